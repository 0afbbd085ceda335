"""What the compiler makes of the launch choices, for GPUs that are not there.

PTX and SASS of every launch are read: registers, spills, the width of every access to every tensor,
bytes read. Then the time is predicted that passes of the benchmark's size should take. Necessary
conditions for speed, not a measurement of it.
"""

import json
import os
import sys
from dataclasses import asdict

import triton

from tritonnorm import heuristics
from tritonnorm.launch.common import TRITON_VERSION

from . import devices, gates, predict
from .compiled import TARGETS, Lowered, lower
from .launches import in_cluster
from .shapes import (
    BRIEF_OPERATORS,
    BRIEF_SIZES,
    DTYPES,
    PASSES,
    ROW_OPERATORS,
    Case,
    layouts_of,
)

SIZES = tuple(2**k for k in range(17))
"""Row lengths: every power of two is a tile of its own as long as rows are resident; 65,536 is longer
than any that is."""

CLUSTER_SIZES = tuple(2**k for k in range(13, 19))
"""Every power of two that a cluster holds, of one dtype and pass or another."""

CLUSTER_ODD_SIZES = (20000, 20001)
"""Not powers of two: whose masks must not narrow accesses, and whose elements take an address each."""

ODD_SIZES = (48, 768, 1000, 1280, 3072, 5120)
"""Not powers of two, rows of a multiple of 16 bytes: masks and row steps must not narrow accesses."""

NARROW_SIZES = (127, 1001, 5121, 5124)
"""Rows that no wide access reaches, as several tiles or one."""

OUTPUT_SIZES = (127, 128, 1000, 1001, 1280, 3072, 5120, 8192, 65536)
"""Rows whose backward pass starts from the output: of each kind, those that would otherwise be several
tiles among them."""

GROUPS = 32
CHANNEL_SHAPES = {
    "group_norm": (
        *((1, 320, 64, 64), (1, 1280, 8, 8), (1, 640, 16, 16), (1, 320, 32, 32)),
        *((1, 2048, 7, 7), (1, 512, 28, 28)),
        *((1, 96, 8, 8), (1, 160, 5, 5), (1, 128, 7, 7), (1, 1280, 11, 11)),
    ),
    "instance_norm": (
        *((1, 64, 64, 64), (2, 64, 16, 16), (2, 64, 4, 8), (1, 32, 128, 128)),
        *((2, 64, 7, 7), (2, 64, 14, 14)),
    ),
    "batch_norm": (
        *((4, 64, 32, 32), (2, 256, 28, 28), (8, 512, 8, 8), (32, 64)),
        *((32, 512, 7, 7), (256, 512, 14, 14)),
    ),
    "batch_norm_eval": ((4, 64, 32, 32), (32, 512, 7, 7)),
}
"""Small batches whose sets are resident, or in pieces, with and without padding, in wide accesses and
narrow ones; the last ones of GroupNorm with several groups a tile, and the narrow one of 32 warps. The
number of images does not reach the code, but for BatchNorm: images of 7 x 7, and of 14 x 14 in 16 bits,
are columns, and the larger batch has a fold's largest tile. Its lines of float32 are whole words, but no
multiple of 16 elements."""

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


def cases(target: str, brief: bool = False) -> list[tuple[Case, str | None]]:
    """(case, variant) of rows, of channels and of weights, as `launches.run` takes them."""
    rows = row_cases(brief) + cluster_cases(target, brief)
    return rows + channel_cases(brief) + weight_cases(brief)


