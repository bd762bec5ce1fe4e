"""Which predictor's instruction GEPA rewrites next."""

from random import Random
from typing import Any

from dspy_lora.optimizers.proposers import RuleProposer
from gepa.strategies.component_selector import RoundRobinReflectionComponentSelector


class MostWrongSelector:
    """Draws a predictor with a chance that grows with its wrong answers in the minibatch.

    A program's score does not say which predictor was wrong, but what ``RuleProposer`` reads does: the feedback names
    the right answer. GEPA's own choice, one predictor after another, spends most calls on those that are right
    already. It chooses where no answer is known to be wrong.

    Args:
        proposer: Reads the feedback.
        seed: Of the draws, which depend on nothing else but GEPA's iteration and the minibatch.
    """

    def __init__(self, proposer: RuleProposer, seed: int) -> None:
        self.proposer, self.seed = proposer, seed
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
        wrong = [self._wrong(name, trajectories) for name in candidate]
        if not any(wrong):
            return self._in_turn(state, trajectories, subsample_scores, candidate_idx, candidate)
        rng = Random(f"{self.seed} {state.i} {candidate_idx} {wrong} {subsample_scores}")
        return rng.choices(list(candidate), wrong)

    def _wrong(self, name: str, trajectories: list[Any]) -> int:
        rows = (self.proposer.row_of(record) for each in trajectories for record in each.records.get(name, []))
        return sum(row is not None and not row.right for row in rows)
