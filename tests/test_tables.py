"""Tables of measured launch choices: what they decide, what is refused, what the wheel ships; and that
nothing is measured while a program runs."""

import ast
import json
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import INTERPRETED

import tritonnorm.functional as tF
from perf import launches
from perf.shapes import Case
from tritonnorm import launch
from tritonnorm.heuristics import channels, common, rows, table, teams
from tritonnorm.heuristics.table import Choices
from tritonnorm.launch.common import CHOICES, forget_plans

ROOT = Path(__file__).parent.parent
WALKS = {"n": 96, "itemsize": 4, "strided": False}
ROWS = WALKS | {"cluster": 1}
PIECES = {"n": 1, "c": 64, "s": 100, "itemsize": 2, "adjacent": "s", "over_batch": False}
PIECES |= {"finer": True, "cg": 2}
GROUPS = {"cg": 2, "groups": 32, "s": 64, "itemsize": 2, "adjacent": "c"}
SETS = {"backward": True, "magnitude": 12, "itemsize": 2, "adjacent": None, "over_batch": True}

on_cpu = pytest.mark.skipif(not INTERPRETED, reason="with a CUDA device no CPU tensor takes a kernel")


def entry(choice, arguments, value, **more):
    return {"choice": choice, "arguments": arguments, "value": value, **more}


LEGAL = [
    entry("row_forward", ROWS, {"rows": 2, "block_n": 32, "num_warps": 1}, gain=1.05),
    entry("row_backward", ROWS, {"rows": 1, "block_n": 128, "num_warps": 8}),
    entry("row_programs", WALKS, 256),
    entry("group_forward", GROUPS, None),
    entry(
        "group_backward",
        GROUPS,
        {"groups": 16, "block_c": 32, "block_s": 64, "num_warps": 8, "registers": None},
    ),
    entry(
        "channel_forward",
        PIECES,
        {"block_c": 4, "block_s": 64, "images": 1, "steps": 2, "num_warps": 2, "registers": 128}
        | {"stages": 3},
    ),
    entry("prefer_teams", SETS, True),
]


def text(*entries, arch="sm_90"):
    return json.dumps({"arch": arch, "device": "of no device", "entries": entries})


def read(*entries):
    return table.read(text(*entries), "sm_90", "tuned/sm_90.json")


# What is read, and what is refused


def test_entries_are_answers_of_their_heuristics():
    assert list(read(*LEGAL).values()) == [
        common.RowTile(2, 32, 1),
        common.RowTile(1, 128, 8),
        256,
        None,
        channels.GroupTile(16, 32, 64, 8, None),
        channels.Pieces(4, 64, 1, 2, 2, 128, stages=3),
        True,
    ]
    choices = Choices(read(*LEGAL))
    assert choices(rows.row_programs, 96, 4, False) == 256
    assert choices(rows.row_programs, 96, 4, True) == common.MAX_PARTIALS
    assert choices(rows.row_forward, 97, 4, False) == rows.row_forward(97, 4, False)
    assert choices(channels.group_forward, *GROUPS.values()) is None
    assert choices(teams.prefer_teams, *SETS.values())


