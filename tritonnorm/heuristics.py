"""Launch choices: pure functions of sizes and dtype widths, nothing else.

What changes the order of a reduction depends on the reduced size, on the dtype and on whether rows are
strided, so that a row's bits do not depend on the number of rows; the number of partial weight
gradients depends on the tensor and not on the GPU. No choice is ever made by timing at run time.

Registers and spills were read off the compiler (`python -m perf lowering`); choices between forms
that compile equally clean wait for a measurement and say so.
"""

from dataclasses import dataclass
from math import ceil

WARP = 32
MIN_WARPS = 4
MAX_WARPS = 32

FORWARD_ELEMENTS = 16
"""Elements a thread holds in the forward pass: two 16-byte loads of bfloat16 in flight, at 32 to 48
registers. 32 take up to 108, which leaves one block of 16 warps on an SM."""

BACKWARD_ELEMENTS = 8
"""In the backward pass, where x, dy, weight, dweight and dbias are all held: 64 registers. 16 take 122
to 126, for the same bytes in flight an SM (unmeasured)."""

STRIDED_FORWARD_ELEMENTS = {2: 16, 4: 16, 8: 8}
STRIDED_BACKWARD_ELEMENTS = {2: 8, 4: 8, 8: 4}
"""The same for strided rows, by bytes an element: twice as many of float64 spill."""

FORWARD_RESIDENT = {2: 16384, 4: 16384, 8: 8192}
"""Largest row, by bytes an element, that the forward pass holds in registers. Twice that spills."""

BACKWARD_RESIDENT = {2: 8192, 4: 8192, 8: 4096}
"""The same for the backward pass."""

FORWARD_CHUNK = {2: 4096, 4: 4096, 8: 2048}
"""Columns a step of the looped forward: 8 warps at 63 to 70 registers (float64: 100)."""

BACKWARD_CHUNK = 2048
"""Columns a step of the split backward: 8 warps at 54 to 61 registers (float64: 100)."""

STRIDED_BYTES = 64
"""Bytes side by side that a tile takes of strided rows: two of DRAM's 32-byte sectors. One is left to
rows that are too long for two (unmeasured)."""

STRIDED_FORWARD_TILE = {2: 16384, 4: 16384, 8: 4096}
"""Elements, at most, of a tile of strided rows in the forward pass."""

STRIDED_BACKWARD_TILE = {2: 4096, 4: 4096, 8: 2048}
"""The same for the backward pass: twice that spills."""

PARTIAL_SHARE = 0.05
"""Partial weight gradients may cost this part of a backward pass's traffic ..."""

PARTIAL_BYTES = 8 * 2**20
"""... or this much memory, a fifth of the L2 of an A100 (40 MB) and less of its successors', whichever
is more: it is read again at once, and should not reach DRAM (unmeasured)."""

MAX_PARTIALS = 1024
"""Programs, at most, that walk through the rows: at 4 warps and 64 registers 8 fit on an SM, 1,056 on
an H100 (unmeasured)."""

FOLD_ELEMENTS, FOLD_COLUMNS, FOLD_WARPS = 4096, 16, 8
"""Elements of a step of the fold of partial gradients, its fewest columns, and its warps: at most 4
loads one after another (MAX_PARTIALS / 256 rows), and at N = 128 still 8 programs (unmeasured)."""


@dataclass(frozen=True)
class RowTile:
    """`rows` x `block_n` elements a program, one step of a loop if `block_n` < N."""

    rows: int
    block_n: int
    num_warps: int


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def _warps(elements: int, a_thread: int) -> int:
    return min(max(elements // (a_thread * WARP), MIN_WARPS), MAX_WARPS)


def _row_tile(n, itemsize, strided, *, a_thread, resident, chunk, strided_tile) -> RowTile:
    block_n = _power_of_two(n)
    filling = MIN_WARPS * WARP * a_thread // block_n  # rows that give every thread its elements
    if strided:
        rows = STRIDED_BYTES // itemsize
        if rows // 2 * block_n > strided_tile:
            block_n = strided_tile // 2 // rows  # a loop holds more than a resident tile does
        elif rows * block_n > strided_tile:
            rows //= 2
        rows = max(rows, filling)
    elif block_n > resident:
        rows, block_n = 1, chunk
    else:
        rows = max(filling, 1)
    return RowTile(rows, block_n, _warps(rows * block_n, a_thread))


def row_forward(n: int, itemsize: int, strided: bool) -> RowTile:
    """The forward pass over rows of n elements; looped if its `block_n` is less than n."""
    return _row_tile(
        n,
        itemsize,
        strided,
        a_thread=STRIDED_FORWARD_ELEMENTS[itemsize] if strided else FORWARD_ELEMENTS,
        resident=FORWARD_RESIDENT[itemsize],
        chunk=FORWARD_CHUNK[itemsize],
        strided_tile=STRIDED_FORWARD_TILE[itemsize],
    )


def row_backward(n: int, itemsize: int, strided: bool) -> RowTile:
    """The backward pass over rows of n elements; split if its `block_n` is less than n."""
    return _row_tile(
        n,
        itemsize,
        strided,
        a_thread=STRIDED_BACKWARD_ELEMENTS[itemsize] if strided else BACKWARD_ELEMENTS,
        resident=BACKWARD_RESIDENT[itemsize],
        chunk=BACKWARD_CHUNK,
        strided_tile=STRIDED_BACKWARD_TILE[itemsize],
    )


def row_partials(m: int, n: int, itemsize: int, parameters: int, rows: int) -> int:
    """Programs that walk through m rows, `rows` at a step, each leaving partial gradients of
    `parameters` (0 to 2) parameters of n elements."""
    steps = ceil(m / rows)
    if parameters == 0:
        return min(steps, MAX_PARTIALS)
    program_bytes = parameters * n * max(itemsize, 4)
    traffic = 3 * m * n * itemsize
    share = PARTIAL_SHARE * traffic / (2 * program_bytes)  # written once, read once
    return max(min(steps, int(max(share, PARTIAL_BYTES / program_bytes)), MAX_PARTIALS), 1)


def fold(partials: int) -> RowTile:
    """The fold of so many partial gradients."""
    rows = min(_power_of_two(partials), FOLD_ELEMENTS // FOLD_COLUMNS)
    return RowTile(rows, FOLD_ELEMENTS // rows, FOLD_WARPS)
