"""LoRA products for a batch of many adapters, in Triton.

vLLM's kernels (``vllm/lora/ops/triton_ops``) start a block for every adapter and every tile of the whole batch; with
twelve adapters, twelve of thirteen blocks have nothing to do. Where a product has several slices (query, key and value,
say) they also read addresses from memory, of which the compiler cannot know that they are aligned, and so moves two
bytes at a time. Here the tiles of all adapters are counted first, and a block finds its own; starts, widths (which the
caller checks) and addresses (which torch's allocator aligns) are said to be aligned; and the slices of one input are
read together.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(tile, counts_ptr, starts_ptr, ids_ptr, loras, LORAS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Finds a tile's adapter and rows: the adapter's slot, the rows' first place in the sorted tokens, how many."""
    at = tl.arange(0, LORAS)
    ids = tl.load(ids_ptr + at, mask=at < loras, other=-1)
    counts = tl.where(ids >= 0, tl.load(counts_ptr + at, mask=at < loras, other=0), 0)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    ends = tl.cumsum(tiles, 0)
    here = (tile < ends) & (tile >= ends - tiles)
    skipped = (tile - tl.sum(tl.where(here, ends - tiles, 0), 0)) * BLOCK_M
    first = tl.sum(tl.where(here, tl.load(starts_ptr + at, mask=at < loras, other=0), 0), 0) + skipped
    return tl.sum(tl.where(here, ids, 0), 0), first, tl.sum(tl.where(here, counts, 0), 0) - skipped


@triton.jit
def expand(
    x_ptr, weights_ptr, out_ptr, starts, widths, N, counts_ptr, starts_ptr, ids_ptr, tokens_ptr, loras, x_slice, x_row,
    weights_lora, out_row, K: tl.constexpr, SLICES: tl.constexpr, SAME_WIDTH: tl.constexpr, ADD: tl.constexpr,
    LORAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out[rows, slice] (+)= x[slice, rows] @ B[slice, lora]^T`` of one tile: BLOCK_M tokens, BLOCK_N outputs."""
    slice_id = tl.program_id(1)
    blocks = tl.cdiv(N, BLOCK_N)
    first_n = (tl.program_id(0) % blocks) * BLOCK_N
    if SAME_WIDTH:
        width, per_lora = N, weights_lora
    else:
        width = tl.multiple_of(tl.load(widths + slice_id).to(tl.int32), 16)
        per_lora = tl.multiple_of(tl.load(weights_lora + slice_id), 16)
    if first_n >= width:
        return
    lora, first, count = _tile(tl.program_id(0) // blocks, counts_ptr, starts_ptr, ids_ptr, loras, LORAS, BLOCK_M)
    if count <= 0:
        return
    if SLICES == 1:
        weights, start = weights_ptr, starts
    else:
        weights = tl.load(weights_ptr + slice_id).to(tl.pointer_type(out_ptr.dtype.element_ty))
        weights = tl.multiple_of(weights, 16)
        start = tl.multiple_of(tl.load(starts + slice_id).to(tl.int32), 16)
    m, n, k = tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    rows = tl.load(tokens_ptr + first + m, mask=m < count, other=0).to(tl.int64)
    x = tl.load(x_ptr + slice_id * x_slice + rows[:, None] * x_row + k[None, :], mask=(k < K)[None, :], other=0.0)
    weight_ptrs = weights + lora * per_lora + n[None, :] * K + k[:, None]
    weight = tl.load(weight_ptrs, mask=(n < width)[None, :] & (k < K)[:, None], other=0.0)
    product = tl.dot(x.to(weight.dtype), weight)
    out_ptrs = out_ptr + rows[:, None] * out_row + (start + n)[None, :]
    inside = (m < count)[:, None] & (n < width)[None, :]
    if ADD:
        product += tl.load(out_ptrs, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptrs, product.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def shrink(
    x_ptr, weights_ptr, out_ptr, counts_ptr, starts_ptr, ids_ptr, tokens_ptr, loras, scaling, x_row, weights_lora,
    out_slice, out_row, K, N: tl.constexpr, SLICES: tl.constexpr, LORAS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """``out[slice, rows] += scaling * x[rows] @ A[slice, lora]^T`` of one tile, all slices, a part of the inputs."""
    lora, first, count = _tile(tl.program_id(0) // SPLIT_K, counts_ptr, starts_ptr, ids_ptr, loras, LORAS, BLOCK_M)
    if count <= 0:
        return
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    k = (tl.program_id(0) % SPLIT_K) * (STEPS * BLOCK_K) + tl.arange(0, BLOCK_K)
    rows = tl.load(tokens_ptr + first + m, mask=m < count, other=0).to(tl.int64)
    slices, inside = n // N, n < SLICES * N
    if SLICES == 1:
        weights = weights_ptr + n % N * K
    else:
        weights = tl.load(weights_ptr + slices, mask=inside, other=0)
        weights = tl.multiple_of(weights.to(tl.pointer_type(x_ptr.dtype.element_ty)), 16) + n % N * K
    x_ptrs = x_ptr + rows[:, None] * x_row + k[None, :]
    weight_ptrs = weights[None, :] + lora * weights_lora + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(STEPS):
        known = k + step * BLOCK_K < K
        x = tl.load(x_ptrs + step * BLOCK_K, mask=known[None, :], other=0.0)
        weight = tl.load(weight_ptrs + step * BLOCK_K, mask=known[:, None] & inside[None, :], other=0.0)
        total += tl.dot(x, weight)
    out_ptrs = out_ptr + slices[None, :] * out_slice + rows[:, None] * out_row + (n % N)[None, :]
    held = (m < count)[:, None] & inside[None, :]
    if SPLIT_K == 1:
        tl.store(out_ptrs, total * scaling, mask=held)
    else:
        tl.atomic_add(out_ptrs, total * scaling, mask=held, sem="relaxed")
