"""Merging: an adapter into its base, several adapters into one, and what vLLM cannot serve into a plain LoRA."""

from dspy_lora.merging.agreement import Agreement, Check
from dspy_lora.merging.combined import METHODS, MergedAdapter, merge_adapters
from dspy_lora.merging.merged_base import MergedBase, merge_into_base
from dspy_lora.merging.plain_lora import PlainLora, to_plain_lora

__all__ = [
    "METHODS",
    "Agreement",
    "Check",
    "MergedAdapter",
    "MergedBase",
    "PlainLora",
    "merge_adapters",
    "merge_into_base",
    "to_plain_lora",
]
