"""DomainPipeline: query -> domain -> adapter -> compiled prompts -> context -> answer, in one ``dspy.Module``."""

import copy
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import dspy
from dspy.evaluate.evaluate import EvaluationResult
from dspy.utils.usage_tracker import UsageTracker, track_usage

from dspy_lora.detection.classifier import DomainClassifier
from dspy_lora.errors import ConfigError, DataError, near
from dspy_lora.evaluation.ablation import Ablation, Spent
from dspy_lora.evaluation.responses import Responses
from dspy_lora.lm import LoRALM
from dspy_lora.router import ROUTE, LoRARouter, Route, but_for_own_lms, marked, parameters, with_own_lms

logger = logging.getLogger(__name__)

STAGES = ("adapter", "prompts", "context")
STEPS = "steps"  # the field of a prediction that says what was decided


class Assembled(Protocol):
    """What a context source gives: a text, its length, and what it is made of and without."""

    @property
    def text(self) -> str:
        """The context; empty where there is none."""

    @property
    def tokens(self) -> int:
        """Its length."""

    def summary(self) -> str:
        """One sentence: what is in it and what was left out."""


@runtime_checkable
class Context(Protocol):
    """What ``DomainPipeline`` asks for context; ``ContextAssembler`` is one."""

    def __call__(self, query: str, *, history: dspy.History | None = None) -> Assembled:
        """Context for a query."""

    async def acall(self, query: str, *, history: dspy.History | None = None) -> Assembled:
        """Async equivalent of calling."""


@dataclass(frozen=True)
class Step:
    """One stop of a query on its way.

    Attributes:
        stage: ``"route"``, ``"prompts"``, ``"context"`` or ``"answer"``.
        choice: What was taken: an adapter, a program, a context, an LM.
        reason: One sentence.
        seconds: Wall time.
        tokens: Of the context, or of prompt and answer.
    """

    stage: str
    choice: str
    reason: str
    seconds: float
    tokens: int = 0

    def toDict(self) -> dict[str, Any]:
        """What ``dspy.Evaluate`` writes to JSON and CSV; the name is DSPy's."""
        return asdict(self)


