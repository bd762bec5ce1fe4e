"""Item response theory over systems x items: the Rasch model and the two-parameter logistic model (2PL).

The model, its priors and how they are integrated: marginal.py. Abilities are estimated by the marginal posterior's
maximum, items by their posterior mean; both carry standard errors.
"""

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dspy_lora.errors import ConfigError, DataError
from dspy_lora.evaluation.items import Items, standard_error
from dspy_lora.evaluation.marginal import DIFFICULTY_SPREAD, DISCRIMINATION_SPREAD, MarginalLikelihood
from dspy_lora.evaluation.responses import Responses, position

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]
Model = Literal["rasch", "2pl"]

FEWEST_FOR_2PL = 8  # systems; with fewer, 2PL predicts held-out cells no better than Rasch (examples/irt_recovery.py)
FEW_ITEMS = 30

_FORMAT = "dspy-lora/irt/1"
_ROUNDS = 12
_SETTLED = 0.01  # relative change of the dispersion that ends the rounds
_REGRID = 1.25  # factor by which a spread may leave the guess that the grid was made for
# The dispersion is not taken below this, nor so low that an item's scores count as more than so many answers of 0 or 1:
# the grid would grow without end. Intervals are then wider than they need be.
_SMALLEST_DISPERSION = 0.02
_MOST_ANSWERS = 250
# Beyond anything the priors allow; a line search that steps further overflows.
_FARTHEST = 30.0  # logits
_LOG_SPREADS = (-6.0, 2.5)


@dataclass(frozen=True)
class Comparison:
    """One system's ability less another's.

    Attributes:
        difference: In logits.
        standard_error: Of the difference; the uncertainty that both share has cancelled.
        probability: That the first is the better one.
    """

    difference: float
    standard_error: float
    probability: float


@dataclass(frozen=True)
class IRTFit:
    """A fitted model.

    Attributes:
        model: ``"rasch"`` or ``"2pl"``.
        systems: Names, N of them.
        abilities: In logits, (N,); 0 is one half right on the median item.
        covariance: Of the abilities, (N, N).
        items: The calibrated items.
        difficulty_sd: sd_b, the spread of the items' difficulties.
        log_discrimination_sd: sd_a, the spread of the log discriminations; 0 in the Rasch model.
        warnings: What to know before believing the figures.
    """

    model: Model
    systems: tuple[str, ...]
    abilities: Array
    covariance: Array
    items: Items
    difficulty_sd: float
    log_discrimination_sd: float
    warnings: tuple[str, ...]

    @property
    def standard_errors(self) -> Array:
        """Of the abilities, (N,). They count the items as a sample: the claim is about more items of the kind."""
        return standard_error(np.diag(self.covariance))

    def ability(self, system: str) -> tuple[float, float]:
        """A system's ability and its standard error.

        Raises:
            DataError: No such system.
        """
        i = position(system, self.systems, "system")
        return float(self.abilities[i]), float(self.standard_errors[i])

    def compare(self, first: str, second: str) -> Comparison:
        """Compares two systems on the items they share and those they do not.

        Raises:
            DataError: No such system.
        """
        i, k = (position(name, self.systems, "system") for name in (first, second))
        difference = float(self.abilities[i] - self.abilities[k])
        variance = self.covariance[i, i] + self.covariance[k, k] - 2 * self.covariance[i, k]
        error = math.sqrt(max(variance, 0.0))
        probability = 0.5 if error == 0 else (1 + math.erf(difference / error / math.sqrt(2))) / 2
        return Comparison(difference, error, probability)

    def ranking(self) -> tuple[str, ...]:
        """The systems, best first."""
        return tuple(self.systems[i] for i in np.argsort(-self.abilities, kind="stable"))

    def telling_items(self, count: int = 10) -> tuple[str, ...]:
        """The items that tell these systems apart: the largest mean information over their abilities, best first."""
        information = self.items.information(self.abilities).mean(1)
        return tuple(self.items.names[j] for j in np.argsort(-information, kind="stable")[:count])

    def save(self, path: str | Path) -> None:
        """Writes the fit as JSON."""
        state: dict[str, Any] = {"format": _FORMAT}
        for name, value in (vars(self) | {"items": vars(self.items)}).items():
            state[name] = _plain(value)
        Path(path).write_text(json.dumps(state, ensure_ascii=False) + "\n", "utf-8", "backslashreplace")

    @classmethod
    def load(cls, path: str | Path) -> "IRTFit":
        """Reads what ``save`` wrote.

        Raises:
            DataError: The file is not such a fit.
        """
        try:
            state = json.loads(Path(path).read_text(encoding="utf-8"))
            if state.pop("format") != _FORMAT:
                raise ValueError("another format")
            items = Items(**_arrays(state.pop("items")))
            fit = cls(items=items, **_arrays(state))
            _check_shapes(fit)
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise DataError(f"{path} is not a fit that IRTFit.save wrote ({exc}). Fit and save it again.") from exc
        return fit


