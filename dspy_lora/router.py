"""LoRARouter: a ``dspy.Module`` that sends each query to the adapter of its domain."""

import copy
import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import dspy

from dspy_lora.adapters.registry import AdapterRegistry
from dspy_lora.detection.classifier import DomainClassifier
from dspy_lora.errors import ConfigError, DataError, UnknownAdapterError, near
from dspy_lora.lm import LoRALM

logger = logging.getLogger(__name__)

_BESIDE = ("cache", "num_retries", "callbacks")  # settings of an LM beside those of a request

QUERY = "query"
ROUTE = "route"  # the field of a prediction that says which adapter answered


@dataclasses.dataclass(frozen=True)
class Route:
    """Which adapter answers, and why.

    Attributes:
        adapter: Its name; None is the base model.
        by: Who decided: ``"classifier"``, ``"caller"`` or ``"history"``.
        reason: One sentence.
        probability: The classifier's calibrated probability of the likeliest domain; None where it was not asked.
        runner_up: The next likely domain.
    """

    adapter: str | None
    by: str
    reason: str
    probability: float | None = None
    runner_up: str | None = None

    def toDict(self) -> dict[str, Any]:
        """What ``dspy.Evaluate`` writes to JSON and CSV; the name is DSPy's."""
        return dataclasses.asdict(self)


