"""What an adapter kept: the exam, the comparison, plain text, the full copy's record, and the command on stand-ins."""

import argparse
import dataclasses
import json
import shutil

import dspy
import numpy as np
import pytest
from dspy.utils import DummyLM
from hypothesis import given, settings
from hypothesis import strategies as st

from dspy_lora.adapters.base import SEEDLING_FOLDER, resolve_base
from dspy_lora.adapters.registry import PACKAGED_ROOT, AdapterRegistry
from dspy_lora.config import load_config
from dspy_lora.errors import AdapterError, ConfigError, DataError
from dspy_lora.evaluation import command, exam, retention, text
from dspy_lora.evaluation.exam import OTHERS, OWN, RULES, STRUCTURE, Exam, TaskSet, domain_sets
from dspy_lora.evaluation.full_copy import find_copy
from dspy_lora.evaluation.retention import ADAPTER, BASE, COPY, PERPLEXITY, Retention, compare_means, compare_systems
from dspy_lora.seedling import bars
from dspy_lora.seedling.rules import rules_task

SIGNATURE = dspy.Signature("text -> label", "Name the kind.")
ROWS = [{"text": f"clause number {i:02}", "label": "term" if i % 2 else "audit"} for i in range(8)]


class Pupil(DummyLM):
    """Knows some rows by heart, and as many instruction tests of each sort; else it answers nothing that parses."""

    def __init__(self, rows=(), tests=0):
        knows = {row["text"]: {"label": row["label"]} for row in rows}
        for question in (*bars.questions(0, tests), *bars.questions(1, tests, rules_task)):
            asked = dspy.ChatAdapter().format(question.signature, [], question.inputs)[-1]["content"]
            knows[asked] = {name: question.row.get(name, "so") for name in question.signature.output_fields}
        super().__init__(knows)
        self.base = "one"
        self.killed = 0

    def kill(self):
        self.killed += 1


# -- the comparison ----------------------------------------------------------------------------------------------------

marks = st.lists(st.lists(st.booleans(), min_size=1, max_size=12), min_size=1, max_size=4)


def arrays(sets):
    return [np.array(each, dtype=np.float64) for each in sets]


@settings(max_examples=25)
@given(marks, st.randoms(use_true_random=False))
def test_a_small_set_counts_as_much_as_a_large_one(sets, random):
    ours = arrays(sets)
    theirs = [np.array(random.choices([0.0, 1.0], k=len(each))) for each in ours]
    compared = compare_means(ours, theirs)
    assert compared.adapter.value == pytest.approx(np.mean([each.mean() for each in ours]))
    assert compared.difference.value == pytest.approx(compared.adapter.value - compared.base.value)
    assert 0 < compared.p_value <= 1
    if compared.adapter.low is not None:
        assert -1e-9 <= compared.adapter.low <= compared.adapter.high <= 1 + 1e-9


def test_intervals_and_p_are_near_the_normal_ones():
    rng = np.random.default_rng(0)
    ours = [(rng.random(size) < 0.8).astype(float) for size in (100, 400)]
    theirs = [(rng.random(size) < 0.7).astype(float) for size in (100, 400)]
    compared = compare_means(ours, theirs)
    variance = sum(each.var() / len(each) for each in ours) / 4
    low, high = compared.adapter.low, compared.adapter.high
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(variance), rel=0.08)
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    spread = np.sqrt(sum(each.var() / len(each) for each in differences) / 4)
    assert (compared.difference.high - compared.difference.low) / 2 == pytest.approx(1.96 * spread, rel=0.08)
    flips = np.sqrt(sum((each**2).mean() / len(each) for each in differences) / 4)
    from scipy.stats import norm

    assert compared.p_value == pytest.approx(2 * norm.sf(abs(compared.difference.value) / flips), abs=0.03)


def test_equal_systems_differ_by_nothing():
    compared = compare_means(arrays([[1, 0], [1]]), arrays([[1, 0], [1]]))
    assert (compared.difference.value, compared.difference.low, compared.p_value) == (0, None, 1)


# -- the exam ----------------------------------------------------------------------------------------------------------


