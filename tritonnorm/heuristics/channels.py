"""Launch choices of the channel view: sets that one program holds, and pieces."""

from dataclasses import dataclass
from math import ceil

from .common import MIN_WARPS, WARP, RowTile, power_of_two, registers, warps_of, whole_words

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

PIECE_ELEMENTS = 8192
"""The smallest piece: 16 KB of bfloat16. One image of 320 channels of 64 x 64 gives 160 of them, more
than an H100 has SMs."""

GROUP_PARTS = 128
"""Parts, at most, that the positions of an image are cut into: the partial results of larger images stay
as few."""

BATCH_PROGRAMS = 4096
"""Programs, at most, that share the statistics of a batch: four waves of an H100 at 8 an SM
(unmeasured)."""

FOLD_SET_ELEMENTS, FOLD_SET_COLUMNS = 1024, 4
"""Elements of a step of a fold of moments, in float64, and its channels: a sector of 32 bytes, so that
the 4,096 pieces of a batch of 64 channels are folded by 16 programs in 16 steps (unmeasured)."""


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


def _group_tile(cg, groups, s, itemsize, adjacent, *, a_thread, resident) -> GroupTile | None:
    """The tile of groups that are resident; None for those that are not."""
    block_s = power_of_two(s)
    filling = MIN_WARPS * WARP * a_thread  # elements that give four warps theirs
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
            warps = warps_of(block_c * block_s, a_thread)
            best = quality, GroupTile(count, block_c, block_s, warps, registers(warps, itemsize))
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
    if not whole_words(s if adjacent == "s" else c, itemsize):
        a_thread = max(a_thread // 2, 1)
    elements = PIECE_WARPS * WARP * a_thread
    if adjacent == "s":
        block_s = min(power_of_two(s), elements)
        block_c = min(power_of_two(c), elements // block_s)
    else:
        filling = elements // power_of_two(s)  # channels, where positions are too few for a tile
        block_c = min(power_of_two(c), max(PIECE_LINE_BYTES // itemsize, filling))
        block_s = min(power_of_two(s), elements // block_c)
    smallest = PIECE_ELEMENTS // block_c  # positions, over all images of the piece
    if over_batch:
        count = max(min(n * s // smallest, BATCH_PROGRAMS // ceil(c / block_c)), 1)
        images, parts = max(n // count, 1), max(count // n, 1)
    else:
        images, parts = 1, max(min(s // smallest, GROUP_PARTS), 1)
    steps = ceil(s / parts / block_s)
    warps = warps_of(block_c * block_s, a_thread)
    return Pieces(block_c, block_s, images, steps, warps, registers(warps, itemsize))


def channel_forward(
    n: int, c: int, s: int, itemsize: int, adjacent: str | None, over_batch: bool
) -> Pieces:
    """The pieces of the forward pass over images of c channels and s positions. n are the images that
    share statistics: 1 for those of groups, whose pieces do not depend on the others."""
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
    block_c = min(power_of_two(channels), FOLD_SET_COLUMNS)
    rows = min(power_of_two(pieces), FOLD_SET_ELEMENTS // block_c)
    return RowTile(rows, block_c, MIN_WARPS)
