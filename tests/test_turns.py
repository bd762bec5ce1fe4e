"""Which adapter's requests may run: logic on an event loop, without an engine."""

import asyncio
import contextlib

import pytest

from dspy_lora.engine.turns import Turns


class Adapters:
    """Requests that run until they are told to end; ``log`` says which began, in order."""

    def __init__(self, slots, patience_s=0.0):
        self.turns, self.log, self.open = Turns(slots, patience_s), [], []

    async def ask(self, adapter):
        """Starts a request; returns its task and what ends it."""
        ended = asyncio.Event()

        async def run():
            async with self.turns.turn(adapter):
                self.log.append(adapter)
                await ended.wait()

        task = asyncio.create_task(run())
        await self.settle()
        return task, ended.set

    async def settle(self):
        for _ in range(5):
            await asyncio.sleep(0)

    async def patience_ends(self):
        await asyncio.sleep(0.01)
        await self.settle()


async def end(adapters, *requests):
    for task, stop in requests:
        stop()
        await task
    await adapters.settle()


async def test_adapters_with_slots_run_at_once():
    adapters = Adapters(2)
    requests = [await adapters.ask(name) for name in "abab"]
    assert adapters.log == list("abab")
    await end(adapters, *requests)


@pytest.mark.parametrize("cancelled", ["all", "the first that waits"])
async def test_requests_that_are_cancelled_when_a_slot_comes_free_keep_none(cancelled):
    turns, answered = Turns(1), []

    async def run(adapter, seconds=0.0):
        async with turns.turn(adapter):
            await asyncio.sleep(seconds)
            answered.append(adapter)

    first = asyncio.create_task(run("a", 60 if cancelled == "all" else 0.01))
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(run("b")) for _ in range(2)]
    await asyncio.sleep(0)
    if cancelled == "all":
        whole = asyncio.gather(first, *waiting)
        whole.cancel()
        with pytest.raises(asyncio.CancelledError):
            await whole
    else:
        turns_leave = turns._leave
        turns._leave = lambda adapter: (waiting[0].cancel() if adapter == "a" else None, turns_leave(adapter))
        await asyncio.wait_for(asyncio.gather(first, waiting[1]), 5)
    await asyncio.gather(*waiting, return_exceptions=True)
    await asyncio.wait_for(run("c"), 5)
    assert (turns._running, turns._waiting) == ({}, {})
    assert answered == (["c"] if cancelled == "all" else ["a", "b", "c"])


async def test_a_turn_says_whether_the_adapter_has_just_come_in():
    turns = Turns(2)
    async with turns.turn("a") as first, turns.turn("a") as second, turns.turn("b") as other:
        assert (first, second, other) == (True, False, True)
    async with turns.turn("a") as again:
        assert again


async def keep_out(adapters, adapter, until):
    """A block without an adapter, which ``until`` ends; it is written down as a request is."""
    async with adapters.turns.without(adapter):
        adapters.log.append(f"without {adapter}")
        await until.wait()


async def test_a_block_without_an_adapter_waits_for_its_requests_and_lets_none_begin():
    adapters, until = Adapters(2, patience_s=0.01), asyncio.Event()
    running = [await adapters.ask("a") for _ in range(2)]
    block = asyncio.create_task(keep_out(adapters, "a", until))
    await adapters.settle()
    later, other = await adapters.ask("a"), await adapters.ask("b")  # a call that never pauses does not hold it up
    await end(adapters, running[0])
    await asyncio.sleep(0.05)
    assert adapters.log == ["a", "a", "b"]
    await end(adapters, running[1])
    await asyncio.sleep(0.05)
    assert adapters.log == ["a", "a", "b", "without a"]  # and the slot stays free
    third = await adapters.ask("c")
    assert adapters.log[-1] == "c"
    await end(adapters, third)
    until.set()
    await block
    await end(adapters, later, other)
    assert adapters.log[-1] == "a"


