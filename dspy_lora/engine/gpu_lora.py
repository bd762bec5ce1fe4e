"""LoRA on vLLM's CUDA back end with the kernels of ``gpu_kernels.py``.

The host names ``TiledGPUWorker`` as vLLM's ``worker_cls`` on an NVIDIA GPU, or ``TunedGPUWorker`` where gpu_tuned.py
has found tiles. It puts launchers in the place of vLLM's two kernels, under the same functions: what vLLM checks,
remembers and captures in graphs stays as it is. A kernel that lacks an argument which the launchers read (those of vLLM
0.26, 0.32 and 0.33 have them all), and a product that they do not take, go vLLM's own way.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from vllm.v1.worker.gpu_worker import Worker

from dspy_lora.engine import gpu_kernels
from dspy_lora.engine.gpu_tiles import RANKS, expand_tiles, padded, shrink_tiles
from dspy_lora.engine.lora_loading import LoadsAside

_OPS = "vllm.lora.ops.triton_ops"
_ALIGNED = 16  # elements: what the kernels tell the compiler of widths, starts and addresses
_BATCH = "token_indices_sorted_by_lora_ids num_tokens_per_lora lora_token_start_loc lora_ids"
_NEEDED = {
    "shrink": "input_ptr lora_ptr out_ptr M N K scaling input_d0_stride lora_d0_stride output_d0_stride"
    f" output_d1_stride SLICE_NUM {_BATCH}",
    "expand": "input_ptr lora_ptr out_ptr M N K slice_start_loc input_d0_stride input_d1_stride ls_d0_ptr"
    f" output_d0_stride output_hs_ptr ADD_INPUTS SLICE_NUM SAME_STRIDE {_BATCH}",
}
_TILES = {"shrink": ("BLOCK_M", "BLOCK_K", "SPLIT_K"), "expand": ("BLOCK_M", "BLOCK_N")}  # of a tuned setting


class TiledGPUWorker(LoadsAside, Worker):
    """vLLM's GPU worker with dspy-lora's LoRA kernels, and adapters loaded aside."""

    tuned = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        install(self.tuned)
        super().__init__(*args, **kwargs)

    def compile_or_warm_up_model(self) -> Any:
        """Runs batches of every size for which the kernels have a form of their own, before vLLM's own warm-up.

        vLLM runs none of adapters but those of its graphs, so that the first long prompts would wait for a compiler.
        """
        if self.lora_config:
            most, adapters = self.model_runner.max_num_tokens, self.lora_config.max_loras
            for tokens in [*(2**power for power in range((most - 1).bit_length())), most]:
                self.model_runner._dummy_run(tokens, skip_eplb=True, remove_lora=False, num_active_loras=adapters)
        return super().compile_or_warm_up_model()


class TunedGPUWorker(TiledGPUWorker):
    """The same, with the tiles that vLLM reads from a folder of `dspy-lora tune`."""

    tuned = True


def install(tuned: bool) -> None:
    """Puts the launchers in the place of vLLM's kernels, for this process; a later call replaces them.

    Where vLLM is to answer the same whatever the batch (``VLLM_BATCH_INVARIANT``), its own order of sums is needed.

    Args:
        tuned: Whether the settings that vLLM hands over are for these kernels; else they are for its own, and the rules
            of gpu_tiles.py decide.
    """
    if importlib.import_module(f"{_OPS}.utils").is_batch_invariant:
        return
    for op, launch in (("shrink", shrink), ("expand", expand)):
        module, name = importlib.import_module(f"{_OPS}.lora_{op}_op"), f"_lora_{op}_kernel"
        kernel = getattr(module, name, None)
        if isinstance(kernel, Launcher):
            kernel = kernel.kernel
        needed = {*_NEEDED[op].split(), *(_TILES[op] if tuned else ())}
        if missing := needed - set(getattr(kernel, "arg_names", ())):
            print(f"LoRA's {op} by vLLM's own kernel, whose arguments lack {sorted(missing)}", file=sys.stderr)
            continue
        setattr(module, name, Launcher(kernel, functools.partial(launch, tuned=tuned)))


class Launcher:
    """Takes the calls of one of vLLM's Triton kernels.

    Args:
        kernel: vLLM's.
        launch: Gets the number of adapters and the kernel's arguments by name; says whether it took the call.
    """

    def __init__(self, kernel: Any, launch: Callable[[int, Mapping[str, Any]], bool]) -> None:
        self.kernel, self.launch = kernel, launch
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        """The kernel on vLLM's grid, whose last dimension counts the adapters."""
        return functools.partial(self._call, grid)

    def _call(self, grid: tuple[int, int, int], *args: Any, **kwargs: Any) -> None:
        if not self.launch(grid[2], dict(zip(self.arg_names, args, strict=False)) | kwargs):
            self.kernel[grid](*args, **kwargs)


