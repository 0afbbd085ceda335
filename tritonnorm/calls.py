"""Calls that are prepared once: what a function of `functional` decides about tensors of given sizes,
strides and dtypes is kept, and asked for by what these tensors look like.

On plain tensors, where nothing watches, compiles or transforms, a call is then one look into a
dictionary. All others, and all that are refused, take the way through the function's checks. Every
tenth of a microsecond counts here: it is the host time of all calls.
"""

from contextlib import contextmanager

import torch
from torch.autograd import forward_ad

from .launch.common import forgotten_with_plans
from .watch import EAGER, pre_dispatch_modes

MOST_CALLS = 1024
"""Prepared calls, at most: with their recordings about 20 KB each."""

OPTIONS = (str, int, float, bool, type(None), type, torch.dtype)
"""Types of options that say what they are. Of a tensor the value can change."""

_calls = {}
forgotten_with_plans(lambda: _calls.clear())


@contextmanager
def kept_in(other: dict):
    """While open, calls are kept in another place: for who changes what they depend on."""
    global _calls
    saved, _calls = _calls, other
    try:
        yield
    finally:
        _calls = saved


_is_compiling = torch.compiler.is_dynamo_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_functional = torch._C._are_functorch_transforms_active
_is_tracing = torch._C._is_tracing
_is_autocast = torch.is_autocast_enabled  # on CUDA


def _look(t):
    """What a call depends on of a tensor beside its input."""
    if t is None:
        return None
    return type(t) in EAGER, t.dtype, t.shape, t.is_contiguous(), t.device, t.is_neg()


def _key(x, weight, bias, mean, variance, options):
    """What a call depends on; None where a dispatch mode, a transform or a tracer has to see it."""
    if (
        type(x) not in EAGER
        or _dispatch_modes() > 0
        or pre_dispatch_modes()
        or _is_functional()
        or _is_tracing()
        or forward_ad._current_level >= 0
    ):
        return None
    about = x.dtype, x.shape, x.stride(), x.device, x.is_neg()
    parameters = _look(weight), _look(bias), _look(mean), _look(variance)
    return about, parameters, _is_autocast(), options


def prepared(x, weight, bias, options, mean=None, variance=None):
    """The call that was prepared for such tensors and options, the name of the function first; or None.

    Whatever is wrong with an argument is for the function to say.
    """
    if _is_compiling():
        return None
    try:
        return _calls.get(_key(x, weight, bias, mean, variance, options))
    except (AttributeError, RuntimeError, TypeError):  # no tensor, no strides, no hash
        return None


def _are_constant(options) -> bool:
    """Whether options have values that do not change, and a hash."""
    return all(
        _are_constant(o) if isinstance(o, tuple) else any(type(o) is kind for kind in OPTIONS)
        for o in options
    )


def prepare(call, x, weight, bias, options, mean=None, variance=None):
    """Keeps a call for such tensors and options, unless something watches, a tensor has to be looked at
    or copied first, or an option could change. Returns the call that is kept, or else this one."""
    key = _key(x, weight, bias, mean, variance, options)
    if key is None or x.is_neg() or not _are_constant(options):
        return call
    for t in (weight, bias, mean, variance):
        if t is not None and (type(t) not in EAGER or t.is_neg() or not t.is_contiguous()):
            return call
    if len(_calls) >= MOST_CALLS:
        _calls.clear()
    return _calls.setdefault(key, call)
