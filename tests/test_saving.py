"""save="output": the backward pass from the output, and when that suffices."""

import pytest
import reference
import torch
from tolerances import assert_close
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import tritonnorm as tn
import tritonnorm.functional as tF
from perf.launches import observe
from tritonnorm import saving
from tritonnorm.formulas import RowOptions
from tritonnorm.saving import least_weight, output_suffices

EPS = 1e-5
N = 1000


def layer_norm(x, weight, bias, save="output"):
    return tF.layer_norm(x, x.shape[-1:], weight, bias, EPS, save=save)


def rms_norm(x, weight, bias, save="output"):
    return tF.rms_norm(x, x.shape[-1:], weight, EPS, save=save)


def inputs(device, *shape, dtype=torch.float32, parameters=None):
    """x, weight, bias and dy, of parameters for which the output suffices."""
    x, dy = torch.randn(2, *shape, dtype=dtype, device=device)
    n, parameters = shape[-1], parameters or dtype
    weight = (torch.rand(n, device=device) + 0.5) * torch.randn(n, device=device).sign()
    bias = (torch.rand(n, device=device) - 0.5) * weight
    return x + 1, weight.to(parameters), bias.to(parameters), dy


def gradients(function, x, weight, bias, dy, save="output"):
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    found = torch.autograd.grad(function(*leaves, save), leaves, dy, allow_unused=True)
    return [f for f in found if f is not None]


def keeps_output(y):
    """Whether the graph of y keeps it."""
    return type(y.grad_fn).__name__.startswith("RowNormFromOutput")


def saved_in_backward(function):
    """What the launches of a function recover from: "x" or "y"."""
    seen = []

    def look(kernel, grid, arguments):
        seen.append(arguments.get("SAVED"))
        kernel[grid](**arguments)

    with observe(look):
        function()
    return {s for s in seen if s is not None}


