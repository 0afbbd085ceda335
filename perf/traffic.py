"""Bytes moved to and from memory: the floor, and what the kernels touch.

Triton's interpreter executes every load and store of a kernel on addresses that can be counted. Each
activation and each row's statistic is counted as often as it is touched; parameters and the statistics
of channels, which many programs read and L2 serves, once. Partial results, which L2 serves as well,
stand beside the floor, and so does the table of the tensors of a launch.
"""

import os
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass

from .shapes import BRIEF_OPERATORS, BRIEF_SIZES, OPERATORS, PASSES, ROW_OPERATORS, Case, layouts_of

SIZES = (64, 128, 512, 1000, 1024, 2048, 4096, 5120, 8192, 16384, 20000, 65536)
ROWS = 8
ROW_STATISTICS = ("mean", "spread", "c1", "c2")
RUNNING = ("running_mean", "running_var")
BESIDE = ("_partial", "table")
TOLERANCE = 0.005

MOST_READS = 2.25
"""Reads of an activation, at most: one for statistics or sums and one for the result; and of rows that
LayerNorm loops over their first chunk again, a quarter of the shortest."""


def tensor_bytes(case: Case) -> int:
    """T, the bytes of one activation tensor."""
    return case.elements * case.itemsize


def floor_bytes(case: Case) -> int:
    """The least a pass can move: each activation, statistic and parameter once.

    Forward: x, y, the parameters, and the statistics, which are saved, or read in evaluation; running
    statistics that are updated are read and written. Backward: dy, x, dx, the statistics, the parameters
    but for the bias, and the parameters' gradients. Activations alone are 2T and 3T.
    """
    operator = OPERATORS[case.operator]
    statistics = case.sets * max(case.itemsize, 4) * (2 if operator.norm == "layer" else 1)
    parameter = case.parameter_size * case.parameter_dtype.itemsize
    if case.direction == "forward":
        updated = 2 * statistics if operator.running == "updated" else 0
        return 2 * tensor_bytes(case) + statistics + updated + parameter * len(operator.parameters)
    parameters = 2 * len(operator.parameters) - ("bias" in operator.parameters)
    return 3 * tensor_bytes(case) + statistics + parameter * parameters


@contextmanager
def memory_accesses(observer):
    """While open, every access of an interpreted kernel first calls
    `observer(addresses, itemsize, is_store)`, with the addresses that its mask lets through."""
    from triton.runtime.interpreter import interpreter_builder as builder

    load, store = builder.create_masked_load, builder.create_masked_store

    def observed_load(pointers, mask, *others):
        observer(pointers.data[mask.data], _itemsize(pointers), False)
        return load(pointers, mask, *others)

    def observed_store(pointers, value, mask, *others):
        observer(pointers.data[mask.data], _itemsize(pointers), True)
        return store(pointers, value, mask, *others)

    builder.create_masked_load, builder.create_masked_store = observed_load, observed_store
    try:
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store


def _itemsize(pointers) -> int:
    return pointers.get_element_ty().primitive_bitwidth // 8


