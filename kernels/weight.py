"""Weight normalization: y = gain * x / ||x||, with the norm of each channel of a dense `[N, C, S]` over
all images and positions. Notation: kernels/README.md.

A launch takes one tensor, or many: then x_ptr and the other pointers are those of the first one, and a
table `[FIELDS, TENSORS]` of int64 has, for each tensor, its first program, its sizes (N, C, S, IMAGES,
STEPS), and in the order of the arguments how many elements each pointer lies from the first one's.
"""

import triton
import triton.language as tl

from .arithmetic import multiply, multiply_add, product
from .channel import count_tiles, load_channels, load_tile, locate, next_tile, store_tile, tile_mask
from .fold import column_sum
from .names import kernel
from .primitives import alone, compute_dtype, input_gradient, square_root, word

FIRST_SIZE = tl.constexpr(1)
FIRST_POINTER = tl.constexpr(6)


@triton.jit
def find_tensor(table_ptr, TENSORS, BLOCK_T: tl.constexpr):
    """The tensor that this program works on, and its number among the tensor's programs."""
    program = tl.program_id(0)
    tensors = tl.arange(0, BLOCK_T)
    first = tl.load(table_ptr + tensors, tensors < TENSORS, other=0)
    tensor = tl.sum(((first <= program) & (tensors < TENSORS)).to(tl.int32), axis=0) - 1
    return tensor, (program - tl.load(table_ptr + tensor)).to(tl.int32)


@triton.jit
def size(table_ptr, number: tl.constexpr, tensor, TENSORS):
    """A size of a tensor."""
    return tl.load(table_ptr + (FIRST_SIZE + number) * TENSORS + tensor).to(tl.int32)


@triton.jit
def pointer(ptr, table_ptr, number: tl.constexpr, tensor, TENSORS):
    """The pointer to a tensor, from that to the first one; None stays None."""
    if ptr is not None:
        ptr += tl.load(table_ptr + (FIRST_POINTER + number) * TENSORS + tensor)
    return ptr


@triton.jit
def dense_strides(C, S, ADJACENT: tl.constexpr):
    """The strides of a dense `[N, C, S]`; where channels are adjacent, N is 1."""
    if ADJACENT == "c":
        strides = (0, 1, C)
    else:
        strides = (C.to(tl.int64) * S, S, 1)
    return strides


@triton.jit
def inverse_norm(norm):
    """1 / norm; NaN of zero, for y and the gradients to be what they are of zeros in PyTorch."""
    is_zero = norm == 0.0
    return tl.where(is_zero, float("nan"), 1.0 / tl.where(is_zero, 1.0, norm))


