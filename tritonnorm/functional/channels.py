"""Batch, group and instance normalization."""

import operator
from math import prod

import torch
import torch.nn.functional as F

from ..dispatch import (
    Running,
    check_bool,
    check_channels,
    check_momentum,
    check_number,
    check_running,
    fits,
    is_plain,
    normalize_channels,
    prepared,
    result_dtype,
    takes_kernel,
    with_torch,
    with_torch_running,
)
from ..formulas import channel_formula


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
    key = "group_norm", num_groups, type(num_groups), eps
    call = prepared(input, weight, bias, key)
    if call is not None:
        return call(input, weight, bias)
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
    if takes_kernel(input, weight, bias) and fits(size):
        dtype = result_dtype(input)
        return normalize_channels(input, weight, bias, groups, "group", eps, dtype, key=key)

    def formula(x, w, b, dtype):
        return channel_formula(x, w, b, groups, "group", eps, dtype)

    return with_torch(lambda x, w, b: F.group_norm(x, groups, w, b, eps), formula, input, weight, bias)


def _call_prepared(input, running, weight, bias, key):
    """The result of the prepared call of a batch or instance normalization; None if there is none."""
    mean, variance = running
    call = prepared(input, weight, bias, key, mean, variance)
    if call is None:
        return None
    return call(input, weight, bias) if mean is None else call(input, weight, bias, running)


def _check_statistics(name, flag, uses_input, input, running, weight, bias, momentum, eps):
    """What batch and instance normalization check alike; momentum and eps. `flag` is the argument
    `uses_input`, by which they take the statistics of the input."""
    mean, variance = running
    check_bool(name, flag, uses_input)
    check_channels(name, input, running_mean=mean, running_var=variance, weight=weight, bias=bias)
    check_running(name, mean, variance, flag, given=not uses_input)
    return check_momentum(name, momentum), check_number(name, "eps", eps)


def _batch_or_instance_norm(torch_norm, input, running, weight, bias, over, momentum, eps, key):
    """`torch_norm`, F.batch_norm or F.instance_norm, on the kernels where they can.

    Args:
        running: (mean, var), each `[C]` or None.
        over: what has statistics of its own: "batch" a channel, "group" a channel of one image;
            "given" means that those of `running` are taken.
    """
    uses_input = over != "given"
    size = prod(input.shape[2:]) * (input.shape[0] if over == "batch" else 1)
    images = input.shape[0] if over == "given" else 1  # a program may take many of them
    if takes_kernel(input, *running, weight, bias) and fits(size, images):
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
            key=key,
        )

    def with_options(*tensors):
        return torch_norm(*tensors, uses_input, float(momentum), eps)

    def formula(x, w, b, dtype):
        return channel_formula(x, w, b, x.shape[1], over, eps, dtype, None if uses_input else running)

    return with_torch_running(with_options, formula, input, running, weight, bias, updates=uses_input)


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
    running = (running_mean, running_var)
    key = "batch_norm", training, type(training), momentum, eps
    y = _call_prepared(input, running, weight, bias, key)
    if y is not None:
        return y
    if not is_plain(input, running_mean, running_var, weight, bias):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    momentum, eps = _check_statistics(
        "batch_norm", "training", training, input, running, weight, bias, momentum, eps
    )
    if eps < 0 or (training and eps == 0):
        raise ValueError(f"batch_norm: eps must be positive, or zero in evaluation, but is {eps}")
    if training and input.shape[0] * prod(input.shape[2:]) == 1:
        raise ValueError(
            f"batch_norm: input of shape {list(input.shape)} has one value per channel in training"
        )
    over = "batch" if training else "given"
    return _batch_or_instance_norm(F.batch_norm, input, running, weight, bias, over, momentum, eps, key)


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
    running = (running_mean, running_var)
    key = "instance_norm", use_input_stats, type(use_input_stats), momentum, eps
    y = _call_prepared(input, running, weight, bias, key)
    if y is not None:
        return y
    if not is_plain(input, running_mean, running_var, weight, bias):
        return F.instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    momentum, eps = _check_statistics(
        *("instance_norm", "use_input_stats", use_input_stats),
        *(input, running, weight, bias, momentum, eps),
    )
    if use_input_stats and prod(input.shape[2:]) == 1:
        raise ValueError(
            f"instance_norm: input of shape {list(input.shape)} has one spatial position, and "
            f"use_input_stats is True"
        )
    over = "group" if use_input_stats else "given"
    return _batch_or_instance_norm(
        F.instance_norm, input, running, weight, bias, over, momentum, eps, key
    )
