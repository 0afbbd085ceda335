"""Replacing the normalizations of an existing model, and undoing it."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch

from . import families, modules, parametrizations, probe, registry
from .registry import ORIGINALS, TORCH, described

OURS = (modules.__name__, parametrizations.__name__, families.__name__)

NORMALIZATIONS = (torch.nn.modules.batchnorm._NormBase, torch.nn.LocalResponseNorm)
"""What a report names as left, SyncBatchNorm for one; beside these, subclasses of what is replaced and
classes named *Norm*."""


@dataclass(frozen=True)
class Entry:
    """One module: its name in the model, its own class (not tritonnorm's) and, if it was left, the
    reason."""

    name: str
    cls: str
    reason: str = ""


@dataclass
class Report:
    """What `convert` or `restore` did: the modules whose class it replaced, and those it left, with the
    reason."""

    replaced: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)

    def __str__(self):
        lines = [f"{len(self.replaced)} replaced, {len(self.left)} left"]
        lines += [f"  replaced  {e.name or '(the model)'}: {e.cls}" for e in self.replaced]
        lines += [f"  left      {e.name or '(the model)'}: {e.cls}, {e.reason}" for e in self.left]
        return "\n".join(lines)


def _reason(module) -> str | None:
    """Why a module that looks like a normalization has no replacement; None for every other module."""
    cls = type(module)
    if _is_ours(cls):
        return "already of tritonnorm"
    for base in TORCH:
        if isinstance(module, base):
            return f"a subclass of torch's {base.__name__}, which may compute something else"
    if isinstance(module, NORMALIZATIONS):
        if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
            return "lazy: it can be replaced once it has seen an input"
        return "not among the classes that tritonnorm replaces"
    if "norm" in cls.__name__.lower() and not any(module.children()):
        return "not a class that tritonnorm knows"
    return None


PRIVATE = frozenset(vars(torch.nn.Module()))
"""The attributes that every module has."""


def _key(value):
    """What tells an attribute from another: its value or, where that has no hash, the object."""
    try:
        return type(value), hash(value), value
    except TypeError:
        return type(value), id(value)


def _values(tensor):
    """Those that the probe keeps: of all dtypes but floats. Nothing is known of meta tensors'."""
    return None if tensor.is_floating_point() or tensor.is_meta else tuple(tensor.flatten().tolist())


def _configuration(module):
    """What modules have in common of which one probe is enough, submodules included: classes, tensors
    but for the values of floats, and attributes."""
    tensors = [
        (name, t.shape, t.dtype, t.device, _values(t))
        for name, t in (*module.named_parameters(), *module.named_buffers())
    ]
    attributes = [
        (prefix, type(m), *((k, _key(v)) for k, v in vars(m).items() if k not in PRIVATE))
        for prefix, m in module.named_modules()
    ]
    return tuple(tensors), tuple(attributes)


def _is_ours(cls) -> bool:
    return cls in ORIGINALS or cls.__module__ in OURS


def _replacement(module, candidates, known) -> tuple[type | None, str | None]:
    """The class that replaces the module's, or why there is none.

    Args:
        candidates: what is registered for the class, or nothing for those of torch.
        known: results of probes, by configuration; this call's is added.
    """
    if "forward" in vars(module):
        return None, "its forward was replaced on the instance, which a new class would not change"
    if not candidates:
        return TORCH[type(module)], None
    key = _configuration(module)
    if key not in known:
        known[key] = _probed(module, candidates)
    return known[key]


def _probed(module, candidates):
    for candidate in candidates:
        difference = probe.difference(module, candidate)
        if not difference:
            return registry.replacement(type(module), candidate.forward), None
    if type(module) in TORCH:
        return TORCH[type(module)], None
    names = ", ".join(candidate.forward.__name__ for candidate in candidates)
    why = f" ({difference})" if len(candidates) == 1 else ""
    return None, f"on a probe its forward differs from {names}{why}"


def _patterns(name, patterns):
    if isinstance(patterns, str):
        return (patterns,)
    patterns = tuple(patterns) if isinstance(patterns, (tuple, list, set, frozenset)) else (patterns,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"convert: {name} must be a pattern of names, or several, not {patterns!r}")
    return patterns


def _check_model(function, model):
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, not {type(model).__name__}")


def _named(model):
    """Each module with all its names, as one may stand in several places."""
    names = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _hooks(module, names):
    """The older weight normalizations, with the names of their weights."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, parametrizations.TorchWeightNormHook):
            yield hook, [f"{name}.{hook.name}".removeprefix(".") for name in names]


def _hook_reason(hook) -> str:
    """Why a hook of weight normalization is left."""
    if type(hook).__module__ in OURS:
        return "already of tritonnorm"
    return "a subclass of torch's WeightNorm, which may compute something else"


def convert(model, include=None, exclude=None) -> Report:
    """Replaces the normalizations of `model` by tritonnorm's, in place:

    - torch.nn's LayerNorm, RMSNorm, GroupNorm, BatchNorm1d/2d/3d and InstanceNorm1d/2d/3d;
    - what `torch.nn.utils.parametrizations.weight_norm` or the older `torch.nn.utils.weight_norm` made;
    - those of Hugging Face's transformers that belong to one of `tritonnorm.families`: RMSNorm as Llama,
      Gemma, OLMo2 and T5 round it, Mamba2's gated one, ConvNeXt's LayerNorm in both data formats;
    - what was registered by `tritonnorm.register`.

    A module keeps its identity, parameters, buffers, hooks and state_dict: only its class changes. So
    every reference to it (an optimizer's, a tied module's) stays valid, and the model itself may be one.

    torch.nn's classes must be exactly these. Of all others it is checked that they compute the same as
    what replaces them, roundings included: once for each class and configuration, both run on probes,
    copies of the module with random parameters, in float32 and 16 bits, training and evaluation. The
    model itself is not run. For modules on the meta device the probes are on the CPU.

    Args:
        model: any module.
        include: replace only modules of these names: a pattern or several, with fnmatch's wildcards
            (`"decoder.*"`), of which `*` matches dots as well. None for all.
        exclude: replace no modules of these names.
            What is excluded or not included is not probed either: the report names the modules for which
            there is a replacement to try.

    Returns:
        A `Report` of what was replaced and of the normalizations that were left, with the reason.
        A module that stands in several places is listed once, and a pattern may match any of its names.
        The older weight normalization is a hook, and has the name of its weight.

    Raises:
        TypeError: model is not a torch.nn.Module, or include or exclude no pattern.
    """
    _check_model("convert", model)
    include = ("*",) if include is None else _patterns("include", include)
    exclude = () if exclude is None else _patterns("exclude", exclude)
    report, known = Report(), {}

    def outside(names):
        """Why a module of these names is not looked at."""
        if any(fnmatchcase(name, pattern) for name in names for pattern in exclude):
            return "excluded"
        if not any(fnmatchcase(name, pattern) for name in names for pattern in include):
            return "not included"
        return None

    for module, names in _named(model).items():
        cls = type(module)
        candidates = [] if _is_ours(cls) else registry.candidates(module)
        if candidates or cls in TORCH:
            new, reason = None, outside(names)
            if not reason:
                new, reason = _replacement(module, candidates, known)
        else:
            new, reason = None, _reason(module)
        if new is not None:
            module.__class__ = new
            report.replaced.append(Entry(names[0], described(cls)))
        elif reason:
            report.left.append(Entry(names[0], described(cls), reason))
        for hook, weights in _hooks(module, names):
            cls = type(hook)
            is_torch = cls is parametrizations.TorchWeightNormHook
            if reason := outside(weights) if is_torch else _hook_reason(hook):
                report.left.append(Entry(weights[0], described(cls), reason))
            else:
                hook.__class__ = parametrizations.WeightNormHook
                report.replaced.append(Entry(weights[0], described(cls)))
    return report


def restore(model) -> Report:
    """Undoes `convert`: modules of tritonnorm get the class back that theirs stands for, in place.

    Modules that were tritonnorm's from the beginning become torch.nn's as well: classes do not tell.

    Args:
        model: any module.

    Returns:
        A `Report` of the modules that have another class now, and of those of tritonnorm that stand for
        no other.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    _check_model("restore", model)
    report = Report()
    for module, names in _named(model).items():
        cls = type(module)
        if cls in ORIGINALS:
            module.__class__ = ORIGINALS[cls]
            report.replaced.append(Entry(names[0], described(type(module))))
        elif base := next((base for base in cls.__mro__ if base in ORIGINALS), None):
            reason = f"a subclass of tritonnorm's {base.__name__}"
            report.left.append(Entry(names[0], described(cls), reason))
        elif cls.__module__ in OURS:
            report.left.append(Entry(names[0], described(cls), "stands for no other class"))
        for hook, weights in _hooks(module, names):
            if type(hook) is parametrizations.WeightNormHook:
                hook.__class__ = parametrizations.TorchWeightNormHook
                report.replaced.append(Entry(weights[0], described(type(hook))))
    return report
