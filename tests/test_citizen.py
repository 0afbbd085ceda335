"""What training scripts do with modules: copies, checkpoints, devices, hooks, wrappers, threads."""

import copy
import io
import os
import pickle
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch._dynamo.compiled_autograd
from torch import nn
from torch.nn.utils import parametrizations, parametrize, skip_init

import tritonnorm as tn

# module, with its parameters' device, and its input's shape
MODULES = {
    "LayerNorm": (lambda **o: tn.LayerNorm(8, **o), (3, 8)),
    "LayerNorm2d": (lambda **o: tn.LayerNorm2d(8, **o), (2, 8, 3, 2)),
    "RMSNorm": (lambda **o: tn.RMSNorm(8, **o), (3, 8)),
    "GroupNorm": (lambda **o: tn.GroupNorm(2, 8, **o), (2, 8, 3)),
    "BatchNorm2d": (lambda **o: tn.BatchNorm2d(8, **o), (2, 8, 3, 2)),
    "BatchNorm1d, cumulative": (lambda **o: tn.BatchNorm1d(8, momentum=None, **o), (3, 8)),
    "InstanceNorm1d": (
        lambda **o: tn.InstanceNorm1d(8, affine=True, track_running_stats=True, **o),
        (2, 8, 3),
    ),
    "weight_norm": (lambda **o: tn.weight_norm(nn.Linear(8, 4, **o)), (3, 8)),
}
every_module = pytest.mark.parametrize("name", MODULES)
norms = pytest.mark.parametrize("name", [name for name in MODULES if name != "weight_norm"])


def case(name, device):
    """A module with parameters of its own, and an input."""
    make, shape = MODULES[name]
    module = make().to(device)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.rand_like(parameter) + 0.5)
    return module, torch.randn(shape, device=device, requires_grad=True)


def step(module, x):
    """The result, all gradients, and the buffers."""
    x = x.detach().requires_grad_()
    y = module(x)
    gradients = torch.autograd.grad(y, [x, *module.parameters()], torch.ones_like(y).cumsum(-1))
    return y.detach(), gradients, dict(module.named_buffers())


def loaded(saved, **options):
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer, **options)


@every_module
def test_checkpoints(name, device):
    """A state_dict loads with weights_only into ours, torch.nn's, and what was made on "meta"."""
    make, _ = MODULES[name]
    module, x = case(name, device)
    module(x)
    state = loaded(module.state_dict(), weights_only=True)
    expected = step(module, x)
    empty = make(device="meta").to_empty(device=device)
    assigned = make(device="meta")
    for other in (empty, assigned, make().to(device), copy.deepcopy(module)):
        other.load_state_dict(state, assign=other is assigned)
        state = copy.deepcopy(state)
        torch.testing.assert_close(step(other, x), expected)


@norms
def test_whole_modules(name, device):
    """Pickled, and saved as an object; a converted model as well."""
    module, x = case(name, device)
    twins = [pickle.loads(pickle.dumps(module)), loaded(module, weights_only=False)]
    expected = step(module, x)
    for twin in twins:
        assert type(twin) is type(module)
        torch.testing.assert_close(step(twin, x), expected)


