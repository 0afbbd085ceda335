"""RMS normalization as models have it: against the float64 reference, and their own formulas."""

import pytest
import reference
import torch
from cases import DTYPES
from conftest import INTERPRETED
from operators import EPS, Operator
from test_rows import STRIDED, compare
from tolerances import assert_close, wide

import tritonnorm.functional as tF
from tritonnorm import launch

NARROW = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture(autouse=True)
def _rounding_interpreter(monkeypatch):
    """Triton's interpreter cuts float32 off to bfloat16, where GPUs round to nearest."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def rounding(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            data = torch.from_numpy(src.data.copy()).bfloat16().view(torch.uint16).numpy()
            return TensorHandle(data, dst_type.scalar)
        return cast(self, src, dst_type)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounding)


def variant(**options):
    """The operator with these options, whose reference does not round."""
    offset = options.get("weight_offset", 0.0)
    return Operator(
        " ".join(f"{name}={value}" for name, value in options.items()),
        lambda x, w, b, dims=1: tF.rms_norm_variant(x, x.shape[-dims:], w, EPS, **options),
        None,
        lambda x, w, b, dims=1: reference.normalize(
            x,
            tuple(range(-dims, 0)),
            center=False,
            eps=EPS,
            weight=w if w is None else offset + w.double(),
        ),
        has_weight=True,
        has_bias=False,
        weight_offset=offset,
    )


OFFSET = variant(weight_offset=1.0)
VARIANTS = (
    OFFSET,
    variant(round_to="input"),
    variant(round_to="weight"),
    variant(weight_offset=-0.3, round_to="input"),
)


@pytest.mark.parametrize("operator", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(37, 64), (3, 1000), (1, 8192), (2, 16392)], ids=str)
def test_forward_and_backward(operator, shape, dtype, device):
    """Two roundings to 16 bits, of half an ulp each, stay within the one ulp of the tolerance."""
    x, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    compare(operator, x, *operator.parameters(shape[1], dtype, device), dy)


@pytest.mark.parametrize("operator", [OFFSET, variant(round_to="input")], ids=str)
@pytest.mark.parametrize("parameters", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes(operator, dtype, parameters, device):
    x = torch.randn(5, 200, device=device).to(dtype)
    compare(operator, x, *operator.parameters(200, parameters, device), torch.randn_like(x))


@pytest.mark.parametrize("layout", STRIDED)
def test_strides(layout, device):
    x = STRIDED[layout](device).bfloat16()
    dy = torch.randn(x.shape, device=device).bfloat16()
    operator = VARIANTS[-1]
    compare(operator, x, *operator.parameters(x.shape[-1], torch.bfloat16, device), dy)


def test_several_normalized_dimensions(device):
    x, dy = torch.randn(2, 3, 4, 5, 6, device=device)
    compare(OFFSET, x, *OFFSET.parameters((5, 6), torch.float32, device), dy, dims=2)


@pytest.mark.parametrize("result", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [200, 16392], ids=["resident", "looped and split"])
def test_result_dtype(n, dtype, result, device):
    """Of any width, forward and backward: a wider gradient than the input, and a narrower one."""
    x = torch.randn(3, n, device=device).to(dtype).requires_grad_()
    weight = torch.randn(n, device=device).requires_grad_()
    dy = torch.randn(3, n, device=device).to(result)
    y = tF.rms_norm_variant(x, (n,), weight, EPS, weight_offset=1.0, dtype=result)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    exact_y, exact = reference.gradients(lambda *t: OFFSET.exact(*t, None), (x, weight), dy)
    assert (y.dtype, dx.dtype, dweight.dtype) == (result, dtype, torch.float32)
    wide_dtype = wide(dtype)
    assert_close(y.detach(), exact_y, terms=n, wide_dtype=wide_dtype, what="y")
    assert_close(dx, exact[0], terms=n, wide_dtype=wide_dtype, scale=50.0, what="dx")
    assert_close(dweight, exact[1], terms=3, scale=50.0, what="dweight")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [64, 20000], ids=["resident", "looped"])
def test_without_options_it_is_rms_norm(n, dtype, device):
    x, weight = torch.randn(3, n, device=device).to(dtype), torch.randn(n, device=device)
    assert torch.equal(tF.rms_norm_variant(x, (n,), weight, EPS), tF.rms_norm(x, (n,), weight, EPS))
    assert torch.equal(
        tF.rms_norm_variant(x, (n,), eps=EPS, round_to="input"), tF.rms_norm(x, (n,), eps=EPS)
    )


def llama(x, weight, eps):
    """LlamaRMSNorm.forward of transformers."""
    wide_x = x.to(torch.float32)
    x_hat = wide_x * torch.rsqrt(wide_x.pow(2).mean(-1, keepdim=True) + eps)
    return weight * x_hat.to(x.dtype)


def gemma(x, weight, eps):
    """GemmaRMSNorm.forward."""
    wide_x = x.float()
    x_hat = wide_x * torch.rsqrt(wide_x.pow(2).mean(-1, keepdim=True) + eps)
    return (x_hat * (1.0 + weight.float())).type_as(x)


def t5(x, weight, eps):
    """T5LayerNorm.forward."""
    x_hat = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + eps)
    if weight.dtype in (torch.float16, torch.bfloat16):
        x_hat = x_hat.to(weight.dtype)
    return weight * x_hat


FAMILIES = {
    "llama": (
        llama,
        lambda x, w: {"round_to": "input", "dtype": torch.promote_types(x.dtype, w.dtype)},
    ),
    "gemma": (gemma, lambda x, w: {"weight_offset": 1.0}),
    "t5": (t5, lambda x, w: {"round_to": "weight", "dtype": w.dtype}),
}


def of_family(family, x, weight):
    """What the class computes, what we do, and our options."""
    formula, options_of = FAMILIES[family]
    options = options_of(x, weight)
    ours = tF.rms_norm_variant(x, weight.shape, weight, 1e-6, **options)
    theirs = formula(x, weight, 1e-6)
    assert ours.dtype == theirs.dtype
    return theirs, ours, options


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parameters", NARROW, ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("n", [64, 1000, 20000])
def test_formulas_of_models(n, dtype, parameters, family, device):
    """The class's bits, but where x_hat, by an ulp of float32, rounds to the neighbour; of float32
    results that ulp is seen itself."""
    x, weight = torch.randn(8, n, device=device).to(dtype), torch.randn(n, device=device).to(parameters)
    theirs, ours, options = of_family(family, x, weight)
    rounded = {"input": dtype, "weight": parameters}.get(options.get("round_to"), torch.float32)
    differs = ours != theirs
    coarsest = max(torch.finfo(rounded).eps, torch.finfo(ours.dtype).eps)
    if coarsest > torch.finfo(torch.float32).eps:
        assert differs.double().mean() < 2e-3
    ulp = torch.finfo(rounded).eps + torch.finfo(ours.dtype).eps + 4 * torch.finfo(torch.float32).eps
    assert ((ours.double() - theirs.double()).abs() <= ulp * theirs.double().abs()).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parameters", NARROW, ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("n", [64, 20000], ids=["resident", "looped"])
def test_rounding_of_x_hat(n, dtype, parameters, family, device):
    """From the kernel's own x_hat, every bit is what the class makes of it."""
    x, weight = torch.randn(4, n, device=device).to(dtype), torch.randn(n, device=device).to(parameters)
    _, ours, options = of_family(family, x, weight)
    x_hat = tF.rms_norm_variant(x, (n,), dtype=torch.float32)
    if family == "gemma":
        expected = (x_hat * (1.0 + weight.float())).to(dtype)
    else:
        expected = weight * x_hat.to({"input": dtype, "weight": parameters}[options["round_to"]])
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parameters", NARROW, ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_without_a_kernel_it_is_the_formula(dtype, parameters, family, device, monkeypatch):
    """PyTorch's path: the class's operations, hence its bits."""
    monkeypatch.setattr(tF.rows, "takes_kernel", lambda *_: False)
    monkeypatch.delattr(launch, "row_forward")
    x, weight = torch.randn(8, 200, device=device).to(dtype), torch.randn(200, device=device)
    theirs, ours, _ = of_family(family, x, weight.to(parameters))
    assert torch.equal(ours, theirs)


