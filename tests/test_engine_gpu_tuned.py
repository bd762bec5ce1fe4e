"""Which tuned tiles an engine on an NVIDIA GPU takes: as engine_args decides it, on a GPU in name only."""

import argparse
import json
import os

import pytest

from dspy_lora.engine import arguments, gpu_tiles, gpu_tuned, openai_server, server_words
from dspy_lora.engine.gpu_shapes import products
from dspy_lora.tuning import files
from dspy_lora.tuning.problem import Problem
from dspy_lora.tuning.search import Outcome
from dspy_lora.tuning.settings import default

GPU, STEM, VLLM = "NVIDIA H100 80GB HBM3", "NVIDIA_H100_80GB_HBM3", "0.32.0"
QWEN3_06B = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
FOLDER = "VLLM_TUNED_CONFIG_FOLDER"


def tune(folder, gpu=GPU, vllm=VLLM, config=QWEN3_06B, rank=16, max_loras=12):
    problems = [Problem(product, rank, tokens, max_loras) for product in products(config) for tokens in (1, 64)]
    files.save(folder, gpu, vllm, "a model", [Outcome(each, 1.0, default(each), 1.0) for each in problems])
    return folder


@pytest.fixture
def start(monkeypatch, tmp_path, capfd):
    """What an engine on that GPU would start with: its worker, the folder that vLLM reads, and what was printed."""
    import vllm
    from vllm.platforms import current_platform

    platform = type(current_platform)
    for name, value in (("is_cpu", False), ("is_cuda", True), ("get_device_name", GPU)):
        monkeypatch.setattr(platform, name, classmethod(lambda cls, value=value: value))
    monkeypatch.setattr(vllm, "__version__", VLLM)
    monkeypatch.setattr(gpu_tuned, "SHIPPED", tmp_path / "shipped")
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(QWEN3_06B))

    def start(given=None, base=base, **args):
        monkeypatch.delenv(FOLDER, raising=False)
        if given is not None:
            monkeypatch.setenv(FOLDER, str(given))
        settings = {"reasoning_parser": None, "kv_cache_gib": 1.0, "args": json.dumps(args)}
        capfd.readouterr()
        found = arguments.engine_args(settings | {"base": {"path": str(base)}})
        lines = [line for line in capfd.readouterr().err.splitlines() if "LoRA tiles" in line]
        return found["worker_cls"].rpartition(".")[2], os.environ.get(FOLDER), lines

    yield start
    os.environ.pop(FOLDER, None)


def dense(kind, hidden, heads, keys, head, inner):
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": keys, "head_dim": head}
    return {"model_type": kind, "intermediate_size": inner} | sizes


@pytest.mark.parametrize("rank", [8, 16, 32, 64])
@pytest.mark.parametrize(
    "config",
    [
        dense("llama", 4096, 32, 8, 128, 14336),  # 3.1 8B
        dense("llama", 3072, 24, 8, 128, 8192),  # 3.2 3B
        dense("llama", 2048, 32, 8, 64, 8192),  # 3.2 1B
        dense("qwen3", 4096, 32, 8, 128, 12288),  # 8B
        dense("qwen3", 2560, 32, 8, 128, 9728),  # 4B
        dense("qwen3", 2048, 16, 8, 128, 6144),  # 1.7B
        QWEN3_06B,
    ],
    ids=lambda config: f"{config['model_type']}-{config['hidden_size']}-{config['intermediate_size']}",
)
def test_what_ships_for_an_h200_has_the_usual_small_models(config, rank):
    folder = gpu_tuned.SHIPPED / "NVIDIA_H200"
    assert gpu_tuned.find(folder, "NVIDIA H200", "0.26.0", products(config), rank, 12) == folder


def test_a_shipped_folder_is_found_by_the_gpu_s_name(start, tmp_path):
    folder = tune(tmp_path / "shipped" / STEM)
    assert start() == ("TunedGPUWorker", str(folder), [f"LoRA tiles from {folder}, tuned for {GPU}, vLLM {VLLM}"])


def test_the_null_device_brings_the_rules_back(start, tmp_path):
    tune(tmp_path / "shipped" / STEM)
    assert start(os.devnull)[:2] == ("TiledGPUWorker", os.devnull)


def test_where_none_ships_the_rules_decide(start):
    assert start() == ("TiledGPUWorker", None, [f"LoRA tiles by rule: none come with dspy-lora for {GPU}"])


def test_the_user_s_folder_comes_first(start, tmp_path):
    tune(tmp_path / "shipped" / STEM)
    mine = tune(tmp_path / "mine")
    assert start(mine) == ("TunedGPUWorker", str(mine), [f"LoRA tiles from {mine}, tuned for {GPU}, vLLM {VLLM}"])


def test_a_user_s_folder_that_does_not_fit_gives_way(start, tmp_path):
    mine = tune(tmp_path / "mine", vllm="0.26.0")
    worker, folder, [line] = start(mine)
    assert (worker, folder) == ("TiledGPUWorker", None)  # vLLM would take the nearest of ours for its own kernels
    why = f"{mine} is tuned with vLLM 0.26.0, this is 0.32.0"
    assert line == f"LoRA tiles by rule: {why}; none come with dspy-lora for {GPU}"
    shipped = tune(tmp_path / "shipped" / STEM)
    assert start(mine)[:2] == ("TunedGPUWorker", str(shipped))


def test_settings_of_vllm_s_own_kernels_are_left_to_those(start, tmp_path):
    tune(tmp_path / "shipped" / STEM)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / f"{STEM}_SHRINK.json").write_text("{}")
    worker, folder, [line] = start(theirs)
    assert (worker, folder) == ("TiledGPUWorker", str(theirs))
    assert line == f"LoRA tiles by rule: {theirs} has no tuned.json, so its settings are for vLLM's own kernels"


