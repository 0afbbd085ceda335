"""What the bits of rows do not depend on: other runs, other rows, a weight of ones, and which gradients
are wanted."""

import pytest
import torch
from operators import LAYER_NORM, RMS_NORM, every_operator, run


@pytest.mark.parametrize("needed", ["x", "weight", "bias", "x bias", "weight bias"])
@pytest.mark.parametrize("n", [64, 127, 2560, 9000], ids=["resident", "narrow", "tiles", "split"])
def test_only_the_needed_gradients(needed, n, device):
    """Each subset of gradients is that of the full backward pass, bit for bit."""
    x, dy = torch.randn(2, 2 if n > 8192 else 5, n, device=device)
    inputs = (x, *LAYER_NORM.parameters(n, torch.float32, device))
    _, everything = run(LAYER_NORM, *inputs, dy)
    names = ("x", "weight", "bias")
    leaves = [t.clone().requires_grad_(name in needed) for name, t in zip(names, inputs, strict=True)]
    LAYER_NORM.ours(*leaves).backward(dy)
    for name, leaf, full in zip(names, leaves, everything, strict=True):
        assert (leaf.grad is None) if name not in needed else torch.equal(leaf.grad, full)


@every_operator
@pytest.mark.parametrize("n", [64, 1000, 20000])
def test_same_bits_again(operator, n, device):
    x, dy = torch.randn(2, 2 if n > 10000 else 7, n, device=device)
    weight, bias = operator.parameters(n, torch.float32, device)
    first, second = (run(operator, x, weight, bias, dy) for _ in range(2))
    assert torch.equal(first[0], second[0])
    for a, b in zip(first[1], second[1], strict=True):
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("operator", [LAYER_NORM, RMS_NORM], ids=str)
@pytest.mark.parametrize("n", [127, 130, 256, 512])
def test_sums_do_not_depend_on_the_weight(operator, n, device):
    """Its presence, dtype and alignment decide loads of a tile's shape, but not the layout of x."""
    x = torch.randn(16, n, device=device)
    ones = torch.ones(n + 1, device=device)
    y, _ = run(operator, x, None, None, x)
    for weight in (ones[:n], ones[1:], ones[:n].bfloat16()):
        assert torch.equal(run(operator, x, weight, None, x)[0], y)


@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [60, 127, 1004, 2560, 20000])
def test_batch_invariance(operator, n, dtype, device):
    """The bits of a row do not depend on the other rows: not on how many, nor on where it starts.
    At n = 60 and 1004, rows start at other alignments than the batch does."""
    m = 3 if n > 10000 else 23
    x, dy = torch.randn(2, m, n, device=device).to(dtype)
    weight, bias = operator.parameters(n, dtype, device)
    y, (dx, *_) = run(operator, x, weight, bias, dy)
    for start, stop in [(1, 2)] if n > 10000 else [(0, 1), (1, 2), (3, m - 1), (m - 1, m)]:
        part_y, (part_dx, *_) = run(operator, x[start:stop], weight, bias, dy[start:stop])
        assert torch.equal(part_y, y[start:stop])
        assert torch.equal(part_dx, dx[start:stop])
