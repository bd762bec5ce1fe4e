"""A plain LoRA, written as the folder that PEFT and vLLM read."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dspy_lora.adapters.base import Base
from dspy_lora.adapters.checks import WEIGHTS_FILE

if TYPE_CHECKING:
    import torch

    # B (outputs, rank) and A (rank, inputs); the module's weight changes by their product.
    Factors = tuple[torch.Tensor, torch.Tensor]


def write_lora(folder: Path, factors: "Mapping[str, Factors]", rank: int, base: Base, dtype: str) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        folder: Where.
        factors: B and A by module. Where they have fewer than ``rank`` columns and rows, zeros are added.
        rank: The adapter's rank. Its alpha is the rank and rsLoRA is off, so nothing scales the product.
        base: The base that it is for.
        dtype: Number format, as torch names it.
    """
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file
    from torch.nn.functional import pad

    tensors = {}
    for module, (b, a) in factors.items():
        missing, kind = rank - a.shape[0], getattr(torch, dtype)
        tensors[f"base_model.model.{module}.lora_A.weight"] = pad(a, (0, 0, 0, missing)).to("cpu", kind).contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = pad(b, (0, missing)).to("cpu", kind).contiguous()
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(factors),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.name,
        inference_mode=True,
    )
    config.save_pretrained(folder)
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
