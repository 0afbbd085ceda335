"""`python -m perf compare`, as far as that needs no GPU: turns, verdicts, and what the command writes.
Times are those of a clock that calls move."""

import csv
import sys

import pytest
import torch

from perf import __main__ as perf_main
from perf import bench, calls, compare, machine, providers
from perf.providers import Provider, operators_of_torch
from perf.shapes import Case
from perf.table import OURS, Table, case_fields
from perf.timer import Prepared, TurnFailed, alternate

RUN = {"device": "NVIDIA H200", "tritonnorm_version": "0.1.0", "command": "python -m perf compare"}
CASE = Case("rms_norm", "forward", (8, 16), "fp32")
RMS = operators_of_torch()["rms_norm"]


class Clock:
    """Calls move it. It is the timer as well."""

    now = 0.0

    def taking(self, microseconds, function=RMS):
        def call(*arguments):
            self.now += microseconds
            return function(*arguments)

        return call

    def prepare(self, call):
        def times(repetitions):
            found = []
            for _ in range(repetitions):
                start = self.now
                call()
                found.append(max(self.now - start, 1.0))  # a copy moves nothing
            return found

        return Prepared(times, repetitions=21, host_us=5.0)


@pytest.fixture
def clock():
    return Clock()


def provider(name, function, version="1"):
    return Provider(name, version, {"rms_norm": function})


def compared(path, clock, *peers, cases=(CASE,), resume=False):
    """The rows after a comparison of these providers."""
    table = Table(path, RUN, resume)
    bench.measure(cases, peers, clock, "cpu", table, 100, compare.measure_case)
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def row(provider, median_us, status="ok", case=CASE, error=""):
    fields = dict(provider=provider, median_us=str(median_us), status=status, error=error)
    return case_fields(case) | fields


# Turns


def test_calls_take_turns_and_another_begins():
    """Three rounds of two repetitions after one that is not counted; the median of their medians."""
    turns = []

    def prepared(name, *rounds):
        left = list(rounds)

        def times(repetitions):
            turns.append((name, repetitions))
            return [1000.0, *left.pop(0)]

        return Prepared(times, repetitions=6, host_us=7.0)

    calls = {
        "a": prepared("a", (1, 3), (50, 70), (4, 6)),
        "b": prepared("b", (1, 1), (2, 2), (3, 3)),
        "c": prepared("c", (9, 9), (9, 9), (9, 9)),
    }
    found = alternate(calls, rounds=3)
    assert turns == [(name, 3) for name in "abcbcacab"]
    assert {name: timing.median_us for name, timing in found.items()} == {"a": 5, "b": 2, "c": 9}
    assert (found["a"].p20_us, found["a"].p80_us, found["a"].host_us) == (3, 50, 7)


def test_a_clock_that_drifts_meets_all_alike():
    """A device that slows down by 1% a turn, half in all: an equal call is a tie with the next."""
    turn = 0

    def times(repetitions):
        nonlocal turn
        turn += 1
        return [100 * 1.01**turn] * repetitions

    same = Prepared(times, repetitions=21, host_us=5.0)
    calls = {name: same for name in ("tritonnorm", "torch", "liger", "quack", "fla", "copy")}
    found = alternate(calls, rounds=7)
    medians = [timing.median_us for timing in found.values()]
    assert max(medians) < 1.06 * min(medians)
    assert compare.Verdict(CASE, "torch", medians[0], medians[1]).kind == "tie"


def test_who_fails_at_its_turn_is_named():
    def times(repetitions):
        raise MemoryError

    calls = {
        "a": Prepared(lambda repetitions: [1.0] * repetitions, 1, 1.0),
        "b": Prepared(times, 1, 1.0),
    }
    with pytest.raises(TurnFailed) as failed:
        alternate(calls)
    assert failed.value.name == "b"
    assert isinstance(failed.value.__cause__, MemoryError)


# Verdicts


@pytest.mark.parametrize(
    ("ours", "theirs", "kind"),
    [
        (100, 97.9, "loss"),
        (100, 98, "tie"),
        (100, 100, "tie"),
        (98, 100, "tie"),
        (97.9, 100, "win"),
        (float("inf"), 100, "loss"),
    ],
)
def test_a_tie_is_within_two_percent(ours, theirs, kind):
    assert compare.Verdict(CASE, "torch", ours, theirs).kind == kind


