"""Launches of the kernels on the channel view `[N, C, S]`.

`over` says what shares statistics: "batch", a channel over all images; "group", the C/groups channels of
a group in an image. Where statistics are given, as in an evaluation, nothing does: `channel_apply`.
Outputs have the memory format of the input.
"""

from dataclasses import replace
from math import ceil
from typing import NamedTuple

import torch

from .. import heuristics
from ..dtypes import compute_dtype
from ..kernels import channel as channel_kernels
from ..kernels import group as group_kernels
from ..views import ChannelView, channel_view, column_view, common_alignment
from . import pieces
from .common import (
    CHOICES,
    Kernel,
    fold_parameters,
    is_written,
    new_statistics,
    on_device,
    parameter_partials,
    planned,
    statistics_of,
)
from .pieces import Sets

channel_gradient_sums = Kernel(channel_kernels.channel_gradient_sums)
group_backward = Kernel(group_kernels.group_backward)
group_forward = Kernel(group_kernels.group_forward)


def _dense_format(x):
    """The memory format of a dense copy of x."""
    if x.dim() in (4, 5) and x.stride(1) == 1 and x.shape[1] > 1:
        return torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return torch.contiguous_format


@planned
def _view(shape, over_batch, strides, itemsize) -> ChannelView | None:
    """The channel view of tensors, or of their columns where that is preferred; None for no view."""
    view = channel_view(shape, over_batch, strides)
    if view is None or view.adjacent != "s" or not over_batch:
        return view
    preferred = heuristics.channels.prefer_columns(view.n, view.c, view.s, itemsize)
    return (preferred and column_view(view)) or view


