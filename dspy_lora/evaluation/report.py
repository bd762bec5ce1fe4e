"""An evaluation as JSON and as Markdown, written in full or not at all."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dspy_lora.adapters import disk
from dspy_lora.evaluation.adapter import Evaluation
from dspy_lora.evaluation.answers import Given
from dspy_lora.evaluation.confusion import Confusion
from dspy_lora.evaluation.cost import Parameters, TrainingCost
from dspy_lora.evaluation.overhead import Overhead, Speed, Spread

JSON, MARKDOWN, PICTURE, ANSWERS = "report.json", "report.md", "confusion.png", "answers.jsonl"


@dataclasses.dataclass(frozen=True)
class Report:
    """An evaluation and what it was of.

    Attributes:
        domain: The task.
        adapter: The adapter's reference, ``legal@0123456789ab``.
        base: The base's name and revision.
        data: The test file.
        sha256: Of that file.
        evaluation: What was measured.
        parameters: What was trained.
        cost: Of the training; None where no rate was given.
        versions: Of the packages that took part.
        hardware: Of the machine.
    """

    domain: str
    adapter: str
    base: str
    data: str
    sha256: str
    evaluation: Evaluation
    parameters: Parameters
    cost: TrainingCost | None
    versions: Mapping[str, str]
    hardware: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """All figures; the answers to single rows and their likelihoods are left out."""
        evaluation, likelihoods = self.evaluation, self.evaluation.likelihoods
        state = {
            "domain": self.domain,
            "adapter": self.adapter,
            "base": self.base,
            "data": {"file": self.data, "sha256": self.sha256, "rows": len(evaluation.references)},
            "measures": [dataclasses.asdict(each) for each in evaluation.measures],
            "no_answer": evaluation.problems(),
            "perplexity": likelihoods
            and {"rows": len(likelihoods.tokens), "left_out": likelihoods.left_out, "tokens": likelihoods.tokens.sum()},
            "labels": evaluation.labels and [dataclasses.asdict(each) for each in evaluation.labels],
            "confusion": evaluation.confusion and dataclasses.asdict(evaluation.confusion),
            "overhead": evaluation.overhead and dataclasses.asdict(evaluation.overhead),
            "parameters": dataclasses.asdict(self.parameters) | {"share": self.parameters.share},
            "versions": dict(self.versions),
            "hardware": dict(self.hardware),
        }
        if self.cost:
            state["training_cost"] = dataclasses.asdict(self.cost) | {"dollars": self.cost.dollars}
        return state

    def to_markdown(self) -> str:
        """The figures for a reader."""
        evaluation = self.evaluation
        parts = [
            f"# {self.adapter} against {self.base}",
            f"{len(evaluation.references):,} rows of `{self.data}` (SHA-256 {self.sha256[:12]}).",
            markdown_table(*self._measures()),
            "Brackets: 95 % bootstrap intervals, over rows. p: two-sided, of no difference.",
            "\n".join(f"- {line}" for line in self._facts()),
        ]
        if evaluation.overhead:
            parts += ["## Inference", markdown_table(*_speeds(evaluation.overhead)), _terms(evaluation.overhead)]
        if evaluation.labels and evaluation.confusion:
            parts += ["## Labels", markdown_table(*self._labels()), f"![confusion matrix]({PICTURE})"]
        return "\n\n".join(parts) + "\n"

    def to_text(self) -> str:
        """A short table for the console."""
        lines = [f"{self.adapter} against {self.base}: {len(self.evaluation.references):,} rows of {self.data}", ""]
        lines.append(text_table(*self._measures()))
        if self.evaluation.overhead:
            lines += ["", text_table(*_speeds(self.evaluation.overhead)), _terms(self.evaluation.overhead)]
        return "\n".join([*lines, "", *self._facts()])

    def _measures(self) -> tuple[list[str], list[list[str]]]:
        header = ["measure", "adapter", "base", "adapter - base", "p", "test"]
        rows = []
        for each in self.evaluation.measures:
            values = (each.adapter, each.base, each.difference)
            rows.append([each.measure, *(value.shown() for value in values), f"{each.p_value:.2g}", each.test])
        return header, rows

    def _labels(self) -> tuple[list[str], list[list[str]]]:
        header = ["label", "rows", "precision", "recall", "F1", "base's F1"]
        rows = []
        for each in self.evaluation.labels or ():
            shares = (each.precision, each.recall, each.f1, each.base_f1)
            rows.append([each.label, str(each.support), *(f"{share:.3f}" for share in shares)])
        return header, rows

    def _facts(self) -> Iterable[str]:
        for name, problems in self.evaluation.problems().items():
            if problems:
                reasons = ", ".join(f"{count:,} {reason}" for reason, count in problems.items())
                yield f"rows without an answer, {name}: {reasons} (they count as wrong)"
        likelihoods = self.evaluation.likelihoods
        if likelihoods and likelihoods.left_out:
            yield f"perplexity: {likelihoods.left_out:,} rows pass the model's context and are left out"
        share = "" if self.parameters.share is None else f" ({self.parameters.share:.2%} of all)"
        yield f"trained parameters: {self.parameters.trained:,}{share}"
        if self.cost:
            hours = f"{self.cost.gpu_hours:.3g} GPU-hours at ${self.cost.rate:g}"
            yield f"training cost: ${self.cost.dollars:.2f} ({hours})"


def _speeds(overhead: Overhead) -> tuple[list[str], list[list[str]]]:
    header = ["speed", "adapter", "base", "adapter / base"]
    figures: list[tuple[str, Callable[[Speed], Spread | None], Spread | None]] = [
        ("answers a second", lambda speed: speed.answers, overhead.throughput_ratio),
        ("output tokens a second", lambda speed: speed.tokens, None),
        ("median latency, s", lambda speed: speed.latency, overhead.latency_ratio),
    ]
    rows = [[name, *map(_spread, (of(overhead.adapter), of(overhead.base), ratio))] for name, of, ratio in figures]
    return header, rows


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    median, least, most = (
        f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in (spread.median, spread.least, spread.most)
    )
    return f"{median} ({least} to {most})"


def _terms(overhead: Overhead) -> str:
    return (
        f"Median (least to most) of {overhead.turns} turns each, {overhead.batch} prompts at once, every answer held "
        f"to {overhead.answer_tokens} tokens."
    )


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns, each as wide as its widest cell."""
    table = [header, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; bars and line breaks in cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")


# -- files -------------------------------------------------------------------------------------------------------------


def write_report(report: Report, folder: Path, *, picture: bool = True) -> None:
    """Writes ``report.json``, ``report.md``, ``answers.jsonl`` (one row a line) and ``confusion.png``.

    A picture of an earlier report is removed where this one has none.

    Raises:
        MissingDependencyError: matplotlib is not installed and the picture is wanted.
        PublishError: The disk refused.
    """
    evaluation = report.evaluation
    given = zip(evaluation.references, evaluation.adapter, evaluation.base, strict=True)
    answers = (_answers(number, *each) for number, each in enumerate(given, start=1))
    drawn = evaluation.confusion if picture else None
    markdown = report.to_markdown()
    if drawn is None:
        markdown = markdown.replace(f"\n\n![confusion matrix]({PICTURE})", "")
    texts = {
        JSON: json.dumps(report.to_json(), indent=2, ensure_ascii=False) + "\n",
        MARKDOWN: markdown,
        ANSWERS: "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers),
    }
    write_files(folder, texts, (drawn, report.adapter) if drawn else None)
    if drawn is None:
        with disk.writing("remove the picture of an earlier report", folder):
            (folder / PICTURE).unlink(missing_ok=True)


def _answers(number: int, truth: str, ours: Given, theirs: Given) -> dict[str, Any]:
    """A row of ``answers.jsonl``; a problem says why an answer is empty."""
    texts = {"row": number, "reference": truth, "adapter": ours.text, "base": theirs.text}
    return texts | {"adapter_problem": ours.problem, "base_problem": theirs.problem}


def write_files(folder: Path, texts: Mapping[str, str], picture: tuple[Confusion, str] | None = None) -> None:
    """Writes files beside their places, then moves them there.

    Raises:
        PublishError: The disk refused.
    """
    with disk.writing("write the report", folder), disk.staging(folder) as hidden:
        for name, text in texts.items():
            disk.write(hidden / name, text.encode("utf-8", "backslashreplace").decode())
        if picture:
            confusion, title = picture
            confusion.draw(hidden / PICTURE, title)
            disk.sync(hidden / PICTURE)
        for file in sorted(hidden.iterdir()):
            file.replace(folder / file.name)
