"""What the joint search of adapters and instructions brings, next to either half alone: ``dspy-lora bench --joint``.

Rows come from the sets that ``lora_config.yaml`` names: training rows to race and reflect on, dev rows to choose the
program, test rows for the figures. Every method gets the same budget of metric calls, but for the one that tries every
assignment; equal calls of different methods are answered from DSPy's cache, which changes their time and not their
count.
"""

import dataclasses
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import dspy

from dspy_lora import LoRALM
from dspy_lora.config import load_config
from dspy_lora.optimizers import LoRAGEPA
from dspy_lora.optimizers.candidates import Space, with_arms
from dspy_lora.optimizers.choosing import interval
from dspy_lora.optimizers.rollouts import Rollouts
from dspy_lora.optimizers.run_log import RunLog
from dspy_lora.training.data import read_rows

_TRAIN, _DEV, _TEST = 80, 60, 200
_EXHAUSTIBLE = 250  # assignments; of more, not all are tried


@dataclasses.dataclass(frozen=True)
class Problem:
    """A program and its rows.

    Attributes:
        name: What the table calls it.
        program: Makes it.
        train: To race and reflect on.
        dev: To choose the program on.
        test: For the figures.
    """

    name: str
    program: Callable[[], dspy.Module]
    train: list[dspy.Example]
    dev: list[dspy.Example]
    test: list[dspy.Example]


class OneLabel(dspy.Module):
    """One predictor that is not told the domain."""

    def __init__(self) -> None:
        super().__init__()
        self.label = dspy.Predict("text -> label")

    def forward(self, one: str) -> dspy.Prediction:
        """One text, one label."""
        return dspy.Prediction(answers=[self.label(text=one).label])


class TwoLabels(dspy.Module):
    """A case of two texts of different domains: two predictors of equal signatures."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = dspy.Predict("text -> label"), dspy.Predict("text -> label")

    def forward(self, one: str, two: str) -> dspy.Prediction:
        """Two texts, a label each."""
        return dspy.Prediction(answers=[self.first(text=one).label, self.second(text=two).label])


class ThreeSteps(dspy.Module):
    """Two texts of different domains, and a rule that the base model follows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = dspy.Predict("text -> label"), dspy.Predict("text -> label")
        self.third = dspy.Predict(dspy.Signature("text, word -> found: bool", "Does the text mention the word?"))

    def forward(self, one: str, two: str, word: str) -> dspy.Prediction:
        """Two labels, and whether a word is in the first text."""
        found = self.third(text=one, word=word).found
        return dspy.Prediction(answers=[self.first(text=one).label, self.second(text=two).label, str(found)])


def metric(gold: Any, pred: Any, trace: Any = None, pred_name: str | None = None, pred_trace: Any = None) -> Any:
    """Share of right answers; the feedback names the predictor's own right answer."""
    right = [given.strip() == wanted for given, wanted in zip(pred.answers, gold.wanted, strict=True)]
    place = {"first": 0, "label": 0, "second": 1, "third": 2}.get(pred_name or "", 0)
    feedback = "Right." if right[place] else f"Wrong. The right answer is {gold.wanted[place]}."
    return dspy.Prediction(score=sum(right) / len(right), feedback=feedback)


def problems(root: Path, seed: int) -> list[Problem]:
    """The three programs, on rows that a seed draws.

    Args:
        root: Holds each domain's folder of train.jsonl, dev.jsonl and test.jsonl.
        seed: Decides which rows.
    """

    def draw(domain: str, split: str, count: int) -> list[dict[str, Any]]:
        rows = read_rows(root / str(load_config().domain(domain).data) / f"{split}.jsonl", ["text", "label"])
        return Random(f"{seed} {domain} {split}").sample(rows, min(count, len(rows)))

    def examples(make: Callable[..., dspy.Example], *domains: str) -> list[list[dspy.Example]]:
        sizes = {"train": _TRAIN, "dev": _DEV, "test": _TEST}
        parts = [[draw(domain, split, size) for domain in domains] for split, size in sizes.items()]
        return [[make(*rows) for rows in zip(*part, strict=False)] for part in parts]

    def one(*rows: dict[str, Any]) -> dspy.Example:
        row = Random(str(rows)).choices(rows, (2, 1, 1))[0]
        return dspy.Example(one=row["text"], wanted=[row["label"]]).with_inputs("one")

    def two(a: dict[str, Any], b: dict[str, Any]) -> dspy.Example:
        return dspy.Example(one=a["text"], two=b["text"], wanted=[a["label"], b["label"]]).with_inputs("one", "two")

    def three(a: dict[str, Any], b: dict[str, Any]) -> dspy.Example:
        words = [word.strip(".,?!") for word in a["text"].split() if word.strip(".,?!").isalpha()] or ["the"]
        chance = Random(a["text"])
        there = chance.random() < 0.5
        word = chance.choice(words) if there else "giraffe"
        inputs = {"one": a["text"], "two": b["text"], "word": word}
        return dspy.Example(**inputs, wanted=[a["label"], b["label"], str(there)]).with_inputs(*inputs)

    made = {
        "one predictor, rows of three domains": (OneLabel, examples(one, "customer_service", "legal", "healthcare")),
        "two predictors": (TwoLabels, examples(two, "customer_service", "manufacturing")),
        "three predictors, one for the base": (ThreeSteps, examples(three, "real_estate", "financial")),
    }
    return [Problem(name, program, *parts) for name, (program, parts) in made.items()]


