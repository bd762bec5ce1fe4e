"""LoRARouter: which adapter answers, and that every prediction says so. A dummy LM stands for each adapter."""

import argparse
import asyncio
import copy
import dataclasses
import json

import dspy
import pytest
from dspy.utils import DummyLM

from dspy_lora import cli, pipeline, route_command, router
from dspy_lora.detection.classifier import DomainClassifier
from dspy_lora.errors import ConfigError, DataError, UnknownAdapterError
from dspy_lora.lm import LoRALM
from dspy_lora.router import LoRARouter, Route

GARDEN = "when do I prune the rose and the hedge"
KITCHEN = "simmer the garlic in a saucepan with butter"
HARBOUR = "drop the anchor and wait for the tide at the quay"
ABOUT = {
    "garden": "rose, tulip, hedge, compost, seedling, prune, soil, lawn, weed, orchard",
    "kitchen": "saucepan, recipe, oven, flour, whisk, butter, simmer, garlic, roast, pastry",
    "harbour": "anchor, tide, mooring, sail, crew, cargo, lighthouse, quay, vessel, rope",
}
MARGIN = 0.3


@pytest.fixture(scope="module")
def classifier():
    return DomainClassifier.train(ABOUT)


class Answering(DummyLM):
    """Answers each call with its adapter's name, and in a rollout with that and its temperature."""

    def __init__(self, domain, fields=("answer",)):
        super().__init__({"": dict.fromkeys(fields, f"from {domain or 'base'}")})
        self.domain = domain

    def _format_answer_fields(self, fields):
        if (rollout := self.kwargs.get("rollout_id")) is not None:
            fields = {name: f"{text}, {rollout} at {self.kwargs['temperature']}" for name, text in fields.items()}
        return super()._format_answer_fields(fields)


@pytest.fixture
def made():
    return []


@pytest.fixture
def make_lm(made):
    def make(domain, **kwargs):
        made.append((domain, kwargs))
        return Answering(domain, ("answer", "reasoning", "first", "second"))

    return make


@pytest.fixture
def make(classifier, make_lm):
    def make(program=None, adapters=("garden", "kitchen"), threshold=MARGIN, **kwargs):
        return LoRARouter(adapters, program, classifier, threshold, make_lm=make_lm, **kwargs)

    return make


class TwoSteps(dspy.Module):
    def __init__(self):
        super().__init__()
        self.first = dspy.Predict("question -> first")
        self.second = dspy.Predict("question, first -> second")

    def forward(self, question):
        first = self.first(question=question).first
        return dspy.Prediction(first=first, second=self.second(question=question, first=first).second)


# -- deciding ----------------------------------------------------------------------------------------------------------


def test_a_query_goes_to_the_adapter_of_its_domain(make):
    route = make().select_adapter(GARDEN)
    assert (route.adapter, route.by) == ("garden", "classifier")
    assert MARGIN < route.probability <= 1
    assert route.runner_up in {"kitchen", "harbour"}
    assert "garden" in route.reason


def test_a_query_below_the_margin_goes_to_the_base_model(make):
    route = make(threshold=0.9999).select_adapter("rose garlic")
    assert route.adapter is None
    assert "left to the base model" in route.reason


def test_a_domain_without_an_adapter_goes_to_the_base_model(make):
    route = make().select_adapter(HARBOUR)
    assert route.adapter is None
    assert "no adapter for harbour here" in route.reason


@pytest.mark.parametrize("query", ["", " \n ", None])
def test_an_empty_query_is_an_error(make, query):
    with pytest.raises(DataError, match="the query is"):
        make().select_adapter(query)


# -- running -----------------------------------------------------------------------------------------------------------


def test_the_adapter_answers_and_the_prediction_says_so(make):
    prediction = make().route_and_execute(query=KITCHEN, auto_detect_domain=True)
    assert prediction.answer == "from kitchen"
    assert prediction.route.adapter == "kitchen"
    assert "kitchen" in prediction.route.reason


def test_without_detection_the_base_model_answers(make):
    prediction = make().route_and_execute(query=KITCHEN, auto_detect_domain=False)
    assert prediction.answer == "from base"
    assert prediction.route == Route(None, "caller", "asked not to detect a domain: the base model")