@triton.jit
def is_tile_of(S, BLOCK_S: tl.constexpr):
    """Whether BLOCK_S is the smallest power of two that holds S positions."""
    return (BLOCK_S // 2 < S) & (S <= BLOCK_S)


@triton.jit
def forward_tile(
    x_ptr,
    y_ptr,
    gain_ptr,
    spread_ptr,
    program,
    C,
    S,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ALIGN: tl.constexpr,
):
    dtype: tl.constexpr = compute_dtype(x_ptr.dtype.element_ty)
    channels = program * BLOCK_C + tl.arange(0, BLOCK_C)
    positions = tl.arange(0, BLOCK_S)
    present = channels < C
    mask = tile_mask(present, positions, S, "s", ALIGN)

    x = load_tile(x_ptr, 0, channels, positions, mask, (0, S, 1), "s", ALIGN)
    gain = load_channels(gain_ptr, channels, present, dtype)

    ALONE: tl.constexpr = alone(BLOCK_S, word(x_ptr.dtype.element_ty, BLOCK_S, ALIGN), 512)
    spread = square_root(tl.sum(product(x, x, ALONE), axis=1))
    y = multiply(x, (gain * inverse_norm(spread))[:, None])

    store_tile(y_ptr, y, 0, channels, positions, mask, (0, S, 1), "s", ALIGN)
    if spread_ptr is not None:
        tl.store(spread_ptr + channels, spread, present)


@kernel(do_not_specialize=["TENSORS", "C", "S"])
def weight_forward(
    x_ptr,  # [C, S]
    y_ptr,  # [C, S]
    gain_ptr,  # [C]
    spread_ptr,  # [C] or None
    table_ptr,  # [FIELDS, TENSORS] or None
    TENSORS,
    C,
    S,
    BLOCK_T: tl.constexpr,
    TILES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Channels that are resident, N = 1: of the tiles (BLOCK_C, BLOCK_S), the smallest that holds S."""
    program = tl.program_id(0)
    if table_ptr is not None:
        tensor, program = find_tensor(table_ptr, TENSORS, BLOCK_T)
        C, S = size(table_ptr, 1, tensor, TENSORS), size(table_ptr, 2, tensor, TENSORS)
        x_ptr = pointer(x_ptr, table_ptr, 0, tensor, TENSORS)
        y_ptr = pointer(y_ptr, table_ptr, 1, tensor, TENSORS)
        gain_ptr = pointer(gain_ptr, table_ptr, 2, tensor, TENSORS)
        spread_ptr = pointer(spread_ptr, table_ptr, 3, tensor, TENSORS)
    for number in tl.static_range(len(TILES)):
        if len(TILES) == 1 or is_tile_of(S, TILES[number][1]):
            forward_tile(
                x_ptr,
                y_ptr,
                gain_ptr,
                spread_ptr,
                program,
                C,
                S,
                TILES[number][0],
                TILES[number][1],
                ALIGN,
            )


@triton.jit
def backward_tile(
    dy_ptr,
    x_ptr,
    gain_ptr,
    spread_ptr,
    dx_ptr,
    dgain_ptr,
    program,
    C,
    S,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ALIGN: tl.constexpr,
):
    dtype: tl.constexpr = compute_dtype(x_ptr.dtype.element_ty)
    channels = program * BLOCK_C + tl.arange(0, BLOCK_C)
    positions = tl.arange(0, BLOCK_S)
    present = channels < C
    mask = tile_mask(present, positions, S, "s", ALIGN)

    dy = load_tile(dy_ptr, 0, channels, positions, mask, (0, S, 1), "s", ALIGN)
    x = load_tile(x_ptr, 0, channels, positions, mask, (0, S, 1), "s", ALIGN)
    inverse = inverse_norm(load_channels(spread_ptr, channels, present, dtype))
    x_hat = multiply(x, inverse[:, None])

    ALONE: tl.constexpr = alone(BLOCK_S, word(x_ptr.dtype.element_ty, BLOCK_S, ALIGN), 512)
    dgain = tl.sum(product(dy, x_hat, ALONE), axis=1)

    if dx_ptr is not None:
        factor = load_channels(gain_ptr, channels, present, dtype) * inverse
        dx = input_gradient(dy, x_hat, dgain, None, factor)
        store_tile(dx_ptr, dx, 0, channels, positions, mask, (0, S, 1), "s", ALIGN)
    if dgain_ptr is not None:
        tl.store(dgain_ptr + channels, dgain, present)


@kernel(do_not_specialize=["TENSORS", "C", "S"])
def weight_backward(
    dy_ptr,  # [C, S]
    x_ptr,  # [C, S]
    gain_ptr,  # [C]
    spread_ptr,  # [C]
    dx_ptr,  # [C, S] or None
    dgain_ptr,  # [C] or None
    table_ptr,  # [FIELDS, TENSORS] or None
    TENSORS,
    C,
    S,
    BLOCK_T: tl.constexpr,
    TILES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """dgain = sum(dy * x_hat) and dx = (dy - x_hat * dgain) * gain / norm, as `weight_forward`."""
    program = tl.program_id(0)
    if table_ptr is not None:
        tensor, program = find_tensor(table_ptr, TENSORS, BLOCK_T)
        C, S = size(table_ptr, 1, tensor, TENSORS), size(table_ptr, 2, tensor, TENSORS)
        dy_ptr = pointer(dy_ptr, table_ptr, 0, tensor, TENSORS)
        x_ptr = pointer(x_ptr, table_ptr, 1, tensor, TENSORS)
        gain_ptr = pointer(gain_ptr, table_ptr, 2, tensor, TENSORS)
        spread_ptr = pointer(spread_ptr, table_ptr, 3, tensor, TENSORS)
        dx_ptr = pointer(dx_ptr, table_ptr, 4, tensor, TENSORS)
        dgain_ptr = pointer(dgain_ptr, table_ptr, 5, tensor, TENSORS)
    for number in tl.static_range(len(TILES)):
        if len(TILES) == 1 or is_tile_of(S, TILES[number][1]):
            backward_tile(
                dy_ptr,
                x_ptr,
                gain_ptr,
                spread_ptr,
                dx_ptr,
                dgain_ptr,
                program,
                C,
                S,
                TILES[number][0],
                TILES[number][1],
                ALIGN,
            )


@triton.jit
def piece_sizes(table_ptr, tensor, TENSORS):
    """N, C, S, IMAGES and STEPS of a tensor."""
    return (
        size(table_ptr, 0, tensor, TENSORS),
        size(table_ptr, 1, tensor, TENSORS),
        size(table_ptr, 2, tensor, TENSORS),
        size(table_ptr, 3, tensor, TENSORS),
        size(table_ptr, 4, tensor, TENSORS),
    )


@triton.jit
def sum_of_pieces(
    partial_ptr, channels, present, N, C, S, IMAGES, STEPS, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Sums `[BLOCK_C]` over all pieces of `channels`: every piece's program adds them up by itself, in
    one order."""
    pieces = tl.cdiv(N, IMAGES) * tl.cdiv(S, STEPS * BLOCK_S)
    return column_sum(partial_ptr, channels, present, pieces, C, BLOCK_P, channels.shape[0])


@kernel(do_not_specialize=["TENSORS", "N", "C", "S", "IMAGES", "STEPS"])
def weight_squares(
    x_ptr,  # [N, C, S]
    squares_partial_ptr,  # [pieces, C]
    table_ptr,  # [FIELDS, TENSORS] or None
    TENSORS,
    N,
    C,
    S,
    IMAGES,
    STEPS,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ADJACENT: tl.constexpr,
    ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sum of squares of each channel of a piece."""
    dtype: tl.constexpr = compute_dtype(x_ptr.dtype.element_ty)
    program = tl.program_id(0)
    if table_ptr is not None:
        tensor, program = find_tensor(table_ptr, TENSORS, BLOCK_T)
        N, C, S, IMAGES, STEPS = piece_sizes(table_ptr, tensor, TENSORS)
        x_ptr = pointer(x_ptr, table_ptr, 0, tensor, TENSORS)
        squares_partial_ptr = pointer(squares_partial_ptr, table_ptr, 1, tensor, TENSORS)
    piece, channels, present, bounds = locate(
        program, N, C, S, IMAGES, STEPS, BLOCK_C, BLOCK_S, ADJACENT, ALIGN
    )
    image, _, first, end = bounds
    strides = dense_strides(C, S, ADJACENT)
    squares = tl.zeros([BLOCK_C, BLOCK_S], dtype)

    n, start = image, first
    for _ in tl.range(0, count_tiles(bounds, BLOCK_S), num_stages=STAGES):
        positions = start + tl.arange(0, BLOCK_S)
        mask = tile_mask(present, positions, end, ADJACENT, ALIGN)
        x = load_tile(x_ptr, n, channels, positions, mask, strides, ADJACENT, ALIGN)
        squares = multiply_add(x, x, squares)
        n, start = next_tile(n, start, first, end, BLOCK_S)

    partial = piece.to(tl.int64) * C + channels
    tl.store(squares_partial_ptr + partial, tl.sum(squares, axis=1), present)


@kernel(do_not_specialize=["TENSORS", "N", "C", "S", "IMAGES", "STEPS"])
def weight_normalize(
    x_ptr,  # [N, C, S]
    y_ptr,  # [N, C, S]
    gain_ptr,  # [C]
    spread_ptr,  # [C] or None
    squares_partial_ptr,  # [pieces, C]
    table_ptr,  # [FIELDS, TENSORS] or None
    TENSORS,
    N,
    C,
    S,
    IMAGES,
    STEPS,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ADJACENT: tl.constexpr,
    ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y of a piece, with the norms of all pieces."""
    dtype: tl.constexpr = compute_dtype(x_ptr.dtype.element_ty)
    program = tl.program_id(0)
    if table_ptr is not None:
        tensor, program = find_tensor(table_ptr, TENSORS, BLOCK_T)
        N, C, S, IMAGES, STEPS = piece_sizes(table_ptr, tensor, TENSORS)
        x_ptr = pointer(x_ptr, table_ptr, 0, tensor, TENSORS)
        y_ptr = pointer(y_ptr, table_ptr, 1, tensor, TENSORS)
        gain_ptr = pointer(gain_ptr, table_ptr, 2, tensor, TENSORS)
        spread_ptr = pointer(spread_ptr, table_ptr, 3, tensor, TENSORS)
        squares_partial_ptr = pointer(squares_partial_ptr, table_ptr, 4, tensor, TENSORS)
    piece, channels, present, bounds = locate(
        program, N, C, S, IMAGES, STEPS, BLOCK_C, BLOCK_S, ADJACENT, ALIGN
    )
    image, _, first, end = bounds
    strides = dense_strides(C, S, ADJACENT)
    spread = square_root(
        sum_of_pieces(squares_partial_ptr, channels, present, N, C, S, IMAGES, STEPS, BLOCK_P, BLOCK_S)
    )
    factor = load_channels(gain_ptr, channels, present, dtype) * inverse_norm(spread)

    n, start = image, first
    for _ in tl.range(0, count_tiles(bounds, BLOCK_S), num_stages=STAGES):
        positions = start + tl.arange(0, BLOCK_S)
        mask = tile_mask(present, positions, end, ADJACENT, ALIGN)
        x = load_tile(x_ptr, n, channels, positions, mask, strides, ADJACENT, ALIGN)
        y = multiply(x, factor[:, None])
        store_tile(y_ptr, y, n, channels, positions, mask, strides, ADJACENT, ALIGN)
        n, start = next_tile(n, start, first, end, BLOCK_S)

    if spread_ptr is not None:
        if piece == 0:
            tl.store(spread_ptr + channels, spread, present)


@triton.jit
def load_gradient_tiles(
    dy_ptr,
    x_ptr,
    n,
    start,
    end,
    channels,
    present,
    strides,
    BLOCK_S: tl.constexpr,
    ADJACENT: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Tiles of dy and x from a position on; their positions, and which elements of them exist."""
    positions = start + tl.arange(0, BLOCK_S)
    mask = tile_mask(present, positions, end, ADJACENT, ALIGN)
    dy = load_tile(dy_ptr, n, channels, positions, mask, strides, ADJACENT, ALIGN)
    x = load_tile(x_ptr, n, channels, positions, mask, strides, ADJACENT, ALIGN)
    return dy, x, positions, mask


@kernel(do_not_specialize=["TENSORS", "N", "C", "S", "IMAGES", "STEPS"])
def weight_gradient_sums(
    dy_ptr,  # [N, C, S]
    x_ptr,  # [N, C, S]
    spread_ptr,  # [C]
    dgain_partial_ptr,  # [pieces, C]
    table_ptr,  # [FIELDS, TENSORS] or None
    TENSORS,
    N,
    C,
    S,
    IMAGES,
    STEPS,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ADJACENT: tl.constexpr,
    ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """sum(dy * x_hat) of each channel of a piece."""
    dtype: tl.constexpr = compute_dtype(x_ptr.dtype.element_ty)
    program = tl.program_id(0)
    if table_ptr is not None:
        tensor, program = find_tensor(table_ptr, TENSORS, BLOCK_T)
        N, C, S, IMAGES, STEPS = piece_sizes(table_ptr, tensor, TENSORS)
        dy_ptr = pointer(dy_ptr, table_ptr, 0, tensor, TENSORS)
        x_ptr = pointer(x_ptr, table_ptr, 1, tensor, TENSORS)
        spread_ptr = pointer(spread_ptr, table_ptr, 2, tensor, TENSORS)
        dgain_partial_ptr = pointer(dgain_partial_ptr, table_ptr, 3, tensor, TENSORS)
    piece, channels, present, bounds = locate(
        program, N, C, S, IMAGES, STEPS, BLOCK_C, BLOCK_S, ADJACENT, ALIGN
    )
    image, _, first, end = bounds
    strides = dense_strides(C, S, ADJACENT)
    inverse = inverse_norm(load_channels(spread_ptr, channels, present, dtype))
    dgain = tl.zeros([BLOCK_C, BLOCK_S], dtype)

    n, start = image, first
    for _ in tl.range(0, count_tiles(bounds, BLOCK_S), num_stages=STAGES):
        dy, x, _, _ = load_gradient_tiles(
            dy_ptr, x_ptr, n, start, end, channels, present, strides, BLOCK_S, ADJACENT, ALIGN
        )
        dgain = multiply_add(dy, multiply(x, inverse[:, None]), dgain)
        n, start = next_tile(n, start, first, end, BLOCK_S)

    partial = piece.to(tl.int64) * C + channels
    tl.store(dgain_partial_ptr + partial, tl.sum(dgain, axis=1), present)


@kernel(do_not_specialize=["TENSORS", "N", "C", "S", "IMAGES", "STEPS"])
def weight_input_gradient(
    dy_ptr,  # [N, C, S]
    x_ptr,  # [N, C, S]
    gain_ptr,  # [C]
    spread_ptr,  # [C]
    dgain_partial_ptr,  # [pieces, C]
    dx_ptr,  # [N, C, S] or None
    dgain_ptr,  # [C] or None
    table_ptr,  # [FIELDS, TENSORS] or None
    TENSORS,
    N,
    C,
    S,
    IMAGES,
    STEPS,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ADJACENT: tl.constexpr,
    ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx of a piece, with dgain of all pieces."""
    dtype: tl.constexpr = compute_dtype(x_ptr.dtype.element_ty)
    program = tl.program_id(0)
    if table_ptr is not None:
        tensor, program = find_tensor(table_ptr, TENSORS, BLOCK_T)
        N, C, S, IMAGES, STEPS = piece_sizes(table_ptr, tensor, TENSORS)
        dy_ptr = pointer(dy_ptr, table_ptr, 0, tensor, TENSORS)
        x_ptr = pointer(x_ptr, table_ptr, 1, tensor, TENSORS)
        gain_ptr = pointer(gain_ptr, table_ptr, 2, tensor, TENSORS)
        spread_ptr = pointer(spread_ptr, table_ptr, 3, tensor, TENSORS)
        dgain_partial_ptr = pointer(dgain_partial_ptr, table_ptr, 4, tensor, TENSORS)
        dx_ptr = pointer(dx_ptr, table_ptr, 5, tensor, TENSORS)
        dgain_ptr = pointer(dgain_ptr, table_ptr, 6, tensor, TENSORS)
    piece, channels, present, bounds = locate(
        program, N, C, S, IMAGES, STEPS, BLOCK_C, BLOCK_S, ADJACENT, ALIGN
    )
    image, _, first, end = bounds
    strides = dense_strides(C, S, ADJACENT)
    inverse = inverse_norm(load_channels(spread_ptr, channels, present, dtype))
    factor = load_channels(gain_ptr, channels, present, dtype) * inverse
    dgain = sum_of_pieces(dgain_partial_ptr, channels, present, N, C, S, IMAGES, STEPS, BLOCK_P, BLOCK_S)
    if dgain_ptr is not None:
        if piece == 0:
            tl.store(dgain_ptr + channels, dgain, present)

    if dx_ptr is not None:
        n, start = image, first
        for _ in tl.range(0, count_tiles(bounds, BLOCK_S), num_stages=STAGES):
            dy, x, positions, mask = load_gradient_tiles(
                dy_ptr, x_ptr, n, start, end, channels, present, strides, BLOCK_S, ADJACENT, ALIGN
            )
            x_hat = multiply(x, inverse[:, None])
            dx = input_gradient(dy, x_hat, dgain, None, factor)
            store_tile(dx_ptr, dx, n, channels, positions, mask, strides, ADJACENT, ALIGN)
            n, start = next_tile(n, start, first, end, BLOCK_S)
