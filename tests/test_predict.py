"""The model of a launch's time on examples worked out by hand, on kernels made up for them, and a few
real kernels whose loops must add up to the bytes that the interpreter counts.

Compilation runs in processes of its own, where kernels are not interpreted.
"""

import ast
import csv
import json
import os
import subprocess
import sys
from argparse import ArgumentParser
from dataclasses import replace
from math import ceil

import pytest
import torch
from lowered import kernel, walking

from perf import compiled, devices, gates, launches, model, predict, roofline
from perf.assembly import Region
from perf.compiled import TARGETS
from perf.devices import DEVICES, KB, Device, find, resident
from perf.predictions import in_own_process
from perf.shapes import Case
from perf.traffic import measure
from tritonnorm import heuristics, launch
from tritonnorm.launch.common import TRITON_VERSION

TOY = Device("toy", "toy", "sm_90", 10, 2.0, 1000 * KB, 228 * KB, 600, 200)
"""10 SMs at 2 GHz; 1,000 bytes a nanosecond, of which a copy reaches 900."""

H100 = find("H100")


@pytest.fixture(autouse=True)
def bandwidth_of_the_toy(monkeypatch):
    monkeypatch.setitem(devices.DATASHEET_GBPS, "toy", 1000)


# Devices


@pytest.mark.parametrize(("name", "most"), [("A100", 0.18), ("H100", 0.17), ("B200", 0.08)])
def test_issue_budgets_are_those_of_the_gates(name, most):
    assert gates.ISSUE_SHARE * find(name).issue_budget == pytest.approx(most, abs=0.005)


def test_every_device_has_a_target_a_name_and_a_bandwidth():
    assert {device.target for device in DEVICES} == set(TARGETS) == set(gates.IN_FLIGHT)
    for device in DEVICES:
        assert find(device.name) is find(device.short) is device
        assert device.gbps == devices.DATASHEET_GBPS[device.name]
    assert find("NVIDIA H100 PCIe") is None
    assert H100.facts.capability == (9, 0)
    assert find("B200").facts.capability == (10, 0)


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "blocks"),
    [
        (64, 4, 0, 8),  # registers: 65,536 / (64 * 128)
        (41, 8, 0, 5),  # 41 are given as 48: 65,536 / (48 * 256)
        (16, 8, 0, 8),  # 64 warps
        (16, 1, 0, 32),  # 32 blocks
        (32, 1, 75 * KB, 3),  # 228 KB of shared memory, 76 a block with the system's
    ],
)
def test_resident_blocks(registers, warps, shared, blocks):
    assert resident(registers, warps, shared, 228 * KB) == blocks


# The model


def work(blocks, resident, nbytes, read, waits, issue):
    """Work of blocks that wait and compute for a time, and read so many of the bytes they move."""
    return model.Work(blocks, resident, nbytes, (model.Steps(1, waits, read=read),), issue)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        # 40 programs at once, 9,000 bytes each, at 900 a nanosecond.
        (work(40, 4, 9000, 4500, 10, 1), {"bytes": 400}),
        # A program waits 1,000 ns, then reads 450 bytes at its SM's share of 90.
        (work(40, 4, 900, 450, 1000, 50), {"in flight": 1005}),
        # 4 programs an SM, one after another at its schedulers.
        (work(40, 4, 900, 450, 10, 50), {"issue": 200}),
        # 5 programs on 10 SMs: each takes 64 bytes a cycle at most, 128 a nanosecond.
        (work(5, 4, 6400, 6400, 10, 1), {"in flight": 60}),
        # 15 programs: some SMs have two of them.
        (work(15, 4, 0, 0, 10, 50), {"issue": 100}),
        # A second wave of a quarter as many takes as long.
        (work(50, 4, 900, 450, 1000, 50), {"in flight": 1256.25, "tail": 753.75}),
        # Bound by bytes, one of a tenth takes little more than a tenth: 10 + 4,500 / 128 for 40.
        (work(44, 4, 9000, 4500, 10, 1), {"bytes": 440, "tail": 5.15625}),
        (work(1, 1, 0, 0, 0, 0), {"bytes": 0}),
    ],
)
def test_the_time_of_a_launch(given, parts):
    found = model.launch_time(given, TOY)
    assert found.parts == pytest.approx({"launch": model.LAUNCH_NS} | parts)
    assert found.us == pytest.approx((model.LAUNCH_NS + sum(parts.values())) / 1e3)
    assert set(found.parts) <= set(model.BOUNDS)


