"""Which setting is fastest: coordinate descent for each problem, within one budget of time for all."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dspy_lora.errors import TuningError
from dspy_lora.tuning.problem import Problem
from dspy_lora.tuning.settings import AXES, Setting, along, default
from dspy_lora.tuning.trials import Measure, Trials

_STEP = 0.99  # a step must be this much faster than where it starts: smaller ones are noise
_WORTH = 0.97  # a setting must be this much faster than the usual one to replace it
_EQUAL_SHARE = 0.5  # of the budget, for all problems alike: decode steps would get no time beside prefills


@dataclass(frozen=True)
class Outcome:
    """What the search chose for a problem.

    Attributes:
        problem: What was tuned.
        default: Seconds that the usual setting takes.
        setting: The chosen one, maybe the usual one.
        seconds: What it takes.
    """

    problem: Problem
    default: float
    setting: Setting
    seconds: float


class Search:
    """Searches settings for several problems.

    Args:
        trials: What was timed before.
        measure: Times a setting; it answers None for one that must not be chosen.
        clock: Seconds, growing.
        tell: Told how many of the problems' usual settings are timed, and of how many, after each.
    """

    def __init__(
        self,
        trials: Trials,
        measure: Measure,
        clock: Callable[[], float] = time.monotonic,
        tell: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._trials = trials
        self._measure = measure
        self._clock = clock
        self._tell = tell
        self._tuned: list[Outcome] = []

    def run(self, problems: dict[Problem, int], budget: float) -> Iterator[Outcome]:
        """Tunes the problems, the most costly first.

        Half of the time that is left is shared out equally, half by what a problem costs: its usual time, times
        how often it occurs. Time that a problem does not need is left to those after it. The usual settings are timed
        whatever the budget.

        Args:
            problems: How often each occurs.
            budget: Seconds for all of them; what is known from earlier runs takes none.

        Yields:
            An outcome for each problem.

        Raises:
            TuningError: The usual setting fails.
        """
        deadline = self._clock() + budget
        costs: dict[Problem, float] = {}
        for problem, count in problems.items():
            costs[problem] = self._default_seconds(problem) * count
            self._tell(len(costs), len(problems))
        left = sorted(costs, key=costs.__getitem__, reverse=True)
        while left:
            share = _EQUAL_SHARE / len(left) + (1 - _EQUAL_SHARE) * costs[left[0]] / sum(map(costs.__getitem__, left))
            outcome = self._tune(left.pop(0), self._clock() + share * (deadline - self._clock()))
            self._tuned.append(outcome)
            yield outcome

    def _default_seconds(self, problem: Problem) -> float:
        setting = default(problem)
        seconds = self._trials.seconds(problem, setting, self._measure)
        if seconds is None:
            raise TuningError(
                f"{problem}: the usual setting ({setting}) is refused by this GPU or computes a wrong result, so "
                "there is nothing to compare with. Leave its size out of --tokens, or its rank out of --ranks."
            )
        return seconds

    def _tune(self, problem: Problem, deadline: float) -> Outcome:
        own, own_seconds = default(problem), self._default_seconds(problem)
        best, seconds = self._trials.fastest(problem)
        for start in self._nearest(problem):
            if (found := self._ask(problem, start, deadline)) is not None and found < seconds:
                best, seconds = start, found
        best, seconds = self._descend(problem, best, seconds, deadline)
        if seconds > own_seconds * _WORTH:
            best, seconds = own, own_seconds
        return Outcome(problem, own_seconds, best, seconds)

    def _nearest(self, problem: Problem) -> list[Setting]:
        """The choice for the nearest number of tokens, if there is one."""
        alike = [
            outcome
            for outcome in self._tuned
            if (outcome.problem.product, outcome.problem.rank) == (problem.product, problem.rank)
        ]
        alike.sort(key=lambda outcome: abs(math.log(outcome.problem.tokens / problem.tokens)))
        return [outcome.setting for outcome in alike[:1]]

    def _descend(self, problem: Problem, best: Setting, seconds: float, deadline: float) -> tuple[Setting, float]:
        """Walks one axis after the other for as long as any of them leads to a faster setting."""
        moved = True
        while moved:
            moved = False
            for axis in AXES:
                for up in (True, False):
                    start = best
                    for candidate in along(problem, start, axis, up):
                        found = self._ask(problem, candidate, deadline)
                        if found is None or found > seconds * _STEP:
                            break
                        best, seconds, moved = candidate, found, True
                    if best != start:
                        break
        return best, seconds

    def _ask(self, problem: Problem, setting: Setting, deadline: float) -> float | None:
        """Seconds of a setting; None where it must not be chosen, or where time is up and it is not known."""
        if self._clock() >= deadline and not self._trials.knows(problem, setting):
            return None
        return self._trials.seconds(problem, setting, self._measure)