async def test_an_adapter_that_is_kept_out_holds_nobody_back():
    adapters, until = Adapters(1, patience_s=0.01), asyncio.Event()
    block = asyncio.create_task(keep_out(adapters, "a", until))
    await adapters.settle()
    waits, b = await adapters.ask("a"), await adapters.ask("b")
    await asyncio.sleep(0.05)
    again = await adapters.ask("b")
    assert adapters.log == ["without a", "b", "b"]
    until.set()
    await block
    await end(adapters, b, again, waits)
    assert adapters.log == ["without a", "b", "b", "a"]


async def test_an_adapter_gets_the_first_slot_that_is_free():
    adapters = Adapters(2, patience_s=60)
    a, b, c, d = [await adapters.ask(name) for name in "abcd"]
    assert adapters.log == ["a", "b"]
    await end(adapters, b)
    assert adapters.log == ["a", "b", "c"]
    await end(adapters, a, c, d)


async def test_busy_adapters_make_room_for_one_that_waits():
    adapters = Adapters(2)
    a, b, c = [await adapters.ask(name) for name in "abc"]
    await adapters.patience_ends()
    another_a, another_b = await adapters.ask("a"), await adapters.ask("b")
    assert adapters.log == ["a", "b", "b"]  # a had its slot first, and gets no more
    await end(adapters, a)
    assert adapters.log == ["a", "b", "b", "c"]
    await adapters.patience_ends()
    await end(adapters, b, another_b)  # now it is b's turn to make room
    assert adapters.log == ["a", "b", "b", "c", "a"]
    await end(adapters, another_a, c)


async def test_an_adapter_that_comes_later_has_to_be_as_patient_as_the_one_before():
    adapters = Adapters(1, patience_s=60)
    a, b = [await adapters.ask(name) for name in "ab"]
    first = adapters.turns._timer
    await end(adapters, a)
    c = await adapters.ask("c")
    assert first.cancelled()
    assert adapters.turns._timer is not first
    await end(adapters, b, c)


async def test_nobody_is_held_back_once_the_one_that_waited_runs():
    adapters = Adapters(2)
    a, b, c = [await adapters.ask(name) for name in "abc"]
    await adapters.patience_ends()
    held = await adapters.ask("a")
    await end(adapters, b)  # c gets b's slot, and a goes on
    assert adapters.log == ["a", "b", "c", "a"]
    await end(adapters, a, c, held)


async def test_a_request_that_is_aborted_while_it_waits_holds_nothing_back():
    adapters = Adapters(1)
    a, (waiting, _) = await adapters.ask("a"), await adapters.ask("b")
    await adapters.patience_ends()
    held = await adapters.ask("a")
    assert adapters.log == ["a"]
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    await adapters.settle()
    assert adapters.log == ["a", "a"]
    await end(adapters, a, held)


async def test_a_request_that_is_aborted_as_it_is_admitted_leaves_its_slot():
    adapters = Adapters(1, patience_s=60)
    (_, stop), (waiting, _) = await adapters.ask("a"), await adapters.ask("b")
    stop()
    await asyncio.sleep(0)  # a leaves and admits b, which has not run yet
    waiting.cancel()
    await adapters.settle()
    assert waiting.cancelled()
    c = await adapters.ask("c")
    assert adapters.log[-1] == "c"
    await end(adapters, c)


@pytest.mark.parametrize("slots", [1, 2, 5])
async def test_every_request_of_many_adapters_is_answered(slots):
    turns, done = Turns(slots, patience_s=0.001), []

    async def busy(adapter, count):
        for _ in range(count):
            async with turns.turn(adapter):
                assert len(turns._running) <= slots
                await asyncio.sleep(0.001)
            done.append(adapter)

    streams = [busy(adapter, count) for adapter, count in (("a", 40), ("b", 40), ("c", 3), ("d", 1)) for _ in range(3)]
    await asyncio.wait_for(asyncio.gather(*streams), 60)
    assert len(done) == 3 * 84
    assert done.index("d") < len(done) - 60  # not after the busy ones
