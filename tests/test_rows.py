"""LayerNorm, RMSNorm and L2 normalization against the float64 reference."""

import pytest
import reference
import torch
from cases import COMPARED, DTYPES, ROWS
from operators import LAYER_NORM, OPERATORS, RMS_NORM, every_operator, run
from tolerances import assert_close, assert_no_worse_than, wide

import tritonnorm.functional as tF

NAMES = ("dx", "dweight", "dbias")


def compare(operator, x, weight, bias, dy, dims=1):
    """Checks y and every gradient; returns ours and the reference's."""
    y, gradients = run(operator, x, weight, bias, dy, dims)
    exact_y, exact = reference.gradients(
        lambda *leaves: operator.exact(*leaves, dims), (x, weight, bias), dy
    )
    n = x[(0,) * (x.dim() - dims)].numel()
    m = x.numel() // n
    assert y.dtype == x.dtype
    assert_close(y, exact_y, terms=n, what="y")
    for what, gradient, expected, leaf in zip(NAMES, gradients, exact, (x, weight, bias), strict=True):
        if leaf is None:
            continue
        assert gradient.dtype == leaf.dtype
        assert gradient.shape == leaf.shape
        if what == "dx":
            # The two terms that are subtracted are each as large as wdy * rstd.
            wdy = dy.double() * (1 if weight is None else operator.weight_offset + weight.double())
            spread = reference_spread(operator, x, dims)
            scale = (wdy.abs().amax(tuple(range(-dims, 0)), keepdim=True) / spread).cpu()
            assert_close(gradient.cpu(), expected.cpu(), terms=n, scale=scale, what=what)
        else:
            x_hat = operator.exact(x, None, None, dims) if what == "dweight" else torch.ones_like(dy)
            scale = (dy.double() * x_hat).abs().max().item()
            assert_close(
                gradient, expected, terms=m, scale=scale * m**0.5, wide_dtype=wide(x.dtype), what=what
            )
    return (y, gradients), (exact_y, exact)


def reference_spread(operator, x, dims):
    """What the deviation was divided by, for the size of the terms of dx."""
    x, last = x.double(), tuple(range(-dims, 0))
    if operator.name == "normalize":
        return x.square().sum(last, keepdim=True).sqrt().clamp_min(1e-12)
    deviation = x - x.mean(last, keepdim=True) if operator is LAYER_NORM else x
    return torch.sqrt(deviation.square().mean(last, keepdim=True) + 1e-5)


@every_operator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_forward_and_backward(operator, shape, dtype, device):
    x = torch.randn(shape.m, shape.n, device=device).to(dtype)
    dy = torch.randn(shape.m, shape.n, device=device).to(dtype)
    compare(operator, x, *operator.parameters(shape.n, dtype, device), dy)


@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", COMPARED, ids=str)
def test_no_worse_than_torch(operator, shape, dtype, device):
    """Not in float64, where the reference is no more exact than what is compared with it."""
    x = torch.randn(shape.m, shape.n, device=device).to(dtype)
    dy = torch.randn(shape.m, shape.n, device=device).to(dtype)
    weight, bias = operator.parameters(shape.n, dtype, device)
    y, gradients = run(operator, x, weight, bias, dy)
    exact_y, exact = reference.gradients(operator.exact, (x, weight, bias), dy)
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    their_y = operator.theirs(*leaves)
    theirs = iter(torch.autograd.grad(their_y, [t for t in leaves if t is not None], dy))
    assert_no_worse_than(their_y.detach(), y, exact_y, what="y")
    for what, gradient, expected in zip(NAMES, gradients, exact, strict=True):
        if gradient is not None:
            assert_no_worse_than(next(theirs), gradient, expected, what=what)


@pytest.mark.parametrize("n", [1000, 20000], ids=["resident", "looped"])
def test_large_mean(n, device):
    """A mean of 10,000 standard deviations: y is as exact as the input's differences are."""
    x = torch.randn(3, n, device=device) + 1e4
    y = tF.layer_norm(x, (n,))
    exact = reference.normalize(x, -1, eps=1e-5)
    assert_close(y, exact, terms=n, what="y")
    assert_no_worse_than(torch.nn.functional.layer_norm(x, (n,)), y, exact, what="y")

    # The backward pass has the mean in float32, where 10,000 has an ulp of 1e-3: half of that, in
    # standard deviations, is what x_hat, and with it dx, can be off by.
    dy = torch.randn_like(x)
    _, (dx, _, _) = run(LAYER_NORM, x, None, None, dy)
    _, (expected, _, _) = reference.gradients(LAYER_NORM.exact, (x, None, None), dy)
    assert (dx.double() - expected).abs().max() < 2 * torch.finfo(torch.float32).eps / 2 * 1e4


