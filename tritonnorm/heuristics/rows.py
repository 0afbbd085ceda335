"""Launch choices of the row view."""

from dataclasses import replace
from math import ceil

from . import common
from .common import (
    MIN_WARPS,
    WARP,
    WORD_BYTES,
    DeviceFacts,
    RowTile,
    partials,
    power_of_two,
    warps,
    whole_words,
)

FORWARD_ELEMENTS = {2: 32, 4: 16, 8: 16}
"""Elements a thread holds in the forward pass, by bytes an element: four 16-byte loads in flight, at 48
to 66 registers. Half as many of bfloat16 have a quarter fewer bytes in flight an SM, and take a quarter
more instructions a byte (unmeasured)."""

BACKWARD_ELEMENTS = {2: 16, 4: 8, 8: 8}
"""The same for the backward pass, where x, dy, weight, dweight and dbias are all held: 64 to 125
registers. Half as many of bfloat16 have as many bytes in flight, and take 30% more instructions
(unmeasured)."""

BACKWARD_STAGES, LEAST_STAGED_BYTES = 3, {2: 1, 4: 4096}
"""Rows that are under way at once, in wide accesses: while one is computed and its sums wait, two are on
their way to shared memory. And the bytes of such a row, at least, by bytes an element: of short ones of
float32 an SM holds enough programs (unmeasured)."""

AHEAD_WARPS, AHEAD_WARPS_BYTES = 2, 256
"""Warps, at least, of a program that loads rows of so many bytes, at least, ahead: four would exchange
the sums of two rows that they share, and take a quarter more instructions; and of such programs an SM
has fewer than it could. Of LayerNorm's rows of 256 bytes four warps take 132 registers on sm_100, of
shorter ones two take 130 (unmeasured)."""

FEW_PROGRAMS, FEW_WARPS = 256, 8
"""Programs that take a single step, at most, where they leave partial sums; of more each takes steps of
so many warps, two of four or four of two: what they leave takes longer to fold than half of them take
for as many steps again. No table can choose it (unmeasured)."""

STAGED_BYTES = 96 * 1024
"""Shared memory of a block, at most, that those take: on sm_86, sm_89 and sm_120 it has 99 KB."""

NARROW_BACKWARD_ELEMENTS = 8
"""The same for rows of any dtype whose accesses are narrow, if they are short or long: each access has
an address of its own, and twice as many spill."""

LONGEST_NARROW_OUTPUT = 4096
"""Columns of such a row, at most, whose backward pass starts from the output. Longer ones spill 8 to 216
bytes, with 32 warps as with 16."""

LONGEST_ODD = 1024
"""Columns of a row, at most, of which a thread has BACKWARD_ELEMENTS though each is an access: longer
rows are one a program, whose masks and addresses take 132 to 146 registers."""

FORWARD_IN_WARP = {2: 48, 4: 48, 8: 24}
"""Elements a thread, at most, of rows that a warp holds in tiles side by side, a word of each a thread:
no sum is then exchanged between warps, which takes a sixth to two thirds of the instructions. 56 and 64
of 16 bits take 80 and 90 registers, and gain nothing by the model (unmeasured)."""

BACKWARD_IN_WARP = {2: 0, 4: 8, 8: 8}
"""The same for the backward pass: twice as many, or 16 of 16 bits, take registers of which rows on their
way are made, and up to 1.5 times as long on a B200 by the model (unmeasured)."""

FULL_WARP_ELEMENTS, FULL_WARP_REGISTERS = 40, 80
"""Elements a thread of the forward pass over such rows, above which the assembler is told to use so many
registers a thread at most: left alone it takes 64 to 76, and with 64 spills two of RMSNorm of 1,536
columns on sm_80."""

FORWARD_CHUNKS = {2: (1, 3, 5), 4: (1, 3, 5), 8: (1,)}
"""Tiles side by side that may hold a row, a word of each a thread: 5,120 columns are 5 times 1,024,
where one tile would be 8,192."""

