"""Which folder of tiles, found by `dspy-lora tune`, an engine on an NVIDIA GPU takes, if any.

vLLM takes settings from the folder in ``VLLM_TUNED_CONFIG_FOLDER``. It falls back to the nearest number of tokens and
the nearest width, without a word, and fails where the number of slices is missing: so ``find`` asks for exact ones. A
folder without a record of ours holds settings of vLLM's own kernels, which ours do not take.
"""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dspy_lora.engine.gpu_shapes import Op, Product, products
from dspy_lora.engine.gpu_tiles import VERSION
from dspy_lora.errors import ConfigError

FOLDER = "VLLM_TUNED_CONFIG_FOLDER"
RECORD = "tuned.json"
SHIPPED = Path(__file__).parents[1] / "tuning" / "tuned"  # a folder for each GPU
TILED, TUNED = (f"dspy_lora.engine.gpu_lora.{name}" for name in ("TiledGPUWorker", "TunedGPUWorker"))


def worker(args: dict[str, Any], base: str) -> str:
    """Chooses the engine's tiles, says in a line on standard error which and why, and sets what vLLM reads.

    A folder of ours that nobody is to take settings from is taken out of the environment: vLLM would give those that
    are nearest to its own kernels.

    Args:
        args: The engine's arguments.
        base: The base model's folder.

    Returns:
        The ``worker_cls``: ``TUNED`` where ``VLLM_TUNED_CONFIG_FOLDER`` is for our kernels, else as it was given.
    """
    given, asked = os.environ.get(FOLDER), str(args["worker_cls"])
    is_ours = bool(given) and Path(str(given), RECORD).is_file()
    if is_ours:
        del os.environ[FOLDER]
    if asked not in (TILED, TUNED) or not args["enable_lora"]:
        return asked
    if given and not is_ours:
        _say(f"LoRA tiles by rule: {given} has no {RECORD}, so its settings are for vLLM's own kernels")
        return TILED
    try:
        os.environ[FOLDER] = str(_choose(args, base, given))
    except ConfigError as exc:
        _say(f"LoRA tiles by rule: {exc}")
        return TILED
    return TUNED


def _choose(args: dict[str, Any], base: str, given: str | None) -> Path:
    """The user's folder, or the one that ships for the GPU.

    Raises:
        ConfigError: None fits, and why.
    """
    import vllm

    computed, gpu = _computed(args, base), _gpu()
    reasons = []
    for folder in [*([Path(given)] if given else []), SHIPPED / stem(gpu)]:
        found = find(folder, gpu, vllm.__version__, computed, args["max_lora_rank"], args["max_loras"])
        if isinstance(found, Path):
            _say(f"LoRA tiles from {found}, tuned for {gpu}, vLLM {vllm.__version__}")
            return found
        reasons.append(found if folder.is_dir() else f"none come with dspy-lora for {gpu}")
    raise ConfigError("; ".join(reasons))


def _computed(args: dict[str, Any], base: str) -> list[Product]:
    """What the engine computes.

    Raises:
        ConfigError: It is not known, or not what is timed.
    """
    from vllm import envs

    if envs.VLLM_BATCH_INVARIANT:
        raise ConfigError("VLLM_BATCH_INVARIANT has vLLM's own kernels compute")
    if (parts := args.get("tensor_parallel_size") or 1) > 1:
        raise ConfigError(f"tensor_parallel_size {parts} cuts the products into parts of other shapes")
    if {"float32", "float"} & {args.get("dtype"), args.get("lora_dtype")}:  # two words of vLLM's for one thing
        raise ConfigError("this engine computes in float32, and tiles are timed with bfloat16")
    if not (config := read(Path(base, "config.json"))):
        raise ConfigError(f"there is no {Path(base, 'config.json')} that says the model's shapes")
    return list(products(config | (args.get("hf_overrides") or {})))


def _gpu() -> str:
    """The GPU's name.

    vLLM asks NVML for it. torch would start CUDA in this process, whose children vLLM could then no longer fork.
    """
    from vllm.platforms import current_platform

    try:
        return str(current_platform.get_device_name())
    except Exception as exc:  # whatever NVML raises, an engine runs without tuned tiles
        raise ConfigError(f"the GPU has no name ({exc!r})") from exc


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def stem(gpu: str) -> str:
    """A GPU's name as vLLM writes it in the names of files."""
    return gpu.replace(" ", "_").replace("-", "_")


def names(gpu: str, op: Op) -> list[str]:
    """The files in which vLLM looks for an operation's settings (utils.py, load_lora_op_config).

    Expand has two: it adds to its output, or, where VLLM_LORA_ENABLE_DUAL_STREAM is set, overwrites it. Both get what
    was timed with the addition.
    """
    ends = ["SHRINK"] if op == "shrink" else ["EXPAND_TRUE", "EXPAND_FALSE"]
    return [f"{stem(gpu)}_{end}.json" for end in ends]


def read(file: Path) -> dict[str, Any]:
    """A file's object; empty where there is no file.

    Raises:
        ConfigError: It cannot be read, or holds something else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{file} cannot be read ({exc}): remove it, and run `dspy-lora tune` again.") from exc
    if not isinstance(found, dict):
        raise ConfigError(f"{file} holds no JSON object: remove it, and run `dspy-lora tune` again.")
    return found


def find(folder: Path, gpu: str, vllm: str, computed: Iterable[Product], rank: int, max_loras: int) -> Path | str:
    """Says whether a folder's settings are for an engine.

    Args:
        folder: A folder that `dspy-lora tune` wrote.
        gpu: The engine's GPU, as torch names it.
        vllm: The engine's version of vLLM.
        computed: What its model computes.
        rank: Its ``max_lora_rank``.
        max_loras: Its ``max_loras``.

    Returns:
        The folder, or in a line why it does not fit.
    """
    try:
        record = read(folder / RECORD)
        if not record:
            return f"there is no {RECORD} in {folder}"
        if why := _other_conditions(record, gpu, vllm):
            return f"{folder} is {why}"
        tuned = {product for model in record["models"].values() for product in model["products"]}
        for product in computed:
            files = [read(folder / name) for name in names(gpu, product.op)]
            if str(product) not in tuned or not all(_covers(file, product, rank, max_loras) for file in files):
                return f"{folder} has no settings for {product} at rank {rank} and max_loras {max_loras}"
    except ConfigError as exc:
        return str(exc)
    except (AttributeError, KeyError, TypeError) as exc:
        return f"{folder} holds something else than `dspy-lora tune` writes ({exc!r})"
    return folder


def _other_conditions(record: dict[str, Any], gpu: str, vllm: str) -> str | None:
    if record.get("gpu") != gpu:
        return f"tuned for {record.get('gpu')}, this is {gpu}"
    if _public(str(record.get("vllm"))) != _public(vllm):
        return f"tuned with vLLM {record.get('vllm')}, this is {vllm}"
    if record.get("kernels") != VERSION:
        return f"tuned for version {record.get('kernels')} of dspy-lora's kernels, this is {VERSION}"
    return None


def _covers(data: dict[str, Any], product: Product, rank: int, max_loras: int) -> bool:
    """Whether vLLM finds the product's own settings, whatever the number of tokens."""
    by_tokens = data.get(str(max_loras + 1), {}).get(str(product.slices), {})
    inputs, outputs = map(str, product.sizes(rank))
    return bool(by_tokens) and all(outputs in widths.get(inputs, {}) for widths in by_tokens.values())


def _public(version: str) -> str:
    """A version without what names its build: 0.32.0 of 0.32.0+cu129."""
    return version.partition("+")[0]
