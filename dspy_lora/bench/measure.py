"""One function a measurement. Each compares within one run, in turns, and returns figures with their spread."""

import contextlib
import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import dspy

from dspy_lora import LoRALM
from dspy_lora.bench import memory
from dspy_lora.bench.endings import seconds_to_end
from dspy_lora.bench.servers import RawVLLM, openai_server, raw_vllm
from dspy_lora.bench.workload import AnyText, Question, in_threads, questions, signature
from dspy_lora.config import load_config
from dspy_lora.engine.settings import EngineSettings, engine_settings

Batch: TypeAlias = tuple[Sequence[Question], Sequence[str | None]]  # and the adapter of each; None: the base model

_SHORT_TOKENS = 16  # a label in DSPy's chat format
_LONG_TOKENS = 64  # with reasoning
_SOAK_CALLS = 20_000
_LEAST = {"one adapter": 0.90, "twelve mixed": 0.88}  # of the base model's speed on a GPU
_BLOCK = 32  # tokens of a block of the prefix cache; that of a GPU, 16, divides it
# What vLLM does on a CPU where dspy-lora's engine does not: environment and engine settings.
_VLLM_DEFAULTS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "OpenMP's threads spin long": ({"GOMP_SPINCOUNT": "300000"}, {}),  # the OpenMP of GCC, where nothing is set
    "OpenMP's threads sleep at once": ({"GOMP_SPINCOUNT": "0"}, {}),
    "one core kept free": ({"VLLM_CPU_NUM_OF_RESERVED_CPU": "1"}, {}),
    "worker in a process of its own": ({"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}, {}),
    "blocks of 128 tokens": ({}, {"block_size": 128}),
    "the weights' own number format": ({}, {"dtype": "auto"}),
    "vLLM's own LoRA path": ({}, {"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}),
}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A measured figure.

    Attributes:
        name: What it is.
        unit: Of its values; ``"x"`` for ratios.
        values: One a repeat.
        least: It is to be at least this, at the median.
        most: It is to be at most this, at the median.
    """

    name: str
    unit: str
    values: tuple[float, ...]
    least: float | None = None
    most: float | None = None

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    @property
    def holds(self) -> bool | None:
        """Whether the bar holds; None without a bar."""
        if self.least is None and self.most is None:
            return None
        return (self.least is None or self.median >= self.least) and (self.most is None or self.median <= self.most)


class Bench:
    """What the measurements share: LoRALMs of all domains on one engine, and what they are compared with.

    Args:
        model: The base model.
        engine: Engine settings.
        calls: Calls a repeat.
        threads: Threads that call.
        repeats: Repeats of each measurement.
        words: Of a question's text.
        answers: Tokens of an answer, where a measurement does not set them.
        registry: Holds an adapter for every domain; None is the usual one.
    """

    def __init__(
        self,
        model: str,
        engine: dict[str, Any],
        calls: int,
        threads: int,
        repeats: int,
        words: tuple[int, int] = (30, 50),
        answers: Sequence[int] = (_SHORT_TOKENS, _LONG_TOKENS),
        registry: Path | None = None,
    ) -> None:
        self.model, self.engine, self.registry = model, engine, registry
        self.calls, self.threads, self.repeats = calls, threads, repeats
        self.words, self.answers = words, answers
        self.domains = list(load_config().domains)
        self.lms = {domain: self.lm(domain) for domain in self.domains}
        self._seed = 0

    def lm(self, domain: str | None = None) -> LoRALM:
        """An LM of the engine, with DSPy's cache off and answers of a fixed length."""
        return LoRALM(
            self.model, domain=domain, engine=self.engine, registry=self.registry, cache=False, ignore_eos=True
        )

    @property
    def settings(self) -> EngineSettings:
        """The engine's settings."""
        return self.settings_with({})

    def settings_with(self, engine: dict[str, Any]) -> EngineSettings:
        """The engine's settings but for some."""
        return engine_settings(self.lms[self.domains[0]].base, load_config(), self.engine | engine)

    @property
    def adapters(self) -> list[Any]:
        """The adapters' revisions."""
        return [lm.adapter for lm in self.lms.values()]

    def preload(self) -> None:
        """Starts the engine with all adapters."""
        for lm in self.lms.values():
            lm.preload()

    def close(self) -> None:
        """Ends the engine."""
        self.lms[self.domains[0]].kill()

    def fresh(self, count: int | None = None) -> list[Question]:
        """Questions that were not asked before in this run."""
        self._seed += 1
        return questions(count or self.calls, self._seed, self.words)

    def run(self, asked: Sequence[Question], call: Callable[[Question], Any]) -> float:
        """Seconds for all questions in this bench's threads."""
        return in_threads([functools.partial(call, question) for question in asked], self.threads)


def throughput(bench: Bench) -> list[Figure]:
    """Output tokens a second of DSPy programs in threads against plain ``LLM.generate``, twelve adapters mixed."""
    figures = []
    with raw_vllm(bench.settings, bench.adapters) as raw, dspy_settings(adapter=AnyText()):
        for tokens in bench.answers:
            programs = {domain: _program(bench, domain, max_tokens=tokens) for domain in bench.domains}
            _raw_tokens_a_second(raw, [_own_adapters(bench, bench.fresh(24))], tokens)
            bench.run(bench.fresh(24), lambda question: programs[question.domain](text=question.text))  # noqa: B023
            plain, through = [], []
            for _ in range(bench.repeats):
                asked = bench.fresh()
                plain.append(_raw_tokens_a_second(raw, [_own_adapters(bench, asked)], tokens))
                seconds = bench.run(asked, lambda question: programs[question.domain](text=question.text))  # noqa: B023
                through.append(tokens * len(asked) / seconds)
            figures += [
                Figure(f"plain LLM.generate, {tokens} tokens an answer", "tokens/s", tuple(plain)),
                Figure(f"DSPy programs, {tokens} tokens an answer", "tokens/s", tuple(through)),
                Figure("DSPy over plain", "x", _ratios(through, plain), least=0.95),
            ]
    return figures


def _program(bench: Bench, domain: str, **kwargs: Any) -> dspy.Predict:
    program = dspy.Predict(signature(domain))
    program.lm = bench.lms[domain].copy(**kwargs)
    return program


def _raw_tokens_a_second(raw: RawVLLM, batches: Sequence[Batch], tokens: int) -> float:
    """Output tokens a second of plain vLLM over batches that follow each other."""
    sampling = {"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True}
    done = [raw.generate([each.messages for each in asked], adapters, sampling) for asked, adapters in batches]
    return sum(part["tokens"] for part in done) / float(sum(part["seconds"] for part in done))


def _ref(bench: Bench, domain: str) -> str:
    revision = bench.lms[domain].adapter
    assert revision is not None
    return revision.ref


def _own_adapters(bench: Bench, asked: Sequence[Question]) -> Batch:
    return asked, [_ref(bench, question.domain) for question in asked]


def adapters(bench: Bench) -> list[Figure]:
    """What adapters cost plain ``LLM.generate`` beside base calls of the same engine, with our LoRA and with vLLM's."""
    figures = []
    for name, engine in (("", {}), (", vLLM's own LoRA", {"worker_cls": "auto"})):
        # One engine has the GPU to itself; the workload as it comes, none of it known.
        alone = {"gpu_memory_utilization": 0.9, "enable_prefix_caching": False}
        with raw_vllm(bench.settings_with(alone | engine), bench.adapters) as raw:
            speeds = _speeds_by_adapters(bench, raw)
        base = speeds.pop("base model")
        figures.append(Figure(f"base model{name}", "tokens/s", base))
        for what, values in speeds.items():
            least = _LEAST.get(what) if raw.device == "cuda" and not engine else None
            figures.append(Figure(f"{what} over base{name}", "x", _ratios(values, base), least=least))
    return figures


def _speeds_by_adapters(bench: Bench, raw: RawVLLM) -> dict[str, tuple[float, ...]]:
    """Tokens a second of each kind of batch, in turns; the first turn, in which the engine warms up, is left out."""
    first = _ref(bench, bench.domains[0])

    def one_after_another(asked: Sequence[Question]) -> list[Batch]:
        parts = ([each for each in asked if each.domain == domain] for domain in bench.domains)
        return [_own_adapters(bench, part) for part in parts if part]

    kinds: dict[str, Callable[[Sequence[Question]], list[Batch]]] = {
        "base model": lambda asked: [(asked, [None] * len(asked))],
        "one adapter": lambda asked: [(asked, [first] * len(asked))],
        "twelve mixed": lambda asked: [_own_adapters(bench, asked)],
        "twelve one after another": one_after_another,
    }
    tokens = max(bench.answers)
    turns = [
        {kind: _raw_tokens_a_second(raw, batches(bench.fresh()), tokens) for kind, batches in kinds.items()}
        for _ in range(bench.repeats + 1)
    ]
    return {kind: tuple(turn[kind] for turn in turns[1:]) for kind in kinds}


def over_http(bench: Bench) -> list[Figure]:
    """The caller's CPU time and calls a second against ``dspy.LM("openai/...")`` and vLLM's server.

    One token an answer, and prompts of which the prefix cache knows all but a token: the engine is not the limit.
    """
    asked = [_known_but_one(bench, question) for question in bench.fresh()]
    with openai_server(bench.settings, bench.adapters) as address:
        ours = {domain: lm.copy(max_tokens=1) for domain, lm in bench.lms.items()}
        theirs = {domain: _http_lm(lm, address) for domain, lm in bench.lms.items()}
        measured: dict[str, list[tuple[float, float]]] = {"LoRALM": [], "dspy.LM over HTTP": []}
        for repeat in range(bench.repeats + 1):
            for name, lms in zip(measured, (ours, theirs), strict=True):
                cost = _cost(bench, asked, lms)
                if repeat:  # the first one fills the prefix cache
                    measured[name].append(cost)
    figures = []
    for name, costs in measured.items():
        figures.append(Figure(f"{name}: CPU time of the caller", "ms/call", tuple(cpu for cpu, _ in costs)))
        figures.append(Figure(f"{name}: short answers", "calls/s", tuple(rate for _, rate in costs)))
    (our_cpu, our_rates), (their_cpu, their_rates) = (zip(*costs, strict=True) for costs in measured.values())
    return [
        *figures,
        Figure("CPU time, LoRALM over HTTP", "x", _ratios(our_cpu, their_cpu), most=0.6),
        Figure("calls a second, LoRALM over HTTP", "x", _ratios(our_rates, their_rates), least=1.3),
    ]


def _known_but_one(bench: Bench, question: Question) -> Question:
    """The question with words at its end, so that one token of the prompt stands after the last full block."""
    lm = bench.lms[question.domain].copy(max_tokens=1)
    lm(question.prompt)
    words = (1 - lm.history[-1]["usage"]["prompt_tokens"]) % _BLOCK
    *first, last = question.messages
    return dataclasses.replace(question, messages=[*first, last | {"content": last["content"] + " a" * words}])


def _http_lm(lm: LoRALM, address: str) -> dspy.LM:
    name = lm.adapter.ref if lm.adapter else lm.base.name
    return dspy.LM(f"openai/{name}", api_base=address, api_key="none", cache=False, temperature=0.0, max_tokens=1)


def _cost(bench: Bench, asked: Sequence[Question], lms: dict[str, Any]) -> tuple[float, float]:
    """CPU milliseconds of this process a call, and calls a second."""
    began = time.process_time()
    seconds = bench.run(asked, lambda question: lms[question.domain](question.prompt))
    return (time.process_time() - began) * 1e3 / len(asked), len(asked) / seconds


def samples(bench: Bench) -> list[Figure]:
    """Eight samples of a call against one."""
    one, eight = [], []
    lm = bench.lms[bench.domains[0]].copy(max_tokens=_LONG_TOKENS, temperature=1.0)
    for question in bench.fresh(bench.repeats):
        lm(question.prompt)  # the prompt is in the prefix cache from here on
        one.append(_seconds(lambda: lm(question.prompt)))  # noqa: B023
        eight.append(_seconds(lambda: lm(question.prompt, n=8)))  # noqa: B023
    return [
        Figure(f"n=1, {_LONG_TOKENS} tokens", "s", tuple(one)),
        Figure(f"n=8, {_LONG_TOKENS} tokens each", "s", tuple(eight)),
        Figure("n=8 over n=1", "x", _ratios(eight, one), most=2.0),
    ]


def mixed(bench: Bench) -> list[Figure]:
    """Calls to twelve adapters in one batch against one adapter after another."""
    together, in_turn = [], []
    lms = {domain: lm.copy(max_tokens=_SHORT_TOKENS) for domain, lm in bench.lms.items()}

    def ask(question: Question) -> Any:
        return lms[question.domain](question.prompt)

    for _ in range(bench.repeats):
        together.append(bench.run(bench.fresh(), ask))
        asked = bench.fresh()
        in_turn.append(
            sum(
                bench.run([question for question in asked if question.domain == domain], ask)
                for domain in bench.domains
            )
        )
    return [Figure("twelve adapters mixed, speed over one after another", "x", _ratios(in_turn, together))]


def defaults(bench: Bench) -> list[Figure]:
    """Each default of the engine on a CPU against what vLLM does there; every line starts engines of its own.

    The engine as it is runs before and after each other one; its spread is what a ratio must exceed to mean something.
    """
    figures, before = [], _speeds(bench, {}, {})
    usual = [before]
    for name, (environment, engine) in _VLLM_DEFAULTS.items():
        other, after = _speeds(bench, environment, engine), _speeds(bench, {}, {})
        ratios = [tuple(ours / theirs for ours in pair) for *pair, theirs in zip(before, after, other, strict=True)]
        for what, ratio in zip(_SPEEDS, ratios, strict=True):
            figures.append(Figure(f"over {name}: {what}", "x", ratio))
        before = after
        usual.append(after)
    for what, values in zip(_SPEEDS, zip(*usual, strict=True), strict=True):
        figures.append(Figure(f"as it is: {what}", "calls/s", values))
    return figures


_SPEEDS = (f"{_SHORT_TOKENS} tokens, new prompts", "1 token, known prompts")


def _speeds(bench: Bench, environment: dict[str, str], engine: dict[str, Any]) -> tuple[float, float]:
    """Calls a second of a new engine, twelve adapters mixed, as named in ``_SPEEDS``."""
    with _environment(environment):
        other = Bench(bench.model, bench.engine | engine, bench.calls, bench.threads, 1, registry=bench.registry)
        try:
            other.preload()
            lms = {
                tokens: {d: lm.copy(max_tokens=tokens) for d, lm in other.lms.items()} for tokens in (1, _SHORT_TOKENS)
            }

            def calls_a_second(tokens: int, asked: Sequence[Question]) -> float:
                return len(asked) / other.run(asked, lambda question: lms[tokens][question.domain](question.prompt))

            calls_a_second(_SHORT_TOKENS, questions(24, -1))
            asked = questions(bench.calls, -2)
            return calls_a_second(_SHORT_TOKENS, asked), calls_a_second(1, asked)
        finally:
            other.close()


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


def engine_memory(bench: Bench) -> list[Figure]:
    """The engine's memory over all its processes with all adapters, after calls that filled the KV cache."""
    bench.run(bench.fresh(max(bench.calls, 768)), lambda q: bench.lms[q.domain](q.prompt, max_tokens=1))
    pid = bench.lms[bench.domains[0]].engine_stats()["pid"]
    return [Figure("engine with all adapters, PSS of its processes", "MB", (memory.group_megabytes(pid),), most=4295)]


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
    """Growth of the engine over many calls, after a tenth of them has filled the KV cache and the allocators."""
    pid = bench.lms[bench.domains[0]].engine_stats()["pid"]
    lms = [lm.copy(max_tokens=1) for lm in bench.lms.values()]

    def ask(first: int, last: int) -> float:
        calls = [functools.partial(lms[index % len(lms)], f"Question {index}.") for index in range(first, last)]
        in_threads(calls, bench.threads)
        return memory.group_megabytes(pid)

    with dspy_settings(disable_history=True):
        before, own = ask(0, calls // 10), memory.megabytes()
        after = ask(calls // 10, calls)
    return [
        Figure(f"engine's growth over {calls} calls", "MB", (after - before,), most=50),
        Figure(f"caller's growth over {calls} calls", "MB", (memory.megabytes() - own,), most=50),
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


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _ratios(above: Sequence[float], below: Sequence[float]) -> tuple[float, ...]:
    return tuple(over / under for over, under in zip(above, below, strict=True))
