"""The client's bookkeeping, on a stand-in for the engine process: what is sent when, and who gets which answer."""

import asyncio
import errno
import io
import queue
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from dspy import lm15

from dspy_lora.adapters.base import Base
from dspy_lora.adapters.revision import Revision
from dspy_lora.config import load_config
from dspy_lora.engine import client as client_module
from dspy_lora.engine.client import EngineClient, close_engines, engine_client
from dspy_lora.engine.failures import advice, ending, last_lines, root_cause
from dspy_lora.engine.local import AsyncLocalEngine, LocalEngine, local_engine
from dspy_lora.engine.progress import Progress
from dspy_lora.engine.protocol import Abort, Adapter, Command, Delta, Done, Failed, Generate, Ready, Result, StartFailed
from dspy_lora.engine.settings import engine_settings
from dspy_lora.errors import AdapterError, EngineDiedError, EngineError, EngineStartError

pytestmark = pytest.mark.timeout(60)
SETTINGS = engine_settings(Base("stand-in", "nowhere", "main"), load_config())


class StandIn:
    """What the client sees of a host process. Tests put replies in ``replies`` and read what was sent."""

    made: "list[StandIn]"

    def __init__(self, settings):
        self.ready = False
        self.failure = None
        self.status = None
        self.process = self
        self.ended = threading.Event()
        self.sent = []
        self.replies = queue.SimpleQueue()
        StandIn.made.append(self)

    def start(self):
        pass

    def stop(self):
        self.ready = False
        self.ended.set()

    def poll(self):
        return self.status

    def send(self, request):
        msgspec.msgpack.encode(request)  # as the real one does
        self.sent.append(request)

    def receive(self, timeout_ms):
        try:
            reply = self.replies.get(timeout=timeout_ms / 1000)
        except queue.Empty:
            return None
        if isinstance(reply, Exception):
            raise reply
        return reply

    def started(self, info):
        self.ready = True

    def start_report(self, cause):
        return f"did not start: {cause}"

    def died(self, status):
        return (EngineDiedError if self.ready else EngineStartError)(f"died with {status}")

    def asked(self):
        return [request for request in self.sent if not isinstance(request, Abort)]


@pytest.fixture
def client(monkeypatch):
    monkeypatch.setattr(client_module, "HostProcess", StandIn)
    monkeypatch.setattr(StandIn, "made", [], raising=False)
    monkeypatch.setattr(client_module, "_POLL_MS", 5)
    client = EngineClient(SETTINGS)
    yield client
    client.close()