@pytest.mark.parametrize("n", [1000, 20000], ids=["resident", "looped"])
def test_mean_of_one_chunk(n, device):
    """Rows whose first part is like nothing that follows: no shifted sum of squares survives this."""
    x = torch.randn(2, n, device=device) + 1e4
    x[:, : n // 3] = 0
    exact = reference.normalize(x, -1, eps=1e-5)
    assert_close(tF.layer_norm(x, (n,)), exact, terms=n, what="y")


@every_operator
def test_float16_of_standard_deviation_300(operator, device):
    """Squares and their sum pass float16's range by far; nothing of them is held in it."""
    x = (300 * torch.randn(4, 1000, device=device)).half()
    compare(operator, x, *operator.parameters(1000, torch.float16, device), torch.randn_like(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_variance(dtype, device):
    """Rows of one value: y is the bias exactly, dx finite."""
    x = (
        torch.tensor([[3.0], [-1000.0], [0.0], [0.1]], device=device)
        .to(dtype)
        .expand(4, 1000)
        .contiguous()
    )
    weight, bias = LAYER_NORM.parameters(1000, dtype, device)
    y, (dx, _, _) = run(LAYER_NORM, x, weight, bias, torch.randn_like(x))
    assert torch.equal(y, bias.expand_as(y))
    assert dx.isfinite().all()


@pytest.mark.parametrize(("n", "value"), [(12289, 65504.0), (16383, 2047.0)])
def test_long_rows_of_one_value_in_float16(n, value, device):
    """Their sum has more digits than float32, whose rounding would be all that is left."""
    x = torch.full((2, n), value, dtype=torch.float16, device=device)
    assert not tF.layer_norm(x, (n,)).any()
    assert not tF.group_norm(x.view(2, 1, n), 1).any()


@every_operator
@pytest.mark.parametrize("n", [8, 96, 20000], ids=["resident", "chunks", "looped"])
def test_special_values(operator, n, device):
    """NaN, infinities, signed zeros and zero rows, as PyTorch has them."""
    x = torch.randn(7, n, device=device)
    x[0, 1] = float("nan")
    x[1, 2] = float("inf")
    x[2, 3] = -float("inf")
    x[3] = 0.0
    x[4] = -0.0
    x[5, 0], x[5, 1] = float("inf"), -float("inf")
    y = operator.ours(x, None, None)
    theirs = operator.theirs(x, None, None)
    torch.testing.assert_close(y, theirs, equal_nan=True)
    if operator is not LAYER_NORM:  # there the sign of x - mean = 0 is an accident of the algorithm
        assert torch.equal(y[3:5].signbit(), theirs[3:5].signbit())


@every_operator
def test_nan_stays_in_its_row(operator, device):
    """A tile of many short rows: one row's NaN must not reach its neighbours, in either direction."""
    x = torch.randn(20, 16, device=device)
    x[7, 3] = float("nan")
    y, (dx, _, _) = run(operator, x, None, None, torch.randn_like(x))
    rows = torch.arange(20, device=device) == 7
    assert torch.equal(y.isnan().any(1), rows)
    assert torch.equal(dx.isnan().any(1), rows)


@every_operator
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0), (2, 0, 4)], ids=str)
def test_empty(operator, shape, device):
    x = torch.randn(shape, device=device)
    weight, bias = operator.parameters(shape[-1], torch.float32, device)
    y, (dx, dweight, dbias) = run(operator, x, weight, bias, torch.randn_like(x))
    assert y.shape == dx.shape == shape
    for gradient in (dweight, dbias):
        assert gradient is None or torch.equal(gradient, torch.zeros_like(gradient))


def qkv(device):
    return torch.randn(2, 5, 3, 4, 64, device=device)  # [batch, sequence, 3, heads, head]


