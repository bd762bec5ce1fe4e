"""The benchmark: its figures and bars, its workload, and one short run on the real engine. No test looks at a clock."""

import contextlib
import json
import os
import threading
from types import SimpleNamespace

import dspy
import pytest

from dspy_lora.adapters.registry import AdapterRegistry
from dspy_lora.bench import (
    adapters,
    command,
    defaults,
    latency,
    measure,
    memory,
    over_http,
    report,
    servers,
    shapes,
    stream,
    workload,
)
from dspy_lora.bench.bench import Bench
from dspy_lora.bench.figure import Figure
from dspy_lora.cli import main
from dspy_lora.engine.protocol import Delta, Token
from dspy_lora.errors import EngineError, EngineStartError


def test_a_bar_is_held_against_the_median():
    assert Figure("", "x", (0.9, 1.0, 5.0), least=0.95).holds is True
    assert Figure("", "x", (0.9, 0.9, 5.0), least=0.95).holds is False
    assert Figure("", "x", (0.9, 1.0, 5.0), most=0.95).holds is False
    assert Figure("", "x", (0.9,)).holds is None


def test_a_row_shows_the_spread_and_the_bar():
    line = report.row(Figure("n=8 over n=1", "x", (1.5, 1.25, 3.0), most=2.0))
    assert line.split() == ["n=8", "over", "n=1", "(x)", "1.50", "1.25", "3.00", "<=", "2:", "holds"]
    assert report.row(Figure("calls", "calls/s", (123.4, 120.0))).split() == [
        "calls",
        "(calls/s)",
        "122",
        "120",
        "123",
    ]
    assert report.row(Figure("", "x", (0.5,), least=0.95)).endswith(">= 0.95: FAILS")


def test_questions_come_from_all_domains_and_differ_between_seeds():
    asked, others = workload.questions(24, 1), workload.questions(24, 2)
    assert [question.domain for question in asked[:12]] == [question.domain for question in asked[12:]]
    assert len({question.domain for question in asked}) == 12
    assert not {question.text for question in asked} & {question.text for question in others}
    assert asked == workload.questions(24, 1)
    assert asked[0].messages[0]["role"] == "system" and asked[0].text in asked[0].messages[-1]["content"]


def test_adapters_that_are_no_domain_have_names_of_their_own_and_the_domains_tasks():
    names = workload.adapter_names(14)
    assert names[12:] == ["adapter-13", "adapter-14"] and workload.adapter_names(3) == names[:3]
    assert workload.signature("adapter-14").instructions == workload.signature(names[1]).instructions
    assert [each.domain for each in workload.questions(5, 1, names=names[:2])] == [*names[:2], *names[:2], names[0]]


def test_the_first_token_and_the_further_ones_are_told_apart():
    asked = []

    def ask(prompt, tokens):
        asked.append(prompt)
        return 0.5 + 0.01 * (tokens - 1)

    first, further = latency.first_and_further(workload.questions(8, 1), ask, 11)
    assert (round(first, 6), round(further, 6)) == (500, 10)
    assert len({" ".join(prompt.split()[:8]) for prompt in asked}) == 8  # nothing for a prefix cache


def test_a_stall_is_the_longest_gap_in_the_span_over_the_usual_one():
    stamps = [0.0, 0.01, 0.02, 0.09, 0.10, 0.11, 0.61]
    assert stream.stall_ms(stamps, 0.03, 0.04) == pytest.approx(60)  # a gap that reaches into the span
    assert stream.stall_ms(stamps, 0.03, 0.105) == pytest.approx(60)
    assert stream.stall_ms(stamps, 0.101, 0.105) == pytest.approx(0)  # neither that before nor that after it


class _Client:
    """Sends what a test says."""

    def __init__(self):
        self.aborted = False

    def submit(self, request, on_delta):
        assert request.stream and request.sampling["ignore_eos"] and request.adapter.name == "legal@1"
        self.on_delta = on_delta
        return request

    def abort(self, pending):
        self.aborted = True


def test_every_token_of_a_stream_is_stamped_and_one_that_ends_is_an_error():
    client = _Client()
    lm = SimpleNamespace(adapter=SimpleNamespace(ref="legal@1", path="/none"))
    with pytest.raises(EngineError, match="after 3 tokens"), stream.Stream(client, lm) as answer:
        for delta in (Delta(1, "a"), Delta(1, logprobs=[Token("b", 0.0, 1), Token("c", 0.0, 2)])):
            threading.Timer(0.05, client.on_delta, [delta]).start()
            answer.more(1)
        assert answer.stamps == sorted(answer.stamps) and len(answer.stamps) == 3
        client.on_delta(None)
        answer.more(1)
    assert client.aborted


