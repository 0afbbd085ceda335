"""Who is measured: tritonnorm, PyTorch eager and compiled, and the peers that are installed.

Every provider offers some of the operators as functions `(x, *parameters) -> y` with the same eps, and
is called through the interface that its users call.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import ceil

import torch

import tritonnorm

from .machine import installed_version, tritonnorm_version
from .shapes import DTYPES, OPERATORS, Case
from .traffic import floor_bytes

EPS = {"layer_norm": 1e-5, "rms_norm": 1e-6, "normalize": 1e-12}

REFERENCE_ELEMENTS = 2**24
"""Elements a step of the float64 reference: 128 MB a tensor."""

MESSAGE_CHARACTERS = 300
"""As much of an error's text goes into a row: a compiler's can have thousands of lines."""


@dataclass(frozen=True)
class Provider:
    """Implementations of operators. `prepare` is applied to one before each case; the operators of
    `float32_parameters` take no narrower weight and bias."""

    name: str
    version: str
    operators: Mapping[str, Callable]
    prepare: Callable[[Callable], Callable] = lambda function: function
    float32_parameters: frozenset[str] = frozenset()


def with_signatures_of_torch(functional) -> dict[str, Callable]:
    """The operators of a module that has the signatures of torch.nn.functional."""
    return {
        "layer_norm": lambda x, weight, bias: functional.layer_norm(
            x, weight.shape, weight, bias, EPS["layer_norm"]
        ),
        "rms_norm": lambda x, weight: functional.rms_norm(x, weight.shape, weight, EPS["rms_norm"]),
        "normalize": lambda x: functional.normalize(x, dim=-1, eps=EPS["normalize"]),
    }


def _tritonnorm() -> Provider:
    return Provider("tritonnorm", tritonnorm_version(), with_signatures_of_torch(tritonnorm.functional))


def _torch() -> Provider:
    return Provider("torch", torch.__version__, with_signatures_of_torch(torch.nn.functional))


def _compiled(function):
    """The function compiled for one static shape. Without the reset, dynamo would stop compiling after
    eight shapes and run eagerly; with donated buffers a backward pass could run only once."""
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)


def _torch_compile() -> Provider:
    operators = with_signatures_of_torch(torch.nn.functional)
    return Provider("torch.compile", torch.__version__, operators, prepare=_compiled)


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
        },
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


LOADERS = {
    "tritonnorm": _tritonnorm,
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
    """The tensors of a case: x and dy `[m, n]`, parameters `[n]`."""

    x: torch.Tensor
    parameters: tuple[torch.Tensor, ...]
    dy: torch.Tensor


def make_inputs(case: Case, device) -> Inputs:
    """Normally distributed inputs, the same at every run. Means of 1, and a dy that goes with x, make
    the mean, c1 and c2 as large as what they are subtracted from: a provider without is found out."""
    generator = torch.Generator(device).manual_seed(0)
    options = dict(dtype=DTYPES[case.dtype], device=device, generator=generator)
    x = torch.randn(case.m, case.n, **options) + 1
    dy = torch.randn(case.m, case.n, **options).add_(x).add_(1)
    parameters = tuple(
        (torch.randn(case.n, **options) + 1).requires_grad_()
        for _ in OPERATORS[case.operator].parameters
    )
    return Inputs(x.requires_grad_(), parameters, dy.detach())


def make_call(provider: Provider, case: Case, inputs: Inputs) -> Callable[[], tuple[torch.Tensor, ...]]:
    """What is timed: the forward pass to (y,), or the backward pass alone to the gradients of x and
    of every parameter. Both as in training: the forward pass saves what the backward needs."""
    function = provider.prepare(provider.operators[case.operator])
    leaves = (inputs.x, *inputs.parameters)
    if case.operator in provider.float32_parameters:
        leaves = (inputs.x, *(p.detach().float().requires_grad_() for p in inputs.parameters))
    if case.direction == "forward":
        return lambda: (function(*leaves),)
    y = function(*leaves)
    return lambda: torch.autograd.grad(y, leaves, inputs.dy, retain_graph=True)


def make_copy(case: Case, device) -> Callable[[], torch.Tensor]:
    """The roof: a copy that reads and writes as many bytes as the case's floor, half of them each."""
    source = torch.zeros(ceil(floor_bytes(case) / 2), dtype=torch.int8, device=device)
    return partial(torch.empty_like(source).copy_, source)


def max_error(case: Case, inputs: Inputs, outputs) -> float:
    """The largest difference of any output from PyTorch's float64 result, relative to the largest
    magnitude of that output; NaN if there is one.

    The reference is computed for as many rows at a time as keep it small beside the inputs.
    """
    function = with_signatures_of_torch(torch.nn.functional)[case.operator]
    parameters = [p.detach().double().requires_grad_() for p in inputs.parameters]
    backward = case.direction == "backward"
    difference = largest = torch.zeros((), dtype=torch.float64, device=inputs.x.device)
    sums = [torch.zeros_like(p) for p in parameters]
    rows = max(REFERENCE_ELEMENTS // case.n, 1)
    for start in range(0, case.m, rows):
        chunk = slice(start, start + rows)
        x = inputs.x.detach()[chunk].double().requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            reference = function(x, *parameters)
        if backward:
            reference, *gradients = torch.autograd.grad(
                reference, (x, *parameters), inputs.dy[chunk].double()
            )
            sums = [a + b for a, b in zip(sums, gradients, strict=True)]
        difference = torch.maximum(difference, (outputs[0].detach()[chunk] - reference).abs().max())
        largest = torch.maximum(largest, reference.abs().max())
    errors = [difference / largest]
    if backward:
        errors += [
            (got - reference).abs().max() / reference.abs().max()
            for got, reference in zip(outputs[1:], sums, strict=True)
        ]
    return torch.stack(errors).max().item()
