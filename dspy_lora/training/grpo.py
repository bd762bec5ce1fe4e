"""GRPO on groups that were sampled elsewhere: the loss, and the process that trains an adapter with it.

    python -m dspy_lora.training.grpo

reads one JSON object a line from its standard input and answers each with one on its standard output; what libraries
print goes to standard error. It holds base, adapter and optimizer from one step to the next (loading takes seconds) and
ends with its parent, in the middle of a step too.

The loss is that of TRL's GRPOTrainer (trl 1.16, ``_compute_loss``), which a test compares; the trainer itself samples
by its own means and imports vLLM, which this process must not.
"""

import contextlib
import json
import math
import os
import queue
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

import pydantic

from dspy_lora.adapters.base import Base
from dspy_lora.errors import DataError, DivergedError, DspyLoraError, TrainingError
from dspy_lora.training.data import prompt_ids
from dspy_lora.training.loading import load_base, lora_config, require_packages
from dspy_lora.training.publishing import save_adapter
from dspy_lora.training.run import Run
from dspy_lora.training.settings import SEVEN_PROJECTIONS, TrainConfig
from dspy_lora.training.sft import SMALL_MODEL

if TYPE_CHECKING:
    import torch

Group = list[dict[str, Any]]

# Keeps the advantages of a group with nearly equal rewards finite (TRL's GRPOTrainer).
_STD_FLOOR = 1e-4

_PARENT_POLL_S = 2.0


