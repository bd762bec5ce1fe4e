"""Rows answered by candidates: what is scored, what is asked for feedback, and whose answer a trace shows."""

import logging
import math
import os
import subprocess
import sys

import dspy
import numpy as np
import pytest
from dspy.utils import DummyLM
from dspy.utils.exceptions import AdapterParseError, LMInvalidRequestError
from dspy_lora.optimizers.rollouts import Rollouts, scored
from dspy_lora.optimizers.run_log import RunLog, digest
from dspy_lora.optimizers.traces import by_predictor, unparsed_by


class Two(dspy.Module):
    """Two predictors of equal signatures."""

    def __init__(self):
        super().__init__()
        self.first, self.second = dspy.Predict("text -> label"), dspy.Predict("text -> label")

    def forward(self, text):
        return dspy.Prediction(label=self.second(text=self.first(text=text).label).label)


class Space:
    def __init__(self, program):
        self.program = program

    def build(self, candidate):
        return self.program.deepcopy()


class Metric:
    """Counts what it is asked."""

    def __init__(self, score=1.0):
        self.score, self.asked = score, []

    def __call__(self, gold, pred, trace=None, pred_name=None, pred_trace=None):
        self.asked.append((trace is not None, pred_name))
        return dspy.Prediction(score=self.score, feedback=f"Feedback for {pred_name}.")


def rollouts_of(program, metric, log=None):
    return Rollouts(Space(program), metric, RunLog(None, {}) if log is None else log, 1, 0.0)


PAIRS = [({"first": "a", "second": "b"}, dspy.Example(text=str(at)).with_inputs("text")) for at in range(3)]


@pytest.fixture
def program():
    program = Two()
    program.set_lm(DummyLM([{"label": str(at)} for at in range(40)]))
    return program


def test_scores_are_asked_without_a_trace_and_feedback_for_the_predictors_named(program):
    metric = Metric()
    rollouts = rollouts_of(program, metric)
    rollouts.run(PAIRS)
    assert metric.asked == [(False, None)] * 3
    (first, second, third) = rollouts.records(PAIRS, ["second"])
    assert metric.asked[3:] == [(True, "second")] * 3
    assert list(first) == ["second"]
    assert first["second"][0]["Feedback"] == "Feedback for second."
    assert (first["second"][0]["Inputs"], second["second"][0]["Inputs"]) == ({"text": "0"}, {"text": "2"})
    assert rollouts.calls == len(third) * 3
    assert rollouts.records(PAIRS, ["second"]) == [first, second, third]
    assert len(metric.asked) == 6


def test_feedback_of_a_run_that_goes_on_asks_the_row_again_once(program):
    log, metric = RunLog(None, {}), Metric()
    before = rollouts_of(program, metric, log).run(PAIRS)
    resumed = rollouts_of(program, metric, log)
    assert resumed.run(PAIRS) == before
    assert [list(each) for each in resumed.records(PAIRS, ["first"])] == [["first"]] * 3
    assert resumed.calls == 3
    assert len(log) == 6


def test_what_an_lm_refuses_shows_nothing_and_ends_nothing(program):
    class Refusing(Two):
        def forward(self, text):
            if text in refused:
                raise LMInvalidRequestError("filtered")
            return super().forward(text)

    refused = {"1"}
    picky = Refusing()
    picky.set_lm(program.first.lm)
    rollouts = rollouts_of(picky, Metric())
    assert [each.score for each in rollouts.run(PAIRS)] == [1.0, 0.0, 1.0]
    for _ in range(2):
        assert [bool(each["first"]) for each in rollouts.records(PAIRS, ["first"])] == [True, False, True]
    refused |= {"0", "2"}
    with pytest.raises(LMInvalidRequestError):
        rollouts_of(picky, Metric()).run(PAIRS)


def test_a_judge_that_refuses_leaves_its_rows_out(program):
    def metric(gold, pred, trace=None, pred_name=None, pred_trace=None):
        if pred_name and gold.text == "1":
            raise LMInvalidRequestError("filtered")
        return 1.0

    rollouts = rollouts_of(program, metric)
    rollouts.run(PAIRS)
    assert [len(each["first"]) for each in rollouts.records(PAIRS, ["first"])] == [1, 0, 1]


def test_feedback_is_asked_once_for_a_predictor_whoever_wants_it(program):
    metric = Metric()
    rollouts = rollouts_of(program, metric)
    rollouts.run(PAIRS)
    everything = rollouts.records(PAIRS, ["first", "second"])
    assert [each["second"] for each in rollouts.records(PAIRS, ["second"])] == [each["second"] for each in everything]
    assert len(metric.asked) == 3 + 6