def test_each_measure_has_its_marks():
    own, other = TaskSet(SIGNATURE, ROWS), TaskSet(SIGNATURE, [{"text": "a stray", "label": "none"}])
    paper = Exam(own, {"strays": other}, questions=12)
    knows_all = paper.take(Pupil([*ROWS[:6], *other.rows], tests=12))
    assert [each.tolist() for each in knows_all[OWN]] == [[1.0] * 6 + [0.0] * 2]
    assert [each.tolist() for each in knows_all[OTHERS]] == [[1.0]]
    assert knows_all[RULES][0].mean() == 1 and len(knows_all[RULES][0]) == 12
    assert knows_all[STRUCTURE][0].mean() == 1 and len(knows_all[STRUCTURE][0]) == 24
    knows_nothing = paper.take(Pupil())
    assert all(each.sum() == 0 for sets in knows_nothing.values() for each in sets)
    assert OTHERS not in Exam(own, {}, questions=1).take(Pupil())


def test_an_engine_ends_before_that_of_another_base_starts():
    pupils = {BASE: Pupil(), ADAPTER: Pupil(), COPY: Pupil()}
    pupils[COPY].base = "two"
    seen = []

    class Paper:
        def take(self, lm):
            seen.append([pupil.killed for pupil in pupils.values()])
            return {}

    exam.take_exam(Paper(), pupils)
    assert seen == [[0, 0, 0], [0, 0, 0], [0, 1, 0]]
    assert all(pupil.killed for pupil in pupils.values())


def test_the_other_domains_are_those_with_test_rows(tmp_path):
    config = load_config()
    for name in ("legal", "financial"):
        folder = tmp_path / config.domain(name).data
        folder.mkdir(parents=True)
        (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert list(domain_sets(config, "legal", tmp_path)) == ["financial"]
    assert len(domain_sets(config, "legal", tmp_path, 3)["financial"].rows) == 3


# -- plain text --------------------------------------------------------------------------------------------------------

PLAIN = "The tide came in over the flat sand, and the boats that had lain on their sides began to stir. " * 14


def test_text_has_the_models_own_loss_and_adapter_and_copy_differ(tmp_path):
    import torch

    from dspy_lora.merging.model import load_model

    base, adapter = resolve_base("seedling"), AdapterRegistry().resolve("legal")
    ids = text.text_windows(PLAIN, base)
    found = text.text_likelihoods(ids, base, adapter.path, base)
    with torch.inference_mode():
        loss = load_model(base.path)(input_ids=ids, labels=ids).loss
    assert -found.sums["base"].sum() / found.tokens.sum() == pytest.approx(float(loss), rel=1e-4)
    assert found.sums["full copy"] == pytest.approx(found.sums["base"])
    assert (found.sums["adapter"] != found.sums["base"]).all()
    assert len(found.tokens) == len(ids) and set(found.tokens) == {text.WINDOW - 1}


def test_a_batch_of_text_that_does_not_fit_is_halved(monkeypatch):
    import torch

    base, adapter = resolve_base("seedling"), AdapterRegistry().resolve("legal")
    ids, real = text.text_windows(PLAIN, base)[:3], text._window_sums
    whole = text.text_likelihoods(ids, base, adapter.path, None)

    def at_most(size):
        def sums(model, batch):
            if len(batch) > size:
                raise torch.OutOfMemoryError
            return real(model, batch)

        return sums

    monkeypatch.setattr(text, "_window_sums", at_most(1))
    halved = text.text_likelihoods(ids, base, adapter.path, None)
    assert all(halved.sums[name] == pytest.approx(sums, rel=1e-4) for name, sums in whole.sums.items())
    monkeypatch.setattr(text, "_window_sums", at_most(0))
    with pytest.raises(ConfigError, match=r"out of GPU memory.* or leave --text out"):
        text.text_likelihoods(ids, base, adapter.path, None)


def test_a_text_that_is_too_short_or_unreadable_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"has 255 tokens\. Give at least 256"):
        text.windows(list(range(255)))
    assert text.windows(list(range(300))).tolist() == [list(range(128)), list(range(128, 256))]
    (tmp_path / "latin").write_bytes(b"\xe4\xf6")
    for name in ("latin", "nothing"):
        with pytest.raises(DataError, match=r"--text .* cannot be read"):
            text.read_text(tmp_path / name)


