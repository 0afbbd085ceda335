"""Whether a function computes what a module's own forward does."""

import copy
import inspect
from itertools import product
from typing import NamedTuple

import torch

from .dispatch import INTERPRETED
from .dtypes import HALF

NARROW = torch.float16 if INTERPRETED else torch.bfloat16
"""Triton's interpreter truncates to bfloat16 where a GPU rounds: there float16 stands for it."""

SCALES = (1.0, 1e-3, 1e4, None)
"""Of the probe's samples (its first dimension), in turn. Small ones show where eps is, and which one,
large ones whether they are cut off. None is zeros with one element: the largest x_hat that there is."""

SPIKE = 100.0

SAMPLE = 256
"""At least so many elements in a sample, for the share of them that is rounded otherwise to mean
something."""

OUTLIERS = 0.02
"""The share of elements that may be rounded to the neighbour, with 16-bit tensors: of a value in the
middle the last bit of a float32 sum decides. A rounding too many or too few moves a fifth of them."""

GRADIENT_ERRORS = 1e-4, 8
"""What gradients may differ by, relative to their largest element: for sums in another order, and as
multiples of the narrowest dtype's epsilon, as models round their own on the way. Each rounding leaves
half an epsilon; 16 are more than lie on any way through a norm's backward pass, and ConvNeXt's, all of
it in 16 bits, comes to 2.9 epsilons. Of bfloat16 8 are 6%."""

PRIVATE = frozenset(vars(torch.nn.Module()))
"""The attributes that every module has."""


class OwnError(Exception):
    """A module's own forward fails."""


class Setting(NamedTuple):
    """One run: the shapes and the dtype of the inputs, which of `SCALES` comes first, the dtype of the
    parameters (None: their own), and whether the module is in training."""

    training: bool
    parameters: torch.dtype | None
    input: torch.dtype
    shapes: list[tuple[int, ...]]
    first: int

    def __str__(self):
        parameters = "" if self.parameters is None else f" and parameters of {self.parameters}"
        mode = "training" if self.training else "evaluation"
        return f"with input of {self.input}{parameters}, in {mode}"


def _floats(module):
    tensors = (*module.parameters(), *module.buffers())
    return [t for t in tensors if t.is_floating_point()]


def _representable(dtype):
    return NARROW if dtype == torch.bfloat16 else dtype


def _copied(value):
    """A tensor's values, any other object with what it refers to, if it can be copied."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    try:
        return copy.deepcopy(value)
    except Exception:  # a process group, say
        return value


def _twin(module, setting, device, generator):
    """A copy with random parameters and buffers and no hooks: running it does nothing to the module.
    What is no float, such as a mask, keeps its values, which may select what is computed.

    They are in [0.5, 1.5): no variance is zero, no weight one or zero, which would hide what it does.
    """

    def changed(t):
        if t is None or not t.is_floating_point():
            return t if t is None else t.detach().clone()
        values = torch.rand(t.shape, generator=generator, dtype=torch.float32) + 0.5
        return values.to(device, _representable(setting.parameters or t.dtype))

    def parameter(t):
        t = changed(t)
        return t.requires_grad_() if t is not None and t.is_floating_point() else t

    twin = object.__new__(type(module))
    attributes = {name: _copied(v) for name, v in vars(module).items() if name not in PRIVATE}
    vars(twin).update(vars(torch.nn.Module()), training=setting.training, **attributes)
    twin._parameters.update({name: parameter(t) for name, t in module._parameters.items()})
    twin._buffers.update({name: changed(t) for name, t in module._buffers.items()})
    children = {name: m and _twin(m, setting, device, generator) for name, m in module._modules.items()}
    twin._modules.update(children)
    return twin


def _default_shapes(module):
    """Of two ranks: `[samples, rows, *normalized_shape]` and `[samples, *normalized_shape]`."""
    weight = getattr(module, "weight", None)
    row = tuple(getattr(module, "normalized_shape", (64,)) if weight is None else weight.shape)
    rows = max(3, SAMPLE // max(1, torch.Size(row).numel()))
    return [(len(SCALES), rows, *row)], [(len(SCALES), *row)]


def _settings(module, candidate):
    """All combinations of dtypes that the module can meet later, and the other mode and rank in its own.
    The first is as it is."""
    if candidate.shapes is None:
        shapes, *others = _default_shapes(module)
    else:
        shapes, others = [tuple(shape) for shape in candidate.shapes(module)], []
    held = [_representable(t.dtype) for t in _floats(module)]
    own = held[0] if held else torch.float32
    dtypes = dict.fromkeys((own, torch.float32, own if own in HALF else NARROW))
    casts = (None, *(d for d in dtypes if {*held} - {d}))
    firsts = range(0, len(SCALES), max(1, shapes[0][0]))
    settings = [Setting(module.training, *s) for s in product(casts, dtypes, [shapes], firsts)]
    settings += [Setting(not module.training, None, own, shapes, first) for first in firsts]
    return settings + [Setting(module.training, None, own, other, 0) for other in others]


def _inputs(setting, device, generator):
    """Samples whose mean is not zero, of the first input in several scales."""
    inputs = [torch.randn(s, generator=generator, dtype=torch.float32) + 0.5 for s in setting.shapes]
    for i, sample in enumerate(inputs[0], setting.first):
        scale = SCALES[i % len(SCALES)]
        if scale is None:
            sample.zero_().view(-1)[:1] = SPIKE
        else:
            sample *= scale
    return [x.to(device, setting.input).requires_grad_() for x in inputs]


def _run(function, module, setting, device):
    """What a function makes of the probe, and what it leaves in inputs and buffers; and what there are
    gradients of."""
    generator = torch.Generator("cpu").manual_seed(0)
    twin = _twin(module, setting, device, generator)
    leaves = _inputs(setting, device, generator)
    inputs = [x.clone() for x in leaves]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        y = function(twin, *inputs)
    parameters = [p for p in twin.parameters() if p.requires_grad]
    return [y, *inputs, *twin.buffers()], [*leaves, *parameters]


def _gradients(y, tensors):
    if not y.requires_grad:
        return [torch.zeros_like(t) for t in tensors]
    generator = torch.Generator("cpu").manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float32).to(y.device, y.dtype)
    gradients = torch.autograd.grad(y, tensors, dy, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, gradients, strict=True)]


def _largest(t):
    """Of each sample."""
    t = t.abs()
    return t.amax(tuple(range(1, t.dim())), keepdim=True) if t.dim() > 1 else t


def _off(ours, theirs, narrowest) -> str:
    """In what two results differ beyond rounding; empty if in nothing."""
    if not isinstance(ours, torch.Tensor) or not isinstance(theirs, torch.Tensor):
        return "no tensor"
    if ours.shape != theirs.shape:
        return "another shape"
    if ours.dtype != theirs.dtype:
        return "another dtype"
    ours, theirs = ours.detach().double(), theirs.detach().double()
    is_off = ~torch.isclose(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)
    off, allowed = is_off.sum().item(), 0
    if narrowest in HALF:
        bound = 2 * torch.finfo(narrowest).eps * _largest(theirs)
        if not (is_off & ~((ours - theirs).abs() <= bound)).any():
            allowed = 1 + OUTLIERS * ours.numel()
    return f"{off} of {ours.numel()} elements" if off > allowed else ""


def _gradient_off(ours, theirs, narrowest) -> bool:
    """Whether gradients differ by more than the roundings on the way, which are the models' own."""
    ours, theirs = ours.double(), theirs.double()
    relative = max(GRADIENT_ERRORS[0], GRADIENT_ERRORS[1] * torch.finfo(narrowest).eps)
    bound = relative * theirs.nan_to_num(0, 0, 0).abs().max()
    return bool((theirs.isfinite() & ~((ours - theirs).abs() <= bound)).any())


