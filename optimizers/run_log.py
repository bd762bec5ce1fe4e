"""A run's memory: what was asked and answered, on disk, so that a run that was killed goes on where it was.

The search is deterministic given the answers it got. A run that goes on therefore begins at the beginning and takes
every answer that is already in the log from there, which costs no metric call and no LM call, and ends as an unbroken
run ends. Feedback is asked when reflection first wants it: where the answer is from the log, its row is asked again.
"""

import dataclasses
import hashlib
import json
import logging
import pickle
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
import pydantic

from dspy_lora.adapters.base import ABSENT
from dspy_lora.errors import ConfigError

logger = logging.getLogger(__name__)

ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


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
        self._torn = False  # the last line may have been written in part: the disk is full
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
                whole += len(line)
                try:
                    entry = json.loads(line)
                except ValueError:
                    if line.strip():
                        logger.warning("%s: a line that was written in part is left out", self._file)
                    continue
                self._answers[entry["key"]] = entry["answer"]
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
                line = json.dumps({"key": key, "answer": answer}) + "\n"
                with self._file.open("a", encoding="utf-8") as lines:
                    begin, self._torn = "\n" if self._torn else "", True
                    lines.write(begin + line)
                self._torn = False


def digest(*parts: Any) -> str:
    """A short name of anything JSON can write, and of the rest as far as it can be pickled."""
    text = json.dumps(parts, sort_keys=True, default=_whole, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:24]


def plain(value: Any) -> Any:
    """What JSON cannot write: a set, whose order changes from process to process, sorted; the rest by ``repr``."""
    if isinstance(value, set | frozenset):
        return sorted(value, key=digest)
    return repr(value)


def _whole(value: Any) -> Any:
    """As ``plain``; a ``repr`` that leaves something out, or tells an address, gets the hash of the pickled object."""
    text = plain(value)
    if not isinstance(text, str) or not ("..." in text or ADDRESS.search(text)):
        return text
    kind = type(value).__qualname__
    if isinstance(value, pydantic.BaseModel):  # what has fields is written by them: a pickle may differ by process
        return [kind, value.model_dump()]
    if isinstance(value, dspy.Example):
        return [kind, value.toDict()]
    if dataclasses.is_dataclass(value):
        return [kind, {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}]
    try:
        pickled = pickle.dumps(value)
    except Exception:  # noqa: BLE001 - whatever a class raises that cannot be pickled; the address tells it apart
        return text
    return f"{ADDRESS.sub('', text)} {hashlib.sha256(pickled).hexdigest()[:24]}"


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
