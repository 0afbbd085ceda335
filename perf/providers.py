"""Who is measured: tritonnorm, PyTorch eager and compiled, and the peers that are installed.

Every provider offers some of the operators as functions `(x, *parameters) -> y` with the same eps, and
is called through the interface that its users call. Behind the parameters come BatchNorm's running
statistics, and GroupNorm's number of groups. Operators of a stack of layers are functions
`(*xs, *parameters) -> ys`.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from math import ceil

import torch

import tritonnorm

from .launches import TEAMS, choosing, clusters
from .machine import installed_version, tritonnorm_version
from .shapes import (
    CHANNEL_OPERATORS,
    DTYPES,
    OPERATORS,
    ROW_OPERATORS,
    SINGLE_WEIGHT_OPERATORS,
    Case,
)
from .traffic import floor_bytes

EPS = {
    "layer_norm": 1e-5,
    "rms_norm": 1e-6,
    "normalize": 1e-12,
    "batch_norm": 1e-5,
    "batch_norm_eval": 1e-5,
    "group_norm": 1e-5,
    "instance_norm": 1e-5,
}

MOMENTUM = 0.1
"""What a batch's statistics count in the running ones: PyTorch's default."""

REFERENCE_ELEMENTS = 2**24
"""Elements a step of the float64 reference: 128 MB a tensor."""

MESSAGE_CHARACTERS = 300
"""As much of an error's text goes into a row: a compiler's can have thousands of lines."""


@dataclass(frozen=True)
class Provider:
    """Implementations of operators. `prepare` is applied to one before each case, and calls run within
    `around()`; the operators of `float32_parameters` take no narrower weight and bias, those of
    `contiguous_only` copy an input of another layout first."""

    name: str
    version: str
    operators: Mapping[str, Callable]
    prepare: Callable[[Callable], Callable] = lambda function: function
    float32_parameters: frozenset[str] = frozenset()
    contiguous_only: frozenset[str] = frozenset()
    around: Callable[[], AbstractContextManager] = nullcontext

    def offers(self, case: Case) -> bool:
        """Whether there is an implementation to be measured."""
        copies = case.layout != "contiguous" and case.operator in self.contiguous_only
        return case.operator in self.operators and not copies


def with_signatures_of_torch(functional) -> dict[str, Callable]:
    """The operators of a module that has the signatures of torch.nn.functional."""

    def batch_norm(operator):
        return lambda x, weight, bias, running_mean, running_var: functional.batch_norm(
            x,
            running_mean,
            running_var,
            weight,
            bias,
            training=operator == "batch_norm",
            momentum=MOMENTUM,
            eps=EPS[operator],
        )

    return {
        "layer_norm": lambda x, weight, bias: functional.layer_norm(
            x, weight.shape, weight, bias, EPS["layer_norm"]
        ),
        "rms_norm": lambda x, weight: functional.rms_norm(x, weight.shape, weight, EPS["rms_norm"]),
        "normalize": lambda x: functional.normalize(x, dim=-1, eps=EPS["normalize"]),
        "batch_norm": batch_norm("batch_norm"),
        "batch_norm_eval": batch_norm("batch_norm_eval"),
        "group_norm": lambda x, weight, bias, groups: functional.group_norm(
            x, groups, weight, bias, EPS["group_norm"]
        ),
        "instance_norm": lambda x, weight, bias: functional.instance_norm(
            x, weight=weight, bias=bias, eps=EPS["instance_norm"]
        ),
    }


def _one_after_another(weight_norm):
    """`weight_norm` as a function of many tensors, as tritonnorm's weight_norms."""
    return lambda vs, gs: [weight_norm(v, g, 0) for v, g in zip(vs, gs, strict=True)]


def weight_operators(weight_norm, weight_norms=None) -> dict[str, Callable]:
    """The operators of weights, by functions of v, g and dim, and of many tensors."""
    weight_norms = weight_norms or _one_after_another(weight_norm)

    def of_stack(*tensors):
        vs, gs = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        return tuple(weight_norms(vs, gs))

    single = {name: partial(weight_norm, dim=OPERATORS[name].dim) for name in SINGLE_WEIGHT_OPERATORS}
    return {**single, "weight_norms": of_stack}


