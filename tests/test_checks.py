"""What may be published: adapters that vLLM would refuse, or load and ignore, are refused with the mend."""

import json
import logging
import shlex
import struct
import subprocess
import sys
from pathlib import Path
from unittest import mock

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dspy_lora.adapters import base as base_module
from dspy_lora.adapters.base import Base, fetch_base, resolve_base
from dspy_lora.adapters.checks import check_adapter
from dspy_lora.adapters.weights import look, read_header
from dspy_lora.errors import AdapterError, ConfigError

# One layer of a tiny Llama: (outputs, inputs) by module.
LAYER = {
    "self_attn.q_proj": (32, 16),
    "self_attn.k_proj": (16, 16),
    "self_attn.v_proj": (16, 16),
    "self_attn.o_proj": (16, 32),
    "mlp.gate_proj": (24, 16),
    "mlp.up_proj": (24, 16),
    "mlp.down_proj": (16, 24),
}
MODULES = {f"model.layers.{n}.{name}": shape for n in range(2) for name, shape in LAYER.items()}
TARGETS = [name.split(".")[-1] for name in LAYER]
MAX_RANK = 64


def write_base(folder, **config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True} | config))
    tensors = {f"{module}.weight": np.ones(shape, np.float32) for module, shape in MODULES.items()}
    tensors |= {
        "model.embed_tokens.weight": np.ones((40, 16), np.float32),
        "model.norm.weight": np.ones(16, np.float32),
    }
    first = dict(list(tensors.items())[:5])
    save_file(first, folder / "model-00001-of-00002.safetensors")
    save_file({k: v for k, v in tensors.items() if k not in first}, folder / "model-00002-of-00002.safetensors")
    return resolve_base(str(folder))


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base")


class Folder:
    """An adapter's folder, whose configuration and tensors a test changes before it is checked."""

    def __init__(self, path):
        self.path = path
        path.mkdir()
        self.config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": TARGETS, "use_rslora": True}
        random = np.random.default_rng(0)
        self.tensors = {}
        for module, (outputs, inputs) in MODULES.items():
            self.tensors[f"base_model.model.{module}.lora_A.weight"] = random.normal(size=(8, inputs))
            self.tensors[f"base_model.model.{module}.lora_B.weight"] = random.normal(size=(outputs, 8))
        self.tensors = {name: value.astype(np.float32) for name, value in self.tensors.items()}

    def save(self, **config):
        (self.path / "adapter_config.json").write_text(json.dumps(self.config | config))
        save_file(self.tensors, self.path / "adapter_model.safetensors")
        return self.path

    def key(self, module, side):
        return f"base_model.model.{module}.lora_{side}.weight"

    def resize(self, module, rank):
        outputs, inputs = MODULES[module]
        self.tensors[self.key(module, "A")] = np.ones((rank, inputs), np.float32)
        self.tensors[self.key(module, "B")] = np.ones((outputs, rank), np.float32)


@pytest.fixture
def adapter(tmp_path):
    return Folder(tmp_path / "adapter")


