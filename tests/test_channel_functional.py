"""batch_norm, group_norm, instance_norm and layer_norm2d: running statistics, dtypes, memory formats,
and what takes PyTorch's own operator."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from channels import statistics, train
from torch._subclasses import FakeTensorMode

import tritonnorm.functional as tF
from tritonnorm import dispatch

SHAPES = [(3, 4), (3, 4, 5), (2, 4, 3, 5), (2, 4, 2, 3, 2)]
FORMATS = {
    torch.contiguous_format: (2, 4, 3, 5),
    torch.channels_last: (2, 4, 3, 5),
    torch.channels_last_3d: (2, 4, 2, 3, 2),
}


@pytest.fixture(params=["kernel", "torch"])
def either(request, monkeypatch):
    """The test runs on the kernels, and again on PyTorch's operators."""
    if request.param == "torch":
        request.getfixturevalue("no_kernel")
        for module in (tF.channels, tF.rows):
            monkeypatch.setattr(module, "takes_kernel", lambda *_: False)
    return request.param


def layer_norm2d(x, weight=None, bias=None, eps=1e-6):
    """As timm and torchvision write it."""
    return F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), weight, bias, eps).permute(0, 3, 1, 2)


CALLS = {
    "batch": lambda f, x, m, v, w, b: f.batch_norm(x, m, v, w, b, True, 0.3, 1e-3),
    "batch without statistics": lambda f, x, m, v, w, b: f.batch_norm(x, None, None, w, b, True),
    "batch in evaluation": lambda f, x, m, v, w, b: f.batch_norm(x, m, v, w, b),
    "group": lambda f, x, m, v, w, b: f.group_norm(x, 2, w, b, 1e-3),
    "group of all": lambda f, x, m, v, w, b: f.group_norm(x, 1, w, b),
    "instance": lambda f, x, m, v, w, b: f.instance_norm(x, m, v, w, b, True, 0.3),
    "instance without statistics": lambda f, x, m, v, w, b: f.instance_norm(x, None, None, w, b),
    "instance in evaluation": lambda f, x, m, v, w, b: f.instance_norm(x, m, v, w, b, False),
}


def arguments(x, parameter_dtype=None, running_dtype=None):
    """Weight, bias, running mean and running variance for x, whose dtype they have by default."""
    channels, parameter = x.shape[1], {"dtype": parameter_dtype or x.dtype, "device": x.device}
    weight, bias = (torch.linspace(*ends, channels, **parameter) for ends in ((-2, 2), (1, 3)))
    return weight, bias, *statistics(channels, dtype=running_dtype or x.dtype, device=x.device)


def results(f, call, x, dy, weight, bias, mean, var):
    """y, the gradients of x, weight and bias, and the running statistics, of copies."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    moved = mean.clone(), var.clone()
    y = CALLS[call](f, leaves[0], *moved, *leaves[1:])
    return [y.detach(), *torch.autograd.grad(y, leaves, dy), *moved]


def assert_like_torch(call, x, dy, *given):
    for ours, theirs in zip(
        results(tF, call, x, dy, *given), results(F, call, x, dy, *given), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def of_shapes(shapes):
    """Every call of every shape, but for the statistics of a single position."""
    return [
        pytest.param(call, shape, id=f"{call}-{shape}")
        for call in CALLS
        for shape in shapes
        if len(shape) > 2 or call not in ("instance", "instance without statistics")
    ]


@pytest.mark.parametrize(("call", "shape"), of_shapes(SHAPES))
def test_like_torch(call, shape, device):
    x, dy = torch.randn(2, *shape, device=device)
    assert_like_torch(call, x, dy, *arguments(x))


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_memory_formats(call, memory_format, device):
    """The result and the input's gradient have the input's."""
    x, dy = torch.randn(2, *FORMATS[memory_format], device=device)
    x = x.to(memory_format=memory_format)
    y, dx, *_ = results(tF, call, x, dy, *arguments(x))
    assert y.stride() == dx.stride() == x.stride()
    assert_like_torch(call, x, dy, *arguments(x))


@pytest.mark.parametrize("call", CALLS)
def test_strided_tensors(call, device):
    """Slices of a larger batch, a transposed one, and parameters and statistics with steps."""
    wide = torch.randn(4, 8, 3, 5, device=device)
    for x in (wide[::2, 2:6], wide[:, 1::2], wide[:, :4].mT):
        dy = torch.randn(5, *x.shape[:3], device=device).movedim(0, -1)[..., : x.shape[3]]
        spread = [t.repeat_interleave(2)[::2] for t in arguments(x)]
        assert_like_torch(call, x, dy, *spread)
        mean, var = spread[2:]
        CALLS[call](tF, x, mean, var, *spread[:2])
        torch.testing.assert_close([mean, var], results(F, call, x, dy, *arguments(x))[4:])


HALVES = [torch.bfloat16, torch.float16]
MIXES = [
    # of the input, of weight and bias, of the running statistics
    *((half, torch.float32, torch.float32) for half in HALVES),
    *((half, half, torch.float32) for half in HALVES),
    *((half, half, half) for half in HALVES),
    (torch.float32, torch.bfloat16, torch.float16),
    (torch.float32, torch.float32, torch.float64),
    (torch.float64, torch.float32, torch.float32),
]


@pytest.mark.parametrize("dtypes", MIXES, ids=lambda d: "-".join(str(t)[6:] for t in d))
@pytest.mark.parametrize("call", ["batch", "batch in evaluation", "group", "instance"])
def test_mixed_dtypes(call, dtypes, either, device):
    """Every tensor keeps its dtype: the result is the input's, and running statistics are their own."""
    x, dy = torch.randn(2, 3, 4, 5, device=device).to(dtypes[0])
    given = arguments(x, *dtypes[1:])
    actual = results(tF, call, x, dy, *given)
    expected = results(F, call, *(t.double() for t in (x, dy, *given)))
    own = [dtypes[i] for i in (0, 0, 1, 1, 2, 2)]
    assert [t.dtype for t in actual] == own
    for t, reference, dtype in zip(actual, expected, own, strict=True):
        tolerance = max(2 * torch.finfo(dtype).eps, 1e-5)
        torch.testing.assert_close(t.double(), reference, rtol=tolerance, atol=tolerance)


