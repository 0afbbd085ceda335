"""The row view `[M, N]`: every row is normalized over its own N elements. Notation: kernels/README.md.

NORM is "layer" (mean and variance), "rms" (mean of squares) or "l2" (Euclidean norm, at least eps).
A row is resident (held in registers, one read) or looped over (a second read).
"""

import triton.language as tl

from .arithmetic import add, multiply, multiply_add, subtract
from .names import kernel
from .primitives import (
    across,
    added,
    affine,
    aligned,
    alone,
    between_warps,
    center,
    centers_twice,
    compute_dtype,
    divide,
    divides,
    evenly_apart,
    fills_warp,
    gradient_means,
    input_gradient,
    load_parameter,
    load_statistics,
    load_tile,
    load_wide,
    no_narrower,
    plus,
    plus_products,
    products,
    row_pointers,
    row_spread,
    row_sum,
    row_sums,
    saved_x_hat,
    scale,
    store_tile,
    sum_of_products,
    tile_mask,
    word,
)


@kernel(do_not_specialize=["M"])
def row_forward_resident(
    x_ptr,  # [M, N]
    y_ptr,  # [M, N]
    weight_ptr,  # [N] or None
    bias_ptr,  # [N] or None
    mean_ptr,  # [M] or None
    spread_ptr,  # [M] or None
    x_strides,
    y_strides,
    M,
    R1,
    R2,
    eps: "fp64",
    N: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    sizes = (M, R1, R2)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, BLOCK_N)

    masks = ()
    xs = ()
    for i in tl.static_range(CHUNKS):
        cols = i * BLOCK_N + lanes
        masks += (tile_mask(rows, cols, M, R2, N),)
        xs += (load_tile(x_ptr, rows, cols, masks[i], x_strides, sizes, ALIGN),)

    deviations = xs
    if NORM == "layer":
        mean, deviations = center(xs, masks, N)
        if centers_twice(x_ptr.dtype.element_ty, N):
            rest, deviations = center(deviations, masks, N)
            mean += rest
        if mean_ptr is not None:
            tl.store(mean_ptr + rows, mean, rows < M)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    WORD: tl.constexpr = word(DTYPE, BLOCK_N, ALIGN)
    ALONE: tl.constexpr = alone(BLOCK_N, WORD)
    squares = sum_of_products(deviations, deviations, ALONE)
    spread = row_spread(tl.sum(squares, axis=1), eps, N, NORM)
    if spread_ptr is not None:
        tl.store(spread_ptr + rows, spread, rows < M)

    rstd = scale(spread, eps, NORM)[:, None]
    # The widest load of a tile's shape decides its layout: a parameter's, wider than x's, would decide
    # the order of x's sums. Of a single padded tile the rows' masks take the registers.
    WIDE: tl.constexpr = no_narrower(weight_ptr, DTYPE) and no_narrower(bias_ptr, DTYPE)
    UNPADDED: tl.constexpr = CHUNKS > 1 or divides(BLOCK_N, N)
    BESIDE: tl.constexpr = ROWS if fills_warp(DTYPE, BLOCK_N, WORD) and WIDE and UNPADDED else 1
    for i in tl.static_range(CHUNKS):
        cols = i * BLOCK_N + lanes
        x_hat = multiply(deviations[i], rstd)
        y = affine(x_hat, weight_ptr, bias_ptr, cols, N, OFFSET, ROUND, BESIDE)
        store_tile(y_ptr, y, rows, cols, masks[i], y_strides, sizes, ALIGN)


