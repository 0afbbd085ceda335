"""Launches of the kernels on the channel view `[N, C, S]`.

`over` says what shares statistics: "batch", a channel over all images; "group", the C/groups channels of
a group in an image. Where statistics are given, as in an evaluation, nothing does: `channel_apply`.
Outputs have the memory format of the input.
"""

from dataclasses import replace
from math import ceil

import torch

from .. import heuristics
from ..dtypes import compute_dtype
from ..kernels.channel import (
    channel_gradient_sums,
    channel_input_gradient,
    channel_moments,
    channel_normalize,
)
from ..kernels.fold import fold_gradient_means, fold_moments
from ..kernels.group import group_backward, group_forward
from ..views import ChannelView, channel_view, common_alignment
from .common import FP_FUSION, fold_parameters, on_device, parameter_partials


def _dense_format(x):
    """The memory format of a dense copy of x."""
    if x.dim() in (4, 5) and x.stride(1) == 1 and x.shape[1] > 1:
        return torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return torch.contiguous_format


def _view_channels(over, inputs, output):
    """The channel view that inputs and output (or None) share, and what it is a view of: the tensors
    themselves or, where they have no view, dense ones in their stead."""
    shape = inputs[0].shape

    def view():
        tensors = [*inputs, output] if output is not None else inputs
        strides = tuple(t.stride() for t in tensors)
        return channel_view(shape, over != "group", strides), tensors

    shared, tensors = view()
    if shared is None:
        memory_format = _dense_format(inputs[0])
        inputs = [t.contiguous(memory_format=memory_format) for t in inputs]
        if output is not None:
            output = torch.empty_like(inputs[0], dtype=output.dtype)
        shared, tensors = view()
    return shared, common_alignment(shared, tensors), inputs, output


def _sizes(view: ChannelView, align):
    """The arguments that every kernel on a view takes."""
    return dict(N=view.n, C=view.c, S=view.s, ADJACENT=view.adjacent, ALIGN=align, **FP_FUSION)


def _in_pieces(pieces: heuristics.Pieces):
    """The arguments of the kernels that take a piece a program."""
    return dict(
        IMAGES=pieces.images,
        STEPS=pieces.steps,
        BLOCK_C=pieces.block_c,
        BLOCK_S=pieces.block_s,
        num_warps=pieces.num_warps,
    )


def _in_tile(tile: heuristics.GroupTile, cg):
    """The arguments of the kernels that hold groups in a tile."""
    return dict(
        CG=cg,
        GROUPS=tile.groups,
        BLOCK_C=tile.block_c,
        BLOCK_S=tile.block_s,
        num_warps=tile.num_warps,
    )


def _fold(view: ChannelView, pieces: heuristics.Pieces, cg, sets):
    """Grid and arguments of a fold of pieces; `sets` an image, 0 for those of a batch."""
    images = view.n if sets else 1
    count = pieces.count(view.n, view.s) // images
    tile = heuristics.fold_sets(count, cg if cg > 1 else view.c)
    blocks = view.c // cg if cg > 1 else ceil(view.c / tile.block_n)
    arguments = dict(
        C=view.c,
        CG=cg,
        SETS=sets,
        PIECES=count,
        ONE_SET=cg > 1,
        BLOCK_P=tile.rows,
        BLOCK_C=tile.block_n,
        num_warps=tile.num_warps,
        **FP_FUSION,
    )
    return (images * blocks,), arguments


class _Running:
    """Running statistics for the time of a launch: contiguous, and marked as changed at its end."""

    def __init__(self, running, count):
        self.given = (running.mean, running.var) if running else (None, None)
        self.mean, self.var = (t if t is None else t.contiguous() for t in self.given)
        self.momentum = running.momentum if running else 0.0
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
        """A kernel has written to them: autograd must know, as of any change in place."""
        for given, moved in zip(self.given, (self.mean, self.var), strict=True):
            if given is not None and given is moved:
                torch.autograd.graph.increment_version(given)
            elif given is not None:
                given.copy_(moved)

    def move(self, mean, variance, images):
        """Moves them towards the average of the images' statistics, as InstanceNorm does."""
        for given, values in zip(self.given, (mean, variance), strict=True):
            if given is not None:
                average = values.view(images, -1).mean(0)
                average *= self.momentum * (self.unbiased if given is self.given[1] else 1)
                given.copy_(given.to(average.dtype) * (1 - self.momentum) + average)


def _normalize(view, align, pieces, x, y, weight, bias, eps, cg, sets, **statistics):
    """Launches channel_normalize with the statistics that are given: mean, rest, rstd, variance."""
    channel_normalize[(pieces.programs(view.n, view.c, view.s),)](
        x_ptr=x,
        y_ptr=y,
        weight_ptr=weight,
        bias_ptr=bias,
        **{f"{name}_ptr": statistics.get(name) for name in ("mean", "rest", "rstd", "variance")},
        x_strides=view.strides[0],
        y_strides=view.strides[1],
        eps=eps,
        CG=cg,
        SETS=sets,
        **_sizes(view, align),
        **_in_pieces(pieces),
    )


