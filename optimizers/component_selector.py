"""Which predictor's instruction GEPA rewrites next."""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from dspy_lora.optimizers.proposers import RuleProposer
from dspy_lora.optimizers.rollouts import Pair, Records
from gepa.strategies.component_selector import RoundRobinReflectionComponentSelector


class MostWrongSelector:
    """Draws a predictor with a chance that grows with its wrong answers in the minibatch.

    A program's score does not say which predictor was wrong, but what ``RuleProposer`` reads does: the feedback names
    the right answer. GEPA's own choice, one predictor after another, spends most calls on those that are right
    already. It chooses where no answer is known to be wrong.

    Args:
        records: Gives what predictors did in rollouts, as ``Rollouts.records``.
        proposer: Reads the feedback.
        seed: Of the draws, which depend on nothing else but GEPA's iteration and the minibatch.
    """

    def __init__(
        self,
        records: Callable[[Sequence[Pair], Sequence[str]], Sequence[Records]],
        proposer: RuleProposer,
        seed: int,
    ) -> None:
        self.records, self.proposer, self.seed = records, proposer, seed
        self._in_turn = RoundRobinReflectionComponentSelector()

    def __call__(
        self,
        state: Any,
        trajectories: list[Any],
        subsample_scores: list[float],
        candidate_idx: int,
        candidate: dict[str, str],
    ) -> list[str]:
        """The predictor's name, in a list as GEPA wants it."""
        found = self.records([pair for pair, _ in trajectories], list(candidate))
        wrong = [self._wrong(name, found) for name in candidate]
        if not any(wrong):
            return self._in_turn(state, trajectories, subsample_scores, candidate_idx, candidate)
        rng = Random(f"{self.seed} {state.i} {candidate_idx} {wrong} {subsample_scores}")
        return rng.choices(list(candidate), wrong)

    def _wrong(self, name: str, found: Sequence[Records]) -> int:
        rows = (self.proposer.row_of(record) for each in found for record in each.get(name, []))
        return sum(row is not None and not row.right for row in rows)
