"""``dspy-lora train``: one domain, several or all, or one setting's values, one after another or side by side."""

import argparse
import gc
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pydantic

from dspy_lora.adapters.base import fetch_base
from dspy_lora.config import LARGEST_RANK, Config, DomainConfig, load_config
from dspy_lora.errors import ConfigError, DataError, DivergedError
from dspy_lora.training.full import RATE_SHARE
from dspy_lora.training.publishing import best_run, publish_run, summary
from dspy_lora.training.run import read_card
from dspy_lora.training.settings import TrainConfig, of_the_base, over_configured, problems
from dspy_lora.training.sft import load_rows, train
from dspy_lora.training.shape import check_targets
from dspy_lora.training.sweep import Sweep

ALL = "all"

# Flags that carry a setting of TrainConfig, with their types; what is not given comes from lora_config.yaml.
_SETTINGS: dict[str, tuple[type, str]] = {
    "r": (int, "rank of the adapter"),
    "lora_alpha": (int, "LoRA alpha"),
    "lora_dropout": (float, "dropout on the adapter's input"),
    "weight_decay": (float, "weight decay"),
    "learning_rate": (float, "highest learning rate"),
    "max_steps": (int, "optimizer steps"),
    "epochs": (float, "passes over the rows, in place of the configured steps; --max-steps comes first"),
    "batch_size": (int, "rows in one optimizer step"),
    "max_length": (int, "longest row, in tokens"),
    "eval_every": (int, "steps between validations, each with a checkpoint (default: a tenth of all)"),
    "eval_rows": (int, "validation rows that are answered (default: 200)"),
    "neftune_noise_alpha": (float, "noise on the embeddings while training (default: none)"),
    "prompt_loss_weight": (float, "weight of a prompt's token in the loss, an answer's having 1 (default: 0)"),
    "noisy_copies": (int, "noisy copies of each row to train on too (default: 0)"),
    "patience": (int, "validations without a lower loss after which a run stops (default: it never does)"),
    "seed": (int, "random seed"),
}

_SWITCHES = {
    "use_rslora": "rsLoRA: scale by alpha / sqrt(r)",
    "use_dora": "DoRA: served only after `dspy-lora merge`",
    "qlora": "QLoRA: hold the frozen base in 4 bit",
    "full_finetune": f"train a whole copy, at {RATE_SHARE:g} of the domain's learning rate unless one is given",
}
_OTHERS = ("dtype", "select_by", "report_to")


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
    for name, text in _SWITCHES.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], help="number format of the base")
    parser.add_argument("--select-by", choices=["exact_match", "loss"], help="what the best checkpoint is best at")
    parser.add_argument("--report-to", nargs="+", choices=["mlflow", "tensorboard"], help="trackers to report to too")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoints of killed runs")
    parser.add_argument("--sweep", metavar="KEY=V1,V2", help="try values of a setting, in OUTPUT_DIR/<domain>/KEY=V")
    parser.add_argument("--publish", type=Path, metavar="REGISTRY", help="publish each adapter to this registry")
    parser.add_argument("--jobs", type=int, default=1, help="runs trained side by side, each in its own process")
    parser.add_argument("--config", type=Path, help="a lora_config.yaml (default: the one in the working directory)")


def run(args: argparse.Namespace) -> int:
    """Runs ``dspy-lora train`` and prints a table of the runs.

    Of a sweep the best run is published: by exact match on the validation rows, then by validation loss. A value whose
    loss explodes is left out.

    Returns:
        The exit status, 0.

    Raises:
        ConfigError: A domain that is not configured, or a setting that is not allowed.
        DataError: Rows that are missing or malformed.
        TrainingError: A run that could not be finished; those finished before it are kept.
    """
    config = load_config(args.config)
    domains = list(config.domains if ALL in args.domain else dict.fromkeys(args.domain))
    values = Sweep.parse(args.sweep).values if args.sweep else (None,)
    tasks = [(name, value) for name in domains for value in values]
    if args.data is not None and len(domains) > 1:
        raise ConfigError(f"--data holds rows of one domain, and {len(domains)} were asked for. Use --data-root.")
    _check(args, [plan(args, config, *task) for task in tasks])
    trained = _side_by_side(args, tasks) if args.jobs > 1 else [_train_one(args, *task) for task in tasks]
    folders = [folder for folder in trained if folder is not None]
    print(summary([read_card(folder) for folder in folders]))
    for name in domains if args.sweep else ():
        _choose(args, name, [folder for folder in folders if folder.parent.name == name])
    return 0


