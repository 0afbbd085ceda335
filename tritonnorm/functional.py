"""Normalizations with the names, arguments, defaults and errors of torch.nn.functional.

The kernels run on CUDA tensors, and on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1). Other
tensors take PyTorch's own operator: other devices, other dtypes than float16, bfloat16, float32 and
float64, tensor subclasses, tensors with a pending negation, and whatever runs under torch.compile,
torch.jit.trace, torch.fx, torch.func or forward-mode AD.

All of them compute in float32 (float64 for float64 input) and round once. The input, the parameters
and the running statistics may have dtypes of their own; the result has the input's. Under CUDA autocast
it is float32, as with PyTorch, but for batch_norm and instance_norm. They are differentiable in input,
weight and bias, twice as well: the second derivative is that of a plain PyTorch formula, which is right
but not fused.
"""

import operator
from math import prod

import torch
import torch.nn.functional as F

from .dispatch import (
    LARGEST_SET,
    Running,
    check_bool,
    check_channels,
    check_momentum,
    check_number,
    check_parameters,
    check_running,
    is_plain,
    normalize_channels,
    normalize_rows,
    result_dtype,
    takes_kernel,
    with_torch,
    with_torch_running,
)
from .dtypes import compute_dtype

__all__ = [
    "batch_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "layer_norm2d",
    "normalize",
    "rms_norm",
]


def _check_rows(name, input, normalized_shape, **parameters):
    """That the input is `[*, *normalized_shape]`, and each parameter of that shape or None."""
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
    check_parameters(name, input, shape, **parameters)


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
    if not is_plain(input, weight, bias):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    _check_rows("layer_norm", input, normalized_shape, weight=weight, bias=bias)
    eps = check_number("layer_norm", "eps", eps)
    if takes_kernel(input, weight, bias) and prod(normalized_shape) < LARGEST_SET:
        return normalize_rows(
            input,
            weight,
            bias,
            len(normalized_shape),
            eps,
            "layer",
            result_dtype(input),
            torch.contiguous_format,
        )
    return with_torch(lambda x, w, b: F.layer_norm(x, normalized_shape, w, b, eps), input, weight, bias)


def layer_norm2d(input, weight=None, bias=None, eps=1e-6):
    """Layer normalization over the channels of each pixel, as ConvNeXt has it (Liu et al.,
    arXiv:2201.03545).

    Args:
        input: `[N, C, H, W]`, any strides; contiguous and channels_last are read where they lie.
        weight, bias: `[C]` or None.
        eps: added to the variance.

    Returns:
        A tensor of the input's shape, dtype (under CUDA autocast float32) and, where it is dense,
        memory format. (PyTorch's operator, where it is taken, returns channels_last.)

    Raises:
        RuntimeError: a shape or device does not fit; the message names the argument.
        TypeError: eps is not a number.
    """

    def with_layer_norm(x, w, b):
        return F.layer_norm(x.movedim(1, -1), (x.shape[1],), w, b, eps).movedim(-1, 1)

    if not is_plain(input, weight, bias):
        return with_layer_norm(input, weight, bias)
    if input.dim() != 4:
        raise RuntimeError(
            f"layer_norm2d: input must be [N, C, H, W], but has shape {list(input.shape)}"
        )
    check_channels("layer_norm2d", input, weight=weight, bias=bias)
    eps = check_number("layer_norm2d", "eps", eps)
    if takes_kernel(input, weight, bias) and input.shape[1] < LARGEST_SET:
        y = normalize_rows(
            input.movedim(1, -1),
            weight,
            bias,
            1,
            eps,
            "layer",
            result_dtype(input),
            torch.preserve_format,
        )
        return y.movedim(-1, 1)
    return with_torch(with_layer_norm, input, weight, bias)


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
    if not is_plain(input, weight):
        return F.rms_norm(input, normalized_shape, weight, eps)
    _check_rows("rms_norm", input, normalized_shape, weight=weight)
    eps = eps if eps is None else check_number("rms_norm", "eps", eps)
    if takes_kernel(input, weight) and prod(normalized_shape) < LARGEST_SET:
        if eps is None:
            eps = torch.finfo(compute_dtype(input)).eps
        return normalize_rows(
            input,
            weight,
            None,
            len(normalized_shape),
            eps,
            "rms",
            result_dtype(input),
            torch.contiguous_format,
        )
    return with_torch(lambda x, w: F.rms_norm(x, normalized_shape, w, eps), input, weight)


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
        and is_plain(input)
        and _are_dims(dims, input.dim())
        and takes_kernel(input)
        and prod(input.shape[d] for d in dims) < LARGEST_SET
    ):
        last = tuple(range(-len(dims), 0))
        y = normalize_rows(
            input.movedim(dims, last),
            None,
            None,
            len(dims),
            check_number("normalize", "eps", eps),
            "l2",
            result_dtype(input),
            torch.preserve_format,
        )
        return y.movedim(last, dims)
    return F.normalize(input, p, dim, eps, out)