def _zero_gradients(x, dtypes):
    return (d and torch.zeros(x.shape[1], dtype=d, device=x.device) for d in dtypes)


def _new_statistics(x, count, names):
    return {name: torch.empty(count, dtype=compute_dtype(x), device=x.device) for name in names}


def channel_forward(x, weight, bias, groups, over, eps, *, dtype, running, save_statistics):
    """y, mean and rstd of x `[N, C, *spatial]` with the statistics of the batch or of groups; mean and rstd
    may be None unless `save_statistics`. `running` (mean, var, momentum) or None is updated in place."""
    y = torch.empty_like(x, dtype=dtype)
    n, c = x.shape[:2]
    count = n * groups if over == "group" else c
    if x.numel() == 0:
        return y, *_new_statistics(x, count, ("mean", "rstd")).values()

    view, align, (x,), target = _view_channels(over, [x], y)
    sets, cg = groups if over == "group" else 0, c // groups
    elements = cg * view.s * (1 if sets else view.n)
    of_images = running is not None and sets > 0
    move = _Running(None if of_images else running, elements)
    tile = None
    if sets or view.n == 1:
        tile = heuristics.group_forward(cg, groups, view.s, x.element_size(), view.adjacent)
    saved = ("mean", "rstd") if save_statistics or tile is None else ()
    if of_images:
        saved = {*saved, "mean", "variance"}
    statistics = _new_statistics(x, count, saved)
    pointers = {f"{name}_ptr": statistics.get(name) for name in ("mean", "rstd", "variance")}
    shared = dict(inverse_count=1 / elements, eps=eps, **move.arguments, **pointers)

    with on_device(x):
        if tile is not None:
            group_forward[(view.n * ceil(groups / tile.groups),)](
                x_ptr=x,
                y_ptr=target,
                weight_ptr=weight,
                bias_ptr=bias,
                x_strides=view.strides[0],
                y_strides=view.strides[1],
                **shared,
                **_sizes(view, align),
                **_in_tile(tile, cg),
            )
        else:
            pieces = heuristics.channel_forward(
                view.n, c, view.s, x.element_size(), view.adjacent, over == "batch"
            )
            partial = pieces.count(view.n, view.s), c
            mean_partial = torch.empty(partial, dtype=torch.float64, device=x.device)
            squares_partial = torch.empty(partial, dtype=compute_dtype(x), device=x.device)
            channel_moments[(pieces.programs(view.n, c, view.s),)](
                x_ptr=x,
                mean_partial_ptr=mean_partial,
                squares_partial_ptr=squares_partial,
                x_strides=view.strides[0],
                **_sizes(view, align),
                **_in_pieces(pieces),
            )
            rest = torch.empty_like(statistics["mean"])
            grid, fold = _fold(view, pieces, cg, sets)
            fold_moments[grid](
                mean_partial_ptr=mean_partial,
                squares_partial_ptr=squares_partial,
                rest_ptr=rest,
                N=view.n,
                S=view.s,
                IMAGES=pieces.images,
                POSITIONS=pieces.steps * pieces.block_s,
                **shared,
                **fold,
            )
            _normalize(
                view,
                align,
                pieces,
                x,
                target,
                weight,
                bias,
                eps,
                cg,
                sets,
                mean=statistics["mean"],
                rest=rest,
                rstd=statistics["rstd"],
            )
    move.moved()
    if of_images:
        _Running(running, elements).move(statistics["mean"], statistics["variance"], n)
    if target is not y:
        y.copy_(target)
    return y, statistics.get("mean"), statistics.get("rstd")


def channel_apply(x, weight, bias, mean, variance, eps, *, dtype):
    """y of x `[N, C, *spatial]` with a mean and variance `[C]` that are given."""
    y = torch.empty_like(x, dtype=dtype)
    if x.numel():
        view, align, (x,), target = _view_channels("given", [x], y)
        pieces = heuristics.channel_forward(
            view.n, view.c, view.s, x.element_size(), view.adjacent, True
        )
        with on_device(x):
            _normalize(
                view, align, pieces, x, target, weight, bias, eps, 1, 0, mean=mean, variance=variance
            )
        if target is not y:
            y.copy_(target)
    return y


