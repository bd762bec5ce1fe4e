"""DomainPipeline: the stages of a query, each alone and together. A dummy LM stands for each adapter."""

import asyncio
import dataclasses
import json
import re

import dspy
import pytest
from dspy.clients.engines.dummy_engine import AsyncDummyEngine, DummyEngine
from dspy.lm15 import StreamDeltaEvent, TextDelta
from dspy.utils import DummyLM
from dspy_lora.optimizers.ace import ACE

from dspy_lora.context.assemble import ContextAssembler
from dspy_lora.context.sources import Bullets, Passages, Source
from dspy_lora.detection.classifier import DomainClassifier
from dspy_lora.errors import ConfigError, DataError
from dspy_lora.pipeline import DomainPipeline

GARDEN = "when do I prune the rose and the hedge"
KITCHEN = "simmer the garlic in a saucepan with butter"
ABOUT = {
    "garden": "rose, tulip, hedge, compost, seedling, prune, soil, lawn, weed, orchard",
    "kitchen": "saucepan, recipe, oven, flour, whisk, butter, simmer, garlic, roast, pastry",
}
COMPILED = "Answer in the domain's own words."


class Engine(DummyEngine):
    """Answers with its adapter's name, whether the prompt was a compiled one and had context, and its rollout."""

    complete_legacy = None  # a shortcut of DSPy's that does not stream

    def __init__(self, owner, domain):
        super().__init__(owner)
        self.domain = domain

    def _complete_messages(self, messages):
        told = "".join(message["content"] for message in messages)
        marks = [name for name, sign in (("compiled", COMPILED), ("ctx", "[1]")) if sign in told]
        marks += [str(self.owner.kwargs["rollout_id"])] if "rollout_id" in self.owner.kwargs else []
        self.owner.answers = {"": dict.fromkeys(("reasoning", "answer"), " ".join([self.domain or "base", *marks]))}
        return super()._complete_messages(messages)

    def stream(self, request):
        """The answer in pieces of four characters."""
        for event in super().stream(request):
            text = event.delta.text if isinstance(event, StreamDeltaEvent) else ""
            pieces = [TextDelta(text=text[i : i + 4], part_index=0) for i in range(0, len(text), 4)]
            yield from (StreamDeltaEvent(delta=piece) for piece in pieces) if pieces else [event]


class AsyncEngine(AsyncDummyEngine):
    complete_legacy = None


def answering(domain, **kwargs):
    lm = DummyLM([])
    lm.kwargs |= kwargs
    lm._engine_spec = Engine(lm, domain)
    lm._async_engine_spec = AsyncEngine(lm._engine_spec)
    lm.copy = lambda cache=True, **changed: answering(domain, **kwargs | changed)
    return lm


@dataclasses.dataclass
class Fixed:
    text: str = "[1] A rose is pruned in March."
    tokens: int = 9

    def summary(self):
        return "1 passage"


class Remembering:
    """A context that remembers what it was asked."""

    def __init__(self, given=None):
        self.given, self.asked = given or Fixed(), []

    def __call__(self, query, *, history=None):
        self.asked.append((query, history))
        return self.given

    async def acall(self, query, *, history=None):
        return self(query, history=history)


def compiled(signature="query -> answer"):
    return dspy.Predict(dspy.Signature(signature, COMPILED))


@pytest.fixture(scope="module")
def classifier():
    return DomainClassifier.train(ABOUT)


@pytest.fixture
def make(classifier):
    def make(program=None, **kwargs):
        return DomainPipeline(
            ["garden", "kitchen"],
            program,
            classifier=classifier,
            threshold=0.3,
            make_lm=answering,
            **kwargs,
        )

    return make


def test_every_stage_takes_part_and_is_named(make):
    pipeline = make(compiled={"garden": compiled()}, context=Remembering())
    found = pipeline(query=GARDEN)
    assert found.answer == "garden compiled ctx"
    assert found.route.adapter == "garden"
    assert [(step.stage, step.choice) for step in found.steps][:3] == [
        ("route", "garden"),
        ("prompts", "compiled for garden"),
        ("context", "instruction"),
    ]
    assert found.steps[3].stage == "answer"
    assert found.steps[2].tokens == 9
    assert all(step.seconds >= 0 for step in found.steps)


