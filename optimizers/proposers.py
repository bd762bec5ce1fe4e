"""Instruction proposers that need no language model."""

import copy
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

_HEADER = "Use these rules:"
_WORD = re.compile(r"[a-z0-9][a-z0-9'-]+")
_STOP = frozenset(
    "the and for with that this from are was were has have had not but you your our they them their its can could will "
    "would shall should may might must been being into than then there here all any some such only other more most "
    "very also just about over under between does did done per via".split()
)
# What follows the right answer: what was given instead ("..., got billing"), or the sentence's end, which the last
# period of "U.S." is only before a capital.
_GIVEN = r"\s*(?:[.,;(]\s*(?:but\s+)?|\sbut\s+)(?:you\s+)?(?:got|received|said|gave|answered|wrote)\b|\s+got\s*[:=]"
_END = rf"(?:{_GIVEN}|(?<!\.[a-z])\.\s|\.\s+(?=(?-i:[A-Z]))|\.?\s*$|\n)"
_GOLD = re.compile(
    r"(?<!not )\b(?:right|correct|expected|true|gold|wanted|reference)"
    r"(?:(?!\b(?:but|got)\b)[\w ]){0,30}?(?:\bis\b|\bwas\b|:|=)\s*"
    rf"(?:(?P<quote>[\"'`])(?P<quoted>[^\n]+?)(?P=quote)(?=[\s.;)]|$|{_GIVEN})"
    rf"|[\"'`]?(?P<said>[^\n]+?)[\"'`]?{_END})"
    r"|\bexpected\s+[\"'`]?(?P<expected>[^\n.:=]+?)[\"'`]?,?\s+(?:but\s+)?got\b",
    re.IGNORECASE,
)
RIGHT_ANSWER = "Right answer"  # of a record, where the row itself holds it

_PRIOR = 0.2  # pseudo-counts of a word in the informative prior, times its frequency
_FEW_LABELS = 30  # labels that are listed in an instruction


@dataclass(frozen=True)
class Row:
    """A row that a predictor answered.

    Attributes:
        text: Its inputs.
        gold: The right answer.
        right: Whether it was given.
    """

    text: str
    gold: str
    right: bool


def gold_in_feedback(feedback: str) -> str | None:
    """The right answer in a feedback such as "The right answer is refund." or "expected: refund"; None without one."""
    match = _GOLD.search(feedback)
    return (match["quoted"] or match["said"] or match["expected"]).strip() if match else None


