"""The child process that owns vLLM: ``python -m dspy_lora.engine.host SOCKET_FOLDER SETTINGS_JSON``.

It tokenises, renders the chat template, runs ``AsyncLLM``, parses reasoning and tool calls, and answers over ZeroMQ.
It ends when the user's process ends (its standard input closes, or its parent changes), and takes vLLM's own child
processes with it.
"""

import asyncio
import contextlib
import dataclasses
import functools
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import zmq
import zmq.asyncio

from dspy_lora.engine.parsers import Parsers
from dspy_lora.engine.protocol import (
    Abort,
    Adapter,
    Candidate,
    Command,
    Delta,
    Done,
    Failed,
    Generate,
    Ready,
    Reply,
    Request,
    Result,
    StartFailed,
    Token,
)
from dspy_lora.engine.settings import check_engine_args
from dspy_lora.errors import AdapterError

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

ENGINE_DIED = 70  # exit status that tells the client vLLM's core is gone
_PARENT_POLL_S = 2.0


class Host:
    """Serves requests on one ``AsyncLLM``.

    Args:
        engine: The running engine.
        parsers: Reasoning and tool parsers of the model.
        replies: Socket to the client.
        stats: Collects scheduler statistics.
    """

    def __init__(self, engine: "AsyncLLM", parsers: Parsers, replies: zmq.asyncio.Socket, stats: "Statistics") -> None:
        self.engine = engine
        self.tokenizer = engine.get_tokenizer()
        self.max_model_len: int = engine.model_config.max_model_len
        self.parsers = parsers
        self.replies = replies
        self.stats = stats
        self.loras: dict[str, LoRARequest] = {}
        self.loading: dict[str, asyncio.Task[LoRARequest]] = {}
        self.tasks: dict[int, asyncio.Task[None]] = {}

    async def serve(self, requests: zmq.asyncio.Socket) -> None:
        """Handles messages until the task is cancelled."""
        decoder = msgspec.msgpack.Decoder(Request)
        while True:
            message = decoder.decode(await requests.recv())
            if isinstance(message, Abort):
                if task := self.tasks.get(message.id):
                    task.cancel()
                continue
            work = self.generate(message) if isinstance(message, Generate) else self.command(message)
            task = asyncio.create_task(self.answer(message.id, work))
            self.tasks[message.id] = task
            task.add_done_callback(functools.partial(self.forget, message.id))

    def forget(self, id: int, task: "asyncio.Task[None]") -> None:
        """Drops a finished request's task."""
        self.tasks.pop(id, None)

    async def answer(self, id: int, work: Any) -> None:
        """Awaits ``work`` and turns what it raises into a ``Failed`` reply."""
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await work
        except EngineDeadError:
            os._exit(ENGINE_DIED)
        except ContextTooLong as exc:
            await self.send(Failed(id, "context", str(exc)))
        except AdapterError as exc:
            await self.send(Failed(id, "adapter", str(exc)))
        except (VLLMClientError, ValueError, TypeError) as exc:
            await self.send(Failed(id, "invalid", str(exc)))
        except Exception as exc:  # noqa: BLE001 - whatever vLLM raises is this caller's answer
            await self.send(Failed(id, "server", f"{type(exc).__name__}: {exc}"))

    async def send(self, reply: Reply) -> None:
        """Sends one reply to the client."""
        await self.replies.send(msgspec.msgpack.encode(reply))

    async def generate(self, request: Generate) -> None:
        """Runs one prompt and sends its deltas and its result."""
        from vllm.inputs.engine import tokens_input

        prompt = self.prompt_tokens(request)
        params = self.sampling_params(request, len(prompt))
        lora = await self.lora(request.adapter) if request.adapter else None
        outputs = self.engine.generate(tokens_input(prompt), params, str(request.id), lora_request=lora)
        if request.stream:
            final = await self.stream(request, prompt, outputs)
        else:
            final = [output async for output in outputs][-1]
        candidates = [self.candidate(request, output) for output in final.outputs]
        self.stats.count(len(prompt), sum(candidate.output_tokens for candidate in candidates))
        await self.send(Done(request.id, candidates, len(prompt), final.num_cached_tokens or 0))

    def prompt_tokens(self, request: Generate) -> list[int]:
        """The chat template's token ids."""
        text = self.tokenizer.apply_chat_template(
            request.messages, tools=request.tools, add_generation_prompt=True, tokenize=False, **request.template
        )
        prompt: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        if len(prompt) >= self.max_model_len:
            raise ContextTooLong(
                f"The prompt has {len(prompt)} tokens; the model's context holds {self.max_model_len}, of which one at "
                "least must be left for the answer. Shorten the input or drop demos."
            )
        return prompt

    def sampling_params(self, request: Generate, prompt_tokens: int) -> Any:
        """vLLM's parameters, ``max_tokens`` cut to what the context leaves."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        sampling = dict(request.sampling)
        room = self.max_model_len - prompt_tokens
        sampling["max_tokens"] = min(sampling.get("max_tokens") or room, room)
        if structured := sampling.pop("structured_outputs", None):
            sampling["structured_outputs"] = StructuredOutputsParams(**structured)
        sampling["output_kind"] = RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY
        return SamplingParams(**sampling | self.parsers.sampling(request))

    async def stream(self, request: Generate, prompt: list[int], outputs: Any) -> "RequestOutput":
        """Sends deltas; returns the last output with the whole text and tokens put back together."""
        splitter = self.parsers.splitter(request, prompt)
        text, ids, logprobs = "", list[int](), list[Any]()
        async for output in outputs:
            [piece] = output.outputs
            text, ids = text + piece.text, ids + list(piece.token_ids)
            logprobs += piece.logprobs or []
            delta = splitter.feed(piece.text, piece.token_ids)
            if delta.text or delta.thinking:
                tokens = [_token(entry, id) for entry, id in zip(piece.logprobs or [], piece.token_ids, strict=False)]
                await self.send(Delta(request.id, delta.text, delta.thinking, tokens))
        piece.text, piece.token_ids, piece.logprobs = text, ids, logprobs or None
        return output

    def candidate(self, request: Generate, output: "CompletionOutput") -> Candidate:
        """A finished sample as the client gets it."""
        parsed = self.parsers.parse(request, output.text, output.token_ids)
        logprobs = None
        if output.logprobs is not None:
            logprobs = [_token(entry, id) for entry, id in zip(output.logprobs, output.token_ids, strict=False)]
        return Candidate(
            text=parsed.text,
            thinking=parsed.thinking,
            reasoning_tokens=parsed.reasoning_tokens,
            tool_calls=parsed.tool_calls,
            finish_reason="tool_calls" if parsed.tool_calls else output.finish_reason or "stop",
            output_tokens=len(output.token_ids),
            logprobs=logprobs,
        )

    async def lora(self, adapter: Adapter) -> "LoRARequest":
        """The engine's handle on an adapter, loaded at the first use.

        Loading goes through ``add_lora`` first because a load that fails inside a batch would end vLLM's core.
        """
        if not await asyncio.to_thread(Path(adapter.path, "adapter_model.safetensors").exists):
            raise AdapterError(
                f"adapter {adapter.name!r} is gone from {adapter.path!r}. Publish it again, or name another revision."
            )
        if adapter.name in self.loras:
            return self.loras[adapter.name]
        if adapter.name not in self.loading:
            self.loading[adapter.name] = asyncio.create_task(self.load(adapter))
        try:
            return await asyncio.shield(self.loading[adapter.name])
        finally:
            if adapter.name in self.loading and self.loading[adapter.name].done():
                del self.loading[adapter.name]

    async def load(self, adapter: Adapter) -> "LoRARequest":
        """Loads an adapter under an integer id that is never used again."""
        from vllm.lora.request import LoRARequest

        lora = LoRARequest(adapter.name, self.stats.next_lora_id(), adapter.path)
        try:
            await self.engine.add_lora(lora)
        except Exception as exc:
            raise AdapterError(f"vLLM cannot load adapter {adapter.name!r} from {adapter.path!r}: {exc}") from exc
        self.loras[adapter.name] = lora
        return lora

    async def command(self, command: Command) -> None:
        """Answers ``load``, ``unload``, ``stats``, ``sleep`` and ``wake``."""
        value: dict[str, Any] = {}
        if command.name == "load" and command.adapter:
            await self.lora(command.adapter)
        elif command.name == "unload" and command.adapter:
            if lora := self.loras.pop(command.adapter.name, None):
                await self.engine.remove_lora(lora.lora_int_id)
            value["unloaded"] = lora is not None
        elif command.name == "stats":
            resident = await self.engine.list_loras()
            names = {lora.lora_int_id: name for name, lora in self.loras.items()}
            value = self.stats.snapshot() | {"adapters": sorted(names[id] for id in resident if id in names)}
        elif command.name == "sleep":
            await self.engine.sleep()
        elif command.name == "wake":
            await self.engine.wake_up()
        await self.send(Result(command.id, value))


class ContextTooLong(ValueError):
    """A prompt that does not fit the model's context."""


