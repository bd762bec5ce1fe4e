"""``dspy-lora prepare``: raw data becomes the rows of one task."""

import argparse
import warnings
from pathlib import Path

import dspy
import pydantic

from dspy_lora.config import check_input_field, check_output_field, load_config
from dspy_lora.errors import ConfigError, DataError
from dspy_lora.prepare import folder as folders
from dspy_lora.prepare.prepared import PrepareConfig, prepare
from dspy_lora.prepare.sources import on_disk

_ADAPTERS = {"chat": dspy.ChatAdapter, "json": dspy.JSONAdapter}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``dspy-lora prepare``."""
    parser.add_argument(
        "source", help="a .csv, .tsv, .jsonl, .json or .parquet file, a folder, or a Hugging Face data set"
    )
    parser.add_argument(
        "output", type=Path, help="the folder to write: train.jsonl, dev.jsonl, test.jsonl, report.json"
    )
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--domain", help="the task of a domain of lora_config.yaml")
    task.add_argument("--signature", help="a DSPy signature, as in 'text -> label'")
    parser.add_argument("--instructions", help="the task in words, for --signature")
    parser.add_argument(
        "--chain-of-thought", action="store_true", help="the program reasons first (dspy.ChainOfThought)"
    )
    parser.add_argument(
        "--adapter", choices=_ADAPTERS, default="chat", help="DSPy adapter of inference (default: chat)"
    )
    parser.add_argument(
        "--columns", nargs="+", default=[], metavar="FIELD=COLUMN", help="columns not called like their fields"
    )
    parser.add_argument("--keep", nargs="+", default=[], metavar="COLUMN", help="columns to write beside the fields")
    parser.add_argument("--dev", type=float, help="rows to validate on: a share below 1, or a number (default: 0.1)")
    parser.add_argument("--test", type=float, help="rows to test on, likewise (default: 0.1)")
    parser.add_argument("--by", choices=["auto", "random", "stratified"], help="how rows are drawn (default: auto)")
    parser.add_argument("--group", metavar="COLUMN", help="rows with one value here stay in one split")
    parser.add_argument("--split-column", metavar="COLUMN", help="the column that names each row's split")
    parser.add_argument("--resplit", action="store_true", help="split anew what the source gives as splits")
    near = parser.add_mutually_exclusive_group()
    near.add_argument("--near", type=float, help="Jaccard similarity of near-duplicates (default: 0.8)")
    near.add_argument("--keep-near", action="store_true", help="look for no near-duplicates")
    parser.add_argument("--seed", type=int, help="decides which rows are drawn (default: 0)")
    parser.add_argument("--base-model", help="count this model's tokens instead of characters")
    parser.add_argument("--max-length", type=int, help="tokens that training takes in a row (default: as configured)")
    parser.add_argument("--delimiter", help="between the cells of a CSV file")
    parser.add_argument("--dataset-name", help="configuration of a Hugging Face data set")
    parser.add_argument("--overwrite", action="store_true", help="replace an output folder of this command")
    parser.add_argument("--config", type=Path, help="a lora_config.yaml (default: the one in the working directory)")


def run(args: argparse.Namespace) -> int:
    """Runs ``dspy-lora prepare`` and prints a table of the splits.

    Returns:
        The exit status, 0.

    Raises:
        ConfigError: A domain that is not configured, or a setting that is not allowed.
        DataError: No such source or column, no rows for a split, or an output folder that exists.
        PublishError: The disk refused; nothing was written.
    """
    folders.check(args.output.expanduser().absolute(), args.overwrite, on_disk(args.source))
    prepared = prepare(args.source, _signature(args), _settings(args), adapter=_ADAPTERS[args.adapter]())
    folder = prepared.write(args.output, args.overwrite)
    print(f"{prepared.table()}\n\nwritten: {folder}")
    return 0


def _signature(args: argparse.Namespace) -> type[dspy.Signature]:
    if args.domain is not None:
        if args.instructions is not None:
            raise ConfigError("--instructions goes with --signature; a domain's are its `task` in lora_config.yaml.")
        signature = load_config(args.config).domain(args.domain).signature()
    else:
        signature = _parsed(args.signature, args.instructions)
    reasoned: type[dspy.Signature] = dspy.ChainOfThought(signature).predict.signature
    return reasoned if args.chain_of_thought else signature


def _parsed(text: str, instructions: str | None) -> type[dspy.Signature]:
    try:
        with warnings.catch_warnings():  # pydantic warns of names that DSPy refuses in its next step
            warnings.filterwarnings("ignore", "Field name", UserWarning)
            signature = dspy.Signature(text, instructions)
        for name in signature.input_fields:
            check_input_field(name)
        for name in signature.output_fields:
            check_output_field(name)
    except (ValueError, SyntaxError) as exc:
        raise ConfigError(f"--signature {text!r} is no signature like 'text -> label': {exc}") from exc
    except (TypeError, pydantic.PydanticUserError) as exc:
        raise ConfigError(
            f"--signature {text!r}: DSPy keeps names like 'instructions', 'signature' and '_x' for itself. Give the "
            "field another name."
        ) from exc
    return signature


def _settings(args: argparse.Namespace) -> PrepareConfig:
    names = (
        "dev", "test", "by", "group", "split_column", "near", "seed", "max_length", "delimiter", "dataset_name",
    )  # fmt: skip
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    given |= {"near": None} if args.keep_near else {}
    given.setdefault("max_length", load_config(args.config).training.max_length)
    try:
        return PrepareConfig(
            columns=_columns(args.columns), keep=args.keep, resplit=args.resplit, base=args.base_model, **given
        )
    except pydantic.ValidationError as exc:
        problems = (f"{'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in exc.errors())
        raise ConfigError("; ".join(problems)) from exc


def _columns(pairs: list[str]) -> dict[str, str]:
    columns = dict(pair.partition("=")[::2] for pair in pairs)
    for pair in pairs:
        field, _, column = pair.partition("=")
        if not field or not column:
            raise DataError(f"--columns {pair!r}: give FIELD=COLUMN, as in text=body.")
    if len(columns) < len(pairs):
        raise DataError(f"--columns {' '.join(pairs)}: a field is named twice.")
    return columns
