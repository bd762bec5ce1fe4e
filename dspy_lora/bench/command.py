"""``dspy-lora bench``: prints ratios of one run as a table, and writes them as JSON."""

import argparse
import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dspy_lora.bench import measure
from dspy_lora.bench.measure import Bench, Figure
from dspy_lora.bench.shapes import ENGINE, SHAPES, make_model, publish_adapters
from dspy_lora.config import load_config
from dspy_lora.errors import ConfigError

# In this order: the last four start engines of their own after this one has ended.
MEASUREMENTS: dict[str, Callable[[Bench], list[Figure]]] = {
    "throughput": measure.throughput,
    "http": measure.over_http,
    "samples": measure.samples,
    "mixed": measure.mixed,
    "engine-memory": measure.engine_memory,
    "soak": measure.soak,
    "caller-memory": measure.caller_memory,
    "endings": measure.endings,
    "adapters": measure.adapters,
    "defaults": measure.defaults,
}

_LONG = ("soak", "endings", "adapters", "defaults")  # minutes
_ALONE = ("caller-memory", "endings", "adapters", "defaults")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``dspy-lora bench``."""
    parser.add_argument("--only", nargs="+", choices=list(MEASUREMENTS), metavar="NAME", help=", ".join(MEASUREMENTS))
    parser.add_argument("--all", action="store_true", help=f"what takes long too: {', '.join(_LONG)}")
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--base-model", default="seedling", help="the base model (default: the bundled seedling)")
    base.add_argument("--shape", choices=list(SHAPES), help="instead: random weights of this shape, and their adapters")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters of --shape (default: %(default)s)")
    parser.add_argument("--engine", default="{}", metavar="JSON", help="engine settings, as LoRALM's engine={...}")
    parser.add_argument("--calls", type=int, default=192, help="calls a repeat (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=128, help="threads that call (default: %(default)s)")
    parser.add_argument("--words", type=int, metavar="N", help="words of a question's text (default: 30 to 50)")
    parser.add_argument("--answers", type=int, nargs="+", metavar="TOKENS", help="of an answer (default: 16 and 64)")
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

        places = [number - 1 for number in args.programs]
        joint.run(args.joint, args.metric_calls, args.seeds, args.threads, places, _engine(args.engine))
        return 0
    with tempfile.TemporaryDirectory(prefix="dspy-lora-bench-") as folder:
        figures = _measure(_bench(args, Path(folder)), _chosen(args))
    if args.json:
        args.json.write_text(json.dumps(report(figures, args), indent=2) + "\n")
    return 0 if all(figure.holds in (True, None) for figure in figures) else 1


def _bench(args: argparse.Namespace, folder: Path) -> Bench:
    """What is measured; a model of random weights lies in the folder."""
    engine, model, registry = _engine(args.engine), args.base_model, None
    if args.shape:
        model, registry = str(make_model(args.shape, folder / args.shape)), folder / "registry"
        publish_adapters(args.shape, Path(model), registry, list(load_config().domains), args.rank)
        engine = ENGINE | {"max_lora_rank": args.rank} | engine
    given = {"words": (args.words, args.words)} if args.words else {}
    given |= {"answers": args.answers} if args.answers else {}
    return Bench(model, engine, args.calls, args.threads, args.repeats, registry=registry, **given)


def _measure(bench: Bench, names: list[str]) -> list[Figure]:
    """Prints figures as they come."""
    figures: list[Figure] = []
    print(f"{'':58}{'median':>10}{'least':>10}{'most':>10}  bar")
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
    chosen = args.only or [name for name in MEASUREMENTS if args.all or name not in _LONG]
    return [name for name in MEASUREMENTS if name in chosen]


def row(figure: Figure) -> str:
    """One line of the table."""
    digits = 0 if figure.median >= 100 else 2
    values = (figure.median, min(figure.values), max(figure.values))
    numbers = "".join(f"{value:>10.{digits}f}" for value in values)
    bar = "" if figure.holds is None else f"  {_bar(figure)}: {'holds' if figure.holds else 'FAILS'}"
    return f"{f'{figure.name} ({figure.unit})':58}{numbers}{bar}"


def _bar(figure: Figure) -> str:
    return f">= {figure.least:g}" if figure.least is not None else f"<= {figure.most:g}"


def report(figures: list[Figure], args: argparse.Namespace) -> dict[str, Any]:
    """The figures and what they were measured on, for a file."""
    return {
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
        "calls": args.calls,
        "threads": args.threads,
        "repeats": args.repeats,
        "words": args.words,
        "answers": args.answers,
        "rank": args.rank if args.shape else None,
        "engine": args.engine,
        "base_model": args.shape or args.base_model,
        "figures": [
            {
                "name": figure.name,
                "unit": figure.unit,
                "median": figure.median,
                "values": list(figure.values),
                "least": figure.least,
                "most": figure.most,
                "holds": figure.holds,
            }
            for figure in figures
        ],
    }
