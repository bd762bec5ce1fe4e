import argparse
import functools
import importlib
import json

import pytest

from dspy_lora import cli
from dspy_lora.engine import gpu_tiles, gpu_tuned
from dspy_lora.engine.gpu_shapes import Product, products
from dspy_lora.errors import ConfigError, CrashError, TuningError
from dspy_lora.tuning import command, files
from dspy_lora.tuning.problem import Problem
from dspy_lora.tuning.search import Outcome, Search
from dspy_lora.tuning.settings import AXES, Setting, along, default, fits, shared_bytes
from dspy_lora.tuning.trials import Trials

LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
QWEN3_06B = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
GATE_UP = Product("expand", (14336, 14336))
QKV = Product("shrink", (4096,) * 3)
GPU = "NVIDIA H100 80GB HBM3-X"
BEST = Setting(block_m=64, block_n=256, block_k=16, num_warps=8, num_stages=1)


def cost(problem, setting):
    """A convex cost with its least at BEST, 2^distance microseconds."""
    steps = [abs(getattr(setting, axis).bit_length() - getattr(BEST, axis).bit_length()) for axis in AXES[:3]]
    return 1e-6 * problem.tokens * 2 ** (sum(steps) + 0.1 * abs(setting.num_warps - 8) + abs(setting.num_stages - 1))


class Fake:
    """Counts what it is asked, and takes a second of its own clock for each."""

    def __init__(self, cost=cost):
        self.cost, self.asked, self.now = cost, [], 0.0

    def measure(self, problem, setting):
        self.asked.append((problem, setting))
        self.now += 1
        return self.cost(problem, setting)

    def clock(self):
        return self.now


def search(folder, fake, problems, budget=1000.0):
    trials = Trials(folder / "trials.jsonl", {"gpu": GPU})
    return list(Search(trials, fake.measure, fake.clock).run(problems, budget))


# -- shapes ------------------------------------------------------------------------------------------------------------


def test_products_of_llama_3_8b():
    assert products(LLAMA_3_8B) == {
        Product("shrink", (4096, 4096, 4096)): 1,
        Product("shrink", (4096,)): 1,
        Product("shrink", (4096, 4096)): 1,
        Product("shrink", (14336,)): 1,
        Product("expand", (4096, 1024, 1024)): 1,
        Product("expand", (4096,)): 2,
        Product("expand", (14336, 14336)): 1,
    }
    assert [(each.slices, each.width) for each in products(LLAMA_3_8B) if each.op == "expand"] == [
        (3, 4096),
        (1, 4096),
        (2, 14336),
    ]


def test_products_where_heads_are_wider_than_the_model():
    found = products(QWEN3_06B)
    assert found[Product("expand", (2048, 1024, 1024))] == 1
    assert found[Product("shrink", (2048,))] == 1
    assert found[Product("shrink", (1024, 1024, 1024))] == 1
    assert found[Product("expand", (1024,))] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "'mixtral'.*llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "None"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"intermediate_size": None}, "intermediate_size None"),
        ({"num_key_value_heads": "8"}, "num_key_value_heads '8'"),
    ],
)
def test_other_models_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        products(LLAMA_3_8B | change)


# -- settings ----------------------------------------------------------------------------------------------------------


def test_default_is_what_the_launchers_take():
    assert default(Problem(GATE_UP, 16, 64, 12)) == Setting(16, 128, 16, 2, 1)
    assert default(Problem(GATE_UP, 64, 2048, 12)) == Setting(32, 128, 64, 4, 1)
    assert default(Problem(QKV, 16, 64, 12)) == Setting(16, 64, 128, 4, 3, split_k=32)
    assert default(Problem(QKV, 16, 16384, 12)) == Setting(64, 64, 128, 4, 3, split_k=1)


