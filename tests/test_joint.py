"""``dspy-lora bench --joint``: the exhaustive search from each predictor's own answers, and the races on them."""

import functools
import json
import statistics
from random import Random
from types import SimpleNamespace

import dspy
import numpy as np
import pytest
from dspy_lora.optimizers.candidates import Space, arm_of, with_arms
from dspy_lora.optimizers.rollouts import Rollouts
from dspy_lora.optimizers.run_log import RunLog

from dspy_lora import LoRALM
from dspy_lora.bench import joint
from dspy_lora.bench.assignments import Answers, ask_all, seconds_of_race
from dspy_lora.config import load_config
from dspy_lora.errors import ConfigError, DataError

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
    monkeypatch.setattr(joint, "problem", lambda root, index, seed, train=20: problem(train))
    monkeypatch.setattr(joint, "_DEV", 10)
    monkeypatch.setattr(joint, "LoRALM", lambda **kwargs: lm)
    monkeypatch.setattr(joint, "score", lambda program, rows, lm, threads: 0.5)
    joint.run(tmp_path, calls=60, seeds=1, threads=4, places=[1])
    out = capsys.readouterr().out
    assert "one after another" in out
    assert "the exhaustive search's best in" in out
    for method in ("as it is", "adapters only", "GEPA only (base)", "LoRAGEPA", "every assignment, then GEPA"):
        assert f"two predictors{' ' * 28}{method}" in out


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


def test_one_after_the_other_is_charged_the_race_s_validation_once(lm, monkeypatch):
    def nothing(*, candidate, components_to_update, **_):
        return {name: candidate[name] for name in components_to_update}

    monkeypatch.setattr(joint, "_optimizer", functools.partial(joint._optimizer, instruction_proposer=nothing))
    two = problem()
    found = joint.methods(two, lm, 120, 0, 4, ask_all(two.parts(), two.train, lm, joint.metric, 4))
    then, charged = found["adapters, then GEPA"]
    assert then.detailed_results.race_calls == 0
    reflected = then.detailed_results.metric_calls - len(two.dev)  # rows that LoRAGEPA's race may have asked already
    assert 0 <= charged - found["LoRAGEPA"][1] <= reflected


def rows_of(folder, count):
    folder.mkdir(parents=True)
    for split in ("train", "dev", "test"):
        lines = [json.dumps({"text": f"{folder.name} {split} {i}", "label": f"{i % 3}"}) for i in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("index", range(3))
def test_no_side_of_phase_one_asks_what_another_did(lm, monkeypatch, tmp_path, index):
    for source in joint._PROGRAMS[index][0]:
        rows_of(tmp_path / (source if "/" in source else load_config().domain(source).data), 700)
    asked, lms = [], []

    def race(program, rows, lm, *rest):
        asked.append([row["one"] for row in rows])
        lms.append(lm.kwargs["seed"])
        return 1.0

    def alone(parts, rows, lm, *rest):
        if len(rows) > 1:
            race(None, rows, lm)
        return SimpleNamespace(seconds=3.0, calls=100)

    monkeypatch.setattr(joint, "seconds_of_race", race)
    monkeypatch.setattr(joint, "ask_all", alone)
    assert joint.phase_one(tmp_path, index, lm, 800, 4) == [3.0] * joint._TIMED
    texts = [text for rows in asked for text in rows]
    assert len(texts) == len(set(texts)) == 8 * 80
    assert len(set(lms)) == 8


def test_intervals_are_student_s_and_differences_go_seed_by_seed():
    ours = [0.80, 0.82, 0.84, 0.86, 0.88]
    figures = {"LoRAGEPA": ours, "half": [value - 0.1 for value in ours]}
    first, second = joint._method_lines(figures, {"LoRAGEPA": [500] * 5, "half": [400] * 5})
    half = 2.776 * statistics.stdev(ours) / 5**0.5
    assert f"0.840 [{0.84 - half:.3f}, {0.84 + half:.3f}]" in first
    assert "0.740 [" in second and "-0.100 [-0.100, -0.100]" in second and "400 calls" in second
    assert "[" not in next(joint._method_lines({"LoRAGEPA": [0.5]}, {"LoRAGEPA": [9]}))


def test_too_few_calls_or_seeds_are_refused_before_anything_is_asked(tmp_path):
    with pytest.raises(ConfigError, match="--metric-calls 299: GEPA after a race wants 300"):
        joint.run(tmp_path, calls=299, seeds=1, threads=4)
    with pytest.raises(ConfigError, match="--seeds 0"):
        joint.run(tmp_path, calls=800, seeds=0, threads=4)
    with pytest.raises(DataError, match=r"train\.jsonl"):
        joint.run(tmp_path, calls=800, seeds=1, threads=4)


def test_feedback_is_the_predictor_s_own():
    gold = dspy.Example(wanted={"first": "a", "second": "b"})
    pred = dspy.Prediction(answers={"first": "a", "second": "c"})
    assert joint.metric(gold, pred).score == statistics.fmean([1, 0])
    assert joint.metric(gold, pred, None, "second", None).feedback == "Wrong. The right answer is b."
    assert joint.metric(gold, pred, None, "first", None).feedback == "Right."
