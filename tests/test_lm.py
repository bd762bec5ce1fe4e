"""LoRALM on the real engine: what DSPy asks of a language model, answered by vLLM. Holds for any weights."""

import asyncio
import copy
import enum
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Literal

import cloudpickle
import dspy
import pydantic
import pytest
from dspy import lm15
from dspy.utils.callback import BaseCallback
from dspy.utils.exceptions import (
    ContextWindowExceededError,
    LMConfigurationError,
    LMInvalidRequestError,
    LMUnsupportedFeatureError,
)

from dspy_lora import AdapterRegistry, LoRALM
from dspy_lora.adapters.registry import PACKAGED_ROOT
from dspy_lora.engine.local import LocalEngine
from dspy_lora.errors import AdapterError, ConfigError, UnknownAdapterError

DOMAINS = sorted(path.name for path in PACKAGED_ROOT.iterdir() if path.is_dir())
LONG = {"max_tokens": 24, "ignore_eos": True}  # so many tokens, whatever the weights say
# A chat answer of DSPy's, forced on any weights, long enough to come in pieces.
FORCED = {"structured_outputs": {"regex": r"\[\[ ## answer ## \]\]\n[a-z]{30,40}\n\n\[\[ ## completed ## \]\]"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


class Ask(dspy.Signature):
    question: str = dspy.InputField()
    tools: list[dspy.Tool] = dspy.InputField()
    outputs: dspy.ToolCalls = dspy.OutputField()


@pytest.fixture(scope="module")
def lm(make_lm):
    lm = make_lm("legal")
    lm.preload()
    return lm


@pytest.fixture
def requests(lm):
    """Counts the engine's requests since the test began, after those of earlier tests are done."""
    while lm.engine_stats()["running"]:
        time.sleep(0.1)
    before = lm.engine_stats()["requests"]
    return lambda: lm.engine_stats()["requests"] - before


# -- calls -------------------------------------------------------------------------------------------------------------


def test_a_call_answers_and_is_written_down(lm):
    [answer] = lm("Say hello.", **LONG)
    entry = lm.history[-1]
    assert answer and entry["outputs"] == [answer]
    assert entry["model"] == lm.model == f"lora/seedling@{lm.base.revision}/legal@{lm.adapter.revision}"
    assert entry["usage"]["completion_tokens"] == 24
    assert entry["usage"]["prompt_tokens"] > 5


async def test_an_async_call_gives_the_same_answer(lm):
    assert await lm.acall("Say hello.", **LONG) == lm("Say hello.", **LONG)


def test_calls_from_many_event_loops_at_once(lm):
    def loop(number):
        return asyncio.run(lm.acall(f"Say {number % 2}.", **LONG))

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(loop, range(8)))
    assert answers[::2] == [answers[0]] * 4 and answers[1::2] == [answers[1]] * 4


async def test_a_cancelled_call_leaves_the_engine(lm):
    task = asyncio.create_task(lm.acall("Go on and on.", max_tokens=1900, ignore_eos=True))
    while lm.engine_stats()["running"] == 0:
        await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(lm, "Hello.")  # a step of the engine later
    assert (await asyncio.to_thread(lm.engine_stats))["running"] == 0


def test_a_typed_request_gets_a_typed_response(lm, requests):
    request = lm15.Request(lm.model, (lm15.Message.user("Hello."),), config=lm15.Config(max_tokens=8, temperature=1.0))
    response = lm.copy(n=3)(request)
    assert isinstance(response, lm15.Response) and response.usage.output_tokens <= 8
    assert requests() == 1


# -- samples -----------------------------------------------------------------------------------------------------------


def test_samples_are_one_engine_request(lm, requests):
    answers = lm("Tell me a word.", n=6, temperature=1.0, seed=1, **LONG)
    assert len(answers) == 6 and len(set(answers)) > 1
    assert requests() == 1
    assert lm.history[-1]["usage"]["completion_tokens"] == 6 * 24


async def test_async_samples_are_one_engine_request(lm, requests):
    answers = await lm.copy(n=4).acall("Tell me a word.", temperature=1.0, **LONG)
    assert len(answers) == 4
    assert await asyncio.to_thread(requests) == 1


def test_the_prompt_of_samples_is_counted_once(lm):
    lm("Tell me a word.", **LONG)
    alone = lm.history[-1]["usage"]["prompt_tokens"]
    lm("Tell me a word.", n=3, temperature=1.0, **LONG)
    assert lm.history[-1]["usage"]["prompt_tokens"] == alone


def test_greedy_samples_are_drawn_once(lm):
    answers = lm("Tell me a word.", n=3, **LONG)
    assert len(answers) == 3 and len(set(answers)) == 1
    assert lm.history[-1]["usage"]["completion_tokens"] == 24


# -- sampling settings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}], ids=str)
def test_a_setting_that_leaves_one_token_is_greedy(lm, setting):
    greedy = lm("Tell me a story.", **LONG)
    free = {"temperature": 2.0, "seed": 5} | LONG
    assert lm("Tell me a story.", **free) != greedy
    assert lm("Tell me a story.", **free | setting) == greedy


def test_a_seed_repeats_an_answer(lm):
    def ask(seed):
        return lm("Hello.", temperature=2.0, seed=seed, **LONG)

    assert ask(1) == ask(1) != ask(2)


def test_stop_ends_before_the_word(lm):
    [whole] = lm("Tell me a story.", **LONG)
    stop = whole[len(whole) // 2 :][:3]
    assert lm("Tell me a story.", stop=[stop], **LONG) == [whole[: whole.index(stop)]]


def test_repetition_penalty_brings_other_tokens(lm):
    def tokens(penalty):
        [answer] = lm("Hello.", repetition_penalty=penalty, logprobs=True, max_tokens=48, ignore_eos=True)
        return [token["token"] for token in answer["logprobs"]["content"]]

    assert len(set(tokens(1.0))) < len(set(tokens(2.0)))


def test_logit_bias_and_allowed_tokens_reach_the_engine(lm):
    [answer] = lm("Hello.", logit_bias={"100": 100}, max_tokens=3, logprobs=True)
    first = answer["logprobs"]["content"][0]["token"]
    [allowed] = lm("Hello.", allowed_token_ids=[100], max_tokens=3)
    assert allowed == first * 3


def test_logprobs_give_the_chosen_token_and_the_likeliest(lm):
    [answer] = lm("Hello.", logprobs=True, top_logprobs=3, temperature=2.0, seed=1, **LONG)
    content = answer["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content).replace("<|im_end|>", "") == answer["text"]
    assert len(content) == 24
    for entry in content:
        top = [other["logprob"] for other in entry["top_logprobs"]]
        assert len(top) == 3 and top == sorted(top, reverse=True) and entry["logprob"] <= top[0] <= 0
    [answer] = lm("Hello.", logprobs=True, **LONG)
    assert not answer["logprobs"]["content"][0]["top_logprobs"]


def test_equal_cached_calls_at_once_are_one_request(lm, requests):
    cached = lm.copy(cache=True)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: cached("Asked by sixteen threads.", **LONG)[0], range(16)))
    assert len(set(answers)) == 1 and requests() == 1
    assert sum(bool(entry["usage"]) for entry in cached.history) == 1  # the others are the cache's

    async def ask():
        return await asyncio.gather(*(cached.acall("Asked by eight tasks.", **LONG) for _ in range(8)))

    assert len({answer for [answer] in asyncio.run(ask())}) == 1 and requests() == 2
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: lm("Asked by four threads.", **LONG), range(4)))
    assert requests() == 6  # without the cache each has its own