def test_a_metric_that_raises_for_feedback_leaves_the_score(program, caplog):
    def metric(gold, pred, trace=None, pred_name=None, pred_trace=None):
        if pred_name:
            raise KeyError("side")
        return 1.0

    rollouts = rollouts_of(program, metric)
    assert [each.score for each in rollouts.run(PAIRS)] == [1.0] * 3
    assert rollouts.records(PAIRS, ["first"])[0]["first"][0]["Feedback"] == "This trajectory got a score of 0.0."
    assert "the metric raised KeyError" in caplog.text


def test_rows_that_fail_are_told(caplog):
    class Broken(dspy.Module):
        def forward(self, text):
            raise KeyError(text)

    rollouts = rollouts_of(Broken(), Metric())
    with caplog.at_level(logging.WARNING):
        assert [each.score for each in rollouts.run(PAIRS)] == [0.0] * 3
    assert "3 of 3 rows failed; the first: KeyError: '0'" in caplog.text
    assert rollouts.records(PAIRS, ["first"]) == [{"first": []}] * 3


def test_a_score_that_is_no_number_is_a_failure(program):
    rollout = rollouts_of(program, lambda *_: math.nan).run(PAIRS[:1])[0]
    assert (rollout.score, rollout.error) == (0.0, "the metric raised ValueError: the metric's score is nan")


def test_numbers_of_numpy_are_kept_as_json(program, tmp_path):
    def metric(*_):
        return dspy.Prediction(score=np.float32(0.5), feedback=None, objective_scores={"f1": np.float32(0.25)})

    rollouts = rollouts_of(program, metric, RunLog(tmp_path, {}))
    assert rollouts.run(PAIRS[:1])[0].objectives == {"f1": 0.25}
    assert scored({"score": np.int64(1), "feedback": 3}) == (1.0, {}, "3")


# -- rows that differ --------------------------------------------------------------------------------------------------


class Opaque:
    def __init__(self, value):
        self.value = value


def test_rows_are_told_apart_where_their_repr_leaves_something_out():
    first, second = np.arange(5_000), np.arange(5_000)
    second[2_500] = -1
    assert repr(first) == repr(second)
    assert digest({"table": first}) != digest({"table": second})
    assert digest({"table": first}) == digest({"table": first.copy()})
    assert digest(Opaque(1)) == digest(Opaque(1))
    assert digest(Opaque(1)) != digest(Opaque(2))


_DIGESTS = """
import dataclasses, enum, pydantic
from dspy_lora.optimizers.run_log import digest

@dataclasses.dataclass
class Ticket:
    text: str
    tags: set

class Mail(pydantic.BaseModel):
    text: str
    sender: str
    tags: set[str]

tags = {"a", "b", "c", "d"}
print(digest(Ticket("Hello... please", tags)), digest(Mail(text="Hello... please", sender="me", tags=tags)))
"""


def test_rows_with_an_ellipsis_are_the_same_in_every_process():
    seen = {
        subprocess.run(
            [sys.executable, "-P", "-c", _DIGESTS],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1


def test_a_line_that_was_written_in_part_loses_no_other(tmp_path, caplog):
    log = RunLog(tmp_path, {})
    log.put("one", 1)
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"key": "two", "ans')
    log._torn = True  # as after an OSError
    log.put("three", 3)
    log.put("four", 4)
    again = RunLog(tmp_path, {})
    assert [again.get(key) for key in ("one", "two", "three", "four")] == [1, None, 3, 4]
    assert "written in part" in caplog.text


# -- traces ------------------------------------------------------------------------------------------------------------


def test_the_calls_of_a_copy_belong_to_the_only_predictor_with_its_signature():
    best = dspy.BestOfN(dspy.ChainOfThought("text -> label"), N=2, reward_fn=lambda *_: 1.0, threshold=1.0)
    copy = best.deepcopy()
    call = (copy.predictors()[0], {"text": "a"}, {"label": "b"})
    assert by_predictor(best, [call]) == {"module.predict": [call]}
    two = Two()
    assert by_predictor(two, [(two.deepcopy().first, {}, {})]) == {}
    assert list(by_predictor(two, [(two.second, {}, {}), (two.first, {}, {})])) == ["second", "first"]


def test_an_answer_that_did_not_parse_is_the_first_predictors_that_has_not_answered():
    two = Two()
    failed = AdapterParseError("ChatAdapter", two.first.signature, "?")
    assert unparsed_by(two, [], failed) == "first"
    assert unparsed_by(two, [(two.first, {}, {})], failed) == "second"
    assert unparsed_by(two, [(two.first, {}, {}), (two.second, {}, {})], failed) == "first"
