"""The matrix that item response theory starts from: systems x items, a score in each cell, NaN where nobody asked.

A system is whatever was evaluated as one (adapter x instruction x base model); an item is one example of the devset.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dspy_lora.errors import DataError, near

if TYPE_CHECKING:
    import dspy
    from dspy.evaluate.evaluate import EvaluationResult

Array = NDArray[np.float64]

_TITLE_LENGTH = 80  # characters


@dataclass(frozen=True)
class Responses:
    """Scores of systems on items.

    Attributes:
        scores: Shape (systems, items), in [0, 1]; NaN where a system was not asked an item.
        systems: Their names, each once.
        items: Ids of the items, each once.
        titles: A line about each item for tables.

    Raises:
        DataError: Shapes, names or scores are not as said here, or a system or an item has no score at all.
    """

    scores: Array
    systems: tuple[str, ...]
    items: tuple[str, ...]
    titles: tuple[str, ...]

    def __post_init__(self) -> None:
        shape = (len(self.systems), len(self.items))
        if self.scores.shape != shape or len(self.titles) != len(self.items) or not self.scores.size:
            raise DataError(
                f"scores of shape {self.scores.shape} for {shape[0]} systems, {shape[1]} items and {len(self.titles)} "
                "titles. Give one row a system, one column and one title an item, and at least one of each."
            )
        for kind, names in (("system", self.systems), ("item", self.items)):
            twice = [name for name, times in Counter(names).items() if times > 1]
            if twice:
                raise DataError(f"the {kind} {twice[0]!r} is named more than once. Give each {kind} its own name.")
        _check_range(self.scores, self.systems, self.items)
        for kind, names, axis in (("system", self.systems, 1), ("item", self.items, 0)):
            empty = np.flatnonzero(np.isnan(self.scores).all(axis))
            if len(empty):
                raise DataError(f"the {kind} {names[empty[0]]!r} has no score. Leave it out, or evaluate it.")

    @classmethod
    def from_matrix(
        cls, scores: Any, systems: tuple[str, ...] | None = None, items: tuple[str, ...] | None = None
    ) -> "Responses":
        """Takes a matrix as it is.

        Args:
            scores: Anything NumPy reads as shape (systems, items): booleans or numbers in [0, 1]; NaN or None where a
                system was not asked.
            systems: Names; None numbers them.
            items: Ids; None numbers them.
        """
        try:
            matrix = np.array(scores, dtype=np.float64)
        except (TypeError, ValueError) as exc:
            raise DataError(f"the scores are not a matrix of numbers: {exc}. Give one row a system.") from exc
        if matrix.ndim != 2:
            raise DataError(f"the scores have shape {matrix.shape}. Give a matrix, one row a system.")
        items = items or tuple(f"item-{j}" for j in range(matrix.shape[1]))
        return cls(matrix, systems or tuple(f"system-{i}" for i in range(matrix.shape[0])), items, items)

    @classmethod
    def from_evaluations(
        cls, results: Mapping[str, "EvaluationResult"], *, item_field: str | None = None
    ) -> "Responses":
        """Takes what ``dspy.Evaluate`` returned, one result a system.

        Systems may have been evaluated on different rows, in any order: what one was not asked is NaN. An example on
        which the program raised carries Evaluate's ``failure_score``.

        Args:
            results: Result by the system's name.
            item_field: Field of the examples that holds an item's id; None makes the id from the content of the
                example, so that equal examples of two devsets are one item (within one devset the second is
                ``"<id>#2"``).

        Raises:
            DataError: No results, a score that is no number in [0, 1], an example without ``item_field``, or one whose
                content makes no id.
        """
        cells: dict[str, dict[str, float]] = {}
        titles: dict[str, str] = {}
        plain, numbered = set[str](), set[str]()
        for system, result in results.items():
            row = cells.setdefault(system, {})
            seen: Counter[str] = Counter()
            for example, _, score in result.results:
                item = _item_id(example, item_field)
                plain.add(item)
                seen[item] += 1
                if seen[item] > 1:
                    item = f"{item}#{seen[item]}"
                    numbered.add(item)
                row[item] = _number(score, system, item)
                titles.setdefault(item, _title(example))
        if both := sorted(plain & numbered):
            raise DataError(
                f"the id {both[0]!r} is that of an example, and made for a second one with the id before its '#'. Give "
                f"each example its own value of {item_field!r} (item_field)."
            )
        scores = np.array([[row.get(item, np.nan) for item in titles] for row in cells.values()], dtype=np.float64)
        return cls(scores.reshape(len(cells), len(titles)), tuple(cells), tuple(titles), tuple(titles.values()))

    @property
    def graded(self) -> bool:
        """Whether any score is other than 0 and 1."""
        known = self.scores[~np.isnan(self.scores)]
        return bool(((known != 0) & (known != 1)).any())

    def system(self, name: str) -> int:
        """The row of a system.

        Raises:
            DataError: No such system.
        """
        return position(name, self.systems, "system")

    def select(self, systems: "list[str] | tuple[str, ...]") -> "Responses":
        """Those systems alone, with the items that one of them was asked."""
        scores = self.scores[[self.system(name) for name in systems]]
        kept = np.flatnonzero(~np.isnan(scores).all(0))
        items, titles = (tuple(names[j] for j in kept) for names in (self.items, self.titles))
        return Responses(scores[:, kept], tuple(systems), items, titles)


def position(name: str, names: tuple[str, ...], kind: str) -> int:
    """Where a name stands among names.

    Raises:
        DataError: It does not; the message names the near ones.
    """
    if name not in names:
        raise DataError(f"no {kind} {name!r}. {near(name, names[:1000])}")
    return names.index(name)


def _check_range(scores: Array, systems: tuple[str, ...], items: tuple[str, ...]) -> None:
    outside = np.argwhere((scores < 0) | (scores > 1))
    if len(outside):
        i, j = outside[0]
        raise DataError(
            f"system {systems[i]!r} has the score {scores[i, j]:g} on item {items[j]!r}; allowed is 0 to 1. "
            "Let the metric return a share of one, or divide by its largest score."
        )


def _item_id(example: "dspy.Example", field: str | None) -> str:
    if field is None:
        try:
            content = json.dumps(example.toDict(), sort_keys=True, ensure_ascii=False, default=repr)
        except (TypeError, ValueError) as exc:  # keys of several types, or a value inside itself
            raise DataError(
                f"an example's content makes no id: {exc}. Name a field that holds its id with item_field."
            ) from exc
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    if field not in example:
        known = sorted(map(str, example.keys()))
        raise DataError(f"an example has no field {field!r} (item_field). {near(field, known)}")
    return str(example[field])


def _title(example: "dspy.Example") -> str:
    """The example's text fields on one line."""
    text = " ".join(" | ".join(str(value) for value in example.toDict().values()).split())
    return text if len(text) <= _TITLE_LENGTH else text[: _TITLE_LENGTH - 1] + "…"


def _number(score: Any, system: str, item: str) -> float:
    """A metric's result as a number: a bool, a number or a ``dspy.Prediction`` with a score; None is missing."""
    if score is None:
        return float("nan")
    try:
        return float(score)
    except (TypeError, ValueError) as exc:
        raise DataError(
            f"system {system!r} has the score {score!r} on item {item!r}; allowed are booleans, numbers from 0 to 1 "
            "and predictions with a score. Let the metric return one of them."
        ) from exc
