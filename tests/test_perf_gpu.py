"""`python -m perf gpu`: its steps, without running them."""

from argparse import ArgumentParser

import pytest
from measuring import main

from perf import bench, compare, gpu, machine, shapes


@pytest.mark.parametrize(("tests_status", "status"), [(0, 0), (1, 1)])
def test_gpu_benchmarks_compares_and_plots_even_if_tests_fail(
    tests_status, status, monkeypatch, tmp_path, capsys
):
    steps = []

    def step(*arguments, log=None):
        steps.append(arguments)
        if "compare" in arguments:
            return compare.LOSS_STATUS  # which is no failure
        return tests_status if "pytest" in arguments else 0

    monkeypatch.setattr(machine, "refusal", lambda: None)
    monkeypatch.setattr(gpu, "step", step)
    assert main(monkeypatch, "gpu", "--quick", "--out", tmp_path) == status
    assert [arguments[1:3] for arguments in steps] == [
        *(("pip", "install"), ("pytest",), ("perf", "bench"), ("perf", "compare")),
        *(("perf", "blocks"), ("perf", "roofline")),
    ]
    assert capsys.readouterr().out.endswith(f"results in {tmp_path}\n")
    parser = ArgumentParser()
    bench.add_arguments(parser)
    parsed = parser.parse_args(steps[2][3:])
    assert (parsed.shapes, parsed.dtypes) == (list(shapes.QUICK_SETS), ["bf16"])
    assert (machine.ROOT / parsed.out).resolve() == tmp_path / "bench.csv"
    parser = ArgumentParser()
    compare.add_arguments(parser)
    parsed = parser.parse_args(steps[3][3:])
    assert parsed.shapes == list(shapes.QUICK_SETS)
    assert (machine.ROOT / parsed.out).resolve() == tmp_path / "compare.csv"


def test_gpu_shows_and_keeps_the_output_of_a_step(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code = "import os, sys; print(os.environ.get('TRITON_INTERPRET')); sys.exit(7)"
    assert gpu.step("-c", code, log=tmp_path / "log.txt") == 7
    assert (tmp_path / "log.txt").read_text() == "None\n"
    assert capfd.readouterr().out.endswith("None\n")


def test_a_devices_folder_has_a_plain_name():
    assert machine.device_slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
