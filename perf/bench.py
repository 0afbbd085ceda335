"""Times every operator beside PyTorch and the installed peers, to CSV.

A row is one provider on one case. Bandwidth is the floor's bytes over the median time, the same bytes
for everyone, and `fraction_of_copy` the time of a copy of as many bytes over that median. What a
provider computed is compared with a float64 reference before it is timed.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from math import inf
from pathlib import Path

import torch

from . import devices, machine
from .predictions import in_own_process, unexpected
from .providers import LOADERS, Provider, describe, load, make_call, make_copy, make_inputs, max_error
from .shapes import DEFAULT_SETS, DTYPES, OPERATORS, PASSES, SHAPE_SETS, Case, make_cases, parse_shapes
from .table import Table, case_fields, summary
from .timer import DeviceTimer, Timing
from .traffic import floor_bytes

TOLERANCES = {"bf16": 3e-2, "fp16": 4e-3, "fp32": 1e-4, "fp64": 1e-9}
"""Largest `max_error` of a right result: four units in the last place for the 16-bit types, as some
peers round twice; for float32 what sums over a million rows lose. A wrong kernel misses by far more."""

USAGE_STATUS = 2  # argparse's

PREDICTING_SHARE = 0.5
"""Part of the time of a run that may go into predictions. What they compile is not compiled again."""

Timer = Callable[[Callable], Timing]


class DeviceLost(RuntimeError):
    """An error that ends the device's context: nothing more can run in this process."""


class Progress:
    """A bar on stderr; where that is no terminal, a line at every tenth."""

    WIDTH = 30

    def __init__(self, total: int):
        self.total, self.done, self.start = max(total, 1), 0, time.monotonic()

    def step(self, label: str) -> None:
        self.done += 1
        share, seconds = self.done / self.total, time.monotonic() - self.start
        if sys.stderr.isatty():
            bar = "#" * int(self.WIDTH * share)
            line = f"\r[{bar:<{self.WIDTH}}] {self.done}/{self.total} {seconds:.0f} s  {label:<60.60}"
            print(line, end="" if self.done < self.total else "\n", file=sys.stderr, flush=True)
        elif self.done * 10 // self.total > (self.done - 1) * 10 // self.total:
            print(f"{self.done}/{self.total} {seconds:.0f} s", file=sys.stderr, flush=True)


def _timed(case: Case, timing: Timing) -> dict:
    """The figures of a timing; times to a nanosecond, which is finer than the events' clock."""
    times = {name: f"{value:.3f}" for name, value in asdict(timing).items()}
    gbps = floor_bytes(case) / timing.median_us / 1e3
    return {**times, "gbps": f"{gbps:.1f}", "status": "ok"}


def _copy(case: Case, timer: Timer, device) -> dict:
    return _timed(case, timer(make_copy(case, device)))


def _measure(provider: Provider, case: Case, inputs, timer: Timer) -> dict:
    call = make_call(provider, case, inputs)
    error = max_error(case, inputs, call())
    result = {**_timed(case, timer(call)), "max_error": f"{error:.2e}"}
    if not error <= TOLERANCES[case.dtype]:
        result |= {"status": "wrong", "error": f"max_error above {TOLERANCES[case.dtype]:.0e}"}
    return result


def _attempt(measurement: Callable[..., dict], *arguments) -> dict:
    """A measurement's figures, or the error in their place."""
    try:
        return measurement(*arguments)
    except Exception as error:  # whatever a peer raises belongs in its row
        return {"status": "error", "error": describe(error)}


def _check_device() -> None:
    """Raises DeviceLost if an earlier error ended the context; otherwise frees what the error held."""
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise DeviceLost(str(error)) from error


def missing(case: Case, providers: list[Provider], table: Table) -> list[Provider]:
    """The providers that offer the case and have no row yet."""
    return [p for p in providers if p.offers(case) and table.find(case, p.name) is None]


def measure_case(
    case: Case, providers, timer: Timer, device, table: Table, predicted=None
) -> Iterator[str]:
    """Adds a row for a copy, then for each provider; yields the name after each. tritonnorm's has what
    was predicted, (us, bound).

    Raises DeviceLost after the row that tells of the error.
    """

    def add(provider, version, result):
        about = dict(provider=provider, provider_version=version, floor_bytes=floor_bytes(case))
        if "median_us" in result and "median_us" in copy:
            fraction = float(copy["median_us"]) / float(result["median_us"])
            about["fraction_of_copy"] = f"{fraction:.4f}"
        if provider == "tritonnorm" and predicted:
            about |= {"predicted_us": f"{predicted[0]:.3f}", "bound": predicted[1]}
        table.add(**case_fields(case), **about, **result)
        if result["status"] == "error":
            _check_device()

    copy = table.find(case, "copy")
    if copy is None:
        copy = _attempt(_copy, case, timer, device)
        add("copy", "", copy)
        yield "copy"
    try:
        inputs = make_inputs(case, device) if providers else None
        failure = None
    except Exception as error:  # out of memory, and then for every provider
        failure = {"status": "error", "error": describe(error)}
    for p in providers:
        add(p.name, p.version, failure or _attempt(_measure, p, case, inputs, timer))
        yield p.name


