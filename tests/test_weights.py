"""Weight normalization against the float64 reference: one tensor, and many at once."""

import pytest
import reference
import torch
from cases import DTYPES
from tolerances import assert_close, assert_no_worse_than, wide

import tritonnorm.functional as tF
from tritonnorm.heuristics import channels as channel_choices
from tritonnorm.heuristics import weights as weight_choices

SHAPES = (
    ((5,), "a vector"),
    ((6, 7), "rows and columns that are no multiple of 16 bytes"),
    ((37, 64), "rows of a multiple of 16 bytes, and a last tile that is not full"),
    ((3, 9000), "rows too long for the backward pass, and columns of three elements"),
    ((8, 1), "rows of one element"),
    ((1, 9, 1), "one channel, or nine of one element"),
    ((128, 64, 3), "the weight of a one-dimensional convolution"),
    ((4, 6, 3, 5), "of a two-dimensional one"),
    ((2, 3, 4, 2, 3), "of a three-dimensional one"),
)
CASES = [
    pytest.param(shape, dim, id=f"{'x'.join(map(str, shape))}-{dim}")
    for shape, _ in SHAPES
    for dim in (None, *range(len(shape)))
]
TYPICAL = [
    pytest.param((37, 64), 0, id="resident"),
    pytest.param((40, 72), 1, id="in pieces of adjacent channels"),
    pytest.param((20, 6, 8), 1, id="in pieces of adjacent positions"),
    pytest.param((33, 50), None, id="the whole tensor"),
]


def others(shape, dim):
    """The dimensions that the norms are over."""
    return [d for d in range(len(shape)) if dim is None or d != dim]


def gain_shape(shape, dim):
    return () if dim is None else tuple(s if d == dim else 1 for d, s in enumerate(shape))


def exact(v, g, dim):
    """The float64 result, from the definition."""
    v = v.double()
    over = others(v.shape, dim)
    norm = v.square().sum(over, keepdim=True).sqrt() if over else v.abs()
    return g.double() * v / norm


def inputs(shape, dim, dtype, device, gain_dtype=None):
    v = torch.randn(shape, dtype=dtype, device=device)
    g = torch.randn(gain_shape(shape, dim), dtype=gain_dtype or dtype, device=device) + 1
    return v, g, torch.randn_like(v)


def run(v, g, dw, dim):
    """Our w, dv and dg."""
    leaves = [t.detach().requires_grad_() for t in (v, g)]
    w = tF.weight_norm(*leaves, dim)
    return w.detach(), *torch.autograd.grad(w, leaves, dw)


def compare(v, g, dw, dim):
    w, dv, dg = run(v, g, dw, dim)
    exact_w, (exact_dv, exact_dg) = reference.gradients(lambda *t: exact(*t, dim), (v, g), dw)
    terms = v.numel() // max(g.numel(), 1)
    wv = v.double()
    over = others(v.shape, dim)
    norm = wv.square().sum(over, keepdim=True).sqrt() if over else wv.abs()
    assert w.dtype == v.dtype
    assert dv.dtype == v.dtype
    assert dg.dtype == g.dtype
    assert dg.shape == g.shape
    largest = dw.double().abs().amax(over, keepdim=True) if over else dw.double().abs()
    assert_close(w, exact_w, terms=terms, what="w")
    # dv cancels where a channel has few elements: no more exact than what is subtracted
    assert_close(
        dv, exact_dv, terms=terms, scale=g.double().abs() * largest * terms**0.5 / norm, what="dv"
    )
    scale = (largest * terms**0.5).amax().item()
    assert_close(dg, exact_dg, terms=terms, scale=scale, wide_dtype=wide(v.dtype), what="dg")


@pytest.mark.parametrize(("shape", "dim"), CASES)
def test_forward_and_backward(shape, dim, device):
    compare(*inputs(shape, dim, torch.float32, device), dim)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float32], ids=str)
