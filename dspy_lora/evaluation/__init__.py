"""Systems compared on items: responses, item response theory, adaptive testing, items that look mislabelled."""

from dspy_lora.evaluation.adaptive import AdaptiveTest
from dspy_lora.evaluation.held_out import HeldOutFit, held_out_fit
from dspy_lora.evaluation.irt import Comparison, IRTFit, fit_irt
from dspy_lora.evaluation.items import Items
from dspy_lora.evaluation.responses import Responses
from dspy_lora.evaluation.simulate import Simulated, simulate
from dspy_lora.evaluation.suspects import Suspect, suspicious_items

__all__ = [
    "AdaptiveTest",
    "Comparison",
    "HeldOutFit",
    "IRTFit",
    "Items",
    "Responses",
    "Simulated",
    "Suspect",
    "fit_irt",
    "held_out_fit",
    "simulate",
    "suspicious_items",
]
