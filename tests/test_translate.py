"""lm15 requests and responses to and from the engine's messages, without an engine."""

import msgspec
import pytest
from dspy import lm15
from dspy._vendor.lm15.result import StreamAccumulator
from dspy.clients.errors import wrap_error
from dspy.utils.exceptions import ContextWindowExceededError, is_retryable_lm_error

from dspy_lora.engine import translate
from dspy_lora.engine.protocol import Candidate, Delta, Done, Failed, Generate, Token, ToolCall
from dspy_lora.errors import EngineError

MODEL = "lora/base@0123456789ab"
USER = (lm15.Message.user("Hello."),)
TOOL = lm15.FunctionTool("weather", "The weather.", {"type": "object", "properties": {"city": {"type": "string"}}})


def request(messages=USER, system=None, tools=(), **config):
    return lm15.Request(MODEL, tuple(messages), system=system, tools=tools, config=lm15.Config(**config))


# -- requests ----------------------------------------------------------------------------------------------------------


def test_every_setting_reaches_vllm_under_its_name():
    generate = translate.to_generate(
        request(
            max_tokens=9,
            temperature=0.5,
            top_p=0.9,
            top_k=4,
            seed=7,
            stop=("a", "b"),
            logprobs=0,
            frequency_penalty=0.1,
            presence_penalty=0.2,
            extensions={"logit_bias": {"5": 1.5}, "metadata": {"min_p": 0.05, "repetition_penalty": 1.1}},
        ),
        n=3,
    )
    assert generate.sampling == {
        "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "seed": 7, "stop": ["a", "b"], "logprobs": 0,
        "frequency_penalty": 0.1, "presence_penalty": 0.2, "logit_bias": {5: 1.5}, "min_p": 0.05,
        "repetition_penalty": 1.1, "n": 3,
    }  # fmt: skip
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(generate), type=Generate) == generate


def test_what_is_not_set_is_left_to_vllm():
    assert translate.to_generate(request()).sampling == {}


@pytest.mark.parametrize(
    ("response_format", "constraint"),
    [
        ({"type": "json_schema", "schema": {"type": "object"}, "name": "x"}, {"json": {"type": "object"}}),
        ({"type": "json_object"}, {"json_object": True}),
        (None, None),
    ],
)
def test_a_response_format_is_a_constraint(response_format, constraint):
    generate = translate.to_generate(request(response_format=response_format))
    assert generate.sampling.get("structured_outputs") == constraint


def test_what_marks_a_call_for_the_cache_is_no_setting():
    for extensions in ({"metadata": {translate.ANSWERS: "x"}}, {translate.ANSWERS: "x"}):
        assert translate.to_generate(request(extensions=extensions)).sampling == {}


def test_an_answer_that_comes_at_once_is_a_whole_stream():
    [response] = translate.to_responses(Done(1, [Candidate("yes", "stop", 1)], 1, 0), MODEL)
    start, delta, end = translate.at_once(response)
    assert (start.model, delta.delta.text, end.finish_reason) == (MODEL, "yes", "stop")


def test_an_unknown_setting_is_refused_with_the_near_names():
    with pytest.raises(lm15.InvalidRequestError, match=r"'min_pp' is no sampling setting.*Did you mean 'min_p'"):
        translate.to_generate(request(extensions={"metadata": {"min_pp": 1}}))


@pytest.mark.parametrize(("effort", "thinks"), [("off", False), ("low", True)])
def test_reasoning_effort_is_the_template_s_enable_thinking(effort, thinks):
    assert translate.to_generate(request(reasoning=lm15.Reasoning(effort))).template == {"enable_thinking": thinks}
    extensions = {"metadata": {"chat_template_kwargs": {"enable_thinking": True, "tone": "dry"}}}
    generate = translate.to_generate(request(reasoning=lm15.Reasoning(effort), extensions=extensions))
    assert generate.template == {"enable_thinking": True, "tone": "dry"}
    assert generate.sampling == {}


def test_messages_as_chat_templates_take_them():
    messages = [
        lm15.Message("developer", (lm15.TextPart("Be short."),)),
        lm15.Message("user", (lm15.TextPart("Is it "), lm15.TextPart("nice?"))),
        lm15.Message("assistant", (lm15.ThinkingPart("Hm."), lm15.ToolCallPart("1", "weather", {"city": "Paris"}))),
        lm15.Message("tool", (lm15.ToolResultPart("1", (lm15.TextPart("sunny"),), name="weather"),)),
    ]
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    assert translate.to_messages(request(messages, system="You help.")) == [
        {"role": "system", "content": "You help."},
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Is it nice?"},
        {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "name": "weather", "content": "sunny"},
    ]


def test_what_is_no_text_is_refused():
    image = lm15.ImagePart(url="https://example.org/x.png")
    with pytest.raises(lm15.UnsupportedFeatureError, match="'image' part cannot reach the model"):
        translate.to_messages(request([lm15.Message("user", (lm15.TextPart("See: "), image))]))
    with pytest.raises(lm15.UnsupportedFeatureError, match="calls functions only"):
        translate.to_generate(request(tools=(lm15.BuiltinTool("web_search"),)))


