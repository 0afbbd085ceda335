"""What profilers are told of the kernels: names, shapes and bytes."""

import os
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import INTERPRETED
from test_imports import ROOT

from perf import launches, traffic
from perf.shapes import Case
from tritonnorm.kernels import names
from tritonnorm.kernels.arithmetic import product
from tritonnorm.launch.common import Kernel

KERNELS = {launched.kernel.__name__: launched.kernel for launched in Kernel.every}
"""What is launched."""


def descriptions(case, variant=None):
    """What each launch of a case is described as; none of them runs."""
    found = []

    def describe(kernel, grid, arguments):
        found.append(kernel.describe_launch(grid, None, arguments))

    with launches.observe(describe):
        launches.run(case, variant)
    return found


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_describes_its_launches(name):
    """A kernel that is decorated with triton.jit alone would be a bare name in a profile; one without
    operations would have no FLOP."""
    assert hasattr(KERNELS[name], "describe_launch")
    assert name in names.OPERATIONS


COUNTED = [
    ("layer_norm", (6, 200), "bf16", None, None),  # the last tile is not full
    ("layer_norm", (2, 20000), "bf16", None, None),  # looped, with a last chunk; split
    ("rms_norm", (2, 20000), "fp32", None, None),
    ("normalize", (5, 64), "bf16", None, None),
    ("group_norm", (2, 32, 4, 4), "bf16", 8, None),  # resident
    ("group_norm", (1, 10, 64, 64), "bf16", 2, None),  # a set of several channels, in pieces
    ("instance_norm", (1, 6, 5, 5), "bf16", None, None),
    ("batch_norm", (3, 6, 7, 7), "bf16", None, None),
    ("batch_norm", (3, 6, 7, 7), "bf16", None, "team"),
    ("batch_norm_eval", (2, 8, 4, 4), "bf16", None, None),
    ("weight_norm", (20, 96), "bf16", None, None),
    ("weight_norm_dim1", (150, 64), "bf16", None, None),
    ("weight_norms", (3, 20, 128, 3), "bf16", None, None),
    ("weight_norms", (2, 2, 17000), "bf16", None, None),  # in pieces
]
"""Operator, shape, dtype, groups, variant: every kernel, every way in which one reads a tensor again."""


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU no bytes are counted")
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("operator", "shape", "dtype", "groups", "variant"), COUNTED)
def test_bytes_are_those_that_the_interpreter_counts(operator, direction, shape, dtype, groups, variant):
    """Of every launch, exactly: activations and running statistics as often as they are touched, and
    what many programs read once."""
    again = (*launches.ACTIVATIONS, *traffic.RUNNING)
    compared = []

    def compare(kernel, grid, arguments):
        found = launches.tensors(arguments)
        touched = Counter()
        seen = {name: np.zeros(tensor.numel(), bool) for name, tensor in found.items()}

        def count(addresses, itemsize, is_store):
            for name, tensor in found.items():
                start = tensor.data_ptr()
                if addresses.size and start <= addresses[0] < start + tensor.nbytes:
                    touched[name] += addresses.size * itemsize
                    seen[name][(addresses - np.uint64(start)) // itemsize] = True

        with traffic.memory_accesses(count):
            kernel[grid](**arguments)
        counted = 0
        for name, tensor in found.items():
            if name.partition("[")[0] in again:
                counted += touched[name]
            elif name in ("table", "arrivals"):  # read in parts; added to, which is no load or store
                counted += tensor.nbytes
            else:
                counted += int(seen[name].sum()) * tensor.element_size()
        compared.append(
            (kernel.__name__, kernel.describe_launch(grid, None, arguments)["bytes"], counted)
        )

    case = Case(operator, direction, shape, dtype, groups=groups)
    with launches.observe(compare):
        launches.run(case, variant)
    assert compared
    for name, described, counted in compared:
        assert described == counted, name


def test_labels_have_operator_shape_and_dtype():
    labels = [d["name"] for d in descriptions(Case("layer_norm", "backward", (64, 8192), "bf16"))]
    assert labels == ["layer_norm_bwd [64, 8192] bf16", "fold_parameter_gradients [64, 8192] fp32"]
    labels = [d["name"] for d in descriptions(Case("rms_norm", "backward", (4, 16384), "fp32"))]
    assert labels[0] == "rms_norm_gradient_means [4, 16384] fp32"
    labels = [d["name"] for d in descriptions(Case("normalize", "forward", (4, 20000), "fp64"))]
    assert labels == ["normalize_fwd [4, 20000] fp64"]
    case = Case("group_norm", "forward", (1, 40, 64, 64), "bf16", "contiguous", 2)
    assert descriptions(case)[-1]["name"] == "channel_normalize [1, 40, 4096] bf16 groups of 20"
    case = Case("weight_norms", "forward", (3, 20, 128, 3), "bf16")
    assert [d["name"] for d in descriptions(case)] == ["weight_forward 3 tensors bf16"]


def test_a_launch_of_another_kind_is_described_as_far_as_it_can_be():
    found = names.describe("new_kernel", {"table_ptr": None, "z_ptr": torch.ones(4), "K": 3})
    assert found == {"name": "new_kernel [4] fp32", "bytes": 16}


def test_operations_are_those_of_the_compute_dtype():
    (found,) = descriptions(Case("layer_norm", "forward", (4, 64), "bf16"))
    assert "flops32" in found
    (found,) = descriptions(Case("layer_norm", "forward", (4, 64), "fp64"))
    assert "flops64" in found


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU no operations are counted")
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("operator", "shape", "groups"),
    [
        ("layer_norm", (128, 128), None),
        ("layer_norm", (1, 65536), None),
        ("rms_norm", (128, 128), None),
        ("group_norm", (2, 64, 8, 8), 8),
        ("batch_norm", (4, 8, 32, 32), None),  # a piece a channel
        ("batch_norm", (4, 8, 96, 96), None),
        ("weight_norm", (64, 128), None),
        ("weight_norm_dim1", (512, 64), None),
    ],
)
def test_operations_are_those_that_the_interpreter_does(operator, shape, groups, direction, monkeypatch):
    """An element, of tiles without padding. At their end, programs add up what they hold for two
    parameters, which is not counted. Of folds, whose tiles are mostly padding, nothing can be said."""
    from triton.runtime.interpreter import ReduceOps, interpreter_builder

    done = Counter()

    def counting(operation, size, each=lambda: 1):
        def counted(*arguments):
            data = size(*arguments)
            if data.ndim == 2 and data.dtype.kind == "f":
                done["operations"] += data.size * each()
            return operation(*arguments)

        return counted

    def of_fma():
        """Two, unless it is but a product that is rounded."""
        frame = sys._getframe()
        while frame and frame.f_code.co_name != product.fn.__name__:
            frame = frame.f_back
        return 1 if frame else 2

    for name in ("create_fadd", "create_fsub", "create_fmul", "create_fdiv", "create_fma"):
        operation = getattr(interpreter_builder, name)
        each = [of_fma] if name == "create_fma" else []
        monkeypatch.setattr(interpreter_builder, name, counting(operation, lambda x, *_: x.data, *each))
    monkeypatch.setattr(ReduceOps, "sum", counting(ReduceOps.sum, lambda self, x: x.handle.data))
    compared = []

    def compare(kernel, grid, arguments):
        done.clear()
        kernel[grid](**arguments)
        if "x_ptr" in arguments:
            described = kernel.describe_launch(grid, None, arguments)["flops32"]
            elements = arguments["x_ptr"].numel()
            compared.append((kernel.__name__, described, done["operations"], elements))

    with launches.observe(compare):
        launches.run(Case(operator, direction, shape, "bf16", groups=groups))
    assert compared
    for name, described, counted, elements in compared:
        assert described <= counted <= described + 2 * elements, (name, counted / elements)


