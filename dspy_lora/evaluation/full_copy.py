"""The fully fine-tuned copy that an adapter is compared with, from the folder of its training run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dspy_lora.adapters.base import Base, resolve_base
from dspy_lora.adapters.registry import Revision
from dspy_lora.errors import ConfigError
from dspy_lora.training.full import MODEL_FOLDER
from dspy_lora.training.run import read_card

# Settings of a run that decide which rows a step sees, and how they are written. What one of the two records does not
# hold is not compared.
_SAME = ("signature", "adapter", "demos", "noisy_copies", "batch_size", "max_length", "seed")


def find_copy(run_folder: Path, base: Base, adapter: Revision) -> Base:
    """Finds the copy and checks that it and the adapter had the same base, rows and steps.

    Args:
        run_folder: A run of ``dspy-lora train --full-finetune``.
        base: The adapter's base.
        adapter: The adapter, published with the record of its training.

    Returns:
        The copy, as the base model that it is to an engine.

    Raises:
        ConfigError: No such run, or another base, other rows or other steps.
    """
    try:
        card = read_card(run_folder)
        copied = {"base": card["base"]["revision"]} | _training(card["config"], card["data"]["sha256"], card["result"])
        record = adapter.metadata
        wanted = {"base": base.revision} | _training(record["config"], record["data"], record["result"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ConfigError(
            f"--full-copy {run_folder}: its run.json, or the adapter's record of its training, cannot be read "
            f"({type(exc).__name__}: {exc}). Give the folder of a finished run of `dspy-lora train --full-finetune`."
        ) from exc
    both = [name for name in copied.keys() & wanted.keys() if copied[name] != wanted[name]]
    if both:
        differences = "; ".join(f"{name} {copied[name]!r}, not {wanted[name]!r}" for name in sorted(both))
        raise ConfigError(
            f"--full-copy {run_folder} was not trained as {adapter.ref!r} was: {differences}. Run `dspy-lora train "
            "--full-finetune` on the adapter's rows, with its --max-steps, --batch-size and --noisy-copies."
        )
    return resolve_base(str(run_folder / MODEL_FOLDER))


def _training(config: Mapping[str, Any], hashes: Mapping[str, str], result: Mapping[str, Any]) -> dict[str, Any]:
    """What a training saw, as far as its record says."""
    settings = {name: config[name] for name in _SAME if name in config}
    return settings | {"rows (SHA-256)": dict(hashes), "steps": result["steps"]}