class LoRARouter(dspy.Module):
    """Runs a program on the adapter that fits the query; each call decides once, for all predictors in it.

    A conversation (an input of type ``dspy.History``) stays with its adapter: that of its latest turn that has a
    ``route`` (``{"question": ..., **prediction}`` puts it there), else the one its turns would have been sent to. A
    conversation that the base model has answered so far is still open.

    The adapter takes the place of ``dspy.settings.lm`` during the call, so a predictor with an LM of its own keeps it.
    Batches, streaming and saving are DSPy's: ``router.batch(examples)``, ``dspy.streamify(router)``, ``router.save``.
    Async calls need a program with ``aforward``, as DSPy's own modules have.

    ``dspy.BestOfN(router, ...)`` and ``dspy.Refine`` sample from the adapters: see ``set_lm``. Where the router is a
    part of another module, DSPy sets the predictors' LMs past it, and no route reaches them.

    Args:
        adapters: The adapter of each domain: a name in the registry (``"legal"``, ``"legal@0123456789ab"``), a folder
            (``"adapters/legal_lora"``: it is published under the domain's name), or an LM. A list of names stands for
            adapters of those names.
        program: What runs; None is ``dspy.Predict("query -> answer")``.
        classifier: Knows every domain of ``adapters``; None takes the packaged one. A query of a domain that has no
            adapter here goes to the base model.
        threshold: Smallest margin (the likeliest domain's probability minus the next one's) at which an adapter is
            chosen; None takes the classifier's own.
        registry: Folder of the adapter registry; None as for ``LoRALM``.
        make_lm: Called as ``LoRALM`` with ``domain`` (None for the base model) and, where given, ``registry``. For
            another base: ``functools.partial(LoRALM, "Qwen/Qwen3-8B")``.
        input_field: The program's input that ``query`` is passed as; None takes ``query``, else its only input.

    Raises:
        ConfigError: No adapters, or a domain that the classifier does not know.
        UnknownAdapterError: No such adapter in the registry.
    """

    def __init__(
        self,
        adapters: Mapping[str, "str | Path | dspy.BaseLM"] | Iterable[str],
        program: dspy.Module | None = None,
        classifier: DomainClassifier | None = None,
        threshold: float | None = None,
        *,
        registry: str | Path | None = None,
        make_lm: Callable[..., dspy.BaseLM] = LoRALM,
        input_field: str | None = None,
    ) -> None:
        super().__init__()
        wanted = _by_name(adapters)
        self.program = program or dspy.Predict("query -> answer")
        self.classifier = classifier or DomainClassifier.packaged()
        self.threshold = threshold
        for name in wanted:
            self.classifier.check_domain(name)
        place = {} if registry is None else {"registry": registry}
        self._base_lm = make_lm(domain=None, **place)
        self._lms = {
            name: wish if isinstance(wish, dspy.BaseLM) else make_lm(domain=self._ref(name, wish, registry), **place)
            for name, wish in wanted.items()
        }
        self._changed = dict[str | None, dspy.BaseLM]()  # copies of all of them with the settings that `set_lm` brought
        self._input_field = input_field or _only_input(self.program)
        if own := with_own_lms(self.program):
            logger.warning("%s have LMs of their own, which no adapter replaces", ", ".join(own))

    def _ref(self, name: str, wish: str | Path, registry: str | Path | None) -> str:
        """The name of an adapter in the registry; a folder is published first (again changes nothing)."""
        if isinstance(wish, str) and "/" not in wish:
            return wish
        base = self._base_lm.base if isinstance(self._base_lm, LoRALM) else None
        return AdapterRegistry(registry).publish(wish, name, base=base).ref

    @property
    def adapters(self) -> dict[str, dspy.BaseLM]:
        """The LM of each domain."""
        return {name: self._changed.get(name, lm) for name, lm in self._lms.items()}

    def uncached(self) -> "LoRARouter":
        """The same router on LMs that answer nothing from DSPy's cache."""
        other = copy.copy(self)
        other._base_lm = self._base_lm.copy(cache=False)
        other._lms = {name: lm.copy(cache=False) for name, lm in self._lms.items()}
        other._changed = {name: lm.copy(cache=False) for name, lm in self._changed.items()}
        return other

    def get_lm(self) -> dspy.BaseLM:
        """The base model's LM, whose copies ``set_lm`` takes settings from; that of all predictors where they have one.

        Raises:
            ConfigError: Some predictors have LMs of their own, and there is no one LM to name.
        """
        return self.lm_for([self.program])

    def set_lm(self, lm: dspy.BaseLM | None) -> None:
        """Changes the settings of all adapters and the base model, or takes another LM in their place.

        Args:
            lm: The base model's LM with other settings (``router.get_lm().copy(temperature=1.0, rollout_id=1)``, as
                ``dspy.BestOfN`` and ``dspy.Refine`` make it): what it changes of them, the LM of every adapter takes
                over, and the route decides for every predictor. Another LM: every predictor gets it for its own, as
                with DSPy's ``set_lm``, and the route's reason says so. None: the LMs are again as they were given, and
                the predictors have none of their own. (The base model for the predictors' own:
                ``router.program.set_lm``.)
        """
        self.set_lm_for([self.program], lm)

    def lm_for(self, programs: Iterable[dspy.Module]) -> dspy.BaseLM:
        """``get_lm`` of a module that runs these programs on the router's LMs."""
        own = _lms_of(programs)
        if len(set(own)) > 1:
            raise ConfigError(
                "some predictors have LMs of their own, so there is no one LM to get. `set_lm(None)` leaves all of "
                "them to the route."
            )
        return next((lm for lm in own if lm is not None), self._changed.get(None, self._base_lm))

    def set_lm_for(self, programs: Sequence[dspy.Module], lm: dspy.BaseLM | None) -> None:
        """``set_lm`` of a module that runs these programs on the router's LMs."""
        # A program that was given the base model for its own keeps to it: its copies are no settings for adapters.
        routed = lm is None or (self._is_base(lm) and not any(self._is_base(each) for each in _lms_of(programs)))
        changes = _changes(self._base_lm, lm) if routed and lm is not None else {}
        self._changed = {name: self._given(name).copy(**changes) for name in (None, *self._lms)} if changes else {}
        for program in programs:
            program.set_lm(None if routed else lm)

    def _given(self, adapter: str | None) -> dspy.BaseLM:
        """The LM of an adapter, or of the base model, as it was given."""
        return self._base_lm if adapter is None else self._lms[adapter]

    def _is_base(self, lm: dspy.BaseLM | None) -> bool:
        """Whether an LM is the base model's, in whatever settings."""
        if lm is None or type(lm) is not type(self._base_lm) or lm.model != self._base_lm.model:
            return False
        return not isinstance(lm, LoRALM) or lm.engine is self._base_lm.engine  # else elsewhere

    def dump_state(self, json_mode: bool = True) -> dict[str, Any]:
        """The program's state; DSPy itself leaves out a program that is compiled."""
        return {"program": self.program.dump_state(json_mode=json_mode)}

    def load_state(self, state: dict[str, Any], **kwargs: Any) -> None:
        """Loads what ``dump_state`` gave."""
        self.program.load_state(state["program"], **kwargs)

    # -- deciding --------------------------------------------------------------------------------------------------

    def select_adapter(self, query: str, history: dspy.History | None = None, *, keep_adapter: bool = True) -> Route:
        """Chooses the adapter for a query.

        Args:
            query: The text.
            history: The conversation so far.
            keep_adapter: Stay with the conversation's adapter.

        Raises:
            DataError: The query is empty.
        """
        if not isinstance(query, str) or not query.strip():
            raise DataError(f"the query is {query!r}. Give a text, or name the adapter: execute_with_adapter.")
        kept = self._of(history) if history is not None and keep_adapter else None
        return kept or self._classified(query)

    def _classified(self, query: str) -> Route:
        choice = self.classifier.choose(query, self.threshold)
        adapter, reason = choice.domain, choice.reason
        if adapter is not None and adapter not in self._lms:
            adapter, reason = None, f"{reason}; no adapter for {adapter} here, left to the base model"
        return Route(adapter, "classifier", reason, choice.probability, choice.runner_up)

    def _of(self, history: dspy.History) -> Route | None:
        """The adapter of a conversation; None while it has none."""
        marks = [mark for message in history.messages if (mark := _mark(message)) is not None]
        for mark in reversed(marks):
            if mark in self._lms:
                return Route(mark, "history", f"the conversation is with {mark}")
        if marks:
            return None  # what was said so far was left to the base model
        for message in history.messages:
            text = self._text_of(message)
            adapter = self._classified(text).adapter if text else None
            if adapter is not None:
                return Route(adapter, "history", f"the conversation began with {adapter}: {text[:60]!r}")
        return None

    def _text_of(self, message: Mapping[str, Any]) -> str:
        """What the user said in a turn."""
        found = message.get(self._input_field or QUERY, message.get(QUERY))
        return found.strip() if isinstance(found, str) else ""

    def _named(self, adapter: str | None) -> Route:
        if adapter is not None and adapter not in self._lms:
            raise UnknownAdapterError(
                f"the router has no adapter {adapter!r}. {near(adapter, self._lms)} None is the base model."
            )
        return Route(adapter, "caller", f"asked for {adapter or 'the base model'}")

    # -- running ---------------------------------------------------------------------------------------------------

    def route_and_execute(
        self, query: str | None = None, *, auto_detect_domain: bool = True, keep_adapter: bool = True, **inputs: Any
    ) -> dspy.Prediction:
        """Chooses the adapter and runs the program on it.

        Args:
            query: The text to choose by, passed to the program; None takes all texts among the inputs.
            auto_detect_domain: False takes the base model.
            keep_adapter: Stay with the conversation's adapter where there is a ``dspy.History`` among the inputs.
            **inputs: The program's other inputs.

        Returns:
            The program's prediction, with a field ``route``.

        Raises:
            DataError: There is no text to choose by.
            ConfigError: The program's inputs do not show which one the query is, or its outputs have a ``route``.
        """
        route = self.route(query, inputs, auto_detect_domain=auto_detect_domain, keep_adapter=keep_adapter)
        return self._run(route, self.inputs_of(query, inputs))

    async def aroute_and_execute(
        self, query: str | None = None, *, auto_detect_domain: bool = True, keep_adapter: bool = True, **inputs: Any
    ) -> dspy.Prediction:
        """Async equivalent of ``route_and_execute``."""
        route = self.route(query, inputs, auto_detect_domain=auto_detect_domain, keep_adapter=keep_adapter)
        return await self._arun(route, self.inputs_of(query, inputs))

    def execute_with_adapter(self, query: str | None = None, *, adapter: str | None, **inputs: Any) -> dspy.Prediction:
        """Runs the program on an adapter that the caller names; None is the base model.

        Raises:
            UnknownAdapterError: The router has no such adapter; the message names the near ones.
            DataError: The query is empty.
        """
        return self._run(self._named(adapter), self.inputs_of(query, inputs))

    async def aexecute_with_adapter(
        self, query: str | None = None, *, adapter: str | None, **inputs: Any
    ) -> dspy.Prediction:
        """Async equivalent of ``execute_with_adapter``."""
        return await self._arun(self._named(adapter), self.inputs_of(query, inputs))

    def forward(self, query: str | None = None, **inputs: Any) -> dspy.Prediction:
        """``route_and_execute``, so that a router is called, evaluated and optimized as its program is."""
        return self.route_and_execute(query, **inputs)

    async def aforward(self, query: str | None = None, **inputs: Any) -> dspy.Prediction:
        """Async equivalent of ``forward``."""
        return await self.aroute_and_execute(query, **inputs)

    def route(
        self,
        query: str | None,
        inputs: Mapping[str, Any],
        *,
        auto_detect_domain: bool = True,
        keep_adapter: bool = True,
    ) -> Route:
        """The decision of ``route_and_execute``, without running anything."""
        if not auto_detect_domain:
            return Route(None, "caller", "asked not to detect a domain: the base model")
        history = next((value for value in inputs.values() if isinstance(value, dspy.History)), None)
        if query is None:
            query = "\n".join(value for value in inputs.values() if isinstance(value, str))
        return self.select_adapter(query, history, keep_adapter=keep_adapter)

    def inputs_of(self, query: str | None, inputs: dict[str, Any]) -> dict[str, Any]:
        """The program's inputs, with the query under the name it has there.

        Raises:
            DataError: The query is empty.
            ConfigError: The program's inputs do not show which one the query is.
        """
        if query is None:
            return inputs
        if not isinstance(query, str) or not query.strip():
            raise DataError(f"the query is {query!r}. Give a text.")
        if self._input_field is None:
            raise ConfigError(
                f"{type(self.program).__name__} has several inputs and none is called {QUERY!r}. Say which one the "
                "query is: LoRARouter(..., input_field=...), or call the router with the program's own inputs."
            )
        return {self._input_field: query, **inputs}

    def lm_of(self, route: Route) -> dspy.BaseLM:
        """The LM that a route leads to."""
        return self._changed.get(route.adapter, self._given(route.adapter))

    def _run(self, route: Route, inputs: dict[str, Any]) -> dspy.Prediction:
        with dspy.context(lm=self.lm_of(route)):
            return marked(self.program(**inputs), but_for_own_lms(route, self.program))

    async def _arun(self, route: Route, inputs: dict[str, Any]) -> dspy.Prediction:
        with dspy.context(lm=self.lm_of(route)):
            return marked(await self.program.acall(**inputs), but_for_own_lms(route, self.program))


