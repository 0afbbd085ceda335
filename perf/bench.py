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
from functools import partial
from math import inf
from pathlib import Path

import torch

from . import devices, machine
from .calls import make_call, make_copy, make_inputs, max_error
from .predictions import in_own_process, unexpected
from .providers import LOADERS, Provider, describe, load
from .shapes import DEFAULT_SETS, DTYPES, OPERATORS, PASSES, SHAPE_SETS, Case, make_cases, parse_shapes
from .table import OURS, Table, case_fields, summary
from .timer import DeviceTimer, Timing
from .traffic import floor_bytes

TOLERANCES = {"bf16": 3e-2, "fp16": 4e-3, "fp32": 1e-4, "fp64": 1e-9}
"""Largest `max_error` of a right result: four units in the last place for the 16-bit types, as some
peers round twice; for float32 what sums over a million rows lose. A wrong kernel misses by far more."""

USAGE_STATUS = 2  # argparse's

PREDICTING_SHARE = 0.5
"""Part of the time of a run that may go into predictions. What they compile is not compiled again."""

Timer = Callable[[Callable], Timing]
MeasureCase = Callable[..., Iterator[str]]


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


def timed(case: Case, timing: Timing) -> dict:
    """The figures of a timing; times to a nanosecond, which is finer than the events' clock."""
    times = {name: f"{value:.3f}" for name, value in asdict(timing).items()}
    gbps = floor_bytes(case) / timing.median_us / 1e3
    return {**times, "gbps": f"{gbps:.1f}", "status": "ok"}


def checked(case: Case, inputs, outputs) -> dict:
    """How far outputs are from the reference, and what becomes of a row if that is too far."""
    error = max_error(case, inputs, outputs)
    result = {"max_error": f"{error:.2e}"}
    if not error <= TOLERANCES[case.dtype]:
        result |= {"status": "wrong", "error": f"max_error above {TOLERANCES[case.dtype]:.0e}"}
    return result


def _copy(case: Case, timer: Timer, device) -> dict:
    return timed(case, timer(make_copy(case, device)))


def _measure(provider: Provider, case: Case, inputs, timer: Timer) -> dict:
    call = make_call(provider, case, inputs)
    check = checked(case, inputs, call())
    return timed(case, timer(call)) | check


def attempt(measurement: Callable[..., dict], *arguments) -> dict:
    """A measurement's figures, or the error in their place."""
    try:
        return measurement(*arguments)
    except Exception as error:  # whatever a peer raises belongs in its row
        return {"status": "error", "error": describe(error)}


def check_device() -> None:
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


def add_row(table: Table, case: Case, name: str, version: str, result: dict) -> None:
    """Adds the row of a provider. That of the copy is there before, or the row has no fraction of it.

    Raises DeviceLost after a row that tells of the error.
    """
    about = dict(provider=name, provider_version=version, floor_bytes=floor_bytes(case))
    copy = result if name == "copy" else table.find(case, "copy")
    if copy and "median_us" in result and copy.get("median_us"):
        fraction = float(copy["median_us"]) / float(result["median_us"])
        about["fraction_of_copy"] = f"{fraction:.4f}"
    table.add(**case_fields(case), **about, **result)
    if result["status"] == "error":
        check_device()


def measure_case(
    case: Case, providers, timer: Timer, device, table: Table, predictions=None
) -> Iterator[str]:
    """Adds a row for a copy, then for each provider; yields the name after each. tritonnorm's has what
    `predictions`, those of `in_own_process`, say of the case.

    Raises DeviceLost after the row that tells of the error.
    """
    if table.find(case, "copy") is None:
        add_row(table, case, "copy", "", attempt(_copy, case, timer, device))
        yield "copy"
    try:
        inputs = make_inputs(case, device) if providers else None
        failure = None
    except Exception as error:  # out of memory, and then for every provider
        failure = {"status": "error", "error": describe(error)}
    for p in providers:
        result = failure or attempt(_measure, p, case, inputs, timer)
        if p.name == OURS and predictions and case in predictions:
            us, bound = predictions[case]
            result = result | {"predicted_us": f"{us:.3f}", "bound": bound}
        add_row(table, case, p.name, p.version, result)
        yield p.name


def measure(
    cases,
    providers,
    timer: Timer,
    device,
    table: Table,
    seconds: float,
    measure_case: MeasureCase = measure_case,
) -> None:
    """Measures what the table lacks of these cases; starts no case after so many seconds."""
    end = time.monotonic() + seconds
    progress = Progress(
        sum(len(missing(c, providers, table)) + (table.find(c, "copy") is None) for c in cases)
    )
    for case in cases:
        if time.monotonic() > end:
            print(f"{seconds:.0f} s are over: the rest of the cases is left out", file=sys.stderr)
            return
        for name in measure_case(case, missing(case, providers, table), timer, device, table):
            progress.step(f"{case.label} {name}")


