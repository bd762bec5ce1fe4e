"""What was timed so far, on disk, so that a run that was killed goes on."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dspy_lora.engine.gpu_shapes import Product
from dspy_lora.errors import ConfigError, CrashError
from dspy_lora.tuning.problem import Problem
from dspy_lora.tuning.settings import Setting

# Seconds that a kernel takes; None where a setting is refused or its result is wrong.
Measure = Callable[[Problem, Setting], float | None]

NAME = "trials.jsonl"


class Trials:
    """Times by problem and setting, each asked for once.

    Args:
        file: One JSON object a line: first the conditions, then the trials.
        conditions: What the times depend on besides problem and setting, such as the GPU's name.

    Raises:
        ConfigError: The file is of other conditions, or is not such a file.
    """

    def __init__(self, file: Path, conditions: dict[str, Any]) -> None:
        self._file = file
        self._seconds: dict[tuple[Problem, Setting], float | None] = {}
        lines = self._complete_lines()
        if not lines:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._append(conditions)
            return
        try:
            self._require_same(json.loads(lines[0]), conditions)
            self._seconds = dict(_trial(json.loads(line)) for line in lines[1:])
        except (ValueError, KeyError, TypeError) as exc:
            if isinstance(exc, ConfigError):
                raise
            raise ConfigError(f"{file} is no list of trials ({exc!r}). Remove it, or give another --output.") from exc

    def __len__(self) -> int:
        return len(self._seconds)

    def knows(self, problem: Problem, setting: Setting) -> bool:
        """Whether this was timed before."""
        return (problem, setting) in self._seconds

    def seconds(self, problem: Problem, setting: Setting, measure: Measure) -> float | None:
        """What a setting takes, measured if it is not known, and then kept."""
        if not self.knows(problem, setting):
            try:
                self._keep(problem, setting, measure(problem, setting))
            except CrashError:
                self._keep(problem, setting, None)
                raise
        return self._seconds[problem, setting]

    def fastest(self, problem: Problem) -> tuple[Setting, float]:
        """The fastest setting that was timed for a problem, and its seconds.

        Raises:
            ValueError: None was.
        """
        timed = {setting: found for (of, setting), found in self._seconds.items() if of == problem and found}
        return min(timed.items(), key=lambda each: each[1])

    def _keep(self, problem: Problem, setting: Setting, seconds: float | None) -> None:
        self._seconds[problem, setting] = seconds
        self._append({"problem": asdict(problem), "setting": asdict(setting), "seconds": seconds})

    def _complete_lines(self) -> list[str]:
        """Lines of the file; one that a killed run left half written is cut off."""
        if not self._file.exists():
            return []
        text = self._file.read_text(encoding="utf-8")
        complete = text[: text.rfind("\n") + 1]
        if complete != text:
            self._file.write_text(complete, encoding="utf-8")
        return complete.splitlines()

    def _require_same(self, found: dict[str, Any], asked: dict[str, Any]) -> None:
        differ = [
            f"{key} {found.get(key)!r}, now {asked.get(key)!r}"
            for key in sorted(found.keys() | asked.keys())
            if found.get(key) != asked.get(key)
        ]
        if differ:
            raise ConfigError(
                f"{self._file} holds times of {'; '.join(differ)}. Times of both cannot be compared: give another "
                "--output, or remove the file."
            )

    def _append(self, line: dict[str, Any]) -> None:
        with self._file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(line) + "\n")


def _trial(line: dict[str, Any]) -> tuple[tuple[Problem, Setting], float | None]:
    problem = line["problem"]
    product = Product(problem["product"]["op"], tuple(problem["product"]["widths"]))
    return (Problem(**{**problem, "product": product}), Setting(**line["setting"])), line["seconds"]
