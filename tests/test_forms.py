"""How the sets of channels are held where teams are allowed, and what the model of L2 says of it."""

import pytest

from perf import forms
from perf.devices import DEVICES, MB, find
from perf.shapes import Case
from perf.traffic import tensor_bytes
from tritonnorm.heuristics import l2

GPUS = tuple(device.short for device in DEVICES)
TOO_LARGE = {
    # Channels side by side: 64 of them at all positions of an image, or of the batch, are a unit.
    ("batch_norm", "4x128x1024x1024", "channels_last"): GPUS,
    ("batch_norm", "256x64x112x112", "channels_last"): GPUS,
    ("batch_norm", "64x64x512x512", "channels_last"): GPUS,
    ("instance_norm", "112x64x512x512", "channels_last"): GPUS,
    ("instance_norm", "2x32x128x128x128", "channels_last"): GPUS,
    # One channel of the batch is a unit of 32 MB, 64 MB in the backward pass.
    ("batch_norm", "64x64x512x512", "contiguous"): ("A100", "H100", "H200"),
}
TOO_LARGE_BACKWARD = {
    ("batch_norm", "64x64x512x512", "contiguous"): GPUS,
    ("batch_norm", "4x128x1024x1024", "contiguous"): ("A100",),
    ("group_norm", "1x128x20x256x256", "contiguous"): ("A100", "H100", "H200"),
    ("group_norm", "8x960x64x64", "channels_last"): ("A100",),
}
"""What no team can hold in a third of L2, and where."""

COLUMNS = {("batch_norm", "256x512x7x7", "contiguous")}
"""Batches that are taken as columns, which no team does: two reads that are wide."""


@pytest.mark.parametrize("gpu", GPUS)
def test_every_set_that_fits_is_read_once(gpu):
    """At the shapes at which peers measure: 2T and 3T, but for slabs that cannot fit."""
    for case in forms.cases():
        found = forms.form(case, find(gpu).facts)
        key = case.operator, case.name, case.layout
        large = TOO_LARGE | (TOO_LARGE_BACKWARD if case.direction == "backward" else {})
        least = 2 if case.direction == "forward" else 3
        if key in COLUMNS:
            assert found.name == "split", case
        elif gpu in large.get(key, ()):
            assert found.name == "split", case
            assert found.dram > least + 0.7, case
        else:
            assert found.name in ("resident", "team"), case
            assert found.dram == least, case


@pytest.mark.parametrize("gpu", GPUS)
def test_folds_take_little(gpu):
    """At most 5% of the time of memory, of tensors of 64 MB and more."""
    for case in forms.cases():
        if tensor_bytes(case) >= 64 * 10**6:
            most = 0.05 * forms.memory_ns(case, find(gpu))
            assert forms.fold_ns(case, find(gpu)) <= most, case


def test_a_long_fold_is_noticed():
    """The check above can fail: 16 MB are too few for the folds of as many pieces."""
    case = Case("batch_norm", "backward", (1, 64, 384, 384), "bf16", "channels_last")
    assert forms.fold_ns(case, find("B200")) > 0.05 * forms.memory_ns(case, find("B200"))


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("size", [64 * MB, 400 * MB, 3584 * MB])
def test_chunks_do_not_pay(gpu, size):
    """Why no pass goes chunk by chunk: it waits for the host, and without it for its own launches."""
    split = forms.split_ns(size, size, find(gpu))
    assert forms.chunked_ns(size, size, find(gpu)) > split
    assert forms.chunked_ns(size, size, find(gpu), host=0) > 0.9 * split


def test_what_l2_keeps():
    kept = l2.kept_bytes(find("H100").facts)
    assert 16 * MB <= kept <= 17 * MB
    assert l2.two_reads(kept, kept, kept, backwards=False) == 2 * kept  # all of it is found either way
    assert l2.two_reads(kept + 1, kept + 1, kept, backwards=False) == 3 * (kept + 1)
    assert l2.two_reads(kept + 1, kept + 1, kept) == 3 * (kept + 1) - kept
    assert l2.two_reads(8 * kept, 4 * kept, kept) == 19 * kept
    assert l2.one_read(8 * kept, 4 * kept) == 12 * kept
