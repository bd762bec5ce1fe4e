"""A long answer of which it is noted when each token came, and what held it up meanwhile."""

import itertools
import statistics
import threading
import time
from collections.abc import Sequence
from types import TracebackType

from dspy_lora import LoRALM
from dspy_lora.engine.client import EngineClient
from dspy_lora.engine.protocol import Adapter, Delta, Generate
from dspy_lora.errors import EngineError

_LONGEST_S = 300.0  # for some tokens
# Log-probabilities make the engine send every token, even one that is no text yet.
_SAMPLING = {"temperature": 0.0, "ignore_eos": True, "logprobs": 0}


class Stream:
    """A streamed answer, until the context is full or the block ends.

    Args:
        client: The engine.
        lm: Its adapter answers.

    Attributes:
        stamps: When each token came, in seconds of ``time.perf_counter``.
    """

    def __init__(self, client: EngineClient, lm: LoRALM) -> None:
        assert lm.adapter is not None
        adapter = Adapter(lm.adapter.ref, str(lm.adapter.path))
        self.stamps: list[float] = []
        self._client, self._came, self._ended = client, threading.Condition(), False
        request = Generate(0, [{"role": "user", "content": "Hello."}], dict(_SAMPLING), adapter, stream=True)
        self._pending = client.submit(request, self._take)

    def _take(self, delta: Delta | None) -> None:
        now = time.perf_counter()
        with self._came:
            if delta is None:
                self._ended = True
            else:
                self.stamps += [now] * max(1, len(delta.logprobs))
            self._came.notify_all()

    def more(self, count: int) -> None:
        """Waits until as many more tokens have come.

        Raises:
            EngineError: The answer ended before, or takes minutes.
        """
        with self._came:
            wanted = len(self.stamps) + count
            self._came.wait_for(lambda: self._ended or len(self.stamps) >= wanted, _LONGEST_S)
            if len(self.stamps) < wanted:
                raise EngineError(f"a streamed answer ended, or stood still, after {len(self.stamps)} tokens")

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._client.abort(self._pending)


def stall_ms(stamps: Sequence[float], began: float, ended: float) -> float:
    """The longest gap between tokens in a span of time, less the median gap of the whole answer, in milliseconds.

    Args:
        stamps: When each token came, in seconds.
        began: The span's start.
        ended: Its end; gaps that reach into the span count.
    """
    gaps = list(itertools.pairwise(stamps))
    longest = max(after - before for before, after in gaps if after > began and before < ended)
    return (longest - statistics.median(after - before for before, after in gaps)) * 1e3
