"""The whole run on a GPU machine: install in place, test, benchmark, compare, plot.

It uses the Python that is there, with its torch and triton, and no network. Everything is kept in one
folder named for the device: `tests.txt`, `bench.csv`, `compare.csv`, `compare.txt`, `blocks.csv` and the
plots.
"""

import argparse
import os
import subprocess
import sys
import time
from math import inf
from pathlib import Path

from . import machine
from .shapes import QUICK_SETS, SHAPE_SETS

FULL_SETS = tuple(name for name in SHAPE_SETS if name not in QUICK_SETS)
FULL_DTYPES = ("bf16", "fp32")


def environment() -> dict[str, str]:
    """The environment of the steps: this checkout first on the path, output shown as it comes."""
    path = os.pathsep.join(filter(None, (str(machine.ROOT), os.environ.get("PYTHONPATH"))))
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def step(*arguments: str, log: Path | None = None) -> int:
    """Runs `python <arguments>` in the checkout, its output shown and kept in `log`; its status."""
    command = [sys.executable, *arguments]
    print(f"\n$ python {' '.join(arguments)}", flush=True)
    if log is None:
        return subprocess.run(command, cwd=machine.ROOT, env=environment(), check=False).returncode
    with (
        log.open("w") as file,
        subprocess.Popen(
            command,
            cwd=machine.ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
    ):
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(line)
    return process.returncode


def install() -> None:
    """Installs the checkout in place. Where that fails (no pip, no setuptools), the path serves."""
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    if step("-m", "pip", "install", *options, "-e", "."):
        print("not installed; going on with PYTHONPATH")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, help="folder of the results (default: perf/results/<device>)"
    )
    parser.add_argument("--quick", action="store_true", help="few shapes of each operator, in bf16 only")
    parser.add_argument("--skip-tests", action="store_true", help="benchmark only")
    parser.add_argument(
        "--resume", action="store_true", help="keep what an interrupted run has measured"
    )
    parser.add_argument(
        "--seconds", type=float, default=inf, help="benchmark and compare no longer than this"
    )


def measure(out: Path, arguments) -> int:
    """Installs, tests, benchmarks, compares on a few shapes, times blocks, and plots; 1 if the tests,
    the benchmark or the blocks failed. A loss is not a failure, nor is a failed plot: without matplotlib
    it can be drawn from the CSV elsewhere."""
    install()
    tests = 0 if arguments.skip_tests else step("-m", "pytest", log=out / "tests.txt")
    shapes, dtypes = (QUICK_SETS, ("bf16",)) if arguments.quick else (FULL_SETS, FULL_DTYPES)
    started = time.monotonic()

    def measured(command, shapes, dtypes, log=None):
        """The status of a command, and its CSV."""
        csv = os.path.relpath(out / f"{command}.csv", machine.ROOT)  # which keeps the command
        left = max(arguments.seconds - (time.monotonic() - started), 0)
        resume = ("--resume",) if arguments.resume else ()
        options = ("--out", csv, "--seconds", str(left), "--shapes", *shapes, "--dtypes", *dtypes)
        return step("-m", "perf", command, *options, *resume, log=log), csv

    bench, table = measured("bench", shapes, dtypes)
    measured("compare", QUICK_SETS, ("bf16",), log=out / "compare.txt")
    blocks = step("-m", "perf", "blocks", "--out", os.path.relpath(out / "blocks.csv", machine.ROOT))
    step("-m", "perf", "roofline", table)
    statuses = {"tests": tests, "bench": bench, "blocks": blocks}
    for name, status in statuses.items():
        if status:
            print(f"{name}: failed with status {status}")
    return int(any(statuses.values()))


def run(arguments) -> int:
    if reason := machine.refusal():
        print(f"gpu: {reason}", file=sys.stderr)
        return machine.NO_DEVICE_STATUS
    out = (arguments.out or machine.results_folder()).resolve()
    out.mkdir(parents=True, exist_ok=True)
    try:
        status = measure(out, arguments)
    except KeyboardInterrupt:
        status = machine.INTERRUPTED_STATUS
    print(f"results in {out}")
    return status
