"""What adapters cost plain ``LLM.generate`` beside base calls of the same engine."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from dspy_lora.bench.bench import Bench
from dspy_lora.bench.figure import Figure, ratios
from dspy_lora.bench.servers import Batch, RawVLLM, raw_vllm

_LEAST = {"one adapter": 0.90, "all adapters mixed": 0.88}  # of the base model's speed on a GPU, for this workload:
_WORKLOAD = ("8b", 12, 16)  # shape, adapters and their rank
_BASE = "base model"
_SOME = (4, 16)  # adapters in a batch of an engine that has more


def adapters(bench: Bench) -> list[Figure]:
    """Tokens a second with adapters and without."""
    workload = (bench.shape, len(bench.domains), bench.engine.get("max_lora_rank"))
    return _measure(bench, {}, "", _LEAST if workload == _WORKLOAD else {})


def vllm_lora(bench: Bench) -> list[Figure]:
    """The same with vLLM's own LoRA."""
    return _measure(bench, {"worker_cls": "auto"}, ", vLLM's own LoRA", {})


def _measure(bench: Bench, engine: dict[str, Any], name: str, least: dict[str, float]) -> list[Figure]:
    """Figures of one engine, which has the GPU to itself; the workload as it comes, none of it known."""
    figures = []
    with raw_vllm(bench.settings_alone(engine), bench.adapters) as raw:
        for tokens in bench.answers:
            speeds = _speeds(bench, raw, tokens)
            base = speeds.pop(_BASE)
            figures.append(Figure(f"{_BASE}, {tokens} tokens an answer{name}", "tokens/s", base))
            for what, values in speeds.items():
                bar = least.get(what) if raw.device == "cuda" else None
                figures.append(
                    Figure(bench.of_answers(f"{what} over base{name}", tokens), "x", ratios(values, base), least=bar)
                )
    return figures


def _speeds(bench: Bench, raw: RawVLLM, tokens: int) -> dict[str, tuple[float, ...]]:
    """Tokens a second of each kind of batch, in turns; the first turn, in which the engine warms up, is left out."""
    kinds = _kinds(bench)
    turns = [
        {kind: raw.tokens_a_second(batches(), tokens) for kind, batches in kinds.items()}
        for _ in range(bench.repeats + 1)
    ]
    return {kind: tuple(turn[kind] for turn in turns[1:]) for kind in kinds}


def _kinds(bench: Bench) -> dict[str, Callable[[], list[Batch]]]:
    """What is asked: the base model, one adapter, some and all of them in a batch, and all one after another."""
    refs = [bench.ref(domain) for domain in bench.domains]
    some = [number for number in _SOME if number < len(refs)]
    return {
        _BASE: functools.partial(_batch, bench, [None]),
        "one adapter": functools.partial(_batch, bench, refs[:1]),
        **{f"{number} adapters mixed": functools.partial(_batch, bench, refs[:number]) for number in some},
        "all adapters mixed": functools.partial(_batch, bench, refs),
        "all adapters one after another": functools.partial(_batches, bench, refs),
    }


def _batch(bench: Bench, adapters: Sequence[str | None]) -> list[Batch]:
    asked = bench.fresh()
    return [(asked, [adapters[place % len(adapters)] for place in range(len(asked))])]


def _batches(bench: Bench, adapters: Sequence[str]) -> list[Batch]:
    [(asked, names)] = _batch(bench, adapters)
    each = len(adapters)
    return [(asked[at::each], names[at::each]) for at in range(min(each, len(asked)))]