def _torch_weight_norm(v, g, dim):
    """What torch.nn.utils.parametrizations.weight_norm calls; there -1 is the norm of all."""
    return torch._weight_norm(v, g, -1 if dim is None else dim)


def operators_of_torch() -> dict[str, Callable]:
    """PyTorch's own."""
    return with_signatures_of_torch(torch.nn.functional) | weight_operators(_torch_weight_norm)


def _tritonnorm() -> Provider:
    functional = tritonnorm.functional
    operators = with_signatures_of_torch(functional)
    operators |= weight_operators(functional.weight_norm, functional.weight_norms)
    return Provider("tritonnorm", tritonnorm_version(), operators)


def _torch_version() -> str:
    """PyTorch's version, with that of cuDNN, which serves BatchNorm and InstanceNorm where it can."""
    if not torch.backends.cudnn.is_available():
        return torch.__version__
    version = torch.backends.cudnn.version()  # 90100: 9.1.0
    return f"{torch.__version__}, cuDNN {version // 10000}.{version // 100 % 100}"


def _torch() -> Provider:
    return Provider("torch", _torch_version(), operators_of_torch())


def _compiled(function):
    """The function compiled for one static shape. Without the reset, dynamo would stop compiling after
    eight shapes and run eagerly; with donated buffers a backward pass could run only once."""
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)


def _torch_compile() -> Provider:
    return Provider("torch.compile", torch.__version__, operators_of_torch(), prepare=_compiled)


def _liger() -> Provider:
    import liger_kernel.transformers.functional as functional

    return Provider(
        "liger",
        installed_version("liger-kernel", "liger-kernel-nightly"),
        {
            "layer_norm": lambda x, weight, bias: functional.liger_layer_norm(
                x, weight, bias, EPS["layer_norm"]
            ),
            # In place, the default, overwrites dy: the next repetition would have another.
            "rms_norm": lambda x, weight: functional.liger_rms_norm(
                x, weight, EPS["rms_norm"], in_place=False
            ),
            "group_norm": lambda x, weight, bias, groups: functional.liger_group_norm(
                x, weight, bias, x.shape[1], groups, EPS["group_norm"]
            ),
        },
        contiguous_only=frozenset({"group_norm"}),
    )


def _fla() -> Provider:
    from fla.modules.l2norm import l2norm
    from fla.modules.layernorm import layer_norm, rms_norm

    return Provider(
        "fla",
        installed_version("fla-core", "flash-linear-attention"),
        {
            "layer_norm": lambda x, weight, bias: layer_norm(x, weight, bias, eps=EPS["layer_norm"]),
            "rms_norm": lambda x, weight: rms_norm(x, weight, None, eps=EPS["rms_norm"]),
            "normalize": lambda x: l2norm(x, eps=EPS["normalize"]),
        },
    )


def _quack() -> Provider:
    # As an attribute of the package, `rmsnorm` is the function.
    rmsnorm = importlib.import_module("quack.rmsnorm")

    class LayerNorm(torch.autograd.Function):
        """quack's forward and backward, which it does not join to a differentiable LayerNorm."""

        @staticmethod
        def forward(ctx, x, weight, bias):
            y, rstd, mean = rmsnorm.layernorm_fwd(
                x, weight, bias, EPS["layer_norm"], return_rstd=True, return_mean=True
            )
            ctx.save_for_backward(x, weight, rstd, mean)
            return y

        @staticmethod
        def backward(ctx, dy):
            x, weight, rstd, mean = ctx.saved_tensors
            return rmsnorm.layernorm_bwd(x, weight, dy, rstd, mean)

    return Provider(
        "quack",
        installed_version("quack-kernels"),
        {
            "layer_norm": LayerNorm.apply,
            "rms_norm": lambda x, weight: rmsnorm.rmsnorm(x, weight, eps=EPS["rms_norm"]),
        },
        float32_parameters=frozenset({"layer_norm"}),
    )


@contextmanager
def _with_teams():
    """While open, teams take what they can, and rows that are too long for a program; no clusters do."""
    with choosing(TEAMS), clusters(largest=1):
        yield