def test_neighbours_stay_within_the_product():
    problem = Problem(GATE_UP, 16, 64, 12)
    start = default(problem)
    assert [each.block_n for each in along(problem, start, "block_n", up=True)] == [256, 512]
    assert [each.block_n for each in along(problem, start, "block_n", up=False)] == [64, 32, 16]
    for axis in ("block_k", "num_stages", "split_k"):  # one step sums all, and only shrink splits
        assert not [*along(problem, start, axis, up=True), *along(problem, start, axis, up=False)]
    shrink = Problem(QKV, 8, 64, 12)
    assert list(along(shrink, default(shrink), "block_n", up=True)) == []
    assert [each.split_k for each in along(shrink, default(shrink), "split_k", up=False)] == [16, 8, 4, 2, 1]


def test_shared_memory_bounds_a_setting():
    problem = Problem(QKV, 16, 64, 12)
    large = Setting(128, 16, 512, 8, 2, split_k=1)
    assert shared_bytes(problem, large) == 2 * (128 * 512 * 2 + 512 * 16 * 2)
    assert not fits(problem, large)
    assert fits(problem, default(problem))


# -- search ------------------------------------------------------------------------------------------------------------


def test_search_finds_the_optimum(tmp_path):
    fake = Fake()
    problems = {Problem(GATE_UP, 16, tokens, 12): 1 for tokens in (1, 64, 2048)}
    outcomes = search(tmp_path, fake, problems)
    assert [outcome.problem.tokens for outcome in outcomes] == [2048, 64, 1]  # the most costly first
    assert {outcome.setting for outcome in outcomes} == {BEST}
    assert all(outcome.seconds == cost(outcome.problem, BEST) for outcome in outcomes)
    assert len(fake.asked) == len(set(fake.asked))


def test_search_starts_from_the_nearest_batch(tmp_path):
    fake = Fake()
    far, near = Problem(GATE_UP, 16, 2048, 12), Problem(GATE_UP, 16, 1024, 12)
    search(tmp_path, fake, {far: 1, near: 1})
    asked = [setting for problem, setting in fake.asked if problem == near]
    assert asked[:2] == [default(near), BEST]


def test_search_keeps_to_its_budget(tmp_path):
    fake = Fake()
    problems = {Problem(GATE_UP, 16, tokens, 12): 1 for tokens in (1, 16, 256, 4096)}
    outcomes = search(tmp_path, fake, problems, budget=20.0)
    assert len(outcomes) == 4
    assert 15 <= fake.now <= 20
    assert search(tmp_path, fake, problems, budget=0.0) == outcomes
    assert fake.now <= 20


def test_half_of_the_budget_goes_to_all_alike(tmp_path):
    fake = Fake(lambda problem, setting: problem.tokens * 1.0**setting.block_m)
    cheap, costly = Problem(GATE_UP, 16, 1, 12), Problem(GATE_UP, 16, 16384, 12)
    search(tmp_path, fake, {cheap: 1, costly: 1}, budget=12.0)
    assert sum(problem == cheap for problem, _ in fake.asked) >= 3


def test_search_goes_on_where_it_was_killed(tmp_path):
    first, problems = Fake(), {Problem(GATE_UP, 16, tokens, 12): 1 for tokens in (1, 64)}
    search(tmp_path, first, problems, budget=9.0)
    log = tmp_path / "trials.jsonl"
    log.write_text(log.read_text() + '{"problem": {"prod')  # killed while it wrote
    second = Fake()
    outcomes = search(tmp_path, second, problems)
    assert {outcome.setting for outcome in outcomes} == {BEST}
    assert not set(first.asked) & set(second.asked)
    third = Fake()
    assert search(tmp_path, third, problems) == outcomes
    assert third.asked == []


def test_a_run_without_time_keeps_the_fastest_that_is_known(tmp_path):
    problem = Problem(GATE_UP, 16, 64, 12)
    trials = Trials(tmp_path / "trials.jsonl", {"gpu": GPU})
    for setting, seconds in ((BEST, 0.5), (Setting(64, 128, 16, 8, 1), 0.6), (Setting(32, 64, 16, 8, 1), None)):
        trials.seconds(problem, setting, lambda *_, seconds=seconds: seconds)
    (outcome,) = search(tmp_path, Fake(lambda *_: 1.0), {problem: 1}, budget=0.0)
    assert (outcome.setting, outcome.seconds) == (BEST, 0.5)


