"""Profilers that run in the process that they profile: torch.profiler and proton."""

import json
import statistics
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from .reading import Kernel, gbps

REPETITIONS = 20
"""Runs of a pass, of which a kernel's time is the median (with proton the mean)."""

PROTON_OWN = "__proton_launch_metadata"
"""How proton names what its hook, and not the pass, launches."""


@dataclass(frozen=True)
class Launch:
    """What a launch is described as."""

    function: str  # the compiled function's name
    label: str
    asked: int  # bytes


@contextmanager
def launches():
    """Collects the launches of Triton kernels that are described. Each is a range of torch.profiler and,
    for Nsight Systems, of NVTX, by its label."""
    from triton import knobs

    found, ranges = [], []

    def enter(metadata):
        function = metadata.data["name"]
        described = metadata.get()
        if "bytes" in described:
            found.append(Launch(function, described["name"], described["bytes"]))
        ranges.append(torch.profiler.record_function(described["name"]))
        ranges[-1].__enter__()
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_push(described["name"])

    def leave(metadata):
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_pop()
        ranges.pop().__exit__(None, None, None)

    hooks = ((knobs.runtime.launch_enter_hook, enter), (knobs.runtime.launch_exit_hook, leave))
    for chain, hook in hooks:
        chain.add(hook)
    try:
        yield found
    finally:
        for chain, hook in hooks:
            chain.remove(hook)


def described(kernels: list[Kernel], found: list[Launch]) -> list[Kernel]:
    """The kernels with what their launches are described as: the two lists have one order, and between
    the launches that are described may be kernels of others."""
    waiting = list(found)
    result = []
    for kernel in kernels:
        position = next((i for i, launch in enumerate(waiting) if launch.function == kernel.name), None)
        if position is not None:
            launch = waiting[position]
            del waiting[: position + 1]
            kernel = replace(kernel, label=launch.label, asked=launch.asked)
        result.append(kernel)
    return result


def write_launches(path: Path, found: list[Launch]) -> None:
    path.write_text(json.dumps([asdict(launch) for launch in found]))


def read_launches(path: Path) -> list[Launch]:
    return [Launch(**launch) for launch in json.loads(path.read_text())]


def by_torch(call, flush, trace: Path) -> list[Kernel]:
    """Profiles a call, after `flush` each time, and leaves a Chrome trace in which kernels tell their
    launch, bytes and GB/s."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with launches() as found, torch.profiler.profile(activities=activities) as profiler:
        for _ in range(REPETITIONS):
            flush()
            call()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(trace))
    content = json.loads(trace.read_text())
    kernels = annotate(content, found)
    trace.write_text(json.dumps(content))
    return medians(kernels, REPETITIONS)


def annotate(trace: dict, found: list[Launch]) -> list[Kernel]:
    """The kernels of a Chrome trace of torch.profiler, in their order. In the trace they are told, in
    their `args`, what launch they are, its bytes and GB/s."""
    events = [event for event in trace["traceEvents"] if event.get("cat") == "kernel"]
    events.sort(key=lambda event: event["ts"])
    kernels = described([Kernel(event["name"], event["dur"]) for event in events], found)
    for event, kernel in zip(events, kernels, strict=True):
        if kernel.label:
            bandwidth = round(gbps(kernel.asked, kernel.microseconds), 1)
            told = {"launch": kernel.label, "bytes": kernel.asked, "GB/s": bandwidth}
            event.setdefault("args", {}).update(told)
    return kernels


def medians(kernels: list[Kernel], repetitions: int) -> list[Kernel]:
    """The kernels of one of several equal repetitions, with the median of their times.

    Raises:
        ValueError: they are not equal.
    """
    count = len(kernels) // repetitions
    runs = [kernels[i * count : (i + 1) * count] for i in range(repetitions)]
    names = [[kernel.name for kernel in run] for run in runs]
    if not count or count * repetitions != len(kernels) or any(other != names[0] for other in names):
        raise ValueError(
            f"{repetitions} repetitions of a pass launched {len(kernels)} kernels: not alike"
        )
    times = [statistics.median(k.microseconds for k in same) for same in zip(*runs, strict=True)]
    return [replace(kernel, microseconds=us) for kernel, us in zip(runs[0], times, strict=True)]


def by_proton(call, flush, folder: Path) -> list[Kernel]:
    """Profiles a call by Triton's own profiler, whose hook reads what launches are described as."""
    import triton.profiler as proton

    name = folder / "proton"
    session = proton.start(str(name), hook="triton")
    try:
        for _ in range(REPETITIONS):
            flush()
            call()
        torch.cuda.synchronize()
    finally:
        proton.finalize(session)
    return parse_proton(name.with_suffix(".hatchet").read_text(), REPETITIONS)


def parse_proton(text: str, repetitions: int) -> list[Kernel]:
    """The kernels of proton's tree of so many repetitions of a pass, in the order of its file, with the
    mean of their times.

    A node is a frame, metrics such as `time (ns)` and `count`, and children. A launch that is described
    is a node of its label, which has the bytes of all its repetitions; the kernel is that node, or a
    child of it.

    Raises:
        ValueError: there is no kernel.
    """
    root, *_ = json.loads(text)  # what follows are the devices
    found = []

    def metric(node, name):
        metrics = node.get("metrics", {})
        return sum(value for key, value in metrics.items() if key.partition(" ")[0] == name)

    def total(node, name):
        return metric(node, name) + sum(total(child, name) for child in node.get("children", []))

    def walk(node):
        name = node["frame"]["name"]
        if name.startswith(PROTON_OWN):
            return
        asked, count = metric(node, "bytes"), total(node, "count")
        if count and (asked or metric(node, "count")):
            microseconds, times = total(node, "time") / count / 1e3, max(round(count / repetitions), 1)
            if asked:
                kernel = Kernel(name, microseconds, times, label=name, asked=round(asked / count))
            else:
                kernel = Kernel(name, microseconds, times)
            found.append(kernel)
            return
        for child in node.get("children", []):
            walk(child)

    walk(root)
    if not found:
        raise ValueError("proton saw no kernel")
    return found