class Statistics:
    """Running totals and vLLM's newest scheduler statistics."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.requests = self.prompt_tokens = self.output_tokens = 0
        self.running = self.waiting = 0
        self.kv_cache_usage = 0.0
        self.cache_queries = self.cache_hits = 0
        self._window = (self.started, 0)
        self._lora_id = 0

    def count(self, prompt_tokens: int, output_tokens: int) -> None:
        """Adds one finished request."""
        self.requests += 1
        self.prompt_tokens += prompt_tokens
        self.output_tokens += output_tokens

    def next_lora_id(self) -> int:
        """An integer id for a LoRA request, never reused."""
        self._lora_id += 1
        return self._lora_id

    def record(self, scheduler: Any) -> None:
        """Takes over vLLM's ``SchedulerStats``."""
        self.running, self.waiting = scheduler.num_running_reqs, scheduler.num_waiting_reqs
        self.kv_cache_usage = scheduler.kv_cache_usage
        self.cache_queries += scheduler.prefix_cache_stats.queries
        self.cache_hits += scheduler.prefix_cache_stats.hits

    def snapshot(self) -> dict[str, Any]:
        """The figures ``engine_stats()`` shows; tokens per second since the last snapshot."""
        now = time.monotonic()
        since, tokens = self._window
        self._window = (now, self.output_tokens)
        return {
            "running": self.running,
            "waiting": self.waiting,
            "requests": self.requests,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "output_tokens_per_s": (self.output_tokens - tokens) / max(now - since, 1e-9),
            "kv_cache_usage": self.kv_cache_usage,
            "prefix_cache_queries": self.cache_queries,
            "prefix_cache_hits": self.cache_hits,
            "uptime_s": now - self.started,
            "pid": os.getpid(),
        }


def _token(entry: dict[int, Any], id: int) -> Token:
    """One position of vLLM's log-probabilities; the chosen token first, alternatives by rank."""
    chosen = entry[id]
    ranked = sorted(entry.items(), key=lambda item: item[1].rank)
    top = [(logprob.decoded_token or "", logprob.logprob, token) for token, logprob in ranked]
    return Token(chosen.decoded_token or "", chosen.logprob, id, top)


def _watch_parent() -> None:
    """Ends this process group when the user's process is gone.

    Standard input is a pipe whose other end only the user's process holds; a fork of that process may hold it too, so
    the parent's id is watched as well.
    """
    parent = os.getppid()

    def until_end_of_input() -> None:
        while os.read(0, 1):
            pass
        os.killpg(0, signal.SIGKILL)

    def until_orphaned() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_S)
        os.killpg(0, signal.SIGKILL)

    for target in (until_end_of_input, until_orphaned):
        threading.Thread(target=target, daemon=True).start()


def _cpu_defaults(kv_cache_gib: float) -> None:
    """Settings of vLLM's CPU back end, unless the user set them.

    ``VLLM_CPU_NUM_OF_RESERVED_CPU=0`` uses every core: it nearly doubled throughput on two cores.
    """
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(kv_cache_gib))))
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")


def _start(settings: dict[str, Any], stats: Statistics) -> "tuple[AsyncLLM, dict[str, Any]]":
    """Brings vLLM up; must run inside the event loop that will use it."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    _cpu_defaults(settings["kv_cache_gib"])
    import vllm
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Recorder(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
            if scheduler_stats is not None:
                stats.record(scheduler_stats)

        def log_engine_initialized(self) -> None:
            pass

    args = {"enable_lora": True, "max_loras": 12, "max_lora_rank": 16, "disable_log_stats": True}
    args |= json.loads(settings["args"])
    check_engine_args(args, {field.name for field in dataclasses.fields(AsyncEngineArgs)})
    base = settings["base"]
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=base["path"], **args), stat_loggers=[Recorder])
    info = {
        "max_model_len": engine.model_config.max_model_len,
        "max_loras": args["max_loras"],
        "max_lora_rank": args["max_lora_rank"],
        "vllm": vllm.__version__,
        "device": current_platform.device_type,
    }
    return engine, info


async def _main(folder: str, settings: dict[str, Any]) -> int:
    context = zmq.asyncio.Context()
    requests, replies = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    for socket, name in ((requests, "requests"), (replies, "replies")):
        socket.set_hwm(0)
        socket.connect(f"ipc://{folder}/{name}")
    stats = Statistics()
    try:
        engine, info = _start(settings, stats)
        parsers = Parsers(engine.get_tokenizer(), settings["tool_parser"], settings["reasoning_parser"])
    except BaseException as exc:  # noqa: BLE001 - the client raises it
        await replies.send(msgspec.msgpack.encode(StartFailed(f"{type(exc).__name__}: {exc}")))
        replies.close(linger=2000)
        return 1
    host = Host(engine, parsers, replies, stats)
    await host.send(Ready(info))
    with contextlib.suppress(asyncio.CancelledError):
        await host.serve(requests)
    return 0


if __name__ == "__main__":
    _watch_parent()
    status = asyncio.run(_main(sys.argv[1], json.loads(sys.argv[2])))
    sys.stdout.flush()
    os._exit(status)