def channel_backward(dy, x, weight, mean, rstd, groups, over, *, needs_dx, dweight_dtype, dbias_dtype):
    """dx, dweight and dbias `[C]`; None for what is not needed (a dtype that is None)."""
    c, dtypes = x.shape[1], (dweight_dtype, dbias_dtype)
    dx = torch.empty_like(x) if needs_dx else None
    if x.numel() == 0:
        return dx, *_zero_gradients(x, dtypes)

    view, align, (x, dy), target = _view_channels(over, [x, dy], dx)
    sets, cg = groups if over == "group" else 0, c // groups
    elements = cg * view.s * (1 if sets else view.n)
    tile = None
    if sets or view.n == 1:
        tile = heuristics.group_backward(cg, groups, view.s, x.element_size(), view.adjacent)
    inputs = dict(
        dy_ptr=dy,
        x_ptr=x,
        weight_ptr=weight,
        mean_ptr=mean,
        rstd_ptr=rstd,
        dy_strides=view.strides[1],
        x_strides=view.strides[0],
        dx_strides=view.strides[2] if needs_dx else None,
        **_sizes(view, align),
    )

    with on_device(x):
        if tile is not None:
            blocks = ceil(groups / tile.groups)
            parameters = 2 - dtypes.count(None)
            programs = heuristics.partials(
                view.n, parameters * c * max(x.element_size(), 4), 3 * x.numel() * x.element_size()
            )
            partials = parameter_partials(x, programs, c, dtypes)
            group_backward[(blocks, programs)](
                dx_ptr=target,
                dweight_partial_ptr=partials[0],
                dbias_partial_ptr=partials[1],
                inverse_count=1 / elements,
                **inputs,
                **_in_tile(tile, cg),
            )
        else:
            pieces = heuristics.channel_backward(
                view.n, c, view.s, x.element_size(), view.adjacent, over == "batch"
            )
            located = dict(CG=cg, SETS=sets, **_in_pieces(pieces))
            grid = (pieces.programs(view.n, c, view.s),)
            partials = parameter_partials(x, pieces.count(view.n, view.s), c, (mean.dtype, mean.dtype))
            channel_gradient_sums[grid](
                variance_ptr=None,
                eps=0.0,
                dweight_partial_ptr=partials[0],
                dbias_partial_ptr=partials[1],
                dx_ptr=None,
                **(inputs | dict(dx_strides=None)),
                **located,
            )
            if needs_dx:
                c1, c2 = torch.empty_like(mean), torch.empty_like(mean)
                fold_grid, fold = _fold(view, pieces, cg, sets)
                fold_gradient_means[fold_grid](
                    dweight_partial_ptr=partials[0],
                    dbias_partial_ptr=partials[1],
                    weight_ptr=weight,
                    c1_ptr=c1,
                    c2_ptr=c2,
                    inverse_count=1 / elements,
                    **fold,
                )
                channel_input_gradient[grid](c1_ptr=c1, c2_ptr=c2, dx_ptr=target, **inputs, **located)
            partials = [p if d else None for p, d in zip(partials, dtypes, strict=True)]
        gradients = fold_parameters(partials, dtypes)
    if target is not dx:
        dx.copy_(target)
    return dx, *gradients


def channel_apply_backward(dy, x, weight, mean, variance, eps, *, needs_dx, dweight_dtype, dbias_dtype):
    """The gradients of `channel_apply`: its statistics are constants."""
    dtypes = (dweight_dtype, dbias_dtype)
    dx = torch.empty_like(x) if needs_dx else None
    if x.numel() == 0:
        return dx, *_zero_gradients(x, dtypes)

    view, align, (x, dy), target = _view_channels("given", [x, dy], dx)
    pieces = heuristics.channel_backward(view.n, view.c, view.s, x.element_size(), view.adjacent, True)
    gradients = None, None
    with on_device(x):
        if dtypes == (None, None):
            # dx = weight * dy / sqrt(variance + eps): a normalization of dy without a mean, x unread
            dy_view = replace(view, strides=view.strides[1:])
            _normalize(dy_view, align, pieces, dy, target, weight, None, eps, 1, 0, variance=variance)
        else:
            wide = compute_dtype(x)
            partials = parameter_partials(x, pieces.count(view.n, view.s), view.c, (wide, wide))
            channel_gradient_sums[(pieces.programs(view.n, view.c, view.s),)](
                dy_ptr=dy,
                x_ptr=x,
                dx_ptr=target,
                weight_ptr=weight,
                mean_ptr=mean,
                rstd_ptr=None,
                variance_ptr=variance,
                dweight_partial_ptr=partials[0],
                dbias_partial_ptr=partials[1],
                dy_strides=view.strides[1],
                x_strides=view.strides[0],
                dx_strides=view.strides[2] if needs_dx else None,
                eps=eps,
                CG=1,
                SETS=0,
                **_sizes(view, align),
                **_in_pieces(pieces),
            )
            partials = [p if d else None for p, d in zip(partials, dtypes, strict=True)]
            gradients = fold_parameters(partials, dtypes)
    if target is not dx:
        dx.copy_(target)
    return dx, *gradients
