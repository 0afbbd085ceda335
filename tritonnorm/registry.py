"""Which classes are replaced, by what, and which class a replacement stands for."""

import inspect
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import wraps
from typing import NamedTuple

import torch

from . import modules, parametrizations

TORCH = {
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

ORIGINALS = {ours: theirs for theirs, ours in TORCH.items()}
"""What each replacement stands for; `replacement` adds to it."""


class Candidate(NamedTuple):
    """A function that may replace the forward of the classes of a name, see `register`."""

    name: str | type
    forward: Callable
    shapes: Callable | None


CANDIDATES: list[Candidate] = []


def described(cls) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def register(*names, shapes=None):
    """A decorator: `convert` replaces the forward of classes of these names by the function.

        @tn.register("package.module.MyNorm")
        def my_norm(module, x):
            return tn.functional.rms_norm(x, module.weight.shape, module.weight, module.eps)

    A module gets a subclass of its class with this forward, so that `isinstance` and everything else of
    the class hold as before. That the function computes what the class does is checked before, on a
    probe: random parameters and inputs, in float32 and 16 bits, and their gradients. A module where they
    disagree is left, and the report says so. Where several functions are registered for a class, the
    last one that agrees is taken. For converted models to be pickled, the function must be importable.

    Args:
        names: classes, or their dotted names, which need not be imported. A module's class must be
            exactly this one. A name may be a pattern, with fnmatch's `*`; it then means modules without
            submodules, and counts only for classes that are neither torch.nn's nor registered by
            themselves.
        shapes: a function of the module that gives the shape of each input of the probe. Without it the
            probe is one input `[4, n, *module.weight.shape]`. Its first dimension is that of
            samples, which get scales of their own: large, small, zero.

    Raises:
        TypeError: a name is neither a subclass of torch.nn.Module nor a str, or shapes or what is
            decorated is not callable.
        ValueError: there is no name.
    """
    if not names:
        raise ValueError("register: names must be one class or dotted name, or several")
    for name in names:
        is_module = isinstance(name, type) and issubclass(name, torch.nn.Module)
        if not (isinstance(name, str) or is_module):
            raise TypeError(f"register: names must be classes of modules or dotted names, not {name!r}")
    if shapes is not None and not callable(shapes):
        raise TypeError(f"register: shapes must be a function of the module, not {shapes!r}")

    def decorator(forward):
        if not callable(forward):
            raise TypeError(f"register: forward must be a function, not {forward!r}")
        CANDIDATES.extend(Candidate(name, forward, shapes) for name in names)
        return forward

    return decorator


def candidates(module) -> list[Candidate]:
    """What is registered for the module's class, the last first. Patterns stop at modules that hold
    others: a class whose name ends in LayerNorm may be a whole encoder. And they do not mean torch.nn's
    classes, which have replacements of their own."""
    cls = type(module)
    name = described(cls)
    newest = CANDIDATES[::-1]
    own = [c for c in newest if c.name is cls or c.name == name]
    if own or cls in TORCH or any(module.children()):
        return own
    return [c for c in newest if isinstance(c.name, str) and fnmatchcase(name, c.name)]


_replacements: dict[tuple[type, Callable], type] = {}
FUNCTIONS: dict[type, Callable] = {}
"""What each replacement was registered with."""


class Replaced:
    """What a replacement has beside its forward: a class made at run time cannot be pickled by its name,
    so a module is pickled (and copied) by the two things that its class is made of."""

    def __reduce_ex__(self, protocol):
        cls = type(self)
        rebuild, args, *state = super().__reduce_ex__(protocol)
        rebuild, *args = (ORIGINALS[cls] if arg is cls else arg for arg in (rebuild, *args))
        return _rebuilt, (FUNCTIONS[cls], rebuild, *args), *state


def _renamed(original, forward):
    """The function, called by the names of the original's parameters where it has others of its own."""
    signature = inspect.signature(original.forward)
    names = [*signature.parameters][1:]
    if names == [*inspect.signature(forward).parameters][1 : len(names) + 1]:
        return forward

    @wraps(forward)
    def call(self, *args, **kwargs):
        if kwargs:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            _, *args = bound.args
            kwargs = bound.kwargs
        return forward(self, *args, **kwargs)

    call.__signature__ = signature
    return call


def replacement(original, forward) -> type:
    """The subclass of `original` that computes this, one for each pair. It keeps the name, by which
    model code tells norms from other modules, as transformers' initialization does."""
    key = (original, forward)
    if key not in _replacements:
        body = {
            "forward": _renamed(original, forward),
            "__module__": __name__,
            "__doc__": original.__doc__,
        }
        _replacements[key] = type(original.__name__, (Replaced, original), body)
        ORIGINALS[_replacements[key]] = original
        FUNCTIONS[_replacements[key]] = forward
    return _replacements[key]


def _rebuilt(forward, rebuild, *args):
    """A module as its own class rebuilds it (`__getnewargs__`, `__reduce__`), with the replacement."""
    module = rebuild(*args)
    module.__class__ = replacement(type(module), forward)
    return module
