"""Launch choices: pure functions of sizes and dtype widths, nothing else.

What changes the order of a reduction depends on the reduced size, on the dtype and on the memory format,
so that the bits of a row, or of an image, do not depend on how many there are; the number of partial
weight gradients depends on the tensor and not on the GPU. No choice is ever made by timing at run time.

Registers and spills were read off the compiler (`python -m perf lowering`); choices between forms
that compile equally clean wait for a measurement and say so.
"""

from dataclasses import dataclass
from math import ceil

WARP = 32
MIN_WARPS = 4
MAX_WARPS = 32
SM_REGISTERS = 65536  # and the most that a block can have

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

GROUP_FORWARD_ELEMENTS = {2: 16, 4: 16, 8: 8}
GROUP_BACKWARD_ELEMENTS = {2: 8, 4: 8, 8: 4}
GROUP_BACKWARD_ELEMENTS_ACROSS = {2: 16, 4: 16, 8: 8}
GROUP_FORWARD_RESIDENT = {2: 16384, 4: 16384, 8: 8192}
GROUP_BACKWARD_RESIDENT = {2: 8192, 4: 8192, 8: 4096}
"""Elements a thread, and largest tile, of sets of channels that are resident: as for rows. Across
channels_last the backward pass has 16 warps at up to 128 registers for its largest tile; 32 warps have
64 registers each, and spill."""

MAX_GROUPS, MAX_GROUP_CHANNELS = 16, 1024
"""Groups and channels, at most, of a tile of several groups: its folds take instructions a group."""

WORD_BYTES = 16
"""The widest access. Lines that are no multiple of it are accessed in less, with an address each: the
tiles of pieces then have half as many elements a thread."""

LINE_BYTES = 64
"""Bytes side by side, at least, that a resident tile takes of channels_last: with half of it the
bandwidth of an H100 is halved."""

CHANNEL_FORWARD_ELEMENTS = {2: 16, 4: 16, 8: 4}
CHANNEL_BACKWARD_ELEMENTS = {2: 8, 4: 8, 8: 4}
PIECE_WARPS = 4
"""Elements a thread, and warps, of a step through a piece: 40 to 96 registers. With 8 warps the moments
of channels_last have twice as many barriers."""

PIECE_LINE_BYTES = 128
"""Bytes side by side that a piece takes of channels_last: a cache line (unmeasured)."""

WIDE_REGISTERS = 128
"""Registers a thread, at most, that the assembler is told to use in float64, tensors' or folds'. Left
alone it takes fewer (64 for the moments on sm_100) and spills one or two."""

PIECE_ELEMENTS = 8192
"""The smallest piece: 16 KB of bfloat16. One image of 320 channels of 64 x 64 gives 160 of them, more
than an H100 has SMs."""

GROUP_PARTS = 128
"""Parts, at most, that the positions of an image are cut into: the partial results of larger images stay
as few."""

BATCH_PROGRAMS = 4096
"""Programs, at most, that share the statistics of a batch: four waves of an H100 at 8 an SM
(unmeasured)."""

TEAM_CAPABILITIES: frozenset[tuple[int, int]] = frozenset()
"""Compute capabilities on which teams were measured to be faster than the split form: none so far.
`python -m perf bench --providers tritonnorm tritonnorm.team` measures."""

TEAM_PROGRAMS, TEAM_REGISTERS = 4, 128
"""Programs of a team's launch on an SM, all of which must be running, and registers a thread that leave
room for them at 4 warps each."""

TEAM_L2_SHARE = 1 / 3
"""Part of L2 that units in flight may take: they are read again from there, beside what is written."""

FOLD_SET_ELEMENTS, FOLD_SET_COLUMNS = 1024, 4
"""Elements of a step of a fold of moments, in float64, and its channels: a sector of 32 bytes, so that
the 4,096 pieces of a batch of 64 channels are folded by 16 programs in 16 steps (unmeasured)."""


WEIGHT_WARPS = 16
WEIGHT_TILE = {2: 8192, 4: 8192, 8: 4096}
WEIGHT_NARROW_TILE = 4096
WEIGHT_FORWARD_RESIDENT = {2: 16384, 4: 16384, 8: 8192}
WEIGHT_BACKWARD_RESIDENT = {2: 8192, 4: 8192, 8: 4096}
"""Warps of a program of weight normalization, elements of its tile, and the largest channel that it
holds, in a tile of its own. Where accesses are not 16 bytes wide, and have an address each, tiles of
8,192 spill. All tensors of a launch have as many warps, whatever their sizes: a tensor normalized alone
has the same bits as among others. 16 elements a thread and tensor (float64 and narrow tiles 8, the
longest forward 32); unmeasured."""

WEIGHT_FOLD = {4: 1024, 8: 512}
"""Elements of a step of the fold of a channel's pieces, by bytes a partial result (unmeasured)."""


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


