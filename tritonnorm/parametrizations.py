"""Weight normalization of a module's parameters, and of a whole model's at once."""

import threading
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.weight_norm import WeightNorm as TorchWeightNormHook

from . import functional
from .dispatch import is_plain
from .watch import is_transformed, is_watched

TorchWeightNorm = parametrizations._WeightNorm


class _Cached(NamedTuple):
    """A weight, what it was computed from, and the state of that."""

    weight: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    state: tuple


class _Contexts(threading.local):
    """The open contexts of a thread: a dict each, from the id of a WeightNorm or WeightNormHook. Nothing
    is kept on modules, whose copies share nothing with it."""

    def __init__(self):
        self.open = []


_contexts = _Contexts()


def _state(v, g):
    """What is different when a weight would be, as far as tensors tell."""
    tensors = ((t.data_ptr(), t._version, t.requires_grad) for t in (v, g))
    return torch.is_grad_enabled(), *tensors


def _can_be_cached(v, g) -> bool:
    """Whether these tell their state, and nothing watches or transforms what is computed."""
    return is_plain(v, g) and not (
        is_watched(v, g) or is_transformed() or v.is_inference() or g.is_inference()
    )


def _weight(owner, v, g):
    """The weight of a WeightNorm or WeightNormHook: the cached one, unless something has changed."""
    for context in reversed(_contexts.open):
        cached = context.get(id(owner))
        if cached is not None and cached.v is v and cached.g is g and _can_be_cached(v, g):
            if cached.state == _state(v, g):
                return cached.weight
            break
    return functional.weight_norm(v, g, owner.dim)


class WeightNorm(TorchWeightNorm):
    """The parametrization of `torch.nn.utils.parametrizations.weight_norm`, computed by
    `tritonnorm.functional.weight_norm`. `original0` is the magnitude g, `original1` the direction v."""

    def forward(self, weight_g, weight_v):
        return _weight(self, weight_v, weight_g)


class WeightNormHook(TorchWeightNormHook):
    """The hook of the older `torch.nn.utils.weight_norm`, computed likewise. Its parameters are
    `weight_g` and `weight_v`."""

    def compute_weight(self, module):
        return _weight(self, getattr(module, f"{self.name}_v"), getattr(module, f"{self.name}_g"))


def weight_norm(module, name="weight", dim=0):
    """Weight normalization of a parameter, as `torch.nn.utils.parametrizations.weight_norm`: same
    parametrization, parameters and state_dict, and it loads checkpoints with `weight_g` and `weight_v`.
    `torch.nn.utils.parametrize.remove_parametrizations` undoes it.

    The weight is computed at every access by `tritonnorm.functional.weight_norm`; within
    `cached_weight_norms`, once.

    Args:
        module: any module with the parameter, which keeps its dtype and device.
        name: of the parameter.
        dim: the dimension of the norms; None or -1 for the norm of the whole parameter.

    Returns:
        The module.

    Raises:
        As torch's: ValueError for a name that is no parameter's, IndexError for a dim out of range.
    """
    parametrizations.weight_norm(module, name, dim)
    module.parametrizations[name][-1].__class__ = WeightNorm
    return module


def _normalized_weights(model):
    """(name, owner, v, g) of every weight of the model that WeightNorm or WeightNormHook computes."""
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        if parametrize.is_parametrized(module):
            for name, parametrization in module.parametrizations.items():
                if type(parametrization[0]) is WeightNorm:
                    v, g = parametrization.original1, parametrization.original0
                    yield prefix + name, parametrization[0], v, g
        for hook in module._forward_pre_hooks.values():
            if type(hook) is WeightNormHook:
                v, g = (getattr(module, f"{hook.name}_{which}") for which in "vg")
                yield prefix + hook.name, hook, v, g


@contextmanager
def cached_weight_norms(model):
    """A context in which the weights that tritonnorm normalizes in a model are computed once, at its
    beginning, together: `tritonnorm.functional.weight_norms` takes one launch for all of them where
    `torch.nn.utils.parametrize.cached` takes one a weight.

        with tn.cached_weight_norms(model):
            loss = criterion(model(x), target)
            loss.backward()
        optimizer.step()

    All uses of the weights within a context share one graph: call backward once, or with
    `retain_graph=True`. It may come after the context, unless activations are recomputed
    (`torch.utils.checkpoint` with `use_reentrant=False`): what is recomputed must find the same weights.

    A weight is computed anew at each access if its parameters change within the context, or require
    gradients that they did not; under torch.func, in a trace, and where operators are watched (by
    torch.compile or a TorchDispatchMode). Changes through `.data` in place, which PyTorch does not
    count, are not noticed. Other threads do not see the context.

    Args:
        model: a module with layers of `tritonnorm.weight_norm`, or converted ones.

    Raises:
        TypeError: model is not a torch.nn.Module.
        RuntimeError: as `tritonnorm.functional.weight_norm`, of the layer that is named.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"cached_weight_norms: model must be a torch.nn.Module, not {type(model).__name__}"
        )
    found = [of_one for of_one in _normalized_weights(model) if _can_be_cached(*of_one[2:])]
    names, owners, vs, gs = zip(*found, strict=True) if found else ((),) * 4
    weights = functional.weights.weight_norms_by_name(
        "cached_weight_norms",
        vs,
        gs,
        [owner.dim for owner in owners],
        [f"v of {name}" for name in names],
        [f"g of {name}" for name in names],
    )
    context = {
        id(owner): _Cached(weight, v, g, _state(v, g))
        for owner, weight, v, g in zip(owners, weights, vs, gs, strict=True)
    }
    _contexts.open.append(context)
    try:
        yield
    finally:
        # by identity: contexts of generators need not end in the order in which they began
        _contexts.open[:] = [c for c in _contexts.open if c is not context]
