"""When the programs of one launch share the sets of the channel view, and how."""

from dataclasses import dataclass
from math import ceil

from .channels import Pieces
from .common import DeviceFacts
from .l2 import kept_bytes

TEAM_CAPABILITIES: frozenset[tuple[int, int]] = frozenset()
"""Compute capabilities on which teams were measured to be faster than the split form: none so far.
`python -m perf bench --providers tritonnorm tritonnorm.team` measures."""

TEAM_PROGRAMS, TEAM_REGISTERS = 4, 128
"""Programs of a team's launch on an SM, all of which must be running, and registers a thread that leave
room for them at 4 warps each."""

TEAM_BUSY = 2
"""Programs of teams on an SM, at least, where there are enough pieces: with fewer than 8 KB in flight,
a quarter of what keeps an H100's memory busy, reading twice is faster (unmeasured)."""


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
    and `element_bytes` those of all tensors that are read twice. No result depends on this choice.

    Units of one piece need no device's facts: a program for each does all of the split form's launches.
    """
    n, c, s = sizes
    blocks = _channel_blocks(c, cg, pieces.block_c)
    images = 1 if over_batch else n
    units = images * ceil(c / (blocks * pieces.block_c))
    members = blocks * pieces.count(n, s) // images
    if members == 1:
        return Team(units, blocks, members, teams=units, width=1)
    if device is None or device.capability not in TEAM_CAPABILITIES:
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
