"""The command line, ``dspy-lora``.

A command of a room is a module with ``add_arguments(parser)`` and ``run(args) -> int``, named in ``_ROOMS``. Only the
module of the command that was asked for is imported, so ``dspy-lora adapters list`` answers at once. ``run`` raises
this package's errors; ``main`` turns them into one line.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dspy_lora import __version__
from dspy_lora.errors import DspyLoraError

if TYPE_CHECKING:
    from dspy_lora.adapters.registry import AdapterRegistry
    from dspy_lora.adapters.revision import Revision

    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]

# Command: its module, and what it does.
_ROOMS = {
    "bench": ("dspy_lora.bench.command", "measure speed and memory against plain vLLM and DSPy over HTTP"),
    "demo": ("dspy_lora.demo", "answer questions of twelve domains in one batch, on the bundled model"),
    "evaluate": ("dspy_lora.evaluation.command", "measure an adapter against its base, or many adapters on one scale"),
    "merge": ("dspy_lora.merging.command", "merge adapters into their base, or into one another"),
    "prepare": ("dspy_lora.prepare.command", "turn raw data into rows to train, validate and test on"),
    "route": ("dspy_lora.route_command", "say which domain a text is of, or measure how well that is said"),
    "serve": ("dspy_lora.serve_command", "start vLLM's OpenAI server with the registry's adapters"),
    "train": ("dspy_lora.training.command", "train an adapter for one domain or several"),
    "tune": ("dspy_lora.tuning.command", "find tiles for LoRA's kernels on this GPU, for a model and its ranks"),
}

_FAILED = 2
_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The words after ``dspy-lora``; None takes the process's own.

    Returns:
        The exit code: 0, 2 for an error of this package (printed as ``error: ...``), 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parser(words).parse_args(words)
        code: int = args.run(args)
        sys.stdout.flush()
    except DspyLoraError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """All commands for the help page, and the flags of the one that was asked for."""
    parser = argparse.ArgumentParser(prog="dspy-lora", description="LoRA adapters for DSPy programs.")
    parser.add_argument("--version", action="version", version=f"dspy-lora {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_adapters(commands)
    asked_for = next((word for word in words if not word.startswith("-")), None)
    for name, (module, text) in _ROOMS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if name == asked_for:
            room = importlib.import_module(module)
            room.add_arguments(command)
            command.set_defaults(run=room.run)
    return parser


def _print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints columns, each as wide as its widest cell."""
    table = [header, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


# -- adapters ----------------------------------------------------------------------------------------------------------


def _add_adapters(commands: "_Commands") -> None:
    adapters = commands.add_parser("adapters", help="list, show, publish, roll back and remove adapters")
    actions = adapters.add_subparsers(title="actions", metavar="ACTION", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--registry", metavar="FOLDER", help="the registry (default: as configured, else ./adapters)")

    listing = actions.add_parser("list", parents=[common], help="the current revision of every adapter")
    listing.set_defaults(run=_list_adapters)

    show = actions.add_parser("show", parents=[common], help="an adapter's history and metadata")
    show.add_argument("name", help="legal, or legal@REVISION")
    show.set_defaults(run=_show_adapter)

    publish = actions.add_parser("publish", parents=[common], help="check an adapter and make it current")
    publish.add_argument("source", type=Path, help="folder with adapter_config.json and adapter_model.safetensors")
    publish.add_argument("name", help="its name; for a domain's adapter the domain")
    publish.add_argument("--base-model", metavar="MODEL", help="the base model it is for (default: as configured)")
    publish.set_defaults(run=_publish_adapter)

    rollback = actions.add_parser("rollback", parents=[common], help="make an earlier revision current")
    rollback.add_argument("name")
    rollback.add_argument("revision", nargs="?", help="default: the one published before the current one")
    rollback.set_defaults(run=_roll_back_adapter)

    remove = actions.add_parser("remove", parents=[common], help="remove a revision, or an adapter with all of them")
    remove.add_argument("name")
    remove.add_argument("revision", nargs="?", help="default: all")
    remove.set_defaults(run=_remove_adapter)


def _registry(args: argparse.Namespace) -> "AdapterRegistry":
    from dspy_lora.adapters.registry import AdapterRegistry

    return AdapterRegistry(args.registry)


def _row(revision: "Revision") -> list[str]:
    size = f"{revision.size / 1e6:.1f} MB"
    return [revision.revision, revision.base_name, str(revision.rank), size, revision.published[:19].replace("T", " ")]


_COLUMNS = ["revision", "base", "rank", "size", "published (UTC)"]


def _list_adapters(args: argparse.Namespace) -> int:
    registry = _registry(args)
    revisions = registry.list()
    if not revisions:
        print(f"No adapters in {registry.root}.")
        return 0
    _print_table(["name", *_COLUMNS], ([revision.adapter, *_row(revision)] for revision in revisions))
    return 0


def _show_adapter(args: argparse.Namespace) -> int:
    registry = _registry(args)
    shown = registry.resolve(args.name)
    current = registry.resolve(shown.adapter)
    history = registry.history(shown.adapter)
    marks = ["*" if revision.revision == current.revision else "" for revision in history]
    print(f"{shown.ref} for base {shown.base_name} ({shown.base})\n{shown.path}\n")
    _print_table(["current", *_COLUMNS], ([mark, *_row(each)] for mark, each in zip(marks, history, strict=True)))
    print(f"\nmetadata of {shown.revision}: {json.dumps(shown.metadata, indent=2)}")
    return 0


def _publish_adapter(args: argparse.Namespace) -> int:
    from dspy_lora.adapters.base import resolve_base
    from dspy_lora.config import load_config

    base = resolve_base(args.base_model or load_config().base_model)
    revision = _registry(args).publish(args.source, args.name, base=base)
    print(f"Published {revision.ref} for base {revision.base_name}: {revision.path}")
    return 0


def _roll_back_adapter(args: argparse.Namespace) -> int:
    revision = _registry(args).rollback(args.name, args.revision)
    print(f"Current is {revision.ref}, published {revision.published[:19].replace('T', ' ')} UTC.")
    return 0


def _remove_adapter(args: argparse.Namespace) -> int:
    from dspy_lora.errors import UnknownAdapterError

    registry = _registry(args)
    registry.remove(args.name, args.revision)
    print(f"Removed {args.name}{'@' + args.revision if args.revision else ''}.")
    try:
        print(f"Current is {registry.resolve(args.name).ref}.")
    except UnknownAdapterError:
        print(f"No adapter {args.name!r} is left.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
