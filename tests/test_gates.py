"""The gates, on kernels that are made up."""

from argparse import ArgumentParser
from dataclasses import replace

import pytest
from lowered import kernel, walking

from perf import gates, lowering, predict
from perf.assembly import Region
from perf.devices import find
from perf.shapes import Case
from tritonnorm.launch.common import TRITON_VERSION

H100 = find("H100")


def of(gate_list, *held):
    return {miss.gate.name: miss for miss in gates.missed(gate_list, *held)}


def test_gates_of_kernels():
    assert of(gates.OF_KERNELS, kernel()) == {}
    many = of(gates.OF_KERNELS, kernel(registers=97))["4 registers"]
    assert many.fails
    assert many.line("here") == "missed: gate 4 registers, here: 97 registers, more than 96"
    assert "4 registers" not in of(gates.OF_KERNELS, walking(registers=128))
    assert of(gates.OF_KERNELS, walking(registers=129))["4 registers"].fails
    few = of(gates.OF_KERNELS, kernel(registers=250))["5 bytes in flight"]
    assert few.how == "8 KB in flight, less than 32"
    assert not few.fails
    assert of(gates.OF_KERNELS, kernel(uneven_sums=1))["10 uneven sums"].fails
    large = of(gates.OF_KERNELS, kernel(shared=101377))["11 shared memory"]
    assert large.fails
    assert large.how == "101377 bytes a block, more than 101376"
    assert "11 shared memory" not in of(gates.OF_KERNELS, kernel(shared=101376))
    loop = replace(walking().regions[1], divisions=1)
    assert of(gates.OF_KERNELS, walking(regions=[Region(), loop]))["7 divisions"].fails
    assert of(gates.OF_KERNELS, walking(regions=[Region(divisions=4), Region(parent=0)])) == {}
    spilling = of(gates.OF_KERNELS, kernel(stack=8))["1 spills"]
    assert spilling.fails
    assert spilling.how == "8 bytes of stack"


def test_an_exemption_is_for_what_it_says():
    """A spill of two registers, by Triton 3.6 or of one line; not of more, of other lines or by another
    Triton."""
    (teams,) = (one for one in gates.EXEMPT if one.why == gates.TEAMS_OFF)
    (sets,) = (one for one in gates.EXEMPT if one.why == gates.NARROW_SETS)
    gate = next(gate for gate in gates.OF_KERNELS if gate.name == "1 spills")
    row = walking(target="sm_80", stack=8, kernel="row_team_backward")
    assert teams.excuses(gate, row, (3, 6))
    assert not teams.excuses(gate, row, (3, 9))
    images = walking(target="sm_100", line=49, stack=8, kernel="group_backward", layout="contiguous")
    for triton in ((3, 6), (3, 9)):
        assert sets.excuses(gate, images, triton)
    for changes in ({"stack": 12}, {"dtype": "fp32"}, {"target": "sm_90"}, {"kernel": "row_backward"}):
        assert not teams.excuses(gate, replace(row, **changes), (3, 6))
        assert not sets.excuses(gate, replace(images, **changes), (3, 6))
    assert not sets.excuses(gate, replace(images, line=121), (3, 6))


def test_padded_rows_may_take_registers_with_an_old_triton():
    """Those of 16 bits on sm_80, if they are loaded ahead."""
    gate = next(gate for gate in gates.OF_KERNELS if gate.name == "4 registers")

    def excused(triton=(3, 6), **changes):
        row = walking(**({"target": "sm_80", "line": 768, "registers": 152, "ahead": 2} | changes))
        return any(one.excuses(gate, row, triton) for one in gates.EXEMPT)

    assert excused()
    assert not excused((3, 9))
    for changes in ({"line": 1024}, {"ahead": 0}, {"dtype": "fp32"}, {"registers": 233}):
        assert not excused(**changes)


