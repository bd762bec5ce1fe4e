"""What ends a run, and what only fails a row."""

import dspy
import pytest
from dspy.utils.exceptions import AdapterParseError, ContextWindowExceededError, LMServerError
from dspy_lora.optimizers.outages import is_outage

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
