"""``LoRALM(domain="auto")``: choosing by the question, and on the real engine."""

import pickle
from pathlib import Path

import dspy
import pytest
from dspy import lm15
from dspy.utils.exceptions import AdapterParseError

from dspy_lora import AdapterRegistry, LoRALM, load
from dspy_lora.auto import AutoRoute, question
from dspy_lora.demo import QUESTIONS
from dspy_lora.detection.classifier import DomainClassifier
from dspy_lora.errors import ChangedAdapterError

CLASSIFIER = DomainClassifier.packaged()
CLAUSE = QUESTIONS["legal"][0]
SURE = [name for name, asked in QUESTIONS.items() if CLASSIFIER.choose(asked[0]).domain == name]


def request(signature, demos=(), **inputs):
    messages = dspy.ChatAdapter().format(dspy.Signature(signature), list(demos), inputs)
    return lm15.Request(model="m", messages=tuple(lm15.Message.user(each["content"]) for each in messages))


@pytest.mark.parametrize("adapter", [dspy.ChatAdapter(), dspy.JSONAdapter(), dspy.XMLAdapter()])
def test_the_question_is_the_last_message_without_what_dspy_writes_around_it(adapter):
    demo = {"text": "an earlier row", "label": "x"}
    messages = adapter.format(dspy.Signature("text, note -> label"), [demo], {"text": CLAUSE, "note": "n"})
    asked = lm15.Request(model="m", messages=tuple(lm15.Message.user(each["content"]) for each in messages))
    assert question(asked).split() == [*CLAUSE.split(), "n"]


def test_a_text_that_asks_for_a_response_itself_is_read_whole():
    text = "Draft a letter.\n\nRespond with a contract clause on assignment.\n\nRespond with the corresponding words."
    assert question(request("text -> label", text=text)).split() == text.split()


def test_an_empty_question_goes_to_the_base():
    route = AutoRoute(CLASSIFIER, {None: "base", "legal": "base/legal@1"})
    assert route(request("text -> label", text="")) == "base"


def test_the_name_stays_when_the_base_comes_to_this_disk():
    before, after = ({None: f"lora/a/b@{base}", "legal": f"lora/a/b@{base}/legal@1"} for base in ("main", "0" * 12))
    assert AutoRoute(CLASSIFIER, before).ref == AutoRoute(CLASSIFIER, after).ref


def test_a_clear_question_goes_to_its_adapter_and_others_to_the_base():
    route = AutoRoute(CLASSIFIER, {None: "base", "legal": "base/legal@1"})
    assert route(request("text -> label", text=CLAUSE)) == "base/legal@1"
    assert route(request("text -> label", text="My card was swallowed by the machine")) == "base"  # no such adapter
    assert route(request("text -> label", text="What time is it?")) == "base"


def test_the_name_changes_with_the_adapters():
    one, other = ({None: "base", "legal": f"base/legal@{n}"} for n in (1, 2))
    assert AutoRoute(CLASSIFIER, one).ref == AutoRoute(CLASSIFIER, dict(one)).ref != AutoRoute(CLASSIFIER, other).ref


def test_the_name_changes_with_what_the_classifier_learned():
    texts = {"a": [f"the party shall pay {n}" for n in range(30)], "b": [f"my dog eats bone {n}" for n in range(30)]}
    one, swapped = DomainClassifier.train(texts), DomainClassifier.train({"a": texts["b"], "b": texts["a"]})
    models = {None: "base", "a": "base/a@1", "b": "base/b@1"}
    assert (one.domains, one.margin) == (swapped.domains, swapped.margin)
    assert AutoRoute(one, models).ref != AutoRoute(swapped, models).ref
    assert AutoRoute(one, models).ref == AutoRoute(DomainClassifier.train(texts), models).ref


def test_it_is_copied_pickled_and_left_as_any_other():
    lm = LoRALM(domain="auto")
    pickled = pickle.loads(pickle.dumps(lm))  # noqa: S301
    assert (lm.domain, lm.adapter) == ("auto", None)
    assert lm.copy(temperature=1.0).model == pickled.model == LoRALM(lm.model).model == lm.model
    assert lm.copy(domain="legal").domain == "legal"
    assert lm.copy(domain="legal").copy(domain="auto").model == lm.model
    assert LoRALM.load_state(lm.dump_state()).model == lm.model
    with pytest.raises(ChangedAdapterError, match="auto"):
        LoRALM.load_state(lm.dump_state() | {"model": lm.model[:-12] + "0" * 12})


def test_a_pickle_asks_for_the_adapters_it_was_made_with_whatever_was_published_since(tmp_path):
    """Its route names them; under a name that the engine does not know, the base would answer."""
    bundled, registry = AdapterRegistry(base="seedling"), AdapterRegistry(tmp_path, base="seedling")
    old = registry.publish(bundled.resolve("legal").path, "legal")
    lm = LoRALM("seedling", domain="auto", registry=tmp_path)
    pickled = pickle.dumps(lm)
    new = registry.publish(bundled.resolve("financial").path, "legal")
    lm.engine.adapters.clear()  # as in another process
    again = pickle.loads(pickled)  # noqa: S301
    assert again._auto.models["legal"] == lm.model_string(old.ref) != lm.model_string(new.ref)
    assert set(again._auto.models.values()) <= again.engine.adapters.keys()
    assert Path(again.engine.adapters[lm.model_string(old.ref)].path) == old.path
    assert again.engine.adapters[lm.model_string(None)] is None


def test_a_classifier_of_the_users_own(tmp_path):
    texts = {
        "legal": [f"the party shall pay clause {n}" for n in range(30)],
        "pets": [f"my dog eats bone {n}" for n in range(30)],
    }
    DomainClassifier.train(texts).save(tmp_path)
    lm = LoRALM(domain="auto", classifier=tmp_path)
    assert lm.dump_state()["classifier"] == str(tmp_path)
    assert lm.model != LoRALM(domain="auto").model
    assert set(lm._auto.models) == {None, "legal"}


@pytest.mark.timeout(600)
def test_one_lm_answers_every_domain_as_its_own_adapter_does(make_lm, tmp_path):
    assert len(SURE) >= 9
    program = dspy.Predict("text -> label")
    program.lm = auto = make_lm("auto", max_tokens=64)

    def label(lm, text):
        try:
            with dspy.context(lm=lm):
                return dspy.Predict("text -> label")(text=text).label
        except AdapterParseError as exc:
            return exc.lm_response

    for name in SURE:
        text = QUESTIONS[name][0]
        assert label(auto, text) == label(make_lm(name, max_tokens=64), text), name
        assert f"/{name}@" in auto.history[-1]["response_model"]
    assert label(auto, "What time is it?") == label(make_lm(max_tokens=64), "What time is it?")
    program.save(tmp_path / "program.json")
    again = load(dspy.Predict("text -> label"), tmp_path / "program.json")
    assert again(text=CLAUSE).label == program(text=CLAUSE).label
    pieces = list(dspy.streamify(program, async_streaming=False)(text=CLAUSE))
    assert pieces[-1].label == program(text=CLAUSE).label
