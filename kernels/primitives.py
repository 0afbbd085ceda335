"""Device functions that kernels are made of; tiles are those of rows. Notation: kernels/README.md."""

import triton
import triton.language as tl

from .arithmetic import add, come_in_pairs, multiply, multiply_add, product, runs_ptx, subtract


@triton.constexpr_function
def compute_dtype(dtype):
    """The dtype that a kernel on inputs of `dtype` computes in: float32, or float64 for float64."""
    return tl.float64 if dtype == tl.float64 else tl.float32


@triton.constexpr_function
def bytes_of(dtype, count):
    """The bytes of `count` elements of `dtype`."""
    return dtype.primitive_bitwidth // 8 * count


@triton.constexpr_function
def word(dtype, count, ALIGN):
    """The adjacent elements, of a line of `count`, that a thread accesses at once: 16 bytes at most."""
    return min(128 // dtype.primitive_bitwidth, count, ALIGN or 1)


@triton.constexpr_function
def between_warps(count, WORD):
    """Whether warps exchange the sums of a line of `count` elements, of which a thread accesses WORD at
    once: not if a warp has all of it. Of narrow words it is not known."""
    return WORD > 1 and count > 32 * WORD


@triton.constexpr_function
def fills_warp(dtype, count, WORD):
    """Whether a line of `count` elements, of which a thread accesses WORD at once, is 16 bytes for each
    thread of a warp."""
    return dtype.primitive_bitwidth * WORD == 128 and count == 32 * WORD


@triton.constexpr_function
def no_narrower(ptr, dtype):
    """Whether what is at ptr, which may be None, has elements as wide as those of `dtype`, or wider."""
    return ptr is None or ptr.dtype.element_ty.primitive_bitwidth >= dtype.primitive_bitwidth


@triton.constexpr_function
def alone(count, WORD, most=256):
    """Whether a thread may have a single element of a line of `count`, of which it accesses WORD at
    once: launches spread a line over `most` threads."""
    return WORD == 1 and count <= most


@triton.constexpr_function
def centers_twice(dtype, count):
    """Whether the mean of `count` elements of `dtype` is taken again of what they deviate from it: its
    own rounding is all that is left of the error at a large mean. Elements of 16 bits are coarser than
    that, as long as the 24 bits of a float32 sum hold that of equal ones."""
    digits = 11 if dtype == tl.float16 else 8
    return dtype.primitive_bitwidth >= 32 or count > 2 ** (24 - digits)


@triton.constexpr_function
def divides(a, b):
    return b % a == 0


@triton.jit
def tile_mask(rows, cols, M, R2, N: tl.constexpr):
    """Which elements of a tile exist, `[ROWS, BLOCK_N]`.

    The detour over R2 keeps what is known of M's divisibility: rows that are adjacent in memory
    (channels of NCHW) are then stored in wide accesses. It folds away where R2 is 1.
    """
    return (rows < M // R2 * R2)[:, None] & (cols < N)[None, :]


@triton.jit
def aligned(ptrs, offsets, ALIGN: tl.constexpr):
    """ptrs + offsets, where rows start. ALIGN, in elements, is what the host knows of every row's
    alignment; None where neighbours in memory are rows. This hint, and not the specialization of single
    arguments, decides the access width, and with it the order of sums: a slice of a batch takes the same
    code as the batch. Given to what another function returned, where nothing is added, it is lost.
    """
    ptrs += offsets
    if ALIGN is not None:
        ptrs = tl.multiple_of(ptrs, bytes_of(ptrs.dtype.scalar.element_ty, ALIGN))
    return ptrs


@triton.jit
def row_pointers(ptr, rows, strides, sizes, ALIGN: tl.constexpr):
    """Where `rows` (int64) start, which count through the sizes [.., R1, R2] of `sizes` = (M, R1, R2)
    as the first three `strides` have them in memory.

    The index arithmetic runs in M's own width, so that divisions are 32-bit unless M needs more.
    """
    M, R1, R2 = sizes
    index = rows.to(M.dtype)
    offsets = (index // R2 // R1).to(tl.int64) * strides[0]
    offsets += (index // R2 % R1).to(tl.int64) * strides[1]
    offsets += (index % R2).to(tl.int64) * strides[2]
    return aligned(ptr, offsets, ALIGN)


@triton.constexpr_function
def evenly_apart(R1, R2):
    """Whether rows are known to have one step between them: a size that is 1 arrives as a constant,
    others, and all of the interpreter's, as tensors."""
    return type(R1) is int and type(R2) is int and R1 == R2 == 1


@triton.jit
def across(row_ptrs, cols, strides):
    """Pointers `[ROWS, BLOCK_N]` to the elements `cols` of rows that start at `row_ptrs`."""
    return row_ptrs[:, None] + (cols.to(tl.int64) * strides[3])[None, :]


@triton.jit
def tile_pointers(ptr, rows, cols, strides, sizes, ALIGN: tl.constexpr):
    """Pointers `[ROWS, BLOCK_N]` to the elements `cols` of `rows`."""
    return across(row_pointers(ptr, rows, strides, sizes, ALIGN), cols, strides)


@triton.jit
def widened(x):
    """x in the compute dtype."""
    if x.dtype == tl.bfloat16 and come_in_pairs(x.shape) and runs_ptx():
        # An instruction an element, where the conversion takes two for every other one.
        apart: tl.constexpr = "shl.b32 $0, $2, 16;\nand.b32 $1, $2, 0xffff0000;"
        wide = tl.inline_asm_elementwise(apart, "=&r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2)
    elif x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        wide = bits.to(tl.float32, bitcast=True)
    else:
        wide = x.to(compute_dtype(x.dtype))
    return wide


@triton.jit
def load_wide(pointers, mask):
    """What is at pointers, in the compute dtype; zero where the mask is not set."""
    return widened(tl.load(pointers, mask, other=0.0))


@triton.jit
def load_tile(ptr, rows, cols, mask, strides, sizes, ALIGN: tl.constexpr):
    """A tile `[ROWS, BLOCK_N]` in the compute dtype; zero in the padding lanes."""
    return load_wide(tile_pointers(ptr, rows, cols, strides, sizes, ALIGN), mask)


@triton.jit
def load_statistics(mean_ptr, spread_ptr, rows, M):
    """What is saved of rows: `(spread,)` or, where they have a mean, `(spread, mean)`, of `[ROWS]`."""
    saved = (load_wide(spread_ptr + rows, rows < M),)
    if mean_ptr is not None:
        saved += (load_wide(mean_ptr + rows, rows < M),)
    return saved


@triton.jit
def store_tile(ptr, tile, rows, cols, mask, strides, sizes, ALIGN: tl.constexpr):
    """Stores a tile `[ROWS, BLOCK_N]`, rounded to the dtype of `ptr`."""
    tl.store(tile_pointers(ptr, rows, cols, strides, sizes, ALIGN), tile, mask)


@triton.jit
def divide(total, N: tl.constexpr):
    """total / N, in float32 correctly rounded but for ties: the mean of equal values is that value.

    A division would be inexact by 2 ulp, or exact by a call that spills.
    """
    return (total.to(tl.float64) * tl.full((), 1.0 / N, tl.float64)).to(total.dtype)


@triton.jit
def times(total, factor):
    """total * factor, with a float64 factor: a mean, where the factor is 1 / count."""
    return (total.to(tl.float64) * factor).to(total.dtype)


@triton.jit
def inverse_deviation(variance, eps):
    """rstd = 1 / sqrt(variance + eps)."""
    return tl.rsqrt(variance + tl.full((), eps, variance.dtype))


@triton.jit
def square_root(x):
    """sqrt(x), correctly rounded."""
    if x.dtype == tl.float64:
        root = tl.sqrt(x)
    else:
        root = tl.sqrt_rn(x)
    return root


@triton.jit
def plus(tiles, others):
    """The sums, tile by tile, of tiles side by side: a tuple of `[ROWS, BLOCK_N]`."""
    sums = ()
    for i in tl.static_range(len(tiles)):
        sums += (add(tiles[i], others[i]),)
    return sums


@triton.jit
def plus_products(tiles, factors, others):
    """The sums, tile by tile, of tiles side by side and of the products of two more."""
    sums = ()
    for i in tl.static_range(len(tiles)):
        sums += (multiply_add(factors[i], others[i], tiles[i]),)
    return sums


@triton.jit
def products(tiles, others, ALONE: tl.constexpr):
    """The products, tile by tile, of which row sums are wanted as well. Of several tiles all are
    rounded: left to the compiler, FMAs add up more of them in one kernel of a shape than in another."""
    found = ()
    for i in tl.static_range(len(tiles)):
        found += (product(tiles[i], others[i], ALONE or len(tiles) > 1),)
    return found


@triton.jit
def sum_of_products(tiles, others, ALONE: tl.constexpr):
    """The sum `[ROWS, BLOCK_N]` of the products of tiles side by side. Of several the first is rounded,
    and FMAs add the others, for the same reason."""
    total = product(tiles[0], others[0], ALONE or len(tiles) > 1)
    for i in tl.static_range(1, len(tiles)):
        total = multiply_add(tiles[i], others[i], total)
    return total


@triton.jit
def added(tiles):
    """The sum `[ROWS, BLOCK_N]` of tiles side by side."""
    total = tiles[0]
    for i in tl.static_range(1, len(tiles)):
        total = add(total, tiles[i])
    return total


@triton.jit
def row_sum(tiles):
    """The sums `[ROWS]` of the rows of tiles side by side: one reduction over lanes for all of them."""
    return tl.sum(added(tiles), axis=1)


@triton.jit
def word_sums(tile, WORD: tl.constexpr):
    """The sums `[ROWS, BLOCK_N / WORD]` of WORD adjacent columns of a tile."""
    return tl.sum(tl.reshape(tile, [tile.shape[0], tile.shape[1] // WORD, WORD]), axis=2)


@triton.jit
def row_sums(tile, other, WORD: tl.constexpr):
    """The row sums `[ROWS]` of two tiles, which warps exchange together: half of the barriers.

    WORD columns are a thread's, and added up before they are joined: pairs of all of them take a quarter
    more registers, as narrow words do.
    """
    return tl.split(tl.sum(tl.join(word_sums(tile, WORD), word_sums(other, WORD)), axis=1))


@triton.jit
def without_padding(x, mask, N: tl.constexpr):
    """x `[ROWS, BLOCK_N]`, or `[ROWS, 1]` for all columns, with zeros in the padding lanes of its rows.
    Where the tile has none, nothing is selected; rows past the last hold what their zeros led to, and
    are not stored."""
    if not divides(mask.shape[1], N):
        x = tl.where(mask, x, 0.0)
    return x


@triton.jit
def center(tiles, masks, N: tl.constexpr):
    """Mean `[ROWS]` of the rows of tiles side by side, which are zero in their padding lanes, and the
    tiles less it, zero there again."""
    mean = divide(row_sum(tiles), N)
    deviations = ()
    for i in tl.static_range(len(tiles)):
        # Selecting what is subtracted takes an instruction for adjacent lanes together.
        deviations += (subtract(tiles[i], without_padding(mean[:, None], masks[i], N)),)
    return mean, deviations


@triton.jit
def row_spread(sum_of_squares, eps, N: tl.constexpr, NORM: tl.constexpr):
    """What is saved of a row's spread: its norm for "l2", else 1 / sqrt(mean of squares + eps)."""
    if NORM == "l2":
        # The norm, not its inverse: whether eps clamped it is asked again in the backward pass.
        result = square_root(sum_of_squares)
    else:
        result = inverse_deviation(divide(sum_of_squares, N), eps)
    return result


@triton.jit
def scale(spread, eps, NORM: tl.constexpr):
    """The factor of x_hat = (x - mean) * rstd, from its spread."""
    if NORM == "l2":
        least = tl.full((), eps, spread.dtype)
        result = 1.0 / tl.where(spread < least, least, spread)  # a NaN norm stays NaN
    else:
        result = spread
    return result


@triton.jit
def load_parameter(
    ptr, cols, dtype: tl.constexpr, N: tl.constexpr, OFFSET: tl.constexpr = 0.0, ROWS: tl.constexpr = 1
):
    """A weight or bias `[ROWS, BLOCK_N]`, widened, plus OFFSET. With one row for all of a tile's the
    compiler may carry it through shared memory to the threads that need it; with as many as the tile
    has each thread loads it for each of its rows."""
    if ROWS == 1:
        parameter = load_wide(ptr + cols, cols < N).to(dtype)[None, :]
    else:
        pointers = tl.broadcast_to((ptr + cols)[None, :], [ROWS, cols.shape[0]])
        parameter = load_wide(pointers, (cols < N)[None, :]).to(dtype)
    if OFFSET != 0.0:
        parameter += tl.full((), OFFSET, dtype)
    return parameter


@triton.jit
def affine(
    x_hat,
    weight_ptr,
    bias_ptr,
    cols,
    N: tl.constexpr,
    OFFSET: tl.constexpr = 0.0,
    ROUND: tl.constexpr = None,
    ROWS: tl.constexpr = 1,
):
    """x_hat * (OFFSET + weight) + bias; either may be None, and is loaded as ROWS rows. x_hat is first
    rounded to the dtype ROUND, if there is one."""
    y = x_hat
    if ROUND is not None:
        y = y.to(ROUND).to(x_hat.dtype)
    if weight_ptr is not None:
        weight = load_parameter(weight_ptr, cols, x_hat.dtype, N, OFFSET, ROWS)
    if bias_ptr is not None:
        bias = load_parameter(bias_ptr, cols, x_hat.dtype, N, ROWS=ROWS)
    if weight_ptr is not None and bias_ptr is not None:
        y = multiply_add(y, weight, bias)
    elif weight_ptr is not None:
        y = multiply(y, weight)
    elif bias_ptr is not None:
        y = add(y, bias)
    return y


@triton.jit
def normalized(x, mean, rstd):
    """x_hat = (x - mean) * rstd of saved statistics; there may be no mean (None). It is zero in padding
    lanes if one of them is, and the other finite: else no x_hat of the row is."""
    if mean is not None:
        x = subtract(x, mean)
    return multiply(x, rstd)


@triton.jit
def recovered(y, weight_ptr, bias_ptr, cols, mask, N: tl.constexpr, OFFSET: tl.constexpr):
    """x_hat from y = x_hat * (OFFSET + weight) + bias; zero in the padding lanes."""
    if bias_ptr is not None:
        y = subtract(y, load_parameter(bias_ptr, cols, y.dtype, N))
    if weight_ptr is not None:
        weight = load_parameter(weight_ptr, cols, y.dtype, N, OFFSET)
        y = multiply(y, 1.0 / tl.where((cols < N)[None, :], weight, 1.0))
    return tl.where(mask, y, 0.0)


@triton.jit
def saved_x_hat(
    x,
    weight_ptr,
    bias_ptr,
    statistics,
    rstd,
    cols,
    mask,
    N: tl.constexpr,
    OFFSET: tl.constexpr,
    SAVED: tl.constexpr,
):
    """x_hat of a tile of what the forward pass kept: of x, or with SAVED "y" of its output."""
    if SAVED == "y":
        x_hat = recovered(x, weight_ptr, bias_ptr, cols, mask, N, OFFSET)
    else:
        mean = None
        if len(statistics) > 1:
            mean = without_padding(statistics[1][:, None], mask, N)
        x_hat = normalized(x, mean, rstd[:, None])
    return x_hat


@triton.jit
def gradient_means(sum_wdy_x_hat, sum_wdy, spread, eps, N: tl.constexpr, NORM: tl.constexpr):
    """c1 = mean(wdy * x_hat) and c2 = mean(wdy), as the normalization has them: RMSNorm's c2 is zero;
    for "l2", c1 is the sum, and zero where eps took the norm's place."""
    if NORM == "l2":
        clamped = spread < tl.full((), eps, spread.dtype)
        c1 = tl.where(clamped, 0.0, sum_wdy_x_hat)
    else:
        c1 = divide(sum_wdy_x_hat, N)
    if NORM == "layer":
        c2 = divide(sum_wdy, N)
    else:
        c2 = tl.zeros_like(sum_wdy)
    return c1, c2


@triton.jit
def input_gradient(wdy, x_hat, c1, c2, rstd):
    """dx = (wdy - x_hat * c1 - c2) * rstd, for a tile and its rows' c1, c2 (or None), rstd `[ROWS]`."""
    dx = multiply_add(x_hat, -c1[:, None], wdy)
    if c2 is not None:
        dx = subtract(dx, c2[:, None])
    return multiply(dx, rstd[:, None])
