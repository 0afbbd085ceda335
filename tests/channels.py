"""The channel normalizations under test: ours, PyTorch's and the reference, behind one signature; and
their shapes, each with its reason."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import pytest
import reference
import torch
import torch.nn.functional as F

import tritonnorm.functional as tF
from tritonnorm.heuristics import channels as channel_choices

EPS = 1e-5
FORMATS = ("contiguous", "channels_last")
NAMES = ("dx", "dweight", "dbias")
X = torch.ones(2, 4, 3)


def in_format(x, memory_format):
    """x `[N, C, *spatial]` with the given dimension adjacent in memory: the last, or the channels."""
    if memory_format == "contiguous" or x.dim() == 2:
        return x.contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


@dataclass(frozen=True)
class Operator:
    """`ours` and `theirs` take (x, weight, bias, groups), of which BatchNorm ignores the groups.
    `over_batch` tells whether images share statistics."""

    name: str
    ours: Callable
    theirs: Callable
    over_batch: bool

    def __str__(self):
        return self.name

    def sets(self, x, groups):
        """x as `[images, groups, a, b]` and the dimensions that share statistics; of a batch, a is
        its channels' one."""
        groups = x.shape[1] if groups is None else groups
        grouped = x.reshape(x.shape[0], groups, x.shape[1] // groups, prod(x.shape[2:]))
        return grouped, ((0, 2, 3) if self.over_batch else (2, 3))

    def exact(self, x, weight, bias, groups):
        """The float64 result, from the definition."""
        grouped, dims = self.sets(x, groups)
        y = reference.normalize(grouped, dims, eps=EPS).reshape(x.shape)
        along = (-1, *[1] * (x.dim() - 2))
        y = y if weight is None else y * weight.double().view(along)
        return y if bias is None else y + bias.double().view(along)

    def set_size(self, x, groups):
        """Elements that share statistics."""
        grouped, dims = self.sets(x, groups)
        return prod(grouped.shape[d] for d in dims)

    def per_element(self, x, groups, statistic):
        """A statistic of each set, a function of (tensor, dims), at every element of x."""
        grouped, dims = self.sets(x, groups)
        return statistic(grouped, dims).expand(grouped.shape).reshape(x.shape)


BATCH_NORM = Operator(
    "batch_norm",
    lambda x, w, b, groups=None: tF.batch_norm(x, None, None, w, b, True, 0.1, EPS),
    lambda x, w, b, groups=None: F.batch_norm(x, None, None, w, b, True, 0.1, EPS),
    over_batch=True,
)
GROUP_NORM = Operator(
    "group_norm",
    lambda x, w, b, groups: tF.group_norm(x, groups, w, b, EPS),
    lambda x, w, b, groups: F.group_norm(x, groups, w, b, EPS),
    over_batch=False,
)
INSTANCE_NORM = Operator(
    "instance_norm",
    lambda x, w, b, groups=None: tF.instance_norm(x, None, None, w, b, True, 0.1, EPS),
    lambda x, w, b, groups=None: F.instance_norm(x, None, None, w, b, True, 0.1, EPS),
    over_batch=False,
)


@dataclass(frozen=True)
class Shape:
    operator: Operator
    shape: tuple[int, ...]
    groups: int | None
    reason: str
    every_dtype: bool = False

    def __str__(self):
        groups = f":{self.groups}" if self.groups else ""
        return f"{self.operator}-{'x'.join(map(str, self.shape))}{groups}"


SHAPES = (
    Shape(GROUP_NORM, (2, 6, 4, 5), 3, "several groups of several channels"),
    Shape(GROUP_NORM, (1, 320, 4, 4), 32, "320 channels in 32 groups: ten a group"),
    Shape(
        GROUP_NORM,
        (2, 48, 8, 8),
        4,
        "several groups a tile of channels_last, twelve channels each",
        True,
    ),
    Shape(GROUP_NORM, (3, 6, 7), 6, "groups of one channel, odd, one spatial dimension"),
    Shape(GROUP_NORM, (2, 6, 5, 3), 1, "one group of all channels"),
    Shape(GROUP_NORM, (5, 12), 4, "nothing spatial"),
    Shape(GROUP_NORM, (3, 8, 1, 1), 2, "one position"),
    Shape(GROUP_NORM, (1, 4, 1, 1, 1), 2, "one point of a volume"),
    Shape(GROUP_NORM, (2, 4, 3, 5, 7), 2, "a volume"),
    Shape(GROUP_NORM, (2, 12, 14, 14), 3, "several tiles side by side, of groups of four channels"),
    Shape(GROUP_NORM, (2, 15, 7, 7), 3, "three groups a tile, of five channels each, odd"),
    Shape(GROUP_NORM, (1, 10, 64, 64), 2, "in pieces, masks of channels"),
    Shape(GROUP_NORM, (1, 2, 130, 131), 1, "in pieces, odd"),
    Shape(
        GROUP_NORM,
        (1, 96, 14, 14),
        1,
        "in pieces, more channels in a group than a fold's tile has",
        True,
    ),
    Shape(INSTANCE_NORM, (2, 6, 4, 5), None, "many channels a tile"),
    Shape(INSTANCE_NORM, (2, 40, 9, 9), None, "odd"),
    Shape(INSTANCE_NORM, (3, 20, 7, 7), None, "odd, several tiles side by side in every dtype", True),
    Shape(INSTANCE_NORM, (2, 3, 17), None, "one spatial dimension"),
    Shape(INSTANCE_NORM, (1, 2, 3, 4, 5), None, "a volume"),
    Shape(INSTANCE_NORM, (1, 2, 135, 130), None, "in pieces: more than any resident set"),
    Shape(INSTANCE_NORM, (1, 33, 24, 25), None, "in pieces of channels_last, resident otherwise", True),
    Shape(BATCH_NORM, (7, 6), None, "nothing spatial: resident", True),
    Shape(BATCH_NORM, (5, 6, 3), None, "short images"),
    Shape(BATCH_NORM, (2, 6, 4, 5), None, "resident in channels_last, in pieces otherwise"),
    Shape(BATCH_NORM, (2, 70, 7, 7), None, "odd images, more channels than a tile", True),
    Shape(
        BATCH_NORM, (12, 3, 30, 30), None, "several pieces of several images, the last one with fewer"
    ),
    Shape(BATCH_NORM, (2, 3, 90, 100), None, "several pieces an image"),
    Shape(BATCH_NORM, (2, 3, 3, 4, 5), None, "volumes"),
    Shape(BATCH_NORM, (17, 72, 3, 3), None, "columns, in contiguous", True),
    Shape(BATCH_NORM, (17, 16, 7, 7), None, "columns, more than a tile has for a channel"),
    Shape(BATCH_NORM, (260, 8, 3, 3), None, "columns, several pieces of them"),
    Shape(BATCH_NORM, (1, 5, 9, 9), None, "one image"),
    Shape(BATCH_NORM, (600, 2), None, "long columns"),
)

TYPICAL = tuple(s for s in SHAPES if s.every_dtype)
COMPARED = tuple(s for s in TYPICAL if s.shape[1] > 16)
"""Enough channels that the size of an error is not chance."""

every_shape = pytest.mark.parametrize("case", SHAPES, ids=str)
every_format = pytest.mark.parametrize("memory_format", FORMATS)
every_operator = pytest.mark.parametrize("operator", [BATCH_NORM, GROUP_NORM, INSTANCE_NORM], ids=str)


def inputs(case, memory_format, dtype, device, parameters=None):
    """x, weight, bias and dy of a case, normally distributed."""
    x, dy = (
        in_format(torch.randn(case.shape, device=device).to(dtype), memory_format) for _ in range(2)
    )
    weight, bias = (torch.randn(case.shape[1], device=device).to(parameters or dtype) for _ in range(2))
    return x, weight, bias, dy


def run(operator, x, weight, bias, dy, groups=None):
    """Our y and the gradients of x, weight and bias (None for what is None)."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    y = operator.ours(*leaves, groups)
    found = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dy))
    return y.detach(), [None if t is None else next(found) for t in leaves]


def make_small(monkeypatch):
    """Makes tiles small, and the sets that a program holds: small tensors are then cut into several
    pieces of several steps."""
    for limits in (
        channel_choices.GROUP_FORWARD_RESIDENT,
        channel_choices.GROUP_BACKWARD_RESIDENT,
        channel_choices.GROUP_BACKWARD_RESIDENT_NARROW,
    ):
        for itemsize in limits:
            monkeypatch.setitem(limits, itemsize, 64)
    for elements in (
        channel_choices.CHANNEL_FORWARD_ELEMENTS,
        channel_choices.CHANNEL_BACKWARD_ELEMENTS,
    ):
        for itemsize in elements:
            monkeypatch.setitem(elements, itemsize, 1)
    monkeypatch.setattr(channel_choices, "PIECE_ELEMENTS", 192)


def statistics(channels=4, **options):
    """A running mean and variance."""
    return torch.linspace(-1, 1, channels, **options), torch.linspace(0.5, 2, channels, **options)


def train(f, *running, x=X, **options):
    return f.batch_norm(x, *running, training=True, **options)
