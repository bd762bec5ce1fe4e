"""Log-probability of the reference answers with an adapter and without, through transformers and PEFT."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dspy_lora.adapters.base import Base
from dspy_lora.errors import AdapterError, ConfigError, MissingDependencyError
from dspy_lora.training.data import ChatExample, Tokens, tokenize

if TYPE_CHECKING:
    import torch

Array = NDArray[np.float64]

_BATCH = 16  # rows; halved where the GPU's memory does not hold them


@dataclass(frozen=True)
class Likelihoods:
    """Reference answers, in the rows' order less those that are too long.

    Attributes:
        adapter: Sum of the log-probabilities of each answer's tokens with the adapter, in nats, (rows,).
        base: The same of the base model alone.
        tokens: Tokens of each answer, its end-of-sequence token included, (rows,).
        left_out: Rows whose prompt and answer pass the model's context.
    """

    adapter: Array
    base: Array
    tokens: Array
    left_out: int


def likelihoods(base: Base, adapter: Path, examples: Sequence[ChatExample], batch_size: int = _BATCH) -> Likelihoods:
    """Runs both over the examples, batch by batch, on the GPU where there is one (in bfloat16 there, else float32).

    Args:
        base: The base model.
        adapter: A PEFT folder for it.
        examples: Rendered rows.
        batch_size: Rows in one batch at first.

    Raises:
        AdapterError: PEFT cannot load the adapter on this base.
        ConfigError: Out of GPU memory with one row at a time.
        DataError: No row fits the model's context, or the base has no chat template.
        MissingDependencyError: transformers or PEFT are not installed.
    """
    model, tokenizer = _load(base, adapter)
    context = model.config.get_text_config().max_position_embeddings
    rows, left_out = tokenize(tokenizer, examples, context)
    order = sorted(range(len(rows)), key=lambda i: rows[i]["length"])
    sums = np.zeros((2, len(rows)))

    def run(batch: Sequence[int]) -> Array:
        return _batch(model, [rows[i] for i in batch])

    for batch, found in in_batches(run, order, batch_size, "leave perplexity out with --no-perplexity"):
        sums[:, batch] = found
    tokens = np.array([sum(label != -100 for label in row["labels"]) for row in rows], dtype=np.float64)
    return Likelihoods(sums[0], sums[1], tokens, left_out)


def in_batches(
    run: Callable[[Sequence[int]], Array], order: Sequence[int], size: int, otherwise: str
) -> Iterator[tuple[Sequence[int], Array]]:
    """Runs a model over rows in batches, smaller ones from where the GPU's memory does not hold one.

    Args:
        run: What is done with a batch, given its rows' places.
        order: The places of all rows.
        size: Rows in a batch at first.
        otherwise: What an error advises beside the CPU.

    Yields:
        The places of a batch, and what ``run`` returned for it.

    Raises:
        ConfigError: Out of GPU memory with one row at a time.
    """
    import torch

    while order:
        batch = order[:size]
        try:
            found = run(batch)
        except torch.OutOfMemoryError as exc:
            if len(batch) == 1:
                raise ConfigError(
                    "out of GPU memory: a single row does not fit beside the base. Run it on the CPU "
                    f"(CUDA_VISIBLE_DEVICES=), or {otherwise}."
                ) from exc
            found = None
        if found is None:  # outside the except clause, where the traceback holds the batch's tensors no longer
            torch.cuda.empty_cache()
            size = len(batch) // 2
            continue
        yield batch, found
        order = order[len(batch) :]


def free_gpu() -> None:
    """Gives the GPU back the memory of models that are done with: an engine that starts next asks for most of it."""
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()


def require_packages() -> None:
    """Raises a MissingDependencyError where PEFT is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as exc:
        raise MissingDependencyError(
            f"perplexity needs {exc.name!r}, which is not installed. Run: pip install 'dspy-lora[train]', or leave it "
            "out with --no-perplexity."
        ) from exc


def _load(base: Base, adapter: Path) -> tuple[Any, Any]:
    """The base with the adapter on it, and its tokenizer."""
    require_packages()
    import torch
    from peft import PeftModel
    from safetensors import SafetensorError

    from dspy_lora.merging.model import load_model, load_tokenizer

    half = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    model = load_model(base.path, torch.bfloat16 if half else torch.float32)
    try:
        return PeftModel.from_pretrained(model, adapter).eval(), load_tokenizer(base.path)
    except (ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as exc:
        raise AdapterError(
            f"{adapter}: PEFT cannot load it on base {base.name!r}: {exc} Name the base that it was trained on with "
            "--base-model."
        ) from exc


def _batch(model: Any, rows: Sequence[Tokens]) -> Array:
    """Log-probability of each row's answer, (adapter and base, rows)."""
    import torch

    ids, mask, labels = _padded(rows, model.device)
    with torch.inference_mode():
        ours = _sums(model, ids, mask, labels)
        with model.disable_adapter():
            theirs = _sums(model, ids, mask, labels)
    return torch.stack([ours, theirs]).double().cpu().numpy()


def _padded(rows: Sequence[Tokens], device: Any) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
    """Token ids, attention mask and labels, each (rows, longest row), padded on the left: the answers end together."""
    import torch

    width = max(row["length"] for row in rows)
    ids, mask = torch.zeros((2, len(rows), width), dtype=torch.long)
    labels = torch.full((len(rows), width), -100)
    for i, row in enumerate(rows):
        ids[i, width - row["length"] :] = torch.tensor(row["input_ids"])
        labels[i, width - row["length"] :] = torch.tensor(row["labels"])
        mask[i, width - row["length"] :] = 1
    return ids.to(device), mask.to(device), labels.to(device)


def _sums(model: Any, ids: "torch.Tensor", mask: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
    """Sum of the log-probabilities of the labelled tokens, (rows,)."""
    longest = int((labels != -100).sum(1).max())
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=longest + 1, use_cache=False)
    labels = labels[:, -longest:]
    chosen = out.logits[:, :-1].float().log_softmax(-1).gather(2, labels.clamp(min=0)[:, :, None])[:, :, 0]
    return (chosen * (labels != -100)).sum(1)
