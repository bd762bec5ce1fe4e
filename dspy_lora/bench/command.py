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
from dspy_lora.bench.loading import loading
from dspy_lora.bench.over_http import over_http
from dspy_lora.bench.report import entries, head, report, row
from dspy_lora.bench.shapes import ENGINE, RANKS, SHAPES, make_model, publish_adapters
from dspy_lora.bench.workload import adapter_names
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
_NOT_JOINT = ("only", "all", "shape", "rank", "adapters", "words", "answers", "sweep", "picture", "json")
_ADAPTERS, _RANK = 12, 16
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
    parser.add_argument("--calls", type=int, default=192, help="calls a repeat (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=128, help="threads that call (default: %(default)s)")
    parser.add_argument("--words", type=int, metavar="N", help="words of a question's text (default: 30 to 50)")
    parser.add_argument("--answers", type=int, nargs="+", metavar="TOKENS", help="of an answer (default: 16 and 64)")
    parser.add_argument(
        "--sweep", metavar="KEY=V1,V2", help=f"measure for each value of one of {', '.join(sweep.KEYS)}"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the ratios of --sweep over its values")
    parser.add_argument("--repeats", type=int, default=5, help="repeats in turns (default: %(default)s)")
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
    if args.picture:
        if not args.sweep:
            raise ConfigError("--picture draws what --sweep measures. Name the values, as in --sweep rank=8,16,32.")
        picture.require_matplotlib()
    key, points = sweep.points(args.sweep, args) if args.sweep else (None, [args])
    for point in points:  # every mistake shows before the first engine starts
        _check(point)
    return _run_points(args, key, points)


def _run_points(args: argparse.Namespace, key: str | None, points: list[argparse.Namespace]) -> int:
    """Measures point after point; the file is written after each, so that a failure keeps those before it."""
    values, measured = [sweep.value_of(key, point) if key else None for point in points], list[list[Figure]]()
    for value, point in zip(values, points, strict=True):
        if key:
            print(f"{key} = {value}", flush=True)
        with tempfile.TemporaryDirectory(prefix="dspy-lora-bench-") as folder:
            measured.append(_measure(_bench(point, Path(folder)), _chosen(point)))
        if args.json:
            found = [entries(figures) for figures in measured]
            several = [{key: value, "figures": figures} for value, figures in zip(values, found, strict=False)]
            written = report(args, {"sweep": key, "points": several} if key else {"figures": found[0]})
            args.json.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    if args.picture:
        picture.draw(str(key), values, measured, args.picture)
    return 0 if all(figure.holds in (True, None) for figures in measured for figure in figures) else 1


def _check(args: argparse.Namespace) -> None:
    """Refuses what does not go together.

    Raises:
        ConfigError: A rank or number of adapters that cannot be, or without a shape; a measurement that has none.
    """
    _engine(args.engine)
    if not args.shape:
        for flag in ("rank", "adapters"):
            if getattr(args, flag) is not None:
                raise ConfigError(f"--{flag} is of the adapters that --shape makes. Name a shape: {', '.join(SHAPES)}.")
        return
    if args.rank is not None and args.rank not in RANKS:
        raise ConfigError(f"--rank {args.rank}: vLLM takes {', '.join(map(str, RANKS))}.")
    if args.adapters is not None and not 1 <= args.adapters <= _MOST_ADAPTERS:
        raise ConfigError(f"--adapters {args.adapters}: give 1 to {_MOST_ADAPTERS}.")
    if refused := [name for name in args.only or () if name in _SEEDLING_S]:
        raise ConfigError(f"{' and '.join(refused)} always measure the seedling. Leave --shape or them out.")


def _bench(args: argparse.Namespace, folder: Path) -> Bench:
    """What is measured; a model of random weights lies in the folder."""
    given: dict[str, Any] = {"words": (args.words, args.words)} if args.words else {}
    given |= {"answers": args.answers} if args.answers else {}
    model = args.base_model
    if args.shape:
        rank, names = args.rank or _RANK, adapter_names(args.adapters or _ADAPTERS)
        model, registry = str(make_model(args.shape, folder / args.shape)), folder / "registry"
        publish_adapters(args.shape, Path(model), registry, names, rank)
        beneath = ENGINE | {"max_lora_rank": rank, "max_loras": len(names)}
        given |= {"registry": registry, "names": names, "shape": args.shape, "beneath": beneath}
    return Bench(model, _engine(args.engine), args.calls, args.threads, args.repeats, **given)


def _measure(bench: Bench, names: list[str]) -> list[Figure]:
    """Prints figures as they come."""
    figures: list[Figure] = []
    print(head())
    try:
        if not set(names) <= set(_ALONE):
            bench.preload()
        for name in names:
            if name in _ALONE:
                bench.close()
            for figure in MEASUREMENTS[name](bench):
                print(row(figure), flush=True)
                figures.append(figure)
    finally:
        bench.close()
    return figures


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
    left_out = () if args.all else _LONG
    usual = [name for name in MEASUREMENTS if name not in left_out and not (args.shape and name in _SEEDLING_S)]
    return [name for name in MEASUREMENTS if name in (args.only or usual)]
