"""What a system is asked to see what it kept: its own test rows, other domains' rows, the seedling's instruction tests.

The instruction tests are of made-up words and rules that stand in the prompt, so that no system knows them beforehand.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dspy_lora.config import Config
from dspy_lora.evaluation.adapter import references
from dspy_lora.evaluation.answers import ask
from dspy_lora.seedling import bars
from dspy_lora.seedling.rules import rules_task
from dspy_lora.training.data import read_rows
from dspy_lora.training.rendering import Row

if TYPE_CHECKING:
    import dspy

    from dspy_lora.lm import LoRALM

Array = NDArray[np.float64]

OWN, RULES, STRUCTURE, OTHERS = "own test set", "rules followed", "structure", "other domains"
QUESTIONS = 400  # of each sort of instruction test, as many as bars.py asks
ANSWER_TOKENS = 300  # of an instruction test, as in bars.py


@dataclass(frozen=True)
class TaskSet:
    """Test rows of one task.

    Attributes:
        signature: The task, with one output field.
        rows: The rows.
    """

    signature: "type[dspy.Signature]"
    rows: list[Row]

    def marks(self, lm: "dspy.LM") -> Array:
        """1 where the answer is the reference, else 0, (rows,)."""
        [given] = ask([lm], self.signature, self.rows)
        truth = references(self.signature, self.rows)
        return np.array([each.text == right for each, right in zip(given, truth, strict=True)], dtype=np.float64)


@dataclass(frozen=True)
class Exam:
    """All questions, the same for every system.

    Attributes:
        own: The adapter's task.
        others: Other domains' tasks by their names.
        questions: Instruction tests of all sorts, and as many on rules.
    """

    own: TaskSet
    others: Mapping[str, TaskSet]
    questions: int = QUESTIONS

    def take(self, lm: "dspy.LM") -> dict[str, list[Array]]:
        """Asks one system.

        Returns:
            For each measure 1 for each right answer and 0 for each wrong one; a list of arrays, one a set, (rows,).
        """
        adapter = bars.ADAPTERS["ChatAdapter"]
        general = bars.ask(lm, adapter, bars.questions(0, self.questions))
        rules = bars.ask(lm, adapter, bars.questions(1, self.questions, rules_task))
        marks = {
            OWN: [self.own.marks(lm)],
            RULES: [np.array([outcome.right for outcome in rules], dtype=np.float64)],
            STRUCTURE: [np.array([outcome.structure for outcome in (*general, *rules)], dtype=np.float64)],
        }
        return marks | ({OTHERS: [each.marks(lm) for each in self.others.values()]} if self.others else {})


def domain_sets(config: Config, but: str, data_root: Path, most: int | None = None) -> dict[str, TaskSet]:
    """Test rows of the other domains that have some.

    Args:
        config: Names the domains and their tasks.
        but: The domain that is left out.
        data_root: A folder that holds each domain's ``data`` folder, with test.jsonl.
        most: Rows of each set, the first ones; None takes all.

    Raises:
        DataError: Rows that are malformed.
    """
    sets = {}
    for name in config.domains:
        domain = config.domain(name)
        file = data_root / (domain.data or name) / "test.jsonl"
        if name != but and file.is_file():
            signature = domain.signature()
            sets[name] = TaskSet(signature, read_rows(file, list(signature.fields))[:most])
    return sets


def take_exam(exam: Exam, lms: "Mapping[str, LoRALM]") -> dict[str, dict[str, list[Array]]]:
    """Asks every system, one after another; an engine ends before one of another base starts, and all at the end."""
    marks: dict[str, dict[str, list[Array]]] = {}
    before = None
    try:
        for name, lm in lms.items():
            if before is not None and before.base != lm.base:
                before.kill()
            marks[name], before = exam.take(lm), lm
    finally:
        for lm in lms.values():
            lm.kill()
    return marks
