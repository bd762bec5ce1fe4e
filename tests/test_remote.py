"""``LoRALM(api_base=...)`` against vLLM's own OpenAI server on loopback, and against what is no such server."""

import asyncio
import contextlib
import http.server
import json
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import dspy
import httpx
import pytest
from dspy.utils.exceptions import (
    ContextWindowExceededError,
    LMAuthError,
    LMConfigurationError,
    LMError,
    LMInvalidRequestError,
    LMServerError,
    LMTransportError,
)

from dspy_lora import AdapterRegistry, LoRALM
from dspy_lora.adapters.base import resolve_base
from dspy_lora.config import load_config
from dspy_lora.engine.openai_server import OpenAIServer, free_port, running
from dspy_lora.engine.settings import engine_settings

pytestmark = pytest.mark.timeout(600)
KEY = "key-of-the-test-server"
LONG = {"max_tokens": 24, "ignore_eos": True}  # so many tokens, whatever the weights say
ENGINE = {"dtype": "float32", "tool_parser": "hermes", "disable_log_stats": False}


@pytest.fixture(scope="module")
def server():
    """vLLM's server with the seedling; yields its address."""
    settings = engine_settings(resolve_base("seedling"), load_config(), ENGINE)
    with running(OpenAIServer(settings, (), "127.0.0.1", free_port(), ("--api-key", KEY))) as address:
        yield address


@pytest.fixture
def far(server):
    """Makes LMs of the server."""

    def make(domain=None, **kwargs):
        settings = {"max_tokens": 16, "cache": False, "num_retries": 0, "api_key": KEY} | kwargs
        return LoRALM("seedling", domain=domain, api_base=server, **settings)

    return make


@pytest.fixture
def lm(far):
    return far("legal")


def served(server):
    return {card["id"] for card in call(server, "GET", "/models")["data"]}


def call(server, method, path, body=None):
    reply = httpx.request(method, server + path, json=body, headers={"Authorization": f"Bearer {KEY}"})
    assert reply.status_code == 200, reply.text
    return reply.json() if method == "GET" else reply.text


def metric(server, name):
    """A counter of vLLM's."""
    lines = httpx.get(server.removesuffix("/v1") + "/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


# -- the server's features ---------------------------------------------------------------------------------------------


def test_each_domain_answers_as_on_an_engine_of_our_own(far, make_lm):
    for domain in (None, "legal", "financial"):
        prompts = ["What is asked here?", "A clause about the governing law."]
        assert [far(domain)(prompt) for prompt in prompts] == [make_lm(domain)(prompt) for prompt in prompts]


async def test_an_async_call_gives_the_same_answer(lm):
    assert await lm.acall("Hello.") == lm("Hello.")


def test_calls_from_many_threads_and_event_loops_reach_their_adapters(far):
    lms = [far(domain) for domain in ("legal", "marketing", "research", None)]
    alone = [lm("Hello.") for lm in lms]
    assert len(set(map(str, alone))) > 1
    with ThreadPoolExecutor(32) as pool:
        sync = list(pool.map(lambda lm: lm("Hello."), lms * 16))
        loops = list(pool.map(lambda lm: asyncio.run(lm.acall("Hello.")), lms * 4))
    assert sync == alone * 16 and loops == alone * 4


def test_the_response_names_the_model_string(lm):
    lm("Hello.")
    assert lm.history[-1]["response_model"] == lm.model
    assert lm.history[-1]["usage"]["completion_tokens"] > 0


def test_samples_are_one_request(lm, server):
    before = metric(server, "vllm:request_prompt_tokens_count"), metric(server, "vllm:prompt_tokens_total")
    answers = lm("Hello.", n=4, temperature=2.0, seed=7, **LONG)
    assert len(set(answers)) == 4
    requests = metric(server, "vllm:request_prompt_tokens_count") - before[0]
    assert requests in (1, 4)  # vLLM counts the samples of one request
    usage = lm.history[-1]["usage"]
    assert usage["completion_tokens"] == 4 * 24
    assert usage["prompt_tokens"] < 60


async def test_async_samples_are_one_request(lm, monkeypatch):
    sent = []
    monkeypatch.setattr(lm._async_engine_spec, "_many", spy(lm._async_engine_spec._many, sent))
    assert len(set(await lm.acall("Hello.", n=3, temperature=2.0, **LONG))) == 3
    assert len(sent) == 1


def spy(function, calls):
    def called(*args):
        calls.append(args)
        return function(*args)

    return called


def test_greedy_samples_are_drawn_once(lm):
    answers = lm("Hello.", n=3)
    assert len(answers) == 3 and len(set(answers)) == 1


def test_a_seed_repeats_an_answer(lm):
    first, again, other = (lm("Hello.", seed=seed, temperature=2.0, **LONG) for seed in (5, 5, 6))
    assert first == again != other


def test_stop_ends_before_the_word(lm):
    [whole] = lm("Tell me a story.", **LONG)
    stop = whole[len(whole) // 2 :][:3]
    assert lm("Tell me a story.", stop=[stop], **LONG) == [whole[: whole.index(stop)]]


@pytest.mark.parametrize(
    "setting", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}], ids=lambda setting: next(iter(setting))
)
def test_a_setting_that_leaves_one_token_is_greedy(lm, setting):
    assert lm("Hello.", temperature=2.0, **setting, **LONG) == lm("Hello.", **LONG)


