"""Rows that no program holds alone: by thread-block clusters. In the interpreter a cluster is one
program with the tile of all its blocks, which shows the numerics of that tile; on a GPU it is one."""

import pytest
import reference
import torch
from conftest import INTERPRETED
from operators import LAYER_NORM, RMS_NORM, every_operator, run
from test_rms_norm_variant import OFFSET
from test_rows import compare
from test_saving import gradients, inputs, layer_norm
from tolerances import assert_close

import tritonnorm.functional as tF
from perf.launches import observe
from tritonnorm import heuristics, launch

N = 17003
"""Neither a power of two nor of whole words, and too long for a program, in both passes."""


@pytest.fixture(autouse=True)
def clusters(monkeypatch):
    """Clusters hold what they can. Collects how many blocks each launch over rows has."""
    if INTERPRETED:
        largest = heuristics.rows.LARGEST_CLUSTER
        monkeypatch.setattr(launch.rows, "largest_cluster", lambda index: largest)
    elif launch.common.largest_cluster(torch.cuda.current_device()) == 1:
        pytest.skip("needs a GPU of sm_90 or later, and Triton 3.8 or later")
    blocks = []

    def look(kernel, grid, arguments):
        if "ROWS" in arguments:
            blocks.append(arguments.get("num_ctas", 1))
        kernel[grid](**arguments)

    with observe(look):
        yield blocks


@every_operator
def test_every_norm(operator, clusters, device):
    x, dy = torch.randn(2, 3, N, device=device)
    compare(operator, x, *operator.parameters(N, x.dtype, device), dy)
    assert clusters == [4, 8]


@pytest.mark.parametrize(
    ("operator", "dtype", "parameters"),
    [
        (LAYER_NORM, torch.bfloat16, torch.float32),
        (LAYER_NORM, torch.float64, torch.float64),
        (OFFSET, torch.float16, torch.float32),
    ],
    ids=str,
)
def test_mixed_dtypes(operator, dtype, parameters, clusters, device):
    """Of float64 a block holds half as many elements."""
    x, dy = torch.randn(2, 2, N, device=device).to(dtype)
    compare(operator, x, *operator.parameters(N, parameters, device), dy)
    assert clusters == ([8, 8] if dtype == torch.float64 else [4, 8])


def test_from_the_output(clusters, device):
    x, weight, bias, dy = inputs(device, 3, N)
    found = gradients(layer_norm, x, weight, bias, dy)
    expected = gradients(layer_norm, x, weight, bias, dy, save="input")
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert clusters == [4, 8, 4, 8]


def test_large_mean(clusters, device):
    """A mean of 10,000 standard deviations, and a first part that is like nothing that follows."""
    x = torch.randn(2, N, device=device) + 1e4
    x[1, : N // 3] = 0
    y = tF.layer_norm(x, (N,))
    assert_close(y, reference.normalize(x, -1, eps=1e-5), terms=N, what="y")
    assert clusters == [4]


def test_more_rows_than_programs(clusters, monkeypatch, device):
    """Each cluster walks through several rows; the bits of a row do not depend on how many there are."""
    x, dy = torch.randn(2, 5, N, device=device)
    parameters = LAYER_NORM.parameters(N, x.dtype, device)
    y, (dx, *_) = run(LAYER_NORM, x, *parameters, dy)
    monkeypatch.setattr(heuristics.common, "MAX_PARTIALS", 2)
    launch.common.forget_plans()
    (few_y, few), _ = compare(LAYER_NORM, x, *parameters, dy)
    assert torch.equal(y, few_y)
    assert torch.equal(dx, few[0])
    one_y, (one_dx, *_) = run(LAYER_NORM, x[3:4], *parameters, dy[3:4])
    assert torch.equal(y[3:4], one_y)
    assert torch.equal(dx[3:4], one_dx)
    assert set(clusters) == {4, 8}


@pytest.mark.gpu
@pytest.mark.parametrize("n", [16384, 32768, 65536, 131072, 262144, 100001])
@pytest.mark.parametrize("operator", [LAYER_NORM, RMS_NORM], ids=str)
def test_on_a_gpu(operator, n, clusters, device):
    """Every size of a cluster, with more rows than fit on the GPU at once, twice to the same bits."""
    m = 2 * torch.cuda.get_device_properties(device).multi_processor_count + 3
    x, dy = torch.randn(2, m, n, device=device, dtype=torch.bfloat16)
    parameters = operator.parameters(n, x.dtype, device)
    (y, found), _ = compare(operator, x, *parameters, dy)
    again_y, again = run(operator, x, *parameters, dy)
    assert torch.equal(y, again_y)
    for first, second in zip(found, again, strict=True):
        assert first is None or torch.equal(first, second)
    assert max(clusters) > 1
