"""What runs compiled kernels without a GPU: an emulator that cannot fail shows nothing."""

import numpy as np
import pytest
import torch
from emulation import launch
from ptx import PtxError, operation, parse


def entry(body: str, pointers: int = 2, threads: int = 64, cluster: int = 1) -> str:
    """A module whose kernel `k` has pointers in %rd0, %rd1, .. and the number of its thread in %r0."""
    loads = "\n".join(f"ld.param.b64 %rd{i}, [k_param_{i}];" for i in range(pointers))
    parameters = ",\n".join(f".param .u64 .ptr .global .align 1 k_param_{i}" for i in range(pointers))
    return (
        f".visible .entry k(\n{parameters}\n)\n.reqntid {threads}\n.reqnctapercluster {cluster}\n"
        f"{{\n.reg .b32 %r<9>;\n"
        f"{loads}\nmov.u32 %r0, %tid.x;\n{body}\nret;\n}}\n"
    )


def run(body: str, *tensors, programs=1, threads=64, cluster=1, together=False):
    """Runs the kernel with pointers to tensors, 1 KB of shared memory, and nothing else."""
    ranges = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors]
    module = entry(body, len(tensors), threads, cluster)
    launch(module, (programs,), [t.data_ptr() for t in tensors], 1024, ranges, together)


ADDRESS = "mul.wide.u32 %rd8, %r0, 4; add.s64 %rd0, %rd0, %rd8; add.s64 %rd1, %rd1, %rd8;"
COPY = f"{ADDRESS} ld.global.b32 %r1, [%rd0]; st.global.b32 [%rd1], %r1;"


@pytest.mark.parametrize(
    ("opcode", "operands", "expected"),
    [
        ("add.s32", (np.int32(2**31 - 1), np.int32(1)), np.int32(-(2**31))),
        ("mul.wide.s32", (np.int32(-(2**30)), np.int32(8)), np.int64(-(2**33))),
        ("mul.hi.u32", (np.uint32(2**31), np.uint32(6)), np.uint32(3)),
        ("mad.wide.u32", (np.uint32(2**31), np.uint32(2), np.uint64(5)), np.uint64(2**32 + 5)),
        ("div.s32", (np.int32(-7), np.int32(2)), np.int32(-3)),
        ("div.s32", (np.int32(-(2**31)), np.int32(2)), np.int32(-(2**30))),
        ("rem.s32", (np.int32(-7), np.int32(2)), np.int32(-1)),
        ("shl.b32", (np.uint32(3), np.uint32(32)), np.uint32(0)),
        ("shr.s32", (np.int32(-8), np.uint32(1)), np.int32(-4)),
        ("shf.l.wrap.b32", (np.uint32(0x80000001), np.uint32(2), np.uint32(1)), np.uint32(5)),
        ("shr.u32", (np.uint32(0x80000000), np.uint32(31)), np.uint32(1)),
        ("bfe.u32", (np.uint32(0b110100), np.uint32(2), np.uint32(3)), np.uint32(0b101)),
        ("bfe.s32", (np.int32(0b100), np.uint32(2), np.uint32(1)), np.int32(-1)),
        ("prmt.b32", (np.uint32(0x44332211), np.uint32(0x88776655), np.uint32(0x7650)), 0x88776611),
        ("prmt.b32", (np.uint32(0x00008011), np.uint32(0), np.uint32(0x4449)), 0x000000FF),
        ("fma.rn.f32", (np.float32(4097), np.float32(4097), np.float32(-(4096**2))), np.float32(8193)),
        ("setp.lt.f32", (np.float32("nan"), np.float32(1)), np.bool_(False)),
        ("setp.neu.f32", (np.float32("nan"), np.float32(1)), np.bool_(True)),
        ("setp.ne.f32", (np.float32("nan"), np.float32(1)), np.bool_(False)),
        ("setp.lt.u32", (np.uint32(2**31), np.uint32(1)), np.bool_(False)),
        ("max.f32", (np.float32("nan"), np.float32(1)), np.float32(1)),
        ("rsqrt.approx.ftz.f32", (np.float32(2**-140),), np.float32("inf")),
        ("cvt.s64.s32", (np.int32(-1),), np.int64(-1)),
        ("cvt.u64.u32", (np.uint32(2**32 - 1),), np.uint64(2**32 - 1)),
        ("cvt.rn.f16x2.f32", (np.float32(1), np.float32(2)), np.uint32(0x3C004000)),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_computing(opcode, operands, expected):
    with np.errstate(all="ignore"):
        found = operation(opcode, len(operands)).function(*(np.array([value]) for value in operands))
    assert found[0] == expected
    if isinstance(expected, np.generic):
        assert found.dtype == expected.dtype


def test_narrow_floats():
    """Rounded to even, as PyTorch does, and NaN of one kind; packed pairs, and mixed operands."""
    values = torch.cat([torch.randn(1000), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, torch.inf])])
    expected = values.bfloat16()
    to, of = operation("cvt.rn.bf16.f32", 1).function, operation("cvt.f32.bf16", 1).function
    bits = to(values.numpy())
    assert np.array_equal(bits, expected.view(torch.uint16).numpy())
    assert np.array_equal(of(bits), expected.float().numpy())
    assert to(np.array([np.nan], np.float32))[0] == 0x7FFF
    packed = operation("cvt.rn.bf16x2.f32", 2).function(np.float32([1]), np.float32([2]))
    assert packed[0] == 0x3F804000
    mixed = operation("sub.rn.f32.bf16", 2).function(np.uint16([0x4000]), np.float32([0.5]))
    assert mixed[0] == 1.5
    pairs = [np.float32([1, 2]).view(np.uint64), np.float32([3, 4]).view(np.uint64)]
    assert operation("mul.f32x2", 2).function(*pairs).view(np.float32).tolist() == [3, 8]
    pairs = [np.float16([1, 2]).view(np.uint32), np.float16([3, 4]).view(np.uint32)]
    assert operation("mul.f16x2", 2).function(*pairs).view(np.float16).tolist() == [3, 8]


