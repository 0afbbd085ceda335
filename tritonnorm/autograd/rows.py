"""LayerNorm, RMSNorm and L2 normalization as differentiable operators."""

from functools import partial
from math import prod

import torch

from .. import launch, library
from ..calls import prepare
from ..formulas import RowOptions, row_deviation, row_formula
from ..saving import output_suffices
from ..watch import is_watched
from .common import (
    Backwards,
    called_directly,
    contiguous,
    formula_gradients,
    is_plain,
    needs_graph,
    recorded,
    results,
    stand_in,
)


def _forward(runner, dims, options, dtype, memory_format, *, save_statistics):
    outputs = dict(dtype=dtype, memory_format=memory_format, save_statistics=save_statistics)

    def forward(x, weight, bias):
        return runner.row_forward(x, weight, bias, dims, options, **outputs)

    return forward


def _backward(dims, options, memory_format, bias_dtype, runner, weight, needed):
    outputs = dict(
        memory_format=memory_format,
        needs_dx=needed[0],
        dweight_dtype=weight.dtype if needed[1] else None,
        dbias_dtype=bias_dtype if needed[2] else None,
    )

    def backward(dy, x, weight, statistics):
        dy = dy.resolve_neg()
        weight, statistics = contiguous(weight, statistics)
        dx, *gradients = runner.row_backward(dy, x, weight, statistics, dims, options, **outputs)
        if dims > 1:
            gradients = (d if d is None else d.view(x.shape[-dims:]) for d in gradients)
        return dx, *gradients

    return backward


class RowCall:
    """A normalization of tensors that look alike over their last `dims` dimensions, with contiguous
    parameters: y is `compute(x, weight, bias)`, and differentiable by `differentiable`."""

    def __init__(self, runner, dims, options, dtype, memory_format, bias):
        self.runner, self.dims, self.options = runner, dims, options
        self.dtype, self.memory_format = dtype, memory_format
        self.bias_dtype = None if bias is None else bias.dtype
        arguments = runner, dims, options, dtype, memory_format
        self.without_statistics = recorded(runner, _forward(*arguments, save_statistics=False))
        self.with_statistics = recorded(runner, _forward(*arguments, save_statistics=True))
        make = partial(_backward, dims, options, memory_format, self.bias_dtype)
        self.backwards = Backwards(runner, make)

    def compute(self, x, weight, bias):
        return self.without_statistics.run(x, weight, bias)[0]

    def differentiable(self, x, weight, bias):
        return RowNorm.apply_directly(self, x, weight, bias)


@called_directly
class RowNorm(torch.autograd.Function):
    """A `RowCall` of x, weight and bias."""

    @staticmethod
    def forward(ctx, call, x, weight, bias):
        y, statistics = call.with_statistics.run(x, weight, bias)
        ctx.save_for_backward(x, weight, statistics)
        ctx.call = call
        return y if call.runner is launch else results(ctx, y, statistics)

    @staticmethod
    def backward(ctx, dy, *_):
        call, needed, saved = ctx.call, ctx.needs_input_grad[1:], ctx.saved_tensors
        gradients = call.backwards.run(dy, saved, needed)
        if gradients is not None:
            return None, *gradients
        x, weight, _ = saved
        bias = stand_in(x, x.shape[-call.dims :], call.bias_dtype) if needed[2] else None
        options = call.dims, call.options, call.dtype
        return None, *formula_gradients(row_formula, dy, (x, weight, bias), needed, options)


class RowNormFromOutput(torch.autograd.Function):
    """`RowNorm` that keeps its output in the place of its input, where `saving.output_suffices`."""

    @staticmethod
    def forward(ctx, call, x, weight, bias):
        y, statistics = call.with_statistics.run(x, weight, bias)
        ctx.save_for_backward(y, weight, bias, statistics)
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx, dy):
        call, needed = ctx.call, ctx.needs_input_grad[1:]
        y, weight, bias, statistics = ctx.saved_tensors
        if torch.is_grad_enabled():
            raise RuntimeError(
                'save="output" does not keep the input, of which the second derivative is one: '
                'use save="input" with create_graph=True'
            )
        if not is_plain(dy) or is_watched(dy):
            # Of the deviation from the mean, which has the same gradient.
            m = prod(y.shape[: y.dim() - call.dims])
            _, rstd = launch.statistics_of(statistics, m)
            x = row_deviation(y, weight, bias, rstd, call.dims, call.options)
            x.requires_grad_(needed[0])
            options = call.dims, call.options, call.dtype
            return None, *formula_gradients(row_formula, dy, (x, weight, bias), needed, options)
        dx, dweight, dbias = launch.row_backward(
            dy.resolve_neg(),
            y,
            weight,
            statistics,
            call.dims,
            call.options,
            memory_format=call.memory_format,
            needs_dx=needed[0],
            dweight_dtype=weight.dtype if needed[1] else None,
            dbias_dtype=bias.dtype if needed[2] else None,
            recover=(bias,),
        )
        dweight = dweight.view(weight.shape) if needed[1] else None
        dbias = dbias.view(bias.shape) if needed[2] else None
        return None, dx, dweight, dbias


def _row_norm(x, weight, bias, dims, *others):
    *options, dtype, preserve_format, _save_statistics = others
    if needs_graph(x, weight, bias):
        memory_format = library.FORMATS[preserve_format]
        call = RowCall(library.operators, dims, RowOptions(*options), dtype, memory_format, bias)
        return RowNorm.apply(call, x, weight, bias)
    return library.below_autograd("row_norm", x, weight, bias, dims, *others)


library.define_gradient("row_norm", _row_norm)


def normalize_rows(x, weight, bias, dims, options, dtype, memory_format, *, key, save_output=False):
    """Normalizes x over its last `dims` dimensions. The call is prepared for the next one of this `key`,
    if there is one. With `save_output` the backward pass starts from y, where that suffices."""
    if is_watched(x, weight, bias):
        preserve_format = memory_format is torch.preserve_format
        arguments = (dims, *options, dtype, preserve_format, False)
        return torch.ops.tritonnorm.row_norm(x, weight, bias, *arguments)[0]
    call = RowCall(launch, dims, options, dtype, memory_format, bias)
    if save_output and needs_graph(x, weight, bias):
        n = prod(x.shape[x.dim() - dims :])
        if output_suffices(x, weight, bias, options, dtype, n):
            return RowNormFromOutput.apply(call, x, *contiguous(weight, bias))
    elif key is not None:
        prepare(call, x, weight, bias, key)
    weight, bias = contiguous(weight, bias)
    if needs_graph(x, weight, bias):
        return RowNorm.apply(call, x, weight, bias)
    return call.compute(x, weight, bias)