def test_losses_are_the_worst_first_and_wrong_peers_win_nothing():
    backward = Case("group_norm", "backward", (8, 64, 4, 4), "bf16", "channels_last", 32)
    unfinished = Case("rms_norm", "forward", (8, 32), "fp32")
    broken = Case("rms_norm", "forward", (8, 64), "fp32")
    rows = [
        {"provider": "fla", "status": "absent", "error": "ModuleNotFoundError: fla"},
        *(row("copy", 1), row("tritonnorm", 100), row("torch", 150), row("quack", 90)),
        *(row("liger", 10, "wrong", error="max_error above 3e-02"), row("tritonnorm.team", 1)),
        *(row("tritonnorm", 100, case=backward), row("torch", 50, case=backward)),
        row("torch.compile", 101, case=backward),
        row("torch", 1, case=unfinished),
        row("tritonnorm", "", "error", broken, "RuntimeError: no kernel"),
        row("torch", 40, case=broken),
    ]
    assert compare.report(rows).splitlines() == [
        "all peers           1 wins     1 ties     3 losses   (a tie is within 2%)",
        "torch               1 wins     0 ties     2 losses",
        "torch.compile       0 wins     1 ties     0 losses",
        "quack               0 wins     0 ties     1 losses",
        "losses, as our time over theirs, worst first:",
        "   infx  torch          rms_norm forward 8x64 fp32: failed to 40.0 us",
        "  2.00x  torch          group_norm backward 8x64x4x4:32 channels_last bf16: 100.0 to 50.0 us",
        "  1.11x  quack          rms_norm forward 8x16 fp32: 100.0 to 90.0 us",
        "absent: fla (ModuleNotFoundError: fla)",
        "wrong: liger, rms_norm forward 8x16 fp32: max_error above 3e-02",
        "error: tritonnorm, rms_norm forward 8x64 fp32: RuntimeError: no kernel",
    ]


@pytest.mark.parametrize(
    ("rows", "allowed", "expected"),
    [
        ([row(OURS, 100), row("torch", 97)], 0.02, compare.LOSS_STATUS),
        ([row(OURS, 100), row("torch", 97)], 0.03, 0),
        ([row(OURS, 100), row("torch", 99)], 0, compare.LOSS_STATUS),
        ([row(OURS, 100), row("torch", 98.5), row("copy", 1)], 0.02, 0),
        ([row(OURS, 100), row("torch", 50, "wrong")], 0.02, 1),  # nothing was compared
        ([row(OURS, 100, "wrong"), row("torch", 200)], 0.99, compare.LOSS_STATUS),
        ([row(OURS, "", "error"), row("torch", "", "error")], 0.02, 1),
        ([], 0.02, 1),
    ],
)
def test_the_status_tells_of_losses_beyond_what_is_allowed(rows, allowed, expected):
    assert compare.status(rows, allowed) == expected


def test_the_status_is_one_of_its_own():
    others = {0, 1, bench.USAGE_STATUS, machine.NO_DEVICE_STATUS, machine.INTERRUPTED_STATUS}
    assert compare.LOSS_STATUS not in others


def test_every_provider_that_is_not_ours_is_a_peer():
    assert compare.PEERS == ("torch", "torch.compile", "liger", "fla", "quack")


# Rows


def test_a_case_has_a_row_of_each_provider(tmp_path, clock):
    def failing(*_):
        raise RuntimeError("no kernel\nfor this row")

    rows = compared(
        tmp_path / "compare.csv",
        clock,
        provider(OURS, clock.taking(40.0), "0.1.0"),
        provider("torch", clock.taking(50.0)),
        provider("liger", clock.taking(10.0, lambda x, weight: 1.1 * RMS(x, weight))),
        provider("fla", failing),
        Provider("quack", "1", {}),
    )
    assert [(r["provider"], r["status"]) for r in rows] == [
        *(("fla", "error"), ("copy", "ok"), ("torch", "ok"), ("liger", "wrong"), (OURS, "ok"))
    ]
    ours = rows[-1]
    assert (ours["median_us"], ours["host_us"], ours["provider_version"]) == ("40.000", "5.000", "0.1.0")
    assert float(ours["max_error"]) < 1e-5
    assert {name: ours[name] for name in RUN} == RUN
    assert [verdict.kind for verdict in compare.verdicts(rows)] == ["win"]


