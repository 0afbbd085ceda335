"""Norms as users of `register` write them."""

import torch
from torch import nn

import tritonnorm as tn


class Scale(nn.Module):
    """A norm of one's own, as its users write it."""

    def __init__(self, size=16, eps=1e-6, scale=2.0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.scale = eps, scale

    def forward(self, x):
        y = x.float() * (x.float().square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (y * self.weight.float() * self.scale).to(x.dtype)


def scaled_rms_norm(module, x):
    weight = module.weight.float() * module.scale
    return tn.functional.rms_norm(x, weight.shape, weight, module.eps)


class Noisy(nn.Module):
    """Leaves traces wherever a forward can."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.inner = nn.Dropout()
        self.calls, self.log, self.by_mode, self.plain = 0, [], {True: [], False: []}, torch.zeros(3)

    def forward(self, x):
        for counter in (self.count, self.steps, self.plain):
            counter += 1
        self.calls += 1
        self.log.append(1)
        self.by_mode[self.training].append(1)
        return self.inner(torch.rand_like(x)) * self.weight * x.sum()
