"""Rows become the chat examples an adapter is trained on.

The prompt is what DSPy's own adapter sends at inference and the answer what the same adapter would parse, so training
and serving cannot drift apart: nothing here writes a prompt of its own.
"""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar

from dspy_lora.errors import DataError
from dspy_lora.training.rendering import Message, Renderer, Row, comparable, missing, typed

if TYPE_CHECKING:
    import dspy
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "ChatExample", "Message", "Row", "Tokens", "hold_out", "is_match", "parse_line", "prompt_ids", "read_rows",
    "render", "sha256", "tokenize",
]  # fmt: skip

_Item = TypeVar("_Item")

_SHOWN = 5  # malformed rows an error message spells out; the rest are counted


class ChatExample(TypedDict):
    """One row as chat: the messages DSPy sends and the one it should get back."""

    prompt: list[Message]
    completion: list[Message]


class Tokens(TypedDict):
    """One row as token ids; ``labels`` is -100 over the prompt, so that only the completion is learnt (by default)."""

    input_ids: list[int]
    labels: list[int]
    length: int


def read_rows(path: str | Path, fields: Sequence[str] = ("text", "label")) -> list[Row]:
    """Reads rows from a JSON-lines file.

    Args:
        path: The file: one JSON object a line, blank lines between them allowed.
        fields: The columns each row must have, with a value that is neither null nor blank. Others are kept.

    Returns:
        The rows in file order.

    Raises:
        DataError: No such file, an unknown format, no rows, or malformed rows (each with its line number).
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".ndjson"):
        raise DataError(f"{path}: rows are read from .jsonl files, not {path.suffix or 'files without a suffix'!r}.")
    rows, problems = [], []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            row, problem = parse_line(line, fields)
            rows.append(row)
            problems += [f"line {number}: {problem}"] if problem else []
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise DataError(
            f"{path}: {len(problems)} of {len(rows)} rows are malformed: {'; '.join(problems[:_SHOWN])}{more}"
        )
    if not rows:
        raise DataError(f'{path} holds no rows. Give one JSON object a line, like {{"text": "...", "label": "..."}}.')
    return rows


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as exc:
        raise DataError(f"{path} is not UTF-8 text: {exc}") from exc
    except OSError as exc:
        raise DataError(f"{path} cannot be read: {exc.strerror}. Give a .jsonl file of rows.") from exc


def parse_line(line: str, fields: Sequence[str] = ()) -> tuple[Row, str | None]:
    """Reads one line of a JSON-lines file.

    Returns:
        The row, and what is wrong with it: no JSON object, or one of the fields is missing or empty.
    """
    try:
        row = json.loads(line)
    except json.JSONDecodeError as exc:
        return {}, f"not JSON ({exc.msg} at column {exc.colno})"
    except ValueError as exc:  # a number that Python does not read
        return {}, f"not JSON that can be read ({str(exc).split(';')[0]})"
    except RecursionError:
        return {}, "not JSON that can be read (it is nested too deeply)"
    if not isinstance(row, dict):
        return {}, f"a JSON object is needed, not {line.strip()[:40]!r}"
    return row, missing(row, fields)


def hold_out(rows: Sequence[_Item], seed: int, share: float = 0.1, most: int = 200) -> tuple[list[_Item], list[_Item]]:
    """Splits off rows to validate on, where the user gave none.

    Args:
        rows: All rows, or what stands for them.
        seed: Decides which rows; the same seed gives the same split.
        share: Share of the rows to hold out.
        most: Upper bound of the rows held out.

    Returns:
        Training rows and held-out rows, each in the order given.

    Raises:
        DataError: Fewer than two rows.
    """
    if len(rows) < 2:
        raise DataError(f"{len(rows)} row(s) cannot be split into training and validation rows. Give more rows.")
    count = min(most, max(1, round(len(rows) * share)))
    held = set(random.Random(seed).sample(range(len(rows)), count))
    return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]


def sha256(source: Path | Sequence[Row]) -> str:
    """Hashes a file's bytes, or rows in memory as JSON lines with sorted keys."""
    if isinstance(source, Path):
        return hashlib.sha256(source.read_bytes()).hexdigest()
    lines = (json.dumps(row, sort_keys=True, ensure_ascii=False, default=str) + "\n" for row in source)
    text = "".join(lines)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()  # rendering refuses such rows, by number


