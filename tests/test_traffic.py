"""Bytes moved, counted in the interpreter, against the floor."""

import pytest
from conftest import INTERPRETED

from perf import traffic
from perf.shapes import ROW_OPERATORS, Case
from tritonnorm import heuristics

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on a GPU no bytes are counted")

ONE_READ = {"forward": heuristics.FORWARD_RESIDENT, "backward": heuristics.BACKWARD_RESIDENT}


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("operator", ROW_OPERATORS)
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
            chunk = heuristics.row_forward(n, case.itemsize, strided=False).block_n
            first = chunk / n if operator == "layer_norm" else 0
            assert moved.activations == {"x": pytest.approx(2 + first), "y": 1}


def test_a_kernel_that_reads_twice_is_noticed(monkeypatch):
    monkeypatch.setitem(heuristics.FORWARD_RESIDENT, 2, 512)
    moved = traffic.measure(Case("rms_norm", "forward", (4, 8192), "bf16"))
    assert moved.excess > 0.4
    assert moved.reread == "x 2.00 times"


@pytest.mark.parametrize("n", [128, 1024, 8192])
def test_partials_stay_small(n):
    """At the size of a training step: at most 5% of the traffic, or 8 MB, that L2 holds."""
    m, itemsize = 2**25 // n, 2
    tile = heuristics.row_backward(n, itemsize, strided=False)
    programs = heuristics.row_partials(m, n, itemsize, 2, tile.rows)
    partial = programs * n * 4 * 2
    assert (
        2 * partial <= heuristics.PARTIAL_SHARE * 3 * m * n * itemsize
        or partial <= heuristics.PARTIAL_BYTES
    )