def measure(
    cases, providers, timer: Timer, device, table: Table, seconds: float, predictions=None
) -> None:
    """Measures what the table lacks of these cases; starts no case after so many seconds. `predictions`
    are those of `in_own_process`."""
    predictions = predictions or {}
    end = time.monotonic() + seconds
    progress = Progress(
        sum(len(missing(c, providers, table)) + (table.find(c, "copy") is None) for c in cases)
    )
    for case in cases:
        if time.monotonic() > end:
            print(f"{seconds:.0f} s are over: the rest of the cases is left out", file=sys.stderr)
            return
        lacking = missing(case, providers, table)
        for name in measure_case(case, lacking, timer, device, table, predictions.get(case)):
            progress.step(f"{case.label} {name}")


def _predictions(
    cases, providers, table: Table, name: str, seconds: float
) -> dict[Case, tuple[float, str]]:
    """What tritonnorm's rows should take, of those that the table lacks, if a GPU of that name has a
    model."""
    device = devices.find(name)
    ours = [p for p in providers if p.name == "tritonnorm"]
    lacking = [case for case in cases if missing(case, ours, table)]
    if device is None or not lacking:
        return {}
    print(f"predicting {len(lacking)} cases from the compiled kernels", file=sys.stderr)
    return in_own_process(lacking, device, PREDICTING_SHARE * seconds)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def choices(name, values, default):
        parser.add_argument(
            name,
            nargs="+",
            choices=values,
            default=default,
            metavar="NAME",
            help=f"of {', '.join(values)} (default: {' '.join(default)})",
        )

    choices("--operators", list(OPERATORS), list(OPERATORS))
    choices("--directions", PASSES, PASSES)
    choices("--dtypes", list(DTYPES), ["bf16"])
    choices("--providers", list(LOADERS), list(LOADERS))
    sets = "; ".join(f"{name}: {shapes.reason}" for name, shapes in SHAPE_SETS.items())
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=list(DEFAULT_SETS),
        metavar="SHAPE",
        help="ROWSxCOLUMNS, IMAGESxCHANNELS[xSPATIAL...][:GROUPS], [LAYERSx]OUTPUTSxINPUTS[xKERNEL...], "
        "or sets of them; an operator takes those of its kind "
        f"(default: {' '.join(DEFAULT_SETS)}). {sets}",
    )
    parser.add_argument("--out", type=Path, default=Path("bench.csv"), help="default: bench.csv")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows of --out, measure the others"
    )
    parser.add_argument("--seconds", type=float, default=inf, help="start no case after so long")


def run(arguments) -> int:
    started = time.monotonic()
    try:
        shape_sets = parse_shapes(arguments.shapes)
        cases = make_cases(arguments.operators, arguments.directions, arguments.dtypes, shape_sets)
        if reason := machine.refusal():
            print(f"bench: {reason}", file=sys.stderr)
            return machine.NO_DEVICE_STATUS
        command = f"python -m perf {shlex.join(sys.argv[1:])}"
        facts = machine.facts()
        table = Table(arguments.out, {**facts, "command": command}, arguments.resume)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return USAGE_STATUS

    providers, absent = load(arguments.providers)
    for name, reason in absent.items():
        print(f"absent: {name} ({reason})", file=sys.stderr)
        if table.find(None, name) is None:
            table.add(provider=name, status="absent", error=reason)
    try:
        predictions = _predictions(cases, providers, table, facts["device"], arguments.seconds)
        left = arguments.seconds - (time.monotonic() - started)
        measure(cases, providers, DeviceTimer(), "cuda", table, left, predictions)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {arguments.out} keeps {len(table.rows)} rows", file=sys.stderr)
        return machine.INTERRUPTED_STATUS
    except DeviceLost as error:
        print(f"\nthe device's context is lost, starting anew: {describe(error)}", file=sys.stderr)
        left = max(arguments.seconds - (time.monotonic() - started), 0)
        again = [*sys.argv[1:], "--resume", "--seconds", str(left)]
        os.execv(sys.executable, [sys.executable, "-m", "perf", *again])
    print(summary(table.rows))
    print(unexpected(table.rows))
    print(f"{len(table.rows)} rows in {arguments.out}")
    ours = [row for row in table.rows if row["provider"] == "tritonnorm"]
    return int(any(row.get("status") != "ok" for row in ours))
