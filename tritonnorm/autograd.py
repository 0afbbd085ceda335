"""The kernels as differentiable operators: an autograd function for rows, one for channels, and one for
the weights of layers."""

from typing import NamedTuple

import torch

from . import launch
from .formulas import channel_formula, row_formula, weight_formula


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


def _takes_kernel(dy) -> bool:
    """Whether a kernel can take this gradient: no second derivative is wanted, and it is plain."""
    return not torch.is_grad_enabled() and _is_plain(dy)


def _is_plain(dy) -> bool:
    """Whether a gradient has memory of its own: not one of a batch (vmap), nor all zeros."""
    return (
        not torch._C._functorch.is_legacy_batchedtensor(dy)
        and not torch._C._functorch.is_functorch_wrapped_tensor(dy)
        and not dy._is_zerotensor()
    )


class RowNorm(torch.autograd.Function):
    """LayerNorm, RMSNorm and L2 normalization over the trailing dimensions."""

    @staticmethod
    def forward(ctx, x, weight, bias, normalized_dims, options, dtype, memory_format):
        y, mean, spread = launch.row_forward(
            x,
            weight,
            bias,
            normalized_dims,
            options,
            dtype=dtype,
            memory_format=memory_format,
            save_statistics=True,
        )
        ctx.save_for_backward(x, weight, bias, mean, spread)
        ctx.options = normalized_dims, options, dtype
        ctx.memory_format = memory_format
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, mean, spread = ctx.saved_tensors
        needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad[:3]
        if not _takes_kernel(dy):
            needed = (needs_dx, needs_dweight, needs_dbias)
            gradients = formula_gradients(row_formula, dy, (x, weight, bias), needed, ctx.options)
        else:
            normalized_dims, options, _ = ctx.options
            dx, dweight, dbias = launch.row_backward(
                dy.resolve_neg(),
                x,
                weight,
                mean,
                spread,
                normalized_dims,
                options,
                memory_format=ctx.memory_format,
                needs_dx=needs_dx,
                dweight_dtype=weight.dtype if needs_dweight else None,
                dbias_dtype=bias.dtype if needs_dbias else None,
            )
            gradients = [
                dx,
                dweight.view(weight.shape) if needs_dweight else None,
                dbias.view(bias.shape) if needs_dbias else None,
            ]
        return (*gradients, None, None, None, None)


def _needs_graph(*tensors) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _contiguous(*tensors):
    return (t if t is None else t.contiguous() for t in tensors)


def normalize_rows(x, weight, bias, normalized_dims, options, dtype, memory_format):
    """Normalizes x over its last `normalized_dims` dimensions, with statistics for the backward
    pass where one can come."""
    weight, bias = _contiguous(weight, bias)
    if _needs_graph(x, weight, bias):
        return RowNorm.apply(x, weight, bias, normalized_dims, options, dtype, memory_format)
    y, _, _ = launch.row_forward(
        x,
        weight,
        bias,
        normalized_dims,
        options,
        dtype=dtype,
        memory_format=memory_format,
        save_statistics=False,
    )
    return y


class Running(NamedTuple):
    """Running statistics `[C]`, or None, and what they move by: a number, or a float64 tensor of one."""

    mean: torch.Tensor | None
    var: torch.Tensor | None
    momentum: float | torch.Tensor


