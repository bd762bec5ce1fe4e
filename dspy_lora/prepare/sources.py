"""Where rows come from: files, folders, Hugging Face data sets, rows in memory. Each record knows its place."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dspy_lora.adapters.base import HUB_ID
from dspy_lora.errors import DataError, near
from dspy_lora.prepare.files import READERS, missing_package
from dspy_lora.training.data import Row

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")

# What the splits of other people's data sets are called.
_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "dev": "dev",
    "val": "dev",
    "valid": "dev",
    "validation": "dev",
    "test": "test",
    "testing": "test",
}


def split_named(name: str) -> Split | None:
    """The split that a name like ``validation`` means; None where it means none."""
    return _NAMES.get(name.strip().lower())


@dataclass(frozen=True)
class Record:
    """One thing that was read.

    Attributes:
        source: File or data set.
        unit: What ``number`` counts: lines of a file, else rows.
        number: Its place, from 1.
        value: The columns by name; the raw text or value where it is malformed.
        problem: What is wrong with it; None for a row.
        split: The split it was given in; None where the source has none.
    """

    source: str
    unit: Literal["line", "row"]
    number: int
    value: Any
    problem: str | None = None
    split: Split | None = None

    @property
    def place(self) -> str:
        """As a message says it: ``rows.csv, line 12``."""
        return f"{self.source}, {self.unit} {self.number}"


@dataclass
class Source:
    """Everything that a source holds.

    Attributes:
        name: As it was asked for.
        records: In order.
        columns: Names of the columns, of whichever record.
        warnings: What the user should know.
    """

    name: str
    records: list[Record]
    columns: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.records:
            raise DataError(f"{self.name} holds no rows. Give a source with at least one row beside its header.")
        if not self.columns:
            self.columns = list(
                dict.fromkeys(key for record in self.records if not record.problem for key in record.value)
            )


def read(source: str | Path | Iterable[Any], delimiter: str | None = None, name: str | None = None) -> Source:
    """Reads a source.

    Args:
        source: A .csv, .tsv, .jsonl, .ndjson, .json or .parquet file; a folder with one such file a split (train, dev
            or validation, test), or a data set's folder; the name of a Hugging Face data set; or rows in memory
            (mappings or ``dspy.Example``).
        delimiter: Between the cells of a CSV file; None is a comma, and a tab in .tsv.
        name: Configuration of a Hugging Face data set that has several.

    Returns:
        Its records.

    Raises:
        DataError: No such source, a format that is not read, or no rows.
        MissingDependencyError: The source needs a package that is not installed.
    """
    if not isinstance(source, str | Path):
        return _in_memory(source)
    path = Path(source).expanduser()
    if on_disk(source) and path.is_file():
        return Source(str(source), list(_file(path, delimiter)))
    if path.is_dir():
        files = _split_files(path)
        return _files(path, files, delimiter) if files else _data_set(str(source), path, name)
    if path.suffix in READERS or not HUB_ID.fullmatch(str(source)):
        raise DataError(f"there is no file or folder {str(source)!r}. Give a path, or a Hugging Face data set's name.")
    return _data_set(str(source), None, name)


def on_disk(source: Any) -> Path | None:
    """The file or folder that a source is; None for a data set of the hub, and for rows in memory."""
    if not isinstance(source, str | Path):
        return None
    path = Path(source).expanduser()
    try:
        return path.absolute() if path.exists() else None
    except OSError as exc:
        raise DataError(
            f"source {str(source)[:80]!r} cannot be read: {exc.strerror}. Give a path that exists."
        ) from exc


# -- files -------------------------------------------------------------------------------------------------------------


def _file(path: Path, delimiter: str | None, split: Split | None = None) -> Iterator[Record]:
    if path.suffix not in READERS:
        raise DataError(
            f"{path}: {path.suffix or 'a file without a suffix'!r} is not read. {near(path.suffix, READERS)}"
        )
    unit: Literal["line", "row"] = "row" if path.suffix in (".json", ".parquet") else "line"
    try:
        for number, value, problem in READERS[path.suffix](path, delimiter):
            yield Record(path.name, unit, number, value, problem, split)
    except OSError as exc:
        raise DataError(f"{path} cannot be read: {exc.strerror or exc}") from exc


def _split_files(folder: Path) -> dict[Split, Path]:
    """The files of a folder that are named like splits."""
    found: dict[Split, Path] = {}
    for path in sorted(folder.iterdir()):
        split = split_named(path.stem) if path.suffix in READERS else None
        if split and split in found:
            raise DataError(f"{folder}: {found[split].name} and {path.name} are both {split} rows. Keep one of them.")
        if split:
            found[split] = path
    return found


def _files(folder: Path, files: dict[Split, Path], delimiter: str | None) -> Source:
    if "train" not in files:
        raise DataError(f"{folder} has {', '.join(sorted(path.name for path in files.values()))} but no train file.")
    others = sorted(
        {path.name for path in folder.iterdir() if path.suffix in READERS} - {p.name for p in files.values()}
    )
    warnings = [f"{folder}: files that are not read: {', '.join(others)}"] if others else []
    records = [record for split, path in files.items() for record in _file(path, delimiter, split)]
    return Source(str(folder), records, warnings=warnings)


# -- data sets and rows in memory --------------------------------------------------------------------------------------


def _data_set(source: str, folder: Path | None, name: str | None) -> Source:
    """A data set of the hub, or in a folder, through Hugging Face ``datasets``."""
    try:
        import datasets
    except ImportError as exc:
        raise missing_package("datasets", source) from exc
    try:
        if folder and any((folder / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(str(folder))
        else:
            loaded = datasets.load_dataset(str(folder or source), name)
    except Exception as exc:  # whatever the hub, the network or a file's reader raises is the answer
        kind = "folder" if folder else "Hugging Face data set (and no file or folder)"
        raise DataError(f"{kind} {source!r} cannot be read: {str(exc).splitlines()[0]}") from exc
    parts = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"": loaded}
    known = {part: split_named(part) for part in parts}
    used = [part for part in parts if known[part] or len(parts) == 1]
    if not used:
        raise DataError(f"{source} has the splits {', '.join(parts)}; train, validation or test are looked for.")
    left = [f"{part} ({len(parts[part]):,} rows)" for part in parts if part not in used]
    warnings = [f"{source}: splits that are not read: {', '.join(left)}"] if left else []
    records = [record for part in used for record in _rows_of(source, part, parts[part], known[part], len(used) > 1)]
    columns = list(dict.fromkeys(column for part in used for column in parts[part].column_names))
    return Source(source, records, columns, warnings)


def _rows_of(source: str, part: str, rows: Any, split: Split | None, several: bool) -> Iterator[Record]:
    """Records of one split, class numbers turned into their names. A single split is no split."""
    from datasets import ClassLabel

    classes = {name: feature for name, feature in rows.features.items() if isinstance(feature, ClassLabel)}
    for number, row in enumerate(rows, start=1):
        named = {
            name: (None if row[name] in (None, -1) else feature.int2str(row[name])) for name, feature in classes.items()
        }
        yield Record(
            f"{source}:{part}" if part else source, "row", number, row | named, split=split if several else None
        )


def _in_memory(rows: Iterable[Any]) -> Source:
    import dspy

    records = []
    for number, row in enumerate(rows, start=1):
        fits = isinstance(row, Mapping | dspy.Example)
        value: Row | str = {str(key): row[key] for key in row.keys()} if fits else repr(row)  # noqa: SIM118
        records.append(Record("rows", "row", number, value, None if fits else "a mapping or dspy.Example is needed"))
    return Source("rows in memory", records)
