"""Allocation, grids and calls of the kernels; the only importer of `tritonnorm.kernels`.

Inputs were checked by the callers. Statistics that a pass finds are float32 (of float64 input float64),
one of each for every set of elements that shares them, and lie in one flat tensor: see `statistics_of`.
"""

from .channels import (
    Running,
    channel_apply,
    channel_apply_backward,
    channel_backward,
    channel_forward,
)
from .common import joined_statistics, statistics_of, statistics_size
from .rows import kinds_of_statistics, row_backward, row_forward
from .weights import is_dense, weights_backward, weights_forward

__all__ = [
    "Running",
    "channel_apply",
    "channel_apply_backward",
    "channel_backward",
    "channel_forward",
    "is_dense",
    "joined_statistics",
    "kinds_of_statistics",
    "row_backward",
    "row_forward",
    "statistics_of",
    "statistics_size",
    "weights_backward",
    "weights_forward",
]