def test_running_statistics_are_those_of_the_first_call(tmp_path, clock):
    """Which all repetitions after it move further."""
    peer = Provider("torch", "1", operators_of_torch())
    case = Case("batch_norm", "forward", (8, 4, 6), "fp32")
    rows = compared(tmp_path / "compare.csv", clock, peer, cases=[case])
    assert {r["provider"]: r["status"] for r in rows} == {"copy": "ok", "torch": "ok"}


def test_who_fails_later_does_not_end_the_comparison(tmp_path, clock):
    calls = 0

    def tiring(*arguments):
        nonlocal calls
        calls += 1
        if calls > 10:
            raise RuntimeError("too many")
        return RMS(*arguments)

    rows = compared(
        tmp_path / "compare.csv",
        clock,
        provider("torch", tiring),
        provider(OURS, clock.taking(40.0)),
    )
    found = {r["provider"]: (r["status"], r["error"]) for r in rows}
    ok = ("ok", "")
    assert found == {"torch": ("error", "RuntimeError: too many"), "copy": ok, OURS: ok}


def test_a_lost_device_costs_the_row_of_who_lost_it(tmp_path, clock, monkeypatch):
    """The comparison starts anew with the others."""

    def failing(*_):
        raise RuntimeError("an illegal memory access was encountered")

    def lost():
        raise bench.DeviceLost

    path = tmp_path / "compare.csv"
    peers = [provider(OURS, clock.taking(40.0)), provider("torch", failing)]
    with monkeypatch.context() as patch:
        patch.setattr(bench, "check_device", lost)
        with pytest.raises(bench.DeviceLost):
            compared(path, clock, *peers)
    rows = compared(path, clock, *peers, resume=True)
    assert [(r["provider"], r["status"]) for r in rows] == [
        *(("torch", "error"), ("copy", "ok"), (OURS, "ok"))
    ]
    assert compared(path, clock, *peers, resume=True) == rows


# The command


@pytest.fixture
def command(monkeypatch, clock, tmp_path):
    """Runs `compare` with a clock in place of a GPU; the times of tritonnorm and torch are given."""

    def run(ours, theirs, *options):
        monkeypatch.setattr(machine, "refusal", lambda: None)
        monkeypatch.setattr(bench, "DeviceTimer", lambda: clock)
        for name in ("make_inputs", "make_copy"):
            function = getattr(calls, name)
            monkeypatch.setattr(compare, name, lambda case, device, make=function: make(case, "cpu"))
        for name, time in ((OURS, ours), ("torch", theirs)):
            loaded = provider(name, clock.taking(time))
            monkeypatch.setitem(providers.LOADERS, name, lambda loaded=loaded: loaded)
        cases = ("--operators", "rms_norm", "--directions", "forward", "--shapes", "8x16")
        out = ("--out", str(tmp_path / "compare.csv"))
        monkeypatch.setattr(sys, "argv", ["perf", "compare", *cases, *out, *options])
        return perf_main.main()

    return run


def test_the_command_counts_and_ends_with_its_status(command, tmp_path, capsys, monkeypatch):
    def broken():
        raise ImportError("no quack")

    monkeypatch.setitem(providers.LOADERS, "quack", broken)
    assert command(40.0, 30.0, "--providers", "torch", "quack") == compare.LOSS_STATUS
    captured = capsys.readouterr()
    assert "0 wins     0 ties     1 losses" in captured.out
    assert "  1.33x  torch          rms_norm forward 8x16 bf16: 40.0 to 30.0 us" in captured.out
    assert "absent: quack (ImportError: no quack)" in captured.out
    assert captured.out.endswith(f"4 rows in {tmp_path / 'compare.csv'}\n")
    assert command(40.0, 30.0, "--providers", "torch", "--allow", "26") == 0
    assert command(40.0, 50.0, "--providers", "torch") == 0


@pytest.mark.parametrize("options", [("--allow", "101"), ("--allow", "-1"), ("--providers", OURS)])
def test_a_usage_error(command, options):
    with pytest.raises(SystemExit) as ended:
        command(1.0, 1.0, *options)
    assert ended.value.code == bench.USAGE_STATUS


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_gpu_nothing_is_compared(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    out = tmp_path / "compare.csv"
    monkeypatch.setattr(sys, "argv", ["perf", "compare", "--out", str(out)])
    assert perf_main.main() == machine.NO_DEVICE_STATUS
    assert capsys.readouterr().err == "compare: no CUDA device: nothing is timed\n"
    assert not out.exists()
