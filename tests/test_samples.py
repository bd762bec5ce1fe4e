"""n samples of one call as one engine request."""

import threading

import pytest
from dspy import lm15

from dspy_lora.engine.samples import Samples, sampling


def request(temperature=1.0):
    config = lm15.Config(temperature=temperature)
    return lm15.Request("lora/base@main", (lm15.Message.user("Hello."),), config=config)


def response(text, tokens=5):
    usage = lm15.Usage(input_tokens=10, output_tokens=tokens)
    return lm15.Response(text, "lora/base@main", lm15.Message.assistant(text), "stop", usage)


def texts(group, count):
    return [group.take().text for _ in range(count)]


def test_the_first_request_draws_all_samples_and_the_others_take_them():
    with sampling(3):
        group = Samples.current()
        assert group.take() is None
        assert group.ask(request()) == 3
        assert group.keep([response("a"), response("b"), response("c")]).text == "a"
        assert texts(Samples.current(), 2) == ["b", "c"]
        assert Samples.current().take() is None


def test_greedy_samples_are_drawn_once_and_counted_once():
    with sampling(3):
        group = Samples.current()
        assert group.ask(request(temperature=0.0)) == 1
        first = group.keep([response("a")])
        rest = [group.take(), group.take()]
    assert [other.text for other in rest] == ["a", "a"]
    assert first.usage.output_tokens == 5
    assert [other.usage.total_tokens or 0 for other in rest] == [0, 0]


def test_a_call_within_a_call_has_its_own_samples():
    with sampling(2):
        Samples.current().keep([response("a"), response("b")])
        with sampling(1):
            assert Samples.current().take() is None
        assert texts(Samples.current(), 1) == ["b"]


def test_a_call_outside_loralm_is_a_group_of_one():
    group = Samples.current()
    assert (group.wanted, group.take()) == (1, None)
    assert group.keep([response("a")]).text == "a" and group.take() is None
    assert Samples.current() is not group


def test_threads_do_not_share_samples():
    seen = []
    with sampling(2):
        Samples.current().keep([response("a"), response("b")])
        thread = threading.Thread(target=lambda: seen.append(Samples.current().take()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_a_group_ends_with_its_call_even_when_that_fails():
    with pytest.raises(ZeroDivisionError), sampling(2):
        Samples.current().keep([response("a"), response("b")])
        _ = 1 / 0
    assert Samples.current().take() is None