def test_trials_of_another_gpu_are_refused(tmp_path):
    Trials(tmp_path / "trials.jsonl", {"gpu": GPU, "vllm": "0.32.0"})
    with pytest.raises(ConfigError, match=r"vllm '0.32.0', now '0.33.0'.*--output") as caught:
        Trials(tmp_path / "trials.jsonl", {"gpu": GPU, "vllm": "0.33.0"})
    assert GPU not in str(caught.value)
    (tmp_path / "trials.jsonl").write_text("hello\n")
    with pytest.raises(ConfigError, match="no list of trials"):
        Trials(tmp_path / "trials.jsonl", {"gpu": GPU})


def test_a_wrong_setting_is_never_chosen(tmp_path):
    fake = Fake(lambda problem, setting: None if setting.block_m == 64 else cost(problem, setting))
    (outcome,) = search(tmp_path, fake, {Problem(GATE_UP, 16, 2048, 12): 1})
    assert any(setting.block_m == 64 for _, setting in fake.asked)
    assert outcome.setting.block_m == 32


def test_a_gain_under_three_percent_keeps_the_default(tmp_path):
    problem = Problem(GATE_UP, 16, 64, 12)
    for gain, kept in ((0.02, True), (0.04, False)):
        fake = Fake(lambda problem, setting, gain=gain: 1.0 - gain * (setting.block_m == 32))
        (outcome,) = search(tmp_path / str(gain), fake, {problem: 1})
        assert (outcome.setting == default(problem)) == kept
        assert (outcome.seconds == outcome.default) == kept


def test_a_default_that_fails_is_said(tmp_path):
    with pytest.raises(TuningError, match=r"expand 2 x 14336 at rank 16, 64 tokens.*usual setting.*--tokens"):
        search(tmp_path, Fake(lambda *_: None), {Problem(GATE_UP, 16, 64, 12): 1})


def test_a_setting_that_crashed_is_not_tried_again(tmp_path):
    def crash(problem, setting):
        if setting != default(problem):
            raise CrashError("gone")
        return 1.0

    first, second = Fake(crash), Fake()
    problems = {Problem(GATE_UP, 16, 64, 12): 1}
    with pytest.raises(CrashError):
        search(tmp_path, first, problems)
    search(tmp_path, second, problems)
    assert first.asked[-1] not in second.asked


# -- inputs ------------------------------------------------------------------------------------------------------------


def shrink(skipped=0):
    """A stand-in for vLLM's kernel, token by token; it may leave out the last inputs, as a wrong tiling would."""

    def run(x, weights, output, adapters, *rest):
        end = x.shape[1] - skipped
        for place, weight in enumerate(weights):
            for token, adapter in enumerate(adapters.tolist()):
                output[place, token] = rest[-1] * (weight[adapter, :, :end].float() @ x[token, :end].float())

    return run


def expand(unwritten=0):
    """The same for expand, rounding as the kernel does; it may leave out the last columns of each slice."""

    def run(x, weights, output, adapters, *rest, offset_start, add_inputs):
        assert add_inputs
        start = offset_start
        for place, weight in enumerate(weights):
            end = start + weight.shape[1] - unwritten
            for token, adapter in enumerate(adapters.tolist()):
                product = (weight[adapter].float() @ x[place, token]).bfloat16()
                output[token, start:end] += product[: end - start]
            start += weight.shape[1]

    return run


