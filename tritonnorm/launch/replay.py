"""Calls that are recorded once, and then made again with little host time.

What a function of this package does with tensors of given sizes, strides and dtypes is always the same:
it allocates tensors and launches kernels, whose other arguments are numbers. A recording becomes a
Python function that does just this. On a GPU it hands pointers to the compiled kernels; elsewhere, in
the interpreter, it passes tensors as the first call did.

A recording holds for tensors whose sizes, strides, dtypes and device are the recorded ones. Addresses
may differ: where one is aligned less than the choice of kernels took for granted, on another device than
the current one, and while a profiler listens, the function that was recorded is called again.
"""

from collections.abc import Callable
from itertools import count
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs

from ..views import LARGEST_ALIGNMENT
from .common import Launch, kept, launches_are_kept

aten = torch.ops.aten
ALLOCATIONS = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}

VIEWS = {aten.view.default, aten.slice.Tensor}
"""What results may be of a whole tensor that was allocated, which is then allocated as they are; and
arguments of launches of a part of such a tensor, or of an input with memory of its own."""

HOOKED = (
    "runtime.launch_enter_hook is not enter or enter.calls or "
    "runtime.launch_exit_hook is not leave or leave.calls"
)
"""Whether a profiler wants to be told of every launch, as only Triton's own way to launch does."""

ATTEMPTS = range(2, 5)
"""Which calls are recorded, until one succeeds: sizes that never come again are not worth it."""

WORKSPACE_ALIGNMENT = 256
"""Bytes: what PyTorch's allocator guarantees on a GPU, at least, of a tensor of its own."""


class _Allocated(NamedTuple):
    """A tensor that was allocated; of itself autograd gives the caller an alias if we keep one."""

    storage: torch.UntypedStorage
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _Allocations(TorchDispatchMode):
    """Keeps what is allocated; `alone` while PyTorch does nothing else."""

    def __init__(self):
        super().__init__()
        self.tensors, self.alone = [], True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if kept.launching or function in VIEWS:
            return result
        if function in ALLOCATIONS:
            t = result
            about = t.shape, t.stride(), t.dtype, t.device
            self.tensors.append(_Allocated(t.untyped_storage(), *about))
        else:
            self.alone = False
        return result


class Recorded:
    """A function of tensors, and of None, that returns a tuple of such. `run` calls it, or from the
    recording on, what was recorded."""

    def __init__(self, function: Callable[..., tuple]):
        self.function, self.calls = function, 0

    def run(self, *tensors):
        self.calls += 1
        if self.calls not in ATTEMPTS:
            return self.function(*tensors)
        results, replay = record(self.function, tensors)
        if replay is not None:
            self.run = replay
        return results


def record(function, tensors):
    """The results of a call, and the function that repeats it; None if it did more than to allocate and
    to launch, or with tensors that cannot be told apart."""
    allocations = _Allocations()
    with launches_are_kept() as (launches, written), allocations:
        results = tuple(function(*tensors))
    replay = None
    if allocations.alone and launches:
        writer = _Writer(function, tensors, allocations.tensors, results)
        replay = writer.write(launches, written)
    return results, replay


def bind(launch: Launch):
    """Of a launch on a GPU the compiled kernel's `run`, and all of its arguments before the kernel's own
    but the stream, which is the fourth; None of a launch in the interpreter."""
    compiled = launch.compiled
    if compiled is None:
        return None
    grid = (*launch.grid, 1, 1)[:3]
    return compiled.run, grid, (compiled.function, compiled.packed_metadata, None, None, None)


class _NotReplayable(Exception):
    """An argument or a result is none of the tensors that the recording knows."""


