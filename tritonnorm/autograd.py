"""The kernels as differentiable operators: one autograd function for rows."""

import torch

from . import launch


def row_formula(x, weight, bias, normalized_dims, eps, norm, dtype):
    """The row normalization in plain PyTorch, from the definition.

    The backward pass differentiates this when it is itself to be differentiated
    (`create_graph=True`), so that second derivatives are right. It is not fused.
    """
    dims = tuple(range(-normalized_dims, 0))
    x_hat = x.to(launch.compute_dtype(x))
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
        if torch.is_grad_enabled():  # create_graph=True
            y = row_formula(x, weight, bias, *ctx.options)
            inputs = (x, weight, bias)
            needed = [t for t, need in zip(inputs, ctx.needs_input_grad, strict=False) if need]
            found = iter(torch.autograd.grad(y, needed, dy, create_graph=True))
            gradients = [next(found) if need else None for need in ctx.needs_input_grad[:3]]
        else:
            normalized_dims, eps, norm, _ = ctx.options
            dx, dweight, dbias = launch.row_backward(
                dy,
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