MOMENTA = [0.1, 0, 1, -0.5, 1.5, torch.tensor(0.3), torch.tensor(0.25, dtype=torch.float64)]
TRACKED = {
    "batch": lambda f, x, m, v, momentum: f.batch_norm(x, m, v, training=True, momentum=momentum),
    "instance": lambda f, x, m, v, momentum: f.instance_norm(x, m, v, momentum=momentum),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("momentum", MOMENTA, ids=str)
@pytest.mark.parametrize("size", [(2, 4, 3, 5), (16, 4, 3, 3)], ids=str)
@pytest.mark.parametrize("tracked", TRACKED)
def test_running_statistics(tracked, size, momentum, dtype, either, device):
    """Over several steps and both memory formats they are PyTorch's, those of columns as well."""
    options = {"dtype": dtype, "device": device}
    ours, theirs = statistics(**options), statistics(**options)
    for memory_format in (torch.contiguous_format, torch.channels_last, torch.contiguous_format):
        x = torch.randn(size, **options).add(2).to(memory_format=memory_format)
        y = TRACKED[tracked](tF, x, *ours, momentum)
        torch.testing.assert_close(y, TRACKED[tracked](F, x, *theirs, float(momentum)))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("tracked", TRACKED)
def test_cumulative_average(tracked, either, device):
    """A momentum of 1 / n, kept in a tensor, averages n batches."""
    mean, var = statistics(dtype=torch.float64, device=device)
    count = torch.zeros((), dtype=torch.long, device=device)
    batches = torch.randn(5, 2, 4, 7, dtype=torch.float64, device=device)
    for x in batches:
        count += 1
        TRACKED[tracked](tF, x, mean, var, count.double().reciprocal())
    if tracked == "batch":
        batches = batches.transpose(1, 2).reshape(5, 1, 4, 14)
    torch.testing.assert_close(mean, batches.mean((0, 1, 3)))
    torch.testing.assert_close(var, batches.var(3).mean((0, 1)))


@pytest.fixture
def unread(monkeypatch):
    """Fails the test if a tensor's value is asked for: on a GPU, the host would wait for it."""

    def refuse(*_):
        raise AssertionError("a tensor was read")

    for name in ("__bool__", "__float__", "__index__", "__int__", "item", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, refuse)


@pytest.mark.parametrize("tracked", TRACKED)
def test_a_momentum_in_memory_is_not_read(tracked, device, unread):
    mean, var = statistics(device=device)
    x, momentum = torch.randn(2, 4, 3, device=device), torch.tensor(0.25, device=device)
    TRACKED[tracked](tF, x, mean, var, momentum)


EMPTY = [(0, 4, 3), (0, 4), (2, 4, 0), (2, 4, 3, 0)]


@pytest.mark.parametrize(("call", "shape"), of_shapes(EMPTY))
def test_empty_inputs(call, shape, device):
    """As in PyTorch: an empty result, zero gradients, running statistics that stay.

    Not as in PyTorch: instance_norm of no images, where it raises an IndexError, or sets running
    statistics to NaN; and group_norm of no positions, whose weight's gradient is NaN there.
    """
    x = torch.empty(shape, device=device)
    given = arguments(x)
    y, dx, dweight, dbias, mean, var = results(tF, call, x, x, *given)
    assert y.shape == dx.shape == shape
    assert torch.equal(dweight, torch.zeros_like(dweight))
    assert torch.equal(dbias, torch.zeros_like(dbias))
    torch.testing.assert_close((mean, var), given[2:])
    if "instance" not in call and "group" not in call:
        assert_like_torch(call, x, x, *given)


@pytest.mark.parametrize("call", CALLS)
def test_no_channels(call, device):
    """An empty result, where PyTorch's batch_norm raises an IndexError if there is a weight."""
    x = torch.empty(2, 0, 3, device=device)
    assert [t.numel() for t in results(tF, call, x, x, *arguments(x))] == [0] * 6


@pytest.mark.parametrize("call", CALLS)
def test_not_a_number_goes_where_it_goes_in_torch(call, device):
    """In the result. A running mean that is infinite in PyTorch may be NaN here."""
    x, dy = torch.randn(2, 3, 4, 5, device=device)
    x[1, 2, 3], x[0, 0, 0] = torch.nan, torch.inf
    given = arguments(x)
    ours, theirs = (CALLS[call](f, x, *(t.clone() for t in given[2:]), *given[:2]) for f in (tF, F))
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=1e-5)
    if call in ("batch", "instance"):
        ours, theirs = (results(f, call, x, dy, *given)[4:] for f in (tF, F))
        for t, reference in zip(ours, theirs, strict=True):
            assert torch.equal(t.isfinite(), reference.isfinite())