class Counting(LocalEngine):
    """The engine, counting the tries."""

    tries = 0

    def complete(self, request):
        self.tries += 1
        return super().complete(request)


def test_a_setting_out_of_range_is_refused_without_a_retry(lm):
    strict = lm.copy(num_retries=1)
    strict._engine_spec = Counting(lm.engine.settings)
    strict._engine_spec.serve(lm.model, lm.engine.adapters[lm.model])
    with pytest.raises(LMInvalidRequestError, match="min_p must be in"):
        strict("Hello.", min_p=7.0)
    assert strict._engine_spec.tries == 1
    with pytest.raises(LMInvalidRequestError, match=r"'min_tokenz' is no sampling setting.*'min_tokens'"):
        lm("Hello.", metadata={"min_tokenz": 3})


def test_settings_of_the_lm_and_of_the_call_add_up(make_lm):
    lm = make_lm(ignore_eos=True, min_p=1.0, temperature=2.0)
    greedy = lm("Hello.", temperature=0.0)
    assert lm("Hello.", seed=1) == greedy
    assert lm("Hello.", seed=1, metadata={"repetition_penalty": 1.0}) == greedy
    assert lm.copy(min_p=None)("Hello.", seed=1) != greedy


# -- structured outputs ------------------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Item(pydantic.BaseModel):
    name: Literal["bolt", "nut"]
    count: Annotated[int, pydantic.Field(ge=0, le=99)]


