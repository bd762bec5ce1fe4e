"""Item response theory on made-up systems and items: are the parameters found, and are the intervals honest?

Usage:
    python examples/irt_recovery.py [--seeds 150]

Every line is one design, fitted once a seed. RMSE is in logits (of the log for discriminations); coverage is the share
of 95 % intervals that hold the truth, and should lie between 93 and 97 %. ``pairs`` are differences of two systems. An
ability's error counts the items as a sample, and one draw of items moves all systems of a seed together, so coverage
of the abilities wants many seeds. Then: held-out cells under both models, adaptive tests against the full test, and
the time of a large fit.
"""

import argparse
import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from options import positive
from scipy.stats import kendalltau

from dspy_lora.evaluation import AdaptiveTest, IRTFit, Simulated, fit_irt, held_out_fit, simulate

Array = NDArray[np.float64]

NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Design:
    """Systems, items and what else ``simulate`` takes."""

    systems: int
    items: int
    settings: dict[str, Any]

    def draw(self, seed: int) -> Simulated:
        """One simulated matrix."""
        return simulate(self.systems, self.items, seed=seed, **self.settings)

    def __str__(self) -> str:
        settings = " ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"{self.systems} x {self.items} {settings}"


DESIGNS = [
    Design(12, 400, {}),
    Design(30, 200, {}),
    Design(13, 200, {"missing": 0.3}),
    Design(12, 300, {"dispersion": 0.3}),
    Design(5, 300, {"log_discrimination_sd": 0.0}),
]


def errors(made: Simulated, fit: IRTFit) -> dict[str, tuple[Array, Array]]:
    """Each parameter's errors and standard errors."""
    away = fit.abilities - made.abilities
    i, k = np.triu_indices(len(away), 1)
    pair = np.diag(fit.covariance)[i] + np.diag(fit.covariance)[k] - 2 * fit.covariance[i, k]
    found = {
        "ability": (away, fit.standard_errors),
        "pairs": (away[i] - away[k], np.sqrt(pair)),
        "difficulty": (fit.items.difficulty - made.difficulty, fit.items.difficulty_se),
    }
    if fit.model == "2pl":
        log_error = fit.items.log_discrimination - np.log(made.discrimination)
        found["discrimination"] = (log_error, np.sqrt(fit.items.covariance[:, 1, 1]))
    return found


def recovery(design: Design, seeds: int) -> str:
    """One line: RMSE and coverage of each parameter."""
    results = []
    for seed in range(seeds):
        made = design.draw(seed)
        results.append(errors(made, fit_irt(made.responses)))
    cells = []
    for name in results[0]:
        away, error = (np.concatenate([result[name][part] for result in results]) for part in (0, 1))
        cells.append(f"{np.sqrt(np.mean(away**2)):.3f} {np.mean(np.abs(away) < NORMAL_95 * error):6.1%}")
    return f"{design!s:<32} " + " ".join(f"{cell:>15}" for cell in cells)


def models(systems: int, seeds: int) -> str:
    """One line: how well both models predict held-out cells of 2PL data."""
    matrices = [simulate(systems, 400, seed=seed).responses for seed in range(seeds)]
    cells = []
    for model in ("rasch", "2pl"):
        fits = [held_out_fit(matrix, model, seed=seed) for seed, matrix in enumerate(matrices)]
        mean = np.mean([(fit.log_loss, fit.auc, fit.calibration_error) for fit in fits], axis=0)
        cells.append("{:>9.4f} {:>6.3f} {:>6.3f}".format(*mean))
    return f"{systems:>7} {'   '.join(cells)}"


def adaptive(calibrated: int, seeds: int, items: int = 1000, new: int = 12) -> str:
    """One line: new systems tested adaptively on a bank from other systems, against all items."""
    rows = []
    for seed in range(seeds):
        made = simulate(calibrated + new, items, seed=seed)
        responses = made.responses
        fit = fit_irt(responses.select(responses.systems[:calibrated]))
        tests = []
        for scores in responses.scores[calibrated:]:
            row = dict(zip(responses.items, scores, strict=True))
            test = AdaptiveTest.for_fit(fit, target_se=0.15, max_items=items // 4)
            tests.append(test.run(lambda names, row=row: [row[name] for name in names], batch=8))
        full, abilities = responses.scores[calibrated:].mean(1), np.array([test.ability for test in tests])
        asked = [len(test.scores) for test in tests]
        some = np.random.default_rng(seed).permutation(items)[: round(np.mean(asked))]
        at_random = responses.scores[calibrated:][:, some].mean(1)
        inside = np.abs(abilities - made.abilities[calibrated:]) < NORMAL_95 * np.array(
            [test.standard_error for test in tests]
        )
        taus = [kendalltau(values, full).statistic for values in (abilities, at_random)]
        rows.append([np.mean(asked) / items, *taus, inside.mean()])
    share, tau, random_tau, coverage = np.mean(rows, axis=0)
    return f"{calibrated:>10} {share:>8.1%} {tau:>8.3f} {random_tau:>12.3f} {coverage:>9.1%}"


def main() -> None:
    """Prints the four tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=positive, default=150, help="matrices a line (default: 150)")
    seeds = parser.parse_args().seeds
    logging.disable(logging.WARNING)  # few systems are meant here
    print(f"RMSE and coverage of 95 % intervals, {seeds} seeds")
    print(f"{'systems x items':<32} {'ability':>15} {'pairs':>15} {'difficulty':>15} {'discrimination':>15}")
    for design in DESIGNS:
        print(recovery(design, seeds), flush=True)
    few = max(1, seeds // 5)
    print(f"\nHeld-out cells of 2PL data with 400 items, {few} seeds: log loss, AUC, calibration error")
    print(f"{'systems':>7} {'Rasch':>23}   {'2PL':>23}")
    for systems in (4, 6, 8, 12, 24):
        print(models(systems, few), flush=True)
    few = max(1, seeds // 10)
    print(f"\nAdaptive tests of 12 new systems, 1,000 items, at most a quarter of them, {few} seeds")
    print(f"{'calibrated':>10} {'asked':>8} {'tau':>8} {'tau, random':>12} {'coverage':>9}")
    for calibrated in (5, 12, 30):
        print(adaptive(calibrated, few), flush=True)
    matrix = simulate(50, 5000, seed=0).responses
    start = time.perf_counter()
    fit_irt(matrix)
    print(f"\n50 systems x 5,000 items: 2PL in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
