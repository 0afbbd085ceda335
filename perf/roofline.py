"""Draws a CSV of `bench`: achieved bandwidth against row length, beside a copy and the datasheet.

A panel is one operator and direction, a line one provider. Drawn are cases of tensors large enough
that memory and not the launch takes the time, and at each row length the one with the most rows. Every
figure is the CSV's, but for the datasheet's ceiling, a line if the device is known.
"""

import argparse
import csv
import sys
from math import nan
from pathlib import Path
from textwrap import fill

from .shapes import DTYPES, OPERATORS, PASSES

REQUIRED = (
    *("operator", "direction", "m", "n", "dtype", "provider", "provider_version", "gbps", "status"),
    *("device", "driver_version", "cuda_version", "torch_version", "triton_version"),
    *("tritonnorm_version", "date"),
)

DATASHEET_GBPS = {
    "NVIDIA A10": 600,
    "NVIDIA A10G": 600,
    "NVIDIA A100-PCIE-40GB": 1555,
    "NVIDIA A100-SXM4-40GB": 1555,
    "NVIDIA A100 80GB PCIe": 1935,
    "NVIDIA A100-SXM4-80GB": 2039,
    "NVIDIA B200": 8000,
    "NVIDIA GB200": 8000,
    "NVIDIA GeForce RTX 3090": 936,
    "NVIDIA GeForce RTX 4090": 1008,
    "NVIDIA GeForce RTX 5090": 1792,
    "NVIDIA H100 80GB HBM3": 3350,
    "NVIDIA H100 NVL": 3900,
    "NVIDIA H100 PCIe": 2000,
    "NVIDIA H200": 4800,
    "NVIDIA L4": 300,
    "NVIDIA L40S": 864,
    "NVIDIA RTX 6000 Ada Generation": 960,
    "NVIDIA RTX A6000": 768,
}
"""Bandwidth of the device memory as the datasheet states it, GB/s, by the name that CUDA gives."""

TITLES = {"layer_norm": "LayerNorm", "rms_norm": "RMSNorm", "normalize": "L2 normalize"}
DTYPE_NAMES = {name: str(dtype).removeprefix("torch.") for name, dtype in DTYPES.items()}

STYLES = {
    "tritonnorm": dict(color="#d55e00", linewidth=2.6, marker="o", markersize=5, zorder=5),
    "torch": dict(color="#0072b2", linewidth=1.3, marker="s", markersize=3.5),
    "torch.compile": dict(color="#56b4e9", linewidth=1.3, marker="D", markersize=3.5),
    "liger": dict(color="#009e73", linewidth=1.3, marker="^", markersize=4),
    "fla": dict(color="#cc79a7", linewidth=1.3, marker="v", markersize=4),
    "quack": dict(color="#000000", linewidth=1.3, marker="P", markersize=4),
    "copy": dict(color="#666666", linewidth=1.3, linestyle=(0, (4, 2))),
}
"""Colours of Okabe and Ito's palette, told apart by readers of any colour vision, and by markers."""

LEAST_TENSOR_BYTES = 64 * 2**20
"""Below it, a launch of some microseconds shows in the bandwidth of a fast device."""

GREY = "#666666"
PANEL_WIDTH, PANEL_HEIGHT, LEGEND_ENTRY_WIDTH = 4.0, 2.9, 1.6  # inches
CAPTION_CHARACTERS = 17  # an inch
DPI = 160


def _tensor_bytes(row) -> int:
    return int(row["m"]) * int(row["n"]) * DTYPES[row["dtype"]].itemsize


