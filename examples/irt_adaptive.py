"""Adaptive tests against the full test, on answers of the bundled base model and its twelve adapters.

Usage:
    python examples/irt_adaptive.py [--count 400] [--seeds 3]

The items are the seedling's held-out tasks (``dspy_lora.seedling.bars``), which every system can be asked: an adapter
learns a domain at some cost to them, each at its own. One system after another is left out, the items are calibrated on
the other twelve, and it is asked adaptively until its ability is known or a quarter of the items is used up. Tau is
Kendall's, between the order of the thirteen systems so found and that of their scores on all items; for comparison the
mean over draws of as many items at random, the same for all systems.
"""

import argparse
import logging

import numpy as np
from numpy.typing import NDArray
from options import positive
from scipy.stats import kendalltau

from dspy_lora import AdapterRegistry, LoRALM
from dspy_lora.adapters.registry import PACKAGED_ROOT
from dspy_lora.evaluation import AdaptiveTest, Responses, fit_irt
from dspy_lora.seedling.bars import ADAPTERS, ask, questions
from dspy_lora.seedling.rules import rules_task

Array = NDArray[np.float64]

DRAWS = 100  # of random items


def answers(count: int, seed: int) -> Responses:
    """Scores of the bundled base model and its adapters on ``count`` tasks, half of them of rules."""
    asked = [*questions(seed, count // 2), *questions(seed + 1, count - count // 2, rules_task)]
    rows = {}
    for domain in (None, *(revision.adapter for revision in AdapterRegistry(PACKAGED_ROOT).list())):
        lm = LoRALM("seedling", domain=domain, registry=PACKAGED_ROOT, max_tokens=100)
        outcomes = ask(lm, ADAPTERS["ChatAdapter"], asked)
        rows[domain or "base"] = [float(outcome.right) for outcome in outcomes]
    return Responses.from_matrix(list(rows.values()), tuple(rows))


def adaptive_test(responses: Responses, system: str, most: int) -> AdaptiveTest:
    """One system's test on items that the other systems calibrated."""
    fit = fit_irt(responses.select([name for name in responses.systems if name != system]))
    scores = dict(zip(responses.items, responses.scores[responses.system(system)], strict=True))
    test = AdaptiveTest.for_fit(fit, target_se=0.1, max_items=most)
    return test.run(lambda names: [scores[name] for name in names], batch=8)


def compare(responses: Responses, seed: int) -> tuple[list[AdaptiveTest], list[float]]:
    """The systems' tests; share of items asked, tau, and mean tau of as many random items."""
    most = len(responses.items) // 4
    tests = [adaptive_test(responses, system, most) for system in responses.systems]
    asked = float(np.mean([len(test.scores) for test in tests]))
    random = np.random.default_rng(seed)
    draws = (random.permutation(len(responses.items))[: round(asked)] for _ in range(DRAWS))
    at_random = [_tau(responses, responses.scores[:, draw].mean(1)) for draw in draws]
    tau = _tau(responses, np.array([test.expected_score for test in tests]))
    return tests, [asked / len(responses.items), tau, float(np.mean(at_random))]


def _tau(responses: Responses, estimates: Array) -> float:
    return float(kendalltau(estimates, responses.scores.mean(1)).statistic)


def main() -> None:
    """Prints the systems of the first seed, and one line a seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=positive, default=400, help="tasks a seed (default: 400)")
    parser.add_argument("--seeds", type=positive, default=3)
    args = parser.parse_args()
    logging.getLogger("dspy_lora.evaluation.irt").setLevel(logging.ERROR)
    figures = []
    for seed in range(args.seeds):
        responses = answers(args.count, 2 * seed)
        tests, line = compare(responses, seed)
        if not seed:
            print(f"{'system':18} {'full score':>10} {'adaptive':>9} {'ability':>8} {'s.e.':>6} {'asked':>6}")
            for name, scores, test in zip(responses.systems, responses.scores, tests, strict=True):
                print(
                    f"{name:18} {scores.mean():>10.3f} {test.expected_score:>9.3f} {test.ability:>8.2f} "
                    f"{test.standard_error:>6.2f} {len(test.scores):>6}"
                )
            print(f"\n{'seed':8} {'asked':>7} {'tau':>7} {'tau, random':>12}")
        figures.append(line)
        print("{:<8} {:>7.1%} {:>7.3f} {:>12.3f}".format(seed, *line), flush=True)
    print("{:<8} {:>7.1%} {:>7.3f} {:>12.3f}".format("mean", *np.mean(figures, axis=0)))


if __name__ == "__main__":
    main()
