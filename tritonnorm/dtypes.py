"""Which dtypes the kernels take, and what they compute in."""

import torch

HALF = (torch.float16, torch.bfloat16)
SUPPORTED = (*HALF, torch.float32, torch.float64)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of arithmetic, statistics and partial gradients: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
