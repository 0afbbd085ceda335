"""Whether the backward pass of a row normalization can start from its output.

    y = x_hat * w + b,  w = weight_offset + weight,    x_hat = (y - b) / w

y is rounded once, by at most u = eps / 2 of its dtype relative to it. So x_hat comes back within
u * (|x_hat| + |b / w|), that is with the precision of y, wherever

1. |b| <= |w|: the bias does not drown x_hat;
2. |w| is at least the smallest normal number of y's dtype: x_hat does not drown in its subnormal ones;
3. |w| * sqrt(n) + |b| is finite in it, as |x_hat| <= sqrt(n): nothing overflows.

All elements of a parameter must pass, which NaN does not. Nothing is clamped: where one does not pass,
the input is kept.
"""

import torch
from torch.utils.weak import WeakTensorKeyDictionary

_decided = WeakTensorKeyDictionary()
"""Of weights: the state that was looked at, and the decision."""


def _state(weight, bias, *others):
    parameters = ((t.data_ptr(), t._version) for t in (weight, bias) if t is not None)
    return *parameters, *others


def _suffices(weight, bias, weight_offset, dtype, n):
    info, w = torch.finfo(dtype), (weight.detach().double() + weight_offset).abs()
    passes = w >= info.smallest_normal
    largest = w * n**0.5
    if bias is not None:
        b = bias.detach().double().abs()
        passes &= b <= w
        largest = largest + b
    return bool((passes & (largest <= info.max)).all())


def output_suffices(x, weight, bias, weight_offset, dtype, n) -> bool:
    """Whether the output of `dtype`, of rows of n elements, can be kept in the place of x.

    Parameters are read, on a GPU with a wait, when they have changed since they were last looked at:
    once an optimizer step. While a CUDA graph is captured nothing is read, and x kept unless known.
    """
    if x.dtype != dtype:
        return False
    if weight is None:
        return bias is None
    if weight.is_inference() or (bias is not None and bias.is_inference()):
        return False  # they do not tell when they change
    state = _state(weight, bias, weight_offset, dtype, n)
    known = _decided.get(weight)
    if known is None or known[0] != state:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        known = _decided[weight] = state, _suffices(weight, bias, weight_offset, dtype, n)
    return known[1]
