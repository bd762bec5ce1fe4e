"""From a source to the rows of a task: accepted, without duplicates, split, measured, written."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import dspy
import pydantic
import pydantic_core

from dspy_lora.adapters.base import resolve_base
from dspy_lora.errors import ConfigError, DataError, near
from dspy_lora.prepare import folder as folders
from dspy_lora.prepare import report as reports
from dspy_lora.prepare.accept import Item, Reject, accept, check_columns
from dspy_lora.prepare.duplicates import near_duplicates
from dspy_lora.prepare.sources import SPLITS, Source, Split, on_disk, read
from dspy_lora.prepare.split import Method, are_labels, split
from dspy_lora.training.data import ChatExample, render
from dspy_lora.training.rendering import Renderer, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Where two rows are (nearly) equal, the one to train on goes: a test set stays as it was published.
_RANKS: dict[Split | None, int] = {None: 0, "train": 0, "dev": 1, "test": 2}


class PrepareConfig(pydantic.BaseModel):
    """How rows are prepared.

    Attributes:
        columns: Column of each field that is not called like its column: ``{"text": "body"}``.
        keep: Columns that are written beside the fields.
        dev: Rows to validate on, where the source gives none: a share below 1, or a number; 0 for none.
        test: Rows to test on, likewise.
        by: How rows are drawn: ``"stratified"`` by their answers, ``"random"``, or ``"auto"``: the first where the
            answers are labels.
        group: Column whose value keeps rows in one split (a customer, a document).
        split_column: Column that names each row's split.
        resplit: Split anew what the source gives as splits.
        near: Jaccard similarity of 5-character shingles of the inputs from which on two rows of different splits are
            near-duplicates; None looks for none.
        seed: Decides which rows are drawn.
        base: Base model whose tokens are counted; None counts characters.
        max_length: Tokens that training takes at most in one row.
        delimiter: Between the cells of a CSV file; None is a comma, and a tab in .tsv.
        dataset_name: Configuration of a Hugging Face data set that has several.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    columns: dict[str, str] = {}
    keep: tuple[str, ...] = ()
    dev: float = pydantic.Field(default=0.1, ge=0)
    test: float = pydantic.Field(default=0.1, ge=0)
    by: Literal["auto", "random", "stratified"] = "auto"
    group: str | None = None
    split_column: str | None = None
    resplit: bool = False
    near: float | None = pydantic.Field(default=0.8, gt=0, le=1)
    seed: int = 0
    base: str | None = None
    max_length: int = pydantic.Field(default=1024, gt=1)
    delimiter: str | None = pydantic.Field(default=None, min_length=1, max_length=1)
    dataset_name: str | None = None

    @pydantic.field_validator("dev", "test")
    @classmethod
    def _check_part(cls, part: float) -> float:
        if part > 1 and not part.is_integer():
            raise pydantic_core.PydanticCustomError("part", "Give a share below 1, or a whole number of rows")
        return part


