"""The engine's process without an engine: what it answers to what goes wrong, and when it unloads an adapter."""

import asyncio
import sys
from types import SimpleNamespace

import jinja2
import msgspec
import pytest

from dspy_lora.engine.host import Host
from dspy_lora.engine.protocol import Adapter, Command, Reply, Result
from dspy_lora.engine.turns import Turns


class Replies(list):
    """The socket to the client."""

    async def send(self, message):
        self.append(msgspec.msgpack.decode(message, type=Reply))


@pytest.fixture
def host(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(exceptions=SimpleNamespace()))
    monkeypatch.setitem(sys.modules, "vllm.v1.engine.exceptions", SimpleNamespace(EngineDeadError=EOFError))
    host = Host.__new__(Host)
    host.replies, host.turns = Replies(), Turns(2)
    return host


async def raises(error, cause=None):
    raise error from cause


@pytest.mark.parametrize(
    ("error", "cause", "kind", "message"),
    [
        (jinja2.TemplateError("System role not supported"), None, "invalid", "System role not supported"),
        (ValueError("min_p must be in [0, 1]"), None, "invalid", "min_p must be in [0, 1]"),
        (ValueError(), KeyError("x"), "invalid", "ValueError: KeyError: 'x'"),
        (RuntimeError(), OSError("disk full"), "server", "RuntimeError: OSError: disk full"),
        (RuntimeError("here"), OSError("there"), "server", "RuntimeError: here"),
        (RuntimeError(), None, "server", "RuntimeError: "),
    ],
)
async def test_an_error_is_worded_and_of_the_kind_that_says_whether_to_try_again(host, error, cause, kind, message):
    await host.answer(1, raises(error, cause))
    assert [(reply.kind, reply.message) for reply in host.replies] == [(kind, message)]


async def test_an_adapter_is_unloaded_once_no_request_of_it_runs(host):
    """vLLM's next step would read it again, inside the batch, where a file that is gone ends its core."""
    unloaded = []

    async def unload(adapter):
        unloaded.append(adapter.name)
        return True

    host.residents = SimpleNamespace(unload=unload)
    async with host.turns.turn("a"), host.turns.turn("b"):
        busy = asyncio.create_task(host.command(Command(1, "unload", Adapter("a", "/"))))
        await host.command(Command(2, "unload", Adapter("c", "/")))
        await asyncio.sleep(0.05)
        assert (unloaded, busy.done()) == (["c"], False)
    await busy
    assert unloaded == ["c", "a"]
    assert list(host.replies) == [Result(2, {"unloaded": True}), Result(1, {"unloaded": True})]