def with_own_lms(program: dspy.Module) -> list[str]:
    """Names of the predictors that no route reaches."""
    return [name for name, each in program.named_sub_modules(dspy.Predict) if each.lm is not None]


def _lms_of(programs: Iterable[dspy.Module]) -> list[dspy.BaseLM | None]:
    """The LM of its own, or None, of whatever DSPy's ``set_lm`` reaches in the programs."""
    leaves = [each for program in programs for each in program.parameters()]
    return [each.lm for each in leaves if isinstance(each, dspy.Module)]


def _changes(before: dspy.BaseLM, after: dspy.BaseLM) -> dict[str, Any]:
    """The settings that make one LM of another; None takes one away."""
    old, new = ({**lm.kwargs, **{name: getattr(lm, name, None) for name in _BESIDE}} for lm in (before, after))
    changes = {key: new.get(key) for key in old | new if new.get(key) != old.get(key)}
    if "rollout_id" in changes:  # at another temperature than it was made for it may change nothing
        changes["temperature"] = new.get("temperature")
    return changes


def but_for_own_lms(route: Route, program: dspy.Module) -> Route:
    """The route, saying in its reason which predictors of the program it does not reach."""
    if own := with_own_lms(program):
        return dataclasses.replace(route, reason=f"{route.reason}; {', '.join(own)} keep LMs of their own")
    return route


