"""LoRALM: a ``dspy.LM`` bound to one adapter revision of a base model that vLLM serves."""

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dspy
from dspy import lm15
from dspy.clients.base_lm import LM_CLASS_STATE_KEY, BaseLM

from dspy_lora.adapters.base import Base, resolve_base
from dspy_lora.adapters.registry import AdapterRegistry, Revision
from dspy_lora.auto import NAME as AUTO
from dspy_lora.auto import AutoRoute
from dspy_lora.config import ServingConfig, load_config
from dspy_lora.detection.classifier import DomainClassifier
from dspy_lora.engine.flights import aflight, flight, flight_key
from dspy_lora.engine.local import AsyncLocalEngine, LocalEngine, async_local_engine, local_engine
from dspy_lora.engine.protocol import Adapter
from dspy_lora.engine.samples import sampling
from dspy_lora.engine.settings import engine_settings
from dspy_lora.engine.translate import ANSWERS, VLLM_KNOBS
from dspy_lora.errors import AdapterError, ChangedAdapterError, ConfigError
from dspy_lora.training.provider import LoRAProvider

if TYPE_CHECKING:
    from dspy_lora.engine.remote import AsyncRemoteEngine, RemoteEngine

_MODEL = re.compile(r"lora/(?P<base>.+?)@(?P<revision>[0-9a-f]{12}|main)(?:/(?P<adapter>[a-z0-9_-]+@[0-9a-f]{12}))?")
_BOUND = (
    "_binding", "_base", "_registry", "_adapter", "_auto", "_answers", "model", "provider", "_engine_spec",
    "_async_engine_spec",
)  # fmt: skip
_REBIND = (
    "domain",
    "model",
    "registry",
    "engine",
    "api_base",
    "api_key",
    "classifier",
)  # what a copy may change beside sampling
_NAMED = {  # arguments that LoRALM has under another name
    "base": "the base is LoRALM's first argument, `model`.",
    "base_model": "the base is LoRALM's first argument, `model`.",
    "adapter": "an adapter's name is LoRALM's argument `domain`.",
}
_OF_SERVERS = ("reasoning_parser",)  # settings that are of use where the engine is a server's
_OF_TRAINING = ("finetuning_model", "launch_kwargs", "train_kwargs", "use_developer_role")  # which dspy.LM saves too
_SAMPLING = ("temperature", "max_tokens")  # which have defaults, and may have been taken back with None


