"""ACE on a fake LM that follows the rules it is told, and with scripted LMs as Reflector and Curator."""

import asyncio
import functools
import json
import logging
import pickle
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from random import Random

import dspy
import pytest
from dspy.clients.engines.dummy_engine import AsyncDummyEngine, DummyEngine
from dspy.utils import DummyLM
from dspy.utils.exceptions import ContextWindowExceededError, LMCollectionLimitError, LMTransportError
from dspy_lora.optimizers.ace import ACE
from dspy_lora.optimizers.ace_learner import Learner
from dspy_lora.optimizers.ace_roles import RULES, Curator, Reflector, RuleCurator, RuleReflector

import dspy_lora
from dspy_lora.context.deltas import Add, Merge, Remove, Update
from dspy_lora.context.playbook import Playbook
from dspy_lora.context.taught import CLOSING, OPENING
from dspy_lora.context.tokens import estimate_tokens
from dspy_lora.errors import ConfigError, DataError

WORLD = {"refund": "money", "invoice": "money", "password": "access", "router": "network"}
LOCK = threading.Lock()
FILLER = "the customer wrote again about order number letter station window garden monday".split()


class Follower(DummyEngine):
    """Answers by the rules of its instruction, else "other"."""

    def __init__(self, owner, asked):
        super().__init__(owner)
        self.asked = asked

    def _complete_messages(self, messages):
        told, text = messages[0]["content"], messages[-1]["content"].split("Respond with")[0]
        self.asked.append(told)
        label = "other"
        for line in told.split("\n"):
            words, _, answer = line.strip().removeprefix("- If it mentions ").partition(", answer ")
            if answer and any(word in text for word in words.replace(" or ", ", ").split(", ")):
                label = answer.removesuffix(".")
        with LOCK:
            self.owner.answers = {"": {"label": label}}
            return super()._complete_messages(messages)


@pytest.fixture
def asked():
    """Every instruction that reached the program's LM; a fresh one answers."""
    lm, prompts = DummyLM([]), []
    lm._engine_spec = Follower(lm, prompts)
    lm._async_engine_spec = AsyncDummyEngine(lm._engine_spec)
    with dspy.context(lm=lm):
        yield prompts


def rows(count, shift=0):
    words = list(WORLD)
    found = []
    for i in range(shift, shift + count):
        word = words[i % len(words)]
        filler = " ".join(Random(i).sample(FILLER, 3))
        found.append(dspy.Example(text=f"{i} {filler} {word}", label=WORLD[word]).with_inputs("text"))
    return found


def metric(gold, pred, trace=None):
    assert trace is None
    return pred.label == gold.label


class Desk(dspy.Module):
    def __init__(self):
        super().__init__()
        self.sort = dspy.Predict("text -> label")

    def forward(self, text):
        return self.sort(text=text)

    async def aforward(self, text):
        return await self.sort.acall(text=text)


def ace(given=metric, **kwargs):
    return ACE(given, **{"num_threads": 4} | kwargs)


def score(program, data):
    return sum(program(**row.inputs()).label == row.label for row in data) / len(data)


# -- offline, by counting ----------------------------------------------------------------------------------------------


def test_it_learns_the_rules_and_leaves_the_program_alone(asked):
    student = Desk()
    before = student.dump_state()
    compiled = ace(track_stats=True).compile(student, trainset=rows(48), valset=rows(24, 100))
    assert student.dump_state() == before
    assert not student._compiled
    assert compiled._compiled
    held_out = rows(24, 200)
    assert score(student, held_out) == 0
    assert score(compiled, held_out) == 1
    result = compiled.detailed_results
    assert result.val_scores[0] == 0
    assert result.val_scores[result.best_idx] == 1
    assert result.playbook is compiled.playbook
    texts = [bullet.text for bullet in compiled.playbook.bullets]
    assert {"If it mentions password, answer access.", "If it mentions router, answer network."} <= {*texts}
    assert all(bullet.helpful > bullet.harmful for bullet in compiled.playbook.bullets)


def test_the_same_seed_learns_the_same(asked):
    texts = {ace(num_threads=threads).compile(Desk(), trainset=rows(24)).playbook.render() for threads in (1, 4)}
    assert len(texts) == 1


