"""The choice of parsers; what they find in an answer is tested in test_lm.py, on the engine."""

from types import SimpleNamespace

import pytest
from dspy.utils.exceptions import LMError

from dspy_lora import LoRALM
from dspy_lora.engine.parsers import Parsers, Splitter
from dspy_lora.engine.protocol import Generate


def test_a_parser_that_vllm_does_not_know_is_refused_before_the_model_is_loaded():
    lm = LoRALM("seedling", engine={"tool_parser": "hermez"}, cache=False)
    with pytest.raises(LMError, match=r"tool_parser='hermez' is no parser of this vLLM. Did you mean 'hermes'"):
        lm("Hello.")
    assert not lm.engine.client.running


def test_text_without_parsers_is_shown_as_it_comes():
    splitter = Splitter(None)
    assert [splitter.feed(text, [1]).text for text in ("a", "b")] == ["a", "b"]


def test_text_that_may_hold_a_tool_call_is_held_back():
    delta = Splitter(None, hold=True).feed("<tool_call>", [1])
    assert (delta.text, delta.thinking) == ("", "")


def test_what_a_reasoning_parser_swallows_is_not_shown():
    class Nothing:
        def extract_reasoning_streaming(self, *texts):
            return None

    delta = Splitter(Nothing()).feed("<think>", [1])
    assert (delta.text, delta.thinking) == ("", "")


@pytest.mark.parametrize(("said", "sampling"), [(None, {}), (False, {"skip_special_tokens": False})])
def test_a_reasoning_parser_that_leaves_special_tokens_as_they_are_sets_nothing(said, sampling):
    """vLLM 0.33 says None for that, and its core ends at a request that does."""

    class Reasoning:
        def __init__(self, *_, **__):
            pass

        def adjust_request(self, request):
            return SimpleNamespace(skip_special_tokens=said)

    parsers = object.__new__(Parsers)
    parsers.tokenizer, parsers.tool_class, parsers.reasoning_class = None, None, Reasoning
    request = Generate(0, [{"role": "user", "content": "Which?"}], {})
    assert parsers.sampling(request) == sampling
