"""Draws a CSV of `bench`: achieved bandwidth against the number of elements that share statistics, a
row's length or a group's size, beside a copy, the datasheet, and what the model predicts. A CSV of
`predict` has nothing but the latter.

A plot is one family of operators in one dtype, a panel one operator and direction, a line one provider
in one layout. Drawn are cases of tensors large enough that memory and not the launch takes the time,
and at each number of elements the largest. Every figure is the CSV's, but for the datasheet's ceiling, a
line if the device is known.
"""

import argparse
import csv
import sys
from math import nan
from pathlib import Path
from textwrap import fill

from .devices import DATASHEET_GBPS
from .shapes import DTYPES, LAYOUTS, OPERATORS, PASSES
from .table import CASE_FIELDS, read_case
from .traffic import floor_bytes, tensor_bytes

REQUIRED = (
    *(*CASE_FIELDS, "provider", "provider_version", "gbps", "status"),
    *("device", "driver_version", "cuda_version", "torch_version", "triton_version"),
    *("tritonnorm_version", "date"),
)

PREDICTED = "predicted"
"""Stands for a provider: tritonnorm's rows have, beside what was measured, what a model predicts."""

FAMILIES = {"rows": "roofline", "channels": "roofline-channels", "weights": "roofline-weights"}
"""The families of operators, and the names of their plots."""

TITLES = {
    "layer_norm": "LayerNorm",
    "rms_norm": "RMSNorm",
    "normalize": "L2 normalize",
    "batch_norm": "BatchNorm",
    "batch_norm_eval": "BatchNorm in evaluation",
    "group_norm": "GroupNorm",
    "instance_norm": "InstanceNorm",
    "weight_norm": "WeightNorm",
    "weight_norm_dim1": "WeightNorm, dim=1",
    "weight_norm_all": "WeightNorm, dim=None",
    "weight_norms": "WeightNorm of many",
}
DTYPE_NAMES = {name: str(dtype).removeprefix("torch.") for name, dtype in DTYPES.items()}

STYLES = {
    "tritonnorm": dict(color="#d55e00", linewidth=2.6, marker="o", markersize=5, zorder=5),
    "tritonnorm.team": dict(color="#e69f00", linewidth=1.8, marker="o", markersize=4, zorder=4),
    "tritonnorm.single": dict(color="#f0e442", linewidth=1.8, marker="o", markersize=4, zorder=4),
    "torch": dict(color="#0072b2", linewidth=1.3, marker="s", markersize=3.5),
    "torch.compile": dict(color="#56b4e9", linewidth=1.3, marker="D", markersize=3.5),
    "liger": dict(color="#009e73", linewidth=1.3, marker="^", markersize=4),
    "fla": dict(color="#cc79a7", linewidth=1.3, marker="v", markersize=4),
    "quack": dict(color="#000000", linewidth=1.3, marker="P", markersize=4),
    "copy": dict(color="#666666", linewidth=1.3, linestyle=(0, (1, 1.5))),
    PREDICTED: dict(color="#000000", linewidth=0.7, zorder=6),
}
"""Colours of Okabe and Ito's palette, told apart by readers of any colour vision, and by markers."""

LAYOUT_STYLES = {"contiguous": {}, "channels_last": dict(linestyle=(0, (4, 2)), markerfacecolor="white")}

LEAST_TENSOR_BYTES = 64 * 2**20
"""Below it, a launch of some microseconds shows in the bandwidth of a fast device."""

GREY = "#666666"
PANEL_WIDTH, PANEL_HEIGHT, LEGEND_ENTRY_WIDTH = 4.0, 2.9, 1.6  # inches
CAPTION_CHARACTERS = 17  # an inch
DPI = 160


