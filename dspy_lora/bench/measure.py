"""One function a measurement. Each compares within one run, in turns, and returns figures with their spread."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import dspy

from dspy_lora.adapters.base import SEEDLING
from dspy_lora.bench import memory
from dspy_lora.bench.bench import LONG_TOKENS, SHORT_TOKENS, Bench
from dspy_lora.bench.endings import seconds_to_end
from dspy_lora.bench.figure import Figure, ratios
from dspy_lora.bench.servers import raw_vllm
from dspy_lora.bench.workload import AnyText, Question, in_threads, seconds_of, signature

_SOAK_CALLS = 20_000
_WARM_UP_CALLS = 2048
_MOST_ENGINE_MB = 4295  # 4 GiB, with the seedling's adapters and 1 GiB of KV cache
_LEAST_OF_PLAIN = {"": 0.95, "8b": 0.97}  # DSPy's speed over plain vLLM's, by shape; the larger, the less the rest is


def throughput(bench: Bench) -> list[Figure]:
    """Output tokens a second of DSPy programs in threads against plain ``LLM.generate``, all adapters mixed."""
    figures, least = [], _LEAST_OF_PLAIN.get(bench.shape or "", _LEAST_OF_PLAIN[""])
    at_once = min(bench.threads, bench.first.engine_stats()["max_num_seqs"])
    with (
        raw_vllm(bench.settings_with({"max_num_seqs": at_once}), bench.adapters) as raw,
        dspy_settings(adapter=AnyText()),
    ):
        for tokens in bench.answers:
            programs = {domain: _program(bench, domain, max_tokens=tokens) for domain in bench.domains}
            raw.tokens_a_second([bench.own_adapters(bench.fresh(24))], tokens)
            bench.run(bench.fresh(24), lambda question: programs[question.domain](text=question.text))  # noqa: B023
            plain, through = [], []
            for _ in range(bench.repeats):
                asked = bench.fresh()
                plain.append(raw.tokens_a_second([bench.own_adapters(asked)], tokens))
                seconds = bench.run(asked, lambda question: programs[question.domain](text=question.text))  # noqa: B023
                through.append(tokens * len(asked) / seconds)
            figures += [
                Figure(f"plain LLM.generate, {tokens} tokens an answer", "tokens/s", tuple(plain)),
                Figure(f"DSPy programs, {tokens} tokens an answer", "tokens/s", tuple(through)),
                Figure(bench.of_answers("DSPy over plain", tokens), "x", ratios(through, plain), least=least),
            ]
    return figures


def _program(bench: Bench, domain: str, **kwargs: Any) -> dspy.Predict:
    program = dspy.Predict(signature(domain))
    program.lm = bench.lms[domain].copy(**kwargs)
    return program


def samples(bench: Bench) -> list[Figure]:
    """Eight samples of a call against one."""
    lm = bench.first.copy(max_tokens=LONG_TOKENS, temperature=1.0)

    def seconds(samples: int) -> float:
        [question] = bench.fresh(1)
        lm(question.prompt)  # the prompt is in the prefix cache from here on
        return seconds_of(lambda: lm(question.prompt, n=samples))

    one, eight = _in_turns(bench, lambda: seconds(1), lambda: seconds(8))
    return [
        Figure(f"n=1, {LONG_TOKENS} tokens", "s", one),
        Figure(f"n=8, {LONG_TOKENS} tokens each", "s", eight),
        Figure("n=8 over n=1", "x", ratios(eight, one), most=2.0),
    ]


def mixed(bench: Bench) -> list[Figure]:
    """Calls to all adapters in one batch against one adapter after another."""
    lms = {domain: lm.copy(max_tokens=SHORT_TOKENS) for domain, lm in bench.lms.items()}

    def ask(question: Question) -> Any:
        return lms[question.domain](question.prompt)

    def one_by_one() -> float:
        asked = bench.fresh()
        return sum(bench.run([each for each in asked if each.domain == domain], ask) for domain in bench.domains)

    together, in_turn = _in_turns(bench, lambda: bench.run(bench.fresh(), ask), one_by_one)
    return [Figure("all adapters mixed, speed over one after another", "x", ratios(in_turn, together))]


def _in_turns(bench: Bench, *ways: Callable[[], float]) -> list[tuple[float, ...]]:
    """What each way takes: a round that does not count, in which the engine warms up, and each repeat another first."""
    found: list[list[float]] = [[] for _ in ways]
    for turn in range(bench.repeats + 1):
        for place in range(len(ways)):
            chosen = (turn + place) % len(ways)
            found[chosen].append(ways[chosen]())
    return [tuple(values[1:]) for values in found]


def _warm_up(bench: Bench) -> None:
    """Asks prompts that begin with their text, of which the prefix cache knows nothing.

    The heap of an engine grows by half over its first thousands of prompts, on a CPU, where the KV cache has its memory
    from the start.
    """
    asked = bench.fresh(_WARM_UP_CALLS)
    bench.run(asked, lambda each: bench.lms[each.domain](f"{each.text} {each.prompt}", max_tokens=1))


def engine_memory(bench: Bench) -> list[Figure]:
    """The engine's memory over all its processes with all adapters, after thousands of prompts."""
    _warm_up(bench)
    pid = bench.first.engine_stats()["pid"]
    most = _MOST_ENGINE_MB if bench.model == SEEDLING else None
    return [Figure("engine with all adapters, PSS of its processes", "MB", (memory.group_megabytes(pid),), most=most)]


def caller_memory(bench: Bench) -> list[Figure]:
    """What LoRALM adds to a process that uses DSPy; starts an engine of its own."""
    return [Figure("LoRALM in the caller's process, PSS", "MB", (memory.caller_megabytes(bench.domains),), most=150)]


def endings(bench: Bench) -> list[Figure]:
    """Ctrl-C and SIGKILL in a program that waits for an answer, each time a new one."""
    back, gone = zip(*(seconds_to_end() for _ in range(bench.repeats)), strict=True)
    return [
        Figure("Ctrl-C in a call until the program goes on", "s", back, most=2),
        Figure("a program's SIGKILL until nothing of its engine is left", "s", gone, most=10),
    ]


def soak(bench: Bench, calls: int = _SOAK_CALLS) -> list[Figure]:
    """Growth of what the engine's processes write over many calls, after a tenth of them have filled the allocators."""
    _warm_up(bench)
    pid = bench.first.engine_stats()["pid"]
    lms = [lm.copy(max_tokens=1) for lm in bench.lms.values()]

    def ask(first: int, last: int) -> float:
        calls = [functools.partial(lms[index % len(lms)], f"Question {index}.") for index in range(first, last)]
        in_threads(calls, bench.threads)
        return memory.group_megabytes(pid, memory.WRITTEN)

    with dspy_settings(disable_history=True):
        before, own = ask(0, calls // 10), memory.megabytes(kinds=memory.WRITTEN)
        half, after = ask(calls // 10, calls // 2), ask(calls // 2, calls)
    return [
        Figure(f"engine's growth over {calls} calls", "MB", (after - before,), most=50),
        Figure("in the second half of them", "MB", (after - half,)),
        Figure(f"caller's growth over {calls} calls", "MB", (memory.megabytes(kinds=memory.WRITTEN) - own,), most=50),
    ]


@contextlib.contextmanager
def dspy_settings(**settings: Any) -> Any:
    """Sets DSPy's settings for every thread: ``dspy.context`` reaches only threads that DSPy starts."""
    before = {name: getattr(dspy.settings, name) for name in settings}
    dspy.configure(**settings)
    try:
        yield
    finally:
        dspy.configure(**before)
