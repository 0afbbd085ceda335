"""Which calls are prepared, for what tensors, and what takes the function's own way all the same."""

import subprocess
import sys

import pytest
import torch
from test_replay import CALLS, kept_calls, replayed, results, stats, tensors
from torch.fx.experimental.proxy_tensor import make_fx

import tritonnorm.functional as tF
from tritonnorm import calls
from tritonnorm.launch.common import forget_plans


def test_a_call_depends_on_all_that_its_function_looks_at(device, monkeypatch):
    """Arguments that differ from a prepared call's in one respect take the function's own way."""
    x, weight = torch.randn(4, 6, device=device), torch.randn(6, device=device)
    tF.layer_norm(x, (6,), weight)
    looked = []
    kernel = tF.rows.takes_kernel
    monkeypatch.setattr(tF.rows, "takes_kernel", lambda *t: looked.append(1) or kernel(*t))
    tF.layer_norm(x, (6,), weight)
    assert not looked
    others = [
        (x.double(), (6,), weight),
        (x[:2], (6,), weight),
        (torch.randn(6, 4, device=device).t(), (6,), weight),
        (x, (6,), weight.double()),
        (x, (6,), torch.randn(6, 2, device=device)[:, 0]),
        (x, (6,), None),
        (x, (6,), weight, weight),
        (x, (6,), weight, None, 1e-3),
        (x, (4, 6), torch.randn(4, 6, device=device)),
        (torch.randn(4, 6, dtype=torch.cfloat, device=device).conj().imag, (6,), weight),
        (x, (6,), torch.randn(6, dtype=torch.cfloat, device=device).conj().imag),
    ]
    for arguments in others:
        looked.clear()
        y = tF.layer_norm(*arguments)
        assert looked, arguments
        torch.testing.assert_close(
            y.double(),
            torch.nn.functional.layer_norm(
                *(a.double() if isinstance(a, torch.Tensor) else a for a in arguments)
            ),
            atol=1e-5,
            rtol=1e-5,
        )
    with pytest.raises(RuntimeError, match="weight must have shape"):
        tF.layer_norm(x, (6,), weight[:5])
    with pytest.raises(TypeError, match="eps must be a number"):
        tF.layer_norm(x, (6,), weight, eps="1e-5")
    with pytest.raises(ValueError, match="save must be"):
        tF.layer_norm(x, (6,), weight, save="nothing")


def test_prepared_calls_are_few(device, monkeypatch):
    """Of sizes that never come again no more than a number is kept."""
    monkeypatch.setattr(calls, "MOST_CALLS", 3)
    for m in range(1, 9):
        tF.rms_norm(torch.randn(m, 4, device=device), (4,))
        assert len(calls._calls) <= 3


def test_looks_are_few(device, monkeypatch):
    """Of one size that comes in ever other strides no more than a number is kept."""
    monkeypatch.setattr(calls, "MOST_LOOKS", 2)
    for step in range(1, 6):
        tF.rms_norm(torch.randn(3, 4 * step, device=device)[:, :4], (4,))
    (kept,) = calls._calls.values()
    assert len(kept) == 2


def test_one_tensor_as_weight_and_bias_is_not_kept(device):
    """It could not be told apart; the call takes its function's own way each time."""
    x, weight = torch.randn(3, 4, device=device), torch.randn(4, device=device)
    for _ in range(CALLS):
        y = tF.layer_norm(x, (4,), weight, weight)
        torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (4,), weight, weight))
    assert not calls._calls


def test_calls_are_right_where_none_is_kept(device, monkeypatch):
    """In a PyTorch that does not say what tensors look like."""
    monkeypatch.setattr(calls, "TensorGuards", None)
    leaves, dy = tensors("layer_norm", device)
    exact = torch.autograd.grad(torch.nn.functional.layer_norm(leaves[0], (6,), *leaves[1:]), leaves, dy)
    for _ in range(CALLS):
        for found, right in zip(results("layer_norm", leaves, dy)[1:], exact, strict=True):
            torch.testing.assert_close(found, right)
    assert not calls._calls


def test_calls_are_few_whatever_they_differ_in(device, monkeypatch):
    """Of several calls of one size each is counted."""
    monkeypatch.setattr(calls, "MOST_CALLS", 3)
    for m in range(1, 5):
        for step in (1, 2):
            tF.rms_norm(torch.randn(m, 4 * step, device=device)[:, :4], (4,))
            assert len(kept_calls()) <= 3


def test_parameters_are_inputs_too(device):
    """As of a classifier's weight; and their calls are recorded."""
    for norm in (lambda p: tF.normalize(p, dim=-1), lambda p: tF.layer_norm2d(p)):
        forget_plans()
        p = torch.nn.Parameter(torch.randn(2, 3, 4, 4, device=device))
        for _ in range(CALLS):
            torch.autograd.grad(norm(p).square().sum(), p)
        (call,) = kept_calls()
        assert replayed(call)


