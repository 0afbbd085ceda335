"""BatchNorm in evaluation: with the statistics that are given, against the float64 reference."""

import pytest
import reference
import torch
from cases import DTYPES
from channels import EPS, NAMES, every_format, in_format
from tolerances import assert_close, wide

import tritonnorm.functional as tF


def given(x, weight, bias, mean, var):
    return tF.batch_norm(x, mean, var, weight, bias, False, 0.1, EPS)


def given_exactly(x, weight, bias, mean, var):
    along = (-1, *[1] * (x.dim() - 2))
    mean, rstd = mean.double().view(along), (var.double() + EPS).rsqrt().view(along)
    return (x.double() - mean) * rstd * weight.double().view(along) + bias.double().view(along)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 6), (3, 70, 7, 7), (17, 16, 5, 3), (2, 3, 90, 100)], ids=str)
@every_format
def test_evaluation(shape, memory_format, dtype, device):
    """With the statistics that are given, forward and backward; they are not changed."""
    x, dy = (in_format(torch.randn(shape, device=device).to(dtype), memory_format) for _ in range(2))
    weight, bias, mean = torch.randn(3, shape[1], device=device)
    var = torch.rand(shape[1], device=device) + 0.1
    kept = mean.clone(), var.clone()
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = given(*leaves, mean, var)
    gradients = torch.autograd.grad(y, leaves, dy)
    exact_y, exact = reference.gradients(lambda *t: given_exactly(*t, *kept), (x, weight, bias), dy)
    assert y.stride() == gradients[0].stride() == x.stride()
    assert torch.equal(mean, kept[0])
    assert torch.equal(var, kept[1])
    assert_close(y.detach(), exact_y, terms=1, what="y")
    assert_close(gradients[0], exact[0], terms=1, what="dx")
    m = x.numel() // x.shape[1]
    for what, gradient, expected in zip(NAMES[1:], gradients[1:], exact[1:], strict=True):
        x_hat = given_exactly(x, torch.ones_like(bias), torch.zeros_like(bias), mean, var)
        scale = (dy.double() * x_hat).abs().max().item() * m**0.5
        assert_close(gradient, expected, terms=m, scale=scale, wide_dtype=wide(x.dtype), what=what)


@pytest.mark.parametrize("shape", [(2, 6, 4, 5), (17, 16, 5, 3)], ids=str)
@every_format
def test_frozen(shape, memory_format, device):
    """In evaluation, with parameters that need no gradient, dx alone: bit for bit that of the others."""
    x, dy = (in_format(torch.randn(shape, device=device), memory_format) for _ in range(2))
    weight, bias, mean = torch.randn(3, shape[1], device=device)
    var = torch.rand(shape[1], device=device) + 0.1
    leaf = x.clone().requires_grad_()
    given(leaf, weight, bias, mean, var).backward(dy)
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    given(*leaves, mean, var).backward(dy)
    assert torch.equal(leaf.grad, leaves[0].grad)


def test_gradcheck_twice_in_evaluation(device):
    x = torch.randn(2, 4, 2, device=device, dtype=torch.float64)
    weight, bias, mean = torch.randn(3, 4, device=device, dtype=torch.float64)
    var = torch.rand(4, device=device, dtype=torch.float64) + 0.1
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *t: given(*t, mean, var), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: given(*t, mean, var), leaves)


def test_evaluation_before_a_training_step(device):
    """The backward pass of an evaluation takes the statistics it had, not those of a step since."""
    x = torch.randn(4, 3, 5, device=device, requires_grad=True)
    mean, var = torch.randn(3, device=device), torch.rand(3, device=device) + 0.1
    expected = (var.double() + EPS).rsqrt().view(3, 1).expand(4, 3, 5)
    y = tF.batch_norm(x, mean, var, None, None, False, 0.1, EPS)
    tF.batch_norm(x, mean, var, None, None, True, 0.9, EPS)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx.double(), expected, rtol=1e-6, atol=0)
