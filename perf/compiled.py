"""Compiling launches for GPUs that are not there, and what is read off the machine code.

Launches are compiled as tritonnorm makes them, instead of run. What tensors hold is never looked at, so
that those of any size take no memory.
"""

import os
import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from math import ceil, prod
from operator import mul
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from tritonnorm import heuristics

from . import assembly, devices
from .assembly import Region
from .launches import ACTIVATIONS, choosing, observe, tensors
from .launches import run as run_case
from .shapes import DTYPES, Case

TARGETS = ("sm_80", "sm_90", "sm_100")

INPUTS = ("x", "dy")

WIDE = 16  # bytes of the widest access that all three targets have

FIRST_ELEMENTS = ("channel_moments", "team_forward")
"""Kernels that read, beside its tiles, the first element of every channel of x, for moments; these take
the whole tiles of a line in a first loop, and what is left of it in a second one."""

SWEEPS = ("row_forward_looped", "row_gradient_means", "team_forward", "team_backward")
"""Kernels whose text loads a tile several times: for sweeps, or in a loop that is unrolled."""

TILE_SIZES = (
    ("BLOCK_C", "BLOCK_S"),
    ("ROWS", "BLOCK_N"),
    ("BLOCK_P", "BLOCK_C"),
    ("BLOCK_P", "BLOCK_N"),
)
"""Parameters that are the sizes of a tile: a kernel has one of these pairs, a team's also a fold's; or
TILES, which are several."""


def _tiles(arguments) -> list[tuple[int, int]]:
    """The tiles that a program may take, that of the longest lines last."""
    if "TILES" in arguments:
        return sorted(arguments["TILES"], key=lambda tile: tile[1])
    sizes = next(pair for pair in TILE_SIZES if all(name in arguments for name in pair))
    rows, columns = (arguments[name] for name in sizes)
    return [(rows, columns * arguments.get("CHUNKS", 1))]


def _line(arguments) -> int:
    """Elements that are adjacent in memory, as far as a program goes along them; 0 in a fold. Of many
    tensors, whose sizes are in a table, what divides all their lines."""
    if arguments.get("table_ptr") is not None:
        return arguments["ALIGN"]
    if "TILES" in arguments:
        return arguments["S"]
    if "ROWS" in arguments:
        return arguments["M" if arguments["ALIGN"] is None else "N"]
    if "ADJACENT" not in arguments:
        return 0
    if arguments["ADJACENT"] == "s":
        return arguments["S"]
    channels = arguments["C"]
    if "GROUPS" in arguments and arguments["GROUPS"] * arguments["CG"] < channels:
        return arguments["GROUPS"] * arguments["CG"]
    return channels


class AbsentDriver:
    """Stands in for Triton's CUDA driver, so that kernels compile for a GPU that is not there."""

    def __init__(self, target: str):
        self.capability = int(target.removeprefix("sm_"))

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability  # a device a target: Triton keeps its compiler by device

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