@pytest.mark.parametrize("n", [7, N, 20000])
@pytest.mark.parametrize("function", [layer_norm, rms_norm])
def test_gradients(function, n, device):
    """Those of the float64 reference; resident rows and long ones."""
    x, weight, bias, dy = inputs(device, 3, n)
    assert saved_in_backward(lambda: gradients(function, x, weight, bias, dy)) == {"y"}
    found = gradients(function, x, weight, bias, dy)
    center = function is layer_norm

    def exact(x, w, b=None):
        return reference.normalize(x, -1, center=center, eps=EPS, weight=w, bias=b)

    leaves = (x, weight, bias) if center else (x, weight)
    _, expected = reference.gradients(exact, leaves, dy)
    largest = (dy * weight).abs().amax().item()
    spread = x.double().std(-1, keepdim=True)
    assert_close(found[0], expected[0], terms=n, scale=3 * largest / spread, what="dx")
    scale = 3 * dy.abs().max().item() * (x.abs().max() / spread.min()).item()
    for gradient, e in zip(found[1:], expected[1:], strict=True):
        assert_close(gradient, e, terms=3, scale=scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parameters", ["same", torch.float32], ids=str)
def test_16_bits(dtype, parameters, device):
    """x_hat has the precision of y: so have the gradients."""
    arguments = inputs(
        device, 4, N, dtype=dtype, parameters=None if parameters == "same" else parameters
    )
    assert saved_in_backward(lambda: gradients(layer_norm, *arguments)) == {"y"}
    found, expected = (gradients(layer_norm, *arguments, save) for save in ("output", "input"))
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == e.dtype
        error = (f.double() - e.double()).square().mean().sqrt()
        assert error <= 4 * torch.finfo(dtype).eps * e.double().square().mean().sqrt()


def test_without_parameters(device):
    x, _, _, dy = inputs(device, 4, 64)
    for function in (layer_norm, rms_norm):
        leaf = x.clone().requires_grad_()
        assert keeps_output(function(leaf, None, None))
        found, expected = (
            torch.autograd.grad(function(leaf, None, None, save), leaf, dy)[0]
            for save in ("output", "input")
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_result_is_the_same(device):
    x, weight, bias, _ = inputs(device, 4, 64)
    for t in (x, x.clone().requires_grad_()):
        y = layer_norm(t, weight, bias)
        assert torch.equal(y, layer_norm(t, weight, bias, "input"))
        assert keeps_output(y) == t.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_criterion(dtype, device):
    x = torch.ones(2, 4, dtype=dtype, device=device)
    tiny, largest = least_weight(dtype), torch.finfo(dtype).max

    def suffices(weight, bias=None, offset=0.0, to=dtype, eps=EPS):
        weight, bias = (t if t is None else torch.tensor(t, device=device) for t in (weight, bias))
        return output_suffices(x, weight, bias, RowOptions("layer", eps, offset), to, 4)

    assert suffices(None)
    assert suffices([1.0, -1.0, 0.5, 2.0])
    assert suffices([1.0, -1.0, 0.5, 2.0], [1.0, 1.0, -0.5, 0.0])
    assert suffices([1.0] * 4)
    assert not suffices([1.0] * 4, eps=-EPS)
    assert suffices([1.001 * tiny] * 4)
    assert suffices([0.0] * 4, offset=1.0)
    assert not suffices([1.0, 0.0, 1.0, 1.0])
    assert not suffices([1.0, tiny / 2, 1.0, 1.0])
    assert not suffices([1.0] * 4, [0.0, 1.01, 0.0, 0.0])
    assert not suffices([1.0, largest / 2.1, 1.0, 1.0], [0.0, largest / 2.1, 0.0, 0.0])
    assert not suffices([1.0, float("nan"), 1.0, 1.0])
    assert not suffices([-1.0] * 4, offset=1.0)
    assert not suffices([1.0] * 4, to=torch.float64)


def test_long_narrow_rows_keep_the_input(device):
    """The kernels that would start from the output would spill."""
    for n, kept in ((4096, True), (4097, False), (4104, True), (20000, True), (20001, False)):
        x = torch.randn(2, n, device=device).bfloat16().requires_grad_()
        assert keeps_output(tF.layer_norm(x, (n,), save="output")) == kept


def test_a_zero_weight_keeps_the_input(device):
    """Its gradient is right; the output would not tell x_hat."""
    x, _, bias, dy = inputs(device, 3, 8)
    weight = torch.full((8,), 1.0, device=device)
    weight[3] = 0
    assert saved_in_backward(lambda: gradients(layer_norm, x, weight, bias, dy)) == {"x"}
    found, expected = (gradients(layer_norm, x, weight, bias, dy, save) for save in ("output", "input"))
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e)


def test_a_changed_parameter_is_looked_at_again(device):
    module = tn.LayerNorm(8, device=device)
    module.save = "output"
    x = torch.randn(3, 8, device=device, requires_grad=True)
    for value, expected in ((1.0, "y"), (0.0, "x"), (2.0, "y")):
        with torch.no_grad():
            module.weight[3] = value
        assert saved_in_backward(lambda: module(x).sum().backward()) == {expected}


def test_reads(device, monkeypatch):
    """Parameters are read once for each version and use; always where versions do not count, as with
    FSDP2; computed ones never."""
    reads, decide = [], saving._suffices

    def counted(*arguments):
        reads.append(None)
        return decide(*arguments)

    monkeypatch.setattr(saving, "_suffices", counted)

    def count(function, times):
        reads.clear()
        for _ in range(times):
            function()
        return len(reads)

    x = torch.randn(3, 8, device=device, requires_grad=True)
    weight = torch.nn.Parameter(torch.ones(8, device=device))
    biases = [torch.nn.Parameter(torch.zeros(8, device=device)) for _ in range(2)]
    assert count(lambda: layer_norm(x, weight, None), 3) == 3
    for parameter in (weight, *biases):
        with torch.no_grad():
            parameter.mul_(1)
    assert count(lambda: [layer_norm(x, weight, bias) for bias in biases], 3) == 2
    assert count(lambda: layer_norm(x, weight * 1, None), 3) == 0
    assert not keeps_output(layer_norm(x, weight * 1, None))
    with torch.no_grad():
        weight.mul_(2)
    assert count(lambda: rms_norm(x, weight, None), 3) == 1


def test_offsets(device):
    """Of a weight that is zero but for its offset, as Gemma's begins."""
    x, _, _, dy = inputs(device, 3, N)
    weight = torch.zeros(N, device=device)
    found = []
    for save in ("output", "input"):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        y = tF.rms_norm_variant(leaves[0], (N,), leaves[1], weight_offset=1.0, save=save)
        assert keeps_output(y) == (save == "output")
        found.append(torch.autograd.grad(y, leaves, dy))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_a_capture_keeps_the_input():
    """Parameters may change between replays."""
    module = tn.LayerNorm(64, device="cuda")
    module.save = "output"
    x = torch.randn(16, 64, device="cuda", requires_grad=True)
    assert keeps_output(module(x))
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert not keeps_output(module(x))


def kept(function, parameters, rows):
    """Bytes that the graph of a function's result keeps, each memory once, but for the parameters and
    for statistics, one or two a row."""
    memory, known = {}, {p.data_ptr() for p in parameters}
    sizes = [tn.launch.statistics_size(rows, kinds) for kinds in (1, 2)]

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and tensor.numel() not in sizes:
            memory[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    del result
    return sum(memory.values())


@pytest.mark.parametrize("cls", [tn.LayerNorm, tn.RMSNorm])
def test_memory(cls, device):
    """A norm and the linear layer after it keep one tensor in the place of two."""
    norm, linear = cls(64, device=device), torch.nn.Linear(64, 8, device=device)
    x = torch.randn(16, 64, device=device, requires_grad=True)

    def model():
        return linear(norm(x * 1))

    parameters = [*norm.parameters(), *linear.parameters()]
    assert kept(model, parameters, 16) == 2 * x.nbytes
    norm.save = "output"
    assert kept(model, parameters, 16) == x.nbytes


def test_converted_norms(device):
    """Of a model from transformers, which have the attribute as well."""
    norm = LlamaRMSNorm(64).to(device)
    with torch.no_grad():
        norm.weight.mul_(1)
    assert len(tn.convert(norm).replaced) == 1
    x = torch.randn(16, 64, device=device, requires_grad=True)
    assert not keeps_output(norm(x))
    norm.save = "output"
    assert keeps_output(norm(x))


def test_no_second_derivative(device):
    x, weight, bias, _ = inputs(device, 3, 8)
    leaf = x.requires_grad_()
    with pytest.raises(RuntimeError, match='save="output"'):
        torch.autograd.grad(layer_norm(leaf, weight, bias).square().sum(), leaf, create_graph=True)


def test_batched_gradients(device):
    x, weight, bias, dy = inputs(device, 3, 8)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    batch, y = torch.stack([dy, 2 * dy]), layer_norm(*leaves)
    assert keeps_output(y)
    found = torch.autograd.grad(y, leaves, batch, is_grads_batched=True)
    for f, e in zip(found, gradients(layer_norm, x, weight, bias, dy), strict=True):
        torch.testing.assert_close(f, torch.stack([e, 2 * e]), rtol=1e-4, atol=1e-5)


def test_a_changed_output_is_noticed(device):
    x, weight, bias, dy = inputs(device, 3, 8)
    y = layer_norm(x.requires_grad_(), weight, bias)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


def test_errors(device):
    x = torch.ones(2, 4, device=device)
    for function in (tF.layer_norm, tF.rms_norm, tF.rms_norm_variant):
        with pytest.raises(ValueError, match="save"):
            function(x, (4,), save="both")
