"""``dspy-lora bench --joint``: the exhaustive search from each predictor's own answers, and the races on them."""

import statistics
from random import Random

import dspy
import numpy as np
import pytest
from dspy_lora.optimizers.candidates import Space, arm_of, with_arms
from dspy_lora.optimizers.rollouts import Rollouts
from dspy_lora.optimizers.run_log import RunLog

from dspy_lora import LoRALM
from dspy_lora.bench import joint
from dspy_lora.bench.assignments import Answers, ask_all, seconds_of_race

SKILL = {"none": 0.2, "legal": 0.9, "financial": 0.5}


class Skilled:
    """Answers for an adapter: right as often as its skill, and one row in twenty raises."""

    def __init__(self, arm):
        self.arm = arm.split("@")[0]

    def __call__(self, **inputs):
        draw = Random(f"{self.arm} {inputs}").random()
        if draw > 0.95:
            raise RuntimeError("no answer")
        return dspy.Prediction(label=inputs["text"].split()[-1] if draw < SKILL[self.arm] else "wrong")


@pytest.fixture
def lm(monkeypatch):
    """A LoRALM of three choices whose predictors answer by skill."""

    def build(space, candidate, original=Space.build):
        program = original(space, candidate)
        for name, predictor in program.named_predictors():
            predictor.forward = Skilled(arm_of(candidate[name]))
        return program

    def arms(space, name, predictor, adapters, original=Space._arms):
        return [arm for arm in original(space, name, predictor, adapters) if arm.split("@")[0] in SKILL]

    monkeypatch.setattr(Space, "build", build)
    monkeypatch.setattr(Space, "_arms", arms)
    return LoRALM()


def problem(count=40):
    rows = [
        dspy.Example(one=f"{i} a", two=f"{i} b", wanted={"first": "a", "second": "b"}).with_inputs("one", "two")
        for i in range(count)
    ]
    steps = {"first": ("text -> label", {"text": "one"}), "second": ("text -> label", {"text": "two"})}
    return joint.Problem("two", steps, rows, rows[:10], rows[:10])


def test_the_exhaustive_search_is_what_asking_for_every_assignment_gives(lm):
    two = problem()
    answers = ask_all(two.parts(), two.train, lm, joint.metric, 4)
    space = Space(two.program(), lm, "all")
    rollouts = Rollouts(space, joint.metric, RunLog(None, {}), 4, 0.0)
    assert any(np.isnan(part).any() for part in answers.right)
    assert answers.table.shape == (3, 3, 40)
    assert answers.calls == 360
    for i, first in enumerate(space.arms["first"]):
        for j, second in enumerate(space.arms["second"]):
            candidate = with_arms(space.start, {"first": first, "second": second})
            asked = [rollout.score for rollout in rollouts.run([(candidate, row) for row in two.train])]
            assert answers.table[i, j].tolist() == asked
    assert {arm.split("@")[0] for arm in answers.best().values()} == {"legal"}


def test_races_on_the_answers_are_counted(lm):
    two = problem()
    answers = ask_all(two.parts(), two.train, lm, joint.metric, 4)
    many = answers.races(budget=200, runs=10)
    assert many.found >= 0.9
    assert many.lost <= 0.02
    assert 0 < many.calls <= 200 / 360
    none = answers.races(budget=1, runs=3)
    assert (none.found, none.calls) == (0.0, 0.0)
    assert none.lost > 0.5


def test_an_assignment_as_good_as_the_best_counts_as_found():
    answers = Answers({"p": ["none", "a", "b"]}, ("none",), [np.array([[0.0] * 8, [1.0] * 8, [1.0] * 8])], 0.0)
    assert answers.races(budget=24, runs=5).found == 1.0
    assert answers.best() == {"p": "a"}


def test_a_race_on_the_engine_takes_its_time(lm):
    two = problem()
    assert seconds_of_race(two.program(), two.train, lm, joint.metric, 4, 90) > 0


def test_the_table_names_every_method_and_both_times(lm, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(joint, "problems", lambda root, seed: [problem(20)])
    monkeypatch.setattr(joint, "LoRALM", lambda **kwargs: lm)
    monkeypatch.setattr(joint, "score", lambda program, rows, lm, threads: 0.5)
    joint.run(tmp_path, calls=60, seeds=1, threads=4)
    out = capsys.readouterr().out
    assert "one after another" in out
    assert "the exhaustive search's best in" in out
    for method in ("as it is", "adapters only", "GEPA only (base)", "LoRAGEPA", "every assignment, then GEPA"):
        assert f"two{' ' * 39}{method}" in out


def test_gepa_after_the_adapters_keeps_them(lm):
    two = problem()
    answers = ask_all(two.parts(), two.train, lm, joint.metric, 4)
    found = joint.methods(two, lm, 120, 0, 4, answers)
    best, _ = found["every assignment, then GEPA"]
    assert [predictor.lm.ref for predictor in best.predictors()] == list(answers.best().values())
    assert best.detailed_results.race_calls == 0
    then, _ = found["adapters, then GEPA"]
    assert then.detailed_results.race_calls == 0
    assert len({tuple(each.adapters.values()) for each in then.detailed_results.found}) == 1


def test_feedback_is_the_predictor_s_own():
    gold = dspy.Example(wanted={"first": "a", "second": "b"})
    pred = dspy.Prediction(answers={"first": "a", "second": "c"})
    assert joint.metric(gold, pred).score == statistics.fmean([1, 0])
    assert joint.metric(gold, pred, None, "second", None).feedback == "Wrong. The right answer is b."
    assert joint.metric(gold, pred, None, "first", None).feedback == "Right."
