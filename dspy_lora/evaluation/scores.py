"""Measures of two systems on the same rows: values, 95 % bootstrap intervals, a paired test of the difference.

Rows are resampled as pairs, so what both systems find hard cancels in the difference. A measure is computed from
weights of rows (how often a resample holds each), which makes thousands of resamples a matrix product.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspy_lora.errors import DataError

Array = NDArray[np.float64]
# Weights of the rows, (draws, rows) -> values, (draws,).
Measure = Callable[[Array], Array]

RESAMPLES = 2_000
SWAPS = 9_999  # of the randomisation tests: the smallest p is 1 / 10,000
LEVEL = 0.95
_CELLS = 4_000_000  # draws x rows in memory at once
_EQUAL = 1e-12


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; no interval (None) where every resample has the same value."""

    value: float
    low: float | None
    high: float | None

    def shown(self, sign: str = "") -> str:
        """As text, ``0.750 [0.685, 0.810]``; ``sign`` is ``"+"`` for a difference."""
        if self.low is None or self.high is None:
            return f"{_number(self.value, sign)} [-]"
        return f"{_number(self.value, sign)} [{_number(self.low, sign)}, {_number(self.high, sign)}]"


def _number(value: float, sign: str) -> str:
    return f"{value:{sign}.3f}" if abs(value) < 100 else f"{value:{sign}.4g}"


@dataclass(frozen=True)
class Compared:
    """One measure of the adapter and of its base.

    Attributes:
        measure: Its name.
        adapter: With the adapter.
        base: The base model alone.
        difference: Adapter minus base; its interval is that of the paired difference.
        p_value: Two-sided, of no difference.
        test: The test that gave it.
    """

    measure: str
    adapter: Estimate
    base: Estimate
    difference: Estimate
    p_value: float
    test: str


@dataclass(frozen=True)
class LabelScores:
    """One label: rows that have it, and precision, recall and F1 of both systems (0 where there is nothing to divide).

    ``precision``, ``recall`` and ``f1`` are the adapter's.
    """

    label: str
    support: int
    precision: float
    recall: float
    f1: float
    base_precision: float
    base_recall: float
    base_f1: float


def compare_exact_match(truth: Sequence[str], adapter: Sequence[str], base: Sequence[str], seed: int = 0) -> Compared:
    """Share of equal answers, with McNemar's exact test (the binomial test of the rows on which one alone is right).

    A share of 0 or 1 has the exact interval of Clopper and Pearson: resampling equal rows says nothing.

    Raises:
        DataError: No rows, or lists of different lengths.
    """
    from scipy.stats import binomtest

    _check(truth, adapter, base)
    ours, theirs = (np.array([a == b for a, b in zip(given, truth, strict=True)]) for given in (adapter, base))
    values = _compare(_mean(ours.astype(np.float64)), _mean(theirs.astype(np.float64)), len(truth), seed)
    won, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    p_value = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    first, second = (_exact(each, len(truth)) for each in values[:2])
    return Compared("exact match", first, second, values[2], p_value, f"McNemar, exact ({won} won, {lost} lost)")


def _exact(share: Estimate, rows: int) -> Estimate:
    from scipy.stats import binomtest

    if share.low is not None:
        return share
    interval = binomtest(round(share.value * rows), rows).proportion_ci(LEVEL, "exact")
    return Estimate(share.value, float(interval.low), float(interval.high))


def compare_macro_f1(truth: Sequence[str], adapter: Sequence[str], base: Sequence[str], seed: int = 0) -> Compared:
    """Unweighted mean of F1 over the labels of the rows, with a randomisation test (Yeh 2000, cs/0008005).

    In a resample the mean goes over the labels that it holds. The test swaps the two systems' answers on random rows.
    The intervals of the values are too narrow where labels are rare: of made-up systems' 91 to 95 % held the truth with
    40 rows a label, 85 to 89 % with 13 or 6; of the difference's 91 to 97 %. BCa intervals did no better.

    Raises:
        DataError: No rows, or lists of different lengths.
    """
    _check(truth, adapter, base)
    labels, references = _one_hot(truth)
    ours, theirs = (_F1(references, _one_hot(given, labels)[1]) for given in (adapter, base))
    values = _compare(ours, theirs, len(truth), seed)
    observed, reached = abs(values[2].value), 0
    for chosen in _swaps(len(truth), seed):
        first, second = (_macro(*counts) for counts in _swapped(ours, theirs, chosen))
        reached += int((np.abs(first - second) >= observed - _EQUAL).sum())
    return Compared("macro-F1", *values, (reached + 1) / (SWAPS + 1), f"randomisation, {SWAPS:,} swaps")


def compare_perplexity(adapter: Array, base: Array, tokens: Array, seed: int = 0) -> Compared:
    """Perplexity a token, exp of the mean negative log-probability, with a sign-flip test on the rows.

    Args:
        adapter: Sum of the log-probabilities of each row's tokens with the adapter, in nats, (rows,).
        base: The same of the base.
        tokens: Tokens of each row, (rows,).
        seed: Of the resamples and flips.

    Raises:
        DataError: No rows, or arrays of different lengths.
    """
    _check(tokens, adapter, base)

    def perplexity(sums: Array) -> Measure:
        return lambda weights: np.exp(-(weights @ sums) / (weights @ tokens))

    values = _compare(perplexity(adapter), perplexity(base), len(tokens), seed)
    gain = adapter - base
    observed, reached = abs(gain.sum()), 0
    for chosen in _swaps(len(tokens), seed):
        reached += int((np.abs(gain.sum() - 2 * chosen @ gain) >= observed * (1 - _EQUAL)).sum())
    return Compared("perplexity", *values, (reached + 1) / (SWAPS + 1), f"sign flips of log-probability, {SWAPS:,}")


