"""Launch choices that were measured: a table for an architecture, which is asked before the heuristics
decide.

A table is a JSON file `tritonnorm/tuned/<arch>.json`, written by `python -m perf tune`. An entry answers
for a heuristic at exactly its arguments, which are sizes, so that what the heuristics promise of the
order of sums holds for entries too: none knows the number of rows or of images, but BatchNorm's. On
another architecture, as with another compiler, the bits may be others. A table is read once, and
nothing is measured while a program runs.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.resources import files
from inspect import signature
from typing import Any, NamedTuple

from ..views import LARGEST_ALIGNMENT
from .channels import (
    GroupTile,
    Pieces,
    channel_backward,
    channel_forward,
    group_backward,
    group_forward,
)
from .common import MAX_WARPS, SM_REGISTERS, WARP, RowTile, power_of_two
from .rows import row_backward, row_forward, row_programs
from .teams import prefer_row_teams, prefer_teams

FOLDER = "tuned"

LARGEST_TILE = 2**20  # elements: Triton's largest tensor
MOST_STAGES = 8
"""Steps under way at once: more would not be computed sooner."""

MOST_PROGRAMS = 65535
"""The largest second dimension of a CUDA grid, along which programs walk through rows."""

Key = tuple[Any, ...]  # the heuristic's name, and its arguments


class Choices:
    """What decides launches on an architecture: the entries of its table and, where it has none, the
    heuristics. Compared by identity: plans belong to the choices that they were made with."""

    def __init__(self, entries: Mapping[Key, Any] | None = None):
        self.entries = dict(entries or {})

    def __call__(self, heuristic: Callable, *arguments):
        """What the heuristic answers, unless there is an entry for it."""
        key = (heuristic.__name__, *arguments)
        return self.entries[key] if key in self.entries else heuristic(*arguments)


class Tunable(NamedTuple):
    """A heuristic that entries may answer for: the class of its answers, None among them if `optional`,
    and why an answer to some arguments is not legal (None if it is)."""

    heuristic: Callable
    kind: type
    flaw: Callable[..., str | None]
    optional: bool = False

    @property
    def arguments(self) -> list[str]:
        return list(signature(self.heuristic).parameters)


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def _tile_flaw(elements: int, num_warps: int, *sizes: int) -> str | None:
    """What no tile of any kernel may be."""
    if not all(map(_is_power_of_two, (num_warps, *sizes))):
        return "sizes and warps are powers of two"
    if num_warps > MAX_WARPS:
        return f"a program has {MAX_WARPS} warps at most"
    if elements > LARGEST_TILE:
        return f"a tile has {LARGEST_TILE} elements at most"
    return None


def _registers_flaw(num_warps: int, registers: int | None) -> str | None:
    if registers is not None and not 0 < registers * num_warps * WARP <= SM_REGISTERS:
        return f"a block has {SM_REGISTERS} registers at most"
    return None


def _stages_flaw(stages: int) -> str | None:
    return None if 1 <= stages <= MOST_STAGES else f"1 to {MOST_STAGES} steps are under way at once"


def _row_flaw(tile: RowTile, n: int, cluster: int, strided: bool, **_) -> str | None:
    if tile.block_n > power_of_two(n):
        return f"a row has {n} elements"
    if tile.chunks < 1 or tile.block_n % tile.chunks or (tile.chunks > 1 and tile.block_n < n):
        return "chunks are tiles of one width, which hold a row"
    if tile.chunks > 1 and (tile.chunks - 1) * tile.block_n // tile.chunks >= n:
        return "no chunk is empty"
    if tile.num_ctas > cluster or (tile.num_ctas > 1 and (tile.block_n < n or strided)):
        return f"a cluster has {cluster} blocks at most, and holds rows of adjacent elements"
    sizes = tile.rows, tile.block_n // tile.chunks, tile.num_ctas
    elements = tile.rows * tile.block_n
    return _tile_flaw(elements, tile.num_warps, *sizes) or _registers_flaw(
        tile.num_warps, tile.registers
    )


def _row_forward_flaw(tile: RowTile, **arguments) -> str | None:
    return "a program takes its rows at once" if tile.stages != 1 else _row_flaw(tile, **arguments)


def _row_backward_flaw(tile: RowTile, **arguments) -> str | None:
    return _row_flaw(tile, **arguments) or _stages_flaw(tile.stages)


def _programs_flaw(programs: int, **_) -> str | None:
    return None if 0 < programs <= MOST_PROGRAMS else f"1 to {MOST_PROGRAMS} programs"


def _group_flaw(tile: GroupTile | None, cg: int, groups: int, s: int, **_) -> str | None:
    if tile is None:  # not resident, whatever the sizes
        return None
    if not 0 < tile.groups <= groups or (cg > 1 and groups % tile.groups):
        return f"an image's {groups} groups do not fill such tiles"
    if tile.chunks < 1 or tile.block_s % tile.chunks:
        return "chunks are tiles of one width"
    width = tile.block_s // tile.chunks
    held = (tile.chunks - 1) * width < s <= tile.block_s and width <= power_of_two(s)
    if tile.block_c != power_of_two(tile.groups * cg) or not held:
        return f"a tile holds its groups of {cg} channels of {s} elements, and no more"
    elements = tile.block_c * tile.block_s
    return _tile_flaw(elements, tile.num_warps, width) or _registers_flaw(tile.num_warps, tile.registers)


def _pieces_flaw(
    pieces: Pieces, n: int, c: int, s: int, over_batch: bool, adjacent: str | None, **_
) -> str | None:
    if not over_batch and (n, pieces.images) != (1, 1):
        return "images that do not share statistics decide nothing: n and images are 1"
    if pieces.images < 1 or pieces.steps < 1:
        return "a piece is not empty"
    if pieces.block_c > power_of_two(c) or (pieces.steps - 1) * pieces.block_s >= s:
        return f"there are {c} channels of {s} elements"
    positions = pieces.steps * pieces.block_s
    if adjacent == "s" and positions < s and positions % min(s & -s, LARGEST_ALIGNMENT):
        return "a piece ends where an access does"
    sizes, elements = (pieces.block_c, pieces.block_s), pieces.block_c * pieces.block_s
    return (
        _tile_flaw(elements, pieces.num_warps, *sizes)
        or _registers_flaw(pieces.num_warps, pieces.registers)
        or _stages_flaw(pieces.stages)
    )


def _no_flaw(*_, **__) -> None:
    return None


TUNABLE = {
    tunable.heuristic.__name__: tunable
    for tunable in (
        Tunable(row_forward, RowTile, _row_forward_flaw),
        Tunable(row_backward, RowTile, _row_backward_flaw),
        Tunable(row_programs, int, _programs_flaw),
        Tunable(group_forward, GroupTile, _group_flaw, optional=True),
        Tunable(group_backward, GroupTile, _group_flaw, optional=True),
        Tunable(channel_forward, Pieces, _pieces_flaw),
        Tunable(channel_backward, Pieces, _pieces_flaw),
        Tunable(prefer_teams, bool, _no_flaw),
        Tunable(prefer_row_teams, bool, _no_flaw),
    )
}
"""What can be tuned. Weight normalization is not: its tensors share launches, and with them choices."""

ARGUMENTS = {
    "itemsize": lambda value: type(value) is int and value in (2, 4, 8),
    "adjacent": lambda value: value in ("s", "c", None),
    "strided": lambda value: type(value) is bool,
    "over_batch": lambda value: type(value) is bool,
    "finer": lambda value: type(value) is bool,
    "backward": lambda value: type(value) is bool,
}
"""What arguments can be; the others are sizes, from 1 on."""


def flaw(name: str, arguments: Mapping[str, Any], value) -> str | None:
    """Why an entry cannot be, in a few words; None if it can."""
    if name not in TUNABLE:
        return f"no such choice (there are {', '.join(TUNABLE)})"
    tunable = TUNABLE[name]
    if list(arguments) != tunable.arguments:
        return f"its arguments are {', '.join(tunable.arguments)}"
    for argument, given in arguments.items():
        known = ARGUMENTS.get(argument, lambda size: type(size) is int and size > 0)
        if not known(given):
            return f"{argument} cannot be {given!r}"
    if value is None and tunable.optional:
        return None
    if type(value) is not tunable.kind:
        return f"{value!r} is no {tunable.kind.__name__}"
    if is_dataclass(value):
        for field in fields(value):
            number = getattr(value, field.name)
            if type(number) is not int and not (number is None and field.name == "registers"):
                return f"{field.name} cannot be {number!r}"
    return tunable.flaw(value, **arguments)


def _value(name: str, given):
    """An entry's value as the heuristic would answer it.

    Raises:
        TypeError: its fields are others.
    """
    kind = TUNABLE[name].kind if name in TUNABLE else None
    return kind(**given) if is_dataclass(kind) and isinstance(given, dict) else given


def read(text: str, arch: str, name: str) -> dict[Key, Any]:
    """The entries of a table.

    Raises:
        ValueError: `text` is no table of this architecture, or an entry is not legal; `name` is the
            file's.
    """
    try:
        table = json.loads(text)
        if table["arch"] != arch:
            raise ValueError(f"it is of {table['arch']!r}")
        entries = list(table["entries"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} is no table of {arch}: {error}") from error
    found = {}
    for entry in entries:
        try:
            choice, arguments = entry["choice"], dict(entry["arguments"])
            value = _value(choice, entry["value"])
            reason = flaw(choice, arguments, value)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
        if reason:
            raise ValueError(f"{name}: {json.dumps(entry)}: {reason}")
        key = (choice, *arguments.values())
        if key in found:
            raise ValueError(f"{name}: {json.dumps(entry)}: there are two entries of these arguments")
        found[key] = value
    return found


@cache
def load(arch: str | None) -> Choices:
    """The choices of an architecture, `sm_90`; of those without a table, and where there is no GPU, the
    heuristics' own.

    Raises:
        ValueError: the table is not legal.
    """
    if arch is None:
        return Choices()
    file = files(__package__.rpartition(".")[0]) / FOLDER / f"{arch}.json"
    return Choices(read(file.read_text(encoding="utf-8"), arch, str(file)) if file.is_file() else None)