def test_vllm_s_own_settings_reach_the_server(lm):
    def tokens(penalty):
        [answer] = lm("Hello.", repetition_penalty=penalty, logprobs=True, max_tokens=48, ignore_eos=True)
        return [token["token"] for token in answer["logprobs"]["content"]]

    assert len(set(tokens(1.0))) < len(set(tokens(2.0)))
    assert lm("Well?", structured_outputs={"choice": ["yes"]}) == ["yes"]
    assert lm.copy(min_p=1.0, temperature=2.0)("Hello.") == lm("Hello.")


def test_logprobs_give_the_chosen_token_and_the_likeliest(lm):
    [answer] = lm("Hello.", logprobs=True, top_logprobs=3, temperature=2.0, seed=1, **LONG)
    content = answer["logprobs"]["content"]
    assert len(content) == 24
    for entry in content:
        top = [other["logprob"] for other in entry["top_logprobs"]]
        assert len(top) >= 3 and entry["logprob"] <= max(top) <= 0


class Grade(dspy.Signature):
    """Grade the text."""

    text: str = dspy.InputField()
    grade: Literal["good", "bad"] = dspy.OutputField()
    sure: bool = dspy.OutputField()


def test_json_adapter_s_schema_is_enforced(lm):
    for seed in range(3):
        with dspy.context(lm=lm.copy(max_tokens=200, temperature=1.0, seed=seed), adapter=dspy.JSONAdapter()):
            graded = dspy.Predict(Grade)(text="Fine work.")
        assert graded.grade in ("good", "bad") and isinstance(graded.sure, bool)


def weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


class Ask(dspy.Signature):
    question: str = dspy.InputField()
    tools: list[dspy.Tool] = dspy.InputField()
    outputs: dspy.ToolCalls = dspy.OutputField()


def test_a_tool_is_called(lm):
    forced = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    lm = lm.copy(structured_outputs={"choice": [forced]}, max_tokens=200)
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter(use_native_function_calling=True)):
        [found] = dspy.Predict(Ask)(question="Weather?", tools=[dspy.Tool(weather)]).outputs.tool_calls
    assert (found.name, found.args) == ("weather", {"city": "Paris"})


FORCED = {"structured_outputs": {"regex": r"\[\[ ## answer ## \]\]\n[a-z]{30,40}\n\n\[\[ ## completed ## \]\]"}}


