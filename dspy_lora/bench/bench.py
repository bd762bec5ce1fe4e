"""What the measurements share: LoRALMs of all adapters on one engine, and how they are asked."""

import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dspy_lora import LoRALM
from dspy_lora.bench.servers import Batch
from dspy_lora.bench.workload import Question, in_threads, questions
from dspy_lora.config import load_config
from dspy_lora.engine.settings import EngineSettings, engine_settings

SHORT_TOKENS = 16  # a label in DSPy's chat format
LONG_TOKENS = 64  # with reasoning
_SHARED, _ALONE = {"gpu_memory_utilization": 0.45}, {"gpu_memory_utilization": 0.9}  # two engines on a GPU, or one


class Bench:
    """A base model, its adapters and how they are asked.

    Args:
        model: The base model.
        engine: Engine settings that were asked for.
        calls: Calls a repeat.
        threads: Threads that call.
        repeats: Repeats of each measurement.
        words: Of a question's text.
        answers: Tokens of an answer, where a measurement does not set them.
        registry: Holds every adapter; None is the usual one.
        names: The adapters'; None takes the domains'.
        shape: What the model is made after, where its weights are random.
        beneath: Engine settings that hold where none was asked for.
    """

    def __init__(
        self,
        model: str,
        engine: dict[str, Any],
        calls: int,
        threads: int,
        repeats: int,
        words: tuple[int, int] = (30, 50),
        answers: Sequence[int] = (SHORT_TOKENS, LONG_TOKENS),
        registry: Path | None = None,
        names: Sequence[str] | None = None,
        shape: str | None = None,
        beneath: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.asked, self.beneath, self.registry = model, engine, _SHARED | (beneath or {}), registry
        self.calls, self.threads, self.repeats = calls, threads, repeats
        self.words, self.answers, self.shape = words, answers, shape
        self.domains = list(names or load_config().domains)
        self.lms = {domain: self.lm(domain) for domain in self.domains}
        self._seed = 0

    @property
    def engine(self) -> dict[str, Any]:
        """The engine's settings as LoRALM takes them."""
        return self.beneath | self.asked

    def lm(self, domain: str | None = None) -> LoRALM:
        """An LM of the engine, with DSPy's cache off and answers of a fixed length."""
        return LoRALM(
            self.model, domain=domain, engine=self.engine, registry=self.registry, cache=False, ignore_eos=True
        )

    def other(self, engine: dict[str, Any]) -> "Bench":
        """The same with an engine of other settings."""
        other = copy.copy(self)
        other.asked = self.asked | engine
        other.lms = {domain: other.lm(domain) for domain in self.domains}
        return other

    @property
    def settings(self) -> EngineSettings:
        """The engine's settings."""
        return self.settings_with({})

    def settings_with(self, engine: dict[str, Any]) -> EngineSettings:
        """The engine's settings but for some."""
        return engine_settings(self.first.base, load_config(), self.engine | engine)

    def settings_alone(self, engine: dict[str, Any]) -> EngineSettings:
        """The same where it has the GPU to itself, and knows no prompt: unless these were asked for."""
        usual = self.beneath | _ALONE | {"enable_prefix_caching": False}
        return engine_settings(self.first.base, load_config(), usual | self.asked | engine)

    @property
    def first(self) -> LoRALM:
        """The first adapter's LM."""
        return self.lms[self.domains[0]]

    @property
    def adapters(self) -> list[Any]:
        """The adapters' revisions."""
        return [lm.adapter for lm in self.lms.values()]

    @property
    def device(self) -> str:
        """vLLM's word for what the engine runs on: ``"cpu"``, ``"cuda"``; of a running one."""
        return str(self.first.engine_stats()["device"])

    def preload(self) -> None:
        """Starts the engine with all adapters."""
        for lm in self.lms.values():
            lm.preload()

    def close(self) -> None:
        """Ends the engine."""
        self.first.kill()

    def fresh(self, count: int | None = None) -> list[Question]:
        """Questions that were not asked before in this run."""
        self._seed += 1
        return questions(count or self.calls, self._seed, self.words, self.domains)

    def run(self, asked: Sequence[Question], call: Callable[[Question], Any]) -> float:
        """Seconds for all questions in this bench's threads."""
        return in_threads([functools.partial(call, question) for question in asked], self.threads)

    def of_answers(self, name: str, tokens: int) -> str:
        """A figure's name, with the answers' tokens where they have several lengths."""
        return f"{name}, {tokens} tokens an answer" if len(self.answers) > 1 else name

    def ref(self, domain: str) -> str:
        """The name under which the engine has an adapter."""
        revision = self.lms[domain].adapter
        assert revision is not None
        return revision.ref

    def own_adapters(self, asked: Sequence[Question]) -> Batch:
        """Each question for its own adapter."""
        return asked, [self.ref(question.domain) for question in asked]
