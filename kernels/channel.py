"""The channel view `[N, C, S]`: N images of C channels at S positions. Notation: kernels/README.md.

A program takes a piece: some channels at some positions of some images. What shares statistics (the
channels of a group, the images of a batch) is not known here: pieces leave partial results, which
`fold.py` adds up. A tile is `[BLOCK_C, BLOCK_S]` whatever the memory format, which is strides.

Contiguous images that share statistics can be positions too, of one image: what is adjacent are then
columns, COLUMNS of which are a channel's.
"""

import triton
import triton.language as tl

from .arithmetic import add, multiply, multiply_add, product, subtract
from .names import kernel
from .primitives import bytes_of, compute_dtype, inverse_deviation, load_wide, normalized


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
    first = images * IMAGES
    start = part * STEPS * BLOCK_S
    last, end = first + tl.minimum(IMAGES, N - first), tl.minimum(start + STEPS * BLOCK_S, S)
    present = channels < known_to_divide(C, ADJACENT == "c", ALIGN)
    return images * parts + part, channels, present, (first, last, start, end)


@triton.jit
def partial_places(piece, columns, C, S, POSITIONS, COLUMNS):
    """Where the partial results of columns belong in `[pieces, channels]`: each column of a channel has
    pieces of its own, as if it were an image of it."""
    pieces = piece + columns % COLUMNS * tl.cdiv(S, POSITIONS)
    return pieces.to(tl.int64) * (C // COLUMNS) + columns // COLUMNS


@triton.jit
def from_the_last():
    """The number of this program, counted from the last one.

    Sweeps that read again what an earlier launch has read run through it backwards, from the last
    program to the first, and in a program from its last tile to its first: what was read last is then
    found in L2.
    """
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def count_tiles(bounds, BLOCK_S: tl.constexpr):
    """The tiles of a piece: those of all of its images."""
    image, last_image, first, end = bounds
    return (last_image - image) * tl.cdiv(end - first, BLOCK_S)


@triton.jit
def next_tile(n, at, first, end, BLOCK_S: tl.constexpr, IMAGE: tl.constexpr = 1):
    """The image and the position of the tile after that at `at` of image n: positions go from `first` to
    `end` (excluded), then to the next image, or the one before it (IMAGE is -1).

    One loop over all tiles, unlike loops over images and positions, has its loads ahead of what is
    computed across images.
    """
    at += BLOCK_S
    ends = at >= end
    return n + tl.where(ends, IMAGE, 0), tl.where(ends, first, at)


@triton.jit
def last_tile(first, end, BLOCK_S: tl.constexpr):
    """Where the last tile of the positions from `first` to `end` (excluded) starts."""
    return first + (end - 1 - first) // BLOCK_S * BLOCK_S


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
def tile_pointers(
    ptr, image, channels, positions, strides, ADJACENT: tl.constexpr, ALIGN: tl.constexpr, start
):
    """Pointers `[BLOCK_C, BLOCK_S]` to `channels` of an image, at `positions` counted from
    `start`. A loop over tiles moves `start` alone: the rest is then computed before it.

    ADJACENT names the dimension whose elements are adjacent in memory, "c" or "s"; every line along it
    starts at a multiple of ALIGN elements. This hint decides the access width, and with it the order of
    sums. It is given to the pointer that is loaded from: the compiler merges earlier additions, and
    loses what it was told of them. Both are None where the compiler has to find out.
    """
    first = ptr + tl.full((), image, tl.int64) * strides[0]
    moved = tl.full((), start, tl.int64) * strides[2]
    across_c = channels.to(tl.int64) * strides[1]
    across_s = positions.to(tl.int64) * strides[2]
    if ADJACENT == "c":
        lines = tl.multiple_of(first + moved + across_s, bytes_of(ptr.dtype.element_ty, ALIGN))
        pointers = lines[None, :] + across_c[:, None]
    elif ADJACENT == "s":
        lines = tl.multiple_of(first + moved + across_c, bytes_of(ptr.dtype.element_ty, ALIGN))
        pointers = lines[:, None] + across_s[None, :]
    else:
        pointers = (first + moved + across_c)[:, None] + across_s[None, :]
    return pointers


@triton.jit
def load_tile(
    ptr, image, channels, positions, mask, strides, ADJACENT: tl.constexpr, ALIGN: tl.constexpr, start=0
):
    """A tile `[BLOCK_C, BLOCK_S]` in the compute dtype; zero in the padding lanes."""
    pointers = tile_pointers(ptr, image, channels, positions, strides, ADJACENT, ALIGN, start)
    return load_wide(pointers, mask)


@triton.jit
def store_tile(
    ptr,
    tile,
    image,
    channels,
    positions,
    mask,
    strides,
    ADJACENT: tl.constexpr,
    ALIGN: tl.constexpr,
    start=0,
):
    """Stores a tile `[BLOCK_C, BLOCK_S]`, rounded to the dtype of `ptr`."""
    pointers = tile_pointers(ptr, image, channels, positions, strides, ADJACENT, ALIGN, start)
    tl.store(pointers, tile, mask)


@triton.jit
def load_channels(ptr, index, mask, dtype: tl.constexpr):
    """Parameters of channels, or statistics of channels or groups, widened; zero where there is none."""
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
    """The set of each channel of an image, `[BLOCK_C]`. SETS is 0 where images share theirs."""
    return tl.full((), image, tl.int64) * SETS + channels // CG


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
    STAGES: tl.constexpr,
    COLUMNS=1,
    program=None,
):
    """Mean and sum of squared deviations of each channel of a piece.

    Every lane of a tile has moments of its own (Welford, 1962), of whole tiles first, then of the last
    one, which fewer lanes have; they are merged at the end (Chan, Golub and LeVeque, 1983). All of it is
    relative to the channel's first element: a large common mean costs no digits, and the deviations of
    equal values are exactly zero.
    """
    dtype: tl.constexpr = compute_dtype(x_ptr.dtype.element_ty)
    if program is None:
        program = tl.program_id(0)
    piece, columns, present, bounds = locate(
        program, N, C, S, IMAGES, STEPS, BLOCK_C, BLOCK_S, ADJACENT, ALIGN
    )
    image, last_image, first, end = bounds
    origin = x_ptr + image.to(tl.int64) * x_strides[0] + first.to(tl.int64) * x_strides[2]
    shift = load_channels(origin, columns.to(tl.int64) * x_strides[1], present, dtype)
    lanes = tl.arange(0, BLOCK_S)
    WIDE: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth >= 32
    whole = first + (end - first) // BLOCK_S * BLOCK_S
    lane_mean = tl.zeros([BLOCK_C, BLOCK_S], dtype)
    lane_squares = tl.zeros([BLOCK_C, BLOCK_S], dtype)
    steps = tl.full((), 0.0, dtype)
    whole_steps = steps

    for part in tl.static_range(2):
        if part == 0:
            start, stop = first, whole
        else:
            start, stop = whole, end
            whole_steps = steps
        mask = tile_mask(present, start + lanes, end, ADJACENT, ALIGN)
        n, at = image, start
        for _ in tl.range(0, count_tiles((image, last_image, start, stop), BLOCK_S), num_stages=STAGES):
            x = load_tile(x_ptr, n, columns, lanes, mask, x_strides, ADJACENT, ALIGN, at)
            if WIDE:
                x = subtract(x, shift[:, None])
            if part == 1:
                x = tl.where(mask, x, lane_mean)  # where a tile has no element, nothing changes
            steps += 1.0
            delta = subtract(x, lane_mean)
            lane_mean = multiply_add(delta, 1.0 / steps, lane_mean)
            lane_squares = multiply_add(delta, subtract(x, lane_mean), lane_squares)
            n, at = next_tile(n, at, start, stop, BLOCK_S)

    counts = tl.where(whole + lanes < end, steps, whole_steps)[None, :]
    if not WIDE:
        lane_mean = subtract(lane_mean, shift[:, None])
    share = 1.0 / ((last_image - image).to(dtype) * (end - first).to(dtype))
    mean = tl.sum(product(lane_mean, counts * share, ALONE=True), axis=1)
    deviation = subtract(lane_mean, mean[:, None])
    squares = tl.sum(multiply_add(multiply(deviation, counts), deviation, lane_squares), axis=1)

    partial = partial_places(piece, columns, C, S, STEPS * BLOCK_S, COLUMNS)
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
    STAGES: tl.constexpr,
    COLUMNS=1,
    program=None,
):
    """y of a piece. What float32 could not hold of the mean goes to the constant term."""
    dtype: tl.constexpr = compute_dtype(x_ptr.dtype.element_ty)
    if program is None:
        program = from_the_last()
    _, columns, present, bounds = locate(
        program, N, C, S, IMAGES, STEPS, BLOCK_C, BLOCK_S, ADJACENT, ALIGN
    )
    image, last_image, first, end = bounds
    channels = columns // COLUMNS
    sets = set_numbers(image, channels, CG, SETS)
    mean, rstd = load_statistics(mean_ptr, rstd_ptr, variance_ptr, eps, sets, present, dtype)
    factor = rstd * load_weight(weight_ptr, channels, present, dtype)
    constant = tl.zeros([BLOCK_C], dtype)
    if rest_ptr is not None:
        constant -= load_channels(rest_ptr, sets, present, dtype) * factor
    if bias_ptr is not None:
        constant += load_channels(bias_ptr, channels, present, dtype)

    lanes = tl.arange(0, BLOCK_S)
    last = last_tile(first, end, BLOCK_S)
    n, back = last_image - 1, 0
    for _ in tl.range(0, count_tiles(bounds, BLOCK_S), num_stages=STAGES):
        start = last - back
        mask = tile_mask(present, start + lanes, end, ADJACENT, ALIGN)
        x = load_tile(x_ptr, n, columns, lanes, mask, x_strides, ADJACENT, ALIGN, start)
        y = multiply_add(subtract(x, mean[:, None]), factor[:, None], constant[:, None])
        store_tile(y_ptr, y, n, columns, lanes, mask, y_strides, ADJACENT, ALIGN, start)
        n, back = next_tile(n, back, 0, end - first, BLOCK_S, IMAGE=-1)


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
    STAGES: tl.constexpr,
    COLUMNS=1,
    program=None,
):
    """sum(dy * x_hat) and sum(dy) of each channel of a piece: c1, c2, dweight and dbias are made of
    them. And where statistics are constants, dx = weight * dy * rstd."""
    dtype: tl.constexpr = compute_dtype(x_ptr.dtype.element_ty)
    if program is None:
        program = tl.program_id(0)
    piece, columns, present, bounds = locate(
        program, N, C, S, IMAGES, STEPS, BLOCK_C, BLOCK_S, ADJACENT, ALIGN
    )
    image, _, first, end = bounds
    channels = columns // COLUMNS
    sets = set_numbers(image, channels, CG, SETS)
    mean, rstd = load_statistics(mean_ptr, rstd_ptr, variance_ptr, eps, sets, present, dtype)

    factor = rstd * load_weight(weight_ptr, channels, present, dtype)
    dweight = tl.zeros([BLOCK_C, BLOCK_S], dtype)
    dbias = tl.zeros([BLOCK_C, BLOCK_S], dtype)
    lanes = tl.arange(0, BLOCK_S)

    n, start = image, first
    for _ in tl.range(0, count_tiles(bounds, BLOCK_S), num_stages=STAGES):
        mask = tile_mask(present, start + lanes, end, ADJACENT, ALIGN)
        dy = load_tile(dy_ptr, n, columns, lanes, mask, dy_strides, ADJACENT, ALIGN, start)
        x = load_tile(x_ptr, n, columns, lanes, mask, x_strides, ADJACENT, ALIGN, start)
        x_hat = normalized(x, mean[:, None], tl.where(mask, rstd[:, None], 0.0))
        dweight = multiply_add(dy, x_hat, dweight)
        dbias = add(dbias, dy)
        if dx_ptr is not None:
            dx = multiply(dy, factor[:, None])
            store_tile(dx_ptr, dx, n, columns, lanes, mask, dx_strides, ADJACENT, ALIGN, start)
        n, start = next_tile(n, start, first, end, BLOCK_S)

    partial = partial_places(piece, columns, C, S, STEPS * BLOCK_S, COLUMNS)
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
    STAGES: tl.constexpr,
    COLUMNS=1,
    program=None,
):
    """dx of a piece, with rstd multiplied into what a channel's elements share."""
    dtype: tl.constexpr = compute_dtype(x_ptr.dtype.element_ty)
    if program is None:
        program = from_the_last()
    _, columns, present, bounds = locate(
        program, N, C, S, IMAGES, STEPS, BLOCK_C, BLOCK_S, ADJACENT, ALIGN
    )
    image, last_image, first, end = bounds
    channels = columns // COLUMNS
    sets = set_numbers(image, channels, CG, SETS)
    mean, rstd = load_statistics(mean_ptr, rstd_ptr, None, None, sets, present, dtype)
    factor = rstd * load_weight(weight_ptr, channels, present, dtype)
    slope = rstd * load_channels(c1_ptr, sets, present, dtype)
    constant = rstd * load_channels(c2_ptr, sets, present, dtype)

    lanes = tl.arange(0, BLOCK_S)
    last = last_tile(first, end, BLOCK_S)
    n, back = last_image - 1, 0
    for _ in tl.range(0, count_tiles(bounds, BLOCK_S), num_stages=STAGES):
        start = last - back
        mask = tile_mask(present, start + lanes, end, ADJACENT, ALIGN)
        dy = load_tile(dy_ptr, n, columns, lanes, mask, dy_strides, ADJACENT, ALIGN, start)
        x = load_tile(x_ptr, n, columns, lanes, mask, x_strides, ADJACENT, ALIGN, start)
        x_hat = multiply(subtract(x, mean[:, None]), rstd[:, None])
        dx = multiply_add(dy, factor[:, None], -constant[:, None])
        dx = multiply_add(x_hat, -slope[:, None], dx)
        store_tile(dx_ptr, dx, n, columns, lanes, mask, dx_strides, ADJACENT, ALIGN, start)
        n, back = next_tile(n, back, 0, end - first, BLOCK_S, IMAGE=-1)
