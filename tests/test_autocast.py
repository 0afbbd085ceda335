"""Autocast, as PyTorch does it, operator by operator: the dtypes of its functions are the reference."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

import tritonnorm as tn
import tritonnorm.functional as tF

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
HALVES = (F16, BF16)


def layer_norm2d(x, weight=None, bias=None, eps=1e-6):
    """As timm and torchvision write it."""
    return F.layer_norm(x.movedim(1, -1), x.shape[1:2], weight, bias, eps).movedim(-1, 1)


# (ours, PyTorch's) of x `[2, 4, 3, 4]` and parameters `[4]`
CALLS = {
    "layer_norm": [lambda x, w, b, f=f: f.layer_norm(x, (4,), w, b) for f in (tF, F)],
    "rms_norm": [lambda x, w, b, f=f: f.rms_norm(x, (4,), w, 1e-5) for f in (tF, F)],
    "rms_norm_variant": [
        lambda x, w, b: tF.rms_norm_variant(x, (4,), w, 1e-5),
        lambda x, w, b: F.rms_norm(x, (4,), w, 1e-5).to(x.dtype),
    ],
    "normalize": [lambda x, w, b, f=f: f.normalize(x) for f in (tF, F)],
    "layer_norm2d": [tF.layer_norm2d, layer_norm2d],
    "group_norm": [lambda x, w, b, f=f: f.group_norm(x, 2, w, b) for f in (tF, F)],
    "batch_norm": [lambda x, w, b, f=f: f.batch_norm(x, None, None, w, b, True) for f in (tF, F)],
    "instance_norm": [lambda x, w, b, f=f: f.instance_norm(x, None, None, w, b) for f in (tF, F)],
    "weight_norm": [
        lambda x, w, b: tF.weight_norm(x, x.new_full((2, 1, 1, 1), 2.0)),
        lambda x, w, b: torch._weight_norm(x, x.new_full((2, 1, 1, 1), 2.0), 0),
    ],
    "weight_norms": [
        lambda x, w, b: tF.weight_norms([x, x], [x.new_full((2, 1, 1, 1), 2.0)] * 2)[1],
        lambda x, w, b: torch._weight_norm(x, x.new_full((2, 1, 1, 1), 2.0), 0),
    ],
}
every_call = pytest.mark.parametrize("name", CALLS)


def inputs(dtype, parameters, device):
    """x, weight and bias; None for parameters that are absent."""
    x = torch.randn(2, 4, 3, 4, device=device).to(dtype)
    if parameters is None:
        return x, None, None
    return x, *(torch.randn(4, device=device).to(parameters) for _ in range(2))


MIXES = [(d, p) for d in (F16, BF16, F32, F64) for p in (None, d, F32) if (d, p) != (F64, F32)]


def same(name, dtype, parameters, device, close=True):
    """Our result has PyTorch's dtype; and its values, to the ulp of 16 bits."""
    ours, theirs = CALLS[name]
    tensors = inputs(dtype, parameters, device)
    y, expected = ours(*tensors), theirs(*tensors)
    assert y.dtype == expected.dtype, f"{dtype} with parameters of {parameters}: {y.dtype}"
    if close:
        coarse = 1.6e-2 if BF16 in (dtype, y.dtype) else 2e-3 if F16 in (dtype, y.dtype) else 1e-5
        torch.testing.assert_close(y, expected, rtol=coarse, atol=coarse)


@pytest.mark.parametrize(("dtype", "enabled"), [(F16, True), (BF16, True), (BF16, False)])
@every_call
def test_on_the_cpu(name, dtype, enabled):
    """It leaves normalizations in the input's dtype: of what it casts to 16 bits, 16 bits."""
    with torch.autocast("cpu", dtype, enabled=enabled):
        for mix in MIXES:
            same(name, *mix, "cpu")


