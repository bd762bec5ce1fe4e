"""The engine objects that ``dspy.LM`` calls: ``complete`` and ``stream``, sync and async, on the process's own vLLM."""

import asyncio
import queue
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

from dspy import lm15

from dspy_lora.engine import translate
from dspy_lora.engine.client import EngineClient, Pending, engine_client
from dspy_lora.engine.protocol import Adapter, Delta, Done, Failed
from dspy_lora.engine.routes import Routes, adapter_of, choose_model
from dspy_lora.engine.samples import Samples
from dspy_lora.engine.settings import EngineSettings
from dspy_lora.errors import EngineError

if TYPE_CHECKING:
    from dspy_lora.adapters.registry import AdapterRegistry


# The figures of an engine that has no process.
_NOT_RUNNING: dict[str, Any] = {"pid": None, "running": 0, "waiting": 0, "adapters": [], "adapters_in_memory": 0}


class _Engine:
    """What the sync and the async engine share. Copies and pickles are the same engine of the same settings."""

    supports_response_schema = True
    supported_params = frozenset(
        {
            "temperature", "max_tokens", "top_p", "top_k", "stop", "seed", "logprobs", "top_logprobs",
            "frequency_penalty", "presence_penalty", "logit_bias", "response_format", "tools", "tool_choice", "stream",
        }
    )  # fmt: skip

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.adapters: dict[str, Adapter | None] = {}
        self.routes: Routes = {}
        self.supports_function_calling = settings.tool_parser is not None
        self.supports_reasoning = settings.reasoning_parser is not None

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Engine":
        return self

    @property
    def client(self) -> EngineClient:
        """The running engine; a forked or unpickled copy finds its own process's."""
        return engine_client(self.settings)

    def serve(self, model: str, adapter: Adapter | None) -> None:
        """Says which adapter a model string stands for; None for the base model alone."""
        self.adapters[model] = adapter

    def know(self, registry: "AdapterRegistry") -> None:
        """Has an engine that starts bring a registry's adapters into its CPU memory, ahead of their use."""
        self.client.registries[registry.root] = registry

    def preload(self, model: str) -> None:
        """Starts the engine if needed and loads the adapter of a model string."""
        adapter = self.adapters.get(model)
        self.client.command("load", adapter) if adapter else self.client.wait_ready()

    def unload(self, model: str) -> None:
        """Takes the adapter of a model string out of a running engine."""
        if self.client.running and (adapter := self.adapters.get(model)):
            self.client.command("unload", adapter)

    def stats(self) -> dict[str, Any]:
        """The engine's figures and what it is; where none runs, none is started."""
        client = self.client
        figures = client.command("stats") if client.running else _NOT_RUNNING
        return figures | {"restarts": client.restarts} | client.info

    def shutdown(self) -> None:
        """Ends the engine process; the next request starts a new one."""
        self.client.close()

    def _submit(self, request: lm15.Request, samples: int, on_delta: Any = None) -> Pending:
        message = translate.to_generate(request, n=samples, stream=on_delta is not None)
        message.adapter = adapter_of(self.adapters, request.model)
        return self.client.submit(message, on_delta)


class LocalEngine(_Engine):
    """The sync engine."""

    def __reduce__(self) -> tuple[Any, ...]:
        return local_engine, (self.settings,)

    def complete(self, request: lm15.Request) -> lm15.Response:
        """Answers one request; see ``dspy.clients.engines.base.Engine``."""
        request = choose_model(self.routes, request)
        group = Samples.current()
        return group.take() or group.keep(self._answer(self._submit(request, group.ask(request)), request.model))

    def stream(self, request: lm15.Request) -> Iterator[Any]:
        """Stream events, token by token. Several samples of one call are drawn first and shown one by one."""
        request = choose_model(self.routes, request)
        if Samples.current().wanted > 1:
            yield from translate.at_once(self.complete(request))
            return
        yield lm15.StreamStartEvent(model=request.model)
        shown = translate.Shown()
        deltas: queue.SimpleQueue[Delta | None] = queue.SimpleQueue()
        pending = self._submit(request, 1, deltas.put)
        try:
            while (delta := deltas.get()) is not None:
                yield from shown.events(delta)
        finally:
            self.client.abort(pending)
        [response] = self._answer(pending, request.model)
        yield from shown.rest(response)

    def _answer(self, pending: Pending, model: str) -> list[lm15.Response]:
        try:
            return _responses(self.client.result(pending), model)
        except EngineError as exc:
            raise translate.engine_error(exc) from exc

    def close(self) -> None:
        """Nothing: the engine belongs to the process, and other LMs use it."""


class AsyncLocalEngine(_Engine):
    """The async engine; works from any event loop."""

    def __reduce__(self) -> tuple[Any, ...]:
        return async_local_engine, (self.settings,)

    async def complete(self, request: lm15.Request) -> lm15.Response:
        """Answers one request."""
        request, group = choose_model(self.routes, request), Samples.current()
        if (ready := group.take()) is not None:
            return ready
        return group.keep(await self._answer(self._submit(request, group.ask(request)), request.model))

    async def stream(self, request: lm15.Request) -> AsyncIterator[Any]:
        """Stream events, token by token."""
        request = choose_model(self.routes, request)
        if Samples.current().wanted > 1:
            for event in translate.at_once(await self.complete(request)):
                yield event
            return
        yield lm15.StreamStartEvent(model=request.model)
        shown = translate.Shown()
        loop = asyncio.get_running_loop()
        deltas: asyncio.Queue[Delta | None] = asyncio.Queue()
        pending = self._submit(request, 1, lambda delta: loop.call_soon_threadsafe(deltas.put_nowait, delta))
        try:
            while (delta := await deltas.get()) is not None:
                for event in shown.events(delta):
                    yield event
        finally:
            self.client.abort(pending)
        [response] = await self._answer(pending, request.model)
        for event in shown.rest(response):
            yield event

    async def _answer(self, pending: Pending, model: str) -> list[lm15.Response]:
        try:
            return _responses(await asyncio.wrap_future(pending.future), model)
        except EngineError as exc:
            raise translate.engine_error(exc) from exc
        finally:  # also where the coroutine is closed, or thrown away
            self.client.abort(pending)

    async def aclose(self) -> None:
        """Nothing: the engine belongs to the process, and other LMs use it."""


def _responses(reply: Done | Failed, model: str) -> list[lm15.Response]:
    if isinstance(reply, Failed):
        raise translate.to_error(reply)
    return translate.to_responses(reply, model)


_engines: dict[EngineSettings, tuple[LocalEngine, AsyncLocalEngine]] = {}


def _pair(settings: EngineSettings) -> tuple[LocalEngine, AsyncLocalEngine]:
    pair = _engines.setdefault(settings, (LocalEngine(settings), AsyncLocalEngine(settings)))
    for engine in pair:
        engine.settings = settings  # equal ones, with another patience, maybe, for the next start
    return pair


def local_engine(settings: EngineSettings) -> LocalEngine:
    """The one sync engine object of this process for these settings."""
    return _pair(settings)[0]


def async_local_engine(settings: EngineSettings) -> AsyncLocalEngine:
    """The one async engine object of this process for these settings."""
    return _pair(settings)[1]