def test_one_nan():
    """Lanes that add up NaN have the same bits, whatever they began with."""
    nans = np.array([0x7FC00001, 0xFFC00002], np.uint32).view(np.float32)
    found = operation("add.f32", 2).function(nans, nans[::-1])
    assert found.view(np.uint32).tolist() == [0xFFFFFFFF] * 2


REFUSED = (
    *("frob.f32", "add.bf16", "mul.bf16x2", "add.s16x2", "add.cc.u32", "mad.hi.s32", "ex2.approx.f32"),
    *("min.NaN.f32", "add.rz.f32", "fma.rn.sat.f32", "fma.rn.relu.f16", "cvt.rn.relu.bf16.f32"),
    *(
        "cvt.rna.tf32.f32",
        "cvt.rzi.s32.f32",
        "cvt.rz.f16.f32",
        "setp.lt.and.f32",
        "setp.lt.bf16",
        "setp.nan.f32",
    ),
)


@pytest.mark.parametrize("opcode", REFUSED)
def test_unknown_instructions(opcode):
    """Whatever has a word that we do not know, even one that seldom matters."""
    with pytest.raises(PtxError, match=f"unknown instruction {opcode}"):
        operation(opcode, 2)


def test_parsing():
    """Labels, guards, several instructions a line, operands with blanks, comments."""
    found = parse(entry("@!%p1 bra $L_1; // far\n\t$L_1: ld.global.v2.b32 { %r1, %r2 }, [ %rd0 + 4 ];"))
    branch, load = found.instructions[3:5]
    assert (branch.guard, found.labels) == (("%p1", False), {"$L_1": 4})
    assert load.operands == (("%r1", "%r2"), ["%rd0", "4"])
    assert (found.threads, found.cluster, len(found.parameters)) == (64, 1, 2)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("@ %p1 ret;", "cannot read"),
        ("mov.u32 %r1, %laneid;", "unknown register %laneid"),
        ("setp.eq.s32 %p1|%p2, %r0, 0;", "unknown register"),
        ("bar.sync 1, 32;", "a barrier of some warps"),
        ("setp.eq.s32 %p1, %r0, 0; @%p1 ret;", "ret with a guard"),
        ("red.global.add.f32 [%rd0], %r0;", "unknown"),
    ],
)
def test_refused(body, error):
    with pytest.raises(PtxError, match=error):
        run(body, torch.zeros(1))