def test_rounding_of_float64(device):
    """The one dtype in which it takes the formula."""
    x, weight = torch.randn(4, 64, device=device).double(), torch.randn(64, device=device).bfloat16()
    y = tF.rms_norm_variant(x, (64,), weight, EPS, round_to="weight")
    x_hat = tF.rms_norm_variant(x, (64,), eps=EPS)
    assert torch.equal(y, x_hat.to(weight.dtype) * weight.double())


def test_infinite_x_hat(device, monkeypatch):
    """A row whose squares vanish, without an eps: infinite in the formula as in the kernel."""
    x = torch.full((1, 8), 1e-30, device=device)
    weight = torch.ones(8, device=device).bfloat16()
    kernel = tF.rms_norm_variant(x, (8,), weight, 0.0, round_to="weight")
    monkeypatch.setattr(tF.rows, "takes_kernel", lambda *_: False)
    formula = tF.rms_norm_variant(x, (8,), weight, 0.0, round_to="weight")
    assert torch.equal(kernel, torch.full_like(x, torch.inf))
    assert torch.equal(formula, kernel)


def test_gradcheck_twice(device):
    x = torch.randn(3, 5, device=device, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, device=device, dtype=torch.float64, requires_grad=True)
    for function in (OFFSET.ours, variant(weight_offset=0.5, round_to="input").ours):
        inputs = (x, weight, None)
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize(
    "options", [{"round_to": "weight"}, {"round_to": "weight", "weight_offset": 1.0}]
)
def test_gradients_are_straight_through(options, device):
    """Those of the formula that does not round, bit for bit, and in the second derivative as well."""
    x = torch.randn(4, 64, device=device, requires_grad=True)
    weight = torch.randn(64, device=device).bfloat16().requires_grad_()
    offset = options.get("weight_offset", 0.0)

    def twice(**options):
        y = tF.rms_norm_variant(x, (64,), weight, EPS, **options)
        by_kernel = torch.autograd.grad(y, (x, weight), x.detach().cos(), retain_graph=True)
        by_formula = torch.autograd.grad(y, (x, weight), x.detach().cos(), create_graph=True)
        torch.testing.assert_close(by_kernel, by_formula)
        penalty = by_formula[0].pow(3).sum() + by_formula[1].pow(3).sum()
        return *by_kernel, *by_formula, *torch.autograd.grad(penalty, (x, weight))

    plain, straight = twice(weight_offset=offset), twice(**options)
    for expected, actual in zip(plain, straight, strict=True):
        assert torch.equal(actual, expected)