async def test_streamify_hands_out_tokens(lm):
    listener = dspy.streaming.StreamListener(signature_field_name="answer")
    program = dspy.streamify(dspy.Predict("question -> answer"), stream_listeners=[listener])
    chunks, final = [], None
    with dspy.context(lm=lm.copy(max_tokens=100, **FORCED)):
        async for event in program(question="Why?"):
            if isinstance(event, dspy.streaming.StreamResponse):
                chunks.append(event.chunk)
            else:
                final = event
    assert len(chunks) > 3
    assert "".join(chunks).strip() == final.answer


def test_streamify_hands_out_tokens_to_sync_code(lm):
    listener = dspy.streaming.StreamListener(signature_field_name="answer")
    program = dspy.streamify(
        dspy.Predict("question -> answer"), stream_listeners=[listener], async_streaming=False, is_async_program=False
    )
    with dspy.context(lm=lm.copy(max_tokens=100, **FORCED)):
        events = list(program(question="Why?"))
    assert sum(isinstance(event, dspy.streaming.StreamResponse) for event in events) > 3


def test_a_prompt_beyond_the_context_is_dspy_s_error(lm):
    with pytest.raises(ContextWindowExceededError, match="maximum context length"):
        lm("word " * 3000)


def test_max_tokens_is_cut_to_what_the_context_leaves(lm):
    [answer] = lm("word " * 1500, max_tokens=1024, ignore_eos=True)
    assert answer
    assert lm.history[-1]["usage"]["completion_tokens"] < 1024


def test_a_setting_out_of_range_is_refused(lm):
    with pytest.raises(LMInvalidRequestError, match="min_p"):
        lm("Hello.", min_p=7.0)
    with pytest.raises(LMInvalidRequestError, match="'min_tokenz' is no sampling setting"):
        lm("Hello.", metadata={"min_tokenz": 3})


def test_the_cache_keeps_adapters_apart(far):
    legal, base = far("legal", cache=True), far(cache=True)
    first = legal("A question of its own.")
    assert base("A question of its own.") != first == legal("A question of its own.")
    assert legal.history[-1]["usage"] == {}


# -- adapters on the server --------------------------------------------------------------------------------------------


def test_an_adapter_is_loaded_at_its_first_call_and_unloaded(far, server):
    lm = far("education")
    name = lm.adapter.ref
    lm.unload()  # what is not there is not unloaded twice
    assert name not in served(server)
    lm.preload()
    assert name in served(server) and name in lm.engine_stats()["models"]
    answer = lm("Hello.")
    lm.unload()
    assert name not in served(server)
    assert lm("Hello.") == answer


def test_an_adapter_that_another_client_unloaded_is_loaded_again(far, server):
    lm = far("analytics", num_retries=1)
    answer = lm("Hello.")
    call(server, "POST", "/unload_lora_adapter", {"lora_name": lm.adapter.ref})
    assert lm("Hello.") == answer
    call(server, "POST", "/unload_lora_adapter", {"lora_name": lm.adapter.ref})
    assert asyncio.run(lm.acall("Hello.")) == answer


def test_an_adapter_that_another_client_loads_at_once_is_no_error(far, server, monkeypatch):
    lm = far("operations")
    lm.unload()
    engine = lm._engine_spec
    before = engine._models()
    call(server, "POST", "/load_lora_adapter", {"lora_name": lm.adapter.ref, "lora_path": str(lm.adapter.path)})
    looks = iter([before])
    monkeypatch.setattr(engine, "_models", lambda models=engine._models: next(looks, None) or models())
    assert lm("Hello.")


def test_an_adapter_that_the_server_cannot_load_is_named(far, tmp_path, monkeypatch):
    registry = AdapterRegistry(tmp_path / "adapters")
    published = registry.publish(AdapterRegistry().resolve("legal").path, "vanishing", base=far().base)
    lm = far("vanishing", registry=registry.root)
    (published.path / "adapter_model.safetensors").unlink()
    with pytest.raises(LMError, match=r"'vanishing@\w+' cannot be loaded from .*must see under the same path"):
        lm("Hello.")
    assert far("legal")("Hello.")  # and the server goes on


