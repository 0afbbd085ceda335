"""The kernels as differentiable operators: one autograd function for rows."""

import torch

from . import launch
from .dtypes import compute_dtype


def row_formula(x, weight, bias, normalized_dims, eps, norm, dtype):
    """The row normalization in plain PyTorch, from the definition.

    `formula_gradients` differentiates this where a kernel's result would be cut off. It is not fused.
    """
    dims = tuple(range(-normalized_dims, 0))
    x_hat = x.to(compute_dtype(x))
    if norm == "l2":
        x_hat = x_hat / torch.linalg.vector_norm(x_hat, dim=dims, keepdim=True).clamp_min(eps)
    else:
        if norm == "layer":
            x_hat = x_hat - x_hat.mean(dims, keepdim=True)
        x_hat = x_hat * torch.rsqrt(x_hat.square().mean(dims, keepdim=True) + eps)
    if weight is not None:
        x_hat = x_hat * weight
    if bias is not None:
        x_hat = x_hat + bias
    return x_hat.to(dtype)


def formula_gradients(dy, inputs, needed, options):
    """The gradients of `row_formula`, which autograd can differentiate again, or batch.

    They are taken with respect to aliases: an input that was computed from another one (a weight
    from x, say) would otherwise contribute to that one's gradient, and hooks would run twice.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [t if t is None else t.view_as(t) for t in inputs]
        y = row_formula(*aliases, *options)
        wanted = [t for t, need in zip(aliases, needed, strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=create_graph))
    return [next(found) if need else None for need in needed]


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
    def forward(ctx, x, weight, bias, normalized_dims, eps, norm, dtype, memory_format):
        y, mean, spread = launch.row_forward(
            x,
            weight,
            bias,
            normalized_dims,
            eps,
            norm,
            dtype=dtype,
            memory_format=memory_format,
            save_statistics=True,
        )
        ctx.save_for_backward(x, weight, bias, mean, spread)
        ctx.options = normalized_dims, eps, norm, dtype
        ctx.memory_format = memory_format
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, mean, spread = ctx.saved_tensors
        needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or not _is_plain(dy):  # create_graph=True, or is_grads_batched
            needed = (needs_dx, needs_dweight, needs_dbias)
            gradients = formula_gradients(dy, (x, weight, bias), needed, ctx.options)
        else:
            normalized_dims, eps, norm, _ = ctx.options
            dx, dweight, dbias = launch.row_backward(
                dy.resolve_neg(),
                x,
                weight,
                mean,
                spread,
                normalized_dims,
                eps,
                norm,
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
        return (*gradients, None, None, None, None, None)


def normalize_rows(x, weight, bias, normalized_dims, eps, norm, dtype, memory_format):
    """Normalizes x over its last `normalized_dims` dimensions, with statistics for the backward
    pass where one can come."""
    weight = weight if weight is None else weight.contiguous()
    bias = bias if bias is None else bias.contiguous()
    tensors = (t for t in (x, weight, bias) if t is not None)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return RowNorm.apply(x, weight, bias, normalized_dims, eps, norm, dtype, memory_format)
    y, _, _ = launch.row_forward(
        x,
        weight,
        bias,
        normalized_dims,
        eps,
        norm,
        dtype=dtype,
        memory_format=memory_format,
        save_statistics=False,
    )
    return y
