"""What a run of LoRAGEPA found: every candidate, the race, and a report."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dspy
from dspy_lora.optimizers.candidates import Candidate, decode
from dspy_lora.optimizers.choosing import Choice, interval


@dataclass(frozen=True)
class Found:
    """One candidate.

    Attributes:
        candidate: Its texts, one a predictor.
        parents: Indices of the candidates that it came from.
        val_scores: One a validation row.
        changes: Adapters and instructions that differ from the program as it was.
        metric_calls: How many metric calls had been made when it was found.
        objectives: Means on the validation rows, more is better: ``score``, ``adapters`` (minus how many), ``seconds``
            (minus the wall time of a row, others beside it), and the metric's ``objective_scores``.
    """

    candidate: Candidate
    parents: list[int]
    val_scores: list[float]
    changes: int
    metric_calls: int
    objectives: dict[str, float] = field(default_factory=dict, compare=False)

    @property
    def val_score(self) -> float:
        """Mean on the validation rows."""
        return sum(self.val_scores) / len(self.val_scores)

    @property
    def val_interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of the mean."""
        return interval(self.val_scores)

    @property
    def adapters(self) -> dict[str, str]:
        """Predictor to adapter, ``none`` for the base model alone."""
        return {name: decode(text)[0] for name, text in self.candidate.items()}

    @property
    def instructions(self) -> dict[str, str]:
        """Predictor to instruction."""
        return {name: decode(text)[1] for name, text in self.candidate.items()}


