"""LoRA on vLLM's CPU back end, adapter by adapter instead of token by token.

vLLM 0.32's CPU path copies an adapter's matrices once for every token of a batch, and gives tokens without an adapter
(slot -1) the weights of the last slot. Here the tokens of one adapter are multiplied with its matrices together, and
tokens without an adapter are left alone. vLLM finds this class through its plugin mechanism (entry point
``vllm.general_plugins`` in pyproject.toml), in every process it starts; it takes effect only in an engine that the host
of this package started (``ENABLED`` in the environment), on a CPU, with a vLLM that it was tested with.

Measured by ``dspy-lora bench`` (see docs) and held to the PEFT reference by ``tests/test_engine_cpu_lora.py``.
"""

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

if TYPE_CHECKING:
    from vllm.lora.layers import LoRAMapping

logger = logging.getLogger(__name__)

ENABLED = "DSPY_LORA_GROUPED_CPU_LORA"
TESTED_VLLM = ("0.32.",)


class GroupedPunica(PunicaWrapperCPU):
    """Applies LoRA to linear layers with two matrix products an adapter and slice.

    Attributes:
        order: Token positions sorted by adapter slot, or None where one adapter owns the whole batch.
        segments: ``(slot, first, last)`` ranges of ``order`` (or of the batch); tokens without an adapter are in none.
    """

    order: torch.Tensor | None = None
    segments: Sequence[tuple[int, int, int]] = ()

    def update_metadata(
        self, mapping: "LoRAMapping", lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """Called once a step; see ``PunicaWrapperBase.update_metadata``."""
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        slots = self.token_lora_indices
        sorted_slots, order = torch.sort(slots, stable=True)
        values, counts = torch.unique_consecutive(sorted_slots, return_counts=True)
        ends = counts.cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        self.segments = [
            (slot, first, last) for slot, first, last in zip(values.tolist(), starts, ends, strict=True) if slot >= 0
        ]
        self.order = None if len(values) <= 1 else order

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds ``scale * x @ A^T @ B^T`` of each token's adapter to ``y``, in place.

        Args:
            y: Output, [tokens, sum of output_slices].
            x: Input, [tokens, in].
            lora_a_stacked: For each slice A, [slots, 1, rank, in].
            lora_b_stacked: For each slice B, [slots, 1, out, rank].
            scale: Factor on the product (vLLM passes 1: an adapter's own scaling is in B).
            output_slices: Width of each slice of ``y``.
            buffer: Not used.
            **kwargs: Not used.
        """
        if not self.segments:
            return
        x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        rows = x if self.order is None else x.index_select(0, self.order)
        target = y if self.order is None else torch.zeros_like(y)
        for slot, first, last in self.segments:
            segment, column = rows[first:last], 0
            for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                out = target[first:last, column : column + width]
                out.addmm_(segment @ a[slot, 0].t(), b[slot, 0].t(), alpha=scale)
                column += width
        if self.order is not None:
            y.index_add_(0, self.order, target)


def register() -> None:
    """vLLM's plugin hook: puts ``GroupedPunica`` in place where it applies, and does nothing elsewhere."""
    import vllm
    from vllm.platforms import current_platform

    if os.environ.get(ENABLED) != "1" or not current_platform.is_cpu():
        return
    if not vllm.__version__.startswith(TESTED_VLLM):
        logger.warning(
            "LoRA on the CPU uses vLLM %s's own path: grouped LoRA was tested with %s", vllm.__version__, TESTED_VLLM
        )
        return
    path = f"{GroupedPunica.__module__}.{GroupedPunica.__qualname__}"
    type(current_platform).get_punica_wrapper = classmethod(lambda cls: path)