@pytest.mark.parametrize("tokens", [1, 3, 50])
@pytest.mark.parametrize(
    ("product", "right", "wrong"),
    [
        (Product("shrink", (256, 256, 256)), shrink(), shrink(skipped=16)),
        (Product("shrink", (4096,)), shrink(), shrink(skipped=16)),
        (Product("expand", (256, 64, 64)), expand(), expand(unwritten=1)),
        (Product("expand", (512,)), expand(), expand(unwritten=16)),
    ],
)
def test_results_are_checked(product, right, wrong, tokens, monkeypatch):
    from vllm.lora.ops import triton_ops

    from dspy_lora.tuning.inputs import Inputs

    inputs = Inputs(Problem(product, 16, tokens, 4), device="cpu")
    for kernel, good in ((right, True), (wrong, False), (lambda *_, **__: None, False), (right, True)):
        monkeypatch.setattr(triton_ops, f"lora_{product.op}", kernel)
        assert inputs.is_right() == good


def test_inputs_are_laid_out_as_vllm_s_kernels_take_them():
    from dspy_lora.tuning.inputs import Inputs

    inputs = Inputs(Problem(Product("expand", (256, 64, 64)), 16, 50, 4), device="cpu")
    adapters, order, counts, starts, ids, no_lora, active = inputs._metadata
    assert adapters.bincount().tolist() == [13, 12, 13, 12] and order.tolist() == list(range(50))
    assert counts.tolist() == [13, 12, 13, 12, 0] and starts.tolist() == [0, 13, 25, 38, 50, 0]
    assert ids.tolist() == [0, 1, 2, 3, -1] and not no_lora.item() and active.item() == 5


@pytest.mark.parametrize("op", ["shrink", "expand"])
def test_kernels_look_settings_up_where_the_bench_puts_them(op):
    module = importlib.import_module(f"vllm.lora.ops.triton_ops.lora_{op}_op")
    assert "get_lora_op_configs" in getattr(module, f"_lora_{op}").__wrapped__.__code__.co_names


# -- files -------------------------------------------------------------------------------------------------------------


def outcomes_for(config, rank=16, tokens=(1, 64, 2048)):
    """An outcome for each product and batch size, every setting another."""
    problems = [Problem(product, rank, m, 12) for product in products(config) for m in tokens]
    return [
        Outcome(problem, 1.0, Setting(16, 32, 16, 4, place, *((8,) if problem.product.op == "shrink" else ())), 0.5)
        for place, problem in enumerate(problems)
    ]


def looked_up(problem, add_inputs):
    """What vLLM's own look-up finds, as its kernels call it."""
    from vllm.lora.ops.triton_ops import utils

    return utils.get_lora_op_configs(
        op_type=problem.product.op,
        max_loras=problem.max_loras + 1,
        batch=problem.tokens,
        hidden_size=problem.product.width,
        rank=problem.rank,
        num_slices=problem.product.slices,
        add_inputs=add_inputs,
    )


@pytest.fixture
def vllm_reads(monkeypatch):
    """Lets vLLM's look-up read a folder, as on a GPU of that name."""
    import torch
    from vllm import envs
    from vllm.lora.ops.triton_ops import utils

    caches = [utils.get_lora_op_configs, utils.load_lora_op_config]

    def read(folder):
        for cache in caches:
            cache.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: GPU)
        monkeypatch.setattr(envs, "VLLM_TUNED_CONFIG_FOLDER", str(folder), raising=False)

    yield read
    for cache in caches:
        cache.cache_clear()


def test_vllm_reads_back_what_was_written(tmp_path, vllm_reads):
    low, high, small = outcomes_for(LLAMA_3_8B), outcomes_for(LLAMA_3_8B, rank=64), outcomes_for(QWEN3_06B)
    files.save(tmp_path, GPU, "0.32.0", "llama", low)
    files.save(tmp_path, GPU, "0.32.0", "llama", high)
    files.save(tmp_path, GPU, "0.32.0", "qwen", small)
    vllm_reads(tmp_path)
    for outcome in low + high + small:
        for add_inputs in (True, False) if outcome.problem.product.op == "expand" else (None,):
            assert looked_up(outcome.problem, add_inputs) == outcome.setting.as_vllm()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "NVIDIA_H100_80GB_HBM3_X_EXPAND_FALSE.json",
        "NVIDIA_H100_80GB_HBM3_X_EXPAND_TRUE.json",
        "NVIDIA_H100_80GB_HBM3_X_SHRINK.json",
        "tuned.json",
    ]
    record = json.loads((tmp_path / "tuned.json").read_text())
    assert record["gpu"] == GPU and record["vllm"] == "0.32.0"
    assert record["models"]["llama"]["ranks"] == [16, 64]
    assert record["models"]["qwen"]["tokens"] == [1, 64, 2048]


