"""What LoRALM is compared with, each in a child process started as LoRALM's own engine is."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO, Any, TypeAlias

from dspy_lora.adapters.registry import Revision
from dspy_lora.bench.workload import Question
from dspy_lora.engine.openai_server import OpenAIServer, free_port, running
from dspy_lora.engine.processes import kill_group
from dspy_lora.engine.settings import EngineSettings
from dspy_lora.errors import EngineError, EngineStartError

Batch: TypeAlias = tuple[Sequence[Question], Sequence[str | None]]  # and the adapter of each; None: the base model

_LOG_BYTES = 3000


class RawVLLM:
    """Plain ``vllm.LLM``, one question and answer at a time.

    Args:
        process: The process of ``raw.py``.
        log: What it writes to its standard error.

    Attributes:
        device: vLLM's word for what it runs on: ``"cpu"``, ``"cuda"``.
    """

    def __init__(self, process: "subprocess.Popen[str]", log: IO[bytes]) -> None:
        self._process, self._log = process, log
        self.device: str = self.answer()["device"]

    def seconds(self, messages: list[list[dict[str, Any]]], adapters: Sequence[str | None], tokens: int) -> float:
        """Runs prompts in one ``LLM.generate``.

        Args:
            messages: Chat messages of each prompt.
            adapters: Each prompt's adapter; None asks the base model.
            tokens: Of each answer.

        Raises:
            EngineError: An answer had fewer tokens.
        """
        assert self._process.stdin is not None
        sampling = {"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True}
        asked = {"messages": messages, "adapters": adapters, "sampling": sampling}
        try:
            print(json.dumps(asked), file=self._process.stdin)
        except BrokenPipeError as exc:
            raise self._ended() from exc
        done = self.answer()
        if done["tokens"] < tokens * len(messages):
            raise EngineError(
                f"answers of {tokens} tokens do not fit into the context behind the prompts: {len(messages)} of them "
                f"had {done['tokens']} tokens. Give fewer --answers or --words."
            )
        return float(done["seconds"])

    def tokens_a_second(self, batches: Sequence[Batch], tokens: int) -> float:
        """Output tokens a second over batches that follow each other.

        Args:
            batches: What is asked.
            tokens: Of each answer.
        """
        seconds = [self.seconds([each.messages for each in asked], adapters, tokens) for asked, adapters in batches]
        return tokens * sum(len(asked) for asked, _ in batches) / sum(seconds)

    def answer(self) -> dict[str, Any]:
        """The next line of the process."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        return dict(json.loads(line))

    def _ended(self) -> EngineStartError:
        self._log.seek(0)
        text = self._log.read()[-_LOG_BYTES:].decode(errors="replace")
        return EngineStartError(f"plain vLLM ended. The end of its log:\n{text}")


@contextlib.contextmanager
def raw_vllm(settings: EngineSettings, adapters: list[Revision]) -> Iterator[RawVLLM]:
    """Starts plain vLLM with an engine's settings."""
    given = dataclasses.asdict(settings) | {
        "adapters": [{"name": adapter.ref, "path": str(adapter.path)} for adapter in adapters]
    }
    with (
        tempfile.TemporaryFile() as log,
        _child(["-m", "dspy_lora.bench.raw", json.dumps(given)], log) as process,
    ):
        yield RawVLLM(process, log)


def openai_server(
    settings: EngineSettings, adapters: list[Revision], api_servers: int = 1
) -> contextlib.AbstractContextManager[str]:
    """Starts vLLM's OpenAI server with an engine's settings; yields its address.

    Args:
        settings: The engine's.
        adapters: It loads them at its start.
        api_servers: Processes that speak HTTP.
    """
    words = ("--disable-uvicorn-access-log", "--api-server-count", str(api_servers))
    return running(OpenAIServer(settings, adapters, "127.0.0.1", free_port(), words))


@contextlib.contextmanager
def _child(arguments: list[str], log: IO[bytes]) -> "Iterator[subprocess.Popen[str]]":
    process = subprocess.Popen(
        [sys.executable, "-P", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
        start_new_session=True,
        bufsize=1,
    )
    try:
        yield process
    finally:
        kill_group(process.pid)
        process.communicate()