@pytest.mark.parametrize("worker", ["auto", "vllm.v1.worker.gpu_worker.Worker"])
def test_vllm_s_own_kernels_get_no_settings_of_ours(start, tmp_path, worker):
    tune(tmp_path / "shipped" / STEM)
    assert start(worker_cls=worker) == (worker.rpartition(".")[2], None, [])
    assert start(tune(tmp_path / "mine"), worker_cls=worker)[1] is None
    assert start(tmp_path, worker_cls=worker)[1] == str(tmp_path)
    assert start(enable_lora=False) == ("TiledGPUWorker", None, [])


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"max_lora_rank": 32}, "has no settings for shrink 3 x 1024 at rank 32 and max_loras 12"),
        ({"max_loras": 4}, "at rank 16 and max_loras 4"),
        ({"hf_overrides": {"intermediate_size": 4096}}, "has no settings for expand 2 x 4096"),
        ({"hf_overrides": {"num_key_value_heads": 4}}, "has no settings for expand 2048+512+512"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size 2"),
        ({"dtype": "float32"}, "float32"),
        ({"dtype": "float"}, "float32"),
        ({"lora_dtype": "float32"}, "float32"),
    ],
    ids=str,
)
def test_another_engine_takes_the_rules(start, tmp_path, args, reason):
    tune(tmp_path / "shipped" / STEM)
    worker, folder, [line] = start(**args)
    assert (worker, folder) == ("TiledGPUWorker", None)
    assert line.startswith("LoRA tiles by rule: ") and reason in line


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gpu": "NVIDIA H200"}, "is tuned for NVIDIA H200, this is NVIDIA H100"),
        ({"vllm": "0.32.1"}, "is tuned with vLLM 0.32.1, this is 0.32.0"),
        ({"kernels": gpu_tiles.VERSION + 1}, f"for version {gpu_tiles.VERSION + 1} of dspy-lora's kernels"),
        ({"models": []}, "holds something else than `dspy-lora tune` writes"),
    ],
    ids=str,
)
def test_another_record_is_not_taken(start, tmp_path, change, reason):
    file = tune(tmp_path / "shipped" / STEM) / "tuned.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    worker, folder, [line] = start()
    assert (worker, folder) == ("TiledGPUWorker", None) and reason in line


def test_a_model_whose_shapes_are_not_known(start, tmp_path):
    tune(tmp_path / "shipped" / STEM)
    (tmp_path / "base" / "config.json").write_text('{"model_type": "mixtral"}')
    assert "LoRA tiles by rule: model_type 'mixtral'" in start()[2][0]
    worker, _, [line] = start(base="some/where")
    assert worker == "TiledGPUWorker" and "there is no some/where/config.json" in line


def test_a_gpu_without_a_name_and_the_batch_invariant_mode(start, tmp_path, monkeypatch):
    from vllm.platforms import current_platform

    tune(tmp_path / "shipped" / STEM)
    with monkeypatch.context() as patch:
        patch.setenv("VLLM_BATCH_INVARIANT", "1")
        assert "VLLM_BATCH_INVARIANT" in start()[2][0]

    def nameless(cls):
        raise RuntimeError("no NVML")

    monkeypatch.setattr(type(current_platform), "get_device_name", classmethod(nameless))
    assert start()[:2] == ("TiledGPUWorker", None)
    assert "no NVML" in start()[2][0]


def test_the_name_is_had_without_starting_cuda(start, tmp_path, monkeypatch):
    import torch

    def started(*_):
        raise AssertionError("this starts CUDA")

    monkeypatch.setattr(torch.cuda, "get_device_name", started)
    monkeypatch.setattr(torch.cuda, "_lazy_init", started)
    tune(tmp_path / "shipped" / STEM)
    assert start()[0] == "TunedGPUWorker"


def test_the_folder_s_place_is_in_the_package():
    assert gpu_tuned.SHIPPED.parent.joinpath("files.py").is_file()


def test_the_workers_are_those_of_the_module():
    pytest.importorskip("triton", reason="Triton is not installed")
    from dspy_lora.engine import gpu_lora

    names = [f"{each.__module__}.{each.__name__}" for each in (gpu_lora.TiledGPUWorker, gpu_lora.TunedGPUWorker)]
    assert names == [gpu_tuned.TILED, gpu_tuned.TUNED]


def test_words_for_vllm_s_server_count_and_its_parser_takes_what_the_engine_gets(start, tmp_path, monkeypatch):
    """The tiles are for the rank that a word names, not for that of the settings; and every argument goes through."""
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")  # which is set else, for this process
    folder = tune(tmp_path / "shipped" / STEM, rank=64)
    assert start()[0] == "TiledGPUWorker"
    base = {"path": str(tmp_path / "base"), "name": "a base"}
    settings = {"reasoning_parser": None, "kv_cache_gib": 1.0, "args": "{}", "base": base, "tool_parser": None}
    given = {"settings": settings, "adapters": [], "host": "127.0.0.1", "port": 8000}
    words = ["--max-lora-rank", "64", "--worker-cls", gpu_tuned.TILED]
    _, *line = openai_server.prepare(given | {"words": words})
    parsed = vars(server_words._parsed(line, argparse.Namespace()))
    assert os.environ[FOLDER] == str(folder)
    wanted = arguments.engine_args(settings | {"args": json.dumps({"max_lora_rank": 64})})
    assert wanted["worker_cls"] == gpu_tuned.TUNED and len(wanted["cudagraph_capture_sizes"]) > 2
    assert {name: parsed[name] for name in wanted} == wanted
