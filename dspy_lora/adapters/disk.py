"""Changes to a folder that happen in full or not at all, with any number of writers and readers."""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from dspy_lora.errors import PublishError

_HIDDEN = ".dspy-lora-staging-"  # how a hidden folder's name begins; no user's folder is called so
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # of a file system that has none
_LEFT_OVER = 24 * 3600  # seconds after which a hidden folder that nobody holds is one that a killed writer left


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
    """A hidden folder inside ``root`` (on the same disk, so that a move out of it is atomic), removed at the end.

    It is locked while it is in use. What a killed writer left is removed by a later one.
    """
    root.mkdir(parents=True, exist_ok=True)
    for old in root.glob(f"{_HIDDEN}*"):
        with contextlib.suppress(OSError):  # it went away meanwhile, it is another user's, or its writer still works
            if time.time() - old.stat().st_mtime > _LEFT_OVER:
                with _held(old, os.O_RDONLY, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_HIDDEN, dir=root))
    try:
        with _held(folder, os.O_RDONLY, fcntl.LOCK_SH, must=False):  # on NFS what is open for reading takes no other
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
    with _held(root / ".lock", os.O_WRONLY | os.O_CREAT, fcntl.LOCK_EX):
        yield


@contextlib.contextmanager
def _held(path: Path, flags: int, how: int, must: bool = True) -> Iterator[None]:
    """A lock on a file or folder, which is opened with these flags; none where it need not be and the disk has none."""
    descriptor = os.open(path, flags, 0o666)
    try:
        try:
            fcntl.flock(descriptor, how)
        except OSError as exc:
            if must or exc.errno not in NO_LOCKS:
                raise
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing does not free it while a forked child has it open too
        os.close(descriptor)


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
