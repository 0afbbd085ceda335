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

from .channels import batch_norm, group_norm, instance_norm
from .rows import layer_norm, layer_norm2d, normalize, rms_norm, rms_norm_variant
from .weights import weight_norm, weight_norms

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
