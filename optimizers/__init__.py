"""Optimizers that know adapters, installed as ``dspy_lora.optimizers``."""

from dspy_lora.optimizers.lora_gepa import LoRAGEPA
from dspy_lora.optimizers.proposers import RuleProposer
from dspy_lora.optimizers.results import LoRAGEPAResult

__all__ = ["LoRAGEPA", "LoRAGEPAResult", "RuleProposer"]