class ChannelNorm(torch.autograd.Function):
    """BatchNorm, GroupNorm and InstanceNorm of `[N, C, *spatial]`."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, over, eps, dtype, running, given):
        if over == "given":
            # Copies: a training step in between may move them before the backward pass comes.
            statistics = [t.clone() for t in given]
            y = launch.channel_apply(x, weight, bias, *given, eps, dtype=dtype)
        else:
            y, *statistics = launch.channel_forward(
                x, weight, bias, groups, over, eps, dtype=dtype, running=running, save_statistics=True
            )
        ctx.save_for_backward(x, weight, bias, *statistics)
        ctx.options = groups, over, eps, dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, *statistics = ctx.saved_tensors
        groups, over, eps, _ = ctx.options
        needed = ctx.needs_input_grad[:3]
        if not _takes_kernel(dy):
            options = (*ctx.options, statistics)
            gradients = formula_gradients(channel_formula, dy, (x, weight, bias), needed, options)
        else:
            outputs = dict(
                needs_dx=needed[0],
                dweight_dtype=weight.dtype if needed[1] else None,
                dbias_dtype=bias.dtype if needed[2] else None,
            )
            dy = dy.resolve_neg()
            if over == "given":
                gradients = launch.channel_apply_backward(dy, x, weight, *statistics, eps, **outputs)
            else:
                gradients = launch.channel_backward(dy, x, weight, *statistics, groups, over, **outputs)
        return (*gradients, None, None, None, None, None, None)


def normalize_channels(x, weight, bias, groups, over, eps, dtype, running=None, given=None):
    """Normalizes x `[N, C, *spatial]` with the statistics of the "batch", of each image's "group"s of
    channels, or with a mean and variance `[C]` that are "given". `running` is updated in place."""
    weight, bias = _contiguous(weight, bias)
    if over == "given":
        given = tuple(_contiguous(*given))
    if _needs_graph(x, weight, bias):
        return ChannelNorm.apply(x, weight, bias, groups, over, eps, dtype, running, given)
    if over == "given":
        return launch.channel_apply(x, weight, bias, *given, eps, dtype=dtype)
    y, _, _ = launch.channel_forward(
        x, weight, bias, groups, over, eps, dtype=dtype, running=running, save_statistics=False
    )
    return y


class WeightNorm(torch.autograd.Function):
    """g * v / ||v|| of many tensors: `apply(dims, *vs, *gs)`."""

    @staticmethod
    def forward(ctx, dims, *tensors):
        vs, gs = tensors[: len(dims)], tensors[len(dims) :]
        ws, norms = launch.weights_forward(vs, gs, dims, save_statistics=True)
        ctx.save_for_backward(*tensors, *norms)
        ctx.dims = dims
        ctx.set_materialize_grads(False)
        needed = ctx.needs_input_grad[1:]
        pairs = zip(needed[: len(dims)], needed[len(dims) :], strict=True)
        ctx.mark_non_differentiable(*(w for w, pair in zip(ws, pairs, strict=True) if not any(pair)))
        return tuple(ws)

    @staticmethod
    def backward(ctx, *dws):
        count, saved = len(ctx.dims), ctx.saved_tensors
        vs, gs, norms = (saved[i * count : (i + 1) * count] for i in range(3))
        needs_dv, needs_dg = (ctx.needs_input_grad[1 + i * count :][:count] for i in range(2))
        dvs, dgs = [None] * count, [None] * count
        used = [i for i, dw in enumerate(dws) if dw is not None and (needs_dv[i] or needs_dg[i])]
        with_kernel = [i for i in used if _takes_kernel(dws[i])]
        if with_kernel:
            of_kernel = (
                [t[i] for i in with_kernel] for t in (vs, gs, norms, ctx.dims, needs_dv, needs_dg)
            )
            found = launch.weights_backward([dws[i].resolve_neg() for i in with_kernel], *of_kernel)
            for i, dv, dg in zip(with_kernel, *found, strict=True):
                dvs[i], dgs[i] = dv, dg
        for i in set(used).difference(with_kernel):
            needed, inputs, options = (needs_dv[i], needs_dg[i]), (vs[i], gs[i]), (ctx.dims[i],)
            dvs[i], dgs[i] = formula_gradients(weight_formula, dws[i], inputs, needed, options)
        return None, *dvs, *dgs


def normalize_weights(vs, gs, dims):
    """g * v / ||v|| of each v, with its norms along its dim, or where that is None the norm of all of
    it; no v is empty, and all lie on one device."""
    gs = list(_contiguous(*gs))
    if _needs_graph(*vs, *gs):
        return WeightNorm.apply(tuple(dims), *vs, *gs)
    return launch.weights_forward(vs, gs, dims, save_statistics=False)[0]
