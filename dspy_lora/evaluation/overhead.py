"""What an adapter costs at inference: both systems on the same batches, in turns."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dspy_lora.errors import DataError
from dspy_lora.evaluation.answers import Turn, timed
from dspy_lora.training.rendering import Row

if TYPE_CHECKING:
    import dspy

TURNS = 5
BATCH = 64  # rows
ANSWER_TOKENS = 16  # of a timed answer where nothing says how long answers are: a label in DSPy's chat format


@dataclass(frozen=True)
class Spread:
    """A figure over the turns."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Takes one value a turn."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Speed:
    """How fast one system answers.

    Attributes:
        answers: A second.
        tokens: Output tokens a second; None where the LM does not count them.
        latency: Median of a batch's calls, in seconds.
    """

    answers: Spread
    tokens: Spread | None
    latency: Spread

    @classmethod
    def of(cls, turns: Sequence[Turn]) -> "Speed":
        """Sums up a system's turns."""
        counted = all(turn.tokens for turn in turns)
        return cls(
            Spread.of([turn.answers / turn.seconds for turn in turns]),
            Spread.of([turn.tokens / turn.seconds for turn in turns]) if counted else None,
            Spread.of([turn.latency for turn in turns]),
        )


@dataclass(frozen=True)
class Overhead:
    """The adapter's speed next to its base's.

    Attributes:
        batch: Prompts in a batch, all under way at once.
        answer_tokens: Length to which every timed answer is held, so that both systems do the same work.
        turns: Turns of each system.
        adapter: With the adapter.
        base: The base model alone.
        throughput_ratio: Answers a second, adapter / base, turn by turn.
        latency_ratio: Median latency, adapter / base, turn by turn.
    """

    batch: int
    answer_tokens: int
    turns: int
    adapter: Speed
    base: Speed
    throughput_ratio: Spread
    latency_ratio: Spread


def measure_overhead(
    adapter: "dspy.LM",
    base: "dspy.LM",
    signature: "type[dspy.Signature]",
    rows: Sequence[Row],
    *,
    answer_tokens: int = ANSWER_TOKENS,
    turns: int = TURNS,
    batch: int = BATCH,
) -> Overhead:
    """Times both systems on the same batches, in turns; who begins alternates.

    Every answer is held to ``answer_tokens`` tokens (a base that does not know the task would ramble on, and the
    comparison would be one of lengths), or to what the context leaves. One turn of each before the clock starts warms
    the engine; the prompts are in its prefix cache then, for both alike.

    Args:
        adapter: With the adapter.
        base: The base model alone.
        signature: The task.
        rows: With its input fields; the first ``batch`` are asked.
        answer_tokens: Length of an answer.
        turns: Timed turns of each.
        batch: Rows in a batch.

    Raises:
        DataError: No rows.
    """
    rows = rows[:batch]
    if not rows:
        raise DataError("there are no rows to take the time on. Give at least one.")
    systems = [lm.copy(max_tokens=answer_tokens, min_tokens=answer_tokens, temperature=0.0) for lm in (adapter, base)]
    taken: tuple[list[Turn], list[Turn]] = ([], [])
    for turn in range(turns + 1):
        for which in (0, 1) if turn % 2 else (1, 0):
            taken[which].append(timed(systems[which], signature, rows))
    ours, theirs = (each[1:] for each in taken)
    pairs = list(zip(ours, theirs, strict=True))
    return Overhead(
        len(rows),
        answer_tokens,
        turns,
        Speed.of(ours),
        Speed.of(theirs),
        Spread.of([b.seconds / a.seconds for a, b in pairs]),
        Spread.of([a.latency / b.latency for a, b in pairs]),
    )