def test_a_compiled_program_needs_no_playbook_to_run_and_keeps_it_when_it_is_saved(asked, tmp_path):
    compiled = ace(epochs=1).compile(Desk(), trainset=rows(32))
    compiled.save(tmp_path / "program.json")
    plain, whole = Desk(), Desk()
    plain.load(tmp_path / "program.json")
    whole.playbook = Playbook()
    whole.load(tmp_path / "program.json")
    assert score(plain, rows(16, 100)) == score(compiled, rows(16, 100)) == 1
    assert whole.playbook.render() == compiled.playbook.render()
    compiled.save(tmp_path / "whole", save_program=True)
    assert dspy.load(tmp_path / "whole", allow_pickle=True).playbook.render() == compiled.playbook.render()


def test_compiling_again_goes_on_from_the_program_s_playbook(asked):
    once = ace(epochs=1).compile(Desk(), trainset=rows(32))
    more = rows(32, 500)
    twice = ace(epochs=1).compile(once, trainset=more)
    total = sum(bullet.helpful for bullet in once.playbook.bullets)
    assert sum(bullet.helpful for bullet in twice.playbook.bullets) == total + len(more)
    assert twice.sort.signature.instructions.count(OPENING) == 1
    assert score(twice, rows(16, 100)) == 1


PROGRAMS = pytest.mark.parametrize("make", [Desk, lambda: dspy.Predict("text -> label")], ids=["module", "predict"])


def told_of(playbook):
    return [(bullet.section, bullet.text) for bullet in playbook.bullets]


@PROGRAMS
def test_a_saved_playbook_comes_back_whole(asked, tmp_path, make):
    compiled, file = ace(epochs=1).compile(make(), trainset=rows(32)), tmp_path / "program.json"
    compiled.save(file)
    loaded = dspy_lora.load(make(), file)
    assert loaded.playbook.render() == compiled.playbook.render()
    loaded.save(file)
    again = dspy_lora.load(loaded.deepcopy(), file)
    assert again.playbook.render() == compiled.playbook.render()
    assert ace().online(again).playbook.render() == compiled.playbook.render()
    more = ace(epochs=1).compile(again, trainset=rows(32, 500))
    assert sum(b.helpful for b in more.playbook.bullets) == sum(b.helpful for b in compiled.playbook.bullets) + 32
    saved = json.loads(file.read_text())
    saved["playbook"]["playbook"] = "nonsense"
    file.write_text(json.dumps(saved))
    fresh = make()
    with pytest.raises(DataError, match="is no playbook"):
        dspy_lora.load(fresh, file)
    assert fresh.dump_state() == make().dump_state()


def test_a_predict_that_dspy_itself_loads_brings_its_playbook_to_ace(asked, tmp_path):
    compiled, fresh = (
        ace(epochs=1).compile(dspy.Predict("text -> label"), trainset=rows(32)),
        dspy.Predict("text -> label"),
    )
    compiled.save(tmp_path / "program.json")
    fresh.load(tmp_path / "program.json")
    assert ace().online(fresh).playbook.render() == compiled.playbook.render()


@PROGRAMS
def test_bullets_that_only_the_instruction_tells_are_learned_on(asked, caplog, make):
    compiled, told = ace(epochs=1).compile(make(), trainset=rows(32)), make()
    for (_, predictor), (_, taught) in zip(told.named_predictors(), compiled.named_predictors(), strict=True):
        predictor.signature = taught.signature
    online = ace().online(told)
    assert len(online.playbook) >= 3
    assert told_of(online.playbook) == told_of(compiled.playbook)
    assert f"{len(online.playbook)} bullets are read from its instructions" in caplog.text
    assert score(online, rows(16, 100)) == 1
    result = ace(epochs=1, track_stats=True).compile(told, trainset=rows(4, 500)).detailed_results
    assert told_of(result.playbooks[0]) == told_of(compiled.playbook)


@PROGRAMS
def test_a_playbook_in_an_instruction_that_cannot_be_read_is_refused(asked, tmp_path, make):
    told = make()
    for _, predictor in told.named_predictors():
        predictor.signature = predictor.signature.with_instructions(f"Sort.\n\n{OPENING}\nBe kind.\n{CLOSING}")
    for learn in (ace().online, lambda program: ace().compile(program, trainset=rows(4))):
        with pytest.raises(DataError, match=r"'Be kind\.'.*ACE\(playbook=\.\.\.\)"):
            learn(told)
    file = tmp_path / "playbook.md"
    Playbook().save(file)
    assert len(ace().online(told, file).playbook) == 0  # the file is the playbook


