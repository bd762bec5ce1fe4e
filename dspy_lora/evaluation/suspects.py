"""Items that look mislabelled: better systems do no better on them, or worse."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspy_lora.evaluation.irt import IRTFit
from dspy_lora.evaluation.marginal import MarginalLikelihood
from dspy_lora.evaluation.responses import Responses

Array = NDArray[np.float64]

# Before any answer: 3.3 % of labels are wrong on average over ten test sets (Northcutt et al. 2021, 2103.14749).
MISLABELLED = 0.033


@dataclass(frozen=True)
class Suspect:
    """One item.

    Attributes:
        item: Its id.
        title: A line about it.
        probability: That the item does not measure what the others do, given its scores.
        point_biserial: Correlation of its scores with the systems' mean score on the other items; NaN where all
            systems scored the same.
        mean_score: Over the systems.
    """

    item: str
    title: str
    probability: float
    point_biserial: float
    mean_score: float


def suspicious_items(
    responses: Responses, fit: IRTFit, *, threshold: float = 0.5, prior: float = MISLABELLED
) -> list[Suspect]:
    """Lists items that look mislabelled, the worst first.

    Three accounts of an item's scores are weighed by their marginal likelihoods: a sound item (the fit's population of
    discriminations), a reversed one (the same with the sign turned), and one that does not discriminate at all. The
    last two share ``prior``. With few systems no item can gather much evidence, and the list is short or empty: an
    item that all systems fail may be wrong or hard, and stays off it.

    Args:
        responses: What was fitted.
        fit: The fit.
        threshold: Least probability to be listed.
        prior: Share of bad items expected beforehand.
    """
    probability, correlation = suspicion(responses, fit, prior), point_biserial(responses.scores)
    means = np.nanmean(responses.scores, axis=0)
    order = [j for j in np.argsort(-probability, kind="stable") if probability[j] >= threshold]
    return [
        Suspect(responses.items[j], responses.titles[j], float(probability[j]), float(correlation[j]), float(means[j]))
        for j in order
    ]


def suspicion(responses: Responses, fit: IRTFit, prior: float = MISLABELLED) -> Array:
    """Probability that an item is reversed or flat, (items,)."""
    slopes = fit.model == "2pl"
    spreads = (fit.difficulty_sd, fit.log_discrimination_sd)
    likelihood = MarginalLikelihood(responses.scores, slopes=slopes, dispersion=fit.items.dispersion, spreads=spreads)
    parameters = np.concatenate([fit.abilities, np.log(spreads[: 1 + slopes])])
    a = likelihood.nodes(parameters).a
    sound = likelihood.log_marginal(parameters)
    bad = np.logaddexp(likelihood.log_marginal(parameters, -a), likelihood.log_marginal(parameters, 0 * a)) - np.log(2)
    return np.asarray(1 / (1 + (1 - prior) / prior * np.exp(np.clip(sound - bad, -500, 500))))


def point_biserial(scores: Array) -> Array:
    """Correlation of each item's scores with the systems' mean score on the other items, (items,).

    Args:
        scores: (systems, items); NaN where a system was not asked.

    Returns:
        NaN where fewer than 3 systems have a score, or all scores or all means are equal.
    """
    known = ~np.isnan(scores)
    x = np.where(known, scores, 0.0)
    others = known.sum(1, keepdims=True) - known
    rest = (x.sum(1, keepdims=True) - x) / np.maximum(others, 1)
    known = known & (others > 0)
    count = known.sum(0)

    def centred(values: Array) -> Array:
        return np.where(known, values - (values * known).sum(0) / np.maximum(count, 1), 0.0)

    x, rest = centred(x), centred(rest)
    scale = np.sqrt((x**2).sum(0) * (rest**2).sum(0))
    ok = (count >= 3) & (scale > 1e-12)
    return np.where(ok, (x * rest).sum(0) / np.where(ok, scale, 1.0), np.nan)
