"""What a profiler found of the kernels of one pass, and what bounds each of them.

The limits below are taken from what the counters mean, not from measurements: unmeasured.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

DRAM_PERCENT = 80.0
"""Of DRAM's peak, from which on there is little left: a copy itself reaches about 90."""

L2_PERCENT = 80.0
ISSUE_PERCENT = 75.0
"""Of the cycles in which a scheduler issues an instruction. Above it, fewer instructions are the way."""

LAUNCH_US = 5.0
"""A kernel that takes less is about as short as its own start and end."""

EXCESS = 0.05
"""DRAM may move so much more than the launch asks for before it is worth a word: partial sectors, and
what other clients of L2 evict."""

NEAR_COPY = 0.9
"""Of a copy's bandwidth, where there are no counters."""

WAITS = {
    "long_scoreboard": "loads from memory: more bytes in flight would hide them, by more warps or more "
    "loads before the first use",
    "short_scoreboard": "shared memory, through which warps reduce with each other",
    "barrier": "the other warps of a program: fewer warps, or fewer reductions over all of them",
    "membar": "memory fences",
    "lg_throttle": "the queue of memory instructions: accesses are many and narrow",
    "mio_throttle": "the queue of shared memory",
    "math_pipe_throttle": "arithmetic units",
    "wait": "the fixed latency of arithmetic: more independent work, or more warps",
    "no_instruction": "instructions: the code is long, or the kernel short",
    "drain": "stores to leave at the end of a program",
    "not_selected": "their turn: there are more warps than can be issued",
}
"""What a stalled warp waits for."""


@dataclass(frozen=True)
class Kernel:
    """Of one kernel of a pass; None is what a tool does not tell. Bytes are of one launch."""

    name: str  # of the compiled function
    microseconds: float
    times: int = 1  # that a pass launches it
    label: str | None = None  # as kernels/names.py describes the launch
    asked: int | None = None  # bytes, by the same description
    read: float | None = None  # bytes from DRAM
    written: float | None = None  # bytes to DRAM
    dram_percent: float | None = None  # of DRAM's peak
    l2_percent: float | None = None  # of L2's peak
    issue_percent: float | None = None  # of cycles in which a scheduler issues
    l2_hit_percent: float | None = None
    occupancy_percent: float | None = None  # warps that are there, of those that an SM can hold
    limiter: str | None = None  # of occupancy
    registers: int | None = None  # a thread
    stalls: dict[str, float] = field(default_factory=dict)  # warps that wait, by reason

    @property
    def top_stalls(self) -> list[tuple[str, float]]:
        """The three most frequent reasons, each with its share of all stalls."""
        total = sum(self.stalls.values())
        ranked = sorted(self.stalls.items(), key=lambda item: -item[1])[:3]
        return [(reason, count / total) for reason, count in ranked if count > 0]

    @property
    def moved(self) -> float | None:
        """Bytes to and from DRAM."""
        return None if self.read is None or self.written is None else self.read + self.written


def bound(kernel: Kernel) -> str | None:
    """What bounds a kernel: "dram", "l2", "issue", "launch" or "latency"; None without counters."""
    if kernel.dram_percent is None:
        return None
    if kernel.dram_percent >= DRAM_PERCENT:
        return "dram"
    if (kernel.l2_percent or 0) >= L2_PERCENT:
        return "l2"
    if (kernel.issue_percent or 0) >= ISSUE_PERCENT:
        return "issue"
    return "launch" if kernel.microseconds < LAUNCH_US else "latency"


def sentence(kernel: Kernel, copy_gbps: float | None = None) -> str:
    """What bounds a kernel, in words; and whether DRAM moves more than the launch asks for."""
    kind = bound(kernel)
    if kind is None:
        text = _by_bandwidth(kernel, copy_gbps)
    elif kind == "dram":
        text = f"DRAM bounds it, at {kernel.dram_percent:.0f}% of its peak"
    elif kind == "l2":
        text = (
            f"L2 bounds it, at {kernel.l2_percent:.0f}% of its peak: what it reads again, it finds there"
        )
    elif kind == "issue":
        text = f"instructions bound it: schedulers issue in {kernel.issue_percent:.0f}% of the cycles"
    elif kind == "launch":
        text = f"its launch bounds it: in {kernel.microseconds:.1f} us no part of the GPU gets busy"
    else:
        text = f"latency bounds it, with DRAM at {kernel.dram_percent:.0f}% of its peak"
        if stalls := kernel.top_stalls:
            reason, share = stalls[0]
            text += f": {share:.0%} of the stalled warps wait for {WAITS.get(reason, reason)}"
        if kernel.occupancy_percent is not None:
            limiter = f", limited by {kernel.limiter}" if kernel.limiter else ""
            text += f" (occupancy {kernel.occupancy_percent:.0f}%{limiter})"
    if kernel.moved and kernel.asked and kernel.moved > (1 + EXCESS) * kernel.asked:
        text += f"; DRAM moves {kernel.moved / kernel.asked:.2f} times what the launch asks for"
    return text


