"""The demo's pieces, in a few steps: what is learned, the two runs, the verdict and the plot."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

import tritonnorm as tn
from perf import convnet, demo, gpt

STEPS = 3
TEXT_SIZE = replace(demo.INTERPRETER[0], layers=1, batch=1, context=16, steps=STEPS)
IMAGE_SIZE = replace(demo.INTERPRETER[1], steps=STEPS)
EXPERIMENTS = demo.experiments(TEXT_SIZE, IMAGE_SIZE)
GPT, BATCH_NORM, GROUP_NORM = EXPERIMENTS
FUNCTIONS = ("layer_norm", "batch_norm", "group_norm")  # one an experiment, of three modules each
KINDS = ({"LayerNorm", "RMSNorm"}, {"BatchNorm2d"}, {"GroupNorm"})


@pytest.fixture(scope="module")
def calls():
    """The inputs of our functions, as `(function, channels_last)`."""
    recorded = []

    def recording(name):
        function = getattr(tn.functional, name)

        def record(x, *arguments, **options):
            channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
            recorded.append((name, channels_last))
            return function(x, *arguments, **options)

        return record

    with patch.multiple(tn.functional, **{name: recording(name) for name in FUNCTIONS}):
        yield recorded


@pytest.fixture(scope="module")
def comparisons(calls, device):
    return [demo.compare(experiment, device) for experiment in EXPERIMENTS]


def test_corpus_is_text_of_this_repository():
    text = bytes(gpt.corpus().tolist()).decode()
    assert "Apache License" in text
    assert "x_hat" in text


def test_passages_are_followed_by_their_targets():
    text = torch.arange(1000)
    inputs, targets = gpt.passages(text, TEXT_SIZE, torch.Generator())
    assert inputs.shape == (TEXT_SIZE.batch, TEXT_SIZE.context)
    assert torch.equal(targets, inputs + 1)


def test_gratings_lie_in_their_directions():
    """Without noise an image does not change along its waves."""
    size = replace(IMAGE_SIZE, batch=64)
    with patch.object(convnet, "NOISE", 0):
        images, directions = convnet.gratings(size, torch.Generator().manual_seed(0))
    assert images.shape == (64, convnet.COLORS, size.pixels, size.pixels)
    assert set(directions.tolist()) == set(range(convnet.DIRECTIONS))
    along = {0: (1, 0), 1: (1, -1), 2: (0, 1), 3: (1, 1)}  # rows and columns
    for image, direction in zip(images, directions.tolist(), strict=True):
        moved = image.roll(along[direction], (1, 2))
        torch.testing.assert_close(moved[:, 1:-1, 1:-1], image[:, 1:-1, 1:-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("experiment", "kinds"), list(zip(EXPERIMENTS, KINDS, strict=True)))
def test_all_norms_are_converted(experiment, kinds):
    report = tn.convert(experiment.seeded_model())
    assert {entry.cls.rpartition(".")[2] for entry in report.replaced} == kinds
    assert not report.left


def test_both_runs_agree(comparisons):
    for comparison in comparisons:
        assert len(comparison.theirs.losses) == len(comparison.ours.losses) == STEPS
        assert comparison.differences().max() <= demo.TOLERANCE
        assert comparison.evaluation_difference() <= demo.TOLERANCE
        assert comparison.statistics_difference() <= demo.STATISTICS_TOLERANCE
        assert comparison.theirs.right == comparison.ours.right


def test_second_run_alone_uses_our_norms(comparisons, calls):
    """Agreement would mean nothing if both runs took the same operators."""
    names = [name for name, _ in calls]
    assert {name: names.count(name) for name in FUNCTIONS} == dict.fromkeys(
        FUNCTIONS, 3 * (STEPS + demo.EVALUATION)
    )


def test_one_convnet_is_channels_last(comparisons, calls):
    assert {last for name, last in calls if name == "batch_norm"} == {True}
    assert {last for name, last in calls if name == "group_norm"} == {False}


def test_running_statistics_are_compared(comparisons):
    gpt_runs, batch_norm, group_norm = comparisons
    assert not gpt_runs.ours.buffers
    assert not group_norm.ours.buffers
    buffers = batch_norm.ours.buffers
    assert {name.rpartition(".")[2] for name in buffers} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }
    biased = replace(
        batch_norm.ours, buffers=buffers | {"norm.running_var": 0.99 * buffers["norm.running_var"]}
    )
    assert 0.005 < replace(batch_norm, ours=biased).statistics_difference() < 0.015


def falling(to, steps=40):
    return demo.Run(
        losses=[5.5 + (to - 5.5) * step / (steps - 1) for step in range(steps)],
        buffers={"mean": torch.tensor([1.0, -2.0])},
        evaluation=to,
    )


NAN = float("nan")
GOOD = falling(to=2.0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"losses": [*GOOD.losses[:-1], GOOD.losses[-1] + 10 * demo.TOLERANCE]}, ["the losses differ"]),
        ({"losses": [*GOOD.losses[:-1], NAN]}, ["the losses differ", "the loss fell"]),
        ({"evaluation": GOOD.evaluation + 10 * demo.TOLERANCE}, ["in evaluation"]),
        ({"evaluation": NAN}, ["in evaluation"]),
        ({"buffers": {"mean": torch.tensor([1.001, -2.0])}}, ["running statistics"]),
        ({"buffers": {"mean": torch.tensor([NAN, -2.0])}}, ["running statistics"]),
    ],
)
def test_faults(changes, expected):
    found = demo.faults(demo.Comparison(GPT, GOOD, replace(GOOD, **changes)))
    assert len(found) == len(expected)
    for fault, beginning in zip(found, expected, strict=True):
        assert fault.startswith(f"{GPT.name}: {beginning}")


def test_a_loss_that_hardly_falls_is_a_fault():
    flat = falling(to=5.0)
    (fault,) = demo.faults(demo.Comparison(GPT, flat, flat))
    assert "the loss fell by 8%" in fault


def test_plot_is_written(tmp_path, comparisons):
    pytest.importorskip("matplotlib")
    files = demo.draw(comparisons, tmp_path / "plots")
    assert sorted(file.name for file in files) == ["losses.png", "losses.svg"]
    assert all(file.stat().st_size > 1000 for file in files)


@pytest.mark.parametrize("interpreted", [True, False])
def test_failing_command_is_reported(monkeypatch, comparisons, tmp_path, interpreted):
    monkeypatch.setattr(demo, "INTERPRETED", interpreted)
    monkeypatch.setattr(demo, "call", lambda command, *_: int(command in ("traffic", "bench")))
    failed = demo.follow_up(comparisons, tmp_path)
    assert failed == ["`traffic` failed" if interpreted else "`bench` failed"]
