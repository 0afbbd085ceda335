"""`python -m perf profile`: reading what profilers write, and what follows from it.

No profiler ran for these tests: what they read is made up, in the formats that ncu, torch.profiler and
proton document, and so are its figures.
"""

import argparse
import json
import sys
from dataclasses import replace

import pytest

from perf import launches, machine, ncu, profile, profilers, reading, traffic
from perf.profilers import Launch
from perf.providers import Provider
from perf.reading import Kernel
from perf.shapes import Case

FAST = Kernel("k", 100.0, asked=200_000_000, read=130e6, written=70e6, dram_percent=91.0)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "dram"),
        ({"dram_percent": 60.0, "l2_percent": 85.0}, "l2"),
        ({"dram_percent": 60.0, "issue_percent": 80.0}, "issue"),
        ({"dram_percent": 60.0, "issue_percent": 30.0, "l2_percent": 50.0}, "latency"),
        ({"dram_percent": 4.0, "issue_percent": 5.0, "microseconds": 3.0}, "launch"),
        ({"dram_percent": 85.0, "microseconds": 3.0}, "dram"),  # short, but as fast as it can be
        ({"dram_percent": None}, None),
    ],
    ids=str,
)
def test_what_bounds_a_kernel(changes, kind):
    kernel = replace(FAST, **changes)
    assert reading.bound(kernel) == kind
    words = {
        "dram": "DRAM bounds it",
        "l2": "L2 bounds it",
        "issue": "instructions bound it",
        "latency": "latency bounds it",
        "launch": "its launch bounds it",
        None: "without counters",
    }
    assert reading.sentence(kernel).startswith(words[kind])


def test_latency_is_explained_by_what_warps_wait_for():
    stalls = {"long_scoreboard": 6.0, "barrier": 3.0, "wait": 1.0, "drain": 0.5, "membar": 0.0}
    kernel = replace(FAST, dram_percent=55.0, stalls=stalls, occupancy_percent=25.0, limiter="registers")
    text = reading.sentence(kernel)
    assert "57% of the stalled warps wait for loads from memory" in text
    assert "occupancy 25%, limited by registers" in text
    assert [reason for reason, _ in kernel.top_stalls] == ["long_scoreboard", "barrier", "wait"]


def test_bytes_above_those_asked_for_are_told():
    assert "times what the launch asks" not in reading.sentence(FAST)
    assert "DRAM moves 1.30 times" in reading.sentence(replace(FAST, read=190e6))


def test_without_counters_bandwidth_decides():
    """200 MB in 100 us are 2,000 GB/s."""
    kernel = replace(FAST, dram_percent=None, read=None, written=None)
    assert "91% of a copy's" in reading.sentence(kernel, copy_gbps=2200)
    assert reading.sentence(kernel, copy_gbps=2200).startswith("DRAM bounds it")
    assert reading.sentence(kernel, copy_gbps=4000).startswith("50% of a copy's bandwidth")


def test_report_has_the_floor_and_sums():
    kernels = [
        replace(FAST, label="layer_norm_bwd [4, 8] bf16"),
        Kernel("fold", 5.0, times=2, asked=1_000_000),
    ]
    text = reading.report(kernels, floor=100_000_000, copy_us=90.0, pass_us=120.0)
    assert "asked 202.0 MB, 2.02 times the floor" in text
    assert "75% of the copy's" in text
    assert "layer_norm_bwd [4, 8] bf16: DRAM bounds it" in text
    assert "\nDRAM " not in text  # of the fold nothing is known
    assert "model" not in text
    predicted = reading.report(kernels, floor=100_000_000, predicted=(95.04, "bytes"))
    assert "model 95.0 us, bound by bytes: predicted, not measured" in predicted
    title, *_ = text.splitlines()
    assert "times" in title
    assert "L2 hits" not in title  # which no kernel has
    moved = [replace(kernel, read=1e6, written=1e6) for kernel in kernels]
    assert "DRAM  6.0 MB" in reading.report(moved, floor=100_000_000)


