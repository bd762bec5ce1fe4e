"""Optimizers that know adapters, installed as ``dspy_lora.optimizers``."""
