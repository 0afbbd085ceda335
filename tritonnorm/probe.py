"""Whether a function computes what a module's own forward does."""

import inspect

import torch

from .dispatch import INTERPRETED
from .dtypes import HALF

NARROW = torch.float16 if INTERPRETED else torch.bfloat16
"""Triton's interpreter truncates to bfloat16 where a GPU rounds: there float16 stands for it."""

SCALES = (1.0, 30.0, 1e-3)
"""Of the probe's rows, in turn: small ones show where eps is, and which one."""

ELEMENTS = 512
"""At least so many in a probe, for the share of them that is rounded otherwise to mean something."""

OUTLIERS = 0.02
"""The share of elements that may be rounded to the neighbour, with 16-bit tensors: of a value in the
middle the last bit of a float32 sum decides. A rounding too many or too few moves a quarter of them."""


def _floats(module):
    tensors = (*module.parameters(), *module.buffers())
    return [t for t in tensors if t.is_floating_point()]


def _representable(dtype):
    return NARROW if dtype == torch.bfloat16 else dtype


def _twin(module, device, generator):
    """A copy with random parameters and buffers and no hooks: running it does nothing to the module.
    What is no float, such as a mask, keeps its values, which may select what is computed.

    They are in [0.5, 1.5): no variance is zero, no weight one or zero, which would hide what it does.
    """

    def changed(t):
        if t is None or not t.is_floating_point():
            return t if t is None else t.clone()
        return (torch.rand(t.shape, generator=generator) + 0.5).to(device, _representable(t.dtype))

    twin = object.__new__(type(module))
    vars(twin).update(vars(module))
    for kind in ("_parameters", "_buffers"):
        vars(twin)[kind] = {name: changed(t) for name, t in vars(module)[kind].items()}
    children = {name: m and _twin(m, device, generator) for name, m in module._modules.items()}
    vars(twin).update(_modules=children, _forward_hooks={}, _forward_pre_hooks={})
    return twin


def _default_shapes(module):
    weight = getattr(module, "weight", None)
    row = tuple(getattr(module, "normalized_shape", (64,)) if weight is None else weight.shape)
    return [(2, max(3, ELEMENTS // max(1, torch.Size(row).numel())), *row)]


def _input(shape, dtype, device, generator):
    """Rows of several scales, whose mean is not zero."""
    x = torch.randn(shape, generator=generator) + 0.5
    scales = torch.tensor(SCALES).repeat(shape[0] * shape[1])[: shape[0] * shape[1]]
    return (x * scales.view(*shape[:2], *[1] * (len(shape) - 2))).to(device, dtype)


def _difference(ours, theirs, narrowest) -> str:
    """In what two results differ beyond rounding; empty if in nothing."""
    if not isinstance(ours, torch.Tensor) or not isinstance(theirs, torch.Tensor):
        return "no tensor"
    if ours.shape != theirs.shape:
        return "another shape"
    if ours.dtype != theirs.dtype:
        return "another dtype"
    ours, theirs = ours.double(), theirs.double()
    off = (~torch.isclose(ours, theirs, rtol=1e-5, atol=1e-6)).sum().item()
    if narrowest in HALF:
        bound = 2 * torch.finfo(narrowest).eps * theirs.abs().max()
        allowed = 1 + OUTLIERS * ours.numel() if ((ours - theirs).abs() <= bound).all() else 0
    else:
        allowed = 0
    return f"{off} of {ours.numel()} elements" if off > allowed else ""


def difference(module, candidate) -> str:
    """In what the candidate's function differs from the module's forward; empty if in nothing.

    Both run on a copy of the module with random parameters, once with inputs of the parameters' dtype,
    once with inputs of the other width (float32 beside 16-bit parameters, bfloat16 beside others), where
    the module's own forward takes those. Of the module's tensors only shapes, dtypes and the device are
    read, nothing is written, and the state of the random number generators stays. Modules on the meta
    device are probed on the CPU.
    """
    own, forward, shapes = type(module).forward, candidate.forward, candidate.shapes or _default_shapes
    theirs, ours = (list(inspect.signature(f).parameters.values())[1:] for f in (own, forward))
    if len(theirs) > len(ours) and not any(p.kind is p.VAR_POSITIONAL for p in ours):
        return "it takes other arguments"
    tensors = _floats(module)
    if not all(t.numel() for t in tensors):
        return "its parameters are empty here"  # as those that DeepSpeed keeps elsewhere
    if any(b.is_meta and not b.is_floating_point() for b in module.buffers()):
        return "a buffer on the meta device, no float, has no values yet, which may decide what it does"
    device = next((t.device for t in tensors if t.device.type != "meta"), torch.device("cpu"))
    dtype = _representable(tensors[0].dtype if tensors else torch.float32)
    other = torch.float32 if dtype in HALF else NARROW
    generator = torch.Generator().manual_seed(0)
    try:
        shapes = [tuple(shape) for shape in shapes(module)]
    except Exception as error:
        return f"no probe, {type(error).__name__}: {error}"
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        for input_dtype in (dtype, other):
            twin = _twin(module, device, generator)
            inputs = [_input(shape, input_dtype, device, generator) for shape in shapes]
            try:
                expected = own(twin, *(x.clone() for x in inputs))
            except Exception as error:
                if input_dtype is dtype:
                    return f"its own forward fails on the probe, {type(error).__name__}: {error}"
                continue
            try:
                result = forward(twin, *inputs)
            except Exception as error:
                return f"{type(error).__name__}: {error}"
            narrowest = min(dtype, input_dtype, key=lambda d: torch.finfo(d).bits)
            if off := _difference(result, expected, narrowest):
                return f"{off}, with input of {input_dtype}"
    return ""
