"""What the compiler makes of every launch choice, for GPUs that are not there: gates 1 to 3, and
what of 4, 5 and 7 is enforced.

Compilation runs in processes of its own, where kernels are not interpreted.
"""

import json
import os
import subprocess
import sys

import pytest
from lowered import walking

from perf import gates
from perf.assembly import Region, read_ptx, read_sass, uneven_sums
from perf.compiled import TARGETS
from perf.lowering import LAYERS, weight_cases
from perf.shapes import Case
from tritonnorm import heuristics
from tritonnorm.launch.common import TRITON_VERSION

DTYPES = {"sm_90": ("bf16", "fp32", "fp64"), "sm_80": ("bf16",), "sm_100": ("bf16",)}
"""What is compiled for whom: half a second a kernel, without Triton's cache. The tiles are the same for
all targets, and bfloat16, which is held twice while it is converted, takes the most registers."""


@pytest.mark.parametrize("target", TARGETS)
def test_gates(target):
    """No spills, 128-bit accesses, one read, for every tile of `perf.lowering.cases`."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "perf", "lowering", "--target", target, "--json"]
    command += ["--dtypes", *DTYPES[target]]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    records = json.loads(output)
    assert len(records) > 150 * (1 + len(DTYPES[target]))
    assert {r["dtype"] for r in records} == {*DTYPES[target]}
    assert {r["kernel"] for r in records} == {
        "row_forward_resident",
        "row_forward_looped",
        "row_gradient_means",
        "row_backward",
        "group_forward",
        "group_backward",
        "channel_moments",
        "channel_normalize",
        "channel_gradient_sums",
        "channel_input_gradient",
        "team_forward",
        "team_backward",
        "row_team_forward",
        "row_team_backward",
        "fold_moments",
        "fold_gradient_means",
        "fold_parameter_gradients",
        "weight_forward",
        "weight_backward",
        "weight_squares",
        "weight_normalize",
        "weight_gradient_sums",
        "weight_input_gradient",
    }
    failing = [
        (r["kernel"], r["dtype"], r["shape"], r["layout"], r["failed"]) for r in records if r["failed"]
    ]
    assert not failing
    needed = {why for r in records for why in r["exempt"]}
    assert needed >= {
        exemption.why
        for exemption in gates.EXEMPT
        if exemption.triton in (None, TRITON_VERSION)
        and target in exemption.targets
        and (set(exemption.dtypes) - {"fp16"} or {"fp16"}) <= set(DTYPES[target])
    }
    clusters = {r["num_ctas"] for r in records}
    has_clusters = target != "sm_80" and TRITON_VERSION >= heuristics.rows.CLUSTER_TRITON
    assert clusters == ({1, 4, 8, 16} if has_clusters else {1})


ISSUE_RATE = """
from perf.compiled import lower
from perf.shapes import Case
cases = [Case("layer_norm", d, (2**20, n), "bf16") for d, n in {cases}]
for launches in lower("{target}", [(case, None) for case in cases], instructions=True):
    for k in launches:
        if k.instructions_per_byte:
            print(k.instructions_per_byte)
"""


LOOSER = 0.0065 if TRITON_VERSION < (3, 9) else 0.0
"""What Triton takes more on sm_100 before 3.9."""


@pytest.mark.parametrize(
    ("target", "forward", "backward"),
    [("sm_90", 0.1, 0.106), ("sm_100", 0.0825 + LOOSER, 0.0825 + LOOSER)],
)
def test_issue_rate(target, forward, backward):
    """LayerNorm on bfloat16 rows takes at most 0.1 warp instructions a byte forward, 35% of what an H100
    issues while its memory moves a byte: a power of two, and five tiles side by side. Backward it takes
    0.106, a tenth of which brings rows through shared memory. A B200 has half as many, and computes two
    elements at once: with the pinned Triton it keeps to 60%. So many rows that what a program does once
    does not count."""
    cases = [("forward", 4096), ("forward", 5120), ("backward", 4096)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", ISSUE_RATE.format(cases=cases, target=target)]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    found = [float(line) for line in output.split()]
    assert len(found) == len(cases)
    assert max(found[:2]) <= forward
    assert found[2] <= backward


WIDTHS = """
from perf.compiled import lower
from perf.shapes import Case
((k, *_),) = lower("sm_90", [(Case("layer_norm", "backward", (2**16, 6), "bf16"), None)])
print({width for name in ("x", "dy", "dx") for width in k.widths[name]})
"""


def test_narrow_rows_have_the_accesses_that_their_alignment_allows():
    """Rows of 12 bytes: 4, though nothing but the hint of alignment tells so; with narrower ones lanes
    would have sums of their own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", WIDTHS]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout == "{4}\n"


BARRIERS = """
from perf import devices, gates
from perf.compiled import lower
from perf.shapes import Case
dtypes, sizes = ("bf16", "fp32"), (1024, 4096, 8192)
cases = [Case("layer_norm", "backward", (2**16, n), dtype) for dtype in dtypes for n in sizes]
for launches in lower("{target}", [(case, None) for case in cases]):
    for k in launches:
        if k.activations:
            print(k.shape, k.dtype, gates.barriers(k, devices.of_target("{target}")[0]))
"""