STRIDED = {
    "query of a fused QKV": lambda d: qkv(d)[:, :, 0],
    "key, heads before the sequence": lambda d: qkv(d)[:, :, 1].transpose(1, 2),
    "every other row and column": lambda d: torch.randn(10, 40, device=d)[::2, ::2],
    "columns of a wider tensor": lambda d: torch.randn(10, 40, device=d)[:, 3:36],
    "transposed": lambda d: torch.randn(48, 10, device=d).t(),
    "channels of NCHW": lambda d: torch.randn(2, 24, 4, 8, device=d).movedim(1, -1),
    "channels of NCHW, odd image": lambda d: torch.randn(2, 24, 3, 5, device=d).movedim(1, -1),
    "many channels of NCHW": lambda d: torch.randn(1, 1100, 2, 8, device=d).movedim(1, -1),
    "expanded rows": lambda d: torch.randn(1, 24, device=d).expand(6, 24),
    "expanded columns": lambda d: torch.randn(6, 1, device=d).expand(6, 24),
    "four row dimensions in disorder": lambda d: torch.randn(2, 3, 2, 3, 8, device=d).permute(
        2, 0, 3, 1, 4
    ),
    "reversed dimensions": lambda d: torch.randn(8, 2, 3, 4, device=d).permute(3, 2, 1, 0),
    "one row": lambda d: torch.randn(2, 40, device=d)[1:],
}


@every_operator
@pytest.mark.parametrize("layout", STRIDED)
def test_strides(operator, layout, device):
    """Any strides, with the gradient and against PyTorch's result for the same tensor."""
    x = STRIDED[layout](device)
    dy = torch.randn(x.shape, device=device)
    weight, bias = operator.parameters(x.shape[-1], torch.float32, device)
    compare(operator, x, weight, bias, dy)
    expected = operator.theirs(x, weight, bias)
    if operator.name != "normalize":
        assert operator.ours(x, weight, bias).stride() == expected.stride()


@every_operator
def test_several_normalized_dimensions(operator, device):
    x = torch.randn(3, 4, 5, 6, device=device)
    dy = torch.randn_like(x)
    compare(operator, x, *operator.parameters((5, 6), torch.float32, device), dy, dims=2)
    swapped = x.to(memory_format=torch.channels_last)
    compare(operator, swapped, *operator.parameters((4, 5, 6), torch.float32, device), dy, dims=3)


@every_operator
@pytest.mark.parametrize("gradient", ["sum", "expanded rows", "strided", "transposed"])
def test_gradient_strides(operator, gradient, device):
    """Gradients as autograd really delivers them: of a sum (no strides at all), broadcast, or a view."""
    x = torch.randn(6, 32, device=device)
    dy = {
        "sum": lambda: torch.ones((), device=device).expand(6, 32),
        "expanded rows": lambda: torch.randn(32, device=device).expand(6, 32),
        "strided": lambda: torch.randn(6, 64, device=device)[:, ::2],
        "transposed": lambda: torch.randn(32, 6, device=device).t(),
    }[gradient]()
    compare(operator, x, *operator.parameters(32, torch.float32, device), dy)


@every_operator
@pytest.mark.parametrize("offset", [1, 2, 4])
@pytest.mark.parametrize("n", [64, 1000])
def test_misaligned_views(operator, offset, n, device):
    """Tensors that start in the middle of a 16-byte word."""
    memory = torch.randn(4 * n + 8, device=device).bfloat16()
    x = memory[offset : offset + 4 * n].view(4, n)
    weight, bias = operator.parameters(n + offset, torch.bfloat16, device)
    weight, bias = (t if t is None else t[offset:] for t in (weight, bias))
    compare(operator, x, weight, bias, torch.randn(4, n, device=device).bfloat16())


@pytest.mark.parametrize("operator", [LAYER_NORM, RMS_NORM], ids=str)
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes(operator, dtype, parameters, device):
    x = torch.randn(5, 200, device=device).to(dtype)
    compare(operator, x, *operator.parameters(200, parameters, device), torch.randn_like(x))


def test_weight_and_bias_of_different_dtypes(device):
    x = torch.randn(5, 200, device=device).bfloat16()
    weight = torch.randn(200, device=device)
    bias = torch.randn(200, device=device).half()
    compare(LAYER_NORM, x, weight, bias, torch.randn_like(x))


