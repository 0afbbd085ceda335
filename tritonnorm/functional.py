"""Normalizations with the names, arguments, defaults and errors of torch.nn.functional.

The kernels run on CUDA tensors, and on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1). Other
tensors take PyTorch's own operator: other devices, other dtypes than float16, bfloat16, float32 and
float64, tensor subclasses, tensors with a pending negation, and whatever runs under torch.jit.trace or
torch.fx. torch.func and forward-mode AD take a formula in plain PyTorch, which has derivatives of every
kind; so does weight normalization without a kernel. torch.compile and torch.export see registered
operators.

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
from torch.overrides import handle_torch_function, has_torch_function

from .dispatch import (
    Running,
    check_bool,
    check_channels,
    check_momentum,
    check_number,
    check_parameters,
    check_running,
    fits,
    is_plain,
    normalize_channels,
    normalize_rows,
    normalize_weights,
    result_dtype,
    takes_kernel,
    with_torch,
    with_torch_running,
)
from .dtypes import HALF, SUPPORTED, compute_dtype
from .formulas import RowOptions, channel_formula, row_formula, weight_formula

__all__ = [
    "batch_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "layer_norm2d",
    "normalize",
    "rms_norm",
    "rms_norm_variant",
    "weight_norm",
    "weight_norms",
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
    if input.shape[-len(shape) :] != shape:
        raise RuntimeError(
            f"{name}: normalized_shape={list(shape)} needs an input of shape "
            f"[*, {', '.join(map(str, shape))}], but input has shape {list(input.shape)}"
        )
    check_parameters(name, input, shape, **parameters)


def _check_save(name, save):
    """Whether the output is to be kept where that suffices."""
    if save not in ("input", "output"):
        raise ValueError(f'{name}: save must be "input" or "output", not {save!r}')
    return save == "output"


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, *, save="input"):
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
        save: what is kept for the backward pass: "input", or "output", which takes no memory of its own
            where the next layer keeps it too, as a linear one does. The output is kept only where x_hat
            comes back from it with the precision of its dtype: that is input's, |bias| <= |weight|,
            and weights are neither subnormal in it nor so large that it could overflow
            (`tritonnorm/saving.py`). This reads the parameters, on a GPU with a wait, once they have
            changed (as PyTorch counts changes: not those that are written through `.data`, after which
            a weight that became zero makes gradients NaN). Gradients are then those of the rounded
            output; there is no second derivative, and the output must not be changed in place. It has
            no effect where operators are watched, as by torch.compile, while a CUDA graph is captured,
            on parameters that are computed, nor on PyTorch's own operator.

    Returns:
        A contiguous tensor of the input's shape and dtype (under CUDA autocast float32).

    Raises:
        RuntimeError: a shape or device does not fit; the message names the argument.
        TypeError: normalized_shape is not a sequence, or eps not a number.
        ValueError: save is neither "input" nor "output".
    """
    save_output = _check_save("layer_norm", save)
    if not is_plain(input, weight, bias):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    _check_rows("layer_norm", input, normalized_shape, weight=weight, bias=bias)
    eps = check_number("layer_norm", "eps", eps)
    if takes_kernel(input, weight, bias) and fits(prod(normalized_shape)):
        return normalize_rows(
            input,
            weight,
            bias,
            len(normalized_shape),
            RowOptions("layer", eps),
            result_dtype(input),
            torch.contiguous_format,
            save_output,
        )

    def formula(x, w, b, dtype):
        return row_formula(x, w, b, len(normalized_shape), RowOptions("layer", eps), dtype)

    def with_layer_norm(x, w, b):
        return F.layer_norm(x, normalized_shape, w, b, eps)

    return with_torch(with_layer_norm, formula, input, weight, bias)


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
    if takes_kernel(input, weight, bias) and fits(input.shape[1]):
        y = normalize_rows(
            input.movedim(1, -1),
            weight,
            bias,
            1,
            RowOptions("layer", eps),
            result_dtype(input),
            torch.preserve_format,
        )
        return y.movedim(-1, 1)

    def formula(x, w, b, dtype):
        y = row_formula(x.movedim(1, -1), w, b, 1, RowOptions("layer", eps), dtype)
        return y.movedim(-1, 1)

    return with_torch(with_layer_norm, formula, input, weight, bias)


