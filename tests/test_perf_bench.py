"""`python -m perf bench`: what is written, resumed and refused. No GPU is needed but for its timer."""

import re
import sys

import pytest
from measuring import ON_GPU, RUN, TORCH, by_label, fake_timer, main, measured, read, small_cases

from perf import bench, calls, machine
from perf.predictions import unexpected
from perf.providers import Provider
from perf.shapes import Case, parse_shapes
from perf.table import FIELDS, Table, case_fields, read_case, summary
from perf.timer import DeviceTimer
from perf.traffic import floor_bytes


def raising(*_):
    raise RuntimeError("no kernel\nfor this row")


def test_bench_writes_a_row_for_right_wrong_and_failing_providers(tmp_path):
    rms = TORCH["rms_norm"]
    table = [
        Provider("tritonnorm", "0.1.0", {"rms_norm": rms}),
        Provider("wrong", "2", {"rms_norm": lambda x, weight: 1.1 * rms(x, weight)}),
        Provider("failing", "3", {"rms_norm": raising}),
        Provider("another", "4", {"layer_norm": raising}),
    ]
    case = Case("rms_norm", "backward", (8, 16), "fp32")
    rows = measured(tmp_path / "sub" / "bench.csv", table, [case])
    assert [row["provider"] for row in rows] == ["copy", "tritonnorm", "wrong", "failing"]
    copy, ours, wrong, failing = rows
    assert tuple(ours) == FIELDS
    assert ours["status"] == copy["status"] == "ok"
    assert (ours["shape"], ours["layout"], ours["groups"]) == ("8x16", "contiguous", "")
    assert float(ours["max_error"]) < 1e-5
    assert (ours["median_us"], ours["p20_us"], ours["p80_us"]) == ("40.000", "39.000", "41.000")
    assert float(ours["gbps"]) == pytest.approx(floor_bytes(case) / 40e-6 / 1e9, abs=0.05)
    assert float(ours["fraction_of_copy"]) == 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", ours["date"])
    assert {name: ours[name] for name in RUN} == RUN
    assert wrong["status"] == "wrong"
    assert float(wrong["max_error"]) == pytest.approx(0.1, rel=0.01)
    assert wrong["median_us"]
    assert failing["status"] == "error"
    assert failing["error"] == "RuntimeError: no kernel for this row"
    assert failing["median_us"] == failing["gbps"] == ""


def test_bench_writes_predictions_beside_our_measurements_alone(tmp_path):
    """And none where there is none."""
    rms = TORCH["rms_norm"]
    table = [Provider("tritonnorm", "0.1.0", {"rms_norm": rms}), Provider("b", "2", {"rms_norm": rms})]
    cases = [Case("rms_norm", "forward", (8, n), "fp32") for n in (16, 32)]
    rows = measured(tmp_path / "bench.csv", table, cases, predictions={cases[0]: (20.0, "issue")})
    assert [(row["predicted_us"], row["bound"]) for row in rows if row["shape"] == "8x16"] == [
        ("", ""),  # a copy's
        ("20.000", "issue"),
        ("", ""),
    ]
    assert not any(row["predicted_us"] for row in rows if row["shape"] == "8x32")


def test_what_is_measured_already_is_not_predicted_again(tmp_path, monkeypatch):
    """Nor where there is no model of the GPU, nor without tritonnorm among the providers."""
    asked = []
    monkeypatch.setattr(bench, "in_own_process", lambda cases, *_: asked.append(cases) or {})
    ours = Provider("tritonnorm", "0.1.0", {"rms_norm": raising})
    done, lacking = cases = [Case("rms_norm", "forward", (8, n), "fp32") for n in (16, 32)]
    table = Table(tmp_path / "bench.csv", RUN, resume=False)
    table.add(**case_fields(done), provider="tritonnorm", status="ok")
    bench._predictions(cases, [ours], table, "NVIDIA H200", 100.0)
    assert asked == [[lacking]]
    assert bench._predictions(cases, [ours], table, "NVIDIA L4", 100.0) == {}
    assert bench._predictions(cases, [], table, "NVIDIA H200", 100.0) == {}
    assert bench._predictions([done], [ours], table, "NVIDIA H200", 100.0) == {}
    assert asked == [[lacking]]


def test_unexpected_times_are_named_worst_first():
    def row(n, median_us, predicted_us, status="ok"):
        fields = case_fields(Case("rms_norm", "forward", (8, n), "bf16"))
        figures = dict(median_us=median_us, predicted_us=predicted_us, bound="bytes")
        return fields | figures | {"provider": "tritonnorm", "status": status}

    rows = [row(1, "11.5", "10"), row(2, "5", "10"), row(3, "10.9", "10"), row(4, "9", "")]
    rows += [row(5, "90", "10", "wrong"), row(6, "", "", "absent")]
    assert unexpected(rows).splitlines() == [
        "2 of 3 predictions are off by more than 10%:",
        "  rms_norm forward 8x2 bf16: 50% of the prediction, 5 us and not 10, bound by bytes",
        "  rms_norm forward 8x1 bf16: 115% of the prediction, 11.5 us and not 10, bound by bytes",
    ]
    assert unexpected(rows[3:]) == "no prediction to compare with"


