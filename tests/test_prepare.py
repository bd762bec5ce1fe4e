"""Raw data becomes rows: nothing is lost without a reason, splits do not leak, a folder is whole or absent."""

import argparse
import contextlib
import csv
import functools
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import dspy
import hypothesis
import pytest
from hypothesis import strategies as st

from dspy_lora.adapters import disk
from dspy_lora.adapters.base import SEEDLING_FOLDER
from dspy_lora.config import load_config
from dspy_lora.errors import ConfigError, DataError, PublishError
from dspy_lora.prepare import PrepareConfig, command, duplicates, files, prepare, sources
from dspy_lora.prepare.split import are_labels, split
from dspy_lora.training import command as training
from dspy_lora.training.data import read_rows, sha256, tokenize

TASK = dspy.Signature("text -> label", "Sort the ticket.")
NOUNS = "router disk printer laptop screen server cable badge phone switch mouse camera modem tablet keyboard".split()
VERBS = "fails blinks stalls smokes hums reboots overheats freezes flickers beeps".split()
ALL = PrepareConfig(dev=0, test=0, near=None)


def make_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Tickets of two teams that differ from each other in most words."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        text = f"{rng.choice(NOUNS)} {rng.randrange(10**9)} {rng.choice(VERBS)} in {rng.randrange(10**9)}"
        rows.append({"text": text, "label": ("network", "storage")[i % 2], "customer": f"c{i % 7}", "id": i})
    return rows


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def everything(prepared: Any) -> list[dict[str, Any]]:
    return [row for part in prepared.rows.values() for row in part]


def reasons(prepared: Any) -> dict[str, str]:
    return {reject.record.place: reject.reason for reject in prepared.rejects}


# -- sources -----------------------------------------------------------------------------------------------------------

ROWS = [{"text": row["text"] + ', "é"\nnext line', "label": row["label"]} for row in make_rows(6)]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "wrapped", "parquet", "examples", "mappings", "disk"])
def test_every_source_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(ROWS)
    source: Any = tmp_path / f"rows.{kind}"
    match kind:
        case "csv":
            write_csv(source, ROWS)
        case "tsv":
            write_csv(source, ROWS, "\t")
        case "jsonl":
            write_jsonl(source, ROWS)
        case "json":
            source.write_text(json.dumps(ROWS))
        case "wrapped":
            source = tmp_path / "rows.json"
            source.write_text(json.dumps({"data": ROWS}))
        case "parquet":
            pyarrow.parquet.write_table(table, source)
        case "examples":
            source = [dspy.Example(**row).with_inputs("text") for row in ROWS]
        case "mappings":
            source = iter(ROWS)
        case "disk":
            datasets.disable_progress_bars()
            datasets.Dataset(table).save_to_disk(str(source))
    assert everything(prepare(source, TASK, ALL)) == ROWS


def test_a_data_set_folder_has_its_splits_and_the_names_of_its_classes(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features(
        {"body": datasets.Value("string"), "label": datasets.ClassLabel(names=["network", "storage"])}
    )
    parts = {"train": [0, 1, -1], "validation": [1], "unsupervised": [-1]}
    made = {
        name: datasets.Dataset.from_dict(
            {"body": [f"{name} {i}" for i in range(len(labels))], "label": labels}, features=features
        )
        for name, labels in parts.items()
    }
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "set"))
    config = PrepareConfig(columns={"text": "body"}, test=0, near=None)
    prepared = prepare(tmp_path / "set", TASK, config)
    assert prepared.rows == {
        "train": [{"text": "train 0", "label": "network"}, {"text": "train 1", "label": "storage"}],
        "dev": [{"text": "validation 0", "label": "storage"}],
    }
    assert list(reasons(prepared).values()) == ["'label' is empty; the signature 'text -> label' needs every field"]
    assert prepared.report["warnings"] == [f"{tmp_path / 'set'}: splits that are not read: unsupervised (1 rows)"]


def test_a_folder_of_other_files_is_read_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "tickets.jsonl", ROWS)
    assert everything(prepare(folder, TASK, ALL)) == ROWS


