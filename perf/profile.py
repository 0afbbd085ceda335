"""Profiles one operator on one shape: what bounds each of its kernels.

ncu reads the GPU's counters: DRAM, L2, occupancy, stalls, registers. proton and torch.profiler measure
the time of each kernel. `--plan` shows without a GPU what would be launched, and its bytes.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from . import devices, machine, ncu, profilers
from .bench import USAGE_STATUS
from .calls import make_call, make_copy, make_inputs
from .predictions import in_own_process
from .providers import LOADERS, describe, load
from .reading import report
from .shapes import DTYPES, LAYOUTS, OPERATORS, PASSES, Case, parse_shapes
from .table import OURS
from .timer import DeviceTimer
from .traffic import floor_bytes

TOOLS = ("ncu", "proton", "torch")
"""In the order in which they are tried: the first tells most."""

FLUSH_TIMES = 2
"""Sizes of L2 that are written between repetitions, as the timer does."""


def make_case(arguments) -> Case:
    """The case that the options name.

    Raises:
        ValueError: there is none.
    """
    (shapes,) = parse_shapes([arguments.shape])
    cases = shapes.cases(arguments.operator, arguments.direction, arguments.dtype)
    if len(shapes.shapes) != 1 or not cases:
        raise ValueError(f"{arguments.shape} is no shape of {arguments.operator}")
    by_layout = {case.layout: case for case in cases}
    if arguments.layout not in by_layout:
        raise ValueError(f"{arguments.operator} of {arguments.shape} has no layout {arguments.layout}")
    return by_layout[arguments.layout]


def plan(case: Case) -> str:
    """What tritonnorm launches for a case, and the bytes of each launch. Nothing runs."""
    from . import launches

    found = []

    def see(kernel, grid, arguments):
        described = kernel.describe_launch(grid, None, arguments)
        operations = sum(value for key, value in described.items() if key.startswith("flops"))
        programs = " x ".join(map(str, grid))
        found.append((described["name"], described["bytes"], operations, programs))

    with launches.observe(see):
        launches.run(case)
    width = max(len(label) for label, *_ in found)
    lines = [f"{'launch':<{width}}  {'MB':>9}  {'MFLOP':>9}  programs"]
    for label, count, operations, programs in found:
        lines.append(f"{label:<{width}}  {count / 1e6:>9.3f}  {operations / 1e6:>9.1f}  {programs}")
    floor, asked = floor_bytes(case), sum(count for _, count, *_ in found)
    lines += [
        "",
        f"floor {floor / 1e6:.3f} MB; asked {asked / 1e6:.3f} MB, {asked / floor:.3f} times the floor",
    ]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("operator", choices=list(OPERATORS), metavar="OP", help=", ".join(OPERATORS))
    parser.add_argument(
        "--shape", required=True, help="such as 4096x8192 or 8x320x64x64:32, as of bench"
    )
    parser.add_argument("--direction", choices=PASSES, default="forward")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--layout", choices=LAYOUTS, default="contiguous")
    parser.add_argument("--provider", choices=list(LOADERS), default="tritonnorm")
    parser.add_argument(
        "--tool",
        choices=(*TOOLS, "none"),
        help="default: the first of ncu, proton and torch that works; none runs the pass once between "
        "cudaProfilerStart and Stop, with NVTX ranges, for an ncu or nsys of your own",
    )
    parser.add_argument("--trace", type=Path, help="write a Chrome trace, by torch.profiler")
    parser.add_argument("--plan", action="store_true", help="only list the launches (no GPU)")
    parser.add_argument(
        "--launches", type=Path, help="with --tool none: write what is launched, as JSON"
    )


def _run_marked(call, launches: Path | None) -> None:
    """Runs a call for a profiler that listens between cudaProfilerStart and Stop."""
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    with profilers.launches() as found:
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    if launches:
        profilers.write_launches(launches, found)


def _by_ncu(arguments) -> list:
    """The kernels of the pass by ncu, in a process of its own.

    Raises:
        NcuError: ncu is absent, or gives no figures.
    """
    tool = ncu.find()
    if tool is None:
        raise ncu.NcuError("it is not installed (looked on the path and where its installers put it)")
    options = [
        f"--{name}={getattr(arguments, name)}"
        for name in ("shape", "direction", "dtype", "layout", "provider")
    ]
    with tempfile.TemporaryDirectory() as folder:
        log, launched = Path(folder, "ncu.csv"), Path(folder, "launches.json")
        program = [sys.executable, "-m", "perf", "profile", arguments.operator, *options]
        program += ["--tool", "none", "--launches", str(launched)]
        ran = subprocess.run(
            ncu.command(tool, str(log), program), cwd=machine.ROOT, capture_output=True, text=True
        )
        kernels = ncu.parse(log.read_text() if log.exists() else ran.stdout + ran.stderr)
        return profilers.described(kernels, profilers.read_launches(launched))


def _flusher():
    """A function that takes everything else out of L2."""
    l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return torch.empty(FLUSH_TIMES * l2_bytes, dtype=torch.int8, device="cuda").zero_


def _read(tool: str, arguments, call) -> list:
    if tool == "ncu":
        return _by_ncu(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if tool == "proton":
            return profilers.by_proton(call, _flusher(), Path(folder))
        return profilers.by_torch(call, _flusher(), arguments.trace or Path(folder, "trace.json"))


def _predicted(case: Case, provider, facts) -> tuple[float, str] | None:
    """What a pass of ours should take, (us, bound); None without a model of the GPU."""
    device = devices.find(facts["device"])
    if device is None or provider.name != OURS:
        return None
    return in_own_process([case], device).get(case)


def run(arguments) -> int:
    try:
        case = make_case(arguments)
        if arguments.plan:
            print(plan(case))
            return 0
        if reason := machine.refusal():
            print(f"profile: {reason} (--plan needs none)", file=sys.stderr)
            return machine.NO_DEVICE_STATUS
        present, absent = load([arguments.provider])
        if absent:
            raise ValueError(f"{arguments.provider} is absent ({absent[arguments.provider]})")
        if not present[0].offers(case):
            raise ValueError(f"{arguments.provider} has no {case.kind}")
    except ValueError as error:
        print(f"profile: {error}", file=sys.stderr)
        return USAGE_STATUS
    (provider,) = present
    call = make_call(provider, case, make_inputs(case, "cuda"))
    call()  # compiles
    if arguments.tool == "none":
        _run_marked(call, arguments.launches)
        return 0
    timer = DeviceTimer()
    copy_us, pass_us = timer(make_copy(case, "cuda")).median_us, timer(call).median_us
    for tool in [arguments.tool] if arguments.tool else TOOLS:
        try:
            kernels = _read(tool, arguments, call)
            break
        except Exception as error:  # a profiler may miss its library, its permission, or the device
            print(f"{tool}: {describe(error)}", file=sys.stderr)
    else:
        return 1
    if arguments.trace and tool != "torch":
        profilers.by_torch(call, _flusher(), arguments.trace)
    facts = machine.facts()
    print(f"{case.label}, {provider.name} {provider.version}, by {tool}")
    print(f"{facts['device']}, torch {facts['torch_version']}, Triton {facts['triton_version']}\n")
    print(report(kernels, floor_bytes(case), copy_us, pass_us, _predicted(case, provider, facts)))
    if arguments.trace:
        print(f"\ntrace in {arguments.trace}")
    return 0
