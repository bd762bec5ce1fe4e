"""The shape of an adapter in training: its parent must have it, its base the modules for it, its engine the rank."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic

from dspy_lora.adapters.base import Base
from dspy_lora.adapters.base_modules import base_modules
from dspy_lora.adapters.peft_config import CONFIG_FILE, PeftConfig, names, read_json
from dspy_lora.engine.settings import EngineSettings
from dspy_lora.errors import AdapterError, ConfigError
from dspy_lora.training.settings import TrainConfig, problems

_ENGINE_RANK = 16  # what an engine takes unless it is told (engine/arguments.py)


def shape_of(folder: Path, name: str) -> dict[str, Any]:
    """The shape of an adapter whose weights a run starts from, as settings.

    Args:
        folder: The adapter's.
        name: What an error calls it.

    Raises:
        AdapterError: No such adapter, or no settings of a run give this shape.
    """
    raw = read_json(folder / CONFIG_FILE)
    try:
        peft = PeftConfig.model_validate(raw)
    except pydantic.ValidationError as exc:
        raise AdapterError(f"adapter {name!r}: {CONFIG_FILE} is not PEFT's: {problems(exc)}") from exc
    if peft.rank_pattern or peft.alpha_pattern or not isinstance(peft.target_modules, list):
        raise AdapterError(
            f"adapter {name!r} has ranks or targets by pattern, which training cannot go on from. Start from a fresh "
            "LoRA over the base model: without parent, or with train_kwargs['from_parent'] = False."
        )
    return {
        "r": peft.r,
        "lora_alpha": peft.lora_alpha,
        "use_rslora": peft.use_rslora,
        "use_dora": bool(raw.get("use_dora")),
        "target_modules": sorted(peft.target_modules),
    }


def differing(settings: Mapping[str, Any], shape: Mapping[str, Any]) -> str | None:
    """The first of the settings that is not as the shape has it."""
    for key in shape.keys() & settings.keys():
        if (sorted(settings[key]) if key == "target_modules" else settings[key]) != shape[key]:
            return key
    return None


def check_parent(config: TrainConfig) -> None:
    """Refuses a run that starts from an adapter of another shape, of which PEFT would take what fits.

    Raises:
        AdapterError: There is no such adapter, or its shape is none of a run's.
        ConfigError: The shapes differ.
    """
    if config.parent is None:
        return
    shape = shape_of(config.parent, str(config.parent))
    own = {key: getattr(config, key) for key in shape}
    if key := differing(own, shape):
        raise ConfigError(
            f"{config.name}: {key} = {own[key]!r}, but the adapter that training goes on from, {config.parent}, has "
            f"{shape[key]!r}. Set {key} to that, or start without parent."
        )


def check_targets(config: TrainConfig, base: Base, publish: bool) -> None:
    """Refuses target modules that the base does not have, as far as its files say which it has.

    Args:
        config: The run.
        base: Its base model.
        publish: Whether the adapter will be published: then each of them must be there, else one is enough.

    Raises:
        ConfigError: They are not there.
    """
    modules = base_modules(base)
    if modules is None or config.full_finetune:
        return
    unmet = [target for target in config.target_modules if not any(names(target, module) for module in modules)]
    if unmet and (publish or len(unmet) == len(config.target_modules)):
        there = sorted({module.rpartition(".")[2] for module in modules})
        raise ConfigError(
            f"{config.name}: target_modules names {', '.join(unmet)}, which base {base.name} does not have. It has "
            f"{', '.join(there)}."
        )


def check_rank(rank: int, engine: EngineSettings | None) -> None:
    """Refuses an adapter that an LM's own engine would not load.

    Args:
        rank: The adapter's.
        engine: Settings of the engine; None where a server serves.

    Raises:
        ConfigError: The rank is above the engine's.
    """
    most = engine.engine_args.get("max_lora_rank", _ENGINE_RANK) if engine else rank
    if rank > most:
        raise ConfigError(
            f"train_kwargs['r'] = {rank}, but the engine of this LM takes ranks up to {most}. Train a smaller one, "
            "or give LoRALM(engine={'max_lora_rank': ...}) or serving.max_lora_rank in lora_config.yaml."
        )
