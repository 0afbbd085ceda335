"""Rows of the row view `[M, N]` spread over the programs of a cooperative launch: one read. Notation:
kernels/README.md.

A row has a team of WIDTH programs, whose registers hold BLOCK_N of its columns each. They publish what
they found of a row, meet, fold what all have found, and apply it to what they still hold.
"""

import triton
import triton.language as tl

from .arithmetic import add, multiply, multiply_add, product
from .names import kernel
from .primitives import (
    affine,
    compute_dtype,
    divide,
    gradient_means,
    input_gradient,
    load_parameter,
    load_statistics,
    load_tile,
    row_spread,
    saved_x_hat,
    scale,
    store_tile,
    tile_mask,
    times,
    without_padding,
)
from .team import meet


@triton.constexpr_function
def width_of(N, BLOCK_N):
    """WIDTH, the programs of a team."""
    return (N + BLOCK_N - 1) // BLOCK_N


@triton.jit
def columns_of(place, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """How many columns the programs at these places of a team have, in float64."""
    WIDTH: tl.constexpr = width_of(N, BLOCK_N)
    columns = tl.where(place < WIDTH - 1, BLOCK_N, N - (WIDTH - 1) * BLOCK_N)
    return tl.where(place < WIDTH, columns, 0).to(tl.float64)


@triton.jit
def published(ptr, rows, places, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """What the programs of a team published of each row, `[ROWS, BLOCK_P]`, in float64."""
    WIDTH: tl.constexpr = width_of(N, BLOCK_N)
    pointers = ptr + rows[:, None] * WIDTH + places[None, :]
    return tl.load(pointers, (places < WIDTH)[None, :], other=0.0).to(tl.float64)


@kernel(do_not_specialize=["M"])
def row_team_forward(
    x_ptr,  # [M, N]
    y_ptr,  # [M, N]
    weight_ptr,  # [N] or None
    bias_ptr,  # [N] or None
    mean_ptr,  # [M] or None
    spread_ptr,  # [M] or None
    mean_partial_ptr,  # [M, WIDTH], float64
    squares_partial_ptr,  # [M, WIDTH]
    arrivals_ptr,  # [M], int32, zeros
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
    BLOCK_P: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """As `row_forward_resident`, with ROWS = 1."""
    sizes = (M, R1, R2)
    dtype: tl.constexpr = compute_dtype(x_ptr.dtype.element_ty)
    WIDTH: tl.constexpr = width_of(N, BLOCK_N)
    team, place = tl.program_id(0) // WIDTH, tl.program_id(0) % WIDTH
    cols = place * BLOCK_N + tl.arange(0, BLOCK_N)
    places = tl.arange(0, BLOCK_P)
    inverse_columns = 1.0 / columns_of(place, N, BLOCK_N)

    for row in range(team.to(tl.int64), M, tl.num_programs(0) // WIDTH):
        rows = row + tl.arange(0, ROWS)
        first = rows < M * (place == 0).to(tl.int32)  # of the team's programs, one stores statistics
        mask = tile_mask(rows, cols, M, R2, N)
        x = load_tile(x_ptr, rows, cols, mask, x_strides, sizes, ALIGN)

        deviation = x
        if NORM == "layer":
            # Twice: the rest is what the first mean lost when it was rounded.
            mean = times(tl.sum(x, axis=1), inverse_columns)
            deviation = without_padding(x - mean[:, None], mask, N)
            rest = times(tl.sum(deviation, axis=1), inverse_columns)
            deviation = without_padding(deviation - rest[:, None], mask, N)
            own_mean = mean.to(tl.float64) + rest.to(tl.float64)
            tl.store(mean_partial_ptr + rows * WIDTH + place, own_mean)
        squares = tl.sum(deviation * deviation, axis=1)
        tl.store(squares_partial_ptr + rows * WIDTH + place, squares)

        meet(arrivals_ptr, row, WIDTH)

        sum_of_squares = published(squares_partial_ptr, rows, places, N, BLOCK_N)
        if NORM == "layer":
            columns = columns_of(places, N, BLOCK_N)[None, :]
            means = published(mean_partial_ptr, rows, places, N, BLOCK_N)
            mean = divide(tl.sum(product(means, columns, ALONE=True), axis=1), N)
            distance = means - mean[:, None]
            sum_of_squares += distance * distance * columns
            deviation += (own_mean - mean).to(dtype)[:, None]
            if mean_ptr is not None:
                tl.store(mean_ptr + rows, mean.to(dtype), first)
        spread = row_spread(tl.sum(sum_of_squares, axis=1).to(dtype), eps, N, NORM)
        if spread_ptr is not None:
            tl.store(spread_ptr + rows, spread, first)

        x_hat = multiply(deviation, scale(spread, eps, NORM)[:, None])
        y = affine(x_hat, weight_ptr, bias_ptr, cols, N, OFFSET, ROUND)
        store_tile(y_ptr, y, rows, cols, mask, y_strides, sizes, ALIGN)


@kernel(do_not_specialize=["M", "WALKS"])
def row_team_backward(
    dy_ptr,  # [M, N]
    x_ptr,  # [M, N]; with SAVED "y" that is y
    weight_ptr,  # [N] or None
    bias_ptr,  # [N] or None, for SAVED "y"
    mean_ptr,  # [M] or None
    spread_ptr,  # [M]
    dx_ptr,  # [M, N]
    dweight_partial_ptr,  # [WALKS, N] or None
    dbias_partial_ptr,  # [WALKS, N] or None
    c1_partial_ptr,  # [M, WIDTH]
    c2_partial_ptr,  # [M, WIDTH]
    arrivals_ptr,  # [M], int32, zeros
    dy_strides,
    x_strides,
    dx_strides,
    M,
    R1,
    R2,
    WALKS,
    eps: "fp64",
    N: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    SAVED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """As `row_backward`, with ROWS = 1. The rows of a partial dweight and dbias, those of a program
    there, are a walk: teams take one after another, and how many teams there are changes no sum."""
    sizes = (M, R1, R2)
    dtype: tl.constexpr = compute_dtype(x_ptr.dtype.element_ty)
    WIDTH: tl.constexpr = width_of(N, BLOCK_N)
    team, place = tl.program_id(0) // WIDTH, tl.program_id(0) % WIDTH
    cols = place * BLOCK_N + tl.arange(0, BLOCK_N)
    places = tl.arange(0, BLOCK_P)
    if weight_ptr is not None:
        weight = load_parameter(weight_ptr, cols, dtype, N, OFFSET)

    for walk in range(team.to(tl.int64), WALKS, tl.num_programs(0) // WIDTH):
        dweight = tl.zeros([ROWS, BLOCK_N], dtype)
        dbias = tl.zeros([ROWS, BLOCK_N], dtype)
        for row in range(walk, M, WALKS):
            rows = row + tl.arange(0, ROWS)
            mask = tile_mask(rows, cols, M, R2, N)
            dy = load_tile(dy_ptr, rows, cols, mask, dy_strides, sizes, ALIGN)
            x = load_tile(x_ptr, rows, cols, mask, x_strides, sizes, ALIGN)
            statistics = load_statistics(mean_ptr, spread_ptr, rows, M)
            spread = statistics[0]
            rstd = scale(spread, eps, NORM)
            x_hat = saved_x_hat(x, weight_ptr, bias_ptr, statistics, rstd, cols, mask, N, OFFSET, SAVED)
            if dweight_partial_ptr is not None:
                dweight = multiply_add(dy, x_hat, dweight)
            if dbias_partial_ptr is not None:
                dbias = add(dbias, dy)
            wdy = dy
            if weight_ptr is not None:
                wdy = multiply(wdy, weight)

            tl.store(c1_partial_ptr + rows * WIDTH + place, tl.sum(wdy * x_hat, axis=1))
            if NORM == "layer":
                tl.store(c2_partial_ptr + rows * WIDTH + place, tl.sum(wdy, axis=1))

            meet(arrivals_ptr, row, WIDTH)

            c1 = tl.sum(published(c1_partial_ptr, rows, places, N, BLOCK_N), axis=1)
            c2 = tl.zeros_like(c1)
            if NORM == "layer":
                c2 = tl.sum(published(c2_partial_ptr, rows, places, N, BLOCK_N), axis=1)
            c1, c2 = gradient_means(c1.to(dtype), c2.to(dtype), spread, eps, N, NORM)
            dx = input_gradient(wdy, x_hat, c1, c2 if NORM == "layer" else None, rstd)
            store_tile(dx_ptr, dx, rows, cols, mask, dx_strides, sizes, ALIGN)

        if dweight_partial_ptr is not None:
            tl.store(dweight_partial_ptr + walk * N + cols, tl.sum(dweight, axis=0), cols < N)
        if dbias_partial_ptr is not None:
            tl.store(dbias_partial_ptr + walk * N + cols, tl.sum(dbias, axis=0), cols < N)