class DomainPipeline(dspy.Module):
    """Answers a query with the adapter, the prompts and the context of its domain.

    A prediction carries ``route`` (which adapter answered, and why) and ``steps``, every decision in order with its
    time and tokens. Async, batches, streaming, saving and ``dspy.Evaluate`` are DSPy's, as for any module;
    ``dspy.BestOfN`` and ``dspy.Refine`` sample from the adapters (``LoRARouter.set_lm``).

    Args:
        adapters: The adapter of each domain, as for ``LoRARouter``.
        program: The program as written; it runs where no compiled one is given.
        compiled: The program with its compiled prompts: one for all queries, or one a domain. ``LoRAGEPA``, ``ACE``
            and DSPy's own optimizers make them. Predictors with LMs of their own, as LoRAGEPA's, keep them, and the
            route decides about the others; ``program.set_lm(None)`` leaves all to the route.
        context: Called with the query, and with a conversation that the program has no input for; a
            ``ContextAssembler``. Its text becomes the program's input ``context_field`` where the program has one, and
            else the end of the instruction of every call that the program makes, through the ``dspy.Adapter`` in
            use: a program that sets one of its own while it runs is not told (a warning says so), and the hints of a
            ``dspy.Refine`` around the pipeline do not arrive.
        context_field: The program's input for context.
        classifier: As for ``LoRARouter``.
        threshold: As for ``LoRARouter``.
        registry: As for ``LoRARouter``.
        make_lm: As for ``LoRARouter``.
        input_field: The program's input that ``query`` is passed as; None takes ``query``, else its only input.

    Raises:
        ConfigError: No adapters, or compiled prompts for a domain that has none.
        UnknownAdapterError: No such adapter in the registry.
    """

    def __init__(
        self,
        adapters: Mapping[str, "str | Path | dspy.BaseLM"] | Iterable[str],
        program: dspy.Module | None = None,
        *,
        compiled: dspy.Module | Mapping[str, dspy.Module] | None = None,
        context: Context | None = None,
        context_field: str = "context",
        classifier: DomainClassifier | None = None,
        threshold: float | None = None,
        registry: str | Path | None = None,
        make_lm: Callable[..., dspy.BaseLM] = LoRALM,
        input_field: str | None = None,
    ) -> None:
        super().__init__()
        self.router = LoRARouter(
            adapters, program, classifier, threshold, registry=registry, make_lm=make_lm, input_field=input_field
        )
        self.compiled_for_all = compiled if isinstance(compiled, dspy.Module) else None
        self.compiled = dict(compiled) if isinstance(compiled, Mapping) else {}
        for name in self.compiled:
            if name not in self.router.adapters:
                raise ConfigError(f"compiled prompts for {name!r}, no adapter. {near(name, self.router.adapters)}")
        for program in (self.compiled_for_all, *self.compiled.values()):
            if program is not None and (own := with_own_lms(program)):
                logger.warning("compiled %s have LMs of their own, which no route replaces", ", ".join(own))
        if context is not None and not isinstance(context, Context):
            raise ConfigError(
                f"context is {context!r}; allowed is a ContextAssembler, or what is called with a query and `history` "
                "and has `acall`. A function becomes a source of one: ContextAssembler([Passages(f)], budget=1024)."
            )
        self._context, self._context_field = context, context_field
        self.stages: frozenset[str] = frozenset(self.available)

    @property
    def available(self) -> tuple[str, ...]:
        """The stages that this pipeline has something for: of ``"adapter"``, ``"prompts"``, ``"context"``."""
        there = (True, self.compiled_for_all is not None or bool(self.compiled), self._context is not None)
        return tuple(stage for stage, given in zip(STAGES, there, strict=True) if given)

    def with_stages(self, *stages: str) -> "DomainPipeline":
        """The same pipeline with some stages alone; without any it is the program on the base model.

        Without the stage ``"adapter"`` a copy runs of a program whose predictors have LMs of their own: stream
        listeners and optimizers, which know predictors by identity, see none of its calls.

        Raises:
            ConfigError: The pipeline has nothing for a stage.
        """
        for stage in stages:
            if stage not in self.available:
                raise ConfigError(f"no stage {stage!r} here. {near(stage, self.available)}")
        other = copy.copy(self)
        other.stages = frozenset(stages)
        return other

    def get_lm(self) -> dspy.BaseLM:
        """As ``LoRARouter.get_lm``, of the program as written and the compiled ones.

        Raises:
            ConfigError: Some predictors have LMs of their own, and there is no one LM to name.
        """
        return self.router.lm_for(self._programs().values())

    def set_lm(self, lm: dspy.BaseLM | None) -> None:
        """As ``LoRARouter.set_lm``, of the program as written and the compiled ones."""
        self.router.set_lm_for(list(self._programs().values()), lm)

    def dump_state(self, json_mode: bool = True) -> dict[str, Any]:
        """The states of the program as written and of the compiled ones, which DSPy itself leaves out."""
        return {name: program.dump_state(json_mode=json_mode) for name, program in self._programs().items()}

    def load_state(self, state: dict[str, Any], **kwargs: Any) -> None:
        """Loads what ``dump_state`` gave.

        Raises:
            ConfigError: It is the state of a pipeline with other compiled programs.
        """
        programs = self._programs()
        saved = state.keys() - {"metadata"}  # DSPy's own
        if saved != programs.keys():
            raise ConfigError(f"saved were {sorted(saved)}, and this pipeline has {sorted(programs)}. Make it alike.")
        for name, program in programs.items():
            program.load_state(state[name], **kwargs)

    def _programs(self) -> dict[str, dspy.Module]:
        found = {"program": self.router.program} | {f"compiled[{n!r}]": each for n, each in self.compiled.items()}
        return found if self.compiled_for_all is None else found | {"compiled": self.compiled_for_all}

    # -- running ---------------------------------------------------------------------------------------------------

    def forward(self, query: str | None = None, **inputs: Any) -> dspy.Prediction:
        """Answers one query.

        Args:
            query: The text to choose by, passed to the program; None takes all texts among the inputs.
            **inputs: The program's other inputs.

        Returns:
            The program's prediction, with ``route`` and ``steps``.

        Raises:
            DataError: There is no text to choose by.
            ConfigError: The program's inputs do not show which one the query is, or its outputs have a ``route`` or
                ``steps``.
        """
        run = self._begin(query, inputs)
        if "context" in self.stages and self._context is not None:
            run.add_context(self._context(run.query, history=run.history), self._context_field)
        with run.settings(), track_usage() as usage:
            prediction = run.program(**run.inputs)
        return run.end(prediction, usage)

    async def aforward(self, query: str | None = None, **inputs: Any) -> dspy.Prediction:
        """Async equivalent of ``forward``."""
        run = self._begin(query, inputs)
        if "context" in self.stages and self._context is not None:
            run.add_context(await self._context.acall(run.query, history=run.history), self._context_field)
        with run.settings(), track_usage() as usage:
            prediction = await run.program.acall(**run.inputs)
        return run.end(prediction, usage)

    def _begin(self, query: str | None, inputs: dict[str, Any]) -> "_Run":
        began = time.perf_counter()
        route = self.router.route(query, inputs)
        run = _Run(began, route)
        run.inputs = self.router.inputs_of(query, inputs)
        run.history = run.take_history(self.router.program)
        run.query = query or "\n".join(value for value in inputs.values() if isinstance(value, str))
        run.step("route", route.adapter or "base model", route.reason)
        run.program, choice, reason = self._program(route)
        run.step("prompts", choice, reason)
        if "adapter" not in self.stages:
            run.route = Route(None, "caller", "the adapter stage is off", route.probability, route.runner_up)
        run.lm = self.router.lm_of(run.route)
        if "adapter" in self.stages:
            run.route = but_for_own_lms(run.route, run.program)
        elif with_own_lms(run.program):
            run.program = _copied(run.program)
            for _, predictor in run.program.named_sub_modules(dspy.Predict):
                predictor.lm = run.lm
        return run

    def _program(self, route: Route) -> tuple[dspy.Module, str, str]:
        """The program for a route, its name and why."""
        if "prompts" not in self.stages:
            return self.router.program, "as written", "no compiled prompts are in use"
        if route.adapter in self.compiled:
            return self.compiled[route.adapter], f"compiled for {route.adapter}", "the domain has prompts of its own"
        if self.compiled_for_all is not None:
            return self.compiled_for_all, "compiled", "one compiled program serves all domains"
        return self.router.program, "as written", f"no compiled prompts for {route.adapter or 'the base model'}"

    # -- measuring -------------------------------------------------------------------------------------------------

    def evaluate(
        self,
        devset: Sequence[dspy.Example],
        metric: Callable[..., Any],
        *,
        systems: Mapping[str, Iterable[str]] | None = None,
        num_threads: int = 64,
        seed: int = 0,
    ) -> Ablation:
        """Asks every row with and without the pipeline's stages, and compares.

        Args:
            devset: Examples with the program's inputs.
            metric: As for ``dspy.Evaluate``: a share of one, a bool, or a prediction with a ``score``.
            systems: Stages by a system's name; None takes the base, the adapter, the prompts, both, and both with
                context, as far as the pipeline has them.
            num_threads: Calls side by side; the seconds are those under this load. Nothing is answered from DSPy's
                cache, except by predictors with LMs of their own.
            seed: Of the resamples.

        Raises:
            ConfigError: A system with a stage that the pipeline has nothing for.
            DataError: No rows, or a metric that gives no number in [0, 1].
        """
        if not devset:
            raise DataError("there are no rows to evaluate on. Give examples with the program's inputs.")
        wanted = self._systems() if systems is None else {name: tuple(stages) for name, stages in systems.items()}
        results: dict[str, EvaluationResult] = {}
        evaluate = dspy.Evaluate(
            devset=list(devset), num_threads=num_threads, display_progress=False, max_errors=len(devset) + 1
        )
        uncached = self.router.uncached()
        for name, stages in wanted.items():
            system = self.with_stages(*stages)
            system.router = uncached
            results[name] = evaluate(system, metric=metric)
        spent = {name: _spent(result) for name, result in results.items()}
        return Ablation.of(Responses.from_evaluations(results), spent, seed)

    def _systems(self) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {"base": ()}
        for stages in (("adapter",), ("prompts",), ("adapter", "prompts"), STAGES):
            present = tuple(stage for stage in stages if stage in self.available)
            if present and present not in found.values():
                found[" + ".join(present)] = present
        return found