def test_without_a_valset_the_last_playbook_is_kept_and_with_one_the_best(asked):
    wrong = [dspy.Example(row, label="wrong").with_inputs("text") for row in rows(16, 300)]
    taught_wrong = ace(epochs=1, track_stats=True).compile(Desk(), trainset=wrong, valset=rows(16))
    assert len(ace(epochs=1).compile(Desk(), trainset=rows(32)).playbook) >= 3
    assert taught_wrong.detailed_results.best_idx == 0
    assert len(taught_wrong.playbook) == 0


def test_without_ground_truth_the_metric_s_feedback_is_all_it_learns_from(asked):
    assert len(ace(ground_truth=False).compile(Desk(), trainset=rows(32)).playbook) == 0

    def told(gold, pred, trace=None, pred_name=None, pred_trace=None):
        return dspy.Prediction(score=pred.label == gold.label, feedback=f"expected: {gold.label}")

    assert score(ace(told, ground_truth=False).compile(Desk(), trainset=rows(32)), rows(16, 100)) == 1


def test_labels_with_periods_are_learned_whole(asked):
    places = {"money": "St. Louis. South", "access": "U.S. desk", "network": "No. 5"}
    data = [dspy.Example(row, label=places[row.label]).with_inputs("text") for row in rows(32)]
    texts = [bullet.text for bullet in ace().compile(Desk(), trainset=data).playbook.bullets]
    assert "If it mentions password, answer U.S. desk." in texts
    assert "If it mentions router, answer No. 5." in texts
    assert any(text.endswith("answer St. Louis. South.") for text in texts)


def test_a_metric_that_raises_fails_its_example_alone(asked, caplog):
    def picky(gold, pred, trace=None):
        if gold.text.startswith("3 "):
            raise ValueError("no opinion")
        return pred.label == gold.label

    compiled = ace(picky, epochs=1, track_stats=True).compile(Desk(), trainset=rows(32))
    [failure] = compiled.detailed_results.failures
    assert failure == "the metric raised ValueError: no opinion"
    assert "no opinion" in caplog.text
    assert score(compiled, rows(16, 100)) == 1


def test_a_program_that_always_raises_ends_with_a_report(asked, caplog):
    class Broken(Desk):
        def forward(self, text):
            raise RuntimeError("out of order")

    compiled = ace(epochs=1, track_stats=True).compile(Broken(), trainset=rows(8))
    assert len(compiled.detailed_results.failures) == 8
    assert "8 of 8 rows failed; the first: RuntimeError: out of order" in caplog.text


