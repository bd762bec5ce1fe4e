"""LoRAGEPA on a fake engine whose adapters know one topic each and whose base model follows rules that it is told."""

import functools
import json
import re
import threading
import time
from random import Random
from typing import Literal
from zlib import crc32

import dspy
import pytest
from dspy.clients.engines.dummy_engine import AsyncDummyEngine, DummyEngine
from dspy.utils import DummyLM
from dspy.utils.exceptions import LMInvalidRequestError, LMServerError
from dspy_lora.optimizers import LoRAGEPA, candidates, lora_gepa, run
from dspy_lora.optimizers.asking import IRTEvaluationPolicy
from dspy_lora.optimizers.candidates import Space, decode
from dspy_lora.optimizers.reflection import Reflection
from dspy_lora.optimizers.rollouts import Rollouts
from dspy_lora.optimizers.run_log import RunLog
from gepa.proposer.merge import sample_and_attempt_merge_programs_by_common_predictors
from hypothesis import given
from hypothesis import strategies as st

from dspy_lora import LoRALM
from dspy_lora.errors import ConfigError, MissingDependencyError

LABELS = {"apple": "fruit", "carrot": "vegetable", "hammer": "tool", "violin": "instrument"}
KNOWS = {"legal": ("apple", "carrot", "hammer", "violin"), "financial": ("apple", "hammer")}
REAL_LM_FOR = Space._lm_for
RULE = re.compile(r"If it mentions ([\w ,]+), answer (\w+)\.")


class Engine(DummyEngine):
    """Answers by what the adapter knows, else by the rules in the prompt, else wrong."""

    def __init__(self, owner, asked, knows, world):
        super().__init__(owner)
        self.asked, self.knows, self.world = asked, knows, world

    def _complete_messages(self, messages):
        self.asked.append(messages)
        text, told = messages[-1]["content"], messages[0]["content"]
        label = next((self.world[word] for word in self.knows if word in text), None)
        for words, answer in RULE.findall(told):
            if any(word in text for word in re.split(r", | or ", words)):
                label = label or answer
        self.owner.answers = {"": dict.fromkeys(re.findall(r"\[\[ ## (\w+) ## \]\]", told), label or "unknown")}
        return super()._complete_messages(messages)


class World:
    """Which adapter knows what; ``asked`` holds every prompt that reached an LM."""

    def __init__(self, monkeypatch, knows=KNOWS, labels=LABELS):
        self.asked, self.knows, self.labels = [], knows, labels
        monkeypatch.setattr(Space, "_lm_for", lambda space, name, arm: self.lm(arm))

    def lm(self, arm):
        lm = DummyLM([])
        lm._engine_spec = Engine(lm, self.asked, self.knows.get(arm.split("@")[0], ()), self.labels)
        lm._async_engine_spec = AsyncDummyEngine(lm._engine_spec)
        return lm


@pytest.fixture
def world(monkeypatch):
    return World(monkeypatch)


def rows(count, labels=LABELS, shift=0):
    words = list(labels)
    return [
        dspy.Example(
            text=f"row {i} has a {words[i % len(words)]} in it", label=labels[words[i % len(words)]]
        ).with_inputs("text")
        for i in range(shift, shift + count)
    ]


def metric(gold, pred, trace=None, pred_name=None, pred_trace=None):
    right = pred.label == gold.label
    return dspy.Prediction(score=float(right), feedback="Right." if right else f"The right answer is {gold.label}.")


def optimizer(**kwargs):
    given = {"metric": metric, "lm": LoRALM(), "max_metric_calls": 400, "seed": 0, "num_threads": 4} | kwargs
    return LoRAGEPA(given.pop("metric"), **given)


def adapters(program):
    result = program.detailed_results
    return result.found[result.best_idx].adapters


# -- what it finds -----------------------------------------------------------------------------------------------------


def test_it_finds_the_adapter_that_knows_the_task_and_leaves_the_program_alone(world):
    student = dspy.Predict("text -> label")
    before = student.dump_state()
    compiled = optimizer().compile(student, trainset=rows(40), valset=rows(40, shift=40))
    assert student.dump_state() == before
    assert student.lm is None
    assert compiled._compiled
    assert adapters(compiled)["self"].startswith("legal@")
    assert compiled(text="a violin").label == "instrument"
    result = compiled.detailed_results
    assert result.metric_calls <= 400 + 40
    assert result.found[result.best_idx].val_score == 1.0
    assert result.choice.gain < 0.01


