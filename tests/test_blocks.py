"""`python -m perf blocks`: what it computes, refuses and writes; no time is asserted."""

from dataclasses import replace

import pytest
import torch
from measuring import main, read

from perf import blocks, machine
from perf.timer import Prepared

SMALL = {
    "gpt2": replace(blocks.SIZES["gpt2"], width=32, heads=4, key_heads=4, hidden=48, batch=2, tokens=6),
    "llama": replace(
        blocks.SIZES["llama"], width=32, heads=4, key_heads=2, hidden=48, batch=2, tokens=6
    ),
}


class Timer:
    """Runs what it prepares, and then says that it takes 40 microseconds."""

    def prepare(self, call):
        call()
        return Prepared(lambda repetitions: [40.0] * repetitions, 7, 5.0)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small blocks, compiled without a compiler of code."""
    compile_ = torch.compile
    monkeypatch.setattr(blocks, "SIZES", SMALL)
    monkeypatch.setattr(torch, "compile", lambda module: compile_(module, backend="aot_eager"))


@pytest.mark.parametrize("direction", blocks.DIRECTIONS)
@pytest.mark.parametrize("name", SMALL)
def test_all_ways_compute_the_block(name, direction, device):
    calls = blocks.make_calls(SMALL[name], direction, torch.float32, device)
    exact = calls.pop("float32")()
    assert set(calls) == set(blocks.WAYS)
    for call in calls.values():
        assert blocks.difference(call(), exact) < 1e-5


def test_a_wrong_norm_is_noticed(device, monkeypatch):
    monkeypatch.setattr(blocks.tn.functional, "rms_norm", lambda x, *_, **__: 1.1 * x)
    with pytest.raises(RuntimeError, match="llama forward, tritonnorm: off by"):
        blocks.measure("llama", "forward", "fp16", Timer(), device)


def test_a_norm_that_stays_is_noticed(device, monkeypatch):
    monkeypatch.setitem(SMALL, "llama", replace(SMALL["llama"], norm=lambda width: torch.nn.Identity()))
    with pytest.raises(RuntimeError, match="both norms"):
        blocks.make_calls(SMALL["llama"], "forward", torch.float32, device)


def test_a_row_of_every_way_is_written(device, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine, "refusal", lambda: None)
    monkeypatch.setattr(blocks, "DeviceTimer", Timer)
    measure = blocks.measure
    monkeypatch.setattr(blocks, "measure", lambda *given: measure(*given[:-1], device))
    out = tmp_path / "blocks.csv"
    assert main(monkeypatch, "blocks", "--blocks", "gpt2", "--dtype", "fp16", "--out", out) == 0
    rows = read(out)
    assert [(row["direction"], row["way"]) for row in rows] == [
        (direction, way) for direction in blocks.DIRECTIONS for way in blocks.WAYS
    ]
    for row in rows:
        assert (row["block"], row["shape"], row["dtype"]) == ("gpt2", "2x6x32", "fp16")
        assert (row["median_us"], row["host_us"]) == ("40.000", "5.000")
        assert float(row["difference"]) < blocks.TOLERANCE
        assert row["torch_version"] == torch.__version__
        assert row["command"].startswith("python -m perf blocks")
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


def test_without_a_gpu_nothing_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(machine, "refusal", lambda: "no CUDA device: nothing is timed")
    assert main(monkeypatch, "blocks") == machine.NO_DEVICE_STATUS
    assert capsys.readouterr().err == "blocks: no CUDA device: nothing is timed\n"
