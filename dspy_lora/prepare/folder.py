"""The folder of prepared rows: written in full or not at all."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from dspy_lora.adapters import disk
from dspy_lora.errors import DataError
from dspy_lora.prepare.sources import SPLITS
from dspy_lora.training.rendering import Row

REPORT = "report.json"
REJECTS = "rejects.jsonl"
_OURS = {REPORT, REJECTS, *(f"{name}.jsonl" for name in SPLITS)}


def check(folder: Path, overwrite: bool, source: Path | None = None) -> None:
    """Checks that a folder may be written.

    Args:
        folder: The folder.
        overwrite: Whether one that was written this way is replaced.
        source: The file or folder that is read; None where there is none.

    Raises:
        DataError: It exists and is not to be overwritten, is no folder of prepared rows, or holds the source.
    """
    if not folder.exists():
        return
    if source is not None and source.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{folder} is what is read ({source}), or holds it, so it stays as it is. Name another folder.")
    if not overwrite:
        raise DataError(f"{folder} exists. Name another folder, or overwrite this one with --overwrite.")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if others := sorted(names - _OURS):
        raise DataError(f"{folder} holds what was not prepared here ({', '.join(others[:3])}), so it stays as it is.")
    if names and REPORT not in names:
        raise DataError(f"{folder} has rows but no {REPORT}: they were not prepared here, so it stays as it is.")


def write(folder: Path, files: Mapping[str, str], overwrite: bool) -> None:
    """Writes files beside the folder's place, then moves all of them there.

    Args:
        folder: Where they belong; what ``check`` lets through.
        files: Texts by file name.
        overwrite: Whether a folder that is there is replaced.

    Raises:
        PublishError: The disk refused; the folder is as it was before.
    """
    with disk.drafting(folder, overwrite) as draft, disk.writing("write the rows", folder):
        for name, text in files.items():
            disk.write(draft / name, text)


def lines(rows: Iterable[Row]) -> str:
    """JSON lines."""
    return "".join(written(json.dumps(row, ensure_ascii=False, default=str)) + "\n" for row in rows)


def written(text: str) -> str:
    """JSON as a file takes it: a lone surrogate (a byte that is not UTF-8) as its escape."""
    return text.encode("utf-8", "backslashreplace").decode()
