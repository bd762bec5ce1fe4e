"""General ability before and after training: the base, the adapter, and a fully fine-tuned copy."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspy_lora.evaluation.exam import OTHERS, OWN, RULES, STRUCTURE
from dspy_lora.evaluation.report import markdown_table, text_table
from dspy_lora.evaluation.scores import (
    RESAMPLES,
    SWAPS,
    Compared,
    compare_exact_match,
    compare_perplexity,
    estimate,
)
from dspy_lora.evaluation.text import TextLikelihoods

Array = NDArray[np.float64]

BASE, ADAPTER, COPY = "base", "adapter", "full copy"
PERPLEXITY = "perplexity of text"
_ORDER = (OWN, PERPLEXITY, RULES, STRUCTURE, OTHERS)
_EQUAL = 1e-12


@dataclass(frozen=True)
class Retention:
    """What was measured.

    Attributes:
        domain: The adapter's task.
        systems: What each system is: the base's name and revision, the adapter's reference, the copy's folder.
        measures: For each measure every system but the base against the base, which stands under ``base`` in each.
        rows: For each measure how many rows (of text: windows) it has.
    """

    domain: str
    systems: Mapping[str, str]
    measures: Mapping[str, Mapping[str, Compared]]
    rows: Mapping[str, int]

    def notes(self) -> list[str]:
        """What was left out, and how to have it."""
        left_out = {
            COPY: "no fully fine-tuned copy: train one on the same rows and steps with `dspy-lora train "
            "--full-finetune`, and give its run with --full-copy.",
            PERPLEXITY: "no perplexity of plain text: give a file with --text.",
            OTHERS: "no other domains' sets: give --data-root, a folder that holds them, instead of --test-data.",
        }
        return [note for name, note in left_out.items() if name not in self.systems and name not in self.measures]

    def to_json(self) -> dict[str, Any]:
        """All figures; in each comparison ``adapter`` is the system that it is filed under."""
        measures = {
            name: {"rows": self.rows[name]} | {system: asdict(compared) for system, compared in each.items()}
            for name, each in self.measures.items()
        }
        state = {"domain": self.domain, "systems": dict(self.systems), "measures": measures}
        return state | {"notes": self.notes()}

    def to_markdown(self) -> str:
        """The figures for a reader."""
        names = [f"- {system}: {what}" for system, what in self.systems.items()]
        parts = [
            f"# What {self.systems[ADAPTER]} kept",
            "\n".join(names),
            markdown_table(*self._values()),
            "## Change from the base",
            markdown_table(*self._changes()),
            self._legend(),
            *(f"Note: {note}" for note in self.notes()),
        ]
        return "\n\n".join(parts) + "\n"

    def to_text(self) -> str:
        """Short tables for the console."""
        lines = [f"{system}: {what}" for system, what in self.systems.items()]
        lines += ["", text_table(*self._values()), "", "change from the base:", text_table(*self._changes())]
        return "\n".join([*lines, "", self._legend(), *(f"note: {note}" for note in self.notes())])

    def _values(self) -> tuple[list[str], list[list[str]]]:
        first = next(iter(self.measures.values()))
        rows = [[BASE, *(next(iter(each.values())).base.shown() for each in self.measures.values())]]
        rows += [[name, *(each[name].adapter.shown() for each in self.measures.values())] for name in first]
        return ["system", *self.measures], rows

    def _changes(self) -> tuple[list[str], list[list[str]]]:
        first = next(iter(self.measures.values()))
        rows = [[name, *(_change(each[name]) for each in self.measures.values())] for name in first]
        return ["system", *self.measures], rows

    def _legend(self) -> str:
        rows = ", ".join(f"{name} {count:,}" for name, count in self.rows.items())
        return (
            "Shares of right answers, the mean over domains for other domains; perplexity a token, where less is "
            f"better. Brackets: 95 % intervals over rows ({rows}). p: two-sided, of no change."
        )


def _change(compared: Compared) -> str:
    return f"{compared.difference.shown()} p={compared.p_value:.2g}"


def compare_systems(
    marks: Mapping[str, Mapping[str, list[Array]]], text: TextLikelihoods | None
) -> tuple[dict[str, dict[str, Compared]], dict[str, int]]:
    """Compares every system with the base.

    Args:
        marks: For each system, the base among them, what ``Exam.take`` returned.
        text: Likelihoods of a plain text; None leaves perplexity out.

    Returns:
        For each measure the systems' comparisons, and the number of its rows.
    """
    systems = [name for name in marks if name != BASE]
    measures, rows = {}, {}
    for measure, theirs in marks[BASE].items():
        compare = compare_means if measure == OTHERS else _compare_shares
        measures[measure] = {name: compare(marks[name][measure], theirs) for name in systems}
        rows[measure] = sum(map(len, theirs))
    if text is not None:
        before = text.sums[BASE]
        measures[PERPLEXITY] = {name: compare_perplexity(text.sums[name], before, text.tokens) for name in systems}
        rows[PERPLEXITY] = len(before)
    order = [name for name in _ORDER if name in measures]
    return {name: measures[name] for name in order}, {name: rows[name] for name in order}


def _compare_shares(ours: list[Array], theirs: list[Array]) -> Compared:
    """Shares of one set, by McNemar's test."""
    [[first], [second]] = ours, theirs
    return compare_exact_match(["1.0"] * len(first), [str(mark) for mark in first], [str(mark) for mark in second])


def compare_means(ours: list[Array], theirs: list[Array], seed: int = 0) -> Compared:
    """Means over sets of each set's share, by a randomisation test; a small set counts as much as a large one.

    Rows are resampled, and answers of the two systems swapped, within their sets.

    Args:
        ours: Marks of a system (1 or 0), one array a set, (rows,).
        theirs: The base's, in the same order.
        seed: Of the resamples and swaps.
    """
    random = np.random.default_rng(seed)
    drawn, flipped = np.zeros((2, RESAMPLES)), np.zeros(SWAPS)
    for pair in zip(ours, theirs, strict=True):
        first, second = pair
        rows = len(first)
        drawn += np.stack(pair) @ random.multinomial(rows, np.full(rows, 1 / rows), RESAMPLES).T / rows / len(ours)
        differing = int((first != second).sum())  # by 1 each: a swap turns it round
        flipped += (2 * random.binomial(differing, 0.5, SWAPS) - differing) / rows / len(ours)
    values = [float(np.mean([marks.mean() for marks in each])) for each in (ours, theirs)]
    difference = values[0] - values[1]
    reached = int((np.abs(flipped) >= abs(difference) - _EQUAL).sum())
    return Compared(
        f"mean over {len(ours)} sets",
        estimate(values[0], drawn[0]),
        estimate(values[1], drawn[1]),
        estimate(difference, drawn[0] - drawn[1]),
        (reached + 1) / (SWAPS + 1),
        f"randomisation within sets, {SWAPS:,} swaps",
    )
