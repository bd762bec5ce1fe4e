"""The main job on real rows: every bundled adapter answers test rows of its domain, all in one mixed batch."""

import json

import dspy
import pytest

from dspy_lora import LoRALM
from dspy_lora.config import load_config
from dspy_lora.evaluation.answers import THREADS, side_by_side

ROWS = 100  # of each domain: a batch of 1,200 calls

# Exact match that an adapter must reach on these rows: the model card's figure less two standard errors of 100 rows.
FLOORS = {
    "financial": 0.80,
    "legal": 0.60,
    "healthcare": 0.80,
    "marketing": 0.85,
    "manufacturing": 0.48,
    "real_estate": 0.85,
    "education": 0.45,
    "analytics": 0.60,
    "operations": 0.65,
    "customer_service": 0.68,
    "research": 0.70,
    "specialized": 0.60,
}

pytestmark = pytest.mark.timeout(900)


def test_adapters_reach_their_figures_on_real_rows_in_one_mixed_batch(data_root, example):
    scores = example("domain_scores")
    config = load_config()
    base = LoRALM("seedling", max_tokens=100)
    rows = {}
    for domain in FLOORS:
        path = data_root / "domains" / str(config.domain(domain).data) / "test.jsonl"
        rows[domain] = [json.loads(line) for line in path.read_text().splitlines()[:ROWS]]
    programs = {domain: scores.program(domain, base.copy(domain=domain)) for domain in FLOORS}
    asked = [(domain, row) for at in range(ROWS) for domain in FLOORS for row in rows[domain][at : at + 1]]
    with dspy.context(adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)):
        given = side_by_side(scores.answer, [(programs[domain], row["text"]) for domain, row in asked], THREADS)
    hits = dict.fromkeys(FLOORS, 0)
    for (domain, row), label in zip(asked, given, strict=True):
        hits[domain] += label == row["label"]
    reached = {domain: hits[domain] / len(rows[domain]) for domain in FLOORS}
    assert all(reached[domain] >= FLOORS[domain] for domain in FLOORS), reached
    resident = base.engine_stats()["adapters"]
    base.kill()
    assert set(resident) >= {programs[domain].lm.adapter.ref for domain in FLOORS}
