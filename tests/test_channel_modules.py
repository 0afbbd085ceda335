"""BatchNorm, GroupNorm, InstanceNorm and LayerNorm2d: drop-ins for torch.nn, and `convert`."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import tritonnorm as tn

C = 4
SHAPES = {
    "BatchNorm1d": [(3, C), (3, C, 5)],
    "BatchNorm2d": [(2, C, 3, 5)],
    "BatchNorm3d": [(2, C, 2, 3, 2)],
    "GroupNorm": [(3, C), (3, C, 5), (2, C, 3, 5)],
    "InstanceNorm1d": [(C, 5), (3, C, 5)],
    "InstanceNorm2d": [(C, 3, 5), (2, C, 3, 5)],
    "InstanceNorm3d": [(C, 2, 3, 2), (2, C, 2, 3, 2)],
}
TRACKING = [
    {},
    {"affine": False},
    {"affine": True},
    {"track_running_stats": True, "momentum": 0.3},
    {"track_running_stats": True, "momentum": None},
    {"track_running_stats": False},
    {"eps": 1e-2},
]
GROUPING = [{}, {"affine": False}, {"eps": 1e-2}]
CASES = [
    pytest.param(name, options, id=f"{name}-{options}")
    for name in SHAPES
    for options in (GROUPING if name == "GroupNorm" else TRACKING)
]


def pair(name, device, **options):
    """Our module and torch.nn's, with the same parameters, none of them 0 or 1."""
    size = (2, C) if name == "GroupNorm" else (C,)
    module, original = (getattr(m, name)(*size, device=device, **options) for m in (tn, nn))
    with torch.no_grad():
        for p in original.parameters():
            p.normal_()
    module.load_state_dict(original.state_dict())
    return module, original


def assert_same(module, original, x):
    """Results, gradients and buffers."""
    dy, found = torch.randn_like(x), []
    for m in (module, original):
        leaf = x.detach().requires_grad_()
        y = m(leaf)
        found.append((y.detach(), *torch.autograd.grad(y, [leaf, *m.parameters()], dy)))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.state_dict(), original.state_dict())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_like_torch(name, options, device):
    """Same construction, state_dict, repr and results: training, evaluation, and training again."""
    for shape in SHAPES[name]:
        module, original = pair(name, device, **options)
        assert repr(module) == repr(original)
        assert list(module.state_dict()) == list(original.state_dict())
        for training in (True, True, False, True):
            module.train(training), original.train(training)
            assert_same(module, original, torch.randn(shape, device=device))
        module.reset_parameters(), original.reset_parameters()
        assert_same(module, original, torch.randn(shape, device=device))


def test_training_without_tracking(device):
    """Attributes are changed on models that exist: what to track, and whether there is something."""
    for name in ("BatchNorm2d", "InstanceNorm2d"):
        module, original = pair(name, device, track_running_stats=True)
        x = torch.randn(SHAPES[name][-1], device=device)
        for change in (
            {"track_running_stats": False},
            {"track_running_stats": True, "num_batches_tracked": None},
            {"momentum": None},
            {"running_mean": None, "running_var": None},
        ):
            for m in (module, original):
                for attribute, value in change.items():
                    setattr(m, attribute, value)
                m.train()
            assert_same(module, original, x)
        module.eval(), original.eval()
        if name == "BatchNorm2d":
            assert_same(module, original, x)


@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith("Batch")])
def test_the_cumulative_average_is_not_read(name, device, monkeypatch):
    """torch.nn's makes the host wait for the number of batches. Ours stays on the device."""
    module = getattr(tn, name)(C, momentum=None, device=device)
    batches = torch.randn(3, *SHAPES[name][-1], device=device)

    def refuse(*_):
        raise AssertionError("a tensor was read")

    with monkeypatch.context() as patch:
        for method in ("__bool__", "__float__", "__index__", "__int__", "item", "tolist"):
            patch.setattr(torch.Tensor, method, refuse)
        for x in batches:
            module(x)
        with pytest.raises(AssertionError, match="read"):
            getattr(nn, name)(C, momentum=None, device=device)(x)
    dims = [0, *range(2, batches.dim() - 1)]
    torch.testing.assert_close(module.running_mean, torch.stack([x.mean(dims) for x in batches]).mean(0))
    torch.testing.assert_close(module.running_var, torch.stack([x.var(dims) for x in batches]).mean(0))
    assert module.num_batches_tracked == 3


@pytest.mark.parametrize(("name", "options"), CASES)
def test_wrong_inputs(name, options, device):
    """PyTorch's errors; neither statistics nor the number of batches move."""
    module, original = pair(name, device, **options)
    before = copy.deepcopy(module.state_dict())
    inputs = [torch.randn(C, device=device), torch.randn(2, C, 1, 1, 1, 1, device=device)]
    channels = torch.randn(2, 2 * C + 1, *SHAPES[name][-1][2:], device=device)
    for x in inputs if name != "GroupNorm" else [inputs[0], channels]:
        with pytest.raises((ValueError, RuntimeError)) as theirs:
            original(x)
        with pytest.raises(theirs.type):
            module(x)
    if name.startswith("Batch") and (options.get("affine", True) or module.track_running_stats):
        with pytest.raises(RuntimeError, match=r"weight|running_mean"):
            module(channels)
    torch.testing.assert_close(module.state_dict(), before)