def test_a_folder_of_split_files_is_split_as_given(tmp_path: Path) -> None:
    rows = make_rows(6)
    write_csv(tmp_path / "train.csv", rows[:3])
    write_jsonl(tmp_path / "valid.jsonl", rows[3:4])
    write_jsonl(tmp_path / "test.jsonl", rows[4:])
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "more.csv").write_text("text,label")
    prepared = prepare(tmp_path, TASK)
    assert prepared.report["warnings"] == [f"{tmp_path}: files that are not read: more.csv"]
    assert {name: len(part) for name, part in prepared.rows.items()} == {"train": 3, "dev": 1, "test": 2}
    write_jsonl(tmp_path / "dev.jsonl", rows[:1])
    with pytest.raises(DataError, match=r"dev.jsonl and valid.jsonl are both dev rows"):
        prepare(tmp_path, TASK)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", "", "holds no rows"),
        ("rows.csv", "text,label\n", "holds no rows"),
        ("rows.jsonl", "\n \n", "holds no rows"),
        ("rows.json", "[]", "holds no rows"),
        ("rows.txt", "a", r"'.txt' is not read\. Known: .csv, .json, .jsonl, .ndjson, .parquet, .tsv"),
        ("rows.jsn", "a", r"'.jsn' is not read\. Did you mean '.json'"),
        ("rows", "a", "'a file without a suffix' is not read"),
        ("rows.json", '{"a": 1}\n{"a": 2}', r"not JSON: Extra data at line 2, column 1\. One object a line"),
        ("rows.json", '"text"', "a list of objects is needed"),
        ("rows.csv", "text,label,text\na,b,c\n", "the header 'text,label,text' cannot be used: a name occurs"),
        ("rows.csv", 'text,"label\na,b\n', "cannot be used: a quote is never closed"),
        ("rows.parquet", "PAR", "is not a Parquet file"),
        ("rows.csv", None, "there is no file or folder"),
        ("no/such/folder", None, "there is no file or folder"),
        ("a" * 5000, None, "cannot be read: File name too long"),
        ("rows.json", "[" * 100_000, "rows.json cannot be read: maximum recursion"),
        ("rows.json", "1" * 5000, "rows.json cannot be read: Exceeds the limit"),
        ("rows.jsonl", "nonsense\n[1]\n", "none of 2 records is a row .* rows.jsonl, line 1: not JSON"),
    ],
)
def test_sources_that_cannot_be_read(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        prepare(path, TASK)


def test_a_data_set_that_is_nowhere_is_named() -> None:
    with pytest.raises(DataError, match=r"data set \(and no file or folder\) 'nobody/nothing' cannot be read"):
        prepare("nobody/nothing", TASK)


def test_malformed_lines_are_set_aside_with_their_numbers_and_cost_no_other_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    lines = [
        b"text,label",
        b'"two\nlines",network',  # lines 2 and 3
        b"only one cell",  # 4
        b'"begins well',  # 5
        b'and "goes" wrong",storage',  # 6: alone it would look like a row
        b"\xff,storage",  # 7
        b'"never closed,storage',  # 8
        b"disk full,storage",  # 9
        b" ,storage",  # 10
    ]
    path.write_bytes(b"\n".join(lines))
    prepared = prepare(path, TASK, ALL)
    assert [row["text"] for row in everything(prepared)] == ["two\nlines", "disk full"]
    assert reasons(prepared) == {
        "rows.csv, line 4": "1 cells, where the header has 2",
        "rows.csv, line 5": "not CSV: ',' expected after '\"' (lines 5 to 6)",
        "rows.csv, line 7": "not UTF-8 at character 1",
        "rows.csv, line 8": "a quote is never closed",
        "rows.csv, line 10": "'text' is empty; the signature 'text -> label' needs every field",
    }
    shown = prepared.table()
    assert "7 records read: 5 malformed" in shown
    assert "rows.csv, line 4: 1 cells" in shown
    out = prepared.write(tmp_path / "out")
    entries = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in entries] == [4, 5, 7, 8, 10]
    assert [entry["value"] for entry in entries[1:3]] == ['"begins well\nand "goes" wrong",storage', "\udcff,storage"]


def test_values_that_no_file_or_tokenizer_takes_cost_no_other_row(tmp_path: Path) -> None:
    rows = [{"text": "a", "size": 1}, {"text": "\ud800", "size": 2}, {"text": "c", "size": float("inf")}]
    rows += [{"text": "d", "size": "Infinity"}, {"text": b"\xff", "size": 3}, {"text": "f", "size": 4}]
    rows.append({"text": functools.reduce(lambda inner, _: [inner], range(600), 1), "size": 5})
    task = dspy.Signature("text -> size: float")
    out = prepare(rows, task, ALL).write(tmp_path / "out")
    assert read_rows(out / "train.jsonl", list(task.fields)) == [{"text": "a", "size": 1}, {"text": "f", "size": 4}]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a", "label": "x\ud800"}, {"text": "b", "label": "x"}])
    prepared = prepare(path, TASK, ALL.model_copy(update={"base": "seedling"}))
    assert "surrogates not allowed" in reasons(prepared)["rows.jsonl, line 1"]
    assert len(read_rows(prepared.write(tmp_path / "too") / "train.jsonl")) == 1


