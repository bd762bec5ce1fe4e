"""The files of settings that vLLM reads, and whether a folder of them fits an engine.

vLLM takes them from the folder in ``VLLM_TUNED_CONFIG_FOLDER``. It falls back to the nearest number of tokens and the
nearest width, without a word, and fails where the number of slices is missing: so ``find`` asks for exact ones.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dspy_lora import __version__
from dspy_lora.adapters.disk import staging, write, writing
from dspy_lora.errors import ConfigError
from dspy_lora.tuning.problem import Problem
from dspy_lora.tuning.search import Outcome
from dspy_lora.tuning.shapes import Op, Product

RECORD = "tuned.json"


def names(gpu: str, op: Op) -> list[str]:
    """The files in which vLLM looks for an operation's settings (utils.py, load_lora_op_config).

    Expand has two: it adds to its output, or, where VLLM_LORA_ENABLE_DUAL_STREAM is set, overwrites it. Both get what
    was timed with the addition.
    """
    stem = gpu.replace(" ", "_").replace("-", "_")
    return [f"{stem}_SHRINK.json"] if op == "shrink" else [f"{stem}_EXPAND_{add}.json" for add in ("TRUE", "FALSE")]


def require_same(folder: Path, gpu: str, vllm: str) -> None:
    """Checks that a folder's settings, if it has any, are of this GPU and this version of vLLM.

    Raises:
        ConfigError: They are not, or cannot be read.
    """
    record = _read(folder / RECORD)
    for key, asked in (("gpu", gpu), ("vllm", vllm)):
        if record and record.get(key) != asked:
            raise ConfigError(f"{folder} is tuned for {key} {record.get(key)!r}, not {asked!r}: give another --output.")


def save(folder: Path, gpu: str, vllm: str, model: str, outcomes: Iterable[Outcome]) -> None:
    """Writes settings, beside those that a folder has; each file changes in full or not at all.

    Args:
        folder: Where to.
        gpu: Its name, as torch has it.
        vllm: vLLM's version.
        model: Whose shapes these are, for the record.
        outcomes: What the search chose.

    Raises:
        ConfigError: The folder's files are of another GPU or version of vLLM, or cannot be read.
        PublishError: The disk refused.
    """
    require_same(folder, gpu, vllm)
    found = list(outcomes)
    record = _read(folder / RECORD) | {"gpu": gpu, "vllm": vllm, "dspy_lora": __version__}
    record.setdefault("models", {})[model] = _record(found)
    texts = {RECORD: json.dumps(record, indent=2) + "\n"}
    ops: tuple[Op, ...] = ("shrink", "expand")
    for op in ops:
        of_op = [outcome for outcome in found if outcome.problem.product.op == op]
        for name in names(gpu, op):
            texts[name] = json.dumps(_merged(_read(folder / name), of_op)) + "\n"
    with writing("write tuned settings", folder), staging(folder) as new:
        for name, text in texts.items():
            write(new / name, text)
            (new / name).replace(folder / name)


def find(folder: Path, gpu: str, vllm: str, products: Iterable[Product], rank: int, max_loras: int) -> Path | str:
    """Says whether a folder's settings are for an engine.

    Args:
        folder: A folder that ``save`` wrote.
        gpu: The engine's GPU, as torch names it.
        vllm: The engine's version of vLLM.
        products: What its model computes.
        rank: Its ``max_lora_rank``.
        max_loras: Its ``max_loras``.

    Returns:
        The folder, or in a line why it does not fit.
    """
    try:
        record = _read(folder / RECORD)
        if not record:
            return f"there is no {RECORD} in {folder}"
        if record.get("gpu") != gpu:
            return f"{folder} is tuned for {record.get('gpu')}, this is {gpu}"
        if _public(str(record.get("vllm"))) != _public(vllm):
            return f"{folder} is tuned with vLLM {record.get('vllm')}, this is {vllm}"
        for product in products:
            problem = Problem(product, rank, 1, max_loras)
            if not all(_covers(_read(folder / name), problem) for name in names(gpu, product.op)):
                return f"{folder} has no settings for {product} at rank {rank} and max_loras {max_loras}"
    except ConfigError as exc:
        return str(exc)
    return folder


def _read(file: Path) -> dict[str, Any]:
    """A file's object; empty where there is no file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{file} cannot be read ({exc}): remove it, and run `dspy-lora tune` again.") from exc
    if not isinstance(found, dict):
        raise ConfigError(f"{file} holds no JSON object: remove it, and run `dspy-lora tune` again.")
    return found


def _merged(data: dict[str, Any], outcomes: list[Outcome]) -> dict[str, Any]:
    """Puts settings where vLLM looks for them: ``[max_loras + 1][slices][m][k][n]``."""
    for outcome in sorted(outcomes, key=lambda outcome: outcome.problem.tokens):
        problem, place = outcome.problem, data
        for key in (problem.max_loras + 1, problem.product.slices, problem.tokens, problem.inputs):
            place = place.setdefault(str(key), {})
        place[str(problem.outputs)] = outcome.setting.as_vllm()
    return data


def _covers(data: dict[str, Any], problem: Problem) -> bool:
    """Whether vLLM finds the product's own settings, whatever the number of tokens."""
    by_tokens = data.get(str(problem.max_loras + 1), {}).get(str(problem.product.slices), {})
    shape = (str(problem.inputs), str(problem.outputs))
    return bool(by_tokens) and all(shape[1] in widths.get(shape[0], {}) for widths in by_tokens.values())


def _record(outcomes: list[Outcome]) -> dict[str, Any]:
    problems = [outcome.problem for outcome in outcomes]
    return {
        "products": sorted({str(problem.product) for problem in problems}),
        "ranks": sorted({problem.rank for problem in problems}),
        "max_loras": sorted({problem.max_loras for problem in problems}),
        "tokens": sorted({problem.tokens for problem in problems}),
    }


def _public(version: str) -> str:
    """A version without what names its build: 0.32.0 of 0.32.0+cu129."""
    return version.partition("+")[0]
