"""LoRAGEPA on the real engine where there is nothing to gain: copies of one adapter, and a metric of noise."""

import json
from zlib import crc32

import dspy
import pytest
from dspy_lora.optimizers import LoRAGEPA

from dspy_lora import AdapterRegistry

COPIES = ("first", "second", "third")


@pytest.fixture(scope="module")
def rows(data_root):
    """Contract clauses: 40 to train on, 40 to validate on, 40 to test on."""
    folder = data_root / "domains/legal/cuad"
    lines = [line for name in ("train", "dev") for line in (folder / f"{name}.jsonl").read_text().splitlines()[:60]]
    found = [dspy.Example(json.loads(line)).with_inputs("text") for line in lines]
    return found[:40], found[40:80], found[80:]


@pytest.fixture(scope="module")
def lm(make_lm, tmp_path_factory):
    """A LoRALM whose adapters are one under three names."""
    registry = AdapterRegistry(tmp_path_factory.mktemp("copies"), base="seedling")
    legal = AdapterRegistry(base="seedling").resolve("legal")
    for name in COPIES:
        registry.publish(legal.path, name)
    return make_lm(domain="first", registry=registry.root, cache=True, max_tokens=48)


def right(gold, pred, trace=None, pred_name=None, pred_trace=None):
    return float(pred.label == gold.label)


def compiled(lm, rows, metric):
    student = dspy.Predict("text -> label")
    student.set_lm(lm)
    optimizer = LoRAGEPA(metric, lm=lm, max_metric_calls=300, num_threads=16, seed=0)
    return student, optimizer.compile(student, trainset=rows[0], valset=rows[1])


def test_copies_of_one_adapter_are_not_told_apart(lm, rows):
    student, program = compiled(lm, rows, right)
    assert program.lm.model == student.lm.model
    evaluate = dspy.Evaluate(devset=rows[2], metric=right, num_threads=16)
    assert evaluate(program).score == evaluate(student).score > 40


def test_a_metric_of_noise_changes_nothing(lm, rows):
    def noise(gold, pred, trace=None, pred_name=None, pred_trace=None):
        return float(crc32(f"{gold.text} {pred.label}".encode()) % 2)

    student, program = compiled(lm, rows, noise)
    assert program.lm.model == student.lm.model
    assert program.signature.instructions == student.signature.instructions