def test_missing_cells_are_null_in_what_is_written(tmp_path: Path) -> None:
    def fail(constant: str) -> None:
        raise AssertionError(constant)

    nan = float("nan")
    rows = [{"text": "a", "label": "x", "n": nan, "deep": [{"a": nan}]}, {"text": "b", "label": nan, "n": 1, "deep": 2}]
    out = prepare(rows, TASK, ALL.model_copy(update={"keep": ("n", "deep")})).write(tmp_path / "out")
    assert read_rows(out / "train.jsonl") == [{"text": "a", "label": "x", "n": None, "deep": [{"a": None}]}]
    for name in ("train.jsonl", "rejects.jsonl"):
        json.loads((out / name).read_text(), parse_constant=fail)


def test_malformed_records_of_a_csv_copy_no_lines() -> None:
    copied = []

    class Lines(list[str]):
        def __getitem__(self, at: Any) -> Any:
            copied.append(len(range(len(self))[at]) if isinstance(at, slice) else 1)
            return super().__getitem__(at)

    lines = Lines(['"a"b,c\n'] * 300)
    assert len(list(files._records(lines, ","))) == 300
    assert sum(copied) < 3 * len(lines)


def test_a_document_longer_than_csvs_limit_is_read(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    path = write_csv(tmp_path / "rows.csv", [{"text": "x" * (limit + 1), "label": "long"}])
    assert len(everything(prepare(path, TASK, ALL))[0]["text"]) == limit + 1
    assert csv.field_size_limit() == limit


@hypothesis.given(st.lists(st.text(st.sampled_from('ab,"\n\r\u2028é \x00'), max_size=12), min_size=1, max_size=12))
@hypothesis.settings(max_examples=60)
def test_every_line_of_a_csv_is_accounted_for(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    path = tmp_path_factory.mktemp("csv") / "rows.csv"
    path.write_bytes(("text,label\n" + "\n".join(lines)).encode())
    with contextlib.suppress(DataError):  # no rows, or none that is a row of the task
        source = sources.read(path)
        prepared = prepare(path, TASK, ALL)
        assert len(everything(prepared)) + len(prepared.rejects) == len(source.records)
    text = "".join(lines)
    if text.strip("\n\r\x00") and not set(text) & set('"\n\r'):
        assert len(sources.read(path).records) == sum(line != "" for line in lines)


# -- columns and values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"columns": {"text": "boddy"}}, r"no column 'boddy' for the field 'text'\. Did you mean 'body'\?"),
        ({}, r"no column 'text'\. Known: body, customer, label\. Say which column it is: --columns text=COLUMN"),
        ({"columns": {"txt": "body"}}, r"columns: 'txt' is no field of the signature\. Did you mean 'text'\?"),
        ({"columns": {"text": "body"}, "group": "custmer"}, r"no column 'custmer'\. Did you mean 'customer'\?"),
        ({"columns": {"text": "body"}, "keep": ["nr"]}, "no column 'nr'"),
    ],
)
def test_unknown_columns_are_errors_that_name_the_near_ones(config: dict[str, Any], message: str) -> None:
    rows = [{"body": row["text"], "label": row["label"], "customer": row["customer"]} for row in make_rows(4)]
    with pytest.raises(DataError, match=message):
        prepare(rows, TASK, PrepareConfig(**config))


def test_columns_are_mapped_and_others_are_kept_if_asked() -> None:
    rows = [{"body": "disk full", "label": "storage", "id": 3, "other": 1}]
    config = ALL.model_copy(update={"columns": {"text": "body"}, "keep": ("id",)})
    assert everything(prepare(rows, TASK, config)) == [{"text": "disk full", "label": "storage", "id": 3}]


class Typed(dspy.Signature):
    """Sort the ticket."""

    tags: list[str] = dspy.InputField()
    urgent: bool = dspy.OutputField()
    team: Literal["network", "storage"] = dspy.OutputField()


def test_cells_are_read_as_their_fields_types_and_others_are_set_aside(tmp_path: Path) -> None:
    rows = [
        {"tags": '["nas", "prod"]', "urgent": "true", "team": " storage"},
        {"tags": "[]", "urgent": "perhaps", "team": "storage"},
        {"tags": "[]", "urgent": "no", "team": "netwrok"},
        {"tags": "[]", "urgent": float("nan"), "team": "network"},
    ]
    prepared = prepare(rows, Typed, ALL)
    assert everything(prepared) == [{"tags": ["nas", "prod"], "urgent": True, "team": "storage"}]
    why = list(reasons(prepared).values())
    assert why[0].startswith("'urgent' = 'perhaps' does not fit bool")
    assert why[1].startswith("'team' = 'netwrok' does not fit Literal['network', 'storage']: Input should be 'network'")
    assert why[2].startswith("'urgent' is empty")
    out = prepared.write(tmp_path / "out")
    assert read_rows(out / "train.jsonl", list(Typed.fields)) == everything(prepared)


# -- programs ----------------------------------------------------------------------------------------------------------