def test_a_pass_of_ours_is_predicted_where_there_is_a_model_of_the_gpu(monkeypatch):
    case = Case("rms_norm", "forward", (8, 64), "bf16")
    monkeypatch.setattr(profile, "in_own_process", lambda cases, device: {cases[0]: (9.0, device.short)})
    ours, theirs = Provider("tritonnorm", "0.1.0", {}), Provider("torch", "2", {})
    assert profile._predicted(case, ours, {"device": "NVIDIA H200"}) == (9.0, "H200")
    assert profile._predicted(case, theirs, {"device": "NVIDIA H200"}) is None
    assert profile._predicted(case, ours, {"device": "NVIDIA L4"}) is None


STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"


def made_up_csv(**changes):
    """What `ncu --csv --page raw` would print of two kernels: figures are made up."""
    metrics = {
        "gpu__time_duration.sum": ("ns", "80,500"),
        "dram__bytes_read.sum": ("byte", "134,300,000"),
        "dram__bytes_write.sum": ("Mbyte", "67.1"),
        "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "88.4"),
        "lts__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "41.2"),
        "lts__t_sector_hit_rate.pct": ("%", "33.5"),
        "sm__warps_active.avg.pct_of_peak_sustained_active": ("%", "49.0"),
        "smsp__issue_active.avg.pct_of_peak_sustained_active": ("%", "22.0"),
        "launch__registers_per_thread": ("register/thread", "64"),
        "launch__occupancy_limit_registers": ("block", "4"),
        "launch__occupancy_limit_warps": ("block", "8"),
        "launch__occupancy_limit_blocks": ("block", "32"),
        STALL.format("long_scoreboard"): ("inst", "7.5"),
        STALL.format("barrier"): ("inst", "2.5"),
        STALL.format("selected"): ("inst", "1.0"),
        STALL.format("membar"): ("inst", "nan"),
        **changes,
    }
    about = ["ID", "Process ID", "Process Name", "Host Name", "Kernel Name"]

    def line(cells):
        return ",".join(f'"{cell}"' for cell in cells)

    return "\n".join(
        [
            "==PROF== Connected to process 7 (/usr/bin/python3)",
            '==PROF== Profiling "row_backward": 0%....100% - 9 passes',
            line([*about, *metrics]),
            line([*[""] * len(about), *(unit for unit, _ in metrics.values())]),
            *(
                line([i, 7, "python3", "host", name, *(value for _, value in metrics.values())])
                for i, name in enumerate(("row_backward_layer_bf16_n8192", "fold"))
            ),
        ]
    )


def test_csv_of_ncu():
    kernels = ncu.parse(made_up_csv())
    assert [kernel.name for kernel in kernels] == ["row_backward_layer_bf16_n8192", "fold"]
    kernel = kernels[0]
    assert kernel.microseconds == pytest.approx(80.5)
    assert kernel.moved == pytest.approx(134.3e6 + 67.1e6)
    assert (kernel.registers, kernel.limiter) == (64, "registers")
    assert kernel.stalls == {"long_scoreboard": 7.5, "barrier": 2.5}
    assert reading.bound(kernel) == "dram"


@pytest.mark.parametrize(("unit", "value"), [("usecond", "80.5"), ("us", "80.5"), ("nsecond", "80500")])
def test_units_of_versions(unit, value):
    (kernel, _) = ncu.parse(made_up_csv(**{"gpu__time_duration.sum": (unit, value)}))
    assert kernel.microseconds == pytest.approx(80.5)


def test_a_metric_that_a_gpu_lacks_is_left_out():
    kernel, _ = ncu.parse(made_up_csv(**{"lts__t_sector_hit_rate.pct": ("", "n/a")}))
    assert kernel.l2_hit_percent is None


def test_what_ncu_refuses_is_told():
    with pytest.raises(ncu.NcuError, match="NVreg_RestrictProfilingToAdminUsers"):
        ncu.parse("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission")
    with pytest.raises(ncu.NcuError, match="No kernels"):
        ncu.parse("==PROF== Connected\n==ERROR== No kernels were profiled.\n==PROF== Disconnected")
    with pytest.raises(ncu.NcuError, match="nothing"):
        ncu.parse("")


