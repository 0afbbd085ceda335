"""Sets of the channel view `[N, C, S]` that are resident in one program: one read. Notation:
kernels/README.md.

CHUNKS tiles `[BLOCK_C, BLOCK_S]` side by side hold all S positions of GROUPS groups of CG channels. In
the backward pass a program walks through images, and keeps the sums that the parameters' gradients are
made of.
"""

import triton
import triton.language as tl

from .arithmetic import multiply_add, product, subtract
from .channel import (
    known_to_divide,
    load_channels,
    load_weight,
    set_numbers,
    store_tile,
    tile_mask,
    tile_pointers,
)
from .fold import update_running
from .names import kernel
from .primitives import (
    alone,
    centers_twice,
    compute_dtype,
    inverse_deviation,
    load_wide,
    normalized,
    products,
    row_sum,
    sum_of_products,
    times,
    word,
)


@triton.constexpr_function
def alone_in_line(dtype, BLOCK_C, BLOCK_S, ADJACENT, ALIGN):
    """Whether a thread may have a single position of a channel in a tile: of one with no more elements
    than threads; of a line that all warps share; and of channels_last, of whose lines only those of up
    to 128 positions are spread so thinly."""
    if ADJACENT == "s":
        single = alone(BLOCK_S, word(dtype, BLOCK_S, ALIGN), 512)
    else:
        single = alone(BLOCK_S, 1, 128 if ADJACENT == "c" else 1024)
    return single or BLOCK_C * BLOCK_S <= 128


