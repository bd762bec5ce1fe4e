"""One setting of the benchmark, several values: ``--sweep rank=8,16,32``."""

import argparse
import copy
from typing import Any

from dspy_lora.bench.shapes import SHAPES
from dspy_lora.errors import ConfigError
from dspy_lora.training.sweep import Sweep

KEYS = ("adapters", "rank", "words", "answers", "shape")


def points(text: str, args: argparse.Namespace) -> tuple[str, list[argparse.Namespace]]:
    """Reads ``KEY=VALUE,VALUE,...``.

    Args:
        text: What was asked for.
        args: The flags.

    Returns:
        The key, and the flags of each value.

    Raises:
        ConfigError: Not of that form, a value twice, another key, one that has a value already, or a value that the
            key cannot have.
    """
    sweep = Sweep.of(text, KEYS, "setting to be swept", "rank=8,16,32")
    if getattr(args, sweep.key) is not None:
        raise ConfigError(f"--{sweep.key} and --sweep {text}: give one of them.")
    found = []
    for written in sweep.values:
        point = copy.copy(args)
        value = _value(sweep.key, written)
        setattr(point, sweep.key, [value] if sweep.key == "answers" else value)
        found.append(point)
    return sweep.key, found


def value_of(key: str, point: argparse.Namespace) -> Any:
    """The swept value of one point."""
    value = getattr(point, key)
    return value[0] if key == "answers" else value


def _value(key: str, written: str) -> Any:
    if key == "shape":
        if written not in SHAPES:
            raise ConfigError(f"--sweep shape: {written!r} is none of {', '.join(SHAPES)}.")
        return written
    if not written.isdecimal() or int(written) < 1:
        raise ConfigError(f"--sweep {key}: {written!r} is no whole number above 0.")
    return int(written)
