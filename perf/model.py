"""The time that a launch should take, from what is compiled and from the facts of a GPU.

The blocks that an SM holds at once share it like customers a queue: programs or, where these are
clusters, parts of them. Each waits and computes by itself for a time T, and takes its turn at the
memory, b, of which r for what it reads, and at the schedulers, c. A wave of R blocks an SM then takes

    max(R * b, R * c, T + r)        bound by bytes, by issue rate, by bytes in flight

(what a block stores leaves while the next one waits). A loop whose loads are d steps ahead of what it
computes adds to T + r, a step, the longest of what it computes, its turn at the memory, s, and
(l + s) / d: what it loads arrives after a latency l and its turn, and d steps later it has to be there.
The first d steps wait no l, as what is before the loop waits for their loads, together.
The last wave may be a partial one, and has its own maximum: what it takes beyond its share is the tail.
A pass is the sum of its launches.

What the model does not see: what the blocks of a cluster or the programs of a team wait for each other
beyond a barrier, that a cluster stays within a part of the GPU; conflicts in shared memory, how many
sectors narrow accesses take, L2's own bandwidth, and clocks that power lowers. It is to be compared with
measurements, and is none.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from operator import mul

from tritonnorm.heuristics import l2

from . import devices
from .compiled import INPUTS, Lowered
from .devices import Device
from .launches import ACTIVATIONS
from .shapes import Case
from .traffic import BESIDE, floor_bytes

COPY_SHARE = 0.9
"""Part of the datasheet's bandwidth that a copy reaches: 3.0 of 3.35 TB/s on an H100, 4.3 of 4.8 on an
H200, 7.1 of 8 on a GB300, as published with peers' kernels. Of an A100 assumed."""

LAUNCH_NS = 2000
"""What a launch adds to its work: until its programs start, and the next launch may (unmeasured). In a
CUDA graph as well: the host's time is not in it."""

INSTRUCTION_CYCLES = 2
"""From an instruction of a warp to its next: half of the latency of an addition, as if half of them
waited for another's result (unmeasured)."""

BARRIER_CYCLES = 30
"""What the warps of a program wait for each other (unmeasured); of a cluster, whose blocks meet through
its SMs' network, more, which is not told apart."""

L2_SPEED = 2.5
"""Bytes that L2 serves while the memory serves one (unmeasured)."""

SM_BYTES_A_CYCLE = 64
"""What one SM takes from L2 at most, where few are busy (NVIDIA's A100 whitepaper)."""

BOUNDS = ("bytes", "in flight", "issue", "launch", "tail")


@dataclass(frozen=True)
class Steps:
    """What a block does in a loop, or once: it loads, and computes."""

    times: float
    busy: float  # nanoseconds a step that it computes
    latency: float = 0.0  # nanoseconds a step until its loads arrive
    read: float = 0.0  # bytes of device memory that all steps read
    ahead: int = 0  # steps by which loads are ahead of what is computed
    starts: float = 1.0  # how often the loop is entered

    def ns(self, rate: float) -> float:
        """The time of all steps where a block reads `rate` bytes a nanosecond."""
        if not self.ahead:
            return self.times * (self.busy + self.latency) + self.read / rate
        waits = self.times - self.ahead * self.starts
        arrives = (waits * self.latency + self.read / rate) / self.ahead
        return max(self.times * self.busy, self.read / rate, arrives)


@dataclass(frozen=True)
class Work:
    """What the blocks of a launch do, on average."""

    blocks: int
    resident: int  # blocks that an SM holds
    nbytes: float  # of device memory that a block moves
    steps: tuple[Steps, ...]  # one after another
    issue: float  # nanoseconds that the schedulers of an SM are busy with a block


@dataclass(frozen=True)
class Prediction:
    """Nanoseconds by what they are due to, of BOUNDS; and what bytes, bytes in flight and issue rate
    would take alone, without a tail."""

    parts: dict[str, float]
    alone: dict[str, float]

    @property
    def ns(self) -> float:
        return sum(self.parts.values())

    @property
    def us(self) -> float:
        return self.ns / 1e3

    @property
    def bound(self) -> str:
        """What most of the time is due to."""
        return max(self.parts, key=self.parts.get)


def bandwidth(device: Device) -> float:
    """Bytes a nanosecond that a kernel reaches at most: a copy's."""
    return device.gbps * COPY_SHARE


def copy_us(case: Case, device: Device) -> float:
    """The time of a copy of the bytes that a case must move, in microseconds."""
    return (LAUNCH_NS + floor_bytes(case) / bandwidth(device)) / 1e3


