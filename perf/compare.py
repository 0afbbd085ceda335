"""Every operator beside every installed peer, alternating in one process: wins, ties and losses.

Of each case all providers are prepared, and checked against a float64 reference, and then take turns
with a copy of as many bytes; their times are medians over the rounds. The CSV has the columns of
`bench`. Who is faster by at most 2% ties. A peer's wrong result is reported and no win; where ours is
wrong or fails, each peer that is right has won.

Exit status 4: a loss is larger than `--allow`. Besides 0, 1 (something of ours failed beside no right
peer, or nothing was compared), 2 (usage), 3 (no GPU) and 130 (interrupted).
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

from .bench import add_arguments as add_bench_arguments
from .bench import add_row, attempt, checked, run_command, timed
from .calls import make_call, make_copy, make_inputs
from .providers import LOADERS, Provider, describe
from .shapes import Case
from .table import OURS, TIE, Table, read_case
from .timer import TurnFailed, alternate

LOSS_STATUS = 4
"""Exit status where a loss is larger than is allowed."""

PEERS = tuple(name for name in LOADERS if name.partition(".")[0] != OURS)


def _prepare(provider: Provider, case: Case, inputs, timer) -> dict:
    call = make_call(provider, case, inputs)
    check = checked(case, inputs, call())  # of the first call: running statistics go on moving
    return {"status": "ok", **check, "call": timer.prepare(call)}


def _prepare_copy(case: Case, timer, device) -> dict:
    return {"call": timer.prepare(make_copy(case, device)), "status": "ok"}


def together(case: Case, providers, timer, device) -> Iterator[tuple[str, dict]]:
    """The results of a copy and of the providers, timed in turns: (name, columns of its row), of who
    fails at once, and of the others at the end, ours last: a case that has it is complete."""
    prepared = {"copy": attempt(_prepare_copy, case, timer, device)}
    try:
        inputs = make_inputs(case, device)
    except Exception as error:  # out of memory, and then for every provider
        for p in providers:
            yield p.name, {"status": "error", "error": describe(error)}
        return
    for p in providers:
        prepared[p.name] = attempt(_prepare, p, case, inputs, timer)
    for name, result in list(prepared.items()):
        if "call" not in result:
            yield name, prepared.pop(name)
    timings = None
    while prepared and timings is None:
        try:
            timings = alternate({name: result["call"] for name, result in prepared.items()})
        except TurnFailed as failed:
            del prepared[failed.name]
            yield failed.name, {"status": "error", "error": describe(failed.__cause__)}
    for name in sorted(prepared, key=lambda name: (name != "copy", name == OURS)):
        result = prepared[name]
        del result["call"]
        yield name, timed(case, timings[name]) | result


def measure_case(case: Case, providers, timer, device, table: Table) -> Iterator[str]:
    """Adds the rows of a case; yields the name after each.

    Raises DeviceLost after the row that tells of the error.
    """
    if not providers:
        return
    versions = {p.name: p.version for p in providers}
    for name, result in together(case, providers, timer, device):
        add_row(table, case, name, versions.get(name, ""), result)
        yield name


@dataclass(frozen=True)
class Verdict:
    """Times of a case in microseconds, ours infinite if it failed."""

    case: Case
    peer: str
    ours_us: float
    theirs_us: float

    @property
    def ratio(self) -> float:
        return self.ours_us / self.theirs_us

    @property
    def kind(self) -> str:
        """ "win", "tie" or "loss"."""
        if self.is_loss(TIE):
            return "loss"
        return "win" if self.ours_us < (1 - TIE) * self.theirs_us else "tie"

    def is_loss(self, allowed: float) -> bool:
        """Whether the peer takes less time by more than this part of ours."""
        return self.theirs_us < (1 - allowed) * self.ours_us

    def __str__(self) -> str:
        ours = "failed" if self.ours_us == inf else f"{self.ours_us:.1f}"
        return (
            f"{self.ratio:6.2f}x  {self.peer:<14} {self.case.label}: {ours} to {self.theirs_us:.1f} us"
        )


def verdicts(rows) -> list[Verdict]:
    """The verdicts on all peers that were right, worst first, in cases that are complete."""
    cases = defaultdict(dict)
    for row in rows:
        if row["status"] != "absent":
            cases[read_case(row)][row["provider"]] = row
    found = []
    for case, by_provider in cases.items():
        ours = by_provider.get(OURS)
        if ours is None:
            continue
        ours_us = float(ours["median_us"]) if ours["status"] == "ok" else inf
        found += [
            Verdict(case, peer, ours_us, float(row["median_us"]))
            for peer, row in by_provider.items()
            if peer in PEERS and row["status"] == "ok"
        ]
    return sorted(found, key=lambda verdict: verdict.ratio, reverse=True)


def _counts(found) -> str:
    count = Counter(verdict.kind for verdict in found)
    return f"{count['win']:>5} wins {count['tie']:>5} ties {count['loss']:>5} losses"


def report(rows) -> str:
    """Counts of all peers and of each, losses, the worst first, and who was absent, wrong or failed."""
    found = verdicts(rows)
    lines = [f"{'all peers':<16}{_counts(found)}   (a tie is within {TIE:.0%})"]
    for peer in PEERS:
        if of_peer := [verdict for verdict in found if verdict.peer == peer]:
            lines.append(f"{peer:<16}{_counts(of_peer)}")
    losses = [verdict for verdict in found if verdict.kind == "loss"]
    if losses:
        lines += ["losses, as our time over theirs, worst first:", *map(str, losses)]
    for row in rows:
        if row["status"] == "absent":
            lines.append(f"absent: {row['provider']} ({row['error']})")
        elif row["status"] != "ok":
            case = read_case(row).label
            lines.append(f"{row['status']}: {row['provider']}, {case}: {row['error']}")
    return "\n".join(lines)


def status(rows, allowed: float) -> int:
    """The exit status, if losses of this part of our time are allowed."""
    found = verdicts(rows)
    if any(verdict.is_loss(allowed) for verdict in found):
        return LOSS_STATUS
    failed = any(row["provider"] == OURS and row["status"] != "ok" for row in rows)
    return int(failed or not found)


def percent(text: str) -> float:
    """A part of 100, as a part of 1."""
    value = float(text)
    if not 0 <= value < 100:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 100")
    return value / 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bench_arguments(parser, "compare", PEERS)
    parser.add_argument(
        "--allow",
        type=percent,
        default=TIE,
        metavar="PERCENT",
        help=f"end with status {LOSS_STATUS} if a peer takes less time by more than this part of ours "
        f"(default: {TIE * 100:g}, below which it is a tie)",
    )


def _report(rows, arguments) -> int:
    print(report(rows))
    return status(rows, arguments.allow)


def run(arguments) -> int:
    return run_command(arguments, "compare", [OURS, *arguments.providers], measure_case, _report)
