"""Racing assignments of adapters on paired rows: sequential halving, after a screening where there are too many.

Sequential halving (Karnin, Koren and Somekh 2013, "Almost Optimal Exploration in Multi-Armed Bandits") fits: the budget
is fixed, one arm is wanted, and whole rounds run as one mixed batch. All arms of a round see the same rows, so that a
hard row costs every arm alike. Where the product of all predictors' choices is small enough for three rows each it is
raced whole, because the best single choices need not be the best pair. Else a balanced design comes first: on every row
each adapter of each predictor takes part once, among random partners (a Latin hypercube), which tells the adapters'
main effects; from the best of each an ascent goes on among each predictor's better half and what it starts with, the
base model as a rule: where only that gives right answers, few of the screening's rows show it. The ascent moves all
predictors at once (a Jacobi step, not one coordinate after another), which makes few large batches of many small ones;
as predictors may not suit one another, whatever won on the way meets in a last race of whole assignments.
"""

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
from dspy_lora.optimizers.asking import leaders_information
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

Assignment = tuple[str, ...]
Scorer = Callable[[Sequence[tuple[Assignment, Any]]], Sequence[float]]  # of assignments on rows
Prior = Callable[[Assignment], float]

_FIRST_ROWS = 3  # of each arm in the first round: fewer and a good arm falls by chance
_SCREENING = 0.25  # share of the budget; the rest is the ascent's
_LIKELY = 0.5  # share of a predictor's adapters that the ascent tries
_SWEEPS = 2
_MEETING = 0.25  # of a sweep's scores, for the last race
_KEPT = 4  # assignments that the race hands on


@dataclass
class Standing:
    """An assignment's scores so far, on rows ``0 .. len(scores) - 1`` of the race.

    Attributes:
        assignment: An adapter for each predictor.
        scores: One a row.
    """

    assignment: Assignment
    scores: list[float] = field(default_factory=list)

    def mean(self, rows: int | None = None) -> float:
        """Mean score, or that of the first rows; minus infinity where none ran."""
        scores = self.scores[:rows]
        return sum(scores) / len(scores) if scores else -math.inf


@dataclass(frozen=True)
class Race:
    """How a race went.

    Attributes:
        ranking: The best assignments, the winner first.
        standings: Every assignment that ran.
        calls: Scores that were asked for.
        rounds: One line a round, for the report.
    """

    ranking: list[Assignment]
    standings: dict[Assignment, Standing]
    calls: int
    rounds: list[str]


