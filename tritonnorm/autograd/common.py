"""What the derivatives of all views share."""

import torch
from torch.autograd import forward_ad

from .. import launch, library
from ..calls import MOST_LOOKS, WEIGHT, is_observed, looks_like
from ..launch.replay import Recorded
from ..watch import EAGER, is_watched


def formula_gradients(formula, dy, inputs, needed, options):
    """The gradients of `formula(*inputs, *options)`, which autograd can differentiate again, or batch.

    They are taken with respect to aliases: an input that was computed from another one (a weight
    from x, say) would otherwise contribute to that one's gradient, and hooks would run twice.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [t if t is None else t.view_as(t) for t in inputs]
        y = formula(*aliases, *options)
        wanted = [t for t, need in zip(aliases, needed, strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=create_graph))
    return [next(found) if need else None for need in needed]


_is_grad_enabled = torch.is_grad_enabled
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def takes_kernel(dy) -> bool:
    """Whether a kernel can take this gradient: no second derivative is wanted, and it is plain."""
    return not torch.is_grad_enabled() and is_plain(dy)


def is_plain(dy) -> bool:
    """Whether a gradient has memory of its own, and no more: it is not one of a batch (vmap), nor all
    zeros, nor of a subclass that nobody watches for, nor may it have a tangent."""
    return torch.compiler.is_dynamo_compiling() or not (
        _is_batched(dy)
        or _is_wrapped(dy)
        or dy._is_zerotensor()
        or forward_ad._current_level >= 0
        or (type(dy) not in EAGER and not is_watched(dy))
    )


def backward_runner(runner, dy):
    """What runs a backward pass. Who watches it (compiled autograd, say) sees the operators, though the
    forward pass was launched."""
    return library.operators if is_watched(dy) else runner


class Backwards:
    """The backward passes of calls that look alike, `make(runner, weight, needed)` each: functions of dy
    and of what was saved, x, weight and statistics."""

    def __init__(self, runner, make):
        self.runner, self.make = runner, make
        self.made = {}

    def run(self, dy, saved, needed):
        """The gradients that are `needed` of the inputs; None where a kernel cannot take this dy."""
        # What was saved may come back as another tensor than it was (saved_tensors_hooks).
        x, weight, statistics = saved
        tensors = dy, x, WEIGHT if weight is None else weight, statistics
        if not (_is_grad_enabled() or is_observed()):
            for looks, backward in self.made.get(needed, ()):
                if looks(*tensors):
                    return backward.run(dy, x, weight, statistics)
        if not takes_kernel(dy):
            return None
        runner = backward_runner(self.runner, dy)
        backward = self.make(runner, weight, needed)
        if runner is not launch:  # sizes may be symbols
            return backward(dy, *saved)
        backward = Recorded(backward)
        looks = looks_like(*tensors)
        if looks is not None:
            made = self.made.setdefault(needed, [])
            made.insert(0, (looks, backward))
            del made[MOST_LOOKS:]
        return backward.run(dy, *saved)


def stand_in(x, shape, dtype):
    """For a bias whose gradient is wanted: no gradient depends on what it was, and it is not kept."""
    return torch.zeros(shape, dtype=dtype, device=x.device, requires_grad=True)


class _Plain:
    """A function that is not recorded."""

    def __init__(self, function):
        self.run = function


def recorded(runner, function):
    """The function as `run`, recorded if it launches at once."""
    return (Recorded if runner is launch else _Plain)(function)


def results(ctx, y, statistics):
    """What the forward pass of the registered operators returns: the statistics too."""
    ctx.mark_non_differentiable(statistics)
    return y, statistics


def called_directly(function):
    """Decorates a Function: its nodes call `backward` without the questions that PyTorch asks before.
    Its `apply_directly` is an `apply` for who knows that no transform is at work, nor has been on the
    tensors."""
    function._backward_cls.apply = function.backward
    function.apply_directly = super(torch.autograd.Function, function).apply
    return function


def needs_graph(*tensors) -> bool:
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def contiguous(*tensors):
    return [t if t is None else t.contiguous() for t in tensors]