@pytest.mark.parametrize("present", [(True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("n", [64, 9000], ids=["resident", "split"])
def test_absent_parameters(present, n, device):
    x = torch.randn(3, n, device=device)
    parameters = LAYER_NORM.parameters(n, torch.float32, device)
    weight, bias = (p if there else None for p, there in zip(parameters, present, strict=True))
    compare(LAYER_NORM, x, weight, bias, torch.randn_like(x))


def test_parameters_that_are_views(device):
    """Not contiguous, and not flat."""
    x = torch.randn(3, 4, 6, device=device)
    weight = torch.randn(6, 4, device=device).t()
    bias = torch.randn(1, device=device).expand(4, 6)
    compare(LAYER_NORM, x, weight, bias, torch.randn_like(x), dims=2)


@every_operator
@pytest.mark.parametrize("n", [64, 20000], ids=["resident", "looped"])
def test_inputs_are_not_written(operator, n, device):
    x, dy = torch.randn(2, 3, n, device=device)
    tensors = [x, dy, *operator.parameters(n, torch.float32, device)]
    before = [None if t is None else t.clone() for t in tensors]
    run(operator, x, tensors[2], tensors[3], dy)
    for now, then in zip(tensors, before, strict=True):
        assert now is None or torch.equal(now, then)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 0.5, -0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_eps(eps, dtype, device):
    """Any eps, exact in float64; with rows of small spread it matters."""
    x = (
        1e-3 * torch.randn(4, 50, device=device, dtype=dtype)
        if eps >= 0
        else torch.randn(4, 50, device=device, dtype=dtype)
    )
    for ours, center in ((tF.layer_norm, True), (tF.rms_norm, False)):
        expected = reference.normalize(x, -1, center=center, eps=eps)
        assert_close(ours(x, (50,), eps=eps), expected, terms=50)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_default_eps(dtype, device):
    """float32's own for the 16-bit types as well, as in PyTorch."""
    x = (1e-3 * torch.randn(4, 50, device=device)).to(dtype)
    eps = torch.finfo(wide(dtype)).eps
    assert_close(tF.rms_norm(x, (50,)), reference.normalize(x, -1, center=False, eps=eps), terms=50)


def test_normalize_at_and_below_eps(device):
    """The norm where it is at least eps, with its gradient; eps below that, with dy / eps."""
    eps = 2.0**-40
    norms = torch.tensor([0.0, 0.5, 1.0, 2.0], device=device) * eps
    x = torch.zeros(4, 3, device=device)
    x[:, 1] = norms
    x.requires_grad_()
    theirs = x.detach().clone().requires_grad_()
    dy = torch.randn(4, 3, device=device)
    y = tF.normalize(x, dim=1, eps=eps)
    expected = torch.nn.functional.normalize(theirs, dim=1, eps=eps)
    y.backward(dy)
    expected.backward(dy)
    assert torch.equal(y, expected)
    torch.testing.assert_close(x.grad, theirs.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, (1, 2), (3, 0)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_normalize_any_dim(dim, memory_format, device):
    """Values, gradient and memory format are PyTorch's."""
    x = torch.randn(2, 6, 3, 5, device=device).to(memory_format=memory_format).requires_grad_()
    theirs = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    dy = torch.randn(2, 6, 3, 5, device=device)
    y = tF.normalize(x, dim=dim)
    expected = torch.nn.functional.normalize(theirs, dim=dim)
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, theirs.grad)
    assert y.stride() == expected.stride()


@every_operator
def test_gradcheck_twice(operator, device):
    """First and second derivatives, numerically, in float64."""
    x = torch.randn(3, 5, device=device, dtype=torch.float64, requires_grad=True)
    parameters = operator.parameters(5, torch.float64, device)
    parameters = [p if p is None else p.requires_grad_() for p in parameters]
    assert torch.autograd.gradcheck(operator.ours, (x, *parameters))
    assert torch.autograd.gradgradcheck(operator.ours, (x, *parameters))


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_gradient_penalty(operator, device):
    """A gradient through a gradient, where a backward pass that is cut off would be wrong silently."""
    x = torch.randn(4, 12, device=device, requires_grad=True)
    weight, bias = (
        p if p is None else p.requires_grad_() for p in operator.parameters(12, x.dtype, device)
    )

    def penalty(function):
        (dx,) = torch.autograd.grad(function(x, weight, bias).pow(3).sum(), x, create_graph=True)
        leaves = [t for t in (x, weight) if t is not None]
        return torch.autograd.grad((dx.norm(dim=1) - 1).square().sum(), leaves)

    for ours, theirs in zip(penalty(operator.ours), penalty(operator.theirs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_more_rows_than_programs(device, monkeypatch):
    """The backward pass walks through rows when there are more of them than programs."""
    from tritonnorm import heuristics
    from tritonnorm.launch.common import forget_plans

    x, dy = torch.randn(2, 14, 1024, device=device)  # a row a program: five rows each of three
    inputs = (x, *LAYER_NORM.parameters(1024, torch.float32, device))
    _, alone = run(LAYER_NORM, *inputs, dy)
    monkeypatch.setattr(heuristics.common, "MAX_PARTIALS", 3)
    forget_plans()
    compare(LAYER_NORM, *inputs, dy)
    _, few = run(LAYER_NORM, *inputs, dy)
    assert torch.equal(alone[0], few[0])


@pytest.mark.gpu
def test_offsets_beyond_int32(device):
    """More than 2^31 elements, forward and backward; the last rows are looked at."""
    m, n = 2**19 + 3, 4096
    x = torch.randn(m, n, device=device, dtype=torch.bfloat16)
    weight, bias = LAYER_NORM.parameters(n, torch.bfloat16, device)
    y, (dx, _, _) = run(LAYER_NORM, x, weight, bias, x)
    tail_y, (tail_dx, _, _) = run(LAYER_NORM, x[-5:].clone(), weight, bias, x[-5:].clone())
    assert torch.equal(y[-5:], tail_y)
    assert torch.equal(dx[-5:], tail_dx)


DEPENDENT = {
    "weight from x": lambda x, w: (x, x.mean(0), w),
    "weight and bias from x": lambda x, w: (x, 2 * x[0], 6 * x[0]),
    "bias is weight": lambda x, w: (x, w, w),
    "bias from weight": lambda x, w: (x, w, 2 * w),
}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("dependence", DEPENDENT)
def test_inputs_that_depend_on_each_other(dependence, create_graph, device):
    """Each gradient is of its own argument alone, and hooks run once."""
    x = torch.randn(4, 12, device=device, requires_grad=True)
    w = torch.randn(12, device=device, requires_grad=True)
    calls = []

    def gradients(function):
        inputs = DEPENDENT[dependence](x * 1, w * 1)
        inputs[0].register_hook(lambda g: calls.append(function) or 2 * g)
        return torch.autograd.grad(
            function(*inputs).pow(3).sum(), (x, w), create_graph=create_graph, allow_unused=True
        )

    for ours, theirs in zip(gradients(LAYER_NORM.ours), gradients(LAYER_NORM.theirs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    assert calls == [LAYER_NORM.ours, LAYER_NORM.theirs]


@every_operator
def test_batched_gradients(operator, device):
    """Vectorized Jacobians, and gradients that are known to be zero."""
    x = torch.randn(3, 8, device=device, requires_grad=True)
    weight, bias = operator.parameters(8, x.dtype, device)

    def ours(t):
        return operator.ours(t, weight, bias)

    def theirs(t):
        return operator.theirs(t, weight, bias)

    jacobians = [
        torch.autograd.functional.jacobian(f, x, vectorize=v) for f, v in [(ours, True), (theirs, False)]
    ]
    torch.testing.assert_close(*jacobians)
    zeros = torch._efficientzerotensor((3, 8), device=device)
    (dx,) = torch.autograd.grad(ours(x), x, zeros)
    assert torch.equal(dx, torch.zeros_like(dx))


@every_operator
def test_pending_negation(operator, device):
    """The imaginary part of a conjugate has its sign in a bit beside the memory."""
    x, dy = (torch.randn(3, 8, dtype=torch.complex64, device=device).conj().imag for _ in range(2))
    assert x.is_neg()
    compare(
        operator, x, *operator.parameters(8, torch.float32, device), torch.randn(3, 8, device=device)
    )
    plain = torch.randn(3, 8, device=device)
    compare(operator, plain, *operator.parameters(8, torch.float32, device), dy)