class _Writer:
    """Writes the Python function that repeats a recording."""

    def __init__(self, function, inputs, allocated, results):
        self.inputs, self.results = inputs, results
        self.allocated = [t for t in allocated if t.storage.nbytes()]
        self.names = {id(t): f"t{i}" for i, t in enumerate(inputs) if t is not None}
        self.distinct = len(self.names) == sum(t is not None for t in inputs)
        self.fresh = {t.storage.data_ptr(): f"o{i}" for i, t in enumerate(self.allocated)}
        self.owners = self._owners() | self.fresh
        self.namespace = {
            "function": function,
            "empty_like": torch.empty_like,
            "runtime": knobs.runtime,
            "enter": knobs.runtime.launch_enter_hook,
            "leave": knobs.runtime.launch_exit_hook,
        }
        self.parameters = ", ".join(f"t{i}" for i in range(len(inputs)))
        self.numbers = count()
        self.lines = []

    def write(self, launches, written) -> Callable | None:
        bound = [bind(launch) for launch in launches]
        pointers = all(b is not None for b in bound)
        try:
            if not self.distinct:
                raise _NotReplayable
            self._check_addresses()
            self._allocate(pointers)
            if pointers:
                self._launch_pointers(launches, bound)
            else:
                self._launch_tensors(launches)
            if written:
                self.namespace["increment_version"] = torch.autograd.graph.increment_version
                names = ", ".join(map(self._name, written))
                self.lines.append(f"increment_version(({names},))")
            returned = ", ".join("None" if r is None else self._name(r) for r in self.results)
        except _NotReplayable:
            return None
        body = "".join(f"    {line}\n" for line in [*self.lines, f"return ({returned},)"])
        exec(f"def replay({self.parameters}):\n{body}", self.namespace)
        return self.namespace["replay"]

    def _constant(self, value) -> str:
        if value is None or type(value) in (int, bool, str):
            return repr(value)
        name = f"c{next(self.numbers)}"
        self.namespace[name] = value
        return name

    def _name(self, tensor) -> str:
        """Of an input, or of all of a tensor that was allocated."""
        if id(tensor) in self.names:
            return self.names[id(tensor)]
        storage = tensor.untyped_storage()
        if tensor.nbytes != storage.nbytes() or storage.data_ptr() not in self.fresh:
            raise _NotReplayable
        return self.fresh[storage.data_ptr()]

    def _owners(self) -> dict[int, str]:
        """The inputs of one dimension that have memory of their own, by its address."""
        storages = [t if t is None else t.untyped_storage() for t in self.inputs]
        addresses = [s if s is None else s.data_ptr() for s in storages]
        return {
            address: f"t{i}"
            for i, (t, storage, address) in enumerate(zip(self.inputs, storages, addresses, strict=True))
            if t is not None
            and (t.dim(), t.nbytes) == (1, storage.nbytes())
            and addresses.count(address) == 1
        }

    def _located(self, tensor) -> tuple[str, slice | None]:
        """The name of a tensor, or of the one that it is adjacent elements of, and which."""
        storage = tensor.untyped_storage()
        owner = self.owners.get(storage.data_ptr())
        if id(tensor) in self.names or owner is None:
            return self._name(tensor), None
        if tensor.nbytes == storage.nbytes():
            return owner, None
        if tensor.dim() != 1 or not tensor.is_contiguous():
            raise _NotReplayable
        first = tensor.storage_offset()
        return owner, slice(first, first + len(tensor))

    def _check_addresses(self):
        """Of the recorded call and, in writing, of those to come."""
        present = [t for t in self.inputs if t is not None]
        mask = LARGEST_ALIGNMENT * max(t.element_size() for t in present) - 1
        if any(t.data_ptr() & mask for t in present):
            raise _NotReplayable
        for t in present:
            self.lines.append(f"p_{self._name(t)} = {self._name(t)}.data_ptr()")
        addresses = " | ".join(f"p_{self._name(t)}" for t in present)
        device = present[0].device
        elsewhere = ""
        if device.type == "cuda":
            self.namespace["current_device"] = torch._C._cuda_getDevice
            elsewhere = f" or current_device() != {device.index}"
        self.lines.append(f"if ({addresses}) & {mask} or {HOOKED}{elsewhere}:")
        self.lines.append(f"    return function({self.parameters})")

    def _allocate(self, pointers: bool):
        """Results, each in the cheapest way that gives its sizes and strides; then what kernels leave
        for each other: where pointers suffice, in one workspace."""
        returned = {self._name(r): r for r in self.results if r is not None}
        pieces, offset = [], 0
        for t in self.allocated:
            name = self.fresh[t.storage.data_ptr()]
            if name in returned or not pointers:
                if name in returned:
                    t = t._replace(shape=returned[name].shape, strides=returned[name].stride())
                self.lines.append(f"{name} = {self._allocation(t)}")
                if pointers:
                    self.lines.append(f"p_{name} = {name}.data_ptr()")
            else:
                pieces.append(f"p_{name} = workspace + {offset}")
                offset += -(-t.storage.nbytes() // WORKSPACE_ALIGNMENT) * WORKSPACE_ALIGNMENT
        if pieces:
            elements = offset // self.inputs[0].element_size()
            self.lines.append(f"workspace_tensor = t0.new_empty({elements})")
            self.lines += ["workspace = workspace_tensor.data_ptr()", *pieces]

    def _allocation(self, t) -> str:
        likes = {f"t{i}": like for i, like in enumerate(self.inputs) if like is not None}
        alike = [name for name, like in likes.items() if like.dtype == t.dtype]
        for name in alike:
            like = likes[name]
            if t.shape == like.shape and torch.empty_like(like).stride() == t.strides:
                return f"empty_like({name})"
        if t.strides == (1,) and alike:
            return f"{alike[0]}.new_empty({t.shape[0]})"
        options = f"dtype={self._constant(t.dtype)}, device={self._constant(t.device)}"
        self.namespace["empty_strided"] = torch.empty_strided
        return f"empty_strided({tuple(t.shape)}, {t.strides}, {options})"

    def _pointer(self, value) -> str:
        if not isinstance(value, torch.Tensor):
            return self._constant(value)
        name, part = self._located(value)
        return f"p_{name}" if part is None else f"p_{name} + {part.start * value.element_size()}"

    def _tensor(self, value) -> str:
        if not isinstance(value, torch.Tensor):
            return self._constant(value)
        name, part = self._located(value)
        return name if part is None else f"{name}[{part.start}:{part.stop}]"

    def _launch_pointers(self, launches, bound):
        device = self.inputs[0].device
        stream = "0"
        if device.type == "cuda":
            self.namespace["current_stream"] = torch._C._cuda_getCurrentRawStream
            self.lines.append(f"stream = current_stream({device.index})")
            stream = "stream"
        # Triton unloads a kernel that nobody holds.
        self.namespace["kernels"] = [launch.compiled for launch in launches]
        for launch, (run, grid, handles) in zip(launches, bound, strict=True):
            values = [launch.arguments.get(*default) for default in launch.kernel.defaults.items()]
            before = [*map(str, grid), stream, *map(self._constant, handles)]
            arguments = [*before, *map(self._pointer, values)]
            self.lines.append(f"{self._constant(run)}({', '.join(arguments)})")

    def _launch_tensors(self, launches):
        for launch in launches:
            kernel = f"{self._constant(launch.kernel)}[{self._constant(launch.grid)}]"
            arguments = (f"{n}={self._tensor(v)}" for n, v in launch.arguments.items())
            self.lines.append(f"{kernel}({', '.join(arguments)})")
