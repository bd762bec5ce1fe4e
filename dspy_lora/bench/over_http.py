"""LoRALM against ``dspy.LM("openai/...")`` and vLLM's server: what a call costs where the engine is not the limit."""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any, TypeAlias

import dspy

from dspy_lora.bench.bench import Bench
from dspy_lora.bench.figure import Figure, ratios
from dspy_lora.bench.servers import openai_server
from dspy_lora.bench.workload import Question

Costs: TypeAlias = dict[str, list[tuple[float, float]]]  # CPU milliseconds a call and calls a second, one a repeat

_OURS, _THEIRS = "LoRALM", "dspy.LM over HTTP"
_API_SERVERS = {"cuda": (1, 4)}  # processes of vLLM's server that speak HTTP; elsewhere one
_BLOCK = 32  # tokens of a block of the prefix cache; that of a GPU, 16, divides it
_MOST_CPU = 0.6  # of the CPU time over HTTP
_LEAST_CALLS, _LEAST_CALLS_OF = 1.3, {"0.6b": 1.5}  # of the calls a second over HTTP, and of a shape


def over_http(bench: Bench) -> list[Figure]:
    """The caller's CPU time and calls a second, against the number of API servers with which vLLM's is fastest.

    One token an answer, and prompts of which the prefix cache knows all but a token: the engine is not the limit.
    """
    asked = [_known_but_one(bench, question) for question in bench.fresh()]
    measured = {count: _in_turns(bench, asked, count) for count in _API_SERVERS.get(bench.device, (1,))}
    figures = []
    for count, costs in measured.items():
        with_count = f", {count} API servers" if len(measured) > 1 else ""
        for name, pairs in costs.items():
            cpu, rates = zip(*pairs, strict=True)
            figures.append(Figure(f"{name}{with_count}: CPU time of the caller", "ms/call", cpu))
            figures.append(Figure(f"{name}{with_count}: short answers", "calls/s", rates))
    return figures + compared(measured[fastest(measured)], bench.shape)


def fastest(measured: dict[int, Costs]) -> int:
    """The number of API servers with which vLLM's server answers most calls a second."""
    return max(measured, key=lambda count: statistics.median(rate for _, rate in measured[count][_THEIRS]))


def compared(costs: Costs, shape: str | None) -> list[Figure]:
    """LoRALM over HTTP, repeat by repeat, with the bars."""
    (our_cpu, our_rates), (their_cpu, their_rates) = (zip(*costs[name], strict=True) for name in (_OURS, _THEIRS))
    least = _LEAST_CALLS_OF.get(shape or "", _LEAST_CALLS)
    return [
        Figure("CPU time, LoRALM over HTTP", "x", ratios(our_cpu, their_cpu), most=_MOST_CPU),
        Figure("calls a second, LoRALM over HTTP", "x", ratios(our_rates, their_rates), least=least),
    ]


def _in_turns(bench: Bench, asked: Sequence[Question], api_servers: int) -> Costs:
    measured: Costs = {_OURS: [], _THEIRS: []}
    with openai_server(bench.settings, bench.adapters, api_servers) as address:
        ours = {domain: lm.copy(max_tokens=1) for domain, lm in bench.lms.items()}
        theirs = {domain: _http_lm(bench.ref(domain), address) for domain in bench.domains}
        for repeat in range(bench.repeats + 1):
            for name, lms in zip(measured, (ours, theirs), strict=True):
                cost = _cost(bench, asked, lms)
                if repeat:  # the first one fills the prefix cache
                    measured[name].append(cost)
    return measured


def _known_but_one(bench: Bench, question: Question) -> Question:
    """The question with words at its end, so that one token of the prompt stands after the last full block."""
    lm = bench.lms[question.domain].copy(max_tokens=1)
    lm(question.prompt)
    words = (1 - lm.history[-1]["usage"]["prompt_tokens"]) % _BLOCK
    *first, last = question.messages
    return dataclasses.replace(question, messages=[*first, last | {"content": last["content"] + " a" * words}])


def _http_lm(name: str, address: str) -> dspy.LM:
    return dspy.LM(f"openai/{name}", api_base=address, api_key="none", cache=False, temperature=0.0, max_tokens=1)


def _cost(bench: Bench, asked: Sequence[Question], lms: dict[str, Any]) -> tuple[float, float]:
    """CPU milliseconds of this process a call, and calls a second."""
    began = time.process_time()
    seconds = bench.run(asked, lambda question: lms[question.domain](question.prompt))
    return (time.process_time() - began) * 1e3 / len(asked), len(asked) / seconds
