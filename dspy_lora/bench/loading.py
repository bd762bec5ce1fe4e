"""What it costs to call an adapter that is not in the engine: the caller, and those whose answers are under way."""

import time
from typing import Any

from dspy_lora.bench.bench import Bench
from dspy_lora.bench.figure import Figure, ratios
from dspy_lora.bench.stream import Stream, stall_ms
from dspy_lora.bench.workload import seconds_of
from dspy_lora.engine.local import local_engine
from dspy_lora.errors import ConfigError

_SLOTS = 4
_LEAST_ADAPTERS = 4  # one that streams, one that is called, two that take the slots of those
_SETTLE_TOKENS = 32  # of a stream before and after a load
_MOST_STALL_MS = 10.0  # on a GPU
_DISK, _MEMORY, _SLOT = "on disk", "in CPU memory", "in its slot"


def loading(bench: Bench) -> list[Figure]:
    """First answers of adapters that are in three places, and how long each call holds a stream up.

    The engine is one of its own, with fewer slots than there are adapters and room for all of them in CPU memory. The
    first turn is left out. Files come from the system's page cache: they were written, or read, a moment ago.
    """
    shelf = _Shelf(bench)
    try:
        turns = [(_first_answers(shelf, turn), _stalls(shelf, turn)) for turn in range(bench.repeats + 1)][1:]
        most = _MOST_STALL_MS if shelf.bench.device == "cuda" else None
    finally:
        shelf.bench.close()
    answers = {place: tuple(first[place] for first, _ in turns) for place in (_DISK, _MEMORY, _SLOT)}
    return [
        *(Figure(f"first answer, adapter {place}", "ms", values) for place, values in answers.items()),
        *(
            Figure(f"first answer, adapter {place} over {_SLOT}", "x", ratios(answers[place], answers[_SLOT]))
            for place in (_DISK, _MEMORY)
        ),
        *(
            Figure(
                f"stall of a stream by a call, adapter {place}",
                "ms",
                tuple(stalls[place] for _, stalls in turns),
                most=None if place == _SLOT else most,
            )
            for place in (_DISK, _MEMORY, _SLOT)
        ),
    ]


def check_loading(adapters: int, engine: dict[str, Any]) -> None:
    """Refuses what `loading` cannot measure with.

    Args:
        adapters: How many there are.
        engine: Settings that were asked for.

    Raises:
        ConfigError: Too few adapters or slots.
    """
    if adapters < _LEAST_ADAPTERS:
        raise ConfigError(f"loading wants {_LEAST_ADAPTERS} adapters at least, and there are {adapters}.")
    if engine.get("max_loras") == 1:
        raise ConfigError(
            "loading wants 2 slots at least, for a stream and a call, and --engine sets 'max_loras' to 1."
        )


class _Shelf:
    """An engine with few slots, and where its adapters are. The first adapter streams; the others come and go.

    Args:
        bench: Its adapters and engine settings are taken.
    """

    def __init__(self, bench: Bench) -> None:
        count = len(bench.domains)
        self.slots = min(bench.asked.get("max_loras", _SLOTS), count - 2)
        own = {"max_loras": self.slots, "max_cpu_loras": count, "enable_prefix_caching": False}
        self.bench = bench.other(own)
        self._others = self.bench.domains[1:]

    def put(self, turn: int, place: str) -> str:
        """Puts the turn's adapter where it is to be.

        Returns:
            Its name.
        """
        first = turn % len(self._others)
        name, *others = self._others[first:] + self._others[:first]
        lm = self.bench.lms[name]
        if place == _DISK:
            lm.unload()
            return name
        for called in (name, *(others[: self.slots] if place == _MEMORY else ())):
            self.call(called)
        return name

    def call(self, name: str, prompt: str = "Hello.") -> None:
        """Asks an adapter for one token."""
        self.bench.lms[name](prompt, max_tokens=1)

    def stream(self) -> Stream:
        """A long answer of the first adapter."""
        return Stream(local_engine(self.bench.settings).client, self.bench.first)


def _first_answers(shelf: _Shelf, turn: int) -> dict[str, float]:
    """Milliseconds until an adapter's answer of one token is there, by where the adapter was."""
    found = {}
    for place in (_DISK, _MEMORY, _SLOT):
        name, [question] = shelf.put(turn, place), shelf.bench.fresh(1)
        found[place] = 1e3 * seconds_of(lambda: shelf.call(name, question.prompt))  # noqa: B023
    return found


def _stalls(shelf: _Shelf, turn: int) -> dict[str, float]:
    """Milliseconds for which a call holds another adapter's stream up, by where the called adapter was.

    The prompt is short, so that the call of an adapter in its slot, which loads nothing, says what the rest is.
    """
    found = {}
    for place in (_DISK, _MEMORY, _SLOT):
        name = shelf.put(turn, place)
        with shelf.stream() as stream:
            stream.more(_SETTLE_TOKENS)
            began = time.perf_counter()
            shelf.call(name)
            ended = time.perf_counter()
            stream.more(_SETTLE_TOKENS)
            found[place] = stall_ms(stream.stamps, began, ended)
    return found