def refusal(folder, base, max_rank=MAX_RANK):
    with pytest.raises(AdapterError) as raised:
        check_adapter(folder, base, max_rank)
    message = str(raised.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


# -- what is served ----------------------------------------------------------------------------------------------------


def test_a_plain_adapter(adapter, base):
    info = check_adapter(adapter.save(), base, MAX_RANK)
    parameters = sum(8 * (outputs + inputs) for outputs, inputs in MODULES.values())
    assert (info.rank, info.modules, info.parameters) == (8, 14, parameters)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_number_formats(adapter, base, dtype):
    adapter.tensors = {name: value.astype(dtype) for name, value in adapter.tensors.items()}
    assert check_adapter(adapter.save(), base, MAX_RANK).modules == 14


def test_patterns_by_peft_rules(adapter, base):
    adapter.resize("model.layers.0.self_attn.q_proj", 32)
    adapter.resize("model.layers.1.self_attn.q_proj", 4)
    patterns = {"layers.0.self_attn.q_proj": 32, "q_proj": 4}
    info = check_adapter(adapter.save(rank_pattern=patterns, alpha_pattern={"q_proj": 8}), base, MAX_RANK)
    assert info.rank == 32


def test_an_alpha_of_zero_for_some_modules(adapter, base):
    assert check_adapter(adapter.save(lora_alpha=0, alpha_pattern={"q_proj": 8}), base, MAX_RANK).modules == 14
    for module in MODULES:
        if module.endswith("q_proj"):
            adapter.tensors[adapter.key(module, "B")] *= 0
    assert "would change nothing" in refusal(adapter.save(lora_alpha=0, alpha_pattern={"q_proj": 8}), base)


def test_names_without_pefts_prefix(adapter, base):
    adapter.tensors = {name.removeprefix("base_model.model."): value for name, value in adapter.tensors.items()}
    assert check_adapter(adapter.save(), base, MAX_RANK).modules == 14


def test_some_layers_only(adapter, base):
    adapter.tensors = {name: value for name, value in adapter.tensors.items() if "layers.0" in name}
    assert check_adapter(adapter.save(layers_to_transform=[0]), base, MAX_RANK).modules == 7


def test_targets_as_a_regular_expression(adapter, base):
    adapter.tensors = {name: value for name, value in adapter.tensors.items() if "mlp" in name}
    assert check_adapter(adapter.save(target_modules=r".*\.mlp\.\w+_proj"), base, MAX_RANK).modules == 6


def test_the_tied_head(adapter, base):
    adapter.tensors["base_model.model.lm_head.lora_A.weight"] = np.ones((8, 16), np.float32)
    adapter.tensors["base_model.model.lm_head.lora_B.weight"] = np.ones((40, 8), np.float32)
    assert check_adapter(adapter.save(target_modules=[*TARGETS, "lm_head"]), base, MAX_RANK).modules == 15


@pytest.mark.parametrize("init", ["pissa", "lora_ga"])  # the second, vLLM would serve without what the base lost
def test_initialisations_that_change_the_base(adapter, base, init):
    assert f"init_lora_weights {init!r} changes the base's weights" in refusal(
        adapter.save(init_lora_weights=init), base
    )


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "EVA", "orthogonal"])
def test_initialisations_that_leave_the_base_as_it_is(adapter, base, init):
    assert check_adapter(adapter.save(init_lora_weights=init), base, MAX_RANK).modules == 14


def test_the_base_name_in_the_configuration_is_only_a_hint(adapter, base):
    assert check_adapter(adapter.save(base_model_name_or_path="somebody/else"), base, MAX_RANK).modules == 14


def test_a_base_that_is_not_on_this_disk_is_not_compared(adapter, caplog):
    adapter.resize("model.layers.0.mlp.up_proj", 8)
    with caplog.at_level(logging.INFO, "dspy_lora"):
        check_adapter(adapter.save(), Base("Org/Model", "Org/Model", "main"), MAX_RANK)
    assert "shapes are not checked" in caplog.text


def test_a_packed_weight_shows_no_shape(adapter, tmp_path):
    base = write_base(tmp_path / "quantised")
    file = tmp_path / "quantised" / "model-00001-of-00002.safetensors"
    save_file({name: np.ones((64, 1), np.uint8) for name in load_file(file)}, file)
    assert check_adapter(adapter.save(), resolve_base(base.name), MAX_RANK).modules == 14


