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


def check(folder: Path, overwrite: bool) -> None:
    """Checks that a folder may be written.

    Raises:
        DataError: It exists and is not to be overwritten, or holds other files than a folder of prepared rows.
    """
    if not folder.exists():
        return
    if not overwrite:
        raise DataError(f"{folder} exists. Name another folder, or overwrite this one with --overwrite.")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else [folder.name]
    if others := sorted(set(names) - _OURS):
        raise DataError(f"{folder} holds what was not prepared here ({', '.join(others[:3])}), so it stays as it is.")


def write(folder: Path, files: Mapping[str, str]) -> None:
    """Writes files beside the folder's place, then moves all of them there.

    Args:
        folder: Where they belong; what ``check`` lets through. The one that is there is replaced.
        files: Texts by file name.

    Raises:
        PublishError: The disk refused; the folder is as it was before.
    """
    with disk.writing("write the rows", folder), disk.staging(folder.parent) as staging:
        draft = staging / "new"
        draft.mkdir()
        for name, text in files.items():
            disk.write(draft / name, text)
        _replace(draft, folder, staging / "old")


def _replace(draft: Path, folder: Path, old: Path) -> None:
    """Moves a folder to its place; the one that was there goes, or comes back where the move fails."""
    if not folder.exists():
        draft.rename(folder)
        return
    folder.rename(old)
    try:
        draft.rename(folder)
    except OSError:
        old.rename(folder)
        raise


def lines(rows: Iterable[Row]) -> str:
    """JSON lines; a lone surrogate (a byte that is not UTF-8) is written as its escape."""
    texts = (json.dumps(row, ensure_ascii=False, default=str) for row in rows)
    return "".join(text.encode("utf-8", "backslashreplace").decode() + "\n" for text in texts)