def test_rows_of_several_domains_get_the_classifier_s_choice_call_by_call(world):
    world.knows = {"legal": ("apple", "carrot"), "financial": ("hammer", "violin"), "auto": tuple(LABELS)}
    compiled = optimizer(adapters=["legal", "financial", "auto"], optimize_prompts=False).compile(
        dspy.Predict("text -> label"), trainset=rows(40), valset=rows(40, shift=40)
    )
    assert adapters(compiled)["self"].startswith("auto@")


def test_rules_are_written_where_no_adapter_knows_the_task(world):
    world.knows = {}
    compiled = optimizer(max_metric_calls=900).compile(
        dspy.Predict("text -> label"), trainset=rows(60), valset=rows(40, shift=60)
    )
    result = compiled.detailed_results
    assert adapters(compiled) == {"self": "none"}
    assert result.found[result.best_idx].val_score >= 0.75
    assert "If it mentions" in result.found[result.best_idx].instructions["self"]


class Two(dspy.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = dspy.Predict("text -> label"), dspy.Predict("text -> label")

    def forward(self, text):
        first, second = self.first(text=text), self.second(text=text)
        return dspy.Prediction(label=f"{first.label} {second.label}")


def test_two_predictors_of_equal_signatures_get_an_adapter_each(monkeypatch):
    names = ("legal", "financial", "marketing")
    world = World(monkeypatch, {"legal": LABELS, "financial": ("apple",)})
    first_only = dict.fromkeys(LABELS, "fruit")

    def lm(space, name, arm):
        made = world.lm(arm)
        made._engine_spec.world = LABELS if name == "first" else first_only
        made._engine_spec.knows = {"first": world.knows, "second": {"financial": LABELS}}[name].get(
            arm.split("@")[0], ()
        )
        return made

    monkeypatch.setattr(Space, "_lm_for", lm)

    def score(gold, pred, trace=None, pred_name=None, pred_trace=None):
        first, second = pred.label.split(" ")
        return ((first == gold.label) + (second == "fruit")) / 2

    compiled = optimizer(metric=score, adapters=names, optimize_prompts=False).compile(
        Two(), trainset=rows(40), valset=rows(40, shift=40)
    )
    assert {name: arm.split("@")[0] for name, arm in adapters(compiled).items()} == {
        "first": "legal",
        "second": "financial",
    }


def test_without_selection_predictors_keep_their_adapters_and_nothing_is_raced(world):
    world.knows = {"none": tuple(LABELS)}  # a race would take the adapter away
    student = Two()
    student.first.lm = LoRALM(domain="financial")
    own = {"first": student.first.lm.ref, "second": "none"}
    sets = {"trainset": rows(40), "valset": rows(40, shift=40)}
    result = optimizer(select_adapters=False).compile(student, **sets).detailed_results
    assert all(found.adapters == own for found in result.found)
    assert (result.race_calls, result.race, result.moves) == (0, [], [])


def test_without_selection_gepa_gets_the_whole_budget(world, monkeypatch):
    world.knows, given = {}, []

    def watched(real=run.optimize, **kwargs):
        given.append(kwargs["max_metric_calls"])
        return real(**kwargs)

    monkeypatch.setattr(run, "optimize", watched)
    sets = {"trainset": rows(40), "valset": rows(40, shift=40)}
    optimizer(select_adapters=False).compile(dspy.Predict("text -> label"), **sets)
    optimizer().compile(dspy.Predict("text -> label"), **sets)
    assert given == [400, 160]  # of the other's, a race and moves get 160 and 40, the race's winner 40


def test_a_predictor_without_an_lm_keeps_to_the_configured_one(monkeypatch):
    world = World(monkeypatch, {"legal": tuple(LABELS)})
    student = Two()
    student.first.lm = LoRALM(domain="financial")
    other = world.lm("legal@")
    with dspy.context(lm=other):
        compiled = optimizer(lm=None, optimize_prompts=False, adapters=["legal"]).compile(
            student, trainset=rows(20), valset=rows(12)
        )
    assert adapters(compiled)["second"] == "as set"
    assert compiled.second.lm is None


def test_predictors_of_one_lm_and_one_adapter_share_an_lm():
    student = Two()
    space = Space(student, LoRALM(), ["legal"])
    arm = space.arms["first"][1]
    built = space.build(candidates.with_arms(space.start, {"first": arm, "second": arm}))
    assert built.get_lm().domain == "legal"  # which dspy.BestOfN asks for


def test_one_optimizer_compiles_twice_alike(world):
    world.knows = {}
    sets = {"trainset": rows(40), "valset": rows(24, shift=40)}
    twice = optimizer(max_metric_calls=500, select_adapters=False)
    runs = [twice.compile(dspy.Predict("text -> label"), **sets).detailed_results for _ in range(2)]
    assert [found.candidate for found in runs[0].found] == [found.candidate for found in runs[1].found]
    assert len(runs[0].found) > 1
    assert all(found.metric_calls <= runs[0].metric_calls for found in runs[0].found)


def test_validation_rows_are_judged_once_and_without_a_trace(world):
    world.knows, traced = {}, []

    def judged(gold, pred, trace=None, pred_name=None, pred_trace=None):
        traced.append((trace is not None, pred_name is not None, int(gold.text.split()[1]) >= 40))
        return metric(gold, pred)

    result = (
        optimizer(metric=judged, max_metric_calls=500, select_adapters=False)
        .compile(dspy.Predict("text -> label"), trainset=rows(40), valset=rows(24, shift=40))
        .detailed_results
    )
    assert {each[:2] for each in traced} == {(False, False), (True, True)}
    assert not any(asked and of_val for _, asked, of_val in traced)
    assert sum(not asked for _, asked, _ in traced) == result.metric_calls


def test_a_score_that_is_no_number_does_not_win(world):
    def judged(gold, pred, trace=None, pred_name=None, pred_trace=None):
        return 1.0 if pred.label == gold.label else float("nan")

    compiled = optimizer(metric=judged, optimize_prompts=False).compile(
        dspy.Predict("text -> label"), trainset=rows(40), valset=rows(24, shift=40)
    )
    assert adapters(compiled)["self"].startswith("legal@")


def test_copies_of_a_validation_row_are_no_more_evidence(world):
    sets = {"trainset": rows(20), "valset": rows(4)}
    once = optimizer(optimize_prompts=False).compile(dspy.Predict("text -> label"), **sets).detailed_results
    sets["valset"] = [row.copy() for row in rows(4) for _ in range(5)]
    copied = optimizer(optimize_prompts=False).compile(dspy.Predict("text -> label"), **sets).detailed_results
    assert once.choice.gain == copied.choice.gain > 0.05
    assert [found.val_score for found in once.found] == [found.val_score for found in copied.found]


def test_no_share_is_added_for_a_race_that_does_not_take_place():
    plain = dspy.GEPA(metric, auto="light", reflection_lm=DummyLM([]))
    alone = optimizer(max_metric_calls=None, auto="light", select_adapters=False)
    assert alone.budget(2, 100, 50) == plain.auto_budget(2, 6, 50)


def test_a_file_in_the_log_s_folder_ends_gepa(world, tmp_path):
    world.knows = {}
    (tmp_path / "gepa.stop").touch()
    result = (
        optimizer(log_dir=str(tmp_path), select_adapters=False)
        .compile(dspy.Predict("text -> label"), trainset=rows(40), valset=rows(24, shift=40))
        .detailed_results
    )
    assert (len(result.found), result.metric_calls) == (1, 24)


def test_a_proposer_that_fails_is_told(world, caplog):
    world.knows = {}
    optimizer(instruction_proposer=lambda: {}, select_adapters=False).compile(
        dspy.Predict("text -> label"), trainset=rows(40), valset=rows(24, shift=40)
    )
    assert "a proposal failed: TypeError" in caplog.text


def test_equal_adapters_gain_nothing(monkeypatch):
    World(monkeypatch, dict.fromkeys(KNOWS, ()))
    compiled = optimizer(optimize_prompts=False).compile(
        dspy.Predict("text -> label"), trainset=rows(40), valset=rows(40, shift=40)
    )
    assert adapters(compiled) == {"self": "none"}


def test_a_metric_of_noise_gains_no_more_often_than_its_level_allows(world):
    def compiled(salt):
        def noise(gold, pred, trace=None, pred_name=None, pred_trace=None):
            return float(crc32(f"{salt} {gold.text} {pred.label}".encode()) % 2)

        return optimizer(metric=noise, optimize_prompts=False).compile(
            dspy.Predict("text -> label"), trainset=rows(40), valset=rows(40, shift=40)
        )

    gains = sum(adapters(compiled(salt)) != {"self": "none"} for salt in range(20))
    assert gains <= 3  # of 20 at a level of 5 %: more has a chance of 1.6 %


def test_reflection_sees_no_validation_row(world):
    world.knows = {}
    seen = []

    def proposer(candidate, reflective_dataset, components_to_update):
        seen.append(json.dumps(reflective_dataset, default=str))
        return {}

    validation = rows(30, shift=1000)
    optimizer(instruction_proposer=proposer).compile(
        dspy.Predict("text -> label"), trainset=rows(40), valset=validation
    )
    assert seen
    assert not any(row.text in text for text in seen for row in validation)


def test_rows_whose_program_or_metric_raises_score_the_failure_score(world):
    def raising(gold, pred, trace=None, pred_name=None, pred_trace=None):
        if "row 1 " in gold.text:
            raise RuntimeError("no")
        return metric(gold, pred)

    compiled = optimizer(metric=raising).compile(dspy.Predict("text -> label"), trainset=rows(20), valset=rows(24))
    found = compiled.detailed_results.found[compiled.detailed_results.best_idx]
    assert adapters(compiled)["self"].startswith("legal@")
    assert found.val_scores[1] == 0.0
    assert sum(found.val_scores) == 23


# -- a run that was killed ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.mark.parametrize("death", [150, 290], ids=["in the race", "after a move"])
def test_a_killed_run_goes_on_without_asking_again_and_ends_as_an_unbroken_one(world, tmp_path, death):
    world.knows = {"financial": KNOWS["financial"]}
    program, sets = dspy.Predict("text -> label"), {"trainset": rows(40), "valset": rows(40, shift=40)}
    whole = optimizer(log_dir=str(tmp_path / "whole"), num_threads=1).compile(program, **sets)
    calls, count, lock = len(world.asked), [0], threading.Lock()

    def dying(*args):
        with lock:
            count[0] += 1
            if count[0] == death:
                raise Killed
        return metric(*args)

    functools.update_wrapper(dying, metric)  # for the log they are one
    world.asked.clear()
    with pytest.raises(Killed):
        optimizer(metric=dying, log_dir=str(tmp_path / "cut"), num_threads=1).compile(program, **sets)
    before = len(world.asked)
    assert 0 < before < calls
    with (tmp_path / "cut" / "answers.jsonl").open("a") as file:
        file.write('{"key": "torn')
    resumed = optimizer(log_dir=str(tmp_path / "cut"), num_threads=1).compile(program, **sets)
    assert len(world.asked) <= calls + 1 + 12  # the row under which it died, and what reflection sees of the race
    assert whole.detailed_results.moves
    for name in ("found", "ranking", "choice", "metric_calls", "race", "moves", "usage"):
        assert getattr(resumed.detailed_results, name) == getattr(whole.detailed_results, name)
    assert (tmp_path / "cut" / "report.html").read_text().count("<circle") == len(whole.detailed_results.found)


def test_a_log_of_another_run_is_refused_with_what_differs(world, tmp_path):
    program = dspy.Predict("text -> label")
    optimizer(log_dir=str(tmp_path), max_metric_calls=120).compile(program, trainset=rows(10), valset=rows(10))
    with pytest.raises(ConfigError, match="seed was 0, is 1"):
        optimizer(log_dir=str(tmp_path), max_metric_calls=120, seed=1).compile(
            program, trainset=rows(10), valset=rows(10)
        )
    with pytest.raises(ConfigError, match="component_selector was 'MostWrongSelector', is 'round_robin'"):
        optimizer(log_dir=str(tmp_path), max_metric_calls=120, component_selector="round_robin").compile(
            program, trainset=rows(10), valset=rows(10)
        )
    with pytest.raises(ConfigError, match="train was"):
        optimizer(log_dir=str(tmp_path), max_metric_calls=120).compile(program, trainset=rows(11), valset=rows(10))


def refused(log_dir, match, program=None, **kwargs):
    with pytest.raises(ConfigError, match=match):
        optimizer(log_dir=str(log_dir), max_metric_calls=120, **kwargs).compile(
            program or dspy.Predict("text -> label"), trainset=rows(10), valset=rows(10)
        )


def test_a_log_of_another_program_is_refused(world, tmp_path):
    student = dspy.Predict("text -> label")
    optimizer(log_dir=str(tmp_path), max_metric_calls=120).compile(student, trainset=rows(10), valset=rows(10))
    taught = student.deepcopy()
    taught.demos = rows(1, shift=100)
    refused(tmp_path, r"program\.predictors\.self\.demos was 'none', is '1, \w+'", taught)
    typed = dspy.Predict(student.signature.with_updated_fields("label", type_=Literal["fruit", "tool"]))
    refused(tmp_path, r"fields\.label was 'output str.*Literal\['fruit', 'tool'\]", typed)
    described = dspy.Predict(student.signature.with_updated_fields("text", desc="a note"))
    refused(tmp_path, r"fields\.text was .*, is 'input str: a note'", described)
    refused(tmp_path, r"config\.temperature was None, is 0\.3", dspy.Predict("text -> label", temperature=0.3))
    refused(tmp_path, "modules.self.class was 'Predict', is 'Two'", Two())
    refused(tmp_path, r"lm\.max_tokens was 1024, is 8\.", lm=LoRALM(max_tokens=8))
    refused(tmp_path, r"failure_score was 0\.0, is -1\.0", failure_score=-1.0)
    refused(tmp_path, "reflection_lm.class was None, is 'DummyLM'", reflection_lm=DummyLM([]))
    with dspy.context(adapter=dspy.JSONAdapter()):
        refused(tmp_path, r"dspy_adapter\.class was 'ChatAdapter', is 'JSONAdapter'")


def test_a_move_is_charged_once_where_its_step_is_asked_for_again(world):
    world.knows, moves = {}, []
    space, log = Space(dspy.Predict("text -> label"), LoRALM(), ["legal"]), RunLog(None, {})

    def proposer(candidate, reflective_dataset, components_to_update):
        raise RuntimeError("no idea")

    for seed in range(10):  # three in ten try a move, which gains nothing
        rollouts = Rollouts(space, metric, log, 1, 0.0)
        reflection = Reflection(rollouts, log, proposer, None, space.arms, rows(8), 100, 1.0, seed)
        records = {"self": [{"Inputs": {}, "Generated Outputs": {}, "Feedback": "no", "Score": 0.0}]}
        for _ in range(2):
            with pytest.raises(RuntimeError, match="no idea"):
                reflection.propose_new_texts(space.start, records, ["self"])
        assert reflection.move_calls == 100 - 16 * len(reflection.moves)
        moves.append(len(reflection.moves))
    assert set(moves) == {0, 1}


# -- an LM that is out of reach ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", ["the program's LM", "the metric's LM", "the proposer's LM"])
def test_an_outage_ends_the_run_which_goes_on_without_it(world, tmp_path, monkeypatch, fails):
    world.knows = {}
    program, sets = dspy.Predict("text -> label"), {"trainset": rows(40), "valset": rows(40, shift=40)}

    def proposer(candidate, reflective_dataset, components_to_update):
        if down and fails == "the proposer's LM":
            raise LMServerError("overloaded")
        return one_rule_more(candidate, reflective_dataset, components_to_update)

    def judged(gold, pred, trace=None, pred_name=None, pred_trace=None):
        if down and fails == "the metric's LM" and len(world.asked) > 100:
            raise LMServerError("overloaded")
        return metric(gold, pred)

    def answered(engine, messages, real=Engine._complete_messages):
        if down and fails == "the program's LM" and len(world.asked) > 100:
            raise dspy.lm15.ServerError("overloaded")
        return real(engine, messages)

    def compiled(folder):
        return optimizer(metric=judged, instruction_proposer=proposer, log_dir=str(tmp_path / folder)).compile(
            program, **sets
        )

    monkeypatch.setattr(Engine, "_complete_messages", answered)
    real = World.lm
    monkeypatch.setattr(World, "lm", lambda world, arm: no_retries(real(world, arm)))
    down = False
    whole = compiled("whole")
    calls, down = len(world.asked), True
    world.asked.clear()
    with pytest.raises(LMServerError, match="overloaded"):
        compiled("cut")
    assert len(world.asked) > 50
    assert "overloaded" not in (tmp_path / "cut" / "answers.jsonl").read_text()
    down = False
    resumed = compiled("cut")
    assert len(world.asked) <= calls + 4 + 12  # those whose metric the outage hit, and what reflection sees of the race
    for name in ("ranking", "choice", "metric_calls", "race", "moves"):
        assert getattr(resumed.detailed_results, name) == getattr(whole.detailed_results, name)


def no_retries(lm):
    lm.num_retries = 0
    return lm


def test_answers_under_way_are_kept_and_no_more_is_asked_when_the_lm_fails():
    failed, began = threading.Event(), []

    class Slow(dspy.Module):
        def forward(self, text):
            began.append(text)
            if text == "0":
                while len(began) < 2:
                    failed.wait(0.01)
                failed.set()
                raise LMServerError("overloaded")
            failed.wait(10)
            time.sleep(0.05)  # time for the failure to be noted
            return dspy.Prediction(label=text)

    class Space:
        def build(self, candidate):
            return Slow()

    log = RunLog(None, {})
    rollouts = Rollouts(Space(), lambda *_: 1.0, log, 2, 0.0)
    pairs = [({"self": ""}, dspy.Example(text=str(i)).with_inputs("text")) for i in range(20)]
    with pytest.raises(LMServerError, match="overloaded"):
        rollouts.run(pairs)
    assert sorted(began[:2]) == ["0", "1"]
    assert len(log) == len(began) - 1 < 19
    assert rollouts.calls == 0


def test_a_refused_row_fails_until_it_is_asked_again_and_refusing_everything_ends_the_run(world, tmp_path, monkeypatch):
    real, refuses = Engine._complete_messages, ["row 1 "]

    def answered(engine, messages):
        if any(words in messages[-1]["content"] for words in refuses):
            raise dspy.lm15.InvalidRequestError("filtered", status=400)
        return real(engine, messages)

    def scores():
        settings = {"optimize_prompts": False, "log_dir": str(tmp_path)}
        compiled = optimizer(**settings).compile(dspy.Predict("text -> label"), trainset=rows(20), valset=rows(24))
        return compiled.detailed_results.found[compiled.detailed_results.best_idx].val_scores

    monkeypatch.setattr(Engine, "_complete_messages", answered)
    assert (lambda found: (found[1], sum(found)))(scores()) == (0.0, 23)
    refuses.clear()
    assert sum(scores()) == 24
    refuses.append("")
    with pytest.raises(LMInvalidRequestError, match="filtered"):
        optimizer().compile(dspy.Predict("text -> label"), trainset=rows(20), valset=rows(24))


def test_a_prompt_that_is_too_long_fails_its_row_alone(world, monkeypatch):
    def answered(engine, messages, real=Engine._complete_messages):
        if "row 1 " in messages[-1]["content"]:
            raise dspy.lm15.ContextLengthError("too long")
        return real(engine, messages)

    monkeypatch.setattr(Engine, "_complete_messages", answered)
    compiled = optimizer(optimize_prompts=False).compile(
        dspy.Predict("text -> label"), trainset=rows(20), valset=rows(24)
    )
    found = compiled.detailed_results.found[compiled.detailed_results.best_idx]
    assert (found.val_scores[1], sum(found.val_scores)) == (0.0, 23)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"max_metric_calls": None}, "exactly one of"),
        ({"auto": "light"}, "exactly one of"),
        ({"adapter_budget": 1.0}, "no share"),
        ({"select_adapters": False, "optimize_prompts": False}, "nothing to optimize"),
        ({"gepa_kwargs": {"frontier": "objective"}}, r"\['frontier'\]: not taken. Did you mean .*frontier_type"),
        ({"gepa_kwargs": {"max_metric_calls": 3}}, "not taken"),
        ({"gepa_kwargs": {"val_evaluation_policy": "IRT"}}, "val_evaluation_policy='IRT'; allowed are"),
        ({"gepa_kwargs": {"frontier_type": "rows"}}, "frontier_type='rows'; allowed are 'instance'"),
        ({"component_selector": "roundrobin"}, "component_selector='roundrobin'; allowed are 'round_robin', 'all'"),
        ({"candidate_selection_strategy": "best"}, "candidate_selection_strategy='best'; allowed are 'pareto'"),
        ({"track_stats": True, "track_best_outputs": True}, "takes no track_best_outputs"),
        ({"code_proposer": print}, "takes no code_proposer"),
    ],
)
def test_settings_that_cannot_be(kwargs, match):
    with pytest.raises(ConfigError, match=match):
        optimizer(**kwargs)


