"""`python -m perf roofline`: what is drawn of a table, and which tables are refused."""

import csv

import pytest
from measuring import TORCH, main

from perf import bench, providers, roofline, shapes
from perf.shapes import DTYPES, OPERATORS, PASSES, WEIGHT_OPERATORS, Case, parse_shapes
from perf.table import CASE_FIELDS, FIELDS, case_fields, read_case
from perf.traffic import floor_bytes

TINY = Case("normalize", "forward", (1, 1), "bf16")


def bench_rows(device="NVIDIA H200"):
    """Of each family two operators forward and one backward in bfloat16; figures that no device
    measured."""
    facts = dict.fromkeys(FIELDS, "1") | {"device": device, "date": "2000-01-01T00:00:00+00:00"}
    facts["predicted_us"] = facts["bound"] = ""
    speeds = {"copy": 4000, "tritonnorm": 3900, "torch": 2000}
    rows = [facts | dict.fromkeys((*CASE_FIELDS, "gbps"), "") | dict(provider="fla", status="absent")]
    row_shapes = parse_shapes(["32768x1024", "65536x1024", "32768x8192", "16x4096"])
    image_shapes = parse_shapes(["64x64x112x112", "128x64x112x112", "512x512x28x28", "1x64x8x8"])
    weight_shapes = parse_shapes(["32768x1024", "8192x8192"])
    cases = [
        *bench.make_cases(["layer_norm"], PASSES, ["bf16"], row_shapes),
        *bench.make_cases(["rms_norm"], ["forward"], ["bf16"], row_shapes),
        *bench.make_cases(["group_norm"], PASSES, ["bf16"], image_shapes),
        *bench.make_cases(["batch_norm"], ["forward"], ["bf16"], image_shapes),
        *bench.make_cases(["weight_norm"], PASSES, ["bf16"], weight_shapes),
        *bench.make_cases(["weight_norms"], ["forward"], ["bf16"], parse_shapes(["wn_layers"])),
    ]
    for case in cases:
        m = case.shape[0]
        for provider, speed in speeds.items():
            if case.layout == "channels_last":
                speed /= 2
            status = "wrong" if (provider, case.set_size) == ("torch", 8192) else "ok"
            figure = dict(provider=provider, gbps=speed * m / (m + 1000), status=status)
            rows.append(facts | case_fields(case) | figure)
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
    assert names == {
        f"roofline{family}-bf16.{kind}"
        for family in ("", "-channels", "-weights")
        for kind in ("png", "svg")
    }
    assert {line.rpartition("/")[2] for line in capsys.readouterr().out.splitlines()} == names


@pytest.mark.parametrize(("device", "roofs"), [("NVIDIA H200", 2), ("NVIDIA Unknown", 1)])
@pytest.mark.parametrize(
    ("family", "panels"),
    [
        ("rows", ["LayerNorm, forward", "RMSNorm, forward", "LayerNorm, backward"]),
        ("channels", ["BatchNorm, forward", "GroupNorm, forward", "GroupNorm, backward"]),
        ("weights", ["WeightNorm, forward", "WeightNorm of many, forward", "WeightNorm, backward"]),
    ],
)
def test_roofline_has_a_panel_an_operator_and_direction(tmp_path, device, roofs, family, panels):
    pytest.importorskip("matplotlib")
    rows = roofline.read(write(tmp_path / "bench.csv", bench_rows(device)))
    figure = roofline.draw(rows, family, "bf16")
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()]
    assert titles == panels
    panel = figure.axes[0]
    horizontal = [line for line in panel.lines if len(set(line.get_ydata())) == 1]
    assert len(horizontal) == roofs
    assert len(panel.texts) == 0  # labels stand at the last column alone


def test_roofline_takes_the_largest_tensor_of_a_length(tmp_path):
    rows = roofline.read(write(tmp_path / "bench.csv", bench_rows()))
    found = roofline.lines(rows, "layer_norm", "forward")
    assert list(found) == [(name, "contiguous") for name in ("tritonnorm", "torch", "copy")]
    torch_points = found["torch", "contiguous"]
    assert [(n, status) for n, _, status in torch_points] == [(1024, "ok"), (8192, "wrong")]
    assert found["copy", "contiguous"][0][1] == pytest.approx(4 * 65536 / 66536)


