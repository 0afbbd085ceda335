"""Step times of a transformer block of GPT-2's size and one of Llama's, as they are and converted, eager
and compiled, to CSV.

A block normalizes before attention and before its MLP. It is built once, with one set of random weights;
`tritonnorm.convert` replaces its norms in a copy. All four ways take turns, after what they compute was
compared with the block as it is, in float32.
"""

import argparse
import copy
import csv
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu

import tritonnorm as tn

from . import machine
from .shapes import DTYPES
from .timer import DeviceTimer, alternate

TOLERANCE = 2**-5
"""How far results may be from those in float32, as a part of the largest: 8 units of bfloat16's last
place, for a chain of six roundings or so. A norm that is wrong is off by all of it."""


@dataclass(frozen=True)
class Size:
    """A block and what it reads: `batch` sequences of `tokens` tokens."""

    width: int
    heads: int
    key_heads: int  # which several query heads share
    hidden: int  # of the MLP
    gated: bool
    norm: type[nn.Module]
    batch: int
    tokens: int


SIZES = {
    "gpt2": Size(768, 12, 12, 3072, False, nn.LayerNorm, batch=16, tokens=1024),
    "llama": Size(4096, 32, 8, 14336, True, nn.RMSNorm, batch=2, tokens=4096),
}
"""GPT-2's smallest model and Llama 3's of 8 billion parameters, without positions: they are added to
tokens, or rotate queries and keys, and have no norm."""

DIRECTIONS = ("forward", "forward + backward")
WAYS = ("torch", "tritonnorm", "torch, compiled", "tritonnorm, compiled")


class Attention(nn.Module):
    """Causal attention, in which several query heads may share a key."""

    def __init__(self, size: Size):
        super().__init__()
        a_head = size.width // size.heads
        self.sizes = [heads * a_head for heads in (size.heads, size.key_heads, size.key_heads)]
        self.a_head = a_head
        self.qkv = nn.Linear(size.width, sum(self.sizes), bias=False)
        self.out = nn.Linear(size.width, size.width, bias=False)

    def forward(self, x):  # [batch, tokens, width]
        parts = self.qkv(x).split(self.sizes, dim=-1)
        q, k, v = (t.unflatten(-1, (-1, self.a_head)).transpose(1, 2) for t in parts)
        y = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers with a GELU, or three with a SiLU that gates."""

    def __init__(self, size: Size):
        super().__init__()
        self.up = nn.Linear(size.width, size.hidden, bias=False)
        self.gate = nn.Linear(size.width, size.hidden, bias=False) if size.gated else None
        self.down = nn.Linear(size.hidden, size.width, bias=False)

    def forward(self, x):
        if self.gate is None:
            return self.down(nn.functional.gelu(self.up(x)))
        return self.down(silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, size: Size):
        super().__init__()
        self.attention_norm, self.attention = size.norm(size.width), Attention(size)
        self.mlp_norm, self.mlp = size.norm(size.width), MLP(size)

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


def make_calls(size: Size, direction: str, dtype: torch.dtype, device: str) -> dict[str, Callable]:
    """The pass of each of WAYS, a function without arguments that returns tensors. That of "float32",
    beside them, is the block as it is in that dtype."""
    torch.manual_seed(0)
    block = Block(size).to(device, dtype)
    x, dy = torch.randn(2, size.batch, size.tokens, size.width, device=device).to(dtype)
    converted = copy.deepcopy(block)
    report = tn.convert(converted)
    if len(report.replaced) != 2:
        raise RuntimeError(f"both norms of the block should be replaced: {report}")
    ways = block, converted, torch.compile(copy.deepcopy(block)), torch.compile(copy.deepcopy(converted))

    def call_of(module, x, dy):
        if direction == "forward":

            @torch.no_grad()
            def forward():
                return (module(x),)

            return forward
        leaves = [x.detach().requires_grad_(), *module.parameters()]
        return lambda: torch.autograd.grad(module(leaves[0]), leaves, dy)

    calls = {way: call_of(module, x, dy) for way, module in zip(WAYS, ways, strict=True)}
    return calls | {"float32": call_of(copy.deepcopy(block).float(), x.float(), dy.float())}


def difference(found, exact) -> float:
    """The largest difference of tensors, each as a part of its largest element."""
    pairs = zip(found, exact, strict=True)
    return max(((a.float() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def measure(name: str, direction: str, dtype: str, timer, device: str) -> list[dict[str, str]]:
    """A row of each way.

    Raises:
        RuntimeError: one does not compute what the block does.
    """
    size = SIZES[name]
    calls = make_calls(size, direction, DTYPES[dtype], device)
    exact = calls.pop("float32")()
    differences = {way: difference(call(), exact) for way, call in calls.items()}
    for way, found in differences.items():
        if not found <= TOLERANCE:
            raise RuntimeError(f"{name} {direction}, {way}: off by {found:.2e} of the largest element")
    timings = alternate({way: timer.prepare(call) for way, call in calls.items()})
    case = {"block": name, "direction": direction, "dtype": dtype}
    case["shape"] = f"{size.batch}x{size.tokens}x{size.width}"
    return [
        {
            **case,
            "way": way,
            **{figure: f"{value:.3f}" for figure, value in asdict(timings[way]).items()},
            "difference": f"{differences[way]:.2e}",
        }
        for way in WAYS
    ]


def line(row) -> str:
    low, high = float(row["p20_us"]), float(row["p80_us"])
    times = f"{float(row['median_us']):9.1f} us ({low:.1f} to {high:.1f})"
    return f"{row['block']:<6} {row['direction']:<18} {row['shape']:<13} {row['way']:<21} {times}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--blocks", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--out", type=Path, help="the CSV (default: perf/results/<device>/blocks.csv)")


def run(arguments) -> int:
    if reason := machine.refusal():
        print(f"blocks: {reason}", file=sys.stderr)
        return machine.NO_DEVICE_STATUS
    out = arguments.out or machine.results_folder() / "blocks.csv"
    about = {**machine.facts(), "command": f"python -m perf {shlex.join(sys.argv[1:])}"}
    about["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    timer, rows = DeviceTimer(), []
    for name in arguments.blocks:
        for direction in DIRECTIONS:
            rows += measure(name, direction, arguments.dtype, timer, "cuda")
            print("\n".join(map(line, rows[-len(WAYS) :])), flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *about])
        writer.writeheader()
        writer.writerows(row | about for row in rows)
    return 0
