"""Calls that are made again from a recording give what the call that was recorded gives."""

import ctypes

import pytest
import torch
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor
from triton import knobs
from triton.runtime.jit import KernelInterface

import tritonnorm.functional as tF
from tritonnorm import calls, launch
from tritonnorm.formulas import RowOptions
from tritonnorm.launch import replay
from tritonnorm.launch.common import Kernel, forget_plans

ON_GPU = torch.cuda.is_available()
CALLS = 5  # more than it takes to record


def stats(x):
    return torch.zeros(x.shape[1], device=x.device), torch.ones(x.shape[1], device=x.device)


OPERATORS = {
    "layer_norm": (lambda x, w, b: tF.layer_norm(x, (6,), w, b), (3, 5, 6), (6,), (6,)),
    "layer_norm, 2 dimensions": (
        lambda x, w, b: tF.layer_norm(x, (5, 6), w, b),
        *((3, 5, 6), (5, 6), (5, 6)),
    ),
    "layer_norm2d": (tF.layer_norm2d, (2, 6, 3, 4), (6,), (6,)),
    "rms_norm": (lambda x, w: tF.rms_norm(x, (6,), w), (3, 5, 6), (6,)),
    "rms_norm_variant": (
        lambda x, w: tF.rms_norm_variant(x, (6,), w, weight_offset=1.0, round_to="input"),
        *((3, 5, 6), (6,)),
    ),
    "normalize": (lambda x: tF.normalize(x, dim=-1), (3, 5, 6)),
    "group_norm": (lambda x, w, b: tF.group_norm(x, 2, w, b), (2, 6, 3, 4), (6,), (6,)),
    "batch_norm": (
        lambda x, w, b: tF.batch_norm(x, *stats(x), w, b, training=True),
        *((2, 6, 3, 4), (6,), (6,)),
    ),
    "batch_norm, evaluation": (
        lambda x, w, b: tF.batch_norm(x, *stats(x), w, b),
        *((2, 6, 3, 4), (6,), (6,)),
    ),
    "instance_norm": (
        lambda x, w, b: tF.instance_norm(x, None, None, w, b),
        *((2, 6, 3, 4), (6,), (6,)),
    ),
    "weight_norm": (tF.weight_norm, (6, 3, 4), (6, 1, 1)),
    "weight_norm, in pieces": (lambda v, g: tF.weight_norm(v, g, dim=1), (6, 3, 4), (1, 3, 1)),
}


def tensors(name, device, dtype=torch.float32):
    """Leaves and a gradient, all aligned."""
    _, *shapes = OPERATORS[name]
    made = [torch.randn(shape, device=device, dtype=dtype) for shape in (*shapes, shapes[0])]
    return [t.requires_grad_() for t in made[:-1]], made[-1]


def results(name, leaves, dy):
    y = OPERATORS[name][0](*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def replayed(call):
    """Whether a prepared call is made from recordings, in training and backward."""
    assert call.with_statistics.run.__name__ == "replay"
    (made,) = call.backwards.made.values()
    ((_, backward),) = made
    return backward.run.__name__ == "replay"


def kept_calls():
    """The calls that are kept, in the order of their use."""
    return [compute.__self__ for kept in calls._calls.values() for _, compute, _ in reversed(kept)]


def from_address(address, like):
    """A tensor laid out as another one, at an address."""
    span = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True))
    memory = (ctypes.c_char * (span * like.element_size())).from_address(address)
    return torch.frombuffer(memory, dtype=like.dtype).as_strided(like.shape, like.stride())