@dataclass(frozen=True)
class Lowered:
    """One compiled kernel, as a launch of one case."""

    target: str
    kernel: str
    operator: str
    direction: str
    shape: str
    dtype: str
    layout: str  # "contiguous", "channels_last", or the variant of `launches.run`
    tiles: list[tuple[int, int]]  # one; or several, of which a program takes one
    line: int  # elements that are adjacent in memory, which decide how wide an access can be
    num_warps: int  # of each block
    registers: int
    stack: int  # bytes, which nothing but spilled registers needs here
    widths: dict[str, list[int]]  # bytes of each access, by tensor
    num_ctas: int = 1  # blocks of a program: of a cluster
    shared: int = 0  # bytes of shared memory, of each block
    programs: int = 1  # of the launch
    steps: float = 1.0  # tiles that a program takes, one after another, on average
    last_steps: float = 0.0  # of these, tiles at the end of lines that whole ones do not fill
    fold_steps: float = 1.0  # the same of tiles of partial results
    ahead: int = 0  # steps by which a program's loads are ahead of what it computes
    cooperative: bool = False
    turns: float = 1.0  # of a team: units, or rows, that it takes, one after another
    pieces: float = 1.0  # how often a program of a team goes through a loop over tiles
    tensor_bytes: dict[str, int] = field(default_factory=dict)  # sizes, those of all layers as one
    regions: list[Region] = field(default_factory=lambda: [Region()])
    uneven_sums: int = 0  # of lanes, see assembly.py
    instructions: list[float] | None = None  # of a warp, once through each region; None: not counted

    @property
    def tile(self) -> tuple[int, int]:
        """The tile; of several that of the longest lines."""
        return self.tiles[-1]

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def tile_bytes(self) -> int:
        return prod(self.tile) * self.itemsize

    @property
    def threads(self) -> int:
        """Threads that a tile is for."""
        return self.num_ctas * self.num_warps * devices.WARP

    @property
    def blocks(self) -> int:
        """Blocks of the launch."""
        return self.num_ctas * self.programs

    @property
    def activations(self) -> list[str]:
        """The activations that the kernel reads or writes."""
        return [name for name in ACTIVATIONS if name in self.widths]

    @property
    def resident(self) -> int:
        """Blocks that an SM of the target holds."""
        shared = min(device.sm_shared for device in devices.of_target(self.target))
        return devices.resident(self.registers, self.num_warps, self.shared, shared)

    @property
    def bytes_in_flight(self) -> int:
        """Of activations, an SM: a block's part of each tile that is read, in every block that it
        holds."""
        read = sum(name in self.widths for name in INPUTS)
        return self.resident * read * max(self.ahead, 1) * self.tile_bytes // self.num_ctas

    def loops_over(self, name: str) -> list[int]:
        """The regions that are loops over the tiles of an activation. What a loop around such a loop
        accesses of it are single elements."""
        touching = {i for i, region in enumerate(self.regions) if i and name in region.touched}
        around = set()
        for i in touching:
            while (i := self.regions[i].parent) is not None:
                around.add(i)
        return sorted(touching - around)

    @property
    def executions(self) -> list[float]:
        """How often a program goes through each region, on average. A loop over tiles, or over partial
        results, goes once through what its accesses cover. Of the others, a loop around one over tiles
        is a team's over pieces, and one where programs arrive goes through its turns; what is left runs
        as often as what is within it, which is the most it can."""
        a_thread = max(self.tile_bytes / self.threads, self.itemsize)
        loops = {name: self.loops_over(name) for name in ACTIVATIONS}
        steps = dict.fromkeys(range(len(self.regions)), self.steps)
        if self.kernel in FIRST_ELEMENTS:
            steps |= zip(loops["x"][:2], (self.steps - self.last_steps, self.last_steps), strict=False)
        around = {self.regions[i].parent for some in loops.values() for i in some}
        found = [1.0] * len(self.regions)
        for i in reversed(range(1, len(found))):
            touched = self.regions[i].touched
            of_tiles = [touched[name] for name in ACTIVATIONS if i in loops[name]]
            if of_tiles:
                found[i] = steps[i] * a_thread / max(of_tiles)
            elif i in around:
                found[i] = self.pieces
            elif "arrivals" in touched:
                found[i] = self.turns
            elif any(name.endswith("_partial") for name in touched):
                found[i] = self.fold_steps
            else:
                within = [found[j] for j, region in enumerate(self.regions) if region.parent == i]
                found[i] = max(within, default=1.0)
        return found

    @property
    def program_instructions(self) -> float | None:
        """Instructions that each warp of a program executes."""
        if self.instructions is None:
            return None
        return sum(map(mul, self.instructions, self.executions))

    @property
    def sweeps(self) -> dict[str, float]:
        """How often the launch reads or writes each activation: once in each loop over it, but for the
        two that moments share."""
        found = {}
        for name in self.activations:
            if whole := self.tensor_bytes.get(name):
                loops = len(self.loops_over(name))
                if self.kernel in FIRST_ELEMENTS and name == "x" and loops > 1:
                    loops -= 1
                once = self.regions[0].touched.get(name, 0) * self.threads * self.programs / whole
                first = self.kernel in FIRST_ELEMENTS or (self.ahead and name in INPUTS)
                once = 0 if first else min(once, 1)
                found[name] = loops + once if loops else 1
        return found

    @property
    def moved(self) -> float:
        """Bytes of activations that the launch reads and writes, as often as it does."""
        return sum(times * self.tensor_bytes[name] for name, times in self.sweeps.items())

    @property
    def instructions_per_byte(self) -> float | None:
        """Warp instructions of the launch a byte of activations; None of a launch without any."""
        if self.instructions is None or not self.moved:
            return None
        return self.program_instructions * self.num_warps * self.blocks / self.moved

    @property
    def barriers(self) -> float:
        """Barriers that a program waits at."""
        return sum(map(mul, [region.barriers for region in self.regions], self.executions))

    def tile_widths(self, tensor: str) -> list[int]:
        """Bytes of each access to the tiles of a tensor."""
        widths = self.widths.get(tensor, [])
        if self.kernel in FIRST_ELEMENTS and tensor == "x":
            wide = self.tile_bytes // (self.threads * WIDE) * (1 + self.ahead)
            widths = sorted(widths, reverse=True)[: max(wide, 1)]
        return widths

    @property
    def violations(self) -> list[str]:
        """Which of the gates 1 to 3 this kernel fails: spills, narrow accesses, more than one read."""
        return [f"spills: {self.stack} bytes of stack"] * (self.stack > 0) + self.misread

    @property
    def misread(self) -> list[str]:
        """Which of the gates 2 and 3 it fails, from which nothing is exempt."""
        found = []
        for tensor in self.activations:
            if self.line * self.itemsize % WIDE:
                continue
            widths = self.tile_widths(tensor)
            if not widths:
                found.append(f"{tensor}: no access found")
                continue
            if min(widths) < WIDE:
                found.append(f"{tensor}: accesses of {min(widths)} bytes")
            touched = sum(widths) * self.threads
            if tensor in INPUTS:  # ahead of the loop and in it
                touched //= 1 + self.ahead
            held = sum(map(prod, self.tiles)) * self.itemsize
            if touched != held and self.kernel not in SWEEPS:
                found.append(f"{tensor}: touches {touched} bytes of a tile of {held}")
        return found


