"""Who is measured: tritonnorm, PyTorch eager and compiled, and the peers that are installed.

Every provider offers some of the operators as functions `(x, *parameters) -> y` with the same eps, and
is called through the interface that its users call. Behind the parameters come BatchNorm's running
statistics, and GroupNorm's number of groups. Operators of a stack of layers are functions
`(*xs, *parameters) -> ys`.
"""

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch

import tritonnorm

from .launches import TEAMS, choosing, clusters
from .machine import installed_version, tritonnorm_version
from .shapes import (
    CHANNEL_OPERATORS,
    OPERATORS,
    ROW_OPERATORS,
    SINGLE_WEIGHT_OPERATORS,
    Case,
)

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
