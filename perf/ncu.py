"""Nsight Compute's command line: where it is, what it is asked, and its answer."""

import csv
import re
import shutil
from pathlib import Path

from .reading import Kernel

PLACES = (
    "/usr/local/cuda*/bin/ncu",
    "/opt/nvidia/nsight-compute/*/ncu",
    "/usr/local/NVIDIA-Nsight-Compute*/ncu",
)
"""Where its installers put it, if not on the path."""

FIGURES = {
    "microseconds": "gpu__time_duration.sum",
    "read": "dram__bytes_read.sum",
    "written": "dram__bytes_write.sum",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_percent": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "l2_hit_percent": "lts__t_sector_hit_rate.pct",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
"""The metric of each figure of a Kernel."""

LIMITS = {
    "registers": "launch__occupancy_limit_registers",
    "shared memory": "launch__occupancy_limit_shared_mem",
    "its number of warps": "launch__occupancy_limit_warps",
    "the programs an SM can hold": "launch__occupancy_limit_blocks",
}
"""Programs an SM holds, as far as each resource allows. The least of them limits occupancy."""

SECTIONS = ("WarpStateStats", "Occupancy", "LaunchStats")
"""Which reasons a warp can stall for depends on the architecture: the section knows. Limits of occupancy
belong to sections as well."""

STALL = re.compile(r"smsp__average_warps?_(?:latency_)?issue_stalled_(\w+?)(?:_per_issue_active)?\.\w+")

UNITS = {
    **{"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9},
    **{"ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6},
    **{"nsecond": 1e-3, "usecond": 1.0, "msecond": 1e3, "second": 1e6},
}
"""Bytes, and microseconds; other units are taken as they come. Versions name seconds differently."""

PERMISSION = "ERR_NVGPUCTRPERM"
NOT_PERMITTED = (
    "this user may not read the GPU's counters: an administrator can allow it, by the driver's option "
    "NVreg_RestrictProfilingToAdminUsers=0, or the profile can run as root "
    "(https://developer.nvidia.com/ERR_NVGPUCTRPERM)"
)


class NcuError(RuntimeError):
    """ncu ran, and gave no figures; the message says why."""


def find(places=PLACES) -> str | None:
    """An ncu that is installed: that on the path, or the last by name, which has a version."""
    if found := shutil.which("ncu"):
        return found
    found = [path for place in places for path in Path("/").glob(place.lstrip("/"))]
    return str(max(found)) if found else None


def command(ncu: str, log: str, program: list[str]) -> list[str]:
    """The command that profiles what a program runs between cudaProfilerStart and Stop.

    Caches are flushed before each kernel, as `bench` does; clocks are left alone, as there.
    """
    metrics = ",".join((*FIGURES.values(), *LIMITS.values()))
    sections = [option for name in SECTIONS for option in ("--section", name)]
    return [
        *(ncu, "--csv", "--page", "raw", "--print-units", "base", "--log-file", log),
        *("--profile-from-start", "off", "--cache-control", "all", "--clock-control", "none"),
        *sections,
        *("--metrics", metrics),
        *program,
    ]


def _number(text: str, unit: str) -> float | None:
    """A value in bytes, microseconds or its own unit; None where there is none (n/a, nan)."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    return None if value != value else value * UNITS.get(unit, 1.0)


def parse(text: str) -> list[Kernel]:
    """The kernels of a CSV of the raw page: after lines of ncu's own titles, units, and a line a kernel.

    Raises:
        NcuError: counters may not be read, or there is no kernel.
    """
    if PERMISSION in text:
        raise NcuError(NOT_PERMITTED)
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = list(csv.reader(line for line in lines[start:] if line and not line.startswith("==")))
    if len(rows) < 3:
        told = [line for line in lines if line.startswith("==ERROR==")] or lines[-1:]
        raise NcuError(" ".join(told) or "it printed nothing")
    titles, units, *kernels = rows
    return [_kernel(dict(zip(titles, zip(row, units, strict=True), strict=True))) for row in kernels]


def _kernel(cells: dict[str, tuple[str, str]]) -> Kernel:
    values = {title: _number(*cell) for title, cell in cells.items()}
    figures = {figure: values.get(metric) for figure, metric in FIGURES.items()}
    if figures["microseconds"] is None:
        raise NcuError(f"no {FIGURES['microseconds']} of {cells['Kernel Name'][0]}")
    if figures["registers"] is not None:
        figures["registers"] = int(figures["registers"])
    limits = {name: values[metric] for name, metric in LIMITS.items() if values.get(metric) is not None}
    stalls = {}
    for title, value in values.items():
        match = STALL.fullmatch(title)
        if match and value is not None and match[1] != "selected":  # which is no stall
            stalls[match[1]] = value
    return Kernel(
        name=cells["Kernel Name"][0],
        limiter=min(limits, key=limits.get) if limits else None,
        stalls=stalls,
        **figures,
    )