def bind_interpreted(made):
    """Of a launch in the interpreter what `bind` is of one on a GPU: a function that takes pointers."""

    def run(x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        found = dict(zip(made.kernel.defaults, arguments, strict=True))
        for name, recorded in made.arguments.items():
            if isinstance(recorded, torch.Tensor):
                assert isinstance(found[name], int)
                found[name] = from_address(found[name], recorded)
        options = {n: v for n, v in made.arguments.items() if n not in found}
        made.kernel[(x, y, z)](**found, **options)

    return run, (*made.grid, 1, 1)[:3], (None,) * 5


@pytest.mark.parametrize("form", ["tensors", "pointers"])
@pytest.mark.parametrize("name", OPERATORS)
def test_replays_have_the_bits_of_calls(name, form, device, monkeypatch):
    """Forward and backward, each time on other tensors; in the interpreter with tensors, as it takes
    them, and with pointers, as a GPU does."""
    if form == "pointers" and not ON_GPU:
        monkeypatch.setattr(replay, "bind", bind_interpreted)
    given = [tensors(name, device) for _ in range(CALLS)]
    expected = []
    for leaves, dy in given:
        forget_plans()
        expected.append(results(name, leaves, dy))
    forget_plans()
    for (leaves, dy), exact in zip(given, expected, strict=True):
        for found, right in zip(results(name, leaves, dy), exact, strict=True):
            assert found.stride() == right.stride()
            assert torch.equal(found, right)
    (call,) = kept_calls()
    assert replayed(call)
    with torch.no_grad():
        for leaves, _ in given:
            y = OPERATORS[name][0](*leaves)
    assert torch.equal(y, expected[-1][0])
    assert call.without_statistics.run.__name__ == "replay"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype, device):
    """Partial results, statistics and gradients of several dtypes."""
    x, dy = torch.randn(2, 4, 6, device=device, dtype=dtype).unbind()
    x, dy = x.clone(), dy.clone()
    weight = torch.randn(6, device=device, requires_grad=True)
    bias = torch.randn(6, device=device, dtype=dtype, requires_grad=True)
    x.requires_grad_()
    found = []
    for _ in range(CALLS):
        y = tF.layer_norm(x, (6,), weight, bias)
        found.append((y, *torch.autograd.grad(y, (x, weight, bias), dy)))
    for again in found:
        for a, b in zip(again, found[0], strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def test_running_statistics_move_at_every_call(device):
    """And autograd knows, as of any change in place."""
    running = torch.zeros(3, device=device), torch.ones(3, device=device)
    expected = [t.clone() for t in running]
    for i in range(CALLS):
        x = torch.randn(4, 3, 5, device=device)
        versions = [t._version for t in running]
        tF.batch_norm(x, *running, training=True)
        torch.nn.functional.batch_norm(x, *expected, training=True)
        torch.testing.assert_close(running, tuple(expected))
        assert all(t._version == v + 1 for t, v in zip(running, versions, strict=True)), i


def test_misaligned_tensors_take_the_function(device):
    """The recorded kernels were chosen for tensors that start at a multiple of 16 elements."""
    buffer = torch.randn(4 * 16 + 1, device=device)
    aligned, misaligned = buffer[:-1].view(4, 16), buffer[1:].view(4, 16)
    for _ in range(CALLS):
        tF.rms_norm(aligned, (16,))
    found = tF.rms_norm(misaligned, (16,))
    forget_plans()
    assert torch.equal(found, tF.rms_norm(misaligned, (16,)))


def row_backward(dy, x, statistics):
    return launch.row_backward(
        *(dy, x, None, statistics, 1, RowOptions("rms", 1e-6)),
        memory_format=torch.contiguous_format,
        needs_dx=True,
        dweight_dtype=None,
        dbias_dtype=None,
    )


def test_one_tensor_in_two_places_is_not_recorded(device):
    """Of a recording with x for dy it would not be known which of them is which."""
    x, statistics = torch.randn(4, 16, device=device), torch.ones(4, device=device)
    recorded = replay.Recorded(row_backward)
    for _ in range(CALLS):
        recorded.run(x, x, statistics)
    assert recorded.run.__name__ == "run"


def test_what_computes_more_is_not_recorded(device):
    """PyTorch's operators are not repeated."""
    dy, x = torch.randn(2, 4, 16, device=device)
    given = dy.clone(), x.clone(), torch.ones(4, device=device)
    alone, more = replay.Recorded(row_backward), replay.Recorded(lambda *t: (row_backward(*t)[0] * 2,))
    for _ in range(CALLS):
        assert torch.equal(more.run(*given)[0], alone.run(*given)[0] * 2)
    assert alone.run.__name__ == "replay"
    assert more.run.__name__ == "run"


def test_a_profiler_sees_every_launch(device):
    """While Triton has a hook, launches go through Triton."""
    x = torch.randn(4, 16, device=device)
    for _ in range(CALLS):
        tF.rms_norm(x, (16,))
    (call,) = kept_calls()
    assert call.without_statistics.run.__name__ == "replay"
    called, function = [], call.without_statistics.function
    call.without_statistics.run.__globals__["function"] = lambda *t: called.append(1) or function(*t)

    def hook(*_):
        pass

    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(hook)
        try:
            tF.rms_norm(x, (16,))
        finally:
            chain.remove(hook)
    tF.rms_norm(x, (16,))
    assert len(called) == 2


def test_every_kernel_can_be_recorded():
    """A launch that a recording does not notice would be missing from it."""
    modules = (launch.rows, launch.channels, launch.pieces, launch.weights, launch.common)
    for module in modules:
        for name, value in vars(module).items():
            assert not isinstance(value, KernelInterface), f"{module.__name__}.{name} is no Kernel"
    assert len(Kernel.every) > 10


def test_a_bias_may_change_before_the_backward_pass(device):
    """No gradient depends on it, and it is not kept."""
    x = torch.randn(2, 3, 4, device=device, requires_grad=True)
    for norm, size in ((lambda b: tF.layer_norm(x, (4,), None, b), 4), (lambda b: group(x, b), 3)):
        bias = torch.randn(size, device=device, requires_grad=True)
        y = norm(bias)
        with torch.no_grad():
            bias.add_(1)
        dx, dbias = torch.autograd.grad(y.square().sum(), (x, bias), create_graph=True)
        again = torch.autograd.grad(dx.square().sum() + dbias.square().sum(), x)
        assert all(t.isfinite().all() for t in (dx, dbias, *again))


def group(x, bias):
    return tF.group_norm(x, 3, None, bias)


@pytest.mark.parametrize("unpack", [torch.Tensor.bfloat16, lambda t: torch.stack((t, t), -1)[..., 0]])
def test_what_was_saved_may_come_back_otherwise(unpack, device, monkeypatch):
    """Of another dtype, or with other strides: the recorded launches are for neither."""
    if not ON_GPU:
        monkeypatch.setattr(replay, "bind", bind_interpreted)

    def gradients(x, weight):
        return torch.autograd.grad(tF.layer_norm(x, (6,), weight).square().sum(), (x, weight))

    x, weight = torch.randn(4, 6, device=device), torch.randn(6, device=device)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        expected = gradients(x, weight)
    forget_plans()
    for _ in range(CALLS):
        gradients(x, weight)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        found = gradients(x, weight)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_gradient_with_a_tangent_takes_the_formula(device):
    x = torch.randn(4, 6, device=device, requires_grad=True)
    for _ in range(CALLS):
        y = tF.layer_norm(x, (6,))
        with forward_ad.dual_level():
            dy = forward_ad.make_dual(torch.ones_like(y), torch.randn_like(y))
            (dx,) = torch.autograd.grad(y, x, dy)
            tangent = forward_ad.unpack_dual(dx).tangent
        assert tangent is not None
        assert tangent.abs().max() > 0


def test_a_gradient_of_a_subclass_takes_the_formula(device):
    """Here one of two tensors, which has no memory of its own."""
    x = torch.randn(4, 6, device=device, requires_grad=True)
    for _ in range(CALLS):
        y = tF.layer_norm(x, (6,))
        dy = torch.randn(4, 6, device=device)
        (exact,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        (dx,) = torch.autograd.grad(y, x, TwoTensor(dy, dy))
        torch.testing.assert_close(dx.a if isinstance(dx, TwoTensor) else dx, exact)