def render(
    signature: "type[dspy.Signature]",
    rows: Sequence[Row],
    adapter: "dspy.Adapter | None" = None,
    demos: Sequence[Row] = (),
    numbers: Sequence[int] | None = None,
) -> list[ChatExample]:
    """Renders rows as ``dspy.Predict(signature)`` would send them, with the answer in the adapter's own format.

    Args:
        signature: The task; its input and output fields name the rows' columns.
        rows: Rows that hold every field of the signature.
        adapter: The adapter inference uses; None is DSPy's default, ``dspy.ChatAdapter()``.
        demos: Few-shot examples that inference shows too.
        numbers: What an error calls each row; None counts them from 1.

    Returns:
        One prompt and completion a row, in order.

    Raises:
        DataError: A row lacks a field of the signature, or DSPy cannot read its answer back.
    """
    renderer = Renderer(signature, adapter, demos)
    examples = []
    for number, row in zip(numbers or range(1, len(rows) + 1), rows, strict=True):
        try:
            exchange = renderer.exchange(row)
        except DataError as exc:
            raise DataError(f"row {number}: {exc}. `dspy-lora prepare` sets such rows aside.") from exc
        answer = Message(role="assistant", content=exchange.answer)
        examples.append(ChatExample(prompt=exchange.prompt, completion=[answer]))
    return examples


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[list[Message]]) -> list[list[int]]:
    """Token ids of prompts as an engine sends them: the chat template with its generation prompt.

    Raises:
        DataError: The tokenizer has no chat template, or one that refuses the messages.
    """
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise DataError(
            "the base model's tokenizer has no chat template, so DSPy's messages cannot be rendered. "
            "Use an instruction-tuned base model, or set `chat_template` in its tokenizer_config.json."
        )
    try:
        texts = tokenizer.apply_chat_template(list(prompts), tokenize=False, add_generation_prompt=True)
    except TemplateError as exc:
        raise DataError(
            f"the base model's chat template refuses DSPy's messages, a system message and turns: {exc}. "
            "Use a base model, or a `chat_template`, that takes them."
        ) from exc
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


def tokenize(
    tokenizer: "PreTrainedTokenizerBase", examples: Sequence[ChatExample], max_length: int, what: str = "row"
) -> tuple[list[Tokens], int]:
    """Tokenises each example as prompt, completion and the end-of-sequence token.

    The two parts are tokenised apart, as they are at inference, where the engine gets the prompt's ids and appends its
    own. What the chat template writes after the end-of-sequence token (ChatML: a newline) is never generated and so is
    not learnt.

    Args:
        tokenizer: The base model's, with a chat template and an end-of-sequence token.
        examples: What ``render`` returns.
        max_length: Longest example in tokens. A longer one is left out: cut at the front it would lose the
            instruction, at the end the answer.
        what: What an error calls an example.

    Returns:
        The tokenised examples, and how many were left out.

    Raises:
        DataError: No chat template, one that refuses the messages, or no example fits.
    """
    prompts = prompt_ids(tokenizer, [example["prompt"] for example in examples])
    answers = [example["completion"][0]["content"] for example in examples]
    completions = tokenizer(answers, add_special_tokens=False)["input_ids"]
    rows: list[Tokens] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = [*prompt, *completion, tokenizer.eos_token_id]
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        if len(ids) <= max_length:
            rows.append(Tokens(input_ids=ids, labels=labels, length=len(ids)))
    if not rows:
        shortest = min(len(p) + len(c) + 1 for p, c in zip(prompts, completions, strict=True))
        raise DataError(
            f"no {what} fits max_length={max_length}: the shortest takes {shortest} tokens. Raise max_length."
        )
    return rows, len(examples) - len(rows)


def is_match(signature: "type[dspy.Signature]", adapter: "dspy.Adapter") -> Callable[[str, Row], bool]:
    """Builds the exact-match test of a generated answer.

    Returns:
        A function of the generated text and its row: does DSPy parse every output field out of the text, equal to the
        row's value (``rendering.comparable``)? A ``reasoning`` field is free text and is not compared. It raises a
        DataError where the row's value does not fit its field's type.
    """
    from dspy.utils.exceptions import AdapterParseError

    compared = {name: field for name, field in signature.output_fields.items() if name != "reasoning"}

    def match(text: str, row: Row) -> bool:
        try:
            parsed = adapter.parse(signature, text)
        except AdapterParseError:
            return False
        return all(
            comparable(parsed[name]) == comparable(typed(name, row[name], field)) for name, field in compared.items()
        )

    return match