def test_scopes():
    """Of inline assembly, with registers of their own; what is behind a brace counts."""
    y = torch.zeros(64, dtype=torch.int32)
    run(
        f"{ADDRESS} {{ .reg .b32 %r7; mov.b32 %r7, 5;\n}}\nst.global.b32 [%rd1], %r7;",
        torch.zeros(64),
        y,
    )
    assert (y == 5).all()


def test_a_copy():
    x, y = torch.randn(64), torch.zeros(64)
    run(COPY, x, y)
    assert torch.equal(x, y)


@pytest.mark.parametrize("size", [63, 65])
def test_outside_of_tensors(size):
    """Of what is read, or written, or neither."""
    memory = torch.zeros(2, 128)
    tensors = memory[0, :size], memory[1, :64]
    if size == 65:
        run(COPY, *tensors)
        return
    for given in (tensors, tensors[::-1]):
        with pytest.raises(PtxError, match="outside of the launch's tensors"):
            run(COPY, *given)


def test_not_aligned():
    x = torch.zeros(64)
    with pytest.raises(PtxError, match="16 bytes is not aligned"):
        run("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd0+4];", x)


OWN = "shl.b32 %r1, %r0, 2;"
OTHER = "xor.b32 %r2, %r0, 63; shl.b32 %r2, %r2, 2;"


def test_shared_memory_needs_a_barrier():
    """A thread reads what one of the other warp wrote."""
    x, y = torch.randn(64), torch.zeros(64)
    load = f"{ADDRESS} ld.global.b32 %r3, [%rd0]; {OWN} {OTHER}"
    store = "ld.shared.b32 %r4, [%r2]; st.global.b32 [%rd1], %r4;"
    run(f"{load} st.shared.b32 [%r1], %r3; bar.sync 0; {store}", x, y)
    assert torch.equal(x.flip(0), y)
    with pytest.raises(PtxError, match="another wrote before a barrier"):
        run(f"{load} st.shared.b32 [%r1], %r3; {store}", x, y)
    with pytest.raises(PtxError, match="another accessed before a barrier"):
        run(f"{load} ld.shared.b32 %r4, [%r2]; st.shared.b32 [%r1], %r3;", x, y)


def test_two_values_for_one_place():
    """Of which a GPU stores either; not of equal ones."""
    x = torch.zeros(64)
    run("mov.b32 %r1, 5; st.shared.b32 [global_smem], %r1;", x)
    with pytest.raises(PtxError, match="two values"):
        run("st.shared.b32 [global_smem], %r0;", x)


ASYNC = f"{ADDRESS} {OWN} {OTHER} cp.async.ca.shared.global [%r1+0], [%rd0+0], 0x4, %r5;"
CLOSE, WAIT = "cp.async.commit_group;", "cp.async.wait_group 0;"
READ = "ld.shared.b32 %r4, [%r2]; st.global.b32 [%rd1], %r4;"


def test_copies_to_shared_memory():
    """What another warp copied is there after its wait and a barrier; zeros where nothing was to be
    copied."""
    x, y = torch.randn(64), torch.zeros(64)
    run(f"mov.b32 %r5, 4; {ASYNC} {CLOSE} {WAIT} bar.sync 0; {READ}", x, y)
    assert torch.equal(x.flip(0), y)
    run(f"mov.b32 %r5, 0; {ASYNC} {CLOSE} {WAIT} bar.sync 0; {READ}", x, y)
    assert not y.any()
    run(f"mov.b32 %r5, 0; {ASYNC}", x[:0], y)  # from an address with nothing behind it