def _check(args: argparse.Namespace, plans: list[TrainConfig]) -> None:
    """Shows every mistake in rows and target modules before the first run starts."""
    for one in plans:
        load_rows(one)
    base = fetch_base(plans[0].base)
    for one in plans:
        check_targets(one, base, publish=args.publish is not None)


def _choose(args: argparse.Namespace, name: str, folders: list[Path]) -> None:
    """Names, and publishes, the best run of a domain's sweep."""
    if not folders:
        raise DivergedError(f"{name}: the loss exploded for every value of --sweep {args.sweep}. Try smaller ones.")
    best = best_run(folders)
    published = f", published as {publish_run(best, args.publish, name).ref} to {args.publish}" if args.publish else ""
    print(f"best of {name}: {best.name}{published}")


def plan(args: argparse.Namespace, config: Config, name: str, value: str | None = None) -> TrainConfig:
    """Folds the flags over the domain's settings.

    Args:
        args: The flags.
        config: What ``lora_config.yaml`` says.
        name: The domain.
        value: The swept setting's value. Such a run is not published by itself.

    Raises:
        ConfigError: No such domain, or a setting that is not allowed.
        DataError: No rows where the flags point.
    """
    domain = config.domain(name)
    rows, dev = _files(args, domain)
    flags = {key: getattr(args, key) for key in (*_SETTINGS, *_SWITCHES, *_OTHERS)}
    given = {key: flag for key, flag in flags.items() if flag is not None}
    title, folder = name, args.output_dir / name
    if value is not None:
        key = Sweep.parse(args.sweep).key
        if key == "epochs" and args.max_steps is not None:
            raise ConfigError(
                f"--sweep {args.sweep} beside --max-steps, which comes first: all runs would be the same."
            )
        given[key] = value
        title, folder = f"{name} {key}={value}", folder / f"{key}={value}"
    settings = over_configured(configured(config, domain), given)
    if settings.get("full_finetune") and "learning_rate" not in given:
        settings["learning_rate"] *= RATE_SHARE
    try:
        whole = TrainConfig(
            name=title,
            signature=domain.signature(),
            train=rows,
            dev=dev,
            output_dir=folder,
            base=args.base_model or config.base_model,
            registry=args.publish,
            **settings,
        )
    except pydantic.ValidationError as exc:
        raise ConfigError(f"domain {name!r}: {problems(exc)}") from exc
    most = config.serving.max_lora_rank or LARGEST_RANK
    if args.publish is not None and whole.r > most:
        raise ConfigError(
            f"domain {name!r}: r = {whole.r} is above {most}, the largest rank that is published. Give a smaller one, "
            f"or raise serving.max_lora_rank in lora_config.yaml (vLLM takes up to {LARGEST_RANK})."
        )
    return whole if value is None else whole.model_copy(update={"registry": None})


def configured(config: Config, domain: DomainConfig) -> dict[str, Any]:
    """The settings of ``lora_config.yaml`` by their names in TrainConfig."""
    lora = config.lora.model_dump(include={"lora_dropout", "target_modules", "use_rslora", "use_dora"})
    names = {"optim", "lr_scheduler_type", "warmup_ratio", "gradient_checkpointing", "max_length", "seed"}
    names |= {"neftune_noise_alpha", "prompt_loss_weight", "noisy_copies", "patience"}
    training = config.training
    return (
        lora
        | of_the_base(config)
        | training.model_dump(include=names)
        | {
            "r": domain.r,
            "lora_alpha": domain.lora_alpha,
            "weight_decay": domain.weight_decay,
            "learning_rate": domain.learning_rate,
            "max_steps": domain.max_steps,
            "micro_batch_size": training.per_device_train_batch_size,
            "batch_size": training.per_device_train_batch_size * training.gradient_accumulation_steps,
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


def _side_by_side(args: argparse.Namespace, tasks: list[tuple[str, str | None]]) -> list[Path | None]:
    # A run keeps about one core busy; with more threads each, runs side by side only take turns.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    spawn = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    with ProcessPoolExecutor(args.jobs, mp_context=spawn, max_tasks_per_child=1) as pool:
        return list(pool.map(_train_one, [args] * len(tasks), *zip(*tasks, strict=True)))


def _train_one(args: argparse.Namespace, name: str, value: str | None) -> Path | None:
    """Trains one run; None is a swept value whose loss exploded."""
    try:
        return train(plan(args, load_config(args.config), name, value), args.resume)
    except DivergedError as exc:
        if value is None:
            raise
        print(f"left out: {exc}", flush=True)
        return None
    finally:
        _forget()


def _forget() -> None:
    """Frees the model of a run, which its trainer holds in a circle, before that of the next is loaded."""
    gc.collect()
    if "torch" in sys.modules:
        import torch

        torch.cuda.empty_cache()
