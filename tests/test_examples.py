"""What README and examples/ show runs, in a process of its own as a user would start it."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import dspy
import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.timeout(600)


def run(*words: str) -> str:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def write_set(folder: Path, *splits: str) -> None:
    folder.mkdir(parents=True)
    for split in splits:
        rows = [{"text": f"word{i} text", "label": "ab"[i % 2]} for i in range(4)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


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


def test_adaptive_tests_order_systems_as_all_items_do(example):
    from dspy_lora.evaluation import simulate

    compare = example("irt_adaptive").compare
    tests, (asked, tau, at_random) = compare(simulate(13, 400, seed=0).responses, 0)
    assert len(tests) == 13
    assert all(len(test.scores) <= 100 for test in tests)
    assert asked <= 0.25
    assert tau >= 0.7
    assert 0 < at_random < 1


def test_the_bundled_systems_are_measured_whatever_the_user_has_published(example, monkeypatch, tmp_path):
    from dspy_lora.adapters.base import resolve_base
    from dspy_lora.adapters.registry import PACKAGED_ROOT, AdapterRegistry

    education = AdapterRegistry(PACKAGED_ROOT).resolve("education")
    for name in ("legal", "tickets"):
        AdapterRegistry(tmp_path / "adapters").publish(education.path, name, base=resolve_base("seedling"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DSPY_LORA_BASE_MODEL", str(tmp_path))
    write_set(tmp_path / "legal/cuad", "train", "dev", "test")
    asked = []
    adaptive = example("irt_adaptive")
    monkeypatch.setattr(adaptive, "ask", lambda lm, *_: asked.append(lm) or [SimpleNamespace(right=True)] * 4)
    assert len(adaptive.answers(4, 0).systems) == 13
    scores = example("domain_scores", "--data-root", tmp_path, "--domain", "legal", "--json", "new/scores.json")
    monkeypatch.setattr(scores, "side_by_side", lambda _, pairs, __: asked.extend(p.lm for p, _ in pairs) or ["a"] * 8)
    scores.main()
    assert {lm.base.name for lm in asked} == {"seedling"}
    found = {lm.adapter.path.parents[1] for lm in asked if lm.adapter}
    assert (found, len(asked)) == ({PACKAGED_ROOT}, 13 + 8)
    assert json.loads((tmp_path / "new/scores.json").read_text())[0]["adapter"] == 0.5


def test_a_set_without_dev_rows_is_refused_before_anything_is_asked(example, monkeypatch, tmp_path):
    from dspy_lora.errors import DataError

    write_set(tmp_path / "legal/cuad", "train", "test")
    scores = example("domain_scores", "--data-root", tmp_path, "--domain", "legal")
    monkeypatch.setattr(scores, "side_by_side", lambda *_: pytest.fail("asked"))
    with pytest.raises(DataError, match=r"dev\.jsonl cannot be read"):
        scores.main()


@pytest.mark.parametrize("error", ["AdapterParseError", "ContextWindowExceededError"])
def test_a_row_without_an_answer_is_wrong_and_ends_nothing(example, error):
    def program(text):
        kind = getattr(dspy.utils.exceptions, error)
        raise kind("ChatAdapter", dspy.Signature("text -> label"), "") if "Parse" in error else kind()

    assert example("domain_scores").answer(program, "a text") == ""


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("ace_playbook", ["--seeds", "0"], "at least 1"),
        ("classical_baseline", ["--data-root", ".", "--domain", "leagl"], "Did you mean 'legal'"),
        ("classical_baseline", ["--data-root", ".", "--domain", "operations"], "texts to produce"),
        ("classical_baseline", ["--data-root", ".", "--set", "legal"], "no DOMAIN=NAME"),
        ("classical_baseline", ["--data-root", ".", "--set", "legal=cud"], "Did you mean 'cuad'"),
        ("domain_scores", ["--data-root", ".", "--json", "."], "is a folder"),
        ("domain_scores", ["--data-root", ".", "--json", "manifest.json/new.json"], "can be made"),
        ("finetune_lift", ["--data", ".", "--strategies", "w", "p->w"], "'p->w': steps are"),
        ("irt_adaptive", ["--seeds", "0"], "at least 1"),
        ("irt_recovery", ["--seeds", "0"], "at least 1"),
        ("joint_optimization", ["--save", "program.txt"], "as a .json file"),
        ("pipeline", ["--data-root", ".", "--seeds", "0"], "at least 1"),
        ("train_speed", ["--repeats", "0"], "'0' is no whole number"),
    ],
)
def test_a_word_that_cannot_be_meant_ends_the_run_at_once(example, name, words, message, monkeypatch, tmp_path, capsys):
    sets = [{"domain": "legal", "name": "cuad"}, {"domain": "operations", "name": "notes", "labels": None}]
    (tmp_path / "manifest.json").write_text(json.dumps([{"primary": True, "labels": 2} | each for each in sets]))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        example(name, *words).main()
    assert message in capsys.readouterr().err


def test_finetune_lift_shows_each_score_as_it_comes(example, monkeypatch, tmp_path, capsys):
    write_set(tmp_path / "set", "train", "dev", "test")
    lift = example("finetune_lift", "--data", tmp_path / "set", "--seeds", 7)
    monkeypatch.setattr(lift, "LoRALM", lambda *_, **__: dspy.LM("none"))
    monkeypatch.setattr(lift, "score", lambda *_: 12.5)
    monkeypatch.setattr(dspy.BetterTogether, "compile", lambda *_, **__: pytest.fail("a step"))
    with pytest.raises(pytest.fail.Exception):
        lift.main()
    assert capsys.readouterr().out.split()[-3:] == ["7", "base", "12.5"]


def test_no_row_to_validate_on_is_one_to_learn_from(example):
    for seed in range(3):
        _, rows = example("ace_playbook").task(seed, 220)
        assert len({row.text for row in rows}) == len(rows) == 220
    joint = example("joint_optimization")
    train, val = joint.rows(0), joint.rows(1)
    assert [row.wanted for row in train] == [row.wanted for row in val]
    for field in ("message", "clause"):
        assert not {row[field] for row in train} & {row[field] for row in val}


def test_train_speed_leaves_the_users_folders_alone(example, monkeypatch, tmp_path):
    speed = example("train_speed")
    (tmp_path / "run").mkdir()
    done = subprocess.CompletedProcess((), 0, stdout="{}\n", stderr="")
    monkeypatch.setattr(speed.subprocess, "run", lambda *_, **__: done)
    assert "failed" not in speed.run({"name": "prepare", "out": str(tmp_path), "folder": str(tmp_path / "run")}, 1)
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


@pytest.mark.parametrize("name", ["classical_baseline", "pipeline"])
def test_rows_are_read_as_training_reads_them(example, name, tmp_path):
    from dspy_lora.errors import DataError

    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": "b"}\n\n{"text": "c\u2028d", "label": "e"}\n')
    rows = example(name).read(tmp_path / "rows.jsonl")
    assert (rows.texts if name == "classical_baseline" else [row.text for row in rows]) == ["a", "c\u2028d"]
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match="line 1: no 'label'"):
        example(name).read(tmp_path / "bad.jsonl")


def test_joint_optimization_wants_labels_that_its_adapters_know(example, data_root):
    joint = example("joint_optimization")
    for wanted, folder in ((joint.MESSAGES, "customer_service/banking77"), (joint.CLAUSES, "legal/cuad")):
        rows = (data_root / "domains" / folder / "train.jsonl").read_text().splitlines()
        assert set(wanted) <= {json.loads(row)["label"] for row in rows}
