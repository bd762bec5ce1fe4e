"""Whether a merged model answers as the unmerged one does."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from dspy_lora.errors import AdapterError, ConfigError, DataError
from dspy_lora.merging.source import Source
from dspy_lora.training.data import Message, Row, prompt_ids
from dspy_lora.training.scoring import greedy

if TYPE_CHECKING:
    import dspy
    import torch
    from transformers import PreTrainedTokenizerBase

LEAST_AGREEMENT = 0.9
_GENERATED = 16  # prompts where there are no rows
_BATCH = 16  # prompts answered together


@dataclass(frozen=True)
class Check:
    """How merged and unmerged answers are compared.

    Attributes:
        rows: Rows with the signature's input fields; None takes 16 generated texts.
        signature: The task; None takes the one that the adapter's training recorded, else ``question -> answer``.
        adapter: DSPy adapter that renders the prompts; None is ``dspy.ChatAdapter()``.
        most: Rows that are answered, the first ones.
        max_tokens: Tokens an answer may take.
        least_agreement: Share of equal answers (0 to 1) below which the result is refused.
    """

    rows: Sequence[Row] | None = None
    signature: "type[dspy.Signature] | None" = None
    adapter: "dspy.Adapter | None" = None
    most: int = 100
    max_tokens: int = 64
    least_agreement: float = LEAST_AGREEMENT

    def __post_init__(self) -> None:
        if not 0 <= self.least_agreement <= 1:
            raise ConfigError(f"least_agreement = {self.least_agreement!r}: it is a share, from 0 to 1.")
        if self.most < 1 or self.max_tokens < 1:
            raise ConfigError(f"most = {self.most!r}, max_tokens = {self.max_tokens!r}: both are at least 1.")

    def prompts(self, source: Source) -> list[list[Message]]:
        """Chat messages to ask.

        Raises:
            DataError: No rows, or a row lacks an input field.
        """
        import dspy

        signature = self.signature or source.signature()
        adapter = self.adapter or dspy.ChatAdapter()
        fields = list(signature.input_fields)
        rows = _generated(fields) if self.rows is None else self.rows[: self.most]
        if not rows:
            raise DataError("there are no rows to compare merged and unmerged answers on. Give rows, or none at all.")
        for number, row in enumerate(rows, start=1):
            if missing := [field for field in fields if field not in row]:
                raise DataError(f"row {number}: no {missing[0]!r} (it has {', '.join(map(repr, row)) or 'nothing'}).")
        return [adapter.format(signature, [], {field: row[field] for field in fields}) for row in rows]


def _generated(fields: Sequence[str]) -> list[Row]:
    from dspy_lora.seedling.sentences import Texts

    random, texts = Random(0), Texts()
    return [{field: texts.text(random, "heldout") for field in fields} for _ in range(_GENERATED)]


@dataclass(frozen=True)
class Agreement:
    """How alike two models answer.

    Attributes:
        prompts: How many were asked.
        equal: Share of them (0 to 1) with the same greedy answer.
        largest_difference: Largest absolute difference, in nats, of the log-probability that the two give a token of
            the unmerged model's answers.
    """

    prompts: int
    equal: float
    largest_difference: float

    def require(self, check: Check, name: str) -> None:
        """Refuses a result that answers differently.

        Raises:
            AdapterError: The share of equal answers is below ``check.least_agreement``.
        """
        if self.equal < check.least_agreement:
            raise AdapterError(
                f"the merged model gives the answers of {name!r} to {self.equal:.1%} of {self.prompts} prompts "
                f"(largest log-probability difference {self.largest_difference:.3g}), and --least-agreement asks for "
                f"{check.least_agreement:.1%}. Nothing was published or written. Take a higher rank, another method or "
                "other weights; or allow it with a lower --least-agreement."
            )


@dataclass(frozen=True)
class Answers:
    """What the unmerged model answers.

    Attributes:
        prompts: Token ids of the prompts.
        texts: Its greedy answers.
        ids: Token ids of the answers, with the end-of-sequence token where they ended by themselves.
        logprobs: For each answer, its tokens' log-probabilities (answer's tokens,).
        max_tokens: Tokens an answer may take.
    """

    prompts: list[list[int]]
    texts: list[str]
    ids: list[list[int]]
    logprobs: "list[torch.Tensor]"
    max_tokens: int

    @classmethod
    def of(cls, model: Any, tokenizer: "PreTrainedTokenizerBase", check: Check, source: Source) -> "Answers":
        """Asks the unmerged model.

        Raises:
            DataError: No row, or none whose prompt and answer fit the model's context.
        """
        context = model.config.get_text_config().max_position_embeddings
        asked = prompt_ids(tokenizer, check.prompts(source))
        prompts = [ids for ids in asked if len(ids) + check.max_tokens <= context]
        if not prompts:
            shortest = min(map(len, asked))
            raise DataError(
                f"no row fits the model's {context} tokens: the shortest prompt takes {shortest}, an answer up to "
                f"{check.max_tokens}. Give shorter rows, or lower --max-tokens."
            )
        texts = greedy(model, tokenizer, prompts, check.max_tokens, _BATCH)
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
        ended = [each if len(each) >= check.max_tokens else [*each, tokenizer.eos_token_id] for each in ids]
        return cls(prompts, texts, ended, _logprobs(model, prompts, ended), check.max_tokens)

    def compare(self, model: Any, tokenizer: "PreTrainedTokenizerBase") -> Agreement:
        """Asks the merged model the same."""
        texts = greedy(model, tokenizer, self.prompts, self.max_tokens, _BATCH)
        same = sum(ours == theirs for ours, theirs in zip(texts, self.texts, strict=True))
        others = _logprobs(model, self.prompts, self.ids)
        apart = max(float((a - b).abs().max()) for a, b in zip(self.logprobs, others, strict=True))
        return Agreement(len(self.prompts), same / len(self.prompts), apart)


def _logprobs(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> "list[torch.Tensor]":
    """Log-probability of each token of each answer."""
    import torch

    found = []
    with torch.inference_mode():
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([prompt + answer], device=model.device)
            logits = model(input_ids=ids, logits_to_keep=len(answer) + 1).logits[0, :-1]
            chosen = ids[0, len(prompt) :, None]
            found.append(logits.float().log_softmax(-1).gather(1, chosen)[:, 0].cpu())
    return found
