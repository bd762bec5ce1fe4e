"""What the joint search of adapters and instructions brings, next to either half alone: ``dspy-lora bench --joint``.

Rows come from the sets that ``lora_config.yaml`` names: training rows to race and reflect on, dev rows to choose the
program, test rows for the figures. Every method gets the same budget of metric calls, but for the one that tries every
assignment; equal calls of different methods are answered from DSPy's cache, which changes their time and not their
count.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random, SystemRandom
from typing import Any, TypeAlias

import dspy

from dspy_lora import LoRALM
from dspy_lora.bench.assignments import Answers, Races, ask_all, seconds_of_race
from dspy_lora.config import load_config
from dspy_lora.errors import ConfigError
from dspy_lora.optimizers import LoRAGEPA
from dspy_lora.optimizers.candidates import Space, with_arms
from dspy_lora.training.data import read_rows

Step: TypeAlias = tuple[str | type[dspy.Signature], Mapping[str, str]]

_TRAIN, _DEV, _TEST = 80, 60, 200
_RACE = 0.4  # LoRAGEPA's adapter_budget
_SHARE = 0.25  # of the exhaustive search's metric calls, that a race may spend
_TIMED = 4  # races whose time is taken
_RACES = 20  # of each seed's rows in other orders; they cost no call
_LABEL = "text -> label"

# A set that no bundled adapter was trained on: what is to be learned about it has to stand in the instruction.
_UNTRAINED = "legal/overruling"
_UNTRAINED_TASK = "Say Yes if the sentence overrules an earlier case, else No."


class Steps(dspy.Module):
    """Predictors side by side; none hears another.

    Args:
        steps: For each predictor its signature, and which field of a row each of its inputs is.
    """

    def __init__(self, steps: Mapping[str, Step]) -> None:
        super().__init__()
        self.reads = {name: reads for name, (_, reads) in steps.items()}
        for name, (signature, _) in steps.items():
            setattr(self, name, dspy.Predict(signature))

    def forward(self, **row: str) -> dspy.Prediction:
        """Each predictor's one answer, by name."""
        answers = {}
        for name, reads in self.reads.items():
            found = getattr(self, name)(**{field: row[source] for field, source in reads.items()})
            answers[name] = str(next(iter(found.values())))
        return dspy.Prediction(answers=answers)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A program and its rows.

    Attributes:
        name: What the table calls it.
        steps: The program's predictors.
        train: To race and reflect on.
        dev: To choose the program on.
        test: For the figures.
    """

    name: str
    steps: Mapping[str, Step]
    train: list[dspy.Example]
    dev: list[dspy.Example]
    test: list[dspy.Example]

    def program(self) -> dspy.Module:
        """The program as it is."""
        return Steps(self.steps)

    def parts(self) -> dict[str, dspy.Module]:
        """Each predictor as a program of its own."""
        return {name: Steps({name: step}) for name, step in self.steps.items()}


def metric(gold: Any, pred: Any, trace: Any = None, pred_name: str | None = None, pred_trace: Any = None) -> Any:
    """Share of right answers; the feedback names the predictor's own right answer."""
    right = {name: given.strip() == gold.wanted[name] for name, given in pred.answers.items()}
    place = pred_name or next(iter(right))
    feedback = "Right." if right[place] else f"Wrong. The right answer is {gold.wanted[place]}."
    return dspy.Prediction(score=sum(right.values()) / len(right), feedback=feedback)


NAMES = (
    "one predictor, rows of three domains",
    "two predictors",
    "three predictors, one without an adapter",
)


def problem(root: Path, index: int, seed: int, train: int = _TRAIN) -> Problem:
    """One of the three programs, on rows that a seed draws.

    Args:
        root: Holds each domain's folder of train.jsonl, dev.jsonl and test.jsonl.
        index: Which of ``NAMES``.
        seed: Decides which rows.
        train: How many training rows.
    """

    def draw(source: str, split: str, count: int) -> list[dict[str, Any]]:
        folder = source if "/" in source else str(load_config().domain(source).data)
        rows = read_rows(root / folder / f"{split}.jsonl", ["text", "label"])
        return Random(f"{seed} {source} {split}").sample(rows, min(count, len(rows)))

    sources, make, steps = _PROGRAMS[index]
    sizes = {"train": train, "dev": _DEV, "test": _TEST}
    parts = [[draw(source, split, size) for source in sources] for split, size in sizes.items()]
    return Problem(NAMES[index], steps, *([make(*rows) for rows in zip(*part, strict=False)] for part in parts))


