"""Weight normalization of modules, their conversion, and whole models at once."""

import copy
import threading
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint
from training import assert_trained_alike, losses

import tritonnorm as tn
from perf.launches import observe


def old_style(module, name="weight", dim=0):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module, name, dim)


LAYERS = [
    lambda: nn.Linear(6, 4),
    lambda: nn.Conv1d(6, 4, 3),
    lambda: nn.ConvTranspose2d(6, 4, 3),
]


def layer_input(layer):
    spatial = {nn.Conv1d: (7,), nn.ConvTranspose2d: (5, 5)}
    sizes = [size for cls, size in spatial.items() if isinstance(layer, cls)]
    return torch.randn(2, 6, *(sizes[0] if sizes else ()))


def results(model, x):
    """Output, and gradients of input and parameters."""
    x = x.clone().requires_grad_()
    y = model(x)
    return y.detach(), *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("make", LAYERS)
def test_like_torch(make, dim, device):
    """Same parameters, state_dict and results."""
    original = make().to(device)
    twin = copy.deepcopy(original)
    parametrizations.weight_norm(original, dim=dim)
    assert tn.weight_norm(twin, dim=dim) is twin
    assert list(twin.state_dict()) == list(original.state_dict())
    twin.load_state_dict(original.state_dict())
    x = layer_input(original).to(device)
    torch.testing.assert_close(results(twin, x), results(original, x), rtol=1e-5, atol=1e-5)
    assert type(twin.parametrizations.weight[0]) is tn.parametrizations.WeightNorm


def test_another_parameter(device):
    module = tn.weight_norm(nn.LSTMCell(3, 4).to(device), "weight_hh", dim=1)
    assert module.parametrizations.weight_hh.original0.shape == (1, 4)
    with pytest.raises(ValueError, match="nothing"):
        tn.weight_norm(module, "nothing")


@pytest.mark.parametrize("dim", [0, 1, None])
def test_old_checkpoints(dim, device):
    """Those with weight_g and weight_v are loaded."""
    old = old_style(nn.Conv1d(6, 4, 3), dim=dim).to(device)
    with torch.no_grad():
        old.weight_g.mul_(2)
    module = tn.weight_norm(nn.Conv1d(6, 4, 3), dim=dim).to(device)
    module.load_state_dict(old.state_dict())
    x = torch.randn(2, 6, 7, device=device)
    torch.testing.assert_close(module(x), old(x))


def test_remove_parametrizations(device):
    module = tn.weight_norm(nn.Linear(6, 4).to(device))
    with torch.no_grad():
        module.parametrizations.weight.original0.mul_(3)
    weight = module.weight.detach().clone()
    parametrize.remove_parametrizations(module, "weight")
    assert type(module) is nn.Linear
    assert torch.equal(module.weight, weight)


def test_right_inverse(device):
    """Assigning to the weight sets direction and magnitude."""
    module = tn.weight_norm(nn.Linear(6, 4).to(device))
    weight = torch.randn(4, 6, device=device)
    module.weight = weight
    torch.testing.assert_close(module.weight, weight)
    torch.testing.assert_close(
        module.parametrizations.weight.original0, torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    )


@pytest.mark.parametrize("normalize", [parametrizations.weight_norm, old_style])
def test_convert(normalize, device):
    """A model keeps its parameters, their identity, its state_dict and results."""
    model = nn.Sequential(
        normalize(nn.Conv1d(6, 8, 3)), nn.ReLU(), nn.Sequential(normalize(nn.Conv1d(8, 4, 1), dim=None))
    ).to(device)
    x = torch.randn(2, 6, 7, device=device)
    expected, state, parameters = results(model, x), model.state_dict(), list(model.parameters())
    report = tn.convert(model)
    assert not report.left
    assert len(report.replaced) == 2
    is_old = normalize is old_style
    assert report.replaced[1].name == ("2.0.weight" if is_old else "2.0.parametrizations.weight.0")
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert list(model.state_dict()) == list(state)
    torch.testing.assert_close(results(model, x), expected, rtol=1e-5, atol=1e-5)
    assert not tn.convert(model).replaced
    if is_old:
        nn.utils.remove_weight_norm(model[0])
        torch.testing.assert_close(model(x), expected[0], rtol=1e-5, atol=1e-5)