@triton.jit
def over_groups(per_channel, CG: tl.constexpr, GROUPS: tl.constexpr):
    """Sums of channels `[BLOCK_C]` to the sums of their groups `[BLOCK_G]`."""
    if CG == 1:
        sums = per_channel
    elif GROUPS == 1:
        sums = tl.sum(per_channel, axis=0, keep_dims=True)
    elif triton.next_power_of_2(CG) == CG:
        sums = tl.sum(tl.reshape(per_channel, [per_channel.shape[0] // CG, CG]), axis=1)
    else:
        # Each group's channels in a line of their own: all groups take one reduction.
        LINE: tl.constexpr = triton.next_power_of_2(CG)
        groups = tl.arange(0, triton.next_power_of_2(GROUPS))[:, None]
        members = tl.arange(0, LINE)[None, :]
        there = (groups < GROUPS) & (members < CG)
        places = tl.where(there, groups * CG + members, 0)
        lines = tl.gather(per_channel, tl.reshape(places, [places.shape[0] * LINE]), 0)
        sums = tl.sum(tl.where(there, tl.reshape(lines, places.shape), 0.0), axis=1)
    return sums


@triton.jit
def at_channels(per_group, CG: tl.constexpr, BLOCK_C: tl.constexpr):
    """What groups `[BLOCK_G]` have, at each of their channels `[BLOCK_C]`."""
    BLOCK_G: tl.constexpr = per_group.shape[0]
    if CG == 1:
        found = per_group
    elif BLOCK_G == 1:
        found = tl.zeros([BLOCK_C], per_group.dtype) + per_group
    elif triton.next_power_of_2(CG) == CG:
        found = tl.reshape(tl.broadcast_to(per_group[:, None], [BLOCK_G, CG]), [BLOCK_C])
    else:
        found = tl.gather(per_group, tl.minimum(tl.arange(0, BLOCK_C) // CG, BLOCK_G - 1), 0)
    return found


@triton.jit
def tile_sets(block, channels, present, C, CG: tl.constexpr, GROUPS: tl.constexpr):
    """Of an image's sets those of a block of GROUPS groups, `[BLOCK_G]`, and which of them there are."""
    if CG == 1:
        groups, known = channels, present
    else:
        lanes = tl.arange(0, triton.next_power_of_2(GROUPS))
        groups = block * GROUPS + lanes
        known = (lanes < GROUPS) & (groups < C // CG)
    return groups, known


@triton.jit
def tile_masks(present, lanes, S, CHUNKS: tl.constexpr, ADJACENT: tl.constexpr, ALIGN: tl.constexpr):
    """Which elements of tiles side by side exist: a mask `[BLOCK_C, BLOCK_S]` each."""
    masks = ()
    for i in tl.static_range(CHUNKS):
        masks += (tile_mask(present, lanes + i * lanes.shape[0], S, ADJACENT, ALIGN),)
    return masks


@triton.jit
def load_tiles(ptr, image, channels, lanes, masks, strides, ADJACENT: tl.constexpr, ALIGN: tl.constexpr):
    """Tiles side by side `[BLOCK_C, BLOCK_S]`, in the compute dtype; zero in the padding lanes."""
    tiles = ()
    for i in tl.static_range(len(masks)):
        positions = lanes + i * lanes.shape[0]
        pointers = tile_pointers(ptr, image, channels, positions, strides, ADJACENT, ALIGN, 0)
        tiles += (load_wide(pointers, masks[i]),)
    return tiles


@triton.jit
def center_groups(tiles, masks, inverse_count, CG: tl.constexpr, GROUPS: tl.constexpr):
    """Mean of each group, `[BLOCK_G]`, and the tiles less it, zero in the padding lanes."""
    mean = times(over_groups(row_sum(tiles), CG, GROUPS), inverse_count)
    subtracted = at_channels(mean, CG, tiles[0].shape[0])[:, None]
    deviations = ()
    for i in tl.static_range(len(tiles)):
        # Selecting what is subtracted takes an instruction for adjacent lanes together.
        deviations += (subtract(tiles[i], tl.where(masks[i], subtracted, 0.0)),)
    return mean, deviations


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
    CHUNKS: tl.constexpr,
    ADJACENT: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """y, and the statistics of each group; the running statistics where a channel is a set."""
    dtype: tl.constexpr = compute_dtype(x_ptr.dtype.element_ty)
    blocks = tl.cdiv(C, GROUPS * CG)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    rows = tl.arange(0, BLOCK_C)
    block = tl.program_id(0) % blocks
    channels = block * (GROUPS * CG) + rows
    present = channels < known_to_divide(C, ADJACENT == "c", ALIGN)
    present &= rows < GROUPS * CG
    lanes = tl.arange(0, BLOCK_S)
    masks = tile_masks(present, lanes, S, CHUNKS, ADJACENT, ALIGN)

    xs = load_tiles(x_ptr, image, channels, lanes, masks, x_strides, ADJACENT, ALIGN)

    mean, deviations = center_groups(xs, masks, inverse_count, CG, GROUPS)
    if centers_twice(x_ptr.dtype.element_ty, CG * CHUNKS * BLOCK_S):
        rest, deviations = center_groups(deviations, masks, inverse_count, CG, GROUPS)
        mean += rest
    ALONE: tl.constexpr = alone_in_line(x_ptr.dtype.element_ty, BLOCK_C, BLOCK_S, ADJACENT, ALIGN)
    squares = over_groups(tl.sum(sum_of_products(deviations, deviations, ALONE), axis=1), CG, GROUPS)
    variance = times(squares, inverse_count)
    rstd = inverse_deviation(variance, eps)

    factor = at_channels(rstd, CG, BLOCK_C)
    if weight_ptr is not None:
        factor *= load_channels(weight_ptr, channels, present, dtype)
    shift = tl.zeros_like(factor)
    if bias_ptr is not None:
        shift += load_channels(bias_ptr, channels, present, dtype)
    for i in tl.static_range(CHUNKS):
        y = multiply_add(deviations[i], factor[:, None], shift[:, None])
        positions = i * BLOCK_S + lanes
        store_tile(y_ptr, y, image, channels, positions, masks[i], y_strides, ADJACENT, ALIGN)

    groups, known = tile_sets(block, channels, present, C, CG, GROUPS)
    sets = set_numbers(image, groups, 1, C // CG)
    if mean_ptr is not None:
        tl.store(mean_ptr + sets, mean, known)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + sets, rstd, known)
    if variance_ptr is not None:
        tl.store(variance_ptr + sets, variance, known)
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
    CHUNKS: tl.constexpr,
    ADJACENT: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """dx of all images, and a partial dweight and dbias of those that one program walks through."""
    dtype: tl.constexpr = compute_dtype(x_ptr.dtype.element_ty)
    program = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, BLOCK_C)
    channels = tl.program_id(0) * (GROUPS * CG) + rows
    present = channels < known_to_divide(C, ADJACENT == "c", ALIGN)
    present &= rows < GROUPS * CG
    lanes = tl.arange(0, BLOCK_S)
    masks = tile_masks(present, lanes, S, CHUNKS, ADJACENT, ALIGN)
    groups, known = tile_sets(tl.program_id(0), channels, present, C, CG, GROUPS)
    dweight = tl.zeros([BLOCK_C], dtype)
    dbias = tl.zeros([BLOCK_C], dtype)
    ALONE: tl.constexpr = alone_in_line(x_ptr.dtype.element_ty, BLOCK_C, BLOCK_S, ADJACENT, ALIGN)
    WORD: tl.constexpr = word(x_ptr.dtype.element_ty, BLOCK_S, ALIGN)

    # Held before the loop the weight is one more wait, but fewer registers beside an address an element.
    HELD: tl.constexpr = CG > 1 and GROUPS > 1 and ADJACENT == "s" and WORD == 1
    if HELD:
        weight = load_weight(weight_ptr, channels, present, dtype)

    for image in range(program, N, tl.num_programs(1)):
        dys = load_tiles(dy_ptr, image, channels, lanes, masks, dy_strides, ADJACENT, ALIGN)
        xs = load_tiles(x_ptr, image, channels, lanes, masks, x_strides, ADJACENT, ALIGN)
        sets = set_numbers(image, groups, 1, C // CG)
        mean = at_channels(load_channels(mean_ptr, sets, known, dtype), CG, BLOCK_C)
        rstd = load_channels(rstd_ptr, sets, known, dtype)
        scale = at_channels(rstd, CG, BLOCK_C)
        x_hats = ()
        for i in tl.static_range(CHUNKS):
            x_hats += (normalized(xs[i], mean[:, None], tl.where(masks[i], scale[:, None], 0.0)),)

        # A chain of FMAs takes registers that narrow accesses need for their addresses.
        if WORD > 1:
            dy_x_hat = tl.sum(sum_of_products(dys, x_hats, ALONE), axis=1)
        else:
            dy_x_hat = row_sum(products(dys, x_hats, ALONE))
        dy_sum = row_sum(dys)
        dweight += dy_x_hat
        dbias += dy_sum
        if dx_ptr is not None:
            if not HELD:
                weight = load_weight(weight_ptr, channels, present, dtype)
            c1 = times(over_groups(product(dy_x_hat, weight, ALONE=True), CG, GROUPS), inverse_count)
            c2 = times(over_groups(product(dy_sum, weight, ALONE=True), CG, GROUPS), inverse_count)
            factor = weight * scale
            c1, c2 = at_channels(c1 * rstd, CG, BLOCK_C), at_channels(c2 * rstd, CG, BLOCK_C)
            for i in tl.static_range(CHUNKS):
                dx = multiply_add(dys[i], factor[:, None], -c2[:, None])
                dx = multiply_add(x_hats[i], -c1[:, None], dx)
                positions = i * BLOCK_S + lanes
                store_tile(dx_ptr, dx, image, channels, positions, masks[i], dx_strides, ADJACENT, ALIGN)

    partial = program * C + channels
    if dweight_partial_ptr is not None:
        tl.store(dweight_partial_ptr + partial, dweight, present)
    if dbias_partial_ptr is not None:
        tl.store(dbias_partial_ptr + partial, dbias, present)
