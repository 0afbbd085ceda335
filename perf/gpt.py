"""A byte-level GPT with both kinds of row norm, LayerNorm before attention and MLP and RMSNorm on every
head's queries and keys, and what it learns: this repository's documents."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from .machine import ROOT

BYTES = 256  # tokens are bytes


@dataclass(frozen=True)
class Size:
    """A model and its training; the width divides by the heads."""

    layers: int
    width: int
    heads: int
    context: int
    batch: int
    steps: int
    learning_rate: float


class Attention(nn.Module):
    """Causal attention with RMSNorm on queries and keys: short rows, strided slices of `qkv`."""

    def __init__(self, size: Size):
        super().__init__()
        self.heads = size.heads
        self.qkv = nn.Linear(size.width, 3 * size.width, bias=False)
        self.q_norm = nn.RMSNorm(size.width // size.heads)
        self.k_norm = nn.RMSNorm(size.width // size.heads)
        self.out = nn.Linear(size.width, size.width, bias=False)

    def forward(self, x):  # [batch, context, width]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        heads = (t.transpose(1, 2) for t in (self.q_norm(q), self.k_norm(k), v))
        y = scaled_dot_product_attention(*heads, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block that normalizes before attention and before the MLP."""

    def __init__(self, size: Size):
        super().__init__()
        self.attention_norm = nn.LayerNorm(size.width)
        self.attention = Attention(size)
        self.mlp_norm = nn.LayerNorm(size.width)
        self.mlp = nn.Sequential(
            nn.Linear(size.width, 4 * size.width), nn.GELU(), nn.Linear(4 * size.width, size.width)
        )

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Logits `[batch, context, 256]` of the next bytes, from bytes `[batch, context]`."""

    def __init__(self, size: Size):
        super().__init__()
        self.token = nn.Embedding(BYTES, size.width)
        self.position = nn.Parameter(torch.randn(size.context, size.width))
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, BYTES, bias=False)

    def forward(self, tokens):
        return self.head(self.norm(self.blocks(self.token(tokens) + self.position)))


def corpus() -> torch.Tensor:
    """The bytes of this repository's documents, as int64."""
    files = [*sorted(ROOT.glob("*.md")), ROOT / "kernels" / "README.md", ROOT / "LICENSE"]
    return torch.tensor(list(b"".join(file.read_bytes() for file in files)))


def passages(
    text: torch.Tensor, size: Size, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of passages from anywhere in the text, and the byte that follows each byte."""
    starts = torch.randint(len(text) - size.context, (size.batch, 1), generator=generator)
    batch = text[starts + torch.arange(size.context + 1)]
    return batch[:, :-1], batch[:, 1:]
