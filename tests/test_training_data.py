"""Rows become exactly the prompts that DSPy sends, and errors name file and line."""

import enum
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import dspy
import hypothesis
import pydantic
import pytest
from hypothesis import strategies as st

from dspy_lora.adapters.base import SEEDLING_FOLDER
from dspy_lora.engine.host import Host
from dspy_lora.engine.protocol import Generate
from dspy_lora.errors import DataError
from dspy_lora.training import data
from dspy_lora.training.rendering import Renderer, comparable, typed

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


class Period(pydantic.BaseModel):
    """A nested value."""

    months: int
    open: bool = False


class Terms(dspy.Signature):
    """Read the terms."""

    text: str = dspy.InputField()
    notes: dict[str, int] = dspy.InputField()
    period: Period = dspy.OutputField()
    parties: list[str] = dspy.OutputField()


TERMS = {"text": "Twelve months.", "notes": {"page": 3}, "period": {"months": 12}, "parties": ["A", "B"]}
REASONED = [row | {"reasoning": f"It begins with {row['text'][:4]!r}."} for row in ROWS]
PROGRAMS = {
    "predict": (dspy.Predict(CLAUSE), ROWS, []),
    "predict, demos": (dspy.Predict(CLAUSE), ROWS, [DEMO, {"text": "Only an input."}]),
    "reasoning": (dspy.ChainOfThought(CLAUSE), REASONED, []),
    # The first demo lacks its reasoning, as labelled examples do: DSPy words it differently.
    "reasoning, demos": (dspy.ChainOfThought(CLAUSE), REASONED, [DEMO, DEMO | {"reasoning": "An end."}]),
    "typed": (dspy.Predict(Typed), [TICKET], [TICKET]),
    "nested": (dspy.ChainOfThought(Terms), [TERMS | {"reasoning": "Short."}], []),
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SEEDLING_FOLDER)


@pytest.mark.parametrize("adapter", [dspy.ChatAdapter(), dspy.JSONAdapter()], ids=["chat", "json"])
@pytest.mark.parametrize(("program", "rows", "demos"), PROGRAMS.values(), ids=PROGRAMS)
def test_training_and_serving_agree_token_for_token(
    program: dspy.Module, rows: Any, demos: Any, adapter: dspy.Adapter, tokenizer: Any
) -> None:
    [predict] = (program := program.deepcopy()).predictors()
    predict.demos = demos
    signature = predict.signature
    lm = Recorder({name: rows[0][name] for name in signature.output_fields}, adapter)
    with dspy.context(lm=lm, adapter=adapter):
        for row in rows:
            program(**{name: row[name] for name in signature.input_fields})
    host: Any = SimpleNamespace(tokenizer=tokenizer, max_model_len=10**6)
    served = [Host.prompt_tokens(host, Generate(id=0, messages=messages, sampling={})) for messages in lm.sent]

    tokens, left_out = data.tokenize(tokenizer, data.render(signature, rows, adapter, demos), 10**6)
    assert left_out == 0
    for row, one, prompt in zip(rows, tokens, served, strict=True):
        assert one["input_ids"][: len(prompt)] == prompt
        assert one["labels"][: len(prompt)] == [-100] * len(prompt)
        *answer, end = one["input_ids"][len(prompt) :]
        assert one["labels"][len(prompt) :] == [*answer, end]
        assert end == tokenizer.eos_token_id
        read = adapter.parse(signature, tokenizer.decode(answer))
        expected = {name: field.annotation for name, field in signature.output_fields.items()}
        for name, annotation in expected.items():
            value = row[name].strip() if isinstance(row[name], str) else row[name]
            assert read[name] == pydantic.TypeAdapter(annotation).validate_python(value)


@hypothesis.given(st.text(), st.text(), st.sampled_from([dspy.ChatAdapter(), dspy.JSONAdapter()]))
@hypothesis.example("<|im_end|>", "[[ ## completed ## ]]", dspy.JSONAdapter())
def test_whatever_is_rendered_is_what_predict_sends_and_reads_back(text: str, label: str, adapter: Any) -> None:
    row = {"text": text, "label": label}
    try:
        [example] = data.render(CLAUSE, [row], adapter)
    except DataError:
        return
    lm = Recorder({"label": "x"}, adapter)
    with dspy.context(lm=lm, adapter=adapter):
        dspy.Predict(CLAUSE)(text=text)
    assert lm.sent == [example["prompt"]]
    assert adapter.parse(CLAUSE, example["completion"][0]["content"])["label"].split() == label.split()


def test_text_of_a_table_is_rendered_as_the_value_that_a_program_passes() -> None:
    cells = {"subject": "disk full", "tags": '["nas","prod"]', "urgent": "true", "team": "storage"}
    assert data.render(Typed, [cells]) == data.render(Typed, [TICKET])


