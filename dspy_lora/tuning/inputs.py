"""Random inputs of a problem, and what a kernel must make of them."""

from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from dspy_lora.tuning.problem import Problem

if TYPE_CHECKING:
    import torch

_SCALE = 0.5  # of shrink
_BFLOAT16 = 2.0**-8  # largest relative error of rounding to bfloat16
_ORDER = 1e-3  # what another order of a float32 sum may change: results are about 1, and a lost step changes 0.02


class Inputs:
    """Tensors of one problem, as an engine hands them to vLLM's kernels.

    Tokens are spread evenly over the adapters, those of an adapter side by side, as in requests of equal length.

    Args:
        problem: What is computed.
        device: Where the tensors lie.
    """

    def __init__(self, problem: Problem, device: str = "cuda") -> None:
        import torch

        self.problem = problem
        self._device = device
        self._generator = torch.Generator(device).manual_seed(0)
        m, rank, widths = problem.tokens, problem.rank, problem.product.widths
        if problem.product.op == "shrink":
            self._x = self._random(m, widths[0])
            self._weights = [self._random(problem.max_loras, rank, width) / width**0.5 for width in widths]
            self._before = torch.zeros(len(widths), m, rank, device=device)
        else:
            # Values that bfloat16 holds, in float32 as in the engine: the kernel's rounding of them changes nothing.
            self._x = self._random(len(widths), m, rank).float()
            self._weights = [self._random(problem.max_loras, width, rank) / rank**0.5 for width in widths]
            self._before = self._random(m, sum(widths))
        self._output = self._before.clone()
        adapters = torch.arange(m, device=device) * problem.max_loras // m
        self._counts: list[int] = torch.bincount(adapters, minlength=problem.max_loras).tolist()
        self._metadata = _metadata(adapters, problem.max_loras)

    def _random(self, *shape: int) -> "torch.Tensor":
        """Normally distributed values in bfloat16."""
        import torch

        return torch.randn(shape, generator=self._generator, dtype=torch.bfloat16, device=self._device)

    def call(self) -> None:
        """Calls vLLM's kernel; expand adds to the output that is there."""
        from vllm.lora.ops.triton_ops import lora_expand, lora_shrink

        if self.problem.product.op == "shrink":
            lora_shrink(self._x, self._weights, self._output, *self._metadata, _SCALE)
        else:
            lora_expand(self._x, self._weights, self._output, *self._metadata, offset_start=0, add_inputs=True)

    def is_right(self) -> bool:
        """Calls the kernel once and compares every output with float32 arithmetic.

        A result may differ by two roundings to bfloat16 (of the product, and of its sum with what was there), plus
        0.001 for the order of the sum: ``2^-7 (|product| + |before|) + 0.001``. Shrink's output is float32, and must
        differ by the last alone.
        """
        import torch

        self._output.copy_(self._before)
        self.call()
        rounding = 0.0 if self.problem.product.op == "shrink" else 2 * _BFLOAT16
        right = torch.ones((), dtype=torch.bool, device=self._device)
        for product, before, got in self._parts():
            allowed = rounding * (product.abs() + before.abs()) + _ORDER
            right &= ((got - before - product).abs() <= allowed).all()
        return bool(right)

    def _parts(self) -> Iterator[tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]]:
        """By adapter and slice: the product, what was there and what the kernel left; float32, [tokens, outputs]."""
        starts = [0, *accumulate(self.problem.product.widths)]
        for adapter, (end, count) in enumerate(zip(accumulate(self._counts), self._counts, strict=True)):
            rows = slice(end - count, end)
            for place, weights in enumerate(self._weights):
                weight = weights[adapter].float()
                if self.problem.product.op == "shrink":
                    product = _SCALE * (self._x[rows].float() @ weight.T)
                    yield product, self._before[place, rows], self._output[place, rows]
                else:
                    product = self._x[place, rows] @ weight.T
                    columns = slice(starts[place], starts[place + 1])
                    yield product, self._before[rows, columns].float(), self._output[rows, columns].float()


def _metadata(adapters: "torch.Tensor", max_loras: int) -> tuple[Any, ...]:
    """vLLM's own metadata of a batch, as its default (``specialize_active_lora`` off) hands it to the kernels.

    Args:
        adapters: Adapter of each token, [tokens].
        max_loras: Adapters on the GPU.
    """
    from vllm.lora.ops.triton_ops import LoRAKernelMeta

    metadata = LoRAKernelMeta.make(max_loras, adapters.numel(), device=adapters.device)
    metadata.prepare_tensors(adapters)
    return tuple(metadata.meta_args(adapters.numel(), False))
