"""Arithmetic of tiles: its results, and what is compiled for GPUs with and without pairs.

Compilation runs in processes of its own, where kernels are not interpreted.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from emulation import launch

from perf.compiled import TARGETS, AbsentDriver
from tritonnorm.kernels.arithmetic import add, multiply, multiply_add, product, subtract
from tritonnorm.kernels.primitives import widened

OPERATIONS = 5
SIZES = (1, 2, 256)


@triton.jit
def every_operation(a_ptr, b_ptr, c_ptr, found_ptr, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    a, b, c = tl.load(a_ptr + lanes), tl.load(b_ptr + lanes), tl.load(c_ptr + lanes)
    tl.store(found_ptr + lanes, add(a, b))
    tl.store(found_ptr + SIZE + lanes, subtract(a, b))
    tl.store(found_ptr + 2 * SIZE + lanes, multiply(a, b))
    tl.store(found_ptr + 3 * SIZE + lanes, product(a, b, ALONE=True) + 0.0)  # zero of one sign
    tl.store(found_ptr + 4 * SIZE + lanes, multiply_add(a, b, c))


@triton.jit
def widen(x_ptr, found_ptr, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    tl.store(found_ptr + lanes, widened(tl.load(x_ptr + lanes)))


def operands(size, dtype, device="cpu"):
    """Three vectors, in most places so near each other that a product which is rounded before its sum
    shows; some elements are not finite, or zeros."""
    a, b, c = torch.randn(3, size, dtype=dtype, device=device)
    near = max(size // 2, 1)
    b[:near] = a[:near]
    c[:near] = -a[:near] * a[:near]
    if size > 6:
        a[-6:] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40])
    return a, b, c


def expected(a, b, c):
    once = (a.double() * b.double() + c.double()).to(a.dtype)
    return torch.stack([a + b, a - b, a * b, a * b + 0.0, once])


def same_floats(found, wanted):
    """Bit by bit, but for those of NaN."""
    bits = {4: torch.int32, 8: torch.int64}[found.itemsize]
    same = found.view(bits) == wanted.view(bits)
    return bool((same | (found.isnan() & wanted.isnan())).all())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_results(size, dtype, device):
    given = operands(size, dtype, device)
    found = torch.empty(OPERATIONS, size, dtype=dtype, device=device)
    every_operation[(1,)](*given, found, size)
    wanted = expected(*given)
    assert same_floats(found[:-1], wanted[:-1])
    if triton.knobs.runtime.interpret or dtype == torch.float64:
        # The interpreter rounds the product, and so does what is expected of float64.
        torch.testing.assert_close(found[-1], wanted[-1], atol=1e-6, rtol=1e-6, equal_nan=True)
    else:
        assert same_floats(found[-1], wanted[-1])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_widened(size, dtype, device):
    x = operands(size, torch.float32, device)[0].to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    found = torch.empty(size, dtype=wide, device=device)
    widen[(1,)](x, found, size)
    assert same_floats(found, x.to(wide))


COMPILED = """
import json
from test_arithmetic import compiled
print(json.dumps(compiled("{target}")))
"""


def compiled(target):
    """PTX for every size, by dtypes of a, and of b and c."""
    triton.runtime.driver.set_active(AbsentDriver(target))

    def ptx(kernel, *dtypes, size):
        tensors = [torch.empty(OPERATIONS * size, dtype=getattr(torch, name)) for name in dtypes]
        return kernel.warmup(*tensors, size, grid=(1,), num_warps=1, enable_fp_fusion=True).asm["ptx"]

    return {
        "float32": [ptx(every_operation, *["float32"] * 4, size=size) for size in SIZES],
        "float64": [ptx(every_operation, *["float64"] * 4, size=size) for size in SIZES],
        "mixed": [ptx(every_operation, "float32", *["float64"] * 3, size=size) for size in SIZES],
        "widen": [ptx(widen, "bfloat16", "float32", size=size) for size in SIZES],
    }


def emulated(ptx, *tensors):
    ranges = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors]
    addresses = [t.data_ptr() for t in tensors]
    launch(ptx, (1,), [*addresses, 0, 0], 1024, ranges, together=False)


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_compiled(target):
    """Pairs of float32 from sm_100 on, not of a single element or of several dtypes; the same numbers on
    all, and an FMA that rounds once."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([".", "tests", environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", COMPILED.format(target=target)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    for name, modules in found.items():
        for size, ptx in zip(SIZES, modules, strict=True):
            pairs = [f"{word}.rn.f32x2" in ptx for word in ("add", "sub", "mul", "fma")]
            in_pairs = target == "sm_100" and name == "float32" and size > 1
            assert pairs == [in_pairs] * 4, (name, size)
            apart = name == "widen" and size > 1  # two elements of a register
            assert ("0xffff0000" in ptx) == apart, (name, size)

    for size, ptx, widening in zip(SIZES, found["float32"], found["widen"], strict=True):
        given, results = operands(size, torch.float32), torch.empty(OPERATIONS, size)
        with np.errstate(all="ignore"):
            emulated(ptx, *given, results)
        assert same_floats(results, expected(*given)), size
        narrow, wide = given[0].bfloat16(), torch.empty(size)
        emulated(widening, narrow, wide)
        assert same_floats(wide, narrow.float()), size
