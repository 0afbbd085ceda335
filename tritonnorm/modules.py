"""torch.nn's normalization modules with `forward` on the kernels: same arguments, parameters,
initialization, `extra_repr` and state_dict."""

import torch

from . import functional

__all__ = ["LayerNorm", "RMSNorm"]


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm, computed by `tritonnorm.functional.layer_norm`.

    Input and output: `[*, *normalized_shape]`.
    """

    def forward(self, input):
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm, computed by `tritonnorm.functional.rms_norm`.

    Input and output: `[*, *normalized_shape]`.
    """

    def forward(self, x):
        return functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)
