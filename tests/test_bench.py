"""The benchmark: its figures and bars, its workload, and one short run on the real engine. No test looks at a clock."""

import json
import os
import threading

import dspy
import pytest

from dspy_lora.adapters.registry import AdapterRegistry
from dspy_lora.bench import command, measure, memory, shapes, workload
from dspy_lora.bench.measure import Figure
from dspy_lora.cli import main


def test_a_bar_is_held_against_the_median():
    assert Figure("", "x", (0.9, 1.0, 5.0), least=0.95).holds is True
    assert Figure("", "x", (0.9, 0.9, 5.0), least=0.95).holds is False
    assert Figure("", "x", (0.9, 1.0, 5.0), most=0.95).holds is False
    assert Figure("", "x", (0.9,)).holds is None


def test_a_row_shows_the_spread_and_the_bar():
    line = command.row(Figure("n=8 over n=1", "x", (1.5, 1.25, 3.0), most=2.0))
    assert line.split() == ["n=8", "over", "n=1", "(x)", "1.50", "1.25", "3.00", "<=", "2:", "holds"]
    assert command.row(Figure("calls", "calls/s", (123.4, 120.0))).split() == [
        "calls",
        "(calls/s)",
        "122",
        "120",
        "123",
    ]
    assert command.row(Figure("", "x", (0.5,), least=0.95)).endswith(">= 0.95: FAILS")


def test_questions_come_from_all_domains_and_differ_between_seeds():
    asked, others = workload.questions(24, 1), workload.questions(24, 2)
    assert [question.domain for question in asked[:12]] == [question.domain for question in asked[12:]]
    assert len({question.domain for question in asked}) == 12
    assert not {question.text for question in asked} & {question.text for question in others}
    assert asked == workload.questions(24, 1)
    assert asked[0].messages[0]["role"] == "system" and asked[0].text in asked[0].messages[-1]["content"]


def test_any_text_is_an_answer():
    signature = dspy.Signature("text -> label, why")
    assert workload.AnyText().parse(signature, "so") == {"label": "so", "why": "so"}


def test_calls_in_threads_run_at_once_and_each_once():
    meeting, done = threading.Barrier(4, timeout=120), []

    def call(index):
        meeting.wait()
        done.append(index)

    workload.in_threads([lambda index=index: call(index) for index in range(8)], 4)
    assert sorted(done) == list(range(8))


def test_an_error_in_a_thread_is_raised():
    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        workload.in_threads([fail] * 4, 2)


def test_memory_of_a_process_and_its_group_is_counted():
    own = memory.megabytes()
    assert 10 < own < 20_000
    assert memory.group_megabytes(os.getpid()) >= own * 0.9


def test_settings_of_dspy_are_put_back():
    before = dspy.settings.adapter
    with measure.dspy_settings(adapter=workload.AnyText()):
        assert isinstance(dspy.settings.adapter, workload.AnyText)
    assert dspy.settings.adapter is before


@pytest.mark.parametrize("engine", ["{", "3"])
def test_an_engine_that_is_no_object_is_refused(engine, capsys):
    assert main(["bench", "--engine", engine]) == 2
    assert "--engine" in capsys.readouterr().err


def test_what_takes_long_runs_only_when_asked_for():
    parser = command.argparse.ArgumentParser()
    command.add_arguments(parser)
    assert not {"soak", "defaults"} & set(command._chosen(parser.parse_args([])))
    assert command._chosen(parser.parse_args(["--all"])) == list(command.MEASUREMENTS)
    assert command._chosen(parser.parse_args(["--only", "soak", "mixed"])) == ["mixed", "soak"]


@pytest.mark.timeout(900)
def test_a_short_run_prints_a_table_and_writes_a_file(tmp_path, capsys, monkeypatch):
    """The engine against plain vLLM, with few calls; whether bars hold is not asked."""
    file, soaked = tmp_path / "bench.json", measure.soak
    monkeypatch.setitem(command.MEASUREMENTS, "soak", lambda bench: soaked(bench, calls=40))
    names = ["throughput", "samples", "mixed", "soak"]
    words = ["bench", "--calls", "12", "--threads", "6", "--repeats", "1", "--json", str(file), "--only", *names]
    assert main(words) in (0, 1)
    shown = capsys.readouterr().out
    written = json.loads(file.read_text())
    assert (written["calls"], written["threads"], written["repeats"]) == (12, 6, 1)
    for figure in written["figures"]:
        assert f"{figure['name']} ({figure['unit']})" in shown
        assert all(value > 0 for value in figure["values"]) or figure["unit"] == "MB"
    assert {figure["name"] for figure in written["figures"]} >= {"DSPy over plain", "n=8 over n=1"}


def test_a_model_of_a_shape_takes_no_space_and_its_adapters_fit(tmp_path):
    model = shapes.make_model("tiny", tmp_path / "model")
    weights = model / "model.safetensors"
    # embeddings, and for each of two layers q, o of 128 x 128, k, v of 64 x 128, three of 128 x 256; two bytes each
    assert weights.stat().st_size > 2 * (8192 * 128 + 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256))
    assert weights.stat().st_blocks * 512 < 100_000
    shapes.publish_adapters("tiny", model, tmp_path / "registry", ["a", "b"], 8)
    found = AdapterRegistry(tmp_path / "registry").list()
    assert [(each.adapter, each.rank) for each in found] == [("a", 8), ("b", 8)]
    assert found[0].revision != found[1].revision


def test_what_adapters_cost_on_random_weights(tmp_path, capsys):
    file = tmp_path / "bench.json"
    words = "--shape tiny --only adapters --calls 12 --repeats 1 --answers 2 --words 8".split()
    assert main(["bench", *words, "--json", str(file)]) == 0
    figures = json.loads(file.read_text())["figures"]
    names = [figure["name"] for figure in figures]
    assert names[:3] == ["base model", "one adapter over base", "twelve mixed over base"]
    assert names[4:6] == ["base model, vLLM's own LoRA", "one adapter over base, vLLM's own LoRA"]
    assert all(figure["median"] > 0 and figure["holds"] is None for figure in figures)
    assert "twelve one after another over base (x)" in capsys.readouterr().out


def test_how_soon_a_program_ends_is_printed(capsys):
    assert main(["bench", "--only", "endings", "--repeats", "1"]) in (0, 1)
    shown = capsys.readouterr().out
    assert "Ctrl-C in a call until the program goes on (s)" in shown
    assert "nothing of its engine is left (s)" in shown
