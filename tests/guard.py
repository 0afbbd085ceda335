"""Guarding interpreted launches: accesses outside the tensors that were passed, and races.

The interpreter runs programs one after another on raw addresses, so it shows neither by itself.
"""

from contextlib import contextmanager

import numpy as np
import torch
from triton.runtime.interpreter import interpreter_builder

from perf.launches import observe, tensors
from perf.traffic import memory_accesses


class _Extent:
    """One tensor of a launch: which of its elements which program touched, and which were written."""

    def __init__(self, name, tensor):
        self.name, self.itemsize = name, tensor.element_size()
        self.first = tensor.data_ptr()
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        self.last = self.first + span * self.itemsize
        # A view's gaps are outside of it.
        self.exists = torch.zeros(span, dtype=torch.bool)
        self.exists.as_strided(tensor.shape, tensor.stride()).fill_(True)
        self.exists = self.exists.numpy()
        self.program = np.full(span, -1, np.int64)
        self.shared = np.zeros(span, bool)
        self.written = np.zeros(span, bool)

    def touch(self, offsets, program, is_store):
        assert not (offsets % self.itemsize).any(), f"misaligned access to {self.name}"
        elements = offsets // self.itemsize
        assert self.exists[elements].all(), f"access to a gap of {self.name}"
        earlier = self.program[elements]
        self.shared[elements] |= (earlier >= 0) & (earlier != program)
        self.program[elements] = program
        self.written[elements] |= is_store


def guarded(kernel, grid, arguments):
    """Runs an interpreted launch; an access outside its tensors or a race is an AssertionError."""
    extents = [_Extent(n, t) for n, t in tensors(arguments).items() if t.numel()]

    def check(addresses, itemsize, is_store):
        if addresses.size == 0:
            return
        x, y, z = interpreter_builder.grid_idx
        _, ny, nz = interpreter_builder.grid_dim
        low, high = int(addresses.min()), int(addresses.max()) + itemsize
        for extent in extents:
            if extent.first <= low and high <= extent.last and extent.itemsize == itemsize:
                offsets = (addresses - np.uint64(extent.first)).astype(np.int64)
                extent.touch(offsets, (x * ny + y) * nz + z, is_store)
                return
        what = "store" if is_store else "load"
        raise AssertionError(f"{kernel.__name__}: {what} outside the tensors of the launch")

    with memory_accesses(check):
        kernel[grid](**arguments)
    for extent in extents:
        races = np.flatnonzero(extent.shared & extent.written)
        assert races.size == 0, (
            f"{kernel.__name__}: one program writes {extent.name}[{races[0]}], another touches it"
        )


@contextmanager
def guarded_launches():
    with observe(guarded):
        yield
