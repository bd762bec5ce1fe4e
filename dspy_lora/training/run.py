"""The book of one training run: console lines, ``metrics.jsonl`` and ``run.json`` in the run's folder."""

import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

_PACKAGES = ("dspy-lora", "dspy", "torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes")

METRICS_FILE = "metrics.jsonl"
CARD_FILE = "run.json"


class Run:
    """A run's folder and clock.

    Args:
        folder: Where the run writes; made if need be.
        name: Put before each console line, so that runs side by side can be told apart.
        quiet: No console lines.
        step: The step that the run goes on from. Later lines of its ``metrics.jsonl`` are dropped, and the clock goes
            on from the last one that stays; at 0 both start anew, and the card of an earlier run there goes.
    """

    def __init__(self, folder: Path, name: str, quiet: bool = False, step: int = 0) -> None:
        self.folder = folder
        self._name = name
        self._quiet = quiet
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CARD_FILE).unlink(missing_ok=True)
        kept = _lines_up_to(step, folder / METRICS_FILE)
        (folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._start = time.monotonic() - (kept[-1]["seconds"] if kept else 0)

    @property
    def seconds(self) -> float:
        """Wall time since the run began; of a run that was resumed, without the time between and the work lost."""
        return time.monotonic() - self._start

    def say(self, text: str) -> None:
        """Prints one console line."""
        if not self._quiet:
            print(f"[{self._name}] {text}", flush=True)

    def log(self, step: int, **values: float) -> None:
        """Appends one line to ``metrics.jsonl``: the step, seconds since the start, and the values."""
        line = {"step": step, "seconds": round(self.seconds, 3)} | values
        with (self.folder / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def close(self, **card: Any) -> None:
        """Writes ``run.json``: what the caller knows, and versions, hardware, wall time and GPU-hours."""
        hardware = _hardware()
        card |= {
            "versions": _versions(),
            "hardware": hardware,
            "wall_seconds": round(self.seconds, 1),
            "gpu_hours": round(self.seconds / 3600 * min(hardware["gpus"], 1), 5),  # a run trains on one
        }
        text = json.dumps(card, indent=2, default=str, ensure_ascii=False)
        draft = self.folder / f"{CARD_FILE}.partial"
        draft.write_text(text + "\n", encoding="utf-8")
        draft.replace(self.folder / CARD_FILE)


def read_card(folder: Path) -> dict[str, Any]:
    """Reads a finished run's ``run.json``."""
    card: dict[str, Any] = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
    return card


def _lines_up_to(step: int, metrics: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl`` up to a step; what a killed run wrote in part comes later and is dropped."""
    lines: list[dict[str, Any]] = []
    if step == 0 or not metrics.is_file():
        return lines
    for text in metrics.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        lines += [line] if line["step"] <= step else []
    return lines


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

    gpus = torch.cuda.device_count()
    facts = {"machine": platform.machine(), "cpus": os.cpu_count(), "peak_memory": _peak_memory(), "gpus": gpus}
    if gpus:
        peak = max(torch.cuda.max_memory_allocated(gpu) for gpu in range(gpus))
        facts |= {"gpu": torch.cuda.get_device_name(), "gpu_peak_memory": peak}
    return facts


def _peak_memory() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