class Two(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sort = dspy.Predict(TASK)
        self.explain = dspy.ChainOfThought("text, label -> reply")


def test_a_program_brings_its_signature_and_its_demos() -> None:
    program = dspy.ChainOfThought(TASK)
    demo = dspy.Example(text="router down", reasoning="It routes.", label="network")
    program.predict.demos = [demo]
    rows = [dspy.Example(text="disk full", reasoning="It stores.", label="storage")]
    prepared = prepare(rows, program, ALL, adapter=dspy.JSONAdapter())
    [example] = prepared.examples("train")
    assert [message["role"] for message in example["prompt"]] == ["system", "user", "assistant", "user"]
    assert json.loads(example["completion"][0]["content"]) == {"reasoning": "It stores.", "label": "storage"}
    assert (prepared.report["demos"], prepared.report["adapter"]) == (1, "JSONAdapter")
    assert len(prepare(rows, program, ALL, demos=[]).examples("train")[0]["prompt"]) == 2


def test_a_program_of_several_predictors_is_asked_which() -> None:
    rows = [{"text": "disk full", "label": "storage", "reply": "ok"}]
    with pytest.raises(DataError, match=r"the program has 2 predictors; name one .* Known: explain.predict, sort"):
        prepare(rows, Two(), ALL)
    with pytest.raises(DataError, match=r"no predictor 'srt'; name one .* Did you mean 'sort'"):
        prepare(rows, Two(), ALL, predictor="srt")
    assert everything(prepare(rows, Two(), ALL, predictor="sort")) == [{"text": "disk full", "label": "storage"}]
    with pytest.raises(DataError, match=r"no column 'reasoning'.* A program that reasons is trained on reasoning"):
        prepare(rows, Two(), ALL, predictor="explain.predict")


# -- splits ------------------------------------------------------------------------------------------------------------

GIVEN = st.sampled_from([None, None, None, "train", "dev", "test"])


@hypothesis.given(
    st.lists(st.tuples(GIVEN, st.sampled_from("abcde")), min_size=4, max_size=200),
    st.sampled_from(["random", "stratified"]),
    st.sampled_from([0, 0.1, 0.25, 1]),
    st.sampled_from([0, 0.1, 0.3, 2]),
    st.integers(0, 3),
)
def test_a_split_keeps_what_was_given_and_cuts_out_what_was_asked(
    rows: list[Any], method: Any, dev: float, test: float, seed: int
) -> None:
    given, keys = [one for one, _ in rows], [key for _, key in rows]
    pool = [i for i, one in enumerate(given) if one in (None, "train")]
    wanted = {name: part for name, part in (("dev", dev), ("test", test)) if part and name not in given}
    sizes = {name: round(part * len(pool)) if part < 1 else int(part) for name, part in wanted.items()}
    spare = len(pool) if method == "random" else len(pool) - len({keys[i] for i in pool})
    if sum(sizes.values()) >= len(pool) or 0 in sizes.values() or sum(sizes.values()) > spare:
        with contextlib.suppress(DataError):  # labels can be too few for both, and enough for one and a bit
            split(given, keys, method, dev, test, seed)
            assert method == "stratified"
        return
    result = split(given, keys, method, dev, test, seed)
    assert result == split(given, keys, method, dev, test, seed)
    assert all(now == one for now, one in zip(result, given, strict=True) if one in ("dev", "test"))
    assert all(result.count(name) == size for name, size in sizes.items())  # type: ignore[arg-type]
    if method == "stratified":
        assert {keys[i] for i in pool} == {keys[i] for i in pool if result[i] == "train"}


@hypothesis.given(st.lists(st.integers(5, 60), min_size=1, max_size=6), st.integers(0, 5))
def test_stratified_splits_have_each_labels_share(sizes: list[int], seed: int) -> None:
    keys = [label for label, size in enumerate(sizes) for _ in range(size)]
    result = split([None] * len(keys), keys, "stratified", 0.2, 0, seed)
    spare = [size - 1 for size in sizes]  # one row of each label is always trained on
    held = Counter(key for key, name in zip(keys, result, strict=True) if name == "dev")
    assert held.total() == min(round(0.2 * len(keys)), sum(spare))
    for label, size in enumerate(spare):
        assert abs(held[label] - held.total() * size / sum(spare)) < 1


@hypothesis.given(st.lists(st.integers(0, 12), min_size=40, max_size=120), st.integers(0, 3))
def test_groups_stay_together(groups: list[int], seed: int) -> None:
    try:
        result = split([None] * len(groups), groups, "group", 0.2, 0.3, seed)
    except DataError as exc:
        assert "no group fits into" in str(exc)
        return
    where: dict[int, set[str]] = {}
    for group, name in zip(groups, result, strict=True):
        where.setdefault(group, set()).add(name)
    assert all(len(names) == 1 for names in where.values())
    assert result.count("dev") <= round(0.2 * len(groups))
    assert result.count("test") <= round(0.3 * len(groups))
    assert "train" in result


def test_prepare_splits_by_group_by_column_and_by_label() -> None:
    rows = make_rows(70)
    grouped = prepare(rows, TASK, PrepareConfig(group="customer", keep=("customer",), dev=0.2, test=0.2))
    customers = {name: {row["customer"] for row in part} for name, part in grouped.rows.items()}
    assert customers["dev"] and customers["test"]
    assert customers["train"].isdisjoint(customers["dev"] | customers["test"])
    assert customers["dev"].isdisjoint(customers["test"])

    given = [row | {"part": "test" if i < 3 else "train"} for i, row in enumerate(rows)]
    config = PrepareConfig(group="customer", split_column="part", near=None, dev=0.2)
    torn = prepare(given, TASK, config)
    warning = "3 group(s) of 'customer' occur in several of the given splits; --resplit splits anew, by group"
    assert torn.report["warnings"] == [warning]
    assert f"warning: {warning}" in torn.table()
    assert prepare(given, TASK, config.model_copy(update={"resplit": True, "test": 0.2})).report["warnings"] == []

    named = [row | {"part": ("train", "Validation", "test")[i % 3]} for i, row in enumerate(rows)]
    named[0]["part"] = "trian"
    by_column = prepare(named, TASK, PrepareConfig(split_column="part", keep=("id",)))
    assert [row["id"] for row in by_column.rows["dev"]] == list(range(1, 70, 3))
    assert reasons(by_column) == {
        "rows, row 1": "'part' = 'trian' names no split. Did you mean 'train'? Known: dev, test, train."
    }
    again = prepare(named, TASK, PrepareConfig(split_column="part", resplit=True, dev=7, test=0))
    assert {name: len(part) for name, part in again.rows.items()} == {"train": 62, "dev": 7}
    assert Counter(row["label"] for row in again.rows["dev"]).most_common()[0][1] == 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"split_column": "part"}, "no row is left for train: each of them is given"),
        ({"dev": 5, "test": 5}, "5 test and 5 dev rows leave none of 10 to train on"),
        ({"group": "all"}, "no group fits into 1 test rows: of 1 groups the smallest has 10 rows"),
    ],
)
def test_splits_that_leave_nothing_to_train_on(config: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare([row | {"all": 1, "part": "test"} for row in make_rows(10)], TASK, PrepareConfig(**config))


@pytest.mark.parametrize("by", ["random", "stratified"])
def test_a_split_without_rows_is_an_error(by: Any) -> None:
    rows = [row | {"label": str(row["id"])} for row in make_rows(8)]
    with pytest.raises(DataError, match=r"no row is left for test: 0\.01 of 8 rows was asked for"):
        prepare(rows, TASK, PrepareConfig(by=by, test=0.01))
    if by == "stratified":  # a label that occurs once is trained on
        with pytest.raises(DataError, match="no row is left for test: 2 of 8 rows"):
            prepare(rows, TASK, PrepareConfig(by=by, test=2))


def test_answers_are_labels_where_each_occurs_often_enough() -> None:
    assert are_labels(["a", "b"] * 4)
    assert not are_labels(["a", "b", "c", "a"])
    assert not are_labels(["a"] * 8)


def test_labels_that_are_never_trained_on_are_a_warning() -> None:
    rows = [row | {"part": "train"} for row in make_rows(20)]
    rows += [{"text": "lunch at noon", "label": "canteen", "part": "test"}, rows[0] | {"part": "dev"}]
    report = prepare(rows, TASK, PrepareConfig(split_column="part", near=None)).report
    assert report["warnings"] == ["1 label(s) of test never occur in train, in 1 rows: 'canteen'"]
    assert report["labels"]["canteen"] == {"train": 0, "dev": 0, "test": 1}


def test_answers_that_contradict_each_other_are_a_warning() -> None:
    rows = [*make_rows(8), make_rows(1)[0] | {"label": "storage"}]
    assert prepare(rows, TASK, ALL).report["warnings"] == ["1 input(s) occur with more than one answer"]


# -- duplicates --------------------------------------------------------------------------------------------------------


def test_of_equal_rows_one_is_left_whatever_columns_are_beside_the_fields() -> None:
    rows = make_rows(5)
    config = ALL.model_copy(update={"keep": ("id",)})
    prepared = prepare([*rows, rows[2] | {"id": 99}], TASK, config)
    assert [row["id"] for row in everything(prepared)] == [0, 1, 2, 3, 4]
    assert reasons(prepared) == {"rows, row 6": "equal to rows, row 3"}


def test_a_test_set_keeps_its_rows_and_the_rows_to_train_on_go() -> None:
    rows = [row | {"part": "train"} for row in make_rows(6)]
    tested = [
        rows[1] | {"part": "test"},
        rows[3] | {"part": "test", "text": rows[3]["text"].upper() + " !!"},
        rows[4] | {"part": "test", "label": "another"},
    ]
    near = rows[0] | {"text": rows[0]["text"] + "."}  # like a row of its own split: it stays
    prepared = prepare([*rows, near, *tested], TASK, PrepareConfig(split_column="part", dev=0, keep=("id",)))
    assert [row["id"] for row in prepared.rows["train"]] == [0, 2, 5, 0]
    assert [row["id"] for row in prepared.rows["test"]] == [1, 3, 4]
    assert reasons(prepared) == {
        "rows, row 2": "equal to rows, row 8",
        "rows, row 4": "train row, nearly equal to the test row at rows, row 9 (Jaccard 1.00)",
        "rows, row 5": "train row, nearly equal to the test row at rows, row 10 (Jaccard 1.00)",
    }
    assert (prepared.report["duplicates"], prepared.report["near_duplicates"]) == (1, 2)
    kept = prepare([*rows, *tested], TASK, PrepareConfig(split_column="part", dev=0, near=None))
    assert len(kept.rows["train"]) == 5


def test_rows_that_are_all_alike_leave_no_split() -> None:
    rows = [
        {"text": f"the disk of server number 1234 in the cellar is full {i}", "label": "ab"[i % 2]} for i in range(20)
    ]
    with pytest.raises(DataError, match=r"no rows are left for train\. 18 rows nearly equal a row of another split"):
        prepare(rows, TASK, PrepareConfig(dev=0))


@hypothesis.given(
    st.integers(0, 10**6),
    st.sampled_from([0.2, 0.5, 0.7, 0.8, 0.95, 1.0]),
    st.sampled_from(["", "Dear desk, please: "]),
)
@hypothesis.settings(max_examples=25)
def test_near_duplicates_are_those_that_brute_force_finds(seed: int, threshold: float, template: str) -> None:
    rng = random.Random(seed)
    words = [rng.choice(NOUNS + VERBS) for _ in range(12)]
    texts, ranks = [], []
    for _ in range(24):
        changed = rng.sample(range(12), rng.randrange(8))
        texts.append(template + " ".join(rng.choice(NOUNS) if i in changed else w for i, w in enumerate(words)))
        ranks.append(rng.randrange(3))
    pairs = {
        (i, j): duplicates.jaccard(texts[i], texts[j])
        for i in range(24)
        for j in range(24)
        if ranks[i] < ranks[j] and duplicates.jaccard(texts[i], texts[j]) >= threshold
    }
    found = duplicates.near_duplicates(texts, ranks, threshold)
    assert set(found) == {i for i, _ in pairs}
    assert all(pairs[i, j] == similarity for i, (j, similarity) in found.items())


@pytest.mark.parametrize("pair", ["20 + 1|20 - 1", "20 * 1|20 / 1", "20 + 1|20 + 3", "C++|C#", "a < b|a > b"])
def test_symbols_make_another_text(pair: str) -> None:
    texts = [f"What is {each}?" for each in pair.split("|")]
    assert duplicates.near_duplicates(texts, [0, 2], 0.8) == {}


def test_sentence_marks_make_no_other_text() -> None:
    for one, other in (("«Is it?» he said…", "is it, he said"), ("wi\u2011fi", "wi-fi"), ("1 \u2212 2", "1 - 2")):
        assert duplicates.jaccard(one, other) == 1
    assert duplicates.jaccard("1 + 20 is", "3 + 20 is") == duplicates.jaccard("is 20 + 1", "is 20 + 3") < 0.8  # at ends
    assert duplicates.jaccard("काम शुरू", "कम शरू") < 1  # vowel signs


def test_jaccard_looks_at_letters_and_digits() -> None:
    assert duplicates.jaccard("Disk  FULL!", "disk full") == 1  # case, blanks, punctuation
    assert duplicates.jaccard("\uff24isk full", "disk full") == 1  # a full-width letter
    assert duplicates.jaccard("abcdef", "abcdeg") == pytest.approx(1 / 3)  # abcde of abcde, bcdef, bcdeg
    assert duplicates.jaccard("硬盘已满请尽快处理", "硬盘已满请尽快处理。") == 1
    assert duplicates.jaccard("+++", "---") == 0
    assert duplicates.jaccard("a", "b") == 0


def test_what_many_texts_share_makes_no_pairs_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    compared, real = [], duplicates.jaccard
    monkeypatch.setattr(duplicates, "jaccard", lambda *pair: compared.append(pair) or real(*pair))
    rng = random.Random(0)
    template = (
        "Read the message of the customer with care and name the one team of the company that answers it; where two "
        "could, take the first by alphabet, and write nothing else beside its name. The message: "
    )
    texts = [template + " ".join(str(rng.randrange(10**5)) for _ in range(12)) for _ in range(300)]
    texts += [text[:-1] for text in texts[:20]]
    ranks = [i % 2 for i in range(300)] + [2] * 20
    assert set(duplicates.near_duplicates(texts, ranks, 0.8)) == set(range(20))
    assert len(compared) < 40  # of 26,400 pairs


# -- the report and the folder -----------------------------------------------------------------------------------------


def test_lengths_are_those_that_training_counts() -> None:
    from transformers import AutoTokenizer

    rows = [*make_rows(30), {"text": "long " * 300, "label": "network"}]
    config = PrepareConfig(dev=0, test=0, base="seedling", max_length=300)
    prepared = prepare(rows, TASK, config)
    tokens, too_long = tokenize(AutoTokenizer.from_pretrained(SEEDLING_FOLDER), prepared.examples("train"), 10**6)
    figures = prepared.report["splits"]["train"]
    assert too_long == 0
    lengths = [(one["labels"].count(-100), one["length"]) for one in tokens]
    assert figures["prompt"]["max"] == max(prompt for prompt, _ in lengths)
    assert figures["prompt"]["min"] == min(prompt for prompt, _ in lengths)
    assert figures["answer"]["max"] == max(length - prompt - 1 for prompt, length in lengths)
    assert figures["too_long"] == sum(length > 300 for _, length in lengths) == 1
    assert "prompt tokens" in prepared.table()
    by_characters = prepare(rows, TASK, PrepareConfig(dev=0, test=0)).report
    assert (by_characters["length_unit"], by_characters["splits"]["train"]["too_long"]) == ("characters", None)


def test_percentiles_are_nearest_ranks() -> None:
    from dspy_lora.prepare.report import _spread

    assert _spread([3, 1, 2]) == {"min": 1, "median": 2, "p95": 3, "max": 3}
    assert _spread(range(1, 101)) == {"min": 1, "median": 50, "p95": 95, "max": 100}


def test_the_seed_decides_and_nothing_else(tmp_path: Path) -> None:
    rows = make_rows(60)
    folders = [
        prepare(rows, TASK, PrepareConfig(seed=seed)).write(tmp_path / name)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    files = [{path.name: path.read_bytes() for path in sorted(folder.iterdir())} for folder in folders]
    assert set(files[0]) == {"train.jsonl", "dev.jsonl", "test.jsonl", "rejects.jsonl", "report.json"}
    assert files[0] == files[1]
    assert files[0]["test.jsonl"] != files[2]["test.jsonl"]


def test_a_folder_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(make_rows(30), TASK)
    written = []

    def full(path: Path, text: str) -> None:
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        path.write_text(text)

    monkeypatch.setattr(disk, "write", full)
    with pytest.raises(PublishError, match=r"cannot write the rows .* No space left on device\. Nothing was changed"):
        prepared.write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_replaced_only_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = prepare(make_rows(30), TASK).write(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    smaller = prepare(make_rows(10), TASK, PrepareConfig(dev=0))
    with pytest.raises(DataError, match=r"exists\. Name another folder, or overwrite this one with --overwrite"):
        smaller.write(out)

    rename = Path.rename

    def refuse(self: Path, target: Path, error: BaseException) -> Path:
        if self.name == "draft":
            raise error
        return rename(self, target)

    for error, raised in ((OSError(5, "Input/output error"), PublishError), (KeyboardInterrupt(), KeyboardInterrupt)):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", functools.partialmethod(refuse, error=error))
            with pytest.raises(raised):
                smaller.write(out, overwrite=True)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    smaller.write(out, overwrite=True)
    assert not (out / "dev.jsonl").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"holds what was not prepared here \(thesis.tex\), so it stays"):
        smaller.write(out, overwrite=True)


def test_what_is_read_is_never_overwritten(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    source = write_jsonl(raw / "train.jsonl", make_rows(30))
    write_jsonl(raw / "dev.jsonl", make_rows(5, seed=1))
    before = source.read_bytes()
    words = ["--signature", "text -> label", "--overwrite"]
    for read, written in ((source, raw), (raw, raw), (raw, tmp_path), (source, source)):
        with pytest.raises(DataError, match=r"is what is read .* or holds it, so it stays"):
            run(str(read), str(written), *words)
        with pytest.raises(DataError, match="is what is read"):
            prepare(read, TASK).write(written, overwrite=True)
    with pytest.raises(DataError, match=r"has rows but no report.json: they were not prepared here"):
        prepare(make_rows(30), TASK).write(raw, overwrite=True)
    assert source.read_bytes() == before
    (tmp_path / "empty").mkdir()
    assert run(str(source), str(tmp_path / "empty"), *words) == 0


# -- the command -------------------------------------------------------------------------------------------------------


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(words))


def test_the_command_writes_what_train_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"body": row["text"], "team": row["label"]} for row in make_rows(40)]
    source, out = write_csv(tmp_path / "raw.csv", rows), tmp_path / "out"
    words = [str(source), str(out), "--domain", "operations", "--columns", "text=body", "label=team"]
    assert run(*words, "--test", "5", "--dev", "0.2", "--near", "0.9", "--seed", "3") == 0
    shown = capsys.readouterr().out
    assert [line.split()[:2] for line in shown.splitlines()[1:4]] == [["train", "27"], ["dev", "8"], ["test", "5"]]
    assert f"written: {out}" in shown

    parser = argparse.ArgumentParser()
    training.add_arguments(parser)
    args = parser.parse_args(["--domain", "operations", "--data", str(out), "--base-model", "seedling"])
    plan = training.plan(args, load_config(), "operations")
    assert isinstance(plan.train, Path)
    assert isinstance(plan.dev, Path)
    read = read_rows(plan.train, list(plan.signature.fields)) + read_rows(plan.dev, list(plan.signature.fields))
    assert {row["text"] for row in read} < {row["body"] for row in rows}
    report = json.loads((out / "report.json").read_text())
    assert report["task"]["instructions"] == plan.signature.instructions
    for name, figures in report["splits"].items():  # what the card of a training run names
        assert figures["sha256"] == sha256(out / f"{name}.jsonl")
    assert (report["settings"]["seed"], report["settings"]["near"]) == (3, 0.9)
    with pytest.raises(DataError, match="--overwrite"):
        run(*words)
    assert run(*words, "--overwrite", "--keep-near") == 0
    assert "Jaccard" not in capsys.readouterr().out


