"""`convert`, `register` and `restore`: names, patterns, pickles. Which norms they find is tested where
the modules are, and of transformers in test_transformers.py; the probe in test_probe.py."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from own_norms import Noisy, Scale, scaled_rms_norm
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.weight_norm import WeightNorm
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import tritonnorm as tn
from tritonnorm import registry

pytestmark = pytest.mark.usefixtures("registry_kept")


@pytest.mark.parametrize("name", [Scale, f"{Scale.__module__}.Scale", f"{Scale.__module__}.S*"])
def test_register(name, device):
    assert tn.register(name)(scaled_rms_norm) is scaled_rms_norm
    model = nn.Sequential(nn.Linear(16, 16), Scale(), Scale(scale=0.5)).to(device)
    weight, x = model[1].weight, torch.randn(3, 16, device=device)
    expected = model(x)
    report = tn.convert(model)
    assert [e.name for e in report.replaced] == ["1", "2"]
    assert isinstance(model[1], Scale)
    assert type(model[1]).__name__ == "Scale"
    assert model[1].weight is weight
    torch.testing.assert_close(model(x), expected)
    assert [e.reason for e in tn.convert(model).left] == ["already of tritonnorm"] * 2
    tn.restore(model)
    assert type(model[1]) is type(model[2]) is Scale


def test_register_wants_names_and_a_function():
    with pytest.raises(ValueError, match="names"):
        tn.register()
    with pytest.raises(TypeError, match="names"):
        tn.register(scaled_rms_norm)
    with pytest.raises(TypeError, match="shapes"):
        tn.register(Scale, shapes=[(2, 16)])
    with pytest.raises(TypeError, match="forward"):
        tn.register(Scale)("a string")


def test_what_was_registered_last_comes_first():
    calls = []

    @tn.register(Scale)
    def newest(module, x):
        calls.append(module)
        return scaled_rms_norm(module, x)

    tn.register(f"{Scale.__module__}.*")(
        scaled_rms_norm
    )  # a pattern: only for classes not registered by name
    model = Scale()
    tn.convert(model)
    assert registry.FUNCTIONS[type(model)] is newest
    assert all(m is not model for m in calls)  # the probe runs on a copy


def test_a_pattern_for_everything():
    """It means neither what is tritonnorm's already nor torch.nn's classes."""
    model = nn.Sequential(LlamaRMSNorm(16), nn.RMSNorm(16), Scale())
    assert len(tn.convert(model).replaced) == 2
    tn.register("*")(lambda module, x: x)
    classes = [type(m) for m in model]
    reasons = [e.reason for e in tn.convert(model).left]
    assert reasons[:2] == ["already of tritonnorm"] * 2
    assert [type(m) for m in model] == classes
    assert type(model[1]) is tn.RMSNorm
    model = nn.RMSNorm(16)
    assert tn.convert(model).replaced
    assert type(model) is tn.RMSNorm


def test_torch_classes_can_be_registered():
    """Where the function differs there is still the usual replacement."""

    @tn.register(nn.LayerNorm)
    def layer_norm(module, x):
        return tn.functional.layer_norm(x, (16,), module.weight, module.bias, 1e-5)

    model = nn.Sequential(nn.LayerNorm(16), nn.LayerNorm(16, eps=1e-3))
    assert len(tn.convert(model).replaced) == 2
    assert isinstance(model[0], nn.LayerNorm)
    assert registry.FUNCTIONS[type(model[0])] is layer_norm
    assert type(model[1]) is tn.LayerNorm


def test_what_is_excluded_does_not_run():
    calls = []

    @tn.register(Scale, Noisy)
    def logged(module, x):
        calls.append(module)
        return scaled_rms_norm(module, x)

    for patterns, reason in (({"exclude": "*"}, "excluded"), ({"include": ()}, "not included")):
        report = tn.convert(nn.Sequential(Scale(), Noisy()), **patterns)
        assert [e.reason for e in report.left] == [reason] * 2
    assert not calls


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), LlamaRMSNorm(8))
        self.decoder = nn.Sequential(nn.LayerNorm(8), self.encoder[2])
        self.conv = nn.utils.weight_norm(nn.Conv1d(8, 8, 3))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    ("patterns", "replaced"),
    [
        ({}, ["encoder.0", "encoder.2", "decoder.0", "conv.weight"]),
        ({"include": "encoder.*"}, ["encoder.0", "encoder.2"]),
        ({"include": "decoder.1"}, ["encoder.2"]),  # one module, of two names
        ({"exclude": "decoder.*"}, ["encoder.0", "conv.weight"]),
        ({"include": ("*.0", "conv*"), "exclude": ["enc*"]}, ["decoder.0", "conv.weight"]),
        ({"include": ()}, []),
    ],
)
def test_patterns(patterns, replaced):
    model = Shared()
    report = tn.convert(model, **patterns)
    assert [e.name for e in report.replaced] == replaced
    assert {e.name for e in report.left} == {"encoder.0", "encoder.2", "decoder.0", "conv.weight"} - {
        *replaced
    }
    assert all(e.reason in ("excluded", "not included") for e in report.left)
    assert [e.name for e in tn.restore(model).replaced] == replaced


def test_patterns_are_strings():
    for name in ("include", "exclude"):
        for wrong in (3, nn.LayerNorm, ["a", None]):
            with pytest.raises(TypeError, match=name):
                tn.convert(nn.LayerNorm(8), **{name: wrong})


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_restore(device):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(
            parametrizations.weight_norm(nn.Conv1d(4, 8, 3)),
            nn.utils.weight_norm(nn.Conv1d(8, 8, 3)),
            nn.BatchNorm1d(8),
            nn.InstanceNorm1d(8),
            LlamaRMSNorm(6),
            nn.Sequential(nn.GroupNorm(2, 8), nn.LayerNorm(6), nn.RMSNorm(6)),
        ).to(device)

    model, original = make(), make()
    converted, restored = tn.convert(model), tn.restore(model)
    assert restored == converted
    assert not any(type(m).__module__.startswith("tritonnorm") for m in model.modules())
    assert type(next(iter(model[1]._forward_pre_hooks.values()))) is WeightNorm
    x = torch.randn(2, 4, 10, device=device)
    assert torch.equal(model(x), original(x))
    assert str(tn.restore(model)) == "0 replaced, 0 left"


class Mine(tn.LayerNorm):
    pass


def test_restore_names_what_stands_for_nothing():
    model = nn.Sequential(Mine(8), tn.LayerNorm2d(8), tn.GroupNorm(2, 8), nn.LayerNorm(8))
    report = tn.restore(model)
    assert [e.name for e in report.left] == ["0", "1"]
    assert "subclass" in report.left[0].reason
    assert type(model[2]) is nn.GroupNorm
    with pytest.raises(TypeError, match="model"):
        tn.restore([model])


def copies(model):
    yield copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)


def test_copies_of_a_converted_model(device):
    model = nn.Sequential(LlamaRMSNorm(16), nn.LayerNorm(16), GemmaRMSNorm(16)).to(device)
    tn.convert(model)
    x = torch.randn(3, 16, device=device)
    for twin in copies(model):
        assert [type(m) for m in twin] == [type(m) for m in model]
        assert twin[0].weight is not model[0].weight
        assert torch.equal(twin(x), model(x))
        tn.restore(twin)
        assert type(twin[0]) is LlamaRMSNorm


class WithNew(Scale):
    def __new__(cls, size):
        assert size == 16
        return super().__new__(cls)

    def __getnewargs__(self):
        return (16,)


class WithReduce(Scale):
    def __reduce__(self):
        return type(self), (16,), vars(self)


@pytest.mark.parametrize("cls", [WithNew, WithReduce])
def test_classes_rebuild_as_they_did(cls):
    tn.register(cls)(scaled_rms_norm)
    model = cls(16)
    assert tn.convert(model).replaced
    model.eps = 0.5
    for twin in copies(model):
        assert type(twin) is type(model)
        assert twin.eps == 0.5


class Several(Scale):
    def forward(self, hidden, shift=0.0, factor=1.0, *, power=1):
        return super().forward(hidden) * factor**power + shift


def several(module, x, offset=0.0, scale=1.0, power=1):
    return scaled_rms_norm(module, x) * scale**power + offset


def test_calls_by_keyword(device):
    """By the names of the class, whatever those of the function are."""
    tn.register(Several)(several)
    norm, llama = Several().to(device), LlamaRMSNorm(16).to(device)
    x = torch.randn(3, 16, device=device)

    def results():
        yield norm(x)
        yield norm(hidden=x, factor=2.0)
        yield norm(x, factor=2.0, power=3)
        yield norm(factor=2.0, shift=1.0, hidden=x)
        yield llama(hidden_states=x)

    expected = [*results()]
    assert tn.convert(norm).replaced
    assert tn.convert(llama).replaced
    for ours, theirs in zip(results(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(TypeError, match="hidden"):
        norm(shift=1.0)


LOAD = """
import sys, torch, tritonnorm
assert "transformers" not in sys.modules, "imported by tritonnorm"
model = torch.load(sys.argv[1], weights_only=False)
assert type(model[0]).forward is tritonnorm.families.rounded_rms_norm
tritonnorm.restore(model)
print(type(model[0]).__module__)
"""


def test_another_process_loads_a_converted_model(tmp_path):
    model = nn.Sequential(LlamaRMSNorm(16))
    tn.convert(model)
    torch.save(model, tmp_path / "model.pt")
    command = [sys.executable, "-c", LOAD, tmp_path / "model.pt"]
    loaded = subprocess.run(command, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.strip() == LlamaRMSNorm.__module__


def test_a_forward_of_the_instance_stays():
    """As accelerate and kernels set it."""
    model = LlamaRMSNorm(16)
    model.forward = model.forward
    assert "instance" in tn.convert(model).left[0].reason


def test_a_parametrized_weight_is_used(device):
    """Registered after the conversion: the class then is a subclass of the replacement."""
    model = LlamaRMSNorm(16).to(device)
    x = torch.randn(3, 16, device=device)
    tn.convert(model)
    expected = 2 * model(x)

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(model, "weight", Doubled())
    torch.testing.assert_close(model(x), expected)
    assert [e.name for e in tn.restore(model).left] == [""]


def test_compile_has_no_graph_break():
    model = nn.Sequential(LlamaRMSNorm(16), GemmaRMSNorm(16), CohereLayerNorm(16))
    x = torch.randn(3, 16)
    expected = model(x)
    assert len(tn.convert(model).replaced) == 3
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
    by_name = torch.compile(lambda x: model[1](x=x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(by_name(x), model[1](x), rtol=1e-5, atol=1e-5)