class Two(dspy.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = dspy.Predict("text -> label"), dspy.Predict("text -> label")

    def forward(self, text):
        return dspy.Prediction(label=self.first(text=text).label, again=self.second(text=text).label)


def test_each_predictor_is_told_its_own_rules(asked):
    def judge(gold, pred, trace=None, pred_name=None, pred_trace=None):
        wanted = gold.label if pred_name == "first" else f"second_{gold.label}"
        return dspy.Prediction(score=0.0, feedback=f"expected: {wanted}")

    compiled = ace(judge, ground_truth=False).compile(Two(), trainset=rows(40))
    first, second = (compiled.first.signature.instructions, compiled.second.signature.instructions)
    assert "answer money." in first
    assert "answer second_money." not in first
    assert "answer second_money." in second
    told = Two()
    told.first.signature, told.second.signature = compiled.first.signature, compiled.second.signature
    assert told_of(ace().online(told).playbook) == told_of(compiled.playbook)
    assert f"\n{RULES}:\n" in second


def test_the_budget_holds_in_every_prompt(asked):
    ace(token_budget=30).compile(Desk(), trainset=rows(48))
    told = [prompt.partition(OPENING)[2].partition(CLOSING)[0].split("\n") for prompt in asked]
    longest = max(estimate_tokens("\n".join(line.strip() for line in lines).strip()) for lines in told)
    assert 0 < longest <= 30


def test_a_run_that_was_killed_goes_on_and_ends_as_an_unbroken_one(asked, tmp_path):
    whole = ace().compile(Desk(), trainset=rows(32), valset=rows(8, 100)).playbook.render()
    calls = []

    def dying(gold, pred, trace=None):
        calls.append(gold)
        if len(calls) > 40:
            raise KeyboardInterrupt
        return metric(gold, pred)

    functools.update_wrapper(dying, metric)  # for the log they are one
    with pytest.raises(KeyboardInterrupt):
        ace(dying, log_dir=tmp_path, num_threads=1).compile(Desk(), trainset=rows(32), valset=rows(8, 100))
    before = len(asked)
    resumed = ace(log_dir=tmp_path, num_threads=1).compile(Desk(), trainset=rows(32), valset=rows(8, 100))
    again = len(asked) - before
    assert resumed.playbook.render() == whole
    assert Playbook.load(tmp_path / "playbook.md").render() == whole
    asked.clear()
    ace(log_dir=tmp_path, num_threads=1).compile(Desk(), trainset=rows(32), valset=rows(8, 100))
    assert not asked
    assert again > 0


def test_an_outage_ends_the_run_which_goes_on_without_it(asked, tmp_path, monkeypatch):
    sets = {"trainset": rows(32), "valset": rows(8, 100)}
    whole = ace(track_stats=True).compile(Desk(), **sets)
    calls, answer = len(asked), Follower._complete_messages
    asked.clear()

    def down(engine, messages):
        if len(asked) >= 40:
            raise dspy.lm15.TransportError("no route")
        return answer(engine, messages)

    dspy.settings.lm.num_retries = 0
    monkeypatch.setattr(Follower, "_complete_messages", down)
    with pytest.raises(LMTransportError, match="no route"):
        ace(log_dir=tmp_path).compile(Desk(), **sets)
    monkeypatch.undo()
    assert "no route" not in (tmp_path / "answers.jsonl").read_text()
    resumed = ace(log_dir=tmp_path, track_stats=True).compile(Desk(), **sets)
    assert resumed.playbook.render() == whole.playbook.render()
    assert resumed.detailed_results.failures == []
    assert resumed.detailed_results.val_scores == whole.detailed_results.val_scores
    assert len(asked) <= calls


def test_a_log_of_another_run_is_refused(asked, tmp_path):
    ace(log_dir=tmp_path).compile(Desk(), trainset=rows(8))
    with pytest.raises(ConfigError, match="seed was 0, is 1"):
        ace(log_dir=tmp_path, seed=1).compile(Desk(), trainset=rows(8))
    taught = Desk()
    taught.sort.demos = rows(1)
    with pytest.raises(ConfigError, match=r"program\.predictors\.self\.sort\.demos was 'none', is '1, "):
        ace(log_dir=tmp_path).compile(taught, trainset=rows(8))
    with pytest.raises(ConfigError, match=r"reflector\.modules\.self\.class was 'RuleReflector', is 'Note'"):
        ace(log_dir=tmp_path, reflector=Note()).compile(Desk(), trainset=rows(8))
    dspy.settings.lm.kwargs["temperature"] = 0.7
    with pytest.raises(ConfigError, match=r"configured\.lm\.temperature was 0\.0, is 0\.7"):
        ace(log_dir=tmp_path).compile(Desk(), trainset=rows(8))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"epochs": 0}, "epochs=0"), ({"token_budget": -1}, "token_budget=-1"), ({"batch_size": 0}, "batch_size=0")],
)
def test_numbers_are_checked(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        ace(**kwargs)


def test_what_it_cannot_use_is_refused():
    with pytest.raises(TypeError, match="must take"):
        ace(lambda gold: 1)
    with pytest.raises(ConfigError, match="no teacher"):
        ace().compile(Desk(), trainset=rows(2), teacher=Desk())
    with pytest.raises(ConfigError, match="training rows"):
        ace().compile(Desk(), trainset=[])
    with pytest.raises(ConfigError, match="no predictor"):
        ace().compile(dspy.Module(), trainset=rows(2))
    with pytest.raises(ConfigError, match=r"ACE\.online"):
        ace(None).compile(Desk(), trainset=rows(2))


# -- the counting roles ------------------------------------------------------------------------------------------------


def record(text, gold, given="other"):
    feedback = f"The right answer is {gold}."
    return {
        "Inputs": {"text": text},
        "Generated Outputs": {"label": given},
        "Feedback": feedback,
        "Score": given == gold,
    }


def curated(playbook, insights, section=""):
    return RuleCurator()(playbook=playbook, section=section, insights=insights, tokens_left=99).operations


def test_the_rule_curator_adds_updates_merges_and_removes():
    playbook = Playbook()
    playbook.apply(curated(playbook, ["If it mentions a, answer X.", "If it mentions b, answer Y."]))
    x, y = playbook.bullets
    assert curated(playbook, ["If it mentions a, answer X."]) == []
    assert curated(playbook, ["If it mentions c, answer X."]) == [Update(id=x.id, text="If it mentions c, answer X.")]
    playbook.apply([Update(id=y.id, harmful=3, helpful=1)])
    assert curated(playbook, []) == [Remove(id=y.id)]
    playbook.apply([Add(section=RULES, text="If it mentions d, answer X.")])
    [merge] = curated(playbook, ["If it mentions a or d, answer X.", "If it mentions b, answer Y."])
    assert isinstance(merge, Merge)
    assert len(merge.ids) == 2


def test_a_rule_s_words_stay_until_rows_speak_against_them():
    playbook = Playbook()
    playbook.apply([Add(section=RULES, text="If it mentions voucher, answer money.")])
    records = [record(f"{i} refund", "money") for i in range(6)] + [record(f"{i} login", "access") for i in range(6)]
    reflector = RuleReflector()
    found = reflector(task="", playbook=playbook, section="", records=records)
    assert "If it mentions refund or voucher, answer money." in found.insights
    against = [record(f"{i} voucher login", "access") for i in range(9)]
    found = reflector(task="", playbook=playbook, section="", records=against)
    assert "If it mentions refund, answer money." in found.insights
    assert found.counts == [Update(id=playbook.bullets[0].id, harmful=9)]


def test_answers_that_are_no_labels_get_hints_on_their_form():
    records = [record(f"the pump{i} leaks", f"pump{i}") for i in range(8)]
    found = RuleReflector()(task="", playbook=Playbook(), section="", records=records)
    assert "Copy the answer from the text, word for word." in found.insights


# -- an LM as Reflector and Curator ------------------------------------------------------------------------------------

RULE = "If it mentions refund, answer money."


def reflection(insights, tags=()):
    return {"reasoning": "so", "insights": json.dumps(insights), "tags": json.dumps(list(tags))}


def operations(*deltas):
    return {"operations": json.dumps([delta.model_dump() for delta in deltas])}


def test_an_lm_reflects_in_rounds_and_curates_by_operations(asked):
    lm = DummyLM([reflection(["refund?"]), reflection([RULE]), operations(Add(section="Rules", text=RULE))])
    compiled = ace(reflection_lm=lm, epochs=1, rounds=2).compile(Desk(), trainset=rows(4))
    assert [(bullet.section, bullet.text) for bullet in compiled.playbook.bullets] == [("Rules", RULE)]
    shown = [call["messages"][-1]["content"] for call in lm.history]
    assert len(shown) == 3
    assert "refund?" in shown[1]
    assert "The right answer is money." in shown[0]
    assert compiled(text="a refund").label == "money"


def test_rounds_end_early_where_nothing_changes():
    lm = DummyLM([reflection(["same"])] * 5)
    with dspy.context(lm=lm):
        found = Reflector(rounds=5)(task="", playbook=Playbook(), section="", records=[record("a", "b")])
    assert found.insights == ["same"]
    assert len(lm.history) == 2


def test_ids_may_come_in_the_brackets_of_the_listing():
    assert Merge(ids=("[rules-1]", "rules-2"), text="x").ids == ("rules-1", "rules-2")
    assert Remove(id=" [rules-1] ").id == "rules-1"


def test_tags_count_and_operations_on_unknown_bullets_are_refused_and_reported(asked):
    playbook = Playbook()
    playbook.apply([Add(section="Rules", text=RULE)])
    [bullet] = playbook.bullets
    tags = [{"id": bullet.id, "verdict": "helpful"}, {"id": "rules-nowhere", "verdict": "harmful"}]
    lm = DummyLM([reflection(["x"], tags), operations(Remove(id="rules-no"), Add(section="Rules", text="Be brief."))])
    optimizer = ace(reflection_lm=lm, epochs=1, rounds=1, playbook=playbook, track_stats=True)
    compiled = optimizer.compile(Desk(), trainset=rows(4))
    assert compiled.playbook[bullet.id].helpful == 1
    assert [b.text for b in compiled.playbook.bullets] == ["Be brief.", RULE]
    assert len(compiled.detailed_results.failures) == 2
    assert playbook[bullet.id].helpful == 0


def test_a_reflection_that_cannot_be_parsed_is_left_out(asked):
    lm = DummyLM([{"nonsense": "x"}] * 8)
    compiled = ace(reflection_lm=lm, epochs=1, track_stats=True).compile(Desk(), trainset=rows(4))
    assert len(compiled.playbook) == 0
    assert "could not be parsed" in compiled.detailed_results.failures[0]


class Small(dspy.Module):
    """A role that takes so many items, else its prompt is too long."""

    def __init__(self, role, most):
        super().__init__()
        self.role, self.most, self.asked = role, most, []

    def forward(self, **kwargs):
        count = len(kwargs.get("records", kwargs.get("insights")))
        self.asked.append(count)
        if count > self.most:
            raise ContextWindowExceededError(message=f"{count} are too many")
        return self.role(**kwargs)


def test_what_is_too_long_for_a_role_is_asked_in_halves(asked):
    reflector, curator = Small(Note(), 2), Small(Keep(), 3)
    optimizer = ace(reflector=reflector, curator=curator, epochs=1, batch_size=5, track_stats=True)
    compiled = optimizer.compile(Desk(), trainset=rows(5))
    assert reflector.asked == [5, 2, 3, 1, 2]
    assert curator.asked == [5, 2, 3]
    assert {bullet.text for bullet in compiled.playbook.bullets} == {
        f"The right answer is {label}. This trajectory got a score of 0.0." for label in WORLD.values()
    }
    assert compiled.detailed_results.failures == []


def test_a_prompt_that_stays_too_long_is_left_out_and_the_run_goes_on(asked, tmp_path):
    for at in range(2):  # resumed too
        optimizer = ace(reflector=Small(Note(), 0), curator=Keep(), epochs=1, log_dir=tmp_path, track_stats=True)
        result = optimizer.compile(Desk(), trainset=rows(4)).detailed_results
        assert len(result.failures) == 4, at
        assert result.failures[0] == "sort: a reflection was too long and is left out: 1 are too many"
    online = ace(reflector=Note(), curator=Small(Keep(), 0)).online(Desk())
    online.learn(rows(1)[0])
    assert len(online.failures) == 1
    assert len(online.playbook) == 0


@pytest.mark.parametrize("error", [LMTransportError("no route"), ValueError("a bug")])
def test_another_error_of_a_role_ends_the_run(asked, error):
    with pytest.raises(type(error)):
        ace(reflector=Raising(error), epochs=1).compile(Desk(), trainset=rows(4))
    with pytest.raises(type(error)):  # where the whole was too long before
        ace(reflector=Small(Raising(error), 2), epochs=1).compile(Desk(), trainset=rows(4))


def test_an_answer_that_no_collector_holds_is_left_out(asked):
    role = Raising(LMCollectionLimitError("the answer is too long"))
    result = ace(reflector=role, epochs=1, track_stats=True).compile(Desk(), trainset=rows(4)).detailed_results
    assert len(result.failures) == 1


class Raising(dspy.Module):
    """A role that raises."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, **kwargs):
        raise self.error


def test_what_an_lm_said_is_taken_from_the_log(asked, tmp_path):
    lm = DummyLM([reflection([RULE]), operations(Add(section="Rules", text=RULE))])
    kwargs = {"reflection_lm": lm, "epochs": 1, "rounds": 1, "log_dir": tmp_path}
    first = ace(**kwargs).compile(Desk(), trainset=rows(4)).playbook.render()
    assert ace(**kwargs).compile(Desk(), trainset=rows(4)).playbook.render() == first
    assert len(lm.history) == 2


def test_the_curator_puts_bullets_into_the_predictor_s_sections():
    lm = DummyLM([operations(Add(section="Rules", text=RULE))])
    with dspy.context(lm=lm):
        found = Curator()(playbook=Playbook(), section="first / ", insights=[RULE], tokens_left=9)
    assert found.operations == [Add(section="first / Rules", text=RULE)]


# -- online ------------------------------------------------------------------------------------------------------------


def test_it_learns_while_it_serves(asked, tmp_path):
    file = tmp_path / "playbook.md"
    online = ace().online(Desk(), file)
    for row in rows(32):
        online.learn(row)
    assert score(online, rows(16, 100)) == 1
    again = ace().online(Desk(), file)
    assert again.playbook.render() == online.playbook.render()
    assert score(again, rows(16, 100)) == 1


def test_feedback_alone_teaches_without_metric_and_ground_truth(asked):
    online = ace(None).online(Desk())
    for row in rows(32):
        answer = online(**row.inputs())
        online.feedback(answer, 0.0, f"expected: {row.label}")
    assert score(online, rows(16, 100)) == 1
    with pytest.raises(ConfigError, match="no metric"):
        online.learn(rows(1)[0])
    with pytest.raises(DataError, match="none of the last"):
        online.feedback(dspy.Prediction(label="x"), 1.0)


def test_an_outage_of_a_judge_is_no_lesson(asked):
    def judge(gold, pred, trace=None):
        raise LMTransportError("the judge is out of reach")

    online = ace(judge).online(Desk())
    with pytest.raises(LMTransportError, match="out of reach"):
        online.learn(rows(1)[0])
    assert len(online.playbook) == 0


@pytest.fixture
def busy():
    """Threads take turns as often as Python lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_many_threads_lose_no_count(busy, asked):
    online = ace().online(ace().compile(Desk(), trainset=rows(32)))
    before = sum(bullet.helpful + bullet.harmful for bullet in online.playbook.bullets)
    online.program.set_lm(dspy.settings.lm)
    online.learner.program.set_lm(dspy.settings.lm)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(online.learn, rows(64, 500)))
    assert sum(bullet.helpful + bullet.harmful for bullet in online.playbook.bullets) == before + 64
    assert (
        online.program.sort.signature.instructions
        == Learner(ace(), online.program).told(online.playbook).sort.signature.instructions
    )


