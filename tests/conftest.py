"""What every test stands on: no hub, no caches of the user's, no settings of the user's."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

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


@pytest.fixture(scope="session")
def data_root(pytestconfig: pytest.Config) -> Path:
    """The folder of real rows; a test that needs it is skipped where it is missing."""
    root: Path = pytestconfig.getoption("--data").resolve()
    if not root.is_dir():
        pytest.skip(f"data: no folder {root} (pytest --data FOLDER)")
    return root
