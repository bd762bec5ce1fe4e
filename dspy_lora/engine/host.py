"""The child process that owns vLLM: ``python -m dspy_lora.engine.host SOCKET_FOLDER SETTINGS_JSON``.

It tokenises, renders the chat template, runs ``AsyncLLM``, parses reasoning and tool calls, and answers over ZeroMQ.
How adapters come into vLLM is in residents.py.

It ends when the user's process ends (its standard input closes, or its parent changes), and takes vLLM's own child
processes with it.
"""

import asyncio
import contextlib
import functools
import json
import os
import shutil
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec
import zmq
import zmq.asyncio

from dspy_lora.engine import core_process
from dspy_lora.engine.arguments import engine_args, set_environment
from dspy_lora.engine.grammar import bounded
from dspy_lora.engine.parsers import Parsers, check_parsers
from dspy_lora.engine.processes import kill_own_group
from dspy_lora.engine.protocol import (
    Abort,
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
from dspy_lora.engine.residents import Residents
from dspy_lora.engine.statistics import Statistics
from dspy_lora.engine.turns import Turns
from dspy_lora.errors import AdapterError

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

ENGINE_DIED = 70  # exit status that tells the client vLLM's core is gone
_PARENT_POLL_S = 2.0
_ENGINE_POLL_S = 0.5


class Host:
    """Serves requests on one ``AsyncLLM``.

    Args:
        engine: The running engine.
        parsers: Reasoning and tool parsers of the model.
        replies: Socket to the client.
        stats: Collects scheduler statistics.
        info: What the engine says of itself.
    """

    def __init__(
        self,
        engine: "AsyncLLM",
        parsers: Parsers,
        replies: zmq.asyncio.Socket,
        stats: Statistics,
        info: dict[str, Any],
    ) -> None:
        self.engine = engine
        self.tokenizer = engine.get_tokenizer()
        self.max_model_len: int = engine.model_config.max_model_len
        self.parsers = parsers
        self.replies = replies
        self.stats = stats
        self.turns = Turns(info["max_loras"])
        self.residents = Residents(engine, info)
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
        from jinja2 import TemplateError
        from vllm import exceptions
        from vllm.v1.engine.exceptions import EngineDeadError

        refused = getattr(exceptions, "VLLMClientError", ValueError)  # which it is before vLLM 0.32
        try:
            await work
        except EngineDeadError:
            os._exit(ENGINE_DIED)  # the client sends what is open to the next host
        except ContextTooLong as exc:
            await self.send(Failed(id, "context", str(exc)))
        except AdapterError as exc:
            await self.send(Failed(id, "adapter", str(exc)))
        except (refused, ValueError, TypeError, TemplateError) as exc:  # a model's chat template refuses roles, say
            await self.send(Failed(id, "invalid", str(exc) or _words(exc)))
        except Exception as exc:  # noqa: BLE001 - whatever vLLM raises is this caller's answer
            await self.send(Failed(id, "server", _words(exc)))

    async def send(self, reply: Reply) -> None:
        """Sends one reply to the client."""
        await self.replies.send(msgspec.msgpack.encode(reply))

    async def generate(self, request: Generate) -> None:
        """Runs one prompt and sends its deltas and its result."""
        from vllm.inputs.engine import tokens_input

        prompt = self.prompt_tokens(request)
        params = self.sampling_params(request, len(prompt))
        lora = await self.residents.lora(request.adapter) if request.adapter else None
        outputs = self.engine.generate(tokens_input(prompt), params, str(request.id), lora_request=lora)
        async with self.turns.turn(lora.lora_name) if lora else contextlib.nullcontext() as came_in:
            if lora and came_in:
                await self.residents.swap_in(lora)
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
        """vLLM's parameters, ``max_tokens`` and ``min_tokens`` cut to what the context leaves."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        sampling = dict(request.sampling)
        room = self.max_model_len - prompt_tokens
        sampling["max_tokens"] = min(sampling.get("max_tokens") or room, room)
        sampling["min_tokens"] = min(sampling.get("min_tokens") or 0, room)
        if structured := sampling.pop("structured_outputs", None):
            structured = bounded(structured, self.engine.vllm_config.structured_outputs_config)
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
            tokens = _tokens(request, piece) or []
            if delta.text or delta.thinking or tokens:
                await self.send(Delta(request.id, delta.text, delta.thinking, tokens))
        piece.text, piece.token_ids, piece.logprobs = text, ids, logprobs or None
        return output

    def candidate(self, request: Generate, output: "CompletionOutput") -> Candidate:
        """A finished sample as the client gets it."""
        parsed = self.parsers.parse(request, output.text, output.token_ids)
        return Candidate(
            text=parsed.text,
            thinking=parsed.thinking,
            reasoning_tokens=parsed.reasoning_tokens,
            tool_calls=parsed.tool_calls,
            finish_reason="tool_calls" if parsed.tool_calls else output.finish_reason or "stop",
            output_tokens=len(output.token_ids),
            logprobs=_tokens(request, output),
        )

    async def watch(self) -> None:
        """Ends this process when vLLM's core is gone: calls of ``add_lora`` and the like would wait for it forever."""
        while not self.engine.errored:
            await asyncio.sleep(_ENGINE_POLL_S)
        os._exit(ENGINE_DIED)

    async def command(self, command: Command) -> None:
        """Answers ``ahead``, ``load``, ``unload`` and ``stats``."""
        value: dict[str, Any] = {}
        if command.name == "ahead" and command.adapter:
            await self.residents.ahead(command.adapter)
        elif command.name == "load" and command.adapter:
            await self.residents.load(command.adapter)
        elif command.name == "unload" and command.adapter:
            async with self.turns.without(command.adapter.name):  # whose next step would read it again, or miss it
                value["unloaded"] = await self.residents.unload(command.adapter)
        elif command.name == "stats":
            adapters = await self.residents.figures()
            value = self.stats.snapshot() | adapters
        await self.send(Result(command.id, value))


class ContextTooLong(ValueError):
    """A prompt that does not fit the model's context."""


def _words(error: BaseException) -> str:
    """An error's type and message; its cause's where it has none, as vLLM's ``EngineGenerateError`` has."""
    cause = error.__cause__
    return f"{type(error).__name__}: {error if str(error) or cause is None else _words(cause)}"


def _tokens(request: Generate, output: "CompletionOutput") -> list[Token] | None:
    """The log-probabilities of a sample, or of a piece of it; None where none were asked for."""
    if output.logprobs is None:
        return None
    count = request.sampling["logprobs"]
    return [_token(entry, id, count) for entry, id in zip(output.logprobs, output.token_ids, strict=True)]


def _token(entry: dict[int, Any], id: int, count: int) -> Token:
    """One position of vLLM's log-probabilities: the chosen token, and the ``count`` likeliest by rank.

    vLLM gives the chosen token along with the likeliest, whether it is one of them or not.
    """
    chosen = entry[id]
    ranked = sorted(entry.items(), key=lambda item: item[1].rank)[:count]
    top = [(logprob.decoded_token or "", logprob.logprob, token) for token, logprob in ranked]
    return Token(chosen.decoded_token or "", chosen.logprob, id, top)


def _watch_parent(folder: str) -> None:
    """Ends this process group, and removes the client's folder, when the user's process is gone.

    Standard input is a pipe whose other end only the user's process holds; a fork of that process may hold it too, so
    the parent's id is watched as well.
    """
    parent = os.getppid()

    def until_end_of_input() -> None:
        while os.read(0, 1):
            pass
        end()

    def until_orphaned() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_S)
        end()

    def end() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        kill_own_group()

    for target in (until_end_of_input, until_orphaned):
        threading.Thread(target=target, daemon=True).start()


