"""Bytes moved, counted in the interpreter, against the floor."""

from dataclasses import replace

import pytest
from conftest import INTERPRETED

from perf import launches, traffic
from perf.shapes import OPERATORS, ROW_OPERATORS, Case
from tritonnorm import heuristics
from tritonnorm.kernels import row_team

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on a GPU no bytes are counted")

ONE_READ = {"forward": heuristics.rows.FORWARD_RESIDENT, "backward": heuristics.rows.BACKWARD_RESIDENT}


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("operator", "dtype"),
    [
        *((operator, "bf16") for operator in ROW_OPERATORS),
        ("layer_norm", "fp32"),
        ("layer_norm", "fp64"),
    ],
)
def test_floor(operator, direction, dtype):
    """2T and 3T within 0.5% wherever a row is resident; for longer rows exactly what is listed."""
    for n in (64, 1000, 4096, 8192, 16384, 20000):
        case = Case(operator, direction, (traffic.ROWS, n), dtype)
        moved = traffic.measure(case)
        if n <= ONE_READ[direction][case.itemsize]:
            assert abs(moved.excess) <= traffic.TOLERANCE, case
            assert not moved.reread
        elif direction == "backward":
            assert moved.activations == {"x": 2, "dy": 2, "dx": 1}
        else:
            chunk = heuristics.rows.row_forward(n, case.itemsize, strided=False).block_n
            first = chunk / n if operator == "layer_norm" else 0
            assert moved.activations == {"x": pytest.approx(2 + first), "y": 1}


@pytest.mark.parametrize("case", traffic.cluster_cases(brief=True), ids=lambda case: case.label)
def test_floor_of_clusters(case):
    """2T and 3T within 0.5% of rows that a cluster holds."""
    moved = traffic.measure(case, "cluster")
    assert abs(moved.excess) <= traffic.TOLERANCE
    assert not moved.reread


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_floor_of_row_teams(direction, monkeypatch):
    """2T and 3T within 0.5% of rows that a team holds, whose programs wait for nobody here."""

    def unguarded(kernel, grid, arguments):
        kernel.kernel[grid](**arguments)  # what others publish is no race

    monkeypatch.setattr(row_team, "meet", lambda arrivals, row, count: None)
    with launches.observe(unguarded):
        moved = traffic.measure(Case("layer_norm", direction, (2, 20000), "bf16"), "team")
    assert moved.partials
    assert abs(moved.excess) <= traffic.TOLERANCE
    assert not moved.reread


ONE_READ_CHANNELS = {
    ("group_norm", "2x320x8x8", "contiguous"),
    ("group_norm", "2x320x8x8", "channels_last"),
    ("group_norm", "2x48x16x16", "contiguous"),
    ("instance_norm", "2x64x16x16", "contiguous"),
    ("instance_norm", "2x64x16x16", "channels_last"),
    ("instance_norm", "1x40x48x48", "contiguous"),
    ("batch_norm_eval", "4x32x32x32", "contiguous"),
    ("batch_norm_eval", "4x32x32x32", "channels_last"),
    ("batch_norm_eval", "256x32x7x7", "contiguous"),
    ("batch_norm_eval", "256x32x7x7", "channels_last"),
}
"""Sets that one program holds, forward and backward; and evaluations, which have none."""


@pytest.mark.parametrize("case", traffic.channel_cases(), ids=lambda case: case.label)
def test_floor_of_channels(case):
    """2T and 3T within 0.5% where sets are resident; in pieces 3T and 5T, and nothing more."""
    moved = traffic.measure(case)
    if "squares_partial" in moved.touched or "c1" in moved.touched:
        assert (case.operator, case.name, case.layout) not in ONE_READ_CHANNELS
        second = ("x",) if case.direction == "forward" else ("x", "dy")
        again = len(second) * traffic.tensor_bytes(case)
        assert moved.activations == {
            name: pytest.approx(1 + (name in second), rel=traffic.TOLERANCE)
            for name in moved.activations
        }
        assert abs(moved.total / (traffic.floor_bytes(case) + again) - 1) <= traffic.TOLERANCE
    else:
        assert abs(moved.excess) <= traffic.TOLERANCE
        assert not moved.reread