BACKWARD_CHUNKS = {2: (1, 3), 4: (1, 3, 5), 8: (1,)}
"""The same for the backward pass: 5 of bfloat16 spill."""

CHUNK_WARPS = 16
"""Warps of a program over such tiles, at most: with more a thread has fewer than 128 registers."""

LEAST_BACKWARD_CHUNKS = 4096
"""Bytes of a row above which they are used. Of several short rows the weight would be held beside x and
dy, which spills."""

CHUNK_BYTES = 64
"""Bytes of a row, at least, in each of several tiles: two of DRAM's 32-byte sectors (unmeasured)."""

NARROW_CHUNKS = 8
"""Tiles side by side, at most, of a short row that no wide access reaches, as of 127 columns. Each is as
wide as the lanes of a warp, so that a row stays in it: as one tile it would be spread over the warps,
and every lane would have elements of many rows to add up."""

PADDED_FORWARD_COLUMNS, PADDED_FORWARD_REGISTERS = 64, 96
"""Tiles of float64 of so many columns, not all of which are there, and the registers a thread, at most,
that the forward pass over them is told to use. Left alone, the assembler of Triton 3.6 and 3.7 takes 80
and spills two; with 96 there are five blocks on an SM, as with the 86 that newer ones take."""

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

CLUSTER_FORWARD_ELEMENTS, CLUSTER_BACKWARD_ELEMENTS = 16, 8
"""Elements a thread of a cluster: what its sums wait for is shared by more warps (unmeasured)."""

CLUSTER_BACKWARD_REGISTERS = 64
"""Registers a thread, at most, of the backward pass of a cluster with so many elements of 16 bits a
thread, loaded ahead: two blocks of 16 warps on an SM. Left alone the assembler takes 85."""

LOOPED_ELEMENTS, SPLIT_ELEMENTS = 16, 8
"""Elements a thread of a step of rows that are not resident, forward and backward (unmeasured)."""

FORWARD_CHUNK = {2: 4096, 4: 4096, 8: 2048}
"""Columns a step of the looped forward: 8 warps at 63 to 70 registers (float64: 100)."""

BACKWARD_CHUNK = 2048
"""Columns a step of the split backward: 8 warps at 39 to 61 registers (float64: 100)."""

STRIDED_BYTES = 64
"""Bytes side by side that a tile takes of strided rows: two of DRAM's 32-byte sectors. One is left to
rows that are too long for two (unmeasured)."""

STRIDED_FORWARD_TILE = {2: 16384, 4: 16384, 8: 4096}
"""Elements, at most, of a tile of strided rows in the forward pass."""

STRIDED_BACKWARD_TILE = {2: 4096, 4: 4096, 8: 2048}
"""The same for the backward pass: twice that spills."""

SPLIT_REGISTERS = {4: 128}
"""Registers a thread, at most, of the split backward pass over strided rows, by bytes an element: left
alone the assembler takes 80 of float32, and spills two of them on sm_100."""


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


