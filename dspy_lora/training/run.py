"""The book of one training run: console lines, ``metrics.jsonl`` and ``run.json`` in the run's folder."""

import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

_PACKAGES = ("dspy-lora", "dspy", "torch", "transformers", "peft", "trl", "datasets", "accelerate")


class Run:
    """A run's folder and clock.

    Args:
        folder: Where the run writes; made if need be. An earlier run's ``metrics.jsonl`` there starts anew.
        name: Put before each console line, so that runs side by side can be told apart.
        quiet: No console lines.
    """

    def __init__(self, folder: Path, name: str, quiet: bool = False) -> None:
        self.folder = folder
        self._name = name
        self._quiet = quiet
        self._start = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_text("")

    @property
    def seconds(self) -> float:
        """Wall time since the run began."""
        return time.monotonic() - self._start

    def say(self, text: str) -> None:
        """Prints one console line."""
        if not self._quiet:
            print(f"[{self._name}] {text}", flush=True)

    def log(self, step: int, **values: float) -> None:
        """Appends one line to ``metrics.jsonl``: the step, seconds since the start, and the values."""
        line = {"step": step, "seconds": round(self.seconds, 3)} | values
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def close(self, **card: Any) -> None:
        """Writes ``run.json``: what the caller knows, and versions, hardware and wall time."""
        card |= {"versions": _versions(), "hardware": _hardware(), "wall_seconds": round(self.seconds, 1)}
        text = json.dumps(card, indent=2, default=str, ensure_ascii=False)
        (self.folder / "run.json").write_text(text + "\n", encoding="utf-8")


def read_card(folder: Path) -> dict[str, Any]:
    """Reads a finished run's ``run.json``."""
    card: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return card


def _versions() -> dict[str, str]:
    installed = {dist.name: dist.version for dist in map(_distribution, _PACKAGES) if dist is not None}
    return {"python": platform.python_version()} | installed


def _distribution(package: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return None


def _hardware() -> dict[str, Any]:
    """The machine, and the largest amount of memory this process has taken on it, in bytes."""
    import torch

    facts: dict[str, Any] = {"machine": platform.machine(), "cpus": os.cpu_count(), "peak_memory": _peak_memory()}
    if torch.cuda.is_available():
        facts |= {"gpu": torch.cuda.get_device_name(), "gpu_peak_memory": torch.cuda.max_memory_allocated()}
    return facts


def _peak_memory() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