def test_a_domain_without_prompts_of_its_own_runs_the_program_as_written(make):
    found = make(compiled={"garden": compiled()})(query=KITCHEN)
    assert found.answer == "kitchen"
    assert found.steps[1].choice == "as written"


def test_one_compiled_program_serves_all(make):
    assert make(compiled=compiled())(query=KITCHEN).answer == "kitchen compiled"


def test_context_goes_into_the_input_of_that_name_and_the_program_stays_as_it_was(make):
    program = dspy.Predict("context, query -> answer")
    found = make(program, context=Remembering())(query=GARDEN)
    assert found.answer == "garden ctx"
    assert found.steps[2].choice == "input 'context'"
    plain = dspy.Predict("query -> answer")
    before = plain.signature.instructions
    make(plain, context=Remembering())(query=GARDEN)
    assert plain.signature.instructions == before


def test_an_assembler_is_a_context(make):
    sources = [Passages(lambda query: ["A rose is pruned in March."]), Source("broken", lambda query: 1 / 0)]
    found = make(context=ContextAssembler(sources, mark="[1] "))(query=GARDEN)
    assert found.answer == "garden ctx"
    assert found.steps[2].reason == "1 of passages; 1 of broken left out (failed)"
    assert found.steps[2].tokens > 0


def test_no_context_is_said(make):
    found = make(context=Remembering(Fixed("", 0)))(query=GARDEN)
    assert found.answer == "garden"
    assert found.steps[2].choice == "none"


def test_a_conversation_goes_to_the_program_or_else_to_the_context(make):
    turn = {"query": GARDEN, "answer": "in March", "route": None, "steps": []}
    history, passages = dspy.History(messages=[turn]), Remembering()
    make(dspy.Predict("history: dspy.History, query -> answer"), context=passages)(query="the tulip?", history=history)
    make(context=passages)(query="the tulip?", history=history)
    assert [asked[1] and asked[1].messages for asked in passages.asked] == [
        None,
        [{"query": GARDEN, "answer": "in March"}],
    ]


class Retrieving(dspy.Module):
    """Fills its predictor's context by itself."""

    def __init__(self):
        super().__init__()
        self.answer = dspy.Predict("context, query -> answer")

    def forward(self, query):
        return self.answer(context="its own", query=query)


def test_a_program_that_brings_its_own_context_is_told_more_in_the_instruction(make):
    found = make(Retrieving(), context=Remembering())(query=GARDEN)
    assert found.answer == "garden ctx"
    assert found.steps[2].choice == "instruction"


@pytest.mark.parametrize(
    ("stages", "answer"),
    [
        ((), "base"),
        (("adapter",), "garden"),
        (("prompts",), "base compiled"),
        (("adapter", "prompts", "context"), "garden compiled ctx"),
    ],
)
def test_stages_are_switched_off(make, stages, answer):
    pipeline = make(compiled={"garden": compiled()}, context=Remembering())
    assert pipeline.with_stages(*stages)(query=GARDEN).answer == answer
    assert pipeline(query=GARDEN).answer == "garden compiled ctx"  # the pipeline itself is unchanged


def test_predictors_with_lms_of_their_own_keep_them_while_adapters_are_in_use(make):
    own = compiled()
    own.lm = answering("own")
    pipeline = make(compiled=own)
    assert pipeline(query=GARDEN).answer == "own compiled"
    assert pipeline.with_stages("prompts")(query=GARDEN).answer == "base compiled"
    assert pipeline(query=GARDEN).answer == "own compiled"


