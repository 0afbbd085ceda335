"""Launch choices of the channel view: sets that one program holds, and pieces."""

from dataclasses import dataclass
from math import ceil

from .common import (
    FOLD_STEPS,
    MIN_WARPS,
    PARTIAL_BYTES,
    PARTIAL_SHARE,
    WARP,
    WORD_BYTES,
    RowTile,
    power_of_two,
    registers,
    warps_of,
    whole_words,
)

LINE_ELEMENTS = {2: 32, 4: 16, 8: 8}
"""Elements a thread of resident sets of contiguous images, by bytes an element, forward and backward: 32
to 64 registers forward, up to 128 backward. Half as many of bfloat16 take half as many instructions
again (unmeasured)."""

NARROW_LINE_ELEMENTS, NARROW_SET = 16, 4096
"""The same, at most, where accesses are of less than 8 bytes, each with an address of its own. Half as
many backward of sets of more than 4,096 elements, which would spill up to 104 bytes; and of float32, of
which twice as many spill 8 to 24, and by the model take 0.96 to 1.3 times as long (unmeasured)."""

LINE_TILES = 8
"""Tiles side by side, at most, that hold a line of positions: a thread then has the sums of few lines,
and few lanes share one. As a single tile it would be spread over several warps, and every lane would
have elements of many lines to add up."""

THREAD_LINES = 4
"""Lines, at most, that a thread has elements of, a word of each."""

LINE_TILE_BYTES = 32
"""Bytes side by side, at least, of a line of such a tile: a sector of DRAM (unmeasured)."""

ACROSS_FORWARD_ELEMENTS = {2: 32, 4: 16, 8: 8}
ACROSS_BACKWARD_ELEMENTS = {2: 16, 4: 16, 8: 8}
"""The same of channels_last, whose threads have several channels: 128 registers backward."""

SCATTERED_ELEMENTS = {2: 16, 4: 16, 8: 8}
"""The same, both passes, where no wide access reaches channels_last, or nothing is adjacent."""

GROUP_FORWARD_REGISTERS, GROUP_BACKWARD_REGISTERS = 96, 128
GROUP_FORWARD_TOLD = {2: 8, 4: 8, 8: 0}
GROUP_BACKWARD_TOLD = {2: 8, 4: 4, 8: 0}
"""Registers a thread, at most, that the assembler is told to use for resident sets, and the warps up to
which it is, by bytes an element. Left alone it spills two of 48 to 80 here and there (on sm_80 and
sm_100, and with Triton 3.6); of more warps it takes what it is told, and fewer blocks are on an SM."""

GROUP_FORWARD_RESIDENT = {2: 16384, 4: 16384, 8: 8192}
GROUP_BACKWARD_RESIDENT = {2: 16384, 4: 16384, 8: 4096}
GROUP_BACKWARD_RESIDENT_NARROW = {2: 8192, 4: 8192, 8: 4096}
"""Largest tile of sets of channels that are resident. Backward it is smaller for channels_last, whose 16
warps have up to 128 registers, and for narrow accesses: 32 warps have 64 registers each, and spill."""

MAX_GROUPS, MAX_GROUP_CHANNELS = 16, 1024
"""Groups and channels, at most, of a tile of several groups (unmeasured)."""

LINE_BYTES = 64
"""Bytes side by side, at least, that a resident tile takes of channels_last: with half of it the
bandwidth of an H100 is halved. And of contiguous lines those that a tile of more channels leaves."""

CHANNEL_FORWARD_ELEMENTS = {2: 16, 4: 16, 8: 4}
CHANNEL_BACKWARD_ELEMENTS = {2: 8, 4: 8, 8: 4}
PIECE_WARPS = 4
"""Elements a thread, and warps, of a step through a piece: 40 to 96 registers."""

PIECE_STAGES = 4
"""Steps through a piece, at most, that are under way at the same time, three of them on their way to
shared memory. By the model four are 0.96 to 1.00 of the time of three, and teams 0.82 to 0.97 (A100 to
B200; unmeasured). No result depends on it."""

LINE_PADDING = 0.15
"""Padding, at most, of the tiles of an image's contiguous lines, before they become narrower and of more
channels (unmeasured)."""

