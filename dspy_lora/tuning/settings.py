"""Tile settings that a LoRA kernel may run with."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from dspy_lora.engine.gpu_shapes import Op
from dspy_lora.engine.gpu_tiles import expand_tiles, padded, shrink_tiles
from dspy_lora.tuning.problem import Problem

# In the order in which the search walks them: the tile first, what depends on it after.
_VALUES = {
    "block_n": (16, 32, 64, 128, 256, 512),
    "block_m": (16, 32, 64, 128, 256),
    "block_k": (16, 32, 64, 128, 256, 512),
    "split_k": (1, 2, 4, 8, 16, 32, 64),
    "num_warps": (1, 2, 4, 8),
    "num_stages": (1, 2, 3, 4, 5),
}
AXES = tuple(_VALUES)
# One block takes all slices' outputs (shrink), or the whole sum in one step (expand).
_FIXED: dict[Op, tuple[str, ...]] = {"shrink": ("block_n",), "expand": ("block_k", "num_stages")}
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
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int | None = None

    def as_vllm(self) -> dict[str, int | None]:
        """The setting as vLLM's kernels and files have it."""
        chosen = {axis: value for axis, value in asdict(self).items() if value is not None}
        groups = {} if self.split_k is None else {"group_size_m": 8}  # vLLM's own value: only its kernel has groups
        return {**chosen, **groups, "num_ctas": 1, "max_nreg": None}

    def __str__(self) -> str:
        tile = f"m{self.block_m} n{self.block_n} k{self.block_k} warps {self.num_warps} stages {self.num_stages}"
        return tile if self.split_k is None else f"{tile} split {self.split_k}"


def default(problem: Problem) -> Setting:
    """The setting that the launchers take where there are no files."""
    if problem.product.op == "shrink":
        outputs = problem.product.slices * problem.rank
        tiles = shrink_tiles(problem.tokens, outputs) | {"BLOCK_N": padded(outputs)}
    else:
        tiles = expand_tiles(problem.tokens) | {"BLOCK_K": padded(problem.rank)}
    return Setting(**{name.lower(): value for name, value in tiles.items()})


def along(problem: Problem, setting: Setting, axis: str, up: bool) -> Iterator[Setting]:
    """The settings that differ in one axis, nearest first, as far as they fit.

    A value outside the search's, such as a default wider than the product, has neighbours too.

    Args:
        problem: What is tuned.
        setting: Where to start; not among what is yielded.
        axis: One of ``AXES``; nothing is yielded for one that the kernel does not have, or that it fixes.
        up: Whether the values grow.
    """
    current = getattr(setting, axis)
    if current is None or axis in _FIXED[problem.product.op]:
        return
    most = {"block_n": padded(problem.outputs), "block_k": padded(problem.inputs)}.get(axis)
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