class GRPOSettings(pydantic.BaseModel):
    """What ``dspy.GRPO(train_kwargs={...})`` may set for a LoRALM; named as in trl.GRPOConfig and peft.LoraConfig.

    Attributes:
        adapter: Name of the adapter in the registry; None is ``"legal-grpo"`` where ``"legal"`` goes on, and
            ``"base-grpo"`` for a fresh one.
        output_dir: Where the run's folder (metrics, log, the adapters of the last steps) lands; None is DSPy's own
            place (``DSPY_FINETUNEDIR``).
        learning_rate: Of AdamW; constant, since DSPy does not say how many steps there will be.
        max_grad_norm: The gradient is cut to this length.
        beta: Weight of the KL divergence (k3 estimate, nats a token) from the policy that the run starts with.
        epsilon: The probability ratio counts down to ``1 - epsilon``.
        epsilon_high: And up to ``1 + epsilon_high``; None is ``epsilon``, DAPO (2503.14476) proposes 0.28.
        num_iterations: Optimizer steps on one batch. With one, all ratios are 1 and nothing is clipped.
        loss_type: How token losses are averaged: over each answer, then over answers ("grpo", 2402.03300); over all
            tokens of the batch ("dapo"); over the largest possible number of tokens ("dr_grpo", 2503.20783).
        scale_rewards: Divide advantages by the standard deviation of the rewards in the group or the batch, or not at
            all (as "dr_grpo" wants).
        num_generations: Answers in a group; DSPy sets it, nothing here depends on it.
        micro_batch_size: Answers in one forward pass.
        max_length: Longest prompt and answer in tokens; None is the base's context. A longer answer counts in its
            group's mean reward and is not trained on.
        lora_dropout: Of a fresh adapter. Training switches it off: it would move the ratios.
        keep: Revisions of the last steps that stay on the disk, beside checkpoints.
        share_gpu: Whether the engine ends for each step and the trainer leaves the GPU after it; None does so where
            both need the same GPU and the engine may take more than half of it.
        adapter_dtype: Number format of published weights; the trainer's own stay float32.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    adapter: str | None = None
    output_dir: Path | None = None
    learning_rate: float = pydantic.Field(default=1e-4, gt=0)
    weight_decay: float = pydantic.Field(default=0.0, ge=0)
    max_grad_norm: float = pydantic.Field(default=1.0, gt=0)
    beta: float = pydantic.Field(default=0.0, ge=0)
    epsilon: float = pydantic.Field(default=0.2, gt=0, lt=1)
    epsilon_high: float | None = pydantic.Field(default=None, gt=0)
    num_iterations: int = pydantic.Field(default=1, gt=0)
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = "dapo"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    num_generations: int | None = pydantic.Field(default=None, gt=0)
    micro_batch_size: int = pydantic.Field(default=8, gt=0)
    max_length: int | None = pydantic.Field(default=None, gt=1)
    r: int = pydantic.Field(default=16, gt=0)
    lora_alpha: int = pydantic.Field(default=32, gt=0)
    lora_dropout: float = pydantic.Field(default=0.05, ge=0, lt=1)
    target_modules: tuple[str, ...] = SEVEN_PROJECTIONS
    use_rslora: bool = True
    qlora: bool = False
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    gradient_checkpointing: bool = True
    seed: int = pydantic.Field(default=0, ge=0)
    keep: int = pydantic.Field(default=2, gt=0)
    share_gpu: bool | None = None
    adapter_dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def loading(self, folder: Path) -> TrainConfig:
        """The same settings as a supervised run has them, to load the base and shape the adapter by."""
        names = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "qlora", "dtype", "seed"}
        return TrainConfig(signature=None, train=[], output_dir=folder, **self.model_dump(include=names))


@dataclass(frozen=True)
class Answer:
    """One sampled answer, ready for the loss.

    Attributes:
        prompt: Token ids.
        tokens: Token ids of the answer, with the end-of-sequence token unless ``max_tokens`` cut it off.
        advantage: By how much it was better than its group.
    """

    prompt: list[int]
    tokens: list[int]
    advantage: float


def advantages(groups: Sequence[Sequence[float]], scale: Literal["group", "batch", "none"]) -> list[list[float]]:
    """Rewards as distances from the group's mean, in standard deviations of the group, of the batch, or as they are.

    Args:
        groups: The rewards of each group.
        scale: What to divide by. The deviation is that of a sample (n - 1), as in TRL; that of one reward is 0.
    """
    everything = [reward for group in groups for reward in group]
    found = []
    for group in groups:
        mean = sum(group) / len(group)
        width = 1.0 if scale == "none" else _deviation(group if scale == "group" else everything) + _STD_FLOOR
        found.append([(reward - mean) / width for reward in group])
    return found


def _deviation(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))


def token_losses(
    logps: "torch.Tensor",
    old_logps: "torch.Tensor",
    advantage: "torch.Tensor",
    settings: GRPOSettings,
    reference_logps: "torch.Tensor | None" = None,
) -> "torch.Tensor":
    """The loss of each token: PPO's clipped ratio times the advantage, and the KL divergence where ``beta`` asks.

    Equation 3 of 2402.03300 with the k3 estimate of the divergence (equation 4), and DAPO's upper bound of its own.

    Args:
        logps: Log-probabilities of the sampled tokens, (answers, tokens).
        old_logps: The same before the first optimizer step on this batch.
        advantage: Of each answer, (answers,).
        settings: epsilon, epsilon_high, beta.
        reference_logps: The same under the reference policy; needed where ``beta`` is not 0.

    Returns:
        (answers, tokens), padding not yet masked.
    """
    ratio = (logps - old_logps).exp()
    high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
    gain = advantage.unsqueeze(1)
    clipped = ratio.clamp(1 - settings.epsilon, 1 + high)
    losses = -(ratio * gain).minimum(clipped * gain)
    if reference_logps is None:
        return losses
    apart = reference_logps - logps
    return losses + settings.beta * (apart.exp() - apart - 1)


def token_weights(lengths: Sequence[int], loss_type: str, max_tokens: int) -> list[float]:
    """What one token of each answer weighs in the loss of the whole batch, so that parts of a batch add up to it.

    Args:
        lengths: Tokens of every answer of the batch.
        loss_type: See ``GRPOSettings``.
        max_tokens: Longest answer that could have been sampled; "dr_grpo" divides by it.
    """
    if loss_type == "dapo":
        return [1 / sum(lengths)] * len(lengths)
    if loss_type == "dr_grpo":
        return [1 / (len(lengths) * max_tokens)] * len(lengths)
    return [1 / (len(lengths) * length) for length in lengths]


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
        self._shuffle = random.Random(settings.seed)

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
            different rewards, so that there is nothing to learn.

        Raises:
            DataError: A group is malformed, or no answer fits ``max_length``.
            DivergedError: The loss is no longer a number; the weights are as before.
        """
        started = time.monotonic()
        answers = self._answers(groups)
        weights = token_weights([len(answer.tokens) for answer in answers], self.settings.loss_type, self.max_tokens)
        telling = [pair for pair in zip(answers, weights, strict=True) if pair[0].advantage or self.settings.beta]
        rewards = [answer["reward"] for group in groups for answer in group]
        figures = {
            "reward": sum(rewards) / len(rewards),
            "reward_std": _deviation(rewards),
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

    def _iterate(self, batches: list["Batch"], old: list[Any] | None, reference: list[Any]) -> dict[str, float]:
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

    def _batches(self, answers: list[tuple[Answer, float]]) -> list["Batch"]:
        """Parts of the batch that one forward pass takes, answers of like length together."""
        ordered = sorted(answers, key=lambda pair: len(pair[0].prompt) + len(pair[0].tokens))
        size = self.settings.micro_batch_size
        parts = [ordered[at : at + size] for at in range(0, len(ordered), size)]
        return [Batch.of(part, self.tokenizer.pad_token_id, self.device) for part in parts]

    def _logps(self, batch: "Batch") -> "torch.Tensor":
        """Log-probabilities of the answers' tokens at the sampling temperature, (answers, tokens)."""
        width = batch.answers.shape[1]
        logits = self.model(
            input_ids=batch.ids, attention_mask=batch.attention, logits_to_keep=width + 1, use_cache=False
        ).logits[:, :-1]
        scaled = logits.float() / self.temperature
        chosen: torch.Tensor = scaled.gather(-1, batch.answers.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)
        return chosen

    def _frozen_logps(self, batch: "Batch") -> "torch.Tensor":
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


@dataclass(frozen=True)
class Batch:
    """Answers padded for one forward pass: prompts to the left, answers to the right.

    Attributes:
        ids: Prompts and answers, (answers, prompt + answer tokens).
        attention: 1 where ``ids`` is no padding.
        answers: The answers' token ids, (answers, answer tokens).
        mask: 1.0 where ``answers`` is no padding.
        weights: What each token weighs in the loss, 0 for padding.
        advantage: (answers,).
    """

    ids: "torch.Tensor"
    attention: "torch.Tensor"
    answers: "torch.Tensor"
    mask: "torch.Tensor"
    weights: "torch.Tensor"
    advantage: "torch.Tensor"

    @classmethod
    def of(cls, part: Sequence[tuple[Answer, float]], pad: int, device: Any) -> "Batch":
        """Pads answers, each with the weight of one of its tokens."""
        import torch

        left = max(len(answer.prompt) for answer, _ in part)
        right = max(len(answer.tokens) for answer, _ in part)
        rows, shown, mask = [], [], []
        for answer, _ in part:
            before, after = left - len(answer.prompt), right - len(answer.tokens)
            rows.append([pad] * before + answer.prompt + answer.tokens + [pad] * after)
            shown.append([0] * before + [1] * (left - before + right - after) + [0] * after)
            mask.append([1.0] * len(answer.tokens) + [0.0] * after)
        ids, marks = torch.tensor(rows, device=device), torch.tensor(mask, device=device)
        weights = torch.tensor([weight for _, weight in part], device=device).unsqueeze(1)
        gains = torch.tensor([answer.advantage for answer, _ in part], device=device)
        return cls(ids, torch.tensor(shown, device=device), ids[:, left:], marks, marks * weights, gains)


class _Server:
    """Answers the lines of the parent."""

    def __init__(self) -> None:
        self.trainer: GroupTrainer | None = None
        self.run: Run | None = None
        self.steps = 0
        self.turns = False

    def load(
        self, settings: dict[str, Any], base: dict[str, Any], parent: str | None, folder: str, turns: bool, **rest: Any
    ) -> dict[str, Any]:
        """Loads the base and the adapter; ``turns`` leaves the GPU between steps."""
        chosen, place = GRPOSettings.model_validate(settings), Path(folder)
        self.run = Run(place, "grpo", quiet=True)
        self.turns = turns
        self.card = {"base": base, "parent": parent, "config": settings, "sampling": rest}
        self.trainer = GroupTrainer(chosen, Base(**base), Path(parent) if parent else None, folder=place, **rest)
        self._leave()
        return {"device": self.trainer.device.type, "parameters": sum(w.numel() for w in self.trainer.weights)}

    def step(self, groups: list[Group]) -> dict[str, Any]:
        """One step; its figures go to ``metrics.jsonl`` too."""
        if self.trainer is None or self.run is None:
            raise TrainingError("a step was asked for before the model was loaded.")
        if self.turns:
            self.trainer.move(self.trainer.device)
        try:
            figures = self.trainer.step(groups)
        finally:
            self._leave()
        self.steps += 1
        self.run.log(self.steps, **figures)
        return figures

    def end(self) -> dict[str, Any]:
        """Writes the run's card."""
        if self.run is not None:
            self.run.close(name="grpo", steps=self.steps, **self.card)
        return {}

    def _leave(self) -> None:
        if self.turns and self.trainer is not None:
            self.trainer.move("cpu")


def _answer(work: Callable[..., dict[str, Any]], arguments: dict[str, Any]) -> dict[str, Any]:
    """Does one piece of work; what it raises becomes an answer too, the traceback goes to the log."""
    import torch

    try:
        return {"value": work(**arguments)}
    except DspyLoraError as exc:
        return {"error": type(exc).__name__, "message": str(exc)}
    except (torch.OutOfMemoryError, MemoryError) as exc:
        traceback.print_exc()
        advice = "Use a smaller micro_batch_size or max_length, qlora, or share_gpu."
        return {"error": TrainingError.__name__, "message": f"out of memory: {str(exc).splitlines()[0]} {advice}"}
    except Exception as exc:  # noqa: BLE001 - the parent raises it
        traceback.print_exc()
        return {"error": TrainingError.__name__, "message": f"{type(exc).__name__}: {exc}"}


def _requests() -> "queue.SimpleQueue[dict[str, Any]]":
    """The parent's lines, read beside the work: their end, or another parent, ends this process at once."""
    found: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    parent = os.getppid()

    def read() -> None:
        for line in sys.stdin:
            found.put(json.loads(line))
        os._exit(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_S)
        os._exit(1)

    for target in (read, watch):
        threading.Thread(target=target, daemon=True).start()
    return found


def _replies() -> TextIO:
    """The pipe to the parent, taken away from whoever prints."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return pipe


def main() -> None:
    """Serves until the parent asks for the end."""
    replies, requests, server = _replies(), _requests(), _Server()
    import torch

    def send(reply: dict[str, Any]) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    send({"value": {"cuda": torch.cuda.is_available()}})
    work: dict[str, Callable[..., dict[str, Any]]] = {"load": server.load, "step": server.step, "end": server.end}
    while True:
        request = requests.get()
        name = request.pop("do")
        send(_answer(work[name], request))
        if name == "end":
            break
    os._exit(0)  # the reader waits for a line that will not come


if __name__ == "__main__":
    main()