@dataclass(frozen=True)
class LoRAGEPAResult:
    """``compiled.detailed_results``.

    Attributes:
        found: Every candidate that was scored on the validation rows, the program as it was first.
        candidates: The same as programs; empty unless ``track_stats``.
        choice: Which one was returned and why.
        race: One line a round of the race.
        ranking: The assignments that the race handed on, best first.
        race_calls: Metric calls of the race.
        moves: Adapter moves that were tried on more rows.
        metric_calls: In all.
        usage: ``calls`` of LMs, ``prompt_tokens``, ``completion_tokens``.
        seconds: Wall time in which candidates ran.
        seed: The run's.
        log_dir: Where its answers are.
    """

    found: list[Found]
    choice: Choice
    race: list[str]
    ranking: list[tuple[str, ...]]
    race_calls: int
    moves: list[str]
    metric_calls: int
    usage: dict[str, float]
    seconds: float
    seed: int | None
    log_dir: str | None
    candidates: list[dspy.Module] = field(default_factory=list)

    @property
    def best_idx(self) -> int:
        """Index of the candidate that was returned."""
        return self.choice.index

    @property
    def best_candidate(self) -> dspy.Module:
        """The program that was returned, as one of ``candidates`` (``track_stats``)."""
        return self.candidates[self.best_idx]

    @property
    def parents(self) -> list[list[int]]:
        """Which candidates each one came from."""
        return [found.parents for found in self.found]

    @property
    def val_subscores(self) -> list[dict[int, float]]:
        """Each candidate's score on each validation row."""
        return [dict(enumerate(found.val_scores)) for found in self.found]

    @property
    def total_metric_calls(self) -> int:
        """``dspy.GEPA``'s name for ``metric_calls``."""
        return self.metric_calls

    @property
    def val_aggregate_scores(self) -> list[float]:
        """Mean score of each candidate on the validation rows."""
        return [found.val_score for found in self.found]

    def front(self, *names: str) -> list[int]:
        """Indices of the candidates that no other one beats in some objective without losing in another.

        Args:
            *names: The objectives that count; none is all of them.
        """
        names = names or tuple(self.found[0].objectives)
        points = [tuple(found.objectives.get(name, -math.inf) for name in names) for found in self.found]

        def beaten(point: tuple[float, ...]) -> bool:
            return any(other != point and all(a >= b for a, b in zip(other, point, strict=True)) for other in points)

        return [index for index, point in enumerate(points) if not beaten(point)]

    def report(self) -> str:
        """The run as Markdown: the choice, the race, every candidate."""
        chosen = self.found[self.choice.index]
        spent = (
            f"{self.metric_calls} metric calls ({self.race_calls} in the race), {self.usage.get('calls', 0):.0f} LM "
            f"calls, {self.usage.get('prompt_tokens', 0):.0f} prompt and "
            f"{self.usage.get('completion_tokens', 0):.0f} output tokens, {self.seconds:.0f} s."
        )
        returned = (
            f"Returned: candidate {self.choice.index}, {chosen.val_score:.3f} on {len(chosen.val_scores)} validation "
            f"rows; the program as it was {self.found[0].val_score:.3f}. P-value of no gain {self.choice.gain:.4f}; of "
            f"not being worse than the best (candidate {self.choice.best}) {self.choice.worse:.4f}."
        )
        lines = [
            "# LoRAGEPA",
            "",
            spent,
            "",
            returned,
            "",
            *_texts(chosen),
            "## The race",
            "",
            *(f"- {line}" for line in self.race),
            *(f"- kept: {', '.join(each)}" for each in self.ranking),
            *(f"- move of {line}" for line in self.moves),
            "",
            "## Candidates",
            "",
            "| # | from | validation | 95 % interval | changes | found at call | adapters |",
            "|---|---|---|---|---|---|---|",
            *(_row(index, found) for index, found in enumerate(self.found)),
            "",
        ]
        return "\n".join(lines)

    def write(self, folder: str | Path) -> Path:
        """Writes ``report.md`` and ``report.html`` (with the lineage as a picture); returns the latter.

        Args:
            folder: Made where it is missing.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = self.report()
        (folder / "report.md").write_text(text, encoding="utf-8")
        page = folder / "report.html"
        head = "<!doctype html><meta charset='utf-8'><title>LoRAGEPA</title>"
        page.write_text(f"{head}{self.lineage()}<pre>{html.escape(text)}</pre>", encoding="utf-8")
        return page

    def lineage(self) -> str:
        """Candidates by validation score over the calls at which they were found, with lines to their parents (SVG)."""
        width, height, margin = 720, 320, 40
        most = max(max(found.metric_calls for found in self.found), 1)

        def place(found: Found) -> tuple[float, float]:
            x = margin + (width - 2 * margin) * found.metric_calls / most
            return x, height - margin - (height - 2 * margin) * min(max(found.val_score, 0.0), 1.0)

        shapes = []
        for index, found in enumerate(self.found):
            x, y = place(found)
            for parent in found.parents:
                px, py = place(self.found[parent])
                shapes.append(f"<line x1='{px:.0f}' y1='{py:.0f}' x2='{x:.0f}' y2='{y:.0f}' stroke='#bbb'/>")
            colour = "#d33" if index == self.choice.index else "#36c"
            title = html.escape(f"{index}: {found.val_score:.3f} {found.adapters}")
            shapes.append(f"<circle cx='{x:.0f}' cy='{y:.0f}' r='5' fill='{colour}'><title>{title}</title></circle>")
        axes = (
            f"<line x1='{margin}' y1='{height - margin}' x2='{width - margin}' y2='{height - margin}' stroke='#000'/>"
            f"<line x1='{margin}' y1='{margin}' x2='{margin}' y2='{height - margin}' stroke='#000'/>"
            f"<text x='{width / 2:.0f}' y='{height - 8}'>metric calls (to {most})</text>"
            f"<text x='4' y='{margin - 10}'>validation score (0 to 1)</text>"
        )
        return (
            f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}'>{axes}{''.join(shapes)}</svg>"
        )


def _texts(found: Found) -> list[str]:
    lines = []
    for name, (adapter, instruction) in {n: decode(t) for n, t in found.candidate.items()}.items():
        lines += [f"## {name}: adapter {adapter}", "", "```", instruction, "```", ""]
    return lines


def _row(index: int, found: Found) -> str:
    low, high = found.val_interval
    parents, adapters = ", ".join(map(str, found.parents)), ", ".join(f"{k}: {v}" for k, v in found.adapters.items())
    cells: Sequence[Any] = (
        index,
        parents or "-",
        f"{found.val_score:.3f}",
        f"{low:.3f} to {high:.3f}",
        found.changes,
        found.metric_calls,
        adapters,
    )
    return f"| {' | '.join(map(str, cells))} |"