def test_a_setting_has_every_key_that_vllm_s_own_has():
    from vllm.lora.ops.triton_ops import utils

    for product in (GATE_UP, QKV):
        problem = Problem(product, 16, 64, 12)
        own = utils.get_lora_op_configs.__wrapped__(product.op, 13, 64, product.width, 16, product.slices)
        assert default(problem).as_vllm().keys() == own.keys()


def test_find_says_why_a_folder_does_not_fit(tmp_path):
    files.save(tmp_path, GPU, "0.32.0+cu129", "llama", outcomes_for(LLAMA_3_8B))
    llama = products(LLAMA_3_8B)
    find = functools.partial(gpu_tuned.find, tmp_path)
    assert find(GPU, "0.32.0", llama, 16, 12) == tmp_path
    assert "this is NVIDIA H200" in find("NVIDIA H200", "0.32.0", llama, 16, 12)
    assert "with vLLM 0.32.0+cu129, this is 0.32.1" in find(GPU, "0.32.1", llama, 16, 12)
    assert "at rank 32 and" in find(GPU, "0.32.0", llama, 32, 12)
    assert "and max_loras 4" in find(GPU, "0.32.0", llama, 16, 4)
    assert "no settings for shrink 3 x 1024 " in find(GPU, "0.32.0", products(QWEN3_06B), 16, 12)
    assert "no tuned.json" in gpu_tuned.find(tmp_path / "none", GPU, "0.32.0", llama, 16, 12)


def test_settings_for_other_kernels_are_not_taken(tmp_path, monkeypatch):
    files.save(tmp_path, GPU, "0.32.0", "llama", outcomes_for(LLAMA_3_8B))
    Trials(tmp_path / "trials.jsonl", files.conditions(GPU, "0.32.0"))
    for module in (gpu_tuned, files):
        monkeypatch.setattr(module, "VERSION", gpu_tiles.VERSION + 1)
    found = gpu_tuned.find(tmp_path, GPU, "0.32.0", products(LLAMA_3_8B), 16, 12)
    assert f"for version {gpu_tiles.VERSION} of dspy-lora's kernels, this is {gpu_tiles.VERSION + 1}" in found
    with pytest.raises(ConfigError, match=r"kernels 1, not 2: give another --output"):
        files.save(tmp_path, GPU, "0.32.0", "llama", outcomes_for(LLAMA_3_8B))
    with pytest.raises(ConfigError, match=r"kernels 1, now 2"):
        Trials(tmp_path / "trials.jsonl", files.conditions(GPU, "0.32.0"))


def test_widths_under_which_vllm_finds_another_model_s_settings(tmp_path):
    """Of unequal slices it looks the largest up: q, k and v of 4096, 1024 and 1024, or all of 4096."""
    files.save(tmp_path, GPU, "0.32.0", "llama", outcomes_for(LLAMA_3_8B | {"num_key_value_heads": 32}))
    found = gpu_tuned.find(tmp_path, GPU, "0.32.0", products(LLAMA_3_8B), 16, 12)
    assert "no settings for expand 4096+1024+1024 at" in found
    files.save(tmp_path, GPU, "0.32.0", "other", outcomes_for(LLAMA_3_8B))
    assert gpu_tuned.find(tmp_path, GPU, "0.32.0", products(LLAMA_3_8B), 16, 12) == tmp_path