def test_saved_weight_normalization(device):
    """The older hook is saved with its module. A parametrized module is copied, but not saved, as
    PyTorch's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hooked = nn.utils.weight_norm(nn.Linear(8, 4)).to(device)
    tn.convert(hooked)
    x = torch.randn(3, 8, device=device)
    twin = loaded(hooked, weights_only=False)
    assert type(next(iter(twin._forward_pre_hooks.values()))) is tn.parametrizations.WeightNormHook
    torch.testing.assert_close(twin(x), hooked(x))
    module = tn.weight_norm(nn.Linear(8, 4)).to(device)
    for ours in (module, parametrizations.weight_norm(nn.Linear(8, 4))):
        with pytest.raises(RuntimeError, match="only supported through state_dict"):
            torch.save(ours, io.BytesIO())
    torch.testing.assert_close(copy.deepcopy(module)(x), module(x))


@norms
def test_meta_device(name, device):
    """Shapes without memory; then memory, and the initialization."""
    make, shape = MODULES[name]
    module = make(device="meta")
    for training in (True, False):
        y = module.train(training)(torch.empty(shape, device="meta"))
        assert (y.is_meta, y.shape) == (True, shape)
    module.train().to_empty(device=device).reset_parameters()
    x = torch.randn(shape, device=device)
    torch.testing.assert_close(step(module, x), step(make().to(device), x))


@pytest.mark.parametrize("cls", [tn.LayerNorm, tn.RMSNorm, tn.LayerNorm2d, tn.BatchNorm1d])
def test_skip_init(cls, device):
    module = skip_init(cls, 8, device=device)
    assert type(module) is cls
    module.reset_parameters()
    torch.testing.assert_close(module.state_dict(), cls(8, device=device).state_dict())


@every_module
def test_without_deterministic_algorithms(name, device):
    """conftest fills torch.empty with NaN. The bits are the same where it keeps what was there."""
    module, x = case(name, device)
    twin, found = copy.deepcopy(module), step(module, x)
    torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(step(twin, x), found, rtol=0, atol=0)


@every_module
def test_inference_tensors(name, device):
    """They go in and come out; where a gradient is due, PyTorch's error, and not a wrong one."""
    module, x = case(name, device)
    module.eval()
    expected = module(x).detach()
    with torch.inference_mode():
        y, inside = module(x), x * 1
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(module(inside), expected)
    assert y.is_inference()
    with torch.no_grad():
        torch.testing.assert_close(module(inside), expected)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        module(inside)


@every_module
def test_hooks(name, device):
    """Before and after the forward pass and the full backward pass, in PyTorch's order."""
    module, x = case(name, device)
    y, (dx, *_), _ = step(copy.deepcopy(module), x)
    log = []
    module.register_forward_pre_hook(lambda m, args: log.append("forward pre"))
    module.register_forward_hook(lambda m, args, out: log.append("forward") or out * 2)
    module.register_full_backward_pre_hook(lambda m, douts: log.append("backward pre"))
    module.register_full_backward_hook(lambda m, dins, douts: log.append("backward") or (3 * dins[0],))
    doubled, (scaled, *_), _ = step(module, x)
    torch.testing.assert_close(doubled, 2 * y)
    torch.testing.assert_close(scaled, 6 * dx)
    assert log == ["forward pre", "forward", "backward pre", "backward"]


@every_module
def test_saved_tensors_hooks(name, device):
    """What is saved goes through them: offloaded, or packed as float64."""
    module, x = case(name, device)
    expected, packed = step(copy.deepcopy(module), x), []

    def pack(t):
        packed.append(t.shape)
        return t.double()

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.to(torch.float32))
    for context in (torch.autograd.graph.save_on_cpu(), hooks):
        twin = copy.deepcopy(module)
        with context:
            torch.testing.assert_close(step(twin, x), expected)
    assert x.numel() in [shape.numel() for shape in packed] or name == "weight_norm"


@every_module
def test_gradients_accumulate(name, device):
    """Over two backward passes of one graph, in .grad, of the dtype and strides of the parameter."""
    module, x = case(name, device)
    _, (dx, *expected), _ = step(copy.deepcopy(module), x)
    y = module(x)
    dy = torch.ones_like(y).cumsum(-1)
    y.backward(dy, retain_graph=True)
    y.backward(dy)
    torch.testing.assert_close(x.grad, 2 * dx)
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(dy)