def _compare(module, own, forward, setting, device) -> str:
    """`difference` in one setting.

    Raises:
        OwnError: the module's own forward does not take it.
    """
    try:
        expected, theirs = _run(own, module, setting, device)
    except Exception as error:
        raise OwnError(f"{type(error).__name__}: {error}") from error
    try:
        result, ours = _run(forward, module, setting, device)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    dtypes = {t.dtype for t in theirs}
    narrowest = min(dtypes, key=lambda d: torch.finfo(d).bits)
    for i, (a, b) in enumerate(zip(result, expected, strict=False)):
        if off := _off(a, b, narrowest):
            return f"what it writes, {off}" if i else off
    try:
        expected = _gradients(expected[0], theirs)
    except Exception:  # there is none to compare with
        return ""
    try:
        result = _gradients(result[0], ours)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    is_off = any(_gradient_off(a, b, narrowest) for a, b in zip(result, expected, strict=True))
    return "its gradients" if is_off else ""


def difference(module, candidate) -> str:
    """In what the candidate's function differs from the module's forward; empty if in nothing.

    Both run on copies of the module with random parameters: with parameters as they are, in float32 and
    in 16 bits, and inputs of each of these dtypes, where the module's own forward takes them; and in the
    module's own dtype also in the other mode (training or evaluation) and on rows of another rank.
    Results, what is left in inputs and buffers, and gradients must agree.

    Of the module's tensors only shapes, dtypes and the device are read, and the values of what is no
    float; nothing is written, and the state of the random number generators stays. Modules on the meta
    device are probed on the CPU.
    """
    own, forward = type(module).forward, candidate.forward
    theirs, ours = (list(inspect.signature(f).parameters.values())[1:] for f in (own, forward))
    if len(theirs) > len(ours) and not any(p.kind is p.VAR_POSITIONAL for p in ours):
        return "it takes other arguments"
    tensors = _floats(module)
    if not all(t.numel() for t in tensors):
        return "its parameters are empty here"  # as those that DeepSpeed keeps elsewhere
    if any(b.is_meta and not b.is_floating_point() for b in module.buffers()):
        return "a buffer on the meta device, no float, has no values yet, which may decide what it does"
    device = next((t.device for t in tensors if t.device.type != "meta"), torch.device("cpu"))
    try:
        settings = _settings(module, candidate)
    except Exception as error:
        return f"no probe, {type(error).__name__}: {error}"
    with device, torch.inference_mode(False), torch.enable_grad():
        for setting in settings:
            try:
                off = _compare(module, own, forward, setting, device)
            except OwnError as error:
                if setting is settings[0]:
                    return f"its own forward fails on the probe, {error}"
                continue
            if off:
                return f"{off}, {setting}"
    return ""
