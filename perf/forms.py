"""How the sets of the channel view are held on GPUs that are not there, and what a model says of DRAM.

The forms are those of the launches that tritonnorm would make where teams are allowed; the bytes are
those of `heuristics.l2`, bandwidths and the time of a launch those of `model.py`. Nothing is measured,
and nothing run.
"""

from dataclasses import dataclass
from math import ceil, prod

from tritonnorm.heuristics import l2
from tritonnorm.heuristics.common import DeviceFacts

from .devices import DEVICES, MB, Device
from .launches import plan_channels
from .model import LAUNCH_NS, bandwidth
from .shapes import OPERATORS, PASSES, SHAPE_SETS, Case
from .traffic import tensor_bytes

SETS = ("gn", "gn_8_groups", "unet", "bn", "in")


HOST_NS = 10_000
"""Host time of an eager launch; in a CUDA graph it is next to nothing (unmeasured)."""


@dataclass(frozen=True)
class Form:
    """How a pass holds its sets, "resident", "team" or "split"; the programs of its first launch; and
    the bytes of DRAM traffic by model, in units of T."""

    name: str
    programs: int
    dram: float


def form(case: Case, facts: DeviceFacts) -> Form:
    """The form that a pass takes on a GPU where teams are allowed."""
    (first, grid, _), *others = plan_channels(case, facts)
    first, names = first.__name__, {kernel.__name__ for kernel, *_ in others}
    t = tensor_bytes(case)
    read, written = (t, t) if case.direction == "forward" else (2 * t, t)
    split = not names.isdisjoint(("channel_normalize", "channel_input_gradient"))
    moved = l2.two_reads(read, written, l2.kept_bytes(facts)) if split else l2.one_read(read, written)
    name = "split" if split else "team" if first.startswith("team") else "resident"
    return Form(name, prod(grid), moved / t)


def memory_ns(case: Case, device: Device) -> float:
    """Time of the DRAM traffic of a pass."""
    return form(case, device.facts).dram * tensor_bytes(case) / bandwidth(device)


def fold_ns(case: Case, device: Device) -> float:
    """Time of the launches that fold partial results, by their bytes and steps, each of which waits for
    L2 or, at worst, for DRAM; the launches' own time is beside it."""
    ns = 0.0
    for kernel, _, arguments in plan_channels(case, device.facts):
        if not kernel.__name__.startswith("fold_"):
            continue
        pieces = arguments["P" if "P" in arguments else "PIECES"]
        steps = ceil(pieces / arguments["BLOCK_P"]) * (1 + (kernel.__name__ == "fold_moments"))
        if arguments.get("ONE_SET"):
            steps *= ceil(arguments["CG"] / arguments["BLOCK_C"])
        partial = sum(t.nbytes for name, t in arguments.items() if name.endswith("_partial_ptr"))
        ns += steps * device.dram_latency + 2 * partial / bandwidth(device)
    return ns


def split_ns(read: int, written: int, device: Device) -> float:
    """Time of a pass of three launches over all of its tensors."""
    moved = l2.two_reads(read, written, l2.kept_bytes(device.facts))
    return max(moved / bandwidth(device) + 3 * LAUNCH_NS, 3 * HOST_NS)


def chunked_ns(read: int, written: int, device: Device, host: float = HOST_NS) -> float:
    """Time of the same pass, the same launches once for each chunk that L2 keeps. Those of small chunks
    wait for the host, or for each other."""
    chunks = -(-read // l2.kept_bytes(device.facts))
    launches = 3 * chunks
    return max(l2.one_read(read, written) / bandwidth(device) + launches * LAUNCH_NS, launches * host)


def cases(dtype: str = "bf16") -> list[Case]:
    """The shapes at which peers measure, training alone: in evaluation nothing is read twice."""
    return [
        case
        for name in SETS
        for operator in SHAPE_SETS[name].operators
        if OPERATORS[operator].running != "read"
        for direction in PASSES
        for case in SHAPE_SETS[name].cases(operator, direction, dtype)
    ]


def table() -> str:
    """One line a case: form, programs and DRAM traffic on every GPU."""
    lines = [f"{'case':<60} {'MB':>5}" + "".join(f" {device.short:>21}" for device in DEVICES)]
    for case in cases():
        found = [form(case, device.facts) for device in DEVICES]
        lines.append(
            f"{case.label:<60} {tensor_bytes(case) / MB:>5.0f}"
            + "".join(f" {f.name:>8} {f.programs:>6} {f.dram:.2f}T" for f in found)
        )
    return "\n".join(lines)


def add_arguments(parser):
    pass


def run(arguments) -> int:
    print("Forms with teams allowed, programs, DRAM traffic by model; nothing was measured")
    print(table())
    return 0
