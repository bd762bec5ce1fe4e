"""Each default of the engine beside another choice: what a setting brings on this machine."""

import contextlib
import os
import statistics
from collections.abc import Sequence
from typing import Any, TypeAlias

from dspy_lora.bench.bench import SHORT_TOKENS, Bench
from dspy_lora.bench.figure import Figure
from dspy_lora.bench.latency import LONE_PROMPTS, first_and_further, plain
from dspy_lora.bench.servers import raw_vllm
from dspy_lora.bench.workload import Question, questions

Others: TypeAlias = dict[str, tuple[dict[str, str], dict[str, Any]]]  # environment and engine settings of each

# What vLLM does on a CPU where dspy-lora's engine does not.
_ON_CPU: Others = {
    "OpenMP's threads spin long": ({"GOMP_SPINCOUNT": "300000"}, {}),  # the OpenMP of GCC, where nothing is set
    "OpenMP's threads sleep at once": ({"GOMP_SPINCOUNT": "0"}, {}),
    "one core kept free": ({"VLLM_CPU_NUM_OF_RESERVED_CPU": "1"}, {}),
    "worker in a process of its own": ({"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}, {}),
    "blocks of 128 tokens": ({}, {"block_size": 128}),
    "the weights' own number format": ({}, {"dtype": "auto"}),
    "vLLM's own LoRA path": ({}, {"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}),
}
_ON_GPU: Others = {
    "vLLM's own LoRA kernels, warm-up and loading": ({}, {"worker_cls": "auto"}),
    "graphs of up to 512 tokens": ({}, {"max_cudagraph_capture_size": 512}),
    "two CUDA streams": ({"VLLM_LORA_ENABLE_DUAL_STREAM": "1"}, {}),
    "graphs by the number of active adapters": ({}, {"specialize_active_lora": True}),
    "128 requests at once": ({}, {"max_num_seqs": 128}),
}
_CPU_SPEEDS = (f"{SHORT_TOKENS} tokens, new prompts", "1 token, known prompts")
_GPU_SPEEDS = ("first batch", "batches, adapters mixed", "first tokens, one request", "further tokens, one request")


def defaults(bench: Bench) -> list[Figure]:
    """What the engine's defaults bring over other choices; every line starts engines of its own."""
    import torch

    return _on_gpu(bench) if torch.cuda.is_available() else _on_cpu(bench)


def _on_cpu(bench: Bench) -> list[Figure]:
    """Against what vLLM does on a CPU.

    The engine as it is runs before and after each other one; its spread is what a ratio must exceed to mean something.
    """
    figures, before = [], _cpu_speeds(bench, {}, {})
    usual = [before]
    for name, (environment, engine) in _ON_CPU.items():
        other, after = _cpu_speeds(bench, environment, engine), _cpu_speeds(bench, {}, {})
        figures += _over(name, _CPU_SPEEDS, [before, after], other)
        before = after
        usual.append(after)
    return figures + _as_it_is(_CPU_SPEEDS, "calls/s", usual)


def _on_gpu(bench: Bench) -> list[Figure]:
    """Against other choices on a GPU, where the engine as it is runs first and last."""
    first = _gpu_speeds(bench, {}, {})
    others = {name: _gpu_speeds(bench, *other) for name, other in _ON_GPU.items()}
    usual = [first, _gpu_speeds(bench, {}, {})]
    figures = [figure for name, other in others.items() for figure in _over(name, _GPU_SPEEDS, usual, other)]
    return figures + _as_it_is(_GPU_SPEEDS, "tokens/s", usual)


def _over(name: str, speeds: Sequence[str], usual: Sequence[Sequence[float]], other: Sequence[float]) -> list[Figure]:
    """How many times as fast the engine as it is was, each time, as another one."""
    times = zip(*usual, strict=True)
    return [
        Figure(f"over {name}: {what}", "x", tuple(ours / theirs for ours in values))
        for what, values, theirs in zip(speeds, times, other, strict=True)
    ]


def _as_it_is(speeds: Sequence[str], unit: str, usual: Sequence[Sequence[float]]) -> list[Figure]:
    times = zip(*usual, strict=True)
    return [Figure(f"as it is: {what}", unit, tuple(values)) for what, values in zip(speeds, times, strict=True)]


def _cpu_speeds(bench: Bench, environment: dict[str, str], engine: dict[str, Any]) -> tuple[float, float]:
    """Calls a second of a new engine, twelve adapters mixed, as named in ``_CPU_SPEEDS``."""
    with _environment(environment):
        other = bench.other(engine)
        try:
            other.preload()
            lms = {
                tokens: {d: lm.copy(max_tokens=tokens) for d, lm in other.lms.items()} for tokens in (1, SHORT_TOKENS)
            }

            def calls_a_second(tokens: int, asked: Sequence[Question]) -> float:
                return len(asked) / other.run(asked, lambda question: lms[tokens][question.domain](question.prompt))

            calls_a_second(SHORT_TOKENS, questions(24, -1, bench.words, bench.domains))
            asked = questions(bench.calls, -2, bench.words, bench.domains)
            return calls_a_second(SHORT_TOKENS, asked), calls_a_second(1, asked)
        finally:
            other.close()


def _gpu_speeds(bench: Bench, environment: dict[str, str], engine: dict[str, Any]) -> tuple[float, ...]:
    """Output tokens a second of plain vLLM under a new engine's settings, as named in ``_GPU_SPEEDS``."""
    tokens = max(2, *bench.answers)
    with _environment(environment), raw_vllm(bench.settings_alone(engine), bench.adapters) as raw:
        batches = [raw.tokens_a_second([bench.own_adapters(bench.fresh())], tokens) for _ in range(bench.repeats + 1)]
        lone = plain(raw, bench.ref(bench.domains[0]))
        first, further = first_and_further(bench.fresh(2 * LONE_PROMPTS), lone, tokens)
    return batches[0], statistics.median(batches[1:]), 1e3 / first, 1e3 / further


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Any:
    """Sets variables of the environment, which an engine that starts inherits."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
