"""How the kernels of ``gpu_kernels.py`` cut a product into tiles, by the number of tokens in the batch.

Chosen by timings on an H100, of the Llama-3-8B shape's products at rank 16 with twelve adapters. What is best differs
little between products, so the number of tokens decides alone.
"""

VERSION = 1  # of the kernels; raise it with any change that may make another setting the fastest: old times are void
RANKS = (8, 16, 32, 64)  # that they take; the tiles of larger ones would not fit a block's shared memory
LEAST = 16  # rows and columns that Triton's dot takes
_FEW = 512  # tokens: a decode step, or a short prompt
_MANY = 128  # outputs: three slices of rank 64, say; chosen by what fits, not by timings


def shrink_tiles(tokens: int, outputs: int) -> dict[str, int]:
    """The tiles of an input's product with A: tokens, inputs a step, and parts that the inputs are split into.

    Args:
        tokens: Of the batch.
        outputs: Of all slices, which one tile takes; many leave room for fewer inputs in a block's shared memory.
    """
    many = outputs > _MANY
    if tokens <= _FEW:
        height, split = 16, 32 if tokens <= 64 else 16
    else:
        height, split = 64, 4 if tokens <= 4096 else 2 if tokens <= 12288 else 1
    inputs, warps = (64, 8 if height == 64 else 4) if many else (128, 4)
    return {"BLOCK_M": height, "BLOCK_K": inputs, "SPLIT_K": split, "num_warps": warps, "num_stages": 3}


def expand_tiles(tokens: int) -> dict[str, int]:
    """The tiles of the product with B: tokens and outputs."""
    height, warps = (16, 2) if tokens <= _FEW else (32, 4)
    return {"BLOCK_M": height, "BLOCK_N": 128, "num_warps": warps, "num_stages": 1}


def padded(size: int) -> int:
    """The power of two that holds a size, as Triton's blocks have to be."""
    return max(LEAST, 1 << (size - 1).bit_length())