def eventually(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def host(number=0, ready=True):
    """The client's host of that number, made to serve."""
    eventually(lambda: len(StandIn.made) > number)
    if ready:
        StandIn.made[number].replies.put(Ready({"device": "none"}))
        eventually(lambda: StandIn.made[number].ready)
    return StandIn.made[number]


def published(name, path, base=SETTINGS.base.name):
    return Revision(name, "1", Path(path), base=SETTINGS.base.revision, base_name=base, rank=8)


def ask(client, on_delta=None):
    return client.submit(Generate(0, [], {}), on_delta)


def done(pending, text="yes"):
    return Done(pending.request.id, [], 0, len(text))


# -- answers -----------------------------------------------------------------------------------------------------------


def test_requests_made_while_the_engine_starts_are_sent_when_it_serves(client):
    calls = [ask(client) for _ in range(3)]
    first = host(ready=False)
    assert first.sent == []
    host()
    assert [request.id for request in first.sent] == [call.request.id for call in calls]
    calls.append(ask(client))
    assert first.sent[-1].id == calls[-1].request.id
    for call in reversed(calls):
        first.replies.put(done(call))
    assert [client.result(call).id for call in calls] == [call.request.id for call in calls]
    assert (len(StandIn.made), client.restarts, client._pending) == (1, 0, {})


def test_a_command_returns_its_figures_or_raises_what_refused_it(client):
    with ThreadPoolExecutor(3) as pool:
        good, refused, lost = (pool.submit(client.command, name) for name in ("stats", "unload", "load"))
        first = host()
        eventually(lambda: len(first.sent) == 3)
        ids = {request.name: request.id for request in first.sent}
        first.replies.put(Result(ids["stats"], {"running": 2}))
        first.replies.put(Failed(ids["unload"], "server", "not now"))
        first.replies.put(Failed(ids["load"], "adapter", "gone"))
        assert good.result() == {"running": 2}
        with pytest.raises(EngineError, match="not now"):
            refused.result()
        with pytest.raises(AdapterError, match="gone"):
            lost.result()


def test_a_stream_shows_its_deltas_and_its_end(client):
    shown = []
    call = ask(client, shown.append)
    first = host()
    first.replies.put(Delta(call.request.id, "a"))
    first.replies.put(done(call))
    client.result(call)
    eventually(lambda: len(shown) == 2)
    assert (shown[0].text, shown[1]) == ("a", None)


def test_a_stream_whose_reader_has_gone_hurts_nobody(client):
    def closed(delta):
        raise RuntimeError("Event loop is closed")

    stream, other = ask(client, closed), ask(client)
    first = host()
    first.replies.put(Delta(stream.request.id, "a"))
    first.replies.put(done(stream))
    first.replies.put(done(other))
    assert client.result(other).id == other.request.id


# -- requests that cannot be sent --------------------------------------------------------------------------------------

CIRCLE = []
CIRCLE.append(CIRCLE)
LARGE = 18446744073709551616


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sampling": {"seed": LARGE}}, f"^sampling.seed={LARGE} cannot be sent .*from -2\\*\\*63 to 2\\*\\*64 - 1"),
        (
            {"sampling": {"structured_outputs": {"json": {"allOf": [{"lt": LARGE}]}}}},
            rf"json.allOf.0.lt={LARGE} cannot",
        ),
        ({"sampling": {"stop": ["a", "\ud800"]}}, r"^sampling.stop.1='\\ud800' cannot .*without lone surrogates"),
        ({"sampling": {"logit_bias": {LARGE: 1}}}, f"^sampling.logit_bias.key={LARGE} cannot"),
        ({"sampling": {"bad_words": CIRCLE}}, "holds itself"),
        ({"sampling": {}, "template": {1: 2}}, "cannot be sent .*template.* mappings with text as keys"),
        ({"sampling": {}, "adapter": Adapter("a@1", "/\udcff")}, r"^adapter.path='/\\udcff' cannot be sent"),
    ],
    ids=["integer", "schema", "text", "key", "circle", "unreadable", "path"],
)
def test_a_request_that_cannot_be_sent_is_refused_alone_and_forgotten(client, settings, words):
    def refused():
        shown = []
        reply = client.result(client.submit(Generate(0, [], **settings), shown.append))
        assert (reply.kind, shown) == ("invalid", [None])
        assert re.search(words, reply.message)

    refused()
    assert not client.running  # nor does it start an engine
    first = ask(client)
    refused()
    second = ask(client)
    at = host()
    refused()
    for call in (first, second):
        at.replies.put(done(call))
        assert client.result(call).id == call.request.id
    assert [request.id for request in at.sent] == [first.request.id, second.request.id]
    at.status = -9
    eventually(lambda: not client.running)
    assert (len(StandIn.made), client._pending) == (1, {})  # nobody waits for another engine


def engines():
    """Engine objects that know of the base model alone."""
    pair = LocalEngine(SETTINGS), AsyncLocalEngine(SETTINGS)
    for each in pair:
        each.serve("stand-in", None)
    return pair


async def refused_every_way(request, error, message):
    near, far = engines()
    with pytest.raises(error, match=message):
        near.complete(request)
    with pytest.raises(error, match=message):
        list(near.stream(request))
    with pytest.raises(error, match=message):
        await far.complete(request)
    with pytest.raises(error, match=message):
        [event async for event in far.stream(request)]


async def test_a_value_that_cannot_be_sent_is_dspy_s_error_of_that_call(client, monkeypatch):
    monkeypatch.setattr(client_module, "_clients", {SETTINGS: client})
    message, config = lm15.Message.user("Hello."), lm15.Config(seed=LARGE)
    request = lm15.Request(model="stand-in", messages=(message,), config=config)
    await refused_every_way(request, lm15.InvalidRequestError, f"seed={LARGE} cannot be sent to the engine")


