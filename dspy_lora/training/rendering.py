"""A row as the messages that LoRALM's engine gets for it, and the answer that DSPy reads back.

Nothing here writes a prompt: ``dspy.Predict`` itself is called, over an engine that takes down the request and answers
with the row's own outputs. So what is trained on is what is served, for every adapter, with demos and ChainOfThought.
"""

import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dspy
import pydantic
import pydantic_core
from dspy import lm15
from dspy.adapters.utils import get_annotation_name, parse_value, serialize_for_json
from dspy.utils.exceptions import AdapterParseError, DSPyError

from dspy_lora.engine.translate import to_messages
from dspy_lora.errors import DataError

Row = dict[str, Any]
Message = dict[str, Any]

_MODEL = "rows"  # a dspy.LM needs a name; no model of that name exists


@dataclass(frozen=True)
class Exchange:
    """One row, rendered.

    Attributes:
        prompt: The messages that a chat template gets.
        answer: The answer in the adapter's format.
        inputs: The input fields, as JSON.
        outputs: The output fields as DSPy reads them back from the answer, as JSON.
    """

    prompt: list[Message]
    answer: str
    inputs: Row
    outputs: Row


class Renderer:
    """Renders rows as ``dspy.Predict(signature)`` sends them. One thread at a time.

    The engine is taken for one without tool and reasoning parsers, as LoRALM's is unless ``serving`` names them.

    Args:
        signature: The task; its input and output fields name the rows' columns.
        adapter: The adapter inference uses; None is DSPy's default, ``dspy.ChatAdapter()``.
        demos: Few-shot examples that inference shows too.
    """

    def __init__(
        self,
        signature: type[dspy.Signature],
        adapter: dspy.Adapter | None = None,
        demos: Sequence[Row] = (),
    ) -> None:
        self.signature = signature
        self.adapter = adapter or dspy.ChatAdapter()
        self._engine = _Recorder()
        self._predict = dspy.Predict(signature)
        self._predict.demos = self.demos = list(demos)
        self._predict.lm = dspy.LM(_MODEL, engine=self._engine, cache=False)

    def exchange(self, row: Row) -> Exchange:
        """Renders one row.

        Raises:
            DataError: The row lacks a field of the signature, a value does not fit its field's type or cannot be
                written as JSON, or DSPy would not read the same answer back.
        """
        if problem := missing(row, list(self.signature.fields)):
            raise DataError(f"{problem}; the signature {self.signature.signature!r} needs every field")
        inputs = {name: typed(name, row[name], field) for name, field in self.signature.input_fields.items()}
        outputs = {name: typed(name, row[name], field) for name, field in self.signature.output_fields.items()}
        for name, value in (inputs | outputs).items():
            _check_json(name, value)
        answer = self.adapter.format_assistant_message_content(self.signature, outputs)
        try:
            parsed = self._ask(inputs, answer)
            prompt = to_messages(self._engine.requests[0])
        except AdapterParseError as exc:
            raise self._unreadable(answer) from exc
        except (ValueError, TypeError, AttributeError, DSPyError, lm15.LM15Error) as exc:
            raise DataError(f"DSPy cannot send this row: {_first_line(exc)}") from exc
        # ChatAdapter asks a second time, through JSONAdapter, where it cannot parse.
        asked_twice = len(self._engine.requests) > 1
        if asked_twice or any(comparable(parsed[name]) != comparable(outputs[name]) for name in outputs):
            raise self._unreadable(answer)
        return Exchange(prompt, answer, serialize_for_json(inputs), serialize_for_json(parsed))

    def _ask(self, inputs: Row, answer: str) -> Row:
        """Calls Predict as a program does; the caller's callbacks, trace and stream belong to calls of a model."""
        self._engine.expect(answer)
        with dspy.context(adapter=self.adapter, callbacks=[], trace=None, send_stream=None, disable_history=True):
            prediction = self._predict(**inputs)
        return {name: prediction[name] for name in self.signature.output_fields}

    def _unreadable(self, answer: str) -> DataError:
        return DataError(f"{type(self.adapter).__name__} would not read the same answer back from {answer[:120]!r}")


def typed(name: str, value: Any, field: Any) -> Any:
    """The value as a program holds it: ``'["a", "b"]'`` of a CSV cell becomes a list where the field is one.

    Raises:
        DataError: It does not fit the field's type.
    """
    if field.annotation is str:
        return str(value) if isinstance(value, int | float) else value
    try:
        return parse_value(value, field.annotation)
    except pydantic.ValidationError as exc:
        problem = exc.errors()[0]["msg"]
    except (ValueError, RecursionError) as exc:
        problem = str(exc)
    raise DataError(f"{name!r} = {value!r} does not fit {get_annotation_name(field.annotation)}: {problem}")


def _check_json(name: str, value: Any) -> None:
    """Refuses what no file of rows and no tokenizer takes: other bytes than UTF-8, infinity, lone surrogates."""
    try:
        plain = pydantic_core.to_jsonable_python(value, inf_nan_mode="constants", fallback=str)
        json.dumps(plain, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as exc:
        raise DataError(f"{name!r} = {reprlib.repr(value)} cannot be written as JSON: {_first_line(exc)}") from exc


def comparable(value: Any) -> str:
    """A typed value as text that two equal values share: a text itself, anything else as JSON with sorted keys.

    DSPy's parsers strip texts and unify their line breaks, so blanks around a text and kinds of line breaks are no
    difference. Nor are a set's order, and 1 and 1.0.
    """
    plain = serialize_for_json(value)  # an Enum becomes its value, a pydantic model a dict
    if isinstance(plain, str):
        return "\n".join(plain.splitlines()).strip()
    if isinstance(value, set | frozenset):
        plain = sorted(plain, key=comparable)
    return json.dumps(json.loads(json.dumps(plain), parse_float=_number), ensure_ascii=False, sort_keys=True)


def _number(text: str) -> float:
    """A number of JSON, as a whole one where it is."""
    value = float(text)
    return int(value) if value.is_integer() else value


class _Recorder:
    """An engine (``dspy.clients.engines.base.Engine``) that keeps requests and gives the answer it was told to."""

    def __init__(self) -> None:
        self.requests: list[lm15.Request] = []
        self._answer = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Recorder":
        return self

    def expect(self, answer: str) -> None:
        """Forgets earlier requests; the next ones get this answer."""
        self.requests, self._answer = [], answer

    def complete(self, request: lm15.Request) -> lm15.Response:
        """Keeps the request and answers it."""
        self.requests.append(request)
        return lm15.Response(
            id=None,
            model=request.model,
            message=lm15.Message(role="assistant", parts=(lm15.TextPart(self._answer),)),
            finish_reason="stop",
            usage=lm15.Usage(input_tokens=0, output_tokens=0),
        )

    def stream(self, request: lm15.Request) -> Iterator[Any]:
        """The answer as stream events."""
        yield from lm15.response_to_events(self.complete(request))

    def close(self) -> None:
        """Nothing to close."""


def missing(row: Mapping[str, Any], fields: Sequence[str]) -> str | None:
    """Says which of the fields the row lacks, or has without a value; None where it has them all."""
    for field in fields:
        if field not in row:
            return f"no {field!r} (it has {', '.join(map(repr, row)) or 'nothing'})"
        if row[field] is None or (isinstance(row[field], str) and not row[field].strip()):
            return f"{field!r} is empty"
    return None


def _first_line(exc: Exception) -> str:
    return str(exc).strip().split("\n", 1)[0][:200]
