"""What LoRALM is compared with, each in a child process started as LoRALM's own engine is."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from dspy_lora.adapters.registry import Revision
from dspy_lora.bench.workload import Question
from dspy_lora.engine.openai_server import OpenAIServer, free_port, running
from dspy_lora.engine.processes import kill_group
from dspy_lora.engine.settings import EngineSettings
from dspy_lora.errors import EngineStartError

Batch: TypeAlias = tuple[Sequence[Question], Sequence[str | None]]  # and the adapter of each; None: the base model


class RawVLLM:
    """Plain ``vllm.LLM``, one question and answer at a time.

    Args:
        process: The process of ``raw.py``.

    Attributes:
        device: vLLM's word for what it runs on: ``"cpu"``, ``"cuda"``.
    """

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.device: str = self.answer()["device"]

    def generate(
        self, messages: list[list[dict[str, Any]]], adapters: Sequence[str | None], sampling: dict[str, Any]
    ) -> dict[str, Any]:
        """Runs prompts in one ``LLM.generate``.

        Args:
            messages: Chat messages of each prompt.
            adapters: Each prompt's adapter; None asks the base model.
            sampling: Arguments of ``vllm.SamplingParams``.

        Returns:
            ``seconds`` and output ``tokens``.
        """
        assert self._process.stdin is not None
        print(json.dumps({"messages": messages, "adapters": adapters, "sampling": sampling}), file=self._process.stdin)
        return self.answer()

    def tokens_a_second(self, batches: Sequence[Batch], tokens: int) -> float:
        """Output tokens a second over batches that follow each other.

        Args:
            batches: What is asked.
            tokens: Of each answer.
        """
        sampling = {"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True}
        done = [self.generate([each.messages for each in asked], adapters, sampling) for asked, adapters in batches]
        return sum(part["tokens"] for part in done) / float(sum(part["seconds"] for part in done))

    def answer(self) -> dict[str, Any]:
        """The next line of the process."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EngineStartError("plain vLLM ended")
        return dict(json.loads(line))


@contextlib.contextmanager
def raw_vllm(settings: EngineSettings, adapters: list[Revision]) -> Iterator[RawVLLM]:
    """Starts plain vLLM with an engine's settings."""
    given = dataclasses.asdict(settings) | {
        "adapters": [{"name": adapter.ref, "path": str(adapter.path)} for adapter in adapters]
    }
    with _child(["-m", "dspy_lora.bench.raw", json.dumps(given)]) as process:
        yield RawVLLM(process)


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
def _child(arguments: list[str]) -> "Iterator[subprocess.Popen[str]]":
    process = subprocess.Popen(
        [sys.executable, "-P", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
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