COMPILED = """
import re
import triton
from triton import knobs
from perf import compiled as compiling
from perf import launches
from perf.shapes import Case

def show(kernel, grid, arguments):
    compiled = kernel.warmup(grid=grid, **arguments)
    print(re.search(r"\\.entry (\\S+?)\\(", compiled.asm["ptx"])[1], compiled.metadata.name)
    assert kernel.launch_metadata is None  # no hook is set
    knobs.runtime.launch_enter_hook.add(print)
    compiled.module, compiled.function = "loaded", "nowhere"  # or it would look for a GPU
    metadata = compiled.launch_metadata(grid, 0, *(arguments.get(name) for name in kernel.arg_names))
    assert metadata.data["name"] == compiled.metadata.name
    assert metadata.get()["bytes"] == kernel.describe_launch(grid, None, arguments)["bytes"] > 0
    compiled.module = None
    knobs.runtime.launch_enter_hook.remove(print)

triton.runtime.driver.set_active(compiling.AbsentDriver("sm_90"))
with launches.observe(show):
    launches.run(Case("layer_norm", "forward", (4, 256), "bf16"))
    launches.run(Case("rms_norm", "backward", (4, 128), "fp32"), "output")
    launches.run(Case("batch_norm_eval", "forward", (2, 16, 8, 8), "bf16", "channels_last"))
"""


def test_compiled_functions_have_readable_names(tmp_path):
    """What Nsight and torch.profiler show; and nothing is described while no hook asks for it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # what was compiled under another name keeps it
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), environment.get("PYTHONPATH", "")))
    process = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    entries, found = zip(*(line.split() for line in process.stdout.splitlines()), strict=True)
    assert entries == found
    assert all(re.fullmatch("[a-z][a-z0-9_]*", name) for name in found)
    assert found[0] == "row_forward_resident_layer_bf16_n256"
    assert found[1] == "row_backward_rms_fp32_n128_from_y"
    assert re.fullmatch(r"channel_normalize_bf16_\d+x\d+_along_c", found[-1])