def test_the_caller_names_the_adapter(make):
    router = make()
    prediction = router.execute_with_adapter(query=KITCHEN, adapter="garden")
    assert (prediction.answer, prediction.route.by) == ("from garden", "caller")
    assert router.execute_with_adapter(query=KITCHEN, adapter=None).answer == "from base"
    with pytest.raises(UnknownAdapterError, match="Did you mean 'garden'"):
        router.execute_with_adapter(query=KITCHEN, adapter="gardn")
    with pytest.raises(DataError, match="the query is ''"):
        router.execute_with_adapter(query="", adapter="garden")


def test_one_call_decides_once_for_all_predictors(make, classifier, monkeypatch):
    asked = []
    choose = DomainClassifier.choose
    monkeypatch.setattr(DomainClassifier, "choose", lambda self, *args: asked.append(args) or choose(self, *args))
    prediction = make(TwoSteps()).route_and_execute(query=GARDEN)
    assert (prediction.first, prediction.second) == ("from garden", "from garden")
    assert len(asked) == 1


def test_a_router_is_called_as_its_program(make):
    router = make(TwoSteps())
    assert router(question=KITCHEN).second == "from kitchen"
    example = dspy.Example(question=GARDEN, second="from garden").with_inputs("question")
    evaluate = dspy.Evaluate(devset=[example], metric=lambda gold, got, trace=None: gold.second == got.second)
    assert evaluate(router).score == 100


def test_the_program_is_chain_of_thought_with_context(make):
    router = make(dspy.ChainOfThought("context, question -> answer"), input_field="question")
    assert router.route_and_execute(query=GARDEN, context="a long day").answer == "from garden"


def test_which_input_the_query_is_must_be_clear(make):
    router = make(dspy.Predict("context, question -> answer"))
    with pytest.raises(ConfigError, match="input_field"):
        router.route_and_execute(query=GARDEN, context="x")
    assert router(question=GARDEN, context="the lawn").answer == "from garden"


def test_the_programs_own_prediction_is_not_marked(make):
    with dspy.context(trace=[]):
        make().route_and_execute(query=GARDEN)
        assert "route" not in dspy.settings.trace[0][2]


def test_several_completions_are_kept(make):
    router = make(dspy.Predict("query -> answer", n=2, temperature=1.0))
    assert router.route_and_execute(query=GARDEN).completions.answer == ["from garden"] * 2


def test_an_output_called_route_is_refused(classifier):
    router = LoRARouter(
        ["garden"],
        dspy.Predict("query -> route"),
        classifier,
        make_lm=lambda domain: Answering(domain, ("route",)),
    )
    with pytest.raises(ConfigError, match="output 'route'"):
        router(query=GARDEN)


def test_a_batch_is_answered_each_by_its_own(make):
    examples = [dspy.Example(query=query).with_inputs("query") for query in (GARDEN, KITCHEN, HARBOUR) * 4]
    answers = [prediction.answer for prediction in make().batch(examples, num_threads=6, disable_progress_bar=True)]
    assert answers == ["from garden", "from kitchen", "from base"] * 4


async def test_async_calls_side_by_side(make):
    router = make()
    found = await asyncio.gather(*(router.acall(query=query) for query in (GARDEN, KITCHEN, HARBOUR) * 3))
    assert [prediction.answer for prediction in found] == ["from garden", "from kitchen", "from base"] * 3
    assert (await router.aexecute_with_adapter(query=GARDEN, adapter="kitchen")).answer == "from kitchen"
    assert (await router.aroute_and_execute(query=GARDEN)).route.adapter == "garden"


@pytest.mark.parametrize("is_async", [False, True])
async def test_streaming_ends_with_a_prediction_that_says_who_answered(make, is_async):
    stream = dspy.streamify(make(), is_async_program=is_async)
    items = [item async for item in stream(query=GARDEN)]
    assert items[-1].answer == "from garden"
    assert items[-1].route.adapter == "garden"


# -- its LMs as DSPy gets and sets them --------------------------------------------------------------------------------


