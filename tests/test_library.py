"""The operators under what watches them: torch.compile, torch.export, fake tensors, dispatch modes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from training import assert_trained_alike, losses

import tritonnorm as tn
import tritonnorm.functional as tF
from tritonnorm.launch.common import forget_plans

F32, BF16 = torch.float32, torch.bfloat16


def leaf(*shape, device, dtype=F32):
    return torch.randn(shape, device=device, dtype=dtype).requires_grad_()


def image(device, dtype=F32):
    """An image and its weight and bias."""
    return leaf(2, 8, 3, 5, device=device, dtype=dtype), *(leaf(8, device=device) for _ in range(2))


def rows(device, dtype=F32):
    return leaf(3, 5, 8, device=device, dtype=dtype), *(leaf(8, device=device) for _ in range(2))


ROW, CHANNEL = ["row_norm", "row_norm_backward"], ["channel_norm", "channel_norm_backward"]
RUNNING = ["channel_norm_running", "channel_norm_backward"]
APPLY = ["channel_apply", "channel_apply_backward"]
WEIGHT = ["weight_norms", "weight_norms_backward"]
CALLS = {
    "layer_norm": (lambda x, w, b: tF.layer_norm(x, (8,), w, b), rows, ROW),
    "rms_norm": (lambda x, w, b: tF.rms_norm(x, (8,), w) + b, rows, ROW),
    "rms_norm_variant": (
        lambda x, w, b: tF.rms_norm_variant(x, (8,), w, weight_offset=1.0, round_to="input") + b,
        rows,
        ROW,
    ),
    "normalize": (lambda x, w, b: tF.normalize(x, dim=1) * w + b, rows, ROW),
    "layer_norm2d": (lambda x, w, b: tF.layer_norm2d(x, w, b), image, ROW),
    "group_norm": (lambda x, w, b: tF.group_norm(x, 4, w, b), image, CHANNEL),
    "instance_norm": (lambda x, w, b: tF.instance_norm(x, None, None, w, b), image, CHANNEL),
    "batch_norm": (lambda x, w, b: tF.batch_norm(x, None, None, w, b, True), image, CHANNEL),
    "weight_norm": (
        lambda x, w, b: tF.weight_norm(x, w.view(1, 1, 8), 2) + b,
        rows,
        WEIGHT,
    ),
    "weight_norms": (
        lambda x, w, b: sum(
            n.mean(0) for n in tF.weight_norms([x, x[0]], [w.view(1, 1, 8), b.sum()], [2, None])
        ),
        rows,
        WEIGHT,
    ),
}
every_call = pytest.mark.parametrize("name", CALLS)


def nodes(graph):
    """The names of our operators in a graph."""
    found = []
    for node in graph.nodes:
        targets = (node.target, *node.args[:1])  # functionalized: the operator is an argument
        found += [t.name() for t in targets if isinstance(t, torch._ops.OpOverload)]
    return [name.removeprefix("tritonnorm::") for name in found if name.startswith("tritonnorm")]


def compile_and_record(function, dynamic=False):
    """The compiled function, and the operators in its graphs."""
    seen = []

    def record(module, inputs):
        seen.extend(nodes(module.graph))
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    return torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic), seen


def results(function, inputs, dy=None):
    y = function(*inputs)
    dy = torch.ones_like(y).cumsum(-1) if dy is None else dy
    return y.detach(), *torch.autograd.grad(y, inputs, dy)


@pytest.mark.parametrize(("dtype", "dynamic"), [(F32, False), (F32, True), (BF16, False)], ids=str)
@every_call
def test_compiled(name, dtype, dynamic, device):
    """One node forward and one backward, no graph break, the same bits; sizes may change."""
    function, make, expected = CALLS[name]
    inputs = make(device, dtype)
    compiled, seen = compile_and_record(function, dynamic)
    for actual, eager in zip(results(compiled, inputs), results(function, inputs), strict=True):
        torch.testing.assert_close(actual, eager)
    assert seen == expected
    x = torch.cat([inputs[0].detach()] * 2).requires_grad_()
    torch.testing.assert_close(compiled(x, *inputs[1:]), function(x, *inputs[1:]))


@pytest.mark.parametrize("name", ["layer_norm", "group_norm", "batch_norm", "weight_norm"])
def test_compiled_with_inductor(name, device):
    """Among operators that inductor fuses, and layouts that it may change."""
    function, make, _ = CALLS[name]
    inputs = make(device)

    def model(x, w, b):
        return function(x.mT.contiguous().mT * 2, w + 1, b).relu().mean(0)

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(results(compiled, inputs), results(model, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("cls", [tn.BatchNorm2d, tn.InstanceNorm2d])
def test_running_statistics(cls, momentum, device):
    """Their update is declared, and a part of the graph; the evaluation reads them."""
    module = cls(8, affine=True, track_running_stats=True, momentum=momentum, device=device)
    twin = copy.deepcopy(module)
    x, dy = leaf(2, 8, 3, 5, device=device), torch.randn(2, 8, 3, 5, device=device)
    compiled, seen = compile_and_record(module)
    for training in (True, True, False, True):
        module.train(training), twin.train(training)
        found = [results(m, [x], dy) for m in (compiled, twin)]
        torch.testing.assert_close(*found)
        torch.testing.assert_close(module.state_dict(), twin.state_dict())
    assert seen == [*RUNNING, *APPLY]


def test_without_gradients(device):
    x, w, b = image(device)
    compiled, seen = compile_and_record(CALLS["group_norm"][0])
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(compiled(x, w, b), CALLS["group_norm"][0](x, w, b))
    assert set(seen) == {"channel_norm"}


def test_some_frozen(device):
    """What needs no gradient gets none."""
    x, w, b = image(device)
    function = CALLS["group_norm"][0]
    for frozen in range(3):
        inputs = [t.detach().requires_grad_(i != frozen) for i, t in enumerate((x, w, b))]
        compiled, _ = compile_and_record(function)
        wanted = [t for t in inputs if t.requires_grad]
        dy = torch.randn_like(x)
        found = [torch.autograd.grad(f(*inputs), wanted, dy) for f in (compiled, function)]
        torch.testing.assert_close(*found)


MODULES = {
    "LayerNorm": (lambda: tn.LayerNorm(8), (3, 8), ["row_norm"]),
    "GroupNorm": (lambda: tn.GroupNorm(2, 8), (3, 8, 5), ["channel_norm"]),
    "BatchNorm2d": (lambda: tn.BatchNorm2d(8), (3, 8, 4, 5), ["channel_norm_running"]),
    "BatchNorm2d, cumulative": (
        lambda: tn.BatchNorm2d(8, momentum=None),
        (3, 8, 4, 5),
        ["channel_norm_running"],
    ),
    "BatchNorm2d, evaluated": (lambda: tn.BatchNorm2d(8).eval(), (3, 8, 4, 5), ["channel_apply"]),
    "weight_norm": (lambda: tn.weight_norm(nn.Linear(8, 4)), (3, 8), ["weight_norms"]),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_exported(name, strict, device):
    """One node, for any size of the batch."""
    make, shape, expected = MODULES[name]
    module, x = make().to(device), torch.randn(shape, device=device)
    twin = copy.deepcopy(module)
    dynamic = ({0: torch.export.Dim("batch", min=2)},)
    program = torch.export.export(module, (x,), dynamic_shapes=dynamic, strict=strict)
    assert nodes(program.graph) == expected
    exported = program.module()
    for batch in (x, torch.cat([x, x + 1])):
        torch.testing.assert_close(exported(batch), twin(batch))
    for buffer, value in exported.state_dict().items():  # those that are used
        torch.testing.assert_close(value, twin.state_dict()[buffer])


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@every_call
def test_traced_by_make_fx(name, mode, device):
    function, make, expected = CALLS[name]
    inputs = make(device)
    graph = make_fx(lambda *t: results(function, t), tracing_mode=mode)(*inputs)
    assert nodes(graph.graph) == expected
    with torch.no_grad():
        found = graph(*inputs)
    torch.testing.assert_close(found, results(function, inputs))


@every_call
def test_dispatch_modes(name, device):
    """They see the operator; gradients of the second order are those of the formula."""
    function, make, expected = CALLS[name]
    inputs = make(device)

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    def penalty():
        y = function(*inputs)
        gradients = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)

    seen, y = [], function(*inputs)
    with Record():
        torch.autograd.grad(y, inputs, torch.ones_like(y))
    assert f"tritonnorm::{expected[1]}" in seen
    seen.clear()
    with Record():
        watched = results(function, inputs)
    names = [n.removeprefix("tritonnorm::") for n in seen if n.startswith("tritonnorm")]
    assert names == expected
    torch.testing.assert_close(watched, results(function, inputs))
    with Record():
        watched = penalty()
    torch.testing.assert_close(watched, penalty())


@pytest.mark.parametrize("context", [None, "reentrant", "selective"])
@every_call
def test_checkpointing(name, context, device):
    function, make, expected = CALLS[name]
    inputs = make(device)

    def policy():
        return create_selective_checkpoint_contexts([getattr(torch.ops.tritonnorm, expected[0]).default])

    options = dict(use_reentrant=context == "reentrant")
    if context == "selective":
        options["context_fn"] = policy
    dy = torch.ones_like(function(*inputs)).cumsum(-1)
    y = checkpoint(lambda *t: function(*t).tanh(), *inputs, **options)
    y.backward(dy)
    expected = results(lambda *t: function(*t).tanh(), inputs, dy)
    torch.testing.assert_close((y.detach(), *(t.grad for t in inputs)), expected)


@every_call
def test_transforms_in_what_is_compiled(name, device):
    """torch.func takes PyTorch's operators, compiled too."""
    function, make, _ = CALLS[name]
    inputs = [t.detach() for t in make(device)]

    def loss(x):
        return function(x, *inputs[1:]).pow(3).sum()

    transformed = (
        torch.func.grad(loss),
        torch.vmap(lambda s: function(s * inputs[0], *inputs[1:])),
        torch.vmap(lambda s: torch.func.grad(loss)(s * inputs[0])),
    )
    for transform, argument in zip(transformed, (inputs[0], torch.ones(2), torch.ones(2)), strict=True):
        torch._dynamo.reset()
        compiled = torch.compile(transform, fullgraph=True, backend="aot_eager")
        argument = argument.to(device)
        torch.testing.assert_close(compiled(argument), transform(argument), rtol=1e-4, atol=1e-4)