def _optimizer(lm: LoRALM, calls: int, seed: int, threads: int, **kwargs: Any) -> LoRAGEPA:
    given = {"max_metric_calls": calls, "seed": seed, "num_threads": threads, "reflection_minibatch_size": 8} | kwargs
    return LoRAGEPA(metric, lm=lm, **given)


def methods(problem: Problem, lm: LoRALM, calls: int, seed: int, threads: int) -> dict[str, tuple[dspy.Module, int]]:
    """Every method's program and its metric calls."""
    sets = {"trainset": problem.train, "valset": problem.dev}

    def compiled(student: dspy.Module, budget: int = calls, **kwargs: Any) -> tuple[dspy.Module, int]:
        program = _optimizer(lm, budget, seed, threads, **kwargs).compile(student, **sets)
        return program, program.detailed_results.metric_calls

    asis = problem.program()
    adapters, spent = compiled(asis, optimize_prompts=False)
    race, race_calls = compiled(asis, round(0.4 * calls) + 2 * len(problem.dev), optimize_prompts=False)
    then, then_calls = compiled(race, calls - race_calls, select_adapters=False)
    made = {
        "as it is": (asis, 0),
        "adapters only": (adapters, spent),
        "GEPA only (base)": compiled(asis, select_adapters=False),
        "adapters, then GEPA": (then, race_calls + then_calls),
        "LoRAGEPA": compiled(asis),
    }
    if (best := exhaustive(problem, lm, threads)) is not None:
        program, tried = best
        after, after_calls = compiled(program, calls - race_calls, select_adapters=False)
        made["every assignment, then GEPA"] = (after, tried + after_calls)
    return made


def exhaustive(problem: Problem, lm: LoRALM, threads: int) -> tuple[dspy.Module, int] | None:
    """The program with the assignment that is best on all training rows, every one tried, and the calls that took.

    None where there are too many.
    """
    space = Space(problem.program(), lm, "all")
    assignments = list(itertools.product(*space.arms.values()))
    if len(assignments) > _EXHAUSTIBLE:
        return None
    rollouts = Rollouts(space, metric, RunLog(None, {}), threads, 0.0)
    candidates = [with_arms(space.start, dict(zip(space.start, arms, strict=True))) for arms in assignments]
    means = [
        statistics.fmean(r.score for r in rollouts.run([(each, row) for row in problem.train])) for each in candidates
    ]
    return space.build(candidates[means.index(max(means))]), rollouts.calls


def score(program: dspy.Module, rows: list[dspy.Example], lm: LoRALM, threads: int) -> float:
    """Mean score on rows."""
    with dspy.context(lm=lm):
        evaluate = dspy.Evaluate(devset=rows, metric=metric, num_threads=threads, failure_score=0.0, max_errors=10**6)
        return float(evaluate(program).score) / 100


def run(root: Path, calls: int, seeds: int, threads: int) -> None:
    """Prints the table, program by program."""
    lm = LoRALM(max_tokens=64)
    for index, name in enumerate(problem.name for problem in problems(root, 0)):
        figures: dict[str, list[float]] = {}
        spent: dict[str, list[int]] = {}
        for seed in range(seeds):
            problem = problems(root, seed)[index]
            for method, (program, cost) in methods(problem, lm, calls, seed, threads).items():
                figures.setdefault(method, []).append(score(program, problem.test, lm, threads))
                spent.setdefault(method, []).append(cost)
        for method, values in figures.items():
            low, high = interval(values) if len(values) > 1 else (values[0], values[0])
            print(
                f"{name:38} {method:28} {statistics.fmean(values):.3f} [{low:.3f}, {high:.3f}] "
                f"{statistics.fmean(spent[method]):7.0f} calls",
                flush=True,
            )
