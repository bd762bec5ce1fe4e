"""Engine objects for a running server that speaks vLLM's OpenAI API: vLLM itself, or Ray Serve LLM.

The requests are DSPy's own ``lm15`` client's; what is added is loading adapters on the server, names, vLLM's sampling
settings, and ``n`` samples in one request. Adapters are loaded through ``/v1/load_lora_adapter``, for which a vLLM
server must run with ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`` and see the adapter's folder under the same path; a server
that already lists the adapter's name needs neither.
"""

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx
from dspy import lm15

from dspy_lora.adapters.base import Base
from dspy_lora.config import API_KEY_VARIABLE
from dspy_lora.engine import translate
from dspy_lora.engine.protocol import Adapter
from dspy_lora.engine.routes import Routes, adapter_of, choose_model
from dspy_lora.engine.samples import Samples

_TIMEOUT_S = 600.0  # as of DSPy's own client
_CONNECTIONS = 1024  # at most; DSPy's threads wait for one where there are fewer than threads
_KEPT_S = 2.0  # an idle connection; vLLM's server closes it after 5 s, maybe as it is used again

T = TypeVar("T")


class _Remote:
    """What the sync and the async engine share: the server's address, its models, and loading adapters."""

    supports_response_schema = True
    supports_function_calling = True
    supported_params = frozenset(
        {
            "temperature", "max_tokens", "top_p", "top_k", "stop", "seed", "logprobs", "top_logprobs",
            "frequency_penalty", "presence_penalty", "logit_bias", "response_format", "tools", "tool_choice", "stream",
        }
    )  # fmt: skip

    def __init__(self, api_base: str, api_key: str | None, base: Base, thinks: bool = False) -> None:
        self.api_base = api_base.rstrip("/")
        self.api_key = api_key
        self.base = base
        self.supports_reasoning = thinks
        self.adapters: dict[str, Adapter | None] = {}
        self.routes: Routes = {}
        self._served: dict[str, str] = {}
        self._start_over()
        _engines.add(self)

    def _start_over(self) -> None:
        """Free locks and no connections: of a new engine, and of one in a forked child.

        The child shares its parent's sockets, where each would read the other's answers, and has none of the threads
        that hold its locks.
        """
        self._opening = threading.Lock()
        self._client: httpx.Client | None = None
        self._locks: dict[str, threading.Lock] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Remote":
        return self

    def serve(self, model: str, adapter: Adapter | None) -> None:
        """Says which adapter a model string stands for; None for the base model alone."""
        self.adapters[model] = adapter

    def preload(self, model: str) -> None:
        """Loads the adapter of a model string on the server."""
        self._name(model)

    def unload(self, model: str) -> None:
        """Makes the server forget the adapter of a model string."""
        if adapter := self.adapters.get(model):
            with self._lock_of(model):
                self._served.pop(model, None)
                if _lists(self._models(), adapter.name):
                    self._http("POST", "/unload_lora_adapter", {"lora_name": adapter.name})

    def stats(self) -> dict[str, Any]:
        """The models and adapters the server lists."""
        return {"models": [card["id"] for card in self._models()]}

    def shutdown(self) -> None:
        """Nothing: the server is not ours."""

    def _key(self) -> str:
        return self.api_key or os.environ.get(API_KEY_VARIABLE) or "EMPTY"

    def _config(self) -> lm15.RouterConfig:
        keys, addresses = {"vllm": self._key()}, {"vllm": self.api_base}
        return lm15.RouterConfig(api_keys=keys, base_urls=addresses, max_connections=_CONNECTIONS)

    # -- requests --------------------------------------------------------------------------------------------------

    def _route(self, request: lm15.Request, n: int = 1) -> lm15.Request:
        """The request as the server wants it: its own name for the model, vLLM's settings at the top level."""
        knobs = translate.vllm_knobs(request.config) | ({"n": n} if n > 1 else {})
        if request.config.top_k is not None:  # which lm15 leaves out: OpenAI's own API has none
            knobs["top_k"] = request.config.top_k
        config = dataclasses.replace(request.config, top_k=None, extensions=knobs or None)
        return dataclasses.replace(request, model=self._name(request.model), config=config)

    def _many(self, routed: lm15.Request) -> list[lm15.Response]:
        """All samples of one request, which DSPy's client reads one at a time; its tokens are counted in the first."""
        wire = lm15.OpenAIChatLM(api_key=self._key(), base_url=self.api_base, compat="vllm")
        request = wire.build_request(routed, stream=False)
        reply = self._send(request.method, request.url, content=request.body, headers=dict(request.headers))
        if reply.status_code >= 400:
            raise wire.normalize_error(reply.status_code, reply.text)
        whole, form = reply.json(), routed.config.response_format
        first, *rest = [
            lm15.response_from_openai_chat(whole, model=routed.model, choice=index, response_format=form)
            for index in range(len(whole["choices"]))
        ]
        free = lm15.Usage(input_tokens=0, output_tokens=0)
        return [first, *(dataclasses.replace(response, usage=free) for response in rest)]

    @contextlib.contextmanager
    def _errors(self, model: str) -> Iterator[None]:
        """Words the server's errors; the next call of an adapter that the server has lost loads it again.

        Args:
            model: The model string that was asked for.
        """
        try:
            yield
        except lm15.InvalidRequestError as exc:
            if exc.status == 404:
                self._served.pop(model, None)
                raise lm15.ServerError(f"the server at {self.api_base} lost {model!r}: {exc}", status=404) from exc
            if "maximum context length" in str(exc) and not isinstance(exc, lm15.ContextLengthError):
                raise lm15.ContextLengthError(str(exc), status=exc.status) from exc
            raise
        except lm15.AuthError as exc:
            raise self._refused_key(exc.status) from exc
        except (ValueError, TypeError, KeyError) as exc:
            raise self._nonsense("/chat/completions", str(exc)) from exc

    # -- the server's models ---------------------------------------------------------------------------------------

    def _name(self, model: str) -> str:
        """The server's name for a model string; loads the adapter at its first use, which holds no other one up."""
        if (name := self._served.get(model)) is not None:
            return name
        with self._lock_of(model):
            if model not in self._served:
                self._served[model] = self._load(model)
            return self._served[model]

    def _lock_of(self, model: str) -> threading.Lock:
        return self._locks.setdefault(model, threading.Lock())

    def _load(self, model: str) -> str:
        adapter, cards = adapter_of(self.adapters, model), self._models()
        base = self._base_name(cards)
        if adapter is None:
            return base
        if not _lists(cards, adapter.name):
            self._load_adapter(adapter)
        return adapter.name

    def _load_adapter(self, adapter: Adapter) -> None:
        try:
            self._http("POST", "/load_lora_adapter", {"lora_name": adapter.name, "lora_path": adapter.path})
        except (lm15.InvalidRequestError, lm15.ServerError) as exc:
            if not _lists(self._models(), adapter.name):  # else another client was faster
                raise lm15.ConfigurationError(
                    f"adapter {adapter.name!r} cannot be loaded from {adapter.path!r}, which the server must see under "
                    f"the same path: {exc}"
                ) from exc

    def _base_name(self, cards: list[dict[str, Any]]) -> str:
        bases = [card for card in cards if not card.get("parent")]
        wanted = {self.base.name, self.base.path}
        for card in bases:
            if card["id"] in wanted or card.get("root") in wanted:
                return str(card["id"])
        raise lm15.ConfigurationError(
            f"the server at {self.api_base} serves {[card['id'] for card in bases]}, not {self.base.name!r}. Give the "
            "base it serves as the first argument of LoRALM, or start the server with that model."
        )

    def _models(self) -> list[dict[str, Any]]:
        body = self._http("GET", "/models")
        if not isinstance(body, dict) or not isinstance(body.get("data"), list):
            raise self._nonsense("/models", str(body))
        return [card for card in body["data"] if isinstance(card, dict) and isinstance(card.get("id"), str)]

    def _http(self, method: str, path: str, body: Any = None) -> Any:
        headers = {"Authorization": f"Bearer {self._key()}"}
        reply = self._send(method, self.api_base + path, json=body, headers=headers)
        if reply.status_code >= 400:
            raise self._refusal(path, reply)
        try:
            return reply.json()
        except ValueError:
            return reply.text

    @property
    def _http_client(self) -> httpx.Client:
        with self._opening:  # of two, ``close`` would not find one
            if self._client is None:
                limits = httpx.Limits(max_connections=_CONNECTIONS, keepalive_expiry=_KEPT_S)
                self._client = httpx.Client(timeout=_TIMEOUT_S, limits=limits)
                weakref.finalize(self, self._client.close)  # at the end of the program too
            return self._client

    def _send(self, method: str, url: str, **content: Any) -> httpx.Response:
        try:
            return self._http_client.request(method, url, **content)
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as exc:
            raise lm15.ConfigurationError(f"api_base={self.api_base!r} is no address of a server: {exc}") from exc
        except (httpx.HTTPError, RuntimeError) as exc:  # RuntimeError: ``close`` came in between
            raise lm15.TransportError(
                f"no answer from the server at {self.api_base}: {exc}. Is it running, and is this its address?"
            ) from exc

    def _refusal(self, path: str, reply: httpx.Response) -> lm15.LM15Error:
        status = reply.status_code
        if status in (401, 403):
            return self._refused_key(status)
        if status in (404, 405) and "lora_adapter" in path and "adapter" not in reply.text:  # no such route
            return lm15.ConfigurationError(
                f"the server at {self.api_base} does not load adapters at run time. Start vLLM with "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora, or list the adapter with --lora-modules."
            )
        if status == 404 and path == "/models":
            return lm15.ConfigurationError(
                f"there is no list of models at {self.api_base}/models. Give the address with its path, as in "
                "api_base='http://localhost:8000/v1'."
            )
        kind = lm15.ServerError if status >= 500 else lm15.InvalidRequestError
        return kind(f"{self.api_base}{path} refused: {reply.text[:500]}", status=status)

    def _refused_key(self, status: int | None) -> lm15.AuthError:
        return lm15.AuthError(
            f"the server at {self.api_base} refused the key. Give LoRALM(api_key=...) or set {API_KEY_VARIABLE}.",
            status=status,
        )

    def _nonsense(self, path: str, body: str) -> lm15.ServerError:
        return lm15.ServerError(
            f"{self.api_base}{path} answered {body[:200]!r}, which is no answer of an OpenAI-compatible server"
        )


