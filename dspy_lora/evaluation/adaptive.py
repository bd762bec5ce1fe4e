"""Adaptive testing: ask a system the items that tell most about it, and stop when its ability is known well enough."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from dspy_lora.errors import ConfigError, DataError
from dspy_lora.evaluation.irt import IRTFit
from dspy_lora.evaluation.items import Items, dispersions, fisher

Array = NDArray[np.float64]

_NARROWEST_PRIOR = 1.0  # logits: a few systems that happen to be alike say little about the next one
_SMALLEST_P = 1e-12
_POINTS = 101  # of the grid of abilities
_REACH = 6.0  # standard deviations on each side
_MOST_OFF = 0.25  # of the grid, from its middle to the posterior's
_ROUNDS = 20
_SETTLED = 1e-9  # logits


class AdaptiveTest:
    """One system's test.

    The ability's posterior is kept on a grid, laid anew around it where it has become narrower than the grid's steps: a
    sum over steps of up to a standard deviation is exact to eight digits. The next item is the one with the most Fisher
    information, averaged over the posterior (Veerkamp & Berger 1997, J. Educ. Behav. Stat. 22). Items whose
    parameters are uncertain tell less and are counted as less (``Items.probability``), so the standard error is not too
    small on a bank from few systems. Of graded scores each item's log-likelihood is divided by the item's own
    dispersion (``items.dispersions``), its mean over the posterior that comes out: one that changed with the ability
    inside the likelihood would itself speak for some abilities.

    Args:
        items: The calibrated bank.
        target_se: The test ends once the ability's standard error, in logits, is not above this.
        max_items: The test ends after so many; None allows the whole bank.
        anchors: Items asked first, of every system: they keep systems comparable whatever comes after.
        prior: Mean and standard deviation of the ability before any answer.

    Raises:
        ConfigError: A setting that is not allowed.
        DataError: An anchor that is not in the bank.
    """

    def __init__(
        self,
        items: Items,
        *,
        target_se: float = 0.3,
        max_items: int | None = None,
        anchors: Sequence[str] = (),
        prior: tuple[float, float] = (0.0, 1.5),
    ) -> None:
        if not target_se > 0:
            raise ConfigError(f"target_se={target_se!r}; allowed is a number above 0, in logits.")
        if not prior[1] > 0:
            raise ConfigError(f"prior={prior!r}; allowed is (mean, standard deviation above 0), in logits.")
        most = len(items.names) if max_items is None else max_items
        if not max(1, len(anchors)) <= most <= len(items.names):
            raise ConfigError(
                f"max_items={max_items!r}; allowed is {max(1, len(anchors))} (or the number of anchors) to "
                f"{len(items.names)}, the size of the bank."
            )
        self.items = items
        self.target_se, self.max_items = target_se, most
        self.scores: dict[str, float] = {}
        self._anchors = [items.item(name) for name in anchors]
        self._prior = prior
        self._open = np.ones(len(items.names), dtype=bool)
        self._asked: list[int] = []
        self._lay_grid(*prior)

    @classmethod
    def for_fit(
        cls, fit: IRTFit, *, target_se: float = 0.3, max_items: int | None = None, anchors: Sequence[str] = ()
    ) -> "AdaptiveTest":
        """A test on a fit's items, with a prior as wide as the systems that the fit knows."""
        prior = (float(fit.abilities.mean()), max(float(fit.abilities.std()), _NARROWEST_PRIOR))
        return cls(fit.items, target_se=target_se, max_items=max_items, anchors=anchors, prior=prior)

    # -- the ability ---------------------------------------------------------------------------------------------------

    @property
    def posterior(self) -> Array:
        """Weights over the grid of abilities."""
        weights = np.exp(self._log_posterior - self._log_posterior.max())
        return np.asarray(weights / weights.sum())

    @property
    def ability(self) -> float:
        """The posterior's mean (EAP), in logits."""
        return float(self.posterior @ self._grid)

    @property
    def standard_error(self) -> float:
        """The posterior's standard deviation, in logits: of the ability on the bank's scale.

        Where that scale lies is uncertain too, more so on a bank from few systems; it is the same for all systems on
        the bank and not counted here.
        """
        return float(np.sqrt(self.posterior @ (self._grid - self.ability) ** 2))

    @property
    def expected_score(self) -> float:
        """Mean score on the whole bank: what was scored as it is, the rest predicted (tinyBenchmarks' p-IRT)."""
        predicted = self._p[self._open] @ self.posterior
        return float((sum(self.scores.values()) + predicted.sum()) / len(self._open))

    @property
    def done(self) -> bool:
        """Whether the test has ended: all anchors asked, and the target, the most items or the bank's end reached."""
        if any(self._open[j] for j in self._anchors):
            return False
        return len(self.scores) >= self.max_items or self.standard_error <= self.target_se

    # -- asking --------------------------------------------------------------------------------------------------------

    def next(self, count: int = 1) -> list[str]:
        """The items to ask next, best first; none when the test has ended.

        Args:
            count: At most so many: a batch is asked at once, and chosen on what is known before it.

        Raises:
            ConfigError: ``count`` below 1.
        """
        if count < 1:
            raise ConfigError(f"count={count!r}; allowed is 1 and more.")
        if self.done:
            return []
        value = np.where(self._open, self._information @ self.posterior, -np.inf)
        anchors = [j for j in self._anchors if self._open[j]]
        rest = [
            j for j in np.argsort(-value, kind="stable")[: count + len(anchors)] if j not in anchors and self._open[j]
        ]
        room = min(count, self.max_items - len(self.scores))
        return [self.items.names[j] for j in (anchors + rest)[:room]]

    def plan(self) -> list[str]:
        """The items to ask at once, without an answer in between: as many as are expected to reach the target.

        The expected variance after some items is the mean, over the posterior, of 1 / (1 / variance + information).
        """
        order = self.next(len(self._open))
        at = [self.items.item(name) for name in order]
        information = 1 / self.standard_error**2 + np.cumsum(self._information[at], axis=0)
        reached = np.flatnonzero((1 / information) @ self.posterior <= self.target_se**2)
        enough = int(reached[0]) + 1 if len(reached) else len(order)
        return order[: max(enough, sum(self._open[j] for j in self._anchors))]

    def record(self, item: str, score: float) -> None:
        """Takes a score in, whether or not the item was proposed.

        Raises:
            DataError: An unknown item, one that has a score, or a score outside [0, 1].
        """
        j = self.items.item(item)
        if not self._open[j]:
            raise DataError(f"item {item!r} has the score {self.scores[item]:g} already. Start another test.")
        score = float(score)
        if not 0 <= score <= 1:
            raise DataError(f"the score {score!r} on item {item!r}; allowed is 0 to 1.")
        self._open[j] = False
        self.scores[item] = score
        self._asked.append(j)
        self._weigh()
        self._fit_grid()

    def run(self, ask: Callable[[list[str]], Sequence[float]], *, batch: int = 1) -> "AdaptiveTest":
        """Runs the test to its end.

        Args:
            ask: Scores the system on some items, in their order; it may ask them side by side.
            batch: Items asked at once.

        Returns:
            The test itself.
        """
        while chosen := self.next(batch):
            for item, score in zip(chosen, ask(chosen), strict=True):
                self.record(item, score)
        return self

    # -- the grid ------------------------------------------------------------------------------------------------------

    def _fit_grid(self) -> None:
        """Lays the grid anew if the posterior is narrower than its steps, or far from its middle.

        It starts from the prior's, where nothing is cut off, and comes nearer.
        """
        off = abs(self.ability - self._grid[_POINTS // 2]) / (self._grid[-1] - self._grid[0])
        if self.standard_error >= self._step and off <= _MOST_OFF:
            return
        self._lay_grid(*self._prior)
        while self.standard_error < self._step:
            self._lay_grid(self.ability, max(self.standard_error, self._step))

    @property
    def _step(self) -> float:
        return float(self._grid[1] - self._grid[0])

    def _lay_grid(self, middle: float, spread: float) -> None:
        self._grid = middle + spread * np.linspace(-_REACH, _REACH, _POINTS)
        p, slope, variance = self.items.answer(self._grid)
        self._dispersions = dispersions(p, variance, self.items.dispersion)
        self._information = fisher(p, slope, self._dispersions)
        self._p = p.clip(_SMALLEST_P, 1 - _SMALLEST_P)
        self._weigh()

    def _weigh(self) -> None:
        """Takes the posterior of all scores, first as if the items were known, then until their dispersions settle."""
        score, p = np.array([*self.scores.values()], dtype=np.float64)[:, None], self._p[self._asked]
        log_likelihood = score * np.log(p) + (1 - score) * np.log1p(-p)  # (answers, grid)
        log_prior = -(((self._grid - self._prior[0]) / self._prior[1]) ** 2) / 2
        dispersion = np.full_like(score, self.items.dispersion)
        self._log_posterior: Array = np.vstack([log_prior, log_likelihood / dispersion]).sum(0)
        for _ in range(_ROUNDS if self.items.dispersion < 1 else 0):
            before = self.ability
            dispersion = (self._dispersions[self._asked] @ self.posterior)[:, None]
            self._log_posterior = np.vstack([log_prior, log_likelihood / dispersion]).sum(0)
            if abs(self.ability - before) < _SETTLED:
                break
