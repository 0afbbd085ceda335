"""How the sets of the channel view are held on GPUs that are not there, and what a model says of DRAM.

The forms are those of the launches that tritonnorm would make where teams are allowed; the bytes are
those of `heuristics.l2`. Nothing is measured, and nothing run.
"""

from dataclasses import dataclass
from math import ceil, prod

from tritonnorm.heuristics import l2
from tritonnorm.heuristics.common import DeviceFacts

from . import devices
from .launches import plan_channels
from .shapes import OPERATORS, PASSES, SHAPE_SETS, Case
from .traffic import tensor_bytes

MB = 2**20
SETS = ("gn", "gn_8_groups", "unet", "bn", "in")


@dataclass(frozen=True)
class Gpu:
    """A GPU: what launch choices know of it, and the bytes a second of a copy (rounded; A100 and B200 by
    their data sheets, less a tenth)."""

    facts: DeviceFacts
    bandwidth: float


GPUS = {
    "A100": Gpu(devices.find("A100").facts, 1.8e12),
    "H100": Gpu(devices.find("H100").facts, 3.0e12),
    "H200": Gpu(devices.find("H200").facts, 4.3e12),
    "B200": Gpu(devices.find("B200").facts, 7.0e12),
}

HOST_SECONDS = 10e-6
"""Host time of an eager launch; in a CUDA graph it is next to nothing (unmeasured)."""

GAP_SECONDS = 2.5e-6
"""Time of a launch in which memory rests: the last programs of one, and the start of the next
(unmeasured)."""


STEP_SECONDS = 1e-6
"""Time of a step of a fold, which waits for L2 or, at worst, for DRAM (unmeasured)."""


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


def fold_seconds(case: Case, gpu: Gpu) -> float:
    """Time of the launches that fold partial results, by their bytes and steps; the launches' own gaps
    are beside it."""
    seconds = 0.0
    for kernel, _, arguments in plan_channels(case, gpu.facts):
        if not kernel.__name__.startswith("fold_"):
            continue
        pieces = arguments["P" if "P" in arguments else "PIECES"]
        steps = ceil(pieces / arguments["BLOCK_P"]) * (1 + (kernel.__name__ == "fold_moments"))
        if arguments.get("ONE_SET"):
            steps *= ceil(arguments["CG"] / arguments["BLOCK_C"])
        partial = sum(t.nbytes for name, t in arguments.items() if name.endswith("_partial_ptr"))
        seconds += steps * STEP_SECONDS + 2 * partial / gpu.bandwidth
    return seconds


def split_seconds(read: int, written: int, gpu: Gpu) -> float:
    """Time of a pass of three launches over all of its tensors."""
    moved = l2.two_reads(read, written, l2.kept_bytes(gpu.facts))
    return max(moved / gpu.bandwidth + 3 * GAP_SECONDS, 3 * HOST_SECONDS)


def chunked_seconds(read: int, written: int, gpu: Gpu, host: float = HOST_SECONDS) -> float:
    """Time of the same pass, the same launches once for each chunk that L2 keeps. Those of small chunks
    wait for the host, or for each other."""
    chunks = -(-read // l2.kept_bytes(gpu.facts))
    launches = 3 * chunks
    return max(l2.one_read(read, written) / gpu.bandwidth + launches * GAP_SECONDS, launches * host)


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
    lines = [f"{'case':<60} {'MB':>5}" + "".join(f" {name:>21}" for name in GPUS)]
    for case in cases():
        found = [form(case, gpu.facts) for gpu in GPUS.values()]
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