class Note(dspy.Module):
    """A Reflector that repeats the feedback."""

    def forward(self, task, playbook, section, records):
        return dspy.Prediction(insights=[each["Feedback"] for each in records], counts=[])


class Keep(dspy.Module):
    """A Curator that keeps every insight."""

    def forward(self, playbook, section, insights, tokens_left):
        return dspy.Prediction(operations=[Add(section="Notes", text=insight) for insight in insights])


def test_a_slow_thread_does_not_bring_back_an_old_playbook(asked, monkeypatch):
    online = ace(None, reflector=Note(), curator=Keep()).online(Desk())
    answers, instructions, pauses = [online(text="a"), online(text="b")], Learner.instructions, [0.3, 0.0]

    def slow(learner, playbook):
        found = instructions(learner, playbook)
        time.sleep(pauses.pop(0))
        return found

    monkeypatch.setattr(Learner, "instructions", slow)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(online.feedback, answers, [0.0, 0.0], ["note 0", "note 1"]))
    assert online.program.sort.signature.instructions.endswith("Notes:\n- note 0\n- note 1\n[End of playbook]")


def test_online_programs_are_saved_loaded_copied_and_called_async(asked, tmp_path):
    online = ace().online(ace().compile(Desk(), trainset=rows(32)))
    online.save(tmp_path / "online.json")
    fresh = ace().online(Desk())
    fresh.load(tmp_path / "online.json")
    assert fresh.playbook.render() == online.playbook.render()
    fresh.learn(rows(1, 900)[0])
    assert score(fresh, rows(16, 100)) == 1
    assert asyncio.run(fresh.acall(text="my password")).label == "access"
    copied = fresh.deepcopy()
    copied.learn(rows(1, 901)[0])
    assert copied.playbook.version == fresh.playbook.version + 1
    pickled = pickle.dumps(online.playbook)
    assert pickle.loads(pickled).render() == online.playbook.render()  # noqa: S301