def call(x, weight):
    return tF.rms_norm_variant(x, (64,), weight, weight_offset=1.0, round_to="weight")


def test_transforms(device):
    """torch.func and forward-mode AD take the formula, whose derivatives do not round."""
    x, weight = torch.randn(4, 64, device=device), torch.randn(64, device=device).bfloat16()
    y = call(x, weight)
    torch.testing.assert_close(torch.vmap(call, (0, None))(x, weight), y)

    def smooth(t):
        return tF.rms_norm_variant(t, (64,), weight, weight_offset=1.0)

    for function in (
        torch.func.grad,
        lambda f: torch.func.grad(lambda t: torch.func.grad(f)(t).sin().sum()),
    ):
        ours, theirs = (
            function(lambda t, f=f: (f(t) * x).sum())(x) for f in (lambda t: call(t, weight), smooth)
        )
        torch.testing.assert_close(ours, theirs)
    value, tangent = torch.func.jvp(lambda t: call(t, weight), (x,), (x.sin(),))
    torch.testing.assert_close(value, y)
    torch.testing.assert_close(tangent, torch.func.jvp(smooth, (x,), (x.sin(),))[1])


def test_traces(device):
    x, weight = torch.randn(4, 64, device=device), torch.randn(64, device=device).bfloat16()
    y = call(x, weight)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), y)
    torch.testing.assert_close(torch.jit.trace(call, (x, weight))(x, weight), y)
    torch.testing.assert_close(torch.fx.symbolic_trace(call)(x, weight), y)
    assert call(x.to("meta"), weight.to("meta")).shape == x.shape


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)], ids=str)
def test_empty(shape, device):
    x = torch.randn(shape, device=device, requires_grad=True)
    weight = torch.randn(shape[1], device=device).half().requires_grad_()
    y = tF.rms_norm_variant(x, shape[1:], weight, weight_offset=1.0, round_to="weight", dtype=torch.half)
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert y.shape == dx.shape == shape
    assert torch.equal(dweight, torch.zeros_like(weight))


X, W = torch.ones(2, 8), torch.ones(8)
MISTAKES = {
    "another shape": (lambda f: f(X, (7,)), RuntimeError, "normalized_shape"),
    "weight of another shape": (lambda f: f(X, (8,), torch.ones(7)), RuntimeError, "weight"),
    "no eps": (lambda f: f(X, (8,), eps=None), TypeError, "eps"),
    "no offset": (lambda f: f(X, (8,), W, weight_offset="1"), TypeError, "weight_offset"),
    "an offset of nothing": (lambda f: f(X, (8,), weight_offset=1.0), ValueError, "weight_offset"),
    "a dtype to round to": (lambda f: f(X, (8,), W, round_to=torch.half), ValueError, "round_to"),
    "the dtype of nothing": (lambda f: f(X, (8,), round_to="weight"), ValueError, "round_to"),
    "dtype of another kind": (lambda f: f(X, (8,), dtype=torch.int32), TypeError, "dtype must"),
    "not a dtype": (lambda f: f(X, (8,), dtype="half"), TypeError, "dtype must"),
    "an input of ints": (lambda f: f(X.int(), (8,)), TypeError, "input"),
    "a weight of ints": (lambda f: f(X, (8,), W.int()), TypeError, "weight"),
    "too many arguments": (lambda f: f(X, (8,), W, 1e-6, 1.0), TypeError, "positional"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_errors_name_the_argument(mistake, monkeypatch):
    monkeypatch.delattr(launch, "row_forward")
    call, error, named = MISTAKES[mistake]
    with pytest.raises(error, match=named):
        call(tF.rms_norm_variant)