# -- copies and files --------------------------------------------------------------------------------------------------


def test_a_copy_is_bound_to_another_adapter_of_the_same_server(lm, far):
    financial = lm.copy(domain="financial")
    assert financial.domain == "financial" and financial("Hello.") == far("financial")("Hello.")
    assert lm.copy(domain=None)("Hello.") == far()("Hello.")


def test_a_pickle_holds_no_key_and_takes_it_from_the_environment(lm, monkeypatch):
    pickled = pickle.dumps(lm)
    assert KEY.encode() not in pickled
    with pytest.raises(LMAuthError, match="DSPY_LORA_API_KEY"):
        pickle.loads(pickled)("Hello.")  # noqa: S301
    monkeypatch.setenv("DSPY_LORA_API_KEY", KEY)
    assert pickle.loads(pickled)("Hello.") == lm("Hello.")  # noqa: S301


def test_a_saved_program_holds_no_key_and_finds_the_server_again(far, tmp_path, monkeypatch):
    program = dspy.Module()
    program.first, program.second = dspy.Predict("question -> answer"), dspy.Predict("question -> answer")
    program.first.lm, program.second.lm = far("legal"), far("financial")
    path = tmp_path / "program.json"
    program.save(str(path))
    assert KEY not in path.read_text()
    monkeypatch.setenv("DSPY_LORA_API_KEY", KEY)
    program.load(str(path), allow_unsafe_lm_state=True)
    assert [program.first.lm.domain, program.second.lm.domain] == ["legal", "financial"]
    assert program.first.lm("Hello.") == far("legal")("Hello.")


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_a_wrong_key_is_refused_with_what_to_do(far):
    with pytest.raises(LMAuthError, match=r"refused the key. Give LoRALM\(api_key=...\) or set DSPY_LORA_API_KEY"):
        far("legal", api_key="wrong")("Hello.")


def test_a_key_that_is_refused_later_is_the_same_error(far):
    lm = far("legal", api_key="wrong-later")
    lm._engine_spec._served[lm.model] = lm.adapter.ref
    with pytest.raises(LMAuthError, match="refused the key"):
        lm("Hello.")


def test_another_base_is_refused_with_what_is_served(server, thinking_base):
    lm = LoRALM(str(thinking_base), api_base=server, api_key=KEY, cache=False)
    with pytest.raises(LMConfigurationError, match=r"serves \['seedling'\], not '.*thinker'.*first argument of LoRALM"):
        lm("Hello.")


def test_nothing_listening_is_an_error_with_the_address():
    address = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(LMTransportError, match=f"no answer from the server at {address}.*Is it running"):
        LoRALM("seedling", api_base=address, num_retries=0, cache=False)("Hello.")


def test_what_is_no_address_is_refused():
    with pytest.raises(LMConfigurationError, match="'localhost:8000' is no address"):
        LoRALM("seedling", api_base="localhost:8000", num_retries=0, cache=False)("Hello.")


@pytest.fixture
def pretend():
    """Starts servers that answer from a table: path -> (status, body)."""
    servers = []

    def start(table):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, body = table.get(self.path, (404, '{"detail": "Not Found"}'))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            do_POST = do_GET

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


MODELS = (200, '{"data": [{"id": "seedling", "parent": null}]}')


def stranger(address, domain=None):
    return LoRALM("seedling", domain=domain, api_base=address, num_retries=0, cache=False)


@pytest.mark.parametrize(
    "body", ["<html>Welcome</html>", "[]", '{"data": 3}', ""], ids=["html", "list", "data", "empty"]
)
def test_a_server_that_lists_nonsense_is_an_error(pretend, body):
    with pytest.raises(LMServerError, match="is no answer of an OpenAI-compatible server"):
        stranger(pretend({"/v1/models": (200, body)}))("Hello.")


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("body", ["<html>Welcome</html>", '"text"', '{"choices": 3}', "{"])
def test_a_server_that_answers_nonsense_is_an_error(pretend, body, n):
    lm = stranger(pretend({"/v1/models": MODELS, "/v1/chat/completions": (200, body)}))
    with pytest.raises(LMError, match=r"is no answer of an OpenAI-compatible server|is not JSON"):
        lm("Hello.", n=n, temperature=1.0)