@pytest.mark.parametrize(("shape", "dim"), TYPICAL)
def test_dtypes(shape, dim, dtype, device):
    compare(*inputs(shape, dim, dtype, device), dim)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float32, torch.float64),
        (torch.float64, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize(("shape", "dim"), TYPICAL)
def test_mixed_dtypes(shape, dim, dtypes, device):
    compare(*inputs(shape, dim, dtypes[0], device, dtypes[1]), dim)


@pytest.mark.parametrize(("shape", "dim"), TYPICAL)
def test_no_worse_than_torch(shape, dim, device):
    v, g, dw = inputs(shape, dim, torch.float32, device)
    ours = run(v, g, dw, dim)
    leaves = [t.detach().requires_grad_() for t in (v, g)]
    their_w = torch._weight_norm(*leaves, -1 if dim is None else dim)
    theirs = their_w, *torch.autograd.grad(their_w, leaves, dw)
    exact_w, expected = reference.gradients(lambda *t: exact(*t, dim), (v, g), dw)
    for what, a, b, e in zip(("w", "dv", "dg"), ours, theirs, (exact_w, *expected), strict=True):
        assert_no_worse_than(b.detach(), a, e, what=what)


@pytest.mark.parametrize(("shape", "dim"), TYPICAL)
def test_several_steps(shape, dim, device, monkeypatch):
    """Pieces of several steps and folds of several, as those of larger tensors."""
    for elements in (
        channel_choices.CHANNEL_FORWARD_ELEMENTS,
        channel_choices.CHANNEL_BACKWARD_ELEMENTS,
    ):
        monkeypatch.setitem(elements, 4, 1)
    monkeypatch.setattr(channel_choices, "PIECE_ELEMENTS", 192)
    monkeypatch.setitem(weight_choices.WEIGHT_FOLD, 4, 4)
    for resident in (
        weight_choices.WEIGHT_FORWARD_RESIDENT,
        weight_choices.WEIGHT_BACKWARD_RESIDENT,
    ):
        monkeypatch.setitem(resident, 4, 16)
    compare(*inputs(shape, dim, torch.float32, device), dim)


@pytest.mark.parametrize("dim", [None, 0, 1, 2, 3])
def test_any_order_in_memory(dim, device):
    """Dense tensors are read where they lie and written alike; a gradient of another order fits too."""
    v, g, dw = inputs((4, 6, 3, 5), dim, torch.float32, device)
    w, dv, dg = run(v, g, dw, dim)
    for order in ((0, 2, 3, 1), (3, 1, 0, 2)):
        there = sorted(range(4), key=order.__getitem__)
        permuted = v.permute(order).contiguous().permute(there)
        results = run(permuted, g, dw, dim)
        assert results[0].stride() == permuted.stride()
        torch.testing.assert_close(results, (w, dv, dg))


def test_tensors_with_gaps(device):
    v, g, dw = inputs((6, 40), 0, torch.float32, device)
    gaps = torch.randn(6, 80, device=device)
    gaps[:, ::2] = v
    torch.testing.assert_close(run(gaps[:, ::2], g, dw, 0), run(v, g, dw, 0))
    expanded = v[:1].expand(6, 40)
    torch.testing.assert_close(run(expanded, g, dw, 0), run(expanded.contiguous(), g, dw, 0))
    ones = torch.ones((), device=device).expand(6, 40)
    torch.testing.assert_close(run(v, g, ones, 0), run(v, g, ones.contiguous(), 0))


@pytest.mark.parametrize("offset", [1, 4])
@pytest.mark.parametrize("dim", [0, 1])
def test_misaligned(offset, dim, device):
    v, g, dw = inputs((8, 64), dim, torch.float32, device)
    shifted = torch.empty(8 * 64 + offset, device=device)[offset:].view(8, 64).copy_(v)
    torch.testing.assert_close(run(shifted, g, dw, dim), run(v, g, dw, dim))


def test_gains_with_gaps(device):
    v, g, dw = inputs((6, 8), 0, torch.float32, device)
    apart = torch.stack([g, -g], 1)[:, 0]
    assert not apart.is_contiguous()
    torch.testing.assert_close(run(v, apart, dw, 0), run(v, g, dw, 0))


@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_special_values(value, dim, device):
    """A norm of zero, NaN and infinity give what they give in PyTorch, in their channel alone."""
    v, g, dw = inputs((4, 6), dim, torch.float32, device)
    if value == 0:
        (v if dim is None else v.select(dim, 1)).zero_()
    else:
        v[1, 1] = value
    leaves = [t.clone().requires_grad_() for t in (v, g)]
    w = torch._weight_norm(*leaves, -1 if dim is None else dim)
    theirs = (w, *torch.autograd.grad(w, leaves, dw))
    torch.testing.assert_close(run(v, g, dw, dim), theirs, equal_nan=True)


def test_zero_vectors_do_not_warn(device, recwarn):
    v = torch.zeros(3, 5, device=device)
    assert run(v, torch.ones(3, 1, device=device), torch.ones_like(v), 0)[0].isnan().all()
    assert not recwarn.list


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_empty(dim, device):
    for shape in ((0, 3), (3, 0)):
        v, g, dw = inputs(shape, dim, torch.float32, device)
        w, dv, dg = run(v, g, dw, dim)
        assert w.shape == dv.shape == shape
        assert dg.shape == g.shape
        assert dg.isnan().all()  # 0 / 0, as with PyTorch


def test_minus_one_is_the_whole_tensor(device):
    v, g, _ = inputs((4, 6), None, torch.float32, device)
    assert torch.equal(tF.weight_norm(v, g, -1), tF.weight_norm(v, g, None))
    torch.testing.assert_close(tF.weight_norm(v, g, -1), torch._weight_norm(v, g, -1))
    v, g, _ = inputs((4, 6), 0, torch.float32, device)
    assert torch.equal(tF.weight_norm(v, g, -2), tF.weight_norm(v, g, 0))
    assert tF.weight_norm(v, g.new_ones(1, 1), None).shape == v.shape


@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize(("shape", "dim"), TYPICAL)
def test_only_the_needed_gradients(shape, dim, needed, device):
    v, g, dw = inputs(shape, dim, torch.float32, device)
    w, dv, dg = run(v, g, dw, dim)
    leaves = [t.clone().requires_grad_(need) for t, need in zip((v, g), needed, strict=True)]
    y = tF.weight_norm(*leaves, dim)
    assert torch.equal(y, w)
    assert y.requires_grad == any(needed)
    if any(needed):
        y.backward(dw)
    for leaf, need, expected in zip(leaves, needed, (dv, dg), strict=True):
        assert (leaf.grad is not None) == need
        if need:
            assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize(("shape", "dim"), TYPICAL)
def test_same_bits_again(shape, dim, device):
    arguments = inputs(shape, dim, torch.bfloat16, device)
    for first, second in zip(run(*arguments, dim), run(*arguments, dim), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(("shape", "dim"), TYPICAL)
def test_inputs_are_not_written(shape, dim, device):
    arguments = inputs(shape, dim, torch.float32, device)
    before = [t.clone() for t in arguments]
    run(*arguments, dim)
    for t, b in zip(arguments, before, strict=True):
        assert torch.equal(t, b)


GRADCHECKED = [
    pytest.param(shape, dim, id=f"{len(shape)}-d, {dim}")
    for shape in ((3,), (3, 4), (3, 2, 2), (2, 1, 3, 2), (2, 1, 2, 1, 2))
    for dim in (None, *range(len(shape)))
]


@pytest.mark.parametrize(("shape", "dim"), GRADCHECKED)
def test_gradcheck_twice(shape, dim, device):
    v, g, _ = inputs(shape, dim, torch.float64, device)
    leaves = (v.requires_grad_(), g.requires_grad_())
    assert torch.autograd.gradcheck(lambda v, g: tF.weight_norm(v, g, dim), leaves)
    assert torch.autograd.gradgradcheck(lambda v, g: tF.weight_norm(v, g, dim), leaves, fast_mode=True)


F32, BF16 = torch.float32, torch.bfloat16
STACK = [
    *((s, F32, F32) for s in ((64, 96), (10, 30, 40), (33, 16, 3, 3), (2, 9000), (3, 17000))),
    *((s, F32, F32) for s in ((5, 7), (6, 7), (0, 3))),
    ((20, 64), BF16, F32),
    ((24, 72), BF16, BF16),
]
"""Tensors that differ in dtype, in the gain's dtype, in whether a channel is a multiple of 16 bytes, and
in how they are held; one has no elements."""


@pytest.mark.parametrize("dim", [0, 1, None])
def test_many_at_once(dim, device):
    """The bits that each tensor has alone, forward and backward."""
    vs, gs, dws = [], [], []
    for shape, dtype, gain_dtype in STACK:
        v, g, dw = inputs(shape, dim, dtype, device, gain_dtype)
        vs.append(v.requires_grad_()), gs.append(g.requires_grad_()), dws.append(dw)
    ws = tF.weight_norms(vs, gs, dim)
    alone = [tF.weight_norm(v, g, dim) for v, g in zip(vs, gs, strict=True)]
    exactly = dict(rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(ws, alone, **exactly)
    together = torch.autograd.grad(ws, [*vs, *gs], dws)
    torch.testing.assert_close(together, torch.autograd.grad(alone, [*vs, *gs], dws), **exactly)


def test_batched_gradients(device):
    """Of some results, while others take the kernel."""
    vs, gs, dws = zip(*(inputs((6, 8), 0, torch.float32, device) for _ in range(2)), strict=True)
    leaves = [t.requires_grad_() for t in vs]
    ws = tF.weight_norms(leaves, gs)
    batch = [torch.stack([dw, 2 * dw]) for dw in dws]
    found = torch.autograd.grad(ws, leaves, batch, is_grads_batched=True)
    for dv, v, g, dw in zip(found, vs, gs, dws, strict=True):
        expected = run(v, g, dw, 0)[1]
        torch.testing.assert_close(dv, torch.stack([expected, 2 * expected]))


def test_a_dimension_each(device):
    shapes, dims = [(6, 8), (6, 8), (4, 3, 5)], [0, 1, None]
    pairs = [inputs(s, d, torch.float32, device)[:2] for s, d in zip(shapes, dims, strict=True)]
    vs, gs = zip(*pairs, strict=True)
    for w, v, g, dim in zip(tF.weight_norms(vs, gs, dims), vs, gs, dims, strict=True):
        assert torch.equal(w, tF.weight_norm(v, g, dim))
    assert dims == [0, 1, None]
    assert tF.weight_norms([], []) == []


def test_one_launch(device):
    """60 layers take one launch forward and one backward."""
    from perf.launches import observe

    launched = []

    def count(kernel, grid, arguments):
        launched.append(kernel.__name__)
        kernel[grid](**arguments)

    sizes = [(16, 4 * k, 3) for k in range(4, 64)]
    vs, gs, _ = zip(*(inputs(s, 0, torch.float32, device) for s in sizes), strict=True)
    leaves = [t.requires_grad_() for t in (*vs, *gs)]
    with observe(count):
        ws = tF.weight_norms(vs, gs)
        torch.autograd.grad([w.sum() for w in ws], leaves)
    assert launched == ["weight_forward", "weight_backward"]


def test_unused_results(device):
    """Only what is used has a gradient."""
    vs, gs, dws = zip(*(inputs((6, 8), 0, torch.float32, device) for _ in range(3)), strict=True)
    leaves = [t.requires_grad_() for t in (*vs, *gs)]
    ws = tF.weight_norms(vs, gs)
    found = torch.autograd.grad(ws[1], leaves, dws[1], allow_unused=True)
    assert [f is None for f in found] == [True, False, True] * 2
    for f, expected in zip((found[1], found[4]), run(vs[1], gs[1], dws[1], 0)[1:], strict=True):
        assert torch.equal(f, expected)


def test_some_frozen(device):
    vs, gs, dws = zip(*(inputs((6, 8), 0, torch.float32, device) for _ in range(4)), strict=True)
    for i, (v, g) in enumerate(zip(vs, gs, strict=True)):
        v.requires_grad_(i in (0, 1)), g.requires_grad_(i in (1, 2))
    ws = tF.weight_norms(vs, gs)
    assert [w.requires_grad for w in ws] == [True, True, True, False]
    torch.autograd.backward(ws[:3], dws[:3])
    for i, (v, g, dw) in enumerate(zip(vs, gs, dws, strict=True)):
        expected = run(v, g, dw, 0)[1:]
        for leaf, gradient, needed in zip((v, g), expected, (i in (0, 1), i in (1, 2)), strict=True):
            assert (leaf.grad is not None) == needed
            if needed:
                assert torch.equal(leaf.grad, gradient)


def test_gradgradcheck_of_many(device):
    vs, gs, _ = zip(*(inputs(s, 0, torch.float64, device) for s in ((2, 3), (3, 2, 2))), strict=True)
    leaves = [t.requires_grad_() for t in (*vs, *gs)]

    def function(*tensors):
        return tuple(tF.weight_norms(tensors[:2], tensors[2:]))

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_an_input_changed_between_the_passes_is_noticed(device):
    v, g, dw = inputs((6, 8), 0, torch.float32, device)
    v.requires_grad_()
    w = tF.weight_norm(v * 1, g, 0)
    with torch.no_grad():
        g.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        w.backward(dw)


V, G = torch.randn(4, 3), torch.randn(4, 1)
MISTAKES = [
    (lambda: tF.weight_norm(V, G, 2), IndexError, "dim=2"),
    (lambda: tF.weight_norm(V, G, -3), IndexError, "dim=-3"),
    (lambda: tF.weight_norm(V, G, "0"), TypeError, "dim"),
    (lambda: tF.weight_norm(V, G, 1), RuntimeError, r"g must have shape \[1, 3\]"),
    (lambda: tF.weight_norm(V, G[:, 0]), RuntimeError, "g must have shape"),
    (lambda: tF.weight_norm(V, G, None), RuntimeError, "g must have one element"),
    (lambda: tF.weight_norm(V, G.to("meta")), RuntimeError, "g is on meta, but v is on cpu"),
    (lambda: tF.weight_norm(None, G), TypeError, "v must be a tensor"),
    (lambda: tF.weight_norm(torch.ones(()), torch.ones(()), 0), IndexError, "dim=0"),
    (lambda: tF.weight_norms([V, V], [G]), ValueError, "vs has 2 tensors, gs 1"),
    (lambda: tF.weight_norms([V], [G], [0, 1]), ValueError, "2 dimensions"),
    (lambda: tF.weight_norms([V, V], [G, G[:2]]), RuntimeError, r"gs\[1\] must have shape"),
    (lambda: tF.weight_norms([V, V[0]], [G, G], [0, 1]), IndexError, r"vs\[1\] of shape"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m[2])
def test_errors_name_the_argument(mistake, no_kernel):
    call, error, message = mistake
    with pytest.raises(error, match=message):
        call()


def test_what_no_kernel_takes(no_kernel, device):
    """Other dtypes, tensors of a trace and of torch.func go to PyTorch."""
    v, g, _ = inputs((4, 3), 0, torch.float32, device)
    expected = torch._weight_norm(v, g, 0)
    jacobian = torch.func.jacrev(lambda v: tF.weight_norm(v, g, 0).sum(1))(v)
    torch.testing.assert_close(
        jacobian, torch.func.jacrev(lambda v: (g * v / v.norm(dim=1, keepdim=True)).sum(1))(v)
    )
    batched = torch.func.vmap(lambda v: tF.weight_norm(v, g, 0))(v.expand(2, 4, 3))
    torch.testing.assert_close(batched, expected.expand(2, 4, 3))
    meta = tF.weight_norm(v.to("meta"), g.to("meta"))
    assert meta.shape == v.shape
    whole = torch.randn((), dtype=torch.complex64)
    v = torch.randn(4, 3, dtype=torch.complex64)
    torch.testing.assert_close(tF.weight_norm(v, whole, None), v * whole / v.norm())
    with pytest.raises(RuntimeError):
        tF.weight_norm(torch.ones(4, 3, dtype=torch.int32), torch.ones(4, 1, dtype=torch.int32))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [0, None])
def test_offsets_beyond_int32(dim):
    v = torch.zeros(2**17, 2**14 + 8, dtype=torch.bfloat16, device="cuda")
    v[-1] = 1
    g = torch.ones(gain_shape(v.shape, dim), dtype=torch.bfloat16, device="cuda")
    last = tF.weight_norm(v, g, dim)[-1]
    torch.testing.assert_close(last, torch.full_like(last, (2**14 + 8) ** -0.5))


@pytest.mark.gpu
def test_many_in_a_graph():
    """A captured launch of many reads its table again at every replay."""
    vs, gs, dws = zip(*(inputs((64, 96), 0, torch.float32, "cuda") for _ in range(3)), strict=True)
    tF.weight_norms(vs, gs)
    torch.cuda.synchronize()
    leaves = [v.requires_grad_() for v in vs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ws = tF.weight_norms(vs, gs)
        dvs = torch.autograd.grad(ws, leaves, dws)
    with torch.no_grad():
        for v in vs:
            v.normal_()
    graph.replay()
    for w, dv, v, g, dw in zip(ws, dvs, vs, gs, dws, strict=True):
        torch.testing.assert_close(w, exact(v, g, 0).float())
        torch.testing.assert_close(dv, run(v, g, dw, 0)[1])


@pytest.mark.gpu
def test_a_default_device():
    """The table of a launch is made in host memory, whatever the default."""
    vs, gs, _ = zip(*(inputs((6, 8), 0, torch.float32, "cuda") for _ in range(2)), strict=True)
    with torch.device("cuda"):
        ws = tF.weight_norms(vs, gs)
    for w, v, g in zip(ws, vs, gs, strict=True):
        assert torch.equal(w, tF.weight_norm(v, g))
