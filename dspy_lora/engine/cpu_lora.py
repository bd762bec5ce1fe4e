"""LoRA on vLLM's CPU back end, adapter by adapter instead of token by token.

vLLM 0.32's own path (``vllm/lora/ops/torch_ops/lora_ops.py``) has two faults. It copies an adapter's matrices once for
every token of a batch. And it indexes the slots with -1 for tokens without an adapter, which gives those the weights of
the LAST slot: once that holds an adapter, base-model calls that share a batch with adapter calls get its answers. Here
the tokens of one adapter are multiplied with its matrices together, and tokens without an adapter are left alone.

The host names ``GroupedCPUWorker`` as vLLM's ``worker_cls`` on a CPU, so nothing but the engines it starts is touched;
``python -m vllm.entrypoints.openai.api_server --worker-cls dspy_lora.engine.cpu_lora.GroupedCPUWorker`` takes it too.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform
from vllm.v1.worker.cpu_worker import CPUWorker

from dspy_lora.engine.heap import keep_trimmed
from dspy_lora.engine.lora_loading import LoadsAside

if TYPE_CHECKING:
    from vllm.lora.layers import LoRAMapping

# A product of a run costs about 25 us to start; gathering and scattering a token costs about 1 us a layer.
_LONG_RUN = 32


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Scattered tokens in tiles of equal height, one adapter a tile, for a batched matrix product.

    With ``n`` adapters and ``t`` tokens the height is ``t / n``: that is at most ``2 n`` tiles and ``2 t`` rows however
    unequal the adapters' shares are.

    Attributes:
        slots: Adapter slot of each tile, [tiles].
        rows: Token position in each row of the tiles, [tiles * height]; 0 in rows that are not used.
        tokens: Positions of the tokens, [t].
        places: Row of each of them, [t].
    """

    slots: torch.Tensor
    rows: torch.Tensor
    tokens: torch.Tensor
    places: torch.Tensor

    @classmethod
    def of(cls, token_slots: torch.Tensor) -> "Tiles | None":
        """Sorts tokens into tiles.

        Args:
            token_slots: Adapter slot of each token, [tokens]; negative for tokens that are left out.

        Returns:
            The tiles; None where all tokens are left out.
        """
        ordered, tokens = torch.sort(token_slots, stable=True)
        out = int((ordered < 0).sum())
        ordered, tokens = ordered[out:], tokens[out:]
        if not len(tokens):
            return None
        slots, counts = torch.unique_consecutive(ordered, return_counts=True)
        height = -(-len(tokens) // len(slots))
        tiles = (counts + height - 1) // height
        starts, first_rows = counts.cumsum(0) - counts, (tiles.cumsum(0) - tiles) * height
        places = torch.arange(len(tokens)) + torch.repeat_interleave(first_rows - starts, counts)
        rows = torch.zeros(int(tiles.sum()) * height, dtype=tokens.dtype)
        rows[places] = tokens
        return cls(torch.repeat_interleave(slots, tiles), rows, tokens, places)

    def apply(
        self, y: torch.Tensor, x: torch.Tensor, a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...], scale: float
    ) -> None:
        """As ``ByAdapter.apply``, for the tokens in the tiles."""
        inputs = x.index_select(0, self.rows).view(len(self.slots), -1, x.shape[-1])
        outputs = torch.cat([self._product(inputs, *pair) for pair in zip(a, b, strict=True)], dim=2)
        y.index_add_(0, self.tokens, outputs.flatten(0, 1).index_select(0, self.places), alpha=scale)

    def _product(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """``x @ A^T @ B^T`` with each tile's adapter: [tiles, height, in] -> [tiles, height, out]."""
        down = torch.bmm(x, a[:, 0].index_select(0, self.slots).transpose(1, 2))
        return torch.bmm(down, b[:, 0].index_select(0, self.slots).transpose(1, 2))


@dataclasses.dataclass(frozen=True)
class ByAdapter:
    """The tokens of a batch by adapter.

    Attributes:
        runs: ``(slot, first, last)`` of long runs of tokens of one adapter (prompts, mostly), multiplied in place.
        tiles: The other tokens that have an adapter (one of each answer, mostly).
    """

    runs: tuple[tuple[int, int, int], ...] = ()
    tiles: Tiles | None = None

    @classmethod
    def of(cls, token_slots: torch.Tensor) -> "ByAdapter":
        """Groups a batch.

        Args:
            token_slots: Adapter slot of each token, [tokens]; negative for none.

        Returns:
            The groups.
        """
        slots, counts = torch.unique_consecutive(token_slots, return_counts=True)
        ends = counts.cumsum(0)
        if len(slots) > 1:
            long = (slots >= 0) & (counts >= _LONG_RUN)
            rest = token_slots.masked_fill(torch.repeat_interleave(long, counts), -1)
            tiles = Tiles.of(rest)
        else:
            long, tiles = slots >= 0, None
        picked = zip(slots[long].tolist(), (ends - counts)[long].tolist(), ends[long].tolist(), strict=True)
        return cls(tuple(picked), tiles)

    def apply(
        self, y: torch.Tensor, x: torch.Tensor, a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...], scale: float
    ) -> None:
        """Adds ``scale * x @ A^T @ B^T`` of each token's adapter to ``y``, in place.

        Args:
            y: Output, [tokens, sum of the slices' widths].
            x: Input, [tokens, in].
            a: For each slice A of every slot, [slots, 1, rank, in].
            b: For each slice B of every slot, [slots, 1, width, rank].
            scale: Factor on the product.
        """
        columns = y.split([slice.shape[-2] for slice in b], dim=1)
        for slot, first, last in self.runs:
            for out, down, up in zip(columns, a, b, strict=True):
                out[first:last].addmm_(x[first:last] @ down[slot, 0].t(), up[slot, 0].t(), alpha=scale)
        if self.tiles is not None:
            self.tiles.apply(y, x, a, b, scale)


