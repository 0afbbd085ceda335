"""How far a result may be from the float64 reference, and why.

A result is computed in float32 (float64 for float64 input) and rounded once to its own dtype. So the
error is half an ulp of the output, plus what the wide arithmetic adds: a few roundings of each element,
and the rounding of sums over n terms, which in pairwise or blocked summation grows no faster than the
square root of their number.
"""

from math import sqrt

import torch

ELEMENTWISE = 8
"""Roundings in float32 that stand between the input and an element: the statistics' own last ones,
the difference, the products and sums of the formula."""


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_close(actual, expected, *, terms, scale=None, wide_dtype=None, what="result"):
    """Every element within one ulp of the output's dtype, and the error of the wide arithmetic.

    Args:
        expected: float64.
        terms: numbers that are summed for one element: the reduced length, or rows for a gradient
            of a parameter.
        scale: magnitude of what is summed or subtracted on the way, a number or a tensor that
            broadcasts; by default the largest magnitude of the expected result. Cancellation cannot be
            more exact than its operands.
    """
    assert actual.shape == expected.shape, f"{what}: {actual.shape} instead of {expected.shape}"
    expected = expected.to(actual.device)
    dtype = actual.dtype
    info, wide_info = torch.finfo(dtype), torch.finfo(wide_dtype or wide(dtype))
    finite = expected.isfinite()
    assert torch.equal(actual.isnan(), expected.isnan()), f"{what}: NaN at other places"
    assert torch.equal(actual.isinf(), expected.isinf()), f"{what}: infinite at other places"
    actual, expected = actual.double(), torch.where(finite, expected, 0.0)
    if scale is None:
        scale = expected.abs().max() if expected.numel() else 0.0
    # One ulp, not half: the wide error may push a value over the midpoint between two neighbours.
    rounding = torch.maximum(expected.abs() * info.eps, torch.tensor(info.smallest_normal * info.eps))
    allowed = rounding + wide_info.eps * scale * (ELEMENTWISE + sqrt(terms))
    error = torch.where(finite, (actual - expected).abs(), 0.0)
    excess = error - allowed
    worst = excess.argmax() if excess.numel() else None
    if worst is not None and excess.flatten()[worst] > 0:
        off, most, value = (t.flatten()[worst] for t in (error, allowed.expand_as(error), expected))
        raise AssertionError(f"{what}: {value:.6g} is off by {off:.3g}, and {most:.3g} is allowed")


def assert_no_worse_than(theirs, actual, expected, *, what="result"):
    """Our error is at most 1.5 times PyTorch's, or one ulp of the output's dtype, whichever is larger.

    Errors and values as root mean squares: which of two equally exact results has the larger maximum
    is luck.
    """

    def size(t):
        return t.double().square().mean().sqrt().item()

    ours, other = size(actual.double() - expected), size(theirs.double() - expected)
    ulp = torch.finfo(actual.dtype).eps * size(expected)
    bound = max(1.5 * other, ulp)
    assert ours <= bound, f"{what}: error {ours:.3g}, PyTorch's {other:.3g}, one ulp {ulp:.3g}"