def _lists(cards: list[dict[str, Any]], name: str) -> bool:
    return any(card["id"] == name for card in cards)


class RemoteEngine(_Remote):
    """The sync engine."""

    def __reduce__(self) -> tuple[Any, ...]:
        return remote_engine, (self.api_base, None, self.base, self.supports_reasoning)  # the key stays here

    def _start_over(self) -> None:
        super()._start_over()
        self._opened: lm15.LMRouter | None = None

    @property
    def _router(self) -> lm15.LMRouter:
        with self._opening:  # of two, ``close`` would not find one
            if self._opened is None:
                self._opened = lm15.LMRouter(self._config())
            return self._opened

    def complete(self, request: lm15.Request) -> lm15.Response:
        """Answers one request; the samples of one call are one request."""
        request = choose_model(self.routes, request)
        group = Samples.current()
        if (ready := group.take()) is not None:
            return ready
        routed = self._route(request, group.ask(request))
        with self._errors(request.model):
            responses = (
                self._many(routed)
                if group.ask(request) > 1
                else [self._router.lm(f"vllm:{routed.model}").complete(routed)]
            )
        return group.keep([_named(response, request.model) for response in responses])

    def stream(self, request: lm15.Request) -> Iterator[Any]:
        """Stream events, token by token. Several samples of one call are drawn first and shown one by one."""
        request = choose_model(self.routes, request)
        if Samples.current().wanted > 1:
            yield from translate.at_once(self.complete(request))
            return
        routed = self._route(request)
        with self._errors(request.model):
            yield from self._router.lm(f"vllm:{routed.model}").stream(routed)

    def close(self) -> None:
        """Closes the connections; the next call opens new ones."""
        with self._opening:
            opened = self._opened, self._client
            self._opened = self._client = None
        for each in opened:
            if each is not None:
                each.close()


