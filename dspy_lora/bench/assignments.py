"""Every assignment of adapters to predictors that do not hear each other: the race against the exhaustive search.

What such a predictor answers depends on its own adapter alone, so its answers with every adapter give the score of
every assignment on every row, exactly, without asking for each. The races run on these answers; a race on the engine
would be told the same ones.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from statistics import fmean
from typing import Any

import dspy
import numpy as np
from numpy.typing import NDArray

from dspy_lora import LoRALM
from dspy_lora.optimizers.candidates import Space, assignment, with_arms
from dspy_lora.optimizers.racing import Assignment, Race, Racer
from dspy_lora.optimizers.rollouts import Rollouts
from dspy_lora.optimizers.run_log import RunLog

Metric = Callable[..., Any]

_EQUAL = 1e-9  # mean scores that differ by less are one


@dataclass(frozen=True)
class Races:
    """Races on known answers, each with its own order of rows.

    Attributes:
        found: Share of them that ended at an assignment which no other beats on all rows.
        lost: Mean score that the winners fall short of the best, on all rows.
        calls: Mean share of the exhaustive search's metric calls.
        runs: How many.
    """

    found: float
    lost: float
    calls: float
    runs: int


@dataclass(frozen=True)
class Answers:
    """The scores of each predictor with each adapter.

    Attributes:
        choices: The adapters of each predictor, the base model first.
        start: The program as it is.
        right: For each predictor (adapters, rows): 1 right, 0 wrong, NaN where it raised, which costs the whole row.
        seconds: Wall time of asking for them, one adapter after another.
    """

    choices: dict[str, list[str]]
    start: Assignment
    right: list[NDArray[np.float64]]
    seconds: float

    @property
    def table(self) -> NDArray[np.float64]:
        """Score of every assignment on every row, (adapters of the first predictor, of the second ..., rows)."""
        count = len(self.right)
        total = np.zeros((1,) * (count + 1))
        for place, right in enumerate(self.right):
            shape = [1] * count + [right.shape[1]]
            shape[place] = len(right)
            total = total + right.reshape(shape)
        return np.nan_to_num(total / count)

    @property
    def calls(self) -> int:
        """Metric calls of the exhaustive search: every assignment on every row."""
        return self.table.size

    def best(self) -> dict[str, str]:
        """The assignment with the highest mean, predictor to adapter; the first of equals."""
        means = self.table.mean(-1)
        places = np.unravel_index(means.argmax(), means.shape)
        return {name: arms[place] for (name, arms), place in zip(self.choices.items(), places, strict=True)}

    def races(self, budget: int, runs: int) -> Races:
        """Races on these answers.

        Args:
            budget: Metric calls of a race.
            runs: How many, each on the rows in another order.
        """
        table = self.table
        means = table.mean(-1)
        at = [{arm: place for place, arm in enumerate(arms)} for arms in self.choices.values()]

        def places(arms: Assignment) -> tuple[int, ...]:
            return tuple(by[arm] for by, arm in zip(at, arms, strict=True))

        def score(pairs: Sequence[tuple[Assignment, int]]) -> list[float]:
            return [float(table[(*places(arms), row)]) for arms, row in pairs]

        lost, calls = [], []
        for seed in range(runs):
            race = raced(self.choices, self.start, range(table.shape[-1]), score, budget, seed)
            lost.append(float(means.max() - means[places(race.ranking[0])]))
            calls.append(race.calls / table.size)
        return Races(fmean(each < _EQUAL for each in lost), fmean(lost), fmean(calls), runs)


def raced(
    choices: Mapping[str, Sequence[str]], start: Assignment, rows: Sequence[Any], score: Any, budget: int, seed: int
) -> Race:
    """A race as LoRAGEPA runs it."""
    return Racer(choices, start, Random(seed).sample(list(rows), len(rows)), score, budget, seed).run()


def ask_all(
    parts: Mapping[str, dspy.Module], rows: list[dspy.Example], lm: LoRALM, metric: Metric, threads: int
) -> Answers:
    """Asks each predictor with each adapter for each row, one adapter after another.

    Args:
        parts: Each predictor's own program, of which it is the only predictor.
        rows: What is asked.
        lm: Lends the adapters.
        metric: Scores a part's answer, 0 or 1.
        threads: Rows at once.
    """
    choices, start, right, seconds = {}, [], [], 0.0
    for name, part in parts.items():
        space = Space(part, lm, "all")
        rollouts = Rollouts(space, metric, RunLog(None, {}), threads, 0.0)
        found = [rollouts.run([(with_arms(space.start, {name: arm}), row) for row in rows]) for arm in space.arms[name]]
        choices[name] = space.arms[name]
        start.append(assignment(space.start)[0])
        right.append(np.array([[np.nan if each.error else each.score for each in line] for line in found]))
        seconds += rollouts.seconds
    return Answers(choices, tuple(start), right, seconds)


def seconds_of_race(
    program: dspy.Module, rows: list[dspy.Example], lm: LoRALM, metric: Metric, threads: int, budget: int
) -> float:
    """Wall time of a race on the engine, all adapters of a round in one batch."""
    space = Space(program, lm, "all")
    rollouts = Rollouts(space, metric, RunLog(None, {}), threads, 0.0)

    def score(pairs: Sequence[tuple[Assignment, dspy.Example]]) -> list[float]:
        asked = [(with_arms(space.start, dict(zip(space.start, arms, strict=True))), row) for arms, row in pairs]
        return [rollout.score for rollout in rollouts.run(asked)]

    raced(space.arms, assignment(space.start), rows, score, budget, 0)
    return rollouts.seconds
