"""Answers near those of the heuristics: what `tune` tries. Pure functions, as the heuristics are."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import ceil, prod

from tritonnorm.heuristics import table
from tritonnorm.heuristics.channels import GroupTile, Pieces
from tritonnorm.heuristics.common import MAX_WARPS, WARP, RowTile, power_of_two, registers
from tritonnorm.heuristics.rows import BACKWARD_CHUNKS, BACKWARD_STAGES, FORWARD_CHUNKS

STEPS = (0.5, 2)
"""The numbers that are varied are powers of two, and their neighbours half and twice of them; no
further, since what is two steps away has four times as many registers a thread, or a quarter of the
loads in flight."""

BOTH = (
    *((step, 1) for step in STEPS),
    *((1, step) for step in STEPS),
    *((step, step) for step in STEPS),
)
"""Two numbers of which one is changed, or both alike."""

CHUNK_REGISTERS = 128
"""Registers a thread, at most, that rows in several tiles are tried with where none is loaded ahead: two
blocks of 8 warps on an SM, which wait for each other's."""

RESIDENT_AFTER_ALL = 32768
"""Elements, at most, of a tile that is tried where the heuristics have none that is resident: twice what
they hold. What spills is found out by the compiler."""


def _times(number: int, factor: float) -> int:
    return int(number * factor)


def _row_tiles(
    tile: RowTile, n: int, itemsize: int, strided: bool, chunks: Mapping[int, tuple[int, ...]], **_
) -> Iterator[RowTile]:
    """Those of a pass whose rows may be held in so many tiles side by side, by bytes an element."""
    for of_rows, of_warps in BOTH:
        rows, num_warps = _times(tile.rows, of_rows), _times(tile.num_warps, of_warps)
        yield replace(tile, rows=rows, num_warps=num_warps)
    if tile.block_n >= n and not strided:
        if tile.rows == tile.chunks == 1:
            yield from _clusters(tile)
        if tile.num_ctas == 1:
            yield from _in_chunks(tile, n, chunks[itemsize])
    elif tile.block_n < n:
        for of_block, of_warps in BOTH:
            block_n, num_warps = _times(tile.block_n, of_block), _times(tile.num_warps, of_warps)
            yield replace(tile, block_n=block_n, num_warps=num_warps)
        if power_of_two(n) <= RESIDENT_AFTER_ALL:
            yield replace(tile, rows=1, block_n=power_of_two(n), num_warps=MAX_WARPS)


def _row_backward_tiles(tile: RowTile, **arguments) -> Iterator[RowTile]:
    yield from _row_tiles(tile, chunks=BACKWARD_CHUNKS, **arguments)
    for stages in (1, BACKWARD_STAGES):
        yield replace(tile, stages=stages)


def _clusters(tile: RowTile) -> Iterator[RowTile]:
    """The row in more blocks or fewer, of as many warps, or with as many elements a thread."""
    for step in STEPS:
        num_ctas = _times(tile.num_ctas, step)
        yield replace(tile, num_ctas=num_ctas)
        yield replace(tile, num_ctas=num_ctas, num_warps=_times(tile.num_warps, 1 / step))


def _in_chunks(tile: RowTile, n: int, counts: tuple[int, ...]) -> Iterator[RowTile]:
    """The row in other numbers of tiles, with about as many elements a thread, or half of them; of
    several tiles also those that two programs on an SM have, and are not loaded ahead."""
    a_warp = tile.rows * tile.block_n // tile.num_warps
    for count in counts:
        block_n = power_of_two(ceil(n / count)) * count
        as_many = power_of_two(ceil(tile.rows * block_n / a_warp))
        for num_warps in (as_many, 2 * as_many):
            of_count = replace(tile, block_n=block_n, num_warps=num_warps, chunks=count, registers=None)
            yield of_count
            if count > 1:
                yield replace(of_count, stages=1, registers=CHUNK_REGISTERS)


def _programs(programs: int, **_) -> Iterator[int]:
    for factor in (0.25, *STEPS):
        yield _times(programs, factor)


def _group_tiles(
    tile: GroupTile | None, cg: int, s: int, itemsize: int, adjacent: str | None, **_
) -> Iterator[GroupTile | None]:
    """Those of other numbers of groups, of warps, and of tiles side by side, none of which is empty."""

    def of(groups, num_warps, chunks):
        width = power_of_two(ceil(s / chunks))
        chunks = ceil(s / width)
        most = registers(max(num_warps, 1), itemsize)
        return GroupTile(
            groups, power_of_two(groups * cg), chunks * width, num_warps, most, chunks=chunks
        )

    if tile is not None:
        for of_groups, of_warps in BOTH:
            groups, num_warps = _times(tile.groups, of_groups), _times(tile.num_warps, of_warps)
            yield of(groups, num_warps, tile.chunks)
        for step in STEPS if adjacent == "s" else ():
            yield of(tile.groups, tile.num_warps, max(_times(tile.chunks, step), 1))
        yield None
    elif power_of_two(cg) * power_of_two(s) <= RESIDENT_AFTER_ALL:
        yield of(1, MAX_WARPS, 1)


def _pieces(pieces: Pieces, s: int, itemsize: int, over_batch: bool, **_) -> Iterator[Pieces]:
    def of(of_c=1.0, of_s=1.0, of_steps=1.0, of_warps=1.0, of_images=1.0):
        num_warps = _times(pieces.num_warps, of_warps)
        return Pieces(
            _times(pieces.block_c, of_c),
            _times(pieces.block_s, of_s),
            _times(pieces.images, of_images),
            _times(pieces.steps, of_steps),
            num_warps,
            registers(max(num_warps, 1), itemsize),
            pieces.stages,
        )

    for step in STEPS:
        yield replace(pieces, stages=_times(pieces.stages, step))
        yield of(of_warps=step)
        yield of(of_c=step, of_s=1 / step, of_steps=step)  # as many elements of another form
        yield of(of_s=step, of_steps=1 / step)
        yield of(of_s=step, of_steps=1 / step, of_warps=step)
        yield of(of_steps=step)
        if over_batch:
            yield of(of_images=step)


def _teams(preferred: bool, **_) -> Iterator[bool]:
    yield not preferred


NEIGHBOURS = {
    "row_forward": partial(_row_tiles, chunks=FORWARD_CHUNKS),
    "row_backward": _row_backward_tiles,
    "row_programs": _programs,
    "group_forward": _group_tiles,
    "group_backward": _group_tiles,
    "channel_forward": _pieces,
    "channel_backward": _pieces,
    "prefer_teams": _teams,
    "prefer_row_teams": _teams,
}


def _leaves_threads_idle(answer) -> bool:
    """Whether a tile has fewer elements than its program has threads."""
    if isinstance(answer, RowTile):
        return answer.rows * answer.block_n < answer.num_ctas * answer.num_warps * WARP
    if isinstance(answer, GroupTile | Pieces):
        return prod((answer.block_c, answer.block_s)) < answer.num_warps * WARP
    return False


def neighbours(choice: str, arguments: Mapping, chosen) -> list:
    """The legal answers near the one that was chosen, which is not among them, each once. None leaves
    threads without an element."""
    found = []
    for answer in NEIGHBOURS[choice](chosen, **arguments):
        known = answer == chosen or answer in found
        legal = table.flaw(choice, arguments, answer) is None
        if legal and not known and not _leaves_threads_idle(answer):
            found.append(answer)
    return found