def test_find_asks_for_every_number_of_tokens(tmp_path):
    files.save(tmp_path, GPU, "0.32.0", "llama", outcomes_for(LLAMA_3_8B))
    files.save(tmp_path, GPU, "0.32.0", "qwen", outcomes_for(QWEN3_06B, tokens=(64,)))
    # At 1 token vLLM would take a setting of the llama's, the only ones for that number.
    assert "no settings" in gpu_tuned.find(tmp_path, GPU, "0.32.0", products(QWEN3_06B), 16, 12)
    assert gpu_tuned.find(tmp_path, GPU, "0.32.0", products(LLAMA_3_8B), 16, 12) == tmp_path


def test_find_survives_broken_files(tmp_path):
    files.save(tmp_path, GPU, "0.32.0", "llama", outcomes_for(LLAMA_3_8B))
    (tmp_path / "NVIDIA_H100_80GB_HBM3_X_EXPAND_FALSE.json").unlink()
    assert "no settings for expand" in gpu_tuned.find(tmp_path, GPU, "0.32.0", products(LLAMA_3_8B), 16, 12)
    (tmp_path / "tuned.json").write_text(json.dumps(files.conditions(GPU, "0.32.0")))
    assert "something else than" in gpu_tuned.find(tmp_path, GPU, "0.32.0", products(LLAMA_3_8B), 16, 12)
    (tmp_path / "tuned.json").write_text("{")
    assert "cannot be read" in gpu_tuned.find(tmp_path, GPU, "0.32.0", products(LLAMA_3_8B), 16, 12)


def test_a_folder_of_another_vllm_is_not_mixed(tmp_path):
    files.save(tmp_path, GPU, "0.32.0", "llama", outcomes_for(LLAMA_3_8B))
    before = (tmp_path / "tuned.json").read_text()
    with pytest.raises(ConfigError, match=r"vllm '0.32.0', not '0.33.0'.*--output"):
        files.save(tmp_path, GPU, "0.33.0", "llama", outcomes_for(LLAMA_3_8B))
    assert (tmp_path / "tuned.json").read_text() == before


# -- command -----------------------------------------------------------------------------------------------------------


def arguments(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA_3_8B))
    return str(file)


@pytest.fixture
def no_gpu(monkeypatch):
    import torch
    import vllm.triton_utils  # noqa: F401 - looks for a GPU when it is first imported, and later tests want the truth

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_command_without_a_gpu(config_file):
    with pytest.raises(TuningError, match="no CUDA device"):
        command.run(arguments("--config", config_file))


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_it_ends_in_one_line_and_leaves_no_folder(config_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["tune", "--config", config_file]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: `dspy-lora tune` times") and printed.err.count("\n") == 1
    assert not printed.out and not (tmp_path / "tuned").exists()


def test_several_ranks_are_tuned_in_one_run(config_file, tmp_path, monkeypatch):
    import torch
    import vllm

    monkeypatch.setattr(command, "require_gpu", lambda: None)
    monkeypatch.setattr(command, "Bench", Fake)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: GPU)
    folder, ranks = tmp_path / "tuned", [str(rank) for rank in gpu_tiles.RANKS]
    command.run(arguments("--config", config_file, "--output", str(folder), "--tokens", "64", "--ranks", *ranks))
    for rank in gpu_tiles.RANKS:
        assert gpu_tuned.find(folder, GPU, vllm.__version__, products(LLAMA_3_8B), rank, 12) == folder


