"""Watching the launches that tritonnorm makes, without a second copy of how it makes them."""

from contextlib import contextmanager

import torch
from triton.runtime.jit import KernelInterface

from tritonnorm import launch
from tritonnorm.dtypes import compute_dtype

from .shapes import DTYPES, OPERATORS, Case

ACTIVATIONS = ("x", "y", "dy", "dx")
EPS = 1e-5


class _Observed:
    def __init__(self, kernel, observer):
        self.kernel, self.observer = kernel, observer

    def __getitem__(self, grid):
        return lambda **arguments: self.observer(self.kernel, grid, arguments)


@contextmanager
def observe(observer):
    """While open, a launch calls `observer(kernel, grid, arguments)` in its stead, which may run it.

    Of observers within each other the inner one is called; what it runs, the outer one sees.
    """
    kinds = (KernelInterface, _Observed)
    kernels = {name: f for name, f in vars(launch).items() if isinstance(f, kinds)}
    for name, kernel in kernels.items():
        setattr(launch, name, _Observed(kernel, observer))
    try:
        yield
    finally:
        for name, kernel in kernels.items():
            setattr(launch, name, kernel)


def tensors(arguments):
    """The tensors of a launch by the names that kernels/README.md gives them."""
    return {
        name.removesuffix("_ptr"): value
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor)
    }


def run(case: Case, strided: bool = False):
    """Runs one pass of a case on CPU tensors of ones: for observers that look at launches and
    addresses, not at values. `strided` takes the rows from the channels of `[1, n, m]`."""
    operator, dtype = OPERATORS[case.operator], DTYPES[case.dtype]
    x = (
        torch.ones(1, case.n, case.m, dtype=dtype).mT
        if strided
        else torch.ones(case.m, case.n, dtype=dtype)
    )
    weight, bias = (
        torch.ones(case.n, dtype=dtype) if name in operator.parameters else None
        for name in ("weight", "bias")
    )
    memory_format = torch.preserve_format if strided else torch.contiguous_format
    if case.direction == "forward":
        launch.row_forward(
            x,
            weight,
            bias,
            1,
            EPS,
            operator.norm,
            dtype=dtype,
            memory_format=memory_format,
            save_statistics=True,
        )
        return
    spread = torch.ones(case.m, dtype=compute_dtype(x))
    launch.row_backward(
        x.clone(),
        x,
        weight,
        spread.clone() if operator.norm == "layer" else None,
        spread,
        1,
        EPS,
        operator.norm,
        memory_format=memory_format,
        needs_dx=True,
        dweight_dtype=None if weight is None else dtype,
        dbias_dtype=None if bias is None else dtype,
    )
