"""Normalization layers for PyTorch in handwritten Triton kernels."""

from . import families, functional
from ._version import __version__
from .convert import convert, restore
from .modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    LayerNorm2d,
    RMSNorm,
)
from .parametrizations import cached_weight_norms, weight_norm
from .registry import register

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LayerNorm2d",
    "RMSNorm",
    "__version__",
    "cached_weight_norms",
    "convert",
    "families",
    "functional",
    "register",
    "restore",
    "weight_norm",
]
