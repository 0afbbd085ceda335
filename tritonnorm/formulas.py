"""The normalizations in plain PyTorch, from the definition: not fused, differentiable in every way.

They serve where a kernel's result would be cut off from autograd, and where PyTorch has no operator.
"""

from math import inf, prod
from typing import NamedTuple

import torch

from .dtypes import compute_dtype


class RowOptions(NamedTuple):
    """What is computed of each row: y = x_hat * (weight_offset + weight) + bias."""

    norm: str  # "layer", "rms" or "l2"
    eps: float
    weight_offset: float = 0.0
    round_to: torch.dtype | None = None  # of 16 bits, to which x_hat is rounded before it is multiplied


def row_formula(x, weight, bias, normalized_dims, options, dtype):
    """Layer, RMS and L2 normalization over the last `normalized_dims` dimensions. Derivatives are those
    of the formula without its rounding."""
    norm, eps, weight_offset, round_to = options
    dims = tuple(range(-normalized_dims, 0))
    x_hat = x.to(compute_dtype(x))
    if norm == "l2":
        x_hat = x_hat / torch.linalg.vector_norm(x_hat, dim=dims, keepdim=True).clamp_min(eps)
    else:
        if norm == "layer":
            x_hat = x_hat - x_hat.mean(dims, keepdim=True)
        x_hat = x_hat * torch.rsqrt(x_hat.square().mean(dims, keepdim=True) + eps)
    y = x_hat
    if weight is not None:
        weight = weight.to(x_hat.dtype)
        weight = weight + weight_offset if weight_offset else weight
        y = x_hat * weight
    if round_to is not None:
        rounded = x_hat.to(round_to).to(x_hat.dtype)
        rounded = rounded if weight is None else rounded * weight
        y = y + (rounded - y).nan_to_num(0.0, inf, -inf).detach()  # the value is exactly `rounded`
    if bias is not None:
        y = y + bias
    return y.to(dtype)


def row_deviation(y, weight, bias, rstd, normalized_dims, options):
    """x less its mean, from the y of `row_formula` and the rstd of each row."""
    x_hat = y.to(rstd.dtype)
    if bias is not None:
        x_hat = x_hat - bias
    if weight is not None:
        x_hat = x_hat / (weight.to(rstd.dtype) + options.weight_offset)
    rows = (*y.shape[: y.dim() - normalized_dims], *[1] * normalized_dims)
    return (x_hat / rstd.view(rows)).to(y.dtype)


def channel_formula(x, weight, bias, groups, over, eps, dtype, given=None):
    """Batch, group and instance normalization of `[N, C, *spatial]`."""
    n, c = x.shape[:2]
    grouped = (n, groups, c // groups, prod(x.shape[2:]))
    x_hat = x.to(compute_dtype(x)).reshape(grouped)
    if over == "given":
        mean, variance = (t.to(x_hat.dtype).view(c, 1, 1) for t in given)
        x_hat = x_hat - mean
    else:
        dims = (0, 2, 3) if over == "batch" else (2, 3)
        x_hat = x_hat - x_hat.mean(dims, keepdim=True)
        variance = x_hat.square().mean(dims, keepdim=True)
    y = (x_hat * torch.rsqrt(variance + eps)).reshape(n, c, prod(x.shape[2:]))
    if weight is not None:
        y = y * weight[:, None]
    if bias is not None:
        y = y + bias[:, None]
    return y.to(dtype).reshape(x.shape)


def weight_formula(v, g, dim):
    """Weight normalization; dim None is the norm of all of v."""
    wide = v.to(compute_dtype(v))
    others = [d for d in range(v.dim()) if d != dim]
    norm = torch.linalg.vector_norm(wide, dim=others, keepdim=True) if others else wide.abs()
    g = g if dim is not None else g.reshape([1] * v.dim())
    return (wide * (g.to(wide.dtype) / norm)).to(v.dtype)
