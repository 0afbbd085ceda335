"""Whether two launches of the same sums in another order agree: what they may differ by, and no more.

Each result is within half an ulp of its dtype of what the wide arithmetic gave, and that within the
roundings of an element and of its sums, which grow no faster than the square root of what is summed.
Two results may be so far apart twice.
"""

from math import sqrt

import torch

from tritonnorm.dtypes import compute_dtype

ELEMENTWISE = 8
"""Roundings in the wide arithmetic between the inputs and an element, beside those of sums: of the
statistics, the difference, and the formula's products and sums."""


def disagreement(expected: torch.Tensor, actual: torch.Tensor, terms: int) -> str | None:
    """How `actual` is another result than `expected`, if no sum has more than so many terms; None if it
    is the same but for the order of sums. NaN and infinities agree with themselves alone."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return "another shape or dtype"
    finite = expected.isfinite()
    if not torch.equal(actual.isnan(), expected.isnan()):
        return "NaN elsewhere"
    if not torch.equal(actual[~finite].nan_to_num(), expected[~finite].nan_to_num()):
        return "infinite elsewhere"
    theirs, ours = expected[finite].double(), actual[finite].double()
    if not theirs.numel():
        return None
    info, wide = torch.finfo(expected.dtype), torch.finfo(compute_dtype(expected))
    ulp = theirs.abs().clamp(min=info.smallest_normal) * info.eps
    allowed = ulp + 2 * wide.eps * theirs.abs().max() * (ELEMENTWISE + sqrt(terms))
    excess = (ours - theirs).abs() / allowed
    if not excess.max() <= 1:  # also where an element of `actual` alone is infinite
        return f"{excess.max().item():.3g} times what another order of sums allows"
    return None