def test_rows_of_several_tiles_may_take_registers_if_they_are_loaded_ahead():
    tiles = walking(tiles=[(1, 3 * 2048)], registers=172, ahead=2)
    assert of(gates.OF_KERNELS, tiles)["4 registers"].exempt.why == gates.ROWS_AHEAD
    others = {"ahead": 0}, {"tiles": [(1, 4096)]}, {"kernel": "channel_moments"}, {"registers": 233}
    for changes in others:
        assert of(gates.OF_KERNELS, replace(tiles, **changes))["4 registers"].fails


def test_what_nothing_needs_is_found():
    """Of all that was compiled; not of other targets, dtypes or versions."""
    every = ("sm_80", "sm_90", "sm_100"), ("bf16", "fp16", "fp32", "fp64")
    missed = gates.missed(gates.OF_KERNELS, kernel(registers=198, dtype="fp64"))
    idle = [one.why for one in gates.unneeded(missed, *every)]
    assert "a float64 takes two" not in idle
    assert gates.ROW_NUMBERS in idle
    assert (gates.TEAMS_OFF in idle) == (TRITON_VERSION == (3, 6))
    assert gates.unneeded([], ("sm_90",), every[1]) == []
    assert [one.why for one in gates.unneeded([], every[0], ("fp64",))] == ["a float64 takes two"]


def test_what_is_exempt_is_named_and_does_not_fail():
    wide = of(gates.OF_KERNELS, kernel(registers=198, dtype="fp64"))["4 registers"]
    assert not wide.fails
    assert wide.line("here").endswith("198 registers, more than 96 (exempt: a float64 takes two)")
    loop = replace(walking().regions[1], divisions=1)
    strided = walking(regions=[Region(), loop], layout="strided")
    assert not of(gates.OF_KERNELS, strided)["7 divisions"].fails
    assert {one.gate for one in gates.EXEMPT} <= {gate.name for gate in gates.OF_KERNELS}


@pytest.mark.parametrize(
    ("k", "missed"),
    [
        (kernel(), {}),
        (kernel(instructions=[400.0]), {"6 issue rate": "0.195 instructions a byte, more than 0.173"}),
        (kernel(regions=[Region(barriers=4)]), {"7 barriers": "4 barriers a row, more than 3"}),
        (
            kernel(operator="rms_norm", regions=[Region(barriers=2)]),
            {"7 barriers": "2 barriers a row, more than 1"},
        ),
        (kernel(regions=[Region(barriers=7)], tiles=[(2, 4096)], registers=20), {}),  # of two rows
        (walking(programs=1024), {}),  # one wave, and 3.5 barriers a row with those of its end
        (walking(programs=1600, steps=4.0), {"9 grid": "1.01 waves"}),
        (walking(programs=131, steps=62.5), {"9 grid": "0.08 waves"}),
        (
            walking(programs=1600, steps=4.0, cooperative=True),
            {"9 grid": "a cooperative grid of 1600, of which 1584 can run"},
        ),
        (walking(programs=1584, steps=4.0, cooperative=True), {}),
    ],
)
def test_gates_of_launches(k, missed):
    found = {name: miss.how for name, miss in of(gates.OF_LAUNCHES, k, H100).items()}
    assert found == missed


@pytest.mark.parametrize(
    ("k", "status"), [(kernel(), 0), (kernel(registers=97), 1), (kernel(stack=8), 1)]
)
def test_the_gate_of_the_command(k, status, monkeypatch, capsys):
    case = Case("layer_norm", "forward", (8192, 4096), "bf16")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(lowering, "lower", lambda *_: [[k]])
    monkeypatch.setattr(predict, "lower", lambda *_, **__: [[kernel(instructions=[400.0])]])
    monkeypatch.setattr(predict, "quick_cases", lambda brief: [case])
    arguments = ["--target", "sm_90", "--gate"]
    parser = ArgumentParser()
    lowering.add_arguments(parser)
    assert lowering.run(parser.parse_args(arguments)) == status
    output = capsys.readouterr().out
    assert "predicted by a model from the compiled kernels, not measured" in output
    assert "H100 layer_norm forward: at worst" in output
    assert "H200 layer_norm forward: at worst" in output
    assert "missed: gate 6 issue rate, H100 layer_norm forward 8192x4096 bf16" in output
    assert "gate 6 issue rate: 2 missed, 0 fail" in output
