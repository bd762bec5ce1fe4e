"""Supervised training of one LoRA adapter, or of a whole copy, with TRL's SFTTrainer."""

import functools
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspy_lora.adapters.base import Base, fetch_base
from dspy_lora.errors import ConfigError, DataError, DivergedError, MissingDependencyError
from dspy_lora.training import data
from dspy_lora.training.checkpoints import Checkpoints, differences, step_of
from dspy_lora.training.data import Row
from dspy_lora.training.failures import explained
from dspy_lora.training.full import MODEL_FOLDER, parameters, save_model
from dspy_lora.training.loading import kind, load_base, lora_config, require_packages
from dspy_lora.training.lock import alone
from dspy_lora.training.noise import with_noisy_copies
from dspy_lora.training.order import row_order
from dspy_lora.training.picture import draw_losses
from dspy_lora.training.publishing import publish_run, save_adapter
from dspy_lora.training.run import CARD_FILE, Run, read_card
from dspy_lora.training.scoring import Questions, exact_match
from dspy_lora.training.settings import TrainConfig
from dspy_lora.training.shape import check_parent, check_targets

__all__ = ["TrainConfig", "load_rows", "train"]

# Below this many parameters a step is bound by kernel launches, not by memory: micro-batches and gradient checkpointing
# would only repeat the launches, so they are left off.
SMALL_MODEL = 500_000_000

# Decides which rows are held out and which are answered: not the run's own seed, so that seeds can be compared.
_VALIDATION_SEED = 0


@dataclass(frozen=True)
class Rows:
    """The rows of a run.

    Attributes:
        train: Rows to train on, with their noisy copies.
        dev: Rows to validate on.
        numbers: For both, each row's number where it came from, counted from 1; a copy has that of its row.
        sha256: Of where they came from.
    """

    train: list[Row]
    dev: list[Row]
    numbers: dict[str, list[int]]
    sha256: dict[str, str]


def train(config: TrainConfig, resume: bool = False) -> Path:
    """Trains one adapter; with ``full_finetune`` all weights of a copy of the base.

    Downloads a base that is not on this disk. Writes ``metrics.jsonl`` (losses, learning rate and validations by step),
    ``loss.png`` (the same, drawn), ``run.json`` (settings, data hashes, versions, hardware, wall time, GPU-hours,
    figures) and ``adapter/`` (a PEFT folder with safetensors weights: those of the best validation), for a copy
    ``model/`` (a Hugging Face folder). Until it has succeeded, ``checkpoints/`` holds the last checkpoint and the best
    one. Several runs side by side on one machine want ``OMP_NUM_THREADS=1`` in their environment.

    Args:
        config: The run.
        resume: Go on from the last checkpoint of a run that was killed: the weights end as those of an unbroken run
            (on the same machine, in float32). Without a checkpoint the run starts from the beginning; a finished run
            with the same settings is left as it is.

    Returns:
        The run's folder.

    Raises:
        ConfigError: No such base model, one that cannot be downloaded or lacks the target modules, a parent of another
            shape, a folder that cannot be written, or checkpoints made with other settings.
        AdapterError: The parent is no adapter that training can go on from.
        DataError: Rows that are malformed, too few or too long.
        MissingDependencyError: The ``train`` extra or a tracker is not installed.
        TrainingError: Out of memory, no space on the disk, the loss is no longer a number (DivergedError), another run
            trains in the folder, or ``resume`` was not given and there are checkpoints.
        PublishError: The disk refused the published adapter; the run itself is finished.
    """
    require_packages(config)
    rows = load_rows(config)
    check_parent(config)
    base = fetch_base(config.base)
    check_targets(config, base, publish=config.registry is not None)
    with alone(config.output_dir):
        return _train_alone(config, base, rows, resume)


