"""Layer, RMS and L2 normalization."""

from math import prod

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function

from ..dispatch import (
    check_channels,
    check_number,
    check_parameters,
    fits,
    is_plain,
    normalize_rows,
    prepared,
    result_dtype,
    takes_kernel,
    with_torch,
)
from ..dtypes import HALF, SUPPORTED, compute_dtype
from ..formulas import RowOptions, row_formula
from ..watch import EAGER


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
            (`tritonnorm/saving.py`); and only of rows that are multiples of 16 bytes or have at most
            4,096 elements. This reads the parameters, on a GPU with a wait, once they have
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
    if save == "input":
        call = prepared(input, weight, bias, ("layer_norm", normalized_shape, eps))
        if call is not None:
            return call(input, weight, bias)
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
            key=("layer_norm", normalized_shape, eps),
            save_output=save_output,
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

    if type(input) in EAGER and input.dim() == 4:
        rows = input.movedim(1, -1)
        call = prepared(rows, weight, bias, ("layer_norm2d", eps))
        if call is not None:
            return call(rows, weight, bias).movedim(-1, 1)
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
            key=("layer_norm2d", eps),
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
    if save == "input":
        call = prepared(input, weight, None, ("rms_norm", normalized_shape, eps))
        if call is not None:
            return call(input, weight, None)
    save_output = _check_save("rms_norm", save)
    if not is_plain(input, weight):
        return F.rms_norm(input, normalized_shape, weight, eps)
    _check_rows("rms_norm", input, normalized_shape, weight=weight)
    eps = eps if eps is None else check_number("rms_norm", "eps", eps)
    if takes_kernel(input, weight) and fits(prod(normalized_shape)):
        key = "rms_norm", normalized_shape, eps
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
            key=key,
            save_output=save_output,
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
    variant = name, normalized_shape, eps, weight_offset, round_to, dtype
    if save == "input":
        call = prepared(input, weight, None, variant)
        if call is not None:
            return call(input, weight, None)
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
        y = normalize_rows(
            input,
            weight,
            None,
            dims,
            options,
            stored,
            torch.contiguous_format,
            key=variant if stored is dtype else None,
            save_output=save_output,
        )
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
    if out is None:
        call = prepared(input, None, None, ("normalize", p, dim, type(dim), eps))
        if call is not None:
            return call(input, None, None)
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
        are_last = dims in (last, (input.dim() - 1,))
        y = normalize_rows(
            input if are_last else input.movedim(dims, last),
            None,
            None,
            len(dims),
            RowOptions("l2", check_number("normalize", "eps", eps)),
            result_dtype(input),
            torch.preserve_format,
            key=("normalize", p, dim, type(dim), eps) if are_last else None,
        )
        return y if are_last else y.movedim(last, dims)
    return F.normalize(input, p, dim, eps, out)
