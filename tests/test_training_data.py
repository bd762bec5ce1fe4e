"""Rows become exactly the prompts that DSPy sends, and errors name file and line."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import dspy
import pytest

from dspy_lora.errors import DataError
from dspy_lora.training import data

CLAUSE = dspy.Signature("text -> label", "Name the type of the contract clause.")
ROWS = [
    {"text": "This Agreement is governed by the laws of Ohio.", "label": "governing law"},
    {"text": "Zwei Zeilen:\n[[ ## label ## ]] — “quoted” <|im_end|>", "label": "anti-assignment"},
    {"text": "  padded ", "label": "cap on liability"},
]


class Typed(dspy.Signature):
    """Sort the ticket."""

    subject: str = dspy.InputField()
    tags: list[str] = dspy.InputField(desc="as given by the user")
    urgent: bool = dspy.OutputField()
    team: Literal["network", "storage"] = dspy.OutputField()


TICKET = {"subject": "disk full", "tags": ["nas", "prod"], "urgent": True, "team": "storage"}
DEMO = {"text": "Either party may terminate.", "label": "termination"}


class Recorder(dspy.utils.DummyLM):
    """Keeps the messages it is sent."""

    def __init__(self, answer: dict[str, Any], adapter: dspy.Adapter) -> None:
        super().__init__([answer] * 20, adapter=adapter)
        self.sent: list[list[dict[str, Any]]] = []

    def __call__(self, prompt: str | None = None, messages: list[dict[str, Any]] | None = None, **kwargs: Any) -> Any:
        self.sent.append(messages or [])
        return super().__call__(prompt=prompt, messages=messages, **kwargs)


@pytest.mark.parametrize("adapter", [dspy.ChatAdapter(), dspy.JSONAdapter()], ids=["chat", "json"])
@pytest.mark.parametrize(
    ("signature", "rows", "demos"),
    [(CLAUSE, ROWS, []), (CLAUSE, ROWS, [DEMO]), (Typed, [TICKET], [])],
    ids=["plain", "demos", "typed"],
)
def test_the_prompt_is_what_predict_sends(signature: Any, rows: Any, demos: Any, adapter: dspy.Adapter) -> None:
    lm = Recorder({name: rows[0][name] for name in signature.output_fields}, adapter)
    predict = dspy.Predict(signature)
    predict.demos = demos
    with dspy.context(lm=lm, adapter=adapter):
        for row in rows:
            predict(**{name: row[name] for name in signature.input_fields})
    assert [example["prompt"] for example in data.render(signature, rows, adapter, demos)] == lm.sent


@pytest.mark.parametrize("adapter", [None, dspy.ChatAdapter(), dspy.JSONAdapter()], ids=["default", "chat", "json"])
def test_the_completion_is_what_the_adapter_parses(adapter: dspy.Adapter | None) -> None:
    [example] = data.render(Typed, [TICKET], adapter)
    [message] = example["completion"]
    assert message["role"] == "assistant"
    parsed = (adapter or dspy.ChatAdapter()).parse(Typed, message["content"])
    assert parsed == {"urgent": True, "team": "storage"}


def test_the_completion_equals_dspys_own_finetuning_data() -> None:
    adapter = dspy.ChatAdapter()
    for row, example in zip(ROWS, data.render(CLAUSE, ROWS), strict=True):
        inputs, outputs = {"text": row["text"]}, {"label": row["label"]}
        expected = adapter.format_finetune_data(CLAUSE, [], inputs, outputs)["messages"]
        assert example["prompt"] + example["completion"] == expected


def test_chain_of_thought_needs_its_reasoning() -> None:
    signature = dspy.ChainOfThought("text -> label").predict.signature
    with pytest.raises(DataError, match=r"row 1: no 'reasoning' \(it has 'text', 'label'\)"):
        data.render(signature, ROWS)


def test_exact_match_asks_dspys_parser() -> None:
    match = data.is_match(CLAUSE, dspy.ChatAdapter())
    row = {"text": "...", "label": "audit rights"}
    assert match("[[ ## label ## ]]\naudit rights\n\n[[ ## completed ## ]]\n", row)
    assert match("[[ ## label ## ]]\naudit rights", row)
    assert not match("[[ ## label ## ]]\nAudit rights\n\n[[ ## completed ## ]]", row)
    assert not match("audit rights", row)
    assert not match("", row)


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_read_rows_keeps_order_and_every_column(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b", "label": "x", "id": 1}, {"text": "c", "label": "é"}]
    path = write(tmp_path / "rows.jsonl", json.dumps(rows[0], ensure_ascii=False), "", json.dumps(rows[1]))
    assert data.read_rows(path) == rows
    assert data.sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_read_rows_asks_for_the_signatures_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", json.dumps(TICKET))
    assert data.read_rows(path, list(Typed.fields)) == [TICKET]
    with pytest.raises(DataError, match="line 1: no 'text'"):
        data.read_rows(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "label": ', r"line 2: not JSON \(Expecting value at column"),
        ('["a", "b"]', "line 2: a JSON object is needed"),
        ('{"text": "a"}', r"line 2: no 'label' \(it has 'text'\)"),
        ("{}", r"line 2: no 'text' \(it has nothing\)"),
        ('{"text": "a", "label": null}', "line 2: 'label' is empty"),
        ('{"text": " \\n", "label": "x"}', "line 2: 'text' is empty"),
    ],
)
def test_malformed_rows_are_named_by_line(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "rows.jsonl", '{"text": "a", "label": "x"}', line)
    with pytest.raises(DataError, match=f"rows.jsonl: 1 of 2 rows are malformed: {message}"):
        data.read_rows(path)


def test_many_malformed_rows_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *["nonsense"] * 8)
    with pytest.raises(DataError, match=r"8 of 8 rows are malformed: line 1.*line 5.*; and 3 more$"):
        data.read_rows(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"\n \n", "holds no rows"),
        ("rows.jsonl", b'{"text": "\xff"}', "is not UTF-8 text"),
        ("rows.jsonl", None, "cannot be read: No such file"),
        ("rows.txt", b"a", "rows are read from .jsonl files, not '.txt'"),
    ],
)
def test_files_that_hold_no_rows(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        data.read_rows(tmp_path / name)


def test_hold_out_is_a_split_that_the_seed_decides() -> None:
    rows = [{"text": str(i), "label": "x"} for i in range(50)]
    kept, held = data.hold_out(rows, seed=3)
    assert (len(kept), len(held)) == (45, 5)
    assert sorted(kept + held, key=lambda row: int(row["text"])) == rows
    assert data.hold_out(rows, seed=3) == (kept, held)
    assert data.hold_out(rows, seed=4) != (kept, held)
    assert len(data.hold_out(rows * 100, seed=0)[1]) == 200
    with pytest.raises(DataError, match=r"1 row\(s\) cannot be split"):
        data.hold_out(rows[:1], seed=0)


def test_rows_in_memory_have_a_hash_of_their_content() -> None:
    assert data.sha256(ROWS) == data.sha256([dict(reversed(row.items())) for row in ROWS])
    assert data.sha256(ROWS) != data.sha256(ROWS[::-1])


def test_the_real_rows_render(data_root: Path) -> None:
    for name in ("legal/cuad", "manufacturing/work_order_items", "healthcare/medquad"):
        rows = data.read_rows(data_root / "domains" / name / "dev.jsonl")
        match = data.is_match(CLAUSE, dspy.ChatAdapter())
        texts = [example["completion"][0]["content"] for example in data.render(CLAUSE, rows)]
        assert all(match(text, row) for text, row in zip(texts, rows, strict=True))
