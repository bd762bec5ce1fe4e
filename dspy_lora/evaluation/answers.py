"""What systems answer to rows, asked side by side through DSPy."""

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dspy_lora.training.rendering import Row, comparable

if TYPE_CHECKING:
    import dspy

THREADS = 128


@dataclass(frozen=True)
class Given:
    """One answer.

    Attributes:
        text: The output field as text that can be compared (``rendering.comparable``); "" where there is none.
        problem: Why there is none: ``"unparsed"`` (DSPy finds no output field in it) or ``"too long"`` (the prompt does
            not fit the context); None for an answer.
    """

    text: str
    problem: str | None = None


def ask(
    lms: "Sequence[dspy.LM]", signature: "type[dspy.Signature]", rows: Sequence[Row], threads: int = THREADS
) -> list[list[Given]]:
    """Asks every system every row, all in one mixed batch.

    Args:
        lms: One LM a system.
        signature: The task, with one output field.
        rows: With the signature's input fields.
        threads: Calls at a time.

    Returns:
        For each system its answers, in the rows' order. Errors of the engine pass through.
    """
    import dspy

    programs = _programs(lms, signature)
    asked = [(program, row) for row in rows for program in programs]
    with dspy.context(adapter=_chat()):
        answers = side_by_side(_answer, asked, threads)
    return [answers[i :: len(lms)] for i in range(len(lms))]


def _programs(lms: "Sequence[dspy.LM]", signature: "type[dspy.Signature]") -> "list[dspy.Predict]":
    import dspy

    programs = [dspy.Predict(signature) for _ in lms]
    for program, lm in zip(programs, lms, strict=True):
        program.lm = lm
    return programs


def _chat() -> "dspy.ChatAdapter":
    """One call a row: without the second try through JSONAdapter."""
    import dspy

    return dspy.ChatAdapter(use_json_adapter_fallback=False)


def _answer(program: "dspy.Predict", row: Row) -> Given:
    from dspy.utils.exceptions import AdapterParseError, ContextWindowExceededError

    [output] = program.signature.output_fields
    try:
        prediction = program(**{name: row[name] for name in program.signature.input_fields})
    except AdapterParseError:
        return Given("", "unparsed")
    except ContextWindowExceededError:
        return Given("", "too long")
    return Given(comparable(prediction[output]))


def side_by_side(work: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], threads: int) -> list[Any]:
    """Calls a function once for each tuple of arguments, in threads that see the caller's DSPy settings."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = [pool.submit(copy_context().run, work, *each) for each in arguments]
        try:
            return [each.result() for each in waiting]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@dataclass(frozen=True)
class Turn:
    """One system's turn on a batch.

    Attributes:
        seconds: For all of it.
        answers: How many.
        tokens: Output tokens; 0 where the LM does not say.
        latency: Median of the calls, in seconds.
    """

    seconds: float
    answers: int
    tokens: int
    latency: float


def timed(lm: "dspy.LM", signature: "type[dspy.Signature]", rows: Sequence[Row], threads: int = THREADS) -> Turn:
    """Asks one system the rows, as ``ask`` does, and takes the time."""
    import dspy

    lm = lm.copy(cache=False)  # and a history of its own
    [program] = _programs([lm], signature)
    with dspy.context(adapter=_chat(), disable_history=False, max_history_size=max(len(rows), 1)):
        start = time.perf_counter()
        latencies = side_by_side(_seconds, [(program, row) for row in rows], threads)
        seconds = time.perf_counter() - start
    tokens = sum((call["usage"] or {}).get("completion_tokens") or 0 for call in lm.history)
    return Turn(seconds, len(rows), tokens, statistics.median(latencies))


def _seconds(program: "dspy.Predict", row: Row) -> float:
    start = time.perf_counter()
    _answer(program, row)
    return time.perf_counter() - start