def fit_irt(responses: Responses, model: Literal["auto", "rasch", "2pl"] = "auto", *, log: bool = True) -> IRTFit:
    """Fits abilities and items.

    Args:
        responses: At least two systems; cells may be missing; scores may be graded.
        model: ``"auto"`` takes 2PL from ``FEWEST_FOR_2PL`` systems on, else Rasch, and Rasch too where 2PL comes to no
            estimate, as on many systems that are alike. Few systems say little about an item, which its standard
            errors show; they are no less good for the abilities.
        log: Whether the fit's ``warnings`` are logged too.

    Returns:
        The fit.

    Raises:
        ConfigError: Another ``model``.
        DataError: Fewer than two systems.
    """
    if model not in ("auto", "rasch", "2pl"):
        raise ConfigError(f"model={model!r}; allowed are 'auto', 'rasch' and '2pl'.")
    if len(responses.systems) < 2:
        raise DataError("one system alone cannot be told from its items. Give the scores of at least two systems.")
    slopes = model == "2pl" or (model == "auto" and len(responses.systems) >= FEWEST_FOR_2PL)
    fit = _fit(responses, slopes)
    if model == "auto" and slopes and fit.warnings:
        why = f"2PL comes to no estimate on these scores ({'; '.join(fit.warnings)}), so this is a Rasch fit"
        fit = _fit(responses, slopes=False)
        fit = replace(fit, warnings=(why, *fit.warnings))
    fit = replace(fit, warnings=(*_doubts(responses, fit.model == "2pl"), *fit.warnings))
    for warning in fit.warnings if log else ():
        logger.warning("%s", warning)
    return fit


def _fit(responses: Responses, slopes: bool) -> IRTFit:
    """The fit; its warnings say why it is not to be believed, if so."""
    likelihood, parameters, settled = _estimate(responses, slopes)
    everything = likelihood.covariance(parameters)
    posterior = likelihood.items(parameters, everything)
    n = len(responses.systems)
    sigma_b, sigma_a = likelihood.spreads(parameters)
    doubts = [] if settled else ["the estimates did not settle"]
    if not _positive_definite(everything):
        doubts.append("the covariance is not positive definite, and the standard errors mean nothing")
    return IRTFit(
        model="2pl" if slopes else "rasch",
        systems=responses.systems,
        abilities=parameters[:n],
        covariance=everything[:n, :n],
        items=Items(
            responses.items,
            responses.titles,
            posterior.mean[:, 0],
            posterior.mean[:, 1],
            posterior.covariance,
            likelihood.dispersion,
        ),
        difficulty_sd=sigma_b,
        log_discrimination_sd=sigma_a,
        warnings=tuple(doubts),
    )


def _positive_definite(covariance: Array) -> bool:
    return bool(np.isfinite(covariance).all() and np.linalg.eigvalsh(covariance)[0] > 0)