NOTES = {"reflector": Note(), "curator": Keep()}


def noted(online):
    return [bullet.text for bullet in online.playbook.bullets]


@pytest.mark.parametrize("there", [False, True])
def test_workers_that_share_a_file_learn_from_each_other_and_lose_nothing(asked, tmp_path, there):
    file, start = tmp_path / "playbook.md", Playbook()
    start.apply([Add(section="Notes", text="start")])
    if there:
        start.save(file)
    one, other = (ace(None, playbook=start, **NOTES).online(Desk(), file) for _ in range(2))
    one.feedback(one(text="a"), 0.0, "note 1")
    other.feedback(other(text="b"), 0.0, "note 2")
    assert noted(other) == ["note 1", "note 2", "start"]
    assert "- note 1\n- note 2\n- start\n" in other.program.sort.signature.instructions
    one.feedback(one(text="c"), 0.0, "note 3")
    assert Playbook.load(file).render() == one.playbook.render()
    assert noted(one) == ["note 1", "note 2", "note 3", "start"]


def test_what_comes_in_from_another_worker_keeps_to_the_budget_and_says_nothing_twice(asked, tmp_path):
    file = tmp_path / "playbook.md"
    one, other = (
        ace(None, token_budget=len("Notes:\n- a 1\n- b 2"), count_tokens=len, **NOTES).online(Desk(), file)
        for _ in range(2)
    )
    for online, notes in ((one, ["a 1", "b 2"]), (other, ["A 1!", "c 3"])):
        for note in notes:
            online.feedback(online(text=note), 0.0, note)
    assert len(noted(other)) == 2
    assert len(other.playbook.prompt()) <= other.learner.ace.token_budget
    assert len({text.casefold()[:3] for text in noted(other)}) == 2
    assert Playbook.load(file).render() == other.playbook.render()


