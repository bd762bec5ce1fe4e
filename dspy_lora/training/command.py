"""``dspy-lora train``: one domain, several or all, one after another or side by side."""

import argparse
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pydantic

from dspy_lora.config import Config, DomainConfig, load_config
from dspy_lora.errors import ConfigError, DataError
from dspy_lora.training.run import read_card
from dspy_lora.training.settings import TrainConfig
from dspy_lora.training.sft import summary, train

ALL = "all"

# Flags that carry a setting of TrainConfig, with their types; what is not given comes from lora_config.yaml.
_SETTINGS: dict[str, tuple[type, str]] = {
    "r": (int, "rank of the adapter"),
    "lora_alpha": (int, "LoRA alpha"),
    "lora_dropout": (float, "dropout on the adapter's input"),
    "weight_decay": (float, "weight decay"),
    "learning_rate": (float, "highest learning rate"),
    "max_steps": (int, "optimizer steps"),
    "batch_size": (int, "rows in one optimizer step"),
    "max_length": (int, "longest row, in tokens"),
    "eval_every": (int, "steps between validations (default: a tenth of all)"),
    "eval_rows": (int, "validation rows that are answered (default: 200)"),
    "seed": (int, "random seed"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``dspy-lora train``."""
    parser.add_argument("--domain", required=True, nargs="+", help="domains of lora_config.yaml, or 'all'")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="a folder with train.jsonl (and dev.jsonl), or a .jsonl file")
    source.add_argument("--data-root", type=Path, help="a folder that holds each domain's `data` folder")
    parser.add_argument("--output-dir", type=Path, default=Path("runs"), help="runs land in OUTPUT_DIR/<domain>")
    parser.add_argument("--base-model", help="Hugging Face id or folder (default: the bundled seedling)")
    for name, (kind, text) in _SETTINGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], help="number format of the base")
    parser.add_argument("--select-by", choices=["exact_match", "loss"], help="what the best checkpoint is best at")
    parser.add_argument("--publish", type=Path, metavar="REGISTRY", help="publish each adapter to this registry")
    parser.add_argument("--jobs", type=int, default=1, help="domains trained side by side, each in its own process")
    parser.add_argument("--config", type=Path, help="a lora_config.yaml (default: the one in the working directory)")


def run(args: argparse.Namespace) -> int:
    """Runs ``dspy-lora train`` and prints a table of the runs.

    Returns:
        The exit status, 0.

    Raises:
        ConfigError: A domain that is not configured, or a setting that is not allowed.
        DataError: Rows that are missing or malformed.
        TrainingError: A run that could not be finished; those finished before it are kept.
    """
    config = load_config(args.config)
    domains = list(config.domains) if ALL in args.domain else args.domain
    plans = [plan(args, config, name) for name in domains]  # every mistake shows before the first run starts
    if args.data is not None and len(plans) > 1:
        raise ConfigError(f"--data holds rows of one domain, and {len(plans)} were asked for. Use --data-root.")
    folders = _side_by_side(args, domains) if args.jobs > 1 else [train(each) for each in plans]
    print(summary([read_card(folder) for folder in folders]))
    return 0


def plan(args: argparse.Namespace, config: Config, name: str) -> TrainConfig:
    """Folds the flags over the domain's settings.

    Raises:
        ConfigError: No such domain, or a setting that is not allowed.
        DataError: No rows where the flags point.
    """
    domain = config.domain(name)
    rows, dev = _files(args, domain)
    given = {key: getattr(args, key) for key in (*_SETTINGS, "dtype", "select_by")}
    settings = _configured(config, domain) | {key: value for key, value in given.items() if value is not None}
    try:
        return TrainConfig(
            name=name,
            signature=domain.signature(),
            train=rows,
            dev=dev,
            output_dir=args.output_dir / name,
            base=args.base_model or config.base_model,
            registry=args.publish,
            **settings,
        )
    except pydantic.ValidationError as exc:
        problems = (f"{'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in exc.errors())
        raise ConfigError(f"domain {name!r}: {'; '.join(problems)}") from exc


def _configured(config: Config, domain: DomainConfig) -> dict[str, Any]:
    """The settings of ``lora_config.yaml`` by their names in TrainConfig."""
    lora = config.lora.model_dump(include={"lora_dropout", "target_modules", "use_rslora", "use_dora"})
    names = {"optim", "lr_scheduler_type", "warmup_ratio", "gradient_checkpointing", "max_length", "seed"}
    training = config.training
    return (
        lora
        | training.model_dump(include=names)
        | {
            "r": domain.r,
            "lora_alpha": domain.lora_alpha,
            "weight_decay": domain.weight_decay,
            "learning_rate": domain.learning_rate,
            "max_steps": domain.max_steps,
            "micro_batch_size": training.per_device_train_batch_size,
            "batch_size": training.per_device_train_batch_size * training.gradient_accumulation_steps,
            "dtype": "auto" if training.bf16 else "float32",
        }
    )


def _files(args: argparse.Namespace, domain: DomainConfig) -> tuple[Path, Path | None]:
    """The files of training and validation rows; without a dev.jsonl the run holds some rows out."""
    if args.data is not None and args.data.is_file():
        return args.data, None
    if args.data is None and domain.data is None:
        raise DataError(f"domain {domain.name!r} has no `data` in lora_config.yaml. Set it, or give --data.")
    folder = args.data if args.data is not None else args.data_root / (domain.data or "")
    if not (folder / "train.jsonl").is_file():
        raise DataError(f"domain {domain.name!r}: there is no {folder / 'train.jsonl'}. Give a folder that has one.")
    dev = folder / "dev.jsonl"
    return folder / "train.jsonl", dev if dev.is_file() else None


def _side_by_side(args: argparse.Namespace, domains: list[str]) -> list[Path]:
    # A run keeps about one core busy; with more threads each, runs side by side only take turns.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    spawn = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    with ProcessPoolExecutor(args.jobs, mp_context=spawn, max_tasks_per_child=1) as pool:
        return list(pool.map(_train_one, [args] * len(domains), domains))


def _train_one(args: argparse.Namespace, name: str) -> Path:
    return train(plan(args, load_config(args.config), name))
