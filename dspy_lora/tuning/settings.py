"""Tile settings that a LoRA kernel may run with."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest.mock import patch

from dspy_lora.tuning.problem import Problem

# In the order in which the search walks them: the tile first, what depends on it after.
_VALUES = {
    "block_n": (16, 32, 64, 128, 256, 512),
    "block_m": (16, 32, 64, 128, 256),
    "block_k": (16, 32, 64, 128, 256, 512),
    "split_k": (1, 2, 4, 8, 16, 32, 64),
    "num_warps": (1, 2, 4, 8),
    "num_stages": (1, 2, 3, 4, 5),
    "group_size_m": (1, 4, 8, 16),
}
AXES = tuple(_VALUES)
_LEAST_TILE = 16  # what Triton's dot takes
_SHARED_BYTES = 227 * 1024  # that a block may use on sm_90 (CUDA programming guide, technical specifications)
_LANES = 32  # threads of a warp
_ACCUMULATORS = 128  # float32 registers of a thread that may hold sums; of 255, the rest hold addresses and inputs


@dataclass(frozen=True)
class Setting:
    """How a kernel cuts its product into tiles.

    Attributes:
        block_m: Tokens of a tile.
        block_n: Outputs of a tile.
        block_k: Inputs that are summed in one step.
        num_warps: Warps that compute a tile.
        num_stages: Steps whose inputs are loaded ahead.
        split_k: Parts into which the sum is cut, added atomically; shrink only, None for expand.
        group_size_m: Tiles of tokens that follow each other; shrink only, None for expand.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int | None = None
    group_size_m: int | None = None

    @classmethod
    def from_vllm(cls, config: dict[str, Any]) -> "Setting":
        """Takes what the search varies from a setting as vLLM has it."""
        return cls(**{axis: config[axis] for axis in AXES if axis in config})

    def as_vllm(self) -> dict[str, int | None]:
        """The setting as vLLM's kernels and files have it."""
        chosen = {axis: value for axis, value in asdict(self).items() if value is not None}
        return {**chosen, "num_ctas": 1, "max_nreg": None}

    def __str__(self) -> str:
        tile = f"m{self.block_m} n{self.block_n} k{self.block_k} warps {self.num_warps} stages {self.num_stages}"
        return tile if self.split_k is None else f"{tile} split {self.split_k} group {self.group_size_m}"


def default(problem: Problem) -> Setting:
    """The setting that vLLM takes when it reads no files."""
    from vllm.lora.ops.triton_ops import utils

    # Past the caches, and blind to files: the user's VLLM_TUNED_CONFIG_FOLDER must not become the baseline.
    with patch.object(utils, "load_lora_op_config", lambda *_: None):
        found = utils.get_lora_op_configs.__wrapped__(
            problem.product.op,
            max_loras=problem.max_loras + 1,  # vLLM counts "no adapter" as one
            batch=problem.tokens,
            hidden_size=problem.product.width,
            rank=problem.rank,
            num_slices=problem.product.slices,
        )
    return Setting.from_vllm(found)


def along(problem: Problem, setting: Setting, axis: str, up: bool) -> Iterator[Setting]:
    """The settings that differ in one axis, nearest first, as far as they fit.

    A value outside the search's, such as a default wider than the product, has neighbours too.

    Args:
        problem: What is tuned.
        setting: Where to start; not among what is yielded.
        axis: One of ``AXES``; nothing is yielded for one that the kernel does not have.
        up: Whether the values grow.
    """
    current = getattr(setting, axis)
    if current is None:
        return
    most = {"block_n": _power_of_two(problem.outputs), "block_k": _power_of_two(problem.inputs)}.get(axis)
    values = [value for value in _VALUES[axis] if most is None or value <= most]
    beyond = [value for value in values if (value > current if up else value < current)]
    for value in sorted(beyond, reverse=not up):
        candidate = replace(setting, **{axis: value})
        if not fits(problem, candidate):
            return
        yield candidate


def fits(problem: Problem, setting: Setting) -> bool:
    """Whether a block's sums fit its registers and its inputs its shared memory, by estimate."""
    sums = setting.block_m * setting.block_n
    threads = setting.num_warps * _LANES
    return sums <= _ACCUMULATORS * threads and shared_bytes(problem, setting) <= _SHARED_BYTES


def shared_bytes(problem: Problem, setting: Setting) -> int:
    """Estimates a block's shared memory in bytes: input tiles of all stages, or the sums on their way out, if larger.

    Shrink's input is bfloat16, expand's is float32 (vLLM's buffer between the two); weights are bfloat16.
    """
    inputs = setting.block_m * setting.block_k * (2 if problem.product.op == "shrink" else 4)
    weights = setting.block_k * setting.block_n * 2
    return max(setting.num_stages * (inputs + weights), setting.block_m * setting.block_n * 4)


def _power_of_two(size: int) -> int:
    """The next power of two, at least the least tile."""
    return max(_LEAST_TILE, 1 << (size - 1).bit_length())
