"""The channel view `[N, C, S]`: N images of C channels at S positions. Notation: kernels/README.md.

A program takes a piece: some channels at some positions of some images. What shares statistics (the
channels of a group, the images of a batch) is not known here: pieces leave partial results, which
`fold.py` adds up. A tile is `[BLOCK_C, BLOCK_S]` whatever the memory format, which is strides.
"""

import triton
import triton.language as tl

from .names import kernel
from .primitives import bytes_of, compute_dtype, input_gradient, inverse_deviation


@triton.jit
def locate(
    program,
    N,
    C,
    S,
    IMAGES,
    STEPS,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ADJACENT: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The piece of a program: its number, its channels `[BLOCK_C]`, which of them are present, and its
    bounds: first and last image, first and last position, the last excluded.

    Pieces that are neighbours in memory run together.
    """
    blocks = tl.cdiv(C, BLOCK_C)
    parts = tl.cdiv(S, STEPS * BLOCK_S)
    if ADJACENT == "c":
        block, part = program % blocks, program // blocks % parts
    else:
        block, part = program // parts % blocks, program % parts
    images = program // (blocks * parts)
    channels = block * BLOCK_C + tl.arange(0, BLOCK_C)
    first = images.to(tl.int64) * IMAGES
    start = part * STEPS * BLOCK_S
    bounds = (first, tl.minimum(first + IMAGES, N), start, tl.minimum(start + STEPS * BLOCK_S, S))
    present = channels < known_to_divide(C, ADJACENT == "c", ALIGN)
    return images * parts + part, channels, present, bounds


@triton.jit
def known_to_divide(size, is_adjacent: tl.constexpr, ALIGN: tl.constexpr):
    """The size of a dimension. Of the adjacent one, which ALIGN divides, the detour tells the compiler
    so: a wide access is then within the mask or outside of it."""
    if is_adjacent:
        size = size // ALIGN * ALIGN
    return size


@triton.jit
def tile_mask(present, positions, end, ADJACENT: tl.constexpr, ALIGN: tl.constexpr):
    """Which elements of a tile exist, `[BLOCK_C, BLOCK_S]`: those of channels that are `present`, before
    the end of the positions."""
    end = known_to_divide(end, ADJACENT == "s", ALIGN)
    return present[:, None] & (positions < end)[None, :]


@triton.jit
def tile_pointers(ptr, image, channels, positions, strides, ADJACENT: tl.constexpr, ALIGN: tl.constexpr):
    """Pointers `[BLOCK_C, BLOCK_S]` to `channels` and `positions` of an image (int64).

    ADJACENT names the dimension whose elements are adjacent in memory, "c" or "s"; every line along it
    starts at a multiple of ALIGN elements. This hint decides the access width, and with it the order of
    sums. Both are None where the compiler has to find out.
    """
    start = ptr + image * strides[0]
    across_c = channels.to(tl.int64) * strides[1]
    across_s = positions.to(tl.int64) * strides[2]
    if ADJACENT == "c":
        lines = tl.multiple_of(start + across_s, bytes_of(ptr.dtype.element_ty, ALIGN))
        pointers = lines[None, :] + across_c[:, None]
    elif ADJACENT == "s":
        lines = tl.multiple_of(start + across_c, bytes_of(ptr.dtype.element_ty, ALIGN))
        pointers = lines[:, None] + across_s[None, :]
    else:
        pointers = (start + across_c)[:, None] + across_s[None, :]
    return pointers


@triton.jit
def load_tile(
    ptr, image, channels, positions, mask, strides, ADJACENT: tl.constexpr, ALIGN: tl.constexpr
):
    """A tile `[BLOCK_C, BLOCK_S]` in the compute dtype; zero in the padding lanes."""
    x = tl.load(
        tile_pointers(ptr, image, channels, positions, strides, ADJACENT, ALIGN), mask, other=0.0
    )
    return x.to(compute_dtype(ptr.dtype.element_ty))


@triton.jit
def store_tile(
    ptr, tile, image, channels, positions, mask, strides, ADJACENT: tl.constexpr, ALIGN: tl.constexpr
):
    """Stores a tile `[BLOCK_C, BLOCK_S]`, rounded to the dtype of `ptr`."""
    tl.store(tile_pointers(ptr, image, channels, positions, strides, ADJACENT, ALIGN), tile, mask)


@triton.jit
def load_channels(ptr, index, mask, dtype: tl.constexpr):
    """A vector `[BLOCK_C]` of parameters or statistics, widened; zero in the padding lanes."""
    return tl.load(ptr + index, mask, other=0.0).to(dtype)


@triton.jit
def load_weight(weight_ptr, channels, present, dtype: tl.constexpr):
    """The weight `[BLOCK_C]`; ones where there is none."""
    if weight_ptr is not None:
        weight = load_channels(weight_ptr, channels, present, dtype)
    else:
        weight = tl.full(channels.shape, 1.0, dtype)
    return weight


@triton.jit
def set_numbers(image, channels, CG, SETS):
    """Which set each channel of an image (int64) belongs to, `[BLOCK_C]`. SETS is 0 where images share
    theirs."""
    return image * SETS + channels // CG


@triton.jit
def load_statistics(mean_ptr, rstd_ptr, variance_ptr, eps, sets, present, dtype: tl.constexpr):
    """mean (zeros if absent) and rstd `[BLOCK_C]` of the sets that channels belong to; rstd as it was
    saved, or from a variance that is given."""
    if mean_ptr is not None:
        mean = load_channels(mean_ptr, sets, present, dtype)
    else:
        mean = tl.zeros(sets.shape, dtype)
    if variance_ptr is not None:
        rstd = inverse_deviation(load_channels(variance_ptr, sets, present, dtype), eps)
    else:
        rstd = load_channels(rstd_ptr, sets, present, dtype)
    return mean, rstd


@kernel(do_not_specialize=["N", "C", "S", "IMAGES", "STEPS"])
def channel_moments(
    x_ptr,  # [N, C, S]
    mean_partial_ptr,  # [pieces, C], float64
    squares_partial_ptr,  # [pieces, C]
    x_strides,
    N,
    C,
    S,
    IMAGES,
    STEPS,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ADJACENT: tl.constexpr,
    ALIGN: tl.constexpr,
    program=None,
):
    """Mean and sum of squared deviations of each channel of a piece.

    Every tile is reduced in two passes over registers and merged (Chan, Golub and LeVeque, 1983), all
    of it relative to the channel's first element: a large common mean costs no digits, and the
    deviations of equal values are exactly zero.
    """
    dtype: tl.constexpr = compute_dtype(x_ptr.dtype.element_ty)
    if program is None:
        program = tl.program_id(0)
    piece, channels, present, bounds = locate(
        program, N, C, S, IMAGES, STEPS, BLOCK_C, BLOCK_S, ADJACENT, ALIGN
    )
    image, last_image, first, end = bounds
    origin = x_ptr + image * x_strides[0] + first.to(tl.int64) * x_strides[2]
    shift = load_channels(origin, channels.to(tl.int64) * x_strides[1], present, dtype)
    count = tl.full((), 0.0, dtype)
    mean = tl.zeros([BLOCK_C], dtype)
    squares = tl.zeros([BLOCK_C], dtype)

    for n in range(image, last_image):
        for start in range(first, end, BLOCK_S):
            positions = start + tl.arange(0, BLOCK_S)
            mask = tile_mask(present, positions, end, ADJACENT, ALIGN)
            x = load_tile(x_ptr, n, channels, positions, mask, x_strides, ADJACENT, ALIGN)
            x = tl.where(mask, x - shift[:, None], 0.0)

            tile_count = tl.minimum(end - start, BLOCK_S).to(dtype)
            tile_mean = tl.sum(x, axis=1) * (1.0 / tile_count)
            deviation = tl.where(mask, x - tile_mean[:, None], 0.0)
            tile_squares = tl.sum(deviation * deviation, axis=1)

            share = tile_count / (count + tile_count)
            delta = tile_mean - mean
            mean += delta * share
            squares += tile_squares + delta * (count * share) * delta  # no inf * 0 in the first tile
            count += tile_count

    partial = piece.to(tl.int64) * C + channels
    tl.store(mean_partial_ptr + partial, shift.to(tl.float64) + mean.to(tl.float64), present)
    tl.store(squares_partial_ptr + partial, squares, present)


@kernel(do_not_specialize=["N", "C", "S", "IMAGES", "STEPS", "SETS"])
def channel_normalize(
    x_ptr,  # [N, C, S]
    y_ptr,  # [N, C, S]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    mean_ptr,  # [sets] or None
    rest_ptr,  # [sets] or None
    rstd_ptr,  # [sets], or None: variance_ptr is given
    variance_ptr,  # [sets] or None
    x_strides,
    y_strides,
    eps: "fp64",
    N,
    C,
    S,
    CG,
    SETS,
    IMAGES,
    STEPS,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ADJACENT: tl.constexpr,
    ALIGN: tl.constexpr,
    program=None,
):
    """y of a piece. What float32 could not hold of the mean goes to the constant term."""
    dtype: tl.constexpr = compute_dtype(x_ptr.dtype.element_ty)
    if program is None:
        program = tl.program_id(0)
    _, channels, present, bounds = locate(
        program, N, C, S, IMAGES, STEPS, BLOCK_C, BLOCK_S, ADJACENT, ALIGN
    )
    image, last_image, first, end = bounds
    sets = set_numbers(image, channels, CG, SETS)
    mean, rstd = load_statistics(mean_ptr, rstd_ptr, variance_ptr, eps, sets, present, dtype)
    factor = rstd * load_weight(weight_ptr, channels, present, dtype)
    constant = tl.zeros([BLOCK_C], dtype)
    if rest_ptr is not None:
        constant -= load_channels(rest_ptr, sets, present, dtype) * factor
    if bias_ptr is not None:
        constant += load_channels(bias_ptr, channels, present, dtype)

    for n in range(image, last_image):
        for start in range(first, end, BLOCK_S):
            positions = start + tl.arange(0, BLOCK_S)
            mask = tile_mask(present, positions, end, ADJACENT, ALIGN)
            x = load_tile(x_ptr, n, channels, positions, mask, x_strides, ADJACENT, ALIGN)
            y = (x - mean[:, None]) * factor[:, None] + constant[:, None]
            store_tile(y_ptr, y, n, channels, positions, mask, y_strides, ADJACENT, ALIGN)


@kernel(do_not_specialize=["N", "C", "S", "IMAGES", "STEPS", "SETS"])
def channel_gradient_sums(
    dy_ptr,  # [N, C, S]
    x_ptr,  # [N, C, S]
    dx_ptr,  # [N, C, S], or None: the statistics depend on x
    weight_ptr,  # [C] or None
    mean_ptr,  # [sets]
    rstd_ptr,  # [sets], or None: variance_ptr is given
    variance_ptr,  # [sets] or None
    dweight_partial_ptr,  # [pieces, C]
    dbias_partial_ptr,  # [pieces, C]
    dy_strides,
    x_strides,
    dx_strides,
    eps: "fp64",
    N,
    C,
    S,
    CG,
    SETS,
    IMAGES,
    STEPS,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ADJACENT: tl.constexpr,
    ALIGN: tl.constexpr,
    program=None,
):
    """sum(dy * x_hat) and sum(dy) of each channel of a piece: c1, c2, dweight and dbias are made of
    them. And where statistics are constants, dx = weight * dy * rstd."""
    dtype: tl.constexpr = compute_dtype(x_ptr.dtype.element_ty)
    if program is None:
        program = tl.program_id(0)
    piece, channels, present, bounds = locate(
        program, N, C, S, IMAGES, STEPS, BLOCK_C, BLOCK_S, ADJACENT, ALIGN
    )
    image, last_image, first, end = bounds
    sets = set_numbers(image, channels, CG, SETS)
    mean, rstd = load_statistics(mean_ptr, rstd_ptr, variance_ptr, eps, sets, present, dtype)

    factor = rstd * load_weight(weight_ptr, channels, present, dtype)
    dweight = tl.zeros([BLOCK_C, BLOCK_S], dtype)
    dbias = tl.zeros([BLOCK_C, BLOCK_S], dtype)

    for n in range(image, last_image):
        for start in range(first, end, BLOCK_S):
            positions = start + tl.arange(0, BLOCK_S)
            mask = tile_mask(present, positions, end, ADJACENT, ALIGN)
            dy = load_tile(dy_ptr, n, channels, positions, mask, dy_strides, ADJACENT, ALIGN)
            x = load_tile(x_ptr, n, channels, positions, mask, x_strides, ADJACENT, ALIGN)
            dweight += tl.where(mask, dy * ((x - mean[:, None]) * rstd[:, None]), 0.0)
            dbias += dy
            if dx_ptr is not None:
                dx = dy * factor[:, None]
                store_tile(dx_ptr, dx, n, channels, positions, mask, dx_strides, ADJACENT, ALIGN)

    partial = piece.to(tl.int64) * C + channels
    tl.store(dweight_partial_ptr + partial, tl.sum(dweight, axis=1), present)
    tl.store(dbias_partial_ptr + partial, tl.sum(dbias, axis=1), present)


@kernel(do_not_specialize=["N", "C", "S", "IMAGES", "STEPS", "SETS"])
def channel_input_gradient(
    dy_ptr,  # [N, C, S]
    x_ptr,  # [N, C, S]
    dx_ptr,  # [N, C, S]
    weight_ptr,  # [C] or None
    mean_ptr,  # [sets]
    rstd_ptr,  # [sets]
    c1_ptr,  # [sets]
    c2_ptr,  # [sets]
    dy_strides,
    x_strides,
    dx_strides,
    N,
    C,
    S,
    CG,
    SETS,
    IMAGES,
    STEPS,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ADJACENT: tl.constexpr,
    ALIGN: tl.constexpr,
    program=None,
):
    dtype: tl.constexpr = compute_dtype(x_ptr.dtype.element_ty)
    if program is None:
        program = tl.program_id(0)
    _, channels, present, bounds = locate(
        program, N, C, S, IMAGES, STEPS, BLOCK_C, BLOCK_S, ADJACENT, ALIGN
    )
    image, last_image, first, end = bounds
    sets = set_numbers(image, channels, CG, SETS)
    mean, rstd = load_statistics(mean_ptr, rstd_ptr, None, None, sets, present, dtype)
    c1 = load_channels(c1_ptr, sets, present, dtype)
    c2 = load_channels(c2_ptr, sets, present, dtype)

    for n in range(image, last_image):
        for start in range(first, end, BLOCK_S):
            positions = start + tl.arange(0, BLOCK_S)
            mask = tile_mask(present, positions, end, ADJACENT, ALIGN)
            dy = load_tile(dy_ptr, n, channels, positions, mask, dy_strides, ADJACENT, ALIGN)
            x = load_tile(x_ptr, n, channels, positions, mask, x_strides, ADJACENT, ALIGN)
            x_hat = (x - mean[:, None]) * rstd[:, None]
            wdy = dy
            if weight_ptr is not None:
                wdy *= load_channels(weight_ptr, channels, present, dtype)[:, None]
            dx = input_gradient(wdy, x_hat, c1, c2, rstd)
            store_tile(dx_ptr, dx, n, channels, positions, mask, dx_strides, ADJACENT, ALIGN)