def _warps_of(elements: int, a_thread: int) -> int:
    """Warps of a tile that may be too small for `MIN_WARPS`."""
    return min(max(elements // (a_thread * WARP), 1), MAX_WARPS)


def _registers(warps: int, itemsize: int) -> int | None:
    """Registers a thread, at most, of a block of so many warps; None to leave it to the assembler."""
    return min(WIDE_REGISTERS, SM_REGISTERS // (warps * WARP)) if itemsize == 8 else None


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


def partials(steps: int, program_bytes: int, traffic: int) -> int:
    """Programs that share so many steps, each leaving `program_bytes` of partial parameter gradients, in
    a backward pass that moves `traffic` bytes."""
    if program_bytes == 0:
        return min(steps, MAX_PARTIALS)
    share = PARTIAL_SHARE * traffic / (2 * program_bytes)  # written once, read once
    return max(min(steps, int(max(share, PARTIAL_BYTES / program_bytes)), MAX_PARTIALS), 1)


def row_partials(m: int, n: int, itemsize: int, parameters: int, rows: int) -> int:
    """Programs that walk through m rows, `rows` at a step, each leaving partial gradients of
    `parameters` (0 to 2) parameters of n elements."""
    return partials(ceil(m / rows), parameters * n * max(itemsize, 4), 3 * m * n * itemsize)


def fold(partials: int) -> RowTile:
    """The fold of so many partial gradients."""
    rows = min(_power_of_two(partials), FOLD_ELEMENTS // FOLD_COLUMNS)
    return RowTile(rows, FOLD_ELEMENTS // rows, FOLD_WARPS)


@dataclass(frozen=True)
class GroupTile:
    """`block_c` x `block_s` elements a program: all positions of `groups` whole groups."""

    groups: int
    block_c: int
    block_s: int
    num_warps: int
    registers: int | None


@dataclass(frozen=True)
class Pieces:
    """How the channel view is cut into pieces: a program takes the `block_c` channels of `images` images
    at `steps` * `block_s` positions, a step at a time."""

    block_c: int
    block_s: int
    images: int
    steps: int
    num_warps: int
    registers: int | None

    def count(self, n: int, s: int) -> int:
        """Pieces of a block of channels."""
        return ceil(n / self.images) * ceil(s / (self.steps * self.block_s))

    def programs(self, n: int, c: int, s: int) -> int:
        return ceil(c / self.block_c) * self.count(n, s)


def _whole_words(elements: int, itemsize: int) -> bool:
    """Whether lines of so many adjacent elements can be accessed in 16 bytes."""
    return elements * itemsize % WORD_BYTES == 0


def _group_tile(cg, groups, s, itemsize, adjacent, *, a_thread, resident) -> GroupTile | None:
    """The tile of groups that are resident; None for those that are not."""
    block_s = _power_of_two(s)
    filling = MIN_WARPS * WARP * a_thread  # elements that give four warps theirs
    best = None
    for count in range(1, groups + 1):
        block_c = _power_of_two(count * cg)
        if block_c * block_s > resident or (count > 1 and block_c > MAX_GROUP_CHANNELS):
            break
        if cg > 1 and (groups % count or count > MAX_GROUPS):
            continue  # the order of a group's sums would depend on where the tile begins
        whole = adjacent == "s" or count == groups
        wide = whole or count * cg * itemsize >= LINE_BYTES
        aligned = whole or _whole_words(count * cg, itemsize)
        quality = (wide, aligned, min(block_c * block_s, filling), count * cg / block_c, -count)
        if best is None or quality > best[0]:
            warps = _warps_of(block_c * block_s, a_thread)
            best = quality, GroupTile(count, block_c, block_s, warps, _registers(warps, itemsize))
    if best is None or not best[0][0]:
        return None
    return best[1]


def group_forward(cg: int, groups: int, s: int, itemsize: int, adjacent: str | None) -> GroupTile | None:
    """The forward pass over sets of cg channels and s positions, `groups` an image; None if a set is not
    resident."""
    return _group_tile(
        cg,
        groups,
        s,
        itemsize,
        adjacent,
        a_thread=GROUP_FORWARD_ELEMENTS[itemsize],
        resident=GROUP_FORWARD_RESIDENT[itemsize],
    )


def group_backward(
    cg: int, groups: int, s: int, itemsize: int, adjacent: str | None
) -> GroupTile | None:
    """The same for the backward pass."""
    a_thread = GROUP_BACKWARD_ELEMENTS if adjacent == "s" else GROUP_BACKWARD_ELEMENTS_ACROSS
    return _group_tile(
        cg,
        groups,
        s,
        itemsize,
        adjacent,
        a_thread=a_thread[itemsize],
        resident=GROUP_BACKWARD_RESIDENT[itemsize],
    )


def _channel_pieces(n, c, s, itemsize, adjacent, over_batch, *, a_thread) -> Pieces:
    if not _whole_words(s if adjacent == "s" else c, itemsize):
        a_thread = max(a_thread // 2, 1)
    elements = PIECE_WARPS * WARP * a_thread
    if adjacent == "s":
        block_s = min(_power_of_two(s), elements)
        block_c = min(_power_of_two(c), elements // block_s)
    else:
        filling = elements // _power_of_two(s)  # channels, where positions are too few for a tile
        block_c = min(_power_of_two(c), max(PIECE_LINE_BYTES // itemsize, filling))
        block_s = min(_power_of_two(s), elements // block_c)
    smallest = PIECE_ELEMENTS // block_c  # positions, over all images of the piece
    if over_batch:
        count = max(min(n * s // smallest, BATCH_PROGRAMS // ceil(c / block_c)), 1)
        images, parts = max(n // count, 1), max(count // n, 1)
    else:
        images, parts = 1, max(min(s // smallest, GROUP_PARTS), 1)
    steps = ceil(s / parts / block_s)
    warps = _warps_of(block_c * block_s, a_thread)
    return Pieces(block_c, block_s, images, steps, warps, _registers(warps, itemsize))


def channel_forward(
    n: int, c: int, s: int, itemsize: int, adjacent: str | None, over_batch: bool
) -> Pieces:
    """The pieces of the forward pass over n images of c channels and s positions. For statistics of
    groups they do not depend on n."""
    return _channel_pieces(
        n, c, s, itemsize, adjacent, over_batch, a_thread=CHANNEL_FORWARD_ELEMENTS[itemsize]
    )


def channel_backward(
    n: int, c: int, s: int, itemsize: int, adjacent: str | None, over_batch: bool
) -> Pieces:
    """The same for the backward pass."""
    return _channel_pieces(
        n, c, s, itemsize, adjacent, over_batch, a_thread=CHANNEL_BACKWARD_ELEMENTS[itemsize]
    )


def fold_sets(pieces: int, channels: int) -> RowTile:
    """The fold of so many pieces of the channels of a program: those of a group, or single ones."""
    block_c = min(_power_of_two(channels), FOLD_SET_COLUMNS)
    rows = min(_power_of_two(pieces), FOLD_SET_ELEMENTS // block_c)
    return RowTile(rows, block_c, MIN_WARPS)


@dataclass(frozen=True)
class DeviceFacts:
    """What is known of a GPU: compute capability, number of SMs, bytes of L2."""

    capability: tuple[int, int]
    processors: int
    l2_bytes: int


@dataclass(frozen=True)
class Team:
    """`teams` teams of `width` programs take `units` units: `blocks` blocks of channels, and `members`
    pieces, each."""

    units: int
    blocks: int
    members: int
    teams: int
    width: int


def team(
    sizes: tuple[int, int, int],
    cg: int,
    over_batch: bool,
    pieces: Pieces,
    element_bytes: int,
    device: DeviceFacts | None,
) -> Team | None:
    """How teams take the pieces of sets of cg channels; None for the split form. `sizes` are (n, c, s),
    and `element_bytes` those of all tensors that are read twice. No result depends on this choice."""
    if device is None or device.capability not in TEAM_CAPABILITIES:
        return None
    n, c, s = sizes
    blocks = _channel_blocks(c, cg, pieces.block_c)
    images = 1 if over_batch else n
    units = images * ceil(c / (blocks * pieces.block_c))
    members = blocks * pieces.count(n, s) // images
    unit_bytes = min(blocks * pieces.block_c, c) * s * (n // images) * element_bytes
    programs = device.processors * TEAM_PROGRAMS
    teams = min(units, int(TEAM_L2_SHARE * device.l2_bytes) // unit_bytes, max(programs // members, 1))
    if teams == 0 or members == 1:
        return None
    return Team(units, blocks, members, teams, min(members, programs // teams))


def _channel_blocks(c: int, cg: int, block_c: int) -> int:
    """Blocks of channels, at least, that hold whole groups."""
    if block_c % cg == 0:
        return 1
    if cg % block_c == 0:
        return cg // block_c
    return ceil(c / block_c)


def weight_tile(s: int, itemsize: int, resident: dict[int, int], wide: bool) -> tuple[int, int] | None:
    """The tile (block_c, block_s) of channels of s adjacent elements each that one program holds; None
    for those it cannot. `resident` is WEIGHT_FORWARD_RESIDENT or WEIGHT_BACKWARD_RESIDENT, and `wide`
    says whether accesses are."""
    block_s = _power_of_two(s)
    if block_s > resident[itemsize]:
        return None
    return max((WEIGHT_TILE[itemsize] if wide else WEIGHT_NARROW_TILE) // block_s, 1), block_s


def weight_fold(block_c: int, itemsize: int) -> int:
    """Pieces a step of the fold of the pieces of block_c channels."""
    return max(WEIGHT_FOLD[max(itemsize, 4)] // block_c, 1)