def read(path: Path) -> list[dict[str, str]]:
    """The rows to be drawn: those with a bandwidth, measured or predicted, of large tensors.

    Raises:
        ValueError: a column is missing, there is no such row, or they are of more than one device.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        absent = [name for name in REQUIRED if name not in (reader.fieldnames or ())]
        if absent:
            raise ValueError(f"{path}: not a CSV of `bench`, it has no column {', '.join(absent)}")
        rows = list(reader)
    rows = [row for row in rows if row["gbps"]] + _predictions(rows)
    rows = [row for row in rows if tensor_bytes(read_case(row)) >= LEAST_TENSOR_BYTES]
    if not rows:
        raise ValueError(f"{path}: no figure of a tensor of {LEAST_TENSOR_BYTES >> 20} MiB or more")
    devices = sorted({row["device"] for row in rows})
    if len(devices) > 1:
        raise ValueError(f"{path}: figures of several devices: {', '.join(devices)}")
    return rows


def _predictions(rows) -> list[dict[str, str]]:
    """Rows of PREDICTED: bandwidth as it is counted of measurements."""
    return [
        row | {"provider": PREDICTED, "gbps": str(_predicted_gbps(row)), "status": "ok"}
        for row in rows
        if row["provider"] == "tritonnorm" and row.get("predicted_us")
    ]


def _predicted_gbps(row) -> float:
    return floor_bytes(read_case(row)) / float(row["predicted_us"]) / 1e3


def _only_predicted(rows) -> bool:
    """Whether nothing was measured."""
    return all(row["provider"] == PREDICTED for row in rows)


def lines(rows, operator, direction) -> dict[tuple[str, str], list[tuple[int, float, str]]]:
    """The points (elements that share statistics, TB/s, status) of a panel, by provider and layout.

    In every layout the largest tensor of each number of elements is drawn, for all providers the same.
    """
    wanted = (operator, direction)
    cases = [(read_case(row), row) for row in rows if (row["operator"], row["direction"]) == wanted]
    largest = {}
    for case, _ in cases:
        other = largest.setdefault((case.layout, case.set_size), case)
        if case.elements > other.elements:
            largest[case.layout, case.set_size] = case
    found = {}
    for case, row in cases:
        if case == largest[case.layout, case.set_size]:
            layout = LAYOUTS[0] if row["provider"] == "copy" else case.layout  # a copy has none
            points = found.setdefault((row["provider"], layout), {})
            points.setdefault(case.set_size, (float(row["gbps"]) / 1e3, row["status"]))
    return {
        (provider, layout): [(size, *point) for size, point in sorted(found[provider, layout].items())]
        for provider in STYLES
        for layout in LAYOUTS
        if (provider, layout) in found
    }


def _count(n: int) -> str:
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if n >= unit and n % unit == 0:
            return f"{n // unit}{name}"
    return str(n)


def _points(axes, found) -> None:
    """Draws the lines of one panel; a wrong result's figure is a cross that interrupts its line."""
    for (provider, layout), points in found.items():
        style = STYLES[provider] | LAYOUT_STYLES[layout]
        sizes = [size for size, _, _ in points]
        right = [value if status == "ok" else nan for _, value, status in points]
        wrong = [value if status == "wrong" else nan for _, value, status in points]
        axes.plot(sizes, right, label=provider, **style)
        axes.plot(sizes, wrong, "x", color=style["color"], markersize=7)


def _roofs(axes, roofs, labelled) -> None:
    """Draws horizontal lines, from a dict of labels to TB/s; the labels stand right of the panel."""
    for label, value in roofs.items():
        axes.axhline(value, color=GREY, linewidth=0.8, zorder=1)
        if labelled:
            axes.annotate(
                f"{label} {value:.2f}",
                (1.02, value),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=8,
                color=GREY,
            )


def _caption(rows) -> tuple[str, str]:
    """What the figure belongs to, versions and date; and how to read it."""
    first = rows[0]
    versions = ", ".join(
        f"{label} {first[name]}"
        for label, name in (
            ("tritonnorm", "tritonnorm_version"),
            ("PyTorch", "torch_version"),
            ("Triton", "triton_version"),
            ("CUDA", "cuda_version"),
            ("driver", "driver_version"),
        )
        if first[name]
    )
    signs = ""
    if any(row["status"] == "wrong" for row in rows):
        signs += " A cross is a wrong result."
    if any(row["layout"] == "channels_last" for row in rows):
        signs += " Dashed: channels_last."
    if _only_predicted(rows):
        return (
            f"{first['device']}, {versions}. Predicted by a model, not measured.",
            "Bandwidth: bytes that the operator must move, over the predicted time. Tensors of "
            f"{LEAST_TENSOR_BYTES >> 20} MiB or more, the largest at each number of elements.{signs}",
        )
    if any(row["provider"] == PREDICTED for row in rows):
        signs += " The thin line is a model's prediction."
    return (
        f"{first['device']}, {versions}. Measured {first['date'][:10]}.",
        "Bandwidth: bytes that the operator must move, the same for everyone, over the median time, L2 "
        f"flushed. Tensors of {LEAST_TENSOR_BYTES >> 20} MiB or more, the largest at each number of "
        f"elements.{signs}",
    )