def test_async_and_threads(make):
    pipeline = make(compiled={"garden": compiled()}, context=Remembering())
    assert asyncio.run(pipeline.acall(query=GARDEN)).answer == "garden compiled ctx"
    rows = [dspy.Example(query=each).with_inputs("query") for each in (GARDEN, KITCHEN) * 5]
    answers = [found.answer for found in pipeline.batch(rows, num_threads=4)]
    assert answers == ["garden compiled ctx", "kitchen ctx"] * 5


class Drafting(dspy.Module):
    def __init__(self):
        super().__init__()
        self.draft = dspy.Predict("query -> reasoning")
        self.write = dspy.ChainOfThought("query, draft -> answer")

    def forward(self, query):
        return self.write(query=query, draft=self.draft(query=query).reasoning)

    async def aforward(self, query):
        return await self.write.acall(query=query, draft=(await self.draft.acall(query=query)).reasoning)


PROGRAMS = [
    pytest.param(lambda: dspy.Predict("query -> answer"), id="Predict"),
    pytest.param(lambda: dspy.ChainOfThought("query -> answer"), id="ChainOfThought"),
    Drafting,
]


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("program", PROGRAMS)
async def test_an_answer_with_context_is_streamed(make, program, given, is_async):
    pipeline = make(program(), context=Remembering())
    predictor = pipeline.router.program.predictors()[-1]
    listener = dspy.streaming.StreamListener("answer", predict=predictor if given else None)
    stream = dspy.streamify(pipeline, stream_listeners=[listener], is_async_program=is_async)
    items = [item async for item in stream(query=GARDEN)]
    pieces = [item.chunk for item in items if isinstance(item, dspy.streaming.StreamResponse)]
    assert len(pieces) > 1
    assert "".join(pieces) == items[-1].answer == "garden ctx"


@pytest.mark.parametrize("program", PROGRAMS)
def test_few_shot_demos_are_found_in_a_pipeline_with_context(make, program):
    pipeline = make(program(), context=Remembering())
    rows = [dspy.Example(query=GARDEN, answer="garden ctx").with_inputs("query")]
    found = dspy.BootstrapFewShot(
        metric=lambda row, found, trace=None: row.answer == found.answer, max_labeled_demos=0
    ).compile(pipeline, trainset=rows)
    assert [demo.augmented for each in found.predictors() for demo in each.demos] == [True] * len(found.predictors())
    assert "[1]" not in str(found.predictors())


def test_an_adapter_that_takes_its_arguments_by_name_is_told_the_context_too(make):
    class Named(dspy.ChatAdapter):
        def __call__(self, lm, **named):
            return super().__call__(lm, **named)

    with dspy.context(adapter=Named()):
        assert make(dspy.Predict("query -> answer"), context=Remembering())(query=GARDEN).answer == "garden ctx"


class Echoing(Engine):
    """Answers with the context it was told."""

    def _complete_messages(self, messages):
        told = re.search(r"\[1\] (.*)", messages[0]["content"])[1]
        self.owner.answers = {"": {"answer": told, "reasoning": "so"}}
        return DummyEngine._complete_messages(self, messages)


def echoing(domain):
    lm = answering(domain)
    lm._engine_spec = Echoing(lm, domain)
    lm._async_engine_spec = AsyncEngine(lm._engine_spec)
    return lm


class Repeating:
    """The query itself as context; the others get theirs before the first call is made."""

    def __call__(self, query, *, history=None):
        return Fixed(f"[1] {query}")

    async def acall(self, query, *, history=None):
        await asyncio.sleep(0.01)
        return self(query)


async def test_queries_side_by_side_are_told_each_its_own_context(classifier):
    pipeline = DomainPipeline(
        ["garden"], Drafting(), classifier=classifier, threshold=0.3, make_lm=echoing, context=Repeating()
    )
    queries = [f"{GARDEN} {i}" for i in range(20)]
    rows = [dspy.Example(query=query).with_inputs("query") for query in queries]
    found = await asyncio.to_thread(pipeline.batch, rows, num_threads=8, disable_progress_bar=True)
    assert [each.answer for each in found] == queries
    found = await asyncio.gather(*(pipeline.acall(query=query) for query in queries))
    assert [each.answer for each in found] == queries