async def test_a_model_string_that_no_lm_has_spoken_for_is_not_answered_by_the_base(client, monkeypatch):
    monkeypatch.setattr(client_module, "_clients", {SETTINGS: client})
    request = lm15.Request(model="stand-in/legal@0123456789ab", messages=(lm15.Message.user("Hello."),))
    await refused_every_way(request, lm15.ConfigurationError, "answers as 'stand-in/legal@0123456789ab'")
    assert not client.running


def test_an_adapter_whose_path_cannot_be_sent_does_not_fail_the_start(client):
    adapters = [published("first", "\udcff"), published("second", "a")]
    client.registries = {Path("/1"): SimpleNamespace(list=lambda: adapters)}
    call = ask(client)
    eventually(lambda: StandIn.made)
    StandIn.made[0].replies.put(Ready({"max_cpu_loras": 4}))
    StandIn.made[0].replies.put(done(call))
    assert client.result(call).id == call.request.id
    assert [each.adapter.path for each in StandIn.made[0].sent[1:]] == ["a"]


# -- callers that stop waiting -----------------------------------------------------------------------------------------


def test_an_interrupted_caller_takes_its_request_back(client, monkeypatch):
    call = ask(client)
    first = host()

    def interrupt(timeout=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(call.future, "result", interrupt)
    with pytest.raises(KeyboardInterrupt):
        client.result(call)
    assert first.sent[-1] == Abort(call.request.id)
    first.replies.put(done(call))  # which was on its way
    other = ask(client)
    first.replies.put(done(other))
    assert client.result(other).id == other.request.id


def test_a_request_taken_back_while_the_engine_starts_is_never_sent(client):
    call, other = ask(client), ask(client)
    client.abort(call)
    assert [request.id for request in host().sent] == [other.request.id]


async def test_an_async_call_that_is_closed_is_taken_back(client, monkeypatch):
    """As Python closes a coroutine that nobody awaits any more: not with CancelledError."""
    monkeypatch.setattr(client_module, "_clients", {SETTINGS: client})
    _, far = engines()
    call = far.complete(lm15.Request(model="stand-in", messages=(lm15.Message.user("Hello."),)))
    call.send(None)
    first = await asyncio.to_thread(host)
    call.close()
    assert client._pending == {}
    assert first.sent[-1] == Abort(first.sent[0].id)


def test_an_answer_to_a_cancelled_future_is_dropped(client):
    call, other = ask(client), ask(client)
    first = host()
    assert call.future.cancel()
    first.replies.put(done(call))
    first.replies.put(done(other))
    assert client.result(other).id == other.request.id


async def test_many_event_loops_wait_for_one_engine(client):
    def loop(number):
        async def wait():
            return (await asyncio.wrap_future(ask(client).future)).id

        return asyncio.run(wait())

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(loop, number) for number in range(8)]
        first = await asyncio.to_thread(host)
        await asyncio.to_thread(eventually, lambda: len(first.sent) == 8)
        for request in first.sent:
            first.replies.put(Done(request.id, [], 0, 0))
        assert len({answer.result(60) for answer in answers}) == 8


# -- hosts that die ----------------------------------------------------------------------------------------------------


def test_what_a_dead_host_had_not_answered_goes_to_the_next_one(client):
    calls = [ask(client) for _ in range(4)]
    first = host()
    first.replies.put(done(calls[0]))
    client.result(calls[0])
    first.status = -9
    second = host(1)
    assert [request.id for request in second.sent] == [call.request.id for call in calls[1:]]
    for call in calls[1:]:
        second.replies.put(done(call))
        client.result(call)
    assert client.restarts == 1


