"""The kernels as differentiable operators: an autograd function for rows, one for channels, and one for
the weights of layers.

The first argument of each is what runs them: `launch`, at once, or `library.operators`, which whoever
watches operators sees. The latter return the statistics too, as the operators do.
"""

from math import prod

import torch

from . import launch, library
from .formulas import RowOptions, channel_formula, row_deviation, row_formula, weight_formula
from .saving import output_suffices
from .watch import check_constants, is_watched


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
    return torch.compiler.is_dynamo_compiling() or (
        not torch._C._functorch.is_legacy_batchedtensor(dy)
        and not torch._C._functorch.is_functorch_wrapped_tensor(dy)
        and not dy._is_zerotensor()
    )


def _runner(ctx, dy):
    """What runs a backward pass. Who watches it (compiled autograd, say) sees the operators, though the
    forward pass was launched."""
    return library.operators if is_watched(dy) else ctx.runner


class RowNorm(torch.autograd.Function):
    """LayerNorm, RMSNorm and L2 normalization over the trailing dimensions."""

    @staticmethod
    def forward(ctx, runner, x, weight, bias, normalized_dims, options, dtype, memory_format):
        y, mean, spread = runner.row_forward(
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
        return _results(ctx, runner, x, y, mean, spread)

    @staticmethod
    def backward(ctx, dy, *_):
        x, weight, bias, mean, spread = ctx.saved_tensors
        needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad[1:4]
        if not _takes_kernel(dy):
            needed = (needs_dx, needs_dweight, needs_dbias)
            gradients = formula_gradients(row_formula, dy, (x, weight, bias), needed, ctx.options)
        else:
            normalized_dims, options, _dtype = ctx.options
            dx, dweight, dbias = _runner(ctx, dy).row_backward(
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
                _in_shape_of(weight, dweight) if needs_dweight else None,
                _in_shape_of(bias, dbias) if needs_dbias else None,
            ]
        return (None, *gradients, None, None, None, None)


class RowNormFromOutput(torch.autograd.Function):
    """`RowNorm` that keeps its output in the place of its input, where `saving.output_suffices`."""

    @staticmethod
    def forward(ctx, x, weight, bias, normalized_dims, options, dtype, memory_format):
        outputs = dict(dtype=dtype, memory_format=memory_format, save_statistics=True)
        y, _, spread = launch.row_forward(x, weight, bias, normalized_dims, options, **outputs)
        ctx.save_for_backward(y, weight, bias, spread)
        ctx.options = normalized_dims, options, dtype
        ctx.memory_format = memory_format
        return y

    @staticmethod
    def backward(ctx, dy):
        y, weight, bias, spread = ctx.saved_tensors
        normalized_dims, options, _dtype = ctx.options
        if torch.is_grad_enabled():
            raise RuntimeError(
                'save="output" does not keep the input, of which the second derivative is one: '
                'use save="input" with create_graph=True'
            )
        needed = ctx.needs_input_grad[:3]
        if not _is_plain(dy) or is_watched(dy):
            # Of the deviation from the mean, which has the same gradient.
            x = row_deviation(y, weight, bias, spread, normalized_dims, options)
            x.requires_grad_(needed[0])
            gradients = formula_gradients(row_formula, dy, (x, weight, bias), needed, ctx.options)
            return (*gradients, None, None, None, None)
        dx, dweight, dbias = launch.row_backward(
            dy.resolve_neg(),
            y,
            weight,
            None,
            spread,
            normalized_dims,
            options,
            memory_format=ctx.memory_format,
            needs_dx=needed[0],
            dweight_dtype=weight.dtype if needed[1] else None,
            dbias_dtype=bias.dtype if needed[2] else None,
            recover=(bias,),
        )
        dweight = _in_shape_of(weight, dweight) if needed[1] else None
        dbias = _in_shape_of(bias, dbias) if needed[2] else None
        return dx, dweight, dbias, None, None, None, None


def _in_shape_of(parameter, gradient):
    return gradient if parameter.dim() == 1 else gradient.view(parameter.shape)


def _results(ctx, runner, x, y, *statistics):
    """What a forward pass returns: y, of the registered operators the statistics too."""
    ctx.runner = runner
    if runner is launch:
        return y
    statistics = library.with_statistics(x, statistics)
    ctx.mark_non_differentiable(*statistics)
    return y, *statistics


def _needs_graph(*tensors) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def _contiguous(*tensors):
    return [t if t is None else t.contiguous() for t in tensors]


def _row_norm(x, weight, bias, dims, *others):
    *options, dtype, preserve_format, _save_statistics = others
    if _needs_graph(x, weight, bias):
        options, memory_format = RowOptions(*options), library.FORMATS[preserve_format]
        return RowNorm.apply(library.operators, x, weight, bias, dims, options, dtype, memory_format)
    return library.below_autograd("row_norm", x, weight, bias, dims, *others)


library.define_gradient("row_norm", _row_norm)


def normalize_rows(x, weight, bias, normalized_dims, options, dtype, memory_format, save_output=False):
    """Normalizes x over its last `normalized_dims` dimensions, with statistics for the backward
    pass where one can come. With `save_output` it starts from y, where that suffices."""
    if is_watched(x, weight, bias):
        preserve_format = memory_format is torch.preserve_format
        arguments = (normalized_dims, *options, dtype, preserve_format, False)
        return torch.ops.tritonnorm.row_norm(x, weight, bias, *arguments)[0]
    if _needs_graph(x, weight, bias):
        n = prod(x.shape[x.dim() - normalized_dims :]) if save_output else None
        save_output = save_output and output_suffices(x, weight, bias, options, dtype, n)
        weight, bias = _contiguous(weight, bias)
        arguments = (normalized_dims, options, dtype, memory_format)
        if save_output:
            return RowNormFromOutput.apply(x, weight, bias, *arguments)
        return RowNorm.apply(launch, x, weight, bias, *arguments)
    weight, bias = _contiguous(weight, bias)
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


class ChannelNorm(torch.autograd.Function):
    """BatchNorm, GroupNorm and InstanceNorm of `[N, C, *spatial]`."""

    @staticmethod
    def forward(ctx, runner, x, weight, bias, groups, over, eps, dtype, running, given):
        if over == "given":
            # Copies: a training step in between may move them before the backward pass comes.
            statistics = [t.clone() for t in given]
            y = runner.channel_apply(x, weight, bias, *given, eps, dtype=dtype)
        else:
            y, *statistics = runner.channel_forward(
                x, weight, bias, groups, over, eps, dtype=dtype, running=running, save_statistics=True
            )
        ctx.save_for_backward(x, weight, bias, *statistics)
        ctx.options = groups, over, eps, dtype
        return _results(ctx, runner, x, y, *(() if over == "given" else statistics))

    @staticmethod
    def backward(ctx, dy, *_):
        x, weight, bias, *statistics = ctx.saved_tensors
        groups, over, eps, _dtype = ctx.options
        needed = ctx.needs_input_grad[1:4]
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
            runner = _runner(ctx, dy)
            backward, arguments = runner.channel_backward, (*statistics, groups, over)
            if over == "given":
                backward, arguments = runner.channel_apply_backward, (*statistics, eps)
            gradients = backward(dy, x, weight, *arguments, **outputs)
        return (None, *gradients, None, None, None, None, None, None)


def normalize_channels(x, weight, bias, groups, over, eps, dtype, running=None, given=None):
    """Normalizes x `[N, C, *spatial]` with the statistics of the "batch", of each image's "group"s of
    channels, or with a mean and variance `[C]` that are "given". `running` is updated in place."""
    if is_watched(x, weight, bias):
        ops, options = torch.ops.tritonnorm, (groups, over, eps, dtype, False)
        if over == "given":
            return ops.channel_apply(x, weight, bias, *given, eps, dtype)
        if running is None:
            return ops.channel_norm(x, weight, bias, *options)[0]
        running = library.running_arguments(running)
        return ops.channel_norm_running(x, weight, bias, *running, *options)[0]
    weight, bias = _contiguous(weight, bias)
    if over == "given":
        given = tuple(_contiguous(*given))
    if _needs_graph(x, weight, bias):
        options = (groups, over, eps, dtype, running, given)
        return ChannelNorm.apply(launch, x, weight, bias, *options)
    if over == "given":
        return launch.channel_apply(x, weight, bias, *given, eps, dtype=dtype)
    y, _, _ = launch.channel_forward(
        x, weight, bias, groups, over, eps, dtype=dtype, running=running, save_statistics=False
    )
    return y


def _channel_norm(x, weight, bias, *options, running=()):
    if _needs_graph(x, weight, bias):
        moved = launch.Running(*running[:2], _momentum(*running[2:])) if running else None
        options = options[:-1]
        return ChannelNorm.apply(library.operators, x, weight, bias, *options, moved, None)
    name = "channel_norm_running" if running else "channel_norm"
    return library.below_autograd(name, x, weight, bias, *running, *options)


def _momentum(in_memory, number):
    return number if in_memory is None else in_memory


def _channel_norm_running(x, weight, bias, *others):
    names = ("running_mean", "running_var", "momentum_tensor")
    check_constants("tritonnorm::channel_norm_running", **dict(zip(names, others[:3], strict=True)))
    return _channel_norm(x, weight, bias, *others[4:], running=others[:4])


def _channel_apply(x, weight, bias, mean, variance, eps, dtype):
    check_constants("tritonnorm::channel_apply", mean=mean, variance=variance)
    if _needs_graph(x, weight, bias):
        options = (x.shape[1], "given", eps, dtype, None, (mean, variance))
        return ChannelNorm.apply(library.operators, x, weight, bias, *options)[0]
    return library.below_autograd("channel_apply", x, weight, bias, mean, variance, eps, dtype)


library.define_gradient("channel_norm", _channel_norm)
library.define_gradient("channel_norm_running", _channel_norm_running)
library.define_gradient("channel_apply", _channel_apply)


class WeightNorm(torch.autograd.Function):
    """g * v / ||v|| of many tensors: `apply(runner, dims, *vs, *gs)`."""

    @staticmethod
    def forward(ctx, runner, dims, *tensors):
        vs, gs = tensors[: len(dims)], tensors[len(dims) :]
        ws, norms = runner.weights_forward(vs, gs, dims, save_statistics=True)
        ctx.save_for_backward(*tensors, *norms)
        ctx.dims = dims
        ctx.set_materialize_grads(False)
        ctx.runner = runner
        needed = ctx.needs_input_grad[2:]
        pairs = zip(needed[: len(dims)], needed[len(dims) :], strict=True)
        frozen = [w for w, pair in zip(ws, pairs, strict=True) if not any(pair)]
        statistics = () if runner is launch else norms
        ctx.mark_non_differentiable(*frozen, *statistics)
        return *ws, *statistics

    @staticmethod
    def backward(ctx, *dws):
        count, saved = len(ctx.dims), ctx.saved_tensors
        dws = dws[:count]
        vs, gs, norms = (saved[i * count : (i + 1) * count] for i in range(3))
        needs_dv, needs_dg = (ctx.needs_input_grad[2 + i * count :][:count] for i in range(2))
        dvs, dgs = [None] * count, [None] * count
        used = [i for i, dw in enumerate(dws) if dw is not None and (needs_dv[i] or needs_dg[i])]
        with_kernel = [i for i in used if _takes_kernel(dws[i])]
        if with_kernel:
            of_kernel = (
                [t[i] for i in with_kernel] for t in (vs, gs, norms, ctx.dims, needs_dv, needs_dg)
            )
            dense = [dws[i].resolve_neg() for i in with_kernel]
            found = _runner(ctx, dense[0]).weights_backward(dense, *of_kernel)
            for i, dv, dg in zip(with_kernel, *found, strict=True):
                dvs[i], dgs[i] = dv, dg
        for i in set(used).difference(with_kernel):
            needed, inputs, options = (needs_dv[i], needs_dg[i]), (vs[i], gs[i]), (ctx.dims[i],)
            dvs[i], dgs[i] = formula_gradients(weight_formula, dws[i], inputs, needed, options)
        return None, None, *dvs, *dgs


def normalize_weights(vs, gs, dims):
    """g * v / ||v|| of each v, with its norms along its dim, or where that is None the norm of all of
    it; no v is empty, and all lie on one device."""
    if is_watched(*vs, *gs):
        return torch.ops.tritonnorm.weight_norms(vs, gs, library.dim_numbers(dims), False)[0]
    gs = list(_contiguous(*gs))
    if _needs_graph(*vs, *gs):
        return WeightNorm.apply(launch, tuple(dims), *vs, *gs)
    return launch.weights_forward(vs, gs, dims, save_statistics=False)[0]


def _weight_norms(vs, gs, dims, save_statistics):
    if _needs_graph(*vs, *gs):
        dims = tuple(library.dims_of(dims))
        found = list(WeightNorm.apply(library.operators, dims, *vs, *gs))
        return found[: len(vs)], found[len(vs) :]
    return library.below_autograd("weight_norms", vs, gs, dims, save_statistics)


library.define_gradient("weight_norms", _weight_norms)