def _by_name(adapters: Mapping[str, Any] | Iterable[str]) -> dict[str, Any]:
    if isinstance(adapters, str):
        raise ConfigError(f"adapters is {adapters!r}. Give a list of names, or a mapping of domains to adapters.")
    found = dict(adapters) if isinstance(adapters, Mapping) else {name: name for name in adapters}
    if not found:
        raise ConfigError(
            "there are no adapters to route to. Give a list of names, or a mapping of domains to adapters."
        )
    return found


def parameters(program: dspy.Module) -> Mapping[str, inspect.Parameter]:
    """What a program takes, itself included: by its ``forward``, else by its ``aforward``.

    Raises:
        ConfigError: It has neither.
    """
    kind = type(program)
    if (forward := getattr(kind, "forward", None) or getattr(kind, "aforward", None)) is None:
        raise ConfigError(f"{kind.__qualname__} has neither forward nor aforward: it answers nothing.")
    return inspect.signature(forward).parameters


def _only_input(program: dspy.Module) -> str | None:
    """The program's input ``query``, else its only one beside the history; None where that is not clear."""
    _, *keywords = parameters(program).values()
    named = {
        each.name: each.annotation for each in keywords if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
    }
    predictors = program.predictors()
    if not named and predictors:
        named = {name: field.annotation for name, field in predictors[0].signature.input_fields.items()}
    inputs = [name for name, annotation in named.items() if annotation is not dspy.History and name != "history"]
    if QUERY in inputs or not named:
        return QUERY
    return inputs[0] if len(inputs) == 1 else None


def marked(prediction: Any, route: Route) -> dspy.Prediction:
    """A copy of a prediction with the field ``route``.

    Raises:
        ConfigError: It is no prediction, or has a ``route`` of its own.
    """
    if not isinstance(prediction, dspy.Prediction):
        raise ConfigError(f"the program returned {type(prediction).__name__}; a router needs a dspy.Prediction.")
    if ROUTE in prediction:
        raise ConfigError(
            f"the program has an output {ROUTE!r}, which is where the router says who answered. Rename it."
        )
    answered = prediction.copy(**{ROUTE: route})  # the program's own prediction may stand in a trace
    answered._completions = prediction._completions
    answered.set_lm_usage(prediction.get_lm_usage())
    return answered


def _mark(message: Mapping[str, Any]) -> str | None:
    """The adapter that a turn of a conversation names; an empty name for the base model, None for no mark."""
    match message.get(ROUTE):
        case Route(adapter=adapter) | {"adapter": adapter} if adapter is None or isinstance(adapter, str):
            return adapter or ""
    return None