def test_a_graph_is_not_made_of_inference_tensors(device):
    """As PyTorch makes none in inference mode, whatever the gradient mode is."""
    x, weight = torch.randn(4, 6, device=device), torch.randn(6, device=device, requires_grad=True)
    with torch.inference_mode(), torch.enable_grad():
        for _ in range(CALLS):
            assert tF.layer_norm(x * 1, (6,), weight).grad_fn is None
    for _ in range(CALLS):
        tF.layer_norm(x, (6,), weight).sum().backward()


def test_imported_by_who_traces():
    """What calls are looked up by is made at import, by no mode and on no default device."""
    code = """
import torch
from torch._subclasses import FakeTensorMode
torch.set_default_device("meta")
with FakeTensorMode():
    import tritonnorm
assert tritonnorm.calls.WEIGHT.device.type == "cpu"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


class Agreeable:
    """Guards of another PyTorch, which take any tensor."""

    def __init__(self, *_, **__):
        pass

    def check(self, *_):
        return True


def test_guards_are_tried_before_they_are_trusted(monkeypatch):
    assert calls._guards_tell()
    for guards in (None, Agreeable, lambda *tensors: Agreeable()):
        monkeypatch.setattr(calls, "TensorGuards", guards)
        assert not calls._guards_tell()


def test_refused_statistics_are_refused_again(device):
    """What was prepared without statistics is not for one of them, nor for some that wait for a
    gradient."""
    x, (mean, var) = torch.randn(4, 3, 5, device=device), stats(torch.zeros(1, 3, device=device))
    for _ in range(CALLS):
        tF.batch_norm(x, None, None, training=True)
        tF.batch_norm(x, mean, var, training=True)
    for one in ((mean, None), (None, var)):
        with pytest.raises(ValueError, match="must both be given"):
            tF.batch_norm(x, *one, training=True)
    mean.requires_grad_()
    with torch.no_grad():
        for _ in range(CALLS):
            tF.batch_norm(x, mean, var)
    with pytest.raises(RuntimeError, match="running_mean cannot require a gradient"):
        tF.batch_norm(x, mean, var)


def test_a_tensor_that_has_left_its_transform(device):
    """torch.func wraps tensors; one that escapes is a tensor again."""
    escaped = []

    def keep(x):
        escaped.append(x * 1)
        return x.sum()

    x = torch.randn(4, 6, device=device)
    torch.func.grad(keep)(x)
    weight = torch.randn(6, device=device, requires_grad=True)
    for _ in range(CALLS):
        y = tF.layer_norm(escaped[0], (6,), weight)
        torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (6,), weight))
        y.sum().backward()


@pytest.mark.parametrize("training", [True, False])
def test_an_option_that_can_change_is_no_key(training, device):
    """A tensor as eps is looked at in every call, and none of them is kept."""
    x, running = torch.randn(4, 3, 5, device=device), stats(torch.zeros(1, 3, device=device))
    eps = torch.tensor(1e-5)
    for value in (1e-5, 1e-5, 1e-5, 1e-5, 10.0):
        eps.fill_(value)
        y = tF.batch_norm(x, *running, training=training, eps=eps)
        exact = torch.nn.functional.batch_norm(x, *stats(x), training=training, eps=value)
        torch.testing.assert_close(y, exact)
    assert not calls._calls


def test_equal_options_of_other_types_are_refused_again(device):
    """1 equals True, and 2.0 equals 2, but they are no bool and no int."""
    x, running = torch.randn(4, 6, 5, device=device), stats(torch.zeros(1, 6, device=device))
    for _ in range(CALLS):
        tF.batch_norm(x, *running, training=True)
        tF.group_norm(x, 2)
    with pytest.raises(TypeError, match="training must be a bool"):
        tF.batch_norm(x, *running, training=1)
    with pytest.raises(TypeError, match="num_groups must be an int"):
        tF.group_norm(x, 2.0)


def test_nested_tensors_take_torch(device):
    rows = torch.nested.nested_tensor([torch.randn(n, 6, device=device) for n in (2, 3)])
    weight, bias = torch.randn(2, 6, device=device)
    found = tF.layer_norm(rows, (6,), weight, bias).unbind()
    exact = torch.nn.functional.layer_norm(rows, (6,), weight, bias).unbind()
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b)


def test_traces_before_dispatch_see_the_operator(device):
    """Also of a call that was prepared."""
    x, weight = torch.randn(4, 6, device=device), torch.randn(6, device=device)
    for _ in range(CALLS):
        tF.layer_norm(x, (6,), weight)
    traced = make_fx(lambda x, w: tF.layer_norm(x, (6,), w), pre_dispatch=True)(x, weight)
    assert any("row_norm" in str(node.target) for node in traced.graph.nodes)
    torch.testing.assert_close(traced(x, weight), tF.layer_norm(x, (6,), weight))
