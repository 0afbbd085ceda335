"""Sets of the channel view `[N, C, S]` that are resident in one program: one read. Notation:
kernels/README.md.

A tile `[BLOCK_C, BLOCK_S]` holds all S positions of GROUPS groups of CG channels. In the backward pass a
program walks through images, and keeps the sums that the parameters' gradients are made of.
"""

import triton
import triton.language as tl

from .channel import known_to_divide, load_channels, load_tile, set_numbers, store_tile, tile_mask
from .fold import update_running
from .names import kernel
from .primitives import centers_twice, compute_dtype, input_gradient, inverse_deviation, times


@triton.jit
def over_groups(per_channel, CG: tl.constexpr, GROUPS: tl.constexpr):
    """Sums of channels `[BLOCK_C]` to the sums of their groups, at every channel; zero beyond GROUPS."""
    BLOCK_C: tl.constexpr = per_channel.shape[0]
    if CG == 1:
        folded = per_channel
    elif GROUPS == 1:
        folded = tl.zeros_like(per_channel) + tl.sum(per_channel, axis=0)
    else:
        groups = tl.arange(0, BLOCK_C) // CG
        folded = tl.zeros_like(per_channel)
        for group in tl.static_range(GROUPS):
            total = tl.sum(tl.where(groups == group, per_channel, 0.0), axis=0)
            folded = tl.where(groups == group, total, folded)
    return folded


@triton.jit
def center_groups(x, mask, inverse_count, CG: tl.constexpr, GROUPS: tl.constexpr):
    """Mean of each channel's group, `[BLOCK_C]`, and the tile less it, zero in the padding lanes."""
    mean = times(over_groups(tl.sum(x, axis=1), CG, GROUPS), inverse_count)
    return mean, tl.where(mask, x - mean[:, None], 0.0)


@kernel(do_not_specialize=["N", "C", "S"])
def group_forward(
    x_ptr,  # [N, C, S]
    y_ptr,  # [N, C, S]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    mean_ptr,  # [N, G] or None
    rstd_ptr,  # [N, G] or None
    variance_ptr,  # [N, G] or None
    running_mean_ptr,  # [C] or None
    running_var_ptr,  # [C] or None
    momentum_ptr,  # [] or None, float64
    x_strides,
    y_strides,
    momentum: "fp64",
    unbiased: "fp64",
    inverse_count: "fp64",
    eps: "fp64",
    N,
    C,
    S,
    CG: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ADJACENT: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """y, and the statistics of each group; the running statistics where a channel is a set."""
    dtype: tl.constexpr = compute_dtype(x_ptr.dtype.element_ty)
    blocks = tl.cdiv(C, GROUPS * CG)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    lanes = tl.arange(0, BLOCK_C)
    channels = tl.program_id(0) % blocks * (GROUPS * CG) + lanes
    positions = tl.arange(0, BLOCK_S)
    present = channels < known_to_divide(C, ADJACENT == "c", ALIGN)
    present &= lanes < GROUPS * CG
    mask = tile_mask(present, positions, S, ADJACENT, ALIGN)

    x = load_tile(x_ptr, image, channels, positions, mask, x_strides, ADJACENT, ALIGN)

    mean, deviation = center_groups(x, mask, inverse_count, CG, GROUPS)
    if centers_twice(x_ptr.dtype.element_ty, CG * BLOCK_S):
        rest, deviation = center_groups(deviation, mask, inverse_count, CG, GROUPS)
        mean += rest
    squares = over_groups(tl.sum(deviation * deviation, axis=1), CG, GROUPS)
    variance = times(squares, inverse_count)
    rstd = inverse_deviation(variance, eps)

    factor = rstd
    if weight_ptr is not None:
        factor *= load_channels(weight_ptr, channels, present, dtype)
    y = deviation * factor[:, None]
    if bias_ptr is not None:
        y += load_channels(bias_ptr, channels, present, dtype)[:, None]

    store_tile(y_ptr, y, image, channels, positions, mask, y_strides, ADJACENT, ALIGN)
    sets = set_numbers(image, channels, CG, C // CG)
    first = present & (channels % CG == 0)
    if mean_ptr is not None:
        tl.store(mean_ptr + sets, mean, first)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + sets, rstd, first)
    if variance_ptr is not None:
        tl.store(variance_ptr + sets, variance, first)
    update_running(
        running_mean_ptr,
        running_var_ptr,
        momentum_ptr,
        momentum,
        unbiased,
        mean.to(tl.float64),
        variance.to(tl.float64),
        channels,
        present,
    )


@kernel(do_not_specialize=["N", "C", "S"])
def group_backward(
    dy_ptr,  # [N, C, S]
    x_ptr,  # [N, C, S]
    weight_ptr,  # [C] or None
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    dx_ptr,  # [N, C, S] or None
    dweight_partial_ptr,  # [programs, C] or None
    dbias_partial_ptr,  # [programs, C] or None
    dy_strides,
    x_strides,
    dx_strides,
    inverse_count: "fp64",
    N,
    C,
    S,
    CG: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ADJACENT: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """dx of all images, and a partial dweight and dbias of those that one program walks through."""
    dtype: tl.constexpr = compute_dtype(x_ptr.dtype.element_ty)
    program = tl.program_id(1).to(tl.int64)
    lanes = tl.arange(0, BLOCK_C)
    channels = tl.program_id(0) * (GROUPS * CG) + lanes
    positions = tl.arange(0, BLOCK_S)
    present = channels < known_to_divide(C, ADJACENT == "c", ALIGN)
    present &= lanes < GROUPS * CG
    mask = tile_mask(present, positions, S, ADJACENT, ALIGN)
    dweight = tl.zeros([BLOCK_C], dtype)
    dbias = tl.zeros([BLOCK_C], dtype)

    for image in range(program, N, tl.num_programs(1)):
        dy = load_tile(dy_ptr, image, channels, positions, mask, dy_strides, ADJACENT, ALIGN)
        x = load_tile(x_ptr, image, channels, positions, mask, x_strides, ADJACENT, ALIGN)
        sets = set_numbers(image, channels, CG, C // CG)
        mean = load_channels(mean_ptr, sets, present, dtype)
        rstd = load_channels(rstd_ptr, sets, present, dtype)
        x_hat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)

        dy_x_hat = tl.sum(dy * x_hat, axis=1)
        dy_sum = tl.sum(dy, axis=1)
        dweight += dy_x_hat
        dbias += dy_sum
        if dx_ptr is not None:
            wdy = dy
            if weight_ptr is not None:
                weight = load_channels(weight_ptr, channels, present, dtype)
                wdy *= weight[:, None]
                dy_x_hat *= weight
                dy_sum *= weight
            c1 = times(over_groups(dy_x_hat, CG, GROUPS), inverse_count)
            c2 = times(over_groups(dy_sum, CG, GROUPS), inverse_count)
            dx = input_gradient(wdy, x_hat, c1, c2, rstd)
            store_tile(dx_ptr, dx, image, channels, positions, mask, dx_strides, ADJACENT, ALIGN)

    partial = program * C + channels
    if dweight_partial_ptr is not None:
        tl.store(dweight_partial_ptr + partial, dweight, present)
    if dbias_partial_ptr is not None:
        tl.store(dbias_partial_ptr + partial, dbias, present)
