"""``dspy-lora bench --sweep``: its points, what is refused before an engine starts, its file and its picture."""

import argparse
import json
import sys

import pytest

from dspy_lora.bench import command, picture, sweep
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
    args = parse("--shape", "4b")
    key, points = sweep.points(text, args)
    assert [getattr(point, key) for point in points] == set_to
    assert [sweep.value_of(key, point) for point in points] == values
    assert vars(args) == vars(parse("--shape", "4b"))


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
    ],
)
def test_mistakes_show_before_an_engine_starts(words, message, monkeypatch, capsys):
    monkeypatch.setattr(command, "_run_points", lambda *args: pytest.fail("measured"))
    assert main(["bench", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_picture_without_matplotlib_is_refused_at_once(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(command, "_run_points", lambda *args: pytest.fail("measured"))
    assert main(["bench", *"--shape tiny --sweep rank=8 --picture x.png".split()]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_what_measures_the_seedling_is_left_out_of_a_shape():
    assert {"caller-memory", "endings"} <= set(command._chosen(parse("--all")))
    assert not {"caller-memory", "endings"} & set(command._chosen(parse("--all", "--shape", "tiny")))
    assert "caller-memory" not in command._chosen(parse("--shape", "tiny"))


def test_a_shape_gets_as_many_slots_as_adapters(tmp_path):
    bench = command._bench(parse("--shape", "tiny", "--adapters", "13", "--rank", "8"), tmp_path)
    assert bench.domains[-1] == "adapter-13" and len(bench.adapters) == 13
    assert (bench.settings.engine_args["max_loras"], bench.settings.engine_args["max_lora_rank"]) == (13, 8)
    assert [each.domain for each in bench.fresh(14)][12:] == ["adapter-13", bench.domains[0]]


def test_points_before_a_failure_are_in_the_file(tmp_path, monkeypatch, capsys):
    figures = iter([[Figure("2 adapters over base", "x", (0.5,))]])
    monkeypatch.setattr(command, "_bench", lambda point, folder: None)
    monkeypatch.setattr(command, "_measure", lambda bench, names: next(figures))
    words = ["bench", *"--shape tiny --sweep rank=8,16 --json".split(), str(tmp_path / "x.json")]
    with pytest.raises(StopIteration):
        main(words)
    written = json.loads((tmp_path / "x.json").read_text())
    assert [(point["rank"], point["figures"][0]["median"]) for point in written["points"]] == [(8, 0.5)]
    assert "figures" not in written and capsys.readouterr().out == "rank = 8\nrank = 16\n"


def test_lines_are_the_ratios_by_name_of_the_points_that_have_them():
    def point(value, *some):
        return [
            Figure("base", "tokens/s", (100.0,)),
            Figure("one over base", "x", (value,)),
            *(Figure(f"{number} mixed over base", "x", (value / 2,)) for number in some),
            Figure("one over base", "x", (value * 2,)),
        ]

    found = picture.lines([point(0.8), point(0.4, 4), point(0.2, 4, 16)])
    assert {name: {place: each.median for place, each in line.items()} for name, line in found.items()} == {
        "one over base": {0: 0.8, 1: 0.4, 2: 0.2},
        "one over base'": {0: 1.6, 1: 0.8, 2: 0.4},
        "4 mixed over base": {1: 0.2, 2: 0.1},
        "16 mixed over base": {2: 0.1},
    }


def test_a_picture_is_drawn_over_numbers_and_over_shapes(tmp_path):
    figures, more = [Figure("a", "x", (0.5, 0.7, 0.6))], [Figure(name, "x", (0.5, 0.4)) for name in "ba"]
    for key, values in (("rank", [8, 64]), ("shape", ["tiny", "8b"])):
        picture.draw(key, values, [figures, more], tmp_path / f"{key}.png")
        assert (tmp_path / f"{key}.png").read_bytes().startswith(b"\x89PNG")
