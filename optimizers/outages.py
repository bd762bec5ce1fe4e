"""What ends a run and what only fails a row: an LM that is out of reach says nothing about the program."""

from collections.abc import Iterator

from dspy import lm15
from dspy.utils.exceptions import AdapterParseError, ContextWindowExceededError, LMCollectionLimitError, LMError

from dspy_lora.errors import AdapterError, EngineError, MissingDependencyError

_OUTAGES = (LMError, lm15.LM15Error, EngineError, AdapterError, MissingDependencyError)
# The LM answered, or the program asked for more than it can read: another run would see the same.
_ANSWERS = (
    AdapterParseError,
    ContextWindowExceededError,
    LMCollectionLimitError,
    lm15.ContextLengthError,
    lm15.CollectionLimitError,
)


def is_outage(error: BaseException) -> bool:
    """Whether the LM, its server or its engine failed, rather than the program or its answer.

    An error that was raised while an outage was handled is one too: modules word errors of their LM anew.
    """
    for each in _chain(error):
        if isinstance(each, _ANSWERS):
            return False
        if isinstance(each, _OUTAGES):
            return True
    return False


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