@planned
def _make_sets(shape, groups, over_batch, strides, itemsize, align, choices) -> Sets:
    view = _view(shape, over_batch, strides, itemsize)
    return Sets(view, align, shape[1] // groups, over_batch, choices)


def _sets(over, groups, inputs, output):
    """The sets of the channel view that inputs and output (or None) share, and what it is a view of: the
    tensors themselves or, where they have no view, dense ones in their stead."""
    shape, over_batch, itemsize = inputs[0].shape, over != "group", inputs[0].element_size()
    tensors = inputs if output is None else (*inputs, output)
    strides = tuple([t.stride() for t in tensors])
    view = _view(shape, over_batch, strides, itemsize)
    if view is None:
        memory_format = _dense_format(inputs[0])
        inputs = [t.contiguous(memory_format=memory_format) for t in inputs]
        if output is not None:
            output = torch.empty_like(inputs[0], dtype=output.dtype)
        tensors = inputs if output is None else (*inputs, output)
        strides = tuple([t.stride() for t in tensors])
        view = _view(shape, over_batch, strides, itemsize)
    align = common_alignment(view, tensors)
    choices = CHOICES[inputs[0].get_device()]
    sets = _make_sets(shape, groups, over_batch, strides, itemsize, align, choices)
    return sets, inputs, output


@planned
def _resident(sets: Sets, heuristic, itemsize) -> heuristics.channels.GroupTile | None:
    """The tile of sets that one program holds; None if it cannot."""
    view = sets.view
    if (sets.over_batch and view.n > 1) or view.columns > 1:
        return None
    return sets.choices(heuristic, sets.cg, view.c // sets.cg, view.s, itemsize, view.adjacent)


@planned
def _in_tile(sets: Sets, tile: heuristics.channels.GroupTile):
    """The arguments of a kernel that holds groups in a tile."""
    return dict(
        inverse_count=1 / sets.elements,
        CG=sets.cg,
        GROUPS=tile.groups,
        BLOCK_C=tile.block_c,
        BLOCK_S=tile.block_s // tile.chunks,
        CHUNKS=tile.chunks,
        num_warps=tile.num_warps,
        maxnreg=tile.registers,
        **sets.arguments,
    )


class Running(NamedTuple):
    """Running statistics `[C]`, or None, and what they move by: a number, or a float64 tensor of one."""

    mean: torch.Tensor | None
    var: torch.Tensor | None
    momentum: float | torch.Tensor


NOTHING_MOVES = dict(
    running_mean_ptr=None, running_var_ptr=None, momentum_ptr=None, momentum=0.0, unbiased=1.0
)
"""The arguments of a kernel that moves no running statistics."""


class _Running:
    """Running statistics for the time of a launch: contiguous, and marked as changed at its end."""

    def __init__(self, running, count):
        self.given = running.mean, running.var
        self.mean, self.var = (t if t is None else t.contiguous() for t in self.given)
        self.momentum = running.momentum
        self.unbiased = count / max(count - 1, 1)

    @property
    def arguments(self):
        """The arguments of a kernel that moves them."""
        in_memory = isinstance(self.momentum, torch.Tensor)
        return dict(
            running_mean_ptr=self.mean,
            running_var_ptr=self.var,
            momentum_ptr=self.momentum if in_memory else None,
            momentum=0.0 if in_memory else float(self.momentum),
            unbiased=self.unbiased,
        )

    def moved(self):
        """A kernel has written to them."""
        for given, moved in zip(self.given, (self.mean, self.var), strict=True):
            if given is not None and given is moved:
                is_written(given)
            elif given is not None:
                given.copy_(moved)

    def move(self, mean, variance, images):
        """Moves them towards the average of the images' statistics, as InstanceNorm does."""
        for given, values in zip(self.given, (mean, variance), strict=True):
            if given is not None:
                average = values.view(images, -1).mean(0, dtype=torch.float64)
                average *= self.unbiased if given is self.given[1] else 1
                given.copy_(given.double() * (1 - self.momentum) + average * self.momentum)


def _zero_gradients(x, dtypes):
    return (d and torch.zeros(x.shape[1], dtype=d, device=x.device) for d in dtypes)


def _wanted(partials, dtypes):
    return [p if d else None for p, d in zip(partials, dtypes, strict=True)]


def channel_forward(x, weight, bias, groups, over, eps, *, dtype, running, save_statistics):
    """y, and a tensor of mean and rstd as `statistics_of` takes it, of x `[N, C, *spatial]` with the
    statistics of the batch or of groups. It may be None unless `save_statistics`. `running` (mean, var,
    momentum) or None is updated in place."""
    y = torch.empty_like(x, dtype=dtype)
    n, c = x.shape[:2]
    count = n * groups if over == "group" else c
    if x.numel() == 0:
        return y, new_statistics(x, count, 2)

    sets, (x,), target = _sets(over, groups, (x,), y)
    tile = _resident(sets, heuristics.channels.group_forward, x.element_size())
    of_images = running is not None and over == "group"
    saved = new_statistics(x, count, 2) if save_statistics or of_images or tile is None else None
    statistics = dict(mean=None, rstd=None, variance=None)
    if saved is not None:
        statistics["mean"], statistics["rstd"] = statistics_of(saved, count)
    if of_images:
        statistics["variance"] = new_statistics(x, count, 1)
    move = None if running is None or of_images else _Running(running, sets.elements)
    moving = NOTHING_MOVES if move is None else move.arguments

    with on_device(x):
        if tile is None:
            pieces.forward(sets, x, target, weight, bias, eps, statistics, moving)
        else:
            group_forward[(sets.view.n * ceil(groups / tile.groups),)](
                x_ptr=x,
                y_ptr=target,
                weight_ptr=weight,
                bias_ptr=bias,
                mean_ptr=statistics["mean"],
                rstd_ptr=statistics["rstd"],
                variance_ptr=statistics["variance"],
                x_strides=sets.view.strides[0],
                y_strides=sets.view.strides[1],
                eps=eps,
                **moving,
                **_in_tile(sets, tile),
            )
    if move is not None:
        move.moved()
    if of_images:
        _Running(running, sets.elements).move(statistics["mean"], statistics["variance"], n)
    if target is not y:
        y.copy_(target)
    return y, saved


def channel_apply(x, weight, bias, mean, variance, eps, *, dtype):
    """y of x `[N, C, *spatial]` with a mean and variance `[C]` that are given."""
    y = torch.empty_like(x, dtype=dtype)
    if x.numel():
        sets, (x,), target = _sets("given", x.shape[1], (x,), y)
        cut = sets.choose(heuristics.channels.channel_forward, x.element_size())
        with on_device(x):
            pieces.normalize(sets, cut, x, target, weight, bias, eps, mean=mean, variance=variance)
        if target is not y:
            y.copy_(target)
    return y


def channel_backward(dy, x, weight, statistics, groups, over, *, needs_dx, dweight_dtype, dbias_dtype):
    """dx, dweight and dbias `[C]`, from the statistics of `channel_forward`; None for what is not needed
    (a dtype that is None)."""
    c, dtypes = x.shape[1], (dweight_dtype, dbias_dtype)
    dx = torch.empty_like(x) if needs_dx else None
    if x.numel() == 0:
        return dx, *_zero_gradients(x, dtypes)

    sets, (x, dy), target = _sets(over, groups, [x, dy], dx)
    mean, rstd = statistics_of(statistics, x.shape[0] * groups if over == "group" else c)
    tile = _resident(sets, heuristics.channels.group_backward, x.element_size())
    with on_device(x):
        if tile is None:
            partials = pieces.backward(sets, dy, x, target, weight, mean, rstd)
        else:
            parameters = 2 - dtypes.count(None)
            programs = heuristics.common.partials(
                sets.view.n, parameters * c * max(x.element_size(), 4), 3 * x.numel() * x.element_size()
            )
            partials = parameter_partials(x, programs, c, dtypes)
            group_backward[(ceil(groups / tile.groups), programs)](
                dy_ptr=dy,
                x_ptr=x,
                weight_ptr=weight,
                mean_ptr=mean,
                rstd_ptr=rstd,
                dx_ptr=target,
                dweight_partial_ptr=partials[0],
                dbias_partial_ptr=partials[1],
                dy_strides=sets.view.strides[1],
                x_strides=sets.view.strides[0],
                dx_strides=sets.view.strides[2] if needs_dx else None,
                **_in_tile(sets, tile),
            )
        gradients = fold_parameters(_wanted(partials, dtypes), dtypes)
    if target is not dx:
        dx.copy_(target)
    return dx, *gradients


@planned
def _without_first(sets: Sets) -> Sets:
    """The same sets of all tensors but the first."""
    return replace(sets, view=replace(sets.view, strides=sets.view.strides[1:]))


def channel_apply_backward(dy, x, weight, statistics, eps, *, needs_dx, dweight_dtype, dbias_dtype):
    """The gradients of `channel_apply`; its mean and variance, in one tensor, are constants."""
    dtypes = (dweight_dtype, dbias_dtype)
    dx = torch.empty_like(x) if needs_dx else None
    if x.numel() == 0:
        return dx, *_zero_gradients(x, dtypes)

    mean, variance = statistics_of(statistics, x.shape[1])
    sets, (x, dy), target = _sets("given", x.shape[1], [x, dy], dx)
    cut = sets.choose(heuristics.channels.channel_backward, x.element_size())
    gradients = None, None
    with on_device(x):
        if dtypes == (None, None):
            # dx = weight * dy / sqrt(variance + eps): a normalization of dy without a mean, x unread.
            pieces.normalize(_without_first(sets), cut, dy, target, weight, None, eps, variance=variance)
        else:
            wide = compute_dtype(x)
            grid, arguments, count = pieces.in_sets(sets, cut)
            partials = parameter_partials(x, count, x.shape[1], (wide, wide))
            channel_gradient_sums[grid](
                dy_ptr=dy,
                x_ptr=x,
                dx_ptr=target,
                weight_ptr=weight,
                mean_ptr=mean,
                rstd_ptr=None,
                variance_ptr=variance,
                dweight_partial_ptr=partials[0],
                dbias_partial_ptr=partials[1],
                dy_strides=sets.view.strides[1],
                x_strides=sets.view.strides[0],
                dx_strides=sets.view.strides[2] if needs_dx else None,
                eps=eps,
                COLUMNS=sets.view.columns,
                CG=1,
                SETS=0,
                **arguments,
            )
            gradients = fold_parameters(_wanted(partials, dtypes), dtypes)
    if target is not dx:
        dx.copy_(target)
    return dx, *gradients
