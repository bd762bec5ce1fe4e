"""A fully fine-tuned copy of the base, which an adapter is compared with: all weights train, and a model is saved."""

import shutil
from pathlib import Path
from typing import Any

from dspy_lora.training.settings import TrainConfig

MODEL_FOLDER = "model"

# Of an adapter's learning rate: the best rate for LoRA is about ten times the best one for full fine-tuning, over many
# models and sets ("LoRA Without Regret", Thinking Machines 2025, https://thinkingmachines.ai/blog/lora/).
RATE_SHARE = 0.1


def parameters(config: TrainConfig, model: Any) -> tuple[int, int]:
    """Trained parameters of a run, and all parameters."""
    if config.full_finetune:
        return model.num_parameters(), model.num_parameters()
    trainable, total = model.get_nb_trainable_parameters()
    return trainable, total


def save_model(model: Any, tokenizer: Any, folder: Path, dtype: str) -> None:
    """Writes a model folder beside its place and then moves it there, so that a half-written one is never seen.

    Args:
        model: The model; its weights are in the saved format afterwards.
        tokenizer: Its tokenizer, whose chat template is saved along.
        folder: Where the model lands; one that is there is replaced.
        dtype: Number format of the saved weights.
    """
    import torch

    draft = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        model.to(getattr(torch, dtype)).save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        shutil.rmtree(folder, ignore_errors=True)
        draft.replace(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