def group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    """Group normalization (Wu and He, arXiv:1803.08494).

        y = (x - mean) / sqrt(var + eps) * weight + bias

    with the mean and the biased variance of each image's group: C / num_groups adjacent channels and
    all spatial positions.

    Args:
        input: `[N, C, *spatial]`.
        num_groups: G, which divides C.
        weight, bias: `[C]` or None.
        eps: added to the variance.

    Returns:
        A tensor of the input's shape, dtype (under CUDA autocast float32) and memory format.

    Raises:
        ValueError: the input has one group in all, of one element.
        RuntimeError: num_groups is not positive or does not divide C, or a shape or device does not
            fit; the message names the argument.
        TypeError: num_groups is not an int, or eps not a number.
    """
    if not is_plain(input, weight, bias):
        return F.group_norm(input, num_groups, weight, bias, eps)
    check_channels("group_norm", input, weight=weight, bias=bias)
    try:
        groups = operator.index(num_groups)
    except TypeError:
        raise TypeError(f"group_norm: num_groups must be an int, not {num_groups!r}") from None
    if groups <= 0 or input.shape[1] % groups:
        raise RuntimeError(
            f"group_norm: num_groups must be positive and divide the {input.shape[1]} channels of "
            f"input, but is {groups}"
        )
    eps = check_number("group_norm", "eps", eps)
    size = input.shape[1] // groups * prod(input.shape[2:])
    if input.shape[0] * size == 1:
        raise ValueError(f"group_norm: input of shape {list(input.shape)} has one value per group")
    if takes_kernel(input, weight, bias) and size < LARGEST_SET:
        return normalize_channels(input, weight, bias, groups, "group", eps, result_dtype(input))
    return with_torch(lambda x, w, b: F.group_norm(x, groups, w, b, eps), input, weight, bias)


def _batch_or_instance_norm(torch_norm, input, running, weight, bias, over, momentum, eps):
    """`torch_norm`, F.batch_norm or F.instance_norm, on the kernels where they can.

    Args:
        running: (mean, var), each `[C]` or None.
        over: what has statistics of its own: "batch" a channel, "group" a channel of one image;
            "given" means that those of `running` are taken.
    """
    uses_input = over != "given"
    size = prod(input.shape[2:]) * (input.shape[0] if over == "batch" else 1)
    if takes_kernel(input, *running, weight, bias) and size < LARGEST_SET:
        if isinstance(momentum, torch.Tensor):
            momentum = momentum.to(input.device, torch.float64)
        return normalize_channels(
            input,
            weight,
            bias,
            input.shape[1],
            over,
            eps,
            input.dtype,
            running=Running(*running, momentum) if uses_input and running[0] is not None else None,
            given=None if uses_input else running,
        )

    def with_options(*tensors):
        return torch_norm(*tensors, uses_input, float(momentum), eps)

    return with_torch_running(with_options, input, running, weight, bias, updates=uses_input)


