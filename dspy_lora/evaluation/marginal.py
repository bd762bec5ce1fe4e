"""The marginal likelihood of the abilities: items are drawn from a population, and integrated out.

    logit P(right) = a (θ - b),    b ~ N(0, sd_b²),    log a ~ N(0, sd_a²)        (Rasch: a = 1)

With few systems and many items the items are the incidental parameters, so they, not the systems, are integrated out
("random items": De Boeck 2008, Psychometrika 73). What stays are one ability θ a system and the two spreads; their
estimates are consistent as items are added, however few the systems. An ability of 0 means one half right on the
median item, and the median discrimination is 1: this fixes the scale. The integral is a trapezoid sum over a grid in
units of sd_b and sd_a, whose spacing follows the width of an item's posterior.

Graded scores x in [0, 1] use the Bernoulli log-likelihood x log P + (1 - x) log(1 - P) divided by a dispersion φ, where
Var(x) = φ P (1 - P): the quasi-binomial model (Papke & Wooldridge 1996). No score in
[0, 1] varies more than φ = 1 says, and scores of 0 and 1 vary exactly so.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ABILITY_SD = 3.0  # logits: the prior allows 0.3 % to 99.7 % right on the median item (2 SD)
# Log-normal priors of sd_b and sd_a, (median, SD of the log). They keep a spread away from 0, where a maximum would
# otherwise lie by chance when systems are few (Chung et al. 2013, Psychometrika 78).
DIFFICULTY_SPREAD = (1.5, 0.7)
DISCRIMINATION_SPREAD = (0.5, 0.5)

_REACH = 5.0  # the grid ends at so many standard deviations
_SPACING = 1.1  # posterior standard deviations between nodes: item means are off by less than 0.002
_FEWEST_NODES = 9
_CHUNK_CELLS = 4_000_000  # items x nodes held at once (32 MB)
_PRIOR_CELLS = 10  # keep the dispersion of a few graded cells from vanishing
_SMALLEST_P = 1e-6
_SMALLEST_WEIGHT = 1e-9


class Nodes(NamedTuple):
    """The grid at given parameters; Q nodes.

    Attributes:
        a: Discrimination, (Q,).
        b: Difficulty, (Q,).
        eta: Logit of a right answer, (systems, Q).
        p: Its probability, (systems, Q).
    """

    a: Array
    b: Array
    eta: Array
    p: Array


class Weighed(NamedTuple):
    """Some items' posterior over the grid.

    Attributes:
        part: Which items.
        log_marginal: Log of each item's marginal likelihood, (items,).
        weights: Posterior weight of each node, (items, Q); rows sum to 1.
    """

    part: slice
    log_marginal: Array
    weights: Array


@dataclass(frozen=True)
class ItemPosterior:
    """Mean and covariance of (b, log a) for each item, given all estimates.

    Attributes:
        mean: (items, 2).
        covariance: (items, 2, 2), with the uncertainty of the abilities and spreads passed on (delta method).
    """

    mean: Array
    covariance: Array


class MarginalLikelihood:
    """Minus the log posterior of (abilities, log sd_b, log sd_a), a mean over items, and its gradient.

    Args:
        scores: (systems, items), in [0, 1] or NaN.
        slopes: Whether items differ in discrimination (2PL); else the last parameter is absent (Rasch).
        dispersion: φ.
        spreads: Rough (sd_b, sd_a), from which the grid's spacing is taken.
    """

    def __init__(self, scores: Array, *, slopes: bool, dispersion: float, spreads: tuple[float, float]) -> None:
        self.mask = (~np.isnan(scores)).astype(np.float64)
        self.scores = np.nan_to_num(scores)
        self._complete = bool(self.mask.all())
        self.slopes = slopes
        self.dispersion = dispersion
        self.n_systems, self.n_items = scores.shape
        z_b, z_a = _grid(self.mask.sum(0).max() / dispersion, spreads, slopes)
        self.z_b, self.z_a = (z.ravel() for z in np.meshgrid(z_b, z_a, indexing="ij"))
        log_prior = -(self.z_b**2 + self.z_a**2) / 2
        self.log_prior = log_prior - np.log(np.exp(log_prior).sum())

    # -- the likelihood ----------------------------------------------------------------------------------------------

    def spreads(self, parameters: Array) -> tuple[float, float]:
        """sd_b and sd_a; the second is 0 in the Rasch model."""
        n = self.n_systems
        return float(np.exp(parameters[n])), float(np.exp(parameters[n + 1])) if self.slopes else 0.0

    def nodes(self, parameters: Array) -> Nodes:
        """The grid at these parameters."""
        sigma_b, sigma_a = self.spreads(parameters)
        a, b = np.exp(sigma_a * self.z_a), sigma_b * self.z_b
        return _nodes(a, b, a * (parameters[: self.n_systems, None] - b))

    def weigh(self, nodes: Nodes) -> Iterator[Weighed]:
        """Each item's posterior over the grid, some items at a time."""
        log_wrong = np.logaddexp(0.0, nodes.eta)
        step = max(1, _CHUNK_CELLS // len(self.log_prior))
        for start in range(0, self.n_items, step):
            part = slice(start, min(start + step, self.n_items))
            wrong = log_wrong.sum(0) if self._complete else self.mask[:, part].T @ log_wrong
            log_p = self.scores[:, part].T @ nodes.eta - wrong
            log_p = log_p / self.dispersion + self.log_prior
            top = log_p.max(1, keepdims=True)
            weights = np.exp(log_p - top)
            total = weights.sum(1, keepdims=True)
            yield Weighed(part, (top + np.log(total))[:, 0], weights / total)

    def __call__(self, parameters: Array) -> tuple[float, Array]:
        """The value and its gradient, both divided by the number of items."""
        nodes = self.nodes(parameters)
        right, asked = np.zeros_like(nodes.eta), np.zeros_like(nodes.eta)
        log_posterior = 0.0
        for part, log_marginal, weights in self.weigh(nodes):
            log_posterior += log_marginal.sum()
            right += self.scores[:, part] @ weights
            asked += weights.sum(0) if self._complete else self.mask[:, part] @ weights
        residual = (right - asked * nodes.p) / self.dispersion  # d log likelihood / d eta
        gradient = [*(residual @ nodes.a), -(residual @ (nodes.a * nodes.b)).sum()]
        if self.slopes:
            gradient.append((residual * nodes.eta).sum(0) @ np.log(nodes.a))
        mean, sd = self._prior()
        distance = (parameters - mean) / sd
        log_posterior -= (distance**2).sum() / 2
        return -log_posterior / self.n_items, (distance / sd - np.array(gradient)) / self.n_items

    def _prior(self) -> tuple[Array, Array]:
        """Mean and standard deviation of the parameters' normal prior."""
        spreads = [DIFFICULTY_SPREAD, DISCRIMINATION_SPREAD][: 1 + self.slopes]
        mean = [0.0] * self.n_systems + [np.log(median) for median, _ in spreads]
        return np.array(mean), np.array([ABILITY_SD] * self.n_systems + [sd for _, sd in spreads])

    # -- what an estimate is worth -----------------------------------------------------------------------------------

    def covariance(self, parameters: Array) -> Array:
        """The parameters' covariance: the inverse of the observed information.

        Louis (1982, JRSS B 44): complete information less the covariance of the complete-data scores. Here the nodes
        stand still and sd_b and sd_a act on their weights, so that those scores are short.
        """
        nodes = self.nodes(parameters)
        n, size = self.n_systems, len(parameters)
        information = np.diag(1 / self._prior()[1] ** 2)
        for weighed in self.weigh(nodes):
            part, _, weights = weighed
            asked = self.mask[:, part] @ weights
            curvature = asked * nodes.a**2 * nodes.p * (1 - nodes.p) / self.dispersion
            spread = [2 * (weights @ z**2).sum() for z in (self.z_b, self.z_a)][: size - n]
            information += np.diag([*curvature.sum(1), *spread])
            mean = self._mean_scores(nodes, weighed)
            information += mean.T @ mean - self._score_products(nodes, weighed)
        return np.asarray(np.linalg.inv(information))

    def _spread_scores(self) -> Array:
        """Scores of log sd_b and log sd_a at each node, (1 or 2, Q)."""
        return np.array([self.z_b, self.z_a][: 1 + self.slopes]) ** 2 - 1

    def _mean_scores(self, nodes: Nodes, weighed: Weighed, times: Array | None = None) -> Array:
        """Posterior mean of each parameter's score, times a function of the node if given: (items, parameters)."""
        part, _, weights = weighed
        weights = weights if times is None else weights * times
        expected = weights @ (nodes.a * nodes.p).T
        seen = self.scores[:, part].T * (weights @ nodes.a)[:, None]
        ability = (seen - self.mask[:, part].T * expected) / self.dispersion
        return np.hstack([ability, weights @ self._spread_scores().T])

    def _score_products(self, nodes: Nodes, weighed: Weighed) -> Array:
        """Posterior mean of the scores' outer product, summed over items: (parameters, parameters)."""
        part, _, weights = weighed
        scores, mask, spread = self.scores[:, part], self.mask[:, part], self._spread_scores()
        size = self.n_systems + len(spread)
        total = np.zeros((size, size))
        rows = np.empty((size, scores.shape[1]))
        for q in np.flatnonzero(weights.max(0) > _SMALLEST_WEIGHT):
            rows[: self.n_systems] = (scores - mask * nodes.p[:, q, None]) * (nodes.a[q] / self.dispersion)
            rows[self.n_systems :] = spread[:, q, None]
            total += (rows * weights[:, q]) @ rows.T
        return total

    def items(self, parameters: Array, covariance: Array) -> ItemPosterior:
        """The items' posterior; ``covariance`` is the parameters'."""
        nodes = self.nodes(parameters)
        values = np.array([nodes.b, np.log(nodes.a)])
        means, covariances = [], []
        for weighed in self.weigh(nodes):
            weights = weighed.weights
            mean = weights @ values.T
            second = np.einsum("jq,uq,vq->juv", weights, values, values, optimize=True)
            scores = self._mean_scores(nodes, weighed)
            moved = [self._mean_scores(nodes, weighed, value) for value in values]
            by_parameter = np.stack([m - mean[:, k, None] * scores for k, m in enumerate(moved)], axis=1)
            passed_on = by_parameter @ covariance @ by_parameter.transpose(0, 2, 1)  # delta method
            means.append(mean)
            covariances.append(second - mean[:, :, None] * mean[:, None, :] + passed_on)
        return ItemPosterior(np.concatenate(means), np.concatenate(covariances))

    def spread_of_scores(self, parameters: Array) -> float:
        """φ from the data: the mean of (x - P)² / (P (1 - P)) over cells and the items' posterior.

        A few cells of dispersion 1 are added, so that it does not vanish where cells are few.
        """
        nodes = self.nodes(parameters)
        p = nodes.p.clip(_SMALLEST_P, 1 - _SMALLEST_P)
        total = 0.0
        for part, _, weights in self.weigh(nodes):
            x, mask = self.scores[:, part], self.mask[:, part]
            squared = x**2 * ((1 / (p * (1 - p))) @ weights.T) - 2 * x * ((1 / (1 - p)) @ weights.T)
            total += (mask * (squared + (p / (1 - p)) @ weights.T)).sum()
        return float((total + _PRIOR_CELLS) / (self.mask.sum() + _PRIOR_CELLS))

    def log_marginal(self, parameters: Array, a: Array | None = None) -> Array:
        """Log marginal likelihood of each item, (items,).

        Args:
            parameters: The estimates.
            a: Other discriminations for the nodes, (Q,): reversed or flat items. They turn about the mean ability.
        """
        nodes = self.nodes(parameters)
        if a is not None:
            ability = parameters[: self.n_systems, None]
            middle = ability.mean()
            nodes = _nodes(a, nodes.b, nodes.a * (middle - nodes.b) + a * (ability - middle))
        return np.concatenate([weighed.log_marginal for weighed in self.weigh(nodes)])


def _nodes(a: Array, b: Array, eta: Array) -> Nodes:
    return Nodes(a, b, eta, np.exp(-np.logaddexp(0.0, -eta)))


def _grid(answers: float, spreads: tuple[float, float], slopes: bool) -> tuple[Array, Array]:
    """Nodes in standard deviations for b and log a.

    An answer tells at most 1/4 about b at a = 1, and 0.44 about log a (the largest of η² P (1 - P)).
    """
    return _line(answers / 4, spreads[0]), _line(0.44 * answers, spreads[1]) if slopes else np.zeros(1)


def _line(information: float, spread: float) -> Array:
    width = 1 / np.sqrt(1 + information * spread**2)  # of an item's posterior, in units of its prior
    count = int(np.ceil(2 * _REACH / (_SPACING * width)))
    return np.linspace(-_REACH, _REACH, max(count, _FEWEST_NODES) | 1)
