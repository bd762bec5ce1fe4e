"""What every test stands on: no hub, no caches of the user's, no settings of the user's."""

import atexit
import ctypes
import importlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

CACHE = tempfile.mkdtemp(prefix="dspy-lora-tests-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)

# Before anything of DSPy, Hugging Face or vLLM is imported, and inherited by the processes that tests start.
os.environ |= {
    "DO_NOT_TRACK": "1",
    "DSPY_CACHEDIR": CACHE,
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
for name in [name for name in os.environ if name.startswith("DSPY_LORA_")]:
    del os.environ[name]
try:
    ctypes.CDLL("libcuda.so.1")
except OSError:  # no NVIDIA driver; Triton reads this when it is first imported
    os.environ["TRITON_INTERPRET"] = "1"

# A property test asks the same examples in every run, and no example fails for being slow on a busy machine.
settings.register_profile("suite", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")
    parser.addoption("--data", type=Path, default=ROOT / "../shared/data", help="folder with domains/*/test.jsonl")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run pytest with --slow"))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _has_cuda():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="gpu: torch finds no CUDA device"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture
def example(monkeypatch):
    """Imports an example by its name and gives the process the words for its ``main``."""
    monkeypatch.syspath_prepend(ROOT / "examples")

    def load(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        return importlib.import_module(name)

    return load


@pytest.fixture(scope="session")
def data_root(pytestconfig: pytest.Config) -> Path:
    """The folder of real rows; a test that needs it is skipped where it is missing."""
    root: Path = pytestconfig.getoption("--data").resolve()
    if not root.is_dir():
        pytest.skip(f"data: no folder {root} (pytest --data FOLDER)")
    return root


@pytest.fixture
def mlflow(tmp_path):
    """MLflow with a store and an experiment, ``tests``, of the test's own: both are global to the process."""
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.create_experiment("tests", artifact_location=str(tmp_path / "artifacts"))
    mlflow.set_experiment("tests")
    return mlflow


@pytest.fixture(scope="session")
def make_lm():
    """Makes LoRALMs of the seedling that share one engine, in float32: an answer does not depend on the batch."""
    from dspy_lora import LoRALM

    engine = {"dtype": "float32", "tool_parser": "hermes"}

    def make(domain=None, **kwargs):
        return LoRALM("seedling", domain=domain, engine=engine, **{"max_tokens": 16, "cache": False} | kwargs)

    yield make
    make().kill()


@pytest.fixture(scope="session")
def thinking_base(tmp_path_factory):
    """The seedling as a model that thinks: its tokenizer has <think> and </think>, its template opens the first."""
    from dspy_lora.adapters.base import SEEDLING_FOLDER

    folder = tmp_path_factory.mktemp("base") / "thinker"
    shutil.copytree(SEEDLING_FOLDER, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    for content, token in (("</think>", max(vocabulary, key=vocabulary.get)), ("<think>", list(vocabulary)[-2])):
        id = vocabulary.pop(token)
        merges.remove(next(merge for merge in merges if "".join(merge) == token))
        vocabulary[content] = id
        tokenizer["added_tokens"].append(
            tokenizer["added_tokens"][0] | {"id": id, "content": content, "special": False}
        )
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "{%- if add_generation_prompt %}{{- '<think>\\n' }}{%- endif %}")
    return folder


@pytest.fixture(scope="session")
def make_thinker(thinking_base):
    """Makes LoRALMs of the model that thinks, on one engine."""
    from dspy_lora import LoRALM

    def make(**kwargs):
        engine = {"reasoning_parser": "deepseek_r1"}
        return LoRALM(str(thinking_base), engine=engine, **{"max_tokens": 64, "cache": False} | kwargs)

    yield make
    make().kill()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """A random Llama of one layer with the seedling's tokenizer, for what trains an adapter whatever it learns."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    from dspy_lora.adapters.base import SEEDLING_FOLDER

    folder = tmp_path_factory.mktemp("base")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(SEEDLING_FOLDER / file, folder)
    config = AutoConfig.from_pretrained(SEEDLING_FOLDER)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    config.update(small | {"num_attention_heads": 2, "num_key_value_heads": 1})
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder
