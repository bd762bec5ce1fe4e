"""Optimizers that know adapters, installed as ``dspy_lora.optimizers``."""

from dspy_lora.optimizers.ace import ACE, ACEResult
from dspy_lora.optimizers.asking import IRTEvaluationPolicy
from dspy_lora.optimizers.bootstrap_finetune import BootstrapFinetune
from dspy_lora.optimizers.lora_gepa import LoRAGEPA
from dspy_lora.optimizers.proposers import RuleProposer
from dspy_lora.optimizers.results import LoRAGEPAResult

__all__ = ["ACE", "ACEResult", "BootstrapFinetune", "IRTEvaluationPolicy", "LoRAGEPA", "LoRAGEPAResult", "RuleProposer"]
