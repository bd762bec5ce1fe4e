"""What was read, kept and set aside: figures for ``report.json`` and a table for the console."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dspy_lora.prepare.accept import Item, Reject
from dspy_lora.prepare.sources import Split
from dspy_lora.prepare.split import are_labels
from dspy_lora.training.data import prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN = 5  # rejected records and labels that are spelled out on the console
_WIDTH = 60  # of a label on the console

Figures = dict[str, Any]


class Meter:
    """Measures prompts and answers: tokens where there is a tokenizer, else characters.

    Args:
        tokenizer: The base model's; None counts characters of the messages.
        max_length: Tokens that training takes at most in one row; rows beyond it are counted.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase | None", max_length: int) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self.unit = "tokens" if tokenizer else "characters"

    def measure(self, items: Sequence[Item]) -> Figures:
        """Lengths of prompts and answers, and how many rows training would leave out (None without a tokenizer)."""
        prompts, answers = self._lengths(items)
        # Training ends each answer with the end-of-sequence token.
        long = sum(prompt + answer + 1 > self._max_length for prompt, answer in zip(prompts, answers, strict=True))
        return {
            "prompt": _spread(prompts),
            "answer": _spread(answers),
            "too_long": long if self._tokenizer else None,
        }

    def _lengths(self, items: Sequence[Item]) -> tuple[list[int], list[int]]:
        if self._tokenizer is None:
            prompts = [sum(len(message["content"]) for message in item.prompt) for item in items]
            return prompts, [len(item.answer) for item in items]
        ids = prompt_ids(self._tokenizer, [item.prompt for item in items])
        answers = self._tokenizer([item.answer for item in items], add_special_tokens=False)["input_ids"]
        return list(map(len, ids)), list(map(len, answers))


def _spread(lengths: Sequence[int]) -> dict[str, int]:
    """Smallest, middle, 95th percentile (nearest rank) and largest length."""
    ordered = sorted(lengths)
    ranks = {"median": 0.5, "p95": 0.95}
    return {"min": ordered[0]} | {
        name: ordered[math.ceil(share * len(ordered)) - 1] for name, share in ranks.items()
    } | {"max": ordered[-1]}  # fmt: skip


def label_counts(labels: Mapping[Split, Sequence[str]]) -> dict[str, dict[str, int]] | None:
    """Rows of each label in each split, most frequent first; None where the answers are no labels."""
    everything = [label for part in labels.values() for label in part]
    if not are_labels(everything):
        return None
    counts = {split: Counter(part) for split, part in labels.items()}
    order = sorted(Counter(everything).items(), key=lambda pair: (-pair[1], pair[0]))
    return {label: {split: counts[split][label] for split in labels} for label, _ in order}


def label_warnings(labels: Mapping[Split, Sequence[str]]) -> list[str]:
    """Labels that are validated or tested on and never trained on."""
    if label_counts(labels) is None:
        return []
    trained = set(labels["train"])
    warnings = []
    for split in (split for split in labels if split != "train"):
        unseen = Counter(label for label in labels[split] if label not in trained)
        if unseen:
            names = ", ".join(repr(label) for label, _ in unseen.most_common(_SHOWN))
            more = f" and {len(unseen) - _SHOWN} more" if len(unseen) > _SHOWN else ""
            warnings.append(
                f"{len(unseen)} label(s) of {split} never occur in train, in {unseen.total()} rows: {names}{more}"
            )
    return warnings


def table(report: Figures, rejects: Sequence[Reject]) -> str:
    """The report for the console."""
    unit, splits = report["length_unit"], report["splits"]
    head = f"{'split':<6} {'rows':>7} {'answers':>8} {'majority':>9} {'prompt ' + unit:>24} {'answer ' + unit:>24}"
    counted = any(figures["too_long"] is not None for figures in splits.values())
    lines = [head + (f" {'too long':>9}" if counted else "")]
    for name, figures in splits.items():
        line = f"{name:<6} {figures['rows']:>7,} {figures['distinct_answers']:>8,} {figures['majority']:>9.1%}"
        line += f" {_shown(figures['prompt']):>24} {_shown(figures['answer']):>24}"
        lines.append(line + (f" {figures['too_long']:>9,}" if counted else ""))
    lines.append("(lengths: median / 95th percentile / largest)")
    return "\n".join([*lines, *_labels(report), "", *_set_aside(report, rejects), *_warnings(report)])


def _shown(spread: Mapping[str, int]) -> str:
    return f"{spread['median']:,} / {spread['p95']:,} / {spread['max']:,}"


def _labels(report: Figures) -> list[str]:
    counts = report["labels"]
    if counts is None:
        return []
    names = [label if len(label) <= _WIDTH else label[: _WIDTH - 1] + "…" for label in list(counts)[:_SHOWN]]
    width = max(len("label"), *map(len, names))
    lines = ["", f"{'label':<{width}}" + "".join(f" {split:>7}" for split in report["splits"])]
    for name, row in zip(names, counts.values(), strict=False):
        lines.append(f"{name:<{width}}" + "".join(f" {number:>7,}" for number in row.values()))
    left = len(counts) - _SHOWN
    return [*lines, f"and {left} more in report.json"] if left > 0 else lines


def _set_aside(report: Figures, rejects: Sequence[Reject]) -> list[str]:
    line = f"{report['records']:,} records read: {report['malformed']:,} malformed, "
    line += f"{report['duplicates']:,} equal to another row"
    if (threshold := report["settings"]["near"]) is not None:
        line += (
            f", {report['near_duplicates']:,} nearly equal to a row of another split (Jaccard {threshold:g} or more)"
        )
    lines = [line]
    bad = [reject for reject in rejects if reject.kind == "malformed"]
    lines += [f"  {reject.record.place}: {reject.reason}" for reject in bad[:_SHOWN]]
    return [*lines, f"  and {len(bad) - _SHOWN} more malformed in rejects.jsonl"] if len(bad) > _SHOWN else lines


def _warnings(report: Figures) -> list[str]:
    return [f"warning: {text}" for text in report["warnings"]]