def _mixed(*rows: dict[str, Any]) -> dspy.Example:
    """One of the rows, of the first set as often as of both others."""
    row = Random(str(rows)).choices(rows, (2, 1, 1))[0]
    return dspy.Example(one=row["text"], wanted={"label": row["label"]}).with_inputs("one")


def _each(*rows: dict[str, Any]) -> dspy.Example:
    """A row for each predictor."""
    inputs = {name: row["text"] for name, row in zip(("one", "two", "three"), rows, strict=False)}
    wanted = {name: row["label"] for name, row in zip(_STEPS, rows, strict=False)}
    return dspy.Example(**inputs, wanted=wanted).with_inputs(*inputs)


_STEPS: dict[str, Step] = {
    "first": (_LABEL, {"text": "one"}),
    "second": (_LABEL, {"text": "two"}),
    "third": (dspy.Signature(_LABEL, _UNTRAINED_TASK), {"text": "three"}),
}
# For each of NAMES: the sets, what makes a row of the program's from one of each, the predictors.
_PROGRAMS: tuple[tuple[tuple[str, ...], Callable[..., dspy.Example], dict[str, Step]], ...] = (
    (("customer_service", "legal", "healthcare"), _mixed, {"label": _STEPS["first"]}),
    (("customer_service", "manufacturing"), _each, {name: _STEPS[name] for name in ("first", "second")}),
    (("real_estate", "financial", _UNTRAINED), _each, _STEPS),
)


def _optimizer(lm: LoRALM, calls: int, seed: int, threads: int, **kwargs: Any) -> LoRAGEPA:
    usual = {"adapter_budget": _RACE, "seed": seed, "num_threads": threads, "reflection_minibatch_size": 8}
    return LoRAGEPA(metric, lm=lm, max_metric_calls=calls, **usual | kwargs)


def methods(
    problem: Problem, lm: LoRALM, calls: int, seed: int, threads: int, answers: Answers
) -> dict[str, tuple[dspy.Module, int]]:
    """Every method's program and its metric calls.

    GEPA after something else scores what it starts from on the dev rows, as LoRAGEPA does once: what the race scored
    there already is not counted again. Training rows that the race asked and reflection sees are, where LoRAGEPA has
    their answers.
    """
    sets = {"trainset": problem.train, "valset": problem.dev}

    def compiled(student: dspy.Module, budget: int = calls, **kwargs: Any) -> tuple[dspy.Module, int]:
        program = _optimizer(lm, budget, seed, threads, **kwargs).compile(student, **sets)
        return program, program.detailed_results.metric_calls

    asis = problem.program()
    adapters, spent = compiled(asis, optimize_prompts=False)
    race, race_calls = compiled(asis, _race_calls(calls) + 2 * len(problem.dev), optimize_prompts=False)
    left = calls - race_calls + len(problem.dev)
    then, then_calls = compiled(race, left, select_adapters=False)
    space = Space(asis, lm, "all")
    best = space.build(with_arms(space.start, answers.best()))
    after, after_calls = compiled(best, left, select_adapters=False)
    return {
        "as it is": (asis, 0),
        "adapters only": (adapters, spent),
        "GEPA only (base)": compiled(asis, select_adapters=False),
        "adapters, then GEPA": (then, race_calls + then_calls - len(problem.dev)),
        "LoRAGEPA": compiled(asis),
        "every assignment, then GEPA": (after, answers.calls + after_calls),
    }


def _race_calls(calls: int) -> int:
    """What LoRAGEPA gives its first phase."""
    return round(_RACE * calls)


def score(program: dspy.Module, rows: list[dspy.Example], lm: LoRALM, threads: int) -> float:
    """Mean score on rows."""
    with dspy.context(lm=lm):
        evaluate = dspy.Evaluate(devset=rows, metric=metric, num_threads=threads, failure_score=0.0, max_errors=10**6)
        return float(evaluate(program).score) / 100


