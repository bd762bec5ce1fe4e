"""What a generated task is: an instruction, typed fields, and a draw of one question with its answer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import dspy
from dspy.signatures.signature import Signature

from dspy_lora.seedling.texts import SentencePool
from dspy_lora.seedling.words import Split


@dataclass(frozen=True)
class Field:
    """A field of a signature: its name, its Python type, and a description or "" for none."""

    name: str
    type: Any = str
    desc: str = ""


@dataclass(frozen=True)
class Draw:
    """One question of a task: the input values, the right output values, and why."""

    inputs: dict[str, Any]
    outputs: dict[str, Any]
    reason: str


@dataclass(frozen=True)
class World:
    """Where tasks take their words and sentences from."""

    split: Split
    pool: SentencePool


@dataclass
class Task:
    """A task that any number of questions can be drawn from.

    Attributes:
        kind: For the breakdown of scores, such as "keyword" or "copy".
        instructions: The signature's instruction; "" leaves DSPy's default.
        labels: How many answers a rule task has, 0 for other tasks.
        demos_needed: Examples without which the task cannot be known.
        show: Draws the examples that must be shown (all labels covered), if ``demos_needed``.
    """

    kind: str
    instructions: str
    inputs: list[Field]
    outputs: list[Field]
    draw: Callable[[Random], Draw]
    labels: int = 0
    demos_needed: int = 0
    show: Callable[[Random], list[Draw]] | None = None
    reasoning: bool = field(default=False)

    def signature(self) -> type[Signature]:
        """The DSPy signature; with ``reasoning`` the one that dspy.ChainOfThought makes of it."""
        fields: dict[str, Any] = {f.name: (f.type, _info(dspy.InputField, f)) for f in self.inputs}
        fields |= {f.name: (f.type, _info(dspy.OutputField, f)) for f in self.outputs}
        made = dspy.Signature(fields, self.instructions) if self.instructions else dspy.Signature(fields)
        return dspy.ChainOfThought(made).predict.signature if self.reasoning else made


def _info(make: Callable[..., Any], described: Field) -> Any:
    return make(desc=described.desc) if described.desc else make()
