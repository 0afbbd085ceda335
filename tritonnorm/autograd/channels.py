"""BatchNorm, GroupNorm and InstanceNorm as differentiable operators."""

from functools import partial

import torch

from .. import launch, library
from ..calls import prepare
from ..formulas import channel_formula
from ..watch import check_constants, is_watched
from .common import (
    Backwards,
    called_directly,
    contiguous,
    formula_gradients,
    needs_graph,
    recorded,
    results,
    stand_in,
)


def _forward(runner, groups, over, eps, dtype, momentum, *, save_statistics):
    def forward(x, weight, bias, *moved):
        running = launch.Running(*moved, momentum) if moved else None
        outputs = dict(dtype=dtype, running=running, save_statistics=save_statistics)
        return runner.channel_forward(x, weight, bias, groups, over, eps, **outputs)

    return forward


def _apply(runner, eps, dtype):
    def apply(x, weight, bias, mean, variance):
        return (runner.channel_apply(x, weight, bias, mean, variance, eps, dtype=dtype),)

    return apply


def _backward(groups, over, eps, bias_dtype, runner, weight, needed):
    outputs = dict(
        needs_dx=needed[0],
        dweight_dtype=weight.dtype if needed[1] else None,
        dbias_dtype=bias_dtype if needed[2] else None,
    )

    def backward(dy, x, weight, statistics):
        dy = dy.resolve_neg()
        weight, statistics = contiguous(weight, statistics)
        if over == "given":
            return runner.channel_apply_backward(dy, x, weight, statistics, eps, **outputs)
        return runner.channel_backward(dy, x, weight, statistics, groups, over, **outputs)

    return backward


class ChannelCall:
    """A normalization of tensors `[N, C, *spatial]` that look alike, with contiguous parameters and
    statistics: y is `compute(x, weight, bias, statistics)`, and differentiable by `differentiable`. It
    takes the statistics of the "batch" or of each image's "group"s of channels, and moves the running
    (mean, variance) by the momentum, unless there are none, (); or it takes (mean, variance) that are
    "given".
    """

    def __init__(self, runner, groups, over, eps, dtype, bias, momentum=None):
        self.runner, self.groups, self.over = runner, groups, over
        self.eps, self.dtype = eps, dtype
        self.bias_dtype = None if bias is None else bias.dtype
        if over == "given":
            self.without_statistics = recorded(runner, _apply(runner, eps, dtype))
            self.with_statistics = self.without_statistics
        else:
            arguments = runner, groups, over, eps, dtype, momentum
            self.without_statistics = recorded(runner, _forward(*arguments, save_statistics=False))
            self.with_statistics = recorded(runner, _forward(*arguments, save_statistics=True))
        make = partial(_backward, groups, over, eps, self.bias_dtype)
        self.backwards = Backwards(runner, make)

    def compute(self, x, weight, bias, statistics=()):
        return self.without_statistics.run(x, weight, bias, *statistics)[0]

    def differentiable(self, x, weight, bias, statistics=()):
        return ChannelNorm.apply_directly(self, statistics, x, weight, bias)


@called_directly
class ChannelNorm(torch.autograd.Function):
    """A `ChannelCall` of x, weight and bias, with the statistics that it moves or is given."""

    @staticmethod
    def forward(ctx, call, statistics, x, weight, bias):
        y, *found = call.with_statistics.run(x, weight, bias, *statistics)
        ctx.call = call
        if call.over == "given":
            # Copies: a training step in between may move them before the backward pass comes.
            ctx.save_for_backward(x, weight, launch.joined_statistics(*statistics))
            return y
        ctx.save_for_backward(x, weight, *found)
        return y if call.runner is launch else results(ctx, y, *found)

    @staticmethod
    def backward(ctx, dy, *_):
        call, needed, saved = ctx.call, ctx.needs_input_grad[2:], ctx.saved_tensors
        gradients = call.backwards.run(dy, saved, needed)
        if gradients is not None:
            return None, None, *gradients
        x, weight, statistics = saved
        bias = stand_in(x, x.shape[1:2], call.bias_dtype) if needed[2] else None
        given = launch.statistics_of(statistics, x.shape[1]) if call.over == "given" else None
        options = call.groups, call.over, call.eps, call.dtype, given
        gradients = formula_gradients(channel_formula, dy, (x, weight, bias), needed, options)
        return None, None, *gradients


def normalize_channels(x, weight, bias, groups, over, eps, dtype, running=None, given=None, *, key):
    """Normalizes x `[N, C, *spatial]` with the statistics of the "batch", of each image's "group"s of
    channels, or with a mean and variance `[C]` that are "given". `running` is updated in place. The call
    is prepared for the next one of this `key`."""
    if is_watched(x, weight, bias):
        ops, options = torch.ops.tritonnorm, (groups, over, eps, dtype, False)
        if over == "given":
            return ops.channel_apply(x, weight, bias, *given, eps, dtype)
        if running is None:
            return ops.channel_norm(x, weight, bias, *options)[0]
        running = library.running_arguments(running)
        return ops.channel_norm_running(x, weight, bias, *running, *options)[0]
    momentum, statistics = None, ()
    if over == "given":
        statistics = tuple(contiguous(*given))
    elif running is not None:
        momentum, statistics = running.momentum, running[:2]
    call = ChannelCall(launch, groups, over, eps, dtype, bias, momentum)
    if not isinstance(momentum, torch.Tensor):
        prepare(call, x, weight, bias, key, *statistics)
    weight, bias = contiguous(weight, bias)
    if needs_graph(x, weight, bias):
        return ChannelNorm.apply(call, statistics, x, weight, bias)
    return call.compute(x, weight, bias, statistics)


def _channel_norm(x, weight, bias, groups, over, eps, dtype, save_statistics, running=()):
    if needs_graph(x, weight, bias):
        momentum = (running[3] if running[2] is None else running[2]) if running else None
        call = ChannelCall(library.operators, groups, over, eps, dtype, bias, momentum)
        return ChannelNorm.apply(call, running[:2], x, weight, bias)
    name = "channel_norm_running" if running else "channel_norm"
    options = (groups, over, eps, dtype, save_statistics)
    return library.below_autograd(name, x, weight, bias, *running, *options)


def _channel_norm_running(x, weight, bias, *others):
    names = ("running_mean", "running_var", "momentum_tensor")
    check_constants("tritonnorm::channel_norm_running", **dict(zip(names, others[:3], strict=True)))
    return _channel_norm(x, weight, bias, *others[4:], running=others[:4])


def _channel_apply(x, weight, bias, mean, variance, eps, dtype):
    check_constants("tritonnorm::channel_apply", mean=mean, variance=variance)
    if needs_graph(x, weight, bias):
        call = ChannelCall(library.operators, x.shape[1], "given", eps, dtype, bias)
        return ChannelNorm.apply(call, (mean, variance), x, weight, bias)
    return library.below_autograd("channel_apply", x, weight, bias, mean, variance, eps, dtype)


library.define_gradient("channel_norm", _channel_norm)
library.define_gradient("channel_norm_running", _channel_norm_running)
library.define_gradient("channel_apply", _channel_apply)