def test_a_request_under_which_two_hosts_died_fails_and_later_ones_go_on(client, caplog):
    poison = ask(client)
    host().status = -9
    second = host(1)
    assert (
        "it is started again for 1 open calls. died with -9" in caplog.text
    )  # the first cause, which nobody else names
    later = ask(client)
    second.status = 70
    with pytest.raises(EngineDiedError, match=r"died twice under this call; .* died with 70"):
        client.result(poison)
    third = host(2)
    assert [request.id for request in third.sent] == [later.request.id]
    third.replies.put(done(later))
    assert client.result(later).id == later.request.id


def test_a_request_that_follows_a_death_starts_a_host(client):
    call = ask(client)
    first = host()
    first.replies.put(done(call))
    client.result(call)
    first.status = -9
    eventually(lambda: not client.running)
    assert len(StandIn.made) == 1  # nobody needs one
    call = ask(client)
    host(1).replies.put(done(call))
    client.result(call)


def test_a_stream_that_had_begun_is_not_started_over(client):
    shown = []
    begun, fresh = ask(client, shown.append), ask(client, shown.append)
    first = host()
    first.replies.put(Delta(begun.request.id, "a"))
    eventually(lambda: shown)
    first.status = -9
    with pytest.raises(EngineDiedError, match=r"while this answer was streaming; call again\. died with -9"):
        client.result(begun)
    assert [request.id for request in host(1).sent] == [fresh.request.id]


@pytest.mark.parametrize("how", ["refused", "died", "bug"])
def test_a_start_that_fails_is_not_repeated_and_fails_every_call(client, how):
    calls = [ask(client) for _ in range(3)]
    first = host(ready=False)
    if how == "refused":
        first.replies.put(StartFailed("no room"))
    elif how == "died":
        first.status = 1
    else:
        first.replies.put(ZeroDivisionError("nonsense"))
    for call in calls:
        with pytest.raises(EngineStartError, match=r"no room|died with 1|ZeroDivisionError: nonsense"):
            client.result(call)
    assert (len(StandIn.made), client.running, client._pending) == (1, False, {})


def test_no_request_is_lost_between_deaths_and_closings(client, monkeypatch):
    """Callers in 16 threads, while hosts die after random answers: each call is answered or fails, and none hangs."""
    stop = threading.Event()

    def serve():
        while not stop.is_set():
            for at in list(StandIn.made):
                if at.ended.is_set():
                    continue
                at.replies.put(Ready({}))
                for request in at.sent[-5:]:
                    at.replies.put(Done(request.id, [], 0, 0))
                if len(at.sent) > 40:
                    at.status = -9
            time.sleep(0.001)

    def call(number):
        try:
            return client.result(ask(client)) is not None
        except EngineError:
            return False

    server = threading.Thread(target=serve)
    server.start()
    with ThreadPoolExecutor(16) as pool:
        calls = [pool.submit(call, number) for number in range(1000)]
        for _ in range(5):
            time.sleep(0.05)
            client.close()
        outcomes = [call.result(60) for call in calls]
    stop.set()
    server.join()
    assert outcomes.count(True) > 500
    assert client._pending == {}


# -- closing -----------------------------------------------------------------------------------------------------------


def test_closing_fails_open_calls_and_the_next_call_starts_a_host(client):
    call = ask(client)
    first = host()
    client.close()
    assert first.ended.is_set()
    with pytest.raises(EngineError, match="closed while this call was open"):
        client.result(call)
    call = ask(client)
    host(1).replies.put(done(call))
    client.result(call)
    assert client.restarts == 0


def test_what_an_abandoned_host_says_is_not_heard(client):
    ask(client)
    first = host(ready=False)
    client.close()
    call = ask(client)
    first.replies.put(Ready({"device": "old"}))
    host(1).replies.put(done(call))
    client.result(call)
    assert client.info == {"device": "none"}


def test_after_ctrl_c_ended_the_program_calls_fail_and_no_engine_starts(client, monkeypatch):
    monkeypatch.setattr(client_module, "_clients", {SETTINGS: client})
    monkeypatch.setattr(client_module, "_interrupted", threading.Event())
    call = ask(client)
    host()
    client_module._give_up_after_interrupt()
    assert client.running  # this program ends by itself: its threads get their answers
    monkeypatch.setattr(client_module.sys, "last_type", KeyboardInterrupt, raising=False)
    client_module._give_up_after_interrupt()
    with pytest.raises(EngineError, match="closed"):
        client.result(call)
    with pytest.raises(EngineError, match="ending after Ctrl-C"):
        ask(client)
    assert len(StandIn.made) == 1