def _steps(arguments, programs: int, xs) -> float:
    """Tiles that a program takes, those that stand over the tensor's edge as whole ones."""
    if "ROWS" in arguments:
        ((rows, columns),) = _tiles(arguments)
        total = ceil(arguments["M"] / rows) * ceil(arguments["N"] / columns)
    elif "GROUPS" in arguments:
        groups = arguments["C"] // arguments["CG"]
        total = arguments["N"] * ceil(groups / arguments["GROUPS"])
    elif "BLOCK_S" in arguments and arguments.get("table_ptr") is None:
        across = ceil(arguments["C"] / arguments["BLOCK_C"])
        total = arguments["N"] * across * ceil(arguments["S"] / arguments["BLOCK_S"])
    elif "TILES" in arguments:
        total = programs
    else:
        total = sum(x.numel() for x in xs) / prod(_tiles(arguments)[-1])
    return total / programs


def _last_steps(arguments, programs: int) -> float:
    """Of the tiles that a program takes, those at the end of lines that whole tiles do not fill."""
    if "BLOCK_S" not in arguments or arguments["S"] % arguments["BLOCK_S"] == 0:
        return 0.0
    return arguments["N"] * ceil(arguments["C"] / arguments["BLOCK_C"]) / programs


def _turns(arguments, programs: int) -> tuple[float, float]:
    """Units or rows that a team takes, one after another; and how often its programs go through a loop
    over tiles, of pieces or of the rows of a walk."""
    if "UNITS" in arguments:
        turns = arguments["UNITS"] / (programs / arguments["WIDTH"])
        return turns, turns * arguments["MEMBERS"] / arguments["WIDTH"]
    if "arrivals_ptr" in arguments:
        teams = programs / ceil(arguments["N"] / arguments["BLOCK_N"])
        return arguments["M"] / teams, arguments.get("WALKS", teams) / teams
    return 1.0, 1.0


def _fold_steps(arguments, turns: float, partials) -> float:
    """Tiles of partial results that a program adds up, of a team that with the most folds."""
    of_rows = "arrivals_ptr" in arguments and "UNITS" not in arguments  # who fold in no loop
    if "BLOCK_P" not in arguments or not partials or of_rows:
        return 1.0
    pieces = arguments.get("PIECES") or partials[0].shape[0]
    columns = arguments.get("FOLD_C", arguments.get("BLOCK_C"))
    across = ceil(arguments["CG"] / columns) if arguments.get("ONE_SET") else 1
    folds = 1
    if "UNITS" in arguments:
        channels = min(arguments["BLOCKS"] * arguments["BLOCK_C"], arguments["C"])
        folds = ceil(
            ceil(channels / (arguments["CG"] if arguments["ONE_SET"] else columns)) / arguments["WIDTH"]
        )
    return ceil(pieces / arguments["BLOCK_P"]) * across * folds * turns


