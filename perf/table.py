"""The CSV of `bench`: its columns, written a row at a time, and what it says in a few lines."""

import csv
import statistics
from collections import Counter, defaultdict
from datetime import datetime, timezone
from pathlib import Path

from .shapes import Case

CASE_FIELDS = ("operator", "direction", "shape", "layout", "groups", "dtype")
RESULT_FIELDS = (
    "provider",
    "provider_version",
    "median_us",
    "p20_us",
    "p80_us",
    "host_us",
    "floor_bytes",
    "gbps",
    "fraction_of_copy",
    "predicted_us",
    "bound",
    "max_error",
    "status",
    "error",
)
RUN_FIELDS = (
    "device",
    "driver_version",
    "cuda_version",
    "torch_version",
    "triton_version",
    "python_version",
    "tritonnorm_version",
    "date",
    "command",
)
FIELDS = CASE_FIELDS + RESULT_FIELDS + RUN_FIELDS

OURS = "tritonnorm"
"""The name of the provider that the others are compared with; variants of it begin with it and a dot."""

TIE = 0.02
"""Who takes less time by a smaller part of the other's is not faster: that is noise."""


def case_fields(case: Case) -> dict[str, str]:
    """A case as the texts of its columns."""
    fields = {name: getattr(case, name) for name in CASE_FIELDS}
    return fields | {"shape": case.name, "groups": str(case.groups or "")}


def read_case(row) -> Case:
    """The case that the columns of a row tell.

    Raises:
        ValueError, KeyError: they tell none.
    """
    shape = tuple(int(size) for size in row["shape"].split("x"))
    groups = int(row["groups"]) if row["groups"] else None
    return Case(row["operator"], row["direction"], shape, row["dtype"], row["layout"], groups)


class Table:
    """The CSV, a row at a time on disk. With `resume` it keeps the rows that are there, but for one that
    was cut off.

    Raises:
        ValueError: a file to be resumed has other columns, or is of another device or version.
    """

    def __init__(self, path: Path, run: dict[str, str], resume: bool):
        self._run = run
        self._rows: dict[tuple[str, ...], dict[str, str]] = {}
        if resume and path.exists():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                if tuple(reader.fieldnames or FIELDS) != FIELDS:
                    raise ValueError(f"{path} has other columns, and cannot be resumed")
                rows = [row for row in reader if None not in row.values()]
            for name, value in run.items():
                if name != "command" and any(row[name] != value for row in rows):
                    raise ValueError(f"{path} is of another {name} than {value}, and cannot be resumed")
            self._rows = {self._key(row): row for row in rows}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", newline="")
        self._writer = csv.DictWriter(self._file, FIELDS, restval="")
        self._writer.writeheader()
        self._writer.writerows(self._rows.values())
        self._file.flush()

    @staticmethod
    def _key(row) -> tuple[str, ...]:
        return tuple(str(row.get(name, "")) for name in (*CASE_FIELDS, "provider"))

    @property
    def rows(self) -> list[dict[str, str]]:
        return list(self._rows.values())

    def find(self, case: Case | None, provider: str) -> dict[str, str] | None:
        """The row of a provider on a case, or on none: that of an absent provider."""
        return self._rows.get(self._key({**(case_fields(case) if case else {}), "provider": provider}))

    def add(self, **values) -> None:
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        row = {name: str(value) for name, value in {**values, **self._run, "date": date}.items()}
        self._rows[self._key(row)] = row
        self._writer.writerow(row)
        self._file.flush()


def summary(rows) -> str:
    """Which part of a copy's bandwidth tritonnorm reached, where a peer is faster, and what failed."""
    times = defaultdict(dict)
    for row in rows:
        if row["status"] == "ok":
            times[read_case(row)][row["provider"]] = float(row["median_us"])
    fractions, lines = defaultdict(list), []
    for case, found in times.items():
        ours, copy = found.pop(OURS, None), found.pop("copy", None)
        if ours is None or copy is None:
            continue
        fractions[case.kind].append(copy / ours)
        lines += [
            f"  {case.label}: {peer} takes {theirs / ours:.0%} of our time"
            for peer, theirs in found.items()
            if theirs < (1 - TIE) * ours
        ]
    margin = f"by more than {TIE:.0%}"
    if fractions:
        lines.insert(0, f"a peer is faster {margin} in:" if lines else f"no peer is faster {margin}")
    reached = [
        f"{kind}: {min(parts):.0%} to {max(parts):.0%} of a copy's bandwidth, "
        f"median {statistics.median(parts):.0%}, {len(parts)} shapes"
        for kind, parts in fractions.items()
    ]
    failures = Counter((r["provider"], r["status"]) for r in rows if r["status"] in ("wrong", "error"))
    failed = [f"{provider}: {count} rows {status}" for (provider, status), count in failures.items()]
    return "\n".join([*reached, *lines, *failed])