def test_an_adapter_that_peft_wrote(tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    llama = transformers.LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=40, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(llama).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=4, target_modules=TARGETS, use_rslora=True, rank_pattern={"q_proj": 2})
    trained = peft.get_peft_model(model, lora)
    trained.save_pretrained(tmp_path / "untrained")
    for name, weight in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    trained.to(torch.bfloat16).save_pretrained(tmp_path / "trained")

    base = resolve_base(str(tmp_path / "base"))
    assert check_adapter(tmp_path / "trained", base, 8).rank == 4
    assert "all its lora_B weights" in refusal(tmp_path / "untrained", base)
    dtypes = {tensor.dtype for tensor in read_header(tmp_path / "trained/adapter_model.safetensors").values()}
    assert dtypes == {"BF16"}


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, ["DoRA", "dspy-lora merge"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save", "Train again"]),
        ({"bias": "all"}, ["bias 'all'", "bias: none"]),
        ({"lora_bias": True}, ["lora_bias"]),
        ({"init_lora_weights": "pissa"}, ["'pissa'", "path_initial_model_for_weight_conversion"]),
        ({"init_lora_weights": "pissa_niter_16"}, ["'pissa_niter_16'"]),
        ({"init_lora_weights": "olora"}, ["'olora'"]),
        ({"init_lora_weights": "corda"}, ["'corda'"]),
        ({"init_lora_weights": "loftq"}, ["'loftq'"]),
        ({"trainable_token_indices": [1]}, ["token embeddings"]),
        ({"alora_invocation_tokens": [1]}, ["Activated LoRA"]),
        ({"layer_replication": [[0, 2]]}, ["(layer_replication). Train again without it"]),
        ({"target_parameters": ["mlp.experts"]}, ["target_parameters"]),
        ({"kasa_config": {"a": 1}}, ["KaSA"]),
        ({"peft_type": "LOHA"}, ["'LOHA'", "only 'LORA'"]),
        ({"peft_type": None}, ["peft_type None"]),
        ({"r": 0}, ["r = 0"]),
        ({"r": "many"}, ["r = 'many'"]),
        ({"lora_alpha": 0}, ["lora_alpha in adapter_config.json is 0", "would change nothing"]),
        ({"lora_alpha": float("nan")}, ["lora_alpha = nan is not allowed"]),
        ({"alpha_pattern": {".*": 0}}, ["lora_alpha in adapter_config.json is 0"]),
        ({"target_modules": "(["}, ["no regular expression"]),
        ({"rank_pattern": {"q_proj": 128}}, ["rank 128 is above the engine's 64", "max_lora_rank"]),
        ({"r": 16}, ["do not have the rank 16", "save it again"]),
    ],
)
def test_configurations_that_no_engine_serves(adapter, base, config, words):
    message = refusal(adapter.save(**config), base)
    assert all(word in message for word in words), message


def test_rank_above_the_engines(adapter, base):
    assert "its rank 8 is above the engine's 4" in refusal(adapter.save(), base, max_rank=4)


VLLM = """
import json, sys
from types import SimpleNamespace
from vllm.lora.peft_helper import PEFTHelper

refused = []
for config in json.loads(sys.argv[1]):
    try:
        PEFTHelper.from_dict(config).validate_legal(SimpleNamespace(max_lora_rank=64))
    except ValueError:
        refused.append(config)
print(json.dumps(refused))
"""


def test_vllm_refuses_the_same_configurations(adapter, base):
    """Both ways: what vLLM refuses is refused here, and what it takes is not (but for what it would ignore)."""
    pytest.importorskip("vllm")
    inits = [True, False, None, "gaussian", "EVA", "orthogonal", "mica", "pissa", "pissa_niter_16", "olora"]
    changes = [{}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"rank_pattern": {"nothing": 65}}]
    changes += [{name: True} for name in ("use_dora", "lora_bias", "use_qalora")]
    changes += [{"alora_invocation_tokens": [1]}, {"layer_replication": [[0, 2]]}, {"use_bdlora": {"nblocks": 2}}]
    changes += [{"init_lora_weights": init} for init in (*inits, "corda", "loftq")]
    configs = [adapter.config | change for change in changes]
    command = [sys.executable, "-c", VLLM, json.dumps(configs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    by_vllm = json.loads(done.stdout.splitlines()[-1])

    def refused(config):
        try:
            check_adapter(adapter.save(**config), base, MAX_RANK)
        except AdapterError:
            return True
        return False

    assert by_vllm
    assert [config for config in configs if refused(config)] == by_vllm


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff\xfe"])
def test_configurations_that_are_no_json_object(adapter, base, text):
    (adapter.save() / "adapter_config.json").write_bytes(text.encode("latin-1"))
    assert "adapter_config.json" in refusal(adapter.path, base)


def test_a_folder_without_an_adapter(tmp_path, base):
    (tmp_path / "empty").mkdir()
    assert "no adapter_config.json" in refusal(tmp_path / "empty", base)
    assert "no adapter_config.json" in refusal(tmp_path / "missing", base)


def test_no_weights(adapter, base):
    (adapter.save() / "adapter_model.safetensors").unlink()
    assert "no adapter_model.safetensors" in refusal(adapter.path, base)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "weights.pkl"])
