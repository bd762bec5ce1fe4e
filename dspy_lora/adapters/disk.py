"""Changes to a folder that happen in full or not at all, with any number of writers and readers."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from dspy_lora.errors import PublishError

_LEFT_OVER = 24 * 3600  # seconds after which a hidden folder is one that a killed writer left


@contextlib.contextmanager
def writing(what: str, root: Path) -> Iterator[None]:
    """Turns an error of the disk into a PublishError; the steps inside must leave nothing behind."""
    try:
        yield
    except OSError as exc:
        error = PublishError(f"cannot {what} in {root}: {exc}. Nothing was changed.")
        error.errno = exc.errno
        raise error from exc


@contextlib.contextmanager
def staging(root: Path) -> Iterator[Path]:
    """A hidden folder inside ``root`` (on the same disk, so that a move out of it is atomic), removed at the end."""
    root.mkdir(parents=True, exist_ok=True)
    for old in root.glob(".staging-*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > _LEFT_OVER:
                shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=".staging-", dir=root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def drafting(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A hidden folder beside ``folder``, which takes its place where the block ends well, and else is removed.

    Raises:
        PublishError: The disk refused, or there is a folder that is not to be replaced; all is as it was before.
    """
    with contextlib.ExitStack() as stack:
        with writing("make a folder", folder.parent):
            hidden = stack.enter_context(staging(folder.parent))
            draft = hidden / "draft"
            draft.mkdir()
        yield draft
        with writing("save the result", folder.parent):
            for path in (*draft.iterdir(), draft):
                sync(path)
            _move_in(draft, folder, hidden / "old", overwrite)
            sync(folder.parent)


def _move_in(draft: Path, folder: Path, old: Path, overwrite: bool) -> None:
    """Renames the draft; puts what was there before back where that fails, or is interrupted."""
    try:
        if folder.exists():
            if not overwrite:
                raise FileExistsError(f"{folder} was made by somebody else meanwhile")
            folder.rename(old)
        draft.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise


@contextlib.contextmanager
def lock(root: Path) -> Iterator[None]:
    """One writer at a time, over threads and processes; the system frees it when a process dies."""
    with (root / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write(path: Path, text: str) -> None:
    """Writes a file and waits until the disk has it."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def copy(source: Path, target: Path) -> None:
    """Copies a file's content and waits until the disk has it."""
    shutil.copyfile(source, target)
    sync(target)


def sync(path: Path) -> None:
    """Waits until the disk has a file's content, or a folder's entries (which makes a rename last)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