def in_letters(events):
    """A stream whose text comes letter by letter."""
    for event in events:
        if event.type == "delta":
            yield from (replace(event, delta=replace(event.delta, text=letter)) for letter in event.delta.text)
        else:
            yield event


def test_streams_and_traces_know_the_predictors_after_feedback_too(asked, monkeypatch):
    whole = Follower.stream
    monkeypatch.setattr(Follower, "stream", lambda engine, request: in_letters(whole(engine, request)))
    monkeypatch.setattr(Follower, "complete_legacy", None)  # DSPy's dummy does not stream over it
    student = Desk()
    before = student.dump_state()
    online = ace(None, **NOTES).online(student)
    program, predictor = online.program, online.program.sort
    stream = dspy.streamify(
        online,
        stream_listeners=[dspy.streaming.StreamListener(signature_field_name="label", allow_reuse=True)],
        async_streaming=False,
    )

    def heard(text):
        *pieces, answer = list(stream(text=text))
        assert pieces
        assert all(isinstance(piece, dspy.streaming.StreamResponse) for piece in pieces)
        return answer

    online.feedback(heard("a"), 0.0, "note 1")
    online.feedback(heard("b"), 0.0, "note 2")
    with dspy.context(trace=[]):
        online(text="c")
        [(traced, _, _)] = dspy.settings.trace
    assert "note 2" in asked[-1]
    assert traced is predictor
    assert online.program is program
    assert student.dump_state() == before


