"""Launches of the row kernels.

Outputs are contiguous, or with `torch.preserve_format` laid out as the input.
"""

from math import ceil, prod
from typing import NamedTuple

import torch
import triton.language as tl

from .. import heuristics
from ..kernels import row as row_kernels
from ..views import RowView, common_alignment, row_view
from . import row_teams
from .common import (
    CHOICES,
    FP_FUSION,
    Kernel,
    fold_parameters,
    largest_cluster,
    new_statistics,
    on_device,
    parameter_partials,
    planned,
    statistics_of,
)

row_backward_kernel = Kernel(row_kernels.row_backward)
row_forward_looped = Kernel(row_kernels.row_forward_looped)
row_forward_resident = Kernel(row_kernels.row_forward_resident)
row_gradient_means = Kernel(row_kernels.row_gradient_means)

ROUND = {None: None, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
"""Of each dtype that x_hat can be rounded to, the kernels' name."""


class _Plan(NamedTuple):
    """What shapes and strides decide of a pass: made once for each."""

    view: RowView
    tile: heuristics.common.RowTile
    programs: int  # that walk through the rows
    arguments: dict  # of every kernel


def _make_plan(shape, normalized_dims, strides, options, choose) -> _Plan | None:
    """The plan of a view, if there is one, with the tile that `choose(n, strided)` gives its rows."""
    view = row_view(shape, normalized_dims, strides)
    if view is None:
        return None
    tile = choose(view.n, view.strided)
    arguments = dict(
        x_strides=view.strides[0],
        M=view.m,
        R1=view.r1,
        R2=view.r2,
        eps=options.eps,
        N=view.n,
        NORM=options.norm,
        OFFSET=options.weight_offset,
        ROWS=tile.rows,
        BLOCK_N=tile.block_n // tile.chunks,
        num_warps=tile.num_warps,
        maxnreg=tile.registers,
        **FP_FUSION,
    )
    if tile.num_ctas > 1:
        arguments["num_ctas"] = tile.num_ctas
    return _Plan(view, tile, ceil(view.m / tile.rows), arguments)


@planned
def _plan_forward(shape, normalized_dims, strides, options, itemsize, choices, cluster):
    def choose(n, strided):
        return choices(heuristics.rows.row_forward, n, itemsize, strided, cluster)

    plan = _make_plan(shape, normalized_dims, strides, options, choose)
    if plan is not None:
        plan.arguments.update(y_strides=plan.view.strides[1], ROUND=ROUND[options.round_to])
    return plan


@planned
def _plan_backward(
    shape, normalized_dims, strides, options, itemsize, choices, cluster, parameters, from_output
):
    def choose(n, strided):
        tile = choices(heuristics.rows.row_backward, n, itemsize, strided, cluster)
        recovers = from_output and not strided
        return heuristics.rows.from_output(tile, n, itemsize) if recovers else tile

    plan = _make_plan(shape, normalized_dims, strides, options, choose)
    if plan is None:
        return None
    plan.arguments.update(dy_strides=plan.view.strides[1])
    view = plan.view
    most = choices(heuristics.rows.row_programs, view.n, itemsize, view.strided)
    programs = heuristics.rows.row_partials(view.m, view.n, itemsize, parameters, plan.tile, most)
    return plan._replace(programs=programs)


def _plan_rows(make, inputs, output, normalized_dims, options, *others):
    """The plan that `make` has for inputs and output (or None), and what it is for: the tensors
    themselves or, where they have no view in common, contiguous ones in their stead."""
    first = inputs[0]
    device = first.get_device()
    others = options, first.element_size(), CHOICES[device], largest_cluster(device), *others
    shape = first.shape
    tensors = inputs if output is None else (*inputs, output)
    plan = make(shape, normalized_dims, tuple([t.stride() for t in tensors]), *others)
    if plan is None:
        inputs = [t.contiguous() for t in inputs]
        if output is not None and not output.is_contiguous():
            output = torch.empty(shape, dtype=output.dtype, device=output.device)
        tensors = inputs if output is None else (*inputs, output)
        plan = make(shape, normalized_dims, tuple([t.stride() for t in tensors]), *others)
    return plan, common_alignment(plan.view, tensors), inputs, output


def kinds_of_statistics(options) -> int:
    """How many kinds of statistics a row has."""
    return 2 if options.norm == "layer" else 1


def _statistics_arguments(statistics, m, options):
    """The statistics as arguments of a kernel."""
    if statistics is None:
        return dict(mean_ptr=None, spread_ptr=None)
    mean, spread = statistics_of(statistics, m)
    return dict(mean_ptr=mean if options.norm == "layer" else None, spread_ptr=spread)


def row_forward(x, weight, bias, normalized_dims, options, *, dtype, memory_format, save_statistics):
    """y, and the statistics of the rows of x over its last `normalized_dims` dimensions.

    options are RowOptions. The statistics are a tensor as `statistics_of` takes it: of the mean, if the
    norm is "layer", and of the spread, which is the norm for "l2" and rstd otherwise. It is None unless
    `save_statistics`.
    """
    y = torch.empty_like(x, dtype=dtype, memory_format=memory_format)
    statistics = None
    if save_statistics:
        m = prod(x.shape[: x.dim() - normalized_dims])
        statistics = new_statistics(x, m, kinds_of_statistics(options))
    if x.numel() == 0:
        return y, statistics

    plan, align, (x,), target = _plan_rows(_plan_forward, (x,), y, normalized_dims, options)
    operands = dict(
        x_ptr=x,
        y_ptr=target,
        weight_ptr=weight,
        bias_ptr=bias,
        **_statistics_arguments(statistics, plan.view.m, options),
        ALIGN=align,
        **plan.arguments,
    )
    with on_device(x):
        if plan.tile.block_n >= plan.view.n:
            row_forward_resident[(plan.programs,)](CHUNKS=plan.tile.chunks, **operands)
        elif not row_teams.forward(plan.view, operands):
            row_forward_looped[(plan.programs,)](**operands)
    if target is not y:
        y.copy_(target)
    return y, statistics


def row_backward(
    dy,
    x,
    weight,
    statistics,
    normalized_dims,
    options,
    *,
    memory_format,
    needs_dx,
    dweight_dtype,
    dbias_dtype,
    recover=None,
):
    """dx, dweight and dbias `[N]`; None for what is not needed (a dtype that is None).

    With `recover`, a tuple of the bias or None, x is the y of the forward pass; no mean is read then.
    """
    dtypes = (dweight_dtype, dbias_dtype)
    dx = torch.empty_like(x, memory_format=memory_format) if needs_dx else None
    if x.numel() == 0:
        n = prod(x.shape[x.dim() - normalized_dims :])
        zeros = (d and torch.zeros(n, dtype=d, device=x.device) for d in dtypes)
        return dx, *zeros

    parameters = 2 - dtypes.count(None)
    plan, align, (x, dy), target = _plan_rows(
        *(_plan_backward, (x, dy), dx, normalized_dims, options, parameters, recover is not None)
    )
    view, tile, programs, arguments = plan
    partials = parameter_partials(x, programs, view.n, dtypes)
    statistics = _statistics_arguments(statistics, view.m, options)
    if recover:
        statistics["mean_ptr"] = None
    shared = dict(
        dy_ptr=dy,
        x_ptr=x,
        weight_ptr=weight,
        bias_ptr=recover[0] if recover else None,
        **statistics,
        SAVED="y" if recover else "x",
        ALIGN=align,
        **arguments,
    )
    outputs = dict(
        dx_ptr=target,
        dweight_partial_ptr=partials[0],
        dbias_partial_ptr=partials[1],
        dx_strides=view.strides[2] if dx is not None else None,
    )
    split = dx is not None and tile.block_n < view.n
    with on_device(x):
        if not (split and row_teams.backward(view, programs, outputs | shared)):
            c1 = c2 = None
            if split:
                c1, c2 = (torch.empty_like(statistics["spread_ptr"]) for _ in range(2))
                row_gradient_means[(ceil(view.m / tile.rows),)](c1_ptr=c1, c2_ptr=c2, **shared)
            row_backward_kernel[(ceil(view.n / tile.block_n), programs)](
                c1_ptr=c1,
                c2_ptr=c2,
                CHUNKS=tile.chunks,
                STAGES=tile.stages,
                **outputs,
                **shared,
            )
        dweight, dbias = fold_parameters(partials, dtypes)
    if target is not dx:
        dx.copy_(target)
    return dx, dweight, dbias