class Other(DummyLM):
    """Another model."""

    def __init__(self):
        super().__init__({"": {"answer": "from another"}})
        self.model = "another"


def second_rollout(args, prediction):
    return float(prediction.answer.endswith(", 2 at 1.0"))


@pytest.mark.parametrize("settings_lm", [None, Other()])
def test_best_of_n_samples_from_the_adapter(make, settings_lm):
    with dspy.context(lm=settings_lm):
        found = dspy.BestOfN(make(), N=3, reward_fn=second_rollout, threshold=1.0)(query=GARDEN)
    assert (found.answer, found.route.adapter) == ("from garden, 2 at 1.0", "garden")


def test_refine_samples_from_the_adapter_and_its_hints_arrive(make):
    adviser = DummyLM([{"discussion": "too short", "advice": '{"program": "be longer"}'}] * 2)
    hints = []
    watch = dspy.ChatAdapter.format

    def format(self, signature, demos, inputs):
        hints.append(inputs.get("hint_"))
        return watch(self, signature, demos, inputs)

    with pytest.MonkeyPatch.context() as patch, dspy.context(lm=adviser):
        patch.setattr(dspy.ChatAdapter, "format", format)
        refine = dspy.Refine(make(), N=3, reward_fn=second_rollout, threshold=1.0)
        assert refine(query=KITCHEN).answer == "from kitchen, 2 at 1.0"
    assert hints[-1] == "be longer"


def test_what_a_copy_of_the_base_models_lm_changes_goes_to_every_adapter_until_it_is_undone(make):
    own = Answering("garden")
    own.kwargs["max_tokens"] = 7
    router = make(adapters={"garden": own, "kitchen": "kitchen"})
    router.set_lm(router.get_lm().copy(rollout_id=5, temperature=0.5, top_p=0.9, cache=False))
    assert router(query=GARDEN).answer == "from garden, 5 at 0.5"
    assert router(query=HARBOUR).answer == "from base, 5 at 0.5"
    taken = router.adapters["garden"]
    assert (taken.kwargs["max_tokens"], taken.kwargs["top_p"], taken.cache) == (7, 0.9, False)
    assert router.get_lm().kwargs["rollout_id"] == 5
    assert router.uncached()(query=GARDEN).answer == "from garden, 5 at 0.5"
    assert copy.deepcopy(router)(query=KITCHEN).answer == "from kitchen, 5 at 0.5"
    router.set_lm(router.get_lm().copy(rollout_id=None, temperature=0.25))
    assert router.adapters["garden"].kwargs == {"temperature": 0.25, "max_tokens": 7, "top_p": 0.9}
    router.set_lm(None)
    assert router.adapters["garden"] is own
    assert router(query=GARDEN).answer == "from garden"


def test_a_rollout_brings_its_temperature_to_adapters_that_had_another(make):
    router = make()
    router._base_lm.kwargs["temperature"] = 1.0
    router.set_lm(router.get_lm().copy(rollout_id=1, temperature=1.0))
    assert router(query=GARDEN).answer == "from garden, 1 at 1.0"


def test_loralms_stay_with_their_adapters_in_other_settings_and_one_of_an_adapter_is_another_lm():
    router = LoRARouter(["legal", "financial"])
    models = {name: lm.model for name, lm in router.adapters.items()}
    router.set_lm(LoRALM(rollout_id=3, temperature=1.0))
    assert {name: lm.model for name, lm in router.adapters.items()} == models
    assert [lm.kwargs["rollout_id"] for lm in router.adapters.values()] == [3, 3]
    router.set_lm(router.get_lm().copy(num_retries=9))
    assert [lm.num_retries for lm in router.adapters.values()] == [9, 9]
    for other in (LoRALM(domain="legal"), LoRALM(api_base="http://127.0.0.1:9/v1")):
        router.set_lm(other)
        assert router.get_lm() is other
    router.set_lm(None)
    assert router.get_lm().domain is None


