"""The child process that runs vLLM's OpenAI server: ``python -m dspy_lora.bench.server SETTINGS_JSON``."""

import json
import runpy
import sys
from typing import Any

from dspy_lora.engine.arguments import engine_args

_MODULE = "vllm.entrypoints.openai.api_server"


def arguments(args: dict[str, Any], port: int, adapters: list[str]) -> list[str]:
    """The server's command line.

    Args:
        args: Arguments for ``vllm.AsyncEngineArgs``.
        port: Where it listens on loopback.
        adapters: ``name=path`` of each.
    """
    words = ["--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"]
    for name, value in args.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", value if isinstance(value, str) else json.dumps(value)]
    return [*words, "--lora-modules", *adapters]


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    sys.argv = [_MODULE, *arguments(engine_args(given), given["port"], given["adapters"])]
    runpy.run_module(_MODULE, run_name="__main__")
