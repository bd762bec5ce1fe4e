"""Which of several programs to return: the simplest one that is not significantly worse than the best."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

_FLIPS = 10_000
_CHUNK = 1_000


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why.

    Attributes:
        index: Of the chosen program.
        best: Of the program with the highest mean.
        gain: P-value of "nothing is better than the simplest program", over all programs at once.
        worse: P-value of "the chosen one is not worse than the best".
    """

    index: int
    best: int
    gain: float
    worse: float


def choose(scores: ArrayLike, complexity: Sequence[float], alpha: float = 0.05) -> Choice:
    """Chooses among programs that were scored on the same rows.

    The best of many is the best by chance too, so its gain over the simplest program is judged by the distribution of
    the largest gain of all under sign flips of whole rows (Westfall and Young 1993, single-step max-T). If that gain is
    not significant the simplest program wins, else the simplest one that is not significantly worse than the best
    (paired sign-flip test).

    Args:
        scores: [programs, rows].
        complexity: One a program; the lowest is the program as it is.
        alpha: Level of both tests, one-sided.

    Returns:
        The choice.

    Raises:
        ValueError: No program, or no row.
    """
    table = np.asarray(scores, dtype=float)
    if table.ndim != 2 or not table.size:
        raise ValueError(f"scores of shape {table.shape}: give at least one program and one row")
    order = sorted(range(len(table)), key=lambda index: (complexity[index], -table[index].mean()))
    simplest, best = order[0], int(table.mean(axis=1).argmax())
    gain = max_gain(table - table[simplest])
    if gain > alpha:
        return Choice(simplest, best, gain, max_gain((table[best] - table[simplest])[None]))
    for index in order[1:]:
        worse = max_gain((table[best] - table[index])[None])
        if index == best or worse > alpha:
            return Choice(index, best, gain, worse)
    return Choice(best, best, gain, 1.0)


def max_gain(differences: ArrayLike, seed: int = 0) -> float:
    """P-value of the largest mean difference under sign flips of rows.

    Args:
        differences: [programs, rows], each against the same program.
        seed: Of the flips.

    Returns:
        The share of flips with a largest mean at least as high, the one observed included.
    """
    table = np.asarray(differences, dtype=float)
    observed = table.mean(axis=1).max()
    rng, reached = np.random.default_rng(seed), 0
    for _ in range(_FLIPS // _CHUNK):
        signs = rng.integers(0, 2, (table.shape[1], _CHUNK)) * 2.0 - 1.0
        reached += int(((table @ signs).max(axis=0) / table.shape[1] >= observed - 1e-12).sum())
    return (reached + 1) / (_FLIPS + 1)


def interval(scores: ArrayLike, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of a mean over rows (percentile method)."""
    values = np.asarray(scores, dtype=float)
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (2_000, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