def _filled(block_n: int, a_thread: int, chunks: int = 1) -> RowTile:
    """As many rows of `block_n` columns as give each thread of the fewest warps its elements."""
    rows = max(MIN_WARPS * WARP * a_thread // block_n, 1)
    rows = power_of_two(rows + 1) // 2  # the power of two below
    num_warps = warps(rows * block_n // chunks, a_thread // chunks)
    return RowTile(rows, block_n, num_warps, chunks=chunks)


def _resident(n: int, itemsize: int, a_thread: int, a_narrow: int, counts, in_warp: int = 0) -> RowTile:
    """The tile of resident rows of adjacent elements, in the chunks that leave the least padding; of
    those a warp's, where it has no more than `in_warp` elements a thread."""
    word = WORD_BYTES // itemsize
    access = min(n & -n, word)  # elements that a thread accesses at once
    lanes = WARP * access
    of_warp = ceil(n / lanes)  # chunks, each of a warp's width
    if not whole_words(n, itemsize) and 1 < of_warp <= NARROW_CHUNKS:
        return _filled(lanes * of_warp, a_narrow, of_warp)
    widths = {count: power_of_two(ceil(n / count)) for count in counts}
    wide = [count for count in counts if count == 1 or widths[count] * itemsize >= CHUNK_BYTES]
    chunks = min(wide, key=lambda count: count * widths[count])
    held = access * of_warp  # elements a thread, if a warp holds a row
    if access == word and of_warp > 1 and held <= in_warp and lanes * of_warp <= chunks * widths[chunks]:
        full = held > FULL_WARP_ELEMENTS
        tile = _filled(lanes * of_warp, max(held, a_thread), of_warp)
        return replace(tile, registers=FULL_WARP_REGISTERS) if full else tile
    if chunks > 1:
        # Narrow accesses take the registers of more addresses.
        return _filled(widths[chunks] * chunks, chunks * max(access, word // 2), chunks)
    if n < word:
        a_thread //= 2  # each element is nearly a row, with an address and statistics of its own
    return _filled(widths[1], a_thread)


def _strided(n: int, itemsize: int, a_thread: int, most: int) -> RowTile:
    block_n, rows = power_of_two(n), STRIDED_BYTES // itemsize
    filling = MIN_WARPS * WARP * a_thread // block_n  # rows that give every thread its elements
    if rows // 2 * block_n > most:
        block_n = most // 2 // rows  # a loop holds more than a resident tile does
    elif rows * block_n > most:
        rows //= 2
    rows = max(rows, filling)
    return RowTile(rows, block_n, warps(rows * block_n, a_thread))


def row_forward(n: int, itemsize: int, strided: bool, cluster: int = 1) -> RowTile:
    """The forward pass over rows of n elements; looped if its `block_n` is less than n. `cluster` is
    `largest_cluster`."""
    if strided:
        return _strided(n, itemsize, STRIDED_FORWARD_ELEMENTS[itemsize], STRIDED_FORWARD_TILE[itemsize])
    limit, chunk = FORWARD_RESIDENT[itemsize], FORWARD_CHUNK[itemsize]
    if n > limit:
        held = _cluster(power_of_two(n), CLUSTER_FORWARD_ELEMENTS, limit, cluster)
        return held or RowTile(1, chunk, warps(chunk, LOOPED_ELEMENTS))
    a_thread = FORWARD_ELEMENTS[itemsize]
    in_warp = FORWARD_IN_WARP[itemsize]
    tile = _resident(n, itemsize, a_thread, a_thread, FORWARD_CHUNKS[itemsize], in_warp)
    if itemsize == 8 and n < tile.block_n == PADDED_FORWARD_COLUMNS and tile.chunks == 1:
        return replace(tile, registers=PADDED_FORWARD_REGISTERS)
    return tile


def _staged(tile: RowTile, n: int, itemsize: int) -> RowTile:
    """The tile of a program that loads rows of n elements ahead of what it computes, if that helps."""
    least = LEAST_STAGED_BYTES.get(itemsize)
    if least is None or n * itemsize < least or not whole_words(n, itemsize):
        return tile
    if n * itemsize >= AHEAD_WARPS_BYTES:
        shares = min(tile.rows, tile.num_warps // AHEAD_WARPS)  # programs that this one is enough for
        tile = replace(tile, rows=tile.rows // shares, num_warps=tile.num_warps // shares)
    # Of x and dy, which is float32 under autocast.
    a_stage = tile.rows * tile.block_n * (itemsize + max(itemsize, 4)) // tile.num_ctas
    return replace(tile, stages=min(1 + STAGED_BYTES // a_stage, BACKWARD_STAGES))


def row_backward(n: int, itemsize: int, strided: bool, cluster: int = 1) -> RowTile:
    """The backward pass over rows of n elements; split if its `block_n` is less than n. `cluster` is
    `largest_cluster`."""
    if strided:
        a_thread, most = STRIDED_BACKWARD_ELEMENTS[itemsize], STRIDED_BACKWARD_TILE[itemsize]
        tile = _strided(n, itemsize, a_thread, most)
        return replace(tile, registers=SPLIT_REGISTERS.get(itemsize)) if tile.block_n < n else tile
    limit = BACKWARD_RESIDENT[itemsize]
    if n > limit:
        held = _cluster(power_of_two(n), CLUSTER_BACKWARD_ELEMENTS, limit, cluster)
        if held is None:
            return RowTile(1, BACKWARD_CHUNK, warps(BACKWARD_CHUNK, SPLIT_ELEMENTS))
        a_thread = held.block_n // (held.num_ctas * held.num_warps * WARP)
        staged = _staged(held, n, itemsize)
        if itemsize == 2 and staged.stages > 1 and a_thread <= CLUSTER_BACKWARD_ELEMENTS:
            return replace(staged, registers=CLUSTER_BACKWARD_REGISTERS)
        return staged
    a_thread, narrow = BACKWARD_ELEMENTS[itemsize], NARROW_BACKWARD_ELEMENTS
    in_warp = BACKWARD_IN_WARP[itemsize]
    if n % 2 and n > LONGEST_ODD:
        a_thread = narrow
    one_tile = _staged(_resident(n, itemsize, a_thread, narrow, (1,), in_warp), n, itemsize)
    if n <= LEAST_BACKWARD_CHUNKS // itemsize:
        return one_tile
    if (n & -n) * itemsize * 2 >= WORD_BYTES:
        tile = _resident(n, itemsize, a_thread, narrow, BACKWARD_CHUNKS[itemsize])
        if tile.chunks == 1:
            return one_tile
        if tile.num_warps <= CHUNK_WARPS:
            return _staged(tile, n, itemsize)
    return _resident(n, itemsize, narrow, narrow, (1,))


def recovers(n: int, itemsize: int) -> bool:
    """Whether the backward pass over rows of n elements may start from their output."""
    return whole_words(n, itemsize) or n <= LONGEST_NARROW_OUTPUT


def from_output(tile: RowTile, n: int, itemsize: int) -> RowTile:
    """The tile of the backward pass over rows that `tile` holds, if it starts from the output: the
    inverse of the weight takes the registers of several tiles side by side, of rows that are loaded
    ahead, and of the addresses of narrow accesses."""
    long = tile.chunks > 1 and n > LEAST_BACKWARD_CHUNKS // itemsize
    narrow = tile.chunks == 1 and n <= tile.block_n and not whole_words(n, itemsize)
    if long or narrow:
        a_thread = BACKWARD_ELEMENTS[itemsize] if long else NARROW_BACKWARD_ELEMENTS
        tile = _resident(n, itemsize, a_thread, NARROW_BACKWARD_ELEMENTS, (1,))
    registers = tile.registers if tile.num_ctas == 1 else None
    more = max(MIN_WARPS // tile.num_warps, 1)  # rows, as none is under way but what is computed
    rows, num_warps = tile.rows * more, tile.num_warps * more
    return replace(tile, rows=rows, num_warps=num_warps, stages=1, registers=registers)


def row_programs(n: int, itemsize: int, strided: bool) -> int:
    """Programs, at most, that walk through rows of n elements in the backward pass."""
    return common.MAX_PARTIALS


def row_partials(
    m: int, n: int, itemsize: int, parameters: int, tile: RowTile, programs: int | None = None
) -> int:
    """Programs, of at most so many, that walk through m rows, a tile at a step, each leaving partial
    gradients of `parameters` (0 to 2) parameters of n elements.

    Where each takes several steps they are a power of two: an SM holds as many, so that of 132 or 148
    SMs the last wave fills most (307 programs would be one wave, and a few; unmeasured). Where they take
    few they are as many as that needs.
    """
    program_bytes, steps = parameters * n * max(itemsize, 4), ceil(m / tile.rows)
    most = max(ceil(steps * tile.num_warps / FEW_WARPS), FEW_PROGRAMS) if program_bytes else steps
    count = partials(min(steps, most), program_bytes, 3 * m * n * itemsize, programs)
    return count if count in (steps, most) else power_of_two(count + 1) // 2