def test_roofline_has_a_line_a_provider_and_layout(tmp_path):
    """And one of copies, which have no layout. 64 x 112 x 112 makes groups of 25,088 elements."""
    rows = roofline.read(write(tmp_path / "bench.csv", bench_rows()))
    found = roofline.lines(rows, "group_norm", "forward")
    ours = [("tritonnorm", "contiguous"), ("tritonnorm", "channels_last")]
    theirs = [("torch", "contiguous"), ("torch", "channels_last")]
    assert list(found) == [*ours, *theirs, ("copy", "contiguous")]
    for (provider, layout), speed in zip(ours, (3.9, 1.95), strict=True):
        assert found[provider, layout] == [
            (512 // 32 * 28 * 28, pytest.approx(speed * 512 / 1512), "ok"),
            (64 // 32 * 112 * 112, pytest.approx(speed * 128 / 1128), "ok"),
        ]


def of_predictions(rows, measured):
    """tritonnorm's rows, in microseconds that make 3.8 TB/s, beside what was measured or without."""
    kept = []
    for row in rows:
        if row["provider"] == "tritonnorm":
            row = row | {"predicted_us": f"{floor_bytes(read_case(row)) / 3.8e6}", "bound": "bytes"}
            row |= {} if measured else {"gbps": "", "median_us": "", "status": "predicted"}
        if measured or row["provider"] == "tritonnorm":
            kept.append(row)
    return kept


@pytest.mark.parametrize("measured", [True, False])
def test_roofline_draws_the_prediction_as_such(tmp_path, measured):
    """A thin line beside the measurement; alone it is said to be none, in title and caption."""
    pytest.importorskip("matplotlib")
    rows = roofline.read(write(tmp_path / "bench.csv", of_predictions(bench_rows(), measured)))
    figure = roofline.draw(rows, "rows", "bf16")
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    predicted = lines[roofline.PREDICTED]
    assert list(predicted.get_ydata()) == [pytest.approx(3.8)] * 2
    assert ("tritonnorm" in lines) == measured
    (legend,) = figure.legends
    assert "tritonnorm, predicted" in [text.get_text() for text in legend.get_texts()]
    texts = legend.get_title().get_text(), figure.get_supxlabel()
    if measured:
        assert predicted.get_linewidth() < lines["tritonnorm"].get_linewidth()
        assert texts[0] == "Achieved bandwidth in bfloat16"
        assert "thin line is a model's prediction" in texts[1].replace("\n", " ")
    else:
        assert texts[0] == "Predicted, not measured: bandwidth in bfloat16"
        assert "Predicted by a model, not measured." in texts[1]
        assert "Measured" not in texts[1]


def test_roofline_draws_channels_last_dashed(tmp_path):
    pytest.importorskip("matplotlib")
    rows = roofline.read(write(tmp_path / "bench.csv", bench_rows()))
    panel = roofline.draw(rows, "channels", "bf16").axes[0]
    ours = [line.get_linestyle() for line in panel.lines if line.get_label() == "tritonnorm"]
    assert ours == ["-", "--"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda row: {k: v for k, v in row.items() if k not in ("gbps", "date")},
            "no column gbps, date",
        ),
        (lambda row: row | {"gbps": ""}, "no figure"),
        (lambda row: row | case_fields(TINY), "no figure of a tensor of 64 MiB"),
        (lambda row: row | case_fields(TINY) | {"layout": "sideways"}, "no layout 'sideways'"),
        (lambda row: row | {"device": row["provider"]}, "several devices: copy, torch, tritonnorm"),
    ],
)
def test_roofline_refuses_a_csv_it_cannot_draw(change, message, tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "bench.csv", [change(row) for row in bench_rows()])
    assert main(monkeypatch, "roofline", path) == 1
    assert message in capsys.readouterr().err
    assert main(monkeypatch, "roofline", tmp_path / "absent.csv") == 1


def test_every_provider_and_dtype_has_a_style():
    assert set(roofline.STYLES) == {*providers.LOADERS, "copy", roofline.PREDICTED}
    assert set(roofline.TITLES) == set(TORCH) == set(OPERATORS)
    assert {*providers.EPS, *WEIGHT_OPERATORS} == set(OPERATORS)
    assert set(bench.TOLERANCES) == set(DTYPES)
    assert set(roofline.FAMILIES) == {operator.family for operator in OPERATORS.values()}
    assert set(roofline.LAYOUT_STYLES) == set(shapes.LAYOUTS)