def test_an_engine_that_starts_is_told_of_the_adapters_that_registries_have_for_its_base(client):
    first = [published(f"a{i}", f"/a{i}") for i in range(3)]
    second = [published("b", "/b", base="another"), published("c", "/c")]
    client.registries = {
        Path("/1"): SimpleNamespace(list=lambda: first),
        Path("/2"): SimpleNamespace(list=lambda: raises(AdapterError("not readable"))),
        Path("/3"): SimpleNamespace(list=lambda: raises(OSError(errno.ESTALE, "Stale file handle"))),
        Path("/4"): SimpleNamespace(list=lambda: second),
    }

    ask(client)
    eventually(lambda: StandIn.made)
    StandIn.made[0].replies.put(Ready({"max_cpu_loras": 4}))
    eventually(lambda: len(StandIn.made[0].sent) == 5)

    assert [each.adapter.name for each in StandIn.made[0].sent[1:]] == ["a0@1", "a1@1", "a2@1", "c@1"]
    assert {each.name for each in StandIn.made[0].sent[1:]} == {"ahead"}


def test_an_engine_without_lora_is_told_of_no_adapters(client):
    client.registries = {Path("/1"): SimpleNamespace(list=lambda: [published("a", "/a")])}

    call = ask(client)
    eventually(lambda: StandIn.made)
    StandIn.made[0].replies.put(Ready({"max_cpu_loras": 0}))
    StandIn.made[0].replies.put(done(call))
    client.result(call)

    assert StandIn.made[0].sent == [call.request]


def raises(error):
    raise error


def test_figures_of_an_engine_that_does_not_run_start_none(client, monkeypatch):
    monkeypatch.setattr(client_module, "_clients", {SETTINGS: client})
    stats = LocalEngine(SETTINGS).stats()
    assert not client.running
    assert (stats["pid"], stats["running"], stats["adapters"], stats["restarts"]) == (None, 0, [], 0)


def test_another_patience_with_a_start_is_no_other_engine_and_counts_at_the_next_one():
    patient = engine_settings(SETTINGS.base, load_config(), {"start_timeout_s": 900})
    engine = local_engine(SETTINGS)
    assert local_engine(patient) is engine
    assert engine.client.settings.start_timeout_s == 900
    assert local_engine(SETTINGS).client.settings.start_timeout_s == 600
    close_engines()


def test_equal_settings_share_a_client(client):
    same = engine_settings(Base("stand-in", "nowhere", "main"), load_config())
    other = engine_settings(Base("stand-in", "nowhere", "main"), load_config(), {"max_loras": 3})
    assert engine_client(SETTINGS) is engine_client(same)
    assert engine_client(SETTINGS) is not engine_client(other)
    close_engines()


# -- a real socket without a process -----------------------------------------------------------------------------------


def test_a_dead_host_says_how_it_died_and_shows_the_end_of_its_log(tmp_path):
    dead = client_module.HostProcess(SETTINGS)
    dead.ready, dead.log = True, tmp_path / "log"
    dead.log.write_text("a last word")
    assert str(dead.died(-11)) == (
        "The vLLM engine for 'stand-in' was killed by SIGSEGV\nLast lines of its log:\na last word"
    )


def test_sending_to_a_host_that_is_gone_does_not_block(monkeypatch):
    dead = client_module.HostProcess(SETTINGS)
    try:
        dead.start()
        dead.process.kill()
        dead.process.wait()
        dead.send(Command(1, "stats"))  # pytest's time limit ends a call that blocks
    finally:
        dead.stop()
    dead.send(Command(2, "stats"))  # nor to one that is stopped
    assert not dead.folder.exists()


# -- the line that shows progress --------------------------------------------------------------------------------------

INFO = {"vllm": "0.32.0", "device": "cpu", "max_loras": 12, "max_lora_rank": 16, "max_model_len": 2048}