@kernel(do_not_specialize=["M"])
def row_forward_looped(
    x_ptr,  # [M, N]
    y_ptr,  # [M, N]
    weight_ptr,  # [N] or None
    bias_ptr,  # [N] or None
    mean_ptr,  # [M] or None
    spread_ptr,  # [M] or None
    x_strides,
    y_strides,
    M,
    R1,
    R2,
    eps: "fp64",
    N: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
):
    sizes = (M, R1, R2)
    dtype: tl.constexpr = compute_dtype(x_ptr.dtype.element_ty)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, BLOCK_N)

    # Moments a lane of the chunks: no reduction over lanes, hence no barrier, until the end.
    squares = tl.zeros([ROWS, BLOCK_N], dtype)
    if NORM == "layer":
        # Welford's algorithm, on x less the mean of the first chunk: the means are then of the size
        # of the spread, and do not lose digits to a large common mean.
        mask = tile_mask(rows, lanes, M, R2, N)
        first = load_tile(x_ptr, rows, lanes, mask, x_strides, sizes, ALIGN)
        shift = divide(tl.sum(first, axis=1), BLOCK_N)
        means = tl.zeros([ROWS, BLOCK_N], dtype)
        for start in range(0, N, BLOCK_N):
            cols = start + lanes
            mask = tile_mask(rows, cols, M, R2, N)
            x = load_tile(x_ptr, rows, cols, mask, x_strides, sizes, ALIGN) - shift[:, None]
            delta = x - means
            means += tl.where(mask, delta / (start // BLOCK_N + 1), 0.0)
            squares += tl.where(mask, delta * (x - means), 0.0)
        counts = (N // BLOCK_N + (lanes < N % BLOCK_N).to(tl.int32)).to(dtype)[None, :]
        rest = divide(tl.sum(means * counts, axis=1), N)
        means -= rest[:, None]
        squares += means * means * counts
        if mean_ptr is not None:
            tl.store(mean_ptr + rows, shift + rest, rows < M)
    else:
        for start in range(0, N, BLOCK_N):
            cols = start + lanes
            mask = tile_mask(rows, cols, M, R2, N)
            x = load_tile(x_ptr, rows, cols, mask, x_strides, sizes, ALIGN)
            squares = multiply_add(x, x, squares)
    spread = row_spread(tl.sum(squares, axis=1), eps, N, NORM)
    if spread_ptr is not None:
        tl.store(spread_ptr + rows, spread, rows < M)
    rstd = scale(spread, eps, NORM)

    for start in range(0, N, BLOCK_N):
        cols = start + lanes
        mask = tile_mask(rows, cols, M, R2, N)
        x = load_tile(x_ptr, rows, cols, mask, x_strides, sizes, ALIGN)
        if NORM == "layer":
            x = subtract(subtract(x, shift[:, None]), rest[:, None])
        y = affine(multiply(x, rstd[:, None]), weight_ptr, bias_ptr, cols, N, OFFSET, ROUND)
        store_tile(y_ptr, y, rows, cols, mask, y_strides, sizes, ALIGN)


@kernel(do_not_specialize=["M"])
def row_gradient_means(
    dy_ptr,  # [M, N]
    x_ptr,  # [M, N]; with SAVED "y" that is y
    weight_ptr,  # [N] or None
    bias_ptr,  # [N] or None, for SAVED "y"
    mean_ptr,  # [M] or None
    spread_ptr,  # [M]
    c1_ptr,  # [M]
    c2_ptr,  # [M]
    dy_strides,
    x_strides,
    M,
    R1,
    R2,
    eps: "fp64",
    N: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    SAVED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """c1 and c2 of rows that are too long to be resident in `row_backward`."""
    sizes = (M, R1, R2)
    dtype: tl.constexpr = compute_dtype(x_ptr.dtype.element_ty)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    statistics = load_statistics(mean_ptr, spread_ptr, rows, M)
    spread = statistics[0]
    rstd = scale(spread, eps, NORM)
    wdy_x_hat = tl.zeros([ROWS, BLOCK_N], dtype)
    wdy_sum = tl.zeros([ROWS, BLOCK_N], dtype)

    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = tile_mask(rows, cols, M, R2, N)
        dy = load_tile(dy_ptr, rows, cols, mask, dy_strides, sizes, ALIGN)
        x = load_tile(x_ptr, rows, cols, mask, x_strides, sizes, ALIGN)
        wdy = affine(dy, weight_ptr, None, cols, N, OFFSET)
        x_hat = saved_x_hat(x, weight_ptr, bias_ptr, statistics, rstd, cols, mask, N, OFFSET, SAVED)
        wdy_x_hat = multiply_add(wdy, x_hat, wdy_x_hat)
        wdy_sum = add(wdy_sum, wdy)

    c1, c2 = gradient_means(tl.sum(wdy_x_hat, axis=1), tl.sum(wdy_sum, axis=1), spread, eps, N, NORM)
    tl.store(c1_ptr + rows, c1, rows < M)
    tl.store(c2_ptr + rows, c2, rows < M)


@kernel(do_not_specialize=["M"])
def row_backward(
    dy_ptr,  # [M, N]
    x_ptr,  # [M, N]; with SAVED "y" that is y
    weight_ptr,  # [N] or None
    bias_ptr,  # [N] or None, for SAVED "y"
    mean_ptr,  # [M] or None
    spread_ptr,  # [M]
    c1_ptr,  # [M], or None: rows are resident, BLOCK_N >= N
    c2_ptr,  # [M], or None
    dx_ptr,  # [M, N] or None
    dweight_partial_ptr,  # [programs, N] or None
    dbias_partial_ptr,  # [programs, N] or None
    dy_strides,
    x_strides,
    dx_strides,
    M,
    R1,
    R2,
    eps: "fp64",
    N: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    SAVED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    STAGES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """dx of all rows, and a partial dweight and dbias of the rows that one program walks through."""
    sizes = (M, R1, R2)
    dtype: tl.constexpr = compute_dtype(x_ptr.dtype.element_ty)
    program = tl.program_id(1).to(tl.int64)
    lanes = tl.program_id(0) * (CHUNKS * BLOCK_N) + tl.arange(0, BLOCK_N)
    # The weight of several long tiles is loaded again with every row where x and dy take the registers;
    # rows that are on their way to shared memory leave room for it.
    HELD: tl.constexpr = CHUNKS == 1 or ROWS > 1 or STAGES > 1
    WORD: tl.constexpr = word(x_ptr.dtype.element_ty, BLOCK_N, ALIGN)
    ALONE: tl.constexpr = alone(BLOCK_N, WORD)
    weights = ()
    dweights = ()
    dbiases = ()
    for i in tl.static_range(CHUNKS):
        if weight_ptr is not None and HELD:
            weights += (load_parameter(weight_ptr, i * BLOCK_N + lanes, dtype, N, OFFSET),)
        dweights += (tl.zeros([ROWS, BLOCK_N], dtype),)
        dbiases += (tl.zeros([ROWS, BLOCK_N], dtype),)

    # Where rows start is carried from one to the next; narrow accesses have too many addresses for that.
    CARRIED: tl.constexpr = evenly_apart(R1, R2) and WORD > 1
    walk = tl.num_programs(1) * ROWS
    if CARRIED:
        rows = program * ROWS + tl.arange(0, ROWS)
        dy_rows = row_pointers(dy_ptr, rows, dy_strides, sizes, ALIGN)
        x_rows = row_pointers(x_ptr, rows, x_strides, sizes, ALIGN)
        if dx_ptr is not None:
            dx_rows = row_pointers(dx_ptr, rows, dx_strides, sizes, ALIGN)
    for start in tl.range(program * ROWS, M, walk, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        if not CARRIED:
            dy_rows = row_pointers(dy_ptr, rows, dy_strides, sizes, ALIGN)
            x_rows = row_pointers(x_ptr, rows, x_strides, sizes, ALIGN)
        statistics = load_statistics(mean_ptr, spread_ptr, rows, M)
        spread = statistics[0]
        rstd = scale(spread, eps, NORM)
        masks = ()
        dys = ()
        x_hats = ()
        for i in tl.static_range(CHUNKS):
            cols = i * BLOCK_N + lanes
            masks += (tile_mask(rows, cols, M, R2, N),)
            dys += (load_wide(across(dy_rows, cols, dy_strides), masks[i]),)
            x = load_wide(across(x_rows, cols, x_strides), masks[i])
            x_hats += (
                saved_x_hat(x, weight_ptr, bias_ptr, statistics, rstd, cols, masks[i], N, OFFSET, SAVED),
            )

        if dweight_partial_ptr is not None:
            dweights = plus_products(dweights, dys, x_hats)
        if dbias_partial_ptr is not None:
            dbiases = plus(dbiases, dys)
        if dx_ptr is not None:
            wdys = dys
            if weight_ptr is not None and HELD:
                wdys = products(dys, weights, ALONE)
            elif weight_ptr is not None:
                again = ()
                for i in tl.static_range(CHUNKS):
                    again += (load_parameter(weight_ptr, i * BLOCK_N + lanes, dtype, N, OFFSET),)
                wdys = products(dys, again, ALONE)
            if c1_ptr is not None:
                c1 = tl.load(c1_ptr + rows, rows < M, other=0.0)
                c2 = tl.load(c2_ptr + rows, rows < M, other=0.0)
            else:
                wdy_x_hat = sum_of_products(wdys, x_hats, ALONE)
                if NORM == "layer" and between_warps(BLOCK_N, WORD):
                    sum_wdy, sum_wdy_x_hat = row_sums(added(wdys), wdy_x_hat, WORD)
                else:
                    sum_wdy_x_hat, sum_wdy = tl.sum(wdy_x_hat, axis=1), row_sum(wdys)
                c1, c2 = gradient_means(sum_wdy_x_hat, sum_wdy, spread, eps, N, NORM)
            if not CARRIED:
                dx_rows = row_pointers(dx_ptr, rows, dx_strides, sizes, ALIGN)
            for i in tl.static_range(CHUNKS):
                dx = input_gradient(wdys[i], x_hats[i], c1, c2 if NORM == "layer" else None, rstd)
                tl.store(across(dx_rows, i * BLOCK_N + lanes, dx_strides), dx, masks[i])
        if CARRIED:
            dy_rows = aligned(dy_rows, walk.to(tl.int64) * dy_strides[0], ALIGN)
            x_rows = aligned(x_rows, walk.to(tl.int64) * x_strides[0], ALIGN)
            if dx_ptr is not None:
                dx_rows = aligned(dx_rows, walk.to(tl.int64) * dx_strides[0], ALIGN)

    for i in tl.static_range(CHUNKS):
        cols = i * BLOCK_N + lanes
        if dweight_partial_ptr is not None:
            tl.store(dweight_partial_ptr + program * N + cols, tl.sum(dweights[i], axis=0), cols < N)
        if dbias_partial_ptr is not None:
            tl.store(dbias_partial_ptr + program * N + cols, tl.sum(dbiases[i], axis=0), cols < N)