def test_another_lm_takes_every_predictor_and_the_route_says_so(make):
    router, other = make(), Other()
    router.set_lm(router.get_lm().copy(temperature=0.5))
    base = router.get_lm()
    router.set_lm(other)
    assert router.get_lm() is other
    found = router(query=GARDEN)
    assert found.answer == "from another"
    assert found.route.reason.endswith("; self keep LMs of their own")
    router.set_lm(base)
    assert router(query=GARDEN).answer == "from garden"
    router.set_lm(other)
    router.set_lm(None)
    assert router(query=GARDEN).answer == "from garden"


def test_a_program_with_the_base_models_lm_for_its_own_keeps_to_it_in_best_of_n(make):
    router = make()
    router.program.lm = router.get_lm()
    assert dspy.BestOfN(router, N=3, reward_fn=second_rollout, threshold=1.0)(query=GARDEN).answer == (
        "from base, 2 at 1.0"
    )


def test_no_one_lm_is_got_where_predictors_have_lms_of_their_own(make):
    program = TwoSteps()
    program.second.lm = Answering("own", ("second",))
    router = make(program)
    with pytest.raises(ConfigError, match=r"`set_lm\(None\)` leaves all"):
        router.get_lm()
    router.set_lm(None)
    assert dspy.BestOfN(router, N=2, reward_fn=lambda args, found: 1.0, threshold=1.0)(question=GARDEN).second == (
        "from garden, 0 at 1.0"
    )


def test_settings_of_the_lms_are_no_part_of_the_saved_state(make, tmp_path):
    router = make()
    router.set_lm(router.get_lm().copy(rollout_id=5, temperature=0.5))
    router.save(tmp_path / "router.json")
    fresh = make()
    fresh.load(tmp_path / "router.json")
    assert fresh(query=GARDEN).answer == "from garden"


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_evaluations_are_written_with_their_routes(chat, tmp_path, kind):
    _, history = turn(chat, GARDEN, dspy.History(messages=[]))
    example = dspy.Example(question=KITCHEN, history=history).with_inputs("question", "history")
    path = tmp_path / f"rows.{kind}"
    dspy.Evaluate(devset=[example], metric=lambda gold, got, trace=None: 1.0, **{f"save_as_{kind}": str(path)})(chat)
    if kind == "json":
        (row,) = json.loads(path.read_text())
        assert row["route"] == dataclasses.asdict(chat(question=KITCHEN, history=history).route)
    assert "the conversation is with garden" in path.read_text()


# -- conversations -----------------------------------------------------------------------------------------------------


CHAT = "question, history: dspy.History -> answer"


@pytest.fixture
def chat(make):
    return make(dspy.Predict(CHAT))


def turn(chat, text, history, **kwargs):
    prediction = chat.route_and_execute(query=text, history=history, **kwargs)
    return prediction, dspy.History(messages=[*history.messages, {"question": text, **prediction}])


def test_a_conversation_stays_with_its_adapter(chat):
    first, history = turn(chat, GARDEN, dspy.History(messages=[]))
    second, history = turn(chat, "and what about " + KITCHEN, history)
    assert (first.route.by, second.route.by) == ("classifier", "history")
    assert second.answer == "from garden"
    moved, history = turn(chat, KITCHEN, history, keep_adapter=False)
    assert moved.answer == "from kitchen"
    assert turn(chat, GARDEN, history)[0].answer == "from kitchen"
    named = chat.execute_with_adapter(query=GARDEN, adapter="garden", history=history)
    assert named.answer == "from garden"


def test_a_conversation_without_marks_stays_with_its_first_domain(chat):
    messages = [{"question": "hello there", "answer": "hi"}, {"question": GARDEN, "answer": "in march"}]
    route = chat.route_and_execute(query=KITCHEN, history=dspy.History(messages=messages)).route
    assert (route.adapter, route.by) == ("garden", "history")


def test_a_conversation_with_the_base_model_is_still_open(chat):
    first, history = turn(chat, HARBOUR, dspy.History(messages=[]))
    assert first.answer == "from base"
    assert turn(chat, KITCHEN, history)[0].route.by == "classifier"


def test_marks_survive_json(chat):
    _, history = turn(chat, GARDEN, dspy.History(messages=[]))
    read = dspy.History(messages=json.loads(history.model_dump_json())["messages"])
    assert turn(chat, KITCHEN, read)[0].route.by == "history"


