"""`python -m perf overhead`: what it times, and what it notices; no time is asserted."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from measuring import main

import tritonnorm.functional as tF
from perf import overhead
from perf.machine import ROOT
from tritonnorm import dispatch
from tritonnorm.launch.common import forget_plans

ON_GPU = torch.cuda.is_available()
BRIEF = ("overhead", "--rounds", "2")

without_gpu = pytest.mark.skipif(ON_GPU, reason="the kernels run there")


def call(operator, direction, shape="tokens"):
    leaves, others = overhead._inputs(operator, overhead.SHAPES[shape], "cpu")
    function = (overhead.with_signatures_of_torch(tF) | overhead.weight_operators(tF.weight_norm))[
        operator
    ]
    return overhead._make_call(function, direction, leaves, others)


def test_every_operator_shape_and_pass_is_printed(monkeypatch, capsys):
    assert main(monkeypatch, *BRIEF) == 0
    lines = capsys.readouterr().out.splitlines()
    for operator in overhead.MEASURED:
        for shape in overhead.SHAPES:
            for direction in overhead.PASSES:
                beginning = f"{operator:<15} {shape:<6} {direction:<18}"
                assert sum(line.startswith(beginning) for line in lines) == 1
    functions = {"layer_norm", "rms_norm", "normalize", "batch_norm", "group_norm", "instance_norm"}
    assert set(overhead.MEASURED) == functions | {"batch_norm_eval", "weight_norm"}


def test_records(monkeypatch, capsys):
    assert main(monkeypatch, *BRIEF, "--operators", "rms_norm", "--json") == 0
    records = json.loads(capsys.readouterr().out)
    assert [(r["shape"], r["direction"]) for r in records] == [
        (shape, direction) for shape in overhead.SHAPES for direction in overhead.PASSES
    ]
    for record in records:
        assert record["ratio"] > 0
        for who in ("ours", "torch"):
            assert 0 < record[who]["p20_us"] <= record[who]["median_us"] <= record[who]["p80_us"]


def test_the_gate_notices_a_slow_function(monkeypatch, capsys):
    """It ends with status 1 only where it is asked to."""
    rms_norm = tF.rms_norm

    def slow(*arguments):
        time.sleep(0.005)
        return rms_norm(*arguments)

    monkeypatch.setattr(tF, "rms_norm", slow)
    options = (*BRIEF, "--operators", "rms_norm")
    assert main(monkeypatch, *options) == 0
    assert "<-" in capsys.readouterr().out
    assert main(monkeypatch, *options, "--gate") == 1
    monkeypatch.setattr(overhead, "LIMIT", float("inf"))
    assert main(monkeypatch, *options, "--gate") == 0


@without_gpu
@pytest.mark.parametrize(
    ("operator", "forward", "both"),
    [
        ("layer_norm", 1, 3),  # backward: the rows, and the fold of the weight's and bias's gradients
        ("rms_norm", 1, 3),
        ("normalize", 1, 2),
        ("batch_norm", 3, 7),  # moments, their fold, y; sums, their fold, dx; the parameters' fold
        ("batch_norm_eval", 1, 3),
        ("group_norm", 1, 3),
        ("instance_norm", 1, 3),
        ("weight_norm", 1, 2),
    ],
)
@pytest.mark.parametrize("shape", overhead.SHAPES)
def test_the_launcher_is_called_and_no_kernel_runs(operator, forward, both, shape):
    """A call that comes again, with its launches planned already, makes as many."""
    for direction, launches in zip(overhead.PASSES, (forward, both), strict=True):
        once = call(operator, direction, shape)
        assert len(overhead.launches_of(once)) == launches
        assert len(overhead.launches_of(once)) == launches
    # torch.empty is filled with NaN here (conftest.py): nothing has written to the result.
    with overhead.kernel_path(overhead.do_nothing):
        result = call(operator, "forward", shape)()
    assert result.isnan().all()


@without_gpu
def test_the_paths_of_the_library_are_as_before(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with overhead.kernel_path(overhead.do_nothing):
        assert dispatch.INTERPRETED
    assert not dispatch.INTERPRETED
    with pytest.raises(ZeroDivisionError), overhead.kernel_path(lambda *_: 1 / 0):
        call("rms_norm", "forward")()
    assert not dispatch.INTERPRETED
    assert not call("rms_norm", "forward")().isnan().any()


@without_gpu
def test_tritons_part_is_timed_where_it_compiles():
    """In a process without the interpreter; kernels are not compiled for it either."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "perf", *BRIEF, "--operators", "layer_norm", "--json"]
    found = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    for record in json.loads(found.stdout):
        assert record["launches"] == (1 if record["direction"] == "forward" else 3)
        assert record["triton_us"] > 0


def launched(x, dy, function):
    """The arguments of every launch of a forward and backward pass, tensors by their strides."""

    def plain(value):
        return value.stride() if isinstance(value, torch.Tensor) else value

    def both():
        leaf = x.detach().requires_grad_()
        torch.autograd.grad(function(leaf), leaf, dy)

    return [
        (kernel.__name__, grid, {name: plain(value) for name, value in arguments.items()})
        for kernel, grid, arguments in overhead.launches_of(both)
    ]


CHANNELS = {
    "batch_norm": lambda x, eps=1e-5: tF.batch_norm(x, None, None, training=True, eps=eps),
    "group_norm": lambda x, eps=1e-5: tF.group_norm(x, 2, eps=eps),
    "instance_norm": lambda x, eps=1e-5: tF.instance_norm(x, eps=eps),
}
ROWS = {
    "layer_norm": lambda x, eps=1e-5: tF.layer_norm(x, x.shape[-1:], eps=eps),
    "rms_norm": lambda x, eps=1e-5: tF.rms_norm(x, x.shape[-2:], eps=eps),
    "normalize": lambda x, eps=1e-5: tF.normalize(x, eps=eps),
}
WEIGHTS = {  # which have no eps
    "weight_norm": lambda x, eps=1: tF.weight_norm(
        x, x.new_ones(x.shape[0] if eps == 1 else 1, 1, 1, 1), dim=0 if eps == 1 else None
    ),
}


@without_gpu
@pytest.mark.parametrize("name", [*CHANNELS, *ROWS, *WEIGHTS])
def test_plans_depend_on_all_that_launches_depend_on(name):
    """Launches that are planned after others of similar tensors are those of a first call."""
    function = (CHANNELS | ROWS | WEIGHTS)[name]
    x = torch.randn(4, 8, 6, 10)
    buffer = torch.randn(x.numel() + 1)
    variants = [
        x,
        x.double(),
        x.half(),
        x.contiguous(memory_format=torch.channels_last),
        torch.randn(4, 16, 6, 10)[:, ::2],
        torch.randn(4, 8, 6, 20)[..., ::2],  # no view: it is copied
        buffer[1:].view(x.shape),  # of less alignment
        x.view(4, 8, 10, 6),
        x[:2],
        x[:, :4],
    ]
    calls = [
        (variant, gradient, options)
        for variant in variants
        for gradient in (torch.randn_like(variant), torch.randn(variant.shape, dtype=variant.dtype))
        for options in ({}, {"eps": 1e-3})
    ]
    forget_plans()
    together = [launched(v, g, lambda y, o=o: function(y, **o)) for v, g, o in calls]
    for arguments, (variant, gradient, options) in zip(together, calls, strict=True):
        forget_plans()
        assert launched(variant, gradient, lambda y, o=options: function(y, **o)) == arguments