def test_loralm_is_compared_with_the_number_of_api_servers_that_is_fastest():
    measured = {
        1: {"LoRALM": [(1.0, 300.0)], "dspy.LM over HTTP": [(4.0, 100.0)]},
        4: {"LoRALM": [(1.0, 300.0)], "dspy.LM over HTTP": [(2.0, 200.0)]},
    }
    assert over_http.fastest(measured) == 4
    cpu, calls = over_http.compared(measured[4], None)
    assert (cpu.values, calls.values, calls.least, cpu.most) == ((0.5,), (1.5,), 1.3, 0.6)
    assert over_http.compared(measured[4], "0.6b")[1].least == 1.5


@pytest.fixture
def plain_vllm(monkeypatch):
    """Starts plain vLLM that is this script."""
    child = servers._child

    def start(script):
        script = f"import sys\nsay = lambda text: print(text, flush=True)\n{script}"
        monkeypatch.setattr(servers, "_child", lambda arguments, log: child(["-c", script], log))
        return servers.raw_vllm(_bench(None).settings, [])

    return start


@pytest.mark.parametrize("said", ["", """say('{"device": "cpu"}')"""], ids=["at its start", "while idle"])
def test_plain_vllm_that_ends_says_why(said, plain_vllm):
    with (
        pytest.raises(EngineStartError, match=r"(?s)plain vLLM ended.*no memory"),
        plain_vllm(f"{said}\nsys.exit('no memory')") as raw,
    ):
        raw._process.wait()
        raw.seconds([[]], [None], 1)


def test_answers_that_the_context_cuts_short_are_no_figure(plain_vllm):
    script = """say('{"device": "cpu"}')\nfor line in sys.stdin:\n    say('{"seconds": 2.0, "tokens": 60}')"""
    asked = (workload.questions(3, 1), [None] * 3)
    with plain_vllm(script) as raw:
        assert raw.tokens_a_second([asked, asked], 20) == 30.0
        with pytest.raises(EngineError, match=r"answers of 21 tokens do not fit .* 60 tokens. Give fewer --answers"):
            raw.tokens_a_second([asked], 21)


class _Raw:
    """Plain vLLM on a GPU, whose adapters halve its speed."""

    device = "cuda"

    def tokens_a_second(self, batches, tokens):
        return 100.0 if batches[0][1][0] is None else 50.0


@pytest.fixture
def started(monkeypatch):
    """Settings of the plain vLLMs that were started."""
    found = []

    @contextlib.contextmanager
    def start(settings, revisions):
        found.append(settings.engine_args)
        yield _Raw()

    monkeypatch.setattr(adapters, "raw_vllm", start)
    return found


def _bench(shape, engine=None, names=None, rank=16):
    return Bench("seedling", engine or {}, 24, 1, 1, names=names, shape=shape, beneath={"max_lora_rank": rank})


@pytest.mark.parametrize(
    ("measured", "shape", "count", "rank", "bars"),
    [
        (adapters.adapters, "8b", 12, 16, {"one adapter over base": 0.90, "all adapters mixed over base": 0.88}),
        (adapters.adapters, "8b", 3, 16, {}),
        (adapters.adapters, "8b", 12, 64, {}),
        (adapters.adapters, "4b", 12, 16, {}),
        (adapters.vllm_lora, "8b", 12, 16, {}),
    ],
)
def test_adapters_have_bars_for_the_large_shape_on_a_gpu(measured, shape, count, rank, bars, started):
    bench = _bench(shape, names=workload.adapter_names(count), rank=rank)
    bench.answers = [16]
    figures = measured(bench)
    assert {figure.name: figure.least for figure in figures if figure.least} == bars
    assert ("worker_cls" in started[0]) == (measured is adapters.vllm_lora)


def test_adapters_are_measured_in_batches_of_some_and_all_for_each_length(started):
    bench = _bench("4b")
    kinds = ["one adapter", "4 adapters mixed", "all adapters mixed", "all adapters one after another"]
    names = [figure.name for figure in adapters.adapters(bench)]
    every = [(what, tokens) for tokens in (16, 64) for what in ("base model", *(f"{kind} over base" for kind in kinds))]
    assert names == [f"{what}, {tokens} tokens an answer" for what, tokens in every]
    batches = {kind: of() for kind, of in adapters._kinds(bench).items()}
    assert [len(batches[kind]) for kind in kinds] == [1, 1, 1, 12]
    assert [len(set(batches[kind][0][1])) for kind in kinds] == [1, 4, 12, 1]
    assert all(len(asked) == len(names) == 2 for asked, names in batches[kinds[-1]])