class RuleProposer:
    """Writes label lists and keyword rules from what separates right from wrong, by counting.

    It keeps the rows that it has been shown. For each label, words and pairs of words are ranked by the z-score of the
    log-odds ratio with an informative Dirichlet prior between the label's rows and the others (Monroe, Colaresi and
    Quinn 2008, "Fightin' Words", eq. 22), counted once a row; those above a threshold become "If it mentions ...,
    answer ...". Labels that were answered wrong come first. How many words, which threshold, whether labels are listed
    and what stands for "otherwise" varies from proposal to proposal; GEPA keeps what scores. Where answers are no
    labels, it says how they are to be written instead: copied from the text, how long, joined by what.

    Args:
        gold: Takes the right answer out of a feedback.
        max_rules: The most rules in an instruction.
        seed: Of the variations.
    """

    def __init__(
        self, gold: Callable[[str], str | None] = gold_in_feedback, max_rules: int = 16, seed: int = 0
    ) -> None:
        self.gold, self.max_rules, self.seed = gold, max_rules, seed
        self._rows: dict[str, dict[str, Row]] = defaultdict(dict)

    def fresh(self) -> "RuleProposer":
        """The same proposer, which has seen no row."""
        other = copy.copy(self)
        other._rows = defaultdict(dict)
        return other

    def remember(self, reflective_dataset: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Takes rows in; a row that was seen before is replaced."""
        for name, records in reflective_dataset.items():
            for record in records:
                if row := self.row_of(record):
                    self._rows[name][row.text] = row

    def __call__(
        self,
        candidate: dict[str, str],
        reflective_dataset: Mapping[str, Sequence[Mapping[str, Any]]],
        components_to_update: list[str],
    ) -> dict[str, str]:
        """A new instruction for every component whose rows say anything."""
        self.remember(reflective_dataset)
        proposed = {}
        for name in components_to_update:
            rows = list(self._rows[name].values())
            chance = Random(f"{self.seed} {len(rows)} {candidate[name]} {[row.text for row in rows[-3:]]}")
            if text := self._instruction(candidate[name], rows, chance):
                proposed[name] = text
        return proposed

    def row_of(self, record: Mapping[str, Any]) -> Row | None:
        """What a reflective record shows: its text, its answer and the right one; None where that is not said.

        The feedback is read for the right answer where the record does not hold it as ``RIGHT_ANSWER``.
        """
        inputs, outputs = record["Inputs"], record["Generated Outputs"]
        text = " ".join(str(value) for value in inputs.values()) if isinstance(inputs, Mapping) else str(inputs)
        gold = record.get(RIGHT_ANSWER) or self.gold(str(record.get("Feedback", "")))
        answers = (
            [str(value) for key, value in outputs.items() if key != "reasoning"] if isinstance(outputs, dict) else []
        )
        if gold is None and record.get("Score", 0) >= 1 and len(answers) == 1:
            gold = answers[0]
        return Row(text, gold, gold in answers) if gold and text else None

    def _instruction(self, told: str, rows: Sequence[Row], chance: Random) -> str | None:
        task = told.split(f"\n\n{_HEADER}")[0].split("\n\nAnswer with one of:")[0].rstrip()
        labels = Counter(row.gold for row in rows)
        if len(rows) < 2:
            return None
        if len(labels) > len(rows) / 2:
            hints = form_rules(rows)
            return f"{task}\n\n{_HEADER}\n" + "\n".join(hints) if hints else None
        parts = [task]
        if len(labels) <= _FEW_LABELS and chance.random() < 0.7:
            parts.append(f"Answer with one of: {', '.join(sorted(labels))}.")
        if rules := self._rules(rows, labels, chance):
            parts.append("\n".join([_HEADER, *rules]))
        return "\n\n".join(parts) if len(parts) > 1 else None

    def _rules(self, rows: Sequence[Row], labels: Counter[str], chance: Random) -> list[str]:
        most, threshold = chance.choice((1, 2, 3, 4)), chance.choice((1.0, 1.5, 2.0))
        wrong = Counter(row.gold for row in rows if not row.right)
        words = telling_words(rows, threshold)
        ranked = sorted(
            (label for label in labels if words.get(label)), key=lambda label: (-wrong[label], -labels[label])
        )
        rules = [f"If it mentions {either(words[label][:most])}, answer {label}." for label in ranked[: self.max_rules]]
        if rules and chance.random() < 0.5:
            left = [label for label in labels if label not in ranked] or list(labels)
            rules.append(f"Otherwise answer {max(left, key=lambda label: labels[label])}.")
        return rules


def telling_words(rows: Sequence[Row], threshold: float = 1.96) -> dict[str, list[str]]:
    """For each label the words, and pairs of words, that its rows hold and others do not.

    Args:
        rows: Rows with their right answers.
        threshold: Least z-score of the log-odds ratio.

    Returns:
        Label to words, the most telling first; a word that is part of a more telling one is left out.
    """
    found = [(row.gold, _terms(row.text)) for row in rows]
    everywhere = Counter(term for _, terms in found for term in terms)
    total = sum(everywhere.values())
    by_label: dict[str, Counter[str]] = defaultdict(Counter)
    for gold, terms in found:
        by_label[gold].update(terms)
    telling = {}
    for label, counts in by_label.items():
        inside, outside = sum(counts.values()), total - sum(counts.values())
        scores = {}
        for term, here in counts.items():
            if here >= 2:
                scores[term] = _z_score(here, inside, everywhere[term] - here, outside, everywhere[term], total)
        ranked = sorted((term for term in scores if scores[term] >= threshold), key=lambda term: (-scores[term], term))
        telling[label] = [term for at, term in enumerate(ranked) if not any(_overlap(term, x) for x in ranked[:at])]
    return telling


def _z_score(here: int, inside: int, there: int, outside: int, count: int, total: int) -> float:
    prior = _PRIOR * count
    prior_total = _PRIOR * total
    one = math.log((here + prior) / (inside + prior_total - here - prior))
    two = math.log((there + prior) / (outside + prior_total - there - prior))
    return (one - two) / math.sqrt(1 / (here + prior) + 1 / (there + prior))


def _terms(text: str) -> set[str]:
    words = _WORD.findall(text.lower())
    single = {word for word in words if len(word) > 2 and word not in _STOP}
    pairs = {f"{a} {b}" for a, b in itertools.pairwise(words) if a in single and b in single}
    return single | pairs


def _overlap(term: str, other: str) -> bool:
    return bool(set(term.split()) & set(other.split()))


def either(words: Sequence[str]) -> str:
    """Words as text: ``a, b or c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def form_rules(rows: Sequence[Row]) -> list[str]:
    """How answers that are no labels are written."""
    hints = []
    if sum(row.gold.lower() in row.text.lower() for row in rows) >= 0.7 * len(rows):
        hints.append("Copy the answer from the text, word for word.")
    longest = max(len(row.gold.split()) for row in rows)
    if longest <= 12:
        hints.append(f"The answer has at most {longest} word{'s' if longest > 1 else ''}.")
    for sign, name in (("; ", "a semicolon"), (", ", "a comma")):
        if sum(sign in row.gold for row in rows) >= 0.3 * len(rows):
            hints.append(f"Separate several answers by {name}.")
    return hints