def test_the_adapter_in_use_tells_the_context_and_modules_see_its_class(make):
    seen = []

    class Looking(dspy.Module):
        def __init__(self):
            super().__init__()
            self.inner = make(context=Remembering(Fixed("the inner context")))  # a pipeline in a pipeline

        def forward(self, query):
            seen.append(dspy.settings.adapter)
            return dspy.Prediction(answer=self.inner(query=query).answer)

    class Own(dspy.ChatAdapter):
        pass

    with dspy.context(adapter=Own()):
        assert make(Looking(), context=Remembering())(query=GARDEN).answer == "garden ctx"
    assert isinstance(seen[0], Own)


def test_a_program_that_is_not_told_its_context_is_named_in_a_warning(make, caplog):
    class Own(dspy.Module):
        def __init__(self):
            super().__init__()
            self.answer = dspy.Predict("query -> answer")

        def forward(self, query):
            with dspy.context(adapter=dspy.ChatAdapter()):
                return self.answer(query=query)

    assert make(Own(), context=Remembering())(query=GARDEN).answer == "garden"
    assert "Own was not told the context" in caplog.text


def second_rollout(args, prediction):
    return float(prediction.answer.endswith(" 2"))


@pytest.mark.parametrize("sampler", [dspy.BestOfN, dspy.Refine])
def test_best_of_n_and_refine_sample_from_the_adapter(make, sampler):
    program = compiled()
    program._compiled = True
    pipeline = make(compiled={"garden": program}, context=Remembering())
    found = sampler(pipeline, N=3, reward_fn=second_rollout, threshold=1.0)(query=GARDEN)
    assert (found.answer, found.route.adapter) == ("garden compiled ctx 2", "garden")
    assert pipeline(query=GARDEN).answer == "garden compiled ctx"


def test_another_lm_takes_compiled_programs_too_and_none_undoes_it(make):
    program = dspy.ChainOfThought(compiled().signature)
    program._compiled = True  # of which DSPy itself sets no LM inside another module
    pipeline, other = make(compiled={"garden": program}), answering("other")
    other.model = "other"
    pipeline.set_lm(other)
    assert pipeline.get_lm() is other
    assert pipeline(query=GARDEN).answer == "other compiled"
    assert pipeline(query=GARDEN).route.reason.endswith("; self.predict keep LMs of their own")
    pipeline.set_lm(None)
    assert pipeline(query=GARDEN).answer == "garden compiled"
    program.predict.lm = other
    with pytest.raises(ConfigError, match="LMs of their own"):
        pipeline.get_lm()


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_evaluations_are_written_with_their_routes_and_steps(make, tmp_path, kind):
    path, pipeline = tmp_path / f"rows.{kind}", make(context=Remembering())
    rows = [dspy.Example(query=GARDEN).with_inputs("query")]
    dspy.Evaluate(devset=rows, metric=lambda row, found, trace=None: 1.0, **{f"save_as_{kind}": str(path)})(pipeline)
    assert "1 passage" in path.read_text()
    if kind == "json":
        (row,) = json.loads(path.read_text())
        assert row["route"]["adapter"] == "garden"
        assert [step["stage"] for step in row["steps"]] == ["route", "prompts", "context", "answer"]


def test_saved_and_loaded_with_its_prompts(make, tmp_path):
    program, empty = (dspy.ChainOfThought(signature) for signature in (compiled().signature, "query -> answer"))
    program._compiled = empty._compiled = True  # of which DSPy itself saves nothing inside another module
    make(compiled={"garden": program}).save(tmp_path / "pipeline.json")
    with pytest.raises(ConfigError, match="Make it alike"):
        make().load(tmp_path / "pipeline.json")
    blank = make(compiled={"garden": empty})
    blank.load(tmp_path / "pipeline.json")
    assert blank(query=GARDEN).answer == "garden compiled"


