"""Shapes and strides to views, without a kernel."""

from math import prod

import pytest
import torch

from tritonnorm.views import (
    MOST_POSITIONS,
    WeightView,
    channel_view,
    column_view,
    common_alignment,
    merge,
    row_view,
    weight_view,
)


def offsets(view, tensor=0):
    """The offset of every element of a view, row by row, as the kernels compute them."""
    r0, r1, r2, n = view.strides[tensor]
    index = torch.arange(view.m)
    rows = index // view.r2 // view.r1 * r0 + index // view.r2 % view.r1 * r1 + index % view.r2 * r2
    return rows[:, None] + torch.arange(view.n) * n


@pytest.mark.parametrize(
    ("x", "normalized_dims"),
    [
        (torch.empty(3, 4, 5), 1),
        (torch.empty(3, 4, 5), 2),
        (torch.empty(3, 4, 5), 3),
        (torch.empty(5), 1),
        (torch.empty(2, 1, 5, 1), 2),
        (torch.empty(2, 5, 3, 4, 8)[:, :, 1].transpose(1, 2), 1),
        (torch.empty(2, 6, 3, 4).movedim(1, -1), 1),
        (torch.empty(10, 40)[::2, ::3], 1),
        (torch.empty(1, 8).expand(6, 8), 1),
        (torch.empty(6, 1).expand(6, 8), 1),
        (torch.empty(3, 4, 5, 6)[:, :2, :3], 1),
    ],
)
def test_every_element_is_where_its_strides_say(x, normalized_dims):
    view = row_view(x.shape, normalized_dims, (x.stride(),))
    expected = sum(
        torch.arange(size).view([-1 if d == i else 1 for i in range(x.dim())]) * stride
        for d, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True))
    )
    assert torch.equal(offsets(view), expected.reshape(view.m, view.n))


def test_contiguous_rows_have_one_step():
    """Nothing of the batch's shape reaches the kernel but the number of rows."""
    views = [
        row_view(shape, 1, (torch.empty(shape).stride(),)) for shape in [(6, 8), (2, 3, 8), (1, 6, 1, 8)]
    ]
    assert views[0] == views[1] == views[2]
    assert (views[0].r1, views[0].r2, views[0].strides) == (1, 1, ((8, 0, 0, 1),))


def test_tensors_merge_together_or_not_at_all():
    x, y = torch.empty(3, 4, 8), torch.empty(4, 3, 8).transpose(0, 1)
    view = row_view(x.shape, 1, (x.stride(), y.stride()))
    assert torch.equal(offsets(view, 0), torch.arange(96).view(12, 8))
    assert torch.equal(offsets(view, 1), torch.arange(96).view(4, 3, 8).transpose(0, 1).reshape(12, 8))


def test_rows_next_to_each_other_come_last():
    """Channels of NCHW: the image's size, whose divisibility counts, is R2 whatever the batch is."""
    for batch in (1, 2):
        x = torch.empty(batch, 6, 4, 8).movedim(1, -1)
        view = row_view(x.shape, 1, (x.stride(),))
        assert (view.r2, view.strides[0][2:], view.strided) == (32, (1, 32), True)


@pytest.mark.parametrize(
    "x",
    [
        torch.empty(2, 2, 3, 2, 8).permute(3, 1, 0, 2, 4)[:, :, :, ::2],  # four row dimensions
        torch.empty(3, 4, 6)[:, :, :5],  # two dimensions within the row
    ],
)
def test_no_view(x):
    assert row_view(x.shape, 2 if x.dim() == 3 else 1, (x.stride(),)) is None


def test_merge_drops_dimensions_of_one():
    assert merge((1, 4, 1, 5, 1), [(99, 5, 7, 1, 3)]) == ([20], [[1]])
    assert merge((1, 1), [(4, 2)]) == ([], [[]])


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (torch.empty(4, 64), 16),
        (torch.empty(4, 1000), 8),
        (torch.empty(4, 1001), 1),
        (torch.empty(4, 72)[:, :64], 8),
        (torch.empty(4, 64)[:, 4:36], 4),
        (torch.empty(65)[1:].view(1, 64), 1),
        (torch.empty(1, 64).expand(5, 64), 16),
        (torch.empty(5, 130)[:1, :64], 2),  # one row of a batch whose rows are 130 apart
        (torch.empty(16, 256, 1, 1).flatten(2).transpose(1, 2), 16),  # a dimension of 1 has a step of 1
        (torch.empty(64, 1).t(), 16),
        (torch.empty(64, 4).t(), None),
    ],
)
def test_alignment(x, expected):
    view = row_view(x.shape, 1, (x.stride(),))
    assert common_alignment(view, [x]) == expected


def test_alignment_is_that_of_the_worst_tensor():
    x, y = torch.empty(4, 64), torch.empty(4, 66)[:, :64]
    view = row_view(x.shape, 1, (x.stride(), y.stride()))
    assert common_alignment(view, [x, y]) == 2


IMAGES = torch.empty(2, 6, 4, 8)
LAST = IMAGES.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("over_batch", [False, True])
@pytest.mark.parametrize(
    "x",
    [
        IMAGES,
        LAST,
        IMAGES[:, 1:3],
        LAST[:, 1:3],
        IMAGES[..., ::2],
        IMAGES.transpose(0, 1),
        torch.empty(5, 6),
        torch.empty(5, 6, 1, 1),
        torch.empty(2, 6, 1, 1).to(memory_format=torch.channels_last),
        torch.empty(1, 6, 3),
        torch.empty(3, 1, 5),
        torch.empty(2, 6, 2, 3, 4).to(memory_format=torch.channels_last_3d),
        torch.empty(()).expand(2, 6, 4, 8),
    ],
)
def test_every_element_of_a_channel_view_is_where_its_strides_say(x, over_batch):
    view = channel_view(x.shape, over_batch, (x.stride(),))
    n, c, s = (torch.arange(size) for size in (view.n, view.c, view.s))
    sn, sc, ss = view.strides[0]
    found = n[:, None, None] * sn + c[:, None] * sc + s * ss
    expected = sum(
        torch.arange(size).view([-1 if d == i else 1 for i in range(x.dim())]) * stride
        for d, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True))
    )
    if over_batch and view.n == 1:  # images are positions
        expected = expected.movedim(0, 1)
    assert torch.equal(found, expected.reshape(found.shape))