@pytest.mark.parametrize(("threads", "at_once"), [(1, 1), (200, 128)])
def test_plain_vllm_runs_as_many_requests_at_once_as_loralm_s_side_does(threads, at_once, started, monkeypatch):
    monkeypatch.setattr(measure, "raw_vllm", adapters.raw_vllm)
    bench = _bench("8b")
    bench.threads = threads
    monkeypatch.setattr(type(bench.first), "engine_stats", lambda self: {"max_num_seqs": 128})
    monkeypatch.setattr(bench, "run", lambda asked, call: 1.0)
    figures = measure.throughput(bench)
    assert started[0]["max_num_seqs"] == at_once
    assert {figure.least for figure in figures} == {None, 0.97}
    assert [figure.name for figure in figures if figure.unit == "x"] == [
        f"DSPy over plain, {tokens} tokens an answer" for tokens in (16, 64)
    ]


def test_what_goes_first_changes_and_the_first_round_does_not_count(monkeypatch):
    order = []

    def timed(name):
        order.append(name)
        return len(order)

    ways = (lambda: timed("a"), lambda: timed("b"))
    assert measure._in_turns(SimpleNamespace(repeats=3), *ways) == [(4, 5, 8), (3, 6, 7)]
    assert "".join(order) == "abbaabba"
    monkeypatch.setattr(measure, "_in_turns", lambda bench, *ways: [(2.0,), (4.0,)])
    for measured, ratio in ((measure.samples, 2.0), (measure.mixed, 2.0)):
        assert measured(_bench(None))[-1].values == (ratio,)


@pytest.mark.parametrize(
    "measured", [measure.engine_memory, lambda bench: measure.soak(bench, calls=10)], ids=["memory", "soak"]
)
def test_memory_is_read_after_prompts_that_begin_with_different_words(measured, monkeypatch):
    asked, seen, bench = [], [], _bench(None)
    monkeypatch.setattr(type(bench.first), "__call__", lambda self, prompt, **settings: asked.append(prompt))
    monkeypatch.setattr(type(bench.first), "engine_stats", lambda self: {"pid": 1})
    monkeypatch.setattr(measure.memory, "group_megabytes", lambda pid, kinds=None: seen.append(len(set(asked))) or 1.0)
    monkeypatch.setattr(measure, "_WARM_UP_CALLS", 100)
    measured(bench)
    assert seen[0] >= 100 and len({" ".join(prompt.split()[:20]) for prompt in asked[:100]}) == 100


@pytest.mark.parametrize(("model", "most"), [("seedling", 4295), ("/models/other", None)])
def test_an_engine_s_memory_has_its_bar_for_the_seedling(model, most, monkeypatch):
    bench = _bench(None)
    bench.model = model
    monkeypatch.setattr(type(bench.first), "engine_stats", lambda self: {"pid": 1})
    monkeypatch.setattr(bench, "run", lambda asked, call: 1.0)
    monkeypatch.setattr(measure.memory, "group_megabytes", lambda pid, kinds=None: 100.0)
    assert [figure.most for figure in measure.engine_memory(bench)] == [most]


def test_defaults_are_ratios_of_the_engine_as_it_is_over_others(monkeypatch):
    """On a CPU the runs before and after each other one, on a GPU the first and the last of all."""
    asked = []

    def speeds(bench, environment, engine):
        asked.append((environment, engine))
        return (10.0 * len(asked), 2.0) if not environment and not engine else (10.0, 4.0)

    for which, names in (("cpu", defaults._CPU_SPEEDS), ("gpu", ("a", "b"))):
        asked.clear()
        monkeypatch.setattr(defaults, f"_{which}_speeds", speeds)
        monkeypatch.setattr(defaults, f"_ON_{which.upper()}", {"x": ({"A": "1"}, {}), "y": ({}, {"b": 2})})
        monkeypatch.setattr(defaults, f"_{which.upper()}_SPEEDS", names)
        found = {figure.name: figure.values for figure in getattr(defaults, f"_on_{which}")(None)}
        last = len(asked)
        assert [asked[0], asked[-1]] == [({}, {})] * 2 and ({"A": "1"}, {}) in asked and ({}, {"b": 2}) in asked
        assert found[f"over x: {names[0]}"] == ((1.0, 3.0) if which == "cpu" else (1.0, last))
        assert found[f"over y: {names[1]}"] == (0.5, 0.5)
        assert found[f"as it is: {names[0]}"] == ((10.0, 30.0, 50.0) if which == "cpu" else (10.0, 10.0 * last))