class Basket(pydantic.BaseModel):
    lines: Annotated[list[Item], pydantic.Field(min_length=1, max_length=2)]


class Order(dspy.Signature):
    """Read the order."""

    text: str = dspy.InputField()
    urgent: bool = dspy.OutputField()
    colour: Colour = dspy.OutputField()
    basket: Basket = dspy.OutputField()


def test_json_adapter_s_schema_is_enforced(lm, requests):
    for number in range(3):
        with dspy.context(lm=lm.copy(max_tokens=400, temperature=1.0, seed=number), adapter=dspy.JSONAdapter()):
            order = dspy.Predict(Order)(text="Two red bolts, please.")
        assert isinstance(order.urgent, bool) and isinstance(order.colour, Colour)
        assert isinstance(order.basket, Basket)
    assert requests() == 3  # a schema that was not met would have been asked for again


@pytest.mark.parametrize(
    ("constraint", "answers"),
    [({"choice": ["yes", "no"]}, {"yes", "no"}), ({"regex": "(ab){3}"}, {"ababab"})],
    ids=["choice", "regex"],
)
def test_vllm_s_own_constraints_are_enforced(lm, constraint, answers):
    [answer] = lm("Well?", structured_outputs=constraint)
    assert answer in answers


def test_a_schema_vllm_cannot_enforce_is_the_caller_s_error(lm):
    with pytest.raises(LMInvalidRequestError):
        lm("Well?", structured_outputs={"regex": "(unclosed"})
    assert lm("Well?")  # and the engine goes on


# -- tools -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "adapter", [dspy.ChatAdapter(use_native_function_calling=True), dspy.JSONAdapter()], ids=["chat", "json"]
)
def test_a_tool_is_called(lm, adapter):
    with dspy.context(lm=lm.copy(structured_outputs={"choice": [CALL]}, max_tokens=200), adapter=adapter):
        answer = dspy.Predict(Ask)(question="Is it nice in Paris?", tools=[dspy.Tool(weather)])
    [call] = answer.outputs.tool_calls
    assert (call.name, call.args) == ("weather", {"city": "Paris"})
    assert call.execute(functions=[dspy.Tool(weather)]) == "sunny in Paris"


def tool_request(lm, messages, answer, choice=None):
    tool = lm15.FunctionTool("weather", "The weather.", {"type": "object", "properties": {"city": {"type": "string"}}})
    config = lm15.Config(
        max_tokens=200, temperature=0.0, tool_choice=choice, extensions={"structured_outputs": {"choice": [answer]}}
    )
    return lm15.Request(lm.model, tuple(messages), tools=(tool,), config=config)


def test_a_conversation_with_tool_calls_goes_on(lm):
    call = lm15.ToolCallPart("call_1", "weather", {"city": "Paris"})
    messages = [
        lm15.Message.user("Is it nice in Paris?"),
        lm15.Message("assistant", (call,)),
        lm15.Message("tool", (lm15.ToolResultPart("call_1", (lm15.TextPart("sunny"),), name="weather"),)),
    ]
    response = lm(tool_request(lm, messages, "It is sunny."))
    assert (response.text, response.tool_calls, response.finish_reason) == ("It is sunny.", [], "stop")
    response = lm(tool_request(lm, messages, f"Wait. {CALL}{CALL}"))
    assert [dict(call.input) for call in response.tool_calls] == [{"city": "Paris"}] * 2
    assert [part.text for part in response.message.parts_of(lm15.TextPart)] == ["Wait."]
    assert response.finish_reason == "tool_call"


def test_a_streamed_tool_call_comes_whole(lm):
    request = tool_request(lm, [lm15.Message.user("Paris?")], CALL)
    deltas = [event.delta for event in lm.engine.stream(request) if event.type == "delta"]
    [call] = [delta for delta in deltas if delta.type == "tool_call"]
    assert (call.name, call.input) == ("weather", '{"city": "Paris"}')
    assert not any("tool_call" in delta.text for delta in deltas if delta.type == "text")


