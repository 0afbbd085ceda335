"""What every shipped configuration is held to beside spills, widths and bytes: the thresholds, as data.

A gate is `enforced` once every configuration meets it, but for those of EXEMPT; until then what misses
it is listed. What is exempt is listed too.
"""

from collections.abc import Callable
from dataclasses import dataclass

from .compiled import Lowered
from .devices import KB, Device
from .shapes import OPERATORS

REGISTERS = {"forward": 96, "backward": 128}
"""Registers a thread, at most: with more an SM holds too few warps to keep its loads coming."""

IN_FLIGHT = {"sm_80": 24 * KB, "sm_90": 32 * KB, "sm_100": 64 * KB}
"""Bytes in flight an SM, at least: bandwidth times latency under load."""

ISSUE_SHARE = 0.6
"""Part of the issue budget of a byte that instructions may take: they do not come evenly."""

ROW_BARRIERS = {"layer": 3, "rms": 1, "l2": 1}
"""Barriers a row, at most: two for each reduction but the last."""

TEAMS = ("team_forward", "team_backward")
ROOM = "as many as leave room for all programs of teams"

WAVES = 4
"""A grid has so many waves at least, for a tail of an eighth at most on average; or a single one."""


@dataclass(frozen=True)
class Gate:
    """A condition on compiled kernels. `miss` says how one misses it, or None."""

    name: str  # with its number in the list of gates
    enforced: bool
    miss: Callable[..., str | None]


def registers(k: Lowered) -> str | None:
    most = REGISTERS[k.direction]
    return f"{k.registers} registers, more than {most}" if k.registers > most else None


def in_flight(k: Lowered) -> str | None:
    least = IN_FLIGHT[k.target]
    if not k.activations or k.bytes_in_flight >= least:
        return None
    return f"{k.bytes_in_flight / KB:.0f} KB in flight, less than {least / KB:.0f}"


def divisions(k: Lowered) -> str | None:
    """Of integers, in a loop over elements of activations."""
    loops = {i for name in k.activations for i in k.loops_over(name)}
    found = sum(k.regions[i].divisions for i in loops)
    return f"{found} integer divisions in a loop over elements" if found else None


def issue(k: Lowered, device: Device) -> str | None:
    needed, most = k.instructions_per_byte, ISSUE_SHARE * device.issue_budget
    if needed is None or needed <= most:
        return None
    return f"{needed:.3f} instructions a byte, more than {most:.3f}"


def barriers(k: Lowered, device: Device) -> str | None:
    """Whole ones a row, so that those at the ends of a program that walks through many do not count."""
    operator = OPERATORS[k.operator]
    if operator.family != "rows" or not k.activations or k.layout != "contiguous":
        return None
    rows = max(int(k.shape.partition("x")[0]) / k.programs, k.tile[0])
    a_row, most = int(k.barriers / rows), ROW_BARRIERS[operator.norm]
    return f"{a_row} barriers a row, more than {most}" if a_row > most else None


def grid(k: Lowered, device: Device) -> str | None:
    slots = k.resident * device.processors
    waves = k.blocks / slots
    if k.cooperative and waves > 1:
        return f"a cooperative grid of {k.blocks}, of which {slots} can run"
    if not k.activations or waves >= WAVES or (waves <= 1 and k.blocks >= device.processors):
        return None
    return f"{waves:.2f} waves"


OF_KERNELS = (
    Gate("4 registers", True, registers),
    Gate("5 bytes in flight", False, in_flight),
    Gate("7 divisions", True, divisions),
)
"""Gates that any compiled kernel can be held to."""

OF_LAUNCHES = (
    Gate("6 issue rate", False, issue),
    Gate("7 barriers", False, barriers),
    Gate("9 grid", False, grid),
)
"""Gates of a launch of some size on a device."""

EXEMPT = (
    ("4 registers", "a float64 takes two", lambda k: k.dtype == "fp64"),
    ("4 registers", "a row of one element is its own", lambda k: k.tile[1] == 1),
    ("7 divisions", "of strided rows' numbers, not of elements'", lambda k: k.layout == "strided"),
    ("4 registers", ROOM, lambda k: k.kernel in TEAMS),
    ("4 registers", "moments a lane, which fewer spill", lambda k: k.kernel == "channel_moments"),
)
"""What may miss an enforced gate, and why."""


@dataclass(frozen=True)
class Miss:
    """How a kernel misses a gate."""

    gate: Gate
    how: str
    exempt: str | None  # why it may

    @property
    def fails(self) -> bool:
        return self.gate.enforced and self.exempt is None

    def line(self, of_what: str) -> str:
        why = f" (exempt: {self.exempt})" if self.exempt else ""
        return f"missed: gate {self.gate.name}, {of_what}: {self.how}{why}"


def missed(gates, k: Lowered, *device: Device) -> list[Miss]:
    """How a kernel, or a launch on a device, misses gates."""
    return [
        Miss(gate, how, next((why for name, why, of in EXEMPT if name == gate.name and of(k)), None))
        for gate in gates
        if (how := gate.miss(k, *device))
    ]
