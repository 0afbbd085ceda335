"""What the tests of the measuring tools share: small cases, a timer without a clock, commands."""

import csv
import sys
from functools import partial

import pytest
import torch

from perf import __main__ as perf_main
from perf import bench
from perf.providers import operators_of_torch
from perf.shapes import (
    BATCH_OPERATORS,
    CHANNEL_OPERATORS,
    OPERATORS,
    PASSES,
    SINGLE_WEIGHT_OPERATORS,
    ShapeSet,
)
from perf.table import Table
from perf.timer import Timing

ON_GPU = torch.cuda.is_available()
RUN = {"device": "NVIDIA H200", "tritonnorm_version": "0.1.0", "command": "python -m perf bench"}
TORCH = operators_of_torch()


def small_cases(dtype):
    """Every operator and pass in every layout, each in chunks of a reference of 256 elements; but one
    norm of all is in one."""
    sets = [
        ShapeSet("rows", ((33, 64),)),
        ShapeSet("without anything spatial", ((5, 64),), BATCH_OPERATORS),
        ShapeSet("images", ((3, 64, 5, 3),), CHANNEL_OPERATORS),
        ShapeSet("lines and volumes", ((3, 8, 12), (2, 8, 3, 2, 5)), CHANNEL_OPERATORS, groups=4),
        ShapeSet("weights", ((33, 64), (9, 16, 3, 3)), SINGLE_WEIGHT_OPERATORS),
        ShapeSet("layers", ((3, 9, 16, 3),), ("weight_norms",)),
    ]
    return bench.make_cases(OPERATORS, PASSES, [dtype], sets)


def by_label(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.label)


def fake_timer(call):
    """A timer without a clock: the call runs, and takes 40 microseconds."""
    call()
    return Timing(median_us=40.0, p20_us=39.0, p80_us=41.0, host_us=5.0)


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["perf", *map(str, arguments)])
    return perf_main.main()


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def measured(path, measured_providers, cases, resume=False, seconds=100, predictions=None):
    table, measure_case = Table(path, RUN, resume), partial(bench.measure_case, predictions=predictions)
    bench.measure(cases, measured_providers, fake_timer, "cpu", table, seconds, measure_case)
    return read(path)
