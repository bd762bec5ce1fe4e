"""The child process of ``host.py`` as its user sees it: start, sockets, log, end."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import zmq

from dspy_lora.child import child_environment
from dspy_lora.engine import core_process
from dspy_lora.engine.failures import advice, ending, last_lines, root_cause
from dspy_lora.engine.processes import kill_group
from dspy_lora.engine.progress import Progress
from dspy_lora.engine.protocol import Reply, Request
from dspy_lora.engine.settings import EngineSettings
from dspy_lora.errors import EngineDiedError, EngineError, EngineStartError

_LONGEST_TEMP = 48  # a socket's path has at most 107 bytes (Linux; 103 on macOS), vLLM's take 57 of them


class HostProcess:
    """One child process, its sockets and its log file. Nothing exists before ``start``."""

    process: "subprocess.Popen[bytes]"

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.ready = False
        self.failure: str | None = None
        self.ended = threading.Event()
        self._deadline = time.monotonic() + settings.start_timeout_s
        self._send_lock = threading.RLock()  # as client.py's
        self._decoder = msgspec.msgpack.Decoder(Reply)
        self._undo = contextlib.ExitStack()

    def start(self) -> None:
        """Starts the process; ``stop`` takes back whatever was done, also where this raises."""
        self.folder = _temp_folder()
        self._undo.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self._context = zmq.Context()
        self._undo.callback(self._context.term)
        self._requests = self._bind(zmq.PUSH, "requests")
        self._replies = self._bind(zmq.PULL, "replies")
        self.log = self.folder / "engine.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "dspy_lora.engine.host", str(self.folder), self.settings.to_json()],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C goes to the user's program, and vLLM's children are in one group
                env=_environment(self.folder),
            )
        self._undo.callback(self._end_process)
        self._progress = Progress(self.settings.base.name)
        self._undo.callback(self._progress.stop)

    def stop(self) -> None:
        """Ends the process with its children and frees sockets, files and shared memory."""
        self.ready = False
        try:
            self._undo.close()
        finally:
            self.ended.set()

    def _bind(self, kind: int, name: str) -> "zmq.Socket[bytes]":
        socket = self._context.socket(kind)
        self._undo.callback(self._close, socket)
        socket.set_hwm(0)
        socket.bind(f"ipc://{self.folder}/{name}")
        return socket

    def _close(self, socket: "zmq.Socket[bytes]") -> None:
        with self._send_lock:
            socket.close(linger=0)

    def _end_process(self) -> None:
        kill_group(self.process.pid)
        self.process.wait()
        if self.process.stdin:
            self.process.stdin.close()

    def send(self, request: Request) -> None:
        """Sends from any thread; never blocks. What a dead host does not take is sent again to the next one."""
        with self._send_lock, contextlib.suppress(zmq.Again):
            if not self._requests.closed:
                self._requests.send(msgspec.msgpack.encode(request), zmq.NOBLOCK)

    def receive(self, timeout_ms: int) -> Reply | None:
        """The next reply, or None after the timeout; notes a start-up that hangs. Only the host's thread calls it."""
        if self._replies.poll(timeout_ms):
            return self._decoder.decode(self._replies.recv())
        if not self.ready:
            self._progress.tick()
            if time.monotonic() > self._deadline and not self.failure:
                limit = self.settings.start_timeout_s
                self.failure = self.start_report(f"no answer after {limit:g} s (engine={{'start_timeout_s': ...}})")
        return None

    def started(self, info: dict[str, Any]) -> None:
        """Marks the host as serving."""
        self.ready = True
        self._progress.done(info)

    def start_report(self, cause: str) -> str:
        """Why the start failed, what to do, and the end of the engine's log."""
        log = self._log_text()
        cause = root_cause(cause, log)
        return (
            f"The vLLM engine for {self.settings.base.name!r} did not start: {cause}{advice(cause, log)}\n"
            f"Last lines of its log:\n{last_lines(log)}"
        )

    def died(self, status: int) -> EngineError:
        """The error of a host that ended by itself."""
        if not self.ready:
            return EngineStartError(self.start_report(f"the engine process {ending(status)}"))
        log = self._log_text()
        return EngineDiedError(
            f"The vLLM engine for {self.settings.base.name!r} {ending(status)}{advice('', log)}\n"
            f"Last lines of its log:\n{last_lines(log)}"
        )

    def _log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def _temp_folder() -> Path:
    """A folder for sockets; in /tmp where the user's own place for such files is too deep for the path of a socket."""
    deep = len(os.fsencode(tempfile.gettempdir())) > _LONGEST_TEMP
    return Path(tempfile.mkdtemp(prefix="dspy-lora-", dir="/tmp" if deep else None))


def _environment(folder: Path) -> dict[str, str]:
    """The host's environment.

    Where byte code may not be written, vLLM's processes compile their 6,000 modules anew at every start; that is half
    of the time of a start, so this wish is not passed on.
    """
    environment = {key: value for key, value in child_environment().items() if key != "PYTHONDONTWRITEBYTECODE"}
    return environment | core_process.host_environment() | {"TMPDIR": str(folder)}