def _predictions(
    cases, providers, table: Table, name: str, seconds: float
) -> dict[Case, tuple[float, str]]:
    """What tritonnorm's rows should take, of those that the table lacks, if a GPU of that name has a
    model."""
    device = devices.find(name)
    ours = [p for p in providers if p.name == OURS]
    lacking = [case for case in cases if missing(case, ours, table)]
    if device is None or not lacking:
        return {}
    print(f"predicting {len(lacking)} cases from the compiled kernels", file=sys.stderr)
    return in_own_process(lacking, device, PREDICTING_SHARE * seconds)


def _add_choices(parser: argparse.ArgumentParser, name: str, values, default) -> None:
    parser.add_argument(
        name,
        nargs="+",
        choices=values,
        default=default,
        metavar="NAME",
        help=f"of {', '.join(values)} (default: {' '.join(default)})",
    )


def add_case_arguments(parser: argparse.ArgumentParser, operators=tuple(OPERATORS), shapes=DEFAULT_SETS):
    """The options that say which cases are measured: those that `make_cases` takes."""
    _add_choices(parser, "--operators", list(operators), list(operators))
    _add_choices(parser, "--directions", PASSES, PASSES)
    _add_choices(parser, "--dtypes", list(DTYPES), ["bf16"])
    sets = "; ".join(f"{name}: {shape_set.reason}" for name, shape_set in SHAPE_SETS.items())
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=list(shapes),
        metavar="SHAPE",
        help="ROWSxCOLUMNS, IMAGESxCHANNELS[xSPATIAL...][:GROUPS], [LAYERSx]OUTPUTSxINPUTS[xKERNEL...], "
        "or sets of them; an operator takes those of its kind "
        f"(default: {' '.join(shapes)}). {sets}",
    )


def add_arguments(
    parser: argparse.ArgumentParser, name: str = "bench", providers=tuple(LOADERS)
) -> None:
    """The options of a command `name` that measures providers on cases, to CSV."""
    add_case_arguments(parser)
    _add_choices(parser, "--providers", list(providers), list(providers))
    out = f"{name}.csv"
    parser.add_argument("--out", type=Path, default=Path(out), help=f"default: {out}")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows of --out, measure the others"
    )
    parser.add_argument("--seconds", type=float, default=inf, help="start no case after so long")


def run(arguments) -> int:
    """`python -m perf bench`."""
    return run_command(arguments, "bench", arguments.providers, measure_case, _report, _predictions)


def _report(rows, _) -> int:
    print(summary(rows))
    print(unexpected(rows))
    return int(any(row.get("status") != "ok" for row in rows if row["provider"] == OURS))


def run_command(
    arguments,
    name: str,
    provider_names,
    measure_case: MeasureCase,
    report: Callable,
    predict: Callable | None = None,
) -> int:
    """Measures what the arguments of a command ask for; its status, which is that of `report(rows,
    arguments)` if nothing else ends it. What `predict` finds, if given, `measure_case` is handed as its
    `predictions`."""
    started = time.monotonic()
    try:
        shape_sets = parse_shapes(arguments.shapes)
        cases = make_cases(arguments.operators, arguments.directions, arguments.dtypes, shape_sets)
        if reason := machine.refusal():
            print(f"{name}: {reason}", file=sys.stderr)
            return machine.NO_DEVICE_STATUS
        command = f"python -m perf {shlex.join(sys.argv[1:])}"
        facts = machine.facts()
        table = Table(arguments.out, {**facts, "command": command}, arguments.resume)
    except ValueError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return USAGE_STATUS

    providers, absent = load(provider_names)
    for provider, reason in absent.items():
        print(f"absent: {provider} ({reason})", file=sys.stderr)
        if table.find(None, provider) is None:
            table.add(provider=provider, status="absent", error=reason)
    try:
        if predict is not None:
            found = predict(cases, providers, table, facts["device"], arguments.seconds)
            measure_case = partial(measure_case, predictions=found)
        left = arguments.seconds - (time.monotonic() - started)
        measure(cases, providers, DeviceTimer(), "cuda", table, left, measure_case)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {arguments.out} keeps {len(table.rows)} rows", file=sys.stderr)
        return machine.INTERRUPTED_STATUS
    except DeviceLost as error:
        print(f"\nthe device's context is lost, starting anew: {describe(error)}", file=sys.stderr)
        left = max(arguments.seconds - (time.monotonic() - started), 0)
        again = [*sys.argv[1:], "--resume", "--seconds", str(left)]
        os.execv(sys.executable, [sys.executable, "-m", "perf", *again])
    status = report(table.rows, arguments)
    print(f"{len(table.rows)} rows in {arguments.out}")
    return status