class AsyncRemoteEngine(_Remote):
    """The async engine; keeps one pool of connections for each event loop."""

    def _start_over(self) -> None:
        super()._start_over()
        self._threads = ThreadPoolExecutor(_CONNECTIONS, "dspy-lora-http")
        self._routers: weakref.WeakKeyDictionary[Any, lm15.AsyncLMRouter] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return async_remote_engine, (self.api_base, None, self.base, self.supports_reasoning)  # the key stays here

    @property
    def _router(self) -> lm15.AsyncLMRouter:
        loop = asyncio.get_running_loop()
        if loop not in self._routers:
            self._drop_ended()
            self._routers[loop] = lm15.AsyncLMRouter(self._config())
        return self._routers[loop]

    def _drop_ended(self) -> None:
        """Closes the connections of event loops that have ended, which hold on to their loop."""
        for reference in self._routers.keyrefs():  # a list: other threads add theirs
            loop = reference()
            if loop is not None and loop.is_closed():
                self._routers.pop(loop, None)

    async def complete(self, request: lm15.Request) -> lm15.Response:
        """Answers one request; the samples of one call are one request."""
        request = choose_model(self.routes, request)
        group = Samples.current()
        if (ready := group.take()) is not None:
            return ready
        routed = await self._aside(self._route, request, group.ask(request))
        with self._errors(request.model):
            if group.ask(request) > 1:
                responses = await self._aside(self._many, routed)
            else:
                responses = [await self._router.lm(f"vllm:{routed.model}").complete(routed)]
        return group.keep([_named(response, request.model) for response in responses])

    async def stream(self, request: lm15.Request) -> AsyncIterator[Any]:
        """Stream events, token by token."""
        request = choose_model(self.routes, request)
        if Samples.current().wanted > 1:
            for event in translate.at_once(await self.complete(request)):
                yield event
            return
        routed = await self._aside(self._route, request)
        with self._errors(request.model):
            async for event in self._router.lm(f"vllm:{routed.model}").stream(routed):
                yield event

    async def _aside(self, blocks: Callable[..., T], *args: Any) -> T:
        """Runs what blocks in a thread of this engine: the event loop's own are few, and DSPy's calls wait for them."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, blocks, *args)

    async def aclose(self) -> None:
        """Closes this event loop's connections."""
        if router := self._routers.pop(asyncio.get_running_loop(), None):
            await router.aclose()
        with self._opening:
            client, self._client = self._client, None
        if client is not None:
            client.close()


