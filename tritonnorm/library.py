"""The operators as torch.library knows them: schema, kernel, results for fake tensors, derivative.

Whatever watches operators (torch.compile, torch.export, a TorchDispatchMode) then sees one node for a
normalization and one for its backward pass, with the mutation of running statistics declared. Nothing
else takes this way, which costs host time. `operators` has functions of `launch` with their signatures,
by way of the dispatcher. What those return as None is an empty tensor in between: a schema has no
optional results.
"""

from math import prod
from types import SimpleNamespace

import torch

from . import launch
from .dtypes import compute_dtype
from .formulas import RowOptions
from .views import LARGEST_SET
from .watch import is_transformed

_library = torch.library.Library("tritonnorm", "DEF")
NAMES = []  # of all operators, with their namespace


def _define(name, schema, kernel, fake):
    """Defines an operator whose `kernel` takes the schema's arguments, as `fake` does."""
    _library.define(name + schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
    for key in ("CPU", "CUDA"):
        _library.impl(name, kernel, key)
    torch.library.register_fake(f"tritonnorm::{name}", fake, lib=_library)
    NAMES.append(f"tritonnorm::{name}")


def define_gradient(name, function):
    """Gives an operator its derivative: `function` answers where autograd is on."""

    def differentiable(*arguments):
        if is_transformed():  # otherwise tangents would be zero, without a word
            raise RuntimeError(
                f"tritonnorm::{name} does not know torch.func and forward-mode AD; "
                "the functions of tritonnorm.functional do"
            )
        return function(*arguments)

    _library.impl(name, differentiable, "Autograd")


def refuse_gradient(name):
    """For backward passes: they are differentiated by a formula, before they come here."""

    def refuse(*arguments):
        tensors = (t for a in arguments for t in (a if isinstance(a, list) else [a]))
        if torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in tensors):
            raise RuntimeError(f"tritonnorm::{name} is not differentiable")
        return below_autograd(name, *arguments)

    define_gradient(name, refuse)


def below_autograd(name, *arguments):
    """Calls an operator, without a derivative."""
    if torch.compiler.is_dynamo_compiling():  # a backward pass, by compiled autograd
        return getattr(torch.ops.tritonnorm, name).default(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.tritonnorm, name).default(*arguments)


def _filled(x, results):
    """Results with empty tensors for None."""
    return tuple(x.new_empty(0) if r is None else r for r in results)


def _check_size(size):
    if size >= LARGEST_SET:
        raise RuntimeError(
            f"{size} elements share statistics, more than a kernel takes (without torch.compile, "
            "PyTorch's operator takes them)"
        )


def _needed(results, needs):
    """Results with None for those that were not needed: False, or a dtype that is None."""
    return [r if need else None for r, need in zip(results, needs, strict=True)]


def _contiguous(*tensors):
    return (t if t is None else t.contiguous() for t in tensors)


def _new_statistics(x, count, kinds):
    """Statistics, `count` of so many kinds: none, or fake ones."""
    return x.new_empty(launch.statistics_size(count, kinds), dtype=compute_dtype(x))


def _with_statistics(x, y, statistics, count):
    """y and its statistics; an empty tensor for None. Nothing in them is left as it was in memory."""
    if statistics is None:
        return y, _new_statistics(x, 0, 1)
    if x.numel() == 0:
        statistics.zero_()
    elif count < statistics.numel() - count:
        statistics[count:-count] = 0
    return y, statistics


def _gradients(x, size, needs_dx, dweight_dtype, dbias_dtype, memory_format=torch.preserve_format):
    """Fake dx, dweight and dbias."""
    dtypes = (dweight_dtype, dbias_dtype)
    parameters = (d if d is None else x.new_empty(size, dtype=d) for d in dtypes)
    dx = torch.empty_like(x, memory_format=memory_format) if needs_dx else None
    return _filled(x, (dx, *parameters))


FORMATS = {True: torch.preserve_format, False: torch.contiguous_format}