def test_ncu_is_found_where_installers_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert ncu.find((f"{tmp_path}/cuda*/bin/ncu",)) is None
    for version in ("12.4", "12.8"):
        place = tmp_path / f"cuda-{version}" / "bin" / "ncu"
        place.parent.mkdir(parents=True)
        place.touch()
    assert ncu.find((f"{tmp_path}/cuda*/bin/ncu",)) == str(place)


FOUND = [
    Launch("row_backward", "layer_norm_bwd [4, 8] bf16", 2000),
    Launch("fold", "fold [2, 8] fp32", 64),
]


def test_launches_are_joined_to_kernels_in_order():
    names = ["vectorized_fill", "row_backward", "fold", "row_backward"]
    kernels = profilers.described([Kernel(name, 1.0) for name in names], FOUND)
    assert [kernel.asked for kernel in kernels] == [None, 2000, 64, None]


def test_launches_are_written_and_read(tmp_path):
    profilers.write_launches(tmp_path / "launches.json", FOUND)
    assert profilers.read_launches(tmp_path / "launches.json") == FOUND


def test_a_trace_tells_launch_bytes_and_bandwidth():
    """Made up: two repetitions of two kernels, written out of order, among events of other kinds."""
    events = [
        {"ph": "X", "cat": "kernel", "name": name, "ts": ts, "dur": dur, "args": {"stream": 7}}
        for name, ts, dur in [
            ("fold", 30, 2.0),
            ("row_backward", 10, 4.0),
            ("row_backward", 50, 8.0),
            ("fold", 70, 2.0),
        ]
    ]
    events += [{"ph": "X", "cat": "cpu_op", "name": "aten::empty", "ts": 1, "dur": 1}, {"ph": "M"}]
    kernels = profilers.annotate({"traceEvents": events}, FOUND * 2)
    assert events[1]["args"] == {
        "stream": 7,
        "launch": "layer_norm_bwd [4, 8] bf16",
        "bytes": 2000,
        "GB/s": 0.5,
    }
    once = profilers.medians(kernels, 2)
    assert [(k.label, k.microseconds) for k in once] == [(FOUND[0].label, 6.0), (FOUND[1].label, 2.0)]
    with pytest.raises(ValueError, match="not alike"):
        profilers.medians(kernels[:3], 2)
    with pytest.raises(ValueError, match="not alike"):
        profilers.medians([], 2)


def test_tree_of_proton():
    """Made up: three repetitions of launches that are described, of two of another's kernels a pass, and
    of what proton's hook launched itself."""

    def node(name, children=(), **metrics):
        return {
            "frame": {"name": name, "type": "function"},
            "metrics": metrics,
            "children": list(children),
        }

    def kernel(name, count, nanoseconds, **more):
        return node(name, count=count, device_id="0", **{"time (ns)": nanoseconds}, **more)

    root = node(
        "ROOT",
        [
            kernel("layer_norm_bwd [4, 8] bf16", 3, 12000, bytes=6000.0, flops32=9.0),
            node("rms_norm_bwd [4, 8] bf16", [kernel("row_backward", 3, 6000)], bytes=3000),
            kernel("vectorized_fill", 6, 6000),
            node("__proton_launch_metadata", [kernel("reduce", 3, 3000)]),
        ],
        count=0,
    )
    text = json.dumps([root, {"CUDA": {"0": {"arch": "90"}}}])
    ours, nested, other = profilers.parse_proton(text, 3)
    assert (ours.label, ours.microseconds, ours.asked, ours.times) == (
        "layer_norm_bwd [4, 8] bf16",
        4.0,
        2000,
        1,
    )
    assert (nested.microseconds, nested.asked) == (2.0, 1000)
    assert (other.label, other.microseconds, other.times) == (None, 1.0, 2)
    with pytest.raises(ValueError, match="no kernel"):
        profilers.parse_proton(json.dumps([node("ROOT")]), 3)