def test_an_environment_is_put_back(monkeypatch):
    monkeypatch.setenv("KNOWN", "before")
    monkeypatch.delenv("NEW", raising=False)
    with pytest.raises(KeyError), defaults._environment({"KNOWN": "in", "NEW": "in"}):
        assert (os.environ["KNOWN"], os.environ["NEW"]) == ("in", "in")
        raise KeyError
    assert os.environ["KNOWN"] == "before" and "NEW" not in os.environ


def test_two_engines_share_a_gpu_but_for_what_was_asked_for(started):
    asked = {"gpu_memory_utilization": 0.3, "enable_prefix_caching": True}
    benches = [_bench(None), _bench("8b", asked)]
    for bench in benches:
        adapters.adapters(bench)
    assert [bench.settings.engine_args["gpu_memory_utilization"] for bench in benches] == [0.45, 0.3]
    assert [(args["gpu_memory_utilization"], args["enable_prefix_caching"]) for args in started] == [
        (0.9, False),
        (0.3, True),
    ]


def test_another_engine_is_asked_the_same_way():
    bench = _bench("8b", {"max_loras": 3}, names=["legal", "financial"])
    other = bench.other({"max_loras": 2})
    assert [each.engine["max_loras"] for each in (bench, other)] == [3, 2]
    assert [each.first._engine_spec.settings.engine_args["max_loras"] for each in (bench, other)] == [3, 2]
    assert (other.calls, other.domains, other.shape) == (24, ["legal", "financial"], "8b")


def test_the_file_says_which_machine_it_was():
    found = report.machine()
    assert found["cpus"] == os.cpu_count() and found["torch"].split(".")[0].isdecimal() and found["vllm"]
    assert "gpu" in found


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
    assert 0 < memory.megabytes(kinds=memory.WRITTEN) < own  # without the pages of libraries


def test_settings_of_dspy_are_put_back():
    before = dspy.settings.adapter
    with measure.dspy_settings(adapter=workload.AnyText()):
        assert isinstance(dspy.settings.adapter, workload.AnyText)
    assert dspy.settings.adapter is before


@pytest.mark.parametrize("engine", ["{", "3"])
def test_an_engine_that_is_no_object_is_refused(engine, capsys):
    assert main(["bench", "--engine", engine]) == 2
    assert "--engine" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--json", "f"], ["--shape", "8b"], ["--base-model", "m"], ["--sweep", "rank=8"], ["--calls", "192"]]
)
def test_a_joint_search_refuses_what_it_would_take_no_notice_of(words, tmp_path, capsys):
    assert main(["bench", "--joint", str(tmp_path), *words]) == 2
    assert f"{words[0]}: of the other measurements" in capsys.readouterr().err


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
    monkeypatch.setattr(measure, "_WARM_UP_CALLS", 24)
    names = ["throughput", "samples", "mixed", "soak", "loading"]
    words = ["bench", *"--calls 12 --threads 6 --repeats 1 --answers 8 16".split()]
    assert main([*words, "--json", str(file), "--only", *names]) in (0, 1)
    shown = capsys.readouterr().out
    written = json.loads(file.read_text())
    assert (written["calls"], written["threads"], written["repeats"]) == (12, 6, 1)
    for figure in written["figures"]:
        assert f"{figure['name']} ({figure['unit']})" in shown
        assert all(value > 0 for value in figure["values"]) or figure["unit"] == "MB" or "stall" in figure["name"]
    assert {figure["name"] for figure in written["figures"]} >= {
        "DSPy over plain, 16 tokens an answer",
        "n=8 over n=1",
        "all adapters mixed, speed over one after another",
        "first answer, adapter on disk over in its slot",
        "stall of a stream by a call, adapter in CPU memory",
    }


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
    """A sweep of one value, with its picture."""
    file, drawn = tmp_path / "bench.json", tmp_path / "bench.png"
    words = "--shape tiny --only adapters --sweep adapters=2 --rank 8 --calls 12 --repeats 1 --answers 2 --words 8"
    assert main(["bench", *words.split(), "--json", str(file), "--picture", str(drawn)]) == 0
    [point] = json.loads(file.read_text())["points"]
    assert point["value"] == point["adapters"] == 2
    names = [figure["name"] for figure in point["figures"]]
    assert names[:3] == ["base model, 2 tokens an answer", "one adapter over base", "all adapters mixed over base"]
    assert all(figure["median"] > 0 and figure["holds"] is None for figure in point["figures"])
    shown = capsys.readouterr().out
    assert shown.startswith("adapters = 2\n") and "all adapters one after another over base (x)" in shown
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_how_soon_a_program_ends_is_printed(capsys):
    assert main(["bench", "--only", "endings", "--repeats", "1"]) in (0, 1)
    shown = capsys.readouterr().out
    assert "Ctrl-C in a call until the program goes on (s)" in shown
    assert "nothing of its engine is left (s)" in shown
