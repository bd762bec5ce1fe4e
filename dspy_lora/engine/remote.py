"""Engine objects for a running server that speaks vLLM's OpenAI API: vLLM itself, or Ray Serve LLM.

The requests are DSPy's own ``lm15`` client's; what is added is loading adapters on the server, names, and vLLM's
sampling settings. Adapters are loaded through ``/v1/load_lora_adapter``, for which a vLLM server must run with
``VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`` and see the adapter's folder under the same path; a server that already lists the
adapter's name needs neither.
"""

import asyncio
import dataclasses
import functools
import os
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
from dspy import lm15

from dspy_lora.adapters.base import Base
from dspy_lora.engine import translate
from dspy_lora.engine.protocol import Adapter

_TIMEOUT_S = 30.0
API_KEY_VARIABLE = "DSPY_LORA_API_KEY"


class _Remote:
    """What the sync and the async engine share: the server's address, its models, and loading adapters."""

    supports_response_schema = True
    supports_function_calling = True
    supports_reasoning = True
    supported_params = frozenset(
        {
            "temperature", "max_tokens", "top_p", "top_k", "stop", "seed", "logprobs", "top_logprobs",
            "frequency_penalty", "presence_penalty", "logit_bias", "response_format", "tools", "tool_choice", "stream",
        }
    )  # fmt: skip

    def __init__(self, api_base: str, api_key: str | None, base: Base) -> None:
        self.api_base = api_base.rstrip("/")
        self.api_key = api_key
        self.base = base
        self.adapters: dict[str, Adapter] = {}
        self._served: dict[str, str] = {}
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Remote":
        return self

    def serve(self, model: str, adapter: Adapter | None) -> None:
        """Says which adapter a model string stands for."""
        if adapter is not None:
            self.adapters[model] = adapter

    def preload(self, model: str) -> None:
        """Loads the adapter of a model string on the server."""
        self._name(model)

    def unload(self, model: str) -> None:
        """Makes the server forget the adapter of a model string."""
        if adapter := self.adapters.get(model):
            with self._lock:
                self._served.pop(model, None)
                self._http("POST", self.api_base, "/unload_lora_adapter", {"lora_name": adapter.name})

    def stats(self) -> dict[str, Any]:
        """The models and adapters the server lists."""
        return {"models": [card["id"] for card in self._models()]}

    def shutdown(self) -> None:
        """Nothing: the server is not ours."""

    def _key(self) -> str:
        return self.api_key or os.environ.get(API_KEY_VARIABLE) or "EMPTY"

    def _config(self) -> lm15.RouterConfig:
        return lm15.RouterConfig(api_keys={"vllm": self._key()}, base_urls={"vllm": self.api_base})

    def _route(self, request: lm15.Request) -> lm15.Request:
        """The request as the server wants it: its own name for the model, vLLM's settings at the top level."""
        knobs = translate.vllm_knobs(request.config)
        config = dataclasses.replace(request.config, extensions=knobs or None)
        return dataclasses.replace(request, model=self._name(request.model), config=config)

    def _name(self, model: str) -> str:
        """The server's name for a model string; loads the adapter at its first use."""
        with self._lock:
            if model not in self._served:
                self._served[model] = self._load(model)
            return self._served[model]

    def _load(self, model: str) -> str:
        cards = self._models()
        adapter = self.adapters.get(model)
        if adapter is None:
            return self._base_name(cards)
        if all(card["id"] != adapter.name for card in cards):
            self._http(
                "POST", self.api_base, "/load_lora_adapter", {"lora_name": adapter.name, "lora_path": adapter.path}
            )
        return adapter.name

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
        body = self._http("GET", self.api_base, "/models")
        if not isinstance(body, dict) or not isinstance(body.get("data"), list):
            raise lm15.ServerError(f"{self.api_base}/models answered {str(body)[:200]!r}, which is no list of models")
        return [card for card in body["data"] if isinstance(card, dict) and isinstance(card.get("id"), str)]

    def _http(self, method: str, root: str, path: str, body: Any = None) -> Any:
        headers = {"Authorization": f"Bearer {self._key()}"}
        try:
            reply = httpx.request(method, root + path, json=body, headers=headers, timeout=_TIMEOUT_S)
        except httpx.HTTPError as exc:
            raise lm15.TransportError(f"no answer from the server at {root}: {exc}") from exc
        if reply.status_code == 404 and path.endswith("lora_adapter"):
            raise lm15.ConfigurationError(
                f"the server at {root} does not load adapters at run time. Start vLLM with "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora, or list the adapter with --lora-modules."
            )
        if reply.status_code >= 400:
            kind = lm15.ServerError if reply.status_code >= 500 else lm15.InvalidRequestError
            raise kind(f"{root}{path} refused: {reply.text[:500]}", status=reply.status_code)
        try:
            return reply.json()
        except ValueError:
            return reply.text


class RemoteEngine(_Remote):
    """The sync engine."""

    def __reduce__(self) -> tuple[Any, ...]:
        return remote_engine, (self.api_base, self.api_key, self.base)

    @functools.cached_property
    def _router(self) -> lm15.LMRouter:
        return lm15.LMRouter(self._config())

    def complete(self, request: lm15.Request) -> lm15.Response:
        """Answers one request; the OpenAI API draws the samples of one call one at a time."""
        routed = self._route(request)
        return _named(self._router.lm(f"vllm:{routed.model}").complete(routed), request.model)

    def stream(self, request: lm15.Request) -> Iterator[Any]:
        """Stream events, token by token."""
        routed = self._route(request)
        yield from self._router.lm(f"vllm:{routed.model}").stream(routed)

    def close(self) -> None:
        """Closes the connections; the next call opens new ones."""
        if router := self.__dict__.pop("_router", None):
            router.close()


class AsyncRemoteEngine(_Remote):
    """The async engine; keeps one pool of connections for each event loop."""

    def __init__(self, api_base: str, api_key: str | None, base: Base) -> None:
        super().__init__(api_base, api_key, base)
        self._routers: weakref.WeakKeyDictionary[Any, lm15.AsyncLMRouter] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return async_remote_engine, (self.api_base, self.api_key, self.base)

    def _router(self) -> lm15.AsyncLMRouter:
        loop = asyncio.get_running_loop()
        if loop not in self._routers:
            self._routers[loop] = lm15.AsyncLMRouter(self._config())
        return self._routers[loop]

    async def complete(self, request: lm15.Request) -> lm15.Response:
        """Answers one request."""
        routed = await asyncio.to_thread(self._route, request)
        return _named(await self._router().lm(f"vllm:{routed.model}").complete(routed), request.model)

    async def stream(self, request: lm15.Request) -> AsyncIterator[Any]:
        """Stream events, token by token."""
        routed = await asyncio.to_thread(self._route, request)
        async for event in self._router().lm(f"vllm:{routed.model}").stream(routed):
            yield event

    async def aclose(self) -> None:
        """Closes this event loop's connections."""
        if router := self._routers.pop(asyncio.get_running_loop(), None):
            await router.aclose()


def _named(response: lm15.Response, model: str) -> lm15.Response:
    return dataclasses.replace(response, model=model)


@functools.cache
def remote_engine(api_base: str, api_key: str | None, base: Base) -> RemoteEngine:
    """The one sync engine object of this process for a server."""
    return RemoteEngine(api_base, api_key, base)


@functools.cache
def async_remote_engine(api_base: str, api_key: str | None, base: Base) -> AsyncRemoteEngine:
    """The one async engine object of this process for a server."""
    return AsyncRemoteEngine(api_base, api_key, base)
