"""A residual convolutional classifier whose norm is a parameter, and what it learns: colored gratings
of four directions, under noise."""

from collections.abc import Callable
from dataclasses import dataclass
from math import pi

import torch
from torch import nn
from torch.nn.functional import silu

COLORS = 3
DIRECTIONS = 4  # classes, 45 degrees apart
NOISE = 0.5  # standard deviation; a grating's amplitude is 0.5 to 1.5 in each color
SHORTEST, LONGEST = 3, 6  # pixels of a wave


@dataclass(frozen=True)
class Size:
    """A model and its training: a block a width, each of which halves the image's height and width."""

    widths: tuple[int, ...]
    pixels: int
    batch: int
    steps: int
    learning_rate: float


class Block(nn.Module):
    """A residual block of two convolutions, each with its norm; the first has stride 2."""

    def __init__(self, channels: int, width: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False)
        self.norm1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = norm(width)
        self.shortcut = nn.Conv2d(channels, width, 1, stride=2)

    def forward(self, x):
        y = silu(self.norm1(self.conv1(x)))
        return silu(self.shortcut(x) + self.norm2(self.conv2(y)))


class ConvNet(nn.Module):
    """Logits `[batch, DIRECTIONS]` of images `[batch, COLORS, pixels, pixels]`, with the norms that
    `norm(channels)` makes.

    The activation is smooth: at the kink of ReLU a rounding decides a gradient, and runs that began one
    rounding apart came to differ by 3e-3 nats, with SiLU by 3e-7.
    """

    def __init__(self, size: Size, norm: Callable[[int], nn.Module]):
        super().__init__()
        channels = (size.widths[0], *size.widths)
        self.conv = nn.Conv2d(COLORS, channels[0], 3, padding=1, bias=False)
        self.norm = norm(channels[0])
        blocks = (Block(c, width, norm) for c, width in zip(channels, size.widths, strict=False))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels[-1], DIRECTIONS)

    def forward(self, images):
        return self.head(self.blocks(silu(self.norm(self.conv(images)))).mean((2, 3)))


def gratings(size: Size, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of images, of any wavelength, phase and color, and the number of each one's direction."""
    directions = torch.randint(DIRECTIONS, (size.batch,), generator=generator)
    wavelength, phase = torch.rand(2, size.batch, 1, 1, generator=generator)
    color = 0.5 + torch.rand(size.batch, COLORS, 1, 1, generator=generator)
    angle = (directions * pi / DIRECTIONS)[:, None, None]
    position = torch.arange(size.pixels)
    along = angle.cos() * position + angle.sin() * position[:, None]  # [batch, pixels, pixels]
    waves = torch.sin(2 * pi * (along / (SHORTEST + (LONGEST - SHORTEST) * wavelength) + phase))
    images = color * waves[:, None]
    return images + NOISE * torch.randn(images.shape, generator=generator), directions