@dataclass(frozen=True)
class Prepared:
    """Rows ready to be trained, validated and tested on.

    Attributes:
        rows: The rows of each split, as JSON; a split that was not asked for is missing.
        rejects: The records that are in no split, with the reason.
        report: Figures; see ``report.py``.
        signature: The task.
        adapter: The DSPy adapter that inference uses.
        demos: The few-shot examples that inference shows.
        source: The file or folder that was read; None where there is none.
    """

    rows: dict[Split, list[Row]]
    rejects: list[Reject]
    report: dict[str, Any]
    signature: type[dspy.Signature]
    adapter: dspy.Adapter
    demos: list[Row]
    source: Path | None = None

    def examples(self, split: Split) -> list[ChatExample]:
        """The rows of a split as chat examples: what inference sends, and the answer it should get."""
        return render(self.signature, self.rows[split], self.adapter, self.demos)

    def table(self) -> str:
        """The report for the console."""
        return reports.table(self.report, self.rejects)

    def write(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Writes train.jsonl, dev.jsonl, test.jsonl, rejects.jsonl and report.json: all of them, or nothing.

        Args:
            folder: A new folder.
            overwrite: Replace a folder that was written this way.

        Returns:
            The folder.

        Raises:
            DataError: The folder exists, holds something else, or is what was read.
            PublishError: The disk refused; nothing was changed.
        """
        path = Path(folder).expanduser().absolute()
        folders.check(path, overwrite, self.source)
        files = {f"{name}.jsonl": folders.lines(rows) for name, rows in self.rows.items()}
        files[folders.REJECTS] = folders.lines(reject.entry() for reject in self.rejects)
        files[folders.REPORT] = folders.written(json.dumps(self.report, indent=2, ensure_ascii=False)) + "\n"
        folders.write(path, files, overwrite)
        return path


def prepare(
    source: str | Path | Iterable[Any],
    task: str | type[dspy.Signature] | dspy.Module,
    config: PrepareConfig | None = None,
    *,
    adapter: dspy.Adapter | None = None,
    demos: Sequence[Row] | None = None,
    predictor: str | None = None,
) -> Prepared:
    """Prepares the rows of a task.

    Each row is rendered by the signature and the adapter that inference will use, and is taken only if DSPy would read
    the same answer back; what is not taken is in ``rejects``.

    Args:
        source: A file, a folder, the name of a Hugging Face data set, or rows (``dspy.Example`` or mappings).
        task: A signature, or a program whose predictor is trained (its signature and demos).
        config: The settings.
        adapter: The adapter inference uses; None is DSPy's default, ``dspy.ChatAdapter()``.
        demos: Few-shot examples that inference shows; None takes the program's.
        predictor: Name of the program's predictor, where it has several.

    Returns:
        The rows of each split, what was set aside, and a report.

    Raises:
        ConfigError: No such base model, or one whose tokenizer cannot be had.
        DataError: No such source or column, or no rows are left for a split.
        MissingDependencyError: The source needs a package that is not installed.
    """
    config = config or PrepareConfig()
    signature, own = _task(task, predictor)
    renderer = Renderer(signature, adapter, own if demos is None else demos)
    meter = reports.Meter(_tokenizer(config.base), config.max_length)
    found = read(source, config.delimiter, config.dataset_name)
    others = [column for column in (config.group, config.split_column) if column]
    check_columns(found, config.columns, list(signature.fields), [*config.keep, *others])
    items, rejects = accept(found, renderer, config.columns, config.keep, config.group, config.split_column)
    _need_rows(items, rejects, found)
    items, equal = _without_equal(items, list(signature.fields), config.resplit)
    parts = _split(items, signature, config)
    nearly = _near(parts, signature, config.near)
    gone = {id(reject.record) for reject in nearly}
    parts = {name: [item for item in part if id(item.record) not in gone] for name, part in parts.items()}
    _need_parts(parts, nearly)
    rows = {name: [item.row for item in part] for name, part in parts.items()}
    counts = {
        "records": len(found.records),
        "malformed": len(rejects),
        "duplicates": len(equal),
        "near_duplicates": len(nearly),
    }
    warnings = found.warnings + _contradictions(items, signature) + _torn_groups(parts, config.group)
    report = _heading(found, renderer, config) | counts | _measure(parts, signature, meter, warnings)
    return Prepared(
        rows, [*rejects, *equal, *nearly], report, signature, renderer.adapter, renderer.demos, on_disk(source)
    )


# -- the task ----------------------------------------------------------------------------------------------------------


def _task(
    task: str | type[dspy.Signature] | dspy.Module, predictor: str | None
) -> tuple[type[dspy.Signature], list[Row]]:
    """Signature and demos of what is trained."""
    if not isinstance(task, dspy.Module):
        return dspy.Signature(task) if isinstance(task, str) else task, []
    named = dict(task.named_predictors())
    if predictor is None and len(named) == 1:
        [chosen] = named.values()
    elif predictor in named:
        chosen = named[predictor]
    else:
        asked = f"no predictor {predictor!r}" if predictor else f"{len(named)} predictors"
        raise DataError(f"the program has {asked}; name one with predictor=. {near(predictor or '', named)}")
    return chosen.signature, list(chosen.demos)


def _outputs(signature: type[dspy.Signature]) -> list[str]:
    """The fields that make the answer; the reasoning is a way to it."""
    return [name for name in signature.output_fields if name != "reasoning"]


def _text(row: Row, names: Iterable[str]) -> str:
    """The values of some fields as one text."""
    values = [row[name] for name in names]
    return "\n".join(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values)


# -- duplicates --------------------------------------------------------------------------------------------------------


def _without_equal(items: list[Item], fields: list[str], resplit: bool) -> tuple[list[Item], list[Reject]]:
    """Leaves one of the rows whose fields are all equal: that of the highest rank, else the first."""
    first: dict[str, Item] = {}
    ranks = [0 if resplit else _RANKS[item.split] for item in items]
    keys = [json.dumps([item.row[name] for name in fields], ensure_ascii=False) for item in items]
    order = sorted(range(len(items)), key=lambda i: -ranks[i])
    kept = {id(first.setdefault(keys[i], items[i])) for i in order}
    rejects = [
        Reject(item.record, "duplicate", f"equal to {first[key].record.place}")
        for item, key in zip(items, keys, strict=True)
        if id(item) not in kept
    ]
    return [item for item in items if id(item) in kept], rejects


def _near(parts: dict[Split, list[Item]], signature: type[dspy.Signature], threshold: float | None) -> list[Reject]:
    """Rows whose inputs nearly equal those of a row of a higher rank."""
    if threshold is None:
        return []
    items = [item for part in parts.values() for item in part]
    texts = [_text(item.row, signature.input_fields) for item in items]
    ranks = [_RANKS[name] for name, part in parts.items() for _ in part]
    names = [name for name, part in parts.items() for _ in part]
    return [
        Reject(
            items[i].record,
            "near-duplicate",
            f"{names[i]} row, nearly equal to the {names[j]} row at {items[j].record.place} (Jaccard {similarity:.2f})",
        )
        for i, (j, similarity) in sorted(near_duplicates(texts, ranks, threshold).items())
    ]


def _contradictions(items: Sequence[Item], signature: type[dspy.Signature]) -> list[str]:
    """A warning about rows with equal inputs and different answers."""
    answers: dict[str, set[str]] = {}
    for item in items:
        answers.setdefault(_text(item.row, signature.input_fields), set()).add(_text(item.row, _outputs(signature)))
    several = sum(len(found) > 1 for found in answers.values())
    return [f"{several:,} input(s) occur with more than one answer"] if several else []


# -- splits ------------------------------------------------------------------------------------------------------------


def _split(items: Sequence[Item], signature: type[dspy.Signature], config: PrepareConfig) -> dict[Split, list[Item]]:
    answers = [_text(item.row, _outputs(signature)) for item in items]
    method: Method = "group" if config.group else "random" if config.by == "auto" else config.by
    if config.by == "auto" and not config.group and are_labels(answers):
        method = "stratified"
    given = [None if config.resplit else item.split for item in items]
    keys = [item.group for item in items] if config.group else answers
    names = split(given, keys, method, config.dev, config.test, config.seed)
    parts = {name: [item for item, one in zip(items, names, strict=True) if one == name] for name in SPLITS}
    return {name: part for name, part in parts.items() if part}


def _torn_groups(parts: dict[Split, list[Item]], column: str | None) -> list[str]:
    """A warning about groups in several splits, which those have that the source gives."""
    splits: dict[str | None, set[Split]] = {}
    for name, part in parts.items():
        for item in part:
            splits.setdefault(item.group, set()).add(name)
    torn = sum(len(found) > 1 for found in splits.values()) if column else 0
    if not torn:
        return []
    return [f"{torn:,} group(s) of {column!r} occur in several of the given splits; --resplit splits anew, by group"]


def _need_rows(items: Sequence[Item], rejects: Sequence[Reject], source: Source) -> None:
    if not items:
        shown = "; ".join(f"{reject.record.place}: {reject.reason}" for reject in rejects[:3])
        raise DataError(f"{source.name}: none of {len(rejects)} records is a row of the task. {shown}")


def _need_parts(parts: dict[Split, list[Item]], nearly: Sequence[Reject]) -> None:
    for name in {"train": [], **parts}:
        if not parts.get(name):
            why = (
                f"{len(nearly)} rows nearly equal a row of another split; a higher `near` keeps more" if nearly else ""
            )
            raise DataError(f"no rows are left for {name}. {why or 'Ask for other shares, or give more rows'}.")


# -- the report --------------------------------------------------------------------------------------------------------


def _heading(source: Source, renderer: Renderer, config: PrepareConfig) -> dict[str, Any]:
    """What was asked for."""
    return {
        "source": source.name,
        "task": {"fields": renderer.signature.signature, "instructions": renderer.signature.instructions},
        "adapter": type(renderer.adapter).__name__,
        "demos": len(renderer.demos),
        "settings": config.model_dump(mode="json"),
    }


def _measure(
    parts: dict[Split, list[Item]], signature: type[dspy.Signature], meter: reports.Meter, warnings: list[str]
) -> dict[str, Any]:
    """Figures of each split, the SHA-256 of its file, and the warnings that they give rise to."""
    labels = {name: [_text(item.row, _outputs(signature)) for item in part] for name, part in parts.items()}
    splits = {}
    for name, part in parts.items():
        most = Counter(labels[name]).most_common(1)[0][1]
        facts = {"rows": len(part), "distinct_answers": len(set(labels[name])), "majority": most / len(part)}
        digest = hashlib.sha256(folders.lines(item.row for item in part).encode()).hexdigest()
        splits[name] = facts | meter.measure(part) | {"sha256": digest}
    return {
        "splits": splits,
        "length_unit": meter.unit,
        "labels": reports.label_counts(labels),
        "warnings": warnings + reports.label_warnings(labels),
    }


def _tokenizer(base: str | None) -> "PreTrainedTokenizerBase | None":
    if base is None:
        return None
    from transformers import AutoTokenizer

    found = resolve_base(base)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(found.path)
    except (OSError, ValueError) as exc:
        raise ConfigError(
            f"base model {base!r}: its tokenizer is not on this disk and cannot be downloaded: {exc} Give the model's "
            f"folder, bring it with `hf download {base}`, or name no base model, and characters are counted."
        ) from exc
    return tokenizer