def test_a_pickle_is_not_read_and_the_command_is_given(adapter, base, name, monkeypatch):
    (adapter.save() / "adapter_model.safetensors").rename(adapter.path / name)
    message = refusal(adapter.path, base)
    assert f"{name} is a pickle" in message
    assert f"torch.load('{name}', map_location='cpu', weights_only=True)" in message


def test_the_given_command_converts_a_pickle(adapter, base):
    torch = pytest.importorskip("torch")
    adapter.save()
    weights = {name: torch.from_numpy(value) for name, value in adapter.tensors.items()}
    torch.save(weights, adapter.path / "adapter_model.bin")
    (adapter.path / "adapter_model.safetensors").unlink()
    command = shlex.split(refusal(adapter.path, base).split("Convert it there: ")[1])
    subprocess.run([sys.executable, *command[1:]], cwd=adapter.path, check=True, timeout=120)
    assert check_adapter(adapter.path, base, MAX_RANK).modules == 14


@pytest.mark.parametrize("keep", [0, 4, 8, 200, -1, -1000])
def test_truncated_weights(adapter, base, keep):
    file = adapter.save() / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "adapter_model.safetensors cannot be used" in refusal(adapter.path, base)


def _with_header(header):
    raw = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(raw)) + raw


@pytest.mark.parametrize(
    "content",
    [
        b"PK\x03\x04 a zip file, as torch.save writes it" * 10,
        struct.pack("<Q", 2**60) + b"{}",
        _with_header(b"not json at all"),
        _with_header(b"[]"),
        _with_header({"a": 1}),
        _with_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}) + b"\0" * 8,
        _with_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}) + b"\0" * 4,
        _with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}) + b"\0" * 8,
        _with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}) + b"\0" * 8,
    ],
)
def test_corrupt_weights(adapter, base, content):
    (adapter.save() / "adapter_model.safetensors").write_bytes(content)
    assert "adapter_model.safetensors cannot be used" in refusal(adapter.path, base)


def test_weights_without_tensors(adapter, base):
    adapter.tensors = {}
    assert "no tensors" in refusal(adapter.save(), base)


def test_an_adapter_of_another_base(adapter, base):
    adapter.tensors = {name.replace("self_attn", "attention"): value for name, value in adapter.tensors.items()}
    message = refusal(adapter.save(base_model_name_or_path="Org/Other"), base)
    assert "has no module 'model.layers.0.attention.k_proj'" in message
    assert "(8 in all)" in message
    assert "'Org/Other'" in message


def test_an_adapter_of_a_base_with_more_layers(adapter, base):
    more = {name.replace("layers.1", "layers.2"): value for name, value in adapter.tensors.items()}
    adapter.tensors |= more
    assert "has no module 'model.layers.2." in refusal(adapter.save(), base)


@pytest.mark.parametrize("side", ["A", "B"])
def test_an_adapter_of_a_base_of_another_size(adapter, base, side):
    shape = (8, 48) if side == "A" else (48, 8)
    adapter.tensors[adapter.key("model.layers.1.mlp.up_proj", side)] = np.ones(shape, np.float32)
    message = refusal(adapter.save(), base)
    assert "model.layers.1.mlp.up_proj: the adapter is for a weight of" in message
    assert "has (24, 16)" in message


def test_an_adapter_trained_on_another_revision_of_the_base(adapter, base):
    (adapter.save() / "metadata.json").write_text(json.dumps({"base_revision": "0123456789ab"}))
    message = refusal(adapter.path, base)
    assert "trained on base revision '0123456789ab'" in message
    (adapter.path / "metadata.json").write_text(json.dumps({"base_revision": base.revision}))
    check_adapter(adapter.path, base, MAX_RANK)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("base_model.model.model.embed_tokens.lora_embedding_A", "it trains embeddings"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector", "not a lora_A or lora_B weight"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight", "not a lora_A or lora_B weight"),
        ("base_model.model.model.embed_tokens.base_layer.weight", "not a lora_A or lora_B weight"),
        ("base_model.model.lm_head.weight", "not a lora_A or lora_B weight"),
        ("base_model.model.lm_head.lora_A.weight", "'lm_head': lora_A without lora_B"),
    ],
)
def test_tensors_that_are_no_pair(adapter, base, name, words):
    adapter.tensors[name] = np.ones((8, 16), np.float32)
    assert words in refusal(adapter.save(), base)


