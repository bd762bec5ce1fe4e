"""Times LoRA's kernels on the GPU, called as vLLM calls them."""

import importlib
import statistics
from typing import TYPE_CHECKING
from unittest.mock import patch

from dspy_lora.errors import CrashError, TuningError
from dspy_lora.tuning.inputs import Inputs
from dspy_lora.tuning.problem import Problem
from dspy_lora.tuning.settings import Setting

if TYPE_CHECKING:
    import torch

_WARM_UPS = 3  # runs
_FLUSHED = 4  # times the L2 cache that is overwritten between two runs


def require_gpu() -> None:
    """Checks that there is something to tune.

    Raises:
        TuningError: No CUDA device, or no vLLM with its Triton kernels.
    """
    try:
        import torch
        from vllm.triton_utils import HAS_TRITON
    except ImportError as exc:
        raise TuningError(
            f"`dspy-lora tune` times LoRA's kernels, and {exc.name} is not installed: on a machine with an NVIDIA "
            "GPU, pip install 'dspy-lora[vllm]'."
        ) from exc
    if not torch.cuda.is_available():
        raise TuningError(
            "`dspy-lora tune` times LoRA's kernels on the GPU that will serve, and torch finds no CUDA device. "
            "Run it there; a model's config.json is enough (--config FILE)."
        )
    if not HAS_TRITON:
        raise TuningError(
            "`dspy-lora tune`: vLLM finds no Triton here, in which the kernels are written: pip install triton."
        )


class Bench:
    """Times a kernel with a setting, after it has checked what the kernel computes with it.

    Args:
        repeats: Runs of which the median counts.
    """

    def __init__(self, repeats: int = 20) -> None:
        import torch

        from dspy_lora.engine import gpu_lora

        gpu_lora.install(tuned=True)
        self._repeats = repeats
        size = _FLUSHED * torch.cuda.get_device_properties("cuda").L2_cache_size
        self._cache = torch.empty(size, dtype=torch.int8, device="cuda")
        self._inputs: Inputs | None = None

    def measure(self, problem: Problem, setting: Setting) -> float | None:
        """Times one setting.

        Args:
            problem: What is computed.
            setting: The tiles.

        Returns:
            Seconds, the median of the runs; None where the GPU or Triton refuses the setting, or its result is wrong.

        Raises:
            CrashError: The setting has broken the CUDA context.
            TuningError: The problem does not fit the GPU's memory.
        """
        import torch
        from vllm.triton_utils import triton

        inputs = self._prepare(problem)
        module = importlib.import_module(f"vllm.lora.ops.triton_ops.lora_{problem.product.op}_op")
        config = setting.as_vllm()
        # The kernel's module has the look-up by name, so this also passes by its cache.
        with patch.object(module, "get_lora_op_configs", lambda *_, **__: config):
            try:
                return self._seconds(inputs) if inputs.is_right() else None
            except (triton.TritonError, RuntimeError) as exc:  # too much shared memory, a pass that fails
                refusal = exc
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            raise CrashError(
                f"{problem}: the setting {setting} ended in a CUDA error, which this process cannot go on after: "
                f"{refusal}. Run the command again; it goes on without that setting."
            ) from refusal
        return None

    def _prepare(self, problem: Problem) -> Inputs:
        """Inputs of a problem; those of the last one are kept, for one problem is timed many times."""
        import torch
        from vllm.lora.ops.triton_ops import utils

        from dspy_lora.engine import gpu_lora

        if self._inputs is None or self._inputs.problem != problem:
            # Strides are remembered by addresses, which the next problem's weights may get again.
            utils._LORA_A_PTR_DICT.clear()
            utils._LORA_B_PTR_DICT.clear()
            gpu_lora.forget()
            self._inputs = None
            try:
                self._inputs = Inputs(problem)
            except torch.OutOfMemoryError as exc:
                raise TuningError(f"{problem}: {exc}. Free the GPU, or leave that size out of --tokens.") from exc
        return self._inputs

    def _seconds(self, inputs: Inputs) -> float:
        """Median seconds of a run, replayed from a CUDA graph as an engine does, with a cold L2 cache."""
        import torch

        for _ in range(_WARM_UPS):
            inputs.call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            inputs.call()
        events = [_event_pair() for _ in range(self._repeats)]
        for start, end in events:
            self._cache.zero_()  # the GPU is at it for longer than Python is at the next lines: no launch is timed
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events) / 1000


def _event_pair() -> "tuple[torch.cuda.Event, torch.cuda.Event]":
    import torch

    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