@pytest.mark.parametrize(
    "case",
    [
        Case("group_norm", "forward", (2, 4, 128, 128), "bf16", "contiguous", 2),
        Case("group_norm", "backward", (1, 10, 64, 64), "bf16", "channels_last", 2),
        Case("batch_norm", "backward", (3, 4, 100, 99), "bf16"),
        Case("batch_norm", "forward", (260, 16, 3, 3), "bf16"),
    ],
    ids=lambda case: case.label,
)
def test_the_second_sweep_runs_backwards(case):
    """What was read last is read first: tile by tile, over all programs and within each."""
    order = {}

    def launch(kernel, grid, arguments):
        x = arguments.get("x_ptr")

        def note(addresses, itemsize, is_store):
            if x is not None and addresses.size > arguments["BLOCK_C"] and not is_store:
                offset = int(addresses.min()) - x.data_ptr()
                if 0 <= offset < x.nbytes:
                    order.setdefault(kernel.__name__, []).append(offset)

        with traffic.memory_accesses(note):
            kernel[grid](**arguments)

    with launches.observe(launch):
        launches.run(case)
    first, second = (
        ("channel_moments", "channel_normalize")
        if case.direction == "forward"
        else ("channel_gradient_sums", "channel_input_gradient")
    )
    assert len(set(order[first])) > 4
    assert order[second] == order[first][::-1]


ONE_READ_WEIGHTS = {
    "forward": heuristics.weights.WEIGHT_FORWARD_RESIDENT,
    "backward": heuristics.weights.WEIGHT_BACKWARD_RESIDENT,
}


@pytest.mark.parametrize("case", traffic.weight_cases(), ids=lambda case: case.label)
def test_floor_of_weights(case):
    """2T and 3T within 0.5% of channels along the first dimension that one program holds, also of many
    tensors at once; in pieces 3T and 5T, and nothing more."""
    moved = traffic.measure(case)
    resident = ONE_READ_WEIGHTS[case.direction][case.itemsize]
    if OPERATORS[case.operator].dim == 0 and case.set_size <= resident:
        assert abs(moved.excess) <= traffic.TOLERANCE
        assert not moved.reread
        assert not moved.partials
    else:
        second = ("x",) if case.direction == "forward" else ("x", "dy")
        assert moved.activations == {name: 1 + (name in second) for name in moved.activations}
        again = len(second) * traffic.tensor_bytes(case)
        assert abs(moved.total / (traffic.floor_bytes(case) + again) - 1) <= traffic.TOLERANCE
        assert moved.partials


def test_a_kernel_that_reads_twice_is_noticed(monkeypatch):
    monkeypatch.setitem(heuristics.rows.FORWARD_RESIDENT, 2, 512)
    moved = traffic.measure(Case("rms_norm", "forward", (4, 8192), "bf16"))
    assert moved.excess > 0.4
    assert moved.reread == "x 2.00 times"


@pytest.mark.parametrize("n", [128, 1024, 8192])
def test_partials_stay_small(n):
    """At the size of a training step: at most 5% of the traffic, or 8 MB, that L2 holds."""
    m, itemsize = 2**25 // n, 2
    tile = heuristics.rows.row_backward(n, itemsize, strided=False)
    programs = heuristics.rows.row_partials(m, n, itemsize, 2, tile)
    partial = programs * n * 4 * 2
    assert (
        2 * partial <= heuristics.common.PARTIAL_SHARE * 3 * m * n * itemsize
        or partial <= heuristics.common.PARTIAL_BYTES
    )


def test_the_gate_wants_bytes_explained():
    """A second read is listed; a third one, a second write, and bytes of nothing are not let through."""
    moved = traffic.measure(Case("rms_norm", "forward", (4, 20000), "bf16"))
    assert moved.reread
    assert not moved.violations

    def but(**times):
        touched = {name: int(size * times.get(name, 1)) for name, size in moved.touched.items()}
        return replace(moved, touched=touched).violations

    assert but(x=1.5) == ["x: 3.00 times"]
    assert but(y=2) == ["y: 2.00 times"]
    assert "are explained" in but(spread=1000)[-1]
