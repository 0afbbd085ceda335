"""The public functions: errors, and what takes PyTorch's own operator."""

import inspect
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import tritonnorm as tn
import tritonnorm.functional as tF

OWN = {"layer_norm2d", "rms_norm_variant", "weight_norm", "weight_norms"}
"""Functions that torch.nn.functional does not have."""


@pytest.mark.parametrize("name", sorted(set(tF.__all__) - OWN))
def test_signatures_are_those_of_torch(name):
    """But for what has to be named."""
    ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (tF, F))
    ours = {n: p for n, p in ours.items() if p.kind is not p.KEYWORD_ONLY}
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]


X = torch.ones(2, 3, 8)
MISTAKES = {
    "an int for the shape": (lambda f: f(X, 8), TypeError, "normalized_shape"),
    "no dimension": (lambda f: f(X, ()), RuntimeError, "normalized_shape"),
    "another shape": (lambda f: f(X, (7,)), RuntimeError, "normalized_shape"),
    "too many dimensions": (lambda f: f(X, (4, 2, 3, 8)), RuntimeError, "normalized_shape"),
    "weight of another shape": (lambda f: f(X, (8,), torch.ones(7)), RuntimeError, "weight"),
    "weight with a dimension more": (lambda f: f(X, (8,), torch.ones(1, 8)), RuntimeError, "weight"),
    "no eps": (lambda f: f(X, (8,), eps="small"), TypeError, "eps"),
    "weight elsewhere": (lambda f: f(X, (8,), torch.ones(8, device="meta")), RuntimeError, "weight"),
}


@pytest.mark.parametrize("function", [tF.layer_norm, tF.rms_norm])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_errors_name_the_argument(function, mistake, no_kernel):
    """And are raised where PyTorch raises one."""
    call, error, named = MISTAKES[mistake]
    with pytest.raises(error, match=named):
        call(function)
    with pytest.raises(
        (error, ValueError)
    ):  # which torch 2.13's rms_norm raises for too many dimensions
        call(getattr(F, function.__name__))


def test_layer_norm_wants_an_eps(no_kernel):
    with pytest.raises(TypeError, match="eps"):
        tF.layer_norm(X, (8,), eps=None)


def test_bias_errors(no_kernel):
    with pytest.raises(RuntimeError, match="bias"):
        tF.layer_norm(X, (8,), None, torch.ones(7))
    with pytest.raises(RuntimeError, match="bias"):
        tF.layer_norm(X, (8,), None, torch.ones(8, device="meta"))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool], ids=str)
def test_dtypes_that_no_normalization_has(dtype, no_kernel):
    """PyTorch's operator is asked, and refuses."""
    x = torch.ones(2, 8).to(dtype)
    for call in (lambda: tF.layer_norm(x, (8,)), lambda: tF.rms_norm(x, (8,)), lambda: tF.normalize(x)):
        with pytest.raises((RuntimeError, NotImplementedError)):
            call()


def test_normalize_leaves_the_rest_to_torch(no_kernel, device):
    x = torch.randn(3, 4, device=device)
    torch.testing.assert_close(tF.normalize(x, p=1), F.normalize(x, p=1))
    torch.testing.assert_close(tF.normalize(x[0, 0], dim=0), F.normalize(x[0, 0], dim=0))
    out = torch.zeros_like(x)
    assert tF.normalize(x, out=out) is out
    assert torch.equal(out, F.normalize(x))
    for dim in (2, (0, -3), (0, 0), (1, -1)):
        with pytest.raises((IndexError, RuntimeError), match=r"[dD]im"):
            tF.normalize(x, dim=dim)


def test_complex_rms_norm_is_left_to_torch(no_kernel, device):
    x = torch.randn(3, 4, dtype=torch.complex64, device=device)
    torch.testing.assert_close(tF.normalize(x), F.normalize(x))


