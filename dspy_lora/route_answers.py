"""Routing end to end: answers of the routed adapter, of the right one, and of the base model, on a mix of domains."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dspy
from dspy.evaluate.evaluate import EvaluationResult

from dspy_lora.config import Config
from dspy_lora.detection.classifier import DomainClassifier
from dspy_lora.evaluation.ablation import Ablation
from dspy_lora.evaluation.responses import Responses
from dspy_lora.lm import LoRALM
from dspy_lora.pipeline import DomainPipeline
from dspy_lora.training.data import Row

BASE, ROUTED, ORACLE = "base", "routed adapter", "right adapter"
_DOMAIN = "domain"
_MAX_TOKENS = 100


def _lm(domain: str | None) -> LoRALM:
    return LoRALM(domain=domain, max_tokens=_MAX_TOKENS, cache=False)


class Told(dspy.Module):
    """Answers with the program and the LM of a domain that it is told."""

    def __init__(self, programs: Mapping[str, dspy.Predict], lms: Mapping[str, dspy.BaseLM]) -> None:
        super().__init__()
        self._programs, self._lms = programs, lms

    def forward(self, domain: str, **inputs: Any) -> Any:
        """The domain's answer."""
        with dspy.context(lm=self._lms[domain]):
            return self._programs[domain](**inputs)


class Routed(dspy.Module):
    """Answers without looking at the domain."""

    def __init__(self, pipeline: DomainPipeline) -> None:
        super().__init__()
        self._pipeline = pipeline

    def forward(self, domain: str, **inputs: Any) -> Any:
        """The pipeline's answer."""
        return self._pipeline(**inputs)


def answers(
    config: Config,
    rows: Mapping[str, Sequence[Row]],
    classifier: DomainClassifier,
    threshold: float | None = None,
    *,
    make_lm: Callable[..., dspy.BaseLM] = _lm,
    num_threads: int = 64,
) -> Ablation:
    """Asks every row of a shuffled mix.

    The routed adapter gets its own domain's task, right or wrong; the base model gets the right one, but for a row that
    the route leaves to it, which has the fields of the first domain's task and none of its words.

    Args:
        config: Names the domains' tasks.
        rows: Rows of each domain, with every field of its task.
        classifier: Routes.
        threshold: Smallest margin at which an adapter is chosen; None takes the classifier's.
        make_lm: Called as ``LoRALM`` with ``domain``.
        num_threads: Calls side by side.

    Returns:
        Exact match of the base, the routed and the right adapter.
    """
    signatures = {name: config.domain(name).signature() for name in rows}
    programs = {name: dspy.Predict(signature) for name, signature in signatures.items()}
    devset = [
        dspy.Example({**row, _DOMAIN: name}).with_inputs(_DOMAIN, *signatures[name].input_fields)
        for name, found in rows.items()
        for row in found
    ]
    random.Random(0).shuffle(devset)
    plain = dspy.Predict(next(iter(signatures.values())).signature)
    pipeline = DomainPipeline(
        list(rows), plain, compiled=programs, classifier=classifier, threshold=threshold, make_lm=make_lm
    )
    base, lms = make_lm(domain=None), pipeline.router.adapters
    systems = {
        BASE: Told(programs, dict.fromkeys(rows, base)),
        ROUTED: Routed(pipeline),
        ORACLE: Told(programs, lms),
    }

    def right(example: dspy.Example, found: dspy.Prediction, trace: Any = None) -> float:
        return float(all(found.get(name) == example[name] for name in signatures[example[_DOMAIN]].output_fields))

    evaluate = dspy.Evaluate(
        devset=devset, metric=right, num_threads=num_threads, display_progress=False, max_errors=len(devset) + 1
    )
    results: dict[str, EvaluationResult] = {name: evaluate(system) for name, system in systems.items()}
    return Ablation.of(Responses.from_evaluations(results), {})
