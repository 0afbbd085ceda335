"""`python -m perf tune`, as far as that needs no GPU: what is tried, what is kept, what is written.
Times are those of a clock that calls move."""

import ast
import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import replace
from math import inf

import pytest
import torch
from conftest import INTERPRETED
from test_compare import Clock

from perf import __main__ as perf_main
from perf import bench, candidates, launches, machine, providers, tune
from perf.launches import H100
from perf.providers import Provider, operators_of_torch
from perf.shapes import PASSES, Case
from perf.tune import HEURISTIC, Choice, Gain
from tritonnorm.heuristics import common, rows, table
from tritonnorm.launch.common import CHOICES, TRITON_VERSION

RUN = {"device": "NVIDIA H200", "date": "2000-01-01", "command": "python -m perf tune"}
LAYER_NORM = operators_of_torch()["layer_norm"]
WALKS = {"n": 4096, "itemsize": 2, "strided": False}
ROWS = WALKS | {"cluster": 1}

on_cpu = pytest.mark.skipif(not INTERPRETED, reason="with a CUDA device no CPU tensor takes a kernel")


class Serial:
    """Processes that are none."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        done = Future()
        try:
            done.set_result(function(*arguments))
        except Exception as error:
            done.set_exception(error)
        return done


@pytest.fixture
def tiny(monkeypatch):
    """Small tensors of every size, and no compiler: none has anything against an answer."""
    monkeypatch.setattr(tune, "TENSOR_BYTES", (512, 1024))
    monkeypatch.setattr(tune, "compilers", Serial)
    monkeypatch.setattr(tune, "violations", lambda *_: [])


def choice_of(name, arguments, cases=()):
    chosen = table.TUNABLE[name].heuristic(*arguments.values())
    return Choice(name, arguments, chosen, list(cases))


# What is tried


def test_choices_are_measured_on_all_cases_that_share_them(monkeypatch):
    """Two operators and three sizes of one row; of BatchNorm, whose images count, the case alone."""
    monkeypatch.setattr(tune, "TENSOR_BYTES", (2**10, 2**12, 2**14))
    cases = [
        Case("layer_norm", "backward", (64, 128), "bf16"),
        Case("rms_norm", "backward", (32, 128), "bf16"),
        Case("batch_norm", "backward", (4, 64, 8, 8), "bf16"),
    ]
    found = {choice.name: choice for choice in tune.asked(cases, H100)}
    assert list(found) == ["row_backward", "row_programs", "channel_backward", "prefer_teams"]
    assert [c.label for c in found["row_programs"].cases] == [
        f"{operator} backward {m}x128 bf16"
        for operator in ("layer_norm", "rms_norm")
        for m in (4, 16, 64)
    ]
    assert found["row_backward"].cases == found["row_programs"].cases
    assert found["row_backward"].chosen == rows.row_backward(128, 2, False)
    assert found["channel_backward"].cases == found["prefer_teams"].cases == cases[2:]
    assert found["prefer_teams"].arguments["magnitude"] == 8


def test_all_default_cases_ask_for_choices_that_can_be_tuned():
    """Of few rows and images: a choice that knew of them would be another."""
    shapes = bench.parse_shapes(tune.DEFAULT_SETS)
    cases = bench.make_cases(tune.TUNED, PASSES, ["bf16"], shapes)
    assert {case.operator for case in cases} == set(tune.TUNED)
    for case in cases[:: len(cases) // 8]:
        if case.operator.startswith("batch_norm"):
            continue
        small, same = ([c.key for c in tune.asked([c], H100)] for c in (tune.small(case), case))
        assert small == same


# What is kept


def test_a_gain_is_over_all_cases():
    times = {HEURISTIC: [100.0, 100.0], "a": [90.0, 101.0], "b": [80.0, 103.0], "c": [50.0, inf]}
    found = tune.gains(times | {"d": [97.0, 100.0]})
    assert set(found) == {"a", "b", "d"}
    assert found["a"].mean == pytest.approx((0.9 * 1.01) ** 0.5)
    assert found["a"].worst == 1.01
    assert tune.best(found) == "a"  # b is slower somewhere, d faster by no more than the noise
    assert tune.best({}) is None
    assert tune.gains({HEURISTIC: [inf], "a": [1.0]}) == {}
    assert Gain(0.97, 1.02).is_kept
    assert not Gain(0.985, 1.0).is_kept


@pytest.fixture
def warps_take(monkeypatch):
    """tritonnorm's layer_norm takes, by its tile's warps, so many microseconds of a clock."""
    clock = Clock()

    def times(by_warps, function=LAYER_NORM):
        def layer_norm(x, weight, bias):
            n = x.shape[1]
            tile = CHOICES[-1](rows.row_forward, n, x.element_size(), False)
            clock.now += by_warps[tile.num_warps].pop(0)
            return function(x, weight, bias)

        ours = Provider("tritonnorm", "0.1.0", {"layer_norm": layer_norm})
        monkeypatch.setitem(providers.LOADERS, "tritonnorm", lambda: ours)
        return clock

    return times


class Always(list):
    def pop(self, _):
        return self[0]


SHORT = {"n": 256, "itemsize": 4, "strided": False, "cluster": 1}
CASE = Case("layer_norm", "forward", (8, 256), "fp32")


@pytest.mark.usefixtures("tiny")
def test_what_is_faster_twice_is_kept(warps_take):
    clock = warps_take({4: Always([100.0]), 8: Always([90.0]), 2: Always([95.0]), 1: Always([1.0])})
    choice = choice_of("row_forward", SHORT, [CASE])
    assert choice.chosen.num_warps == 4
    answers = candidates.neighbours("row_forward", SHORT, choice.chosen)
    answer, gain = tune.tune(choice, answers, {}, clock, "cpu")
    assert answer.num_warps == 8
    assert gain.mean == pytest.approx(0.9)
    assert CHOICES[-1].entries == {}


@pytest.mark.usefixtures("tiny")
def test_what_is_faster_once_is_not_kept(warps_take):
    """The second measurement of the best of many is of it alone."""
    calls = [90.0] * 30 + [100.0] * 100  # a check, and 28 that are timed
    clock = warps_take({4: Always([100.0]), 8: calls})
    choice = choice_of("row_forward", SHORT, [CASE])
    answer = common.RowTile(4, 256, 8)
    assert tune.best(tune.measure(choice, {"8": answer}, {}, clock, "cpu")) == "8"
    calls[:] = [90.0] * 31 + [100.0] * 100  # one more, by which it may be refused
    assert tune.tune(choice, [answer], {}, clock, "cpu") is None


def confused(by):
    """layer_norm, which gives another result with 8 warps."""

    def layer_norm(x, weight, bias):
        right = LAYER_NORM(x, weight, bias)
        warps = CHOICES[-1](rows.row_forward, x.shape[1], x.element_size(), False).num_warps
        return by(right) if warps == 8 else right

    return layer_norm


@pytest.mark.usefixtures("tiny")
def test_a_wrong_answer_is_not_kept(warps_take, capsys):
    """Also where it is right of the small case, by which it was not refused."""
    clock = warps_take({4: Always([100.0]), 8: Always([50.0])}, confused(lambda y: y * 1.1))
    choice = choice_of("row_forward", SHORT, [CASE])
    assert tune.measure(choice, {"8": common.RowTile(4, 256, 8)}, {}, clock, "cpu") == {}
    assert "max_error above" in capsys.readouterr().err


# What is refused before it is timed


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("wrong", ["scaled", "nan", "infinite"])
def test_another_result_is_refused_and_never_written(
    wrong, dtype, warps_take, capsys, tmp_path, monkeypatch
):
    """Off by what a check against the reference lets pass, four ulps; and NaN, which is no number."""
    info = torch.finfo(torch.float32 if dtype == "fp32" else torch.bfloat16)
    by = {
        "scaled": lambda y: y * (1 + 4 * info.eps * (20 if dtype == "fp32" else 1)),
        "nan": lambda y: y.index_fill(0, torch.tensor([0]), torch.nan),
        "infinite": lambda y: y.index_fill(0, torch.tensor([0]), torch.inf),
    }[wrong]
    times = {4: Always([100.0]), 8: Always([50.0]), 2: Always([100.0]), 16: Always([100.0])}
    clock = warps_take(times, confused(by))
    arguments = SHORT | {"itemsize": 4 if dtype == "fp32" else 2}
    choice = choice_of("row_forward", arguments, [Case("layer_norm", "forward", (8, 256), dtype)])
    path = tmp_path / "sm_90.json"
    tune.sweep([choice], "sm_90", path, 100, clock, "cpu")
    assert not path.exists()
    refused = [line for line in capsys.readouterr().err.splitlines() if "is refused" in line]
    assert refused
    for line in refused:
        answer, reason = line.split(" is refused: ")
        assert "num_warps=8" in answer.split(",")
        assert reason.startswith("result 0 of layer_norm forward")


@pytest.mark.usefixtures("tiny")
def test_an_answer_that_cannot_be_launched_is_refused(warps_take, capsys):
    def fail(y):
        raise RuntimeError("out of resources")

    clock = warps_take({4: Always([100.0]), 8: Always([50.0])}, confused(fail))
    choice = choice_of("row_forward", SHORT, [CASE])
    assert tune.tune(choice, [common.RowTile(4, 256, 8)], {}, clock, "cpu") is None
    assert "is refused: layer_norm forward 8x256 fp32: RuntimeError: out of" in capsys.readouterr().err


@on_cpu
@pytest.mark.parametrize(
    "case",
    [
        Case("layer_norm", "forward", (8, 384), "bf16"),
        Case("layer_norm", "backward", (8, 384), "bf16"),
        Case("rms_norm", "backward", (8, 5120), "fp32"),
        Case("group_norm", "backward", (2, 16, 8, 8), "bf16", "channels_last", 4),
        Case("batch_norm", "forward", (4, 32, 8, 8), "fp32"),
        Case("batch_norm", "backward", (4, 32, 8, 8), "bf16", "channels_last"),
    ],
    ids=lambda case: case.label,
)
def test_no_answer_that_would_be_tried_is_refused(case):
    """In the interpreter: every neighbour of every choice that a case asks for, but for teams, whose
    programs wait for each other."""
    choices = [choice for choice in tune.asked([case], None) if not choice.name.startswith("prefer")]
    assert choices
    for choice in choices:
        choice = replace(choice, cases=[case])
        for answer in candidates.neighbours(choice.name, choice.arguments, choice.chosen):
            assert tune.refusal(choice, answer, {}, "cpu") is None, answer


@on_cpu
def test_a_kernel_that_leaves_columns_out_is_refused():
    """An answer that no table would have: its tile is narrower than the row that it should hold."""
    case = Case("layer_norm", "forward", (8, 256), "fp32")
    choice = choice_of("row_forward", SHORT, [case])

    def narrower(kernel, grid, arguments):
        if arguments["num_warps"] == 8:
            arguments = arguments | {"N": 128}
        kernel[grid](**arguments)

    with launches.observe(narrower):
        assert tune.refusal(choice, common.RowTile(4, 256, 4), {}, "cpu") is None
        assert "result 0" in tune.refusal(choice, common.RowTile(4, 256, 8), {}, "cpu")


# What is written


def entries_of(path):
    return table.read(path.read_text(), "sm_90", path.name)


@pytest.mark.usefixtures("tiny")
def test_a_sweep_writes_a_table_and_goes_on_from_it(warps_take, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["perf", "tune", "--operators", "layer_norm"])
    path = tmp_path / "tuned" / "sm_90.json"
    choice = choice_of("row_forward", SHORT, [CASE])
    other = choice_of("row_programs", WALKS)
    fast = Always([90.0])
    clock = warps_take({4: Always([100.0]), 8: fast, 2: Always([100.0]), 16: Always([100.0])})
    tune.sweep([choice], "sm_90", path, 100, clock, "cpu")
    ((key, answer),) = entries_of(path).items()
    assert key == ("row_forward", 256, 4, False, 1)
    assert answer.num_warps == 8
    written = json.loads(path.read_text())
    (entry,) = written["entries"]
    assert (entry["time"], entry["worst"], entry["cases"], entry["run"]) == (0.9, 0.9, 1, 0)
    assert entry["heuristic"]["num_warps"] == 4
    (run,) = written["runs"]
    assert {"device", "triton_version", "torch_version", "date"} < run.keys()
    assert run["command"] == "python -m perf tune --operators layer_norm"
    assert "0.900 of its time" in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", ["perf", "tune", "--shapes", "llm"])
    monkeypatch.setattr(tune, "tune", lambda *_: (512, Gain(0.8, 0.9)))
    tune.sweep([other], "sm_90", path, 100, clock, "cpu")
    assert entries_of(path) == {key: answer, other.key: 512}
    written = json.loads(path.read_text())
    assert [run["command"].split()[-1] for run in written["runs"]] == ["layer_norm", "llm"]
    assert [entry["run"] for entry in written["entries"]] == [0, 1]

    monkeypatch.undo()
    monkeypatch.setattr(tune, "compilers", Serial)
    monkeypatch.setattr(tune, "tune", lambda *_: None)
    monkeypatch.setattr(tune, "violations", lambda *_: [])
    tune.sweep([choice], "sm_90", path, 100, clock, "cpu")
    assert entries_of(path) == {other.key: 512}
    written = json.loads(path.read_text())
    assert [run["command"].split()[-1] for run in written["runs"]] == ["llm"]


@pytest.mark.usefixtures("tiny")
def test_no_table_is_written_of_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "tune", lambda *_: None)
    path = tmp_path / "sm_90.json"
    tune.sweep([choice_of("row_programs", WALKS)], "sm_90", path, 100, Clock(), "cpu")
    assert not path.exists()
    assert "stays, of 4" in capsys.readouterr().out
    tune.sweep([choice_of("row_programs", WALKS)], "sm_90", path, -1, Clock(), "cpu")
    assert "1 choices are left out" in capsys.readouterr().out


def test_what_does_not_compile_cleanly_is_not_tried(tmp_path, monkeypatch):
    """Spills, or an error of the compiler."""
    seen = []

    def compiled(target, facts, choice, answer):
        assert target == "sm_90"
        if answer == 256:
            raise RuntimeError("ptxas failed")
        return ["row_backward: spills: 8 bytes of stack"] if answer == 512 else []

    monkeypatch.setattr(tune, "compilers", Serial)
    monkeypatch.setattr(tune, "violations", compiled)
    monkeypatch.setattr(tune, "tune", lambda choice, answers, *_: seen.extend(answers))
    tune.sweep([choice_of("row_programs", WALKS)], "sm_90", tmp_path / "t.json", 100, Clock(), "cpu")
    assert seen == [2048]


# The command


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["perf", "tune", *map(str, arguments)])
    return perf_main.main()


COMPILE = """
import pickle, sys
from tritonnorm.heuristics.common import RowTile