def _provider_labels(rows) -> dict[str, str]:
    """Names for the legend, with the versions that are not in the caption: the peers' and cuDNN's."""
    versions = {row["provider"]: row["provider_version"] for row in rows}
    labels = {provider: f"{provider} {version}" for provider, version in versions.items()}
    _, comma, cudnn = versions.get("torch", "").partition(",")
    known = {"tritonnorm": "tritonnorm", "torch": f"PyTorch{comma}{cudnn}"}
    model = {PREDICTED: "tritonnorm, predicted"}
    return labels | known | model | {"torch.compile": "torch.compile", "copy": "copy of as many bytes"}


def _select(rows, family, dtype):
    return [r for r in rows if (OPERATORS[r["operator"]].family, r["dtype"]) == (family, dtype)]


def draw(rows, family, dtype):
    """The figure of a family of operators in one dtype.

    matplotlib is imported here, as a GPU machine may be without: it draws nothing, but measures.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    rows = _select(rows, family, dtype)
    operators = [name for name in OPERATORS if any(row["operator"] == name for row in rows)]
    directions = [name for name in PASSES if any(row["direction"] == name for row in rows)]
    panels = {(d, o): lines(rows, o, d) for d in directions for o in operators}
    copies = [value for found in panels.values() for _, value, _ in found.get(("copy", LAYOUTS[0]), [])]
    roofs = {"best copy": max(copies)} if copies else {}
    if rows[0]["device"] in DATASHEET_GBPS:
        roofs["datasheet"] = DATASHEET_GBPS[rows[0]["device"]] / 1e3

    width, height = PANEL_WIDTH * len(operators) + 1, PANEL_HEIGHT * len(directions) + 1.5
    figure = Figure((width, height), layout="constrained")
    grid = figure.subplots(len(directions), len(operators), sharex=True, sharey=True, squeeze=False)
    for axes, ((direction, operator), found) in zip(grid.flat, panels.items(), strict=True):
        _points(axes, found)
        _roofs(axes, roofs, labelled=axes in grid[:, -1])
        axes.set_visible(bool(found))
        axes.set_title(f"{TITLES[operator]}, {direction}", loc="left", fontsize=11)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(LogLocator(base=4))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: _count(round(n))))
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9, color=GREY)
    for axes in grid[-1]:
        axes.set_xlabel("elements that share statistics", fontsize=9)
    for axes in grid[:, 0]:
        axes.set_ylabel("TB/s", fontsize=9)

    names = _provider_labels(rows)
    handles = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)  # that of the first layout
    ordered = [name for name in STYLES if name in handles]
    title = "Predicted, not measured: bandwidth" if _only_predicted(rows) else "Achieved bandwidth"
    figure.legend(
        [handles[name] for name in ordered],
        [names[name] for name in ordered],
        loc="outside upper left",
        ncols=max(int(width / LEGEND_ENTRY_WIDTH), 1),
        frameon=False,
        fontsize=9,
        title=f"{title} in {DTYPE_NAMES[dtype]}",
        title_fontproperties={"size": 13, "weight": "bold"},
        alignment="left",
    )
    characters = int(width * CAPTION_CHARACTERS)
    caption = "\n".join(fill(line, characters) for line in _caption(rows))
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=7.5, color=GREY)
    return figure


def save(figure, path: Path) -> list[Path]:
    """Writes PNG and SVG. The same figure gives the same files: no date, no random identifiers."""
    from matplotlib import rc_context

    written = [path.with_name(f"{path.name}.{kind}") for kind in ("png", "svg")]
    with rc_context({"svg.hashsalt": path.name}):
        figure.savefig(written[0], dpi=DPI)
        figure.savefig(written[1], metadata={"Date": None})
    return written


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("csv", type=Path, help="what `bench` or `predict` wrote")
    parser.add_argument("--out", type=Path, help="folder of the plots (default: the CSV's)")


def run(arguments) -> int:
    out = arguments.out or arguments.csv.parent
    try:
        rows = read(arguments.csv)
        out.mkdir(parents=True, exist_ok=True)
        for family, name in FAMILIES.items():
            for dtype in DTYPES:
                if _select(rows, family, dtype):
                    for path in save(draw(rows, family, dtype), out / f"{name}-{dtype}"):
                        print(path)
    except (OSError, ValueError) as error:
        print(f"roofline: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"roofline: {error}; it can be drawn from the CSV on another machine", file=sys.stderr)
        return 1
    return 0
