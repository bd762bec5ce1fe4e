"""``dspy-lora tune``: finds tile settings for this GPU and a model's shapes, and writes the files that vLLM reads."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dspy_lora.adapters.base import resolve_base
from dspy_lora.config import load_config
from dspy_lora.engine.gpu_shapes import Product, products
from dspy_lora.engine.gpu_tiles import RANKS
from dspy_lora.engine.gpu_tuned import FOLDER
from dspy_lora.errors import ConfigError
from dspy_lora.tuning import files, trials
from dspy_lora.tuning.kernels import Bench, require_gpu
from dspy_lora.tuning.problem import Problem
from dspy_lora.tuning.search import Outcome, Search
from dspy_lora.tuning.trials import Trials

_DECODE = [2**power for power in range(9)]
_PREFILL = [512, 2048, 8192, 16384]
_TOLD = 10  # problems from one line of progress to the next


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``dspy-lora tune``."""
    shapes = parser.add_mutually_exclusive_group()
    shapes.add_argument("--base-model", metavar="MODEL", help="the model to tune for (default: as configured)")
    shapes.add_argument("--config", type=Path, metavar="FILE", help="its config.json alone: no weights are needed")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[16], help="the engine's max_lora_rank, one or more (default: 16)"
    )
    parser.add_argument("--max-loras", type=int, default=12, help="the engine's max_loras (default: %(default)s)")
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=_DECODE + _PREFILL,
        help="batch sizes; an engine's others take the nearest one's settings (default: 1 to 16384)",
    )
    parser.add_argument("--budget-minutes", type=float, default=10, help="time to search (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("tuned"), metavar="DIR", help="files; a run goes on there (default: tuned)"
    )


def run(args: argparse.Namespace) -> int:
    """Runs ``dspy-lora tune``.

    Returns:
        0.

    Raises:
        ConfigError: A flag, a config.json or a folder that cannot be used.
        TuningError: No GPU to tune, or one on which the usual settings fail.
    """
    _check(args)
    model, config = _model(args)
    counts = _problems(products(config), args)
    require_gpu()
    import torch
    import vllm

    gpu = torch.cuda.get_device_name()
    files.require_same(args.output, gpu, vllm.__version__)
    files.require_same_tokens(args.output, gpu, counts)
    known = Trials(args.output / trials.NAME, files.conditions(gpu, vllm.__version__))
    print(f"{model} on {gpu}: {len(counts)} problems; {len(known)} trials known from {args.output / trials.NAME}")
    outcomes = _search(Search(known, Bench().measure, tell=_tell), counts, args.budget_minutes * 60)
    files.save(args.output, gpu, vllm.__version__, model, outcomes)
    for line in sums(outcomes, counts):
        print(line)
    print(f"An engine takes them with {FOLDER}={args.output.resolve()} in its environment.")
    return 0


def _search(search: Search, counts: dict[Problem, int], budget: float) -> list[Outcome]:
    """Runs the search and prints its table row by row."""
    outcomes: list[Outcome] = []
    for outcome in search.run(counts, budget):
        if not outcomes:
            print(_line("product", "rank", "m", "usual us", "tuned us", "ratio", "setting"))
        print(row(outcome), flush=True)
        outcomes.append(outcome)
    return outcomes


def _tell(done: int, total: int) -> None:
    """Shows that something happens before the first row: to compile and time a usual setting takes seconds."""
    if done % _TOLD == 0 or done == total:
        print(f"the usual settings: {done} of {total} problems timed", flush=True)


def _check(args: argparse.Namespace) -> None:
    for flag, values in (("ranks", args.ranks), ("max-loras", [args.max_loras]), ("tokens", args.tokens)):
        if bad := [value for value in values if value < 1]:
            raise ConfigError(f"--{flag} {bad[0]}: give a number from 1.")
    if other := [rank for rank in args.ranks if rank not in RANKS]:
        raise ConfigError(
            f"--ranks {other[0]}: dspy-lora's kernels take {', '.join(map(str, RANKS))}; others run on vLLM's own."
        )
    if args.budget_minutes <= 0:
        raise ConfigError(f"--budget-minutes {args.budget_minutes}: give more than 0.")


def _model(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """A name for the record, and the config."""
    if args.config is None:
        base = resolve_base(args.base_model or load_config().base_model)
        if base.folder is None:
            raise ConfigError(
                f"base model {base.name!r} is not on this disk: download it, or give its config.json (--config FILE)."
            )
        return base.name, _read_config(base.folder / "config.json")
    config = _read_config(args.config)
    return str(config.get("_name_or_path") or args.config.resolve().parent.name), config


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{file} cannot be read: {exc}. Give a model's config.json.") from exc
    if not isinstance(config, dict):
        raise ConfigError(f"{file} holds no JSON object. Give a model's config.json.")
    return config


def _problems(counts: dict[Product, int], args: argparse.Namespace) -> dict[Problem, int]:
    """Every product at every rank and batch size, and how often a layer computes it."""
    return {
        Problem(product, rank, tokens, args.max_loras): count
        for product, count in counts.items()
        for rank in args.ranks
        for tokens in args.tokens
    }


def row(outcome: Outcome) -> str:
    """One line of the table; times in microseconds."""
    problem, chosen = outcome.problem, outcome.setting
    setting = f"{chosen}" if outcome.seconds < outcome.default else "the usual"
    return _times(str(problem.product), problem.rank, problem.tokens, outcome.default, outcome.seconds, setting)


def sums(outcomes: Sequence[Outcome], counts: dict[Problem, int]) -> list[str]:
    """What all products of a layer take together, by rank and batch size and over all of them, before and after."""
    lines = []
    for rank, tokens in sorted({(outcome.problem.rank, outcome.problem.tokens) for outcome in outcomes}):
        alike = [each for each in outcomes if (each.problem.rank, each.problem.tokens) == (rank, tokens)]
        lines.append(_times("a layer", rank, tokens, *_sum(alike, counts)))
    return [*lines, _times("all of these", "", "", *_sum(outcomes, counts))]


def _sum(outcomes: Sequence[Outcome], counts: dict[Problem, int]) -> tuple[float, float]:
    before = sum(each.default * counts[each.problem] for each in outcomes)
    return before, sum(each.seconds * counts[each.problem] for each in outcomes)


def _times(name: str, rank: object, tokens: object, before: float, after: float, setting: str = "") -> str:
    return _line(name, rank, tokens, f"{before * 1e6:.1f}", f"{after * 1e6:.1f}", f"{before / after:.2f}", setting)


def _line(name: str, rank: object, tokens: object, before: str, after: str, ratio: str, setting: str) -> str:
    return f"{name:23}{rank:>5}{tokens:>7}{before:>11}{after:>11}{ratio:>7}  {setting}".rstrip()
