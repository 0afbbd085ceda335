"""Predicts the time of every operator on GPUs that need not be there: see model.py.

Kernels are compiled as they would be launched, for tensors of any size, and nothing runs.
"""

import argparse
import json
import os
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from . import devices, gates, machine, model
from .compiled import Lowered, lower
from .devices import DEVICES, Device
from .launches import device_facts
from .shapes import DTYPES, OPERATORS, PASSES, QUICK_SETS, Case, make_cases, parse_shapes
from .table import Table, case_fields, read_case
from .traffic import floor_bytes

USAGE_STATUS = 2  # argparse's


@dataclass(frozen=True)
class Predicted:
    """A pass on a device, and the launches that it consists of."""

    case: Case
    device: Device
    launches: list[Lowered]
    prediction: model.Prediction

    @property
    def missed(self) -> list[tuple[gates.Miss, str]]:
        """The gates that launches miss, with a line each."""
        return [
            (miss, miss.line(f"{self.device.short} {self.case.label} {k.kernel}"))
            for k in self.launches
            for miss in gates.missed(gates.OF_LAUNCHES, k, self.device)
        ]

    @property
    def us(self) -> float:
        return self.prediction.us

    @property
    def gbps(self) -> float:
        """Bandwidth as `bench` counts it: of the bytes that must be moved."""
        return floor_bytes(self.case) / self.us / 1e3

    @property
    def of_copy(self) -> float:
        """The time of a copy of as many bytes, as a part of the pass's."""
        return model.copy_us(self.case, self.device) / self.us


def predict(cases: list[Case], target: str, some_devices: list[Device]) -> list[Predicted]:
    """What the cases take on devices of a target, in a process that will run no kernel."""
    chosen, lowered = [(case, None) for case in cases], {}
    for device in some_devices:
        if device.facts not in lowered:
            with device_facts(device.facts):
                lowered[device.facts] = lower(target, chosen, instructions=True)
    return [
        Predicted(case, device, launches, model.pass_time(launches, device))
        for device in some_devices
        for case, launches in zip(cases, lowered[device.facts], strict=True)
    ]


def table(found: list[Predicted]) -> str:
    """One line a case and a device: the time and what most of it is due to; what bytes, bytes in flight
    and issue rate would take alone, in us; and instr/B of each launch that moves activations."""
    lines = [
        f"{'GPU':<5} {'operator':<16} {'pass':<8} {'dtype':<5} {'shape':>16} {'layout':<13} {'us':>8} "
        f"{'GB/s':>5} {'of copy':>7} {'bound':<9} {'bytes':>7} {'flight':>7} {'issue':>7} instr/B"
    ]
    for p in found:
        case = p.case
        alone = " ".join(f"{p.prediction.alone[bound] / 1e3:>7.1f}" for bound in model.BOUNDS[:3])
        counts = [k.instructions_per_byte for k in p.launches]
        lines.append(
            f"{p.device.short:<5} {case.operator:<16} {case.direction:<8} {case.dtype:<5} "
            f"{case.name:>16} {case.layout:<13} {p.us:>8.1f} {p.gbps:>5.0f} {p.of_copy:>7.0%} "
            f"{p.prediction.bound:<9} {alone} {' '.join(f'{count:.3f}' for count in counts if count)}"
        )
    return "\n".join(lines)


def worst(found: list[Predicted]) -> str:
    """For each operator and pass the case that is furthest from a copy."""
    of_kind = defaultdict(list)
    for p in found:
        of_kind[p.device.short, p.case.operator, p.case.direction].append(p)
    least = (min(some, key=lambda p: p.of_copy) for some in of_kind.values())
    return "\n".join(
        f"{p.device.short} {p.case.operator} {p.case.direction}: at worst {p.of_copy:.0%} of a copy, "
        f"bound by {p.prediction.bound}, {p.case.name} {p.case.layout}"
        for p in least
    )


def quick_cases(brief: bool = False) -> list[Case]:
    """Shapes of the benchmark that are predicted beside the registers: its quick sets, in bfloat16."""
    sets = QUICK_SETS[:1] if brief else QUICK_SETS
    operators = ("layer_norm", "rms_norm") if brief else list(OPERATORS)
    return make_cases(operators, PASSES, ["bf16"], parse_shapes(sets))


def write(path: Path, found: list[Predicted], command: str) -> None:
    """A CSV with the columns of `bench`, in which nothing is measured: `roofline` draws it as such."""
    facts = machine.facts() | {"device": found[0].device.name, "driver_version": "", "cuda_version": ""}
    out = Table(path, facts | {"command": command}, resume=False)
    for p in found:
        out.add(
            **case_fields(p.case),
            provider="tritonnorm",
            floor_bytes=floor_bytes(p.case),
            predicted_us=f"{p.us:.3f}",
            bound=p.prediction.bound,
            status="predicted",
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="H100",
        choices=[name for d in DEVICES for name in (d.short, d.name)],
        metavar="NAME",
        help=f"of {', '.join(d.short for d in DEVICES)} (default: H100)",
    )
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--directions", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument(
        "--shapes", nargs="+", default=list(QUICK_SETS), help="as of `bench` (default: the quick sets)"
    )
    parser.add_argument("--out", type=Path, help="a CSV for `roofline`")
    parser.add_argument(
        "--json", action="store_true", help="cases from standard input, [us, bound] of each as JSON"
    )


def run(arguments) -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("predict: the interpreter compiles nothing; unset TRITON_INTERPRET", file=sys.stderr)
        return USAGE_STATUS
    device = devices.find(arguments.device)
    if arguments.json:
        cases = [read_case(row) for row in json.load(sys.stdin)]
        found = predict(cases, device.target, [device])
        print(json.dumps([[p.us, p.prediction.bound] for p in found]))
        return 0
    try:
        cases = make_cases(
            arguments.operators, arguments.directions, arguments.dtypes, parse_shapes(arguments.shapes)
        )
    except ValueError as error:
        print(f"predict: {error}", file=sys.stderr)
        return USAGE_STATUS
    found = predict(cases, device.target, [device])
    print("Predicted by a model from the compiled kernels, not measured")
    print(table(found))
    print(worst(found))
    for _, line in (miss for p in found for miss in p.missed):
        print(line)
    if arguments.out:
        write(arguments.out, found, f"python -m perf {' '.join(sys.argv[1:])}")
        print(arguments.out)
    return 0
