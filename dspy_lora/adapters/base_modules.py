"""The modules of a base model that an adapter can change, read from its files' headers alone."""

import functools
import json
from pathlib import Path

from dspy_lora.adapters.base import Base, weights_files
from dspy_lora.adapters.weights import Tensor, read_header
from dspy_lora.errors import ConfigError

# (outputs, inputs) of a linear module; None where the stored weight is packed and does not show it.
Shape = tuple[int, int] | None


def base_modules(base: Base) -> dict[str, Shape] | None:
    """Lists a base model's linear modules (and embeddings, which have the same form).

    Args:
        base: The base model.

    Returns:
        Shape by module name, named as PEFT names them; None where the model is not on this disk, or where its file's
        names are not its modules' names (models of several parts, such as text and vision).

    Raises:
        ConfigError: The base's files cannot be read.
    """
    if base.folder is None:
        return None
    return _modules(base.folder, base.revision)


@functools.lru_cache(maxsize=16)
def _modules(folder: Path, revision: str) -> dict[str, Shape] | None:
    """The revision is only a part of the cache's key: a base that was replaced is read again."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = {name: tensor for file in weights_files(folder) for name, tensor in read_header(file).items()}
    except (OSError, ValueError) as exc:
        raise ConfigError(f"base model {folder} cannot be read: {exc}. Copy or download it again.") from exc
    if "text_config" in config:
        return None
    modules: dict[str, Shape] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind in ("weight", "qweight") and len(tensor.shape) == 2:
            modules[module] = _shape(kind, tensor)
    if config.get("tie_word_embeddings") and "model.embed_tokens" in modules:
        modules.setdefault("lm_head", modules["model.embed_tokens"])
    return modules


def _shape(kind: str, tensor: Tensor) -> Shape:
    """Shape of a weight; quantised ones (GPTQ, AWQ, 4-bit) are packed, so their stored shape says nothing."""
    if kind == "qweight" or tensor.dtype in ("U8", "I8", "I32"):
        return None
    return (tensor.shape[0], tensor.shape[1])
