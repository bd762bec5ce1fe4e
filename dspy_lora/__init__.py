"""dspy-lora: DSPy programs on a vLLM engine that serves many LoRA adapters in one batch.

The public names are loaded at their first use (PEP 562), so ``import dspy_lora`` costs milliseconds and pulls in
neither torch nor vLLM nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from dspy_lora import errors

if TYPE_CHECKING:
    from dspy_lora.adapters.registry import AdapterRegistry
    from dspy_lora.config import Config, load_config
    from dspy_lora.detection.classifier import DomainClassifier
    from dspy_lora.lm import LoRALM
    from dspy_lora.optimizers import LoRAGEPA
    from dspy_lora.pipeline import DomainPipeline
    from dspy_lora.router import LoRARouter
    from dspy_lora.saved import load

__version__ = "0.1.0"
__all__ = [
    "AdapterRegistry",
    "Config",
    "DomainClassifier",
    "DomainPipeline",
    "LoRAGEPA",
    "LoRALM",
    "LoRARouter",
    "errors",
    "load",
    "load_config",
]

_HOMES = {
    "AdapterRegistry": "dspy_lora.adapters.registry",
    "Config": "dspy_lora.config",
    "DomainClassifier": "dspy_lora.detection.classifier",
    "DomainPipeline": "dspy_lora.pipeline",
    "LoRAGEPA": "dspy_lora.optimizers",
    "LoRALM": "dspy_lora.lm",
    "LoRARouter": "dspy_lora.router",
    "load": "dspy_lora.saved",
    "load_config": "dspy_lora.config",
}

if not TYPE_CHECKING:  # a type checker would take this as "any name exists"

    def __getattr__(name: str) -> object:
        """Imports a public name from its module at its first use."""
        if name not in _HOMES:
            raise AttributeError(f"module 'dspy_lora' has no attribute {name!r}")
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """Lists the public names, loaded or not."""
    return sorted([*globals(), *__all__])
