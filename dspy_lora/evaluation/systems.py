"""Many adapters on the rows of one domain, under item response theory."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dspy_lora.errors import ConfigError
from dspy_lora.evaluation.adapter import references
from dspy_lora.evaluation.answers import ask
from dspy_lora.evaluation.irt import IRTFit, fit_irt
from dspy_lora.evaluation.report import markdown_table, text_table
from dspy_lora.evaluation.responses import Responses
from dspy_lora.evaluation.suspects import Suspect, suspicious_items
from dspy_lora.training.rendering import Row

if TYPE_CHECKING:
    import dspy

SHOWN = 10  # rows that are listed
_NORMAL_95 = 1.959964
_TITLE = 80  # characters

Table = tuple[list[str], list[list[str]]]


@dataclass(frozen=True)
class SystemsReport:
    """Systems, best first, and the rows that say most about them.

    Attributes:
        domain: The task.
        data: The test file.
        responses: 1 where a system's answer is the reference, else 0; an item is ``row N``, N from 1 in the file.
        fit: Abilities and items.
        suspects: Rows that look mislabelled, the worst first.
    """

    domain: str
    data: str
    responses: Responses
    fit: IRTFit
    suspects: tuple[Suspect, ...]

    def tables(self) -> dict[str, Table]:
        """The tables by their titles."""
        return {
            "Systems": self._abilities(),
            "Rows that tell these systems apart": self._telling(),
            f"Rows that look mislabelled{self._left_out()}": self._suspects(),
        }

    def _abilities(self) -> Table:
        share = np.nanmean(self.responses.scores, axis=1)
        rows = []
        for name in self.fit.ranking():
            ability, error = self.fit.ability(name)
            low, high = ability - _NORMAL_95 * error, ability + _NORMAL_95 * error
            rows.append(
                [name, f"{share[self.responses.system(name)]:.3f}", f"{ability:+.2f} [{low:+.2f}, {high:+.2f}]"]
            )
        return ["system", "exact match", "ability, logits [95 %]"], rows

    def _telling(self) -> Table:
        rows = []
        for name in self.fit.telling_items(SHOWN):
            at = self.responses.items.index(name)
            mean = f"{np.nanmean(self.responses.scores[:, at]):.2f}"
            item = self.fit.items.item(name)
            difficulty = f"{self.fit.items.difficulty[item]:+.2f} ± {self.fit.items.difficulty_se[item]:.2f}"
            rows.append([name, mean, difficulty, self.responses.titles[at]])
        return ["row", "mean score", "difficulty ± s.e.", "text"], rows

    def _suspects(self) -> Table:
        rows = [[s.item, f"{s.probability:.2f}", f"{s.mean_score:.2f}", s.title] for s in self.suspects[:SHOWN]]
        return ["row", "probability", "mean score", "text"], rows

    def _left_out(self) -> str:
        count = len(self.suspects)
        return f" (the first {SHOWN} of {count}; all are in irt.json)" if count > SHOWN else ""

    def to_text(self) -> str:
        """For the console."""
        rows, systems = len(self.responses.items), len(self.responses.systems)
        lines = [f"{self.domain}: {systems} systems on {rows:,} rows of {self.data} ({self.fit.model})"]
        for title, table in self.tables().items():
            lines += ["", f"{title}:", text_table(*table) if table[1] else "none"]
        return "\n".join([*lines, *(f"note: {warning}" for warning in self.fit.warnings)])

    def to_markdown(self) -> str:
        """For a reader."""
        rows, systems = len(self.responses.items), len(self.responses.systems)
        parts = [f"# {self.domain}: {systems} systems on {rows:,} rows", f"`{self.data}`; model {self.fit.model}."]
        for title, table in self.tables().items():
            parts += [f"## {title}", markdown_table(*table) if table[1] else "None."]
        parts += [f"Note: {warning}." for warning in self.fit.warnings]
        return "\n\n".join(parts) + "\n"

    def to_json(self) -> str:
        """Abilities, suspects, and every system's scores."""
        state: dict[str, Any] = {
            "domain": self.domain,
            "data": self.data,
            "model": self.fit.model,
            "systems": [_system(self, name) for name in self.fit.ranking()],
            "telling_rows": list(self.fit.telling_items(SHOWN)),
            "suspects": [_without_nan(asdict(suspect)) for suspect in self.suspects],
            "rows": list(self.responses.items),
            "scores": dict(zip(self.responses.systems, self.responses.scores.astype(int).tolist(), strict=True)),
            "warnings": list(self.fit.warnings),
        }
        return json.dumps(state, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _without_nan(state: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in state.items()}


def _system(report: SystemsReport, name: str) -> dict[str, Any]:
    ability, error = report.fit.ability(name)
    share = float(np.nanmean(report.responses.scores[report.responses.system(name)]))
    return _without_nan({"system": name, "ability": ability, "standard_error": error, "exact_match": share})


def evaluate_systems(
    lms: "Mapping[str, dspy.LM]", signature: "type[dspy.Signature]", rows: Sequence[Row], *, domain: str, data: str
) -> SystemsReport:
    """Asks every system every row in one mixed batch, and fits abilities and items.

    Args:
        lms: LM by the system's name.
        signature: The task.
        rows: Test rows.
        domain: Name of the task, for the report.
        data: Where the rows are from, for the report.

    Raises:
        ConfigError: Fewer than two systems.
    """
    if len(lms) < 2:
        raise ConfigError(f"--irt compares systems, and there is {len(lms)}: name two or more with --systems.")
    truth = references(signature, rows)
    given = ask(list(lms.values()), signature, rows)
    scores = [[float(each.text == gold) for each, gold in zip(answers, truth, strict=True)] for answers in given]
    names = tuple(f"row {number}" for number in range(1, len(rows) + 1))
    titles = tuple(_title(signature, row, gold) for row, gold in zip(rows, truth, strict=True))
    responses = Responses(np.array(scores), tuple(lms), names, titles)
    fit = fit_irt(responses, log=False)  # the report shows its warnings
    return SystemsReport(domain, data, responses, fit, tuple(suspicious_items(responses, fit)))


def _title(signature: "type[dspy.Signature]", row: Row, gold: str) -> str:
    """The label and the beginning of the input."""
    text = " ".join([f"{gold}:", *(str(row[name]) for name in signature.input_fields)])
    text = " ".join(text.split())
    return text if len(text) <= _TITLE else text[: _TITLE - 1] + "…"