def test_tools_and_tool_choice():
    other = lm15.FunctionTool("time")
    generate = translate.to_generate(request(tools=(TOOL, other)))
    assert [tool["function"]["name"] for tool in generate.tools] == ["weather", "time"]
    assert generate.tools[0] == {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    chosen = translate.to_generate(request(tools=(TOOL, other), tool_choice=lm15.ToolChoice(allowed=("time",))))
    assert [tool["function"]["name"] for tool in chosen.tools] == ["time"]
    assert translate.to_generate(request(tools=(TOOL,), tool_choice=lm15.ToolChoice("none"))).tools is None
    with pytest.raises(lm15.UnsupportedFeatureError, match=r"tool_choice=\['weather'\]"):
        translate.to_generate(request(tools=(TOOL,), tool_choice=lm15.ToolChoice("required", ("weather",))))


# -- responses ---------------------------------------------------------------------------------------------------------


def done(*candidates):
    return Done(7, list(candidates), prompt_tokens=11, cached_tokens=3)


def test_the_prompt_is_counted_in_the_first_sample():
    first, second = translate.to_responses(done(Candidate("a", "stop", 2), Candidate("b", "length", 4)), MODEL)
    assert (first.text, first.finish_reason, second.finish_reason) == ("a", "stop", "length")
    assert (first.usage.input_tokens, first.usage.cache_read_tokens, first.usage.output_tokens) == (11, 3, 2)
    assert (second.usage.input_tokens, second.usage.cache_read_tokens, second.usage.output_tokens) == (0, 0, 4)
    assert first.id != second.id


def test_reasoning_text_and_tool_calls_are_parts():
    calls = [ToolCall("1", "weather", '{"city": "Paris"}'), ToolCall("2", "count", "3")]
    candidate = Candidate("", "tool_calls", 9, thinking="Hm.", reasoning_tokens=2, tool_calls=calls)
    [response] = translate.to_responses(done(candidate), MODEL)
    assert response.finish_reason == "tool_call" and response.usage.reasoning_tokens == 2
    thinking, *found = response.message.parts
    assert thinking == lm15.ThinkingPart("Hm.")
    assert [(call.id, call.name, dict(call.input)) for call in found] == [
        ("1", "weather", {"city": "Paris"}),
        ("2", "count", {"value": 3}),
    ]


def test_a_tool_call_that_is_no_json_is_handed_on_as_a_server_s_is():
    """The model's mistake is the program's to handle; an error here would look like an engine out of reach."""
    from dspy._vendor.lm15.providers.common import parse_json_object

    texts = ["{city", "", "3", '{"city": "Paris"}']
    candidate = Candidate("", "tool_calls", 9, tool_calls=[ToolCall("1", "weather", text) for text in texts])
    [response] = translate.to_responses(done(candidate), MODEL)
    assert [dict(part.input) for part in response.message.parts] == [parse_json_object(text) for text in texts]
    assert parse_json_object("{city") == {"partial_json": "{city"}


def test_logprobs_keep_their_tokens():
    candidate = Candidate("a", "stop", 1, logprobs=[Token("a", -0.5, 7, [("b", -0.25, 8), ("a", -0.5, 7)])])
    [response] = translate.to_responses(done(candidate), MODEL)
    [score] = response.logprobs
    assert (score.token, score.logprob, score.token_id) == ("a", -0.5, 7)
    assert [(top.token, top.logprob, top.token_id) for top in score.top] == [("b", -0.25, 8), ("a", -0.5, 7)]


# -- streams -----------------------------------------------------------------------------------------------------------


def assembled(deltas, response):
    """What DSPy puts together from a stream, and the texts it came in."""
    shown, accumulator = translate.Shown(), StreamAccumulator(request())
    events = [lm15.StreamStartEvent(model=MODEL)]
    for delta in deltas:
        events += shown.events(delta)
    events += shown.rest(response)
    for event in events:
        accumulator.push(event)
    texts = [event.delta.text for event in events if event.type == "delta" and event.delta.type == "text"]
    return accumulator.response(), texts


def tokens(text):
    return [Token(letter, -1.0, ord(letter)) for letter in text]


def test_a_stream_is_put_together_as_the_whole_answer():
    candidate = Candidate("abc", "stop", 5, thinking="xy", logprobs=tokens("xyabc"))
    [whole] = translate.to_responses(done(candidate), MODEL)
    deltas = [
        Delta(7, thinking="xy", logprobs=tokens("xy")),
        Delta(7, "a", logprobs=tokens("a")),
        Delta(7, logprobs=tokens("b")),  # half a character: a token without text
    ]
    response, texts = assembled(deltas, whole)
    assert texts == ["a", "bc"]
    assert response.message.parts == whole.message.parts
    assert response.logprobs == whole.logprobs
    assert (response.usage, response.finish_reason) == (whole.usage, whole.finish_reason)


def test_a_stream_without_deltas_is_shown_at_its_end():
    call = ToolCall("1", "weather", '{"city": "Paris"}')
    [whole] = translate.to_responses(done(Candidate("Wait.", "tool_calls", 5, tool_calls=[call])), MODEL)
    response, texts = assembled([], whole)
    assert texts == ["Wait."] and response.message.parts == whole.message.parts


def test_text_that_a_parser_took_back_is_not_shown_twice():
    [whole] = translate.to_responses(done(Candidate("answer", "stop", 5)), MODEL)
    response, texts = assembled([Delta(7, " answer ")], whole)
    assert texts == [" answer "] and response.text == " answer "


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "error", "retried"),
    [
        ("context", lm15.ContextLengthError, False),
        ("invalid", lm15.InvalidRequestError, False),
        ("adapter", lm15.ConfigurationError, False),
        ("server", lm15.ServerError, True),
    ],
)
def test_a_refusal_is_dspy_s_error(kind, error, retried):
    found = translate.to_error(Failed(7, kind, "because"))
    assert type(found) is error and "because" in str(found)
    public = wrap_error(found, model=MODEL)
    assert is_retryable_lm_error(public) is retried
    assert isinstance(public, ContextWindowExceededError) is (kind == "context")


def test_a_dead_engine_is_not_tried_again():
    error = wrap_error(translate.engine_error(EngineError("it died")), model=MODEL)
    assert not is_retryable_lm_error(error) and "it died" in str(error)
