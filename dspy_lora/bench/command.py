"""``dspy-lora bench``: prints ratios of one run as a table, and writes them as JSON."""

import argparse
import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dspy_lora.adapters.base import SEEDLING
from dspy_lora.bench import measure, picture, sweep
from dspy_lora.bench.adapters import adapters, vllm_lora
from dspy_lora.bench.bench import Bench
from dspy_lora.bench.defaults import defaults
from dspy_lora.bench.figure import Figure
from dspy_lora.bench.latency import latency
from dspy_lora.bench.loading import check_loading, loading
from dspy_lora.bench.over_http import over_http
from dspy_lora.bench.report import effective, head, report, row
from dspy_lora.bench.shapes import RANKS, SHAPES, make_model, publish_adapters
from dspy_lora.bench.workload import adapter_names
from dspy_lora.config import load_config
from dspy_lora.errors import ConfigError

# In this order: those of _ALONE start engines of their own, after the one that the others share has ended.
MEASUREMENTS: dict[str, Callable[[Bench], list[Figure]]] = {
    "throughput": measure.throughput,
    "latency": latency,
    "http": over_http,
    "samples": measure.samples,
    "mixed": measure.mixed,
    "engine-memory": measure.engine_memory,
    "soak": measure.soak,
    "caller-memory": measure.caller_memory,
    "endings": measure.endings,
    "loading": loading,
    "adapters": adapters,
    "vllm-lora": vllm_lora,
    "defaults": defaults,
}

