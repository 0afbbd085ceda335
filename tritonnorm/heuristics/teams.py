"""When the programs of one launch share the sets of the channel view, or rows, and how."""

from dataclasses import dataclass
from math import ceil

from .channels import Pieces
from .common import SM_REGISTERS, WARP, WIDE_REGISTERS, DeviceFacts
from .l2 import kept_bytes

TEAM_PROGRAMS, TEAM_REGISTERS = 4, 128
"""Programs of a team's launch on an SM, all of which must be running, and registers a thread that leave
room for them at 4 warps each."""

TEAM_BUSY = 2
"""Programs of teams on an SM, at least, where there are enough pieces: with fewer than 8 KB in flight,
a quarter of what keeps an H100's memory busy, reading twice is faster (unmeasured)."""

ROW_FORWARD_SLAB = {2: 4096, 4: 4096, 8: 2048}
"""Columns, by bytes an element, that a program of a row's team holds: 16 elements a thread (float64: 8)
in few warps, so that several programs are on an SM."""

ROW_BACKWARD_SLAB = {2: 2048, 4: 2048, 8: 1024}
"""The same for the backward pass."""

ROW_TEAM_WARPS = 8
ROW_TEAM_REGISTERS = {2: 80, 4: 80, 8: WIDE_REGISTERS}
"""Registers a thread, at most: 3 programs on an SM (float64: 2). With 64, for 4 of them, the backward
pass of LayerNorm spills (unmeasured)."""


@dataclass(frozen=True)
class RowTeam:
    """`teams` teams of `width` programs, which hold `block_n` columns of a row each."""

    block_n: int
    num_warps: int
    registers: int
    width: int
    teams: int


def prefer_row_teams(backward: bool, n: int, itemsize: int) -> bool:
    """Whether teams are faster than two reads, for rows of n elements that neither a program nor a
    cluster holds. Nowhere, unless the table of an architecture says so: no GPU has measured them yet."""
    return False


def row_team(
    n: int, itemsize: int, slab: dict[int, int], walks: int, device: DeviceFacts | None
) -> RowTeam | None:
    """How teams take rows of n elements, in so many walks through the rows; None where they do not. No
    result depends on the number of teams, nor does anything else on that of the walks."""
    if device is None:
        return None
    block_n, registers = slab[itemsize], ROW_TEAM_REGISTERS[itemsize]
    width = ceil(n / block_n)
    programs = device.processors * (SM_REGISTERS // (ROW_TEAM_WARPS * WARP * registers))
    if width > programs:
        return None
    return RowTeam(block_n, ROW_TEAM_WARPS, registers, width, min(walks, programs // width))


@dataclass(frozen=True)
class Team:
    """`teams` teams of `width` programs take `units` units: `blocks` blocks of channels, and `members`
    pieces, each."""

    units: int
    blocks: int
    members: int
    teams: int
    width: int


def magnitude(sizes: tuple[int, int, int], cg: int, over_batch: bool) -> int:
    """The elements of a set of cg channels, rounded up to a power of two: its exponent."""
    n, _, s = sizes
    return (cg * s * (n if over_batch else 1) - 1).bit_length()


def prefer_teams(
    backward: bool, magnitude: int, itemsize: int, adjacent: str | None, over_batch: bool
) -> bool:
    """Whether teams are faster than the split form, for sets of 2^magnitude elements or a little less.
    Nowhere, unless the table of an architecture says so: no GPU has measured them yet."""
    return False


def team(
    sizes: tuple[int, int, int],
    cg: int,
    over_batch: bool,
    pieces: Pieces,
    element_bytes: int,
    device: DeviceFacts | None,
) -> Team | None:
    """How teams take the pieces of sets of cg channels; None for the split form. `sizes` are (n, c, s),
    and `element_bytes` those of all tensors that are read twice. No result depends on this choice.

    Units of one piece need no facts of a device: a program for each does all of the split form's
    launches. Without facts there are no other teams.
    """
    n, c, s = sizes
    blocks = _channel_blocks(c, cg, pieces.block_c)
    images = 1 if over_batch else n
    units = images * ceil(c / (blocks * pieces.block_c))
    members = blocks * pieces.count(n, s) // images
    if members == 1:
        return Team(units, blocks, members, teams=units, width=1)
    if device is None:
        return None
    unit_bytes = min(blocks * pieces.block_c, c) * s * (n // images) * element_bytes
    programs = device.processors * TEAM_PROGRAMS
    teams = min(units, kept_bytes(device) // unit_bytes, max(programs // members, 1))
    if teams == 0:
        return None
    width = min(members, programs // teams)
    if teams * width < min(TEAM_BUSY * device.processors, units * members):
        return None
    return Team(units, blocks, members, teams, width)


def _channel_blocks(c: int, cg: int, block_c: int) -> int:
    """Blocks of channels, at least, that hold whole groups."""
    if block_c % cg == 0:
        return 1
    if cg % block_c == 0:
        return cg // block_c
    return ceil(c / block_c)
