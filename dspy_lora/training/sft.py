"""Supervised training of one LoRA adapter: TRL's SFTTrainer, PEFT, and the loss on the completion alone."""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspy_lora.adapters.base import Base, resolve_base
from dspy_lora.errors import DataError, MissingDependencyError, TrainingError
from dspy_lora.training import data
from dspy_lora.training.data import Row
from dspy_lora.training.run import Run
from dspy_lora.training.scoring import Questions, exact_match
from dspy_lora.training.settings import TrainConfig

__all__ = ["TrainConfig", "load_rows", "summary", "train"]

# Below this many parameters a step is bound by kernel launches, not by memory: micro-batches and gradient checkpointing
# would only repeat the launches, so they are left off.
SMALL_MODEL = 500_000_000


@dataclass(frozen=True)
class Rows:
    """The rows of a run and the SHA-256 of where they came from."""

    train: list[Row]
    dev: list[Row]
    sha256: dict[str, str]


def train(config: TrainConfig) -> Path:
    """Trains one adapter.

    Writes ``metrics.jsonl`` (losses, learning rate and validations by step), ``run.json`` (settings, data hashes,
    versions, hardware, wall time, figures) and ``adapter/`` (a PEFT folder with safetensors weights: those of the best
    validation). Several runs side by side on one machine want ``OMP_NUM_THREADS=1`` in their environment.

    Args:
        config: The run.

    Returns:
        The run's folder.

    Raises:
        ConfigError: No such base model.
        DataError: Rows that are malformed, too few or too long.
        MissingDependencyError: The ``train`` extra is not installed.
        TrainingError: Out of memory, or the loss is no longer a number.
    """
    _require_packages()
    import torch

    rows = load_rows(config)
    base = resolve_base(config.base)
    run = Run(config.output_dir, config.name, config.quiet)
    try:
        trainer, questions, facts = _prepare(config, base, rows, run)
        trainer.train()
        figures = _finish(config, base, trainer, questions, run)
    except torch.OutOfMemoryError as exc:
        raise TrainingError(
            f"{config.name}: out of GPU memory. Use a smaller micro_batch_size or max_length. ({exc})"
        ) from exc
    run.close(
        name=config.name,
        base=vars(base),
        config=config.settings(),
        data=facts | {"sha256": rows.sha256},
        result=figures,
    )
    shutil.rmtree(config.output_dir / "checkpoints", ignore_errors=True)
    if config.registry is not None:
        _publish(config, base, rows, figures, run)
    return config.output_dir


def load_rows(config: TrainConfig) -> Rows:
    """Reads a run's rows; without validation rows a part of the training rows is held out.

    Raises:
        DataError: Rows that are malformed, or none.
    """
    rows = _read(config, config.train, "train on")
    hashes = {"train": data.sha256(config.train)}
    if config.dev is None:
        return Rows(*data.hold_out(rows, config.seed), hashes)
    dev = _read(config, config.dev, "validate on")
    return Rows(rows, dev, hashes | {"dev": data.sha256(config.dev)})


def _read(config: TrainConfig, source: Path | list[Row], purpose: str) -> list[Row]:
    if isinstance(source, Path):
        return data.read_rows(source, list(config.signature.fields))
    if not source:
        raise DataError(f"{config.name}: there are no rows to {purpose}.")
    return source


def _require_packages() -> None:
    try:
        import peft  # noqa: F401
        import trl  # noqa: F401
    except ImportError as exc:
        raise MissingDependencyError(
            f"training needs {exc.name!r}, which is not installed. Run: pip install 'dspy-lora[train]'"
        ) from exc


def _prepare(config: TrainConfig, base: Base, rows: Rows, run: Run) -> tuple[Any, Questions, dict[str, Any]]:
    """Loads the base, tokenises the rows and makes the trainer."""
    from transformers import set_seed

    set_seed(config.seed)
    model, tokenizer = _load(config, base)
    context = min(config.max_length, model.config.get_text_config().max_position_embeddings)
    adapter = config.chat_adapter()
    sets, facts = {}, {}
    for split, part in (("train", rows.train), ("dev", rows.dev)):
        examples = data.render(config.signature, part, adapter)
        sets[split], left_out = data.tokenize(tokenizer, examples, context)
        facts[split] = {"rows": len(part), "too_long": left_out, "tokens": sum(row["length"] for row in sets[split])}
        if left_out:
            run.say(f"{left_out} of {len(part)} {split} rows pass {context} tokens and are left out")
    questions = Questions.prepare(tokenizer, config.signature, adapter, rows.dev[: config.eval_rows], context)
    run.say(f"base {base.name} ({base.revision}): {model.num_parameters() / 1e6:.1f} M parameters, {model.dtype}")
    trainer = _trainer(config, model, tokenizer, sets, questions, run)
    _describe(config, trainer, facts, run)
    return trainer, questions, facts


