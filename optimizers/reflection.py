"""GEPA's side of a candidate: evaluation, what reflection sees, and new texts: instructions, or other adapters.

``dspy.GEPA``'s own adapter is not used: it tells predictors apart by their signatures, so that those of equal ones
share each other's traces, and it loses an example whose answer parses in part.
"""

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

import dspy
from dspy_lora.optimizers.candidates import BASE, KEPT, Candidate, arm_of, decode, encode, with_arms
from dspy_lora.optimizers.outages import Passing, is_outage
from dspy_lora.optimizers.proposers import RuleProposer
from dspy_lora.optimizers.rollouts import UNPARSED, Pair, Records, Rollout, Rollouts
from dspy_lora.optimizers.run_log import RunLog, digest
from gepa import EvaluationBatch, GEPAAdapter

logger = logging.getLogger(__name__)

Proposer = Callable[..., Mapping[str, str]]
Trajectory = tuple[Pair, Rollout]

_MOVE_ROWS = 16  # an adapter move must win on as many training rows before GEPA sees it: its own three are too few
_MOVE_SHARE = 0.3  # of the proposals that could move
_MOVE_FAILING = 0.5  # a move is tried where at least this share of a minibatch failed


class Reflection(GEPAAdapter[dspy.Example, Trajectory, None]):
    """What ``gepa.optimize`` calls.

    Args:
        rollouts: Runs candidates.
        log: Keeps instructions that were written.
        proposer: Writes instructions, as DSPy's ``instruction_proposer``.
        reflection_lm: The LM in whose context the proposer runs; None leaves the context as it is.
        alternatives: Adapters of each predictor that the race liked, for moves.
        trainset: Where moves are tried.
        move_calls: Metric calls that moves may spend.
        perfect_score: From here on a row did not fail.
        seed: Of the moves.
        unparsed: Whether reflection sees answers that did not parse.

    Attributes:
        moves: One line a move that was tried.
        found_at: Metric calls that had been made when a candidate was first evaluated, by its digest.
    """

    def __init__(
        self,
        rollouts: Rollouts,
        log: RunLog,
        proposer: Proposer,
        reflection_lm: dspy.LM | None,
        alternatives: Mapping[str, Sequence[str]],
        trainset: Sequence[dspy.Example],
        move_calls: int,
        perfect_score: float,
        seed: int,
        unparsed: bool = True,
    ) -> None:
        self.rollouts, self.log, self.proposer, self.reflection_lm = rollouts, log, proposer, reflection_lm
        self.alternatives, self.trainset, self.move_calls = alternatives, trainset, move_calls
        self.perfect_score, self.seed, self.unparsed = perfect_score, seed, unparsed
        self.moves: list[str] = []
        self.found_at: dict[str, int] = {}
        self._moved: dict[str, dict[str, str] | None] = {}  # by proposal

    # -- evaluation ------------------------------------------------------------------------------------------------

    def evaluate(
        self, batch: list[dspy.Example], candidate: Candidate, capture_traces: bool = False
    ) -> EvaluationBatch[Trajectory, None]:
        """One candidate on a batch."""
        return self.batch_evaluate([(candidate, batch)], capture_traces=capture_traces)[0]

    def batch_evaluate(
        self, items: list[tuple[Candidate, list[dspy.Example]]], *, capture_traces: bool = True
    ) -> list[EvaluationBatch[Trajectory, None]]:
        """Several candidates on a batch each, all rows at once."""
        pairs = [(candidate, example) for candidate, batch in items for example in batch]
        found, batches = zip(pairs, self.rollouts.run(pairs), strict=True), list[EvaluationBatch[Trajectory, None]]()
        for candidate, batch in items:
            self.found_at.setdefault(digest(candidate), self.rollouts.calls)
            part = list(itertools.islice(found, len(batch)))
            batches.append(
                EvaluationBatch(
                    outputs=[None] * len(part),
                    scores=[rollout.score for _, rollout in part],
                    trajectories=part if capture_traces else None,
                    objective_scores=[objectives(candidate, rollout) for _, rollout in part],
                )
            )
        return batches

    # -- new texts -------------------------------------------------------------------------------------------------

    def make_reflective_dataset(
        self, candidate: Candidate, eval_batch: EvaluationBatch[Trajectory, None], components_to_update: list[str]
    ) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """The records of each predictor, with the score of the whole program.

        Raises:
            Passing: An LM that judges is out of reach.
        """
        seen = [each for each in eval_batch.trajectories or [] if self.unparsed or not _is_unparsed(each[1])]
        found = self.records([pair for pair, _ in seen], components_to_update)
        return {
            name: [
                record | {"Score": rollout.score}
                for (_, rollout), records in zip(seen, found, strict=True)
                for record in records.get(name, [])
            ]
            for name in components_to_update
        }

    def records(self, pairs: Sequence[Pair], names: Sequence[str]) -> list[Records]:
        """As ``Rollouts.records``, where GEPA would go on after an outage.

        Raises:
            Passing: An LM that judges is out of reach.
        """
        try:
            return self.rollouts.records(pairs, names)
        except Exception as exc:
            if is_outage(exc):
                raise Passing(exc) from exc
            raise

    def propose_new_texts(
        self,
        candidate: Candidate,
        reflective_dataset: Mapping[str, Sequence[Mapping[str, Any]]],
        components_to_update: list[str],
    ) -> dict[str, str]:
        """A move of one predictor to another adapter, where the rows suggest it; else new instructions.

        Raises:
            Passing: An LM is out of reach.
        """
        self._remember(reflective_dataset)
        try:
            return self._proposal(candidate, reflective_dataset, components_to_update)
        except Exception as exc:
            if is_outage(exc):  # GEPA would go on without this proposal
                raise Passing(exc) from exc
            logger.warning("a proposal failed: %s: %s", type(exc).__name__, exc)
            raise

    def _proposal(
        self, candidate: Candidate, dataset: Mapping[str, Sequence[Mapping[str, Any]]], components: list[str]
    ) -> dict[str, str]:
        """A run that goes on moves again: the log answers its rows, and what they cost is charged as before."""
        key = digest("proposal", candidate, dataset, components)
        if key not in self._moved:  # GEPA asks again for a step of which one proposer raised
            self._moved[key] = self._move(candidate, dataset, components, Random(f"{self.seed}{key}"))
        if (moved := self._moved[key]) is not None:
            return dict(moved)
        if (known := self.log.get(key)) is None:
            known = self._instructions(candidate, dataset, components)
            self.log.put(key, known)
        return dict(known)

    def _remember(self, dataset: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        if isinstance(self.proposer, RuleProposer):
            self.proposer.remember(dataset)

    def _instructions(
        self, candidate: Candidate, dataset: Mapping[str, Sequence[Mapping[str, Any]]], components: list[str]
    ) -> dict[str, str]:
        told = {name: decode(text)[1] for name, text in candidate.items()}
        records = {
            name: [{key: value for key, value in record.items() if key != "Score"} for record in dataset.get(name, [])]
            for name in components
        }
        asked = [name for name in components if records[name]]
        if not asked:
            return {}
        with dspy.context(lm=self.reflection_lm or dspy.settings.lm):
            written = self.proposer(candidate=told, reflective_dataset=records, components_to_update=asked)
        return {name: encode(arm_of(candidate[name]), text) for name, text in written.items() if name in candidate}

    def _move(
        self,
        candidate: Candidate,
        dataset: Mapping[str, Sequence[Mapping[str, Any]]],
        components: list[str],
        rng: Random,
    ) -> dict[str, str] | None:
        """Another adapter for one of the predictors, if most of its rows failed and it wins on more rows."""
        failing = [name for name in components if self._failed(dataset.get(name, ())) >= _MOVE_FAILING]
        options = [(name, arm) for name in failing for arm in self.alternatives[name] if arm != arm_of(candidate[name])]
        cost = 2 * min(_MOVE_ROWS, len(self.trainset))
        if not options or self.move_calls < cost or rng.random() > _MOVE_SHARE:
            return None
        self.move_calls -= cost
        name, arm = rng.choice(options)
        moved = with_arms(candidate, {name: arm})
        rows = rng.sample(list(self.trainset), min(_MOVE_ROWS, len(self.trainset)))
        scores = self.rollouts.run([(each, row) for each in (candidate, moved) for row in rows])
        before, after = (sum(rollout.score for rollout in part) for part in (scores[: len(rows)], scores[len(rows) :]))
        self.moves.append(
            f"{name}: {arm_of(candidate[name])} to {arm}, {before / len(rows):.3f} to {after / len(rows):.3f} on "
            f"{len(rows)} rows ({'taken' if after > before else 'refused'})"
        )
        return {name: moved[name]} if after > before else None

    def _failed(self, records: Sequence[Mapping[str, Any]]) -> float:
        return sum(record["Score"] < self.perfect_score for record in records) / len(records) if records else 0.0


def _is_unparsed(rollout: Rollout) -> bool:
    return rollout.error is not None and rollout.error.startswith(UNPARSED)


def objectives(candidate: Candidate, rollout: Rollout) -> dict[str, float]:
    """What GEPA's fronts over objectives compare; more is better.

    ``score``, ``adapters`` (minus how many different ones), ``seconds`` (minus the wall time), and the metric's
    ``objective_scores``, which come before them.
    """
    used = {arm for arm in map(arm_of, candidate.values()) if arm not in (BASE, KEPT)}
    return {"score": rollout.score, "adapters": -float(len(used)), "seconds": -rollout.seconds} | rollout.objectives


def alternatives(ranking: Sequence[tuple[str, ...]], names: Sequence[str]) -> dict[str, list[str]]:
    """The adapters of each predictor in the best assignments of a race."""
    return {name: list(dict.fromkeys(each[place] for each in ranking)) for place, name in enumerate(names)}