def _estimate(responses: Responses, slopes: bool) -> tuple[MarginalLikelihood, Array, bool]:
    """Finds the maximum; again with a finer or coarser grid, or another dispersion, until both fit the estimates."""
    spreads, dispersion = (DIFFICULTY_SPREAD[0], DISCRIMINATION_SPREAD[0]), 1.0
    parameters = _start(responses.scores, slopes)
    lowest = max(_SMALLEST_DISPERSION, (~np.isnan(responses.scores)).sum(0).max() / _MOST_ANSWERS)
    for _ in range(_ROUNDS):
        likelihood = MarginalLikelihood(responses.scores, slopes=slopes, dispersion=dispersion, spreads=spreads)
        parameters, found = _maximum(likelihood, parameters)
        if not found:
            break
        fitted = likelihood.spreads(parameters)
        moved = max(max(new / old, old / new) for new, old in zip(fitted, spreads, strict=True) if new)
        wanted = min(max(likelihood.spread_of_scores(parameters), lowest), 1.0) if responses.graded else 1.0
        if moved < _REGRID and abs(wanted / dispersion - 1) < _SETTLED:
            return likelihood, parameters, True
        spreads, dispersion = (fitted[0], fitted[1] or spreads[1]), wanted
    return likelihood, parameters, False


def _maximum(likelihood: MarginalLikelihood, start: Array) -> tuple[Array, bool]:
    from scipy.optimize import minimize

    # The value is a mean over items, so a change of 1e-11 is far below what one more answer would change.
    options = {"maxiter": 500, "ftol": 1e-12, "gtol": 1e-7}
    n = likelihood.n_systems
    bounds = [(-_FARTHEST, _FARTHEST)] * n + [_LOG_SPREADS] * (len(start) - n)
    result = minimize(likelihood, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return result.x, bool(result.success)


def _start(scores: Array, slopes: bool) -> Array:
    """Abilities from the mean scores, and the priors' spreads."""
    share = np.nanmean(scores, axis=1).clip(0.02, 0.98)
    spreads = [DIFFICULTY_SPREAD[0], DISCRIMINATION_SPREAD[0]][: 1 + slopes]
    return np.concatenate([1.3 * np.log(share / (1 - share)), np.log(spreads)])


# -- honesty -----------------------------------------------------------------------------------------------------------


def _doubts(responses: Responses, slopes: bool) -> Iterator[str]:
    """What a reader of the fit should know."""
    n, count = responses.scores.shape
    if n < FEWEST_FOR_2PL:
        yield (
            f"{n} systems say little about single items: their intervals are wide and lean on the population"
            + (", the discriminations most of all; 'rasch' is the safer model" if slopes else "")
        )
    if count < FEW_ITEMS:
        yield f"{count} items: the abilities' intervals are wide and lean on the prior"
    for name, row in zip(responses.systems, responses.scores, strict=True):
        if np.nanmin(row) == np.nanmax(row) and row[~np.isnan(row)][0] in (0, 1):
            yield f"every score of {name!r} is {np.nanmax(row):g}: only the prior bounds its ability on one side"
    if not _connected(~np.isnan(responses.scores)):
        yield (
            "the systems fall into groups without a common item: they compare only if their items are random draws "
            "from one population; ask all of them some anchor items"
        )


def _connected(asked: NDArray[np.bool_]) -> bool:
    """Whether every system reaches every other over common items."""
    reached = asked[0]  # items
    for _ in asked:
        reached = asked[(asked & reached).any(1)].any(0)
    return bool(reached.all())


# -- JSON --------------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


def _arrays(state: dict[str, Any]) -> dict[str, Any]:
    """Lists of numbers as arrays, lists of strings as tuples."""
    names = ("names", "titles", "systems", "warnings")
    return {
        name: (tuple(value) if name in names else np.array(value, dtype=np.float64))
        if isinstance(value, list)
        else value
        for name, value in state.items()
    }


def _check_shapes(fit: IRTFit) -> None:
    n, count = len(fit.systems), len(fit.items.names)
    shapes = {
        "abilities": (fit.abilities, (n,)),
        "covariance": (fit.covariance, (n, n)),
        "difficulty": (fit.items.difficulty, (count,)),
        "log_discrimination": (fit.items.log_discrimination, (count,)),
        "the items' covariance": (fit.items.covariance, (count, 2, 2)),
    }
    for name, (array, shape) in shapes.items():
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, not {shape}")
