"""Shapes, strides and memory formats: any tensor as rows, or as channels.

A row view `[M, N]` of a tensor of shape `[*, *normalized_shape]` merges the trailing dimensions into
one of size N with one stride, and the leading ones into at most three of sizes (R0, R1, R2), whose
product is M. A channel view `[N, C, S]` of a tensor `[N, C, *spatial]` merges the spatial dimensions
into S positions. Several tensors of one shape share the sizes and have strides of their own. Contiguous
images whose statistics are those of the batch can be viewed as `[1, C * S, N]`: columns of N positions.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import prod

ROW_LEVELS = 3
MOST_POSITIONS = 2**30
"""Positions and columns, at most, to which images are merged: with a part of them added, int32 holds
them still."""

LARGEST_SET = 2**30
"""Kernels take sets of fewer elements that share statistics, and fewer images in evaluation: their
indices are int32, with room for a last chunk or part."""

LARGEST_ALIGNMENT = 16  # elements: 16 bytes or more, which is as wide as accesses are


@dataclass(frozen=True)
class RowView:
    """Row sizes and, per tensor, the strides (r0, r1, r2, n) in elements.

    `alignment` is the largest power of two, at most 16, that divides the steps between rows; None
    for strided rows, where the compiler finds out by itself.
    """

    m: int
    n: int
    r1: int
    r2: int
    strides: tuple[tuple[int, int, int, int], ...]
    alignment: int | None

    @property
    def strided(self) -> bool:
        """Whether neighbours in a row of the first tensor are apart in memory."""
        return self.strides[0][3] != 1


def merge(shape, strides):
    """Merges neighbouring dimensions wherever every tensor can step through both with one stride.

    `strides` is one tuple a tensor. Returns the merged shape and strides, without dimensions of
    size 1; no dimension at all remains of a single element.

    >>> merge((2, 3, 4), [(12, 4, 1), (24, 8, 2)])
    ([24], [[1], [2]])
    """
    sizes, merged = [], [[] for _ in strides]
    for d, size in enumerate(shape):
        if size == 1:
            continue
        steps = [tensor[d] for tensor in strides]
        if sizes and all(m[-1] == size * step for m, step in zip(merged, steps, strict=True)):
            sizes[-1] *= size
            for m, step in zip(merged, steps, strict=True):
                m[-1] = step
        else:
            sizes.append(size)
            for m, step in zip(merged, steps, strict=True):
                m.append(step)
    return sizes, merged


def _step_alignment(n, row_shape, strides) -> int:
    """The alignment of `RowView`. The step between rows counts even where there is one row only, unless
    it is too small to be one: a slice of a batch has the alignment of the batch."""
    bits = n | LARGEST_ALIGNMENT
    for tensor in strides:
        for size, step in zip(row_shape, tensor, strict=False):
            if size > 1 or step >= n:
                bits |= step
    return bits & -bits


@lru_cache(maxsize=4096)
def row_view(shape, normalized_dims, strides) -> RowView | None:
    """The tensors of `shape` with the given strides, a tuple of tuples, as rows over the last
    `normalized_dims` dimensions; None where they need more row dimensions, or a second one within the
    row. Shapes come again at every step of a training, so answers are kept."""
    split = len(shape) - normalized_dims
    m, n = prod(shape[:split]), prod(shape[split:])
    row_sizes, row_strides = merge(shape[:split], [s[:split] for s in strides])
    n_sizes, n_strides = merge(shape[split:], [s[split:] for s in strides])
    if len(row_sizes) > ROW_LEVELS or len(n_sizes) > 1:
        return None
    n_stride = [s[0] if s else 1 for s in n_strides]
    strided = n_stride[0] != 1

    # Rows that are neighbours in memory go to R2, whose divisibility the compiler knows; of M, which
    # changes from batch to batch, it knows nothing. Otherwise R2 = R1 = 1 wherever that is possible.
    missing = ROW_LEVELS - len(row_sizes)
    if strided and row_sizes:
        sizes = [1] * missing + row_sizes
        padded = [[0] * missing + s for s in row_strides]
    else:
        sizes = row_sizes + [1] * missing
        padded = [s + [0] * missing for s in row_strides]
    return RowView(
        m=m,
        n=n,
        r1=sizes[1],
        r2=sizes[2],
        strides=tuple((*rows, step) for rows, step in zip(padded, n_stride, strict=True)),
        alignment=None if strided else _step_alignment(n, shape[:split], strides),
    )


@dataclass(frozen=True)
class ChannelView:
    """Sizes and, per tensor, the strides (n, c, s) in elements.

    `adjacent` names the dimension along which the elements of every tensor are neighbours in memory: "s"
    (contiguous), "c" (channels_last, or no spatial dimension), or None. `alignment` is the largest power
    of two, at most 16, that divides the steps between such lines, and their length; None without lines.
    A channel of the tensors is `columns` neighbours of the view's c.
    """

    n: int
    c: int
    s: int
    strides: tuple[tuple[int, int, int], ...]
    adjacent: str | None
    alignment: int | None
    columns: int = 1


@lru_cache(maxsize=4096)
def channel_view(shape, over_batch, strides) -> ChannelView | None:
    """The tensors `[N, C, *spatial]` with the given strides, a tuple of tuples, as `[N, C, S]`; None
    where the spatial dimensions of one do not merge. Where statistics are those of a batch
    (`over_batch`), the images are positions as well, N = 1, if one step leads through them too, as in
    channels_last."""
    sizes, merged = merge(shape[2:], [steps[2:] for steps in strides])
    if len(sizes) > 1:
        return None
    n, c, s = shape[0], shape[1], prod(shape[2:])
    if over_batch:
        batch, batch_merged = merge((n, *shape[2:]), [(steps[0], *steps[2:]) for steps in strides])
        if len(batch) < 2 and n * s < MOST_POSITIONS:
            n, s, merged = 1, n * s, batch_merged
    steps = [(full[0], full[1], m[0] if m else 1) for full, m in zip(strides, merged, strict=True)]

    adjacent = alignment = None
    if s > 1 and all(step[2] == 1 for step in steps):
        adjacent, alignment = "s", _step_alignment(s, (n, c), [step[:2] for step in steps])
    elif all(step[1] == 1 for step in steps):
        lines = [(step[0], step[2] if s > 1 else c) for step in steps]
        adjacent, alignment = "c", _step_alignment(c, (n, s), lines)
    return ChannelView(n, c, s, tuple(steps), adjacent, alignment)


def column_view(view: ChannelView) -> ChannelView | None:
    """Images as the positions of one, in which every position of every channel is a column; None where
    something is between the channels in memory, or there is too much of anything."""
    n, c, s = view.n, view.c, view.s
    if max(n, c * s) >= MOST_POSITIONS or any(step[1:] != (s, 1) for step in view.strides):
        return None
    alignment = _step_alignment(c * s, (n,), [step[:1] for step in view.strides])
    strides = tuple((step[0], 1, step[0]) for step in view.strides)
    return ChannelView(1, c * s, n, strides, "c", alignment, columns=s)


@dataclass(frozen=True)
class WeightView:
    """Sizes of a dense tensor as `[N, C, S]`, whose norms are those of its C channels; `adjacent` is
    "s", or "c" where there is one image and its channels are neighbours in memory."""

    n: int
    c: int
    s: int
    adjacent: str

    @property
    def line(self) -> int:
        """Elements that are adjacent in memory."""
        return self.s if self.adjacent == "s" else self.c


def memory_order(shape, strides) -> list[int] | None:
    """The dimensions of a dense tensor from the outermost in memory to the innermost, but those of size
    1; None of a tensor that is not dense: with gaps, or elements that overlap."""
    order = sorted((d for d, size in enumerate(shape) if size != 1), key=lambda d: -strides[d])
    step = 1
    for d in reversed(order):
        if strides[d] != step:
            return None
        step *= shape[d]
    return order


@lru_cache(maxsize=4096)
def weight_view(shape, strides, dim: int | None) -> WeightView | None:
    """A dense tensor with its norms along `dim`, over all other dimensions, or where that is None over
    all; None of one that is not dense.

    >>> weight_view((2, 3, 4), (12, 4, 1), 1)
    WeightView(n=2, c=3, s=4, adjacent='s')
    """
    order = memory_order(shape, strides)
    if order is None:
        return None
    if dim not in order:
        return WeightView(1, 1, prod(shape), "s")
    place = order.index(dim)
    outer, inner = (prod(shape[d] for d in part) for part in (order[:place], order[place + 1 :]))
    if inner == 1 and outer > 1:
        return WeightView(1, shape[dim], outer, "c")
    return WeightView(outer, shape[dim], inner, "s")


def common_alignment(view: RowView | ChannelView, tensors) -> int | None:
    """The largest power of two, at most 16, of which every line of every tensor starts at a multiple,
    in elements of that tensor; None where there are no lines of adjacent elements."""
    if view.alignment is None:
        return None
    bits = view.alignment
    for tensor in tensors:
        bits |= tensor.data_ptr() // tensor.element_size()
    return bits & -bits