def estimate_mean(scores: Array, seed: int = 0) -> Estimate:
    """Mean of the rows' scores with its percentile interval over resamples.

    Raises:
        DataError: No rows.
    """
    _check(scores)
    mean = _mean(scores)
    drawn = np.concatenate([mean(weights) for weights in _resamples(len(scores), seed)])
    return estimate(float(scores.mean()), drawn)


def label_scores(truth: Sequence[str], adapter: Sequence[str], base: Sequence[str]) -> list[LabelScores]:
    """Precision, recall and F1 of every label of the rows, most frequent first.

    Raises:
        DataError: No rows, or lists of different lengths.
    """
    _check(truth, adapter, base)
    labels, references = _one_hot(truth)
    everything = np.ones((1, len(truth)))
    tables = []
    for given in (adapter, base):
        hits, predicted, support = (c[0] for c in _F1(references, _one_hot(given, labels)[1]).counts(everything))
        tables.append((_share(hits, predicted), _share(hits, support), _share(2 * hits, predicted + support)))
    columns = [column.tolist() for table in tables for column in table]
    rows = [LabelScores(label, int(n), *scores) for label, n, *scores in zip(labels, support, *columns, strict=True)]
    return sorted(rows, key=lambda row: (-row.support, row.label))


# -- resamples ---------------------------------------------------------------------------------------------------------


def _check(truth: Sequence[str] | Array, *given: Sequence[str] | Array) -> None:
    if not len(truth) or any(len(each) != len(truth) for each in given):
        lengths = ", ".join(str(len(each)) for each in given)
        raise DataError(f"{len(truth)} rows and {lengths} answers of the systems. Give at least one row, and one each.")


def _compare(adapter: Measure, base: Measure, rows: int, seed: int) -> tuple[Estimate, Estimate, Estimate]:
    """Both values and their difference, each with the percentile interval over common resamples."""
    once = np.ones((1, rows))
    ours, theirs = float(adapter(once)[0]), float(base(once)[0])
    drawn = [(adapter(weights), base(weights)) for weights in _resamples(rows, seed)]
    first, second = (np.concatenate(part) for part in zip(*drawn, strict=True))
    return estimate(ours, first), estimate(theirs, second), estimate(ours - theirs, first - second)


def estimate(value: float, drawn: Array) -> Estimate:
    """A value with the percentile interval of what resamples gave, (draws,)."""
    low, high = (float(x) for x in np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    return Estimate(value, low, high) if np.ptp(drawn) > _EQUAL else Estimate(value, None, None)


def _resamples(rows: int, seed: int) -> Iterator[Array]:
    """How often each resample holds each row, RESAMPLES x rows in parts; the same for the same seed."""
    random = np.random.default_rng(seed)
    for n in _parts(RESAMPLES, rows):
        yield random.multinomial(rows, np.full(rows, 1 / rows), n).astype(np.float64)


def _swaps(rows: int, seed: int) -> Iterator[Array]:
    """Which rows are swapped (1) and which are not (0), SWAPS x rows in parts."""
    random = np.random.default_rng(seed)
    for n in _parts(SWAPS, rows):
        yield random.integers(0, 2, (n, rows)).astype(np.float64)


def _parts(draws: int, rows: int) -> list[int]:
    size = max(1, _CELLS // rows)
    return [min(size, draws - start) for start in range(0, draws, size)]


def _mean(scores: Array) -> Measure:
    return lambda weights: weights @ scores / weights.sum(1)


# -- macro-F1 ----------------------------------------------------------------------------------------------------------


class _F1:
    """Macro-F1 as a measure.

    Args:
        references: 1 where a row has a label, (rows, labels).
        predicted: 1 where a label was the answer, (rows, labels); no 1 in a row whose answer is none of the labels.
    """

    def __init__(self, references: Array, predicted: Array) -> None:
        self.parts = (references * predicted, predicted, references)

    def counts(self, weights: Array) -> tuple[Array, Array, Array]:
        """Hits, answers and rows of each label, each (draws, labels)."""
        hits, predicted, references = (weights @ part for part in self.parts)
        return hits, predicted, references

    def __call__(self, weights: Array) -> Array:
        return _macro(*self.counts(weights))


def _swapped(ours: _F1, theirs: _F1, chosen: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Counts of both systems after their answers to the chosen rows, (draws, rows), changed places."""
    everything = np.ones((1, chosen.shape[1]))
    before = [system.counts(everything) for system in (ours, theirs)]
    moved = [chosen @ (b - a) for a, b in zip(ours.parts[:2], theirs.parts[:2], strict=True)]
    moved.append(np.zeros_like(moved[0]))  # the references are the same
    first = tuple(count + change for count, change in zip(before[0], moved, strict=True))
    second = tuple(count - change for count, change in zip(before[1], moved, strict=True))
    return first, second


def _macro(hits: Array, predicted: Array, references: Array) -> Array:
    """Mean F1 over the labels that occur, (draws,)."""
    there = references > 0
    return np.asarray((_share(2 * hits, predicted + references) * there).sum(1) / there.sum(1))


def _share(part: Array, whole: Array) -> Array:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _one_hot(answers: Sequence[str], labels: Sequence[str] | None = None) -> tuple[list[str], Array]:
    """The labels, sorted unless given, and which of them each answer is, (rows, labels)."""
    labels = sorted(set(answers)) if labels is None else list(labels)
    column = {label: i for i, label in enumerate(labels)}
    table = np.zeros((len(answers), len(labels)))
    for row, answer in enumerate(answers):
        if answer in column:
            table[row, column[answer]] = 1
    return labels, table