def shrink(loras: int, given: Mapping[str, Any], tuned: bool = False) -> bool:
    """Launches ``gpu_kernels.shrink``; False where it does not take the product."""
    rank, inputs, slices = given["N"], given["K"], given["SLICE_NUM"]
    if rank not in RANKS or inputs % _ALIGNED:
        return False
    tiles = _handed_over(given, "shrink") if tuned else shrink_tiles(given["M"], slices * rank)
    split = tiles["SPLIT_K"]
    gpu_kernels.shrink[(_most_tiles(given["M"], loras, tiles["BLOCK_M"]) * split,)](
        given["input_ptr"], given["lora_ptr"], given["out_ptr"], *_batch(given), loras, given["scaling"],
        given["input_d0_stride"], given["lora_d0_stride"], given["output_d0_stride"], given["output_d1_stride"], inputs,
        N=rank, SLICES=slices, LORAS=padded(given["lora_ids"].numel()), BLOCK_N=padded(slices * rank),
        STEPS=-(-inputs // (tiles["BLOCK_K"] * split)), **tiles,
    )  # fmt: skip
    return True


def expand(loras: int, given: Mapping[str, Any], tuned: bool = False) -> bool:
    """Launches ``gpu_kernels.expand``; False where it does not take the product."""
    rank, widest, slices = given["K"], given["N"], given["SLICE_NUM"]
    placed = (given["slice_start_loc"], widest, *([] if given["SAME_STRIDE"] else [given["output_hs_ptr"]]))
    if rank not in RANKS or not all(map(_is_aligned, placed)):
        return False
    tiles = _handed_over(given, "expand") if tuned else expand_tiles(given["M"])
    columns = -(-widest // tiles["BLOCK_N"])
    gpu_kernels.expand[(_most_tiles(given["M"], loras, tiles["BLOCK_M"]) * columns, slices)](
        given["input_ptr"], given["lora_ptr"], given["out_ptr"], given["slice_start_loc"], given["output_hs_ptr"],
        widest, *_batch(given), loras, given["input_d0_stride"], given["input_d1_stride"], given["ls_d0_ptr"],
        given["output_d0_stride"], K=rank, SLICES=slices, SAME_WIDTH=given["SAME_STRIDE"], ADD=given["ADD_INPUTS"],
        LORAS=padded(given["lora_ids"].numel()), BLOCK_K=padded(rank), **tiles,
    )  # fmt: skip
    return True


def _batch(given: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """Which tokens are whose: counts, places of the first, adapters' slots, and the tokens in their order."""
    names = ("num_tokens_per_lora", "lora_token_start_loc", "lora_ids", "token_indices_sorted_by_lora_ids")
    return tuple(given[name] for name in names)


def _handed_over(given: Mapping[str, Any], op: str) -> dict[str, int]:
    """The setting that vLLM has read from a folder."""
    return {name: given[name] for name in (*_TILES[op], "num_warps", "num_stages")}


def _most_tiles(tokens: int, loras: int, height: int) -> int:
    """The most tiles that a batch can have, whichever adapters its tokens are of."""
    return min(tokens, tokens // height + loras)


_seen: dict[int, bool] = {}


def _is_aligned(value: "int | torch.Tensor") -> bool:
    """Whether all numbers are multiples of what the kernels promise the compiler.

    vLLM keeps its tensors for as long as the engine runs and sees each for the first time outside of a graph's capture,
    so that looking once is both enough and allowed.
    """
    if isinstance(value, int):
        return value % _ALIGNED == 0
    if value.data_ptr() not in _seen:
        _seen[value.data_ptr()] = all(number % _ALIGNED == 0 for number in value.tolist())
    return _seen[value.data_ptr()]


def forget() -> None:
    """Forgets which tensors were looked at; for a caller whose tensors come and go."""
    _seen.clear()
