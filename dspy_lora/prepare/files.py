"""The formats of files: CSV, JSON lines, JSON, Parquet. A malformed row costs no other row."""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dspy_lora.errors import DataError, MissingDependencyError
from dspy_lora.training.data import parse_line

# What a file holds: a number (of the line, else of the row), a value, and what is wrong with it.
Entry = tuple[int, Any, str | None]


def _text(path: Path) -> str:
    """The file's text. Bytes that are not UTF-8 become lone surrogates, so that only their own rows are malformed."""
    return path.read_text(encoding="utf-8-sig", errors="surrogateescape")


def _not_utf8(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        return f"not UTF-8 at character {exc.start + 1}"
    return None


def _jsonl(path: Path, _delimiter: str | None) -> Iterator[Entry]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            row, problem = parse_line(line)
            problem = _not_utf8(line) or problem
            yield number, line if problem else row, problem


def _json(path: Path, _delimiter: str | None) -> Iterator[Entry]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as exc:
        raise DataError(f"{path} is not UTF-8 text: {exc}") from exc
    except json.JSONDecodeError as exc:
        hint = " One object a line is JSON lines: name the file .jsonl." if exc.msg == "Extra data" else ""
        raise DataError(f"{path} is not JSON: {exc.msg} at line {exc.lineno}, column {exc.colno}.{hint}") from exc
    except (ValueError, RecursionError) as exc:
        raise DataError(f"{path} cannot be read: {exc}. Leave out the numbers or lists that long or deep.") from exc
    if isinstance(value, dict) and len(value) == 1:  # {"data": [...]}
        [value] = value.values()
    if not isinstance(value, list):
        raise DataError(f"{path}: a list of objects is needed, not {json.dumps(value)[:60]}.")
    for number, item in enumerate(value, start=1):
        yield number, item, None if isinstance(item, dict) else "a JSON object is needed"


def _csv(path: Path, delimiter: str | None) -> Iterator[Entry]:
    lines = list(io.StringIO(_text(path), newline=""))
    entries = _records(lines, delimiter or ("\t" if path.suffix == ".tsv" else ","))
    header: list[str] = []
    for number, raw, cells, problem in entries:
        problem = problem or _not_utf8(raw)
        if not header:
            if problem or len(set(cells)) < len(cells):
                raise DataError(f"{path}: the header {raw!r} cannot be used: {problem or 'a name occurs twice'}.")
            header = cells
        elif not problem and len(cells) != len(header):
            yield number, raw, f"{len(cells)} cells, where the header has {len(header)}"
        else:
            yield number, raw if problem else dict(zip(header, cells, strict=True)), problem


def _records(lines: Sequence[str], delimiter: str) -> Iterator[tuple[int, str, list[str], str | None]]:
    """Number of the first line, raw text, cells, and what is wrong, of each record that is not blank.

    A malformed record ends with the line that shows it to be one, so that no row is made of its inside. Only where a
    quote is never closed, and the record would be the rest of the file, its first line is given up alone.
    """
    limit = csv.field_size_limit(sys.maxsize)  # documents pass the default of 131,072 characters
    try:
        start, reader = 0, csv.reader(lines, delimiter=delimiter, strict=True)
        while True:
            first = start + reader.line_num
            cells, problem = list[str](), None
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as exc:
                last = start + reader.line_num
                unclosed = str(exc) == "unexpected end of data"
                problem = "a quote is never closed" if unclosed else f"not CSV: {exc} (lines {first + 1} to {last})"
                start = first + 1 if unclosed else last
                rest = map(lines.__getitem__, range(start, len(lines)))
                reader = csv.reader(rest, delimiter=delimiter, strict=True)
            if cells or problem:
                yield first + 1, "".join(lines[first : start + reader.line_num]).rstrip("\r\n"), cells, problem
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path, _delimiter: str | None) -> Iterator[Entry]:
    try:
        import pyarrow.parquet
    except ImportError as exc:
        raise missing_package("pyarrow", str(path)) from exc
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as exc:
        raise DataError(f"{path} is not a Parquet file: {str(exc).splitlines()[0]}") from exc
    for number, row in enumerate(rows, start=1):
        yield number, row, None


READERS: dict[str, Callable[[Path, str | None], Iterator[Entry]]] = {
    ".csv": _csv,
    ".tsv": _csv,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
}


def missing_package(package: str, source: str) -> MissingDependencyError:
    """The error for a source whose package is not installed."""
    return MissingDependencyError(
        f"{source} is read with {package!r}, which is not installed. Run: pip install 'dspy-lora[train]'"
    )
