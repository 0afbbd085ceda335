"""Rows that no program holds alone: by thread-block clusters, or by the teams of a cooperative launch.

In the interpreter a cluster is one program with the tile of all its blocks, which shows the numerics of
that tile. Programs run one after another there and cannot wait for each other: a team's launch runs
twice, and nobody waits. In the second run everything is published, by the first. That shows what teams
compute, and nothing of how they meet; a GPU does.
"""

from dataclasses import replace

import pytest
import reference
import torch
from conftest import EMULATED, HAS_GPU, INTERPRETED
from operators import LAYER_NORM, RMS_NORM, every_operator, run
from test_rms_norm_variant import OFFSET
from test_rows import compare
from test_saving import gradients, inputs, layer_norm
from test_team import H100
from tolerances import assert_close

import tritonnorm.functional as tF
from perf.launches import TEAMS, observe
from tritonnorm import heuristics, launch
from tritonnorm.kernels import row_team
from tritonnorm.launch.common import TRITON_VERSION

N = 5003
"""Neither a power of two nor of whole words, and too long for a program of `small`, in both passes."""

SHARING = {"cluster": [4, 8], "team": [2, 3]}
"""Blocks of a cluster, or programs of a team, that hold such a row, forward and backward."""


@pytest.fixture
def small(monkeypatch):
    """Programs hold a quarter of the elements that they could."""
    for limits in (heuristics.rows.FORWARD_RESIDENT, heuristics.rows.BACKWARD_RESIDENT):
        for itemsize, limit in limits.items():
            monkeypatch.setitem(limits, itemsize, limit // 4)


def allow_clusters(monkeypatch):
    if HAS_GPU:
        largest = launch.common.largest_cluster(torch.cuda.current_device())
    elif EMULATED == "sm_80" or (EMULATED and TRITON_VERSION < heuristics.rows.CLUSTER_TRITON):
        largest = 1
    else:
        largest = heuristics.rows.LARGEST_CLUSTER
        monkeypatch.setattr(launch.rows, "largest_cluster", lambda index: largest)
    if largest == 1:
        pytest.skip("needs a GPU of sm_90 or later, and Triton 3.8 or later")


def allow_teams(monkeypatch):
    """As if they had been measured to be faster."""
    monkeypatch.setattr(launch.rows, "largest_cluster", lambda index: 1)
    facts = launch.common.device_facts(torch.device("cuda")) if HAS_GPU else H100
    for index in range(-1, torch.cuda.device_count()):
        monkeypatch.setitem(launch.common.CHOICES, index, TEAMS)
    monkeypatch.setattr(launch.row_teams, "device_facts", lambda device: facts)
    if INTERPRETED:
        monkeypatch.setattr(row_team, "meet", lambda arrivals, row, count: None)


@pytest.fixture
def sharing():
    """How many blocks or programs hold a row, in each launch over rows."""
    found = []

    def look(kernel, grid, arguments):
        if "arrivals_ptr" in arguments:
            found.append(arguments.get("c1_partial_ptr", arguments.get("squares_partial_ptr")).shape[1])
            if INTERPRETED:
                kernel = kernel.kernel  # not guarded: what others publish is no race
                kernel[grid](**arguments)
        elif "ROWS" in arguments:
            found.append(arguments.get("num_ctas", 1))
        kernel[grid](**arguments)

    with observe(look):
        yield found


@pytest.fixture(params=SHARING)
def expected(request, small, monkeypatch):
    """Has rows held so; what `sharing` then collects of a forward and a backward pass."""
    allow = allow_clusters if request.param == "cluster" else allow_teams
    allow(monkeypatch)
    return SHARING[request.param]


@every_operator
def test_every_norm(operator, expected, sharing, device):
    x, dy = torch.randn(2, 3, N, device=device)
    compare(operator, x, *operator.parameters(N, x.dtype, device), dy)
    assert sharing == expected


@pytest.mark.parametrize(
    ("operator", "dtype", "parameters"),
    [
        (LAYER_NORM, torch.bfloat16, torch.float32),
        (LAYER_NORM, torch.float64, torch.float64),
        (OFFSET, torch.float16, torch.float32),
    ],
    ids=str,
)
def test_mixed_dtypes(operator, dtype, parameters, expected, sharing, device):
    """Of float64 each holds half as many elements."""
    x, dy = torch.randn(2, 2, N, device=device).to(dtype)
    compare(operator, x, *operator.parameters(N, parameters, device), dy)
    if dtype == torch.float64:
        assert sharing in ([8, 8], [3, 5])  # the backward pass's blocks hold all that they can
    else:
        assert sharing == expected


def test_from_the_output(expected, sharing, device):
    x, weight, bias, dy = inputs(device, 3, N)
    found = gradients(layer_norm, x, weight, bias, dy)
    from_input = gradients(layer_norm, x, weight, bias, dy, save="input")
    for ours, theirs in zip(found, from_input, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert sharing == 2 * expected


def test_large_mean(expected, sharing, device):
    """A mean of 10,000 standard deviations, and a first part that is like nothing that follows."""
    x = torch.randn(2, N, device=device) + 1e4
    x[1, : N // 3] = 0
    y = tF.layer_norm(x, (N,))
    assert_close(y, reference.normalize(x, -1, eps=1e-5), terms=N, what="y")
    assert sharing == expected[:1]


@every_operator
def test_special_values(operator, expected, sharing, device):
    """NaN and infinities in one part of a row reach all of it, and no other row."""
    x = torch.randn(4, N, device=device)
    x[0, 1] = float("nan")
    x[1, 2], x[1, -1] = float("inf"), -float("inf")
    x[2, 5000] = float("inf")
    torch.testing.assert_close(
        operator.ours(x, None, None), operator.theirs(x, None, None), equal_nan=True
    )
    assert sharing == expected[:1]


@pytest.mark.parametrize("needed", ["x", "weight bias"])
def test_only_the_needed_gradients(needed, expected, sharing, device):
    """Each subset of gradients is that of the full backward pass. Without that of x, a row has no sums
    that would have to be held."""
    x, dy = torch.randn(2, 3, N, device=device)
    inputs = (x, *LAYER_NORM.parameters(N, torch.float32, device))
    _, everything = run(LAYER_NORM, *inputs, dy)
    names = ("x", "weight", "bias")
    leaves = [t.clone().requires_grad_(name in needed) for name, t in zip(names, inputs, strict=True)]
    LAYER_NORM.ours(*leaves).backward(dy)
    for name, leaf, full in zip(names, leaves, everything, strict=True):
        if name in needed:
            torch.testing.assert_close(leaf.grad, full)
    assert sharing[:3] == [*expected, expected[0]]


def test_more_rows_than_programs(expected, sharing, monkeypatch, device):
    """Programs walk through several rows, and teams take several walks; the bits of a row depend on
    neither, nor on how many rows there are, and those of dweight not on the number of teams."""
    x, dy = torch.randn(2, 4, N, device=device)
    parameters = LAYER_NORM.parameters(N, x.dtype, device)
    y, (dx, *_) = run(LAYER_NORM, x, *parameters, dy)
    monkeypatch.setattr(heuristics.common, "MAX_PARTIALS", 2)
    launch.common.forget_plans()
    (few_y, few), _ = compare(LAYER_NORM, x, *parameters, dy)
    assert torch.equal(y, few_y)
    assert torch.equal(dx, few[0])

    choose = heuristics.teams.row_team
    monkeypatch.setattr(heuristics.teams, "row_team", lambda *a: replace(choose(*a), teams=1))
    _, fewer = run(LAYER_NORM, x, *parameters, dy)
    for one, other in zip(few, fewer, strict=True):
        assert torch.equal(one, other)

    one_y, (one_dx, *_) = run(LAYER_NORM, x[3:4], *parameters, dy[3:4])
    assert torch.equal(y[3:4], one_y)
    assert torch.equal(dx[3:4], one_dx)
    assert sharing == 4 * expected


@pytest.mark.gpu
@pytest.mark.parametrize("n", [16384, 32768, 65536, 131072, 262144, 100001])
@pytest.mark.parametrize("allow", [allow_clusters, allow_teams])
@pytest.mark.parametrize("operator", [LAYER_NORM, RMS_NORM], ids=str)
def test_on_a_gpu(operator, allow, n, sharing, monkeypatch, device):
    """Every size of a cluster, and teams of up to 128 programs, with more rows than fit on the GPU at
    once, twice to the same bits."""
    allow(monkeypatch)
    m = 2 * torch.cuda.get_device_properties(device).multi_processor_count + 3
    x, dy = torch.randn(2, m, n, device=device, dtype=torch.bfloat16)
    parameters = operator.parameters(n, x.dtype, device)
    (y, found), _ = compare(operator, x, *parameters, dy)
    again_y, again = run(operator, x, *parameters, dy)
    assert torch.equal(y, again_y)
    for first, second in zip(found, again, strict=True):
        assert first is None or torch.equal(first, second)
    assert max(sharing) > 1