class Squared(parametrizations._WeightNorm):
    def forward(self, g, v):
        return super().forward(g, v).square()


def test_convert_leaves_subclasses():
    layer = nn.Linear(3, 4)
    parametrize.register_parametrization(layer, "weight", Squared(), unsafe=True)
    report = tn.convert(layer)
    assert not report.replaced
    assert "_WeightNorm" in report.left[0].reason


class OwnHook(tn.parametrizations.TorchWeightNormHook):
    pass


def test_convert_leaves_subclasses_of_the_hook():
    layer = old_style(nn.Linear(3, 4))
    (hook,) = layer._forward_pre_hooks.values()
    hook.__class__ = OwnHook
    report = tn.convert(layer)
    assert not report.replaced
    assert report.left[0].name == "weight"
    assert "subclass" in report.left[0].reason


def stack(device):
    """Weight-normalized convolutions, parametrized and old-style, of two dims."""
    return nn.Sequential(
        tn.weight_norm(nn.Conv1d(8, 8, 3)),
        nn.LeakyReLU(0.1),
        tn.weight_norm(nn.Conv1d(8, 8, 3, padding=1), dim=1),
        nn.LeakyReLU(0.1),
        old_style(nn.Conv1d(8, 4, 3)),
        tn.weight_norm(nn.Conv1d(4, 4, 3)),
    ).to(device)


def count_launches(function):
    launched = []

    def count(kernel, grid, arguments):
        launched.append(kernel.__name__)
        kernel[grid](**arguments)

    with observe(count):
        function()
    return launched


def test_cached(device):
    """Same results; the weights with a norm along dimension 0 in one launch, for two calls."""
    model = stack(device)
    tn.convert(model)
    x = torch.randn(2, 8, 20, device=device)
    expected = results(model, x)

    def step():
        with tn.cached_weight_norms(model):
            assert torch.equal(model(x), expected[0])
            again = results(model, x)
        torch.testing.assert_close(again, expected, rtol=0, atol=0)

    assert count_launches(step).count("weight_forward") == 1
    assert count_launches(lambda: model(x)).count("weight_forward") == 3


def test_the_cache_ends_with_its_context(device):
    model = stack(device)
    with tn.cached_weight_norms(model):
        weight = model[0].weight
        assert model[0].weight is weight
        with tn.cached_weight_norms(model):
            inner = model[0].weight
            assert inner is not weight
        assert model[0].weight is weight
    assert model[0].weight is not weight
    with pytest.raises(ZeroDivisionError), tn.cached_weight_norms(model):
        _ = 1 / 0
    assert not tn.parametrizations._contexts.open


def test_a_change_is_noticed(device):
    """Of values, of the parameter's memory, of the parameter itself, and of the gradient mode."""
    model = stack(device)
    parametrization = model[0].parametrizations.weight

    def changed(change):
        with tn.cached_weight_norms(model):
            before = model[0].weight
            change()
            after = model[0].weight
            assert after is not before
            return after

    def times(factor):
        with torch.no_grad():
            parametrization.original0.mul_(factor)

    before = model[0].weight
    torch.testing.assert_close(changed(lambda: times(3)), 3 * before)

    def swap():
        parametrization.original0.data = parametrization.original0.data / 3

    torch.testing.assert_close(changed(swap), before)

    model[0].requires_grad_(False)
    with tn.cached_weight_norms(model):
        assert not model[0].weight.requires_grad
        assert model[2].weight.requires_grad
        model[0].requires_grad_(True)
        assert model[0].weight.requires_grad

    with torch.no_grad(), tn.cached_weight_norms(model):
        assert not model[0].weight.requires_grad
        with torch.enable_grad():
            assert model[0].weight.requires_grad

    with tn.cached_weight_norms(model):
        x = torch.ones(2, 8, 5, device=device)
        state = {k: v * 2 for k, v in model[0].state_dict().items()}
        other = torch.func.functional_call(model[0], state, x)
        assert not torch.equal(other, model[0](x))


