"""How well a fit predicts cells that it has not seen: discrimination (AUC) and calibration."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dspy_lora.errors import ConfigError, DataError
from dspy_lora.evaluation.irt import fit_irt
from dspy_lora.evaluation.responses import Responses

Array = NDArray[np.float64]

_BINS = 10
_SMALLEST_P = 1e-9


@dataclass(frozen=True)
class HeldOutFit:
    """Figures over the cells that were held out.

    Attributes:
        model: The model that was fitted.
        cells: How many were held out.
        auc: Probability that a right cell was predicted above a wrong one; a graded score counts in part as each.
        calibration_error: Expected calibration error over 10 bins of equal count, as a share of one.
        log_loss: Mean of -(x log P + (1 - x) log (1 - P)), in nats.
        baseline_log_loss: The same of the system's mean score on the other cells.
    """

    model: str
    cells: int
    auc: float
    calibration_error: float
    log_loss: float
    baseline_log_loss: float


def held_out_fit(
    responses: Responses, model: Literal["auto", "rasch", "2pl"] = "auto", *, share: float = 0.1, seed: int = 0
) -> HeldOutFit:
    """Hides some cells, fits the rest, and predicts them.

    Args:
        responses: As for ``fit_irt``.
        model: As for ``fit_irt``.
        share: Of the known cells, above 0 and at most one half. Each system and each item keeps one cell.
        seed: Of the choice of cells.

    Raises:
        ConfigError: A share that is not allowed.
        DataError: No cell can be spared.
    """
    if not 0 < share <= 0.5:
        raise ConfigError(f"share={share!r}; allowed is above 0 and at most 0.5.")
    hidden = _choose(~np.isnan(responses.scores), share, np.random.default_rng(seed))
    if not hidden.any():
        raise DataError("no cell can be held out: every item has one score only. Ask systems common items.")
    seen = replace(responses, scores=np.where(hidden, np.nan, responses.scores))
    fit = fit_irt(seen, model)
    x, p = responses.scores[hidden], fit.items.probability(fit.abilities).T[hidden]
    means = np.broadcast_to(np.nanmean(seen.scores, axis=1, keepdims=True), hidden.shape)[hidden]
    return HeldOutFit(fit.model, len(x), auc(x, p), calibration_error(x, p), log_loss(x, p), log_loss(x, means))


def _choose(known: NDArray[np.bool_], share: float, random: np.random.Generator) -> NDArray[np.bool_]:
    """Cells to hide: at random, but one of each system and of each item stays."""
    draw = np.where(known, random.random(known.shape), np.inf)
    stays = (draw == draw.min(0)) | (draw == draw.min(1, keepdims=True))
    draw[stays] = np.inf
    count = min(max(1, round(share * known.sum())), int(np.isfinite(draw).sum()))
    hidden = np.zeros(known.shape, dtype=bool)
    hidden.flat[np.argsort(draw, axis=None)[:count]] = True
    return hidden


def auc(scores: Array, predicted: Array) -> float:
    """Area under the ROC curve; a score x counts x times as right and 1 - x times as wrong; ties count one half.

    Returns:
        NaN where all scores are right or all are wrong.
    """
    _, level = np.unique(predicted, return_inverse=True)
    right, wrong = np.bincount(level, scores), np.bincount(level, 1 - scores)
    pairs = right.sum() * wrong.sum()
    below = np.cumsum(wrong) - wrong / 2
    return float(right @ below / pairs) if pairs > 0 else float("nan")


def calibration_error(scores: Array, predicted: Array) -> float:
    """Mean distance between predicted and observed share over bins of equal count."""
    bins = np.array_split(np.argsort(predicted, kind="stable"), min(_BINS, len(predicted)))
    return float(sum(abs((predicted[part] - scores[part]).sum()) for part in bins) / len(predicted))


def log_loss(scores: Array, predicted: Array) -> float:
    """Mean Bernoulli log loss in nats."""
    p = predicted.clip(_SMALLEST_P, 1 - _SMALLEST_P)
    return float(-(scores * np.log(p) + (1 - scores) * np.log1p(-p)).mean())