@dataclass(frozen=True)
class Moved:
    """What one pass of a case moved, in bytes."""

    case: Case
    variant: str | None  # of `launches.run`
    touched: dict[str, int]  # by tensor, those of all layers as one, as often as it is touched
    distinct: dict[str, int]  # by tensor, each byte once

    @property
    def activations(self) -> dict[str, float]:
        """Times that each activation tensor was moved."""
        return {
            name: self.touched[name] / tensor_bytes(self.case)
            for name in ("x", "dy", "y", "dx")
            if name in self.touched
        }

    @property
    def partials(self) -> int:
        return sum(size for name, size in self.touched.items() if name.endswith("_partial"))

    @property
    def total(self) -> int:
        """Bytes to compare with the floor."""
        rows = OPERATORS[self.case.operator].family == "rows"
        counted = (*self.activations, *(ROW_STATISTICS if rows else RUNNING))
        return sum(
            self.touched[name] if name in counted else self.distinct[name]
            for name in self.touched
            if not name.endswith(BESIDE)
        )

    @property
    def excess(self) -> float:
        """Bytes above the floor, as a part of it."""
        return self.total / floor_bytes(self.case) - 1

    @property
    def reread(self) -> str:
        """Names the activations that were moved more than once."""
        more = {name: times for name, times in self.activations.items() if times > 1}
        return ", ".join(f"{name} {times:.2f} times" for name, times in more.items())

    @property
    def violations(self) -> list[str]:
        """Which of the gates this case fails: what is above the floor has to be a second read of an
        activation, which is listed."""
        found, explained = [], floor_bytes(self.case)
        for name, times in self.activations.items():
            explained += (times - 1) * tensor_bytes(self.case)
            most = MOST_READS if name in ("x", "dy") else 1
            if not 1 <= times <= most:
                found.append(f"{name}: {times:.2f} times")
        if abs(self.total / explained - 1) > TOLERANCE:
            found.append(f"{self.total} bytes, of which {explained:.0f} are explained")
        return found