def test_what_the_heuristics_answer_could_be_an_entry():
    """The checks are no stricter than the choices that are in use."""
    for n in (1, 7, 96, 4096, 65536, 4_200_000):
        for strided in (False, True):
            for itemsize in (2, 4, 8):
                walks = {"n": n, "itemsize": itemsize, "strided": strided}
                assert table.flaw("row_programs", walks, rows.row_programs(*walks.values())) is None
                for cluster in (1, rows.LARGEST_CLUSTER):
                    arguments = walks | {"cluster": cluster}
                    for heuristic in (rows.row_forward, rows.row_backward):
                        value = heuristic(*arguments.values())
                        assert table.flaw(heuristic.__name__, arguments, value) is None
    for c, groups in ((64, 32), (320, 32), (30, 3), (17, 17)):
        for s in (1, 49, 64, 4096):
            for adjacent in ("s", "c", None):
                of_groups = {"cg": c // groups, "groups": groups, "s": s, "itemsize": 8}
                of_groups["adjacent"] = adjacent
                in_pieces = {"n": 1, "c": c, "s": s, "itemsize": 2, "adjacent": adjacent}
                for over_batch, n in ((False, 1), (True, 9)):
                    in_pieces |= {"n": n, "over_batch": over_batch, "finer": adjacent == "s"}
                    in_pieces["cg"] = 1 if over_batch else c // groups
                    for heuristic, arguments in (
                        (channels.group_forward, of_groups),
                        (channels.group_backward, of_groups),
                        (channels.channel_forward, in_pieces),
                        (channels.channel_backward, in_pieces),
                    ):
                        value = heuristic(*arguments.values())
                        assert table.flaw(heuristic.__name__, arguments, value) is None


TILE = {"rows": 1, "block_n": 128, "num_warps": 4}
PIECE = {"block_c": 4, "block_s": 64, "images": 1, "steps": 2, "num_warps": 4, "registers": None}
GROUP = {"groups": 16, "block_c": 32, "block_s": 64, "num_warps": 4, "registers": None}


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (entry("weight_tile", {"s": 1}, [1, 2]), "no such choice"),
        (entry("row_forward", ROWS | {"m": 4096}, TILE), "its arguments are n, itemsize, strided"),
        (entry("row_forward", {"n": 96, "itemsize": 4}, TILE), "its arguments are"),
        (entry("row_forward", ROWS | {"n": 0}, TILE), "n cannot be 0"),
        (entry("row_forward", ROWS | {"n": 96.0}, TILE), "n cannot be 96.0"),
        (entry("row_forward", ROWS | {"itemsize": 3}, TILE), "itemsize cannot be 3"),
        (entry("row_forward", ROWS | {"strided": 0}, TILE), "strided cannot be 0"),
        (entry("row_forward", ROWS, TILE | {"chunks": 4, "num_warps": 1}), "no chunk is empty"),
        (entry("row_forward", ROWS, TILE | {"num_ctas": 2}), "a cluster has 1 blocks at most"),
        (
            entry("channel_forward", PIECES | {"s": 96}, PIECE | {"block_s": 4, "steps": 1}),
            "a piece ends where an access does",
        ),
        (entry("row_forward", ROWS, None), "None is no RowTile"),
        (entry("row_forward", ROWS, {"rows": 1, "block_n": 128}), "TypeError: .*num_warps"),
        (entry("row_forward", ROWS, TILE | {"ahead": 1}), "TypeError: .*ahead"),
        (entry("row_forward", ROWS, TILE | {"stages": 2}), "a program takes its rows at once"),
        (entry("row_backward", ROWS, TILE | {"stages": 0}), "1 to 8 steps are under way"),
        (entry("row_forward", ROWS, TILE | {"rows": 3}), "powers of two"),
        (entry("row_forward", ROWS, TILE | {"rows": True}), "rows cannot be True"),
        (entry("row_forward", ROWS, TILE | {"num_warps": 64}), "32 warps at most"),
        (entry("row_forward", ROWS, TILE | {"block_n": 256}), "a row has 96 elements"),
        (entry("row_forward", ROWS, TILE | {"rows": 2**14}), "1048576 elements at most"),
        (entry("row_programs", WALKS, 0), "1 to 65535 programs"),
        (entry("row_programs", WALKS, 256.0), "256.0 is no int"),
        (entry("group_forward", GROUPS, GROUP | {"groups": 12}), "do not fill"),
        (entry("group_forward", GROUPS, GROUP | {"block_c": 64}), "holds its groups of 2 channels"),
        (entry("group_forward", GROUPS, GROUP | {"registers": 1024}), "65536 registers at most"),
        (entry("channel_forward", PIECES | {"n": 8}, PIECE), "n and images are 1"),
        (entry("channel_forward", PIECES, PIECE | {"images": 2}), "n and images are 1"),
        (entry("channel_forward", PIECES, PIECE | {"steps": 3}), "64 channels of 100 elements"),
        (entry("channel_forward", PIECES, PIECE | {"stages": 9}), "1 to 8 steps are under way"),
        (entry("channel_forward", PIECES | {"adjacent": "n"}, PIECE), "adjacent cannot be 'n'"),
        (entry("prefer_teams", SETS, 1), "1 is no bool"),
        ({"choice": "row_forward", "arguments": ROWS}, "KeyError: 'value'"),
        ("row_forward", "TypeError"),
    ],
)
def test_an_entry_that_cannot_be_is_named(wrong, reason):
    with pytest.raises(ValueError, match=reason) as error:
        read(LEGAL[0], wrong)
    assert str(error.value).startswith(f"tuned/sm_90.json: {json.dumps(wrong)}: ")