class _Run:
    """One query on its way."""

    program: dspy.Module
    lm: dspy.BaseLM
    inputs: dict[str, Any]
    query: str
    history: dspy.History | None = None
    telling: "_Telling | None" = None  # where the context goes into the instructions

    def __init__(self, began: float, route: Route) -> None:
        self.route, self.steps = route, list[Step]()
        self._last = began

    def take_history(self, program: dspy.Module) -> dspy.History | None:
        """The conversation, out of the inputs, where the program takes none: then it is context."""
        for name, value in self.inputs.items():
            if isinstance(value, dspy.History) and not _has_input(program, name):
                self.inputs = {key: each for key, each in self.inputs.items() if key != name}
                marks = (ROUTE, STEPS)
                turns = [{key: each for key, each in turn.items() if key not in marks} for turn in value.messages]
                return dspy.History(messages=turns)
        return None

    def step(self, stage: str, choice: str, reason: str, tokens: int = 0) -> None:
        """Notes what was done since the last step."""
        now = time.perf_counter()
        self.steps.append(Step(stage, choice, reason, now - self._last, tokens))
        self._last = now

    def add_context(self, assembled: Assembled, field: str) -> None:
        """Gives the program the context: as its input of that name, or at the end of each instruction."""
        place = "instruction"
        if _has_input(self.program, field):
            self.inputs = {**self.inputs, field: assembled.text}
            place = f"input {field!r}"
        elif assembled.text:
            self.telling = _Telling(dspy.settings.adapter or dspy.ChatAdapter(), assembled.text)
        self.step("context", place if assembled.text else "none", assembled.summary(), assembled.tokens)

    def settings(self) -> AbstractContextManager[None]:
        """DSPy's settings while the program runs."""
        adapter = {} if self.telling is None else {"adapter": self.telling.adapter()}
        context: AbstractContextManager[None] = dspy.context(lm=self.lm, **adapter)
        return context

    def end(self, prediction: Any, usage: UsageTracker) -> dspy.Prediction:
        """The prediction with its marks."""
        if self.telling is not None and not self.telling.told:
            logger.warning(
                "%s was not told the context: it called no predictor, or set a dspy adapter of its own. "
                "Give it an input for the context.",
                type(self.program).__name__,
            )
        totals = usage.get_total_tokens()
        tokens = sum(each.get("prompt_tokens", 0) + each.get("completion_tokens", 0) for each in totals.values())
        self.step("answer", ", ".join(totals) or str(getattr(self.lm, "model", self.lm)), "", tokens)
        answered = marked(prediction, self.route)
        if STEPS in answered:
            raise ConfigError(
                f"the program has an output {STEPS!r}, where the pipeline names its decisions. Rename it."
            )
        answered[STEPS] = self.steps
        return answered