def test_instance_norm_of_other_channels(device):
    """A warning without parameters, as torch.nn's, and an error with them."""
    x = torch.randn(2, C + 1, 5, device=device)
    with pytest.warns(UserWarning, match="num_features"):
        y = tn.InstanceNorm1d(C)(x)
    torch.testing.assert_close(y, nn.functional.instance_norm(x))
    with pytest.raises(ValueError, match="num_features"):
        tn.InstanceNorm1d(C, affine=True, device=device)(x)


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "GroupNorm"])
def test_old_checkpoints(name):
    """Before version 2 there was no num_batches_tracked."""
    module, original = pair(name, "cpu", track_running_stats=True, affine=True)
    old = {k: torch.rand_like(v) for k, v in original.state_dict().items() if v.dim()}
    for m in (module, original):
        m.num_batches_tracked.fill_(7)
        m.load_state_dict(copy.copy(old))
    torch.testing.assert_close(module.state_dict(), original.state_dict())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_copies(name, options, device):
    module, _ = pair(name, device, **options)
    x = torch.randn(SHAPES[name][-1], device=device)
    module(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is getattr(tn, name)
        torch.testing.assert_close(twin.state_dict(), module.state_dict())
        assert torch.equal(twin(x), copy.deepcopy(module)(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["BatchNorm2d", "GroupNorm", "InstanceNorm2d"])
def test_dtypes(name, dtype, device):
    """A 16-bit input with float32 parameters and statistics stays 16-bit, as in mixed training."""
    wide, reference = pair(name, device)
    x = torch.randn(SHAPES[name][-1], device=device).to(dtype)
    y = wide(x)
    assert y.dtype == dtype
    tolerance = 2 * max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(
        y.double(), reference.double()(x.double()), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"bias": False}, {"eps": 1e-2}], ids=lambda o: str(o)
)
def test_layer_norm2d(options, device):
    """As timm's and torchvision's: a LayerNorm whose parameters are those of nn.LayerNorm(C)."""
    module = tn.LayerNorm2d(C, device=device, **options)
    assert isinstance(module, nn.LayerNorm)
    assert module.normalized_shape == (C,)
    twin = nn.LayerNorm(
        C, module.eps, options.get("affine", True), options.get("bias", True), device=device
    )
    assert tn.LayerNorm2d(C).eps == 1e-6
    module.load_state_dict(twin.state_dict())
    x = torch.randn(2, C, 3, 5, device=device)
    torch.testing.assert_close(module(x), twin(x.movedim(1, -1)).movedim(-1, 1))
    assert torch.equal(copy.deepcopy(module)(x), module(x))


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_convert(device):
    """Every class that has a replacement, with its parameters, buffers and hooks; the rest is named."""
    others = {
        "doubled": Doubled(C),
        "sync": nn.SyncBatchNorm(C),
        "lazy": nn.LazyBatchNorm2d(),
        "response": nn.LocalResponseNorm(2),
        "ours": tn.LayerNorm2d(C),
    }
    norms = {
        name: nn.GroupNorm(2, C) if name == "GroupNorm" else getattr(nn, name)(C) for name in SHAPES
    }
    model = nn.ModuleDict(norms | others).to(device)
    tensors = [*model.parameters(), *model.buffers()]
    keys = list(model.state_dict())
    report = tn.convert(model)
    assert [e.name for e in report.replaced] == list(SHAPES)
    for name in SHAPES:
        assert type(model[name]) is getattr(tn, name)
    left = {e.name: e.reason for e in report.left}
    assert list(left) == list(others)
    assert "BatchNorm2d" in left["doubled"]
    assert "lazy" in left["lazy"]
    assert left["ours"] == "already of tritonnorm"
    now = [*model.parameters(), *model.buffers()]
    assert all(a is b for a, b in zip(tensors, now, strict=True))
    assert list(model.state_dict()) == keys


def test_lazy_modules_can_be_converted_later(device):
    model = nn.Sequential(nn.LazyBatchNorm2d(), nn.LazyInstanceNorm2d(affine=True)).to(device)
    x = torch.randn(2, C, 3, 5, device=device)
    assert not tn.convert(model).replaced
    model(x)
    original = copy.deepcopy(model)
    assert len(tn.convert(model).replaced) == 2
    assert_same(model, original, x)


def test_sync_batch_norm_knows_them():
    """torch's own conversion takes ours for what they are."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(tn.BatchNorm2d(C)))
    assert type(model[0]) is nn.SyncBatchNorm


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(C), nn.InstanceNorm2d(C, affine=True)
        self.third = nn.GroupNorm(2, C)

    def forward(self, x):
        return self.third(self.first(x) + self.second(x).relu())


def test_fx_keeps_the_modules(device):
    """What checks its input, or counts batches, is one node of the graph, as torch.nn's is."""
    model = Branches().to(device)
    original = copy.deepcopy(model)
    tn.convert(model)
    traced = torch.fx.symbolic_trace(model)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called == ["first", "second"]
    for training in (True, True, False):
        traced.train(training), original.train(training)
        x = torch.randn(2, C, 3, 5, device=device)
        torch.testing.assert_close(traced(x), original(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(traced.state_dict(), original.state_dict())


def test_traces_take_torch(device):
    model = Branches().to(device).eval()
    x = torch.randn(2, C, 3, 5, device=device)
    expected = model(x)
    tn.convert(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what depends on the input's shape is constant in a trace
        traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), expected)


def test_compile_has_no_graph_break(device):
    """In training as well: the number of batches and the running statistics are part of the graph."""
    model = Branches().to(device)
    original = copy.deepcopy(model)
    tn.convert(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, C, 3, 5, device=device)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), original(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.state_dict(), original.state_dict())


def test_state_is_replaced_by_functional_call(device):
    """As ensembles and meta-learning do: other parameters and buffers for one call."""
    model = Branches().to(device)
    original = copy.deepcopy(model)
    tn.convert(model)
    x = torch.randn(2, C, 3, 5, device=device)
    results = []
    for m in (model, original):
        state = {k: v.detach().clone() for k, v in original.state_dict().items()}
        results.append((torch.func.functional_call(m, state, (x,)), state))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert model.first.num_batches_tracked == 0
