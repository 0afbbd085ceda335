"""Weight normalization as a differentiable operator, of one tensor and of many."""

from functools import partial

import torch

from .. import launch, library
from ..calls import prepare
from ..formulas import weight_formula
from ..watch import is_watched
from .common import (
    Backwards,
    backward_runner,
    called_directly,
    contiguous,
    formula_gradients,
    needs_graph,
    recorded,
    takes_kernel,
)


def _forward(dim, *, save_statistics):
    def forward(v, g):
        (w,), (norms,) = launch.weights_forward([v], [g], [dim], save_statistics=save_statistics)
        return w, norms

    return forward


def _backward(dim, runner, _g, needed):
    needs = [[need] for need in needed]

    def backward(dw, v, g, norms):
        dw = dw.resolve_neg()
        g, norms = contiguous(g, norms)
        (dv,), (dg,) = runner.weights_backward([dw], [v], [g], [norms], [dim], *needs)
        return dv, dg

    return backward


class WeightCall:
    """g * v / ||v|| of tensors that look alike, with a contiguous g: `compute(v, g)`, and
    `differentiable(v, g)`."""

    def __init__(self, dim):
        self.dim = dim
        self.without_statistics = recorded(launch, _forward(dim, save_statistics=False))
        self.with_statistics = recorded(launch, _forward(dim, save_statistics=True))
        self.backwards = Backwards(launch, partial(_backward, dim))

    def compute(self, v, g):
        return self.without_statistics.run(v, g)[0]

    def differentiable(self, v, g):
        return WeightNorm.apply_directly(self, v, g)


@called_directly
class WeightNorm(torch.autograd.Function):
    """A `WeightCall` of v and g."""

    @staticmethod
    def forward(ctx, call, v, g):
        w, norms = call.with_statistics.run(v, g)
        ctx.save_for_backward(v, g, norms)
        ctx.call = call
        return w

    @staticmethod
    def backward(ctx, dw):
        call, needed, saved = ctx.call, ctx.needs_input_grad[1:], ctx.saved_tensors
        gradients = call.backwards.run(dw, saved, needed)
        if gradients is not None:
            return None, *gradients
        v, g, _ = saved
        return None, *formula_gradients(weight_formula, dw, (v, g), needed, (call.dim,))


class WeightNorms(torch.autograd.Function):
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
        with_kernel = [i for i in used if takes_kernel(dws[i])]
        if with_kernel:
            of_kernel = (
                [t[i] for i in with_kernel] for t in (vs, gs, norms, ctx.dims, needs_dv, needs_dg)
            )
            dense = [dws[i].resolve_neg() for i in with_kernel]
            found = backward_runner(ctx.runner, dense[0]).weights_backward(dense, *of_kernel)
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
    if len(vs) == 1:
        call = WeightCall(dims[0])
        prepare(call, vs[0], gs[0], None, ("weight_norm", dims[0], type(dims[0])))
        v, (g,) = vs[0], contiguous(*gs)
        return [WeightNorm.apply(call, v, g) if needs_graph(v, g) else call.compute(v, g)]
    gs = list(contiguous(*gs))
    if needs_graph(*vs, *gs):
        return WeightNorms.apply(launch, tuple(dims), *vs, *gs)
    return launch.weights_forward(vs, gs, dims, save_statistics=False)[0]


def _weight_norms(vs, gs, dims, save_statistics):
    if needs_graph(*vs, *gs):
        dims = tuple(library.dims_of(dims))
        found = list(WeightNorms.apply(library.operators, dims, *vs, *gs))
        return found[: len(vs)], found[len(vs) :]
    return library.below_autograd("weight_norms", vs, gs, dims, save_statistics)


library.define_gradient("weight_norms", _weight_norms)