def _has_input(program: dspy.Module, field: str) -> bool:
    """Whether a program takes an input: by its ``forward``, or where that takes anything by its first predictor."""
    taken = parameters(program)
    if field in taken:
        return True
    takes_any = any(each.kind is each.VAR_KEYWORD for each in taken.values())
    predictors = [each for _, each in program.named_sub_modules(dspy.Predict)]
    return takes_any and bool(predictors) and field in predictors[0].signature.input_fields


def _copied(program: dspy.Module) -> dspy.Module:
    """A copy without what an optimizer has left on it."""
    bare = copy.copy(program)
    vars(bare).pop("detailed_results", None)
    return bare.deepcopy()


@dataclass
class _Telling:
    """Ends the instruction of each call with a text.

    It stands in a ``dspy.Adapter``, the one place that every predictor's call passes, those inside any module too, and
    that is set for a thread or task alone. So the predictors stay as they are, which other queries use at the same
    time, and are the ones that stream listeners and traces know.

    Attributes:
        beneath: The adapter that does the work.
        text: What is told.
        told: Whether it was.
    """

    beneath: dspy.Adapter
    text: str
    told: bool = False

    def adapter(self) -> dspy.Adapter:
        """An adapter that is as the one beneath in all but its calls; of its class, for modules that ask."""

        def call(_: Any, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any) -> Any:
            told = self._longer(signature)
            return self.beneath(lm, lm_kwargs=lm_kwargs, signature=told, demos=demos, inputs=inputs)

        async def acall(_: Any, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any) -> Any:
            told = self._longer(signature)
            return await self.beneath.acall(lm, lm_kwargs=lm_kwargs, signature=told, demos=demos, inputs=inputs)

        made, kind = copy.copy(self.beneath), type(self.beneath)
        made.__class__ = type(kind.__name__, (kind,), {"__call__": call, "acall": acall})
        return made

    def _longer(self, signature: type[dspy.Signature]) -> type[dspy.Signature]:
        self.told = True
        return signature.with_instructions(f"{signature.instructions}\n\n{self.text}")


def _spent(result: EvaluationResult) -> list[Spent]:
    """Seconds and tokens of every step of every answered row."""
    return [
        Spent(step.stage, step.seconds, step.tokens)
        for _, prediction, _ in result.results
        for step in prediction.get(STEPS, [])
    ]