def test_the_command_prepares_reasoning_for_the_json_adapter(tmp_path: Path) -> None:
    rows = [row | {"reasoning": f"Because of {row['text'][:5]}."} for row in make_rows(20)]
    source = write_jsonl(tmp_path / "raw.jsonl", rows)
    assert run(str(source), str(tmp_path / "out"), "--signature", "text -> label", "--chain-of-thought",
               "--instructions", "Sort it.", "--adapter", "json") == 0  # fmt: skip
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["task"] == {"fields": "text -> reasoning, label", "instructions": "Sort it."}
    assert report["adapter"] == "JSONAdapter"
    assert report["labels"] is not None  # the reasoning is no part of the label


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--columns", "text"], DataError, r"--columns 'text': give FIELD=COLUMN"),
        (["--columns", "text=a", "text=b"], DataError, "a field is named twice"),
        (["--near", "1.5"], ConfigError, r"near = 1.5: Input should be less than or equal to 1"),
        (["--delimiter", ";;"], ConfigError, r"delimiter = ';;'"),
        (["--base-model", "no/model/here"], ConfigError, "base model 'no/model/here'"),
        (["--base-model", "foo/bar"], ConfigError, "'foo/bar': its tokenizer is not on this disk and cannot be downl"),
        (["--dev", "inf"], ConfigError, "dev = inf: Input should be a finite number"),
        (["--test", "1.9"], ConfigError, "test = 1.9: Give a share below 1, or a whole number of rows"),
    ],
)
def test_flags_that_are_not_allowed(tmp_path: Path, flags: list[str], error: type[Exception], message: str) -> None:
    source = write_jsonl(tmp_path / "raw.jsonl", make_rows(20))
    with pytest.raises(error, match=message):
        run(str(source), str(tmp_path / "out"), "--signature", "text -> label", *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--signature", "text"], "'text' is no signature like 'text -> label'"),
        (["--signature", "instructions -> label"], "DSPy keeps names like 'instructions'"),
        (["--signature", "text -> _x"], "DSPy keeps names like"),
        (["--signature", "demos -> label"], "dspy.Predict takes 'demos' for an argument of its own"),
        (["--domain", "legal", "--instructions", "x"], "--instructions goes with --signature"),
        (["--domain", "leagl"], "Did you mean 'legal'"),
    ],
)
def test_tasks_that_are_none(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run("raw.csv", str(tmp_path / "out"), *flags)


def test_import_pulls_in_no_heavy_package() -> None:
    heavy = "('torch', 'transformers', 'vllm', 'datasets', 'sklearn', 'pyarrow')"
    code = f"import sys, dspy_lora.prepare.command; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_real_rows_are_rows_of_their_task(data_root: Path) -> None:
    for name in ("manufacturing", "legal", "healthcare"):
        domain = load_config().domain(name)
        path = data_root / "domains" / str(domain.data) / "dev.jsonl"
        assert everything(prepare(path, domain.signature(), ALL)) == read_rows(path)