def test_tool_choice_none_and_required(lm):
    message = [lm15.Message.user("Paris?")]
    response = lm(tool_request(lm, message, CALL, lm15.ToolChoice("none")))
    assert not response.tool_calls and "tool_call" in response.text
    with pytest.raises(LMUnsupportedFeatureError, match="lets the model choose"):
        lm(tool_request(lm, message, CALL, lm15.ToolChoice("required")))


# -- reasoning ---------------------------------------------------------------------------------------------------------

THOUGHTFUL = {"thinking_token_budget": 6, "structured_outputs": {"choice": ["Paris", "Rome"]}}


def test_reasoning_is_told_from_the_answer(make_thinker):
    lm = make_thinker(**THOUGHTFUL)
    assert lm.supports_reasoning
    [answer] = lm("The capital of France?")
    assert answer["text"] in ("Paris", "Rome")
    assert answer["reasoning_content"] and "think>" not in answer["reasoning_content"]


def test_reasoning_is_streamed_apart_from_the_answer(make_thinker):
    lm = make_thinker()
    config = lm15.Config(max_tokens=64, temperature=0.0, extensions=THOUGHTFUL)
    request = lm15.Request(lm.model, (lm15.Message.user("The capital of France?"),), config=config)
    whole = lm(request)
    deltas = [event.delta for event in lm.engine.stream(request) if event.type == "delta"]
    thinking = [delta.text for delta in deltas if delta.type == "thinking"]
    assert len(thinking) > 2
    assert "".join(thinking).strip() == "".join(part.text for part in whole.message.parts_of(lm15.ThinkingPart)).strip()
    assert "".join(delta.text for delta in deltas if delta.type == "text") == whole.text


def test_a_reasoning_field_is_filled(make_thinker):
    lm = make_thinker(thinking_token_budget=6, max_tokens=100, **FORCED)
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
        answer = dspy.Predict("question -> thoughts: dspy.Reasoning, answer")(question="Is it?")
    assert str(answer.thoughts) and len(answer.answer) >= 30
    assert len(lm.history) == 1


def test_a_schema_holds_for_what_follows_the_reasoning(make_thinker):
    lm = make_thinker(thinking_token_budget=6, max_tokens=100)
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        answer = dspy.Predict("question -> answer: bool")(question="Is it?")
    assert isinstance(answer.answer, bool)
    assert lm.history[-1]["outputs"][0]["reasoning_content"]
    assert len(lm.history) == 1


# -- streaming ---------------------------------------------------------------------------------------------------------


class Answer(dspy.Module):
    def __init__(self, lm):
        super().__init__()
        self.predict = dspy.Predict("question -> answer")
        self.predict.set_lm(lm)

    def forward(self, question):
        return self.predict(question=question)

    async def aforward(self, question):
        return await self.predict.acall(question=question)


def told(chunks):
    """The pieces of an answer, and the answer of the prediction that ends them."""
    *pieces, final = chunks
    assert isinstance(final, dspy.Prediction)
    return [piece.chunk for piece in pieces], final.answer


def listening(lm, **kwargs):
    listeners = [dspy.streaming.StreamListener(signature_field_name="answer")]
    return dspy.streamify(Answer(lm.copy(max_tokens=100, **FORCED)), stream_listeners=listeners, **kwargs)


@pytest.mark.parametrize("is_async_program", [False, True])
async def test_streamify_hands_out_tokens(lm, is_async_program):
    program = listening(lm, is_async_program=is_async_program)
    pieces, answer = told([chunk async for chunk in program(question="Why?")])
    assert len(pieces) > 3 and "".join(pieces).strip() == answer.strip()


def test_streamify_hands_out_tokens_to_sync_code(lm):
    pieces, answer = told(listening(lm, async_streaming=False)(question="Why?"))
    assert len(pieces) > 3 and "".join(pieces).strip() == answer.strip()


async def test_streamed_chunks_make_the_answer(lm):
    program = dspy.streamify(Answer(lm.copy(max_tokens=100, n=1, **FORCED)))
    chunks = [chunk async for chunk in program(question="Why?")]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert f"[[ ## answer ## ]]\n{chunks[-1].answer}" in text


