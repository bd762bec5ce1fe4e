"""Our item response models next to girth's marginal maximum likelihood, on the same made-up matrices.

Usage:
    pip install girth
    python examples/irt_girth.py [--seeds 10]

``r`` is the correlation of the two fits, RMSE that of each with the truth, after both are brought to its mean and
scale (girth fixes the abilities' scale, ours estimates it).
"""

import argparse
import logging

import girth
import numpy as np
from numpy.typing import NDArray
from options import positive

from dspy_lora.evaluation import fit_irt, simulate

Array = NDArray[np.float64]

DESIGNS = ((300, 40), (60, 100), (13, 200))


def scaled(values: Array, truth: Array) -> Array:
    """The values with the truth's mean and standard deviation."""
    return np.asarray((values - values.mean()) / values.std() * truth.std() + truth.mean())


def compare(systems: int, items: int, model: str, seeds: int) -> str:
    """One line: difficulties and abilities of both fits."""
    found = []
    for seed in range(seeds):
        sd = 0.0 if model == "rasch" else 0.4
        made = simulate(systems, items, seed=seed, log_discrimination_sd=sd)
        scores = made.responses.scores
        mixed = (scores.mean(0) > 0) & (scores.mean(0) < 1)  # girth cannot place an item that all or none solve
        fit = fit_irt(made.responses, model)
        answers = scores[:, mixed].T.astype(int)
        theirs = (girth.rasch_mml if model == "rasch" else girth.twopl_mml)(answers)
        abilities = girth.ability_eap(answers, theirs["Difficulty"], theirs["Discrimination"])
        pairs = (
            (fit.items.difficulty[mixed], theirs["Difficulty"], made.difficulty[mixed]),
            (fit.abilities, abilities, made.abilities),
        )
        found.append(
            [
                figure
                for ours, other, truth in pairs
                for figure in (
                    np.corrcoef(ours, other)[0, 1],
                    *(np.sqrt(np.mean((scaled(each, truth) - truth) ** 2)) for each in (ours, other)),
                )
            ]
        )
    means = np.mean(found, axis=0)
    return f"{systems:>4} x {items:<4} {model:<6} " + "".join(f"{value:>10.3f}" for value in means)


def main() -> None:
    """Prints one line a design."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=positive, default=10)
    seeds = parser.parse_args().seeds
    logging.disable(logging.WARNING)
    print(f"{'':18} {'difficulty':>10}{'':20}{'ability':>10}")
    print(f"{'systems x items':<18} " + "".join(f"{head:>10}" for head in ("r", "RMSE ours", "girth") * 2))
    for systems, items in DESIGNS:
        for model in ("rasch", "2pl"):
            print(compare(systems, items, model, seeds), flush=True)


if __name__ == "__main__":
    main()