class Racer:
    """One race.

    Args:
        choices: The adapters of each predictor, the base model first.
        start: The program as it is.
        rows: What is asked, in an order that a seed has shuffled.
        score: Scores pairs of assignment and row, all at once.
        budget: The most scores that are asked for.
        seed: Of the random assignments.
        prior: Plausibility of an assignment (the router's similarity, say); decides between equals.
        telling_rows: After a screening, ask the rows first that told most in it (``asking.py``).
    """

    def __init__(
        self,
        choices: Mapping[str, Sequence[str]],
        start: Assignment,
        rows: Sequence[Any],
        score: Scorer,
        budget: int,
        seed: int = 0,
        prior: Prior | None = None,
        telling_rows: bool = False,
    ) -> None:
        self.choices, self.start, self.rows, self.score = list(choices.values()), start, list(rows), score
        self.budget, self.rng, self.prior = budget, Random(seed), prior or (lambda assignment: 0.0)
        self.telling_rows = telling_rows
        self.standings: dict[Assignment, Standing] = {}
        self.calls = 0
        self.rounds: list[str] = []

    def run(self) -> Race:
        """Races within the budget."""
        size = math.prod(len(arms) for arms in self.choices)
        if size == 1:
            ranking = [self.start]
        elif size * _FIRST_ROWS * 2 <= self.budget or len([arms for arms in self.choices if len(arms) > 1]) == 1:
            ranking = self.halve(list(itertools.product(*self.choices)), self.budget)
        else:
            ranking = self._screen_and_ascend()
        if size > 1 and not self.rounds:
            logger.warning("%d metric calls are too few for one round among %d assignments", self.budget, size)
            self.rounds.append(f"{self.budget} metric calls are too few for one round among {size} assignments")
        return Race(ranking[:_KEPT], self.standings, self.calls, self.rounds)

    # -- sequential halving ----------------------------------------------------------------------------------------

    def halve(self, arms: list[Assignment], budget: int) -> list[Assignment]:
        """Ranks arms by dropping the worse half after every round; the program as it is always takes part."""
        return self._halve_together([[self.start, *arms]], budget)[0]

    def _halve_together(self, heats: Sequence[Sequence[Assignment]], budget: int) -> list[list[Assignment]]:
        """Ranks the arms of each heat; a round of all heats is one batch."""
        alive = [self._ordered(dict.fromkeys(arms), self._least(arms)) for arms in heats]
        dropped: list[list[Assignment]] = [[] for _ in heats]
        end = self.calls + budget
        while running := [arms for arms in alive if len(arms) > 1]:
            left = max(math.ceil(math.log2(len(arms))) for arms in running)
            asked = list(dict.fromkeys(itertools.chain(*running)))
            wanted = max(_FIRST_ROWS, (end - self.calls) // left // len(asked))
            rows = min(len(self.rows), self._least(asked) + wanted)
            if not self._extend(asked, rows, end):
                break
            for heat, arms in enumerate(alive):
                alive[heat] = arms = self._ordered(dict.fromkeys(arms), rows)
                keep = math.ceil(len(arms) / 2) if left > 1 else len(arms)
                alive[heat], dropped[heat] = arms[:keep], arms[keep:] + dropped[heat]
            best = max(self.standings[arms[0]].mean(rows) for arms in alive)
            self.rounds.append(f"{len(asked)} assignments on {rows} rows, best {best:.3f}")
            if left == 1:
                break
        return [kept + out for kept, out in zip(alive, dropped, strict=True)]

    def _least(self, arms: Sequence[Assignment]) -> int:
        return min(len(self.standings.setdefault(arm, Standing(arm)).scores) for arm in arms)

    def _extend(self, arms: Sequence[Assignment], rows: int, end: int) -> bool:
        """Scores arms up to a number of rows in one batch; False where the budget does not hold it."""
        missing = [(arm, len(self.standings[arm].scores)) for arm in arms if len(self.standings[arm].scores) < rows]
        cost = sum(rows - have for _, have in missing)
        if not missing or self.calls + cost > min(end, self.budget):
            return False
        pairs = [(arm, place) for arm, have in missing for place in range(have, rows)]
        scores = self.score([(arm, self.rows[place]) for arm, place in pairs])
        for (arm, _), value in zip(pairs, scores, strict=True):
            self.standings[arm].scores.append(float(value))
        self.calls += cost
        return True

    def _ordered(self, arms: Mapping[Assignment, None], rows: int) -> list[Assignment]:
        """Best on the first rows first; of equals the likelier one, then the one nearer to the program as it is."""

        def rank(arm: Assignment) -> tuple[float, float, int]:
            standing = self.standings.setdefault(arm, Standing(arm))
            changed = sum(new != old for new, old in zip(arm, self.start, strict=True))
            return -standing.mean(rows), -self.prior(arm), changed

        return sorted(arms, key=rank)

    # -- many assignments ------------------------------------------------------------------------------------------

    def _screen_and_ascend(self) -> list[Assignment]:
        """Ascends from what the main effects say, among each predictor's better half of adapters."""
        most = max(len(arms) for arms in self.choices)
        if (count := int(self.budget * _SCREENING) // most) == 0:
            return [self.start]
        effects = self._main_effects(self.rows[::-1][:count], most)
        ranked = [
            [arms[at] for at in np.argsort(-table.mean(1), kind="stable")]
            for arms, table in zip(self.choices, effects, strict=True)
        ]
        if self.telling_rows:
            self._ask_telling_first(effects)
        likely = [
            list(dict.fromkeys([*arms[: math.ceil(len(arms) * _LIKELY)], start]))
            for arms, start in zip(ranked, self.start, strict=True)
        ]
        return self._ascend([arms[0] for arms in ranked], likely)

    def _main_effects(self, rows: Sequence[Any], most: int) -> list[NDArray[np.float64]]:
        """Scores of each predictor's adapters among random partners, ``most`` a row: (adapters, rows) for each."""
        drawn = [[*zip(*(self._spread(arms, most) for arms in self.choices), strict=True)] for _ in rows]
        scores = iter(self.score([(arms, row) for row, batch in zip(rows, drawn, strict=True) for arms in batch]))
        self.calls += most * len(rows)
        self.rounds.append(f"main effects from {most * len(rows)} scores")
        sums = [np.zeros((2, len(arms), len(rows))) for arms in self.choices]
        for column, batch in enumerate(drawn):
            for assignment in batch:
                score = next(scores)
                for arm, arms, found in zip(assignment, self.choices, sums, strict=True):
                    found[:, arms.index(arm), column] += 1, score
        return [total / count for count, total in sums]

    def _ask_telling_first(self, effects: Sequence[NDArray[np.float64]]) -> None:
        """Moves the rows that tell most about the likely winner to the front, those that tell least to the end."""
        if any(table.min() < 0 or table.max() > 1 for table in effects):
            self.rounds.append("rows are asked as drawn: item response theory needs scores from 0 to 1")
            return
        information = leaders_information(effects)
        seen = len(information)
        usual = float(np.median(information))
        value = [usual] * (len(self.rows) - seen) + list(information[::-1])
        self.rows = [self.rows[at] for at in np.argsort(-np.array(value), kind="stable")]

    def _spread(self, arms: Sequence[str], count: int) -> list[str]:
        """The arms in random order, repeated evenly up to a number."""
        spread: list[str] = []
        while len(spread) < count:
            spread += self.rng.sample(list(arms), len(arms))
        return spread[:count]

    def _ascend(self, top: Sequence[str], likely: Sequence[Sequence[str]]) -> list[Assignment]:
        """Tries adapters for all predictors at once, each beside its partners as they are; winners meet at the end."""
        top = tuple(top)
        met = [top]
        for sweep in range(_SWEEPS):
            heats = [[(*top[:at], arm, *top[at + 1 :]) for arm in arms] for at, arms in enumerate(likely)]
            rankings = self._halve_together(heats, int((self.budget - self.calls) / (_SWEEPS - sweep + _MEETING)))
            top = tuple(ranking[0][at] for at, ranking in enumerate(rankings))
            met += [top, *(ranking[0] for ranking in rankings)]
        return self.halve(met[::-1], self.budget - self.calls)
