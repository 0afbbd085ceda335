"""The demo's pieces, in a few steps: its text, its two runs, its verdict and its plot."""

from dataclasses import replace
from unittest.mock import patch

import pytest

import tritonnorm as tn
from perf import demo

SIZE = replace(demo.INTERPRETER, layers=1, batch=1, context=16, steps=3)
LAYER_NORMS = 2 * SIZE.layers + 1


@pytest.fixture(scope="module")
def our_layer_norm():
    with patch.object(tn.functional, "layer_norm", wraps=tn.functional.layer_norm) as spy:
        yield spy


@pytest.fixture(scope="module")
def runs(our_layer_norm, device):
    return demo.compare(SIZE, demo.corpus(), device)


def test_corpus_is_text_of_this_repository():
    text = bytes(demo.corpus().tolist()).decode()
    assert "Apache License" in text
    assert "x_hat" in text


def test_model_has_both_kinds_of_norm():
    report = tn.convert(demo.seeded_model(SIZE))
    kinds = {entry.cls.rpartition(".")[2] for entry in report.replaced}
    assert kinds == {"LayerNorm", "RMSNorm"}
    assert not report.left


def test_both_runs_agree(runs):
    theirs, ours = runs
    assert len(theirs.losses) == len(ours.losses) == SIZE.steps
    assert demo.differences(theirs, ours).max() <= demo.TOLERANCE


def test_second_run_alone_uses_our_norms(runs, our_layer_norm):
    """Agreement would mean nothing if both runs took the same operators."""
    assert our_layer_norm.call_count == SIZE.steps * LAYER_NORMS


def falling(steps, to):
    return demo.Run(losses=[5.5 + (to - 5.5) * step / (steps - 1) for step in range(steps)])


def test_faults():
    good = falling(40, to=2.0)
    apart = demo.Run(losses=[*good.losses[:-1], good.losses[-1] + 10 * demo.TOLERANCE])
    nan = demo.Run(losses=[*good.losses[:-1], float("nan")])
    flat = falling(40, to=5.0)
    assert demo.faults(good, good) == []
    assert "differ" in demo.faults(good, apart)[0]
    assert len(demo.faults(good, nan)) == 2
    assert "fell" in demo.faults(flat, flat)[0]


def test_plot_is_written(tmp_path, runs):
    pytest.importorskip("matplotlib")
    files = demo.draw(*runs, tmp_path / "plots")
    assert sorted(file.name for file in files) == ["losses.png", "losses.svg"]
    assert all(file.stat().st_size > 1000 for file in files)


@pytest.mark.parametrize("interpreted", [True, False])
def test_failing_command_is_reported(monkeypatch, runs, tmp_path, interpreted):
    monkeypatch.setattr(demo, "INTERPRETED", interpreted)
    monkeypatch.setattr(demo, "call", lambda command, *_: int(command in ("traffic", "bench")))
    failed = demo.follow_up(*runs, tmp_path)
    assert failed == ["`traffic` failed" if interpreted else "`bench` failed"]
