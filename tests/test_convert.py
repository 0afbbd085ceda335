"""`convert`, `register` and `restore`: names, probes, patterns, pickles. Which norms they find is tested
where the modules are, and of transformers in test_transformers.py."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.weight_norm import WeightNorm
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from transformers.models.t5.modeling_t5 import T5LayerNorm

import tritonnorm as tn
from tritonnorm import probe, registry


class Scale(nn.Module):
    """A norm of one's own, as its users write it."""

    def __init__(self, size=16, eps=1e-6, scale=2.0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.scale = eps, scale

    def forward(self, x):
        y = x.float() * (x.float().square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (y * self.weight.float() * self.scale).to(x.dtype)


def scaled_rms_norm(module, x):
    weight = module.weight.float() * module.scale
    return tn.functional.rms_norm(x, weight.shape, weight, module.eps)


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "CANDIDATES", registry.CANDIDATES[:])


@pytest.mark.parametrize("name", [Scale, f"{__name__}.Scale", f"{__name__}.S*"])
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

    tn.register(f"{__name__}.*")(scaled_rms_norm)  # a pattern: only for classes not registered by name
    model = Scale()
    tn.convert(model)
    assert registry.FUNCTIONS[type(model)] is newest
    assert all(m is not model for m in calls)  # the probe runs on a copy


def off_in_bfloat16(module, x):
    return (1 if x.dtype == torch.float32 else 1.01) * scaled_rms_norm(module, x)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: scaled_rms_norm(m, x) / 2, "769 of 1024 elements"),
        (lambda m, x: tn.functional.rms_norm(x, (16,), m.weight * m.scale), "elements"),  # its eps
        (off_in_bfloat16, "16"),
        (lambda m, x: scaled_rms_norm(m, x).double(), "another dtype"),
        (lambda m, x: scaled_rms_norm(m, x)[..., :1], "another shape"),
        (lambda m, x: None, "no tensor"),
        (lambda m, x: m.missing, "AttributeError"),
        (lambda m: None, "takes other arguments"),
    ],
)
def test_what_computes_something_else_is_left(forward, reason):
    tn.register(Scale)(forward)
    model = Scale()
    report = tn.convert(model)
    assert not report.replaced
    assert reason in report.left[0].reason
    assert type(model) is Scale


def test_a_module_whose_forward_fails_is_left():
    tn.register(Scale, shapes=lambda module: [(2, 4, 15)])(scaled_rms_norm)
    assert "its own forward fails" in tn.convert(Scale()).left[0].reason


def test_a_module_that_cannot_be_probed_is_left():
    tn.register(Scale, shapes=lambda module: module.missing)(scaled_rms_norm)
    assert "no probe" in tn.convert(Scale()).left[0].reason
    assert "empty" in tn.convert(Scale(0)).left[0].reason


