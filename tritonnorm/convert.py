"""Replacing the normalizations of an existing model."""

from dataclasses import dataclass, field

import torch

from . import modules, parametrizations

REPLACEMENTS = {
    torch.nn.LayerNorm: modules.LayerNorm,
    torch.nn.RMSNorm: modules.RMSNorm,
    torch.nn.GroupNorm: modules.GroupNorm,
    torch.nn.BatchNorm1d: modules.BatchNorm1d,
    torch.nn.BatchNorm2d: modules.BatchNorm2d,
    torch.nn.BatchNorm3d: modules.BatchNorm3d,
    torch.nn.InstanceNorm1d: modules.InstanceNorm1d,
    torch.nn.InstanceNorm2d: modules.InstanceNorm2d,
    torch.nn.InstanceNorm3d: modules.InstanceNorm3d,
    parametrizations.TorchWeightNorm: parametrizations.WeightNorm,
}
"""Class to class. The class must be exactly this one: a subclass may compute something else."""

OURS = (modules.__name__, parametrizations.__name__)

NORMALIZATIONS = (torch.nn.modules.batchnorm._NormBase, torch.nn.LocalResponseNorm)
"""What a report names as left, SyncBatchNorm for one; beside these, subclasses of what is replaced and
classes named *Norm*."""


@dataclass(frozen=True)
class Entry:
    """One module: its name in the model, its class and, if it was left, the reason."""

    name: str
    cls: str
    reason: str = ""


@dataclass
class Report:
    """What `convert` did: the modules it replaced, and those it left, with the reason."""

    replaced: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)

    def __str__(self):
        lines = [f"{len(self.replaced)} replaced, {len(self.left)} left"]
        lines += [f"  replaced  {e.name or '(the model)'}: {e.cls}" for e in self.replaced]
        lines += [f"  left      {e.name or '(the model)'}: {e.cls}, {e.reason}" for e in self.left]
        return "\n".join(lines)


def _reason(module) -> str | None:
    """Why a module that looks like a normalization is left; None for every other module."""
    cls = type(module)
    if cls.__module__ in OURS:
        return "already of tritonnorm"
    if cls in REPLACEMENTS:
        return "its forward was replaced on the instance, which a new class would not change"
    for base in REPLACEMENTS:
        if isinstance(module, base):
            return f"a subclass of torch's {base.__name__}, which may compute something else"
    if isinstance(module, NORMALIZATIONS):
        if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
            return "lazy: it can be replaced once it has seen an input"
        return "not among the classes that tritonnorm replaces"
    if "norm" in cls.__name__.lower() and not any(module.children()):
        return "not a class that tritonnorm knows"
    return None


def _hook_reason(cls) -> str:
    """Why a hook of weight normalization is left."""
    if cls.__module__ in OURS:
        return "already of tritonnorm"
    return "a subclass of torch's WeightNorm, which may compute something else"


def convert(model: torch.nn.Module) -> Report:
    """Replaces torch.nn's LayerNorm, RMSNorm, GroupNorm, BatchNorm1d/2d/3d and InstanceNorm1d/2d/3d in
    `model` by tritonnorm's, in place, and what `torch.nn.utils.parametrizations.weight_norm` or the
    older `torch.nn.utils.weight_norm` put into it.

    A module keeps its identity, parameters, buffers, hooks and state_dict: only its class changes. So
    every reference to it (an optimizer's, a tied module's) stays valid, and the model itself may be one.

    Args:
        model: any module.

    Returns:
        A `Report` of what was replaced and of the normalizations that were left, with the reason.
        A module that stands in several places is listed once. The older weight normalization is a
        hook, and is listed by the name of its weight.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, not {type(model).__name__}")
    report = Report()
    for name, module in model.named_modules():
        cls = type(module)
        described = f"{cls.__module__}.{cls.__qualname__}"
        if cls in REPLACEMENTS and "forward" not in vars(module):
            module.__class__ = REPLACEMENTS[cls]
            report.replaced.append(Entry(name, described))
        elif reason := _reason(module):
            report.left.append(Entry(name, described, reason))
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, parametrizations.TorchWeightNormHook):
                weight, cls = f"{name}.{hook.name}".removeprefix("."), type(hook)
                described = f"{cls.__module__}.{cls.__qualname__}"
                if cls is parametrizations.TorchWeightNormHook:
                    hook.__class__ = parametrizations.WeightNormHook
                    report.replaced.append(Entry(weight, described))
                else:
                    report.left.append(Entry(weight, described, _hook_reason(cls)))
    return report