def test_bench_keeps_its_rows_when_interrupted_and_resumes(tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    path = tmp_path / "bench.csv"
    cases = bench.make_cases(["normalize"], ["forward"], ["fp32"], parse_shapes(["4x8", "4x16"]))
    ours = Provider("tritonnorm", "0.1.0", {"normalize": TORCH["normalize"]})
    with pytest.raises(KeyboardInterrupt):
        measured(path, [ours, Provider("peer", "1", {"normalize": interrupted})], cases)
    assert [row["provider"] for row in read(path)] == ["copy", "tritonnorm"]

    rows = measured(path, [ours, Provider("peer", "1", {"normalize": raising})], cases, resume=True)
    assert [(row["shape"], row["provider"]) for row in rows] == [
        (shape, provider) for shape in ("4x8", "4x16") for provider in ("copy", "tritonnorm", "peer")
    ]


@by_label(small_cases("bf16"))
def test_a_case_is_found_in_its_row(case, tmp_path):
    path = tmp_path / "bench.csv"
    Table(path, RUN, resume=False).add(**case_fields(case), provider="torch", status="ok")
    (row,) = read(path)
    assert read_case(row) == case
    assert row["groups"] == str(case.groups or "")
    table = Table(path, RUN, resume=True)
    assert table.find(case, "torch") == row
    others = [other for other in small_cases("bf16") if other != case]
    assert not any(table.find(other, "torch") for other in others)


def test_bench_resumes_no_other_csv(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        Table(path, RUN, resume=True)


def test_bench_starts_no_case_when_the_time_is_over(tmp_path, capsys):
    case = Case("normalize", "forward", (4, 8), "fp32")
    assert measured(tmp_path / "bench.csv", [], [case], seconds=-1) == []
    assert "left out" in capsys.readouterr().err


def test_progress_is_a_few_lines_without_a_terminal(capsys):
    progress = bench.Progress(200)
    for _ in range(200):
        progress.step("a case")
    assert len(capsys.readouterr().err.splitlines()) == 10


def test_summary_names_faster_peers_and_failures():
    image = Case("group_norm", "forward", (8, 64, 4, 4), "bf16", "channels_last", 32)

    def row(provider, median_us, status="ok", n=64, case=None):
        case = case or Case("rms_norm", "forward", (8, n), "bf16")
        return {**case_fields(case), "provider": provider, "median_us": median_us, "status": status}

    rows = [
        *(row("copy", "9"), row("tritonnorm", "10"), row("quack", "9.5"), row("torch", "9.9")),
        *(row("liger", "1", "wrong"), row("fla", "", "error")),
        *(row("copy", "10", n=128), row("tritonnorm", "10", n=128)),
        *(row("copy", "5", case=image), row("tritonnorm", "10", case=image)),
        row("torch", "8", case=image),
        {"provider": "absent", "status": "absent"},
    ]
    assert summary(rows).splitlines() == [
        "rms_norm forward bf16: 90% to 100% of a copy's bandwidth, median 95%, 2 shapes",
        "group_norm forward channels_last bf16: 50% to 50% of a copy's bandwidth, median 50%, 1 shapes",
        "a peer is faster by more than 2% in:",
        "  rms_norm forward 8x64 bf16: quack takes 95% of our time",
        "  group_norm forward 8x64x4x4:32 channels_last bf16: torch takes 80% of our time",
        "liger: 1 rows wrong",
        "fla: 1 rows error",
    ]


def test_bench_starts_anew_when_the_device_is_lost(monkeypatch, tmp_path, capsys):
    """An illegal access ends the context of the process, but not the run."""
    started = []

    def lost(*_):
        raise bench.DeviceLost("an illegal memory access was encountered")

    def execv(path, command):
        started.append(command)
        raise SystemExit

    monkeypatch.setattr(machine, "refusal", lambda: None)
    monkeypatch.setattr(bench, "DeviceTimer", lambda: fake_timer)
    monkeypatch.setattr(bench, "measure", lost)
    monkeypatch.setattr(bench.os, "execv", execv)
    options = ("bench", "--out", str(tmp_path / "bench.csv"), "--providers", "torch")
    with pytest.raises(SystemExit):
        main(monkeypatch, *options)
    assert started == [[sys.executable, "-m", "perf", *options, "--resume", "--seconds", "inf"]]
    assert "illegal memory access" in capsys.readouterr().err


def test_an_error_that_loses_the_device_is_in_its_row(monkeypatch, tmp_path):
    def lost():
        raise bench.DeviceLost

    monkeypatch.setattr(bench, "check_device", lost)
    peers = [Provider(name, "1", {"normalize": raising}) for name in ("first", "second")]
    cases = [Case("normalize", "forward", (4, 8), "fp32")]
    path = tmp_path / "bench.csv"
    for names in (["copy", "first"], ["copy", "first", "second"]):
        with pytest.raises(bench.DeviceLost):
            measured(path, peers, cases, resume=True)
        assert [row["provider"] for row in read(path)] == names


@pytest.mark.skipif(ON_GPU, reason="needs a machine without a CUDA device, and this one has one")
@pytest.mark.parametrize("command", ["bench", "gpu"])
def test_without_a_gpu_nothing_is_timed(command, monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    status = main(monkeypatch, command, "--out", tmp_path / "out")
    captured = capsys.readouterr()
    assert status == machine.NO_DEVICE_STATUS == 3
    assert captured.out == ""
    assert captured.err == f"{command}: no CUDA device: nothing is timed\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["bench", "gpu"])
def test_the_interpreter_is_not_timed(command, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(monkeypatch, command, "--out", tmp_path / "out") == machine.NO_DEVICE_STATUS
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert "TRITON_INTERPRET" in captured.err


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_the_timer_on_a_device():
    case = Case("rms_norm", "forward", (8192, 4096), "bf16")
    timing = DeviceTimer()(calls.make_copy(case, "cuda"))
    assert 0 < timing.p20_us <= timing.median_us <= timing.p80_us
    assert timing.host_us > 0
