"""A run's memory: what was asked and answered, on disk, so that a run that was killed goes on where it was.

The search is deterministic given the answers it got. A run that goes on therefore begins at the beginning and takes
every answer that is already in the log from there, which costs no metric call and no LM call, and ends as an unbroken
run ends.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dspy_lora.adapters.base import ABSENT
from dspy_lora.errors import ConfigError


class RunLog:
    """Answers by question.

    Args:
        folder: Where ``run.json`` and ``answers.jsonl`` lie; None keeps answers in memory alone.
        settings: What the run depends on. A folder that was written under others is refused.

    Raises:
        ConfigError: The folder belongs to a run with other settings or data.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any]) -> None:
        self._answers: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._file = None if folder is None else folder / "answers.jsonl"
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            _check_settings(folder / "run.json", settings)
            self._read()

    def _read(self) -> None:
        assert self._file is not None
        if not self._file.exists():
            return
        whole = 0
        with self._file.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break  # the process was killed while it wrote this
                entry = json.loads(line)
                self._answers[entry["key"]] = entry["answer"]
                whole += len(line)
        with self._file.open("r+b") as lines:
            lines.truncate(whole)

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> Any:
        """The answer to a question; None if there is none yet."""
        return self._answers.get(key)

    def put(self, key: str, answer: Any, lasting: bool = True) -> None:
        """Keeps an answer, which must be JSON, on disk if it is lasting. Any thread may call."""
        with self._lock:
            self._answers[key] = answer
            if lasting and self._file is not None:
                with self._file.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps({"key": key, "answer": answer}) + "\n")


def digest(*parts: Any) -> str:
    """A short name of anything JSON can write; for what it cannot see ``plain``."""
    text = json.dumps(parts, sort_keys=True, default=plain, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:24]


def plain(value: Any) -> Any:
    """What JSON cannot write: a set, whose order changes from process to process, sorted; the rest by ``repr``."""
    if isinstance(value, set | frozenset):
        return sorted(value, key=digest)
    return repr(value)


def _check_settings(file: Path, settings: dict[str, Any]) -> None:
    settings = json.loads(json.dumps(settings, default=plain))
    if not file.exists():
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return
    before, now = dict(_leaves(json.loads(file.read_text(encoding="utf-8")))), dict(_leaves(settings))
    differ = sorted(key for key in {*before, *now} if not _same(before.get(key), now.get(key)))
    if differ:
        shown = "; ".join(f"{'.'.join(key)} was {before.get(key)!r}, is {now.get(key)!r}" for key in differ)
        raise ConfigError(
            f"log_dir={str(file.parent)!r} holds a run with other settings: {shown}. Give another one, or remove it."
        )


def _same(before: Any, now: Any) -> bool:
    """Whether a setting is what it was; nan is, and a base that was not on the disk may have come to it."""
    return repr(before) == repr(now) or (ABSENT in (before, now) and None not in (before, now))


def _leaves(settings: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Settings within settings, each with the names that lead to it."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value
