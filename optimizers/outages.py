"""What ends a run and what only fails a row: an LM that is out of reach says nothing about the program."""

from collections.abc import Iterator

from dspy import lm15
from dspy.utils.exceptions import (
    AdapterParseError,
    ContextWindowExceededError,
    LMCollectionLimitError,
    LMError,
    LMInvalidRequestError,
    LMUnsupportedModelError,
)

from dspy_lora.errors import AdapterError, EngineError, MissingDependencyError

_OUTAGES = (LMError, lm15.LM15Error, EngineError, AdapterError, MissingDependencyError)
_TOO_LONG = (ContextWindowExceededError, lm15.ContextLengthError)
# The LM answered, or the program asked for more than it can read: another run would see the same.
_ANSWERS = (AdapterParseError, *_TOO_LONG, LMCollectionLimitError, lm15.CollectionLimitError)
_REFUSALS = (LMInvalidRequestError, lm15.InvalidRequestError)
_NO_MODEL = (LMUnsupportedModelError, lm15.UnsupportedModelError)  # some of them, and no row's fault


def is_outage(error: BaseException) -> bool:
    """Whether the LM, its server or its engine failed, rather than the program or its answer.

    An error that was raised while an outage was handled is one too: modules word errors of their LM anew.
    """
    told = _telling(error)
    return told is not None and not isinstance(told, _ANSWERS)


def is_refusal(error: BaseException) -> bool:
    """Whether it is an outage that may be of one request alone, such as by a provider's filter of contents."""
    told = _telling(error)
    return is_outage(error) and isinstance(told, _REFUSALS) and not isinstance(told, _NO_MODEL)


def is_answer(error: BaseException) -> bool:
    """Whether the LM is well: its answer was of no use, or the prompt or the answer was too long."""
    return isinstance(_telling(error), _ANSWERS)


def is_too_long(error: BaseException) -> bool:
    """Whether a prompt was longer than the LM can read; a shorter one may do."""
    return isinstance(_telling(error), _TOO_LONG)


def _telling(error: BaseException) -> BaseException | None:
    """The first of an error and its causes that is of an LM; some of the failed tries are LMErrors too."""
    return next((each for each in _chain(error) if isinstance(each, (*_ANSWERS, *_OUTAGES))), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what caused it, what caused that..."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)


class Passing(BaseException):
    """Carries an outage past code that takes every ``Exception`` for a failed try, as GEPA does with a proposer's.

    Attributes:
        error: The outage.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error