def test_the_mark_does_not_reach_the_prompt(chat):
    _, history = turn(chat, GARDEN, dspy.History(messages=[]))
    turn(chat, KITCHEN, history)
    prompt = json.dumps(chat.adapters["garden"].history[-1]["messages"])
    assert GARDEN in prompt
    assert "classifier" not in prompt


# -- what it is made of ------------------------------------------------------------------------------------------------


def test_adapters_are_names_references_or_lms(make, made):
    own = Answering("mine")
    router = make(adapters={"garden": "garden@0123456789ab", "kitchen": own}, registry="somewhere")
    assert made == [(None, {"registry": "somewhere"}), ("garden@0123456789ab", {"registry": "somewhere"})]
    assert router.adapters["kitchen"] is own
    assert router(query=KITCHEN).answer == "from mine"


def test_a_folder_is_published_under_the_domains_name(make, made, monkeypatch, tmp_path):
    published = []

    class Registry:
        def __init__(self, root):
            self.root = root

        def publish(self, source, name, base):
            published.append((self.root, source, name, base))
            return type("Revision", (), {"ref": f"{name}@0123456789ab"})

    monkeypatch.setattr("dspy_lora.router.AdapterRegistry", Registry)
    make(adapters={"garden": "adapters/garden_lora", "kitchen": tmp_path})
    assert published == [
        (None, "adapters/garden_lora", "garden", None),
        (None, tmp_path, "kitchen", None),
    ]
    assert [domain for domain, _ in made] == [None, "garden@0123456789ab", "kitchen@0123456789ab"]


@pytest.mark.parametrize("adapters", [[], {}, "garden"])
def test_no_adapters_is_an_error(make, adapters):
    with pytest.raises(ConfigError, match="Give a list of names"):
        make(adapters=adapters)


def test_an_adapter_of_an_unknown_domain_is_an_error(make):
    with pytest.raises(ConfigError, match=r"no domain 'gardn'\. Did you mean 'garden'.*classifier\.add"):
        make(adapters=["gardn"])


def test_the_default_classifier_is_the_packaged_one(make_lm):
    router = LoRARouter(["legal", "financial"], make_lm=make_lm)
    query = "This Agreement shall be governed by the laws of the State of Delaware."
    assert router.route_and_execute(query=query).answer == "from legal"


def test_an_unknown_adapter_of_the_registry_is_an_error_when_the_router_is_made(classifier, tmp_path):
    with pytest.raises(UnknownAdapterError, match="no adapter 'garden'"):
        LoRARouter(["garden"], classifier=classifier, registry=tmp_path)


def test_predictors_with_lms_of_their_own_are_named(make, caplog):
    program = TwoSteps()
    program.second.lm = Answering("own", ("second",))
    prediction = make(program)(question=GARDEN)
    assert (prediction.first, prediction.second) == ("from garden", "from own")
    assert "second have LMs of their own" in caplog.text
    assert prediction.route.reason.endswith("; self.second keep LMs of their own")


def test_a_program_that_returns_no_prediction_is_an_error(make):
    class Bare(dspy.Module):
        def forward(self, query):
            return query

    with pytest.raises(ConfigError, match="returned str"):
        make(Bare())(query=GARDEN)


def test_copies_and_saved_state(make, tmp_path):
    router = make()
    router.program.signature = router.program.signature.with_instructions("Answer shortly.")
    copied = copy.deepcopy(router)
    assert copied(query=GARDEN).answer == "from garden"
    assert copied.classifier is router.classifier
    router.save(tmp_path / "router.json")
    fresh = make()
    fresh.load(tmp_path / "router.json")
    assert fresh.program.signature.instructions == "Answer shortly."


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def route(capsys):
    def route(*words):
        parser = argparse.ArgumentParser()
        route_command.add_arguments(parser)
        assert route_command.run(parser.parse_args(words)) == 0
        return capsys.readouterr().out

    return route


