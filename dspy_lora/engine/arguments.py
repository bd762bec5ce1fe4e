"""What vLLM is started with: dspy-lora's defaults under the caller's settings."""

import dataclasses
import json
import os
import sys
from typing import Any

from dspy_lora.engine import gpu_tuned
from dspy_lora.engine.settings import check_engine_args

_LORAS_IN_MEMORY = 32  # 2.7 GB for rank 16 of Llama 3 8B; they are read once instead of at every swap
# Tokens of the batches that have a CUDA graph: those of vLLM 0.26, which end at 512, and on to 2,048.
_GRAPHS = [1, 2, 4, *range(8, 256, 8), *range(256, 512, 16), *range(512, 2049, 128)]
_ON_GRAPHS = {  # the user's words about graphs
    "cudagraph_capture_sizes",
    "max_cudagraph_capture_size",
    "compilation_config",
    "enforce_eager",
    "performance_mode",
}
_GROUPED_LORA_VLLM = ("0.32.", "0.33.")  # the versions that cpu_lora.py was tested with


def set_environment() -> None:
    """Sets what vLLM and OpenMP read from the environment, unless the user did. To be called before vLLM is imported.

    ``VLLM_CPU_NUM_OF_RESERVED_CPU=0`` uses every core; vLLM leaves one idle otherwise.
    ``OMP_WAIT_POLICY=PASSIVE`` lets threads that wait for each other sleep. They spin otherwise, and where anything
    else wants a core, each waits for one that is not running. ``GOMP_SPINCOUNT`` has them spin for some microseconds
    first: the many small products of adapters follow each other faster than a sleeping thread wakes.
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")


def _cpu_args(kv_cache_gib: float, version: str) -> dict[str, Any]:
    """Arguments of the engine on a CPU, unless the user gives them.

    ``VLLM_ENABLE_V1_MULTIPROCESSING=0`` puts the one worker into the core's process, which saves a process, its memory
    and a hop for each step. Blocks of 32 tokens let the prefix cache keep what calls share (instruction and field
    names) to within 32 tokens; vLLM's own 128 are longer than most instructions. A processor without AVX-512 has no
    arithmetic for bfloat16, which most weights are stored in: there float32 is several times as fast.
    ``dspy-lora bench --only defaults`` measures them.

    Args:
        kv_cache_gib: Size of the KV cache; vLLM's own environment variable comes before it.
        version: vLLM's.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    args: dict[str, Any] = {"block_size": 32}
    if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        args["kv_cache_memory_bytes"] = int(kv_cache_gib * 2**30)
    if not _computes_bfloat16():
        args["dtype"] = "float32"
    if version.startswith(_GROUPED_LORA_VLLM):
        args["worker_cls"] = "dspy_lora.engine.cpu_lora.GroupedCPUWorker"
    else:
        tested = " and ".join(f"{each}*" for each in _GROUPED_LORA_VLLM)
        print(f"LoRA by vLLM {version}'s own path: dspy-lora's is for {tested}", file=sys.stderr)
    return args


def _cuda_args(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the engine on an NVIDIA GPU, unless the user gives them.

    A prompt that is longer than every graph runs from Python, where a layer's eight LoRA kernels take longer to launch
    than to run: with graphs that end at 512 tokens, as vLLM's do, a lone prompt of 512 got its first token 2.2 times
    as late. Graphs for each number of active adapters (``specialize_active_lora``) were 1.00 times as fast. Both
    on Llama 3 8B's shape and an H200, as ``dspy-lora bench --shape 8b --only defaults --words 350`` measures them.

    Args:
        given: The user's.
    """
    args: dict[str, Any] = {"worker_cls": gpu_tuned.TILED}
    if given.get("enable_lora", True) and not _ON_GRAPHS & given.keys():
        args["cudagraph_capture_sizes"] = _GRAPHS
    return args


def _computes_bfloat16() -> bool:
    """Whether this processor is fast enough in bfloat16; only of x86 is it known that some are not."""
    import torch

    found = torch.cpu.get_capabilities()
    return found["architecture"] != "x86_64" or bool(found["avx512_f"])


def engine_args(settings: dict[str, Any], said: dict[str, Any] | None = None) -> dict[str, Any]:
    """Arguments for ``vllm.AsyncEngineArgs``; the benchmark starts plain vLLM with the same.

    Args:
        settings: ``EngineSettings`` as a dictionary.
        said: Arguments that come before those of the settings.

    Returns:
        The arguments.

    Raises:
        ConfigError: A setting that this vLLM does not know.
    """
    set_environment()
    import vllm
    from vllm.platforms import current_platform

    given = json.loads(settings["args"]) | (said or {})
    args: dict[str, Any] = {"enable_lora": True, "max_loras": 12, "max_lora_rank": 16, "disable_log_stats": True}
    if settings["reasoning_parser"]:  # vLLM applies a schema to what follows the reasoning only if it knows the parser
        args["reasoning_parser"] = settings["reasoning_parser"]
    if current_platform.is_cpu():
        args |= _cpu_args(settings["kv_cache_gib"], vllm.__version__)
    elif current_platform.is_cuda():
        args |= _cuda_args(given)
    args |= given
    args.setdefault("max_cpu_loras", max(_LORAS_IN_MEMORY, args["max_loras"]))
    check_engine_args(args, {field.name for field in dataclasses.fields(vllm.AsyncEngineArgs)})
    if current_platform.is_cuda():
        args["worker_cls"] = gpu_tuned.worker(args, settings["base"]["path"])
    return args | {"model": settings["base"]["path"]}