@pytest.mark.parametrize("targets", [[*TARGETS, "w1"], ".*nothing"])
def test_targets_without_tensors(adapter, base, targets):
    message = refusal(adapter.save(target_modules=targets), base)
    assert ("'w1'" if isinstance(targets, list) else "'.*nothing'") in message


def test_a_layer_without_tensors(adapter, base):
    for side in "AB":
        del adapter.tensors[adapter.key("model.layers.1.mlp.up_proj", side)]
    assert "names 'model.layers.1.mlp.up_proj'" in refusal(adapter.save(), base)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(adapter, base, dtype, value):
    key = adapter.key("model.layers.1.mlp.up_proj", "B")
    adapter.tensors[key] = adapter.tensors[key].astype(dtype)
    adapter.tensors[key][-1, -1] = value
    assert "model.layers.1.mlp.up_proj holds NaN or infinity" in refusal(adapter.save(), base)


@pytest.mark.parametrize("side", ["A", "B"])
def test_an_adapter_that_would_change_nothing(adapter, base, side):
    for module in MODULES:
        adapter.tensors[adapter.key(module, side)] *= -0.0
    assert "it would change nothing" in refusal(adapter.save(), base)
    adapter.tensors[adapter.key("model.layers.1.mlp.up_proj", side)][0, 0] = 1e-30
    check_adapter(adapter.save(), base, MAX_RANK)


def test_weights_that_are_no_floats(adapter, base):
    key = adapter.key("model.layers.1.mlp.up_proj", "B")
    adapter.tensors[key] = adapter.tensors[key].astype(np.int8)
    assert "type I8 is none of" in refusal(adapter.save(), base)