def test_a_stream_comes_token_by_token_with_its_logprobs(lm):
    config = lm15.Config(max_tokens=24, temperature=0.0, logprobs=2, extensions={"ignore_eos": True})
    request = lm15.Request(lm.model, (lm15.Message.user("Hello."),), config=config)
    events = list(lm.engine.stream(request))
    deltas = [event.delta for event in events if event.type == "delta"]
    whole = lm.engine.complete(request)
    assert len(deltas) > 12
    assert "".join(delta.text for delta in deltas) == whole.text
    scores = [score for delta in deltas for score in delta.logprobs]
    assert [score.token_id for score in scores] == [score.token_id for score in whole.logprobs]
    assert events[-1].usage.output_tokens == 24


async def test_samples_of_a_streamed_call(lm, requests):
    request = {"temperature": 1.0, "n": 3, "max_tokens": 100}
    program = dspy.streamify(Answer(lm.copy(**request, **FORCED)))
    *_, final = [chunk async for chunk in program(question="Why?")]
    assert len(final.completions.answer) == 3
    assert await asyncio.to_thread(requests) == 1


def test_a_stream_that_nobody_reads_on_leaves_the_engine(lm, requests):
    config = lm15.Config(max_tokens=1900, temperature=0.0, extensions={"ignore_eos": True})
    stream = lm.engine.stream(lm15.Request(lm.model, (lm15.Message.user("Hello."),), config=config))
    for _ in range(3):
        next(stream)
    stream.close()
    lm("Hello.")
    assert lm.engine_stats()["running"] == 0
    assert requests() == 1  # the call; the stream never finished


# -- what DSPy adds ----------------------------------------------------------------------------------------------------


def test_usage_is_tracked(lm):
    with dspy.track_usage() as tracker:
        lm("Hello.", **LONG)
        lm("Hello.", **LONG)
    [(model, usage)] = tracker.get_total_tokens().items()
    assert model == lm.model and usage["completion_tokens"] == 48


def test_callbacks_are_called_once_a_call(make_lm):
    class Recorder(BaseCallback):
        def __init__(self):
            self.seen = []

        def on_lm_start(self, call_id, instance, inputs):
            self.seen.append(("start", instance.domain, inputs["prompt"]))

        def on_lm_end(self, call_id, outputs, exception=None):
            self.seen.append(("end", outputs, exception))

    recorder = Recorder()
    lm = make_lm("legal", callbacks=[recorder])
    answer = lm("Hello.", n=2)
    assert recorder.seen == [("start", "legal", "Hello."), ("end", answer, None)]


def test_memory_and_disk_cache(make_lm, requests):
    lm = make_lm("legal", cache=True, temperature=1.0)
    first = lm("Cache me.", min_p=0.01)
    assert requests() == 1
    assert lm("Cache me.", min_p=0.01) == first
    dspy.cache.reset_memory_cache()
    assert lm("Cache me.", min_p=0.01) == first
    assert requests() == 1
    assert lm.history[-1]["usage"] == {}
    lm("Cache me.", min_p=0.02)
    lm.copy(domain="research")("Cache me.", min_p=0.01)
    assert requests() == 3  # another setting, another adapter


def test_a_rollout_id_is_another_answer(make_lm, requests):
    lm = make_lm("legal", cache=True, temperature=1.5, max_tokens=24, ignore_eos=True)
    answers = [lm("Roll.", rollout_id=number) for number in (1, 2, 1)]
    assert answers[0] == answers[2] != answers[1]
    assert requests() == 2


class Flaky(LocalEngine):
    """The engine, failing at the first call."""

    failures = 1

    def complete(self, request):
        if self.failures:
            self.failures -= 1
            raise lm15.ServerError("not now")
        return super().complete(request)


def test_a_server_error_is_tried_again(lm, requests):
    flaky = lm.copy(num_retries=1)
    flaky._engine_spec = Flaky(lm.engine.settings)
    flaky._engine_spec.serve(lm.model, lm.engine.adapters[lm.model])
    answers = flaky("Hello.", n=2, temperature=1.0, **LONG)
    assert len(answers) == 2 and requests() == 1


def test_a_prompt_beyond_the_context_is_dspy_s_error(lm, requests):
    with pytest.raises(ContextWindowExceededError, match=r"The prompt has \d+ tokens; the model's context holds 2048"):
        lm("word " * 3000)
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()), pytest.raises(ContextWindowExceededError):
        dspy.Predict("question -> answer")(question="word " * 3000)
    assert requests() == 0


