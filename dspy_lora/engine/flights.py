"""Equal calls at once as one engine request: the first goes on, the others wait and find its answer in DSPy's cache.

DSPy's cache knows an answer once it is there. An optimizer that tries many candidates on one row at once asks what they
have in common many times before the first answer is in.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Hashable, Iterator
from concurrent.futures import Future
from typing import Any

import dspy

_first: dict[Hashable, Future[None]] = {}  # the call under way, by key


def flight_key(lm: dspy.LM, prompt: Any, messages: Any, kwargs: dict[str, Any]) -> Hashable:
    """What makes calls equal; None where DSPy's cache would not hold the answer, or where it is streamed.

    Calls that differ for the cache and not here only wait for each other.
    """
    kept = any(getattr(dspy.cache, f"enable_{kind}_cache", True) for kind in ("memory", "disk"))
    if not kept or not kwargs.get("cache", lm.cache) or dspy.settings.send_stream is not None:
        return None
    settings = sorted((lm.kwargs | kwargs).items())
    fork = os.getpid()  # which waits for nobody of the process it came from
    return fork, lm.model, repr(prompt), repr(messages), repr(settings)


@contextlib.contextmanager
def flight(key: Hashable) -> Iterator[None]:
    """Lets the first call of a key go on while the others wait for its end, whether it answered or failed.

    Args:
        key: From ``flight_key``; None waits for nobody.
    """
    key = key and ("sync", key)
    if first := _board(key):
        first.result()
        yield
    else:
        with _landing(key):
            yield


@contextlib.asynccontextmanager
async def aflight(key: Hashable) -> AsyncIterator[None]:
    """Async equivalent of ``flight`` for the calls of one event loop; what runs elsewhere may wait for this loop."""
    key = key and (id(asyncio.get_running_loop()), key)
    if first := _board(key):
        await asyncio.wrap_future(first)
        yield
    else:
        with _landing(key):
            yield


def _board(key: Hashable) -> Future[None] | None:
    """The equal call under way; None makes this one the first."""
    if key is None:
        return None
    mine: Future[None] = Future()
    mine.set_running_or_notify_cancel()  # one of those who wait may be cancelled, which ends its waiting alone
    first = _first.setdefault(key, mine)
    return None if first is mine else first


@contextlib.contextmanager
def _landing(key: Hashable) -> Iterator[None]:
    try:
        yield
    finally:
        if key is not None:
            _first.pop(key).set_result(None)