def _tritonnorm_team() -> Provider:
    """tritonnorm with teams wherever they can be, as if a table preferred them."""
    ours = _tritonnorm()
    shared = (*ROW_OPERATORS, *(name for name in CHANNEL_OPERATORS if name != "batch_norm_eval"))
    operators = {name: ours.operators[name] for name in shared}
    return replace(ours, name="tritonnorm.team", operators=operators, around=_with_teams)


def _tritonnorm_single() -> Provider:
    """tritonnorm, of the layers of a stack one after another: what a launch for all of them saves."""
    operators = weight_operators(tritonnorm.functional.weight_norm)
    stacked = {name: operators[name] for name in operators if OPERATORS[name].stacked}
    return Provider("tritonnorm.single", tritonnorm_version(), stacked)


LOADERS = {
    "tritonnorm": _tritonnorm,
    "tritonnorm.team": _tritonnorm_team,
    "tritonnorm.single": _tritonnorm_single,
    "torch": _torch,
    "torch.compile": _torch_compile,
    "liger": _liger,
    "fla": _fla,
    "quack": _quack,
}


def load(names) -> tuple[list[Provider], dict[str, str]]:
    """The providers of these names that can be imported, and for the others the reason."""
    present, absent = [], {}
    for name in names:
        try:
            present.append(LOADERS[name]())
        except Exception as error:  # a peer may raise anything while it looks for its device
            absent[name] = describe(error)
    return present, absent


def describe(error: Exception) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:MESSAGE_CHARACTERS]}"


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case: x and dy in its shape and layout, parameters in `case.parameter_shape`, and
    running mean and variance `[channels]` where the operator has them."""

    x: torch.Tensor
    parameters: tuple[torch.Tensor, ...]
    dy: torch.Tensor
    running: tuple[torch.Tensor, ...] = ()

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        """What has gradients, in the order of a provider's arguments."""
        return (self.x, *self.parameters)


@dataclass(frozen=True)
class StackInputs:
    """The tensors of a case of many layers: those of each, so that no gradient has to be stacked."""

    layers: tuple[Inputs, ...]
    running = ()

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        """The x of every layer, then the parameters."""
        return (*(layer.x for layer in self.layers), *(p for i in self.layers for p in i.parameters))

    @property
    def dy(self) -> tuple[torch.Tensor, ...]:
        return tuple(layer.dy for layer in self.layers)


def make_inputs(case: Case, device) -> Inputs | StackInputs:
    """Normally distributed inputs, the same at every run. Means of 1, and a dy that goes with x, make
    the mean, c1 and c2 as large as what they are subtracted from: a provider without is found out. So
    is one that takes the batch's statistics for running ones, which are others, or one layer for
    another."""
    generator = torch.Generator(device).manual_seed(0)
    if OPERATORS[case.operator].stacked:
        return StackInputs(tuple(_make_inputs(layer, generator) for layer in case.layers))
    return _make_inputs(case, generator)


def _make_inputs(case: Case, generator) -> Inputs:
    operator = OPERATORS[case.operator]

    def normal(*shape, dtype=case.parameter_dtype):
        return torch.randn(shape, dtype=dtype, device=generator.device, generator=generator)

    def activation():
        dtype = DTYPES[case.dtype]
        if case.layout == "contiguous":
            return normal(*case.shape, dtype=dtype)
        images, channels, *spatial = case.shape
        return normal(images, *spatial, channels, dtype=dtype).movedim(-1, 1)

    x = activation().add_(1)
    dy = activation().add_(x).add_(1)
    shape = case.parameter_shape
    parameters = tuple((normal(*shape) + 1).requires_grad_() for _ in operator.parameters)
    running = (normal(*shape) + 1, normal(*shape).square() + 0.5) if operator.running else ()
    return Inputs(x.requires_grad_(), parameters, dy, running)


def make_call(provider: Provider, case: Case, inputs: Inputs) -> Callable[[], tuple[torch.Tensor, ...]]:
    """What is timed, within what the provider has around it."""
    with provider.around():
        call = _make_call(provider, case, inputs)
    if provider.around is nullcontext:
        return call

    def call_within():
        with provider.around():
            return call()

    return call_within


