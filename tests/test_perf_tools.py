"""The tools that measure, as far as that needs no GPU: what is written, drawn and refused."""

import csv
import re
import sys
from argparse import ArgumentParser

import pytest
import torch

from perf import __main__ as perf_main
from perf import bench, gpu, machine, providers, roofline
from perf.providers import Provider, with_signatures_of_torch
from perf.shapes import DTYPES, OPERATORS, PASSES, SHAPE_SETS, Case, parse_shapes
from perf.table import FIELDS, Table, summary
from perf.timer import DeviceTimer, Timing
from perf.traffic import floor_bytes, tensor_bytes

ON_GPU = torch.cuda.is_available()
NORMS = [(operator, direction) for operator in OPERATORS for direction in PASSES]
RUN = {"device": "NVIDIA H200", "tritonnorm_version": "0.1.0", "command": "python -m perf bench"}
TORCH = with_signatures_of_torch(torch.nn.functional)


def fake_timer(call):
    """A timer without a clock: the call runs, and takes 40 microseconds."""
    call()
    return Timing(median_us=40.0, p20_us=39.0, p80_us=41.0, host_us=5.0)


def raising(*_):
    raise RuntimeError("no kernel\nfor this row")


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["perf", *map(str, arguments)])
    return perf_main.main()


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def measured(path, measured_providers, cases, resume=False, seconds=100):
    bench.measure(cases, measured_providers, fake_timer, "cpu", Table(path, RUN, resume), seconds)
    return read(path)


# Shapes and bytes


@pytest.mark.parametrize("name", SHAPE_SETS)
def test_shape_sets_fit_a_gpu_of_80_gb(name):
    """Six float32 activations at once: x, dy, y, dx and what an unfused backward pass adds."""
    assert SHAPE_SETS[name].reason
    for m, n in SHAPE_SETS[name].shapes:
        assert 6 * tensor_bytes(Case("layer_norm", "backward", m, n, "fp32")) < 80e9


def test_parse_shapes_takes_sets_and_sizes_once():
    decode = list(SHAPE_SETS["decode"].shapes)
    assert parse_shapes(["3x5", "decode", "1x4096", "3x5"]) == [(3, 5), *decode]


@pytest.mark.parametrize("text", ["large", "4096", "4096x", "0x16", "-1x16", "4x4x4"])
def test_parse_shapes_refuses_other_texts(text):
    with pytest.raises(ValueError, match="neither a set"):
        parse_shapes([text])


@pytest.mark.parametrize(
    ("case", "by_hand"),
    [
        # x and y; mean and rstd in float32; weight and bias
        (Case("layer_norm", "forward", 10, 64, "bf16"), 2 * 1280 + 2 * 40 + 2 * 128),
        # dy, x and dx; mean and rstd; weight; the gradients of weight and bias
        (Case("layer_norm", "backward", 10, 64, "bf16"), 3 * 1280 + 2 * 40 + 128 + 2 * 128),
        (Case("rms_norm", "backward", 10, 64, "fp32"), 3 * 2560 + 40 + 256 + 256),
        (Case("normalize", "forward", 10, 64, "fp64"), 2 * 5120 + 80),
    ],
)
def test_floor_bytes(case, by_hand):
    assert floor_bytes(case) == by_hand


def test_a_copy_moves_the_floor():
    case = Case("rms_norm", "forward", 5, 7, "bf16")
    copied = providers.make_copy(case, "cpu")()
    assert floor_bytes(case) <= 2 * copied.nbytes <= floor_bytes(case) + 1


# What is compared


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("operator", "direction"), NORMS)
def test_pytorch_is_within_the_tolerance(operator, direction, dtype, monkeypatch):
    monkeypatch.setattr(providers, "REFERENCE_ELEMENTS", 256)  # in chunks, the last one smaller
    case = Case(operator, direction, 33, 64, dtype)
    inputs = providers.make_inputs(case, "cpu")
    outputs = providers.make_call(providers.LOADERS["torch"](), case, inputs)()
    shapes = [inputs.x.shape, *(p.shape for p in inputs.parameters)]
    assert [t.shape for t in outputs] == (shapes if direction == "backward" else shapes[:1])
    assert 0 < providers.max_error(case, inputs, outputs) < bench.TOLERANCES[dtype] / 2