def _train_alone(config: TrainConfig, base: Base, rows: Rows, resume: bool) -> Path:
    """Trains, unless the folder holds the finished run, and publishes."""
    settings = config.settings() | {"base_revision": base.revision, "sha256": rows.sha256}
    checkpoints = Checkpoints(config.output_dir)
    if resume and _is_finished(config.output_dir, settings):
        if not config.quiet:
            print(f"[{config.name}] {config.output_dir} is finished already", flush=True)
    else:
        start = checkpoints.begin(settings, resume)
        run = Run(config.output_dir, config.name, config.quiet, step_of(start) if start else 0)
        with explained(config.name, run, checkpoints):
            _run(config, base, rows, run, start)
    if config.registry is not None:
        revision = publish_run(config.output_dir, config.registry, config.name)
        if not config.quiet:
            print(f"[{config.name}] published {revision.ref} to {config.registry}", flush=True)
    checkpoints.remove()
    return config.output_dir


def _is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds a finished run of the same settings (one that is not yet published counts)."""
    result = MODEL_FOLDER if settings["full_finetune"] else "adapter"
    if not ((folder / CARD_FILE).is_file() and (folder / result).is_dir()):
        return False
    card = read_card(folder)
    before = card["config"] | {"base_revision": card["base"]["revision"], "sha256": card["data"]["sha256"]}
    return not differences(before, settings)


def _run(config: TrainConfig, base: Base, rows: Rows, run: Run, start: Path | None) -> None:
    """Trains, measures, and writes the run's folder."""
    trainer, questions, facts = _prepare(config, base, rows, run)
    before = exact_match(trainer.model, trainer.processing_class, questions, config.eval_batch_size)
    if config.parent is not None:
        trainer.model.load_adapter(str(config.parent), "default", is_trainable=True)
        run.say(f"starting from the weights of {config.parent}")
    _train(config, trainer, run, start)
    figures = _finish(config, base, trainer, questions, run, before)
    run.close(
        name=config.name,
        base=vars(base),
        config=config.settings(),
        data=facts | {"sha256": rows.sha256},
        result=figures,
    )
    try:
        draw_losses(run.folder)
    except MissingDependencyError as exc:
        run.say(str(exc))


def load_rows(config: TrainConfig) -> Rows:
    """Reads a run's rows; without validation rows a part of the training rows is held out, before copies are made.

    Raises:
        ConfigError: Noisy copies of rows that have no text.
        DataError: Rows that are malformed, or none.
    """
    rows = _read(config, config.train, "train on")
    hashes = {"train": data.sha256(config.train)}
    kept = list(range(len(rows)))
    if config.dev is None:
        kept, held = data.hold_out(kept, _VALIDATION_SEED)
        dev = [rows[place] for place in held]
    else:
        dev = _read(config, config.dev, "validate on")
        held = list(range(len(dev)))
        hashes["dev"] = data.sha256(config.dev)
    train, places = _with_copies(config, [rows[place] for place in kept])
    numbers = {"train": [kept[place] + 1 for place in places], "dev": [place + 1 for place in held]}
    return Rows(train, dev, numbers, hashes)


def _with_copies(config: TrainConfig, rows: list[Row]) -> tuple[list[Row], list[int]]:
    texts = [name for name, field in config.signature.input_fields.items() if field.annotation is str]
    if config.noisy_copies and not texts:
        raise ConfigError(f"noisy_copies = {config.noisy_copies}: {config.signature.signature!r} has no input text.")
    return with_noisy_copies(rows, texts, config.noisy_copies, config.seed)


def _read(config: TrainConfig, source: Path | list[Row], purpose: str) -> list[Row]:
    if isinstance(source, Path):
        return data.read_rows(source, list(config.signature.fields))
    if not source:
        raise DataError(f"{config.name}: there are no rows to {purpose}.")
    return source