@pytest.mark.parametrize(
    ("x", "over_batch", "adjacent", "alignment"),
    [
        (IMAGES, False, "s", 16),
        (LAST, False, "c", 2),
        (IMAGES[1:], False, "s", 16),
        (LAST[1:], True, "c", 2),
        (torch.empty(2, 64, 7, 7), False, "s", 1),
        (torch.empty(2, 64, 7, 7).to(memory_format=torch.channels_last), False, "c", 16),
        (torch.empty(2, 320, 14, 14), True, "s", 4),
        (torch.empty(5, 64), True, "c", 16),
        (torch.empty(5, 64, 1, 1), False, "c", 16),
        (LAST[:, 1:5], False, "c", 2),
        (IMAGES[..., ::2], False, None, None),
        (torch.empty(()).expand(2, 6, 4, 8), False, None, None),
    ],
)
def test_adjacent_dimension(x, over_batch, adjacent, alignment):
    view = channel_view(x.shape, over_batch, (x.stride(),))
    assert (view.adjacent, view.alignment) == (adjacent, alignment)


def test_images_are_positions_where_one_step_leads_through_both():
    assert channel_view(LAST.shape, True, (LAST.stride(),)).n == 1
    assert channel_view(LAST.shape, False, (LAST.stride(),)).n == 2
    assert channel_view(IMAGES.shape, True, (IMAGES.stride(),)).n == 2
    assert channel_view((5, 6), True, ((6, 1),)).s == 5
    assert channel_view(LAST.shape, True, (LAST.stride(), IMAGES.stride())).n == 2


def test_tensors_of_two_memory_formats_have_no_adjacent_dimension():
    view = channel_view(LAST.shape, False, (LAST.stride(), IMAGES.stride()))
    assert view.adjacent is None


@pytest.mark.parametrize("x", [IMAGES[..., 1:-1], IMAGES.transpose(2, 3)])
def test_no_channel_view(x):
    assert channel_view(x.shape, False, (x.stride(),)) is None


def test_images_are_not_merged_to_more_positions_than_int32_holds():
    for images, merged in ((2**20 - 1, 1), (2**20, 2**20)):
        view = channel_view((images, 4, 1024), True, ((4096, 1, 4),))
        assert view.n == merged


@pytest.mark.parametrize(
    ("x", "alignment"),
    [(torch.empty(5, 16, 7, 7), 16), (torch.empty(5, 8, 3)[::2], 8), (torch.empty(5, 9, 3)[:, 1:], 1)],
)
def test_columns(x, alignment):
    """Every position of every channel is a column, whose positions are the images."""
    n, c, s = x.shape[0], x.shape[1], prod(x.shape[2:])
    view = column_view(channel_view(x.shape, True, (x.stride(), x.stride())))
    assert (view.n, view.c, view.s, view.columns) == (1, c * s, n, s)
    assert view.strides == ((x.stride(0), 1, x.stride(0)),) * 2
    assert (view.adjacent, view.alignment) == ("c", alignment)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((5, 6, 4), ((48, 8, 1),)),  # a gap behind every channel
        ((5, 6, 4), ((24, 4, 1), (4, 20, 1))),  # channels outside of images
        ((MOST_POSITIONS, 6, 4), ((24, 4, 1),)),
        ((5, MOST_POSITIONS // 4, 4), ((MOST_POSITIONS, 4, 1),)),
    ],
)
def test_no_columns(shape, strides):
    assert column_view(channel_view(shape, True, strides)) is None


@pytest.mark.parametrize(
    ("v", "dim", "expected"),
    [
        (torch.empty(4, 3, 5), 0, (1, 4, 15, "s")),
        (torch.empty(4, 3, 5), 1, (4, 3, 5, "s")),
        (torch.empty(4, 3, 5), 2, (1, 5, 12, "c")),
        (torch.empty(4, 3, 5), None, (1, 1, 60, "s")),
        (torch.empty(4), 0, (1, 4, 1, "s")),
        (torch.empty(1, 4, 1), 0, (1, 1, 4, "s")),
        (torch.empty(1, 4, 1), 1, (1, 4, 1, "s")),
        (torch.empty(4, 3, 5, 5).to(memory_format=torch.channels_last), 0, (1, 4, 75, "s")),
        (torch.empty(4, 3, 5, 5).to(memory_format=torch.channels_last), 1, (1, 3, 100, "c")),
        (torch.empty(3, 4).T, 0, (1, 4, 3, "c")),
        (torch.empty(()), None, (1, 1, 1, "s")),
    ],
)
def test_weights(v, dim, expected):
    assert weight_view(v.shape, v.stride(), dim) == WeightView(*expected)
    line = expected[2] if expected[3] == "s" else expected[1]
    assert weight_view(v.shape, v.stride(), dim).line == line


@pytest.mark.parametrize(
    "v", [torch.empty(4, 6)[:, ::2], torch.empty(4, 6)[:, :3], torch.empty(1, 6).expand(4, 6)]
)
def test_weights_with_gaps_have_no_view(v):
    assert weight_view(v.shape, v.stride(), 0) is None