@pytest.fixture
def pretended(monkeypatch):
    """torch.autocast("cuda"), which without a GPU disables itself; with fake tensors."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    with FakeTensorMode():
        yield


NOT_FAKE = ("weight_norm", "weight_norms")  # PyTorch's operator asks the fake device


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@every_call
def test_on_a_pretended_gpu(name, dtype, pretended):
    """float32 for 16-bit input, where PyTorch's lists have the operator."""
    with torch.autocast("cuda", dtype):
        assert torch.is_autocast_enabled("cuda")
        for mix in MIXES:
            if name not in NOT_FAKE:
                same(name, *mix, "cuda", close=False)
            else:
                assert CALLS[name][0](*inputs(*mix, "cuda")).dtype == mix[0]


@every_call
def test_nested_contexts(name, pretended):
    """The innermost decides, and the outer one is back after it."""
    x, w, b = inputs(BF16, F32, "cuda")
    ours, _ = CALLS[name]
    outside = ours(x, w, b).dtype
    with torch.autocast("cuda", F16):
        within = ours(x, w, b).dtype
        with torch.autocast("cuda", enabled=False):
            assert ours(x, w, b).dtype == outside == BF16
            with torch.autocast("cuda", BF16):
                assert ours(x, w, b).dtype == within
        with torch.autocast("cpu", BF16):
            assert ours(x, w, b).dtype == within
        assert ours(x, w, b).dtype == within
    assert ours(x, w, b).dtype == outside


@pytest.mark.parametrize("context", ["around", "inside"])
@every_call
def test_compiled_for_a_pretended_gpu(name, context, pretended):
    """Autocast is a part of what is compiled, or of where it is called."""
    x, w, b = inputs(BF16, F32, "cuda")
    ours, _ = CALLS[name]

    def function(x, w, b):
        with torch.autocast("cuda", BF16) if context == "inside" else nullcontext():
            return ours(x, w, b)

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    with torch.autocast("cuda", BF16) if context == "around" else nullcontext():
        expected = function(x, w, b).dtype
        assert compiled(x, w, b).dtype == expected
    if context == "around":
        assert compiled(x, w, b).dtype == BF16  # compiled again


def network(dtype=F32):
    """Every module that rows and channels have, among layers that autocast runs in 16 bits."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.BatchNorm2d(8),
        nn.GELU(),
        nn.Conv2d(8, 8, 1),
        nn.GroupNorm(2, 8),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 4, 1)),
        nn.InstanceNorm2d(4, affine=True),
        nn.Flatten(1),
        nn.LayerNorm(24),
        nn.Linear(24, 8),
        nn.RMSNorm(8),
        nn.Linear(8, 5),
    ).to(dtype)


def train(model, dtype, device, compiled=False, steps=3):
    """Losses, and the scale, with an overflow in the second step, which the scaler must notice."""
    torch.manual_seed(1)
    x, target = torch.randn(2, 3, 2, 3, device=device), torch.randint(5, (2,), device=device)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**4, growth_interval=100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def forward(x):
        with torch.autocast(device, dtype):
            return F.cross_entropy(model(x), target)

    function = torch.compile(forward, backend="aot_eager", fullgraph=True) if compiled else forward
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = function(x)
        scaler.scale(loss * (float("inf") if step == 1 else 1)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    return torch.stack(losses), scaler.get_scale(), [p.grad.dtype for p in model.parameters()]


@pytest.mark.parametrize(("dtype", "compiled"), [(F16, False), (BF16, True)])
def test_grad_scaler(dtype, compiled, device):
    """A model trains as PyTorch's does, with the step left out that overflows."""
    theirs = network().to(device)
    ours = copy.deepcopy(theirs)
    assert len(tn.convert(ours).replaced) == 6
    torch._dynamo.reset()
    losses, scale, dtypes = train(ours, dtype, device, compiled)
    expected, expected_scale, expected_dtypes = train(theirs, dtype, device)
    coarse = 5e-2 if dtype == BF16 else 1e-2
    torch.testing.assert_close(losses, expected, rtol=coarse, atol=coarse)
    assert losses[0] != losses[1] == losses[2]
    assert scale == expected_scale == 2.0**3
    assert dtypes == expected_dtypes


@pytest.mark.gpu
@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@every_call
def test_on_a_gpu(name, dtype, enabled):
    with torch.autocast("cuda", dtype, enabled=enabled):
        for mix in MIXES:
            if enabled or mix[1] in (None, mix[0]):
                same(name, *mix, "cuda")
