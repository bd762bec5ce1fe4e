"""What ends a run, and what only fails a row."""

import dspy
import pytest
from dspy.utils.exceptions import (
    AdapterParseError,
    ContextWindowExceededError,
    LMCollectionLimitError,
    LMInvalidRequestError,
    LMServerError,
    LMUnsupportedModelError,
)
from dspy_lora.optimizers.outages import is_answer, is_outage, is_refusal, is_too_long

from dspy_lora.errors import DataError, EngineDiedError, UnknownAdapterError


def worded(error):
    """An error that a module raises in place of its LM's."""
    try:
        try:
            raise error
        except type(error):
            raise RuntimeError("the step failed")  # noqa: B904 - the cause is not named
    except RuntimeError as exc:
        return exc


@pytest.mark.parametrize(
    ("error", "outage"),
    [
        (LMServerError("overloaded"), True),
        (worded(LMServerError("overloaded")), True),
        (EngineDiedError("out of memory"), True),
        (UnknownAdapterError("no adapter 'legal'"), True),
        (dspy.lm15.TransportError("no route"), True),
        (LMUnsupportedModelError("no such model"), True),
        (dspy.lm15.UnsupportedModelError("no such model"), True),
        (LMInvalidRequestError("filtered"), True),
        (ContextWindowExceededError(), False),
        (dspy.lm15.ContextLengthError("too long"), False),
        (AdapterParseError("ChatAdapter", dspy.Signature("a -> b"), "nonsense"), False),
        (worded(ContextWindowExceededError()), False),
        (DataError("no such row"), False),
        (ConnectionError("a tool's own"), False),
    ],
)
def test_what_is_an_outage(error, outage):
    assert is_outage(error) is outage


@pytest.mark.parametrize(
    ("error", "answer", "too_long"),
    [
        (AdapterParseError("ChatAdapter", dspy.Signature("a -> b"), "nonsense"), True, False),
        (LMCollectionLimitError("the answer is too long"), True, False),
        (ContextWindowExceededError(), True, True),
        (dspy.lm15.ContextLengthError("too long"), True, True),
        (worded(ContextWindowExceededError()), True, True),
        (LMInvalidRequestError("filtered"), False, False),
        (LMUnsupportedModelError("no such model"), False, False),
        (LMServerError("overloaded"), False, False),
        (DataError("no such row"), False, False),
    ],
)
def test_what_another_prompt_may_mend(error, answer, too_long):
    assert (is_answer(error), is_too_long(error)) == (answer, too_long)


@pytest.mark.parametrize(
    ("error", "refusal"),
    [
        (LMInvalidRequestError("filtered"), True),
        (worded(dspy.lm15.InvalidRequestError("filtered", status=400)), True),
        (LMUnsupportedModelError("no such model"), False),
        (ContextWindowExceededError(), False),
        (LMServerError("overloaded"), False),
    ],
)
def test_what_may_be_of_one_request_alone(error, refusal):
    assert is_refusal(error) is refusal
