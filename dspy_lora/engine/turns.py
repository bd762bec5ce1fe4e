"""Turns for more adapters than the engine has slots for, so that a rare one is not kept waiting by busy ones.

vLLM passes a request over for as long as every slot has a request running, whoever came first: adapters whose requests
overlap without end keep all others out. Here a request goes to vLLM when its adapter has a slot. Where an adapter has
waited for its slot for a while, one that has had its own the longest gets no new requests until its running ones are
done, and then waits itself. So a request waits at most for the patience and for the longest answer under way, times the
adapters that wait before it.
"""

import asyncio
import collections
import contextlib
from collections.abc import AsyncIterator

_PATIENCE_S = 0.5  # a few short answers' time: swapping costs a load from memory, and a batch of one adapter less
_IDLE_POLL_S = 0.01


class Turns:
    """Who may run.

    Args:
        slots: The engine's ``max_loras``.
        patience_s: Seconds for which an adapter waits before another one's requests are held back.
    """

    def __init__(self, slots: int, patience_s: float = _PATIENCE_S) -> None:
        self._slots, self._patience_s = slots, patience_s
        self._running: dict[str, int] = {}  # requests by adapter, the adapter that got its slot first stands first
        self._waiting: dict[str, list[asyncio.Future[None]]] = {}  # by adapter, in the order of their first requests
        self._closing: str | None = None  # the adapter whose new requests are held back
        self._kept_out: collections.Counter[str] = collections.Counter()  # blocks of ``without`` by adapter
        self._timer: asyncio.TimerHandle | None = None

    @contextlib.asynccontextmanager
    async def turn(self, adapter: str) -> AsyncIterator[bool]:
        """Waits until the adapter has a slot, and keeps it for the block; says whether it had none before."""
        if has_slot := adapter in self._running and adapter != self._closing and not self._kept_out[adapter]:
            self._running[adapter] += 1
        else:
            await self._slot(adapter)
        try:
            yield not has_slot
        finally:
            self._leave(adapter)

    @contextlib.asynccontextmanager
    async def without(self, adapter: str) -> AsyncIterator[None]:
        """Waits until the requests of an adapter that run are done, and lets none begin until the block ends."""
        self._kept_out[adapter] += 1
        try:
            while adapter in self._running:
                await asyncio.sleep(_IDLE_POLL_S)
            yield
        finally:
            self._kept_out[adapter] -= 1
            self._admit()

    async def _slot(self, adapter: str) -> None:
        admitted = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(adapter, []).append(admitted)
        self._admit()
        try:
            await admitted
        except asyncio.CancelledError:
            if admitted.cancelled():
                self._forget(adapter, admitted)
                self._admit()
            else:  # admitted and cancelled at once
                self._leave(adapter)
            raise

    def _forget(self, adapter: str, admitted: asyncio.Future[None]) -> None:
        """Takes a request out of those that wait, unless its adapter's turn came before it could go."""
        waiting = self._waiting.get(adapter, [])
        if admitted in waiting:
            waiting.remove(admitted)
        if not waiting:
            self._waiting.pop(adapter, None)

    def _leave(self, adapter: str) -> None:
        self._running[adapter] -= 1
        if not self._running[adapter]:
            del self._running[adapter]
            if adapter == self._closing:
                self._closing = None
            self._admit()

    def _admit(self) -> None:
        """Gives free slots to those who wait, and looks again after a while where some still do."""
        while (waiting := self._may_come_in()) and len(self._running) < self._slots:
            self._start(waiting[0])
        if self._closing is not None and set(waiting) <= {self._closing}:
            self._closing = None  # whom it was closed for has found another slot, or gone
            for adapter in waiting:
                self._start(adapter)
            waiting = []
        if self._timer is not None and not waiting:
            self._timer.cancel()
            self._timer = None
        if waiting and self._closing is None and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._patience_s, self._close)

    def _may_come_in(self) -> list[str]:
        """The adapters that wait, the first to come first, but for those that are kept out."""
        return [adapter for adapter in self._waiting if not self._kept_out[adapter]]

    def _start(self, adapter: str) -> None:
        for admitted in self._waiting.pop(adapter, []):
            if admitted.cancelled():  # its task has yet to run
                continue
            self._running[adapter] = self._running.get(adapter, 0) + 1
            admitted.set_result(None)

    def _close(self) -> None:
        self._timer = None
        if self._may_come_in() and self._closing is None:
            self._closing = next(iter(self._running))
