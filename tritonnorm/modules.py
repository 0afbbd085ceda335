"""torch.nn's normalization modules on the kernels: same arguments, parameters, buffers, initialization,
checks, `extra_repr` and state_dict."""

import torch

from . import functional
from .dispatch import is_plain, takes_kernel

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
]


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm, computed by `tritonnorm.functional.layer_norm`.

    Input and output: `[*, *normalized_shape]`. Set `save` to "output" to keep that for the backward
    pass, in the place of the input, where it suffices.
    """

    save = "input"

    def forward(self, input):
        return functional.layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps, save=self.save
        )


class LayerNorm2d(torch.nn.LayerNorm):
    """Layer normalization over channels, computed by `tritonnorm.functional.layer_norm2d`; the
    arguments are those of timm's module of this name.

    Input and output: `[N, num_channels, H, W]`. Parameters: weight, bias `[num_channels]`.
    """

    def __init__(self, num_channels, eps=1e-6, affine=True, bias=True, device=None, dtype=None):
        super().__init__(num_channels, eps, affine, bias, device, dtype)

    def forward(self, input):
        return functional.layer_norm2d(input, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm, computed by `tritonnorm.functional.rms_norm`.

    Input and output: `[*, *normalized_shape]`. `save` is that of `LayerNorm`.
    """

    save = "input"

    def forward(self, x):
        return functional.rms_norm(x, self.normalized_shape, self.weight, self.eps, save=self.save)


class GroupNorm(torch.nn.GroupNorm):
    """torch.nn.GroupNorm, computed by `tritonnorm.functional.group_norm`.

    Input and output: `[N, num_channels, *spatial]`.
    """

    def forward(self, input):
        return functional.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def _traced(module, proxy):
    """A call of the module as one node of torch.fx's graph, which torch.nn's modules are as well."""
    return proxy.tracer.create_proxy("call_module", proxy.tracer.path_of_module(module), (proxy,), {})


class _BatchNorm:
    """`forward` of the batch normalizations."""

    def forward(self, input):
        if isinstance(input, torch.fx.Proxy):
            return _traced(self, input)
        self._check_input_dim(input)
        batches = self.num_batches_tracked if self.training and self.track_running_stats else None
        momentum = self.momentum
        if momentum is None:  # the cumulative average
            momentum = 0.0 if batches is None else self._reciprocal(batches + 1, input)
        tracked = not self.training or self.track_running_stats
        y = functional.batch_norm(
            input,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            momentum,
            self.eps,
        )
        if batches is not None:
            batches.add_(1)
        return y

    @staticmethod
    def _reciprocal(count, input):
        """Of a tensor of one number: on its device for a kernel, a float for PyTorch's operator. One on
        the meta device has none, and nothing depends on it: shapes alone are computed."""
        if count.is_meta:
            return 1.0
        if is_plain(input) and takes_kernel(input):
            return count.double().reciprocal()
        return 1.0 / float(count)


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """torch.nn.BatchNorm1d, computed by `tritonnorm.functional.batch_norm`.

    Input and output: `[N, C]` or `[N, C, L]`.
    """


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """torch.nn.BatchNorm2d, computed by `tritonnorm.functional.batch_norm`.

    Input and output: `[N, C, H, W]`.
    """


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """torch.nn.BatchNorm3d, computed by `tritonnorm.functional.batch_norm`.

    Input and output: `[N, C, D, H, W]`.
    """


class _InstanceNorm:
    """What the instance normalizations compute."""

    def forward(self, input):
        return _traced(self, input) if isinstance(input, torch.fx.Proxy) else super().forward(input)

    def _apply_instance_norm(self, input):
        return functional.instance_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            self.momentum if self.momentum is not None else 0.0,
            self.eps,
        )


class InstanceNorm1d(_InstanceNorm, torch.nn.InstanceNorm1d):
    """torch.nn.InstanceNorm1d, computed by `tritonnorm.functional.instance_norm`.

    Input and output: `[N, C, L]` or `[C, L]`.
    """


class InstanceNorm2d(_InstanceNorm, torch.nn.InstanceNorm2d):
    """torch.nn.InstanceNorm2d, computed by `tritonnorm.functional.instance_norm`.

    Input and output: `[N, C, H, W]` or `[C, H, W]`.
    """


class InstanceNorm3d(_InstanceNorm, torch.nn.InstanceNorm3d):
    """torch.nn.InstanceNorm3d, computed by `tritonnorm.functional.instance_norm`.

    Input and output: `[N, C, D, H, W]` or `[C, D, H, W]`.
    """
