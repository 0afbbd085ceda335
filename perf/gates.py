"""What every shipped configuration is held to beside widths and bytes: the thresholds, as data.

A gate is `enforced` once every configuration meets it, but for those of EXEMPT; until then what misses
it is listed. What is exempt is listed too; an exemption that nothing needs fails, as a missed gate does.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tritonnorm.launch.common import TRITON_VERSION

from .compiled import TARGETS, Lowered
from .devices import KB, Device
from .shapes import DTYPES, OPERATORS

REGISTERS = {"forward": 96, "backward": 128}
"""Registers a thread, at most: with more an SM holds too few warps to keep its loads coming."""

AHEAD_REGISTERS = 232
"""The same of rows in several tiles that are loaded ahead: 225 at most with Triton 3.9.0 and 3.6.0."""

IN_FLIGHT = {"sm_80": 24 * KB, "sm_90": 32 * KB, "sm_100": 64 * KB}
"""Bytes in flight an SM, at least: bandwidth times latency under load."""

BLOCK_SHARED = 99 * KB
"""Shared memory of a block, at most: what GPUs of sm_86, sm_89 and sm_120 have, others more."""

ISSUE_SHARE = 0.6
"""Part of the issue budget of a byte that instructions may take: they do not come evenly."""

ROW_BARRIERS = {"layer": 3, "rms": 1, "l2": 1}
"""Barriers a row, at most: two for each reduction but the last."""

TEAMS = ("team_forward", "team_backward")
ROW_NUMBERS = "of strided rows' numbers, not of elements'"
ROOM = "as many as leave room for all programs of teams"

WAVES = 4
"""A grid has so many waves at least, for a tail of an eighth at most on average; or a single one."""


@dataclass(frozen=True)
class Gate:
    """A condition on compiled kernels. `miss` says how one misses it, or None."""

    name: str  # with its number in the list of gates
    enforced: bool
    miss: Callable[..., str | None]


def spills(k: Lowered) -> str | None:
    return f"{k.stack} bytes of stack" if k.stack else None


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


def shared_memory(k: Lowered) -> str | None:
    if k.shared <= BLOCK_SHARED:
        return None
    return f"{k.shared} bytes a block, more than {BLOCK_SHARED}"


def uneven_sums(k: Lowered) -> str | None:
    """Lanes with sums of their own, of which shared memory may take either: not the same bits again."""
    return f"{k.uneven_sums} sums that differ between lanes" if k.uneven_sums else None


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
    Gate("1 spills", True, spills),
    Gate("4 registers", True, registers),
    Gate("5 bytes in flight", False, in_flight),
    Gate("7 divisions", True, divisions),
    Gate("10 uneven sums", True, uneven_sums),
    Gate("11 shared memory", True, shared_memory),
)
"""Gates that any compiled kernel can be held to."""

OF_LAUNCHES = (
    Gate("6 issue rate", False, issue),
    Gate("7 barriers", False, barriers),
    Gate("9 grid", False, grid),
)
"""Gates of a launch of some size on a device."""


@dataclass(frozen=True)
class Exemption:
    """What may miss an enforced gate, and why: kernels compiled for some targets and dtypes, by any
    Triton or by one."""

    gate: str
    why: str
    of: Callable[[Lowered], bool]
    dtypes: tuple[str, ...] = tuple(DTYPES)
    targets: tuple[str, ...] = TARGETS
    triton: tuple[int, int] | None = None

    def excuses(self, gate: Gate, k: Lowered, triton=TRITON_VERSION) -> bool:
        return (
            self.gate == gate.name
            and self.triton in (None, triton)
            and k.target in self.targets
            and k.dtype in self.dtypes
            and self.of(k)
        )


def _two_registers(kernel: str, n: int | None = None) -> Callable[[Lowered], bool]:
    """Whether it is this kernel, of lines of n elements, and spills no more than two registers."""
    return lambda k: k.kernel == kernel and n in (None, k.line) and k.stack <= 8


def _ahead(k: Lowered) -> bool:
    return k.kernel == "row_backward" and k.ahead > 1 and k.registers <= AHEAD_REGISTERS


def _tiles_ahead(k: Lowered) -> bool:
    return _ahead(k) and k.tile[1].bit_count() > 1  # several, whose columns are a power of two each


def _contiguous_sets(positions: int, stack: int) -> Callable[[Lowered], bool]:
    """Whether it is the backward pass of resident sets of contiguous lines of so many positions, and
    spills no more than `stack` bytes."""
    kind = ("group_backward", "contiguous", positions)
    return lambda k: (k.kernel, k.layout, k.line) == kind and k.stack <= stack


FEW_FOLD = "few programs fold, and with fewer registers they spill"
ROWS_AHEAD = "rows are on their way to shared memory: by the model one block an SM is enough"
NARROW_ROWS = "an address each; told to take 128, Triton 3.9 spills some lengths"
NARROW_SETS = "an address an element, and pairs of registers, by which others gain up to 3%"
TEAMS_OFF = "no table prefers teams, and with more registers there are fewer of them"

HALF = ("bf16", "fp16")

EXEMPT = (
    Exemption("4 registers", "a float64 takes two", lambda k: True, ("fp64",)),
    Exemption("4 registers", "a row of one element is its own", lambda k: k.tile[1] == 1),
    Exemption("7 divisions", ROW_NUMBERS, lambda k: k.layout == "strided"),
    Exemption("4 registers", ROOM, lambda k: k.kernel in TEAMS),
    Exemption("4 registers", FEW_FOLD, lambda k: k.kernel == "fold_moments"),
    Exemption("4 registers", ROWS_AHEAD, _tiles_ahead),
    Exemption(
        "4 registers",
        ROWS_AHEAD,
        lambda k: _ahead(k) and k.line in (768, 1000, 1280),
        HALF,
        ("sm_80",),
        (3, 6),
    ),
    Exemption(
        "4 registers",
        NARROW_ROWS,
        _two_registers("row_backward", 1001),
        HALF,
        ("sm_80", "sm_100"),
        (3, 6),
    ),
    Exemption("1 spills", NARROW_SETS, _contiguous_sets(49, 8), ("bf16",), ("sm_100",)),
    Exemption("1 spills", TEAMS_OFF, _two_registers("row_team_backward"), ("bf16",), ("sm_80",), (3, 6)),
)
"""What is exempt, with the pinned Triton (3.9) and the oldest that is supported, with which every launch
is compiled as well."""


@dataclass(frozen=True)
class Miss:
    """How a kernel misses a gate."""

    gate: Gate
    how: str
    exempt: Exemption | None  # by which it may

    @property
    def fails(self) -> bool:
        return self.gate.enforced and self.exempt is None

    def line(self, of_what: str) -> str:
        why = f" (exempt: {self.exempt.why})" if self.exempt else ""
        return f"missed: gate {self.gate.name}, {of_what}: {self.how}{why}"


def missed(gates, k: Lowered, *device: Device) -> list[Miss]:
    """How a kernel, or a launch on a device, misses gates."""
    return [
        Miss(gate, how, next((one for one in EXEMPT if one.excuses(gate, k)), None))
        for gate in gates
        if (how := gate.miss(k, *device))
    ]


def unneeded(missed: Iterable[Miss], targets, dtypes) -> list[Exemption]:
    """The exemptions that nothing needs, of those from what is compiled for these targets and dtypes."""
    needed = [miss.exempt for miss in missed]
    return [
        one
        for one in EXEMPT
        if one not in needed
        and one.triton in (None, TRITON_VERSION)
        and set(one.targets) <= set(targets)
        and set(one.dtypes) <= set(dtypes)
    ]