# -- bfloat16, which numpy lacks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.0, (True, True)),
        (3e38, (True, True)),
        (1e-40, (True, True)),
        (0.0, (True, False)),
        (-0.0, (True, False)),
        (np.inf, (False, True)),
        (-np.inf, (False, True)),
        (np.nan, (False, True)),
    ],
)
def test_bfloat16(tmp_path, value, expected):
    upper = np.array([value], np.float32).view(np.uint32) >> 16
    header = {"a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}, "__metadata__": {"format": "pt"}}
    (tmp_path / "a.safetensors").write_bytes(_with_header(header) + upper.astype("<u2").tobytes())
    assert look(tmp_path / "a.safetensors", read_header(tmp_path / "a.safetensors")["a"]) == expected


# -- the base ----------------------------------------------------------------------------------------------------------


def test_a_bases_revision_is_its_content(tmp_path):
    first, second = write_base(tmp_path / "a"), write_base(tmp_path / "b")
    assert first.revision == second.revision
    assert len(first.revision) == 12
    assert (first.name, first.path) == (str(tmp_path / "a"), str((tmp_path / "a").resolve()))
    other = write_base(tmp_path / "c", model_type="qwen2")
    assert other.revision != first.revision


def test_a_renamed_weights_file_is_another_revision(tmp_path):
    before = write_base(tmp_path / "base")
    file = tmp_path / "base/model-00001-of-00002.safetensors"
    file.rename(file.with_name("model-00001-of-00003.safetensors"))
    assert resolve_base(before.name).revision != before.revision


def test_a_base_that_changes_has_another_revision(tmp_path):
    before = write_base(tmp_path / "base")
    file = tmp_path / "base/model-00001-of-00002.safetensors"
    save_file({name: value * 2 for name, value in load_file(file).items()}, file)
    assert resolve_base(before.name).revision != before.revision


def test_a_large_file_counts_with_blocks_of_its_content(tmp_path, monkeypatch):
    monkeypatch.setattr(base_module, "_WHOLE_FILE", 2**20)
    name, file = write_base(tmp_path / "base").name, tmp_path / "base/model-00001-of-00002.safetensors"
    weights, revisions = np.zeros(20 * 2**20, np.uint8), set()
    for changed in (None, slice(None), 0, -1):  # nothing, all, the first byte, the last
        weights[:] = 0
        if changed is not None:
            weights[changed] = 1
        save_file({"a": weights}, file)
        revisions.add(resolve_base(name).revision)
    assert len(revisions) == 4


def test_the_blocks_of_a_large_file_are_evenly_spaced():
    starts, size = base_module._block_starts(1000, 2**30), 2**30
    steps = np.diff(starts)
    assert (len(starts), starts[0], starts[-1] + 64 * 2**10) == (64, 1000, size)
    assert steps.max() - steps.min() <= 1
    assert base_module._block_starts(1000, 1000) == [1000] * 64


def test_the_seedlings_revision_is_that_of_its_adapters():
    assert resolve_base("seedling").revision == "da5964ee401e"


@pytest.mark.parametrize("index", [True, False])
def test_weights_in_another_form_beside_do_not_count(adapter, tmp_path, index):
    """Another download of the same model lacks them."""
    folder = Path(write_base(tmp_path / "base").path)
    files = sorted(folder.glob("*.safetensors"))
    if index:
        weight_map = {name: file.name for file in files for name in load_file(file)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        save_file({name: value for file in files for name, value in load_file(file).items()}, folder / files[0].name)
        files[1].unlink()
        files[0].rename(folder / "model.safetensors")
    before = resolve_base(str(folder))
    save_file({"layers.0.self_attn.q_proj.weight": np.ones((2, 2), np.float32)}, folder / "consolidated.safetensors")
    assert resolve_base(str(folder)) == before
    assert check_adapter(adapter.save(), before, MAX_RANK).modules == 14


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 1}'])
def test_an_index_that_is_none(tmp_path, text):
    name = write_base(tmp_path / "base").name
    (tmp_path / "base/model.safetensors.index.json").write_text(text)
    with pytest.raises(ConfigError, match=r"model.safetensors.index.json is no index of weights: .* Copy or download"):
        resolve_base(name)


def test_a_weights_file_that_is_a_link_to_nothing(tmp_path):
    name, file = write_base(tmp_path / "base").name, tmp_path / "base/model-00002-of-00002.safetensors"
    file.unlink()
    file.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=rf"base model '{name}' cannot be read: .*'{file}'\. Copy or download"):
        resolve_base(name)


def test_a_download_whose_weights_are_links_to_nothing_stays_an_id(download):
    file = Path(download("Pruned").path) / "model-00002-of-00002.safetensors"
    file.unlink()
    file.symlink_to("nowhere")
    assert resolve_base("Org/Pruned").revision == "main"


def test_a_base_s_template_is_what_writes_its_prompts(tmp_path):
    folder = tmp_path / "base"
    bare = write_base(folder)
    found = [bare]
    for name, text in (("tokenizer.json", "{}"), ("chat_template.jinja", "a"), ("chat_template.jinja", "bc")):
        (folder / name).write_text(text)
        found.append(resolve_base(str(folder)))
    assert len({base.template for base in found}) == 4
    assert {base.revision for base in found} == {bare.revision}
    (folder / "README.md").write_text("about")
    assert resolve_base(str(folder)) == found[-1]


def test_a_hub_id_that_is_not_cached_stays_an_id():
    assert resolve_base("Qwen/Not-In-The-Cache") == Base("Qwen/Not-In-The-Cache", "Qwen/Not-In-The-Cache", "main")