@dataclasses.dataclass(frozen=True)
class _Binding:
    """What a LoRALM was asked for, enough to build it again."""

    base: str | None
    registry: str | None
    engine: dict[str, Any]
    api_base: str | None
    classifier: str | None = None
    api_key: str | None = dataclasses.field(default=None, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Binding, (self.base, self.registry, self.engine, self.api_base, self.classifier)  # no key in a pickle


class LoRALM(dspy.LM):
    """A language model for DSPy: a base model with one LoRA adapter, or without.

    All LoRALMs of one base and equal engine settings share one vLLM engine, which answers calls to different adapters
    in one batch. The engine starts at the first call, in a process of its own.

    Args:
        model: The base model: a folder, a Hugging Face name, or ``"seedling"``; None takes the configured one, else
            the bundled seedling. A model string of another LoRALM (``lora/...``) is taken apart.
        domain: Name of the adapter, ``"legal"`` for its current revision or ``"legal@0123456789ab"`` for that one; None
            for the base model alone; ``"auto"`` for whichever adapter the classifier chooses call by call, or none,
            by the last user message (a conversation that is to stay with one adapter goes through ``LoRARouter``). The
            revision is fixed here: ``copy(domain="legal")`` takes a newer one.
        registry: Folder of the adapter registry; None takes the configured one, else ``adapters/`` in the working
            directory. Where the base is the seedling, its bundled adapters lie under either.
        classifier: Folder of the ``DomainClassifier`` that ``domain="auto"`` asks; None takes the packaged one, which
            knows the domains of ``lora_config.yaml``.
        engine: Settings of the engine: keys of ``serving`` in ``lora_config.yaml``, or any argument of
            ``vllm.AsyncEngineArgs``. With ``api_base`` the server's own count, but for ``reasoning_parser``: one says
            that the server has it, so that ``dspy.Reasoning`` fields are filled with what the model thought.
        api_base: Address of a running OpenAI-compatible vLLM server, to be used instead of an own engine.
        api_key: Key for that server; else the environment variable ``DSPY_LORA_API_KEY``.
        temperature: Sampling temperature; 0 is greedy.
        max_tokens: Largest number of new tokens; less where the context ends.
        **kwargs: As for ``dspy.LM`` (``cache``, ``callbacks``, ``num_retries``, ``top_p``, ``top_k``, ``seed``,
            ``stop``, ``logprobs``, ``n``...) and vLLM's ``min_p``, ``repetition_penalty``, ``min_tokens``,
            ``bad_words``, ``structured_outputs``, ``chat_template_kwargs`` (see ``engine/translate.py``).

    Raises:
        UnknownAdapterError: No such adapter; the message names the near ones.
        AdapterError: The adapter was made for another base.
        ConfigError: A setting is not allowed.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        domain: str | None = None,
        registry: str | Path | None = None,
        classifier: str | Path | None = None,
        engine: dict[str, Any] | None = None,
        api_base: str | None = None,
        api_key: str | None = None,
        temperature: float | None = 0.0,
        max_tokens: int | None = 1024,
        **kwargs: Any,
    ) -> None:
        _check_settings(kwargs)
        model = _text(model)
        named = _MODEL.fullmatch(model or "")
        if named:
            model, domain = named["base"], domain or named["adapter"]
        own = copy.deepcopy(engine) if engine else {}
        self._binding = _Binding(model, _text(registry), own, api_base, _text(classifier), api_key)
        config = load_config()
        self._base = resolve_base(model or config.base_model)
        if named and not self._base.is_recorded(named["base"], named["revision"]):
            raise ConfigError(
                f"{named.string!r} names another revision of base {self._base.name!r}: here it is at "
                f"{self._base.revision}. Give the base's name alone to take this one."
            )
        self._registry = AdapterRegistry(registry, base=self._base.name)
        self._auto = self._auto_route() if domain is not None and domain.split("@")[0] == AUTO else None
        self._adapter = None if self._auto else self._resolve(domain)
        pair = self._engine_pair(config)
        settings = pair[0].settings if isinstance(pair[0], LocalEngine) else None
        self._answers = settings.answers if settings else None
        super().__init__(
            model=self.model_string(self.ref),
            temperature=temperature,
            max_tokens=max_tokens,
            engine=pair[0],
            async_engine=pair[1],
            **_with_knobs(kwargs, {}),
        )
        self.provider = LoRAProvider(self._base, self._registry, settings)
        self._announce()

    # -- what it is bound to ---------------------------------------------------------------------------------------

    @property
    def base(self) -> Base:
        """The base model."""
        return self._base

    @property
    def domain(self) -> str | None:
        """Name of the adapter, ``"auto"`` where every call chooses; None for the base model alone."""
        return self._adapter.adapter if self._adapter else AUTO if self._auto else None

    @property
    def adapter(self) -> Revision | None:
        """The adapter revision that answers; None for the base model alone, and where every call chooses."""
        return self._adapter

    @property
    def registry(self) -> AdapterRegistry:
        """Where its adapters are."""
        return self._registry

    @property
    def asked_registry(self) -> str | None:
        """The registry as it was given; None is the configured one over the seedling's own."""
        return self._binding.registry

    def _resolve(self, domain: str | None) -> Revision | None:
        if domain is None:
            return None
        revision = self._registry.resolve(domain)
        revision.check_base(self._base, "Give its own base")
        return revision

    def _auto_route(self) -> AutoRoute:
        folder = self._binding.classifier
        classifier = DomainClassifier.load(folder) if folder else DomainClassifier.packaged()
        mine = [each for each in self._registry.list() if each.is_for(self._base)]
        known = [each for each in mine if each.adapter in classifier.domains]
        models = {None: self.model_string(None)} | {each.adapter: self.model_string(each.ref) for each in known}
        return AutoRoute(classifier, models, known)

    def model_string(self, ref: str | None) -> str:
        """The model string of an adapter of this LM's base, or of the base alone."""
        name = f"lora/{self._base.name}@{self._base.revision}"
        return f"{name}/{ref}" if ref else name

    @property
    def ref(self) -> str | None:
        """What answers, by content: ``legal@0123456789ab``, ``auto@...``; None for the base model alone."""
        return self._adapter.ref if self._adapter else self._auto.ref if self._auto else None

    def _engine_pair(
        self, config: Any
    ) -> "tuple[LocalEngine, AsyncLocalEngine] | tuple[RemoteEngine, AsyncRemoteEngine]":
        settings = engine_settings(self._base.for_engine, config, self._binding.engine)
        if self._binding.api_base is not None:
            from dspy_lora.engine.remote import async_remote_engine, remote_engine

            _check_server_s(self._binding.engine)
            thinks = settings.reasoning_parser is not None
            server = (self._binding.api_base, self._binding.api_key, self._base, thinks)
            return remote_engine(*server), async_remote_engine(*server)
        return local_engine(settings), async_local_engine(settings)

    def _get_initial_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        """Without dspy.LM's rules for OpenAI's models, which it knows by a model string's end, as in gpt-5-distill."""
        found = BaseLM._get_initial_kwargs(self, **kwargs)
        return {key: value for key, value in found.items() if key != "rollout_id" or value is not None}

    def _announce(self) -> None:
        """Tells the engine objects which adapter this model string means, or how one is chosen."""
        adapters = self._auto.revisions if self._auto else (self._adapter,) if self._adapter else ()
        for engine in (self._engine_spec, self._async_engine_spec):
            engine.serve(self.model_string(None), None)
            if self._auto:
                engine.routes[self.model] = self._auto
            for each in adapters:
                engine.serve(self.model_string(each.ref), Adapter(each.ref, str(each.path)))
        if isinstance(self._engine_spec, LocalEngine):
            self._engine_spec.know(self._registry)

    # -- calls -----------------------------------------------------------------------------------------------------

    def __call__(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Any:
        """As ``dspy.LM``; ``n`` samples are one engine request, and so are equal cached calls at once."""
        prompt, kwargs = self._marked(prompt, kwargs)
        with flight(flight_key(self, prompt, messages, kwargs)), sampling(_samples(prompt, kwargs, self.kwargs)):
            return super().__call__(prompt, messages=messages, **kwargs)

    async def acall(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Any:
        """Async equivalent of ``__call__``."""
        prompt, kwargs = self._marked(prompt, kwargs)
        with sampling(_samples(prompt, kwargs, self.kwargs)):
            async with aflight(flight_key(self, prompt, messages, kwargs)):
                return await super().acall(prompt, messages=messages, **kwargs)

    def _marked(self, prompt: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A call as DSPy takes it, marked for its cache with the settings of the engine that answers depend on."""
        mark = {ANSWERS: self._answers} if self._answers else {}
        typed = prompt if isinstance(prompt, lm15.Request) else kwargs.get("request")
        if typed is None:
            return prompt, _with_knobs(kwargs | mark, self.kwargs)
        if mark:
            config = dataclasses.replace(typed.config, extensions={**(typed.config.extensions or {}), **mark})
            typed = dataclasses.replace(typed, config=config)
        return (typed, kwargs) if isinstance(prompt, lm15.Request) else (prompt, kwargs | {"request": typed})

    # -- the engine ------------------------------------------------------------------------------------------------

    def preload(self) -> None:
        """Starts the engine if needed and loads this LM's adapter, so that the first call does not wait."""
        self._engine_spec.preload(self.model)

    def unload(self) -> None:
        """Takes this LM's adapter out of the engine once no call runs with it; the next call loads it again."""
        self._engine_spec.unload(self.model)

    def engine_stats(self) -> dict[str, Any]:
        """Figures of the running engine.

        Returns:
            Running and waiting requests, tokens per second since the last look, the adapters resident in it, how
            many are in its CPU memory (used or not), prefix-cache queries and hits (tokens), uptime in seconds,
            restarts; where no engine runs, none is started, and ``pid`` is None.
        """
        return self._engine_spec.stats()

    def launch(self, launch_kwargs: dict[str, Any] | None = None) -> None:
        """Starts the engine and waits until it serves (DSPy's optimizers call this)."""
        self.preload()

    def kill(self, launch_kwargs: dict[str, Any] | None = None) -> None:
        """Ends the engine and frees its memory; the next call of any LM starts it again.

        DSPy's optimizers call this before they train, and on LMs that their callers go on using.
        """
        self._engine_spec.shutdown()

    # -- copies and files ------------------------------------------------------------------------------------------

    def copy(self, **kwargs: Any) -> "LoRALM":
        """A copy with other settings, or bound to another adapter: ``lm.copy(domain="legal", temperature=1.0)``.

        Args:
            **kwargs: Sampling settings, or ``domain``, ``model``, ``registry``, ``engine``, ``api_base``.
                ``domain=None`` is the base model alone.
        """
        _check_settings(kwargs)
        rebind = {key: kwargs.pop(key) for key in _REBIND if key in kwargs}
        copied: LoRALM = super().copy(**_with_knobs(kwargs, self.kwargs))
        if rebind:
            copied.rebind(**rebind)
        return copied

    def rebind(self, **changes: Any) -> None:
        """Binds this object itself to another adapter, base, registry or engine; ``copy`` leaves it as it is.

        Args:
            **changes: As for the class.
        """
        if "model" in changes:
            changes.setdefault("domain", None)
        domain = changes.pop("domain", self.ref)
        binding = dataclasses.asdict(self._binding)
        if changes.get("api_base") is not None:  # the server has an engine of its own
            binding["engine"] = _of_servers(binding["engine"])
        other = LoRALM(
            changes.pop("model", binding.pop("base")),
            domain=domain,
            **{key: value for key, value in binding.items() if key != "base"} | changes,
        )
        for name in _BOUND:
            setattr(self, name, getattr(other, name))

    def __deepcopy__(self, memo: dict[int, Any]) -> "LoRALM":
        """A handle of its own with an empty history, on the same engine."""
        return self.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._announce()

    def dump_state(self) -> dict[str, Any]:
        """What ``program.save`` writes: the base's and the adapter's revision, sampling settings, no key."""
        state: dict[str, Any] = BaseLM.dump_state(self)
        state |= {"registry": self._binding.registry, "engine": self._binding.engine, "base": self._binding.base}
        state |= {name: value for name in _OF_TRAINING if (value := vars(self)[name]) and _is_json(value)}
        if self._binding.classifier is not None:
            state["classifier"] = self._binding.classifier
        if self._binding.api_base is not None:
            state["server"] = self._binding.api_base
        return state

    @classmethod
    def load_state(cls, state: dict[str, Any], *, allow_custom_lm_class: bool = False) -> "LoRALM":
        """Builds the LM that ``dump_state`` wrote.

        Raises:
            ChangedAdapterError: The base or the adapter revision is gone or its content has changed.
        """
        state = {key: value for key, value in state.items() if key not in (LM_CLASS_STATE_KEY, "model_type")}
        saved, base = state.pop("model"), state.pop("base", None)
        match = _MODEL.fullmatch(saved)
        if match is None:
            raise ConfigError(f"{saved!r} is no model string of a LoRALM (lora/<base>@<revision>/<adapter>@<revision>)")
        server = state.pop("server", None)
        if server is not None:
            state["engine"] = _of_servers(state.get("engine") or {})
        try:
            lm = cls(base, domain=match["adapter"], api_base=server, **state)
        except AdapterError as exc:
            raise ChangedAdapterError(f"the program was saved with adapter {match['adapter']!r}: {exc}") from exc
        lm._check_unchanged(match)
        return lm.copy(**dict.fromkeys(name for name in _SAMPLING if name not in state))

    def _check_unchanged(self, saved: re.Match[str]) -> None:
        if not self._base.is_recorded(saved["base"], saved["revision"]) or saved["adapter"] != self.ref:
            raise ChangedAdapterError(
                f"the program was saved with {saved.string!r}, but the base here is {self._base.name!r} at revision "
                f"{self._base.revision} and the LM is {self.model!r}. Bring what was saved back, or compile again."
            )
        if self._adapter is not None:
            self._registry.verify(self._adapter)


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


def _check_settings(kwargs: dict[str, Any]) -> None:
    """Refuses the engine's settings among a call's, where they would wait for the first call to be refused.

    Raises:
        ConfigError: There are some.
    """
    for key in kwargs.keys() & _NAMED.keys():
        raise ConfigError(f"{key}={kwargs[key]!r}: {_NAMED[key]}")
    if found := {key: kwargs[key] for key in kwargs if key in ServingConfig.model_fields}:
        raise ConfigError(f"{', '.join(found)}: of the engine, not of a call. Give LoRALM(engine={found!r}).")


def _of_servers(engine: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in engine.items() if key in _OF_SERVERS}


def _is_json(value: Any) -> bool:
    """Whether a saved program can hold a value: not a path, an adapter..."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _check_server_s(engine: dict[str, Any]) -> None:
    """Refuses settings that a running server cannot be given.

    Raises:
        ConfigError: There are some.
    """
    if idle := {key: value for key, value in engine.items() if key not in _OF_SERVERS}:
        raise ConfigError(
            f"engine={idle!r}: the server at api_base was started with settings of its own. Start it with these, and "
            f"give LoRALM no more than {', '.join(map(repr, _OF_SERVERS))} of them."
        )


def _with_knobs(kwargs: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Moves vLLM's own sampling settings into ``metadata``, the one key DSPy hands on and caches by."""
    kwargs = dict(kwargs)
    if kwargs.get("top_k") in (0, -1):  # vLLM's words for "all tokens"; DSPy's is absence
        kwargs["top_k"] = None
    knobs = {key: kwargs.pop(key) for key in list(kwargs) if key in VLLM_KNOBS or key == ANSWERS}
    if knobs or kwargs.get("metadata"):
        metadata = (defaults.get("metadata") or {}) | (kwargs.get("metadata") or {}) | knobs
        kwargs["metadata"] = {key: value for key, value in metadata.items() if value is not None}
    return kwargs


def _samples(prompt: Any, kwargs: dict[str, Any], defaults: dict[str, Any]) -> int:
    """How many answers DSPy will ask the engine for; a typed request has one."""
    if isinstance(prompt, lm15.Request) or "request" in kwargs:
        return 1
    return kwargs.get("n", defaults.get("n")) or 1