def _prepare(config: TrainConfig, base: Base, rows: Rows, run: Run) -> tuple[Any, Questions, dict[str, Any]]:
    """Loads the base, tokenises the rows and makes the trainer."""
    from transformers import set_seed

    set_seed(config.seed)
    model, tokenizer = load_base(config, base)
    context = min(config.max_length, model.config.get_text_config().max_position_embeddings)
    adapter = config.chat_adapter()
    sets, facts = {}, {}
    for split, part in (("train", rows.train), ("dev", rows.dev)):
        examples = data.render(config.signature, part, adapter, config.demos, rows.numbers[split])
        what = "row to train on" if split == "train" else "row to validate on"
        sets[split], left_out = data.tokenize(tokenizer, examples, context, what)
        facts[split] = {"rows": len(part), "too_long": left_out, "tokens": sum(row["length"] for row in sets[split])}
        if left_out:
            run.say(f"{left_out} of {len(part)} {split} rows pass {context} tokens and are left out")
    asked = _asked(rows.dev, config.eval_rows)
    questions = Questions.prepare(tokenizer, config.signature, adapter, asked, context, config.demos)
    run.say(f"base {base.name} ({base.revision}): {model.num_parameters() / 1e6:.1f} M parameters, {model.dtype}")
    trainer = _trainer(config, model, tokenizer, sets, questions, run)
    _describe(config, trainer, facts, run)
    return trainer, questions, facts


def _asked(rows: list[Row], most: int) -> list[Row]:
    """The rows that are answered, in their order: a sample, since files are often sorted by label."""
    places = random.Random(_VALIDATION_SEED).sample(range(len(rows)), min(most, len(rows)))
    return [rows[place] for place in sorted(places)]


def _trainer(
    config: TrainConfig, model: Any, tokenizer: Any, sets: dict[str, list[data.Tokens]], questions: Questions, run: Run
) -> Any:
    from datasets import Dataset
    from transformers import PrinterCallback

    from dspy_lora.training.watch import Watch

    args = _arguments(config, model, len(sets["train"]))
    rows_a_step = args.train_batch_size * args.gradient_accumulation_steps
    order = row_order([row["length"] for row in sets["train"]], rows_a_step, args.max_steps, config.seed)
    trainer = _kind_of_trainer(config)(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(sets["train"]).select(order),
        eval_dataset=Dataset.from_list(sorted(sets["dev"], key=lambda row: -row["length"])),  # little padding
        processing_class=tokenizer,
        peft_config=None if config.full_finetune else lora_config(config),
        callbacks=[Watch(run, questions, config.eval_batch_size, config.select_by, config.patience)],
    )
    trainer.remove_callback(PrinterCallback)
    if "tensorboard" in config.report_to:
        _keep_tensorboard(trainer, config.output_dir / "tensorboard")
    for weight in (weight for weight in trainer.model.parameters() if weight.requires_grad):
        weight.data = weight.data.float()  # over a 4-bit base TRL makes them bfloat16, too coarse for small steps
    return trainer


def _kind_of_trainer(config: TrainConfig) -> Any:
    if config.prompt_loss_weight:
        from dspy_lora.training.prompt_loss import PromptLossTrainer

        return functools.partial(PromptLossTrainer, config.prompt_loss_weight)
    from dspy_lora.training.validation_loss import TokenMeanTrainer

    return TokenMeanTrainer


def _keep_tensorboard(trainer: Any, folder: Path) -> None:
    """Moves TensorBoard's logs out of the folder of checkpoints, which goes when the run succeeds."""
    from transformers.integrations import TensorBoardCallback

    callback = trainer.pop_callback(TensorBoardCallback)
    callback.logging_dir = str(folder)
    trainer.add_callback(callback)