def measure(case: Case, variant: str | None = None) -> Moved:
    """Runs a case in the interpreter, as `launches.run` does, and counts."""
    import numpy as np

    from . import launches

    touched, sizes, seen = Counter(), {}, {}

    def launch(kernel, grid, arguments):
        tensors = launches.tensors(arguments)

        def count(addresses, itemsize, is_store):
            if addresses.size == 0:
                return
            for name, tensor in tensors.items():
                first = tensor.data_ptr()
                if first <= addresses[0] < first + tensor.nbytes:
                    touched[name] += addresses.size * itemsize
                    sizes[name] = itemsize
                    elements = seen.setdefault(name, np.zeros(tensor.numel(), bool))
                    elements[(addresses - np.uint64(first)) // itemsize] = True
                    return
            raise ValueError(f"{kernel.__name__} touches an address in no tensor of its launch")

        with memory_accesses(count):
            kernel[grid](**arguments)

    with launches.observe(launch):
        launches.run(case, variant)
    touched_of_all, distinct = Counter(), Counter()
    for name, elements in seen.items():
        tensor = name.partition("[")[0]  # x of x[0], a layer's
        touched_of_all[tensor] += touched[name]
        distinct[tensor] += int(elements.sum()) * sizes[name]
    return Moved(case, variant, dict(touched_of_all), dict(distinct))


CHANNEL_SHAPES = {
    "group_norm": (((2, 320, 8, 8), 32), ((2, 48, 16, 16), 4), ((1, 10, 64, 64), 2)),
    "instance_norm": (((2, 64, 16, 16), None), ((1, 40, 48, 48), None)),
    "batch_norm": (
        ((512, 64), None),
        ((4, 32, 32, 32), None),
        ((256, 32, 7, 7), None),
        ((2, 8, 96, 96), None),
    ),
    "batch_norm_eval": (((4, 32, 32, 32), None), ((256, 32, 7, 7), None)),
}
"""Shapes and groups: sets that one program holds first, except BatchNorm's, and sets in pieces, those of
7x7 in columns."""


def cases(brief: bool = False) -> list[tuple[Case, str | None]]:
    """(case, variant) of rows, of channels and of weights."""
    plain = row_cases(brief) + channel_cases(brief) + weight_cases(brief)
    return [(case, None) for case in plain] + [(case, "cluster") for case in cluster_cases(brief)]


def channel_cases(brief: bool = False) -> list[Case]:
    """Both passes and layouts of CHANNEL_SHAPES in bfloat16, and of the first ones in float32."""
    return [
        Case(operator, direction, shape, dtype, layout, groups)
        for operator, shapes in CHANNEL_SHAPES.items()
        for direction in PASSES
        for shape, groups in (shapes[-1:] if brief else shapes)
        for dtype in (("bf16",) if brief or shape != shapes[0][0] else ("bf16", "fp32"))
        for layout in layouts_of(operator, shape)
    ]


WEIGHT_SHAPES = {
    "weight_norm": ((20, 768), (60, 32, 3, 3), (3, 8192), (3, 16384), (3, 20000)),
    "weight_norm_dim1": ((150, 256), (3, 40, 200)),
    "weight_norm_all": ((40, 1024),),
    "weight_norms": ((3, 20, 128, 3),),
}
"""Channels that one program holds, up to the longest ones; and those in pieces."""


def weight_cases(brief: bool = False) -> list[Case]:
    """Both passes of WEIGHT_SHAPES in bfloat16, and of the first ones in float32."""
    return [
        Case(operator, direction, shape, dtype)
        for operator, shapes in WEIGHT_SHAPES.items()
        for direction in PASSES
        for shape in (shapes[:1] if brief else shapes)
        for dtype in (("bf16",) if brief or shape != shapes[0] else ("bf16", "fp32"))
    ]


def row_cases(brief: bool = False) -> list[Case]:
    """LayerNorm in three widths, the others in bfloat16."""
    if brief:
        operators, sizes, dtypes = BRIEF_OPERATORS, BRIEF_SIZES, ("bf16",)
    else:
        operators, sizes, dtypes = ROW_OPERATORS, SIZES, ("bf16", "fp32", "fp64")
    return [
        Case(operator, direction, (ROWS, n), dtype)
        for operator in operators
        for direction in PASSES
        for dtype in (dtypes if operator == "layer_norm" else ("bf16",))
        for n in sizes
    ]


def cluster_cases(brief: bool = False) -> list[Case]:
    """Rows that are held by clusters, in bfloat16: the long ones of `row_cases`, and the longest."""
    from .launches import in_cluster

    sizes = BRIEF_SIZES if brief else (*SIZES, 131072, 262144)
    chosen = [
        Case(operator, direction, (ROWS, n), "bf16")
        for operator in BRIEF_OPERATORS
        for direction in PASSES
        for n in sizes
    ]
    return [case for case in chosen if in_cluster(case)]


def table(moved: list[Moved]) -> str:
    """One line a case: activations in units of T, bytes above the floor, and what was read again."""
    lines = [
        f"{'operator':<15} {'pass':<8} {'dtype':<5} {'shape':>12} {'layout':<13} "
        f"{'floor':>5} {'moved':>6} {'excess':>7} read again"
    ]
    for result in moved:
        case = result.case
        floor = 2 if case.direction == "forward" else 3
        activations = sum(result.activations.values())
        lines.append(
            f"{case.operator:<15} {case.direction:<8} {case.dtype:<5} {case.name:>12} "
            f"{result.variant or case.layout:<13} {floor:>4}T {activations:>5.2f}T "
            f"{result.excess:>7.1%} {result.reread}".rstrip()
            + ("  <- " + "; ".join(result.violations) if result.violations else "")
        )
    return "\n".join(lines)


def add_arguments(parser):
    parser.add_argument("--brief", action="store_true", help="fewer operators and sizes, bfloat16")
    parser.add_argument(
        "--gate",
        action="store_true",
        help="end with status 1 where bytes above the floor are no second read",
    )


def run(arguments) -> int:
    if os.environ.get("TRITON_INTERPRET") != "1":  # read when triton is imported
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        return subprocess.run([sys.executable, "-m", "perf", *sys.argv[1:]], env=environment).returncode
    moved = [measure(case, variant) for case, variant in cases(arguments.brief)]
    print("Bytes touched, counted in Triton's interpreter; nothing was timed")
    print(table(moved))
    at_floor = sum(abs(result.excess) <= TOLERANCE for result in moved)
    failing = sum(bool(result.violations) for result in moved)
    print(f"\n{len(moved)} cases, {at_floor} within {TOLERANCE:.1%} of the floor, {failing} unexplained")
    return int(arguments.gate and failing > 0)