def launch_time(work: Work, device: Device) -> Prediction:
    """The time of one launch."""
    sms = device.processors
    slots = work.resident * sms
    full, rest = divmod(work.blocks, slots)

    def wave(blocks: int) -> dict[str, float]:
        """The three bounds of so many blocks at once."""
        busy = min(blocks, sms)
        rate = min(bandwidth(device) / busy, SM_BYTES_A_CYCLE * device.clock)
        return {
            "bytes": blocks * work.nbytes / bandwidth(device),
            "in flight": sum(steps.ns(rate) for steps in work.steps),
            "issue": ceil(blocks / sms) * work.issue,
        }

    parts = {"launch": float(LAUNCH_NS)}
    bounds = wave(slots if full else rest)
    waves = work.blocks / slots if full else 1.0
    alone = {bound: waves * ns for bound, ns in bounds.items()}
    bound = max(bounds, key=bounds.get)
    parts[bound] = alone[bound]
    if full and rest:
        parts["tail"] = full * bounds[bound] + max(wave(rest).values()) - alone[bound]
    return Prediction(parts, alone)


def block_steps(k: Lowered, device: Device, reads: dict[str, float]) -> tuple[Steps, ...]:
    """What a block does in each region, of a launch that reads so many bytes of each tensor. The loads
    of an iteration are waited for together; those that are ahead are of tiles."""
    times = k.executions
    counts = k.instructions or [0.0] * len(k.regions)
    whole = {name: sum(map(mul, times, (r.loads.get(name, 0) for r in k.regions))) for name in reads}
    of_tiles = {i for name in INPUTS for i in k.loops_over(name)}
    found = []
    for i, region in enumerate(k.regions):
        cycles = counts[i] * INSTRUCTION_CYCLES + region.barriers * BARRIER_CYCLES
        latency = 0.0
        if region.loads:
            far = any(name in ACTIVATIONS for name in region.loads)
            latency = device.dram_latency if far else device.l2_latency
        read = sum(reads[name] * region.loads.get(name, 0) / whole[name] for name in reads)
        found.append(
            Steps(
                times=times[i],
                busy=cycles / device.clock,
                latency=latency,
                read=times[i] * read / k.blocks,
                ahead=k.ahead if i in of_tiles else 0,
                starts=times[region.parent] if region.parent is not None else 1.0,
            )
        )
    return tuple(found)


def device_bytes(k: Lowered, device: Device, held: bool) -> tuple[float, dict[str, float]]:
    """Bytes of device memory that a launch moves, and those of them that it reads, by tensor. L2 serves
    what it keeps (`heuristics.l2`), if it keeps all: partial results that are read, which count as so
    many fewer bytes; what a program reads again while it lasts; and the inputs if they are `held` since
    an earlier launch. Partial results that are written leave L2 in the end."""
    share = l2.kept_bytes(device.facts)
    at_once = min(k.resident * device.processors / k.blocks, 1) / k.turns
    moved, reads = 0.0, {}
    for name, size in k.tensor_bytes.items():
        if name in k.sweeps:
            times = k.sweeps[name]
            if times > 1 and size * at_once <= share:
                times = 1.0
            if held and name in INPUTS:
                times = 0.0
        else:
            written = any(name in region.stores for region in k.regions)
            kept = name.endswith(BESIDE) and size <= share and not written
            times = 1 / L2_SPEED if kept else 1.0
        moved += times * size
        if any(name in region.loads for region in k.regions):
            reads[name] = times * size
    return moved, reads


def work_of(k: Lowered, device: Device, held: bool = False) -> Work:
    """The work of a compiled launch on a device."""
    moved, reads = device_bytes(k, device, held)
    cycles = (k.program_instructions or 0) * k.num_warps / devices.SCHEDULERS
    return Work(
        blocks=k.blocks,
        resident=k.resident,
        nbytes=moved / k.blocks,
        steps=block_steps(k, device, reads),
        issue=cycles / device.clock,
    )


def pass_time(launches: Sequence[Lowered], device: Device) -> Prediction:
    """The time of the launches of a pass, one after another."""
    parts, alone, seen = Counter(), Counter(), 0
    for k in launches:
        inputs = sum(k.tensor_bytes[name] for name in INPUTS if name in k.sweeps)
        held = 0 < inputs <= seen and seen <= l2.kept_bytes(device.facts)
        found = launch_time(work_of(k, device, held), device)
        parts.update(found.parts)
        alone.update(found.alone)
        seen = max(seen, inputs)
    return Prediction(dict(parts), dict(alone))