@pytest.mark.parametrize(
    ("between", "error"),
    [
        (f"{CLOSE} bar.sync 0;", "a copy is on its way"),  # nobody waits
        (f"{WAIT} bar.sync 0;", "a copy is on its way"),  # for a group that is not closed
        (f"{CLOSE} cp.async.wait_group 1; bar.sync 0;", "a copy is on its way"),  # for older ones alone
        (f"{CLOSE} {WAIT}", "another wrote before a barrier"),
    ],
)
def test_copies_to_wait_for(between, error):
    x, y = torch.randn(64), torch.zeros(64)
    with pytest.raises(PtxError, match=error):
        run(f"mov.b32 %r5, 4; {ASYNC} {between} {READ}", x, y)


def test_copies_over_what_is_read():
    """A copy may write as soon as it begins: not before all have read what was there."""
    x, y = torch.randn(64), torch.zeros(64)
    read = f"mov.b32 %r5, 4; {OTHER} ld.shared.b32 %r4, [%r2];"
    run(f"{read} bar.sync 0; {ASYNC} {CLOSE} {WAIT}", x, y)
    with pytest.raises(PtxError, match="another accessed before a barrier"):
        run(f"{read} {ASYNC} {CLOSE} {WAIT}", x, y)
    for count in (2, 8):
        with pytest.raises(PtxError, match=f"a copy of {count} bytes of 4"):
            run(f"mov.b32 %r5, {count}; {ASYNC}", x, y)


def test_copies_of_what_changes():
    """Which value is copied would be open; and nobody has to wait for a copy to be refused."""
    x, changing = torch.randn(64), torch.randn(64)
    store = "st.global.b32 [%rd0], %r0;"
    run(f"mov.b32 %r5, 4; {ASYNC} {CLOSE} {WAIT} {store}", x, x)
    with pytest.raises(PtxError, match="written while it was copied"):
        run(f"mov.b32 %r5, 4; {ASYNC} {CLOSE} {store} {WAIT}", changing, x)
    with pytest.raises(PtxError, match="outside of the launch's tensors"):
        run(f"mov.b32 %r5, 4; {ASYNC}", x[:0], torch.zeros(64))


def test_a_register_is_wider_than_what_is_loaded():
    y = torch.zeros(64, dtype=torch.int32)
    body = f"{ADDRESS} st.shared.b8 [%r0], 200; ld.shared.b8 %rs1, [%r0];"
    run(f"{body} and.b16 %rs2, %rs1, 240; cvt.u32.u16 %r1, %rs2; st.global.b32 [%rd1], %r1;", y, y)
    assert (y == 192).all()


def test_outside_of_shared_memory():
    with pytest.raises(PtxError, match="outside of shared memory"):
        run("st.shared.b32 [global_smem+1024], %r0;", torch.zeros(1))


def test_threads_part_and_meet():
    """Odd threads take another way, which lies behind where both meet at a barrier."""
    y = torch.zeros(64, dtype=torch.int32)
    body = f"""{ADDRESS}
        and.b32 %r1, %r0, 1;
        setp.ne.s32 %p1, %r1, 0;
        @%p1 bra $L_odd;
        mov.b32 %r2, 10;
        $L_meet:
        bar.sync 0;
        shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;
        st.global.b32 [%rd1], %r3;
        bra $L_end;
        $L_odd:
        mov.b32 %r2, 20;
        bra $L_meet;
        $L_end:"""
    run(body, torch.zeros(64), y)
    assert y.tolist() == [20, 10] * 32


def test_a_barrier_that_a_warp_never_reaches():
    with pytest.raises(PtxError, match="wait for each other"):
        run(
            """setp.lt.s32 %p1, %r0, 32;
            $L_again:
            @%p1 bra $L_again_2;
            bar.sync 0;
            bra $L_end;
            $L_again_2:
            ld.global.acquire.gpu.b32 %r1, [%rd0];
            bra $L_again;
            $L_end:""",
            torch.zeros(1),
        )


