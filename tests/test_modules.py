"""Modules and `convert`: drop-ins for torch.nn."""

import copy
import pickle

import pytest
import torch
from torch import nn

import tritonnorm as tn

PAIRS = [(tn.LayerNorm, nn.LayerNorm), (tn.RMSNorm, nn.RMSNorm)]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("options", [{}, {"elementwise_affine": False}, {"eps": 1e-3}], ids=str)
def test_like_torch(ours, theirs, options, device):
    """Same construction, state_dict, repr and results, forward and backward."""
    module, original = ours((3, 8), device=device, **options), theirs((3, 8), device=device, **options)
    assert repr(module) == repr(original)
    assert list(module.state_dict()) == list(original.state_dict())
    with torch.no_grad():
        for p in original.parameters():
            p.normal_()
    module.load_state_dict(original.state_dict())
    x = torch.randn(2, 3, 8, device=device, requires_grad=True)
    dy = torch.randn_like(x)
    results = []
    for m in (module, original):
        y = m(x)
        results.append((y, *torch.autograd.grad(y, [x, *m.parameters()], dy)))
    torch.testing.assert_close(*results)


def test_layer_norm_without_bias(device):
    assert set(tn.LayerNorm(8, bias=False).state_dict()) == {"weight"}
    module = tn.LayerNorm(8, bias=False, device=device)
    x = torch.randn(2, 8, device=device)
    torch.testing.assert_close(module(x), nn.functional.layer_norm(x, (8,)))


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_copies(ours, theirs, device):
    module = ours(8, device=device)
    x = torch.randn(2, 8, device=device)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is ours
        assert torch.equal(twin(x), module(x))


class Doubled(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnNorm(nn.Module):
    def forward(self, x):
        return x / x.abs().amax()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.LayerNorm(8)
        self.again = self.first
        self.rms = nn.RMSNorm(8)
        self.doubled = Doubled(8)
        self.own = OwnNorm()
        self.ours = tn.RMSNorm(8)
        self.batch = nn.BatchNorm1d(8)
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        x = self.linear(self.again(self.first(x)))
        return self.batch(self.own(self.ours(self.doubled(self.rms(x)))))


def test_convert(device):
    model = Block().to(device)
    original = copy.deepcopy(model)
    parameters = list(model.named_parameters())
    report = tn.convert(model)

    assert [e.name for e in report.replaced] == ["first", "rms", "batch"]
    assert type(model.first) is tn.LayerNorm
    assert model.again is model.first
    assert type(model.rms) is tn.RMSNorm
    assert type(model.doubled) is Doubled
    left = {e.name: e.reason for e in report.left}
    assert set(left) == {"doubled", "own", "ours"}
    assert all(left.values())
    assert "subclass" in left["doubled"]
    assert "first" in str(report)
    assert left["doubled"] in str(report)

    for (name, before), (name_now, now) in zip(parameters, model.named_parameters(), strict=True):
        assert name == name_now
        assert before is now
    assert list(model.state_dict()) == list(original.state_dict())

    x = torch.randn(4, 8, device=device)
    ours, theirs = model(x), original(x)
    torch.testing.assert_close(ours, theirs)
    dy = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, list(model.parameters()), dy),
        torch.autograd.grad(theirs, list(original.parameters()), dy),
        rtol=1e-4,
        atol=1e-4,
    )


def test_convert_again_changes_nothing():
    model = nn.Sequential(nn.LayerNorm(8))
    tn.convert(model)
    report = tn.convert(model)
    assert not report.replaced
    assert [e.reason for e in report.left] == ["already of tritonnorm"]


def test_convert_the_model_itself(device):
    model = nn.LayerNorm(8, device=device)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    report = tn.convert(model)
    assert type(model) is tn.LayerNorm
    assert "(the model)" in str(report)
    model(torch.randn(2, 8, device=device))
    assert calls == [1]


def test_convert_leaves_parametrized_modules():
    """Their class is one of its own, made by torch.nn.utils.parametrize."""
    model = nn.Sequential(nn.LayerNorm(8))
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
    report = tn.convert(model)
    assert not report.replaced
    assert "subclass" in report.left[0].reason


def test_convert_leaves_a_forward_of_the_instance():
    """As accelerate's hooks set it: the class's forward would never be called."""
    model = nn.Sequential(nn.LayerNorm(8))
    model[0].forward = model[0].forward
    report = tn.convert(model)
    assert not report.replaced
    assert "instance" in report.left[0].reason
    assert type(model[0]) is nn.LayerNorm


def test_convert_wants_a_module():
    with pytest.raises(TypeError, match="model"):
        tn.convert([nn.LayerNorm(8)])


def test_transformer_layer(device):
    """PyTorch's own encoder layer, converted, in training and in evaluation with its fast path."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, device=device)
    twin = copy.deepcopy(layer)
    assert len(tn.convert(twin).replaced) == 2
    x = torch.randn(2, 5, 16, device=device)
    torch.testing.assert_close(twin(x), layer(x), rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(twin.eval()(x), layer.eval()(x), rtol=1e-5, atol=1e-5)
