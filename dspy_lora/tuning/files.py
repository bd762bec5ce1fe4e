"""The files of settings that vLLM reads, and the record of what they are for; engine/gpu_tuned.py reads both."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dspy_lora import __version__
from dspy_lora.adapters.disk import staging, write, writing
from dspy_lora.engine.gpu_shapes import Op
from dspy_lora.engine.gpu_tiles import VERSION
from dspy_lora.engine.gpu_tuned import RECORD, names, read
from dspy_lora.errors import ConfigError
from dspy_lora.tuning.problem import Problem
from dspy_lora.tuning.search import Outcome
from dspy_lora.tuning.settings import default

OPS: tuple[Op, ...] = ("shrink", "expand")


def conditions(gpu: str, vllm: str) -> dict[str, Any]:
    """What times depend on besides problem and setting."""
    return {"gpu": gpu, "vllm": vllm, "kernels": VERSION}


def require_same(folder: Path, gpu: str, vllm: str) -> None:
    """Checks that a folder's settings, if it has any, are of this GPU, this version of vLLM and these kernels.

    Raises:
        ConfigError: They are not, or cannot be read.
    """
    record = read(folder / RECORD)
    for key, asked in conditions(gpu, vllm).items():
        if record and record.get(key) != asked:
            raise ConfigError(f"{folder} is tuned for {key} {record.get(key)!r}, not {asked!r}: give another --output.")


def require_same_tokens(folder: Path, gpu: str, problems: Iterable[Problem]) -> None:
    """Checks that all of a folder's products and ranks are tuned for the same batch sizes once these problems are too.

    vLLM goes to the nearest number of tokens first and to a width after: one that is missing there would get another's
    setting, so an engine takes none.

    Raises:
        ConfigError: They would not be, or a file cannot be read.
    """
    usual = [Outcome(problem, 0, default(problem), 0) for problem in problems]
    for op in OPS:
        data = _merged(read(folder / names(gpu, op)[0]), [each for each in usual if each.problem.product.op == op])
        for by_tokens in (by_tokens for by_slices in data.values() for by_tokens in by_slices.values()):
            widths = {frozenset((k, n) for k in found for n in found[k]) for found in by_tokens.values()}
            if len(widths) > 1:
                sizes = ", ".join(sorted(by_tokens, key=int))
                raise ConfigError(
                    f"{folder} is tuned for other batch sizes: with these there would be {sizes} tokens, and an engine "
                    "wants each of its products at all of them. Give the --tokens of the runs before, or another "
                    "--output."
                )


def save(folder: Path, gpu: str, vllm: str, model: str, outcomes: Iterable[Outcome]) -> None:
    """Writes settings, beside those that a folder has; each file changes in full or not at all.

    Args:
        folder: Where to.
        gpu: Its name, as torch has it.
        vllm: vLLM's version.
        model: Whose shapes these are, for the record.
        outcomes: What the search chose.

    Raises:
        ConfigError: The folder's files are of another GPU, of other versions, or cannot be read.
        PublishError: The disk refused.
    """
    require_same(folder, gpu, vllm)
    found = list(outcomes)
    record = read(folder / RECORD) | conditions(gpu, vllm) | {"dspy_lora": __version__}
    models = record.setdefault("models", {})
    models[model] = _record(found, models.get(model, {}))
    texts = {RECORD: json.dumps(record, indent=2) + "\n"}
    for op in OPS:
        of_op = [outcome for outcome in found if outcome.problem.product.op == op]
        for name in names(gpu, op):
            texts[name] = json.dumps(_merged(read(folder / name), of_op)) + "\n"
    with writing("write tuned settings", folder), staging(folder) as new:
        for name, text in texts.items():
            write(new / name, text)
            (new / name).replace(folder / name)


def _merged(data: dict[str, Any], outcomes: list[Outcome]) -> dict[str, Any]:
    """Puts settings where vLLM looks for them: ``[max_loras + 1][slices][m][k][n]``."""
    for outcome in sorted(outcomes, key=lambda outcome: outcome.problem.tokens):
        problem, place = outcome.problem, data
        for key in (problem.max_loras + 1, problem.product.slices, problem.tokens, problem.inputs):
            place = place.setdefault(str(key), {})
        place[str(problem.outputs)] = outcome.setting.as_vllm()
    return data


def _record(outcomes: list[Outcome], before: dict[str, Any]) -> dict[str, Any]:
    """What a model is tuned for, by earlier runs too."""
    problems = [outcome.problem for outcome in outcomes]
    tuned: dict[str, set[Any]] = {
        "products": {str(problem.product) for problem in problems},
        "ranks": {problem.rank for problem in problems},
        "max_loras": {problem.max_loras for problem in problems},
        "tokens": {problem.tokens for problem in problems},
    }
    return {name: sorted(values | set(before.get(name, ()))) for name, values in tuned.items()}