@pytest.fixture
def download(tmp_path, monkeypatch):
    """Puts a model into a cache of the test's own, as Hugging Face's library does."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def download(name):
        model = tmp_path / "hub" / f"models--Org--{name}"
        for folder in ("refs", "snapshots"):
            (model / folder).mkdir(parents=True)
        (model / "refs" / "main").write_text("abc")
        base = write_base(model / "snapshots" / "abc")
        Path(base.path, "tokenizer.json").write_text("{}")
        return base

    return download


def test_a_hub_id_in_the_cache_is_its_snapshot(download):
    plain = download("Tiny")
    base = resolve_base("Org/Tiny")
    assert (base.name, base.path, base.revision) == ("Org/Tiny", plain.path, plain.revision)


@pytest.mark.parametrize(
    ("missing", "index"),
    [("model-00002-of-00002.safetensors", None),
     ("model-00001-of-00002.safetensors", {"a": "model-00001-of-00002.safetensors"}),
     ("model-00002-of-00002.safetensors", {"b": "model-00002-of-00002.safetensors"}),
     ("tokenizer.json", None)],
)  # fmt: skip
def test_a_download_that_has_not_ended_stays_an_id(missing, index, download):
    """As a folder vLLM would take it for the whole model."""
    snapshot = Path(download(f"Half{missing[:11]}{bool(index)}").path)
    (snapshot / missing).unlink()
    if index:
        (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    name = f"Org/{snapshot.parents[1].name.removeprefix('models--Org--')}"
    assert resolve_base(name) == Base(name, name, "main")


def test_a_model_that_comes_while_a_process_runs_keeps_its_name_there(download, adapter, monkeypatch):
    """Another one would start a second engine beside the one that downloaded it."""
    first = resolve_base("Org/Later")
    download("Later")
    assert resolve_base("Org/Later") == first
    monkeypatch.setattr(base_module, "_absent", set())  # the next process
    assert resolve_base("Org/Later").folder is not None


def test_what_is_trained_names_a_base_that_was_downloaded_for_it(download, monkeypatch):
    import huggingface_hub

    with pytest.raises(ConfigError, match=r"'Org/Fetched' is not on this disk .* `hf download Org/Fetched`"):
        fetch_base("Org/Fetched")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: download("Fetched").path)
    fetched = fetch_base("Org/Fetched")
    assert fetched.name == "Org/Fetched" and fetched.folder is not None and len(fetched.revision) == 12
    (fetched.folder / "model-00002-of-00002.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: fetched.path)
    with pytest.raises(ConfigError, match="lacks some of its weights"):
        fetch_base("Org/Fetched")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", mock.Mock(side_effect=httpx.ConnectError("no route")))
    with pytest.raises(ConfigError, match="cannot be downloaded: no route"):
        fetch_base("Org/Fetched")
    assert fetch_base("seedling") == resolve_base("seedling")


@pytest.mark.parametrize(
    ("name", "revision", "fits"),
    [("a", "0" * 12, True), ("b", "0" * 12, True), ("a", "1" * 12, False), ("a", "main", True), ("b", "main", False)],
)
def test_a_base_that_was_not_on_the_disk_goes_by_its_name(name, revision, fits):
    here, elsewhere = Base("a", "/a", "0" * 12), Base(name, "/b", revision)
    assert here.is_recorded(elsewhere.name, elsewhere.revision) is fits
    assert elsewhere.is_recorded(here.name, here.revision) is fits
    assert Base("a", "a", "main").is_recorded(name, "main") is (name == "a")


def test_an_engine_s_base_has_one_name_however_its_folder_is_spelled(tmp_path, monkeypatch):
    folder = write_base(tmp_path / "base").path
    monkeypatch.chdir(tmp_path)
    assert {resolve_base(name).for_engine for name in ("base", "./base", "base/", folder)} == {resolve_base(folder)}
    for name in ("seedling", "Org/Nowhere"):
        assert resolve_base(name).for_engine == resolve_base(name)


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "a/b/c", "", "a b", "Org/Name\n", "../x"])
def test_what_is_neither_a_folder_nor_an_id(model):
    with pytest.raises(ConfigError, match="Give a"):
        resolve_base(model)


def test_a_folder_that_holds_no_model(tmp_path):
    with pytest.raises(ConfigError, match="holds no model"):
        resolve_base(str(tmp_path))


def test_a_base_with_a_corrupt_file(adapter, base):
    (Path(base.path) / "model-00001-of-00002.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="cannot be read"):
        assert check_adapter(adapter.save(), resolve_base(base.name), MAX_RANK).modules == 14
