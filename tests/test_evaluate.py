"""Evaluation of an adapter: measures against scikit-learn, tests against enumeration, the command on stand-in LMs."""

import argparse
import enum
import itertools
import json
import math
import shutil
import tracemalloc

import dspy
import numpy as np
import pydantic
import pytest
from dspy.utils import DummyLM
from hypothesis import given, settings
from hypothesis import strategies as st

from dspy_lora.adapters.base import resolve_base
from dspy_lora.adapters.registry import PACKAGED_ROOT, AdapterRegistry
from dspy_lora.config import load_config
from dspy_lora.errors import (
    AdapterError,
    ConfigError,
    DataError,
    PublishError,
    UnknownAdapterError,
    UnknownDomainError,
)
from dspy_lora.evaluation import command, overhead, scores, systems
from dspy_lora.evaluation.adapter import evaluate_adapter, with_perplexity
from dspy_lora.evaluation.answers import Turn, ask, timed
from dspy_lora.evaluation.confusion import NONE, OTHER, Confusion
from dspy_lora.evaluation.cost import Parameters, TrainingCost
from dspy_lora.evaluation.likelihood import Likelihoods
from dspy_lora.evaluation.overhead import Spread, measure_overhead
from dspy_lora.evaluation.scores import compare_exact_match, compare_macro_f1, compare_perplexity, label_scores
from dspy_lora.evaluation.suspects import Suspect
from dspy_lora.evaluation.systems import SystemsReport
from dspy_lora.training.data import render
from dspy_lora.training.run import read_card

SIGNATURE = dspy.Signature("text -> label", "Name the kind.")
KINDS = ["insurance", "audit rights", "term"]
ROWS = [{"text": f"clause number {i:03}", "label": KINDS[i % 3]} for i in range(24)]


def stand_in(answers, rows=ROWS):
    """An LM that gives each row its answer."""
    return DummyLM({row["text"]: {"label": answer} for row, answer in zip(rows, answers, strict=True)})


def right(rows=ROWS):
    return stand_in([row["label"] for row in rows], rows)


def wrong(rows=ROWS, label="term"):
    return stand_in([label] * len(rows), rows)


class Mute(DummyLM):
    """Writes no field at all."""

    def __init__(self):
        super().__init__([])

    def _format_answer_fields(self, fields):
        return "I had rather not."


# -- scores ------------------------------------------------------------------------------------------------------------

labels = st.sampled_from(["a", "b", "c", "d", ""])
triples = st.lists(st.tuples(st.sampled_from("abc"), labels, labels), min_size=1, max_size=40)


@settings(max_examples=40)
@given(triples)
def test_scores_are_those_of_scikit_learn(rows):
    metrics = pytest.importorskip("sklearn.metrics")
    truth, ours, theirs = map(list, zip(*rows, strict=True))
    known = sorted(set(truth))
    exact, macro = compare_exact_match(truth, ours, theirs), macro_f1(truth, ours, theirs)
    for given_, side in ((ours, "adapter"), (theirs, "base")):
        each = metrics.precision_recall_fscore_support(truth, given_, labels=known, zero_division=0.0)
        assert getattr(exact, side).value == pytest.approx(metrics.accuracy_score(truth, given_))
        assert getattr(macro, side).value == pytest.approx(each[2].mean())
    table = {row.label: row for row in label_scores(truth, theirs, ours)}
    assert [table[label].support for label in known] == each[3].tolist()
    assert [table[label].precision for label in known] == pytest.approx(each[0])
    assert [table[label].recall for label in known] == pytest.approx(each[1])
    assert [table[label].f1 for label in known] == pytest.approx(each[2])
    assert macro.difference.value == pytest.approx(macro.adapter.value - macro.base.value)


