"""The row normalizations under test: ours, PyTorch's and the reference, behind one signature."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import reference
import torch
import torch.nn.functional as F

import tritonnorm.functional as tF

EPS = 1e-5
L2_EPS = 1e-12


@dataclass(frozen=True)
class Operator:
    """`ours`, `theirs` and `exact` take (x, weight, bias, dims), the number of dimensions normalized."""

    name: str
    ours: Callable
    theirs: Callable
    exact: Callable
    has_weight: bool
    has_bias: bool
    weight_offset: float = 0.0

    def __str__(self):
        return self.name

    def parameters(self, shape, dtype, device):
        """weight and bias, or None, of other magnitudes than 1 and 0."""
        weight = torch.randn(shape, dtype=dtype, device=device) if self.has_weight else None
        bias = torch.randn(shape, dtype=dtype, device=device) if self.has_bias else None
        return weight, bias


def _last(dims):
    return tuple(range(-dims, 0))


LAYER_NORM = Operator(
    "layer_norm",
    lambda x, w, b, dims=1: tF.layer_norm(x, x.shape[-dims:], w, b, EPS),
    lambda x, w, b, dims=1: F.layer_norm(x, x.shape[-dims:], w, b, EPS),
    lambda x, w, b, dims=1: reference.normalize(x, _last(dims), eps=EPS, weight=w, bias=b),
    has_weight=True,
    has_bias=True,
)
RMS_NORM = Operator(
    "rms_norm",
    lambda x, w, b, dims=1: tF.rms_norm(x, x.shape[-dims:], w, EPS),
    lambda x, w, b, dims=1: F.rms_norm(x, x.shape[-dims:], w, EPS),
    lambda x, w, b, dims=1: reference.normalize(x, _last(dims), center=False, eps=EPS, weight=w),
    has_weight=True,
    has_bias=False,
)
NORMALIZE = Operator(
    "normalize",
    lambda x, w, b, dims=1: tF.normalize(x, dim=_last(dims), eps=L2_EPS),
    lambda x, w, b, dims=1: F.normalize(x, dim=_last(dims), eps=L2_EPS),
    lambda x, w, b, dims=1: reference.l2_normalize(x, _last(dims), eps=L2_EPS),
    has_weight=False,
    has_bias=False,
)
OPERATORS = (LAYER_NORM, RMS_NORM, NORMALIZE)

every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=str)


def run(operator, x, weight, bias, dy, dims=1):
    """Our y and the gradients of x, weight and bias (None for what is None)."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    y = operator.ours(*leaves, dims)
    found = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dy))
    return y.detach(), [None if t is None else next(found) for t in leaves]