# -- the full copy -----------------------------------------------------------------------------------------------------


@pytest.fixture
def full_run(tmp_path):
    """A run of the same rows and steps as the packaged legal adapter's; its model is the seedling itself."""
    record = AdapterRegistry().resolve("legal").metadata
    folder = tmp_path / "full"
    shutil.copytree(SEEDLING_FOLDER, folder / "model")
    card = {
        "base": {"revision": resolve_base("seedling").revision},
        "config": {"signature": record["config"]["signature"], "batch_size": record["config"]["batch_size"]},
        "data": {"sha256": record["data"]},
        "result": {"steps": record["result"]["steps"]},
    }
    (folder / "run.json").write_text(json.dumps(card))
    return folder


def change(folder, part, key, value):
    card = json.loads((folder / "run.json").read_text())
    card[part][key] = value
    (folder / "run.json").write_text(json.dumps(card))


def test_a_copy_of_the_same_rows_and_steps_is_found(full_run):
    base, adapter = resolve_base("seedling"), AdapterRegistry().resolve("legal")
    assert find_copy(full_run, base, adapter).path == str(full_run / "model")


@pytest.mark.parametrize(
    ("part", "key", "value", "says"),
    [
        ("base", "revision", "0" * 12, "base '000000000000', not"),
        ("data", "sha256", {"train": "other"}, r"rows \(SHA-256\) {'train': 'other'}, not"),
        ("result", "steps", 7, "steps 7, not"),
        ("config", "batch_size", 5, "batch_size 5, not"),
        ("config", "noisy_copies", 0, "noisy_copies 0, not 3"),
        ("config", "adapter", "JSONAdapter", "adapter 'JSONAdapter', not 'ChatAdapter'"),
    ],
)
def test_a_copy_of_another_training_is_refused(full_run, part, key, value, says):
    change(full_run, part, key, value)
    with pytest.raises(ConfigError, match=f"was not trained as 'legal@.*{says}.*--full-finetune"):
        find_copy(full_run, resolve_base("seedling"), AdapterRegistry().resolve("legal"))


def test_a_folder_without_a_run_and_an_adapter_without_a_record_are_refused(full_run, tmp_path):
    base, adapter = resolve_base("seedling"), AdapterRegistry().resolve("legal")
    for folder, which in ((tmp_path, adapter), (full_run, dataclasses.replace(adapter, metadata={}))):
        with pytest.raises(ConfigError, match="finished run of `dspy-lora train --full-finetune`"):
            find_copy(folder, base, which)


def test_an_adapter_in_the_folder_of_its_run_has_the_record_of_its_training(full_run, tmp_path):
    known = AdapterRegistry().resolve("legal")
    run = tmp_path / "run"
    shutil.copytree(known.path, run / "adapter")
    card = {"config": known.metadata["config"], "data": {"sha256": known.metadata["data"]}, "gpu_hours": 0.0}
    (run / "run.json").write_text(json.dumps(card | {"result": known.metadata["result"]}))
    base = resolve_base("seedling")
    args = argparse.Namespace(adapter_path=run / "adapter", domain="legal")
    with command._adapter(args, load_config(), base) as (adapter, _):
        assert find_copy(full_run, base, adapter).path == str(full_run / "model")


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows_file(tmp_path):
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


@pytest.fixture
def evaluate(tmp_path, capsys, monkeypatch):
    """Runs the command: the adapter knows every row and forgot the tests, base and copy the other way round."""

    def make(model, domain=None, **kwargs):
        lm = Pupil(ROWS) if domain else Pupil(ROWS[:2], tests=6)
        lm.base = model
        return lm

    monkeypatch.setattr(command, "LoRALM", make)
    monkeypatch.setattr(exam.Exam, "questions", 6)
    monkeypatch.setattr(exam.Exam.__init__, "__defaults__", (6,))

    def evaluate(*words):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        args = ["--domain", "legal", "--base-model", "seedling", "--output", tmp_path / "out", *words]
        assert command.run(parser.parse_args(list(map(str, args)))) == 0
        return capsys.readouterr().out

    return evaluate


