"""Allocation, grids and calls of the kernels; the only importer of `tritonnorm.kernels`.

Inputs were checked by the callers. Outputs are contiguous, or with `torch.preserve_format` laid out
as the input; statistics are flat, one float32 (for float64 input, float64) a row.
"""

from contextlib import nullcontext
from math import ceil, prod

import torch

from . import heuristics
from .dtypes import compute_dtype
from .kernels.fold import fold_parameter_gradients
from .kernels.row import row_backward as row_backward_kernel
from .kernels.row import row_forward_looped, row_forward_resident, row_gradient_means
from .views import common_alignment, row_view

FP_FUSION = {"enable_fp_fusion": True}
"""Multiply and add contract to FMA: stated, since the default differs between Triton releases."""


def _on_device(x: torch.Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


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


def row_forward(x, weight, bias, normalized_dims, eps, norm, *, dtype, memory_format, save_statistics):
    """y, mean and spread of the rows of x over its last `normalized_dims` dimensions.

    norm is "layer", "rms" or "l2". mean is None unless norm is "layer"; spread is the norm for
    "l2" and rstd otherwise; both are None unless `save_statistics`.
    """
    y = torch.empty_like(x, dtype=dtype, memory_format=memory_format)
    mean = spread = None
    if save_statistics:
        m = prod(x.shape[: x.dim() - normalized_dims])
        spread = torch.empty(m, dtype=compute_dtype(x), device=x.device)
        mean = torch.empty_like(spread) if norm == "layer" else None
    if x.numel() == 0:
        return y, mean, spread

    view, align, (x,), target = _view_rows(normalized_dims, [x], y)
    tile = heuristics.row_forward(view.n, x.element_size(), view.strided)
    kernel = row_forward_resident if tile.block_n >= view.n else row_forward_looped
    with _on_device(x):
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
            eps=eps,
            N=view.n,
            NORM=norm,
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
    eps,
    norm,
    *,
    memory_format,
    needs_dx,
    dweight_dtype,
    dbias_dtype,
):
    """dx, dweight and dbias `[N]`; None for what is not needed (a dtype that is None)."""
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
    dweight_partial, dbias_partial = (
        d and torch.empty(programs, n, dtype=compute_dtype(x), device=x.device) for d in dtypes
    )
    # Of float64 input the fold leaves float64: Triton's interpreter casts it wrongly to 16 bits.
    dweight, dbias = (
        d and torch.empty(n, dtype=torch.float64 if x.dtype == torch.float64 else d, device=x.device)
        for d in dtypes
    )
    shared = dict(
        dy_ptr=dy,
        x_ptr=x,
        weight_ptr=weight,
        mean_ptr=mean,
        spread_ptr=spread,
        dy_strides=view.strides[1],
        x_strides=view.strides[0],
        M=view.m,
        R1=view.r1,
        R2=view.r2,
        eps=eps,
        N=view.n,
        NORM=norm,
        ROWS=tile.rows,
        BLOCK_N=tile.block_n,
        ALIGN=align,
        num_warps=tile.num_warps,
        **FP_FUSION,
    )
    with _on_device(x):
        c1 = c2 = None
        if dx is not None and tile.block_n < view.n:
            c1, c2 = torch.empty_like(spread), torch.empty_like(spread)
            row_gradient_means[(ceil(view.m / tile.rows),)](c1_ptr=c1, c2_ptr=c2, **shared)
        row_backward_kernel[(ceil(view.n / tile.block_n), programs)](
            c1_ptr=c1,
            c2_ptr=c2,
            dx_ptr=target,
            dweight_partial_ptr=dweight_partial,
            dbias_partial_ptr=dbias_partial,
            dx_strides=view.strides[2] if dx is not None else None,
            **shared,
        )
        if parameters:
            fold = heuristics.fold(programs)
            fold_parameter_gradients[(ceil(view.n / fold.block_n),)](
                dweight_partial_ptr=dweight_partial,
                dbias_partial_ptr=dbias_partial,
                dweight_ptr=dweight,
                dbias_ptr=dbias,
                P=programs,
                N=view.n,
                BLOCK_P=fold.rows,
                BLOCK_N=fold.block_n,
                num_warps=fold.num_warps,
                **FP_FUSION,
            )
    if target is not dx:
        dx.copy_(target)
    dweight, dbias = (t if t is None else t.to(d) for t, d in zip((dweight, dbias), dtypes, strict=True))
    return dx, dweight, dbias