def _unplug(router: lm15.AsyncLMRouter) -> None:
    """Puts the null device in the place of the sockets that a forked child has from its parent.

    Whatever closes a connection there, lm15's finaliser at the latest, would end the parent's TLS session and take the
    socket out of the parent's event loop: the two share what the loop waits with. Closing a sync one sends nothing.
    """
    if router._transport is None:  # nothing was asked
        return
    pool, null = router._transport._pool, os.open(os.devnull, os.O_RDWR)
    for connection in itertools.chain(pool._in_use, *pool._idle.values()):
        socket = connection.writer.get_extra_info("socket")
        if socket is not None and socket.fileno() >= 0:  # else it is closed
            os.dup2(null, socket.fileno(), inheritable=False)
    os.close(null)


def _named(response: lm15.Response, model: str) -> lm15.Response:
    return dataclasses.replace(response, model=model)


def _start_over_in_fork() -> None:
    engines = list(_engines)
    routers = [router for each in engines if isinstance(each, AsyncRemoteEngine) for router in each._routers.values()]
    for engine in engines:
        engine._start_over()
    for router in routers:
        _unplug(router)


_engines: weakref.WeakSet[_Remote] = weakref.WeakSet()  # of this process
os.register_at_fork(after_in_child=_start_over_in_fork)


@functools.cache
def remote_engine(api_base: str, api_key: str | None, base: Base, thinks: bool = False) -> RemoteEngine:
    """The one sync engine object of this process for a server.

    Args:
        api_base: Its address.
        api_key: The key for it; None takes the environment's.
        base: The base model.
        thinks: Whether it tells reasoning from the answer.
    """
    return RemoteEngine(api_base, api_key, base, thinks)


@functools.cache
def async_remote_engine(api_base: str, api_key: str | None, base: Base, thinks: bool = False) -> AsyncRemoteEngine:
    """The one async engine object of this process for a server, with the arguments of ``remote_engine``."""
    return AsyncRemoteEngine(api_base, api_key, base, thinks)
