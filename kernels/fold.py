"""Folding partial results of many programs, in a fixed order. Notation: kernels/README.md."""

import triton
import triton.language as tl


@triton.jit
def column_sum(partial_ptr, cols, mask, P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sums `[BLOCK_N]` of the columns `cols` of `[P, N]`."""
    total = tl.zeros([BLOCK_P, BLOCK_N], partial_ptr.dtype.element_ty)
    for start in range(0, P, BLOCK_P):
        pieces = start + tl.arange(0, BLOCK_P)
        offsets = pieces.to(tl.int64)[:, None] * N + cols[None, :]
        total += tl.load(partial_ptr + offsets, (pieces < P)[:, None] & mask[None, :], other=0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["P"])
def fold_parameter_gradients(
    dweight_partial_ptr,  # [P, N] or None
    dbias_partial_ptr,  # [P, N] or None
    dweight_ptr,  # [N] or None
    dbias_ptr,  # [N] or None
    P,
    N,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < N
    if dweight_ptr is not None:
        dweight = column_sum(dweight_partial_ptr, cols, mask, P, N, BLOCK_P, BLOCK_N)
        tl.store(dweight_ptr + cols, dweight, mask)
    if dbias_ptr is not None:
        dbias = column_sum(dbias_partial_ptr, cols, mask, P, N, BLOCK_P, BLOCK_N)
        tl.store(dbias_ptr + cols, dbias, mask)
