"""Candidates on examples: all pairs of a step in one pool of threads, so that the engine runs one mixed batch."""

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeVar

import dspy
from dspy.utils.exceptions import AdapterParseError
from dspy.utils.parallelizer import ParallelExecutor
from dspy_lora.optimizers.candidates import Candidate
from dspy_lora.optimizers.outages import is_outage, is_refusal
from dspy_lora.optimizers.run_log import RunLog, digest
from dspy_lora.optimizers.traces import Call, Trace, by_predictor, shown, unparsed_by

logger = logging.getLogger(__name__)

Pair = tuple[Candidate, dspy.Example]
Item = TypeVar("Item")
Records = dict[str, list[dict[str, Any]]]  # of each predictor: inputs, outputs, feedback
UNPARSED = "the answer could not be parsed"  # what the error of such a rollout begins with

_NO_FEEDBACK = "This trajectory got a score of {score}."
_KEPT = 1_024  # answers that can still be judged without asking again


@dataclass(frozen=True)
class Rollout:
    """One example answered by one candidate.

    Attributes:
        score: The metric's.
        objectives: Its ``objective_scores``.
        error: What the program or the metric raised; the score is the failure score then.
        usage: Tokens by kind, and ``calls`` of LMs.
        seconds: Wall time of the program, with the others of its batch beside it.
    """

    score: float
    objectives: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    usage: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class _Answer:
    """What a program gave for an example, as long as it is in memory.

    Attributes:
        prediction: None where it raised.
        trace: Its calls of predictors.
        unparsed: What it raised where an answer did not parse.
    """

    program: dspy.Module
    prediction: Any
    trace: Trace
    unparsed: AdapterParseError | None


class Builder(Protocol):
    """Makes the program that a candidate stands for."""

    def build(self, candidate: Candidate) -> dspy.Module:
        """A program of its own."""