class Positive(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return nn.functional.softplus(weight)


@norms
def test_parametrized_norms(name, device):
    """A weight that is computed from another one, with its gradient."""
    module, x = case(name, device)
    original = module.weight.detach().clone().requires_grad_()
    plain = copy.deepcopy(module)
    parametrize.register_parametrization(module, "weight", Positive())
    module(x).pow(2).sum().backward()
    with torch.no_grad():
        plain.weight.copy_(nn.functional.softplus(original))
    plain(x.detach()).pow(2).sum().backward()
    (expected,) = torch.autograd.grad(nn.functional.softplus(original), original, plain.weight.grad)
    torch.testing.assert_close(module.parametrizations.weight.original.grad, expected)


def test_spectral_norm_of_a_normalized_weight(device):
    """Chained with ours as with PyTorch's weight_norm."""
    modules = []
    for weight_norm in (tn.weight_norm, parametrizations.weight_norm):
        torch.manual_seed(3)
        modules.append(parametrizations.spectral_norm(weight_norm(nn.Linear(8, 4))).to(device))
    x = torch.randn(3, 8, device=device)
    torch.testing.assert_close(*(step(m, x)[:2] for m in modules))


@pytest.mark.parametrize("compiled", [False, True])
@every_module
def test_compiled_autograd(name, compiled, device):
    """The backward pass of an eager or of a compiled forward pass, in one graph with what is around."""
    module, x = case(name, device)
    twin = copy.deepcopy(module)
    expected = step(twin, x)
    torch._dynamo.reset()
    function = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        y = function(x)
        y.backward(torch.ones_like(y).cumsum(-1))
    found = (y.detach(), (x.grad, *(p.grad for p in module.parameters())), dict(module.named_buffers()))
    torch.testing.assert_close(found, expected)


CONVERTED = """
import copy, sys, torch, tritonnorm as tn
from torch import nn
torch.manual_seed(0)

def model():
    return nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.GroupNorm(2, 4), nn.Flatten(1),
        nn.LayerNorm(16), nn.Linear(16, 8), nn.RMSNorm(8), nn.Linear(8, 3),
    )

def train(model, x, target, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)

theirs = model()
ours = copy.deepcopy(theirs)
assert len(tn.convert(ours).replaced) == 4
x, target = torch.randn(4, 2, 2, 2), torch.tensor([0, 1, 2, 0])
close = dict(rtol=1e-4, atol=1e-5)
"""

COMPILED = """
losses = train(torch.compile(ours, fullgraph=True, backend="aot_eager"), x, target)
torch.testing.assert_close(losses, train(theirs, x, target), **close)
torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **close)
"""

DISTRIBUTED = """
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))

def sharded(m):
    for layer in m:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    return fully_shard(m, mesh=mesh)

x, target = x[rank::2], target[rank::2]
for wrap in (DistributedDataParallel, sharded):
    models = [wrap(copy.deepcopy(m)) for m in (ours, theirs)]
    torch.testing.assert_close(*(train(m, x, target) for m in models), **close)
    states = [m.state_dict() for m in models]
    full = [{k: getattr(v, "full_tensor", lambda: v)() for k, v in s.items()} for s in states]
    torch.testing.assert_close(*full, **close)
    before = theirs.state_dict()
    still = [k for k, v in full[0].items() if torch.equal(v, before[k.removeprefix("module.")])]
    assert len(still) <= 1, still  # the bias before BatchNorm, which has no gradient but rounding
dist.destroy_process_group()
"""


def spawn(script, *arguments, interpreted):
    """A Python process with this repository, on the CPU, with or without the interpreter."""
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-W", "ignore", "-c", CONVERTED + script, *arguments]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, env=environment, cwd=root, **pipes)


def finish(*processes):
    try:
        for process in processes:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()


def test_compiled_without_the_interpreter():
    """A converted model on a machine without a GPU, compiled: PyTorch's operators."""
    finish(spawn(COMPILED, interpreted=False))


def test_data_parallel_and_sharded(tmp_path):
    """DDP and FSDP2, two ranks: losses and parameters are those of the model that was not converted."""
    store = str(tmp_path / "store")
    finish(*(spawn(DISTRIBUTED, str(rank), store, interpreted=True) for rank in range(2)))


@pytest.mark.gpu
@every_module
def test_cuda_graphs(name):
    """Forward and backward, captured and replayed with other inputs."""
    module, x = case(name, "cuda")
    twin = copy.deepcopy(module)
    graphed = torch.cuda.make_graphed_callables(module, (x,))
    for _ in range(3):
        sample = torch.randn_like(x)
        torch.testing.assert_close(step(graphed, sample)[:2], step(twin, sample)[:2])


@pytest.mark.gpu
@every_module
def test_side_streams(name):
    """Kernels run on the stream that is current: they wait for what is slow there."""
    module, x = case(name, "cuda")
    expected = step(copy.deepcopy(module), 2 * x)  # compiles, too
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        found = step(module, 2 * x)
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(found, expected)


@pytest.mark.gpu
@every_module
def test_threads(name):
    """Two threads at once, a stream each, of which the first call may compile. (Triton's interpreter
    takes one thread only.)"""
    module, x = case(name, "cuda")
    modules = [copy.deepcopy(module) for _ in range(2)]
    found, barrier = [None, None], threading.Barrier(2)

    def work(i):
        barrier.wait()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                found[i] = step(modules[i], x)[:2]
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(found, [step(module, x)[:2]] * 2, rtol=0, atol=0)
