"""What launches of rows and of channels share."""

import inspect
import threading
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from math import ceil
from typing import Any, ClassVar, NamedTuple

import torch
import triton

from .. import heuristics
from ..dtypes import compute_dtype
from ..kernels import fold as fold_kernels

FP_FUSION = {"enable_fp_fusion": True}
"""Multiply and add contract to FMA: stated, since the default differs between Triton releases."""


MOST_PLANS = 4096
"""Plans, at most, that are kept of a kind: shapes come again at every step of a training, or never."""

_plans, _forget = [], []


def forgotten_with_plans(forget):
    """Has `forget()` called whenever plans are forgotten."""
    _forget.append(forget)


def planned(function):
    """Keeps the answers of a function of sizes, strides and dtypes: they come again at every step of a
    training, and cost more than the launch that they are for."""
    kept = lru_cache(maxsize=MOST_PLANS)(function)
    _plans.append(kept)
    return kept


def forget_plans():
    """For who changes heuristics, as tests do."""
    for plan in _plans:
        plan.cache_clear()
    for forget in _forget:
        forget()


class Launch(NamedTuple):
    """A launch that was made. `compiled` is what Triton made of the kernel, None in the interpreter."""

    kernel: "Kernel"
    grid: tuple
    arguments: dict
    compiled: Any


class _Kept(threading.local):
    """What a thread has launched, and the inputs that it has written to, None while nobody asks; and
    whether it is launching: PyTorch's operators are then the interpreter's."""

    launches = written = None
    launching = False


kept = _Kept()


@contextmanager
def launches_are_kept():
    """While open, what this thread does is added to the lists that it gives."""
    outer = kept.launches, kept.written
    kept.launches, kept.written = [], []
    try:
        yield kept.launches, kept.written
    finally:
        kept.launches, kept.written = outer


def is_written(tensor):
    """A kernel has written to it: autograd must know, as of any change in place."""
    torch.autograd.graph.increment_version(tensor)
    if kept.written is not None:
        kept.written.append(tensor)


class Kernel:
    """A Triton kernel, whose launches can be kept. `kernel` may be changed for one that observes;
    `defaults` are those of its parameters, in their order."""

    every: ClassVar[list] = []

    def __init__(self, kernel):
        self.kernel = kernel
        parameters = inspect.signature(kernel.fn).parameters.values()
        self.defaults = {parameter.name: parameter.default for parameter in parameters}
        Kernel.every.append(self)

    def __getitem__(self, grid):
        def launch(**arguments):
            kept.launching = True
            try:
                compiled = self.kernel[grid](**arguments)
            finally:
                kept.launching = False
            if kept.launches is not None:
                kept.launches.append(Launch(self, grid, arguments, compiled))

        return launch


fold_parameter_gradients = Kernel(fold_kernels.fold_parameter_gradients)


_HERE = nullcontext()


def on_device(x: torch.Tensor):
    """The context in which Triton launches on the device of x."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)


@lru_cache
def device_facts(device: torch.device) -> heuristics.common.DeviceFacts | None:
    """What launch choices may know of a GPU; None elsewhere."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return heuristics.common.DeviceFacts(
        capability=(properties.major, properties.minor),
        processors=properties.multi_processor_count,
        l2_bytes=properties.L2_cache_size,
    )


TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])


@lru_cache
def largest_cluster(index: int) -> int:
    """Blocks of the largest cluster that a GPU and this Triton can make; -1 is the CPU, with none."""
    device = torch.device("cuda", index) if index >= 0 else torch.device("cpu")
    return heuristics.rows.largest_cluster(device_facts(device), TRITON_VERSION)


class _ByDevice(dict):
    """Choices by the number of a device, which is -1 for the CPU. Found at the first launch there."""

    def __missing__(self, index: int) -> heuristics.table.Choices:
        arch = None
        # ROCm's capabilities are numbers of another kind.
        if index >= 0 and torch.version.hip is None and not triton.knobs.runtime.interpret:
            major, minor = device_facts(torch.device("cuda", index)).capability
            arch = f"sm_{major}{minor}"
        self[index] = heuristics.table.load(arch)
        return self[index]


CHOICES = _ByDevice()
"""What decides launches on the device of x: `CHOICES[x.get_device()]`. Plans are kept by it."""


STATISTICS_STEP = 4
"""Elements: the second kind of statistics begins at a multiple of so many in their tensor, 16 bytes of
float32, as Triton compiles another kernel for pointers that are aligned to less."""


def statistics_size(count: int, kinds: int) -> int:
    """The elements of a tensor that holds one or two `kinds` of statistics, `count` of each."""
    return (kinds - 1) * -(-count // STATISTICS_STEP) * STATISTICS_STEP + count


def new_statistics(x, count: int, kinds: int) -> torch.Tensor:
    """A tensor for the statistics of x."""
    return torch.empty(statistics_size(count, kinds), dtype=compute_dtype(x), device=x.device)


def joined_statistics(first, last) -> torch.Tensor:
    """A copy of two kinds of statistics in one tensor, of the wider of their dtypes."""
    gap = -first.shape[0] % STATISTICS_STEP
    return torch.cat((first, first.new_zeros(gap), last) if gap else (first, last))


def statistics_of(tensor, count: int):
    """The first and the last kind of statistics in a tensor, `[count]` each: the same of one kind."""
    return tensor[:count], tensor[tensor.shape[0] - count :]


def parameter_partials(x, programs: int, n: int, dtypes):
    """Partial gradients `[programs, n]` for each parameter whose gradient's dtype is not None."""
    wide, device = compute_dtype(x), x.device
    return [d and torch.empty(programs, n, dtype=wide, device=device) for d in dtypes]


@planned
def _fold(programs: int, n: int):
    """The grid of a fold of partial gradients, and the arguments that are sizes."""
    tile = heuristics.common.fold(programs)
    sizes = dict(P=programs, N=n, BLOCK_P=tile.rows, BLOCK_N=tile.block_n, num_warps=tile.num_warps)
    return (ceil(n / tile.block_n),), sizes | FP_FUSION


def fold_parameters(partials, dtypes):
    """dweight and dbias `[n]` in their dtypes, from `parameter_partials`; None for those that are."""
    first = partials[0] if partials[0] is not None else partials[1]
    if first is None:
        return None, None
    programs, n = first.shape
    # Of float64 input the fold leaves float64: Triton's interpreter casts it wrongly to 16 bits.
    wide = first.dtype == torch.float64
    device = first.device
    dweight, dbias = [
        d and torch.empty(n, dtype=torch.float64 if wide else d, device=device) for d in dtypes
    ]
    grid, sizes = _fold(programs, n)
    fold_parameter_gradients[grid](
        dweight_partial_ptr=partials[0],
        dbias_partial_ptr=partials[1],
        dweight_ptr=dweight,
        dbias_ptr=dbias,
        **sizes,
    )
    if wide:
        dweight, dbias = (d and t.to(d) for t, d in zip((dweight, dbias), dtypes, strict=True))
    return dweight, dbias