class Rollouts:
    """Runs pairs of candidate and example, each once.

    Args:
        space: Builds the candidates' programs.
        metric: DSPy's GEPA metric, ``(gold, pred, trace, pred_name, pred_trace)``. Scores are asked without a trace, as
            in ``dspy.Evaluate``; feedback is asked with it.
        log: Answers that are known, and where new ones go.
        threads: How many run at once.
        failure_score: Where the program or the metric raises.

    Attributes:
        calls: Metric calls for scores so far, those answered from the log included.
        seconds: Wall time of what was run.
    """

    def __init__(
        self, space: Builder, metric: Callable[..., Any], log: RunLog, threads: int | None, failure_score: float
    ) -> None:
        self.space, self.metric, self.log = space, metric, log
        self.threads, self.failure_score = threads, failure_score
        self.calls = 0
        self.seconds = 0.0
        self.usage: dict[str, float] = {}
        self._seen: set[str] = set()
        self._answers: OrderedDict[str, _Answer] = OrderedDict()
        self._lock = threading.Lock()

    def run(self, pairs: Sequence[Pair]) -> list[Rollout]:
        """Answers pairs in their order.

        A pair that the LM refuses while it answers others fails, and is asked again by a run that goes on.

        Raises:
            LMError: The LM is out of reach, or another outage (``outages.py``). Answers that came before it, and those
                that were under way, are in the log; the pair that met it is not, and is asked again.
        """
        keys = [_key("rollout", pair) for pair in pairs]
        new = {key: pair for key, pair in zip(keys, pairs, strict=True) if self.log.get(key) is None}
        if new:
            self._run_new(new)
        found = {key: Rollout(**self.log.get(key)) for key in keys}
        for key in dict.fromkeys(keys):
            if key not in self._seen:
                self._count(found[key])
                self._seen.add(key)
        return [found[key] for key in keys]

    def records(self, pairs: Sequence[Pair], names: Sequence[str]) -> list[Records]:
        """What reflection sees of pairs that ran: of each predictor named its inputs, outputs and feedback.

        The metric is called once for each call of these predictors. A pair that is no longer in memory is answered
        again, by DSPy's cache as a rule. One that failed, or that an LM refuses, shows nothing.

        Raises:
            LMError: As ``run``.
        """
        wanted = {_key("records", pair, name): (pair, name) for pair in pairs for name in names}
        new = {key: each for key, each in wanted.items() if self.log.get(key) is None}
        self._answer_again([pair for pair, _ in new.values()])

        def judge(key: str, each: tuple[Pair, str]) -> None:
            self.log.put(key, self._records(*each))

        for key in self._in_threads(judge, new):
            self.log.put(key, [], lasting=False)
        return [{name: self.log.get(_key("records", pair, name)) for name in names} for pair in pairs]

    def _answer_again(self, pairs: Sequence[Pair]) -> None:
        """Answers pairs whose answers only the log has; those that failed have none to show."""
        missing = {key: pair for pair in pairs if (key := _key("rollout", pair)) not in self._answers}
        for key in list(missing):
            error = (self.log.get(key) or {}).get("error")
            if error and not error.startswith(UNPARSED):
                del missing[key]
        programs = self._programs(missing.values())
        self._in_threads(lambda key, pair: self._one(key, programs[digest(pair[0])], pair[1]), missing)

    def _count(self, rollout: Rollout) -> None:
        self.calls += 1
        for kind, count in rollout.usage.items():
            self.usage[kind] = self.usage.get(kind, 0) + count

    def _programs(self, pairs: Iterable[Pair]) -> dict[str, dspy.Module]:
        candidates = {digest(candidate): candidate for candidate, _ in pairs}
        return {key: self.space.build(candidate) for key, candidate in candidates.items()}

    def _run_new(self, new: Mapping[str, Pair]) -> None:
        programs = self._programs(new.values())

        def run(key: str, pair: Pair) -> None:
            self.log.put(key, asdict(self._one(key, programs[digest(pair[0])], pair[1])))

        refused = self._in_threads(run, new)
        if len(refused) == len(new) and (len(new) > 1 or not len(self.log)):
            raise next(iter(refused.values()))  # it refuses everything
        for key, exc in refused.items():
            logger.warning("the LM refused %s: %s", str(new[key][1])[:200], exc)
            failed = Rollout(self.failure_score, {}, f"{type(exc).__name__}: {exc}")
            self.log.put(key, asdict(failed), lasting=False)
        errors = [error for key in new if (error := self.log.get(key)["error"])]
        if errors:
            logger.warning("%d of %d rows failed; the first: %s", len(errors), len(new), errors[0])

    def _in_threads(self, ask: Callable[[str, Item], Any], new: Mapping[str, Item]) -> dict[str, Exception]:
        """Asks all; returns what an LM has refused, and raises any other outage."""
        raised: list[Exception] = []
        refused: dict[str, Exception] = {}

        def run(item: tuple[str, Item]) -> None:
            if raised:
                return  # the others would meet the same outage, each after its retries
            try:
                ask(*item)
            except Exception as exc:  # noqa: BLE001 - raised below, when those under way have ended
                if is_refusal(exc):
                    refused[item[0]] = exc
                else:
                    raised.append(exc)

        if not new:
            return {}
        began = time.monotonic()
        ParallelExecutor(self.threads, disable_progress_bar=True, timeout=0).execute(run, list(new.items()))
        self.seconds += time.monotonic() - began
        if raised:
            raise raised[0]
        return refused

    def _one(self, key: str, program: dspy.Module, example: dspy.Example) -> Rollout:
        """One answer; what the program or the metric raises is its failure, but for an outage."""
        with dspy.context(trace=[]), dspy.track_usage() as tracker:
            unparsed: AdapterParseError | None = None
            prediction, error = None, None
            began = time.monotonic()
            try:
                prediction = program(**example.inputs())
            except AdapterParseError as exc:
                unparsed, error = exc, f"{UNPARSED}: {exc.lm_response[:500]}"
            except Exception as exc:
                if is_outage(exc):
                    raise
                error = f"{type(exc).__name__}: {exc}"
            seconds = time.monotonic() - began
            trace = list(dspy.settings.trace)
        self._keep(key, _Answer(program, prediction, trace, unparsed))
        usage = _usage(tracker.get_total_tokens(), len(trace))
        if error is None:
            try:
                score, objectives, _ = scored(self.metric(example, prediction, None, None, None))
                return Rollout(score, objectives, None, usage, seconds)
            except Exception as exc:
                if is_outage(exc):  # of an LM that judges
                    raise
                error = f"the metric raised {type(exc).__name__}: {exc}"
        return Rollout(self.failure_score, {}, error, usage, seconds)

    def _keep(self, key: str, answer: _Answer) -> None:
        with self._lock:
            self._answers[key] = answer
            while len(self._answers) > _KEPT:
                self._answers.popitem(last=False)

    def _records(self, pair: Pair, name: str) -> list[dict[str, Any]]:
        """What a predictor got, gave, and how the metric judges it."""
        answer = self._answers.get(_key("rollout", pair))
        if answer is None:
            return []
        if answer.unparsed is not None:
            return _unparsed(answer, name, answer.unparsed)
        if answer.prediction is None:
            return []
        calls = by_predictor(answer.program, answer.trace).get(name, [])
        return [self._record(pair[1], answer, name, call) for call in calls]

    def _record(self, example: dspy.Example, answer: _Answer, name: str, call: Call) -> dict[str, Any]:
        _, inputs, outputs = call
        try:
            score, _, feedback = scored(self.metric(example, answer.prediction, answer.trace, name, [call]))
        except Exception as exc:
            if is_outage(exc):
                raise
            logger.warning("the metric raised %s: %s for feedback on %r", type(exc).__name__, exc, name)
            score, feedback = self.failure_score, None
        told = feedback or _NO_FEEDBACK.format(score=score)
        return {"Inputs": shown(inputs), "Generated Outputs": shown(outputs), "Feedback": told}


def _key(kind: str, pair: Pair, *parts: Any) -> str:
    return digest(kind, pair[0], pair[1].toDict(), *parts)


def _unparsed(answer: _Answer, name: str, failed: AdapterParseError) -> list[dict[str, Any]]:
    """The record of an answer that did not parse, if this predictor gave it."""
    if unparsed_by(answer.program, answer.trace, failed) != name:
        return []
    fields = ", ".join(failed.signature.output_fields)
    feedback = f"The answer could not be parsed. It must give every output field: {fields}."
    return [{"Inputs": {}, "Generated Outputs": failed.lm_response, "Feedback": feedback}]


def scored(result: Any) -> tuple[float, dict[str, float], str | None]:
    """Score, objectives and feedback of what a metric returned.

    Raises:
        ValueError: The score is not finite.
    """
    objectives: Mapping[str, Any] = {}
    feedback = None
    if isinstance(result, dspy.Prediction | dict):
        objectives, feedback, result = result.get("objective_scores") or {}, result.get("feedback"), result["score"]
    if not math.isfinite(score := float(result)):
        raise ValueError(f"the metric's score is {score}")
    told = None if feedback is None else str(feedback)
    return score, {name: float(value) for name, value in objectives.items() if value is not None}, told


def _usage(tokens: dict[str, dict[str, Any]], calls: int) -> dict[str, float]:
    kinds = ("prompt_tokens", "completion_tokens")
    return {"calls": calls} | {kind: sum(model.get(kind) or 0 for model in tokens.values()) for kind in kinds}