def test_the_command_writes_three_systems_and_all_measures(evaluate, tmp_path, full_run):
    config = load_config()
    for name in ("legal", "financial"):
        folder = tmp_path / "data" / config.domain(name).data
        folder.mkdir(parents=True)
        (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "plain.txt").write_text(PLAIN)
    words = ("--data-root", tmp_path / "data", "--full-copy", full_run, "--text", tmp_path / "plain.txt")
    shown = evaluate("--retention", *words)
    state = json.loads((tmp_path / "out" / "retention.json").read_text())
    assert list(state["measures"]) == [OWN, PERPLEXITY, RULES, STRUCTURE, OTHERS]
    assert list(state["systems"]) == [BASE, ADAPTER, COPY] and state["notes"] == []
    values = {
        name: [each[ADAPTER]["base"]["value"], each[ADAPTER]["adapter"]["value"], each[COPY]["adapter"]["value"]]
        for name, each in state["measures"].items()
    }
    assert values[OWN] == values[OTHERS] == [0.25, 1.0, 0.25]
    assert values[RULES] == values[STRUCTURE] == [1.0, 0.0, 1.0]
    assert values[PERPLEXITY][0] == pytest.approx(values[PERPLEXITY][2])
    assert state["measures"][STRUCTURE]["rows"] == 12 and state["measures"][OWN][ADAPTER]["difference"]["low"] > 0
    markdown = (tmp_path / "out" / "retention.md").read_text()
    for part in ("full copy", "0.250 [", "Change from the base", RULES):
        assert part in shown + markdown and part in markdown


def test_what_is_left_out_is_said(evaluate, rows_file, tmp_path):
    shown = evaluate("--retention", "--test-data", rows_file)
    state = json.loads((tmp_path / "out" / "retention.json").read_text())
    assert list(state["measures"]) == [OWN, RULES, STRUCTURE] and len(state["notes"]) == 3
    for flag in ("--full-copy", "--text", "--data-root"):
        assert flag in shown and flag in (tmp_path / "out" / "retention.md").read_text()


def test_another_base_and_malformed_rows_are_found_before_the_text_is_read(evaluate, tmp_path, monkeypatch):
    config = load_config()
    for name, rows in (("legal", ROWS), ("financial", [{"text": "a"}])):
        folder = tmp_path / "data" / config.domain(name).data
        folder.mkdir(parents=True)
        (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "plain.txt").write_text(PLAIN)
    read = []
    monkeypatch.setattr(command, "text_likelihoods", lambda *each: read.append(each))
    words = ("--retention", "--data-root", tmp_path / "data", "--text", tmp_path / "plain.txt")
    with pytest.raises(DataError, match=r"line 1: .*'label'"):
        evaluate(*words)
    base = tmp_path / "base"
    shutil.copytree(resolve_base("seedling").folder, base)
    (base / "config.json").write_text((base / "config.json").read_text() + "\n")  # another revision
    with pytest.raises(AdapterError, match=r"was made for base 'seedling'.*--base-model"):
        evaluate(*words, "--base-model", base, "--registry", PACKAGED_ROOT)
    assert not read


def test_flags_that_do_not_go_together_are_refused(evaluate, rows_file):
    for words, says in (
        (("--text", rows_file), "are for --retention"),
        (("--full-copy", rows_file), "are for --retention"),
        (("--retention", "--irt"), "leave --irt, --rate and --run out"),
        (("--retention", "--rate", "1"), "leave --irt, --rate and --run out"),
        (("--retention", "--run", rows_file), "leave --irt, --rate and --run out"),
    ):
        with pytest.raises(ConfigError, match=says):
            evaluate("--test-data", rows_file, *words)


def test_a_change_shows_its_interval_and_p():
    ours, theirs = {OWN: arrays([[1, 1, 1, 0]])}, {OWN: arrays([[0, 0, 1, 0]])}
    report = Retention("legal", {BASE: "b", ADAPTER: "a"}, *compare_systems({BASE: theirs, ADAPTER: ours}, None))
    assert "0.250 [" in report.to_text() and "0.500 [" in report.to_text() and "p=0.5" in report.to_text()
    assert report.rows == {OWN: 4} and retention.PERPLEXITY not in report.measures
