"""Launch choices of the row view."""

from math import ceil

from . import common
from .common import MIN_WARPS, WARP, DeviceFacts, RowTile, partials, power_of_two, warps

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

CLUSTER_CAPABILITY, CLUSTER_TRITON = (9, 0), (3, 8)
"""The first GPU that has clusters, and the first Triton whose sums are over all of one."""

PORTABLE_CLUSTER, LARGEST_CLUSTER = 8, 16
"""Blocks that every such GPU takes as a cluster, and that those below do if asked, as Triton's launcher
does."""

LARGEST_CLUSTER_MAJORS, LARGEST_CLUSTER_PROCESSORS = (9, 10), 121
"""Major compute capabilities, and the least number of SMs, of which one of at most 8 GPCs then has 16: a
cluster stays within one, and a block may need an SM for itself."""

CLUSTER_WARPS = 16
"""Warps of a block of a cluster, at most: 32 would leave one block on an SM, and nothing to do there
while it waits for the others (unmeasured)."""

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


def largest_cluster(device: DeviceFacts | None, triton_version: tuple[int, int]) -> int:
    """Blocks of the largest cluster that the device takes and Triton compiles; 1 where there is none."""
    if device is None or device.capability < CLUSTER_CAPABILITY or triton_version < CLUSTER_TRITON:
        return 1
    large = device.processors >= LARGEST_CLUSTER_PROCESSORS
    return (
        LARGEST_CLUSTER if large and device.capability[0] in LARGEST_CLUSTER_MAJORS else PORTABLE_CLUSTER
    )


def _cluster(block_n: int, a_thread: int, resident: int, largest: int) -> RowTile | None:
    """The tile of a cluster that holds `block_n` columns; None where they are too many.

    Each block has half of the elements that a program alone can have, so that there are several on an
    SM; or as many, where the cluster would be larger than a portable one.
    """
    num_ctas = block_n * 2 // resident
    if num_ctas > PORTABLE_CLUSTER:
        num_ctas //= 2
    if num_ctas > largest:
        return None
    num_warps = min(warps(block_n // num_ctas, a_thread), CLUSTER_WARPS)
    return RowTile(1, block_n, num_warps, num_ctas)


def _row_tile(n, itemsize, strided, cluster, *, a_thread, resident, chunk, strided_tile) -> RowTile:
    block_n = power_of_two(n)
    if not strided and block_n > resident and (tile := _cluster(block_n, a_thread, resident, cluster)):
        return tile
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
    return RowTile(rows, block_n, warps(rows * block_n, a_thread))


def row_forward(n: int, itemsize: int, strided: bool, cluster: int = 1) -> RowTile:
    """The forward pass over rows of n elements; looped if its `block_n` is less than n. `cluster` is
    `largest_cluster`."""
    return _row_tile(
        n,
        itemsize,
        strided,
        cluster,
        a_thread=STRIDED_FORWARD_ELEMENTS[itemsize] if strided else FORWARD_ELEMENTS,
        resident=FORWARD_RESIDENT[itemsize],
        chunk=FORWARD_CHUNK[itemsize],
        strided_tile=STRIDED_FORWARD_TILE[itemsize],
    )


def row_backward(n: int, itemsize: int, strided: bool, cluster: int = 1) -> RowTile:
    """The backward pass over rows of n elements; split if its `block_n` is less than n. `cluster` is
    `largest_cluster`."""
    return _row_tile(
        n,
        itemsize,
        strided,
        cluster,
        a_thread=STRIDED_BACKWARD_ELEMENTS[itemsize] if strided else BACKWARD_ELEMENTS,
        resident=BACKWARD_RESIDENT[itemsize],
        chunk=BACKWARD_CHUNK,
        strided_tile=STRIDED_BACKWARD_TILE[itemsize],
    )


def row_programs(n: int, itemsize: int, strided: bool) -> int:
    """Programs, at most, that walk through rows of n elements in the backward pass."""
    return common.MAX_PARTIALS


def row_partials(
    m: int, n: int, itemsize: int, parameters: int, rows: int, programs: int | None = None
) -> int:
    """Programs, of at most so many, that walk through m rows, `rows` at a step, each leaving partial
    gradients of `parameters` (0 to 2) parameters of n elements."""
    program_bytes = parameters * n * max(itemsize, 4)
    return partials(ceil(m / rows), program_bytes, 3 * m * n * itemsize, programs)
