"""What goes to a kernel and what to PyTorch's operator, and the checks that come before both."""

import os
from functools import reduce

import torch
from torch._subclasses import FakeTensor

from .dtypes import HALF, SUPPORTED, compute_dtype
from .views import LARGEST_SET
from .watch import check_constants, is_functional, is_transformed

try:
    from .autograd import normalize_channels, normalize_rows, normalize_weights
    from .calls import prepared
    from .launch import Running
except ModuleNotFoundError as error:  # a platform without Triton: PyTorch's operators serve
    if error.name != "triton":
        raise
    Running = normalize_channels = normalize_rows = normalize_weights = None

    def prepared(*_):
        """No call is."""


__all__ = [
    "Running",
    "check_bool",
    "check_channels",
    "check_momentum",
    "check_number",
    "check_parameters",
    "check_running",
    "fits",
    "is_plain",
    "normalize_channels",
    "normalize_rows",
    "normalize_weights",
    "prepared",
    "result_dtype",
    "takes_kernel",
    "with_torch",
    "with_torch_running",
]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PLAIN = (torch.Tensor, torch.nn.Parameter, FakeTensor)


def is_plain(*tensors) -> bool:
    """Whether these are tensors, fake ones too, or None, and not other subclasses or what stands for
    tensors in a symbolic trace: those dispatch themselves in PyTorch's operator."""
    # Here and below a loop: a generator costs as much as what it asks.
    for t in tensors:  # noqa: SIM110
        if t is not None and (type(t) not in PLAIN or t.is_nested):
            return False
    return True


def takes_kernel(*tensors) -> bool:
    """Whether these plain tensors, the input first, can go to a kernel."""
    x = tensors[0]
    if not (x.is_cuda or (INTERPRETED and x.device.type == "cpu")) or normalize_rows is None:
        return False
    if is_transformed():
        return False
    compiling = torch.compiler.is_compiling()
    for t in tensors:
        if t is not None and not (
            t.dtype in SUPPORTED and t.layout is torch.strided and (compiling or not t.is_neg())
        ):
            return False
    return True


def fits(*sizes) -> bool:
    """Whether sets are of sizes that the kernels take. Of what is compiled the operator asks again, when
    sizes are known: a guard would cut the range of dynamic ones."""
    return torch.compiler.is_compiling() or max(sizes) < LARGEST_SET


def result_dtype(x):
    """Under CUDA autocast float32 of 16-bit input, for the normalizations that it lists: all but batch
    and instance normalization."""
    if x.is_cuda and x.dtype in HALF and torch.is_autocast_enabled("cuda"):
        return torch.float32
    return x.dtype


def _are_mixed(x, dtypes) -> bool:
    """Whether a set of dtypes, all of which kernels take, has others than x's."""
    return {x.dtype, *dtypes} <= set(SUPPORTED) and not dtypes <= {x.dtype}


def _with_weight(weight, *bias):
    """The parameters, with ones for a weight that is missing beside a bias: PyTorch's second derivatives
    fail in that case, or are wrong without an error."""
    is_missing = weight is None and any(b is not None for b in bias)
    return torch.ones_like(*bias) if is_missing else weight, *bias


def _takes_formula(*tensors) -> bool:
    """Whether a transform must not see PyTorch's operators: where one differentiates what another did
    (hessian), those take saved statistics for constants, without an error."""
    return is_functional() and all(t is None or t.dtype in SUPPORTED for t in tensors)


def with_torch(operator, formula, x, *parameters):
    """PyTorch's operator, with our promise for mixed dtypes: compute wide, round once. Under torch.func
    and in forward mode the formula, which takes (x, *parameters, dtype)."""
    if _takes_formula(x, *parameters):
        return formula(x, *parameters, result_dtype(x))
    parameters = _with_weight(*parameters)
    if not _are_mixed(x, {p.dtype for p in parameters if p is not None}):
        return operator(x, *parameters)
    wide = compute_dtype(x)
    y = operator(x.to(wide), *(p if p is None else p.to(wide) for p in parameters))
    return y.to(result_dtype(x))


def with_torch_running(operator, formula, x, running, *parameters, updates):
    """`with_torch` for operator(x, *running, *parameters), which updates `running` in place or not.

    PyTorch takes one mix itself: 16-bit x, and everything else in float32.
    """
    if formula is not None and _takes_formula(x, *running, *parameters):
        if updates and running[0] is not None:
            with_torch_running(operator, None, x, running, *parameters, updates=True)
        return formula(x, *parameters, x.dtype)
    parameters = _with_weight(*parameters)
    dtypes = {t.dtype for t in (*running, *parameters) if t is not None}
    if not _are_mixed(x, dtypes) or (x.dtype in HALF and dtypes == {torch.float32}):
        return operator(x, *running, *parameters)
    wide = reduce(torch.promote_types, (t.dtype for t in running if t is not None), compute_dtype(x))
    # copies, since what the operator saves for its backward pass must not change afterwards
    copies = [t if t is None else t.to(wide, copy=True) for t in running]
    y = operator(x.to(wide), *copies, *(p if p is None else p.to(wide) for p in parameters))
    if updates:
        for statistic, updated in zip(running, copies, strict=True):
            if statistic is not None:
                statistic.copy_(updated)
    return y.to(x.dtype)


def check_number(name, argument, value) -> float:
    """Its float; of a string there is none."""
    if type(value) is float:
        return value
    try:
        return float(None if isinstance(value, str) else value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: {argument} must be a number, not {type(value).__name__}") from None


def check_momentum(name, momentum):
    """A float, or a tensor of one number, which is not read here: it may lie on a GPU."""
    if not isinstance(momentum, torch.Tensor):
        return check_number(name, "momentum", momentum)
    if momentum.dim() != 0 or momentum.requires_grad:
        raise TypeError(f"{name}: momentum must be a number, or a tensor of one without a gradient")
    return momentum


def check_bool(name, argument, value):
    if not isinstance(value, bool):
        raise TypeError(f"{name}: {argument} must be a bool, not {type(value).__name__}")


def check_parameters(name, input, shape, **parameters):
    """That each is None, or has this shape and lies where the input does."""
    device = input.device
    for argument, tensor in parameters.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise RuntimeError(
                f"{name}: {argument} must have shape {list(shape)}, but has {list(tensor.shape)}"
            )
        if tensor.device != device:
            raise RuntimeError(f"{name}: {argument} is on {tensor.device}, but input is on {device}")


def check_channels(name, input, **parameters):
    """That the input is `[N, C, *spatial]`, and each parameter `[C]` or None."""
    if input.dim() < 2:
        raise RuntimeError(f"{name}: input must have at least 2 dimensions, but has {input.dim()}")
    check_parameters(name, input, (input.shape[1],), **parameters)


def check_running(name, running_mean, running_var, flag, given):
    """That both statistics are there, or none if they are not `given`, and that no gradient is due."""
    for argument, tensor in (("running_mean", running_mean), ("running_var", running_var)):
        if tensor is None and given:
            raise RuntimeError(f"{name}: {argument} must be given where {flag} is False")
    check_constants(name, running_mean=running_mean, running_var=running_var)
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{name}: running_mean and running_var must both be given, or both be None")
