"""What the compiler makes of the launch choices, for GPUs that are not there.

Launches are compiled as tritonnorm makes them, instead of run, and PTX and SASS are read:
registers, spills, the width of every access to every tensor, bytes read. Necessary conditions for
speed, not a measurement of it.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from tritonnorm import heuristics
from tritonnorm.launch.common import TRITON_VERSION

from .launches import ACTIVATIONS, H100, choosing, in_cluster, observe
from .launches import run as run_case
from .shapes import (
    BRIEF_OPERATORS,
    BRIEF_SIZES,
    DTYPES,
    PASSES,
    ROW_OPERATORS,
    Case,
    layouts_of,
)

TARGETS = ("sm_80", "sm_90", "sm_100")
SIZES = tuple(2**k for k in range(17))
"""Row lengths: every power of two is a tile of its own as long as rows are resident; 65,536 is longer
than any that is."""

CLUSTER_SIZES = tuple(2**k for k in range(13, 19))
"""Every power of two that a cluster holds, of one dtype and pass or another."""

CLUSTER_ODD_SIZES = (20000, 20001)
"""Not powers of two: whose masks must not narrow accesses, and whose elements take an address each."""

ODD_SIZES = (48, 768, 1000, 3072, 5120)
"""Not powers of two, rows of a multiple of 16 bytes: masks and row steps must not narrow accesses."""

NARROW_SIZES = (127, 1001, 5124)
"""Rows that no wide access reaches, as several tiles or one."""

GROUPS = 32
CHANNEL_SHAPES = {
    "group_norm": ((1, 320, 64, 64), (1, 1280, 8, 8), (1, 640, 16, 16), (1, 320, 32, 32)),
    "instance_norm": ((1, 64, 64, 64), (2, 64, 16, 16), (2, 64, 4, 8), (1, 32, 128, 128)),
    "batch_norm": ((4, 64, 32, 32), (2, 256, 28, 28), (8, 512, 8, 8), (32, 64)),
    "batch_norm_eval": ((4, 64, 32, 32),),
}
"""Small batches whose sets are resident, or in pieces, with and without padding. The number of images
does not reach the code, but for BatchNorm."""

TEAM_SHAPES = {"group_norm": ((1, 320, 64, 64),), "batch_norm": ((4, 64, 64, 64),)}
"""The same for teams: sets of one channel, and of several."""

TEAM_ROWS = (
    *(("layer_norm", dtype, 65536, PASSES, "team") for dtype in ("bf16", "fp32", "fp64")),
    ("layer_norm", "bf16", 20000, PASSES, "team"),
    ("rms_norm", "bf16", 65536, PASSES, "team"),
    ("layer_norm", "bf16", 65536, ("backward",), "team output"),
)
"""The same for rows: one slab for all lengths, masked or not."""

WEIGHT_SIZES = tuple(2**k for k in range(15))
"""Elements of a channel: every power of two is a tile of its own as long as channels are resident."""

WEIGHT_ODD_SIZES = (27, 255, 511, 4095)
"""Channels that are no multiple of 16 bytes, as of 3x3 on 3 colours: narrow accesses, and the registers
of as many addresses."""

WEIGHT_PIECES = {"weight_norm_dim1": ((512, 256), (64, 128, 256)), "weight_norm_all": ((512, 512),)}
"""Weights whose channels no program holds: side by side in memory, or with adjacent elements."""

LAYERS = (11, 64, 8192)
"""A stack whose channels, halved from layer to layer, have every tile from 8,192 down to 8 elements."""

ROWS = 64
"""The number of rows. The code knows of it, in strided rows alone, whether it divides by 16."""

WIDE = 16  # bytes of the widest access that all three targets have


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
    """One compiled kernel, for one case."""

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
    num_ctas: int  # blocks of a cluster
    registers: int
    stack: int  # bytes, which nothing but spilled registers needs here
    widths: dict[str, list[int]]  # bytes of each access, by tensor
    bytes_in_flight: int  # of activations, an SM: a block's part of each tile read, times occupancy
    instructions_per_byte: float | None = None  # warp instructions a byte of activations

    @property
    def tile(self) -> tuple[int, int]:
        """The tile; of several that of the longest lines."""
        return self.tiles[-1]

    @property
    def threads(self) -> int:
        """Threads that a tile is for."""
        return self.num_ctas * self.num_warps * heuristics.common.WARP

    @property
    def tile_bytes(self) -> int:
        return prod(self.tile) * DTYPES[self.dtype].itemsize

    def tile_widths(self, tensor: str) -> list[int]:
        """Bytes of each access to the tiles of a tensor."""
        widths = self.widths.get(tensor, [])
        if self.kernel in FIRST_ELEMENTS and tensor == "x":
            wide = self.tile_bytes // (self.threads * WIDE)
            widths = sorted(widths, reverse=True)[: max(wide, 1)]
        return widths

    @property
    def violations(self) -> list[str]:
        """Which of the gates this kernel fails: spills, narrow accesses, more than one read."""
        found = []
        if self.stack:
            found.append(f"spills: {self.stack} bytes of stack")
        for tensor in ACTIVATIONS:
            if tensor not in self.widths or self.line * DTYPES[self.dtype].itemsize % WIDE:
                continue
            widths = self.tile_widths(tensor)
            if not widths:
                found.append(f"{tensor}: no access found")
                continue
            if min(widths) < WIDE:
                found.append(f"{tensor}: accesses of {min(widths)} bytes")
            touched = sum(widths) * self.threads
            held = sum(map(prod, self.tiles)) * DTYPES[self.dtype].itemsize
            if touched != held and self.kernel not in SWEEPS:
                found.append(f"{tensor}: touches {touched} bytes of a tile of {held}")
        return found


FIRST_ELEMENTS = ("channel_moments", "team_forward")
"""Kernels that read, beside its tiles, the first element of every channel of x."""

SWEEPS = ("row_forward_looped", "row_gradient_means", "team_forward", "team_backward")
"""Kernels whose text loads a tile several times: for sweeps, or in a loop that is unrolled."""


ACCESS = r"(?:ld|st|atom)[\w.:]*?\.global(?:[\w.:]*?\.v(\d)|[\w.:]*?)\.[bfus](\d+)\s(.*)"
"""A load, store or atomic of PTX: vector length, bits, operands; with any cache hints between."""


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _access_widths(ptx: str, pointers: dict[int, str]) -> dict[str, list[int]]:
    """Bytes of every global access in PTX, by the tensor it goes to.

    `pointers` names the kernel's parameters that are pointers. An address is traced back through the
    instructions that made it to the one pointer among the parameters.
    """
    sources = defaultdict(list)  # register -> the instructions that write it
    accesses = []
    for line in ptx.splitlines():
        text = line.split("//")[0].strip().rstrip(";")
        text = re.sub(r"^@!?%p\d+\s+", "", text)
        if access := re.match(ACCESS, text):
            address = re.search(r"\[\s*(%\w+)", access[3])
            accesses.append((address[1], int(access[1] or 1) * int(access[2]) // 8))
        elif re.match(r"(ld|st|red|atom|cp)\S*\.global", text):
            raise ValueError(f"an access of a kind that is not counted: {text}")
        elif match := re.match(r"ld\.param\S*\s+(%\w+),\s*\[\w+_param_(\d+)", text):
            sources[match[1]].append(int(match[2]))
        elif match := re.match(r"[a-z][\w.:]*\s+(%\w+),\s*(.*)", text):
            sources[match[1]].append(re.findall(r"%[a-z]+\d+", match[2]))

    widths = {name: [] for name in pointers.values()}
    for register, size in accesses:
        seen, waiting, names = set(), [register], set()
        while waiting:
            current = waiting.pop()
            if current in seen:
                continue
            seen.add(current)
            for source in sources[current]:
                if isinstance(source, int):
                    names |= {pointers[source]} if source in pointers else set()
                else:
                    waiting += source
        (name,) = names
        widths[name].append(size)
    return widths


def _instructions(cubin: bytes) -> int:
    """Instructions of the longest loop of a kernel, or of all of it where there is none."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = _tool("cuobjdump", "-sass", file.name)
    found = re.findall(r"^\s+/\*([0-9a-f]+)\*/\s+(?!NOP)(\S.*);", sass, re.MULTILINE)
    position = {int(address, 16): i for i, (address, _) in enumerate(found)}
    longest = 0
    for i, (_, instruction) in enumerate(found):
        if branch := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", instruction):
            target = position.get(int(branch[1], 16), i)
            if target < i:  # a branch to itself only pads the end
                longest = max(longest, i + 1 - target)
    return longest or len(found)


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