@pytest.fixture
def own_domains(tmp_path, monkeypatch):
    """Three domains of a user: two with rows, in a column of another name for one, and one with a task alone."""
    domains = {"garden": {"input_field": "query", "data": "plants"}, "kitchen": {"data": "food"}, "harbour": {}}
    tasks = {name: {"task": ABOUT[name], **rest} for name, rest in domains.items()}
    (tmp_path / "lora_config.yaml").write_text(json.dumps({"domains": tasks}))
    monkeypatch.chdir(tmp_path)
    for name, folder, field in (("garden", "plants", "query"), ("kitchen", "food", "text")):
        (tmp_path / folder).mkdir()
        words = ABOUT[name].split(", ")
        rows = [json.dumps({field: f"how do I {one} the {other}"}) for one in words for other in words]
        for split in ("train", "test"):
            (tmp_path / folder / f"{split}.jsonl").write_text("\n".join(rows))
    return tmp_path


def test_route_prints_a_choice_for_each_query(route):
    lines = route("replace cracked windscreen on cab", "play some jazz in the living room please").splitlines()
    assert [line.split("\t")[0] for line in lines] == ["manufacturing", "none"]
    assert "next" in lines[0].split("\t")[2]


def test_route_trains_saves_and_measures(route, own_domains):
    saved = own_domains / "mine"
    own = ("--domain", *reversed(ABOUT))
    printed = route(HARBOUR, "--train", str(saved), *own, "--evaluate", "--data-root", str(own_domains))
    assert "harbour: a description" in printed
    assert DomainClassifier.load(saved).domains == ("kitchen", "garden", "harbour")
    assert f"harbour\t{HARBOUR}" in printed
    (accuracy,) = [line.split()[1] for line in printed.splitlines() if line.startswith("accuracy")]
    assert float(accuracy) >= 0.97
    assert "microseconds a query" in printed
    again = route("--classifier", str(saved), "--evaluate", "--data-root", str(own_domains))
    assert accuracy in again


class Later(dspy.Module):
    """Answers async calls alone."""

    def __init__(self):
        super().__init__()
        self.ask = dspy.Predict("clause -> kind")

    async def aforward(self, clause):
        return await self.ask.acall(clause=clause)


def test_the_input_of_a_program_that_is_async_alone():
    assert router._only_input(Later()) == "clause"
    assert pipeline._has_input(Later(), "clause")
    with pytest.raises(ConfigError, match="neither forward nor aforward"):
        router.parameters(dspy.Module())


def test_route_needs_something_to_do(route):
    with pytest.raises(ConfigError, match="give a query"):
        route()
    with pytest.raises(ConfigError, match="--data-root"):
        route("--evaluate")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--evaluate", "--answers", "-1"], "--answers -1: rows"),
        (["--evaluate", "--growth", "20", "1"], "--growth 1: a classifier"),
        (["--evaluate", "--domain", "garden"], "--domain garden says what to train on: give --train"),
        (["How do I prune it?", "--answers", "5"], "--answers and --growth say what to measure: give --evaluate"),
        (["How do I prune it?", "--growth", "20"], "--answers and --growth say what to measure: give --evaluate"),
        (["--train", "mine", "--classifier", "mine"], "give one of them"),
        (["--train", "mine", "--domain", "garden", "kitchn"], "Did you mean 'kitchen'"),
    ],
)
def test_route_refuses_flags_before_it_works(capsys, own_domains, words, message):
    assert cli.main(["route", *words, "--data-root", "."]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert message in error


def test_a_missed_bar_is_shown(route, own_domains):
    route("--train", str(own_domains / "mine"), "--domain", "garden", "kitchen", "--data-root", str(own_domains))
    printed = route(
        "--classifier", str(own_domains / "mine"), "--evaluate", "--data-root", str(own_domains), "--threshold", "1.1"
    )
    (line,) = [line for line in printed.splitlines() if line.startswith("accuracy")]
    assert line.split()[1] == "0.0000"
    assert line.endswith("missed")


def test_the_packaged_classifier_reaches_its_bars(route, data_root):
    printed = route("--evaluate", "--data-root", str(data_root))
    assert " missed" not in printed
    assert "queries from other sources" in printed