class Screen(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_moving_line_on_a_terminal(monkeypatch):
    monkeypatch.setattr("sys.stderr", screen := Screen())
    progress = Progress("seedling")
    for _ in range(3):
        progress.tick()
    assert screen.getvalue() == "\rdspy-lora: starting vLLM for 'seedling' ... 0 s"
    progress.done(INFO)
    progress.stop()
    assert screen.getvalue().count("\n") == 1
    assert "12 adapter slots, rank up to 16, context 2048" in screen.getvalue()


def test_progress_promises_no_slots_of_an_engine_without_lora(monkeypatch):
    monkeypatch.setattr("sys.stderr", log := io.StringIO())
    Progress("seedling").done(INFO | {"max_loras": 0, "max_lora_rank": 0})
    assert log.getvalue().endswith("(no LoRA, context 2048)\n")


def test_progress_is_two_lines_in_a_file_and_ends_its_line_where_a_start_fails(monkeypatch):
    monkeypatch.setattr("sys.stderr", log := io.StringIO())
    progress = Progress("seedling")
    progress.tick()
    progress.done(INFO)
    progress.stop()
    assert [line.split(" (")[0] for line in log.getvalue().splitlines()] == [
        "dspy-lora: starting vLLM for 'seedling'",
        "dspy-lora: vLLM 0.32.0 serves 'seedling' on cpu after 0 s",
    ]
    monkeypatch.setattr("sys.stderr", screen := Screen())
    failed = Progress("seedling")
    failed.tick()
    failed.stop()
    failed.stop()
    assert screen.getvalue().endswith("0 s\n")


@pytest.mark.parametrize("closed", [False, True])
def test_progress_does_without_a_standard_error(monkeypatch, capfd, closed):
    screen = io.StringIO()
    screen.close()
    monkeypatch.setattr("sys.stderr", screen if closed else None)
    progress = Progress("seedling")
    progress.tick()
    progress.done(INFO)
    progress.stop()
    assert capfd.readouterr() == ("", "")  # nor does it go elsewhere


# -- words -------------------------------------------------------------------------------------------------------------


def test_the_first_error_in_the_log_is_the_cause():
    log = (
        "(Worker pid=7) INFO 11-24 09:06:04 [x.py:1] fine\n"
        "(EngineCore pid=5) ERROR 11-24 09:06:06 [core.py:9] ValueError: too small\n"
        "(MainProcess pid=3) ERROR 11-24 09:06:07 [y.py:1] RuntimeError: failed. See root cause above.\n"
    )
    assert root_cause("RuntimeError: failed. See root cause above.", log) == "ValueError: too small"
    assert root_cause("RuntimeError: failed. See root cause above.", "nothing") != ""
    assert root_cause("ConfigError: plain", log) == "ConfigError: plain"


def test_a_log_is_shown_by_its_end():
    assert last_lines("\n".join(map(str, range(100)))).splitlines() == [str(line) for line in range(80, 100)]
    assert last_lines("") == "(empty)"


def test_advice_is_given_where_the_cause_is_known():
    assert "kv_cache_gib" in advice("ValueError: larger than the available KV cache memory", "")
    assert "--shm-size" in advice("", "RuntimeError: Insufficient space in /dev/shm for a buffer")
    assert advice("something else", "") == ""
    error = "(EngineCore pid=5) ERROR 11-24 09:06:06 [core.py:9] torch.OutOfMemoryError: CUDA out of memory. Tried"
    assert "too little free memory" in advice("", error)
    healthy = "(EngineCore pid=5) INFO 11-26 17:44:23 [x.py:1] "
    lines = (
        "CPU KV cache size: 139,808 tokens",
        "Explicitly set (1.0/23.54) GiB for KV cache",
        "Free memory on device",
    )
    assert advice("", "\n".join(healthy + line for line in lines) + "\nSegmentation fault") == ""
    assert ending(3) == "ended with status 3"
    assert "memory runs out" in ending(-9)
    assert ending(-11) == "was killed by SIGSEGV"