def test_copies_within_the_context(device):
    model = stack(device)
    with torch.inference_mode(), tn.cached_weight_norms(model):
        weight = model[0].weight
        assert model[0].weight is weight
        assert copy.deepcopy(model[0]).weight is not weight


def test_inference_tensors_are_not_cached(device):
    """They do not tell when they change."""
    with torch.inference_mode():
        model = stack(device)
        with tn.cached_weight_norms(model):
            before = model[0].weight.clone()
            model[0].parametrizations.weight.original0.mul_(2)
            torch.testing.assert_close(model[0].weight, 2 * before)


def test_contexts_need_not_nest(device):
    model = stack(device)
    first, second = tn.cached_weight_norms(model), tn.cached_weight_norms(model)
    first.__enter__(), second.__enter__()
    weight = model[0].weight
    first.__exit__(None, None, None)
    assert model[0].weight is weight
    second.__exit__(None, None, None)
    assert not tn.parametrizations._contexts.open


def test_other_threads_do_not_see_a_context(device):
    model, found = stack(device), []
    with tn.cached_weight_norms(model):
        thread = threading.Thread(target=lambda: found.append(model[0].weight))
        thread.start()
        thread.join()
        assert found[0] is not model[0].weight


def test_transforms_within_the_context(device):
    model, x = stack(device), torch.randn(2, 8, 20, device=device)
    parameters = dict(model.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(model, parameters, x).square().sum()

    expected = torch.func.grad(loss)(parameters)
    with tn.cached_weight_norms(model):
        torch.testing.assert_close(torch.func.grad(loss)(parameters), expected)


def test_traces_within_the_context(device):
    """A trace computes the weight itself."""
    layer, x = tn.weight_norm(nn.Linear(6, 4)).to(device), torch.randn(3, 6, device=device)
    with warnings.catch_warnings(), tn.cached_weight_norms(layer):
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(layer, x)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)
    torch.testing.assert_close(traced(x), layer(x))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant, device):
    """With the backward pass inside of the context."""
    model, x = stack(device), torch.randn(2, 8, 20, device=device, requires_grad=True)
    model(x).square().sum().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    with tn.cached_weight_norms(model):
        checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)


def test_errors_name_the_layer(device):
    model = stack(device)
    parametrization = model[2].parametrizations.weight
    parametrization.original0 = nn.Parameter(torch.ones(3, device=device))
    with (
        pytest.raises(RuntimeError, match=r"g of 2\.weight must have shape"),
        tn.cached_weight_norms(model),
    ):
        pass


def test_an_attribute_of_the_name(device):
    """`parametrizations` is somebody else's word as well."""
    model = stack(device)
    model[1].parametrizations = []
    with tn.cached_weight_norms(model):
        assert model[0].weight is model[0].weight


def test_cached_wants_a_module():
    with pytest.raises(TypeError, match="model"), tn.cached_weight_norms(None):
        pass


def test_training(device):
    """A converted stack of convolutions trains to the losses of PyTorch's, cached or not."""
    torch.manual_seed(1)
    original = nn.Sequential(
        *(
            module
            for i in range(4)
            for module in (
                parametrizations.weight_norm(nn.Conv1d(4, 4, 3, padding=1, dilation=1), dim=i % 2),
                nn.Tanh(),
            )
        )
    ).to(device)
    models = [original, copy.deepcopy(original), copy.deepcopy(original)]
    for model in models[1:]:
        assert len(tn.convert(model).replaced) == 4
    x, target = torch.randn(2, 3, 4, 16, device=device)

    def losses_of(model, context):
        def loss():
            with context(model):
                return (model(x) - target).square().mean()

        return losses(loss, model.parameters(), steps=8)

    contexts = (nullcontext, nullcontext, tn.cached_weight_norms)
    theirs, alone, cached = map(losses_of, models, contexts)
    assert torch.equal(alone, cached)
    assert_trained_alike(alone, theirs)