def test_max_tokens_is_cut_to_what_the_context_leaves(lm):
    lm("word " * 1990, max_tokens=1000, ignore_eos=True)
    usage = lm.history[-1]["usage"]
    assert usage["prompt_tokens"] + usage["completion_tokens"] == 2048


def test_what_is_no_text_is_refused(lm):
    message = lm15.Message("user", (lm15.ImagePart(url="https://example.org/x.png"),))
    with pytest.raises(LMUnsupportedFeatureError, match="LoRALM sends text"):
        lm(lm15.Request(lm.model, (message,)))


# -- adapters ----------------------------------------------------------------------------------------------------------


def scores(lm, prompt="Name the kind."):
    """The first tokens' log-probabilities, and the tokens."""
    [answer] = lm(prompt, logprobs=True, max_tokens=12, ignore_eos=True)
    return [(entry["token"], entry["logprob"]) for entry in answer["logprobs"]["content"]]


def same(some, others):
    """Whether tokens are equal, and their log-probabilities up to what the order of a float32 sum may change."""
    return [token for token, _ in some] == [token for token, _ in others] and [
        score for _, score in some
    ] == pytest.approx([score for _, score in others], abs=1e-3)


def test_an_answer_does_not_depend_on_the_batch(make_lm):
    lms = [make_lm(), *(make_lm(domain) for domain in DOMAINS)]
    alone = [scores(lm) for lm in lms]
    with ThreadPoolExecutor(4 * len(lms)) as pool:
        mixed = list(pool.map(scores, lms * 4))
    for index, quiet in enumerate(alone):
        for busy in mixed[index :: len(lms)]:
            assert same(busy, quiet), lms[index].model
    assert len({tuple(score for _, score in quiet) for quiet in alone}) == len(lms)  # every adapter has its say


class Routed(dspy.Module):
    """One predictor a domain, each with its adapter."""

    def __init__(self, make_lm):
        super().__init__()
        constraint = {"structured_outputs": {"regex": r"\[\[ ## label ## \]\]\n[a-z]{4}\n\n\[\[ ## completed ## \]\]"}}
        self.predictors = {domain: dspy.Predict("text -> label") for domain in DOMAINS}
        for domain, predictor in self.predictors.items():
            predictor.set_lm(make_lm(domain, max_tokens=48, **constraint))

    def forward(self, domain, text):
        return self.predictors[domain](text=text)


def most(lm, figure, work):
    """The largest value of an engine figure while ``work`` runs."""
    seen, done = [0], threading.Event()

    def watch():
        while not done.wait(0.05):
            seen.append(lm.engine_stats()[figure])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        return work(), max(seen)
    finally:
        done.set()
        thread.join()


def test_hundreds_of_threads_make_one_batch_of_mixed_adapters(lm, make_lm, requests):
    examples = [
        dspy.Example(domain=DOMAINS[number % len(DOMAINS)], text=f"row {number}").with_inputs("domain", "text")
        for number in range(256)
    ]
    evaluate = dspy.Evaluate(
        devset=examples, metric=lambda gold, pred, trace=None: len(pred.label) == 4, num_threads=256
    )
    result, running = most(lm, "running", lambda: evaluate(Routed(make_lm)))
    assert result.score == 100.0
    assert 256 <= requests() <= 259  # after two minutes DSPy asks for the last three again
    assert running > 64
    assert len(lm.engine_stats()["adapters"]) == 12


def test_parallel_makes_one_batch_of_mixed_adapters(lm, make_lm, requests):
    program = Routed(make_lm)
    pairs = [(program, {"domain": domain, "text": f"row {row}"}) for row in range(4) for domain in DOMAINS]
    parallel = dspy.Parallel(num_threads=48, disable_progress_bar=True)
    results, running = most(lm, "running", lambda: parallel(pairs))
    assert len(results) == 48 and all(result.label for result in results)
    assert requests() == 48
    assert running > 16


def test_preload_and_unload(make_lm):
    lm = make_lm("marketing")
    lm.preload()
    assert lm.adapter.ref in lm.engine_stats()["adapters"]
    lm.unload()
    assert lm.adapter.ref not in lm.engine_stats()["adapters"]
    assert lm("Hello.")
    assert lm.adapter.ref in lm.engine_stats()["adapters"]


