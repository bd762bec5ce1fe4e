"""One request at a time: how soon its first token comes, and how fast the further ones follow."""

import statistics
from collections.abc import Callable
from typing import TypeAlias

from dspy_lora.bench.bench import Bench
from dspy_lora.bench.figure import Figure, ratios
from dspy_lora.bench.servers import RawVLLM, raw_vllm
from dspy_lora.bench.workload import Question, seconds_of

Ask: TypeAlias = Callable[[str, int], float]  # a prompt and the tokens of its answer -> seconds

_BASE, _ADAPTER, _OURS = "plain vLLM, base model", "plain vLLM, one adapter", "LoRALM, one adapter"
_RATIOS = {"one adapter over base": (_ADAPTER, _BASE), "LoRALM over plain, one adapter": (_OURS, _ADAPTER)}
LONE_PROMPTS = 8  # of each length of answer in a repeat, which takes their median
_NEW_WORDS = 8  # in front of a prompt, so that no block of it is in the prefix cache


def latency(bench: Bench) -> list[Figure]:
    """First and further tokens of plain ``LLM.generate`` and of an LM, in turns; the first turn is left out."""
    tokens = max(2, *bench.answers)
    with raw_vllm(bench.settings, bench.adapters) as raw:
        kinds = {_BASE: plain(raw, None), _ADAPTER: plain(raw, bench.ref(bench.domains[0])), _OURS: _through(bench)}
        turns = [
            {kind: first_and_further(bench.fresh(2 * LONE_PROMPTS), ask, tokens) for kind, ask in kinds.items()}
            for _ in range(bench.repeats + 1)
        ]
    figures = []
    for place, part in enumerate(("first token", "further token")):
        times = {kind: tuple(turn[kind][place] for turn in turns[1:]) for kind in kinds}
        figures += [Figure(f"{kind}: {part}", "ms", values) for kind, values in times.items()]
        figures += [
            Figure(f"{part}, {name}", "x", ratios(times[above], times[below]))
            for name, (above, below) in _RATIOS.items()
        ]
    return figures


def first_and_further(asked: list[Question], ask: Ask, tokens: int) -> tuple[float, float]:
    """Milliseconds of the first token, and of each further one of a longer answer.

    Args:
        asked: Half of them get an answer of one token, half a longer one.
        ask: Asks for an answer and says how long it took.
        tokens: Of the longer answers, two at least.
    """
    pairs = [(ask(_new(one), 1), ask(_new(other), tokens)) for one, other in zip(asked[::2], asked[1::2], strict=True)]
    first, whole = (statistics.median(times) for times in zip(*pairs, strict=True))
    return first * 1e3, (whole - first) * 1e3 / (tokens - 1)


def _new(question: Question) -> str:
    """The prompt with words of its own in front: the instruction is the same for all of a domain."""
    return " ".join([*question.text.split()[:_NEW_WORDS], question.prompt])


def plain(raw: RawVLLM, adapter: str | None) -> Ask:
    """Asks plain vLLM for one answer at a time.

    Args:
        raw: Plain vLLM.
        adapter: Its name there; None asks the base model.
    """

    def ask(prompt: str, tokens: int) -> float:
        return raw.seconds([[{"role": "user", "content": prompt}]], [adapter], tokens)

    return ask


def _through(bench: Bench) -> Ask:
    lm = bench.first
    return lambda prompt, tokens: seconds_of(lambda: lm(prompt, max_tokens=tokens))