def operands_of(kernel, arguments) -> list[tuple[str, Any]]:
    """What a compiled kernel takes, by the parameters' names: Triton leaves out what is constexpr, None
    or, unless it is told not to, the integer 1, and flattens tuples."""

    def specializes(parameter) -> bool:
        return not (parameter.do_not_specialize or parameter.annotation_type)

    def flat(value, specialized: bool):
        if isinstance(value, tuple):
            return [item for member in value for item in flat(member, specialized=True)]
        return [] if value is None or (specialized and type(value) is int and value == 1) else [value]

    return [
        (parameter.name, item)
        for parameter in kernel.params
        if not parameter.is_constexpr
        for item in flat(arguments.get(parameter.name), specializes(parameter))
    ]


def inspect(kernel, grid, arguments, compiled, case: Case, target: str, variant: str | None) -> Lowered:
    """Reads a compiled kernel."""
    operands = enumerate(operands_of(kernel, arguments))
    pointers = {
        position: name.removesuffix("_ptr")
        for position, (name, value) in operands
        if isinstance(value, torch.Tensor)
    }
    usage = assembly.on_cubin("cuobjdump", "-res-usage", compiled.asm["cubin"])
    widths, regions = assembly.read_ptx(compiled.asm["ptx"], pointers)

    programs = prod(grid)
    turns, pieces = _turns(arguments, programs)
    named = defaultdict(list)
    for name, tensor in tensors(arguments).items():
        named[name.partition("[")[0]].append(tensor)  # x of x[0], a layer's
    return Lowered(
        target=target,
        kernel=kernel.__name__,
        operator=case.operator,
        direction=case.direction,
        shape=case.name,
        dtype=case.dtype,
        layout=case.layout if variant in (None, "team") else variant,
        tiles=_tiles(arguments),
        line=_line(arguments),
        num_warps=arguments["num_warps"],
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        widths=widths,
        num_ctas=arguments.get("num_ctas", 1),
        shared=compiled.metadata.shared,
        programs=programs,
        steps=_steps(arguments, programs, named["x"]),
        last_steps=_last_steps(arguments, programs) if kernel.__name__ in FIRST_ELEMENTS else 0.0,
        fold_steps=_fold_steps(
            arguments, turns, [t[0] for n, t in named.items() if n.endswith("_partial")]
        ),
        ahead=arguments.get("STAGES", 1) - 1,
        cooperative=arguments.get("launch_cooperative_grid", False),
        turns=turns,
        pieces=pieces,
        tensor_bytes={name: sum(t.nbytes for t in some) for name, some in named.items()},
        regions=regions,
        uneven_sums=assembly.uneven_sums(compiled.asm["ptx"]),
    )


def _instructions(cubin: bytes, regions: list[Region]) -> list[float] | None:
    """Instructions of SASS of each region. A loop that the assembler unrolled has the accesses of
    several passes. None where it has made other loops."""
    instructions, accesses = assembly.read_sass(assembly.disassemble(cubin))
    if len(instructions) != len(regions):
        return None
    unrolled = [
        max(round(found / region.accesses), 1) if region.accesses else 1
        for found, region in zip(accesses, regions, strict=True)
    ]
    return [count / times for count, times in zip(instructions, [1, *unrolled[1:]], strict=True)]


def lower(target: str, chosen, instructions: bool = False, choices=None) -> list[list[Lowered]]:
    """Compiles the launches of each (case, variant) for a target, in a process that will run no kernel.
    `choices` decide them, if given in place of the target's table and the heuristics.

    `instructions` counts them as well, which takes the disassembler half a second a kernel.
    """
    found, counts = [], {}

    def compile_and_inspect(kernel, grid, arguments):
        compiled = kernel.warmup(grid=grid, **arguments)
        k = inspect(kernel, grid, arguments, compiled, case, target, variant)
        if instructions:
            counts[len(found), len(launches)] = pool.submit(
                _instructions, compiled.asm["cubin"], k.regions
            )
        launches.append(k)

    triton.runtime.driver.set_active(AbsentDriver(target))
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        observe(compile_and_inspect),
        choosing(choices or heuristics.table.load(target)),
        torch.device("meta"),  # tensors without memory
    ):
        for case, variant in chosen:
            launches = []
            run_case(case, variant)
            found.append(launches)
    for (i, j), count in counts.items():
        found[i][j] = replace(found[i][j], instructions=count.result())
    return found
