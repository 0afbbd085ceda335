"""Whether the backward pass of a row normalization can start from its output.

    y = x_hat * w + b,  w = weight_offset + weight,    x_hat = (y - b) / w

y is rounded once, by at most u = eps / 2 of its dtype relative to it. So x_hat comes back within
u * (|x_hat| + |b / w|), that is with the precision of y, wherever

1. |b| <= |w|: the bias does not drown x_hat;
2. |w| is so large that neither y nor what is computed from it in float32 is subnormal for an x_hat of
   ordinary size;
3. |w| * sqrt(n) + |b| is finite in y's dtype, as |x_hat| <= sqrt(n): nothing overflows.

All elements of a parameter must pass, which NaN does not. Nothing is clamped: where one does not pass,
the input is kept. So it is where the kernels hold too little, which `heuristics.rows.recovers` tells.
"""

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .dtypes import compute_dtype
from .heuristics.rows import recovers

_decided = WeakTensorKeyDictionary()
"""Of each weight: decisions by what else they depend on, with the versions they are of."""

MOST_DECISIONS = 16
"""Of one weight: uses of it with several biases, lengths or dtypes."""


def least_weight(dtype) -> float:
    """Criterion 2."""
    float32 = torch.finfo(torch.float32)
    return max(torch.finfo(dtype).smallest_normal, float32.smallest_normal / float32.eps)


def _suffices(weight, bias, weight_offset, wide, dtype, n):
    w = (weight.detach().to(wide) + weight_offset).abs()
    passes = w >= least_weight(dtype)
    largest = w * n**0.5
    if bias is not None:
        b = bias.detach().to(wide).abs()
        passes &= b <= w
        largest = largest + b
    return bool((passes & (largest <= torch.finfo(dtype).max)).all())


def output_suffices(x, weight, bias, options, dtype, n) -> bool:
    """Whether the output of `dtype`, of rows of n elements, can be kept in the place of x.

    Parameters are read, on a GPU with a wait, when their version has moved since they were last looked
    at: once an optimizer step. They are read at every call as long as the version is 0, as FSDP2 keeps
    it. While a CUDA graph is captured x is kept: parameters may change between its replays.
    """
    if not recovers(n, x.element_size()):
        return False
    if x.dtype != dtype or options.eps < 0 or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    parameters = [t for t in (weight, bias) if t is not None]
    if any(t.is_inference() or not t.is_leaf for t in parameters):
        return False  # they do not tell when they change, or are new at every call
    if weight is None:
        return bias is None
    case = bias if bias is None else id(bias), options.weight_offset, dtype, n
    versions = [(t.data_ptr(), t._version) for t in parameters]
    decisions = _decided.setdefault(weight, {})
    if case not in decisions or decisions[case][0] != versions or not all(v for _, v in versions):
        if len(decisions) >= MOST_DECISIONS:
            decisions.clear()
        decisions[case] = (
            versions,
            _suffices(weight, bias, options.weight_offset, compute_dtype(x), dtype, n),
        )
    return decisions[case][1]