def test_what_each_bound_takes_alone():
    """Without launch and tail, of 1.25 waves."""
    found = model.launch_time(work(50, 4, 9000, 4500, 1000, 50), TOY)
    assert found.alone == pytest.approx({"bytes": 500, "in flight": 1312.5, "issue": 250})


def test_a_pass_is_bound_by_what_most_of_its_time_is_due_to():
    assert model.Prediction({"launch": 2000, "bytes": 1500, "tail": 300}, {}).bound == "launch"
    assert model.Prediction({"launch": 2000, "issue": 9000, "tail": 300}, {}).bound == "issue"
    two = model.pass_time([kernel(), kernel()], H100)
    one = model.pass_time([kernel()], H100)
    assert two.ns == pytest.approx(2 * one.ns)
    assert one.bound == "bytes"


def test_work_is_read_off_the_kernel():
    """One load of x and 3 barriers; 272 instructions of each of 8 warps at 4 schedulers."""
    k = kernel()
    assert k.resident == 6
    found = model.work_of(k, TOY)
    assert found.nbytes == pytest.approx(2 * 8192 + 4)
    assert found.issue == pytest.approx(272 * 8 / 4 / 2)
    alone = 272 * model.INSTRUCTION_CYCLES + 3 * model.BARRIER_CYCLES
    assert found.steps == (model.Steps(1, alone / 2, latency=600, read=8192),)
    assert k.instructions_per_byte == pytest.approx(272 * 8 / (2 * 8192))
    assert replace(k, instructions=None).instructions_per_byte is None


def test_a_program_waits_in_every_step_of_its_loops():
    k = walking()
    assert k.executions == [1, 8]
    assert k.program_instructions == 128 + 8 * 200
    assert k.barriers == 4 + 8 * 3
    once, loop = model.block_steps(k, TOY, {"x": 1024 * 8 * 2048, "mean": 1024 * 8 * 4})
    assert once.ns(1) == pytest.approx((128 * model.INSTRUCTION_CYCLES + 4 * model.BARRIER_CYCLES) / 2)
    cycles = 200 * model.INSTRUCTION_CYCLES + 3 * model.BARRIER_CYCLES
    assert loop == model.Steps(8, cycles / 2, latency=600, read=8 * 2052)
    assert loop.ns(rate=2) == pytest.approx(8 * (600 + cycles / 2 + 1026))


def test_loads_ahead_are_waited_for_beside_the_work():
    """Of a step the longest: its work, its loads' turn at the memory, or the part of their latency and
    of their turn that steps ahead leave of them. The first steps' latency is not the loop's."""
    ahead = model.Steps(12, busy=100, latency=600, read=12 * 900, ahead=3)
    assert ahead.ns(rate=9) == pytest.approx((9 * 600 + 12 * 100) / 3)
    assert ahead.ns(rate=90) == pytest.approx((9 * 600 + 12 * 10) / 3)
    assert ahead.ns(rate=2) == pytest.approx(12 * 450)  # its turn alone is longer
    assert replace(ahead, busy=400).ns(rate=3) == pytest.approx(12 * 400)
    assert replace(ahead, ahead=1, busy=849).ns(rate=3) == pytest.approx(11 * 600 + 12 * 300)
    assert replace(ahead, starts=2).ns(rate=9) == pytest.approx((6 * 600 + 12 * 100) / 3)
    assert replace(ahead, starts=6).ns(rate=9) == pytest.approx(12 * 100)  # all loads stand before it


def test_loads_ahead_of_a_kernel():
    """Only the loads of the first steps are waited for by themselves; the last step loads nothing."""
    loop = replace(walking().regions[1], loads={"x": 16, "dy": 16, "mean": 4})
    first = Region(loads={"x": 16, "dy": 16}, accesses=2)
    ahead = walking(regions=[first, loop], instructions=[0.0, 100.0], ahead=1)
    found = model.block_steps(ahead, TOY, {"x": 1024 * 9 * 10})
    assert found[0] == model.Steps(1, 0, latency=600, read=10)
    assert (found[1].times, found[1].ahead, found[1].starts) == (8, 1, 1)
    assert found[1].read == pytest.approx(80)
    assert ahead.sweeps["x"] == 1


