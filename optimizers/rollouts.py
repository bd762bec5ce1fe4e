"""Candidates on examples: all pairs of a step in one pool of threads, so that the engine runs one mixed batch."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import dspy
from dspy.utils.exceptions import AdapterParseError
from dspy.utils.parallelizer import ParallelExecutor
from dspy_lora.optimizers.candidates import Candidate
from dspy_lora.optimizers.outages import is_outage, is_refusal
from dspy_lora.optimizers.run_log import RunLog, digest

logger = logging.getLogger(__name__)

Pair = tuple[Candidate, dspy.Example]
_NO_FEEDBACK = "This trajectory got a score of {score}."


@dataclass(frozen=True)
class Rollout:
    """One example answered by one candidate.

    Attributes:
        score: The metric's.
        objectives: Its ``objective_scores``.
        error: What the program or the metric raised; the score is the failure score then.
        records: For each predictor that ran what reflection sees: inputs, outputs, feedback. Empty unless traced.
        usage: Tokens by kind, and ``calls`` of LMs.
        seconds: Wall time of the program, with the others of its batch beside it.
    """

    score: float
    objectives: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    records: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    usage: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


class Builder(Protocol):
    """Makes the program that a candidate stands for."""

    def build(self, candidate: Candidate) -> dspy.Module:
        """A program of its own."""


class Rollouts:
    """Runs pairs of candidate and example, each once.

    Args:
        space: Builds the candidates' programs.
        metric: DSPy's GEPA metric, ``(gold, pred, trace, pred_name, pred_trace)``.
        log: Answers that are known, and where new ones go.
        threads: How many run at once.
        failure_score: Where the program or the metric raises.

    Attributes:
        calls: Metric calls so far, those answered from the log included.
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

    def run(self, pairs: Sequence[Pair], traced: bool = False) -> list[Rollout]:
        """Answers pairs in their order.

        A pair that the LM refuses while it answers others fails, and is asked again by a run that goes on.

        Raises:
            LMError: The LM is out of reach, or another outage (``outages.py``). Answers that came before it, and those
                that were under way, are in the log; the pair that met it is not, and is asked again.
        """
        keys = [digest("rollout", traced, candidate, example.toDict()) for candidate, example in pairs]
        new = {key: pair for key, pair in zip(keys, pairs, strict=True) if self.log.get(key) is None}
        if new:
            self._run_new(new, traced)
        found = {key: Rollout(**self.log.get(key)) for key in keys}
        for key in dict.fromkeys(keys):
            if key not in self._seen:
                self._seen.add(key)
                self.calls += 1
                for kind, count in found[key].usage.items():
                    self.usage[kind] = self.usage.get(kind, 0) + count
        return [found[key] for key in keys]

    def _run_new(self, new: dict[str, Pair], traced: bool) -> None:
        programs = {digest(candidate): self.space.build(candidate) for candidate, _ in new.values()}
        raised: list[Exception] = []
        refused: dict[str, Exception] = {}

        def run(item: tuple[str, Pair]) -> None:
            if raised:
                return  # the others would meet the same outage, each after its retries
            key, (candidate, example) = item
            try:
                self.log.put(key, asdict(self._one(programs[digest(candidate)], example, traced)))
            except Exception as exc:  # noqa: BLE001 - raised below, when those under way have ended
                if is_refusal(exc):
                    refused[key] = exc
                else:
                    raised.append(exc)

        began = time.monotonic()
        executor = ParallelExecutor(self.threads, disable_progress_bar=True, timeout=0)
        executor.execute(run, list(new.items()))
        self.seconds += time.monotonic() - began
        if len(refused) == len(new) and (len(new) > 1 or not len(self.log)):
            raised += refused.values()  # it refuses everything
        if raised:
            raise raised[0]
        for key, exc in refused.items():
            logger.warning("the LM refused %s: %s", str(new[key][1])[:200], exc)
            failed = Rollout(self.failure_score, {}, f"{type(exc).__name__}: {exc}", {}, {}, 0.0)
            self.log.put(key, asdict(failed), lasting=False)

    def _one(self, program: dspy.Module, example: dspy.Example, traced: bool) -> Rollout:
        """One answer; what the program or the metric raises is its failure, but for an outage."""
        with dspy.context(trace=[]), dspy.track_usage() as tracker:
            failed: AdapterParseError | None = None
            prediction, error = None, None
            began = time.monotonic()
            try:
                prediction = program(**example.inputs())
            except AdapterParseError as exc:
                failed, error = exc, f"the answer could not be parsed: {exc.lm_response[:500]}"
            except Exception as exc:
                if is_outage(exc):
                    raise
                error = f"{type(exc).__name__}: {exc}"
            seconds = time.monotonic() - began
            trace = list(dspy.settings.trace)
        usage = _usage(tracker.get_total_tokens(), len(trace))
        if error is None:
            try:
                score, objectives, _ = scored(self.metric(example, prediction, trace, None, None))
                records = self._records(program, example, prediction, trace) if traced else {}
                return Rollout(score, objectives, None, records, usage, seconds)
            except Exception as exc:
                if is_outage(exc):  # of an LM that judges
                    raise
                error = f"the metric raised {type(exc).__name__}: {exc}"
                logger.warning("%s on %s", error, str(example)[:200])
        records = {}
        if traced and failed is not None:
            records = dict(_unparsed(program, failed))
        return Rollout(self.failure_score, {}, error, records, usage, seconds)

    def _records(
        self, program: dspy.Module, example: dspy.Example, prediction: Any, trace: list[Any]
    ) -> dict[str, list[dict[str, Any]]]:
        """What each predictor got, gave, and how the metric judges it."""
        names = {id(predictor): name for name, predictor in program.named_predictors()}
        records: dict[str, list[dict[str, Any]]] = {}
        for predictor, inputs, outputs in trace:
            if (name := names.get(id(predictor))) is None:
                continue  # a module that the program made on the way
            part = [(predictor, inputs, outputs)]
            score, _, feedback = scored(self.metric(example, prediction, trace, name, part))
            records.setdefault(name, []).append(
                {
                    "Inputs": {key: shown_value(value) for key, value in inputs.items()},
                    "Generated Outputs": {key: shown_value(value) for key, value in outputs.items()},
                    "Feedback": feedback or _NO_FEEDBACK.format(score=score),
                }
            )
        return records


def _unparsed(program: dspy.Module, failed: AdapterParseError) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The record of an answer that did not parse, for the predictor whose signature it was to follow."""
    for name, predictor in program.named_predictors():
        if predictor.signature.equals(failed.signature):
            fields = ", ".join(failed.signature.output_fields)
            feedback = f"The answer could not be parsed. It must give every output field: {fields}."
            yield name, [{"Inputs": {}, "Generated Outputs": failed.lm_response, "Feedback": feedback}]
            return


def scored(result: Any) -> tuple[float, dict[str, float], str | None]:
    """Score, objectives and feedback of what a metric returned."""
    if isinstance(result, dspy.Prediction):
        return float(result.score), dict(result.get("objective_scores") or {}), result.get("feedback")
    if isinstance(result, dict):
        return float(result["score"]), dict(result.get("objective_scores") or {}), result.get("feedback")
    return float(result), {}, None


def shown_value(value: Any) -> str:
    """A field's value as text."""
    return value if isinstance(value, str) else str(value)


def _usage(tokens: dict[str, dict[str, Any]], calls: int) -> dict[str, float]:
    kinds = ("prompt_tokens", "completion_tokens")
    return {"calls": calls} | {kind: sum(model.get(kind) or 0 for model in tokens.values()) for kind in kinds}
