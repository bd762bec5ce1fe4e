"""What adapters cost plain ``LLM.generate`` beside base calls of the same engine."""

from collections.abc import Callable, Sequence

from dspy_lora.bench.bench import Bench
from dspy_lora.bench.figure import Figure, ratios
from dspy_lora.bench.servers import Batch, RawVLLM, raw_vllm
from dspy_lora.bench.workload import Question

_BASE = "base model"
_LEAST = {"one adapter": 0.90, "12 adapters mixed": 0.88}  # of the base model's speed on a GPU, for the shape below
_SHAPE = "8b"


def adapters(bench: Bench) -> list[Figure]:
    """Tokens a second with adapters and without, with our LoRA and with vLLM's own."""
    figures = []
    for name, engine in (("", {}), (", vLLM's own LoRA", {"worker_cls": "auto"})):
        # One engine has the GPU to itself; the workload as it comes, none of it known.
        settings = bench.settings_with({"enable_prefix_caching": False} | engine, {"gpu_memory_utilization": 0.9})
        with raw_vllm(settings, bench.adapters) as raw:
            speeds = _speeds(bench, raw)
        barred = raw.device == "cuda" and bench.shape == _SHAPE and not engine
        base = speeds.pop(_BASE)
        figures.append(Figure(f"base model, engine with LoRA on{name}", "tokens/s", base))
        for what, values in speeds.items():
            least = _LEAST.get(what) if barred else None
            figures.append(Figure(f"{what} over base{name}", "x", ratios(values, base), least=least))
    return figures


def _speeds(bench: Bench, raw: RawVLLM) -> dict[str, tuple[float, ...]]:
    """Tokens a second of each kind of batch, in turns; the first turn, in which the engine warms up, is left out."""
    first = bench.ref(bench.domains[0])

    def one_after_another(asked: Sequence[Question]) -> list[Batch]:
        parts = ([each for each in asked if each.domain == domain] for domain in bench.domains)
        return [bench.own_adapters(part) for part in parts if part]

    count = len(bench.domains)
    kinds: dict[str, Callable[[Sequence[Question]], list[Batch]]] = {
        _BASE: lambda asked: [(asked, [None] * len(asked))],
        "one adapter": lambda asked: [(asked, [first] * len(asked))],
        f"{count} adapters mixed": lambda asked: [bench.own_adapters(asked)],
        f"{count} adapters one after another": one_after_another,
    }
    tokens = max(bench.answers)
    turns = [
        {kind: raw.tokens_a_second(batches(bench.fresh()), tokens) for kind, batches in kinds.items()}
        for _ in range(bench.repeats + 1)
    ]
    return {kind: tuple(turn[kind] for turn in turns[1:]) for kind in kinds}