def _start(settings: dict[str, Any], stats: Statistics) -> "tuple[AsyncLLM, dict[str, Any]]":
    """Brings vLLM up; must run inside the event loop that will use it."""
    set_environment()
    import vllm
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext
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

    check_parsers(settings["tool_parser"], settings["reasoning_parser"])
    args = engine_args(settings)
    # Whose batch sizes vLLM takes: of an "engine" it lets 128 requests run at once, on whatever GPU.
    usage = UsageContext.LLM_CLASS if current_platform.is_cuda() else UsageContext.ENGINE_CONTEXT
    given = AsyncEngineArgs(**args)
    config = given.create_engine_config(usage)
    if current_platform.is_cpu():
        core_process.choose_start(config)
    engine = AsyncLLM.from_vllm_config(
        config,
        usage_context=usage,
        stat_loggers=[Recorder],
        enable_log_requests=given.enable_log_requests,
        disable_log_stats=given.disable_log_stats,
    )
    room = {key: args[key] if args["enable_lora"] else 0 for key in ("max_loras", "max_lora_rank", "max_cpu_loras")}
    info = room | {
        "max_model_len": engine.model_config.max_model_len,
        "max_num_seqs": engine.vllm_config.scheduler_config.max_num_seqs,
        "loads_aside": args["enable_lora"] and args.get("worker_cls", "").startswith("dspy_lora."),
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
        context.destroy(linger=2000)  # which waits until the message is out
        return 1
    host = Host(engine, parsers, replies, stats, info)
    await host.send(Ready(info))
    await asyncio.gather(host.serve(requests), host.watch())
    return 0


if __name__ == "__main__":
    _watch_parent(sys.argv[1])
    status = asyncio.run(_main(sys.argv[1], json.loads(sys.argv[2])))
    sys.stdout.flush()
    os._exit(status)
