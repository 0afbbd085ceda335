"""Predictions beside measurements: asking for them where a GPU is measured, and what differs."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from math import inf

from . import machine
from .devices import Device
from .shapes import Case
from .table import case_fields, read_case

EXPECTED = 0.1
"""Part of a predicted time that a measured one may differ by before a reason is looked for."""

MAX_PROCESSES = 8
"""That compile side by side: each has a disassembler of its own."""


def in_own_process(
    cases: list[Case], device: Device, seconds: float = inf
) -> dict[Case, tuple[float, str]]:
    """Microseconds and bound of each case, from processes of their own that do not see the GPU: nothing
    stays behind that a measurement could notice. Cases whose process fails, or takes longer than so many
    seconds, are left out."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "perf", "predict", "--device", device.name, "--json"]

    def ask(some: list[Case]) -> list[tuple[Case, tuple[float, str]]]:
        try:
            done = subprocess.run(
                command,
                input=json.dumps([case_fields(case) for case in some]),
                capture_output=True,
                text=True,
                check=True,
                cwd=machine.ROOT,
                env=environment,
                timeout=None if seconds == inf else seconds,
            )
            times = json.loads(done.stdout.splitlines()[-1])
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip()
            print(f"no prediction of {len(some)} cases: {said.splitlines()[-1]}", file=sys.stderr)
            return []
        return [(case, (us, bound)) for case, (us, bound) in zip(some, times, strict=True)]

    processes = min(os.cpu_count() or 1, MAX_PROCESSES)
    shares = [cases[i::processes] for i in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        return dict(pair for pairs in pool.map(ask, filter(None, shares)) for pair in pairs)


def unexpected(rows) -> str:
    """The cases that took another time than was predicted, worst first. What is behind each belongs,
    with the measurement, beside the number in heuristics that it concerns."""
    ratios = [
        (float(row["median_us"]) / float(row["predicted_us"]), row)
        for row in rows
        if row["status"] == "ok" and row.get("predicted_us")
    ]
    if not ratios:
        return "no prediction to compare with"
    off = [(ratio, row) for ratio, row in ratios if abs(ratio - 1) > EXPECTED]
    lines = [
        f"  {read_case(row).label}: {ratio:.0%} of the prediction, {row['median_us']} us and not "
        f"{row['predicted_us']}, bound by {row['bound']}"
        for ratio, row in sorted(off, key=lambda pair: max(pair[0], 1 / pair[0]), reverse=True)
    ]
    head = f"{len(off)} of {len(ratios)} predictions are off by more than {EXPECTED:.0%}"
    return "\n".join([head + (":" if lines else ""), *lines])