class Noisy(nn.Module):
    """Leaves traces wherever a forward can."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.inner = nn.Dropout()
        self.calls, self.log, self.by_mode, self.plain = 0, [], {True: [], False: []}, torch.zeros(3)

    def forward(self, x):
        for counter in (self.count, self.steps, self.plain):
            counter += 1
        self.calls += 1
        self.log.append(1)
        self.by_mode[self.training].append(1)
        return self.inner(torch.rand_like(x)) * self.weight * x.sum()


@pytest.mark.parametrize("function", [lambda module, x: x, Noisy.forward], ids=["another", "the same"])
def test_the_probe_leaves_no_trace(function):
    tn.register(Noisy)(function)
    model = Noisy().eval()
    for module in model.modules():
        module.register_forward_hook(lambda *_: pytest.fail("a hook was called"))
        module.register_full_backward_hook(lambda *_: pytest.fail("a hook was called"))
    state = torch.get_rng_state()
    tn.convert(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(t.any() for t in (model.count, model.steps, model.plain, model.weight))
    assert model.weight.grad is None
    assert not model.training
    assert model.calls == 0
    assert model.log == []
    assert model.by_mode == {True: [], False: []}


def test_one_probe_for_modules_alike(monkeypatch):
    probed = []
    difference = probe.difference
    monkeypatch.setattr(probe, "difference", lambda m, c: probed.append(m) or difference(m, c))
    tn.register(Scale)(scaled_rms_norm)
    alike = [Scale() for _ in range(5)]
    model = nn.Sequential(*alike, Scale(scale=1.0), Scale(8), Scale().bfloat16())
    assert len(tn.convert(model).replaced) == 8
    assert probed == [model[0], model[5], model[6], model[7]]


class Parts(Scale):
    """What it computes depends on an attribute that is no number, and on a submodule."""

    def __init__(
        self, function=F.silu, dtype=torch.float32, slope=0.01, table=(1.0,), mask=(True,) * 16
    ):
        super().__init__()
        self.function, self.dtype, self.table = function, dtype, table
        self.inner = nn.LeakyReLU(slope)
        self.register_buffer("mask", torch.tensor(mask))

    def forward(self, x):
        y = super().forward(x).to(self.dtype).to(x.dtype)
        return torch.where(self.mask, self.inner(self.function(y)) * self.table[0], 0)


def parts_of_a_kind(module, x):
    return F.leaky_relu(F.silu(scaled_rms_norm(module, x)), 0.01)


@pytest.mark.parametrize(
    "other",
    [
        {"function": F.gelu},
        {"dtype": torch.float16},
        {"slope": 0.5},
        {"table": [2.0]},
        {"table": {0: 2.0}},
        {"table": torch.tensor([2.0])},
        {"mask": (True, False) * 8},
    ],
    ids=str,
)
def test_modules_that_differ_are_not_taken_for_alike(other):
    tn.register(Parts)(parts_of_a_kind)
    model = nn.Sequential(Parts(), Parts(**other), Parts())
    assert [e.name for e in tn.convert(model).replaced] == ["0", "2"]


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


def test_families_differ_in_their_roundings(device):
    """All alike in float32, and with weights as they are initialized."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = nn.ModuleList([LlamaRMSNorm(16), Olmo2RMSNorm(16), T5LayerNorm(16), GemmaRMSNorm(16)])
        tn.convert(model.to(device, dtype))
        families = ["rounded_rms_norm", "rms_norm", "t5_norm", "offset_rms_norm"]
        assert [type(norm).forward.__name__ for norm in model] == families


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("cls", [LlamaRMSNorm, Olmo2RMSNorm, T5LayerNorm, GemmaRMSNorm, CohereLayerNorm])
def test_families_round_as_their_models_do(cls, dtype, x_dtype, device):
    """To the bit, but for what float32 sums decide."""
    norm = cls(64).to(device, dtype)
    norm.weight.data += torch.randn_like(norm.weight)
    x = torch.randn(50, 64, device=device).to(x_dtype)
    expected = norm(x)
    assert tn.convert(norm).replaced
    y = norm(x)
    assert y.dtype == expected.dtype
    assert (y - expected).abs().gt(1e-5 * expected.abs() + 1e-6).float().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "make", [lambda: MambaRMSNormGated(64, group_size=16), lambda: Qwen3NextRMSNormGated(64)]
)
def test_gated_families(make, dtype, device):
    """The gate before the statistics, of groups; and after the weight. With their gradients."""
    norm = make().to(device, dtype)
    x, gate = (torch.randn(50, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    tensors = (x, gate, norm.weight)
    expected = norm(x, gate)
    dy = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, tensors, dy)
    assert tn.convert(norm).replaced
    y = norm(x, gate)
    assert (y - expected).abs().gt(1e-5 * expected.abs() + 1e-6).float().mean() < 0.01
    bound = 16 * torch.finfo(dtype).eps
    for ours, theirs in zip(torch.autograd.grad(y, tensors, dy), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound * theirs.abs().max().item())


def test_a_wrong_family_is_not_taken():
    """Weights of two dimensions with statistics over one: rows of both would be another norm."""
    model = CohereLayerNorm((4, 8))
    assert "differs" in tn.convert(model).left[0].reason
    assert type(model) is CohereLayerNorm


def test_meta():
    """Before the weights are there; the probe has its own."""
    with torch.device("meta"):
        model = nn.ModuleList([LlamaRMSNorm(16), GemmaRMSNorm(16), nn.LayerNorm(16)])
    assert len(tn.convert(model).replaced) == 3
    assert registry.FUNCTIONS[type(model[1])] is tn.families.offset_rms_norm
    assert all(p.is_meta for p in model.parameters())


def rms(x, eps):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


class Rounding(Scale):
    """1 + weight is of the weight's dtype: seen only where that has 16 bits."""

    def forward(self, x):
        return (rms(x.float(), self.eps) * (1 + self.weight).float()).to(x.dtype)


class TrainingOnly(Scale):
    def forward(self, x):
        return super().forward(x) * (2 if self.training else 1)


class Clamped(Scale):
    def forward(self, x):
        return super().forward(x.clamp(-1000, 1000))


class ClampedAfter(Scale):
    def forward(self, x):
        x = rms(x.float(), self.eps).clamp(-5, 5)
        return (x * self.weight.float() * self.scale).to(x.dtype)


class OtherRank(Scale):
    def forward(self, x):
        return super().forward(x) * (1 if x.dim() == 3 else 2)


def offset(module, x):
    return tn.functional.rms_norm_variant(x, (64,), module.weight, module.eps, weight_offset=1.0)


def detached(module, x):
    return scaled_rms_norm(module, x.detach())


def detached_weight(module, x):
    weight = module.weight.detach().float() * module.scale
    return tn.functional.rms_norm(x, weight.shape, weight, module.eps)


def writes(module, x):
    y = scaled_rms_norm(module, x)
    x.detach().mul_(2)
    return y


@pytest.mark.parametrize(
    ("cls", "forward", "reason"),
    [
        (Rounding, offset, "parameters of torch."),
        (TrainingOnly, scaled_rms_norm, "in training"),
        (Clamped, scaled_rms_norm, "elements"),
        (ClampedAfter, scaled_rms_norm, "elements"),
        (OtherRank, scaled_rms_norm, "elements"),
        (Scale, detached, "gradients"),
        (Scale, detached_weight, "gradients"),
        (Scale, writes, "what it writes"),
    ],
)
def test_what_a_tame_probe_does_not_show(cls, forward, reason):
    tn.register(cls)(forward)
    assert reason in tn.convert(cls(64).eval()).left[0].reason


@pytest.mark.parametrize("ambient", ["meta", "cpu", torch.bfloat16, "inference"])
def test_ambient_settings_do_not_matter(ambient):
    tn.register(Scale)(scaled_rms_norm)
    model = nn.Sequential(LlamaRMSNorm(16), Scale())
    dtype = torch.get_default_dtype()
    try:
        if isinstance(ambient, torch.dtype):
            torch.set_default_dtype(ambient)
        elif ambient != "inference":
            torch.set_default_device(ambient)
        with torch.inference_mode(ambient == "inference"):
            report = tn.convert(model)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)
    assert len(report.replaced) == 2


def test_masks_have_to_be_there():
    """What is masked out is seen on the probe; a mask on the meta device has no values."""
    tn.register(Parts)(parts_of_a_kind)
    assert "differs" in tn.convert(Parts(mask=(False,) * 16)).left[0].reason
    assert "no values" in tn.convert(Parts().to("meta")).left[0].reason


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
