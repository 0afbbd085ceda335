"""Steps that are under way at once: what is on its way to shared memory changes no bit. The interpreter
runs one step after another, and copies nothing."""

import pytest
import torch
from channels import BATCH_NORM, FORMATS, GROUP_NORM, in_format, make_small
from channels import run as run_channels
from conftest import INTERPRETED
from operators import LAYER_NORM, RMS_NORM
from operators import run as run_rows

import tritonnorm.functional as tF
from perf.launches import observe
from tritonnorm.heuristics import channels, common, rows
from tritonnorm.launch.common import forget_plans

pytestmark = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device, or the emulator of one")


def bits_by_stages(monkeypatch, module, name, call):
    """What `call` returns with 1, 2 and 4 steps under way, each of which some kernel has."""
    found = []
    for stages in (1, 2, 4):
        monkeypatch.setattr(module, name, stages)
        forget_plans()
        seen = set()

        def watch(kernel, grid, arguments, seen=seen):
            seen.add(arguments.get("STAGES"))
            kernel[grid](**arguments)

        with observe(watch):
            found.append(call())
        assert stages in seen
    forget_plans()
    return found


def assert_the_same(found):
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("operator", [BATCH_NORM, GROUP_NORM], ids=str)
def test_channels_in_pieces(operator, memory_format, dtype, device, monkeypatch):
    """Of several steps and images, with part of a tile at the end of each."""
    make_small(monkeypatch)
    monkeypatch.setattr(channels, "PIECE_ELEMENTS", 1024)
    x, dy = (in_format(torch.randn(3, 8, 19, 24), memory_format).to(device, dtype) for _ in range(2))
    weight, bias = torch.randn(2, 8).to(device)
    groups = 2 if operator is GROUP_NORM else None

    def call():
        y, gradients = run_channels(operator, x, weight, bias, dy, groups)
        return [y, *gradients]

    assert_the_same(bits_by_stages(monkeypatch, channels, "PIECE_STAGES", call))


@pytest.mark.parametrize(("shape", "dim"), [((4, 40000), 0), ((600, 64), 1)])
def test_weights_in_pieces(shape, dim, device, monkeypatch):
    monkeypatch.setattr(channels, "PIECE_ELEMENTS", 2**14)
    v = torch.randn(shape, device=device)
    leaves = [v.requires_grad_(), torch.randn_like(v.narrow(1 - dim, 0, 1)).requires_grad_()]

    def call():
        y = tF.weight_norm(*leaves, dim)
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    assert_the_same(bits_by_stages(monkeypatch, channels, "PIECE_STAGES", call))


@pytest.mark.parametrize("operator", [LAYER_NORM, RMS_NORM], ids=str)
@pytest.mark.parametrize(
    ("n", "dtype"),
    [
        (256, torch.bfloat16),
        (1000, torch.float16),
        (4096, torch.float32),
        (2560, torch.bfloat16),  # in three tiles
        (2560, torch.float32),  # in five
    ],
)
def test_rows(operator, n, dtype, device, monkeypatch):
    """More of them than are under way, fewer, and none."""
    monkeypatch.setattr(common, "SMALL_PARTIALS", 2)
    weight = torch.randn(n).to(device, dtype)
    bias = torch.randn_like(weight) if operator is LAYER_NORM else None
    for m in (1, 19):
        x, dy = (torch.randn(m, n).to(device, dtype) for _ in range(2))

        def call(x=x, dy=dy):
            y, gradients = run_rows(operator, x, weight, bias, dy)
            return [y, *(gradient for gradient in gradients if gradient is not None)]

        assert_the_same(bits_by_stages(monkeypatch, rows, "BACKWARD_STAGES", call))