def _arguments(config: TrainConfig, model: Any, rows: int) -> Any:
    import torch
    from transformers.utils import is_torch_tf32_available
    from trl import SFTConfig

    from dspy_lora.training.watch import CHOICE

    small = model.num_parameters() < SMALL_MODEL
    most = config.batch_size if small else min(config.micro_batch_size, config.batch_size)
    micro = next(size for size in range(most, 0, -1) if config.batch_size % size == 0)
    steps = config.max_steps or math.ceil(config.epochs * rows / config.batch_size)
    every = min(config.eval_every or max(1, steps // 10), steps)
    cuda = torch.cuda.is_available()
    args = SFTConfig(
        output_dir=str(config.output_dir / "checkpoints"),
        run_name=config.name,
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=config.batch_size // micro,
        per_device_eval_batch_size=config.eval_batch_size if small else micro,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=min(int(config.warmup_ratio * steps), steps - 1),  # whose first step has a learning rate of 0
        optim="adamw_torch_fused" if cuda and config.optim == "adamw_torch" else config.optim,
        seed=config.seed,
        bf16=model.dtype == torch.bfloat16,
        tf32=True if is_torch_tf32_available() else None,
        use_cpu=not cuda,
        gradient_checkpointing=config.gradient_checkpointing and not small,
        torch_compile=config.torch_compile,
        neftune_noise_alpha=config.neftune_noise_alpha,
        max_length=None,  # rows that are too long are already left out
        dataset_kwargs={"skip_prepare_dataset": True},  # data.tokenize has done it
        train_sampling_strategy="sequential",  # row_order has laid out every step
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
        report_to=list(config.report_to) or "none",
    )
    # One process trains on one GPU, the first that it sees: with more, transformers would wrap the model in
    # nn.DataParallel, which TRL refuses, and enlarge the batch. Under accelerate or torchrun this is 1 already.
    args._n_gpu = min(args.n_gpu, 1)
    return args


def _describe(config: TrainConfig, trainer: Any, facts: dict[str, Any], run: Run) -> None:
    """Console lines on what trains, its share and the rows."""
    trainable, total = parameters(config, trainer.model)
    what = (
        "full fine-tuning"
        if config.full_finetune
        else f"{kind(config)} r={config.r} alpha={config.lora_alpha} dropout={config.lora_dropout} on "
        f"{len(config.target_modules)} modules a layer"
    )
    run.say(f"{what}: {trainable:,} of {total:,} parameters train ({trainable / total:.2%})")
    copies = f" ({config.noisy_copies} of {config.noisy_copies + 1} noisy copies)" if config.noisy_copies else ""
    run.say(
        f"{facts['train']['rows']} rows{copies}, {facts['dev']['rows']} to validate on; "
        f"{trainer.args.max_steps} steps of {config.batch_size} rows, learning rate "
        f"{config.learning_rate:g}, weight decay {config.weight_decay:g}; "
        f"a validation and a checkpoint every {trainer.args.eval_steps} steps"
    )


def _train(config: TrainConfig, trainer: Any, run: Run, start: Path | None) -> None:
    """Trains to the end and leaves the best weights in the model.

    Raises:
        DivergedError: The loss is no longer a number.
    """
    from transformers import TrainerState
    from transformers.integrations import MLflowCallback

    from dspy_lora.training.watch import out_of_patience

    state = TrainerState.load_from_json(str(start / "trainer_state.json")) if start else None
    if start is not None:
        run.say(f"going on from step {step_of(start)}, {start}")
    if state and start and (state.global_step >= trainer.args.max_steps or out_of_patience(state, config.patience)):
        trainer.state = state  # killed after its last step: the trainer would make one more
        trainer._load_from_checkpoint(str(start.with_name(f"checkpoint-{state.best_global_step}")))
    else:
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    if "mlflow" in config.report_to:
        trainer.remove_callback(MLflowCallback)  # its run has ended; what comes after would start another
    if not all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry):
        Checkpoints(config.output_dir).remove()  # going on from there would end the same way
        raise DivergedError(f"{config.name}: the loss is no longer a number. Use a smaller learning_rate.")


def _finish(
    config: TrainConfig, base: Base, trainer: Any, questions: Questions, run: Run, before: float
) -> dict[str, Any]:
    """Rounds the best weights, saves them and measures them on the validation rows.

    Args:
        config: The run's settings.
        base: The base model.
        trainer: The trainer, at its end.
        questions: Validation rows.
        run: The run's book.
        before: Exact match of the base model on them.
    """
    import torch

    model, tokenizer = trainer.model, trainer.processing_class
    for weight in (weight for weight in model.parameters() if weight.requires_grad):
        weight.data = weight.data.to(getattr(torch, config.adapter_dtype)).to(weight.dtype)
    if not config.full_finetune:
        save_adapter(model, base, config.output_dir / "adapter", config.adapter_dtype)
    metrics = trainer.evaluate()
    if config.full_finetune:  # after it: the weights leave the format that they were trained and measured in
        save_model(model, tokenizer, config.output_dir / MODEL_FOLDER, config.adapter_dtype)
    trainable, total = parameters(config, model)
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