def test_one_answer_to_the_same_arguments():
    with pytest.raises(ValueError, match="two entries of these arguments"):
        read(LEGAL[2], LEGAL[2] | {"value": 512})


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"arch": "sm_90"}', text(arch="sm_80"), text()[:-1]]
)
def test_another_file_is_no_table(content):
    with pytest.raises(ValueError, match=r"tuned/sm_90\.json is no table of sm_90"):
        table.read(content, "sm_90", "tuned/sm_90.json")


def test_no_entry_knows_the_number_of_rows_or_images():
    """What changes the order of a sum must not: of all arguments there is only `n`, of the images that
    share statistics, which the last check holds to 1 where they share none."""
    known = {"row": list(ROWS), "row_programs": list(WALKS)}
    known |= {"group": list(GROUPS), "channel": list(PIECES)}
    for name, tunable in table.TUNABLE.items():
        if not name.startswith("prefer"):  # on which no result depends
            assert tunable.arguments == known.get(name, known.get(name.partition("_")[0]))


# Where tables are found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where tables are looked for."""
    monkeypatch.setattr(table, "files", lambda package: tmp_path)
    table.load.cache_clear()
    (tmp_path / "tuned").mkdir()
    yield tmp_path / "tuned"
    table.load.cache_clear()


def test_a_table_is_read_once(folder):
    path = folder / "sm_90.json"
    path.write_text(text(*LEGAL))
    choices = table.load("sm_90")
    assert choices.entries == read(*LEGAL)
    path.unlink()
    assert table.load("sm_90") is choices


def test_without_a_table_the_heuristics_decide(folder):
    (folder / "sm_90.json").write_text(text(*LEGAL))
    for arch in (None, "sm_100"):
        assert table.load(arch).entries == {}


def test_a_table_that_is_wrong_is_named(folder):
    path = folder / "sm_90.json"
    path.write_text(text(entry("row_programs", WALKS, 0)))
    with pytest.raises(ValueError, match=r"1 to 65535 programs") as error:
        table.load("sm_90")
    assert str(error.value).startswith(str(path))


def test_a_device_has_the_table_of_its_architecture(folder, monkeypatch):
    """Two GPUs of one architecture share choices, and with them plans; ROCm's have none, nor has the
    interpreter."""
    (folder / "sm_90.json").write_text(text(*LEGAL))
    capabilities = {0: (9, 0), 1: (9, 0), 2: (10, 0)}
    facts = {
        torch.device("cuda", i): common.DeviceFacts(capability, 132, 50 * 2**20)
        for i, capability in capabilities.items()
    }
    monkeypatch.setattr(launch.common, "device_facts", facts.__getitem__)
    monkeypatch.setattr(launch.common.triton.knobs.runtime, "interpret", False)
    by_device = type(CHOICES)()
    assert by_device[0] is by_device[1]
    assert by_device[0].entries == read(*LEGAL)
    assert by_device[2].entries == by_device[-1].entries == {}
    assert by_device[2] is not by_device[0]
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert type(CHOICES)()[0].entries == {}
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(launch.common.triton.knobs.runtime, "interpret", True)
    assert type(CHOICES)()[0].entries == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_the_cpu_has_no_table():
    assert CHOICES[torch.ones(1).get_device()].entries == {}