def phase_one(root: Path, index: int, lm: LoRALM, calls: int, threads: int) -> list[float]:
    """How many times as long as the race it takes to ask every adapter for every row, one adapter after another.

    Each side of each repeat has rows of its own and a cache of its own; they take turns in going first. Within a side
    DSPy's cache answers what was asked before, as it does for a user.
    """

    def fresh() -> LoRALM:
        return lm.copy(seed=SystemRandom().getrandbits(31))  # answers are greedy: the seed is a key of the cache

    def race(rows: list[dspy.Example]) -> float:
        budget = min(_race_calls(calls), int(_SHARE * first.calls * len(rows)))
        return seconds_of_race(drawn.program(), rows, fresh(), metric, threads, budget)

    def alone(rows: list[dspy.Example]) -> float:
        return ask_all(drawn.parts(), rows, fresh(), metric, threads).seconds

    drawn = problem(root, index, 1000, 2 * _TIMED * _TRAIN)
    first = ask_all(drawn.parts(), drawn.dev[:1], fresh(), metric, threads)
    ratios = []
    for repeat in range(_TIMED):
        one, two = (drawn.train[2 * repeat + side :: 2 * _TIMED] for side in range(2))
        seconds = (race(one), alone(two)) if repeat % 2 else (alone(two), race(one))[::-1]
        ratios.append(seconds[1] / seconds[0])
    return ratios


def run(
    root: Path,
    calls: int,
    seeds: int,
    threads: int,
    places: Sequence[int] | None = None,
    engine: dict[str, Any] | None = None,
) -> None:
    """Prints, program by program: how the race does against the exhaustive search, phase 1's time, the methods.

    Args:
        root: Holds the domains' folders.
        calls: Budget of metric calls of a method.
        seeds: How many, from 0.
        threads: Rows at once.
        places: Which of the programs, from 0; None takes all.
        engine: Engine settings, as LoRALM's.

    Raises:
        ConfigError: Too few metric calls for the methods, or no seed.
        DataError: Rows that are missing or malformed.
    """
    least = math.ceil(3 * _DEV / (1 - _RACE))
    if calls < least:
        raise ConfigError(f"--metric-calls {calls}: GEPA after a race wants {least} and more.")
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}: give 1 or more.")
    chosen = range(len(NAMES)) if places is None else places
    for index in chosen:  # rows that are missing show before the engine starts
        problem(root, index, 0)
    lm = LoRALM(max_tokens=64, engine=engine)
    for index in chosen:
        name = NAMES[index]
        figures: dict[str, list[float]] = {}
        spent: dict[str, list[int]] = {}
        races: dict[str, list[Races]] = {}
        ratios = phase_one(root, index, lm, calls, threads)
        spread = f"{statistics.fmean(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        print(f"{name:41} phase 1 takes 1 / {spread} of the adapters one after another", flush=True)
        for seed in range(seeds):
            drawn = problem(root, index, seed)
            answers = ask_all(drawn.parts(), drawn.train, lm, metric, threads)
            whole = int(_SHARE * answers.calls)
            for budget, found in ((f"{_SHARE:.0%}", whole), ("LoRAGEPA's", min(_race_calls(calls), whole))):
                races.setdefault(budget, []).append(answers.races(found, _RACES))
            for method, (program, cost) in methods(drawn, lm, calls, seed, threads, answers).items():
                figures.setdefault(method, []).append(score(program, drawn.test, lm, threads))
                spent.setdefault(method, []).append(cost)
                print(f"{name:41} seed {seed}: {method:28} {figures[method][-1]:.3f} {cost:7} calls", flush=True)
        print(f"{name:41} {len(drawn.test)} test rows a seed; means and differences with 95 % intervals over seeds")
        for line in (*_race_lines(races), *_method_lines(figures, spent)):
            print(f"{name:41} {line}", flush=True)


def _race_lines(races: Mapping[str, Sequence[Races]]) -> Iterator[str]:
    for budget, each in races.items():
        found, lost, calls = (statistics.fmean(getattr(r, field) for r in each) for field in ("found", "lost", "calls"))
        yield (
            f"race, {budget} budget: the exhaustive search's best in {found:.0%} of {sum(r.runs for r in each)} races "
            f"with {calls:.1%} of its metric calls; {lost:.4f} of score lost"
        )


def _method_lines(figures: Mapping[str, list[float]], spent: Mapping[str, list[int]]) -> Iterator[str]:
    """Each method's mean score, its difference to LoRAGEPA's, seed by seed, and its metric calls."""
    for method, values in figures.items():
        less = [value - ours for value, ours in zip(values, figures["LoRAGEPA"], strict=True)]
        calls = statistics.fmean(spent[method])
        yield f"{method:28} {_with_interval(values, '.3f')}  {_with_interval(less, '+.3f')} {calls:7.0f} calls"


def _with_interval(values: Sequence[float], form: str) -> str:
    """A mean and its 95 % interval by Student's t distribution; a single value has none."""
    from scipy.stats import t

    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return f"{mean:{form}}"
    half = t.ppf(0.975, count - 1) * statistics.stdev(values) / math.sqrt(count)
    return f"{mean:{form}} [{mean - half:{form}}, {mean + half:{form}}]"