class GroupedPunica(PunicaWrapperCPU):
    """vLLM's interface to LoRA's arithmetic.

    Attributes:
        tokens: The batch's tokens.
        sampled: The positions whose logits are computed, for adapters of the output layer.
    """

    tokens = ByAdapter()
    sampled = ByAdapter()

    def update_metadata(
        self, mapping: "LoRAMapping", lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """Called when the batch changes; see ``PunicaWrapperBase.update_metadata``."""
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        self.tokens = ByAdapter.of(self.token_lora_indices)
        self.sampled = ByAdapter.of(self.sampler_indices)

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
        """Adds each token's adapter to the output of a linear layer, in place.

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
        self.tokens.apply(y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]), lora_a_stacked, lora_b_stacked, scale)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds each position's adapter of the output layer; arguments as above, with one slice."""
        y = y.view(-1, y.shape[-1])[:, : lora_b_stacked.shape[-2]]
        self.sampled.apply(y, x.view(-1, x.shape[-1]), (lora_a_stacked,), (lora_b_stacked,), scale)

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """Adds each token's adapter of the embedding; ``x`` is the row of A, [tokens, rank]."""
        without = (self.token_lora_indices < 0).unsqueeze(1)
        super().add_lora_embedding(y, x.masked_fill(without, 0), lora_b_stacked, add_inputs, **kwargs)


class GroupedCPUWorker(LoadsAside, CPUWorker):
    """vLLM's CPU worker with ``GroupedPunica`` in the place of its own LoRA path, loading aside, its heap trimmed."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Loads the model; its LoRA layers are made here and ask the platform for their implementation."""
        path = f"{GroupedPunica.__module__}.{GroupedPunica.__qualname__}"
        current_platform.get_punica_wrapper = lambda: path
        super().load_model(*args, **kwargs)
        keep_trimmed()