def test_hooks_collect_what_launches_are_described_as():
    """As Triton calls them, with a description that is made when it is asked for."""
    from triton import knobs
    from triton.compiler import LazyDict

    case = Case("layer_norm", "forward", (4, 64), "bf16")
    kernels = []
    with launches.observe(lambda *launch: kernels.append(launch)):
        launches.run(case)
    ((kernel, grid, arguments),) = kernels
    with profilers.launches() as found:
        metadata = LazyDict({"name": "row_forward_resident_layer_bf16_n64", "function": 0, "stream": 0})
        metadata.add(kernel.describe_launch, (grid, None, arguments))
        knobs.runtime.launch_enter_hook(metadata)
        knobs.runtime.launch_exit_hook(metadata)
        of_a_peer = LazyDict({"name": "their_kernel", "function": 0, "stream": 0})
        knobs.runtime.launch_enter_hook(of_a_peer)
        knobs.runtime.launch_exit_hook(of_a_peer)
    (launch,) = found
    assert launch.function == "row_forward_resident_layer_bf16_n64"
    assert (launch.label, launch.asked) == ("layer_norm_fwd [4, 64] bf16", traffic.floor_bytes(case))
    assert not knobs.runtime.launch_enter_hook.calls


def parse(*options):
    parser = argparse.ArgumentParser()
    profile.add_arguments(parser)
    return parser.parse_args(options)


def test_the_plan_needs_no_gpu(capsys):
    options = parse("layer_norm", "--shape", "16x8192", "--direction", "backward", "--plan")
    assert profile.run(options) == 0
    shown = capsys.readouterr().out
    assert "layer_norm_bwd [16, 8192] bf16" in shown
    floor = traffic.floor_bytes(Case("layer_norm", "backward", (16, 8192), "bf16"))
    assert f"floor {floor / 1e6:.3f} MB" in shown


def test_without_a_gpu_nothing_is_profiled(monkeypatch, capsys):
    monkeypatch.setattr(machine, "refusal", lambda: "no CUDA device: nothing is timed")
    options = parse("group_norm", "--shape", "2x32x8x8", "--trace", "trace.json")
    assert profile.run(options) == machine.NO_DEVICE_STATUS
    assert capsys.readouterr().err.startswith("profile: no CUDA device: nothing is timed")


@pytest.mark.parametrize(
    "options",
    [
        ("layer_norm", "--shape", "2x32x8x8"),
        ("layer_norm", "--shape", "quick"),  # a set of several
        ("layer_norm", "--shape", "4x64", "--layout", "channels_last"),
    ],
    ids=str,
)
def test_what_is_no_case_is_a_usage_error(options, capsys):
    assert profile.run(parse(*options, "--plan")) == 2
    assert capsys.readouterr().err.startswith("profile: ")


STAND_IN = """#!{python}
import sys
options = sys.argv[1:]
def after(name):
    return options[options.index(name) + 1]
assert after("--profile-from-start") == "off"
assert after("--tool") == "none"
assert "--shape=4x64" in options
open(after("--log-file"), "w").write({csv!r})
open(after("--launches"), "w").write({launches!r})
"""


def test_a_profile_by_ncu(tmp_path, monkeypatch):
    """A script plays the part of ncu, and of the program under it, and writes made-up figures."""
    label = "layer_norm_bwd [4, 64] bf16"
    launched = [{"function": "row_backward_layer_bf16_n8192", "label": label, "asked": 150_000_000}]
    stand_in = tmp_path / "ncu"
    stand_in.write_text(
        STAND_IN.format(python=sys.executable, csv=made_up_csv(), launches=json.dumps(launched))
    )
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    first, second = profile._by_ncu(parse("layer_norm", "--shape", "4x64", "--direction", "backward"))
    assert (first.label, first.asked, second.label) == (label, 150_000_000, None)
    assert "DRAM moves 1.34 times" in reading.sentence(first)
