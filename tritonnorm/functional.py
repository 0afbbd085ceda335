"""Normalizations with the names, arguments, defaults and errors of torch.nn.functional.

The kernels run on CUDA tensors, and on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1). Other
tensors take PyTorch's own operator: other devices, other dtypes than float16, bfloat16, float32 and
float64, tensor subclasses, tensors with a pending negation, and whatever runs under torch.compile,
torch.jit.trace, torch.fx, torch.func or forward-mode AD.

All of them compute in float32 (float64 for float64 input) and round once. The input, the weight and
the bias may have dtypes of their own; the result has the input's, or float32 under CUDA autocast, as
with PyTorch. They are differentiable in every tensor argument, twice as well: the second derivative
is that of a plain PyTorch formula, which is right but not fused.
"""

import os
from math import prod

import torch
import torch.nn.functional as F

from .dtypes import HALF, SUPPORTED, compute_dtype

try:
    from .autograd import normalize_rows
except ModuleNotFoundError as error:  # a platform without Triton: PyTorch's operators serve
    if error.name != "triton":
        raise
    normalize_rows = None

__all__ = ["layer_norm", "normalize", "rms_norm"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LARGEST_ROW = 2**31 - 2**16  # column indices are int32, with room for the last chunk of a loop


def _is_plain(*tensors) -> bool:
    """Whether these are tensors, or None, and neither subclasses nor what stands for tensors in a trace:
    those dispatch themselves in PyTorch's operator."""
    return all(t is None or type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors)


def _takes_kernel(*tensors) -> bool:
    """Whether these plain tensors, the input first, can go to a kernel."""
    x = tensors[0]
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and (x.is_cuda or (INTERPRETED and x.device.type == "cpu"))
        and normalize_rows is not None
        and all(
            t is None or (t.dtype in SUPPORTED and t.layout is torch.strided and not t.is_neg())
            for t in tensors
        )
        and torch._C._functorch.maybe_current_level() is None
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _result_dtype(x):
    """CUDA autocast runs normalizations in float32."""
    if x.is_cuda and x.dtype in HALF and torch.is_autocast_enabled("cuda"):
        return torch.float32
    return x.dtype


def _check_eps(name, eps) -> float:
    try:
        return float(eps)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: eps must be a number, not {type(eps).__name__}") from None


def _check(name, input, normalized_shape, **parameters):
    """Raises PyTorch's kinds of errors, naming the argument."""
    if not isinstance(normalized_shape, (tuple, list, torch.Size)):
        raise TypeError(
            f"{name}: normalized_shape must be a tuple or list of ints, "
            f"not {type(normalized_shape).__name__}"
        )
    shape = tuple(normalized_shape)
    if not shape:
        raise RuntimeError(f"{name}: normalized_shape must have at least one dimension")
    if tuple(input.shape[-len(shape) :]) != shape:
        raise RuntimeError(
            f"{name}: normalized_shape={list(shape)} needs an input of shape "
            f"[*, {', '.join(map(str, shape))}], but input has shape {list(input.shape)}"
        )
    for argument, tensor in parameters.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise RuntimeError(
                f"{name}: {argument} must have the shape of normalized_shape {list(shape)}, "
                f"but has {list(tensor.shape)}"
            )
        if tensor.device != input.device:
            raise RuntimeError(
                f"{name}: {argument} is on {tensor.device}, but input is on {input.device}"
            )


def _with_torch(operator, x, *parameters):
    """PyTorch's operator, with our promise for mixed dtypes: compute wide, round once."""
    if not all(p is None or p.dtype in SUPPORTED for p in (x, *parameters)) or all(
        p is None or p.dtype == x.dtype for p in parameters
    ):
        return operator(x, *parameters)
    wide = compute_dtype(x)
    y = operator(x.to(wide), *(p if p is None else p.to(wide) for p in parameters))
    return y.to(_result_dtype(x))


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    """Layer normalization over the trailing dimensions (Ba, Kiros and Hinton, arXiv:1607.06450).

        y = (x - mean) / sqrt(var + eps) * weight + bias

    with the mean and the biased variance of each row, that is over `normalized_shape`. The variance
    is two-pass (for long rows Welford's), never E[x^2] - E[x]^2.

    Args:
        input: `[*, *normalized_shape]`, any strides; rows that three strides and a step within
            the row describe (slices, transposes, channels of NCHW) are read where they lie.
        normalized_shape: tuple of ints.
        weight, bias: of shape `normalized_shape`, or None.
        eps: added to the variance.

    Returns:
        A contiguous tensor of the input's shape and dtype (under CUDA autocast float32).

    Raises:
        RuntimeError: a shape or device does not fit; the message names the argument.
        TypeError: normalized_shape is not a sequence, or eps not a number.
    """
    if not _is_plain(input, weight, bias):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    _check("layer_norm", input, normalized_shape, weight=weight, bias=bias)
    eps = _check_eps("layer_norm", eps)
    if _takes_kernel(input, weight, bias) and prod(normalized_shape) < LARGEST_ROW:
        return normalize_rows(
            input,
            weight,
            bias,
            len(normalized_shape),
            eps,
            "layer",
            _result_dtype(input),
            torch.contiguous_format,
        )
    return _with_torch(lambda x, w, b: F.layer_norm(x, normalized_shape, w, b, eps), input, weight, bias)


def rms_norm(input, normalized_shape, weight=None, eps=None):
    """Root mean square normalization over the trailing dimensions (Zhang and Sennrich,
    arXiv:1910.07467).

        y = x / sqrt(mean(x^2) + eps) * weight

    with the mean over `normalized_shape`.

    Args:
        input: `[*, *normalized_shape]`, any strides, as for `layer_norm`.
        normalized_shape: tuple of ints.
        weight: of shape `normalized_shape`, or None.
        eps: added to the mean of squares; None means, as in PyTorch, the machine epsilon of the
            dtype computed in: float32's also for float16 and bfloat16.

    Returns:
        A contiguous tensor of the input's shape and dtype (under CUDA autocast float32). Hugging
        Face's LlamaRMSNorm rounds before it multiplies by the weight; this function rounds once.

    Raises:
        RuntimeError: a shape or device does not fit; the message names the argument.
        TypeError: normalized_shape is not a sequence, or eps not a number.
    """
    if not _is_plain(input, weight):
        return F.rms_norm(input, normalized_shape, weight, eps)
    _check("rms_norm", input, normalized_shape, weight=weight)
    eps = eps if eps is None else _check_eps("rms_norm", eps)
    if _takes_kernel(input, weight) and prod(normalized_shape) < LARGEST_ROW:
        if eps is None:
            eps = torch.finfo(compute_dtype(input)).eps
        return normalize_rows(
            input,
            weight,
            None,
            len(normalized_shape),
            eps,
            "rms",
            _result_dtype(input),
            torch.contiguous_format,
        )
    return _with_torch(lambda x, w: F.rms_norm(x, normalized_shape, w, eps), input, weight)


def _are_dims(dims, count) -> bool:
    """Whether these name dimensions of a tensor that has `count`, at least one and none twice."""
    return (
        isinstance(dims, (tuple, list))
        and len(dims) > 0
        and all(isinstance(d, int) and -count <= d < count for d in dims)
        and len({d % count for d in dims}) == len(dims)
    )


def normalize(input, p=2.0, dim=1, eps=1e-12, out=None):
    """L2 normalization along a dimension, or several.

        y = x / max(||x||_2, eps)

    Where the norm is below eps the denominator is constant, and the gradient is dy / eps. eps does not
    round to zero in float16, as it does in PyTorch: a row of zeros stays zero.

    Args:
        input: any shape and strides.
        p: the norm's exponent. The kernel computes p = 2; others take PyTorch's operator.
        dim: int or tuple of ints.
        eps: smallest denominator.
        out: a tensor to write to, not differentiable; takes PyTorch's operator.

    Returns:
        A tensor of the input's shape, dtype (under CUDA autocast float32) and, where it is dense,
        memory format.

    Raises:
        IndexError: dim is out of range.
    """
    dims = (dim,) if isinstance(dim, int) else dim
    if (
        p == 2
        and out is None
        and _is_plain(input)
        and _are_dims(dims, input.dim())
        and _takes_kernel(input)
        and prod(input.shape[d] for d in dims) < LARGEST_ROW
    ):
        last = tuple(range(-len(dims), 0))
        y = normalize_rows(
            input.movedim(dims, last),
            None,
            None,
            len(dims),
            _check_eps("normalize", eps),
            "l2",
            _result_dtype(input),
            torch.preserve_format,
        )
        return y.movedim(last, dims)
    return F.normalize(input, p, dim, eps, out)