def rms_norm(input, normalized_shape, weight=None, eps=None, *, save="input"):
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
        save: "input" or "output", as for `layer_norm`.

    Returns:
        A contiguous tensor of the input's shape and dtype (under CUDA autocast float32). Hugging
        Face's LlamaRMSNorm rounds before it multiplies by the weight; this function rounds once, and
        `rms_norm_variant` as a model does.

    Raises:
        RuntimeError: a shape or device does not fit; the message names the argument.
        TypeError: normalized_shape is not a sequence, or eps not a number.
        ValueError: save is neither "input" nor "output".
    """
    save_output = _check_save("rms_norm", save)
    if not is_plain(input, weight):
        return F.rms_norm(input, normalized_shape, weight, eps)
    _check_rows("rms_norm", input, normalized_shape, weight=weight)
    eps = eps if eps is None else check_number("rms_norm", "eps", eps)
    if takes_kernel(input, weight) and fits(prod(normalized_shape)):
        if eps is None:
            eps = torch.finfo(compute_dtype(input)).eps
        return normalize_rows(
            input,
            weight,
            None,
            len(normalized_shape),
            RowOptions("rms", eps),
            result_dtype(input),
            torch.contiguous_format,
            save_output,
        )

    def formula(x, w, dtype):
        wide_eps = torch.finfo(compute_dtype(x)).eps if eps is None else eps
        return row_formula(x, w, None, len(normalized_shape), RowOptions("rms", wide_eps), dtype)

    return with_torch(lambda x, w: F.rms_norm(x, normalized_shape, w, eps), formula, input, weight)


def _check_dtypes(name, **dtypes):
    """That kernels take each of them."""
    for argument, dtype in dtypes.items():
        if dtype not in SUPPORTED:
            names = ", ".join(str(d).removeprefix("torch.") for d in SUPPORTED)
            raise TypeError(f"{name}: {argument} must be one of {names}, not {dtype}")


def rms_norm_variant(
    input,
    normalized_shape,
    weight=None,
    eps=1e-6,
    *,
    weight_offset=0.0,
    round_to=None,
    dtype=None,
    save="input",
):
    """RMS normalization that rounds, and offsets its weight, where a given model does.

        x_hat = x / sqrt(mean(x^2) + eps)
        y = x_hat * (weight_offset + weight)

    all in float32 (float64 for float64 input), but for the rounding of x_hat that `round_to` asks for.
    Of the models in Hugging Face transformers (src/transformers/models/*/modeling_*.py), from whose
    eager `forward` the formulas are taken:

    - LlamaRMSNorm, and most others (Mistral, Qwen2, Qwen3, DeepSeek): `round_to="input"`, and for dtype
      `torch.promote_types(input.dtype, weight.dtype)`;
    - GemmaRMSNorm (Gemma 1 to 3), and Qwen3-Next's: `weight_offset=1.0`;
    - T5LayerNorm (T5, mT5, LongT5, UMT5): `round_to="weight", dtype=weight.dtype`;
    - OLMo2's and GPT-OSS's: no options.

    Where x_hat is the same in float32 the result has their bits; the order of sums and 1 / sqrt can move
    x_hat by some float32 ulps, and with it, rarely, its rounding to the neighbour.

    Gradients are those of the formula without any rounding, in float32 (straight-through): dweight is
    sum(dy * x_hat), and dx what it is for `rms_norm` of the weight `weight_offset + weight`. (The
    classes' own gradients are rounded to 16 bits on the way.)

    Args:
        input: `[*, *normalized_shape]`, any strides, as for `layer_norm`.
        normalized_shape: tuple of ints.
        weight: of shape `normalized_shape`, or None.
        eps: added to the mean of squares.
        weight_offset: added to the weight. Each other number compiles kernels of its own.
        round_to: None, "input" or "weight": x_hat is rounded to its dtype, if that has 16 bits, before
            it is multiplied.
        dtype: the result's; None for the input's, under autocast too.
        save: "input" or "output", as for `layer_norm`.

    Returns:
        A tensor of the input's shape; contiguous where a kernel computes it. Where none does, and for
        float64 input that is to be rounded, it is a formula in plain PyTorch.

    Raises:
        ValueError: round_to or save is none of these, or round_to or weight_offset needs a weight that
            is None.
        RuntimeError: a shape or device does not fit; the message names the argument.
        TypeError: normalized_shape is not a sequence, eps or weight_offset not a number, or a dtype is
            not float16, bfloat16, float32 or float64.
    """
    if has_torch_function((input, weight)):
        return handle_torch_function(
            rms_norm_variant,
            (input, weight),
            input,
            normalized_shape,
            weight,
            eps,
            weight_offset=weight_offset,
            round_to=round_to,
            dtype=dtype,
            save=save,
        )
    name = "rms_norm_variant"
    save_output = _check_save(name, save)
    _check_rows(name, input, normalized_shape, weight=weight)
    eps = check_number(name, "eps", eps)
    weight_offset = check_number(name, "weight_offset", weight_offset)
    if round_to not in (None, "input", "weight"):
        raise ValueError(f'{name}: round_to must be None, "input" or "weight", not {round_to!r}')
    if weight is None and (round_to == "weight" or weight_offset != 0):
        argument = "weight_offset" if weight_offset != 0 else 'round_to="weight"'
        raise ValueError(f"{name}: {argument} needs a weight, but weight is None")
    dtype = input.dtype if dtype is None else dtype
    dtypes = {"input": input.dtype, "weight": input.dtype if weight is None else weight.dtype}
    _check_dtypes(name, **dtypes, dtype=dtype)

    rounded = dtypes[round_to] if round_to is not None else None
    rounded = rounded if rounded in HALF else None
    options = RowOptions("rms", eps, weight_offset, rounded)
    dims, wide = len(normalized_shape), compute_dtype(input)
    if (
        is_plain(input, weight)
        and takes_kernel(input, weight)
        and fits(prod(normalized_shape))
        and not (wide is torch.float64 and rounded)
    ):
        # A kernel of float32 takes no gradient in float64, and one of float64 none in less.
        stored = wide if torch.float64 in (wide, dtype) else dtype
        memory_format = torch.contiguous_format
        y = normalize_rows(input, weight, None, dims, options, stored, memory_format, save_output)
        return y.to(dtype)
    return row_formula(input, weight, None, dims, options, dtype)


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
        and fits(prod([input.shape[d] for d in dims]))
    ):
        last = tuple(range(-len(dims), 0))
        y = normalize_rows(
            input.movedim(dims, last),
            None,
            None,
            len(dims),
            RowOptions("l2", check_number("normalize", "eps", eps)),
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
    if takes_kernel(input, weight, bias) and fits(size):
        return normalize_channels(input, weight, bias, groups, "group", eps, result_dtype(input))

    def formula(x, w, b, dtype):
        return channel_formula(x, w, b, groups, "group", eps, dtype)

    return with_torch(lambda x, w, b: F.group_norm(x, groups, w, b, eps), formula, input, weight, bias)


def _batch_or_instance_norm(torch_norm, input, running, weight, bias, over, momentum, eps):
    """`torch_norm`, F.batch_norm or F.instance_norm, on the kernels where they can.

    Args:
        running: (mean, var), each `[C]` or None.
        over: what has statistics of its own: "batch" a channel, "group" a channel of one image;
            "given" means that those of `running` are taken.
    """
    uses_input = over != "given"
    size = prod(input.shape[2:]) * (input.shape[0] if over == "batch" else 1)
    if takes_kernel(input, *running, weight, bias) and fits(size):
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


def weight_norm(v, g, dim=0):
    """Weight normalization (Salimans and Kingma, arXiv:1602.07868).

        w = g * v / ||v||_2

    with one norm for each index of `dim`, over all other dimensions; of a tensor of one dimension that
    is each element's magnitude. None, and as in `torch._weight_norm` also -1, mean one norm of the whole
    tensor: -1 is not the last dimension. Other negative dims count from the end. A norm of zero gives
    NaN, as with PyTorch. Autocast changes nothing.

    Args:
        v: the direction, of any shape; dense tensors, whatever the order of their dimensions in memory
            (contiguous, channels_last), are read where they lie, others are copied.
        g: the magnitudes: of v's shape with 1 for every dimension but `dim`, or for None one element.
            Its dtype may be another one than v's.
        dim: int or None.

    Returns:
        A tensor of v's shape, dtype and, where v is dense, memory format. Norms are computed in
        float32, of float64 in float64.

    Raises:
        RuntimeError: the shape or device of g does not fit.
        IndexError: dim is out of range.
        TypeError: v or g is no tensor, or dim neither an int nor None.
    """
    return weight_norms_by_name("weight_norm", [v], [g], [dim], ["v"], ["g"])[0]


def weight_norms(vs, gs, dim=0):
    """`weight_norm` of many tensors at once, in one launch for all whose channels one program holds.

    With dim=0, the default of PyTorch, these are all channels up to 16,384 elements (in the backward
    pass 8,192; float64: 8,192 and 4,096). Others take two launches for every way in which they are cut.
    Tensors do not share launches if they differ in device, in the dtype of v or g, in whether channels
    and addresses are multiples of 16 bytes, or, in the backward pass, in which of v and g need
    gradients. Each result has the bits that `weight_norm` gives it.

    The results of one device share one node of the graph: backward is called once for all of them (or
    with `retain_graph=True`), and runs when the gradients of all that are used are there.

    Args:
        vs, gs: sequences of tensors, as in `weight_norm`.
        dim: int or None for all of them, or a sequence of such, one for each.

    Returns:
        A list of tensors.

    Raises:
        ValueError: vs, gs and dim differ in length.
        RuntimeError, IndexError, TypeError: as by `weight_norm`; the message names the tensor.
    """
    vs, gs = list(vs), list(gs)
    dims = list(dim) if isinstance(dim, (tuple, list)) else [dim] * len(vs)
    if not len(vs) == len(gs) == len(dims):
        raise ValueError(
            f"weight_norms: vs has {len(vs)} tensors, gs {len(gs)}, and dim {len(dims)} dimensions"
        )
    names = [[f"{which}[{i}]" for i in range(len(vs))] for which in ("vs", "gs")]
    return weight_norms_by_name("weight_norms", vs, gs, dims, *names)


def weight_norms_by_name(function, vs, gs, dims, v_names, g_names):
    """`weight_norms` for a function whose errors name the tensors in its own way."""
    checked = [
        _check_weight(function, *of_one) for of_one in zip(vs, gs, dims, v_names, g_names, strict=True)
    ]
    by_device = {}
    for i, (v, g, dim) in enumerate(zip(vs, gs, checked, strict=True)):
        sizes = (1, v.numel()) if dim is None else (v.shape[dim], v.numel() // max(v.shape[dim], 1))
        if is_plain(v, g) and takes_kernel(v, g) and v.numel() and fits(*sizes):
            by_device.setdefault(v.device, []).append(i)
    ws = [None] * len(vs)
    for numbers in by_device.values():
        of_device = ([t[i] for i in numbers] for t in (vs, gs, checked))
        for i, w in zip(numbers, normalize_weights(*of_device), strict=True):
            ws[i] = w
    return [
        _torch_weight_norm(v, g, dim) if w is None else w
        for w, v, g, dim in zip(ws, vs, gs, checked, strict=True)
    ]


def _check_weight(function, v, g, dim, v_name, g_name):
    """That g has a magnitude for every norm of v. Returns dim, not negative; None for one norm."""
    for name, tensor in ((v_name, v), (g_name, g)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{function}: {name} must be a tensor, not {type(tensor).__name__}")
    if dim is not None:
        try:
            dim = operator.index(dim)
        except TypeError:
            raise TypeError(f"{function}: dim must be an int or None, not {dim!r}") from None
    if dim is None or dim == -1:
        dim = None
        if g.numel() != 1:
            raise RuntimeError(f"{function}: {g_name} must have one element, not shape {list(g.shape)}")
    else:
        if not -v.dim() <= dim < v.dim():
            raise IndexError(
                f"{function}: dim={dim} is out of range for {v_name} of shape {list(v.shape)}"
            )
        dim %= v.dim()
        shape = [size if d == dim else 1 for d, size in enumerate(v.shape)]
        if list(g.shape) != shape:
            raise RuntimeError(f"{function}: {g_name} must have shape {shape}, not {list(g.shape)}")
    if v.device != g.device:
        raise RuntimeError(f"{function}: {g_name} is on {g.device}, but {v_name} is on {v.device}")
    return dim


def _torch_weight_norm(v, g, dim):
    """The formula. PyTorch's operator has no forward-mode AD, is a loop under vmap, and its second
    derivative takes the norms for constants; it serves dtypes that are not ours."""
    if {v.dtype, g.dtype} <= set(SUPPORTED):
        return weight_formula(v, g, dim)
    return torch._weight_norm(v, g, -1 if dim is None else dim)
