"""``n`` samples of one LM call as one engine request.

DSPy asks an engine for one response at a time, ``n`` times in a row. LoRALM opens a group for each call; the first
request draws all ``n`` samples and the following ones take what is left.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

from dspy import lm15


@dataclass
class Samples:
    """The samples of one LM call.

    Attributes:
        wanted: ``n``.
        ready: Samples drawn and not yet taken.
    """

    wanted: int = 1
    ready: list[lm15.Response] = field(default_factory=list)

    @classmethod
    def current(cls) -> "Samples":
        """The group of the LM call that this code runs in; a call outside LoRALM is a group of one."""
        return _current.get() or cls()

    def take(self) -> lm15.Response | None:
        """The next sample already drawn, if there is one."""
        return self.ready.pop(0) if self.ready else None

    def ask(self, request: lm15.Request) -> int:
        """How many samples the engine is to draw: all, or one where greedy decoding makes them equal."""
        return 1 if request.config.temperature == 0 else self.wanted

    def keep(self, responses: list[lm15.Response]) -> lm15.Response:
        """Puts the samples after the first aside; greedy samples are repeated without counting tokens twice."""
        first, *rest = responses
        free = replace(first, usage=lm15.Usage(input_tokens=0, output_tokens=0))
        self.ready = rest or [free] * (self.wanted - 1)
        return first


_current: ContextVar[Samples | None] = ContextVar("dspy_lora_samples", default=None)


@contextlib.contextmanager
def sampling(n: int) -> Iterator[None]:
    """Opens the group of one LM call."""
    token = _current.set(Samples(n))
    try:
        yield
    finally:
        _current.reset(token)