@pytest.mark.parametrize("target", TARGETS)
def test_barriers(target):
    """Both sums of a row of LayerNorm's backward pass are exchanged at once: gate 7 is met."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", BARRIERS.format(target=target)]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    lines = output.splitlines()
    assert len(lines) == 6
    assert [line for line in lines if not line.endswith("None")] == []


def lowered(**changes):
    """A step of a backward pass, whose every access is of 16 bytes."""
    widths = {"x": [16], "dy": [16], "dx": [16], "mean": [4]}
    return walking(**(dict(line=1024, registers=64, widths=widths) | changes))


def test_violations_are_noticed():
    assert lowered().violations == []
    assert "spills" in lowered(stack=8).violations[0]
    assert "accesses of 2 bytes" in lowered(widths={"x": [2] * 8}).violations[0]
    assert "touches" in lowered(widths={"x": [16, 16]}).violations[0]
    twice = {"x": [16, 16], "dy": [16, 16], "dx": [16]}
    assert lowered(ahead=1, widths=twice).violations == []  # ahead of the loop, and in it
    assert lowered(line=1001, widths={"x": [2] * 8}).violations == []  # rows are not of whole words


def test_a_cluster_splits_its_tile():
    """Of 4 blocks each accesses a quarter; none of them all of it."""
    cluster = dict(tiles=[(1, 4096)], line=4096, num_ctas=4)
    assert lowered(**cluster).violations == []
    everything = {"x": [16] * 4, "dy": [16], "dx": [16]}
    assert lowered(**cluster, widths=everything).violations == [
        "x: touches 32768 bytes of a tile of 8192"
    ]


PTX = """
    ld.param.b64 \t%rd1, [kernel_param_0];
    ld.param.b64 \t%rd2, [kernel_param_1];
    ld.param.b32 \t%r1, [kernel_param_2];
    mul.wide.s32 \t%rd3, %r1, 2;
    add.s64 \t%rd4, %rd1, %rd3;
    mov.b64 \t%rd5, %rd4;
    @%p1 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd5 + 0 ];
    add.s64 \t%rd6, %rd2, %rd3;
    @!%p2 st.global.b16 [ %rd6 + 8 ], { %rs1 };
"""


@pytest.mark.parametrize(
    ("instruction", "width"),
    [
        ("ld.global.L1::evict_first.L2::cache_hint.b16 { %rs2 }, [ %rd5 + 0 ], %rd9;", 2),
        ("ld.relaxed.gpu.global.v2.b64 { %rd7, %rd8 }, [ %rd5 ];", 16),
        ("ld.global.nc.u16 %rs2, [%rd5];", 2),
        ("st.global.L1::evict_last.v4.b32 [ %rd5 + 0 ], { %r2, %r3, %r4, %r5 };", 16),
        ("ld.global.v8.b32 { %r2 }, [ %rd5 ];", 32),
        ("atom.global.gpu.acq_rel.add.u32 %r1, [ %rd5 + 0 ], %r2;", 4),
        ("cp.async.cg.shared.global [ %r2 + 0 ], [ %rd5 + 0 ], 0x10, %r3;", 16),
        ("cp.async.ca.shared.global [ %r2 ], [ %rd5 ], 0x4;", 4),
    ],
)
def test_any_kind_of_access_counts(instruction, width):
    address = "ld.param.b64 %rd5, [kernel_param_0];\n"
    assert read_ptx(address + instruction, {0: "x"})[0] == {"x": [width]}


def test_accesses_that_are_not_understood_are_an_error():
    with pytest.raises(ValueError, match="not counted"):
        read_ptx("cp.async.bulk.shared::cta.global [ %r1 ], [ %rd1 ], 16, [ %r2 ];", {0: "x"})


def test_first_elements_may_be_read_narrowly():
    """Those of channel_moments, beside a whole tile in wide accesses; and nothing else."""
    moments = dict(kernel="channel_moments", direction="forward", tiles=[(64, 32)])
    assert lowered(**moments, widths={"x": [2, 16, 16]}).violations == []
    assert "accesses of 2 bytes" in lowered(**moments, widths={"x": [2, 16]}).violations[0]
    assert "accesses of 8 bytes" in lowered(**moments, widths={"x": [8, 8, 8, 8]}).violations[0]


def test_of_several_tiles_each_is_touched_once():
    several = dict(kernel="weight_backward", tiles=[(4, 256), (1, 1024)], line=8)
    assert lowered(**several).tile == (1, 1024)
    assert lowered(**several, widths={"x": [16, 16]}).violations == []
    assert "touches 2048 bytes of a tile of 4096" in lowered(**several).violations[0]


def test_every_wide_tile_of_weights_is_lowered():
    """Alone in bfloat16; together in launches of many, also of float32. And some of the narrow ones."""
    chosen = weight_cases()
    for resident, direction in (
        (heuristics.weights.WEIGHT_FORWARD_RESIDENT, "forward"),
        (heuristics.weights.WEIGHT_BACKWARD_RESIDENT, "backward"),
    ):

        def tile_of(n, resident=resident):
            return heuristics.weights.weight_tile(n, 2, resident, wide=n % 8 == 0)

        wide = {tile_of(n) for n in range(8, resident[2] + 1, 8)}
        alone = [
            case.set_size
            for case, variant in chosen
            if case.kind == f"weight_norm {direction} bf16" and case.set_size <= resident[2]
        ]
        tiles = {tile_of(n) for n in alone}
        assert wide < tiles
        assert len(tiles - wide) > 4
        for dtype in ("bf16", "fp32"):
            assert (Case("weight_norms", direction, LAYERS, dtype), "halved") in chosen


def test_a_tensor_without_accesses_is_a_violation():
    assert "no access" in lowered(widths={"x": []}).violations[0]


def test_accesses_are_traced_to_their_tensor():
    widths, (region,) = read_ptx(PTX, {0: "x", 1: "y"})
    assert widths == {"x": [16], "y": [2]}
    assert region == Region(loads={"x": 16}, stores={"y": 2}, accesses=2)


LOOPS = """
    ld.param.b64 \t%rd1, [kernel_param_0];
    ld.param.b64 \t%rd2, [kernel_param_1];
    ld.global.b32 { %r1 }, [ %rd2 + 0 ];
    bar.sync \t0;
