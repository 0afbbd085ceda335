"""Allocation, grids and calls of the kernels; the only importer of `tritonnorm.kernels`.

Inputs were checked by the callers. Statistics are flat, float32 (for float64 input, float64), one of
each for every set of elements that shares them.
"""

from .channels import (
    Running,
    channel_apply,
    channel_apply_backward,
    channel_backward,
    channel_forward,
)
from .rows import row_backward, row_forward
from .weights import is_dense, weights_backward, weights_forward

__all__ = [
    "Running",
    "channel_apply",
    "channel_apply_backward",
    "channel_backward",
    "channel_forward",
    "is_dense",
    "row_backward",
    "row_forward",
    "weights_backward",
    "weights_forward",
]