def test_a_run_that_would_leave_batch_sizes_untuned_is_refused_before_it_measures(config_file, tmp_path, monkeypatch):
    import torch
    import vllm

    fake, folder = Fake(), tmp_path / "tuned"
    monkeypatch.setattr(command, "require_gpu", lambda: None)
    monkeypatch.setattr(command, "Bench", lambda: fake)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: GPU)

    def tune(*words):
        command.run(arguments("--config", config_file, "--output", str(folder), *words))

    def found(rank):
        return gpu_tuned.find(folder, GPU, vllm.__version__, products(LLAMA_3_8B), rank, 12)

    tune("--ranks", "16", "--tokens", "1", "64")
    asked = len(fake.asked)
    for words in (["--ranks", "32", "--tokens", "64"], ["--ranks", "32", "--tokens", "1", "64", "2048"]):
        with pytest.raises(ConfigError, match=r"would be 1, 64(, 2048)? tokens.*the --tokens of the runs before"):
            tune(*words)
    assert len(fake.asked) == asked and found(16) == folder
    tune("--ranks", "32", "--tokens", "1", "64")
    tune("--ranks", "16", "32", "--tokens", "1", "64", "2048")  # all that the folder has, at one more
    assert found(16) == found(32) == folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "0"], "--ranks 0"),
        (["--ranks", "8", "128"], "--ranks 128: dspy-lora's kernels take 8, 16, 32"),
        (["--budget-minutes", "0"], "--budget-minutes 0"),
        (["--tokens", "16", "-1"], "--tokens -1"),
    ],
)
def test_command_refuses_flags(config_file, words, message):
    with pytest.raises(ConfigError, match=message):
        command.run(arguments("--config", config_file, *words))


def test_command_without_a_config(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        command.run(arguments("--config", str(tmp_path / "none.json")))
    with pytest.raises(ConfigError, match=r"not on this disk.*--config"):
        command.run(arguments("--base-model", "some/where"))


def test_command_tunes_and_writes(config_file, tmp_path, monkeypatch, capsys):
    import torch
    import vllm

    fake = Fake(lambda problem, setting: 1e-6 * problem.tokens * setting.block_m)
    monkeypatch.setattr(command, "require_gpu", lambda: None)
    monkeypatch.setattr(command, "Bench", lambda: fake)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: GPU)
    folder = tmp_path / "tuned"
    assert command.run(arguments("--config", config_file, "--output", str(folder), "--tokens", "1024", "2048")) == 0
    printed = capsys.readouterr().out
    assert "expand 2 x 14336          16   2048    65536.0    32768.0   2.00  m16 n128 k16" in printed
    # expand: 4 calls of a layer at 32 rows, shrink: 4 at 64
    assert f"a layer                   16   1024{1024 * (4 * 32 + 4 * 64):>9}.0" in printed
    assert printed.index("usual settings: 10 of 14 problems") < printed.index("usual settings: 14 of 14 problems")
    assert printed.index("14 of 14") < printed.index("product    ") < printed.index("expand 2 x 14336")
    assert printed.count("usual settings:") == 2
    last = f"An engine takes them with VLLM_TUNED_CONFIG_FOLDER={folder.resolve()} in its environment."
    assert printed.splitlines()[-1] == last
    assert f"all of these                       {3072 * (4 * 32 + 4 * 64):>9}.0" in printed
    assert gpu_tuned.find(folder, GPU, vllm.__version__, products(LLAMA_3_8B), 16, 12) == folder


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_tuning_two_products_for_real(tmp_path):
    from dspy_lora.tuning.kernels import Bench

    bench = Bench(repeats=5)
    qkv = Product("expand", (2048, 1024, 1024))
    problems = {Problem(qkv, 16, 64, 4): 1, Problem(Product("shrink", (1024,) * 3), 16, 64, 4): 1}
    trials = Trials(tmp_path / "trials.jsonl", {"gpu": "this one"})
    outcomes = list(Search(trials, bench.measure).run(problems, 20.0))
    assert {outcome.problem for outcome in outcomes} == problems.keys()
    assert all(0 < outcome.seconds <= outcome.default for outcome in outcomes)
    for outcome in outcomes:
        assert bench.measure(outcome.problem, outcome.setting) is not None  # None: not what float32 computes
    assert bench.measure(outcomes[0].problem, Setting(256, 512, 512, 1, 5, 1)) is None  # no GPU has room for it
