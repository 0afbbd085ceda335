"""What every test compares with: normalization in float64, from the definition."""

import torch


def normalize(x, dims, *, center=True, eps=0.0, weight=None, bias=None):
    """Normalizes x over `dims`: less the mean, over the standard deviation, times weight, plus bias.

    All in float64; autograd of these lines is the reference for gradients.
    """
    x = x.double()
    deviation = x - x.mean(dims, keepdim=True) if center else x
    variance = deviation.square().mean(dims, keepdim=True)
    y = deviation / torch.sqrt(variance + eps)
    y = y if weight is None else y * weight.double()
    return y if bias is None else y + bias.double()


def l2_normalize(x, dims, *, eps):
    """x over its Euclidean norm, or over eps where that is larger."""
    x = x.double()
    norm = x.square().sum(dims, keepdim=True).sqrt()
    return x / torch.where(norm < eps, torch.full_like(norm, eps), norm)


def gradients(function, inputs, dy):
    """y and the gradients of a function of float64 leaves made of `inputs`; None stays None."""
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    y = function(*leaves)
    found = torch.autograd.grad(y, [t for t in leaves if t is not None], dy.double())
    found = iter(found)
    return y.detach(), [None if t is None else next(found) for t in leaves]
