"""``dspy-lora bench --sweep``: its points, what is refused before an engine starts, its file and its picture."""

import argparse
import json
import sys
from types import SimpleNamespace

import pytest

from dspy_lora.bench import command, picture, report, sweep
from dspy_lora.bench.figure import Figure
from dspy_lora.cli import main
from dspy_lora.errors import ConfigError


def parse(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(list(words))


@pytest.mark.parametrize(
    ("text", "values", "set_to"),
    [
        ("adapters=1,64", [1, 64], [1, 64]),
        ("rank=8,16", [8, 16], [8, 16]),
        ("words=30", [30], [30]),
        ("answers=16,64", [16, 64], [[16], [64]]),
        ("shape=tiny,8b", ["tiny", "8b"], ["tiny", "8b"]),
    ],
)
def test_each_value_is_a_point(text, values, set_to):
    args = parse()
    key, points = sweep.points(text, args)
    assert [getattr(point, key) for point in points] == set_to
    assert [sweep.value_of(key, point) for point in points] == values
    assert vars(args) == vars(parse())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rang=8", "'rang' is no setting to be swept. Did you mean 'rank'"),
        ("rank=8,8", "give different values, as in --sweep rank=8,16,32"),
        ("rank", "give different values"),
        ("rank=8,x", "--sweep rank: 'x' is no whole number above 0"),
        ("words=0", "'0' is no whole number above 0"),
        ("shape=tiny,9b", "'9b' is none of 8b, 4b"),
    ],
)
def test_what_cannot_be_swept_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        sweep.points(text, parse())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--shape tiny --rank 12", "--rank 12: vLLM takes 1, 8, 16, 32"),
        ("--shape tiny --sweep rank=8,4", "--rank 4: vLLM takes"),
        ("--rank 8", "--rank is of the adapters that --shape makes"),
        ("--sweep adapters=2,4", "--adapters is of the adapters that --shape makes"),
        ("--shape tiny --adapters 65", "--adapters 65: give 1 to 64"),
        ("--shape tiny --only mixed endings caller-memory", "endings and caller-memory always measure the seedling"),
        ("--sweep shape=tiny --only endings", "endings always measure the seedling"),
        ("--picture x.png", "--picture draws what --sweep measures"),
        ("--calls 0", "--calls 0: give 1 at least"),
        ("--threads -1", "--threads -1: give 1 at least"),
        ("--repeats 0", "--repeats 0: give 1 at least"),
        ("--words 0", "--words 0: give 1 at least"),
        ("--answers 16 0", "--answers 0: give 1 at least"),
        ("--joint x --seeds 0", "--seeds 0: give 1 at least"),
        ("--only samples mixed --calls 11", "--calls 11: mixed asks 12 adapters. Give 12 at least"),
        ("--only adapters --calls 3 --shape tiny --sweep adapters=3,4", "--calls 3: adapters asks 4 adapters"),
        ("--only loading --shape tiny --adapters 3", "loading wants 4 adapters at least, and there are 3"),
        ('--only loading --engine {"max_loras":1}', "loading wants 2 slots at least"),
        ("--json none/x.json", "--json none/x.json: give a file in a folder that is there"),
        ("--json /", "--json /: give a file"),
        ("--sweep words=8,16 --picture none/x.png", "--picture none/x.png: give a file in a folder that is there"),
        ("--sweep words=8,16 --picture x.doc", "--picture x.doc: matplotlib writes eps, "),
        ("--base-model m --only endings", "endings always measure the seedling. Leave the other model or them out"),
        ("--base-model m --sweep shape=tiny,8b", "--base-model m: a shape is measured instead of it"),
        ("--shape tiny --rank 64 --sweep rank=8,16", "--rank and --sweep rank=8,16: give one of them"),
        ("--sweep answers=16,64 --only mixed", "--answers is read by throughput, latency"),
        ("--words 8 --only endings", "--words is read by throughput, latency"),
    ],
)
def test_mistakes_show_before_an_engine_starts(words, message, monkeypatch, capsys):
    monkeypatch.setattr(command, "_run_points", lambda *args: pytest.fail("measured"))
    assert main(["bench", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_picture_without_matplotlib_is_refused_at_once(monkeypatch, capsys):
    for name in ("matplotlib", "matplotlib.backend_bases"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(command, "_run_points", lambda *args: pytest.fail("measured"))
    assert main(["bench", *"--shape tiny --sweep rank=8 --picture x.png".split()]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_what_measures_the_seedling_is_left_out_of_a_shape():
    assert {"caller-memory", "endings"} <= set(command._chosen(parse("--all")))
    assert not {"caller-memory", "endings"} & set(command._chosen(parse("--all", "--shape", "tiny")))
    for model in ("--shape", "tiny"), ("--base-model", "m"):
        assert "caller-memory" not in command._chosen(parse(*model))


def test_a_shape_gets_as_many_slots_as_adapters(tmp_path):
    bench = command._bench(parse("--shape", "tiny", "--adapters", "13", "--rank", "8"), tmp_path)
    assert bench.domains[-1] == "adapter-13" and len(bench.adapters) == 13
    assert (bench.settings.engine_args["max_loras"], bench.settings.engine_args["max_lora_rank"]) == (13, 8)
    assert [each.domain for each in bench.fresh(14)][12:] == ["adapter-13", bench.domains[0]]
    found = report.effective(bench)
    assert (found["base_model"], found["adapters"], found["ranks"]) == ("tiny", 13, [8])
    assert (found["words"], found["answers"]) == ([30, 50], [16, 64])


def test_what_was_measured_before_a_failure_is_in_the_file(tmp_path, monkeypatch, capsys):
    def bench(point, folder):
        described = {"model": "m", "shape": "tiny", "domains": ["a"], "words": (30, 50), "answers": (16,)}
        return SimpleNamespace(
            **described, adapters=[SimpleNamespace(rank=point.rank)], preload=lambda: None, close=lambda: None
        )

    figures = iter([Figure("a", "x", (0.5,)), Figure("b", "x", (0.6,)), Figure("a", "x", (0.7,))])
    for name in ("http", "samples"):
        monkeypatch.setitem(command.MEASUREMENTS, name, lambda bench: [next(figures)])
    monkeypatch.setattr(command, "_bench", bench)
    words = ["bench", *"--shape tiny --only http samples --sweep rank=8,16 --json".split(), str(tmp_path / "x.json")]
    with pytest.raises(StopIteration):
        main(words)
    written = json.loads((tmp_path / "x.json").read_text())
    assert [(point["value"], point["ranks"]) for point in written["points"]] == [(8, [8]), (16, [16])]
    assert [[each["median"] for each in point["figures"]] for point in written["points"]] == [[0.5, 0.6], [0.7]]
    assert "figures" not in written and "rank = 16\n" in capsys.readouterr().out


def test_lines_are_the_ratios_by_name_of_the_points_that_have_them():
    def point(value, *some):
        return [
            Figure("base", "tokens/s", (100.0,)),
            Figure("one over base", "x", (value,)),
            *(Figure(f"{number} mixed over base", "x", (value / 2,)) for number in some),
        ]

    found = picture.lines([point(0.8), point(0.4, 4), point(0.2, 4, 16)])
    assert {name: {place: each.median for place, each in line.items()} for name, line in found.items()} == {
        "one over base": {0: 0.8, 1: 0.4, 2: 0.2},
        "4 mixed over base": {1: 0.2, 2: 0.1},
        "16 mixed over base": {2: 0.1},
    }


def test_a_picture_is_drawn_over_numbers_and_over_shapes(tmp_path):
    figures, more = [Figure("a", "x", (0.5, 0.7, 0.6))], [Figure(name, "x", (0.5, 0.4)) for name in "ba"]
    for key, values in (("rank", [8, 64]), ("shape", ["tiny", "8b"])):
        picture.draw(key, values, [figures, more], tmp_path / f"{key}.png")
        assert (tmp_path / f"{key}.png").read_bytes().startswith(b"\x89PNG")