def test_tables_of_the_repository_are_legal():
    for path in sorted((ROOT / "tritonnorm" / table.FOLDER).glob("*")):
        assert path.suffix == ".json"
        table.read(path.read_text(), path.stem, path.name)


def test_the_wheel_ships_tables(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__", table.FOLDER)
    for name in ("tritonnorm", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "tritonnorm" / table.FOLDER).mkdir()
    (tmp_path / "tritonnorm" / table.FOLDER / "sm_90.json").write_text(text())
    build = "from setuptools import build_meta; build_meta.build_wheel('wheel')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert f"tritonnorm/{table.FOLDER}/sm_90.json" in names
    assert "tritonnorm/heuristics/table.py" in names


# What an entry decides


def launched(case):
    """The names of the kernels that a case launches, and their grids and sizes."""
    seen = []

    def note(kernel, grid, arguments):
        sizes = {k: v for k, v in arguments.items() if not isinstance(v, torch.Tensor)}
        seen.append((kernel.__name__, grid, sizes))

    with launches.observe(note):
        launches.run(case)
    return seen


def of_case(choice, arguments, value):
    return Choices(read(entry(choice, arguments, value)))


BATCH = Case("batch_norm", "forward", (4, 32, 30, 20), "bf16")
DECIDED = [
    (
        Case("layer_norm", "forward", (40, 96), "fp32"),
        entry("row_forward", ROWS, {"rows": 8, "block_n": 64, "num_warps": 2}),
        [("row_forward_looped", (5,), {"ROWS": 8, "BLOCK_N": 64, "num_warps": 2})],
    ),
    (
        Case("rms_norm", "backward", (40, 96), "fp32"),
        entry("row_programs", WALKS, 2),
        [("row_backward", (1, 2), {}), ("fold_parameter_gradients", (1,), {"P": 2})],
    ),
    (
        Case("group_norm", "forward", (2, 64, 8, 8), "bf16", "channels_last", 32),
        entry("group_forward", GROUPS, GROUP | {"num_warps": 8}),
        [("group_forward", (4,), {"GROUPS": 16, "BLOCK_C": 32, "num_warps": 8})],
    ),
    (
        Case("group_norm", "forward", (2, 64, 8, 8), "bf16", "channels_last", 32),
        entry("group_forward", GROUPS, None),
        [("team_forward", ..., {"WIDTH": 1})],
    ),
    (
        BATCH,
        entry(
            "channel_forward",
            PIECES | {"n": 4, "c": 32, "s": 600, "over_batch": True, "cg": 1},
            {"block_c": 2, "block_s": 256, "images": 2, "steps": 3, "num_warps": 2, "registers": None},
        ),
        [
            ("channel_moments", (32,), {"IMAGES": 2, "STEPS": 3, "num_warps": 2}),
            ("fold_moments", ..., {"PIECES": 2}),
            ("channel_normalize", (32,), {"BLOCK_C": 2, "BLOCK_S": 256}),
        ],
    ),
]


@on_cpu
@pytest.mark.parametrize(("case", "found", "expected"), DECIDED)
def test_an_entry_decides_a_launch(case, found, expected):
    """And only while its table does: plans that were made without it, or with another, are not used."""
    without = launched(case)
    choices, again = (Choices(read(found)) for _ in range(2))
    with launches.choosing(choices):
        decided = launched(case)
        with launches.choosing(again):
            assert launched(case) == decided
    assert decided != without
    assert launched(case) == without
    assert [kernel for kernel, _, _ in decided] == [kernel for kernel, _, _ in expected]
    for (_, grid, sizes), (_, of_entry, some) in zip(decided, expected, strict=True):
        assert of_entry in (grid, ...)
        assert some.items() <= sizes.items()


@on_cpu
def test_an_entry_for_teams_decides():
    case = Case("batch_norm", "backward", (4, 64, 64, 64), "fp32")
    preferred = {"backward": True, "magnitude": 14, "itemsize": 4, "adjacent": "s", "over_batch": True}
    kernels = []
    for magnitude in (13, 14):
        arguments = preferred | {"magnitude": magnitude}
        choices = Choices(read(entry("prefer_teams", arguments, True)))
        with launches.device_facts(launches.H100), launches.choosing(choices):
            kernels.append([kernel for kernel, _, _ in launched(case)])
    assert "team_backward" not in kernels[0]
    assert kernels[1][0] == "team_backward"


@on_cpu
def test_results_by_entries_are_right():
    """Tiles and counts that the heuristics would not choose, against PyTorch."""
    tile = {"rows": 4, "block_n": 32, "num_warps": 1}
    choices = Choices(
        read(
            entry("row_forward", ROWS, tile),
            entry("row_backward", ROWS, tile),
            entry("row_programs", WALKS, 3),
        )
    )
    x, dy = torch.randn(2, 41, 96)
    leaves = [x.requires_grad_(), *(torch.randn(96, requires_grad=True) for _ in range(2))]
    expected = torch.nn.functional.layer_norm(x, (96,), *leaves[1:])
    with launches.choosing(choices):
        y = tF.layer_norm(x, (96,), *leaves[1:])
        gradients = torch.autograd.grad(y, leaves, dy)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


# Nothing is tuned while a program runs

CLOCKS = {"time", "timeit", "datetime", "proton"}
TUNERS = {"autotune", "Autotuner", "do_bench", "do_bench_cudagraph", "benchmark", "testing", "profiler"}
TIMES = {
    "Event",
    "elapsed_time",
    "perf_counter",
    "perf_counter_ns",
    "monotonic",
    "clock64",
    "globaltimer",
}


def measures(source):
    """The names in a module that measure time, or tune."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom):
            names = {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Attribute):
            names = {node.attr} - CLOCKS
        elif isinstance(node, ast.Name):
            names = {node.id} - CLOCKS
        else:
            continue
        yield from names & (CLOCKS | TUNERS | TIMES)


@pytest.mark.parametrize("folder", ["tritonnorm", "kernels"])
def test_no_source_measures_or_tunes(folder):
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    assert {path.name: found for path in paths if (found := list(measures(path.read_text())))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import time",
        "from time import perf_counter as now",
        "from triton.testing import do_bench",
        "@triton.autotune(configs=[], key=[])\ndef f(): pass",
        "start = torch.cuda.Event(enable_timing=True)",
        "import triton.profiler as p",
    ],
)
def test_a_source_that_measures_is_noticed(source):
    assert list(measures(source))


def calls():
    x = torch.randn(6, 8, 5, 7, requires_grad=True)
    weight, bias = torch.randn(8), torch.randn(8)
    y = tF.layer_norm(x.flatten(1), (280,)).sum() + tF.rms_norm(x, (7,)).sum()
    y = y + tF.group_norm(x, 4, weight, bias).sum() + tF.batch_norm(x, None, None, training=True).sum()
    y = y + tF.weight_norm(x, torch.ones(6, 1, 1, 1)).sum()
    y.backward()


@on_cpu
def test_a_first_call_launches_what_every_other_does(monkeypatch):
    """Choosing by measurement takes launches that are tried, or a clock. The first call of all has the
    launches and arguments of the second, neither looks at a clock, and the second plans nothing."""
    seen = []

    def note(kernel, grid, arguments):
        sizes = {k: v for k, v in arguments.items() if not isinstance(v, torch.Tensor)}
        seen.append((kernel.__name__, grid, sizes))
        kernel[grid](**arguments)

    def refuse(*_, **__):
        raise AssertionError("something looked at a clock")

    def planned():
        return sum(plan.cache_info().misses for plan in launch.common._plans)

    forget_plans()
    with launches.observe(note), monkeypatch.context() as patch:
        for name in ("time", "time_ns", "perf_counter", "perf_counter_ns", "monotonic", "process_time"):
            patch.setattr(time, name, refuse)
        patch.setattr(torch.cuda, "Event", refuse)
        calls()
        first, plans = list(seen), planned()
        calls()
        again = planned()
    assert len(first) > 10
    assert plans > 5
    assert seen == 2 * first
    assert again == plans
