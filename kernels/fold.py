"""Folding the partial results of many programs, in a fixed order. Notation: kernels/README.md.

Of the channel view's kernels these alone know which pieces share statistics: PIECES pieces of an image,
or of the batch, and the CG channels of a group. With ONE_SET a program folds one set of several
channels; without, it folds BLOCK_C sets of a channel each.
"""

import triton
import triton.language as tl

from .names import kernel
from .primitives import inverse_deviation, times


@triton.jit
def accumulator(partial_ptr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Zeros `[BLOCK_P, BLOCK_N]` of the dtype of partial results, which may be None."""
    if partial_ptr is not None:
        zeros = tl.zeros([BLOCK_P, BLOCK_N], partial_ptr.dtype.element_ty)
    else:
        zeros = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    return zeros


@triton.jit
def column_sums(
    dweight_partial_ptr,
    dbias_partial_ptr,
    first_row,
    cols,
    mask,
    P,
    N,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums `[BLOCK_N]` of the columns `cols` of both `[P, N]` from `first_row` on, in one loop: a step
    waits for memory once; of one that is None, zeros."""
    dweight = accumulator(dweight_partial_ptr, BLOCK_P, BLOCK_N)
    dbias = accumulator(dbias_partial_ptr, BLOCK_P, BLOCK_N)
    for start in range(0, P, BLOCK_P):
        pieces = start + tl.arange(0, BLOCK_P)
        there = (pieces < P)[:, None] & mask[None, :]
        offsets = (first_row + pieces).to(tl.int64)[:, None] * N + cols[None, :]
        if dweight_partial_ptr is not None:
            dweight += tl.load(dweight_partial_ptr + offsets, there, other=0.0)
        if dbias_partial_ptr is not None:
            dbias += tl.load(dbias_partial_ptr + offsets, there, other=0.0)
    return tl.sum(dweight, axis=0), tl.sum(dbias, axis=0)


@triton.jit
def column_sum(partial_ptr, cols, mask, P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sums `[BLOCK_N]` of the columns `cols` of `[P, N]`."""
    total, _ = column_sums(partial_ptr, None, 0, cols, mask, P, N, BLOCK_P, BLOCK_N)
    return total


@kernel(do_not_specialize=["P"])
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
    dweight, dbias = column_sums(
        dweight_partial_ptr, dbias_partial_ptr, 0, cols, mask, P, N, BLOCK_P, BLOCK_N
    )
    if dweight_ptr is not None:
        tl.store(dweight_ptr + cols, dweight, mask)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + cols, dbias, mask)


@triton.jit
def over_set(per_channel, ONE_SET: tl.constexpr):
    """`[BLOCK_C]` sums of channels to the sums of their sets."""
    if ONE_SET:
        per_channel = tl.zeros_like(per_channel) + tl.sum(per_channel, axis=0)
    return per_channel


@triton.jit
def piece_counts(pieces, N, S, IMAGES, POSITIONS):
    """Elements of one channel in each piece of the batch, float64."""
    parts = tl.cdiv(S, POSITIONS)
    images = tl.minimum(N - pieces // parts * IMAGES, IMAGES)
    positions = tl.minimum(S - pieces % parts * POSITIONS, POSITIONS)
    return images.to(tl.float64) * positions.to(tl.float64)


@triton.jit
def set_moments(
    mean_partial_ptr,
    squares_partial_ptr,
    first_piece,
    first_channel,
    last_channel,
    inverse_count,
    N,
    C,
    S,
    IMAGES,
    POSITIONS,
    PIECES,
    ONE_SET: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and variance `[BLOCK_C]`, float64, of channels from the first to the last, which is excluded,
    over PIECES pieces. In two passes: the mean of the means first, then what they deviate from it."""
    mean = tl.zeros([BLOCK_C], tl.float64)
    variance = tl.zeros([BLOCK_C], tl.float64)
    for sweep in tl.static_range(2):
        total = tl.zeros([BLOCK_P, BLOCK_C], tl.float64)
        for first in range(first_channel, last_channel, BLOCK_C):
            channels = first + tl.arange(0, BLOCK_C)
            for start in range(0, PIECES, BLOCK_P):
                pieces = start + tl.arange(0, BLOCK_P)
                mask = (pieces < PIECES)[:, None] & (channels < last_channel)[None, :]
                pieces += first_piece
                partial = pieces.to(tl.int64)[:, None] * C + channels[None, :]
                counts = piece_counts(pieces, N, S, IMAGES, POSITIONS)[:, None]
                means = tl.load(mean_partial_ptr + partial, mask, other=0.0)
                if sweep == 0:
                    terms = counts * means
                else:
                    deviation = means - mean[None, :]
                    squares = tl.load(squares_partial_ptr + partial, mask, other=0.0)
                    terms = squares.to(tl.float64) + counts * deviation * deviation
                total += tl.where(mask, terms, 0.0)
        folded = over_set(tl.sum(total, axis=0), ONE_SET) * inverse_count
        if sweep == 0:
            mean = folded
        else:
            variance = folded
    return mean, variance


@triton.jit
def split_mean(mean, dtype: tl.constexpr):
    """A float64 mean as the sum of two numbers of `dtype`."""
    rounded = mean.to(dtype)
    return rounded, (mean - rounded.to(tl.float64)).to(dtype)


@triton.jit
def move_running(running_ptr, channels, mask, value, momentum):
    """running = (1 - momentum) * running + momentum * value, all in float64."""
    running = tl.load(running_ptr + channels, mask, other=0.0)
    moved = running.to(tl.float64) * (1.0 - momentum) + value * momentum
    if running.dtype != tl.float64:
        moved = moved.to(tl.float32)
    tl.store(running_ptr + channels, moved, mask)


@triton.jit
def update_running(
    running_mean_ptr, running_var_ptr, momentum_ptr, momentum, unbiased, mean, variance, channels, mask
):
    """Moves the running statistics of channels towards mean and `unbiased * variance`. The momentum is
    read from memory where a tensor holds it."""
    if momentum_ptr is not None:
        momentum = tl.load(momentum_ptr)
    if running_mean_ptr is not None:
        move_running(running_mean_ptr, channels, mask, mean, momentum)
    if running_var_ptr is not None:
        move_running(running_var_ptr, channels, mask, variance * unbiased, momentum)


@triton.jit
def locate_set(program, C, CG, SETS, PIECES, ONE_SET: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of a program that folds: its first piece, its channels from first to last (excluded), and the sets
    `[BLOCK_C]` that it stores, with a mask. SETS is 0 where the batch shares statistics."""
    lanes = tl.arange(0, BLOCK_C)
    if ONE_SET:
        image, group = program // (C // CG), program % (C // CG)
        first, last = group * CG, group * CG + CG
        sets, mask = program + lanes, lanes < 1
    else:
        blocks = tl.cdiv(C, BLOCK_C)
        image, first = program // blocks, program % blocks * BLOCK_C
        last = tl.minimum(first + BLOCK_C, C)
        sets, mask = image.to(tl.int64) * SETS + first + lanes, first + lanes < last
    return image * PIECES, first, last, sets, mask


@kernel(do_not_specialize=["N", "C", "S", "CG", "SETS", "IMAGES", "POSITIONS", "PIECES"])
def fold_moments(
    mean_partial_ptr,  # [pieces, C], float64
    squares_partial_ptr,  # [pieces, C]
    mean_ptr,  # [sets]
    rest_ptr,  # [sets]
    rstd_ptr,  # [sets]
    variance_ptr,  # [sets] or None
    running_mean_ptr,  # [C] or None
    running_var_ptr,  # [C] or None
    momentum_ptr,  # [] or None, float64
    momentum: "fp64",
    unbiased: "fp64",
    inverse_count: "fp64",
    eps: "fp64",
    N,
    C,
    S,
    CG,
    SETS,
    IMAGES,
    POSITIONS,
    PIECES,
    ONE_SET: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    program=None,
):
    """Mean and rstd of each set, and for sets of a channel each the running statistics."""
    dtype: tl.constexpr = squares_partial_ptr.dtype.element_ty
    if program is None:
        program = tl.program_id(0)
    first_piece, first, last, sets, mask = locate_set(program, C, CG, SETS, PIECES, ONE_SET, BLOCK_C)

    mean, variance = set_moments(
        mean_partial_ptr,
        squares_partial_ptr,
        first_piece,
        first,
        last,
        inverse_count,
        N,
        C,
        S,
        IMAGES,
        POSITIONS,
        PIECES,
        ONE_SET,
        BLOCK_P,
        BLOCK_C,
    )

    rounded, rest = split_mean(mean, dtype)
    tl.store(mean_ptr + sets, rounded, mask)
    tl.store(rest_ptr + sets, rest, mask)
    tl.store(rstd_ptr + sets, inverse_deviation(variance.to(dtype), eps), mask)
    if variance_ptr is not None:
        tl.store(variance_ptr + sets, variance.to(dtype), mask)
    update_running(
        running_mean_ptr, running_var_ptr, momentum_ptr, momentum, unbiased, mean, variance, sets, mask
    )


@triton.jit
def set_gradient_means(
    dweight_partial_ptr,
    dbias_partial_ptr,
    weight_ptr,
    first_piece,
    first_channel,
    last_channel,
    inverse_count,
    C,
    PIECES,
    ONE_SET: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """c1 = mean(wdy * x_hat) and c2 = mean(wdy), `[BLOCK_C]`, of channels from the first to the last,
    which is excluded, over PIECES pieces."""
    dtype: tl.constexpr = dbias_partial_ptr.dtype.element_ty
    wdy_x_hat = tl.zeros([BLOCK_C], dtype)
    wdy = tl.zeros([BLOCK_C], dtype)
    for first in range(first_channel, last_channel, BLOCK_C):
        channels = first + tl.arange(0, BLOCK_C)
        mask = channels < last_channel
        dweight, dbias = column_sums(
            dweight_partial_ptr,
            dbias_partial_ptr,
            first_piece,
            channels,
            mask,
            PIECES,
            C,
            BLOCK_P,
            BLOCK_C,
        )
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + channels, mask, other=0.0).to(dtype)
            dweight *= weight
            dbias *= weight
        wdy_x_hat += dweight
        wdy += dbias
    c1 = times(over_set(wdy_x_hat, ONE_SET), inverse_count)
    c2 = times(over_set(wdy, ONE_SET), inverse_count)
    return c1, c2


@kernel(do_not_specialize=["C", "CG", "SETS", "PIECES"])
def fold_gradient_means(
    dweight_partial_ptr,  # [pieces, C]
    dbias_partial_ptr,  # [pieces, C]
    weight_ptr,  # [C] or None
    c1_ptr,  # [sets]
    c2_ptr,  # [sets]
    inverse_count: "fp64",
    C,
    CG,
    SETS,
    PIECES,
    ONE_SET: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    program=None,
):
    if program is None:
        program = tl.program_id(0)
    first_piece, first, last, sets, mask = locate_set(program, C, CG, SETS, PIECES, ONE_SET, BLOCK_C)
    c1, c2 = set_gradient_means(
        dweight_partial_ptr,
        dbias_partial_ptr,
        weight_ptr,
        first_piece,
        first,
        last,
        inverse_count,
        C,
        PIECES,
        ONE_SET,
        BLOCK_P,
        BLOCK_C,
    )
    tl.store(c1_ptr + sets, c1, mask)
    tl.store(c2_ptr + sets, c2, mask)