_LONG = ("soak", "endings", "loading", "adapters", "vllm-lora", "defaults")  # minutes
_ALONE = ("caller-memory", "endings", "loading", "adapters", "vllm-lora", "defaults")
_SEEDLING_S = ("caller-memory", "endings")  # their programs are written for it
_ALL_ADAPTERS = ("mixed", "adapters", "vllm-lora")  # they ask every adapter in a repeat
_READ_BY = {
    "answers": ("throughput", "latency", "adapters", "vllm-lora", "defaults"),
    "words": tuple(name for name in MEASUREMENTS if name not in _SEEDLING_S),
}
_NOT_JOINT = (
    "only", "all", "shape", "rank", "adapters", "calls", "words", "answers", "sweep", "picture", "repeats", "json",
)  # fmt: skip
_ADAPTERS, _RANK, _CALLS, _REPEATS = 12, 16, 192, 5
_MOST_ADAPTERS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``dspy-lora bench``."""
    parser.add_argument("--only", nargs="+", choices=list(MEASUREMENTS), metavar="NAME", help=", ".join(MEASUREMENTS))
    parser.add_argument("--all", action="store_true", help=f"what takes long too: {', '.join(_LONG)}")
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--base-model", default=SEEDLING, help="the base model (default: the bundled seedling)")
    base.add_argument("--shape", choices=list(SHAPES), help="instead: random weights of this shape, and their adapters")
    parser.add_argument("--rank", type=int, help=f"of the adapters of --shape (default: {_RANK})")
    parser.add_argument(
        "--adapters", type=int, metavar="N", help=f"of --shape, 1 to {_MOST_ADAPTERS} (default: {_ADAPTERS})"
    )
    parser.add_argument("--engine", default="{}", metavar="JSON", help="engine settings, as LoRALM's engine={...}")
    parser.add_argument("--calls", type=int, help=f"calls a repeat (default: {_CALLS})")
    parser.add_argument("--threads", type=int, default=128, help="threads that call (default: %(default)s)")
    parser.add_argument("--words", type=int, metavar="N", help="words of a question's text (default: 30 to 50)")
    parser.add_argument("--answers", type=int, nargs="+", metavar="TOKENS", help="of an answer (default: 16 and 64)")
    parser.add_argument(
        "--sweep", metavar="KEY=V1,V2", help=f"measure for each value of one of {', '.join(sweep.KEYS)}"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the ratios of --sweep over its values")
    parser.add_argument("--repeats", type=int, help=f"repeats in turns (default: {_REPEATS})")
    parser.add_argument(
        "--joint", type=Path, metavar="DIR", help="instead: LoRAGEPA against its halves, on the domains' rows in DIR"
    )
    parser.add_argument("--metric-calls", type=int, default=800, help="budget of a method (default: %(default)s)")
    parser.add_argument(
        "--programs", type=int, nargs="+", choices=[1, 2, 3], default=[1, 2, 3], help="of --joint (default: all three)"
    )
    parser.add_argument("--seeds", type=int, default=5, help="seeds of --joint (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")


def run(args: argparse.Namespace) -> int:
    """Runs ``dspy-lora bench``.

    Returns:
        0 if every bar holds, else 1.
    """
    for name in ("dspy", "httpx"):  # a warning for each answer that was cut, a line for each request
        logging.getLogger(name).setLevel(logging.ERROR)
    _check_numbers(args)
    if args.joint:
        from dspy_lora.bench import joint

        named = [f"--{name}" for name in _NOT_JOINT if getattr(args, name)]
        if args.base_model != SEEDLING:  # the domains' adapters are the seedling's
            named.append("--base-model")
        if named:
            raise ConfigError(f"{', '.join(named)}: of the other measurements, which --joint takes the place of.")
        places = [number - 1 for number in args.programs]
        joint.run(args.joint, args.metric_calls, args.seeds, args.threads, places, _engine(args.engine))
        return 0
    args.calls, args.repeats = args.calls or _CALLS, args.repeats or _REPEATS
    if args.picture:
        if not args.sweep:
            raise ConfigError("--picture draws what --sweep measures. Name the values, as in --sweep rank=8,16,32.")
        picture.check(args.picture)
    key, points = sweep.points(args.sweep, args) if args.sweep else (None, [args])
    for point in points:  # every mistake shows before the first engine starts
        _check(point)
    return _run_points(args, key, points)


def _run_points(args: argparse.Namespace, key: str | None, points: list[argparse.Namespace]) -> int:
    """Measures point after point; the file is written after each measurement, so that a failure keeps those before."""
    values, measured = [sweep.value_of(key, point) if key else None for point in points], list[list[Figure]]()
    described: list[dict[str, Any]] = []

    def keep(figures: list[Figure]) -> None:
        measured[-1] += figures
        if args.json:
            written = report(args, key, list(zip(described, measured, strict=True)))
            args.json.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")

    for value, point in zip(values, points, strict=True):
        if key:
            print(f"{key} = {value}", flush=True)
        with tempfile.TemporaryDirectory(prefix="dspy-lora-bench-") as folder:
            bench = _bench(point, Path(folder))
            described.append({"value": value} | effective(bench) if key else effective(bench))
            measured.append([])
            _measure(bench, _chosen(point), keep)
    if args.picture:
        picture.draw(str(key), values, measured, args.picture)
    return 0 if all(figure.holds in (True, None) for figures in measured for figure in figures) else 1


def _check_numbers(args: argparse.Namespace) -> None:
    """Raises a ConfigError for a number below 1."""
    for flag in ("calls", "threads", "repeats", "words", "answers", "seeds"):
        given = getattr(args, flag)
        for number in given if isinstance(given, list) else [given]:
            if number is not None and number < 1:
                raise ConfigError(f"--{flag} {number}: give 1 at least.")


def _check(args: argparse.Namespace) -> None:
    """Refuses what does not go together.

    Raises:
        ConfigError: A model, measurements or a file that the other flags do not go with.
    """
    _check_model(args)
    engine, chosen = _engine(args.engine), _chosen(args)
    adapters = (args.adapters or _ADAPTERS) if args.shape else len(load_config().domains)
    for flag, readers in _READ_BY.items():
        if getattr(args, flag) and not set(readers) & set(chosen):
            raise ConfigError(f"--{flag} is read by {', '.join(readers)}. Measure one of them, or leave it out.")
    for name in _ALL_ADAPTERS:
        if name in chosen and args.calls < adapters:
            raise ConfigError(f"--calls {args.calls}: {name} asks {adapters} adapters. Give {adapters} at least.")
    if "loading" in chosen:
        check_loading(adapters, engine)
    for flag in ("json", "picture"):
        path = getattr(args, flag)
        if path and (path.is_dir() or not path.parent.is_dir()):
            raise ConfigError(f"--{flag} {path}: give a file in a folder that is there.")


def _check_model(args: argparse.Namespace) -> None:
    """Raises a ConfigError for what the base model, or its adapters, cannot be."""
    if (args.shape or args.base_model != SEEDLING) and (
        refused := [name for name in args.only or () if name in _SEEDLING_S]
    ):
        raise ConfigError(f"{' and '.join(refused)} always measure the seedling. Leave the other model or them out.")
    if args.shape and args.base_model != SEEDLING:
        raise ConfigError(f"--base-model {args.base_model}: a shape is measured instead of it. Give one of them.")
    if not args.shape:
        for flag in ("rank", "adapters"):
            if getattr(args, flag) is not None:
                raise ConfigError(f"--{flag} is of the adapters that --shape makes. Name a shape: {', '.join(SHAPES)}.")
        return
    if args.rank is not None and args.rank not in RANKS:
        raise ConfigError(f"--rank {args.rank}: vLLM takes {', '.join(map(str, RANKS))}.")
    if args.adapters is not None and not 1 <= args.adapters <= _MOST_ADAPTERS:
        raise ConfigError(f"--adapters {args.adapters}: give 1 to {_MOST_ADAPTERS}.")


def _bench(args: argparse.Namespace, folder: Path) -> Bench:
    """What is measured; a model of random weights lies in the folder."""
    given: dict[str, Any] = {"words": (args.words, args.words)} if args.words else {}
    given |= {"answers": args.answers} if args.answers else {}
    model = args.base_model
    if args.shape:
        rank, names = args.rank or _RANK, adapter_names(args.adapters or _ADAPTERS)
        model, registry = str(make_model(args.shape, folder / args.shape)), folder / "registry"
        publish_adapters(args.shape, Path(model), registry, names, rank)
        beneath = {"load_format": "dummy", "max_lora_rank": rank, "max_loras": len(names)}
        given |= {"registry": registry, "names": names, "shape": args.shape, "beneath": beneath}
    return Bench(model, _engine(args.engine), args.calls, args.threads, args.repeats, **given)


def _measure(bench: Bench, names: list[str], keep: Callable[[list[Figure]], None]) -> None:
    """Prints figures, and hands them over, as they come."""
    print(head())
    try:
        if not set(names) <= set(_ALONE):
            bench.preload()
        for name in names:
            if name in _ALONE:
                bench.close()
            figures = MEASUREMENTS[name](bench)
            print(*map(row, figures), sep="\n", flush=True)
            keep(figures)
    finally:
        bench.close()


def _engine(text: str) -> dict[str, Any]:
    try:
        engine = json.loads(text)
    except ValueError as exc:
        raise ConfigError(f"--engine {text!r} is no JSON: {exc}") from exc
    if not isinstance(engine, dict):
        raise ConfigError(f"--engine {text!r}: give an object, like '{{\"max_loras\": 4}}'")
    return engine


def _chosen(args: argparse.Namespace) -> list[str]:
    """The measurements that run, in their order."""
    left_out: tuple[str, ...] = () if args.all else _LONG
    if args.shape or args.base_model != SEEDLING:
        left_out += _SEEDLING_S
    usual = [name for name in MEASUREMENTS if name not in left_out]
    return [name for name in MEASUREMENTS if name in (args.only or usual)]