def test_running_statistics_need_no_gradient_without_autograd(device):
    """As in PyTorch, where parameters may be running statistics under no_grad."""
    x = torch.randn(2, 4, 3, device=device)
    ours, theirs = statistics(device=device), statistics(device=device)
    ours[0].requires_grad_()
    with torch.no_grad():
        train(tF, *ours, x=x)
        train(F, *theirs, x=x)
    torch.testing.assert_close([t.detach() for t in ours], list(theirs))


DOUBLE = {
    "batch": lambda x, w, b: tF.batch_norm(x, None, None, w, b, training=True),
    "batch in evaluation": lambda x, w, b: tF.batch_norm(x, *statistics(device=x.device), w, b),
    "group": lambda x, w, b: tF.group_norm(x, 2, w, b),
    "instance": lambda x, w, b: tF.instance_norm(x, weight=w, bias=b),
    "layer": tF.layer_norm2d,
}


@pytest.mark.parametrize("call", DOUBLE)
def test_derivatives(call, device):
    options = {"dtype": torch.float64, "device": device, "requires_grad": True}
    inputs = [torch.randn(s, **options) for s in ((2, 4, 1, 3), (4,), (4,))]
    torch.autograd.gradcheck(DOUBLE[call], inputs, fast_mode=True)
    torch.autograd.gradgradcheck(DOUBLE[call], inputs, fast_mode=True)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("call", DOUBLE)
def test_without_gradients(call, context, device):
    """The same bits, and nothing is saved."""
    x = torch.randn(2, 4, 3, 5, device=device, requires_grad=True)
    weight, bias = torch.randn(2, 4, device=device)
    expected = DOUBLE[call](x, weight, bias)
    with context():
        y = DOUBLE[call](x, weight, bias)
    assert torch.equal(y, expected)
    assert y.grad_fn is None


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("parameters", [0, 1, 2])
def test_layer_norm2d(parameters, memory_format, device):
    x, dy = torch.randn(2, 2, 6, 3, 5, device=device)
    leaves = [x.to(memory_format=memory_format), *torch.randn(2, 6, device=device)[:parameters]]
    leaves = [t.requires_grad_() for t in leaves]
    y, expected = tF.layer_norm2d(*leaves), layer_norm2d(*leaves)
    torch.testing.assert_close(y, expected)
    assert y.stride() == x.to(memory_format=memory_format).stride()
    torch.testing.assert_close(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy)
    )


def test_layer_norm2d_of_mixed_dtypes(either, device):
    x = torch.randn(2, 6, 3, 5, device=device).bfloat16()
    weight = torch.randn(6, device=device)
    y = tF.layer_norm2d(x, weight)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, layer_norm2d(x.float(), weight).bfloat16())