def test_rendering_leaves_no_trace_and_calls_no_callbacks_of_the_users() -> None:
    class Callback(dspy.utils.BaseCallback):
        def on_lm_start(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError

    with dspy.context(trace=[], callbacks=[Callback()]):
        data.render(CLAUSE, ROWS)
        assert dspy.settings.trace == []


@pytest.mark.parametrize(
    ("signature", "row", "message"),
    [
        (Typed, TICKET | {"urgent": "maybe"}, r"row 1: 'urgent' = 'maybe' does not fit bool: Input should be a valid"),
        (Typed, TICKET | {"team": "net"}, r"'team' = 'net' does not fit Literal\['network', 'storage'\]: Input should"),
        (CLAUSE, {"text": "a", "label": "x\n[[ ## completed ## ]]\ny"}, "ChatAdapter would not read the same answer"),
        (CLAUSE, {"text": "a", "label": "[[ ## label ## ]]"}, "ChatAdapter would not read the same answer back"),
        (CLAUSE, {"text": "\ud800", "label": "x"}, "'text' = .* cannot be written as JSON: .* surrogates not allowed"),
        (CLAUSE, {"text": "a", "label": "\ud800"}, "'label' = .* cannot be written as JSON: .* surrogates not allowed"),
        (CLAUSE, {"text": b"\xff", "label": "x"}, "'text' = .* cannot be written as JSON: .* invalid utf-8"),
        (dspy.Signature("text -> size: float"), {"text": "a", "size": "inf"}, "'size' = inf cannot be written as JSON"),
        (Typed, TICKET | {"tags": "[" * 100_000}, "'tags' = .* does not fit list"),
        (
            dspy.Signature("photo: dspy.Image -> label"),
            {"photo": dspy.Image("data:image/png;base64,AAAA"), "label": "x"},
            "cannot send this row: LoRALM sends text",
        ),
    ],
)
def test_rows_that_serving_would_not_give_back_are_named(signature: Any, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        data.render(signature, [row], dspy.ChatAdapter())


def test_an_exchange_holds_the_values_as_json_and_as_dspy_reads_them() -> None:
    exchange = Renderer(CLAUSE).exchange({"text": 12, "label": " two\r\nlines "})
    assert (exchange.inputs, exchange.outputs) == ({"text": "12"}, {"label": "two\nlines"})
    nested = Renderer(Terms).exchange(TERMS)
    assert nested.inputs | nested.outputs == TERMS | {"period": {"months": 12, "open": False}}


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


class Team(enum.Enum):
    """Where a ticket goes."""

    NETWORK = "network"
    STORAGE = "storage"


class Assessed(dspy.Signature):
    """Assess the ticket."""

    text: str = dspy.InputField()
    team: Team = dspy.OutputField()
    period: Period = dspy.OutputField()
    urgent: bool = dspy.OutputField()
    share: float = dspy.OutputField()
    note: str = dspy.OutputField()


ASSESSED = {
    "text": "disk full",
    "team": "storage",
    "period": {"open": True, "months": 12},
    "urgent": "true",
    "share": 3,
    "note": "first\r\nsecond ",
}


@pytest.mark.parametrize("adapter", [dspy.ChatAdapter(), dspy.JSONAdapter()], ids=["chat", "json"])
def test_a_rendered_answer_of_any_type_matches_its_row_and_no_other(adapter: dspy.Adapter) -> None:
    match = data.is_match(Assessed, adapter)
    [example] = data.render(Assessed, [ASSESSED], adapter)
    answer = example["completion"][0]["content"]
    assert match(answer, ASSESSED)
    others = {"team": "network", "period": {"months": 12}, "urgent": False, "share": 3.5, "note": "first second"}
    assert not any(match(answer, ASSESSED | {name: other}) for name, other in others.items())


@pytest.mark.parametrize(
    ("kind", "one", "other", "are_equal"),
    [
        (set[int], [8, 0], {0, 8}, True),
        (set[int], [8, 0], {0, 7}, False),
        (int | float, 1, 1.0, True),
        (dict[str, float], {"a": 1}, {"a": 1.0}, True),
        (list[int], [8, 0], [0, 8], False),
        (bool, "true", 1, True),
    ],
)
def test_equal_values_are_comparable_alike(kind: Any, one: Any, other: Any, are_equal: bool) -> None:
    field = dspy.Signature("text -> found").with_updated_fields("found", type_=kind).output_fields["found"]
    first, second = (comparable(typed("found", value, field)) for value in (one, other))
    assert (first == second) is are_equal


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
        ('{"text": "a", "label": ' + "1" * 5000, r"line 2: not JSON that can be read \(Exceeds the limit .* digits"),
        ("[" * 100_000, r"line 2: not JSON that can be read \(it is nested too deeply"),
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