$L__BB0_1:                              // %outer
    @%p3 bra \t$L__BB0_3;
$L__BB0_2:                              // =>  This Inner Loop Header: Depth=2
    ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd1 + 0 ];
    bar.sync \t0;
    div.s32 \t%r6, %r7, %r8;
    st.global.v2.b32 [ %rd1 + 0 ], { %r2, %r3 };
    @%p1 bra \t$L__BB0_2;
    bar.sync \t0;
    bra.uni \t$L__BB0_1;
$L__BB0_3:
    ret;
"""

LOOPS_IN_SASS = """
        /*0000*/                   LDG.E R2, desc[UR4][R2.64] ;
                                                          /* 0x00000000000079c3 */
        /*0010*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0020*/               @P2 EXIT ;
        /*0030*/              @!P0 LDG.E.128 R4, desc[UR4][R8.64] ;
        /*0040*/                   FADD R5, R5, R6 ;
        /*0050*/                   STG.E.64 desc[UR4][R8.64], R4 ;
        /*0060*/              @!P0 BRA 0x30 ;
        /*0070*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0080*/               @P1 BRA 0x20 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   MUFU.RCP R1, R0 ;
        /*00b0*/                   RET.REL.NODEC R20 0x0 ;
        /*00c0*/                   BRA 0xc0;
        /*00d0*/                   NOP;
"""


def test_ptx_is_told_apart_by_its_loops():
    widths, regions = read_ptx(LOOPS, {0: "x", 1: "mean"})
    assert widths == {"x": [16, 8], "mean": [4]}
    assert regions == [
        Region(loads={"mean": 4}, accesses=1, barriers=1),
        Region(parent=0, barriers=1),
        Region(parent=1, loads={"x": 16}, stores={"x": 8}, accesses=2, barriers=1, divisions=1),
    ]
    assert regions[2].touched == {"x": 24}


def test_sass_has_the_same_loops_and_no_subroutines():
    instructions, accesses = read_sass(LOOPS_IN_SASS)
    assert instructions == [3, 3, 4]  # the exit in the outer loop is passed as often as the loop is run
    assert accesses == [1, 0, 2]


UNEVEN = """
	mul.f32 	%r3, %r1, %r2;
	shfl.sync.bfly.b32 	%r4, %r3, 1, 31, -1;
	fma.rn.f32 	%r5, %r1, %r2, %r4;
"""
UNEVEN_PAIRS = """
	mul.f32x2 	%rd3, %rd1, %rd2;
	mov.b64 	{%r1, %r2}, %rd3;
	shfl.sync.bfly.b32 	%r3, %r1, 1, 31, -1;
	shfl.sync.bfly.b32 	%r4, %r2, 1, 31, -1;
	mov.b64 	%rd4, {%r3, %r4};
	fma.rn.f32x2 	%rd5, %rd1, %rd2, %rd4;
"""


def test_sums_that_differ_between_lanes():
    """An FMA of a product and another lane's; not one that adds something else, or a sum."""
    assert uneven_sums(UNEVEN) == uneven_sums(UNEVEN_PAIRS) == 1
    assert uneven_sums(UNEVEN.replace("%r1, %r2, %r4", "%r1, %r6, %r4")) == 0
    assert (
        uneven_sums(UNEVEN.replace("fma.rn.f32 	%r5, %r1, %r2, %r4", "add.f32 	%r5, %r3, %r4"))
        == 0
    )