def test_transforms_take_torch(no_kernel, device):
    x = torch.randn(3, 8, device=device)
    torch.testing.assert_close(torch.vmap(lambda r: tF.layer_norm(r, (8,)))(x), F.layer_norm(x, (8,)))
    gradient = torch.func.grad(lambda t: tF.layer_norm(t, (8,)).pow(3).sum())(x)
    expected = torch.func.grad(lambda t: F.layer_norm(t, (8,)).pow(3).sum())(x)
    torch.testing.assert_close(gradient, expected)
    _, tangent = torch.func.jvp(lambda t: tF.layer_norm(t, (8,)), (x,), (x.sin(),))
    _, expected = torch.func.jvp(lambda t: F.layer_norm(t, (8,)), (x,), (x.sin(),))
    torch.testing.assert_close(tangent, expected)


def test_traces_take_torch(device):
    """torch.jit.trace and torch.fx, of a converted model."""
    model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.RMSNorm(8)).to(device)
    x = torch.randn(3, 8, device=device)
    expected = model(x)
    tn.convert(model)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)


def test_autocast_of_mixed_dtypes_without_a_device(monkeypatch):
    """CUDA autocast gives float32, also where the work is left to PyTorch, as in a compiled graph."""
    monkeypatch.setattr(tF.rows, "is_plain", lambda *_: True)
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode():
            x = torch.empty(3, 8, device="cuda", dtype=torch.bfloat16)
            weight = torch.empty(8, device="cuda")
            for function in (tF.layer_norm, tF.rms_norm):
                assert function(x, (8,), weight).dtype == torch.float32
                assert function(x, (8,)).dtype == torch.float32
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_meta_tensors(no_kernel):
    assert tF.layer_norm(torch.ones(3, 8, device="meta"), (8,)).shape == (3, 8)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context, device):
    """The same bits, and nothing is saved."""
    x = torch.randn(3, 8, device=device, requires_grad=True)
    expected = tF.layer_norm(x, (8,))
    with context():
        y = tF.layer_norm(x, (8,))
    assert torch.equal(y, expected)
    assert y.grad_fn is None


def test_a_changed_input_is_noticed(device):
    """What the backward pass needs was saved, not copied: changing it in between is an error."""
    x = torch.randn(3, 8, device=device, requires_grad=True)
    h = x * 2
    y = tF.layer_norm(h, (8,))
    h.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


def test_the_graph_can_be_kept(device):
    x = torch.randn(3, 8, device=device, requires_grad=True)
    y = tF.layer_norm(x, (8,)).pow(2).sum()
    first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


WITHOUT_INTERPRETER = """
import torch, tritonnorm as tn, tritonnorm.functional as tF
import torch.nn.functional as F
def refuse(*_, **__):
    raise AssertionError("a kernel was launched")

tn.launch.row_forward = refuse
x, w, b = torch.randn(3, 8), torch.randn(8), torch.randn(8)
assert torch.equal(tF.layer_norm(x, (8,), w, b), F.layer_norm(x, (8,), w, b))
assert torch.equal(tF.rms_norm(x, (8,), w), F.rms_norm(x, (8,), w))
assert torch.equal(tF.normalize(x), F.normalize(x))
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
expected = model(x)
tn.convert(model)
assert torch.equal(model(x), expected)
# PyTorch refuses this mixture on the CPU; the promise holds there as well.
mixed = tF.layer_norm(x, (8,), w.bfloat16(), b.bfloat16())
assert mixed.dtype == torch.float32
torch.testing.assert_close(mixed, F.layer_norm(x, (8,), w.bfloat16().float(), b.bfloat16().float()))
"""


def test_cpu_tensors_take_torch():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", WITHOUT_INTERPRETER], env=environment, check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_autocast(dtype):
    """CUDA autocast runs normalizations in float32: the result's dtype is PyTorch's."""
    x = torch.randn(3, 64, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(64, device="cuda", requires_grad=True)
    wide = torch.promote_types(dtype, torch.float32)
    for name in ("layer_norm", "rms_norm"):
        with torch.autocast("cuda", torch.bfloat16):
            y = getattr(tF, name)(x, (64,), weight, eps=1e-5)
            expected = getattr(F, name)(x, (64,), weight.to(wide), eps=1e-5)
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y, expected)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert dx.dtype == dtype


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_tensors_device_is_used():
    x = torch.randn(3, 64, device="cuda:1")
    torch.testing.assert_close(tF.layer_norm(x, (64,)), F.layer_norm(x, (64,)))