def read(path: Path) -> list[dict[str, str]]:
    """The rows to be drawn: those with a bandwidth, of large tensors.

    Raises:
        ValueError: a column is missing, there is no such row, or they are of more than one device.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        absent = [name for name in REQUIRED if name not in (reader.fieldnames or ())]
        if absent:
            raise ValueError(f"{path}: not a CSV of `bench`, it has no column {', '.join(absent)}")
        rows = [row for row in reader if row["gbps"] and _tensor_bytes(row) >= LEAST_TENSOR_BYTES]
    if not rows:
        raise ValueError(f"{path}: no figure of a tensor of {LEAST_TENSOR_BYTES >> 20} MiB or more")
    devices = sorted({row["device"] for row in rows})
    if len(devices) > 1:
        raise ValueError(f"{path}: figures of several devices: {', '.join(devices)}")
    return rows


def lines(rows, operator, direction) -> dict[str, list[tuple[int, float, str]]]:
    """Per provider the points (n, TB/s, status) of a panel, by row length."""
    rows = [row for row in rows if (row["operator"], row["direction"]) == (operator, direction)]
    most = {}
    for row in rows:
        most[row["n"]] = max(most.get(row["n"], 0), int(row["m"]))
    found = {}
    for row in rows:
        if int(row["m"]) == most[row["n"]]:
            point = int(row["n"]), float(row["gbps"]) / 1e3, row["status"]
            found.setdefault(row["provider"], []).append(point)
    return {name: sorted(found[name]) for name in STYLES if name in found}


def _length(n: int) -> str:
    return f"{n // 1024}K" if n >= 1024 and n % 1024 == 0 else str(n)


def _points(axes, found) -> None:
    """Draws the lines of one panel; a wrong result's figure is a cross that interrupts its line."""
    for provider, points in found.items():
        style = STYLES[provider]
        lengths = [n for n, _, _ in points]
        right = [value if status == "ok" else nan for _, value, status in points]
        wrong = [value if status == "wrong" else nan for _, value, status in points]
        axes.plot(lengths, right, label=provider, **style)
        axes.plot(lengths, wrong, "x", color=style["color"], markersize=7)


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
    wrong = " A cross is a wrong result." if any(row["status"] == "wrong" for row in rows) else ""
    return (
        f"{first['device']}, {versions}. Measured {first['date'][:10]}.",
        "Bandwidth: bytes that the operator must move, the same for everyone, over the median time, L2 "
        f"flushed. Tensors of {LEAST_TENSOR_BYTES >> 20} MiB or more, at each N the largest.{wrong}",
    )


def _provider_labels(rows) -> dict[str, str]:
    """Names for the legend, with the peers' versions. tritonnorm's and PyTorch's are in the caption."""
    labels = {row["provider"]: f"{row['provider']} {row['provider_version']}" for row in rows}
    known = {"tritonnorm": "tritonnorm", "torch": "PyTorch", "torch.compile": "torch.compile"}
    return labels | known | {"copy": "copy of as many bytes"}


def draw(rows, dtype):
    """The figure of the rows of one dtype.

    matplotlib is imported here, as a GPU machine may be without: it draws nothing, but measures.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    rows = [row for row in rows if row["dtype"] == dtype]
    operators = [name for name in OPERATORS if any(row["operator"] == name for row in rows)]
    directions = [name for name in PASSES if any(row["direction"] == name for row in rows)]
    panels = {(d, o): lines(rows, o, d) for d in directions for o in operators}
    copies = [value for found in panels.values() for _, value, _ in found.get("copy", [])]
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
        axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: _length(round(n))))
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9, color=GREY)
    for axes in grid[-1]:
        axes.set_xlabel("row length N", fontsize=9)
    for axes in grid[:, 0]:
        axes.set_ylabel("TB/s", fontsize=9)

    names = _provider_labels(rows)
    handles = {}
    for axes in grid.flat:
        handles |= {
            label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
    ordered = [name for name in STYLES if name in handles]
    figure.legend(
        [handles[name] for name in ordered],
        [names[name] for name in ordered],
        loc="outside upper left",
        ncols=max(int(width / LEGEND_ENTRY_WIDTH), 1),
        frameon=False,
        fontsize=9,
        title=f"Achieved bandwidth in {DTYPE_NAMES[dtype]}",
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
    parser.add_argument("csv", type=Path, help="what `bench` wrote")
    parser.add_argument("--out", type=Path, help="folder of the plots (default: the CSV's)")


def run(arguments) -> int:
    out = arguments.out or arguments.csv.parent
    try:
        rows = read(arguments.csv)
        out.mkdir(parents=True, exist_ok=True)
        for dtype in DTYPES:
            if any(row["dtype"] == dtype for row in rows):
                for path in save(draw(rows, dtype), out / f"roofline-{dtype}"):
                    print(path)
    except (OSError, ValueError) as error:
        print(f"roofline: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"roofline: {error}; it can be drawn from the CSV on another machine", file=sys.stderr)
        return 1
    return 0