MOMENTS_REGISTERS = {2: 64, 4: 88}
"""Registers a thread, at most, of moments, by bytes an element: they spill none with them. Left alone
the assembler takes up to 82 and 105, and fewer blocks then read at the same time."""

PIECE_LINE_BYTES = 128
"""Bytes side by side that a piece takes of channels_last: a cache line (unmeasured)."""

PIECE_ELEMENTS = 8192
"""The smallest piece: 16 KB of bfloat16. One image of 320 channels of 64 x 64 gives 160 of them, more
than an H100 has SMs."""

GROUP_PARTS, GROUP_PARTS_ACROSS = 256, 128
"""Parts, at most, that the positions of an image are cut into: the partial results of larger images stay
as few. Of contiguous ones more: two channels of 2 million positions, which are all that a backward pass
by teams has in flight on an H100, then have 512 programs. (Across channels_last a unit is too large for
teams, however it is cut.)"""

BATCH_PROGRAMS = 4096
"""Programs, at most, that share the statistics of a batch: four waves of an H100 at 8 an SM
(unmeasured)."""

FEWEST_IMAGES, MOST_COLUMNS, COLUMN_MOMENTS = 16, 512, 12
"""Images, at least, and positions of a channel, at most, that are taken as columns; and the bytes of the
partial moments of each. By the model 7x7 to 17x17 gain, and from 27x27 on they do on a B200 alone
(perf/NOTES.md; unmeasured)."""

TEAM_PIECE_BYTES, BATCH_PIECES = 32768, 65536
"""Bytes of a piece of x, or of x and dy, that 512 programs of teams hold in a third of an H100's L2; and
the most pieces that a batch is cut into for it, where channels lie apart: their moments take 0.8 MB
(unmeasured)."""

FOLD_SET_ELEMENTS, FOLD_SET_COLUMNS = 2048, 4
"""Elements of a step of a fold of moments, in float64, and its channels: a sector of 32 bytes. A group's
are more where its pieces are few; single ones fewer where more than FOLD_STEPS steps would follow one
another (unmeasured)."""

FOLD_SET_REGISTERS = 168
"""Registers a thread, at most, of such folds: with 128 those of 512 pieces of four channels spill two to
eight. Few programs fold, and an SM still holds three of them."""


@dataclass(frozen=True)
class GroupTile:
    """`block_c` x `block_s` elements a program: all positions of `groups` whole groups, in `chunks`
    tiles side by side, whose widths are powers of two."""

    groups: int
    block_c: int
    block_s: int
    num_warps: int
    registers: int | None
    chunks: int = 1


@dataclass(frozen=True)
class Pieces:
    """How the channel view is cut into pieces: a program takes the `block_c` channels of `images` images
    at `steps` * `block_s` positions, a step at a time, of which `stages` are under way at once."""

    block_c: int
    block_s: int
    images: int
    steps: int
    num_warps: int
    registers: int | None
    stages: int = 1

    def count(self, n: int, s: int) -> int:
        """Pieces of a block of channels."""
        return ceil(n / self.images) * ceil(s / (self.steps * self.block_s))

    def programs(self, n: int, c: int, s: int) -> int:
        return ceil(c / self.block_c) * self.count(n, s)


def _narrow(s: int, itemsize: int) -> bool:
    """Whether lines of s adjacent elements are accessed in less than 8 bytes."""
    return (s & -s) * itemsize * 2 < WORD_BYTES


