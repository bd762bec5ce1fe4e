"""What a generated task is: one signature and several rows whose answers the prompt decides."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from dspy_lora.seedling.words import Split

ROWS = 6


@dataclass
class Task:
    """One signature and its rows.

    Attributes:
        kind: Which sort of task.
        instruction: The signature's instruction.
        inputs: Field name to type.
        outputs: Field name to type.
        rows: Field name to value, for all fields; ``reasoning`` is set where the answer has a reason to give.
        needs_demos: The answer follows from the demos only.
        labels: Number of labels where rules decide among labels, else 0.
        descriptions: Field name to description, for some fields.
    """

    kind: str
    instruction: str
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    rows: list[dict[str, Any]]
    needs_demos: bool = False
    labels: int = 0
    descriptions: dict[str, str] = field(default_factory=dict)


def pick(rng: Random, wordings: Sequence[str], split: Split) -> str:
    """One wording; every fifth is held out."""
    return rng.choice([w for i, w in enumerate(wordings) if (i % 5 == 4) == (split == "heldout")])
