"""Ending an engine: every process of its group, and nothing it left on the machine."""

import contextlib
import os
import signal
import time
from pathlib import Path

_PROC = Path("/proc")
_POLL_S = 0.01
_KILL_WAIT_S = 5.0
_TRACKER_WAIT_S = 2.0


def kill_group(group: int) -> None:
    """Kills a process group, but lets Python's resource trackers in it finish.

    vLLM's processes share memory segments of some hundred MiB, which outlive a killed process. Its resource tracker
    removes them when all that used them are gone, if it lives to see that; then it ends by itself.

    Args:
        group: Id of the group.
    """
    if not _PROC.is_dir():  # macOS, where segments of a killed engine stay until the next boot
        _signal_group(group)
        return
    _kill_workers(group, spared=0)
    deadline = time.monotonic() + _TRACKER_WAIT_S
    while members(group):
        if time.monotonic() > deadline:
            _signal_group(group)
            break
        time.sleep(_POLL_S)


def kill_own_group() -> None:
    """Kills the group of this process as ``kill_group`` does, this process last."""
    if not _PROC.is_dir():
        _signal_group(0)
    _kill_workers(os.getpgrp(), spared=os.getpid())
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_workers(group: int, spared: int) -> None:
    """Kills what is in a group until nothing but trackers and the process ``spared`` is left."""
    deadline = time.monotonic() + _KILL_WAIT_S
    while workers := [pid for pid in members(group) if pid != spared and not _is_tracker(pid)]:
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            break
        time.sleep(_POLL_S)


def _signal_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def members(group: int) -> list[int]:
    """Processes of a group that are alive; zombies, which wait for a parent that may never look, are not."""
    found = []
    for entry in _PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, pgrp = (entry / "stat").read_text().rpartition(")")[2].split()[:3]  # see proc(5)
            if int(pgrp) == group and state not in "ZX":
                found.append(int(entry.name))
    return found


def _is_tracker(pid: int) -> bool:
    """Whether a process is a resource tracker, of multiprocessing or of joblib's loky."""
    try:
        return b"resource_tracker" in (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return False
