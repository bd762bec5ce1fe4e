"""Log-probability of plain text, window by window, through transformers and PEFT."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dspy_lora.adapters.base import Base
from dspy_lora.errors import DataError
from dspy_lora.evaluation.likelihood import in_batches

if TYPE_CHECKING:
    import torch

Array = NDArray[np.float64]

WINDOW = 128  # tokens; the first of each is given, the others are predicted
_BATCH = 8  # windows; halved where the GPU's memory does not hold them


@dataclass(frozen=True)
class TextLikelihoods:
    """A text in windows of ``WINDOW`` tokens, the last incomplete one left out.

    Attributes:
        sums: For each system the sum of the log-probabilities of each window's tokens, in nats, (windows,).
        tokens: Predicted tokens of each window, (windows,).
    """

    sums: dict[str, Array]
    tokens: Array


def read_text(file: Path) -> str:
    """Reads a plain text.

    Raises:
        DataError: It cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"--text {file} cannot be read: {exc}. Give a file of plain text in UTF-8.") from exc


def text_windows(text: str, base: Base) -> "torch.Tensor":
    """Token ids of a text in windows, (windows, WINDOW). No chat template is put around it.

    Raises:
        DataError: It fills fewer than two.
        MissingDependencyError: transformers is not installed.
    """
    from dspy_lora.merging.model import load_tokenizer

    return windows(load_tokenizer(base.path)(text, add_special_tokens=False)["input_ids"])


def text_likelihoods(ids: "torch.Tensor", base: Base, adapter: Path, copy: Base | None) -> TextLikelihoods:
    """Runs base, adapter and copy over a text, on the GPU where there is one (in bfloat16 there, else float32).

    Args:
        ids: The text's windows, (windows, WINDOW).
        base: The base model.
        adapter: A PEFT folder for it.
        copy: A fully fine-tuned copy of it; None for none.

    Returns:
        Sums of ``"base"``, ``"adapter"`` and, where there is one, ``"full copy"``.

    Raises:
        ConfigError: Out of GPU memory with one window at a time.
        MissingDependencyError: PEFT is not installed.
    """
    from peft import PeftModel

    from dspy_lora.merging.model import load_model

    model = PeftModel.from_pretrained(load_model(base.path, _dtype()), adapter).eval()
    sums = {"adapter": _sums(model, ids)}
    with model.disable_adapter():
        sums["base"] = _sums(model, ids)
    del model
    if copy is not None:
        sums["full copy"] = _sums(load_model(copy.path, _dtype()), ids)
    return TextLikelihoods(sums, np.full(len(ids), WINDOW - 1, dtype=np.float64))


def windows(tokens: list[int]) -> "torch.Tensor":
    """Cuts token ids into windows, (windows, WINDOW).

    Raises:
        DataError: They fill fewer than two.
    """
    import torch

    count = len(tokens) // WINDOW
    if count < 2:
        raise DataError(f"the text has {len(tokens):,} tokens. Give at least {2 * WINDOW}; some thousands say more.")
    return torch.tensor(tokens[: count * WINDOW]).view(count, WINDOW)


def _dtype() -> "torch.dtype":
    import torch

    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def _sums(model: Any, ids: "torch.Tensor") -> Array:
    """Sum of the log-probabilities of each window's tokens but the first, (windows,)."""

    def run(batch: Sequence[int]) -> Array:
        return _window_sums(model, ids[list(batch)].to(model.device))

    return np.concatenate([found for _, found in in_batches(run, range(len(ids)), _BATCH, "leave --text out")])


def _window_sums(model: Any, ids: "torch.Tensor") -> Array:
    """The same of one batch."""
    import torch

    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        chosen = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]
        return np.asarray(chosen.sum(1).double().cpu().numpy())