@pytest.mark.parametrize("output", [0, 1, 2])
@pytest.mark.parametrize("spoil", [1.1, float("nan")])
def test_one_wrong_element_of_any_gradient_is_seen(output, spoil):
    case = Case("layer_norm", "backward", 8, 16, "fp32")
    inputs = providers.make_inputs(case, "cpu")
    gradients = [g.clone() for g in providers.make_call(providers.LOADERS["torch"](), case, inputs)()]
    gradients[output].view(-1)[gradients[output].abs().argmax()] *= spoil
    assert not providers.max_error(case, inputs, gradients) <= 0.09


def test_float32_parameters_are_made_before_the_call():
    seen = []

    def layer_norm(x, weight, bias):
        seen.append((x.dtype, weight.dtype, bias.dtype))
        return TORCH["layer_norm"](x.float(), weight, bias).to(x.dtype)

    provider = Provider("wide", "1", {"layer_norm": layer_norm}, float32_parameters={"layer_norm"})
    case = Case("layer_norm", "backward", 8, 16, "bf16")
    gradients = providers.make_call(provider, case, providers.make_inputs(case, "cpu"))()
    assert seen == [(torch.bfloat16, torch.float32, torch.float32)]
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32, torch.float32]


def test_a_peer_that_cannot_be_imported_is_absent(monkeypatch):
    def broken():
        raise OSError("libcuda.so.1 is\nmissing")

    monkeypatch.setitem(providers.LOADERS, "quack", broken)
    present, absent = providers.load(["torch", "quack"])
    assert [p.name for p in present] == ["torch"]
    assert absent == {"quack": "OSError: libcuda.so.1 is missing"}


# bench


def test_bench_writes_a_row_for_right_wrong_and_failing_providers(tmp_path):
    rms = TORCH["rms_norm"]
    table = [
        Provider("tritonnorm", "0.1.0", {"rms_norm": rms}),
        Provider("wrong", "2", {"rms_norm": lambda x, weight: 1.1 * rms(x, weight)}),
        Provider("failing", "3", {"rms_norm": raising}),
        Provider("another", "4", {"layer_norm": raising}),
    ]
    case = Case("rms_norm", "backward", 8, 16, "fp32")
    rows = measured(tmp_path / "sub" / "bench.csv", table, [case])
    assert [row["provider"] for row in rows] == ["copy", "tritonnorm", "wrong", "failing"]
    copy, ours, wrong, failing = rows
    assert tuple(ours) == FIELDS
    assert ours["status"] == copy["status"] == "ok"
    assert (ours["m"], ours["n"]) == ("8", "16")
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