def test_what_is_not_there_is_refused_with_the_near_names(make):
    with pytest.raises(ConfigError, match=r"gardn.*'garden'"):
        make(compiled={"gardn": compiled()})
    with pytest.raises(ConfigError, match="no stage 'context'"):
        make().with_stages("context")
    with pytest.raises(DataError, match="query is ''"):
        make()(query="")
    with pytest.raises(ConfigError, match="an output 'steps'"):

        class Steps(dspy.Module):
            def forward(self, query):
                return dspy.Prediction(steps=query)

        make(Steps())(query=GARDEN)


def test_a_plain_function_is_no_context_and_no_rows_are_no_devset(make):
    with pytest.raises(ConfigError, match="A function becomes a source"):
        make(context=lambda query: query)
    with pytest.raises(DataError, match="no rows to evaluate on"):
        make().evaluate([], metric=lambda gold, pred: 1.0)


def test_evaluate_compares_every_variant(make, tmp_path):
    pipeline = make(compiled={"garden": compiled()}, context=Remembering())
    rows = [dspy.Example(query=f"{GARDEN} {i}", answer="garden compiled ctx").with_inputs("query") for i in range(6)]
    rows += [dspy.Example(query=f"{KITCHEN} {i}", answer="kitchen").with_inputs("query") for i in range(6)]
    report = pipeline.evaluate(rows, lambda row, found, trace=None: row.answer == found.answer, num_threads=4)
    scores = {system.name: system.score.value for system in report.systems}
    assert scores == {
        "base": 0,
        "adapter": 0.5,
        "prompts": 0,
        "adapter + prompts": 0.5,
        "adapter + prompts + context": 0.5,
    }
    assert report.system("adapter").gain.value == 0.5
    assert report.system("adapter").ability > report.system("base").ability
    assert report.system("adapter + prompts + context").seconds.keys() == {"route", "prompts", "context", "answer"}
    assert "adapter + prompts + context" in report.to_text()
    report.save(tmp_path / "report.json")
    assert (tmp_path / "report.json").stat().st_size > 100


def test_a_row_that_raises_counts_as_wrong(make):
    class Failing(dspy.Module):
        def forward(self, query):
            raise RuntimeError("no")

    rows = [dspy.Example(query=f"{GARDEN} {i}").with_inputs("query") for i in range(4)]
    report = make(Failing()).evaluate(rows, lambda row, found, trace=None: 1.0, systems={"adapter": ["adapter"]})
    assert report.system("adapter").score.value == 0
    assert report.system("adapter").ability is None


def test_what_ace_learned_reaches_the_prompt_and_is_named(make, monkeypatch):
    words = {"rose": "spring", "hedge": "autumn"}
    rows = [
        dspy.Example(query=f"when do I prune {word} {i}", answer=words[word]).with_inputs("query")
        for i in range(12)
        for word in words
    ]
    with dspy.context(lm=answering("untaught")):
        optimizer = ACE(lambda row, found, trace=None: row.answer == found.answer, epochs=1, num_threads=1)
        learned = optimizer.compile(dspy.Predict("query -> answer"), trainset=rows)
    bullets, prompts, complete = learned.playbook.bullets, [], Engine._complete_messages
    assert any("rose" in bullet.text and bullet.text.endswith("answer spring.") for bullet in bullets)

    def watched(engine, messages):
        prompts.append("".join(message["content"] for message in messages))
        return complete(engine, messages)

    monkeypatch.setattr(Engine, "_complete_messages", watched)
    found = make(compiled={"garden": learned})(query=GARDEN)
    assert all(f"- {bullet.text}" in prompts[-1] for bullet in bullets)
    assert found.steps[1].choice == "compiled for garden"
    found = make(context=ContextAssembler([Bullets(learned.playbook)]))(query=GARDEN)
    assert all(f"[playbook:{bullet.id}] {bullet.text}" in prompts[-1] for bullet in bullets)
    assert (found.steps[1].choice, found.steps[2].choice) == ("as written", "instruction")
    assert found.steps[2].reason == f"{len(bullets)} of playbook"
