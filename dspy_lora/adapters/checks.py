"""Whether an engine can serve an adapter.

What vLLM would refuse at the first call, or load and then ignore, is refused before it is published. The rules are
vLLM's own (``vllm/lora/peft_helper.py``, ``lora/utils.py``, ``lora/lora_model.py``, read at 0.32), and some for
adapters that it would load and that would then do nothing.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspy_lora.adapters.base import ABSENT, Base
from dspy_lora.adapters.base_modules import Shape, base_modules
from dspy_lora.adapters.peft_config import CONFIG_FILE, PeftConfig, names, read_json, read_peft_config, refuse
from dspy_lora.adapters.weights import Tensor, look, read_header

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "adapter_model.safetensors"
METADATA_FILE = "metadata.json"

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_CONVERT = (
    'python -c "import torch; from safetensors.torch import save_file; '
    "w = torch.load('{name}', map_location='cpu', weights_only=True); "
    "save_file({{k: v.contiguous() for k, v in w.items()}}, 'adapter_model.safetensors')\""
)
_LORA_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True)
class AdapterInfo:
    """What a checked adapter is.

    Attributes:
        rank: Its largest rank, which the engine's ``max_lora_rank`` must reach.
        modules: Number of modules it changes.
        parameters: Number of its weights.
    """

    rank: int
    modules: int
    parameters: int


@dataclass(frozen=True)
class _Pair:
    """The two tensors of one module: A is (rank, inputs), B is (outputs, rank)."""

    a: Tensor
    b: Tensor


def check_adapter(folder: str | Path, base: Base, max_rank: int) -> AdapterInfo:
    """Checks that an engine can serve an adapter on a base model, and that it will change its answers.

    Args:
        folder: ``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT's ``save_pretrained`` writes them.
        base: The base model. Where it is not on this disk, shapes are not compared (one log line says so).
        max_rank: Largest rank that the engine takes.

    Returns:
        What was found.

    Raises:
        AdapterError: It cannot be served; the message says what to do.
    """
    folder = Path(folder)
    config = read_peft_config(folder)
    _check_rank(folder, config, max_rank)
    check_trained_on(folder, read_metadata(folder), base)
    tensors = _read_tensors(folder)
    pairs = _pairs(folder, tensors)
    _check_pair_shapes(folder, config, pairs)
    modules = base_modules(base)
    if modules is None:
        logger.info("%s: base %r cannot be compared here, so the adapter's shapes are not checked.", folder, base.name)
    else:
        _check_fits_base(folder, config, pairs, modules, base)
    _check_targets(folder, config, pairs, modules or {})
    _check_values(folder, config, pairs)
    parameters = sum(tensor.parameters for tensor in tensors.values())
    return AdapterInfo(max(config.rank(module) for module in pairs), len(pairs), parameters)


def _some(names: Iterable[str]) -> str:
    """The first names of a list and how many there are: ``'a', 'b', 'c' (12 in all)``."""
    listed = sorted(names)
    return ", ".join(repr(name) for name in listed[:3]) + (f" ({len(listed)} in all)" if len(listed) > 3 else "")


def _check_rank(folder: Path, config: PeftConfig, max_rank: int) -> None:
    if config.largest_rank > max_rank:
        refuse(
            folder,
            f"its rank {config.largest_rank} is above the engine's {max_rank}. Raise serving.max_lora_rank in "
            f"lora_config.yaml (DSPY_LORA_SERVING__MAX_LORA_RANK), or reduce the rank with `dspy-lora merge`.",
        )


def check_trained_on(folder: Path, metadata: dict[str, Any], base: Base) -> None:
    """Compares the base with the one that training recorded; the name in adapter_config.json is only a hint.

    Raises:
        AdapterError: ``metadata["base_revision"]`` is there and is another base's.
    """
    trained_on = metadata.get("base_revision")
    if trained_on is not None and trained_on != base.revision and ABSENT not in (trained_on, base.revision):
        refuse(
            folder,
            f"it was trained on base revision {trained_on!r}, the base here is {base.name!r} at {base.revision!r}. "
            "Publish it for its own base, or train it on this one.",
        )


def read_metadata(folder: Path) -> dict[str, Any]:
    """What training wrote about the adapter (``metadata.json``); empty where it wrote nothing."""
    return read_json(folder / METADATA_FILE) if (folder / METADATA_FILE).is_file() else {}


def _hint(config: PeftConfig) -> str:
    return f" ({config.base_model_name_or_path!r})" if config.base_model_name_or_path else ""


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
        if pickles:
            command = _CONVERT.format(name=pickles[0])
            refuse(folder, f"{pickles[0]} is a pickle and is not read: it could run code. Convert it there: {command}")
        refuse(folder, f"there is no {WEIGHTS_FILE}. Give a folder that PEFT's save_pretrained wrote.")
    try:
        tensors = read_header(path)
    except (OSError, ValueError) as exc:
        refuse(folder, f"{WEIGHTS_FILE} cannot be used: {exc}. Copy or save the adapter again.")
    if not tensors:
        refuse(folder, f"{WEIGHTS_FILE} holds no tensors. Save the adapter again.")
    return tensors


def _pairs(folder: Path, tensors: dict[str, Tensor]) -> dict[str, _Pair]:
    """Groups the tensors by the module that they change."""
    embeddings = [name for name in tensors if ".lora_embedding_" in name]
    if embeddings:
        refuse(folder, f"it trains embeddings ({_some(embeddings)}). Train again without embedding target_modules.")
    matches = {name: _LORA_TENSOR.fullmatch(name) for name in tensors}
    strange = [name for name, match in matches.items() if match is None]
    if strange:
        refuse(folder, f"{_some(strange)}: not a lora_A or lora_B weight. Save it with PEFT's save_pretrained.")
    sides: dict[str, dict[str, Tensor]] = {}
    for name, match in matches.items():
        if match is not None:
            sides.setdefault(match["module"], {})[match["side"]] = tensors[name]
    halves = [module for module, pair in sides.items() if len(pair) != 2]
    if halves:
        refuse(folder, f"{_some(halves)}: lora_A without lora_B or the reverse. Save the adapter again.")
    return {module: _Pair(pair["A"], pair["B"]) for module, pair in sides.items()}


def _check_pair_shapes(folder: Path, config: PeftConfig, pairs: dict[str, _Pair]) -> None:
    for module, pair in pairs.items():
        a, b, rank = pair.a.shape, pair.b.shape, config.rank(module)
        if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
            refuse(
                folder,
                f"{module}: lora_A {a} and lora_B {b} do not have the rank {rank} that {CONFIG_FILE} says. "
                "Configuration and weights are not of the same adapter; save it again.",
            )


def _check_fits_base(
    folder: Path, config: PeftConfig, pairs: dict[str, _Pair], modules: dict[str, Shape], base: Base
) -> None:
    """Checks that every module exists in the base, with the shape that the adapter expects."""
    mend = f"Publish the adapter for the base that it was trained on{_hint(config)}, or train it on {base.name!r}."
    unknown = [module for module in pairs if module not in modules]
    if unknown:
        refuse(folder, f"the base {base.name!r} has no module {_some(unknown)}: they would do nothing. {mend}")
    for module, pair in pairs.items():
        shape = modules[module]
        expected = (pair.b.shape[0], pair.a.shape[1])
        if shape is not None and expected != (shape[::-1] if config.fan_in_fan_out else shape):
            refuse(
                folder,
                f"{module}: the adapter is for a weight of {expected}, the base {base.name!r} has {shape}. {mend}",
            )


def _check_targets(folder: Path, config: PeftConfig, pairs: dict[str, _Pair], modules: dict[str, Shape]) -> None:
    """Checks that no module that was to be trained is missing from the weights."""
    if config.target_modules is None or config.target_modules == "all-linear":
        return
    if isinstance(config.target_modules, str):
        unmet = [] if any(config.targets(module) for module in pairs) else [config.target_modules]
    else:
        unmet = [target for target in config.target_modules if not any(names(target, module) for module in pairs)]
    if config.exclude_modules is None and config.layers_to_transform is None:
        unmet += [module for module in modules if config.targets(module) and module not in pairs]
    if unmet:
        refuse(
            folder,
            f"target_modules in {CONFIG_FILE} names {_some(unmet)}, the weights hold no tensors for that. Save the "
            f"adapter again; or take a name that this base does not have out of target_modules.",
        )


def _check_values(folder: Path, config: PeftConfig, pairs: dict[str, _Pair]) -> None:
    """Checks that all weights are finite, and that the product of some pair is not zero and is not scaled to zero."""
    if not any(config.alpha(module) for module in pairs):
        refuse(folder, f"lora_alpha in {CONFIG_FILE} is 0: it would change nothing. Give the one it was trained with.")
    acts = False
    for module, pair in pairs.items():
        try:
            finite_a, some_a = look(folder / WEIGHTS_FILE, pair.a)
            finite_b, some_b = look(folder / WEIGHTS_FILE, pair.b)
        except (OSError, ValueError) as exc:
            refuse(folder, f"{module}: {exc}. Save the adapter in float32, bfloat16 or float16.")
        if not (finite_a and finite_b):
            refuse(
                folder, f"{module} holds NaN or infinity: training diverged. Train again with a lower learning rate."
            )
        acts = acts or (some_a and some_b and config.alpha(module) != 0)
    if not acts:
        refuse(folder, "all its lora_B weights (or lora_A) are zero: it would change nothing. It was not trained.")