def test_an_unrolled_loop_runs_less_often():
    k = walking()
    twice = replace(k.regions[1], loads={"x": 32, "dy": 32}, stores={"dx": 32})
    assert replace(k, regions=[k.regions[0], twice]).executions == [1, 4]


def test_loops_around_and_folds():
    """A loop without accesses of its own runs as what is within it; a fold as there are tiles of pieces,
    which come from L2."""
    around, within = Region(parent=0), Region(parent=1, loads={"dweight_partial": 4})
    k = walking(regions=[Region(), around, within], fold_steps=3.0, widths={}, tensor_bytes={})
    assert k.executions == [1, 3, 3]
    quiet = replace(k, instructions=None, ahead=3)
    once, outer, fold = model.block_steps(quiet, TOY, {})
    assert (once.latency, outer.latency) == (0, 0)
    assert (fold.times, fold.latency, fold.ahead) == (3, 200, 0)  # tiles alone are ahead


def test_a_team_takes_units_and_their_pieces_one_after_another():
    """24 tiles in 6 pieces of 2 units: a unit's programs meet and fold, a piece waits for its first
    tiles."""
    tiles = Region(parent=2, loads={"x": 32})
    unit, piece = Region(parent=0, stores={"arrivals": 4}), Region(parent=1, loads={"x": 96})
    meeting, fold = Region(parent=1, loads={"arrivals": 4}), Region(parent=1, loads={"mean_partial": 8})
    regions = [Region(), unit, piece, tiles, meeting, fold]
    k = kernel(regions=regions, instructions=None, ahead=3, steps=24, turns=2, pieces=6, fold_steps=4)
    assert k.executions == [1, 2, 6, 24, 2, 4]
    _, _, first, ahead, *_ = model.block_steps(k, TOY, {})
    assert (first.times, first.latency, first.ahead) == (6, 600, 0)
    assert (ahead.times, ahead.latency, ahead.ahead, ahead.starts) == (24, 600, 3, 6)


def keeping(size: int) -> Device:
    """A device whose L2 keeps so many bytes until they are read again, by its part that does."""
    device = replace(TOY, l2_bytes=ceil(size / heuristics.l2.KEPT_SHARE))
    assert 0 <= heuristics.l2.kept_bytes(device.facts) - size < 2
    return device


def test_what_is_read_twice():
    """In two loops x is read twice, unless L2 holds the rows that are under way: 60 of 8 KB, here."""
    loops = [Region(parent=0, loads={"x": 32}), Region(parent=0, loads={"x": 32}, stores={"y": 32})]
    k = kernel(regions=[Region(), *loops], instructions=[10.0, 100.0, 100.0])
    assert k.sweeps == {"x": 2, "y": 1}
    size = k.tensor_bytes["x"]
    large = keeping(60 * 8 * KB)
    once, twice = (2 * size + 32768, {"x": size}), (3 * size + 32768, {"x": 2 * size})
    assert model.device_bytes(k, large, held=False) == once
    small = keeping(59 * 8 * KB)
    assert model.device_bytes(k, small, held=False) == twice
    team = replace(k, turns=2)  # half of the rows wait for the others
    assert model.device_bytes(team, keeping(30 * 8 * KB), held=False) == once
    assert model.device_bytes(team, keeping(29 * 8 * KB), held=False) == twice


def test_partial_results_are_read_from_l2_as_far_as_they_fit():
    """What is written leaves L2 in the end; what is read is there, if all of it fits."""
    written = walking(tensor_bytes={"dweight_partial": 400 * KB})
    for size in (400 * KB, 399 * KB):
        assert model.device_bytes(written, keeping(size), held=False) == (400 * KB, {})
    fold = replace(written, regions=[Region(loads={"dweight_partial": 32})])
    partial, served = "dweight_partial", 400 * KB / model.L2_SPEED
    assert model.device_bytes(fold, keeping(400 * KB), held=False) == (served, {partial: served})
    assert model.device_bytes(fold, keeping(399 * KB), held=False) == (400 * KB, {partial: 400 * KB})