def test_bench_keeps_its_rows_when_interrupted_and_resumes(tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    path = tmp_path / "bench.csv"
    cases = bench.make_cases(["normalize"], ["forward"], ["fp32"], [(4, 8), (4, 16)])
    ours = Provider("tritonnorm", "0.1.0", {"normalize": TORCH["normalize"]})
    with pytest.raises(KeyboardInterrupt):
        measured(path, [ours, Provider("peer", "1", {"normalize": interrupted})], cases)
    assert [row["provider"] for row in read(path)] == ["copy", "tritonnorm"]

    rows = measured(path, [ours, Provider("peer", "1", {"normalize": raising})], cases, resume=True)
    assert [(row["n"], row["provider"]) for row in rows] == [
        (n, provider) for n in ("8", "16") for provider in ("copy", "tritonnorm", "peer")
    ]


def test_bench_resumes_no_other_csv(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        Table(path, RUN, resume=True)


def test_bench_starts_no_case_when_the_time_is_over(tmp_path, capsys):
    case = Case("normalize", "forward", 4, 8, "fp32")
    assert measured(tmp_path / "bench.csv", [], [case], seconds=-1) == []
    assert "left out" in capsys.readouterr().err


def test_progress_is_a_few_lines_without_a_terminal(capsys):
    progress = bench.Progress(200)
    for _ in range(200):
        progress.step("a case")
    assert len(capsys.readouterr().err.splitlines()) == 10


def test_summary_names_faster_peers_and_failures():
    def row(provider, median_us, status="ok", n="64"):
        case = dict(operator="rms_norm", direction="forward", m="8", n=n, dtype="bf16")
        return {**case, "provider": provider, "median_us": median_us, "status": status}

    rows = [
        *(row("copy", "9"), row("tritonnorm", "10"), row("quack", "9.5"), row("torch", "9.9")),
        *(row("liger", "1", "wrong"), row("fla", "", "error")),
        *(row("copy", "10", n="128"), row("tritonnorm", "10", n="128")),
        {"provider": "absent", "status": "absent"},
    ]
    assert summary(rows).splitlines() == [
        "rms_norm forward bf16: 90% to 100% of a copy's bandwidth, median 95%, 2 shapes",
        "a peer is faster by more than 2% in:",
        "  rms_norm forward 8x64 bf16: quack takes 95% of our time",
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

    monkeypatch.setattr(bench, "_check_device", lost)
    peers = [Provider(name, "1", {"normalize": raising}) for name in ("first", "second")]
    cases = [Case("normalize", "forward", 4, 8, "fp32")]
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
    case = Case("rms_norm", "forward", 8192, 4096, "bf16")
    timing = DeviceTimer()(providers.make_copy(case, "cuda"))
    assert 0 < timing.p20_us <= timing.median_us <= timing.p80_us
    assert timing.host_us > 0


# gpu


@pytest.mark.parametrize(("tests_status", "status"), [(0, 0), (1, 1)])
def test_gpu_benchmarks_and_plots_even_if_tests_fail(
    tests_status, status, monkeypatch, tmp_path, capsys
):
    steps = []

    def step(*arguments, log=None):
        steps.append(arguments)
        return tests_status if "pytest" in arguments else 0

    monkeypatch.setattr(machine, "refusal", lambda: None)
    monkeypatch.setattr(gpu, "step", step)
    assert main(monkeypatch, "gpu", "--quick", "--out", tmp_path) == status
    assert [arguments[1:3] for arguments in steps] == [
        *(("pip", "install"), ("pytest",), ("perf", "bench"), ("perf", "roofline"))
    ]
    assert capsys.readouterr().out.endswith(f"results in {tmp_path}\n")
    parser = ArgumentParser()
    bench.add_arguments(parser)
    parsed = parser.parse_args(steps[2][3:])
    assert (parsed.shapes, parsed.dtypes) == (["quick"], ["bf16"])
    assert (machine.ROOT / parsed.out).resolve() == tmp_path / "bench.csv"


def test_gpu_shows_and_keeps_the_output_of_a_step(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code = "import os, sys; print(os.environ.get('TRITON_INTERPRET')); sys.exit(7)"
    assert gpu.step("-c", code, log=tmp_path / "log.txt") == 7
    assert (tmp_path / "log.txt").read_text() == "None\n"
    assert capfd.readouterr().out.endswith("None\n")


def test_a_devices_folder_has_a_plain_name():
    assert machine.device_slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


# roofline


def bench_rows(device="NVIDIA H200"):
    """Two operators forward and one backward in bfloat16; figures that no device measured."""
    facts = dict.fromkeys(FIELDS, "1") | {"device": device, "date": "2000-01-01T00:00:00+00:00"}
    panels = [("layer_norm", "forward"), ("layer_norm", "backward"), ("rms_norm", "forward")]
    speeds = {"copy": 4000, "tritonnorm": 3900, "torch": 2000}
    rows = [facts | dict(provider="fla", gbps="", m="", n="", dtype="", status="absent")]
    for operator, direction in panels:
        for m, n in ((32768, 1024), (65536, 1024), (32768, 8192), (16, 4096)):
            for provider, speed in speeds.items():
                case = dict(operator=operator, direction=direction, m=m, n=n, dtype="bf16")
                status = "wrong" if (provider, n) == ("torch", 8192) else "ok"
                figure = dict(provider=provider, gbps=speed * m / (m + 1000), status=status)
                rows.append(facts | case | figure)
    return rows


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_roofline_draws_png_and_svg(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    path = write(tmp_path / "bench.csv", bench_rows())
    assert main(monkeypatch, "roofline", path, "--out", tmp_path / "plots") == 0
    names = {file.name for file in (tmp_path / "plots").iterdir()}
    assert names == {"roofline-bf16.png", "roofline-bf16.svg"}
    assert {line.rpartition("/")[2] for line in capsys.readouterr().out.splitlines()} == names


@pytest.mark.parametrize(("device", "roofs"), [("NVIDIA H200", 2), ("NVIDIA Unknown", 1)])
def test_roofline_has_a_panel_an_operator_and_direction(tmp_path, device, roofs):
    pytest.importorskip("matplotlib")
    rows = roofline.read(write(tmp_path / "bench.csv", bench_rows(device)))
    figure = roofline.draw(rows, "bf16")
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()]
    assert titles == ["LayerNorm, forward", "RMSNorm, forward", "LayerNorm, backward"]
    panel = figure.axes[0]
    horizontal = [line for line in panel.lines if len(set(line.get_ydata())) == 1]
    assert len(horizontal) == roofs
    assert len(panel.texts) == 0  # labels stand at the last column alone


def test_roofline_takes_the_largest_tensor_of_a_length(tmp_path):
    rows = roofline.read(write(tmp_path / "bench.csv", bench_rows()))
    found = roofline.lines(rows, "layer_norm", "forward")
    assert list(found) == ["tritonnorm", "torch", "copy"]
    assert [(n, status) for n, _, status in found["torch"]] == [(1024, "ok"), (8192, "wrong")]
    assert found["copy"][0][1] == pytest.approx(4 * 65536 / 66536)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda row: {k: v for k, v in row.items() if k not in ("gbps", "date")},
            "no column gbps, date",
        ),
        (lambda row: row | {"gbps": ""}, "no figure"),
        (lambda row: row | {"m": "1", "n": "1", "dtype": "bf16"}, "no figure of a tensor of 64 MiB"),
        (lambda row: row | {"device": row["provider"]}, "several devices: copy, torch, tritonnorm"),
    ],
)
def test_roofline_refuses_a_csv_it_cannot_draw(change, message, tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "bench.csv", [change(row) for row in bench_rows()])
    assert main(monkeypatch, "roofline", path) == 1
    assert message in capsys.readouterr().err
    assert main(monkeypatch, "roofline", tmp_path / "absent.csv") == 1


def test_every_provider_and_dtype_has_a_style():
    assert set(roofline.STYLES) == {*providers.LOADERS, "copy"}
    assert set(roofline.TITLES) == set(OPERATORS)
    assert set(bench.TOLERANCES) == set(DTYPES)


@pytest.mark.parametrize("without", ["mean", "c1", "c2"])
@pytest.mark.parametrize("n", [256, 65536])
def test_a_missing_reduction_is_wrong(without, n):
    """Also for long rows in bfloat16, where centered inputs would hide it."""
    direction = "forward" if without == "mean" else "backward"
    case = Case("layer_norm", direction, 8, n, "bf16")
    inputs = providers.make_inputs(case, "cpu")
    x, weight, bias, dy = (t.detach().double() for t in (inputs.x, *inputs.parameters, inputs.dy))
    deviation = x - x.mean(1, keepdim=True)
    rstd = torch.rsqrt(deviation.square().mean(1, keepdim=True) + providers.EPS["layer_norm"])
    x_hat, wdy = deviation * rstd, weight * dy
    c1, c2 = (wdy * x_hat).mean(1, keepdim=True), wdy.mean(1, keepdim=True)

    def outputs(mean=1, c1_factor=1, c2_factor=1):
        if direction == "forward":
            return (((x if mean == 0 else deviation) * rstd * weight + bias).bfloat16(),)
        dx = (wdy - c1_factor * x_hat * c1 - c2_factor * c2) * rstd
        return dx.bfloat16(), (dy * x_hat).sum(0).bfloat16(), dy.sum(0).bfloat16()

    names = {"mean": "mean", "c1": "c1_factor", "c2": "c2_factor"}
    limit = bench.TOLERANCES["bf16"]
    assert providers.max_error(case, inputs, outputs()) < limit / 2
    assert providers.max_error(case, inputs, outputs(**{names[without]: 0})) > 2 * limit