def inspect(kernel, arguments, compiled, case: Case, target: str, variant: str | None) -> Lowered:
    """Reads a compiled kernel."""
    # Triton leaves constexpr and None arguments out of the signature, and flattens tuples.
    pointers, position = {}, 0
    for parameter in kernel.params:
        value = arguments.get(parameter.name)
        if parameter.is_constexpr or value is None:
            continue
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, torch.Tensor):
                pointers[position] = parameter.name.removesuffix("_ptr")
            if isinstance(item, torch.Tensor) or item != 1 or parameter.do_not_specialize:
                position += 1
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    widths = _access_widths(compiled.asm["ptx"], pointers)

    warps, ctas = arguments["num_warps"], arguments.get("num_ctas", 1)
    block_registers = -(-registers // 8) * 8 * heuristics.common.WARP * warps
    blocks = min(heuristics.common.SM_REGISTERS // block_registers, 64 // warps, 32)
    tiles = _tiles(arguments)
    tile_bytes = prod(tiles[-1]) * case.itemsize
    loads = sum(name in widths for name in ("x", "dy"))
    return Lowered(
        target=target,
        kernel=kernel.__name__,
        operator=case.operator,
        direction=case.direction,
        shape=case.name,
        dtype=case.dtype,
        layout=case.layout if variant in (None, "team") else variant,
        tiles=tiles,
        line=_line(arguments),
        num_warps=warps,
        num_ctas=ctas,
        registers=registers,
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        widths=widths,
        bytes_in_flight=blocks * loads * tile_bytes // ctas,
    )


def cases(target: str, brief: bool = False) -> list[tuple[Case, str | None]]:
    """(case, variant) of rows, of channels and of weights, as `launches.run` takes them. float16 is
    lowered as bfloat16 is."""
    rows = row_cases(brief) + cluster_cases(target, brief)
    return rows + channel_cases(brief) + weight_cases(brief)


def channel_cases(brief: bool = False) -> list[tuple[Case, str | None]]:
    """Both layouts and passes of CHANNEL_SHAPES, float64 of the first two of each operator; and of
    TEAM_SHAPES, whose sets are taken by teams."""

    def of(shapes, dtypes):
        return [
            Case(operator, direction, shape, dtype, layout, GROUPS if operator == "group_norm" else None)
            for operator in shapes
            for shape in (shapes[operator][:1] if brief else shapes[operator])
            for dtype in dtypes
            if dtype != "fp64" or shape in shapes[operator][:2]
            for layout in layouts_of(operator, shape)
            for direction in PASSES
        ]

    if brief:
        return [(case, None) for case in of(CHANNEL_SHAPES, ("bf16",))]
    return [(case, None) for case in of(CHANNEL_SHAPES, ("bf16", "fp32", "fp64"))] + [
        (case, "team") for case in of(TEAM_SHAPES, ("bf16", "fp32"))
    ]


def weight_cases(brief: bool = False) -> list[tuple[Case, str | None]]:
    """Every tile of resident channels: alone in bfloat16, and all in a launch in bfloat16 and float32. A
    few more of float32 and float64, odd sizes, and pieces."""

    def of(shapes, dtype, variant=None):
        return [
            (Case(operator, direction, shape, dtype), variant)
            for operator in shapes
            for shape in shapes[operator]
            for direction in PASSES
        ]

    def rows(*lengths):
        return {"weight_norm": [(ROWS, n) for n in lengths]}

    if brief:
        return of(rows(1024, 8192) | WEIGHT_PIECES, "bf16")
    across = {"weight_norm_dim1": WEIGHT_PIECES["weight_norm_dim1"][:1]}
    return [
        *of(rows(*WEIGHT_SIZES, *WEIGHT_ODD_SIZES) | WEIGHT_PIECES, "bf16"),
        *of(rows(1, 255, 4096) | across, "fp32"),
        *of(rows(1024) | across, "fp64"),
        *of({"weight_norms": [LAYERS]}, "bf16", "halved"),
        *of({"weight_norms": [LAYERS]}, "fp32", "halved"),
    ]


def row_cases(brief: bool = False) -> list[tuple[Case, str | None]]:
    """Every tile of the heuristics, resident, looped, split and of teams. LayerNorm with weight and bias
    holds the most, and is compiled for every length and width and for strided rows; the others for
    adjacent elements in bfloat16 of BRIEF_SIZES, among which are the longest of each kind. Some of
    RMSNorm as models round it, and of backward passes from the output."""
    chosen = []
    for operator in BRIEF_OPERATORS if brief else ROW_OPERATORS:
        every = operator == "layer_norm" and not brief
        sizes = SIZES + ODD_SIZES + NARROW_SIZES if every else BRIEF_SIZES
        for direction in PASSES:
            for dtype in ("bf16", "fp32", "fp64") if every else ("bf16",):
                chosen += [(Case(operator, direction, (ROWS, n), dtype), None) for n in sizes]
                if every:
                    tiles, choose = {}, getattr(heuristics.rows, f"row_{direction}")
                    for n in SIZES[1:]:  # a row of one element has no step within it
                        tile = choose(n, DTYPES[dtype].itemsize, strided=True)
                        tiles.setdefault((tile, tile.block_n < n), n)
                    chosen += [
                        (Case(operator, direction, (ROWS, n), dtype), "strided") for n in tiles.values()
                    ]
    if not brief:
        for n in (1024, 65536):
            chosen += [
                (Case("rms_norm", direction, (ROWS, n), "bf16"), "rounded") for direction in PASSES
            ]
        chosen += [
            (Case("layer_norm", "backward", (ROWS, n), dtype), "output")
            for dtype in ("bf16", "fp32")
            for n in (128, 1000, 8192, 65536)
        ]
        chosen += [
            (Case(operator, direction, (ROWS, n), dtype), variant)
            for operator, dtype, n, directions, variant in TEAM_ROWS
            for direction in directions
        ]
    return chosen


def cluster_cases(target: str, brief: bool = False) -> list[tuple[Case, str | None]]:
    """Every tile of clusters, where the target and this Triton have them: the rows that `row_cases` has
    looped and split."""
    device = replace(H100, capability=divmod(AbsentDriver(target).capability, 10))
    largest = heuristics.rows.largest_cluster(device, TRITON_VERSION)
    if largest == 1:
        return []

    def of(operator, dtype, sizes, passes=PASSES, variant="cluster"):
        chosen = [Case(operator, direction, (ROWS, n), dtype) for direction in passes for n in sizes]
        return [(case, variant) for case in chosen if in_cluster(case, largest)]

    if brief:
        return [case for operator in BRIEF_OPERATORS for case in of(operator, "bf16", BRIEF_SIZES)]
    return [
        *of("layer_norm", "bf16", CLUSTER_SIZES + CLUSTER_ODD_SIZES),
        *of("layer_norm", "fp32", CLUSTER_SIZES + CLUSTER_ODD_SIZES),
        *of("layer_norm", "fp64", CLUSTER_SIZES),
        *of("rms_norm", "bf16", CLUSTER_SIZES[2::2]),
        *of("normalize", "bf16", CLUSTER_SIZES[2::2]),
        *of("layer_norm", "bf16", CLUSTER_SIZES[2::2], ("backward",), "cluster output"),
    ]


def lower(target: str, chosen, instructions: bool = False, choices=None) -> list[Lowered]:
    """Compiles the launches of the chosen cases for a target, in a process that will run no kernel.
    `choices` decide them, if given in place of the target's table and the heuristics.

    `instructions` counts them as well, which takes the disassembler half a second a kernel.
    """
    found, counts = [], []

    def compile_and_inspect(kernel, grid, arguments):
        compiled = kernel.warmup(grid=grid, **arguments)
        found.append(inspect(kernel, arguments, compiled, case, target, variant))
        if instructions:
            counts.append(disassemblers.submit(_instructions, compiled.asm["cubin"]))

    triton.runtime.driver.set_active(AbsentDriver(target))
    choices = choices or heuristics.table.load(target)
    with (
        ThreadPoolExecutor(os.cpu_count()) as disassemblers,
        observe(compile_and_inspect),
        choosing(choices),
    ):
        for case, variant in chosen:
            run_case(case, variant)
    if instructions:
        for i, count in enumerate(counts):
            k = found[i]
            if moved := k.tile_bytes * sum(name in k.widths for name in ACTIVATIONS):
                warps = k.num_warps * k.num_ctas
                found[i] = replace(k, instructions_per_byte=count.result() * warps / moved)
    return found


def table(lowered: list[Lowered]) -> str:
    """One line a kernel. Warps are those of each block (CTA) of a program. Spill is in bytes; width is
    the narrowest access to an activation, in bits; KB in flight are an SM's, as far as registers and
    warps limit them."""
    lines = [
        f"{'operator':<15} {'pass':<8} {'dtype':<5} {'shape':>12} {'layout':<13} {'kernel':<24} "
        f"{'tile':>8} {'CTAs':>4} {'warps':>5} {'regs':>4} {'spill':>5} {'width':>5} "
        f"{'KB in flight':>12}" + (" instr/B" if lowered[0].instructions_per_byte else "")
    ]
    for k in lowered:
        width = min((w for name in ACTIVATIONS for w in k.tile_widths(name)), default=0) * 8
        tile = f"{k.tile[0]}x{k.tile[1]}"
        lines.append(
            f"{k.operator:<15} {k.direction:<8} {k.dtype:<5} {k.shape:>12} {k.layout:<13} "
            f"{k.kernel:<24} {tile:>8} {k.num_ctas:>4} {k.num_warps:>5} {k.registers:>4} {k.stack:>5} "
            f"{width:>5} {k.bytes_in_flight / 1024:>12.0f}"
            + (f" {k.instructions_per_byte:>7.3f}" if k.instructions_per_byte else "")
            + ("  <- " + "; ".join(k.violations) if k.violations else "")
        )
    return "\n".join(lines)


def add_arguments(parser):
    parser.add_argument("--target", choices=TARGETS, help="one target (default: sm_90)")
    parser.add_argument("--all", action="store_true", help="every target")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES], help="inputs of these (default: all)"
    )
    parser.add_argument("--brief", action="store_true", help="fewer operators and sizes, bfloat16")
    parser.add_argument(
        "--gate", action="store_true", help="end with status 1 on spills or narrow accesses"
    )
    parser.add_argument(
        "--instructions", action="store_true", help="count them a byte too (half a second a kernel)"
    )
    parser.add_argument("--json", action="store_true", help="records instead of a table")


def run(arguments) -> int:
    targets = TARGETS if arguments.all else (arguments.target or "sm_90",)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("lowering: the interpreter compiles nothing; unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    found = {}
    for target in targets:
        chosen = [one for one in cases(target, arguments.brief) if one[0].dtype in arguments.dtypes]
        found[target] = lower(target, chosen, arguments.instructions)
    records = [k for lowered in found.values() for k in lowered]
    if arguments.json:
        print(json.dumps([asdict(k) | {"violations": k.violations} for k in records]))
    else:
        for target, lowered in found.items():
            print(f"{target}, compiled with Triton {triton.__version__}; nothing was run")
            print(table(lowered), end="\n\n")
        failing = sum(bool(k.violations) for k in records)
        print(f"{len(records)} kernels, {failing} that spill, access narrowly or read twice")
    return int(arguments.gate and any(k.violations for k in records))