def _load(config: TrainConfig, base: Base) -> tuple[Any, Any]:
    """Loads model and tokenizer; the tokenizer gets a padding token where it has none."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base.path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and _gpu_has_bfloat16())
    dtype = torch.bfloat16 if half else torch.float32
    return AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype), tokenizer


def _gpu_has_bfloat16() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def _trainer(
    config: TrainConfig, model: Any, tokenizer: Any, sets: dict[str, list[data.Tokens]], questions: Questions, run: Run
) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import SFTTrainer

    from dspy_lora.training.watch import Watch

    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.target_modules),
        bias="none",
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        task_type="CAUSAL_LM",
    )
    trainer = SFTTrainer(
        model=model,
        args=_arguments(config, model, len(sets["train"])),
        train_dataset=Dataset.from_list(sets["train"]),
        eval_dataset=Dataset.from_list(sets["dev"]),
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[Watch(run, questions, config.eval_batch_size, config.select_by)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(config: TrainConfig, model: Any, rows: int) -> Any:
    import torch
    from trl import SFTConfig

    from dspy_lora.training.watch import CHOICE

    small = model.num_parameters() < SMALL_MODEL
    micro = config.batch_size if small else min(config.micro_batch_size, config.batch_size)
    steps = config.max_steps or math.ceil(config.epochs * math.ceil(rows / config.batch_size))
    every = min(config.eval_every or max(1, steps // 10), steps)
    cuda = torch.cuda.is_available()
    return SFTConfig(
        output_dir=str(config.output_dir / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=math.ceil(config.batch_size / micro),
        per_device_eval_batch_size=config.eval_batch_size if small else micro,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_ratio,
        optim="adamw_torch_fused" if cuda and config.optim == "adamw_torch" else config.optim,
        seed=config.seed,
        bf16=model.dtype == torch.bfloat16,
        tf32=True if cuda else None,
        use_cpu=not cuda,
        gradient_checkpointing=config.gradient_checkpointing and not small,
        torch_compile=config.torch_compile,
        max_length=None,  # rows that are too long are already left out
        dataset_kwargs={"skip_prepare_dataset": True},  # data.tokenize has done it
        train_sampling_strategy="group_by_length",
        dataloader_pin_memory=cuda,
        prediction_loss_only=True,
        logging_steps=max(1, min(25, steps // 10)),
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=CHOICE,
        greater_is_better=True,
        disable_tqdm=True,
        report_to="none",
    )


def _describe(config: TrainConfig, trainer: Any, facts: dict[str, Any], run: Run) -> None:
    """Console lines on the adapter, its trainable share and the rows."""
    trainable, total = trainer.model.get_nb_trainable_parameters()
    kind = ("rsLoRA" if config.use_rslora else "LoRA") + (" + DoRA" if config.use_dora else "")
    run.say(
        f"{kind} r={config.r} alpha={config.lora_alpha} dropout={config.lora_dropout} on "
        f"{len(config.target_modules)} modules a layer: {trainable:,} of {total:,} parameters train "
        f"({trainable / total:.2%})"
    )
    run.say(
        f"{facts['train']['rows']} rows, {facts['dev']['rows']} to validate on; {trainer.args.max_steps} steps of "
        f"{config.batch_size} rows, learning rate {config.learning_rate:g}, weight decay {config.weight_decay:g}"
    )


def _finish(config: TrainConfig, base: Base, trainer: Any, questions: Questions, run: Run) -> dict[str, Any]:
    """Rounds and saves the best weights and measures them, and the base model, on the validation rows."""
    import torch

    if not all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry):
        raise TrainingError(f"{config.name}: the loss is no longer a number. Use a smaller learning_rate.")
    model, tokenizer = trainer.model, trainer.processing_class
    for weight in (weight for weight in model.parameters() if weight.requires_grad):
        weight.data = weight.data.to(getattr(torch, config.adapter_dtype)).to(weight.dtype)
    _save(config, base, model)
    metrics = trainer.evaluate()
    with model.disable_adapter():
        before = exact_match(model, tokenizer, questions, config.eval_batch_size)
    trainable, total = model.get_nb_trainable_parameters()
    run.say(
        f"done in {run.seconds:.0f} s: validation loss {metrics['eval_loss']:.4f}, exact match "
        f"{metrics['eval_exact_match']:.3f} (base model {before:.3f}) on {len(questions.rows)} rows"
    )
    return {
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "eval_loss": metrics["eval_loss"],
        "exact_match": metrics["eval_exact_match"],
        "base_exact_match": before,
        "answered_rows": len(questions.rows),
        "trainable_parameters": trainable,
        "parameters": total,
    }


def _save(config: TrainConfig, base: Base, model: Any) -> None:
    """Writes the PEFT folder beside its place and then moves it there, so that a half-written one is never seen."""
    import torch
    from safetensors.torch import load_file, save_file

    folder, draft = config.output_dir / "adapter", config.output_dir / "adapter.partial"
    shutil.rmtree(draft, ignore_errors=True)
    model.peft_config["default"].base_model_name_or_path = base.name
    model.save_pretrained(draft, save_embedding_layers=False)
    (draft / "README.md").unlink(missing_ok=True)  # PEFT's blank model card
    file, dtype = draft / "adapter_model.safetensors", getattr(torch, config.adapter_dtype)
    save_file({name: weight.to(dtype) for name, weight in load_file(file).items()}, file, {"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    draft.replace(folder)


def _publish(config: TrainConfig, base: Base, rows: Rows, figures: dict[str, Any], run: Run) -> None:
    from dspy_lora.adapters.registry import AdapterRegistry

    settings = json.loads(json.dumps(config.settings()))
    metadata = {"config": settings, "data": rows.sha256, "result": figures}
    revision = AdapterRegistry(config.registry).publish(
        config.output_dir / "adapter", config.name, base=base, metadata=metadata
    )
    run.say(f"published {revision.ref} to {config.registry}")


def summary(cards: Sequence[dict[str, Any]]) -> str:
    """A table of finished runs, one line a ``run.json``."""
    lines = [f"{'name':<18} {'rows':>6} {'steps':>6} {'val. loss':>9} {'exact match':>11} {'base':>6} {'seconds':>8}"]
    for card in cards:
        result = card["result"]
        lines.append(
            f"{card['name']:<18} {card['data']['train']['rows']:>6} {result['steps']:>6} {result['eval_loss']:>9.4f} "
            f"{result['exact_match']:>11.3f} {result['base_exact_match']:>6.3f} {card['wall_seconds']:>8.0f}"
        )
    return "\n".join(lines)