def samples(device):
    """Arguments of every operator, as its schema has them."""
    for grad in (True, False):

        def make(*shape, grad=grad):
            return torch.randn(shape, device=device, requires_grad=grad)

        x, w, b = make(3, 4, 8), make(8), make(8)
        for norm, weight, bias in (("layer", w, b), ("rms", w, None), ("l2", None, None)):
            yield "row_norm", (x, weight, bias, 1, norm, 1e-5, 0.0, None, F32, False, False)
        yield "row_norm", (x.mT, make(4), None, 1, "layer", 1e-5, 0.0, None, BF16, True, True)
        yield "row_norm", (x, w, None, 1, "rms", 1e-5, 1.0, BF16, F32, False, False)
        x = x.detach().to(BF16).requires_grad_(grad)
        yield "row_norm", (x, w, None, 1, "rms", 1e-5, 0.0, None, BF16, False, False)
        yield "row_norm", (x[:, :0], w, b, 1, "layer", 1e-5, 0.0, None, F32, False, True)
        yield "channel_norm", (x, make(4), None, 2, "group", 1e-5, BF16, False)
        yield "channel_norm", (x[:1].expand(3, 4, 8), None, None, 4, "batch", 1e-5, BF16, True)
        x, w, b = make(2, 8, 3, 5), make(8), make(8)
        options = (1e-5, F32, False)
        yield "channel_norm", (x, w, b, 2, "group", *options)
        yield "channel_norm", (x[:0], w, b, 8, "batch", 1e-5, F32, True)
        yield "channel_norm", (x.to(memory_format=torch.channels_last), w, None, 8, "batch", *options)
        mean, var = torch.zeros(8, device=device), torch.ones(8, device=device)
        momentum = torch.full((), 0.1, dtype=torch.float64, device=device)
        yield "channel_norm_running", (x, w, b, mean, var, None, 0.1, 8, "batch", *options)
        yield "channel_norm_running", (x, None, None, mean, var, momentum, 0.0, 8, "group", *options)
        yield "channel_apply", (x, w, b, mean, var, 1e-5, F32)
        vs, gs = [make(4, 3), make(2, 5).T], [make(4, 1), make()]
        yield "weight_norms", (vs, gs, [0, -1], False)
    x, w = torch.randn(2, 8, 3, 5, device=device), torch.ones(8, device=device)
    rows = torch.randn(6, 8, device=device)
    statistic = torch.ones(6, device=device)

    def statistics(count):
        return torch.ones(tn.launch.statistics_size(count, 2), device=device)

    needs = (True, F32, BF16)
    yield (
        "row_norm_backward",
        (rows, rows + 1, w, statistics(6), 1, "layer", 1e-5, 0.0, None, False, *needs),
    )
    yield "channel_norm_backward", (x, x + 1, w, statistics(8), 8, "batch", *needs)
    yield "channel_apply_backward", (x, x + 1, w, statistics(8), 1e-5, True, F32, None)
    yield (
        "weight_norms_backward",
        ([rows], [rows + 1], [statistic[:, None]], [statistic], [0], [True], [False]),
    )