def test_an_lm_that_the_program_was_set_stays_after_feedback(asked):
    online = ace(None, **NOTES).online(Desk())
    online.set_lm(dspy.settings.lm)
    online.feedback(online(text="a"), 0.0, "note 1")
    assert online.get_lm() is dspy.settings.lm


def test_an_edited_file_stops_saving_and_nothing_is_lost(asked, tmp_path):
    file = tmp_path / "playbook.md"
    online = ace().online(ace().compile(Desk(), trainset=rows(32)), file)
    online.learn(rows(1, 900)[0])
    edited = file.read_text().replace("# Playbook", "# Playbook\n\n## Notes\n\n- Be kind.\n")
    file.write_text(edited)
    version = online.playbook.version
    with pytest.raises(DataError, match="edited by hand"):
        online.learn(rows(1, 901)[0])
    assert file.read_text() == edited
    assert online.playbook.version == version + 1
    assert "Be kind." in [bullet.text for bullet in ace().online(Desk(), file).playbook.bullets]


def test_a_caller_s_trace_sees_the_call(asked, caplog):
    caplog.set_level(logging.WARNING)
    online = ace().online(Desk())
    with dspy.context(trace=[]):
        online(text="x")
        assert len(dspy.settings.trace) == 1


# -- the seedling ------------------------------------------------------------------------------------------------------


def test_the_seedling_gains_from_a_playbook(example, make_lm):
    playbook = example("ace_playbook")
    signature, data = playbook.task(0, 100)
    train, test = data[:60], data[60:]
    program = dspy.Predict(signature)
    with dspy.context(lm=make_lm(max_tokens=32)):
        learned = ACE(playbook.metric, epochs=1, batch_size=20, num_threads=16).compile(program, trainset=train)
        before, after = (playbook.score(each, test, 16) for each in (program, learned))
    assert after >= before + 10
