"""Items with known parameters: what they ask, how uncertain that is, and what an answer tells about an ability."""

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dspy_lora.errors import DataError
from dspy_lora.evaluation.responses import position

Array = NDArray[np.float64]

_nodes, _weights = np.polynomial.hermite_e.hermegauss(5)
_POINTS = [*zip(_nodes, _weights / _weights.sum(), strict=True)]  # of a standard normal; 15 instead of 5 change nothing
_SMALLEST_VARIANCE = 1e-12


@dataclass(frozen=True)
class Items:
    """A bank of J calibrated items, on the scale of the abilities (logits).

    Attributes:
        names: Their ids.
        titles: A line about each, for tables.
        difficulty: Ability at which half the answers are right, (J,).
        log_discrimination: Log of the slope there, (J,); zeros in the Rasch model.
        covariance: Of (difficulty, log discrimination), (J, 2, 2).
        dispersion: φ: the variance of a score is φ P (1 - P); 1 for scores of 0 and 1.
    """

    names: tuple[str, ...]
    titles: tuple[str, ...]
    difficulty: Array
    log_discrimination: Array
    covariance: Array
    dispersion: float = 1.0

    @property
    def discrimination(self) -> Array:
        """The slopes, (J,): the posterior's median."""
        return np.exp(self.log_discrimination)

    @property
    def difficulty_se(self) -> Array:
        """Standard errors of the difficulties, (J,)."""
        return standard_error(self.covariance[:, 0, 0])

    @property
    def discrimination_se(self) -> Array:
        """Standard errors of the discriminations, (J,): those of the logs times the slope (delta method)."""
        return standard_error(self.covariance[:, 1, 1]) * self.discrimination

    def item(self, name: str) -> int:
        """Where an item stands.

        Raises:
            DataError: No such item.
        """
        return position(name, self.names, "item")

    def probability(self, ability: ArrayLike) -> Array:
        """Probability of a right answer, or the mean score.

        The mean over an item's uncertain parameters, not the value at their estimate: nearer to one half.

        Args:
            ability: One or T abilities.

        Returns:
            Shape (J, T).
        """
        return self.answer(ability)[0]

    def information(self, ability: ArrayLike) -> Array:
        """Fisher information of one answer about the ability, in 1 / logit².

        With exactly known parameters a² P (1 - P) / φ; an item of uncertain parameters tells less: its probability is
        nearer to one half, and its dispersion is nearer to 1 (``dispersions``).

        Args:
            ability: One or T abilities.

        Returns:
            Shape (J, T).
        """
        p, slope, variance = self.answer(ability)
        return fisher(p, slope, dispersions(p, variance, self.dispersion))

    def answer(self, ability: ArrayLike) -> tuple[Array, Array, Array]:
        """The probability of a right answer: its mean, the mean's derivative by the ability, and its variance.

        Gauss-Hermite quadrature over the normal posterior of (difficulty, log discrimination).

        Args:
            ability: One or T abilities.

        Returns:
            All of shape (J, T).
        """
        theta = np.atleast_1d(np.asarray(ability, dtype=np.float64))
        of_b, both, of_a = (self.covariance[:, i, j] for i, j in ((0, 0), (0, 1), (1, 1)))
        root = np.sqrt(of_b)
        cross = np.divide(both, root, out=np.zeros_like(root), where=root > 0)
        rest = np.sqrt((of_a - cross**2).clip(0))
        p, slope, squared = np.zeros((3, len(self.names), len(theta)))
        for (x, of_x), (y, of_y) in product(_POINTS, _POINTS):
            a = np.exp(self.log_discrimination + cross * x + rest * y)[:, None]
            right = (1 + np.tanh(a / 2 * (theta - (self.difficulty + root * x)[:, None]))) / 2
            p += of_x * of_y * right
            slope += of_x * of_y * a * right * (1 - right)
            squared += of_x * of_y * right**2
        return p, slope, (squared - p**2).clip(0)

    def select(self, names: tuple[str, ...] | list[str]) -> "Items":
        """Those items alone."""
        at = [self.item(name) for name in names]
        return Items(
            tuple(names),
            tuple(self.titles[j] for j in at),
            self.difficulty[at],
            self.log_discrimination[at],
            self.covariance[at],
            self.dispersion,
        )

    def anchors(self, count: int, low: float, high: float) -> tuple[str, ...]:
        """Items to ask every system: the most informative ones at points spread evenly over a range of abilities.

        Args:
            count: How many, at most as many as there are items.
            low: Lower end of the range, for example the lowest ability so far.
            high: Upper end.

        Raises:
            DataError: ``count`` is not from 1 to the number of items.
        """
        if not 1 <= count <= len(self.names):
            raise DataError(f"count={count!r} anchors; allowed is 1 to {len(self.names)}, the number of items.")
        information = self.information(np.linspace(low, high, count))
        chosen: list[int] = []
        for point in information.T:
            point = point.copy()
            point[chosen] = -1
            chosen.append(int(point.argmax()))
        return tuple(self.names[j] for j in chosen)


def fisher(p: Array, slope: Array, dispersion: Array) -> Array:
    """Information about an ability in an answer that is right with probability ``p``, of slope dp / d ability."""
    return slope**2 / (p * (1 - p)).clip(_SMALLEST_VARIANCE) / dispersion


def dispersions(p: Array, variance: Array, dispersion: float) -> Array:
    """Variance of a score over p (1 - p), where the item's probability P is uncertain, with mean p and a variance.

    The score's is φ E[P (1 - P)] + Var P, which is φ p (1 - p) + (1 - φ) Var P.
    """
    return dispersion + (1 - dispersion) * variance / (p * (1 - p)).clip(_SMALLEST_VARIANCE)


def standard_error(variance: Array) -> Array:
    """Root of variances; NaN where a fit that came to no estimate has one below 0."""
    return np.sqrt(np.where(variance < 0, np.nan, variance))