def test_opcheck(device):
    """Schema, autograd registration, fake tensors, and compilation with static and dynamic shapes."""
    checked = set()
    for name, arguments in samples(device):
        torch.library.opcheck(getattr(torch.ops.tritonnorm, name).default, arguments)
        checked.add(name)
    assert checked == {n.removeprefix("tritonnorm::") for n in tn.library.NAMES}


def test_what_an_operator_refuses(device):
    """Called by hand it knows no transforms, and tells instead of dropping tangents."""
    x, w, b = (t.detach() for t in rows(device))

    def call(x):
        return torch.ops.tritonnorm.row_norm(x, w, b, 1, "layer", 1e-5, 0.0, None, F32, False, False)[0]

    torch.testing.assert_close(call(x), tF.layer_norm(x, (8,), w, b))
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.jvp(call, (x,), (x,))
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda t: call(t).sum())(x)
    x.requires_grad_()
    arguments = (x, x, w, torch.ones(15, device=device), 1, "rms", 1e-5, 0.0, None)
    with pytest.raises(RuntimeError, match="not differentiable"):
        torch.ops.tritonnorm.row_norm_backward(*arguments, False, True, None, None)


def test_too_large_a_set(device, monkeypatch):
    """What is compiled asks when it runs."""
    monkeypatch.setattr(tn.library, "LARGEST_SET", 8)
    compiled, _ = compile_and_record(CALLS["layer_norm"][0])
    with pytest.raises(RuntimeError, match="8 elements"):
        compiled(*rows(device))


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("channel_apply", "mean"),
        ("channel_apply", "variance"),
        ("channel_norm_running", "running_mean"),
        ("channel_norm_running", "running_var"),
        ("channel_norm_running", "momentum_tensor"),
    ],
)
def test_constants_cannot_require_a_gradient(name, argument, device):
    """Called by hand; autograd would drop it without a word. Without a gradient they are taken."""
    operator = getattr(torch.ops.tritonnorm, name).default
    names = (a.name for a in operator._schema.arguments)
    arguments = dict(zip(names, dict(samples(device))[name], strict=True))
    given = arguments[argument].detach().clone()
    with pytest.raises(RuntimeError, match=f"{name}: {argument} cannot require a gradient"):
        operator(**arguments | {argument: given.requires_grad_()})
    with torch.no_grad():
        operator(**arguments | {argument: given})