def _row_norm(x, weight, bias, dims, *others):
    *options, dtype, preserve_format, save_statistics = others
    _check_size(prod(x.shape[x.dim() - dims :]))
    outputs = dict(dtype=dtype, memory_format=FORMATS[preserve_format], save_statistics=save_statistics)
    parameters = _contiguous(weight, bias)
    found = launch.row_forward(x, *parameters, dims, RowOptions(*options), **outputs)
    return _with_statistics(x, *found, prod(x.shape[: x.dim() - dims]))


def _row_norm_fake(x, weight, bias, dims, *others):
    *options, dtype, preserve_format, save_statistics = others
    y = torch.empty_like(x, dtype=dtype, memory_format=FORMATS[preserve_format])
    rows = prod(x.shape[: x.dim() - dims]) if save_statistics else 0
    return y, _new_statistics(x, rows, launch.kinds_of_statistics(RowOptions(*options)))


def _row_norm_backward(dy, x, weight, statistics, dims, *others):
    *options, preserve_format, needs_dx, dweight_dtype, dbias_dtype = others
    gradients = launch.row_backward(
        *(dy, x, *_contiguous(weight), statistics, dims, RowOptions(*options)),
        memory_format=FORMATS[preserve_format],
        needs_dx=needs_dx,
        dweight_dtype=dweight_dtype,
        dbias_dtype=dbias_dtype,
    )
    return _filled(x, gradients)


def _row_norm_backward_fake(dy, x, weight, statistics, dims, *others):
    *_, preserve_format, needs_dx, dweight_dtype, dbias_dtype = others
    size, memory_format = prod(x.shape[x.dim() - dims :]), FORMATS[preserve_format]
    return _gradients(x, size, needs_dx, dweight_dtype, dbias_dtype, memory_format)


_NEEDS = "bool needs_dx, ScalarType? dweight_dtype, ScalarType? dbias_dtype"
_ROW_OPTIONS = "int dims, str norm, float eps, float weight_offset, ScalarType? round_to"
_define(
    "row_norm",
    f"(Tensor x, Tensor? weight, Tensor? bias, {_ROW_OPTIONS}, ScalarType dtype, bool preserve_format, "
    "bool save_statistics) -> (Tensor y, Tensor statistics)",
    _row_norm,
    _row_norm_fake,
)
_define(
    "row_norm_backward",
    f"(Tensor dy, Tensor x, Tensor? weight, Tensor statistics, {_ROW_OPTIONS}, "
    f"bool preserve_format, {_NEEDS}) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _row_norm_backward,
    _row_norm_backward_fake,
)


def _row_forward(x, weight, bias, dims, options, *, dtype, memory_format, save_statistics):
    outputs = (dtype, memory_format is torch.preserve_format, save_statistics)
    return below_autograd("row_norm", x, weight, bias, dims, *options, *outputs)


def _row_backward(
    dy, x, weight, statistics, dims, options, *, memory_format, needs_dx, dweight_dtype, dbias_dtype
):
    preserve_format = memory_format is torch.preserve_format
    needs = (needs_dx, dweight_dtype, dbias_dtype)
    arguments = (dy, x, weight, statistics, dims, *options, preserve_format, *needs)
    return _needed(below_autograd("row_norm_backward", *arguments), needs)


def _sets(x, groups, over):
    """How many sets of elements share statistics."""
    return x.shape[0] * groups if over == "group" else x.shape[1]