def batch_norm(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    """Batch normalization (Ioffe and Szegedy, arXiv:1502.03167).

        y = (x - mean) / sqrt(var + eps) * weight + bias

    In training, mean and biased variance are those of each channel, over N and all spatial positions,
    and the running statistics, if given, are updated in place, with the unbiased variance:

        running = (1 - momentum) * running + momentum * statistic

    Otherwise mean and variance are the running statistics. An empty input changes none of them.

    Args:
        input: `[N, C, *spatial]`.
        running_mean, running_var: `[C]`, in training also None.
        weight, bias: `[C]` or None.
        training: bool.
        momentum: a number, or a tensor of one on any device, which the kernels do not wait for.
        eps: added to the variance.

    Returns:
        A tensor of the input's shape, dtype and memory format.

    Raises:
        ValueError: in training, one value per channel, or one running statistic without the other;
            eps is negative, or zero in training.
        RuntimeError: a shape or device does not fit, running statistics are missing in evaluation or
            require a gradient; the message names the argument.
        TypeError: training is not a bool, or momentum or eps not a number.

    Nothing is updated where an error is raised.
    """
    if not is_plain(input, running_mean, running_var, weight, bias):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    parameters = {
        "running_mean": running_mean,
        "running_var": running_var,
        "weight": weight,
        "bias": bias,
    }
    check_bool("batch_norm", "training", training)
    check_channels("batch_norm", input, **parameters)
    check_running("batch_norm", running_mean, running_var, "training", given=not training)
    momentum = check_momentum("batch_norm", momentum)
    eps = check_number("batch_norm", "eps", eps)
    if eps < 0 or (training and eps == 0):
        raise ValueError(f"batch_norm: eps must be positive, or zero in evaluation, but is {eps}")
    if training and input.shape[0] * prod(input.shape[2:]) == 1:
        raise ValueError(
            f"batch_norm: input of shape {list(input.shape)} has one value per channel in training"
        )
    running = (running_mean, running_var)
    over = "batch" if training else "given"
    return _batch_or_instance_norm(F.batch_norm, input, running, weight, bias, over, momentum, eps)


def instance_norm(
    input,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=0.1,
    eps=1e-5,
):
    """Instance normalization (Ulyanov, Vedaldi and Lempitsky, arXiv:1607.08022).

        y = (x - mean) / sqrt(var + eps) * weight + bias

    With `use_input_stats`, mean and biased variance are those of each image's channel, over all spatial
    positions, and the running statistics, if given, are updated in place as by `batch_norm`, with the
    images' mean and unbiased variance averaged over N. Otherwise the running statistics are taken. An
    empty input changes none of them.

    Args:
        input: `[N, C, *spatial]`.
        running_mean, running_var: `[C]`, or None with `use_input_stats`.
        weight, bias: `[C]` or None.
        use_input_stats: bool.
        momentum: a number, or a tensor of one on any device, which the kernels do not wait for.
        eps: added to the variance.

    Returns:
        A tensor of the input's shape, dtype and memory format.

    Raises:
        ValueError: with `use_input_stats`, one spatial position, or one running statistic without
            the other.
        RuntimeError: a shape or device does not fit, running statistics are missing without
            `use_input_stats` or require a gradient; the message names the argument.
        TypeError: use_input_stats is not a bool, or momentum or eps not a number.

    Nothing is updated where an error is raised.
    """
    if not is_plain(input, running_mean, running_var, weight, bias):
        return F.instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    parameters = {
        "running_mean": running_mean,
        "running_var": running_var,
        "weight": weight,
        "bias": bias,
    }
    check_bool("instance_norm", "use_input_stats", use_input_stats)
    check_channels("instance_norm", input, **parameters)
    check_running(
        "instance_norm", running_mean, running_var, "use_input_stats", given=not use_input_stats
    )
    momentum = check_momentum("instance_norm", momentum)
    eps = check_number("instance_norm", "eps", eps)
    if use_input_stats and prod(input.shape[2:]) == 1:
        raise ValueError(
            f"instance_norm: input of shape {list(input.shape)} has one spatial position, and "
            f"use_input_stats is True"
        )
    running = (running_mean, running_var)
    over = "group" if use_input_stats else "given"
    return _batch_or_instance_norm(F.instance_norm, input, running, weight, bias, over, momentum, eps)