def _line_tiles(s: int, itemsize: int, narrow: int) -> tuple[int, int, int]:
    """Of a line of s adjacent positions: the tiles side by side that hold it, their width, and the
    elements of each that a thread has. It has `narrow` in all, at most, if accesses are."""
    access, a_thread = min(s & -s, WORD_BYTES // itemsize), LINE_ELEMENTS[itemsize]
    if _narrow(s, itemsize):
        a_thread = min(a_thread, narrow)
    most = max(min(a_thread // access, LINE_TILES), 1)
    width = max(power_of_two(ceil(s / most)), LINE_TILE_BYTES // itemsize)
    width = min(width, power_of_two(s))
    chunks = ceil(s / width)
    return chunks, width, min(max(a_thread // power_of_two(chunks), 1), max(access, THREAD_LINES))


def _group_tile(
    cg, groups, s, itemsize, adjacent, *, narrow, across, told, told_registers, resident
) -> GroupTile | None:
    """The tile of groups that are resident; None for those that are not."""
    scattered = adjacent is None or (adjacent == "c" and not whole_words(cg * groups, itemsize))
    if adjacent == "s":
        chunks, width, a_thread = _line_tiles(s, itemsize, narrow)
    else:
        a_thread = (SCATTERED_ELEMENTS if scattered else across)[itemsize]
        chunks, width = 1, power_of_two(s)
    block_s = chunks * width
    filling = MIN_WARPS * WARP * a_thread * chunks  # elements that give four warps theirs
    best = None
    for count in range(1, groups + 1):
        block_c = power_of_two(count * cg)
        if block_c * block_s > resident or (count > 1 and block_c > MAX_GROUP_CHANNELS):
            break
        if cg > 1 and (groups % count or count > MAX_GROUPS):
            continue  # the order of a group's sums would depend on where the tile begins
        whole = adjacent == "s" or count == groups
        wide = whole or count * cg * itemsize >= LINE_BYTES
        aligned = whole or whole_words(count * cg, itemsize)
        quality = (wide, aligned, min(block_c * block_s, filling), count * cg / block_c, -count)
        if best is None or quality > best[0]:
            warps = warps_of(block_c * width, a_thread)
            if adjacent == "c":  # of small tiles a word a thread: more spill single registers
                warps = max(warps, min(warps_of(block_c * width, WORD_BYTES // itemsize), MIN_WARPS))
            most = registers(warps, itemsize)
            if warps <= told and not scattered:
                most = told_registers
            best = quality, GroupTile(count, block_c, block_s, warps, most, chunks)
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
        narrow=NARROW_LINE_ELEMENTS,
        across=ACROSS_FORWARD_ELEMENTS,
        told=GROUP_FORWARD_TOLD[itemsize],
        told_registers=GROUP_FORWARD_REGISTERS,
        resident=GROUP_FORWARD_RESIDENT[itemsize],
    )


def group_backward(
    cg: int, groups: int, s: int, itemsize: int, adjacent: str | None
) -> GroupTile | None:
    """The same for the backward pass."""
    wide = adjacent == "s" and not _narrow(s, itemsize)
    few = itemsize > 2 or cg * s > NARROW_SET
    resident = GROUP_BACKWARD_RESIDENT if wide else GROUP_BACKWARD_RESIDENT_NARROW
    return _group_tile(
        cg,
        groups,
        s,
        itemsize,
        adjacent,
        narrow=NARROW_LINE_ELEMENTS // (2 if few else 1),
        across=ACROSS_BACKWARD_ELEMENTS,
        told=GROUP_BACKWARD_TOLD[itemsize],
        told_registers=GROUP_BACKWARD_REGISTERS,
        resident=resident[itemsize],
    )


def _line_width(s: int, itemsize: int, bytes_once: int, elements: int, most_channels: int) -> int:
    """Positions of a tile of contiguous lines of s, of which it has `most_channels` at most: as many as
    fill it, but fewer where much of it would be padding, or a piece of whole lines too small."""
    width, least = min(power_of_two(s), elements), LINE_BYTES // itemsize

    def narrower() -> bool:
        channels, padding = elements // width, ceil(s / width) * width - s
        more = 2 * channels <= most_channels and 2 * channels * s * bytes_once <= TEAM_PIECE_BYTES
        return width > least and more and (channels * s < PIECE_ELEMENTS or padding > LINE_PADDING * s)

    while narrower():
        width //= 2
    return width


def _channel_pieces(
    n, c, s, itemsize, adjacent, over_batch, finer, cg, *, a_thread, bytes_once
) -> Pieces:
    if not whole_words(s if adjacent == "s" else c, itemsize):
        a_thread = max(a_thread // 2, 1)
    elements = PIECE_WARPS * WARP * a_thread
    if adjacent == "s":
        # No more of a group's channels than a power of two that divides them: a team needs whole groups.
        most_channels = 1 if over_batch else cg & -cg
        block_s = _line_width(s, itemsize, bytes_once, elements, most_channels)
        block_c = min(power_of_two(c), elements // block_s)
    else:
        filling = elements // power_of_two(s)  # channels, where positions are too few for a tile
        block_c = min(power_of_two(c), max(PIECE_LINE_BYTES // itemsize, filling))
        block_s = min(power_of_two(s), elements // block_c)
    smallest = PIECE_ELEMENTS // block_c  # positions, over all images of the piece
    if over_batch:
        blocks, small = ceil(c / block_c), TEAM_PIECE_BYTES // (block_c * bytes_once)
        programs = BATCH_PROGRAMS
        if finer:
            programs = max(programs, min(n * s // small * blocks, BATCH_PIECES))
        count = max(min(n * s // smallest, programs // blocks), 1)
        images, parts = max(n // count, 1), max(round(count / n), 1)
    else:
        most = GROUP_PARTS if adjacent == "s" else GROUP_PARTS_ACROSS
        images, parts = 1, max(min(s // smallest, most), 1)
    steps = ceil(s / parts / block_s)
    warps = warps_of(block_c * block_s, a_thread)
    stages = min(images * steps, PIECE_STAGES)
    return Pieces(block_c, block_s, images, steps, warps, registers(warps, itemsize), stages)


def channel_forward(
    n: int,
    c: int,
    s: int,
    itemsize: int,
    adjacent: str | None,
    over_batch: bool,
    finer: bool = False,
    cg: int = 1,
) -> Pieces:
    """The pieces of the forward pass over images of c channels and s positions. n are the images that
    share statistics: 1 for those of groups, whose pieces do not depend on the others. Those of a batch
    are at most BATCH_PROGRAMS; or `finer`, as teams need them. Groups have cg channels."""
    return _channel_pieces(
        n,
        c,
        s,
        itemsize,
        adjacent,
        over_batch,
        finer,
        cg,
        a_thread=CHANNEL_FORWARD_ELEMENTS[itemsize],
        bytes_once=itemsize,
    )


def channel_backward(
    n: int,
    c: int,
    s: int,
    itemsize: int,
    adjacent: str | None,
    over_batch: bool,
    finer: bool = False,
    cg: int = 1,
) -> Pieces:
    """The same for the backward pass, which reads two tensors."""
    return _channel_pieces(
        n,
        c,
        s,
        itemsize,
        adjacent,
        over_batch,
        finer,
        cg,
        a_thread=CHANNEL_BACKWARD_ELEMENTS[itemsize],
        bytes_once=2 * itemsize,
    )


def prefer_columns(n: int, c: int, s: int, itemsize: int) -> bool:
    """Whether n contiguous images that share statistics are taken as columns of n positions, so that
    accesses are of 16 bytes where those of s positions are not."""
    moments = COLUMN_MOMENTS * c * s  # of a piece that is all images
    small = max(PARTIAL_BYTES, PARTIAL_SHARE * 3 * itemsize * n * c * s / 2)  # written once, read once
    return (
        not whole_words(s, itemsize)
        and whole_words(c * s, itemsize)
        and n >= FEWEST_IMAGES
        and s <= MOST_COLUMNS
        and moments <= small
    )


def moments_registers(pieces: Pieces, itemsize: int) -> int | None:
    """Registers a thread, at most, of the moments of pieces; None to leave it to the assembler."""
    return MOMENTS_REGISTERS.get(itemsize, pieces.registers)


def fold_sets(pieces: int, channels: int, one_set: bool) -> RowTile:
    """The fold of so many pieces of the channels of a program: those of a group, which are `one_set`, or
    single ones."""
    columns = power_of_two(channels)
    if one_set:
        columns = min(columns, max(FOLD_SET_COLUMNS, FOLD_SET_ELEMENTS // power_of_two(pieces)))
    else:
        filling = FOLD_SET_ELEMENTS // power_of_two(ceil(2 * pieces / FOLD_STEPS))  # in two sweeps
        columns = min(columns, FOLD_SET_COLUMNS, max(filling, 1))
    rows = min(power_of_two(pieces), FOLD_SET_ELEMENTS // columns)
    return RowTile(rows, columns, MIN_WARPS, registers=FOLD_SET_REGISTERS)
