"""A run's folder, for one run at a time."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from dspy_lora.adapters.disk import NO_LOCKS
from dspy_lora.errors import ConfigError, TrainingError

# Held while a run trains; the system frees it when a process dies. A job's process holds another one (jobs.py).
LOCK_FILE = ".training"


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Makes a run's folder and keeps other runs out of it.

    Raises:
        ConfigError: The folder cannot be written.
        TrainingError: Another run trains there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_FILE).open("w")
    except OSError as exc:
        raise ConfigError(f"{folder} cannot hold a run: {exc.strerror}. Give another output folder.") from exc
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise TrainingError(f"{folder}: another run trains there. Wait for it, or give another folder.") from exc
        except OSError as exc:
            if exc.errno not in NO_LOCKS:
                raise
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # a forked child may have it open for longer