@pytest.mark.parametrize("call", DOUBLE)
def test_transforms_take_torch(call, no_kernel, device):
    f, x = DOUBLE[call], torch.randn(2, 4, 3, 5, device=device)
    weight, bias = torch.randn(2, 4, device=device)

    def loss(x):
        return f(x, weight, bias).pow(3).sum()

    expected = torch.func.grad(loss)(x)
    assert expected.shape == x.shape
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(x[None])[0], expected)
    _, tangent = torch.func.jvp(loss, (x,), (x.sin(),))
    torch.testing.assert_close(tangent, (expected * x.sin()).sum(), rtol=1e-4, atol=1e-4)


def test_meta_tensors(no_kernel):
    x, vector = torch.ones(2, 4, 3, 5, device="meta"), torch.ones(4, device="meta")
    for call in CALLS.values():
        assert call(tF, x, vector, vector, vector, vector).shape == x.shape
    assert tF.layer_norm2d(x).shape == x.shape


def test_large_sets_take_torch(no_kernel, monkeypatch, device):
    """One element more than the kernels can count."""
    x = torch.randn(2, 4, 3, 5, device=device)
    for call, elements in (("batch", 30), ("batch in evaluation", 15), ("group", 30), ("instance", 15)):
        monkeypatch.setattr(dispatch, "LARGEST_SET", elements)
        assert_like_torch(call, x, x, *arguments(x))
    monkeypatch.setattr(dispatch, "LARGEST_SET", 4)
    torch.testing.assert_close(tF.layer_norm2d(x), layer_norm2d(x))


@pytest.fixture
def autocast():
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", False)


def autocast_dtypes(mean, weight, x):
    """Of the results of what CUDA autocast runs in float32, and of what it leaves alone."""
    in_float32 = [tF.group_norm(x, 2), tF.group_norm(x, 2, weight), tF.layer_norm2d(x, weight)]
    left = [train(tF, None, None, x=x, weight=w) for w in (None, weight)]
    left += [tF.batch_norm(x, mean, weight), tF.instance_norm(x), tF.instance_norm(x, weight=weight)]
    return {t.dtype for t in in_float32}, {t.dtype for t in left}


def test_autocast_without_a_device(monkeypatch, autocast):
    """As PyTorch's lists have it, also where the work is left to PyTorch: AT_FORALL_FP32 in
    ATen/autocast_mode.h has group_norm and layer_norm; no list has batch_norm or instance_norm."""
    monkeypatch.setattr(tF.channels, "is_plain", lambda *_: True)
    with FakeTensorMode():
        mean, weight = (torch.empty(4, device="cuda") for _ in range(2))
        x = torch.empty(2, 4, 3, 5, device="cuda", dtype=torch.bfloat16)
        assert autocast_dtypes(mean, weight, x) == ({torch.float32}, {torch.bfloat16})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast(dtype, autocast):
    mean, var = statistics(device="cuda")
    x = torch.randn(2, 4, 3, 5, device="cuda", dtype=dtype)
    assert autocast_dtypes(mean, var, x) == ({torch.float32}, {dtype})
    assert F.group_norm(x, 2, var).dtype == torch.float32
    assert train(F, None, None, x=x, weight=var).dtype == F.instance_norm(x).dtype == dtype


WITHOUT_INTERPRETER = """
import torch, tritonnorm as tn, tritonnorm.functional as tF
import torch.nn.functional as F
def refuse(*_, **__):
    raise AssertionError("a kernel was launched")

for name in tn.launch.__all__:
    setattr(tn.launch, name, refuse)
x, w, b = torch.randn(2, 4, 3, 5), torch.randn(4), torch.randn(4)
ours, theirs = [torch.zeros(4), torch.ones(4)], [torch.zeros(4), torch.ones(4)]
assert torch.equal(tF.batch_norm(x, *ours, w, b, True), F.batch_norm(x, *theirs, w, b, True))
assert torch.equal(tF.instance_norm(x, *ours), F.instance_norm(x, *theirs))
assert torch.equal(tF.batch_norm(x, *ours, w, b), F.batch_norm(x, *theirs, w, b))
assert torch.equal(torch.stack(ours), torch.stack(theirs))
assert torch.equal(tF.group_norm(x, 2, w, b), F.group_norm(x, 2, w, b))
model = torch.nn.Sequential(
    torch.nn.BatchNorm2d(4, momentum=None), torch.nn.GroupNorm(2, 4), torch.nn.InstanceNorm2d(4)
)
expected = model(x)
model[0].reset_running_stats()
assert len(tn.convert(model).replaced) == 3
assert torch.equal(model(x), expected)
"""


def test_cpu_tensors_take_torch():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", WITHOUT_INTERPRETER], env=environment, check=True)