PARTIALS = """
from statistics import geometric_mean

from perf import devices, predict
from perf.shapes import Case
from tritonnorm.heuristics import common
from tritonnorm.launch.common import forget_plans

found = {}
sizes = [(2**22 // n, n) for n in (128, 256, 512, 1024, 2048)]
cases = [Case(op, "backward", size, "bf16") for op in ("layer_norm", "rms_norm") for size in sizes]
for common.SMALL_PARTIALS in (256, common.SMALL_PARTIALS, common.MAX_PARTIALS):
    forget_plans()
    for name in ("A100", "H100", "B200"):
        device = devices.find(name)
        predicted = predict.predict(cases, device.target, [device])
        found.setdefault(name, []).append(geometric_mean(p.us for p in predicted))
print(found)
"""


def test_few_programs_are_faster_for_small_tensors():
    """By the model, over rows of several lengths, than as many as large tensors have: by a twentieth at
    least on an H100 and a B200. Fewer still are slower on a B200: its SMs would be left without work."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "-c", PARTIALS],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    times = ast.literal_eval(found.stdout)
    for name, (fewer, ours, more) in times.items():
        assert ours < (1 if name == "A100" else 0.95) * more, name
        assert (ours < fewer) == (name == "B200"), name


def test_a_small_tensor_is_read_once_by_several_launches():
    small = walking(tensor_bytes={name: 100 * KB for name in ("x", "dy", "dx")})
    nbytes = [model.work_of(small, TOY, held).nbytes * small.programs for held in (False, True)]
    assert nbytes == [300 * KB, 100 * KB]
    once, twice = model.pass_time([small], TOY), model.pass_time([small] * 2, TOY)
    assert twice.ns <= 2 * once.ns
    large = walking()
    assert model.pass_time([large] * 2, TOY).ns == pytest.approx(2 * model.pass_time([large], TOY).ns)


# The command


def test_a_csv_of_predictions_has_no_measurement(tmp_path, monkeypatch):
    case = Case("layer_norm", "forward", (8192, 4096), "bf16")
    monkeypatch.setattr(predict, "lower", lambda *_, **__: [[kernel()]])
    found = predict.predict([case], "sm_90", [H100])
    path = tmp_path / "predicted.csv"
    predict.write(path, found, "python -m perf predict")
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["provider"], row["status"], row["device"]) == ("tritonnorm", "predicted", H100.name)
    assert row["median_us"] == row["gbps"] == row["driver_version"] == ""
    assert float(row["predicted_us"]) == pytest.approx(found[0].us, abs=1e-3)
    assert row["bound"] == "bytes"
    (drawn,) = roofline.read(path)
    assert float(drawn["gbps"]) == pytest.approx(found[0].gbps, rel=1e-3)


def test_launches_are_chosen_for_the_device():
    """Not for the one that tensors are on: teams, where one had measured them to be faster."""
    before = launch.pieces.device_facts
    with launches.device_facts(H100.facts):
        assert launch.pieces.device_facts(None) == H100.facts
    assert launch.pieces.device_facts is before


def test_long_rows_are_predicted_of_clusters():
    """Where the device and Triton have them; and not where teams are asked for."""
    largest_of_h100 = 16 if TRITON_VERSION >= heuristics.rows.CLUSTER_TRITON else 1
    for device, largest in (("A100", 1), ("H100", largest_of_h100)):
        with launches.device_facts(find(device).facts):
            assert launch.rows.largest_cluster(-1) == largest
    with launches.teams():
        assert launch.rows.largest_cluster(-1) == 1
    assert launch.rows.largest_cluster(-1) == 1


def test_the_blocks_of_a_cluster_share_a_program():
    """4 blocks take a quarter of a row of 16,384 each, and do what four programs of a quarter do."""
    size = 2048 * 16384 * 2
    sizes = {"x": size, "y": size, "mean": 4 * 8192}
    cluster = kernel(num_ctas=4, programs=2048, tiles=[(1, 16384)], tensor_bytes=sizes)
    assert (cluster.threads, cluster.blocks) == (1024, 8192)
    assert cluster.violations == []
    assert cluster.sweeps == {"x": 1, "y": 1}
    assert cluster.bytes_in_flight == kernel().bytes_in_flight
    assert cluster.instructions_per_byte == kernel().instructions_per_byte
    assert model.work_of(cluster, TOY) == model.work_of(kernel(), TOY)
    cooperative = replace(cluster, cooperative=True, programs=199)
    assert gates.grid(cooperative, H100) == "a cooperative grid of 796, of which 792 can run"


def test_a_row_team_walks_as_often_as_its_teams_must():
    """20 walks through 90 rows, of 3 teams of 4 programs each."""
    forward = dict(arrivals_ptr=None, M=90, N=4096, BLOCK_N=1024)
    assert compiled._turns(forward, 12) == (30, 1)
    assert compiled._turns(dict(forward, WALKS=20), 12) == (30, pytest.approx(20 / 3))
    assert compiled._fold_steps(dict(forward, BLOCK_P=4), 30, [torch.empty(90, 4)]) == 1


def test_a_team_folds_in_turns():
    """A fold goes through tiles of pieces. 2 teams of 4 programs take 6 units of 12 pieces, and of 40
    channels, of which a fold takes 8: a program has two at most."""
    assert compiled._turns({}, 12) == (1, 1)
    assert compiled._fold_steps(dict(BLOCK_P=4, PIECES=9), 1, [torch.empty(9, 2)]) == 3
    team = dict(UNITS=6, MEMBERS=12, WIDTH=4, BLOCKS=5, BLOCK_C=16, C=40, CG=4, FOLD_C=8, ONE_SET=False)
    assert compiled._turns(team, 8) == (3, 9)
    team |= dict(BLOCK_P=4, PIECES=9)
    assert compiled._fold_steps(team, 3, [torch.empty(9, 2)]) == 3 * 2 * 3
    assert compiled._fold_steps(dict(team, ONE_SET=True), 3, [torch.empty(9, 2)]) == 3 * 3 * 3


def test_predict_refuses_the_interpreter_and_unknown_shapes(monkeypatch, capsys):
    parser = ArgumentParser()
    predict.add_arguments(parser)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert predict.run(parser.parse_args([])) == 2
    assert "the interpreter compiles nothing" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_INTERPRET")
    assert predict.run(parser.parse_args(["--shapes", "large"])) == 2
    assert "'large' is neither a set" in capsys.readouterr().err


# Real kernels

ONE_PIECE = Case("batch_norm", "forward", (4, 8, 32, 32), "bf16")
"""In units of one piece, by the kernel of teams: of its loops the assembler makes others, so that no
instructions are counted."""

COUNTED = [
    Case("layer_norm", "forward", (2, 65536), "bf16"),  # looped, and once more its first chunk
    Case("rms_norm", "backward", (2, 16384), "bf16"),  # split
    Case("group_norm", "forward", (1, 10, 64, 64), "bf16", "contiguous", 2),  # in pieces
    Case("batch_norm", "forward", (4, 8, 96, 97), "bf16"),  # whose lines end with a part of a tile
    ONE_PIECE,
    Case("layer_norm", "backward", (2, 5120), "bf16"),  # in chunks
    Case("instance_norm", "backward", (2, 8, 4, 4), "bf16", "channels_last"),  # resident
]

READ = """
import json
from dataclasses import asdict
from perf.compiled import lower
from tests.test_predict import COUNTED
found = lower("sm_90", [(case, None) for case in COUNTED], instructions=True)
print(json.dumps([[(k.sweeps, k.program_instructions) for k in launches] for launches in found]))
"""


def test_loops_add_up_to_the_bytes_that_are_moved():
    """Reading the loops of PTX, and counting in the interpreter, find the same traffic; and SASS has the
    same loops."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([".", "tests", environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", READ]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    for case, passes in zip(COUNTED, json.loads(done.stdout), strict=True):
        moved = {}
        for sweeps, instructions in passes:
            if sweeps and case != ONE_PIECE:
                assert instructions > 20
            for name, times in sweeps.items():
                moved[name] = moved.get(name, 0) + times
        assert moved == pytest.approx(measure(case).activations, rel=0.005), case.label


def test_predictions_come_from_processes_of_their_own(capsys, monkeypatch):
    case = Case("rms_norm", "forward", (8192, 4096), "bf16")
    ((us, bound),) = in_own_process([case], H100).values()
    assert bound == "bytes"
    assert us == pytest.approx(model.copy_us(case, H100), rel=0.05)
    monkeypatch.setattr(sys, "executable", "false")  # which fails
    assert in_own_process([case, case], H100) == {}
    assert "no prediction of 1 cases" in capsys.readouterr().err