def test_a_tracker_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(lora_gepa, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install wandb"):
        optimizer(use_wandb=True)


def test_compile_says_what_is_missing(world):
    program = dspy.Predict("text -> label")
    with pytest.raises(ConfigError, match="trainset is empty"):
        optimizer().compile(program, trainset=[])
    with pytest.raises(ConfigError, match="no teacher"):
        optimizer().compile(program, trainset=rows(4), teacher=program)
    with pytest.raises(ConfigError, match="needs a LoRALM"):
        optimizer(lm=None).compile(program, trainset=rows(4))
    with pytest.raises(ConfigError, match="do not score two programs"):
        optimizer(max_metric_calls=10).compile(program, trainset=rows(4), valset=rows(20))
    with pytest.raises(ConfigError, match="legal"):
        optimizer(adapters=["legl"]).compile(program, trainset=rows(4), valset=rows(4))
    with pytest.raises(ConfigError, match=r"give 'all', or names in a list: \['legal'\]"):
        optimizer(adapters="legal").compile(program, trainset=rows(4), valset=rows(4))
    frozen = dspy.Module()
    frozen.inner = Two()
    frozen.inner._compiled = True
    with pytest.raises(ConfigError, match="no predictor to optimize"):
        optimizer().compile(frozen, trainset=rows(4), valset=rows(4))


def test_a_candidate_text_holds_adapter_and_instruction():
    text = candidates.encode("legal@0123456789ab", "Say\n\nit.")
    assert decode(text) == ("legal@0123456789ab", "Say\n\nit.")
    assert candidates.arm_of(candidates.with_arms({"a": text}, {"a": "none"})["a"]) == "none"
    with pytest.raises(ConfigError, match="must begin with"):
        decode("Say it.")


# -- rows that are asked -----------------------------------------------------------------------------------------------


WORDS = {f"word{chr(97 + i)}": f"label{chr(97 + i)}" for i in range(16)}


def one_rule_more(candidate, reflective_dataset, components_to_update):
    """A proposer that learns one label at a time, so that candidates are many."""
    (name,) = components_to_update
    wrong = [record for record in reflective_dataset[name] if record["Feedback"] != "Right."]
    if not wrong:
        return {}
    label = wrong[0]["Feedback"].removeprefix("The right answer is ").rstrip(".")
    return {name: f"{candidate[name]} If it mentions {label.replace('label', 'word')}, answer {label}."}


def test_item_response_theory_asks_fewer_rows_and_the_returned_program_is_scored_on_all(monkeypatch):
    World(monkeypatch, {}, WORDS)
    asked = []
    real = Reflection.batch_evaluate

    def watched(reflection, items, **kwargs):
        asked.extend(len(batch) for _, batch in items)
        return real(reflection, items, **kwargs)

    monkeypatch.setattr(Reflection, "batch_evaluate", watched)
    result = (
        optimizer(
            max_metric_calls=1300,
            num_threads=1,
            adapters=[],
            instruction_proposer=one_rule_more,
            gepa_kwargs={"val_evaluation_policy": IRTEvaluationPolicy(target_se=0.6)},
        )
        .compile(dspy.Predict("text -> label"), trainset=rows(64, WORDS), valset=rows(128, WORDS, shift=64))
        .detailed_results
    )
    asked = [count for count in asked if count > 3]  # 3 is a minibatch
    assert asked[:4] == [128] * 4
    assert len(asked) >= 16  # with all rows of each it would be 10
    assert max(asked[9:]) < 40
    assert len(result.found) < len(asked)  # the worse ones were not asked the rest
    assert all(len(found.val_scores) == 128 for found in result.found)
    assert all(parent < index for index, found in enumerate(result.found) for parent in found.parents)
    assert result.found[result.best_idx].val_score >= 3 / 16
    assert result.metric_calls <= 1300 + 128


def test_the_policy_s_name_is_taken_and_a_killed_run_goes_on(world, tmp_path):
    world.knows = {}
    program, sets = dspy.Predict("text -> label"), {"trainset": rows(40), "valset": rows(40, shift=40)}
    given = {"max_metric_calls": 700, "num_threads": 1, "gepa_kwargs": {"val_evaluation_policy": "irt"}}
    assert optimizer(**given).gepa_kwargs == {"val_evaluation_policy": IRTEvaluationPolicy()}
    first = optimizer(log_dir=str(tmp_path), **given).compile(program, **sets)
    calls = len(world.asked)
    second = optimizer(log_dir=str(tmp_path), **given).compile(program, **sets)
    assert len(world.asked) == calls
    assert second.detailed_results.found == first.detailed_results.found
    with pytest.raises(ConfigError, match="val_evaluation_policy was"):
        optimizer(log_dir=str(tmp_path), max_metric_calls=700).compile(program, **sets)


def test_the_race_may_ask_telling_rows(monkeypatch):
    World(monkeypatch, {"legal": LABELS})
    compiled = optimizer(race_rows="telling", optimize_prompts=False, max_metric_calls=600).compile(
        Two(), trainset=rows(60), valset=rows(40, shift=60)
    )
    assert "main effects" in compiled.detailed_results.race[0]
    assert compiled.detailed_results.race_calls <= 600


# -- more than one objective -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frontier", ["objective", "hybrid", "cartesian"])
def test_fronts_over_objectives(world, frontier):
    world.knows = {}

    def judged(gold, pred, trace=None, pred_name=None, pred_trace=None):
        scored = metric(gold, pred)
        return dspy.Prediction(**scored.toDict(), objective_scores={"short": -float(len(pred.label))})

    result = (
        optimizer(metric=judged, max_metric_calls=600, gepa_kwargs={"frontier_type": frontier})
        .compile(dspy.Predict("text -> label"), trainset=rows(40), valset=rows(40, shift=40))
        .detailed_results
    )
    assert len(result.found) > 1
    assert all({"score", "adapters", "seconds", "short"} <= set(found.objectives) for found in result.found)
    assert all(found.objectives["score"] == pytest.approx(found.val_score) for found in result.found)


def test_the_front_of_score_against_the_number_of_adapters(world):
    world.knows = {"legal": tuple(LABELS)}
    result = optimizer().compile(dspy.Predict("text -> label"), trainset=rows(40), valset=rows(40, shift=40))
    result = result.detailed_results
    front = [result.found[index] for index in result.front("score", "adapters")]
    assert {found.objectives["adapters"] for found in front} == {0.0, -1.0}
    assert max(found.val_score for found in front) == 1.0
    assert result.front("score") == [i for i, found in enumerate(result.found) if found.val_score == 1.0]


# -- merge -------------------------------------------------------------------------------------------------------------

texts = st.builds(
    candidates.encode, st.sampled_from(["none", "legal@0123456789ab", "auto@0123456789ab"]), st.sampled_from("abcd")
)


@given(st.lists(st.fixed_dictionaries({"first": texts, "second": texts}), min_size=3, max_size=3), st.integers(0, 99))
def test_merge_takes_adapter_and_instruction_together(family, seed):
    merged = sample_and_attempt_merge_programs_by_common_predictors(
        agg_scores=[0.1, 0.5, 0.6],
        rng=Random(seed),
        merge_candidates=[1, 2],
        merges_performed=([], []),
        program_candidates=family,
        parent_program_for_candidate=[[None], [0], [0]],
    )
    if merged is not None:
        assert all(text in {each[name] for each in family} for name, text in merged[0].items())


# -- beside others -----------------------------------------------------------------------------------------------------


class Served:
    """Stands for the engine that LoRALMs share: answers for the adapter that a request's model names."""

    def __init__(self, world, happened):
        self.world, self.happened, self.routes = world, happened, {}

    def complete(self, request):
        return self.world.lm(request.model.rsplit("/", 1)[-1])._engine_spec.complete(request)

    def serve(self, model, adapter):
        pass

    def preload(self, model):
        self.happened.append("launch")

    def shutdown(self):
        self.happened.append("kill")

    def __deepcopy__(self, memo):
        return self


class AsyncServed(Served):
    async def complete(self, request):
        return super().complete(request)


@pytest.fixture
def lms(monkeypatch, world):
    """LoRALMs whose adapters know what the world says; returns how often they were launched and killed."""
    happened = []
    engine = Served(world, happened)
    monkeypatch.setattr(Space, "_lm_for", REAL_LM_FOR)
    monkeypatch.setattr(LoRALM, "_engine_pair", lambda lm, config: (engine, AsyncServed(world, happened)))
    return happened


def test_inside_better_together_it_is_a_prompt_optimizer(lms):
    student = dspy.Predict("text -> label")
    student.set_lm(LoRALM())
    together = dspy.BetterTogether(metric=lambda gold, pred, trace=None: metric(gold, pred).score, p=optimizer(lm=None))
    compiled = together.compile(student, trainset=rows(40), valset=rows(40, shift=40), strategy="p -> p")
    assert not compiled.flag_compilation_error_occurred
    best = compiled.candidate_programs[0]
    assert (best["strategy"], best["score"]) == ("p", 100.0)
    assert {each["strategy"] for each in compiled.candidate_programs} == {"", "p", "p -> p"}
    assert compiled.lm.ref.startswith("legal@")
    assert compiled(text="a violin").label == "instrument"
    assert student.lm.ref is None
    assert (lms[0], lms[-1]) == ("launch", "kill")


def test_better_together_s_teacher_is_refused(lms):
    student = dspy.Predict("text -> label")
    student.set_lm(LoRALM())
    together = dspy.BetterTogether(metric=lambda gold, pred, trace=None: metric(gold, pred).score, p=optimizer(lm=None))
    compiled = together.compile(student, teacher=student.deepcopy(), trainset=rows(8), valset=rows(8), strategy="p")
    assert compiled.flag_compilation_error_occurred
    assert compiled.lm.ref is None


def test_mlflow_s_autolog_finds_its_compile():
    """It patches the direct subclasses of Teleprompter and none below, and logs parameters and the program's state."""
    assert LoRAGEPA in dspy.teleprompt.Teleprompter.__subclasses__()
    assert optimizer().get_params()["adapter_budget"] == 0.4


@pytest.mark.filterwarnings("ignore")  # MLflow's own, and it logs nothing more where one is an error
def test_mlflow_autolog(world, mlflow):
    mlflow.dspy.autolog(log_compiles=True, log_traces=False, silent=True)
    try:
        with dspy.context(lm=LoRALM()):
            compiled = optimizer().compile(dspy.Predict("text -> label"), trainset=rows(40), valset=rows(40, shift=40))
        (run,) = mlflow.search_runs(experiment_names=["tests"], output_format="list")
        logged = [each.path for each in mlflow.MlflowClient().list_artifacts(run.info.run_id)]
    finally:
        mlflow.dspy.autolog(disable=True)
    assert adapters(compiled)["self"].startswith("legal@")
    assert {"best_model.json", "trainset.json", "valset.json"} <= set(logged)
