"""Calls that are prepared once: what a function of `functional` decides about tensors of given sizes,
strides and dtypes is kept, and asked for by what these tensors look like.

On plain tensors, where nothing watches, compiles or transforms, a call is then one look at its tensors.
All others, and all that are refused, take the way through the function's checks. Every tenth of a
microsecond counts here: it is the host time of all calls.
"""

from contextlib import contextmanager

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

from .launch.common import forgotten_with_plans
from .watch import EAGER, pre_dispatch_modes

try:
    # What torch.compile asks of tensors before it runs what it compiled for such, in one call: type,
    # dtype, device, sizes, strides, whether they require a gradient, and what decides the dispatch of
    # operators in this thread: transforms, tracers, autocast on the tensors' device. It overlooks some
    # dispatch modes, and forward-mode AD: `is_observed` asks for these.
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None

MOST_CALLS = 1024
"""Prepared calls, at most: with their recordings about 20 KB each."""

MOST_LOOKS = 16
"""Prepared calls of one function with the same options and sizes, at most."""

OPTIONS = (str, int, float, bool, type(None), type, torch.dtype)
"""Types of options that say what they are. Of a tensor the value can change."""


class _Absent(torch.Tensor):
    """The type of what is looked at in the place of None: one for each of a call's parameters, since no
    tensor may be looked at twice."""


def _guard(*tensors):
    """A function of as many tensors: whether they look like these, as TensorGuards has it."""
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


def _guards_tell() -> bool:
    """Whether TensorGuards, which PyTorch may change at any time, tells what is expected of it."""
    x = torch.empty(2, 3, device="cpu")
    others = x.double(), x[:1], x.new_empty(3, 2).mT, x.clone().requires_grad_()
    try:
        looks = _guard(x)
        return looks(x.clone()) and not any(map(looks, others))
    except Exception:  # whatever it then raises
        return False


with _disable_current_modes():  # who imports this may be tracing
    WEIGHT, BIAS, MEAN, VARIANCE = (torch.empty(0, device="cpu").as_subclass(_Absent) for _ in range(4))
    if not _guards_tell():  # nothing is prepared
        TensorGuards = None

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
_is_grad_enabled = torch.is_grad_enabled
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def is_observed() -> bool:
    """Whether somebody has to see a call who does not show in how its tensors look."""
    return _is_compiling() or _dispatch_modes() > 0 or forward_ad._current_level >= 0


def _is_ordinary(*tensors) -> bool:
    """Whether these are tensors of which calls are kept: plain ones, while no dispatch mode, transform
    or tracer has to see the call."""
    return (
        TensorGuards is not None
        and not is_observed()
        and not pre_dispatch_modes()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._is_tracing()
        and all(type(t) in EAGER and not t.is_neg() and not _is_wrapped(t) for t in tensors)
    )


def looks_like(*tensors):
    """A function of as many tensors: whether they, and what dispatches operators, look like these, now;
    a Parameter is no Tensor. None where calls are not to be kept, or a tensor is there twice."""
    if len({id(t) for t in tensors}) < len(tensors):
        return None
    if not _is_ordinary(*(t for t in tensors if type(t) is not _Absent)):
        return None
    return _guard(*tensors)


def _looked_at(x, weight, bias, mean, variance) -> tuple:
    """What is looked at of a call's tensors: few, as each takes a tenth of a microsecond."""
    if weight is None:
        weight = WEIGHT
    if mean is None and variance is None:
        return (x, weight) if bias is None else (x, weight, bias)
    if bias is None:
        bias = BIAS
    return x, weight, bias, MEAN if mean is None else mean, VARIANCE if variance is None else variance


def prepared(x, weight, bias, options, mean=None, variance=None):
    """What was prepared for such tensors and options, the name of the function first: a function of the
    tensors; or None.

    Whatever is wrong with an argument is for the function to say.
    """
    # `is_observed`, without the call
    if _is_compiling() or _dispatch_modes() > 0 or forward_ad._current_level >= 0:
        return None
    if type(x) not in EAGER:
        return None
    tensors = _looked_at(x, weight, bias, mean, variance)
    try:
        kept = _calls.get((x.shape, len(tensors), options))
    except (RuntimeError, TypeError):  # no sizes, no hash
        return None
    if kept is None:
        return None
    for looks, compute, differentiable in kept:
        if looks(*tensors):
            return differentiable if differentiable is not None and _is_grad_enabled() else compute
    return None


def _are_constant(options) -> bool:
    """Whether options have values that do not change, and a hash."""
    return all(
        _are_constant(o) if isinstance(o, tuple) else any(type(o) is kind for kind in OPTIONS)
        for o in options
    )


def prepare(call, x, weight, bias, options, mean=None, variance=None):
    """Keeps a call for such tensors and options, unless something watches, a tensor has to be looked at
    or copied first, or an option could change.

    Args:
        call: has functions `compute` and `differentiable` of the tensors.
    """
    tensors = _looked_at(x, weight, bias, mean, variance)
    constant = not any(t.requires_grad for t in tensors[3:])
    if not (constant and _are_constant(options) and all(t.is_contiguous() for t in tensors[1:])):
        return
    looks = looks_like(*tensors)
    if looks is None:
        return
    if sum(map(len, _calls.values())) >= MOST_CALLS:
        _calls.clear()
    kept = _calls.setdefault((x.shape, len(tensors), options), [])
    # Who prepares a call may have looked at another tensor than `prepared` does.
    if any(known(*tensors) for known, *_ in kept):
        return
    needs_graph = any(t.requires_grad for t in tensors) and not torch.is_inference_mode_enabled()
    kept.insert(0, (looks, call.compute, call.differentiable if needs_graph else None))
    del kept[MOST_LOOKS:]
