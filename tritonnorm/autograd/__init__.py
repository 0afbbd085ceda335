"""The kernels as differentiable operators: an autograd function for rows, one for channels, and one for
the weights of layers.

What runs them is `launch`, at once, or `library.operators`, which whoever watches operators sees. The
latter return the statistics too, as the operators do.
"""

from .channels import normalize_channels
from .rows import normalize_rows
from .weights import normalize_weights

__all__ = ["normalize_channels", "normalize_rows", "normalize_weights"]
