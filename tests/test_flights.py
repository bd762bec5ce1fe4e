"""Equal calls at once as one engine request."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import dspy
import pytest
from dspy.utils import DummyLM

from dspy_lora.engine import flights
from dspy_lora.engine.flights import aflight, flight, flight_key


@pytest.fixture(autouse=True)
def nobody_is_left_under_way():
    yield
    assert flights._first == {}


def test_equal_calls_wait_for_the_first_and_other_calls_do_not():
    inside, go, order = threading.Event(), threading.Event(), []

    def call(key, name):
        with flight(key):
            if name == "first":
                inside.set()
                go.wait(60)
            order.append(name)

    with ThreadPoolExecutor(5) as pool:
        calls = [pool.submit(call, "a", "first")]
        inside.wait(60)
        calls += [pool.submit(call, "a", "second"), pool.submit(call, "a", "third")]
        pool.submit(call, "b", "other").result(60)
        pool.submit(call, None, "alone").result(60)
        assert order == ["other", "alone"]
        go.set()
        for each in calls:
            each.result(60)
    assert order[2] == "first" and sorted(order[3:]) == ["second", "third"]


def test_those_who_wait_go_on_where_the_first_fails():
    inside, go = threading.Event(), threading.Event()

    def fail():
        with flight("a"):
            inside.set()
            go.wait(60)
            raise ValueError("first")

    def answer():
        with flight("a"):
            return "second"

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(fail)
        inside.wait(60)
        second = pool.submit(answer)
        go.set()
        assert second.result(60) == "second"
        with pytest.raises(ValueError, match="first"):
            first.result(60)


async def test_in_an_event_loop_one_that_waits_can_be_cancelled():
    go, order = asyncio.Event(), []

    async def call(name):
        async with aflight("a"):
            if name == "first":
                await go.wait()
            order.append(name)

    first, second, third = (asyncio.create_task(call(name)) for name in ("first", "second", "third"))
    await asyncio.sleep(0.05)
    assert order == []
    second.cancel()
    with flight("a"):  # a thread does not wait for a loop, which may wait for the thread
        order.append("sync")
    go.set()
    await asyncio.gather(first, third)
    assert order == ["sync", "first", "third"]
    assert second.cancelled()


@pytest.mark.parametrize(
    ("changes", "equal"),
    [({}, True), ({"temperature": 0.5}, False), ({"rollout_id": 3}, False), ({"max_tokens": 7}, False)],
)
def test_calls_are_equal_with_one_prompt_and_the_same_settings(changes, equal):
    lm = DummyLM([])
    lm.cache = True
    messages = [{"role": "user", "content": "Hello."}]
    assert (flight_key(lm, None, messages, {}) == flight_key(lm, None, list(messages), changes)) is equal
    assert flight_key(lm, None, messages, {}) != flight_key(lm, None, [], {})
    assert flight_key(lm, "Hello.", None, {}) != flight_key(lm, None, messages, {})


def test_calls_that_are_not_cached_or_are_streamed_have_no_key(monkeypatch):
    lm = DummyLM([])
    lm.cache = True
    assert flight_key(lm, "Hello.", None, {}) is not None
    assert flight_key(lm, "Hello.", None, {"cache": False}) is None
    with dspy.context(send_stream=object()):
        assert flight_key(lm, "Hello.", None, {}) is None
    monkeypatch.setattr(dspy.cache, "enable_memory_cache", False)
    monkeypatch.setattr(dspy.cache, "enable_disk_cache", False)
    assert flight_key(lm, "Hello.", None, {}) is None
