"""Launches on CPU tensors of what the compiler makes of the kernels, for a GPU that is not there."""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np
import torch
import triton
from ptx import numpy_type, parse
from ptx_machine import Blocks, Memory
from ptx_steps import step_of
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from perf.compiled import AbsentDriver, operands_of
from perf.launches import observe, tensors
from tritonnorm import dispatch

MOST_THREADS = 1 << 13
"""Threads, at most, that run together where those of a launch need not: a register takes 32 KB."""

EVERYWHERE = ((1 << 12, 1 << 47),)
"""All addresses that a process may have memory at."""


@lru_cache(maxsize=64)
def _read(ptx: str):
    """The entry of a module, and what its instructions do."""
    entry = parse(ptx)
    return entry, [step_of(instruction, entry) for instruction in entry.instructions]


def launch(ptx: str, grid, operands, shared_bytes: int, ranges, together: bool = False) -> None:
    """Runs a grid of programs: some after the others, unless all have to be there `together`.

    `operands` are numbers and addresses; `ranges` say from which address to which there is memory.
    """
    entry, steps = _read(ptx)
    parameters = {
        name: np.array(value, numpy_type(kind))
        for (kind, name), value in zip(entry.parameters, operands, strict=True)
    }
    x, y, z = (*grid, 1, 1)[:3]
    assert z == 1, "a grid of two dimensions at most"
    grid = x * entry.cluster, y
    count, memory = prod(grid), Memory(ranges)
    at_once = max(MOST_THREADS // (entry.threads * entry.cluster), 1) * entry.cluster
    if together:
        at_once = count
    elif any("acquire" in instruction.opcode for instruction in entry.instructions):
        at_once = entry.cluster  # who waits for others would do so forever
    with np.errstate(all="ignore"):
        for first in range(0, count, at_once):
            numbers = range(first, min(first + at_once, count))
            Blocks(entry, numbers, grid, memory, shared_bytes, parameters).run(steps)


def _range(tensor) -> tuple[int, int]:
    """From which address to which a tensor's memory is."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


@dataclass(frozen=True)
class Emulated:
    """A compiled kernel, as what records launches takes it."""

    kernel: JITFunction
    compiled: CompiledKernel
    together: bool
    function: None = None
    packed_metadata: None = None

    def launch(self, grid, arguments, ranges) -> None:
        operands = [value for _, value in operands_of(self.kernel, arguments)]
        addresses = [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in operands]
        addresses += 0, 0  # Triton adds pointers to memory of which these kernels need none
        ptx, shared_bytes = self.compiled.asm["ptx"], self.compiled.metadata.shared
        launch(ptx, grid, addresses, shared_bytes, ranges, self.together)

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *values) -> None:
        """As Triton's launcher: `values` are the kernel's parameters, addresses for tensors. Where the
        memory behind those ends is not known."""
        self.launch((x, y, z), dict(zip(self.kernel.arg_names, values, strict=True)), EVERYWHERE)


def run(kernel, grid, arguments) -> Emulated:
    """Compiles a launch, and runs it."""
    together = arguments.get("launch_cooperative_grid", False)
    emulated = Emulated(kernel, kernel.warmup(grid=grid, **arguments), together)
    emulated.launch(grid, arguments, [_range(t) for t in tensors(arguments).values()])
    return emulated


@contextmanager
def emulated(target: str):
    """While open, CPU tensors take the kernels' path, with kernels that are compiled for a target."""
    driver = triton.runtime.driver
    driver_before, interpreted_before = driver._active, dispatch.INTERPRETED
    driver.set_active(AbsentDriver(target))
    dispatch.INTERPRETED = True
    try:
        with observe(run):
            yield
    finally:
        driver.set_active(driver_before)
        dispatch.INTERPRETED = interpreted_before