ARRIVE_AND_WAIT = """
    setp.eq.s32 %p1, %r0, 0;
    mov.b32 %r1, 1;
    @%p1 atom.global.gpu.acq_rel.add.u32 %r2, [%rd0], %r1;
    $L_wait:
    ld.global.acquire.gpu.b32 %r3, [%rd0];
    setp.lt.s32 %p2, %r3, 3;
    @%p2 bra $L_wait;
"""


def test_programs_that_wait_for_each_other():
    """As those of a team; which must all be there."""
    arrivals, y = torch.zeros(1, dtype=torch.int32), torch.zeros(3, 64, dtype=torch.int32)
    store = f"""mov.u32 %r4, %ctaid.x; mul.wide.u32 %rd7, %r4, 256; add.s64 %rd1, %rd1, %rd7;
        {ADDRESS} st.global.b32 [%rd1], %r3;"""
    run(ARRIVE_AND_WAIT + store, arrivals, y, programs=3, together=True)
    assert (y == 3).all()
    arrivals.zero_()
    with pytest.raises(PtxError, match="wait for each other"):
        run(ARRIVE_AND_WAIT + store, arrivals, y, programs=2, together=True)


def test_an_arrival_needs_a_barrier():
    """Before it, where other warps of the block have stored."""
    arrivals, y = torch.zeros(1, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    store = "mul.wide.u32 %rd8, %r0, 4; add.s64 %rd7, %rd1, %rd8; st.global.b32 [%rd7], %r0;"
    arrive = ARRIVE_AND_WAIT.replace("%r3, 3", "%r3, 1")
    run(f"{store} bar.sync 0; {arrive}", arrivals, y)
    arrivals.zero_()
    with pytest.raises(PtxError, match="no barrier is before the arrival"):
        run(store + arrive, arrivals, y)


def test_programs_that_wait_must_be_launched_together():
    arrivals, y = torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    with pytest.raises(PtxError, match="wait for each other"):
        run(ARRIVE_AND_WAIT, arrivals, y, programs=3)


CLUSTER_COPY = f"""{ADDRESS}
    mov.u32 %r1, %cluster_ctarank;
    mul.lo.s32 %r2, %r1, 100;
    add.s32 %r2, %r2, %r0;
    shl.b32 %r3, %r0, 2;
    st.shared.b32 [%r3], %r2;
    BARRIER
    xor.b32 %r4, %r1, 1;
    mapa.shared::cluster.u32 %r5, %r3, %r4;
    ld.shared::cluster.b32 %r6, [%r5];
    mul.wide.u32 %rd7, %r1, 256;
    add.s64 %rd1, %rd1, %rd7;
    st.global.b32 [%rd1], %r6;"""


def test_clusters():
    """A block reads its neighbour's memory, once both have met."""
    x, y = torch.zeros(64), torch.zeros(2, 64, dtype=torch.int32)
    meet = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
    run(CLUSTER_COPY.replace("BARRIER", meet), x, y, cluster=2)
    assert torch.equal(y, torch.arange(64) + torch.tensor([[100], [0]]))
    with pytest.raises(PtxError, match="another wrote before a barrier"):
        run(CLUSTER_COPY.replace("BARRIER", ""), x, y, cluster=2)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices(transposed):
    """What stmatrix stores, ldmatrix loads; the other way round it is transposed."""
    x, y = torch.arange(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    how = ".trans" if transposed else ""
    body = f"""{ADDRESS} ld.global.b32 %r1, [%rd0];
        and.b32 %r2, %r0, 7; shl.b32 %r2, %r2, 4;
        stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r2], {{%r1}};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x1{how}.shared.b16 {{%r3}}, [%r2];
        st.global.b32 [%rd1], %r3;"""
    run(body, x, y, threads=32)
    matrix, found = (t.view(torch.int16).view(8, 8) for t in (x, y))
    assert torch.equal(found, matrix.T if transposed else matrix)