def _by_bandwidth(kernel: Kernel, copy_gbps: float | None) -> str:
    """What can be said from time and bytes alone."""
    if kernel.asked is None or not copy_gbps:
        return "without counters there is nothing to say but its time"
    part = gbps(kernel.asked, kernel.microseconds) / copy_gbps
    if part >= NEAR_COPY:
        return f"DRAM bounds it, as far as bandwidth tells: {part:.0%} of a copy's"
    if kernel.microseconds < LAUNCH_US:
        return f"its launch bounds it: {kernel.microseconds:.1f} us, {part:.0%} of a copy's bandwidth"
    return f"{part:.0%} of a copy's bandwidth; what holds it back, counters tell (--tool ncu)"


def gbps(count: float, microseconds: float) -> float:
    return count / microseconds / 1e3


def _megabytes(count) -> str:
    return "" if count is None else f"{count / 1e6:.1f}"


def _percent(value) -> str:
    return "" if value is None else f"{value:.0f}%"


def _bandwidth(kernel: Kernel) -> str:
    return "" if kernel.asked is None else f"{gbps(kernel.asked, kernel.microseconds):.0f}"


def _stalls(kernel: Kernel) -> str:
    return ", ".join(f"{reason} {share:.0%}" for reason, share in kernel.top_stalls)


COLUMNS: tuple[tuple[str, Callable[[Kernel], str]], ...] = (
    ("times", lambda k: "" if k.times == 1 else str(k.times)),
    ("us", lambda k: f"{k.microseconds:.1f}"),
    ("asked MB", lambda k: _megabytes(k.asked)),
    ("read MB", lambda k: _megabytes(k.read)),
    ("written MB", lambda k: _megabytes(k.written)),
    ("GB/s", _bandwidth),
    ("DRAM", lambda k: _percent(k.dram_percent)),
    ("issue", lambda k: _percent(k.issue_percent)),
    ("L2 hits", lambda k: _percent(k.l2_hit_percent)),
    ("warps", lambda k: _percent(k.occupancy_percent)),
    ("regs", lambda k: "" if k.registers is None else str(k.registers)),
    ("stalls", _stalls),
)
"""Title and text of each column. One that is empty for all kernels is left out; one that another command
knows, such as a predicted time, is one more here."""


def table(kernels: list[Kernel]) -> str:
    """One line a kernel."""
    rows = [["kernel", *(title for title, _ in COLUMNS)]]
    rows += [[k.label or k.name, *(text(k) for _, text in COLUMNS)] for k in kernels]
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in zip(*columns, strict=True):
        first, *others = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def report(
    kernels: list[Kernel],
    floor: int,
    copy_us: float | None = None,
    pass_us: float | None = None,
    predicted: tuple[float, str] | None = None,
) -> str:
    """The table; what the pass moves beside its floor, in bytes; what it takes beside a copy of the
    floor's bytes, both timed without a profiler, and beside what a model predicts, (us, bound); and what
    bounds each kernel."""
    lines = [table(kernels), ""]
    asked = sum(k.times * (k.asked or 0) for k in kernels)
    lines.append(f"floor {floor / 1e6:.1f} MB")
    if asked:
        lines.append(f"asked {asked / 1e6:.1f} MB, {asked / floor:.2f} times the floor")
    if kernels and all(k.moved is not None for k in kernels):
        moved = sum(k.times * k.moved for k in kernels)
        lines.append(f"DRAM  {moved / 1e6:.1f} MB, {moved / floor:.2f} times the floor")
    copy_gbps = None
    if copy_us:
        copy_gbps = gbps(floor, copy_us)
        lines.append(f"copy  {copy_us:.1f} us, {copy_gbps:.0f} GB/s")
    if pass_us:
        share = f", {copy_us / pass_us:.0%} of the copy's" if copy_us else ""
        lines.append(
            f"pass  {pass_us:.1f} us, {gbps(floor, pass_us):.0f} GB/s of the floor's bytes{share}"
        )
    if predicted:
        lines.append(f"model {predicted[0]:.1f} us, bound by {predicted[1]}: predicted, not measured")
    lines.append("")
    lines += [f"{k.label or k.name}: {sentence(k, copy_gbps)}." for k in kernels]
    return "\n".join(lines)
