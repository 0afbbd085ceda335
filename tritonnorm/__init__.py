"""Normalization layers for PyTorch in handwritten Triton kernels."""

from . import functional
from ._version import __version__
from .convert import convert
from .modules import LayerNorm, RMSNorm

__all__ = ["LayerNorm", "RMSNorm", "__version__", "convert", "functional"]
