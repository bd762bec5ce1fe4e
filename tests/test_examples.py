"""What README and examples/ show runs, in a process of its own as a user would start it."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.timeout(600)


def run(*words: str) -> str:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_quickstart_fits_a_screen_and_answers():
    assert len((ROOT / "examples/quickstart.py").read_text().splitlines()) <= 40
    out = run("examples/quickstart.py")
    assert "intent='card_arrival'" in out
    assert "city='London'" in out
    assert "clause='governing law'" in out


def test_the_pipeline_compares_its_stages(data_root, tmp_path):
    words = ["--domain", "marketing", "financial", "--rows", "8", "--seeds", "1", "--metric-calls", "100"]
    run("examples/pipeline.py", "--data-root", str(data_root / "domains"), *words, "--json", str(tmp_path / "f.json"))
    scores = json.loads((tmp_path / "f.json").read_text())["scores"]
    assert list(scores) == ["base", "adapter", "prompts", "adapter + prompts", "adapter + prompts + context"]
    assert sum(scores["adapter"]) >= 8 > sum(scores["base"])


def test_the_demo_answers_all_questions_twice():
    from dspy_lora.demo import QUESTIONS

    out = run("-m", "dspy_lora.cli", "demo")
    table = [line for line in out.splitlines() if line.split(" ")[0] in QUESTIONS]
    assert len(table) == sum(map(len, QUESTIONS.values()))
    assert "24 of 24 answers are the same" in out


def test_adaptive_tests_order_systems_as_all_items_do(monkeypatch):
    from dspy_lora.evaluation import simulate

    monkeypatch.syspath_prepend(ROOT / "examples")
    compare = importlib.import_module("irt_adaptive").compare
    tests, (asked, tau, at_random) = compare(simulate(13, 400, seed=0).responses, 0)
    assert len(tests) == 13
    assert all(len(test.scores) <= 100 for test in tests)
    assert asked <= 0.25
    assert tau >= 0.7
    assert 0 < at_random < 1
