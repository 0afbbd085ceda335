"""Compiled kernels that are made up, for tests of what is worked out from such."""

from perf.assembly import Region
from perf.compiled import Lowered


def kernel(**changes):
    """A forward pass over 8,192 rows of 4,096, one a program, that an SM holds 6 of."""
    size = 8192 * 4096 * 2
    fields = dict(
        target="sm_90",
        kernel="row_forward_resident",
        operator="layer_norm",
        direction="forward",
        shape="8192x4096",
        dtype="bf16",
        layout="contiguous",
        tiles=[(1, 4096)],
        line=4096,
        num_warps=8,
        registers=40,
        stack=0,
        widths={"x": [16, 16], "y": [16, 16], "mean": [4]},
        programs=8192,
        tensor_bytes={"x": size, "y": size, "mean": 4 * 8192},
        regions=[Region(loads={"x": 32}, stores={"y": 32, "mean": 4}, accesses=5, barriers=3)],
        instructions=[272.0],
    )
    return Lowered(**(fields | changes))


def walking(**changes):
    """A backward pass of 1,024 programs, of 8 rows each."""
    size = 8192 * 1024 * 2
    loop = Region(
        parent=0, loads={"x": 16, "dy": 16, "mean": 4}, stores={"dx": 16}, accesses=4, barriers=3
    )
    names = ("x", "dy", "dx")
    fields = dict(
        kernel="row_backward",
        direction="backward",
        shape="8192x1024",
        tiles=[(1, 1024)],
        num_warps=4,
        widths={name: [16] for name in names},
        programs=1024,
        steps=8.0,
        tensor_bytes={name: size for name in names},
        regions=[Region(stores={"dweight_partial": 32}, barriers=4), loop],
        instructions=[128.0, 200.0],
    )
    return kernel(**(fields | changes))
