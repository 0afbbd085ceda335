"""Launches of the row kernels.

Outputs are contiguous, or with `torch.preserve_format` laid out as the input.
"""

from math import ceil, prod

import torch
import triton.language as tl

from .. import heuristics
from ..dtypes import compute_dtype
from ..kernels.row import row_backward as row_backward_kernel
from ..kernels.row import row_forward_looped, row_forward_resident, row_gradient_means
from ..views import common_alignment, row_view
from .common import FP_FUSION, fold_parameters, on_device, parameter_partials

ROUND = {None: None, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
"""Of each dtype that x_hat can be rounded to, the kernels' name."""


def _view_rows(normalized_dims, inputs, output):
    """The row view that inputs and output (or None) share, and what it is a view of: the tensors
    themselves or, where they have no view in common, contiguous ones in their stead."""
    shape = inputs[0].shape

    def view():
        tensors = [*inputs, output] if output is not None else inputs
        return row_view(shape, normalized_dims, tuple(t.stride() for t in tensors)), tensors

    shared, tensors = view()
    if shared is None:
        inputs = [t.contiguous() for t in inputs]
        if output is not None and not output.is_contiguous():
            output = torch.empty(shape, dtype=output.dtype, device=output.device)
        shared, tensors = view()
    return shared, common_alignment(shared, tensors), inputs, output


def row_forward(x, weight, bias, normalized_dims, options, *, dtype, memory_format, save_statistics):
    """y, mean and spread of the rows of x over its last `normalized_dims` dimensions.

    options are RowOptions. mean is None unless their norm is "layer"; spread is the norm for "l2" and
    rstd otherwise; both are None unless `save_statistics`.
    """
    y = torch.empty_like(x, dtype=dtype, memory_format=memory_format)
    mean = spread = None
    if save_statistics:
        m = prod(x.shape[: x.dim() - normalized_dims])
        spread = torch.empty(m, dtype=compute_dtype(x), device=x.device)
        mean = torch.empty_like(spread) if options.norm == "layer" else None
    if x.numel() == 0:
        return y, mean, spread

    view, align, (x,), target = _view_rows(normalized_dims, [x], y)
    tile = heuristics.row_forward(view.n, x.element_size(), view.strided)
    kernel = row_forward_resident if tile.block_n >= view.n else row_forward_looped
    with on_device(x):
        kernel[(ceil(view.m / tile.rows),)](
            x_ptr=x,
            y_ptr=target,
            weight_ptr=weight,
            bias_ptr=bias,
            mean_ptr=mean,
            spread_ptr=spread,
            x_strides=view.strides[0],
            y_strides=view.strides[1],
            M=view.m,
            R1=view.r1,
            R2=view.r2,
            eps=options.eps,
            N=view.n,
            NORM=options.norm,
            OFFSET=options.weight_offset,
            ROUND=ROUND[options.round_to],
            ROWS=tile.rows,
            BLOCK_N=tile.block_n,
            ALIGN=align,
            num_warps=tile.num_warps,
            **FP_FUSION,
        )
    if target is not y:
        y.copy_(target)
    return y, mean, spread


def row_backward(
    dy,
    x,
    weight,
    mean,
    spread,
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

    With `recover`, a tuple of the bias or None, x is the y of the forward pass, and mean is None.
    """
    n = prod(x.shape[x.dim() - normalized_dims :])
    dtypes = (dweight_dtype, dbias_dtype)
    dx = torch.empty_like(x, memory_format=memory_format) if needs_dx else None
    if x.numel() == 0:
        zeros = (d and torch.zeros(n, dtype=d, device=x.device) for d in dtypes)
        return dx, *zeros

    view, align, (x, dy), target = _view_rows(normalized_dims, [x, dy], dx)
    tile = heuristics.row_backward(view.n, x.element_size(), view.strided)
    parameters = 2 - dtypes.count(None)
    programs = heuristics.row_partials(view.m, view.n, x.element_size(), parameters, tile.rows)
    partials = parameter_partials(x, programs, n, dtypes)
    shared = dict(
        dy_ptr=dy,
        x_ptr=x,
        weight_ptr=weight,
        bias_ptr=recover[0] if recover else None,
        mean_ptr=mean,
        spread_ptr=spread,
        dy_strides=view.strides[1],
        x_strides=view.strides[0],
        M=view.m,
        R1=view.r1,
        R2=view.r2,
        eps=options.eps,
        N=view.n,
        NORM=options.norm,
        OFFSET=options.weight_offset,
        SAVED="y" if recover else "x",
        ROWS=tile.rows,
        BLOCK_N=tile.block_n,
        ALIGN=align,
        num_warps=tile.num_warps,
        **FP_FUSION,
    )
    with on_device(x):
        c1 = c2 = None
        if dx is not None and tile.block_n < view.n:
            c1, c2 = torch.empty_like(spread), torch.empty_like(spread)
            row_gradient_means[(ceil(view.m / tile.rows),)](c1_ptr=c1, c2_ptr=c2, **shared)
        row_backward_kernel[(ceil(view.n / tile.block_n), programs)](
            c1_ptr=c1,
            c2_ptr=c2,
            dx_ptr=target,
            dweight_partial_ptr=partials[0],
            dbias_partial_ptr=partials[1],
            dx_strides=view.strides[2] if dx is not None else None,
            **shared,
        )
        dweight, dbias = fold_parameters(partials, dtypes)
    if target is not dx:
        dx.copy_(target)
    return dx, dweight, dbias