violations, *arguments = pickle.loads(sys.stdin.buffer.read())
for warps in (4, 8):
    print(violations(*arguments, RowTile(16, 64, warps)))
"""


def test_what_the_compiler_has_against_an_answer():
    """In a process of its own, to which all is sent. 8 warps have 4 elements a thread: 8 bytes."""
    case = Case("normalize", "forward", (4096, 64), "bf16")
    choice = choice_of("row_forward", ROWS | {"n": 64}, [case])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=machine.ROOT,
        env=environment,
        input=pickle.dumps((tune.violations, "sm_90", H100, choice)),
        capture_output=True,
        check=True,
    )
    clean, narrow = map(ast.literal_eval, found.stdout.decode().splitlines())
    assert clean == []
    assert narrow[0] == "row_forward_resident: x: accesses of 8 bytes"


def test_an_answer_is_compiled_with_fewer_images(monkeypatch):
    """Also where these would be resident, as two images of a BatchNorm in channels_last are."""
    case = Case("batch_norm", "forward", (8, 64, 16, 16), "bf16", "channels_last")
    (choice,) = [c for c in tune.asked([case], H100) if c.name == "channel_forward"]
    (answer, *_) = candidates.neighbours(choice.name, choice.arguments, choice.chosen)
    assert answer != choice.chosen
    seen = []

    def lower(target, chosen, choices):
        def note(kernel, grid, arguments):
            seen.append((kernel.__name__, arguments["num_warps"]))

        with launches.observe(note), launches.choosing(choices):
            for small, variant in chosen:
                launches.run(small, variant)
        return []

    monkeypatch.setattr(tune, "lower", lower)
    assert tune.violations("sm_90", H100, choice, answer) == []
    assert seen[0] == ("channel_moments", answer.num_warps)
    assert seen[-1] == ("channel_normalize", answer.num_warps)


def test_a_dry_run_lists_what_would_be_tried(monkeypatch, capsys):
    def compiled(target, facts, choice, answer):
        return ["row_forward_resident: spills: 8 bytes of stack"] if answer.num_warps == 8 else []

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(tune, "compilers", Serial)
    monkeypatch.setattr(tune, "violations", compiled)
    options = ("--operators", "normalize", "--directions", "forward", "--shapes", "64x64")
    assert main(monkeypatch, "--dry-run", *options) == 0
    first, *answers, last = capsys.readouterr().out.splitlines()
    cluster = rows.largest_cluster(H100, TRITON_VERSION)  # which the choices of an H100 are asked with
    about = f"row_forward n=64 itemsize=2 strided=False cluster={cluster}"
    assert first == f"{about}: rows=64,block_n=64,num_warps=4, 3 cases"
    assert "  rows=32,block_n=64,num_warps=4: clean" in answers
    assert "  rows=64,block_n=64,num_warps=8: row_forward_resident: spills: 8 bytes of stack" in answers
    assert last == "1 choices, 6 answers near them, 4 compile cleanly for sm_90"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_gpu_nothing_is_tuned(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    out = tmp_path / "sm_90.json"
    assert main(monkeypatch, "--out", out) == machine.NO_DEVICE_STATUS
    assert capsys.readouterr().err == "tune: no CUDA device: nothing is timed\n"
    assert not out.exists()


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (None, 0),
        (bench.DeviceLost("an illegal memory access"), 1),
        (ValueError("sm_90.json is no table"), bench.USAGE_STATUS),
        (KeyboardInterrupt(), machine.INTERRUPTED_STATUS),
    ],
)
def test_the_command_tunes_the_gpu_at_hand(raised, status, monkeypatch, tmp_path):
    def sweep(choices, arch, path, seconds, timer, device):
        assert [choice.name for choice in choices] == ["row_forward"]
        assert (arch, path, seconds, timer, device) == (
            "sm_90",
            tune.FOLDER / "sm_90.json",
            60,
            1,
            "cuda",
        )
        if raised is not None:
            raise raised

    monkeypatch.setattr(machine, "refusal", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(tune, "device_of", lambda device: H100)
    monkeypatch.setattr(tune, "DeviceTimer", lambda: 1)
    monkeypatch.setattr(tune, "sweep", sweep)
    options = ("--operators", "normalize", "--directions", "forward", "--shapes", "64x64")
    assert main(monkeypatch, *options, "--seconds", "60") == status


def test_what_cannot_be_tuned_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(monkeypatch, "--dry-run", "--shapes", "64x64") == bench.USAGE_STATUS
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err
    assert main(monkeypatch, "--operators", "group_norm", "--shapes", "64x64") == bench.USAGE_STATUS
    assert "no shape for group_norm" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(monkeypatch, "--operators", "weight_norm")


@on_cpu
@pytest.mark.usefixtures("tiny")
def test_answers_are_what_kernels_run_with(monkeypatch):
    """In the interpreter: a measurement of the real operator launches the answer's tile."""
    seen = set()

    def note(kernel, grid, arguments):
        seen.add((arguments["ROWS"], arguments["num_warps"]))
        kernel[grid](**arguments)

    choice = choice_of("row_forward", SHORT, [CASE])
    with launches.observe(note):
        found = tune.measure(choice, {"8": common.RowTile(8, 256, 8)}, {}, Clock(), "cpu")
    assert seen == {(choice.chosen.rows, choice.chosen.num_warps), (8, 8)}
    assert found["8"].mean == 1