def test_a_server_that_fails_is_a_server_error(pretend):
    lm = stranger(pretend({"/v1/models": MODELS, "/v1/chat/completions": (500, "out of order")}))
    with pytest.raises(LMServerError, match="out of order"):
        lm("Hello.")


def test_an_address_without_its_path_is_refused(pretend):
    address = pretend({"/v1/models": MODELS}).removesuffix("/v1")
    with pytest.raises(LMConfigurationError, match=r"no list of models at .*/models. Give the address with its path"):
        stranger(address)("Hello.")


def test_a_server_that_loads_no_adapters_says_what_it_needs(pretend):
    lm = stranger(pretend({"/v1/models": MODELS}), "legal")
    with pytest.raises(LMConfigurationError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        lm("Hello.")


def test_an_adapter_that_a_server_lists_is_not_loaded(pretend):
    answer = '{"id": "1", "model": "m", "choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]}'
    name = AdapterRegistry().resolve("legal").ref
    models = f'{{"data": [{{"id": "seedling"}}, {{"id": "{name}", "parent": "seedling"}}]}}'
    address = pretend({"/v1/models": (200, models), "/v1/chat/completions": (200, answer)})
    assert stranger(address, "legal")("Hello.") == ["yes"]


# -- forks -------------------------------------------------------------------------------------------------------------


class Echo(http.server.BaseHTTPRequestHandler):
    """Repeats what it is asked, after a while, on connections that are kept."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer({"data": [{"id": "seedling"}]})

    def do_POST(self):
        [message] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
        time.sleep(0.1)
        self.answer({"id": "1", "model": "m", "choices": [{"message": message | {"role": "assistant"}}]})

    def answer(self, body):
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 64


@pytest.fixture
def serving():
    """Starts servers of a thread by their handlers; gives their addresses."""
    with contextlib.ExitStack() as stack:

        def start(handler):
            server = stack.enter_context(Server(("127.0.0.1", 0), handler))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}/v1"

        yield start


@pytest.fixture
def echo(serving):
    """The address of a server that repeats what it is asked."""
    return serving(Echo)


class Counting(Echo):
    """Counts its connections."""

    opened = 0

    def setup(self):
        type(self).opened += 1
        super().setup()


class Crowded(Echo):
    """Loads an adapter once it is told to, and answers once many ask."""

    load, crowd = threading.Event(), threading.Barrier(40)

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "lora_name" in asked:
            self.load.wait(30)
            self.answer("done")
            return
        if asked["messages"][0]["content"] == "All at once.":
            self.crowd.wait(30)
        choice = {"message": {"role": "assistant", "content": "yes"}}
        self.answer({"id": "1", "model": "m", "choices": [choice] * asked.get("n", 1)})


def test_samples_go_over_connections_that_are_kept(serving):
    lm = stranger(serving(Counting))
    for _ in range(5):
        lm("Hello.", n=2, temperature=1.0)
    assert Counting.opened == 1


async def test_async_samples_do_not_queue_for_the_event_loop_s_few_threads(serving):
    lm = stranger(serving(Crowded))
    answers = await asyncio.gather(*(lm.acall("All at once.", n=2, temperature=1.0) for _ in range(40)))
    assert answers == [["yes", "yes"]] * 40


async def test_an_adapter_that_is_slow_to_load_holds_nobody_else_up(serving):
    base = stranger(serving(Crowded))
    legal, other = base.copy(domain="legal"), base.copy(domain="financial")
    base("Hello.")
    with ThreadPoolExecutor(2) as pool:
        try:
            slow = pool.submit(legal, "Hello.")
            tasks = [asyncio.create_task(other.acall("Hello.")) for _ in range(40)]
            await asyncio.sleep(0.3)
            assert await asyncio.wait_for(asyncio.to_thread(base, "Hello."), 10) == ["yes"]
            assert await asyncio.wait_for(base.acall("Hello."), 10) == ["yes"]
            assert not slow.done() and not any(task.done() for task in tasks)
        finally:
            Crowded.load.set()
        assert slow.result(30) == ["yes"]
        assert await asyncio.gather(*tasks) == [["yes"]] * 40


def test_a_model_string_that_no_lm_has_spoken_for_is_not_answered_by_the_base(echo):
    lm = stranger(echo)
    lm.model = lm.model_string("legal@0123456789ab")
    with pytest.raises(LMConfigurationError, match="no LoRALM of this process has said what answers as"):
        lm("Hello.")


def test_an_event_loop_that_has_ended_leaves_no_connection(echo):
    lm = LoRALM("seedling", api_base=echo, num_retries=0, cache=False)
    ended = set()
    for _ in range(3):
        assert asyncio.run(lm.acall("First.")) == ["First."]
        [loop] = lm._async_engine_spec._routers
        ended.add(loop)
    assert len(ended) == 3


def run_fork(address, code):
    """Runs a program that forks; nothing of it may take long."""
    start = f"""
import asyncio, os, signal, sys, threading
from dspy_lora import LoRALM

lm = LoRALM("seedling", api_base={address!r}, num_retries=0, cache=False)

def end(child):
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the child ended with {{status}}"

assert lm("First.") == ["First."]
"""
    done = subprocess.run(
        [sys.executable, "-c", start + code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_fork_and_its_parent_get_their_own_answers(echo):
    run_fork(
        echo,
        """
questions = [f"{number}, please." for number in range(5)]
asyncio.run(lm.acall("First."))
child = os.fork()
asked = [f"{'parent' if child else 'child'}: {question}" for question in questions]
assert [lm(question) for question in asked] == [[question] for question in asked]
assert [asyncio.run(lm.acall(question)) for question in asked] == [[question] for question in asked]
if child:
    end(child)
""",
    )


@pytest.mark.parametrize("lock", ["engine._lock_of(lm.model)", "engine._opening"])
def test_a_fork_waits_for_no_thread_of_its_parent(echo, lock):
    run_fork(
        echo,
        f"""
engine = lm._engine_spec
engine._served.clear()
lock = {lock}
lock.acquire()  # as a thread does, which the child does not have
child = os.fork()
if child:
    lock.release()
    end(child)
else:
    signal.alarm(20)
assert lm("Second.") == ["Second."]
""",
    )


def test_a_fork_has_connections_and_threads_of_its_own_for_samples(echo):
    run_fork(
        echo,
        """
ask = dict(n=2, temperature=1.0)
assert lm("First.", **ask) == asyncio.run(lm.acall("First.", **ask)) == ["First."] * 2
child = os.fork()
if not child:
    signal.alarm(20)
name = "parent" if child else "child"
for number in range(5):
    question = f"{name} {number}"
    assert lm(question, **ask) == asyncio.run(lm.acall(question, **ask)) == [question] * 2
if child:
    end(child)
""",
    )


def test_a_fork_that_ends_leaves_its_parent_s_event_loop_alone(echo):
    run_fork(
        echo,
        """
loop = asyncio.new_event_loop()
threading.Thread(target=loop.run_forever, daemon=True).start()

def ask(question):
    return asyncio.run_coroutine_threadsafe(lm.acall(question), loop).result(20)

assert ask("First.") == ["First."]
open_call = asyncio.run_coroutine_threadsafe(lm.acall("Second."), loop)
child = os.fork()
if child:
    end(child)
    assert open_call.result(20) == ["Second."]
    assert ask("Third.") == ["Third."]
""",
    )