def channel_cases(brief: bool = False) -> list[tuple[Case, str | None]]:
    """Both layouts and passes of CHANNEL_SHAPES, float16 and float64 of the first two of each operator;
    and of TEAM_SHAPES, whose sets are taken by teams."""

    def of(shapes, dtypes):
        return [
            Case(operator, direction, shape, dtype, layout, GROUPS if operator == "group_norm" else None)
            for operator in shapes
            for shape in (shapes[operator][:1] if brief else shapes[operator])
            for dtype in dtypes
            if dtype not in ("fp16", "fp64") or shape in shapes[operator][:2]
            for layout in layouts_of(operator, shape)
            for direction in PASSES
        ]

    if brief:
        return [(case, None) for case in of(CHANNEL_SHAPES, ("bf16",))]
    return [(case, None) for case in of(CHANNEL_SHAPES, tuple(DTYPES))] + [
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
    holds the most, and is compiled for every length and dtype and for strided rows; the others for
    adjacent elements of 16 bits of BRIEF_SIZES, among which are the longest of each kind. Some of
    RMSNorm as models round it, and of backward passes from the output."""
    chosen = []
    for operator in BRIEF_OPERATORS if brief else ROW_OPERATORS:
        every = operator == "layer_norm" and not brief
        sizes = SIZES + ODD_SIZES + NARROW_SIZES if every else BRIEF_SIZES
        for direction in PASSES:
            for dtype in DTYPES if every else ("bf16",) if brief else ("bf16", "fp16"):
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
            for n in OUTPUT_SIZES
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
    device = devices.of_target(target)[0]
    largest = heuristics.rows.largest_cluster(device.facts, TRITON_VERSION)
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


def table(lowered: list[Lowered]) -> str:
    """One line a kernel. Warps are those of each block (CTA) of a program. Spill is in bytes; width is
    the narrowest access to an activation, in bits; KB in flight are an SM's, as far as registers, warps
    and shared memory limit them."""
    lines = [
        f"{'operator':<15} {'pass':<8} {'dtype':<5} {'shape':>12} {'layout':<13} {'kernel':<24} "
        f"{'tile':>8} {'CTAs':>4} {'warps':>5} {'regs':>4} {'spill':>5} {'width':>5} "
        f"{'KB in flight':>12}" + (" instr/B" if any(k.instructions for k in lowered) else "")
    ]
    for k in lowered:
        width = min((w for name in k.activations for w in k.tile_widths(name)), default=0) * 8
        tile = f"{k.tile[0]}x{k.tile[1]}"
        lines.append(
            f"{k.operator:<15} {k.direction:<8} {k.dtype:<5} {k.shape:>12} {k.layout:<13} "
            f"{k.kernel:<24} {tile:>8} {k.num_ctas:>4} {k.num_warps:>5} {k.registers:>4} {k.stack:>5} "
            f"{width:>5} {k.bytes_in_flight / 1024:>12.0f}"
            + (f" {k.instructions_per_byte:>7.3f}" if k.instructions_per_byte else "")
            + ("  <- " + "; ".join(k.violations) if k.violations else "")
        )
    return "\n".join(lines)


def misses(k: Lowered) -> list[tuple[gates.Miss, str]]:
    """The gates that a kernel misses, with a line each."""
    what = f"{k.target} {k.operator} {k.direction} {k.shape} {k.layout} {k.dtype} {k.kernel}"
    return [(miss, miss.line(what)) for miss in gates.missed(gates.OF_KERNELS, k)]


def summary(missed: list[gates.Miss]) -> str:
    """How often each gate is missed."""
    names = [gate.name for gate in gates.OF_KERNELS + gates.OF_LAUNCHES]
    counts = [(name, [miss for miss in missed if miss.gate.name == name]) for name in names]
    return "; ".join(
        f"gate {name}: {len(some)} missed, {sum(miss.fails for miss in some)} fail"
        for name, some in counts
    )


def add_arguments(parser):
    parser.add_argument("--target", choices=TARGETS, help="one target (default: sm_90)")
    parser.add_argument("--all", action="store_true", help="every target")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES], help="inputs of these (default: all)"
    )
    parser.add_argument(
        "--brief", action="store_true", help="fewer operators and sizes, bfloat16; misses counted"
    )
    parser.add_argument(
        "--gate",
        action="store_true",
        help="end with status 1 on spills, narrow accesses, an enforced gate that is missed, or an "
        "exemption that nothing needs",
    )
    parser.add_argument(
        "--instructions",
        action="store_true",
        help="count them a byte too, for the few rows that are compiled for (half a second a kernel)",
    )
    parser.add_argument("--json", action="store_true", help="records instead of tables, no prediction")


def run(arguments) -> int:
    targets = TARGETS if arguments.all else (arguments.target or "sm_90",)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("lowering: the interpreter compiles nothing; unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    found = {}
    for target in targets:
        chosen = [one for one in cases(target, arguments.brief) if one[0].dtype in arguments.dtypes]
        found[target] = [k for ks in lower(target, chosen, arguments.instructions) for k in ks]
    records = [k for lowered in found.values() for k in lowered]
    missed = [miss for k in records for miss in misses(k)]
    if arguments.json:
        print(json.dumps([_record(k) for k in records]))
    else:
        for target, lowered in found.items():
            print(f"{target}, compiled with Triton {triton.__version__}; nothing was run")
            print(table(lowered), end="\n\n")
        for target in targets:
            quick = [c for c in predict.quick_cases(arguments.brief) if c.dtype in arguments.dtypes]
            predicted = predict.predict(quick, target, devices.of_target(target))
            missed += [miss for p in predicted for miss in p.missed]
            print(f"{target}: predicted by a model from the compiled kernels, not measured")
            print(predict.table(predicted))
            print(predict.worst(predicted), end="\n\n")
        for _, line in () if arguments.brief else missed:
            print(line)
    failing = sum(bool(k.misread) for k in records)
    misses_alone = [miss for miss, _ in missed]
    idle = [] if arguments.brief else gates.unneeded(misses_alone, targets, arguments.dtypes)
    if not arguments.json:
        for one in idle:
            print(f"no kernel needs to be exempt from gate {one.gate}: {one.why}")
        print(summary(misses_alone))
        print(f"{len(records)} kernels, {failing} that access narrowly or read twice")
    failed = failing or idle or any(miss.fails for miss in misses_alone)
    return int(arguments.gate and bool(failed))


def _record(k: Lowered) -> dict:
    return asdict(k) | {
        "failed": k.misread + [line for miss, line in misses(k) if miss.fails],
        "exempt": [miss.exempt.why for miss, _ in misses(k) if miss.exempt],
    }
