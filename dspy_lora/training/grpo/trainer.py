"""An adapter in training: what a step of GRPO does to it."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspy_lora.adapters.base import Base
from dspy_lora.errors import DataError, DivergedError
from dspy_lora.training.data import prompt_ids
from dspy_lora.training.grpo.batch import Answer, Batch
from dspy_lora.training.grpo.loss import advantages, deviation, token_losses, token_weights
from dspy_lora.training.grpo.settings import GRPOSettings
from dspy_lora.training.loading import load_base, lora_config, require_packages
from dspy_lora.training.publishing import save_adapter
from dspy_lora.training.sft import SMALL_MODEL

if TYPE_CHECKING:
    import torch

Group = list[dict[str, Any]]


class GroupTrainer:
    """An adapter in training: base, LoRA weights and optimizer.

    Args:
        settings: The run's settings.
        base: The base model.
        parent: Folder of the adapter to go on from; None starts a fresh one.
        temperature: What the answers are sampled at; log-probabilities are taken at it too.
        max_tokens: Longest answer that is sampled.
        folder: The run's folder; the adapter lands in ``folder/adapter`` after each step.
    """

    def __init__(
        self, settings: GRPOSettings, base: Base, parent: Path | None, temperature: float, max_tokens: int, folder: Path
    ) -> None:
        import torch
        from peft import PeftModel, get_peft_model
        from transformers import set_seed

        config = settings.loading(folder)
        require_packages(config)
        set_seed(settings.seed)
        self.settings, self.base, self.folder = settings, base, folder
        self.temperature, self.max_tokens = temperature, max_tokens
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model, self.tokenizer = load_base(config, base)
        self.context: int = model.config.get_text_config().max_position_embeddings
        self.model: Any = (
            PeftModel.from_pretrained(model, str(parent), is_trainable=True)
            if parent
            else get_peft_model(model, lora_config(config))
        )
        self._prepare()
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.start = [weight.detach().clone() for weight in self.weights] if settings.beta else []
        self.optimizer = torch.optim.AdamW(self.weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)

    def _prepare(self) -> None:
        """float32 LoRA weights, no dropout, and less memory for a large base."""
        import torch

        self.model.to(self.device).train()
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for weight in self.model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
        if self.settings.gradient_checkpointing and self.model.num_parameters() >= SMALL_MODEL:
            self.model.enable_input_require_grads()
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def step(self, groups: Sequence[Group]) -> dict[str, float]:
        """Trains on one batch and saves the adapter.

        Args:
            groups: ``{"messages", "completion", "reward"}`` of each answer, group by group.

        Returns:
            Figures of the step. ``steps`` is how many optimizer steps it took: 0 where no group has answers of
            different rewards and ``beta`` is 0, so that there is nothing to learn.

        Raises:
            DataError: A reward is no finite number, the base's chat template refuses the messages, or no answer fits
                ``max_length``.
            DivergedError: The loss is no longer a number; the weights are as the iteration before left them.
        """
        started = time.monotonic()
        _check_rewards(groups)
        answers = self._answers(groups)
        weights = token_weights([len(answer.tokens) for answer in answers], self.settings.loss_type, self.max_tokens)
        telling = [pair for pair in zip(answers, weights, strict=True) if pair[0].advantage or self.settings.beta]
        rewards = [answer["reward"] for group in groups for answer in group]
        figures = {
            "reward": sum(rewards) / len(rewards),
            "reward_std": deviation(rewards),
            "groups": len(groups),
            "even_groups": sum(len({answer["reward"] for answer in group}) == 1 for group in groups),
            "answers": len(answers),
            "answer_tokens": sum(len(answer.tokens) for answer in answers) / len(answers),
        }
        figures |= self._train(telling) if telling else {"steps": 0}
        save_adapter(self.model, self.base, self.folder / "adapter", self.settings.adapter_dtype)
        return figures | {"train_seconds": round(time.monotonic() - started, 3)}

    def move(self, device: Any) -> None:
        """Moves weights and optimizer, to leave the GPU to the engine and to come back."""
        import torch

        self.model.to(device)
        self.start = [weight.to(device) for weight in self.start]
        self.optimizer.load_state_dict(self.optimizer.state_dict())  # which puts the moments where the weights are
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _answers(self, groups: Sequence[Group]) -> list[Answer]:
        everything = [answer for group in groups for answer in group]
        gains = advantages([[answer["reward"] for answer in group] for group in groups], self.settings.scale_rewards)
        prompts = prompt_ids(self.tokenizer, [answer["messages"] for answer in everything])
        texts = [answer["completion"]["content"] for answer in everything]
        tokens = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        most = min(self.settings.max_length or self.context, self.context)
        found = []
        for prompt, ids, gain in zip(prompts, tokens, [gain for group in gains for gain in group], strict=True):
            whole = ids if len(ids) >= self.max_tokens else [*ids, self.tokenizer.eos_token_id]
            if len(prompt) + len(whole) <= most:
                found.append(Answer(prompt, whole, gain))
        if not found:
            raise DataError(f"no answer fits max_length={most} together with its prompt. Raise max_length.")
        return found

    def _train(self, answers: list[tuple[Answer, float]]) -> dict[str, float]:
        """``num_iterations`` optimizer steps on the batch, each over all of it."""
        batches = self._batches(answers)
        with self._as_at_start():
            reference = [self._frozen_logps(batch) if self.settings.beta else None for batch in batches]
        old = [self._frozen_logps(batch) for batch in batches] if self.settings.num_iterations > 1 else None
        figures: dict[str, float] = {}
        for _ in range(self.settings.num_iterations):
            figures = self._iterate(batches, old, reference)
        return figures | {"steps": self.settings.num_iterations}

    def _iterate(self, batches: list[Batch], old: list[Any] | None, reference: list[Any]) -> dict[str, float]:
        import torch

        self.optimizer.zero_grad()
        total, divergence = 0.0, 0.0
        for place, batch in enumerate(batches):
            logps = self._logps(batch)
            before = logps.detach() if old is None else old[place]
            losses = token_losses(logps, before, batch.advantage, self.settings, reference[place])
            loss = (losses * batch.weights).sum()
            loss.backward()
            total += loss.item()
            if reference[place] is not None:
                apart = (reference[place] - logps.detach()) * batch.mask
                divergence += (apart.exp() - apart - 1).sum().item()
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.settings.max_grad_norm).item()
        if not math.isfinite(total) or not math.isfinite(norm):
            self.optimizer.zero_grad()
            raise DivergedError(f"the GRPO loss is {total} (gradient {norm}). Use a smaller learning_rate.")
        self.optimizer.step()
        tokens = sum(int(batch.mask.sum()) for batch in batches)
        return {"loss": total, "grad_norm": norm} | ({"kl": divergence / tokens} if self.settings.beta else {})

    def _batches(self, answers: list[tuple[Answer, float]]) -> list[Batch]:
        """Parts of the batch that one forward pass takes, answers of like length together."""
        ordered = sorted(answers, key=lambda pair: len(pair[0].prompt) + len(pair[0].tokens))
        size = self.settings.micro_batch_size
        parts = [ordered[at : at + size] for at in range(0, len(ordered), size)]
        return [Batch.of(part, self.tokenizer.pad_token_id, self.device) for part in parts]

    def _logps(self, batch: Batch) -> "torch.Tensor":
        """Log-probabilities of the answers' tokens at the sampling temperature, (answers, tokens)."""
        width = batch.answers.shape[1]
        logits = self.model(
            input_ids=batch.ids, attention_mask=batch.attention, logits_to_keep=width + 1, use_cache=False
        ).logits[:, :-1]
        scaled = logits.float() / self.temperature
        chosen: torch.Tensor = scaled.gather(-1, batch.answers.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)
        return chosen

    def _frozen_logps(self, batch: Batch) -> "torch.Tensor":
        import torch

        with torch.no_grad():
            return self._logps(batch)

    @contextlib.contextmanager
    def _as_at_start(self) -> Iterator[None]:
        """The policy that the run started with, where ``beta`` made us keep it."""
        now = [weight.data for weight in self.weights] if self.start else []
        for weight, start in zip(self.weights, self.start, strict=False):
            weight.data = start
        try:
            yield
        finally:
            for weight, data in zip(self.weights, now, strict=False):
                weight.data = data


def _check_rewards(groups: Sequence[Group]) -> None:
    for reward in (answer["reward"] for group in groups for answer in group):
        if not isinstance(reward, int | float) or not math.isfinite(reward):
            raise DataError(f"a reward is {reward!r}. The metric must return a finite number for every answer.")
