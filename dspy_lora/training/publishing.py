"""A trained adapter on its way out: into the run's folder, into a registry, into a table."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspy_lora.adapters.base import Base
from dspy_lora.training.run import read_card

if TYPE_CHECKING:
    from dspy_lora.adapters.revision import Revision


def save_adapter(model: Any, base: Base, folder: Path, dtype: str) -> None:
    """Writes the PEFT folder beside its place and then moves it there, so that a half-written one is never seen.

    Args:
        model: The PEFT model.
        base: Its base, named in adapter_config.json.
        folder: Where the adapter lands; one that is there is replaced.
        dtype: Number format of the saved weights.
    """
    import torch
    from safetensors.torch import load_file, save_file

    draft = folder.with_name("adapter.partial")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        model.peft_config["default"].base_model_name_or_path = base.name
        model.save_pretrained(draft, save_embedding_layers=False)
        (draft / "README.md").unlink(missing_ok=True)  # PEFT's blank model card
        file = draft / "adapter_model.safetensors"
        rounded = {name: weight.to(getattr(torch, dtype)) for name, weight in load_file(file).items()}
        save_file(rounded, file, {"format": "pt"})
        shutil.rmtree(folder, ignore_errors=True)
        draft.replace(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def record(folder: Path) -> dict[str, Any]:
    """What a revision's metadata say of a finished run: settings, data hashes, figures, GPU-hours."""
    card = read_card(folder)
    what = {"config": card["config"], "data": card["data"]["sha256"], "result": card["result"]}
    return what | {"gpu_hours": card["gpu_hours"]}


def publish_run(folder: Path, registry: Path, name: str, **more: Any) -> "Revision":
    """Publishes a finished run's adapter with the settings, data hashes and figures of its card.

    Args:
        folder: The run's.
        registry: Where to.
        name: The adapter's name.
        **more: More to record about the revision.

    Raises:
        AdapterError: It cannot be served.
        PublishError: The disk refused; the registry is as it was before.
    """
    from dspy_lora.adapters.registry import AdapterRegistry

    base = Base(**read_card(folder)["base"])
    return AdapterRegistry(registry).publish(folder / "adapter", name, base=base, metadata=record(folder) | more)


def summary(cards: Sequence[dict[str, Any]]) -> str:
    """A table of finished runs, one line a ``run.json``."""
    width = max([18, *(len(card["name"]) for card in cards)])
    lines = [
        f"{'name':<{width}} {'rows':>6} {'steps':>6} {'val. loss':>9} {'exact match':>11} {'base':>6} {'seconds':>8}"
    ]
    for card in cards:
        result = card["result"]
        lines.append(
            f"{card['name']:<{width}} {card['data']['train']['rows']:>6} {result['steps']:>6} "
            f"{result['eval_loss']:>9.4f} {result['exact_match']:>11.3f} {result['base_exact_match']:>6.3f} "
            f"{card['wall_seconds']:>8.0f}"
        )
    return "\n".join(lines)


def best_run(folders: Sequence[Path]) -> Path:
    """The run with the highest exact match on the validation rows, among equals the one with the lowest loss."""
    results = {folder: read_card(folder)["result"] for folder in folders}
    return max(folders, key=lambda folder: (results[folder]["exact_match"], -results[folder]["eval_loss"]))