def macro_f1(*answers):
    """With few swaps: the values are the point."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "SWAPS", 50)
        return compare_macro_f1(*answers)


@settings(max_examples=20)
@given(triples)
def test_an_adapter_that_answers_as_its_base_makes_no_difference(rows):
    truth, ours, _ = map(list, zip(*rows, strict=True))
    for compared in (compare_exact_match(truth, ours, ours), macro_f1(truth, ours, ours)):
        assert compared.difference == scores.Estimate(0.0, None, None)
        assert compared.p_value == 1.0


def test_exact_match_has_mcnemars_p_and_a_bootstrap_interval_near_the_normal_one():
    truth = ["x"] * 200
    ours = ["x"] * 150 + ["y"] * 50
    theirs = ["x"] * 100 + ["y"] * 50 + ["x"] * 10 + ["y"] * 40  # 50 rows won, 10 lost
    compared = compare_exact_match(truth, ours, theirs)
    tail = sum(math.comb(60, k) for k in range(11)) / 2**60
    assert compared.p_value == pytest.approx(2 * tail)
    assert "50 won, 10 lost" in compared.test
    half = 1.96 * math.sqrt(0.75 * 0.25 / 200)
    assert compared.adapter.value == 0.75
    assert (compared.adapter.low, compared.adapter.high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.012)
    half = 1.96 * math.sqrt((60 / 200 - 0.2**2) / 200)  # of the paired difference, not of two samples
    assert (compared.difference.low, compared.difference.high) == pytest.approx((0.2 - half, 0.2 + half), abs=0.012)


def test_a_share_of_none_or_all_has_the_exact_interval():
    compared = compare_exact_match(["x"] * 30, ["x"] * 30, ["y"] * 30)
    assert (compared.base.low, compared.base.high) == pytest.approx((0, 1 - 0.025 ** (1 / 30)))
    assert (compared.adapter.low, compared.adapter.high) == pytest.approx((0.025 ** (1 / 30), 1))
    assert compared.difference == scores.Estimate(1.0, None, None)
    assert compared.p_value == pytest.approx(2 / 2**30)


def test_the_randomisation_test_is_the_enumeration_of_all_swaps():
    metrics = pytest.importorskip("sklearn.metrics")
    truth = list("aabbccab")
    ours, theirs = list("aabbcbab"), list("abbaccbb")

    def macro(given_):
        return metrics.f1_score(truth, given_, average="macro", labels=list("abc"), zero_division=0.0)

    observed, reached = abs(macro(ours) - macro(theirs)), 0
    for swaps in itertools.product([False, True], repeat=len(truth)):
        pairs = [(b, a) if swap else (a, b) for swap, a, b in zip(swaps, ours, theirs, strict=True)]
        first, second = zip(*pairs, strict=True)
        reached += abs(macro(first) - macro(second)) >= observed - 1e-12
    assert compare_macro_f1(truth, ours, theirs).p_value == pytest.approx(reached / 2 ** len(truth), abs=0.02)


def test_the_tests_keep_their_level():
    random = np.random.default_rng(0)
    below = np.zeros(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "SWAPS", 199)
        patch.setattr(scores, "RESAMPLES", 20)
        for _ in range(200):
            truth, ours, theirs = (random.choice(list("abc"), 60).tolist() for _ in range(3))
            sums = random.normal(-3, 1, (2, 60))
            results = (
                compare_exact_match(truth, ours, theirs),
                compare_macro_f1(truth, ours, theirs),
                compare_perplexity(sums[0], sums[1], np.ones(60)),
            )
            below += [each.p_value <= 0.1 for each in results]
    assert (below / 200 <= 0.16).all()  # 0.1 and three standard errors
    assert (below[1:] / 200 >= 0.04).all()  # and they are not idle; McNemar's exact test is a cautious one


def test_perplexity_is_a_token_and_its_test_sees_a_difference():
    random = np.random.default_rng(1)
    tokens = random.integers(1, 9, 80).astype(float)
    ours, theirs = -0.5 * tokens, -2.0 * tokens - random.random(80)
    compared = compare_perplexity(ours, theirs, tokens)
    assert compared.adapter.value == pytest.approx(math.exp(0.5))
    assert compared.base.value == pytest.approx(math.exp(-theirs.sum() / tokens.sum()))
    assert compared.base.low < compared.base.value < compared.base.high
    assert compared.difference.high < 0
    assert compared.p_value == 1 / 10_000


def test_macro_f1_weighs_rare_labels_as_frequent_ones():
    truth = ["often"] * 90 + ["rare"] * 10
    compared = compare_macro_f1(truth, ["often"] * 100, truth)
    assert compared.adapter.value == pytest.approx(0.5 * 2 * 90 / 190)
    assert compared.base.value == 1.0
    assert compared.p_value < 0.01


def test_a_label_that_a_resample_does_not_hold_counts_for_nothing_there():
    truth = ["often"] * 30 + ["rare"]
    assert macro_f1(truth, truth, ["often"] * 31).adapter == scores.Estimate(1.0, None, None)


def test_resamples_and_swaps_are_in_memory_one_part_at_a_time(monkeypatch):
    monkeypatch.setattr(scores, "_CELLS", 100_000)  # 0.8 MB; all of them have 96 MB
    truth = ["a", "b"] * 500
    tracemalloc.start()
    try:
        compare_macro_f1(truth, truth, truth[::-1])
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compare", [compare_exact_match, compare_macro_f1, label_scores])
def test_no_rows_and_uneven_answers_are_refused(compare):
    with pytest.raises(DataError, match="at least one row"):
        compare([], [], [])
    with pytest.raises(DataError, match="1 rows and 2, 1 answers"):
        compare(["a"], ["a", "b"], ["a"])


# -- answers and tables ------------------------------------------------------------------------------------------------


def test_each_system_answers_every_row_in_order():
    ours, theirs = ask([right(), wrong()], SIGNATURE, ROWS, threads=7)
    assert [each.text for each in ours] == [row["label"] for row in ROWS]
    assert {each.text for each in theirs} == {"term"}


def test_an_answer_that_cannot_be_parsed_counts_as_wrong_and_is_counted():
    evaluation = evaluate_adapter(right(), Mute(), SIGNATURE, ROWS, turns=0)
    exact = evaluation.measures[0]
    assert (exact.adapter.value, exact.base.value) == (1.0, 0.0)
    assert evaluation.problems() == {"adapter": {}, "base": {"unparsed": len(ROWS)}}
    assert [each.measure for each in evaluation.measures] == ["exact match", "macro-F1"]


class Kind(enum.Enum):
    """Of a clause."""

    TERM = "term"
    RIGHTS = "audit rights"


class Length(pydantic.BaseModel):
    """Of a term."""

    months: int
    open: bool = False


@pytest.mark.parametrize(
    ("kind", "references", "answers"),
    [
        (Kind, ["term", "audit rights"], ["term", "audit rights"]),
        (Length, [{"months": 3}, {"months": 4}], ['{"months": 3, "open": false}', '{"open": false, "months": 4}']),
        (bool, ["true", "false"], ["True", "False"]),
        (float, [3, 4], ["3.0", "4"]),
        (str, ["one\r\ntwo", "three "], ["one\ntwo", "three"]),
    ],
)
def test_answers_of_any_type_are_compared_by_value(kind, references, answers):
    signature = dspy.Signature({"text": (str, dspy.InputField()), "label": (kind, dspy.OutputField())})
    rows = [{"text": f"clause {i}", "label": label} for i, label in enumerate(references)]
    swapped = stand_in(answers[::-1], rows)
    exact = evaluate_adapter(stand_in(answers, rows), swapped, signature, rows, turns=0).measures[0]
    assert (exact.adapter.value, exact.base.value) == (1.0, 0.0)


def test_a_broken_engine_is_an_error_not_a_wrong_answer():
    with pytest.raises(Exception, match="the engine died"):
        ask([Broken()], SIGNATURE, ROWS[:3])


class Broken(DummyLM):
    def __init__(self):
        super().__init__([])

    def _format_answer_fields(self, fields):
        raise RuntimeError("the engine died")


def test_texts_get_exact_match_alone():
    rows = [{"text": f"order {i}", "label": f"pump {i}; valve"} for i in range(8)]
    evaluation = evaluate_adapter(right(rows), wrong(rows), SIGNATURE, rows, turns=0)
    assert [each.measure for each in evaluation.measures] == ["exact match"]
    assert evaluation.labels is None and evaluation.confusion is None


def test_rows_that_dspy_cannot_render_and_no_rows_are_refused():
    with pytest.raises(DataError, match="at least one"):
        evaluate_adapter(right(), right(), SIGNATURE, [])
    with pytest.raises(ConfigError, match="2 output fields"):
        evaluate_adapter(right(), right(), dspy.Signature("text -> label, reason"), ROWS)


@given(triples, st.integers(1, 4))
def test_the_confusion_matrix_holds_every_row_once(rows, most):
    truth, answers, _ = zip(*rows, strict=True)
    matrix = Confusion.of(truth, answers, most)
    assert sum(map(sum, matrix.counts)) == len(rows)
    assert sum(row[-1] for row in matrix.counts) == answers.count("")
    for label, row in zip(matrix.labels, matrix.counts, strict=True):
        if label != OTHER:
            assert sum(row) == truth.count(label)
            hits = sum(a == b == label for a, b in zip(truth, answers, strict=True))
            assert row[matrix.answers.index(label)] == hits
    assert (OTHER in matrix.labels) == (len(set(truth)) > most)


def test_the_picture_is_drawn_with_labels_that_look_like_mathematics(tmp_path):
    pytest.importorskip("matplotlib")
    matrix = Confusion.of(["$x", "b_2", "a label that is far too long to be shown in full"], ["b_2", "", "$x"])
    assert matrix.answers[-2:] == (OTHER, NONE)
    for title in ("legal@1 $5 and ^", "a$_$b", r"\$\frac$"):
        matrix.draw(tmp_path / "it.png", title)
        assert (tmp_path / "it.png").read_bytes()[:4] == b"\x89PNG"
        (tmp_path / "it.png").unlink()


def test_labels_that_are_called_as_the_special_columns_keep_their_own():
    matrix = Confusion.of(["(other)", "(other)", "(none)"], ["(other)", "x", ""])
    assert matrix.labels == ("(other)", "(none)")
    assert matrix.answers == ("(other)", "(none)", "((other))", "((none))")
    assert matrix.counts == ((1, 0, 1, 0), (0, 0, 0, 1))


# -- time --------------------------------------------------------------------------------------------------------------


def test_the_slower_system_has_the_lower_throughput_and_the_longer_latency(monkeypatch):
    book, seconds = [], {"ours": itertools.cycle([0.9, 0.6, 1.5]), "theirs": itertools.cycle([0.3])}

    def clock(lm, signature, rows):
        name = lm.kwargs["name"]
        book.append((name, lm.kwargs["max_tokens"], lm.kwargs["min_tokens"]))
        took = next(seconds[name])
        return Turn(took, len(rows), 0, took / 3)

    monkeypatch.setattr(overhead, "timed", clock)
    ours, theirs = right(), right()
    ours.kwargs["name"], theirs.kwargs["name"] = seconds
    measured = measure_overhead(ours, theirs, SIGNATURE, ROWS, answer_tokens=9, turns=2, batch=6)
    assert (measured.batch, measured.turns, measured.answer_tokens) == (6, 2, 9)
    assert {tuple(lengths) for _, *lengths in book} == {(9, 9)}
    assert [name for name, *_ in book] == ["theirs", "ours", "ours", "theirs", "theirs", "ours"]  # in turns
    assert measured.throughput_ratio == Spread(pytest.approx(0.35), pytest.approx(0.2), pytest.approx(0.5))
    assert measured.latency_ratio == Spread(pytest.approx(3.5), pytest.approx(2), pytest.approx(5))
    assert measured.adapter.answers == Spread(pytest.approx(7), pytest.approx(4), pytest.approx(10))
    assert measured.adapter.latency == Spread(pytest.approx(0.35), pytest.approx(0.2), pytest.approx(0.5))
    assert measured.adapter.tokens is None  # nothing counted them


def test_output_tokens_are_counted_from_the_calls_of_the_turn():
    turn = timed(Counting(), SIGNATURE, ROWS[:5])
    assert (turn.answers, turn.tokens) == (5, 35)


class Counting(DummyLM):
    def __init__(self):
        super().__init__({"": {"label": "term"}})

    def copy(self, **kwargs):
        copied = super().copy(**kwargs)
        copied.update_history = lambda entry: copied.history.append(entry | {"usage": {"completion_tokens": 7}})
        return copied


def test_no_rows_to_time_are_refused():
    with pytest.raises(DataError, match="no rows"):
        measure_overhead(right(), right(), SIGNATURE, [])


# -- parameters and cost -----------------------------------------------------------------------------------------------


def test_parameters_are_those_that_training_counted():
    revision = AdapterRegistry(PACKAGED_ROOT).resolve("legal")
    parameters = Parameters.of(revision.path, resolve_base("seedling"))
    counted = revision.metadata["result"]
    assert parameters.trained == counted["trainable_parameters"]
    assert parameters.trained + parameters.base == counted["parameters"]
    assert parameters.share == pytest.approx(parameters.trained / counted["parameters"])


def test_a_base_in_two_forms_is_counted_once(tmp_path):
    base = resolve_base("seedling")
    shutil.copytree(base.folder, tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    shutil.copy(weights, weights.with_name("consolidated.safetensors"))
    index = {"weight_map": {"model.embed_tokens.weight": weights.name}}
    weights.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    adapter = AdapterRegistry(PACKAGED_ROOT).resolve("legal").path
    twice = resolve_base(str(tmp_path / "base"))
    assert Parameters.of(adapter, twice).base == Parameters.of(adapter, base).base


@pytest.mark.parametrize(
    ("card", "hours"),
    [
        ({"gpu_hours": 3.0, "wall_seconds": 60.0, "hardware": {}}, 3.0),
        ({"wall_seconds": 5400.0, "hardware": {"gpu": "H100"}}, 1.5),
    ],
)
def test_cost_is_gpu_hours_times_the_rate(card, hours):
    assert TrainingCost.of(card, 2.5) == TrainingCost(hours, 2.5)
    assert TrainingCost.of(card, 2.5).dollars == hours * 2.5


@pytest.mark.parametrize(
    "card", [{}, {"gpu_hours": 0.0}, {"wall_seconds": 9.0, "hardware": {"cpus": 2}}, {"hardware": {"gpu": "H100"}}]
)
def test_a_run_without_gpu_hours_has_no_cost(card):
    with pytest.raises(ConfigError, match=r"--run RUN_FOLDER"):
        TrainingCost.of(card, 2.0)
    with pytest.raises(ConfigError, match="0 or more"):
        TrainingCost.of({"gpu_hours": 1}, -2.0)


# -- perplexity --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded():
    """The seedling with its legal adapter, and rows of unequal length."""
    pytest.importorskip("peft")
    from dspy_lora.evaluation.likelihood import _load

    revision = AdapterRegistry(PACKAGED_ROOT).resolve("legal")
    rows = [{"text": "The tenant shall pay. " * (1 + 2 * (i % 3)), "label": KINDS[i % 3]} for i in range(5)]
    signature = load_config().domain("legal").signature()
    return revision, resolve_base("seedling"), render(signature, rows), _load(resolve_base("seedling"), revision.path)


def test_likelihoods_do_not_depend_on_the_batch_and_are_the_models_own_loss(loaded, monkeypatch):
    import torch

    from dspy_lora.evaluation import likelihood
    from dspy_lora.training.data import tokenize

    revision, base, examples, (model, tokenizer) = loaded
    monkeypatch.setattr(likelihood, "_load", lambda *_: (model, tokenizer))
    found = likelihood.likelihoods(base, revision.path, examples, batch_size=3)
    rows, _ = tokenize(tokenizer, examples, 10_000)
    with torch.inference_mode():
        for i, row in enumerate(rows):
            ids, labels_ = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            assert found.tokens[i] == (labels_ != -100).sum()
            loss = model(input_ids=ids, labels=labels_).loss.item()  # transformers' mean over the answer's tokens
            assert -found.adapter[i] / found.tokens[i] == pytest.approx(loss, rel=1e-3)
            with model.disable_adapter():
                loss = model(input_ids=ids, labels=labels_).loss.item()
            assert -found.base[i] / found.tokens[i] == pytest.approx(loss, rel=1e-3)
    assert found.left_out == 0
    assert found.adapter.sum() > found.base.sum()  # the adapter knows the format and the labels


def test_rows_past_the_context_are_left_out_and_counted(loaded, monkeypatch):
    from dspy_lora.evaluation import likelihood

    revision, base, examples, (model, tokenizer) = loaded
    monkeypatch.setattr(likelihood, "_load", lambda *_: (model, tokenizer))
    longest = model.config.get_text_config().max_position_embeddings
    long = render(SIGNATURE, [{"text": "word " * longest, "label": "term"}])
    found = likelihood.likelihoods(base, revision.path, [*examples[:2], *long])
    assert (len(found.tokens), found.left_out) == (2, 1)


def test_a_batch_that_does_not_fit_is_halved(loaded, monkeypatch):
    import torch

    from dspy_lora.evaluation import likelihood

    revision, base, examples, pair = loaded
    monkeypatch.setattr(likelihood, "_load", lambda *_: pair)
    examples, real = examples[:3], likelihood._batch
    whole = likelihood.likelihoods(base, revision.path, examples)

    def at_most(size):
        def batch(model, rows):
            if len(rows) > size:
                raise torch.OutOfMemoryError
            return real(model, rows)

        return batch

    monkeypatch.setattr(likelihood, "_batch", at_most(2))
    assert likelihood.likelihoods(base, revision.path, examples).adapter == pytest.approx(whole.adapter, rel=1e-3)
    monkeypatch.setattr(likelihood, "_batch", at_most(0))
    with pytest.raises(ConfigError, match="out of GPU memory"):
        likelihood.likelihoods(base, revision.path, examples)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def lms(monkeypatch):
    """What the command makes instead of LoRALMs: adapters know the answers, the base says 'term'."""
    made = []

    def make(model, domain=None, **settings):
        lm = right() if domain else wrong()
        lm.kill = lambda: None
        made.append((model, domain, settings))
        return lm

    monkeypatch.setattr(command, "LoRALM", make)
    return made


@pytest.fixture
def evaluate(tmp_path, capsys):
    def evaluate(*words):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        args = parser.parse_args(["--output", str(tmp_path / "out"), "--base-model", "seedling", *map(str, words)])
        assert command.run(args) == 0
        return capsys.readouterr().out

    return evaluate


FAST = ("--turns", "1", "--no-perplexity")


def test_the_command_reports_on_the_published_adapter(evaluate, lms, rows_file, tmp_path, loaded, monkeypatch):
    from dspy_lora.evaluation import likelihood

    monkeypatch.setattr(likelihood, "_load", lambda *_: loaded[-1])
    out = evaluate("--domain", "legal", "--test-data", rows_file, "--turns", "1")
    revision = AdapterRegistry(PACKAGED_ROOT).resolve("legal")
    assert [(model, domain) for model, domain, _ in lms] == [("seedling", revision.ref), ("seedling", None)]
    assert all(settings["cache"] is False for *_, settings in lms)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    exact, macro, perplexity = report["measures"]
    assert (exact["adapter"]["value"], exact["base"]["value"]) == (1.0, pytest.approx(1 / 3))
    assert exact["difference"]["low"] > 0 and exact["p_value"] < 0.001
    assert macro["base"]["value"] == pytest.approx((2 * 8 / 32) / 3)
    assert perplexity["measure"] == "perplexity" and perplexity["adapter"]["value"] > 1
    assert report["parameters"]["trained"] == 1_105_920
    assert report["data"]["rows"] == 24 and report["perplexity"]["rows"] == 24
    assert report["overhead"]["turns"] == 1 and report["overhead"]["batch"] == 24
    assert {each["label"]: each["support"] for each in report["labels"]} == dict.fromkeys(KINDS, 8)
    assert "training_cost" not in report and "$" not in out  # no rate was given
    markdown = (tmp_path / "out" / "report.md").read_text()
    for words in ("exact match", "macro-F1", "perplexity", "answers a second", "1,105,920", "confusion.png", "audit"):
        assert words in markdown
    assert (tmp_path / "out" / "confusion.png").is_file()
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    given = {"row": 2, "reference": "audit rights", "adapter": "audit rights", "base": "term"}
    assert answers[1] == given | {"adapter_problem": None, "base_problem": None}
    assert "macro-F1" in out and "1,105,920" in out
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "answers.jsonl", "confusion.png", "report.json", "report.md",
    ]  # fmt: skip


def test_an_answer_that_is_missing_says_why(evaluate, rows_file, tmp_path, monkeypatch):
    def make(model, domain=None, **_):
        lm = right() if domain else Mute()
        lm.kill = lambda: None
        return lm

    monkeypatch.setattr(command, "LoRALM", make)
    evaluate("--domain", "legal", "--test-data", rows_file, *FAST, "--turns", "0", "--no-picture")
    answer = json.loads((tmp_path / "out" / "answers.jsonl").read_text().splitlines()[0])
    assert (answer["adapter_problem"], answer["base_problem"]) == (None, "unparsed")


def test_perplexity_fails_before_anyone_is_asked(evaluate, lms, rows_file, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(command, "likelihoods", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate("--domain", "legal", "--test-data", rows_file)
    assert not lms


def test_a_picture_of_an_earlier_report_goes(evaluate, lms, rows_file, tmp_path):
    words = ("--domain", "legal", "--test-data", rows_file, *FAST, "--turns", "0")
    evaluate(*words)
    assert (tmp_path / "out" / "confusion.png").exists()
    evaluate(*words, "--no-picture")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["answers.jsonl", "report.json", "report.md"]


def test_a_rate_gives_the_cost_of_the_published_training(evaluate, lms, rows_file, tmp_path):
    out = evaluate("--domain", "legal", "--test-data", rows_file, *FAST, "--no-picture", "--rate", "2")
    seconds = AdapterRegistry(PACKAGED_ROOT).resolve("legal").metadata["wall_seconds"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["training_cost"]["dollars"] == pytest.approx(2 * seconds / 3600)
    assert "training cost: $" in out
    assert not (tmp_path / "out" / "confusion.png").exists()
    assert "confusion.png" not in (tmp_path / "out" / "report.md").read_text()


def test_a_folder_is_evaluated_without_being_published(evaluate, lms, rows_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = AdapterRegistry(PACKAGED_ROOT).resolve("legal")
    folder = tmp_path / "run" / "adapter"
    shutil.copytree(source.path, folder)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"gpu_hours": 2}))
    words = ("--domain", "legal", "--test-data", rows_file, "--adapter-path", folder, *FAST)
    out = evaluate(*words, "--rows", "5", "--run", tmp_path / "run", "--rate", "3")
    assert lms[0][1] == source.ref and lms[0][2]["registry"] not in (None, str(tmp_path))
    assert read_card(tmp_path / "run") == {"gpu_hours": 2}
    assert "5 rows" in out and "training cost: $6.00" in out
    assert not (tmp_path / "adapters").exists()
    assert "macro-F1" in out  # 5 rows of a file whose references are labels


def test_a_run_of_another_adapter_gives_no_cost(evaluate, lms, rows_file, tmp_path):
    other = AdapterRegistry(PACKAGED_ROOT).resolve("financial")
    shutil.copytree(other.path, tmp_path / "run" / "adapter")
    words = ("--domain", "legal", "--test-data", rows_file, *FAST, "--rate", "1", "--run", tmp_path / "run")
    with pytest.raises(ConfigError, match="its adapter is not 'legal@"):
        evaluate(*words)
    shutil.rmtree(tmp_path / "run" / "adapter")
    with pytest.raises(ConfigError, match=r"run\.json cannot be read"):
        evaluate(*words)


def test_data_root_holds_the_domains_test_rows(evaluate, lms, rows_file, tmp_path):
    folder = tmp_path / "data" / load_config().domain("legal").data
    folder.mkdir(parents=True)
    shutil.copy(rows_file, folder / "test.jsonl")
    assert "24 rows" in evaluate("--domain", "legal", "--data-root", tmp_path / "data", *FAST, "--no-picture")


def test_what_is_wrong_is_said_before_anything_runs(evaluate, lms, rows_file, tmp_path):
    ok = ("--domain", "legal", "--test-data", rows_file)
    with pytest.raises(UnknownDomainError, match="Did you mean 'legal'"):
        evaluate("--domain", "leagl", "--test-data", rows_file)
    for words, says in (
        ((*ok, "--rows", "0"), "at least one row"),
        ((*ok, "--turns", "-1"), "0 takes no time"),
        ((*ok, "--systems", "legal"), "is for --irt"),
        ((*ok, "--run", tmp_path), "--rate"),
        ((*ok, "--irt", "--rate", "1"), "--irt compares published"),
        *(
            ((*ok, mode, *each), "leave --turns, --no-perplexity and --no-picture out")
            for mode in ("--irt", "--retention")
            for each in (("--turns", "5"), ("--no-perplexity",), ("--no-picture",))
        ),
        ((*ok, "--adapter-path", tmp_path, "--registry", tmp_path), "Leave --registry out"),
        ((*ok, "--rate", "-1"), "0 or more"),
    ):
        with pytest.raises(ConfigError, match=says):
            evaluate(*words)
    with pytest.raises(UnknownAdapterError, match="dspy-lora train"):
        evaluate(*ok, "--registry", tmp_path / "empty")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(DataError, match="holds no rows"):
        evaluate("--domain", "legal", "--test-data", empty)
    empty.write_text('{"text": "a"}\n{"text": "b", "label": "c"}\n')
    with pytest.raises(DataError, match=r"line 1: .*'label'"):
        evaluate("--domain", "legal", "--test-data", empty)
    with pytest.raises(DataError, match="cannot be read"):
        evaluate("--domain", "legal", "--data-root", tmp_path)
    with pytest.raises(PublishError, match="cannot write the report"):
        evaluate(*ok, "--output", rows_file)
    assert not lms


def test_an_adapter_of_another_base_is_refused(evaluate, rows_file, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(resolve_base("seedling").folder, base)
    (base / "config.json").write_text((base / "config.json").read_text() + "\n")  # another revision
    words = ("--domain", "legal", "--test-data", rows_file, "--registry", PACKAGED_ROOT, "--base-model", base)
    with pytest.raises(AdapterError, match="was made for base 'seedling'"):
        evaluate(*words)
    with pytest.raises(ConfigError, match="two or more"):  # the base alone is left
        evaluate(*words, "--irt")
    folder = tmp_path / "adapter"
    shutil.copytree(AdapterRegistry(PACKAGED_ROOT).resolve("legal").path, folder)
    (folder / "metadata.json").write_text('{"base_revision": "0123456789ab"}')
    with pytest.raises(AdapterError, match="trained on base revision '0123456789ab'"):
        evaluate("--domain", "legal", "--test-data", rows_file, "--adapter-path", folder)


def test_reports_are_as_before_where_the_disk_refuses(evaluate, lms, rows_file, tmp_path, monkeypatch):
    words = ("--domain", "legal", "--test-data", rows_file, *FAST)
    evaluate(*words)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Confusion, "draw", refuse)
    with pytest.raises(PublishError, match="No space left"):
        evaluate(*words, "--rows", "3")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_perplexity_joins_the_other_measures():
    evaluation = evaluate_adapter(right(), wrong(), SIGNATURE, ROWS, turns=0)
    sums = Likelihoods(np.full(24, -1.0), np.full(24, -3.0), np.full(24, 2.0), 0)
    *_, perplexity = with_perplexity(evaluation, sums).measures
    assert perplexity.adapter == scores.Estimate(pytest.approx(math.exp(0.5)), None, None)


# -- many systems ------------------------------------------------------------------------------------------------------


@pytest.fixture
def graded(monkeypatch):
    """Adapters of the registry that know more and more rows; row 5 is mislabelled, so the better ones miss it."""
    refs = [each.ref for each in AdapterRegistry(PACKAGED_ROOT).list()]

    def make(model, domain=None, **_):
        skill = -1.0 if domain is None else refs.index(domain) / 3
        random = np.random.default_rng(0 if domain is None else 1 + refs.index(domain))
        known = [random.random() < 1 / (1 + math.exp(-2 * (skill - (i % 6) / 1.5))) for i in range(len(ROWS))]
        known[4] = skill < 1.5
        lm = stand_in([row["label"] if ok else "?" for row, ok in zip(ROWS, known, strict=True)])
        lm.kill = lambda: None
        return lm

    monkeypatch.setattr(command, "LoRALM", make)
    return refs


def test_irt_ranks_the_systems_and_names_the_row_that_looks_mislabelled(
    graded, evaluate, rows_file, tmp_path, caplog, monkeypatch
):
    seen, real = [], systems.suspicious_items
    monkeypatch.setattr(systems, "suspicious_items", lambda *both: seen.append(both) or real(*both))
    out = evaluate("--domain", "legal", "--test-data", rows_file, "--irt")
    state = json.loads((tmp_path / "out" / "irt.json").read_text())
    assert len(state["systems"]) == 13 and state["model"] == "2pl"
    ranking = [each["system"] for each in state["systems"]]
    assert set(ranking[:5]) <= set(graded[5:]) and ranking.index("base") > 7
    abilities = [each["ability"] for each in state["systems"]]
    assert abilities == sorted(abilities, reverse=True)
    assert [each["item"] for each in state["suspects"]] == ["row 5"]
    assert len(state["scores"]["base"]) == 24 and set(state["scores"]["base"]) <= {0, 1}
    assert "Rows that tell these systems apart" in out and "row 5" in out
    assert "ability, logits [95 %]" in (tmp_path / "out" / "irt.md").read_text()
    assert "24 items" in out and "24 items" not in caplog.text  # a note, not logged beside it
    assert "Rows that look mislabelled:" in out
    one = Suspect("row 5", "term: clause", 0.9, -0.5, 0.5)
    many = SystemsReport("legal", "f", *seen[0], (one,) * 11)
    assert "Rows that look mislabelled (the first 10 of 11" in many.to_text()


def test_irt_takes_the_systems_that_are_named(graded, evaluate, rows_file, tmp_path, caplog):
    evaluate("--domain", "legal", "--test-data", rows_file, "--irt", "--systems", "base", "legal", "legal", "research")
    state = json.loads((tmp_path / "out" / "irt.json").read_text())
    assert sorted(each["system"].partition("@")[0] for each in state["systems"]) == ["base", "legal", "research"]
    assert state["model"] == "rasch"
    with pytest.raises(ConfigError, match="two or more"):
        evaluate("--domain", "legal", "--test-data", rows_file, "--irt", "--systems", "base")
    with pytest.raises(UnknownAdapterError, match="Did you mean 'research'"):
        evaluate("--domain", "legal", "--test-data", rows_file, "--irt", "--systems", "base", "reserch")


def test_labels_are_told_from_texts_on_real_rows(data_root):
    from dspy_lora.prepare.split import are_labels
    from dspy_lora.training.data import read_rows

    config = load_config()
    files = {name: data_root / "domains" / str(config.domain(name).data) / "test.jsonl" for name in config.domains}
    texts = {name for name, file in files.items() if not are_labels([row["label"] for row in read_rows(file)])}
    assert texts == {"manufacturing"}