class Functions(TorchFunctionMode):
    """The names of the functions of torch that are called."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.__name__)
        return function(*args, **(kwargs or {}))


OF_TORCH = {"layer_norm2d": {"layer_norm"}, "weight_norm": set(), "weight_norms": set()}
"""Which of PyTorch's norms answers where no kernel does, if not that of the same name."""


@every_call
def test_modes_of_torch_functions(name, device, monkeypatch):
    """As the README says: `rms_norm_variant` is one call, others are PyTorch's norm, or none."""
    function, make, _ = CALLS[name]
    by_kernel, by_torch = Functions(), Functions()
    inputs = make(device)
    with by_kernel:
        function(*inputs)
    one_call = {name} if name == "rms_norm_variant" else set()
    assert by_kernel.seen & CALLS.keys() == one_call
    assert ("empty_like" in by_kernel.seen) == (not one_call)
    monkeypatch.setattr(tn.dispatch, "INTERPRETED", False)
    forget_plans()
    inputs = make("cpu")
    with by_torch:
        function(*inputs)
    assert by_torch.seen & CALLS.keys() == OF_TORCH.get(name, {name})


class Block(nn.Module):
    """Of a Llama-like model: attention with normalized queries and keys, and a gated layer."""

    def __init__(self, width, heads):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.head_norms = nn.ModuleList(nn.RMSNorm(width // heads) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down, self.heads = nn.Linear(2 * width, width), heads

    def forward(self, x):
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (norm(t) for norm, t in zip(self.head_norms, (q, k), strict=True))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        h = self.norms[1](x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def test_a_compiled_model_trains(device):
    """Converted and compiled, a Llama-like model has the losses of PyTorch's, eager."""
    eager = nn.Sequential(nn.Embedding(16, 16), Block(16, 2), Block(16, 2), nn.Linear(16, 16)).to(device)
    ours = copy.deepcopy(eager)
    assert len(tn.convert(ours).replaced) == 8
    compiled, seen = compile_and_record(ours)
    tokens = torch.randint(16, (2, 9), device=device)

    def losses_of(model, parameters):
        def loss():
            return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

        return losses(loss, parameters, steps=5)

    assert_trained_alike(losses_of(compiled, ours.parameters()), losses_of(eager, eager.parameters()))
    assert sorted(set(seen)) == sorted(ROW)
    assert len(seen) == 16