def test_an_unknown_domain_is_refused_with_the_near_names(make_lm):
    with pytest.raises(UnknownAdapterError, match=r"no adapter 'leagl'.*Did you mean 'legal'"):
        make_lm("leagl")


def test_an_adapter_of_another_base_is_refused(thinking_base, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for file in thinking_base.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    with pytest.raises(AdapterError, match=r"adapter 'legal@[0-9a-f]{12}' was made for base 'seedling'"):
        LoRALM(str(other), domain="legal", registry=PACKAGED_ROOT)


def test_a_configured_registry_lies_over_the_bundled_adapters(tmp_path, monkeypatch):
    """As `dspy-lora adapters list` and `dspy-lora serve` have it."""
    monkeypatch.setenv("DSPY_LORA_REGISTRY", str(tmp_path / "shared"))
    bundled = AdapterRegistry(PACKAGED_ROOT).resolve("legal")
    assert LoRALM("seedling", domain="legal").adapter == bundled
    monkeypatch.setenv("DSPY_LORA_BASE_MODEL", "Org/Other")
    assert LoRALM("seedling", domain="legal").adapter == bundled
    with pytest.raises(UnknownAdapterError, match="no adapter 'legal'"):
        LoRALM(domain="legal")


def test_an_adapter_that_is_gone_is_this_call_s_error(make_lm, lm, tmp_path):
    registry = AdapterRegistry(tmp_path / "registry")
    registry.publish(lm.adapter.path, "passing", base=lm.base)
    passing = make_lm("passing", registry=registry.root)
    registry.remove("passing")
    with pytest.raises(LMConfigurationError, match=r"adapter 'passing@[0-9a-f]{12}' is gone"):
        passing("Hello.")
    assert lm("Hello.")


def test_an_engine_setting_vllm_does_not_know_is_refused():
    with pytest.raises(ConfigError, match="max_loras"):
        LoRALM("seedling", engine={"max_loras": 0})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_model": "Qwen/Qwen3-8B"}, "base_model='Qwen/Qwen3-8B': the base is LoRALM's first argument, `model`"),
        ({"max_loras": 4, "seed": 1}, r"max_loras: .* LoRALM\(engine=\{'max_loras': 4\}\)"),
    ],
)
def test_settings_that_are_no_call_s_are_refused_at_once(settings, message):
    with pytest.raises(ConfigError, match=message):
        LoRALM(domain="legal", **settings)


# -- copies ------------------------------------------------------------------------------------------------------------


def test_a_copy_is_bound_to_another_adapter(lm, make_lm):
    research, base = lm.copy(domain="research", temperature=0.5), lm.copy(domain=None)
    assert (research.domain, base.domain, lm.domain) == ("research", None, "legal")
    assert research.kwargs["temperature"] == 0.5 and lm.kwargs["temperature"] == 0.0
    assert research.engine is base.engine is lm.engine
    assert same(scores(research.copy(temperature=0.0)), scores(make_lm("research")))
    assert same(scores(base), scores(make_lm()))
    assert not same(scores(base), scores(lm))
    assert lm.copy(model=research.model).domain == "research"
    with pytest.raises(ConfigError, match="names another revision of base 'seedling'"):
        lm.copy(model=research.model.replace(lm.base.revision, "0123456789ab"))


def test_a_deep_copy_is_a_new_handle_on_the_same_engine(make_lm):
    program = dspy.Predict("question -> answer"), dspy.Predict("question -> answer")
    lm = make_lm("legal")
    for predictor in program:
        predictor.set_lm(lm)
    lm("Hello.")
    first, second = copy.deepcopy(program)
    assert first.lm is second.lm is not lm
    assert first.lm.engine is lm.engine and first.lm.model == lm.model
    assert len(lm.history) == 1 and first.lm.history == []
    assert first.lm("Hello.", **LONG) == lm("Hello.", **LONG)


@pytest.mark.parametrize("module", [pickle, cloudpickle], ids=["pickle", "cloudpickle"])
def test_a_pickle_finds_the_same_engine(lm, module):
    other = pickle.loads(module.dumps(lm))  # noqa: S301 - made one line above
    assert other.engine is lm.engine and (other.model, other.adapter) == (lm.model, lm.adapter)
    assert other("Hello.", **LONG) == lm("Hello.", **LONG)
