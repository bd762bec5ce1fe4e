"""Made-up systems and items from the model itself, to see what a design of so many systems and items can tell."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspy_lora.evaluation.responses import Responses

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Simulated:
    """Responses with the parameters behind them.

    Attributes:
        responses: N systems x J items.
        abilities: (N,).
        difficulty: (J,).
        discrimination: (J,).
    """

    responses: Responses
    abilities: Array
    difficulty: Array
    discrimination: Array


def simulate(
    systems: int,
    items: int,
    *,
    seed: int,
    difficulty_sd: float = 1.5,
    log_discrimination_sd: float = 0.4,
    dispersion: float = 1.0,
    missing: float = 0.0,
) -> Simulated:
    """Draws abilities from N(0.5, 1), items from the population of marginal.py, and scores.

    Args:
        systems: How many.
        items: How many.
        seed: Of NumPy's default generator.
        difficulty_sd: sd_b.
        log_discrimination_sd: sd_a; 0 makes a Rasch model.
        dispersion: φ; below 1 the scores are graded: beta distributed with variance φ P (1 - P).
        missing: Share of cells without a score.
    """
    random = np.random.default_rng(seed)
    abilities = random.normal(0.5, 1.0, systems)
    difficulty = random.normal(0.0, difficulty_sd, items)
    discrimination = np.exp(random.normal(0.0, log_discrimination_sd, items))
    p = 1 / (1 + np.exp(-discrimination * (abilities[:, None] - difficulty)))
    if dispersion == 1:
        scores = (random.random(p.shape) < p).astype(np.float64)
    else:
        precision = 1 / dispersion - 1
        p = p.clip(1e-6, 1 - 1e-6)
        scores = random.beta(p * precision, (1 - p) * precision)
    scores[random.random(p.shape) < missing] = np.nan
    return Simulated(Responses.from_matrix(scores), abilities, difficulty, discrimination)
