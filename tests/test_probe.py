"""What the probe of `convert` sees, and what it leaves alone; and that the families of transformers pass
it where they compute the same, to the rounding."""

import pytest
import torch
from own_norms import Noisy, Scale, scaled_rms_norm
from torch import nn
from torch.nn import functional as F
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from transformers.models.t5.modeling_t5 import T5LayerNorm

import tritonnorm as tn
from tritonnorm import dispatch, probe, registry

pytestmark = pytest.mark.usefixtures("registry_kept")


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


def steeper_in_16_bits(module, x):
    """The right result, and a tenth too much of every gradient."""
    y = scaled_rms_norm(module, x)
    return y if x.dtype == torch.float32 else y + (y - y.detach()) / 10


def test_gradients_in_bfloat16(monkeypatch):
    """As on a GPU, for in the interpreter float16 stands for it: families that round on the way pass."""
    monkeypatch.setattr(probe, "NARROW", torch.bfloat16)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    tn.register(Scale)(scaled_rms_norm)
    convnext = ConvNextLayerNorm(16, data_format="channels_first")
    model = nn.ModuleList([convnext, LlamaRMSNorm(16), GemmaRMSNorm(16), CohereLayerNorm(16), Scale()])
    assert len(tn.convert(model).replaced) == 5
    tn.register(Scale)(steeper_in_16_bits)
    tn.convert(model := Scale())
    assert registry.FUNCTIONS[type(model)] is scaled_rms_norm


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
