"""Launch choices of weight normalization."""

from .common import power_of_two

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


def weight_tile(s: int, itemsize: int, resident: dict[int, int], wide: bool) -> tuple[int, int] | None:
    """The tile (block_c, block_s) of channels of s adjacent elements each that one program holds; None
    for those it cannot. `resident` is WEIGHT_FORWARD_RESIDENT or WEIGHT_BACKWARD_RESIDENT, and `wide`
    says whether accesses are."""
    block_s = power_of_two(s)
    if block_s > resident[itemsize]:
        return None
    return max((WEIGHT_TILE[itemsize] if wide else WEIGHT_NARROW_TILE) // block_s, 1), block_s


def weight_fold(block_c: int, itemsize: int) -> int:
    """Pieces a step of the fold of the pieces of block_c channels."""
    return max(WEIGHT_FOLD[max(itemsize, 4)] // block_c, 1)
