"""The settings of an engine: the configuration's ``serving`` section under what a caller gives."""

import dataclasses
import json
import pickle
import sys
from types import SimpleNamespace

import pytest

from dspy_lora.adapters.base import Base
from dspy_lora.config import load_config
from dspy_lora.engine import arguments
from dspy_lora.engine.host import Host
from dspy_lora.engine.protocol import Generate
from dspy_lora.engine.settings import check_engine_args, engine_settings
from dspy_lora.errors import ConfigError

BASE = Base("seedling", "/models/seedling", "0123456789ab")


def settings(**overrides):
    return engine_settings(BASE, load_config(), overrides)


def test_defaults_leave_the_choice_to_the_engine():
    found = settings()
    assert found.engine_args == {"trust_remote_code": False}
    assert (found.kv_cache_gib, found.tool_parser, found.reasoning_parser) == (1.0, None, None)
    assert found.start_timeout_s == 600.0


def test_a_caller_overrides_the_configuration_and_its_environment(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora_config.yaml").write_text("serving: {max_loras: 4, max_num_seqs: 8, dtype: float32}")
    monkeypatch.setenv("DSPY_LORA_SERVING__MAX_NUM_SEQS", "16")
    args = settings(dtype="bfloat16").engine_args
    assert (args["max_loras"], args["max_num_seqs"], args["dtype"]) == (4, 16, "bfloat16")


def test_a_setting_is_taken_back_with_none(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora_config.yaml").write_text("serving: {max_loras: 4}")
    assert "max_loras" not in settings(max_loras=None).engine_args


def test_our_own_settings_are_no_arguments_of_vllm():
    found = settings(kv_cache_gib=0.5, tool_parser="hermes", reasoning_parser="qwen3", start_timeout_s=30)
    assert found.engine_args == settings().engine_args
    assert (found.kv_cache_gib, found.tool_parser, found.reasoning_parser) == (0.5, "hermes", "qwen3")
    assert found.start_timeout_s == 30.0


def test_any_argument_of_vllm_is_handed_on():
    assert settings(swap_space=2, hf_overrides={"rope_theta": 1.0}).engine_args == {
        "trust_remote_code": False,
        "swap_space": 2,
        "hf_overrides": {"rope_theta": 1.0},
    }


def test_equal_settings_are_one_key_whatever_their_order():
    one, other = settings(max_loras=2, seed=1), settings(seed=1, max_loras=2)
    assert (one, hash(one)) == (other, hash(other))
    assert one != settings(max_loras=3, seed=1)
    assert pickle.loads(pickle.dumps(one)) == one  # noqa: S301


def test_settings_that_change_answers_are_told_from_those_of_speed():
    """For DSPy's cache, which does not see the engine."""
    assert settings().answers is None
    speed = {"max_loras": 4, "kv_cache_gib": 2.0, "gpu_memory_utilization": 0.5, "start_timeout_s": 30}
    assert settings(**speed).answers is None
    others = [{"reasoning_parser": "qwen3"}, {"tool_parser": "hermes"}, {"dtype": "float32"}, {"quantization": "fp8"}]
    found = [settings(**other).answers for other in [*others, {"hf_overrides": {"rope_theta": 1.0}}]]
    assert len(set(found)) == 5 and None not in found
    assert settings(dtype="float32", **speed).answers == found[2]


def test_another_chat_template_is_another_engine_with_answers_of_its_own():
    first, second = (engine_settings(dataclasses.replace(BASE, template=digest * 12), load_config()) for digest in "ab")
    assert first != second
    assert len({first.answers, second.answers, settings().answers}) == 3


def test_patience_with_a_start_is_no_other_engine():
    assert settings(start_timeout_s=30) == settings() and hash(settings(start_timeout_s=30)) == hash(settings())


def test_the_host_reads_what_was_set():
    read = json.loads(settings(max_loras=2, kv_cache_gib=0.25).to_json())
    assert read["base"]["path"] == "/models/seedling"
    assert read["kv_cache_gib"] == 0.25
    assert json.loads(read["args"])["max_loras"] == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_loras", "many"),
        ("max_loras", 0),
        ("max_lora_rank", 20),
        ("kv_cache_gib", 0),
        ("gpu_memory_utilization", 2),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_by_its_name(key, value):
    with pytest.raises(ConfigError, match=key) as caught:
        settings(**{key: value})
    assert repr(value) in str(caught.value)


def test_a_value_that_is_not_json_is_refused():
    with pytest.raises(ConfigError, match=r"not allowed: .*not JSON serializable"):
        settings(hf_overrides={1, 2})


def test_the_base_model_is_no_setting_of_the_engine():
    with pytest.raises(ConfigError, match="For another revision give its folder as the base"):
        settings(revision="v2")
    with pytest.raises(ConfigError, match="LoRALM's first argument"):
        settings(model="other")


def test_settings_that_are_no_mapping_are_refused():
    with pytest.raises(ConfigError, match="max_loras"):
        engine_settings(BASE, load_config(), ["max_loras"])


def test_an_argument_that_vllm_does_not_know_is_refused_with_the_near_ones():
    check_engine_args({"max_loras": 1}, {"max_loras", "max_model_len"})
    with pytest.raises(
        ConfigError, match=r"engine=\{'max_lora': ...\} is no setting of this vLLM. Did you mean 'max_lo"
    ):
        check_engine_args({"max_lora": 1}, {"max_loras", "max_model_len"})


@pytest.mark.parametrize(
    ("architecture", "avx512", "dtype"),
    [("x86_64", False, "float32"), ("x86_64", True, None), ("aarch64", False, None)],
)
def test_a_processor_that_cannot_compute_in_bfloat16_gets_float32(monkeypatch, architecture, avx512, dtype):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": architecture, "avx512_f": avx512})
    assert arguments._cpu_args(1.0, "0.32.0").get("dtype") == dtype


@pytest.mark.parametrize(
    "given",
    [
        {"cudagraph_capture_sizes": [1]},
        {"max_cudagraph_capture_size": 512},
        {"compilation_config": {}},
        {"enforce_eager": True},
        {"performance_mode": "interactivity"},
        {"enable_lora": False},
    ],
    ids=str,
)
def test_graphs_on_a_gpu_go_beyond_vllm_s_unless_the_user_says_something_of_them(given):
    sizes = arguments._cuda_args({"max_loras": 4})["cudagraph_capture_sizes"]
    assert sizes == sorted(set(sizes)) and {1, 256, 512, 2048} < set(sizes) and sizes[-1] == 2048
    assert "cudagraph_capture_sizes" not in arguments._cuda_args(given)


@pytest.mark.parametrize(
    ("prompt", "asked", "most", "least"),
    [
        (97, {"max_tokens": 16, "min_tokens": 16}, 3, 3),
        (97, {"min_tokens": 16}, 3, 3),
        (50, {"max_tokens": 16, "min_tokens": 4}, 16, 4),
        (50, {"max_tokens": 16, "min_tokens": 20}, 16, 20),  # vLLM says what is wrong with that
        (50, {}, 50, 0),
    ],
)
def test_an_answers_length_is_cut_to_what_the_context_leaves(monkeypatch, prompt, asked, most, least):
    kinds = SimpleNamespace(DELTA=1, FINAL_ONLY=2)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=dict))
    monkeypatch.setitem(
        sys.modules, "vllm.sampling_params", SimpleNamespace(RequestOutputKind=kinds, StructuredOutputsParams=dict)
    )
    host = Host.__new__(Host)
    host.max_model_len, host.parsers = 100, SimpleNamespace(sampling=lambda _: {})
    found = host.sampling_params(Generate(1, [], asked), prompt)
    assert (found["max_tokens"], found["min_tokens"]) == (most, least)