def _make_call(provider: Provider, case: Case, inputs: Inputs):
    """The forward pass to y and the running statistics that it updates, or the backward
    pass alone to the gradients of x and of every parameter; of a stack to those of every layer. Both as
    in training: the forward pass saves what the backward needs."""
    function = provider.prepare(provider.operators[case.operator])
    leaves = inputs.leaves
    if case.operator in provider.float32_parameters:
        leaves = (inputs.x, *(p.detach().float().requires_grad_() for p in inputs.parameters))
    running = tuple(r.clone() for r in inputs.running)  # every provider begins with the same
    others = (*running, *_groups(case))
    if case.direction == "forward":
        if OPERATORS[case.operator].stacked:
            return lambda: function(*leaves)
        updated = _updated(case, running)
        return lambda: (function(*leaves, *others), *updated)
    y = function(*leaves, *others)
    return lambda: torch.autograd.grad(y, leaves, inputs.dy, retain_graph=True)


def _groups(case: Case) -> tuple[int, ...]:
    """The argument that GroupNorm has in addition."""
    return () if case.groups is None else (case.groups,)


def _updated(case: Case, running) -> tuple[torch.Tensor, ...]:
    """Of running statistics, those that are a forward pass's results."""
    return running if OPERATORS[case.operator].running == "updated" else ()


def make_copy(case: Case, device) -> Callable[[], torch.Tensor]:
    """The roof: a copy that reads and writes as many bytes as the case's floor, half of them each."""
    source = torch.zeros(ceil(floor_bytes(case) / 2), dtype=torch.int8, device=device)
    return partial(torch.empty_like(source).copy_, source)


def _chunks(case: Case) -> Iterator[tuple]:
    """Where a chunk of the reference lies in x, and in the parameters: so many rows, images or, where
    images share statistics, channels that it is small beside the inputs; all, where all share them."""
    operator = OPERATORS[case.operator]
    if not operator.sets:
        yield ..., ...
        return
    size = case.channels if operator.images_share else case.shape[0]
    step = max(REFERENCE_ELEMENTS * size // case.elements, 1)
    for start in range(0, size, step):
        part = slice(start, start + step)
        chunk = (slice(None), part) if operator.images_share else part
        if operator.family == "weights":
            yield chunk, chunk
        else:
            yield chunk, part if operator.images_share else slice(None)


def max_error(case: Case, inputs: Inputs | StackInputs, outputs) -> float:
    """The largest difference of any output from PyTorch's float64 result, relative to the largest
    magnitude of that output; NaN if there is one.

    The reference is computed in chunks of contiguous tensors, whatever the layout of the case.
    """
    if OPERATORS[case.operator].stacked:
        layers = zip(case.layers, inputs.layers, strict=True)
        errors = [max_error(*layer, outputs[i :: case.stack]) for i, layer in enumerate(layers)]
        return torch.tensor(errors).max().item()
    function = operators_of_torch()[case.operator]
    backward = case.direction == "backward"
    difference = largest = torch.zeros((), dtype=torch.float64, device=inputs.x.device)
    # What is not of x's shape: every chunk has its part of it by channels, or adds to all of it.
    totals = [torch.zeros_like(t, dtype=torch.float64) for t in outputs[1:]]
    for chunk, columns in _chunks(case):
        x, dy = (t.detach()[chunk].contiguous().double() for t in (inputs.x, inputs.dy))
        x.requires_grad_(backward)
        parameters = [p.detach()[columns].double().requires_grad_() for p in inputs.parameters]
        running = [r[columns].double().clone() for r in inputs.running]
        with torch.set_grad_enabled(backward):
            reference = function(x, *parameters, *running, *_groups(case))
        others = _updated(case, running)
        if backward:
            reference, *others = torch.autograd.grad(reference, (x, *parameters), dy)
        for total, other in zip(totals, others, strict=True):
            total[columns] += other
        difference = torch.maximum(difference, (outputs[0].detach()[chunk] - reference).abs().max())
        largest = torch.maximum(largest, reference.abs().max())
    errors = [
        (got - total).abs().max() / total.abs().max()
        for got, total in zip(outputs[1:], totals, strict=True)
    ]
    return torch.stack([difference / largest, *errors]).max().item()
