"""What a query and a training cost the domain classifier as domains become many: ``dspy-lora route --growth``."""

import random
import time
from collections.abc import Iterator, Sequence

import numpy as np

from dspy_lora.detection.classifier import DomainClassifier

_TEXTS = 10  # of a domain
_QUERIES = 500


def microseconds(classifier: DomainClassifier, texts: Sequence[str]) -> tuple[float, float]:
    """Median and 99th percentile of the time that one choice takes, in microseconds."""
    times = []
    for text in texts:
        began = time.perf_counter()
        classifier.choose(text)
        times.append((time.perf_counter() - began) * 1e6)
    return float(np.median(times)), float(np.quantile(times, 0.99))


def growth(texts: Sequence[str], counts: Sequence[int]) -> Iterator[str]:
    """One line for each number of domains, which are made up: ten of the texts each, so no choice means anything."""
    yield f"{'domains':>7} {'training, s':>12} {'a query, microseconds: median':>31} {'99 % below':>11}"
    chance = random.Random(0)
    for count in counts:
        began = time.perf_counter()
        classifier = DomainClassifier.train({f"domain {i}": chance.choices(texts, k=_TEXTS) for i in range(count)})
        training = time.perf_counter() - began
        median, most = microseconds(classifier, chance.choices(texts, k=_QUERIES))
        yield f"{count:>7} {training:>12.1f} {median:>31.0f} {most:>11.0f}"