def _channel_norm(x, weight, bias, groups, over, eps, dtype, save_statistics, running=None):
    sets = _sets(x, groups, over)
    _check_size(x.numel() // max(sets, 1))
    options = dict(dtype=dtype, running=running, save_statistics=save_statistics)
    parameters = _contiguous(weight, bias)
    y, statistics = launch.channel_forward(x, *parameters, groups, over, eps, **options)
    return _with_statistics(x, y, statistics if save_statistics else None, sets)


def _channel_norm_fake(x, weight, bias, groups, over, eps, dtype, save_statistics):
    sets = _sets(x, groups, over) if save_statistics else 0
    return torch.empty_like(x, dtype=dtype), _new_statistics(x, sets, 2)


def _channel_norm_running(
    x, weight, bias, running_mean, running_var, momentum_tensor, momentum, *others
):
    momentum = momentum if momentum_tensor is None else momentum_tensor
    running = launch.Running(running_mean, running_var, momentum)
    return _channel_norm(x, weight, bias, *others, running=running)


def _channel_norm_running_fake(
    x, weight, bias, running_mean, running_var, momentum_tensor, momentum, *others
):
    return _channel_norm_fake(x, weight, bias, *others)


def _channel_norm_backward(
    dy, x, weight, statistics, groups, over, needs_dx, dweight_dtype, dbias_dtype
):
    needs = dict(needs_dx=needs_dx, dweight_dtype=dweight_dtype, dbias_dtype=dbias_dtype)
    gradients = launch.channel_backward(dy, x, *_contiguous(weight), statistics, groups, over, **needs)
    return _filled(x, gradients)


def _channel_norm_backward_fake(dy, x, weight, statistics, groups, over, *needs):
    return _gradients(x, x.shape[1], *needs)


def _channel_apply(x, weight, bias, mean, variance, eps, dtype):
    return launch.channel_apply(x, *_contiguous(weight, bias, mean, variance), eps, dtype=dtype)


def _channel_apply_fake(x, weight, bias, mean, variance, eps, dtype):
    return torch.empty_like(x, dtype=dtype)


def _channel_apply_backward(dy, x, weight, statistics, eps, needs_dx, dweight_dtype, dbias_dtype):
    needs = dict(needs_dx=needs_dx, dweight_dtype=dweight_dtype, dbias_dtype=dbias_dtype)
    constants = _contiguous(weight, statistics)
    return _filled(x, launch.channel_apply_backward(dy, x, *constants, eps, **needs))


def _channel_apply_backward_fake(dy, x, weight, statistics, eps, *needs):
    return _gradients(x, x.shape[1], *needs)


_CHANNEL_OPTIONS = "int groups, str over, float eps, ScalarType dtype, bool save_statistics"
_define(
    "channel_norm",
    f"(Tensor x, Tensor? weight, Tensor? bias, {_CHANNEL_OPTIONS}) -> (Tensor y, Tensor statistics)",
    _channel_norm,
    _channel_norm_fake,
)
_define(
    "channel_norm_running",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    f"Tensor? momentum_tensor, float momentum, {_CHANNEL_OPTIONS}) "
    "-> (Tensor y, Tensor statistics)",
    _channel_norm_running,
    _channel_norm_running_fake,
)
_define(
    "channel_norm_backward",
    f"(Tensor dy, Tensor x, Tensor? weight, Tensor statistics, int groups, str over, {_NEEDS}) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
    _channel_norm_backward,
    _channel_norm_backward_fake,
)
_define(
    "channel_apply",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor variance, float eps, "
    "ScalarType dtype) -> Tensor y",
    _channel_apply,
    _channel_apply_fake,
)
_define(
    "channel_apply_backward",
    f"(Tensor dy, Tensor x, Tensor? weight, Tensor statistics, float eps, {_NEEDS}) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
    _channel_apply_backward,
    _channel_apply_backward_fake,
)


def running_arguments(running):
    """Running statistics, their momentum as a tensor or None, and as a number."""
    in_memory = isinstance(running.momentum, torch.Tensor)
    momentum = (running.momentum, 0.0) if in_memory else (None, float(running.momentum))
    return running.mean, running.var, *momentum


def _channel_forward(x, weight, bias, groups, over, eps, *, dtype, running, save_statistics):
    options = (groups, over, eps, dtype, save_statistics)
    if running is None:
        return below_autograd("channel_norm", x, weight, bias, *options)
    return below_autograd("channel_norm_running", x, weight, bias, *running_arguments(running), *options)


def _channel_apply_below(x, weight, bias, mean, variance, eps, *, dtype):
    return below_autograd("channel_apply", x, weight, bias, mean, variance, eps, dtype)


def _backward_below(name):
    def backward(*arguments, needs_dx, dweight_dtype, dbias_dtype):
        needs = needs_dx, dweight_dtype, dbias_dtype
        return _needed(below_autograd(name, *arguments, *needs), needs)

    return backward


def dims_of(numbers):
    """-1 is None: a list of a schema has none."""
    return [None if number == -1 else number for number in numbers]


def dim_numbers(dims):
    return [-1 if dim is None else dim for dim in dims]


def _weight_norms(vs, gs, dims, save_statistics):
    for v, g in zip(vs, gs, strict=True):
        _check_size(max(g.numel(), v.numel() // max(g.numel(), 1)))
    ws, norms = launch.weights_forward(
        vs, list(_contiguous(*gs)), dims_of(dims), save_statistics=save_statistics
    )
    return ws, norms if save_statistics else []


def _fake_dense(x):
    """As x, which is copied to a contiguous tensor unless it is dense."""
    return torch.empty_like(x if launch.is_dense(x) else x.contiguous())


def _weight_norms_fake(vs, gs, dims, save_statistics):
    norms = [_new_statistics(v, g.numel(), 1) for v, g in zip(vs, gs, strict=True)]
    return [_fake_dense(v) for v in vs], norms if save_statistics else []


def _weight_norms_backward(dws, vs, gs, norms, dims, needs_dv, needs_dg):
    gs = list(_contiguous(*gs))
    found = launch.weights_backward(dws, vs, gs, norms, dims_of(dims), needs_dv, needs_dg)
    return tuple(list(_filled(vs[0], gradients)) for gradients in found)


def _weight_norms_backward_fake(dws, vs, gs, norms, dims, needs_dv, needs_dg):
    dvs = [_fake_dense(v) if need else None for v, need in zip(vs, needs_dv, strict=True)]
    dgs = [g.new_empty(g.shape) if need else None for g, need in zip(gs, needs_dg, strict=True)]
    return list(_filled(vs[0], dvs)), list(_filled(vs[0], dgs))


_define(
    "weight_norms",
    "(Tensor[] vs, Tensor[] gs, int[] dims, bool save_statistics) -> (Tensor[] ws, Tensor[] norms)",
    _weight_norms,
    _weight_norms_fake,
)
_define(
    "weight_norms_backward",
    "(Tensor[] dws, Tensor[] vs, Tensor[] gs, Tensor[] norms, int[] dims, bool[] needs_dv, "
    "bool[] needs_dg) -> (Tensor[] dvs, Tensor[] dgs)",
    _weight_norms_backward,
    _weight_norms_backward_fake,
)


def _weights_forward(vs, gs, dims, *, save_statistics):
    ws, norms = below_autograd("weight_norms", vs, gs, dim_numbers(dims), save_statistics)
    return ws, norms if save_statistics else [None] * len(vs)


def _weights_backward(dws, vs, gs, norms, dims, needs_dv, needs_dg):
    arguments = (dws, vs, gs, norms, dim_numbers(dims), needs_dv, needs_dg)
    dvs, dgs = below_autograd("weight_norms_backward", *arguments)
    return _needed(dvs, needs_dv), _needed(dgs, needs_dg)


operators = SimpleNamespace(
    row_forward=_row_forward,
    row_backward=_row_backward,
    channel_forward=_channel_forward,
    channel_backward=_backward_below("channel_norm_backward"),
    channel_apply=_channel_apply_below,
    channel_apply_backward=_backward_below("channel_apply_backward"),
    weights_forward=_weights_forward,
    weights_backward=_weights_backward,
)
for _name in ("row_norm", "channel_norm", "channel_apply", "weight_norms"):
    refuse_gradient(f"{_name}_backward")
