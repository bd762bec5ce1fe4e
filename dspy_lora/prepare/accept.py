"""Which records are rows of the task, and why the others are not."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dspy_lora.errors import DataError, near
from dspy_lora.prepare.sources import SPLITS, Record, Source, Split, split_named
from dspy_lora.training.rendering import Message, Renderer, Row

Kind = Literal["malformed", "duplicate", "near-duplicate"]


@dataclass(frozen=True)
class Item:
    """A row of the task.

    Attributes:
        record: Where it comes from.
        row: The signature's fields, as JSON, and the columns that are kept beside them.
        prompt: The messages that the engine would get for it.
        answer: The answer in the adapter's format.
        group: The value that keeps rows together in one split; None where there are no groups.
        split: The split it was given in.
    """

    record: Record
    row: Row
    prompt: list[Message]
    answer: str
    group: str | None
    split: Split | None


@dataclass(frozen=True)
class Reject:
    """A record that is in no split.

    Attributes:
        kind: Malformed, or a duplicate of another row.
        reason: Why, in words.
    """

    record: Record
    kind: Kind
    reason: str

    def entry(self) -> dict[str, Any]:
        """Its line in ``rejects.jsonl``."""
        record = self.record
        place = {"source": record.source, record.unit: record.number}
        return place | {"kind": self.kind, "reason": self.reason, "value": _plain(record.value)}


def check_columns(source: Source, columns: Mapping[str, str], fields: Sequence[str], others: Iterable[str]) -> None:
    """Checks the names before any row is looked at.

    Args:
        source: What was read.
        columns: Column of each field that is not called like its column.
        fields: The signature's fields.
        others: Columns that are used beside the fields.

    Raises:
        DataError: A field or column that does not exist.
    """
    for name in columns:
        if name not in fields:
            raise DataError(f"columns: {name!r} is no field of the signature. {near(name, fields)}")
    if not source.columns:
        return  # every record is malformed, and will be shown
    for name in fields:
        column = columns.get(name, name)
        if column not in source.columns:
            raise DataError(
                f"{source.name} has no column {column!r}{_for(name, column)}. {near(column, source.columns)} "
                f"Say which column it is: --columns {name}=COLUMN, or columns={{{name!r}: COLUMN}}.{_reasoning(name)}"
            )
    for column in others:
        if column not in source.columns:
            raise DataError(f"{source.name} has no column {column!r}. {near(column, source.columns)}")


def _for(name: str, column: str) -> str:
    return "" if name == column else f" for the field {name!r}"


def _reasoning(name: str) -> str:
    if name != "reasoning":
        return ""
    return " A program that reasons is trained on reasoning: collect it (dspy.BootstrapFinetune does), or use Predict."


def accept(
    source: Source,
    renderer: Renderer,
    columns: Mapping[str, str],
    keep: Sequence[str] = (),
    group: str | None = None,
    split_column: str | None = None,
) -> tuple[list[Item], list[Reject]]:
    """Renders every record; those that cannot be rendered are rejected with the reason.

    Args:
        source: What was read.
        renderer: The task, as inference sends it.
        columns: Column of each field that is not called like its column.
        keep: Columns that are kept beside the fields.
        group: Column whose value keeps rows together.
        split_column: Column that names the split.

    Returns:
        The rows and the rejected records, each in order.
    """
    items, rejects = [], []
    for record in source.records:
        try:
            items.append(_item(record, renderer, columns, keep, group, split_column))
        except DataError as exc:
            rejects.append(Reject(record, "malformed", str(exc)))
    return items, rejects


def _item(
    record: Record,
    renderer: Renderer,
    columns: Mapping[str, str],
    keep: Sequence[str],
    group: str | None,
    split_column: str | None,
) -> Item:
    if record.problem:
        raise DataError(record.problem)
    fields = {name: columns.get(name, name) for name in renderer.signature.fields}
    found = {name: _value(record.value[column]) for name, column in fields.items() if column in record.value}
    exchange = renderer.exchange(found)
    kept = {column: _plain(record.value.get(column)) for column in keep if column not in fields}
    return Item(
        record=record,
        row=exchange.inputs | exchange.outputs | kept,
        prompt=exchange.prompt,
        answer=exchange.answer,
        group=_filled(record, group) if group else None,
        split=_named(record, split_column) if split_column else record.split,
    )


def _value(value: Any) -> Any:
    """None for a float that is not a number: a missing cell, as pandas and Parquet write it."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _plain(value: Any) -> Any:
    """A value as JSON, with null for a number that JSON lacks."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)


def _filled(record: Record, column: str) -> str:
    value = _value(record.value.get(column))
    if value is None or not str(value).strip():
        raise DataError(f"{column!r} is empty")
    return str(value)


def _named(record: Record, column: str) -> Split:
    name = _filled(record, column)
    split = split_named(name)
    if split is None:
        raise DataError(f"{column!r} = {name!r} names no split. {near(name, SPLITS)}")
    return split
