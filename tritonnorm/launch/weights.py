"""Launches of weight normalization, of one tensor or of many at once.

The norms of a tensor lie along a dimension `dim`, or where that is None there is one. What is written
has the strides of what is read; tensors with gaps, or that overlap themselves, are copied first.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import ceil

import torch

from .. import heuristics
from ..dtypes import compute_dtype
from ..kernels import weight as weight_kernels
from ..views import WeightView, memory_order, weight_view
from .common import FP_FUSION, Kernel, on_device, planned
from .pieces import in_pieces

weight_backward = Kernel(weight_kernels.weight_backward)
weight_forward = Kernel(weight_kernels.weight_forward)
weight_gradient_sums = Kernel(weight_kernels.weight_gradient_sums)
weight_input_gradient = Kernel(weight_kernels.weight_input_gradient)
weight_normalize = Kernel(weight_kernels.weight_normalize)
weight_squares = Kernel(weight_kernels.weight_squares)

SIZES = ("N", "C", "S", "IMAGES", "STEPS")

_captured = []
"""Tables in host memory that a CUDA graph copies again whenever it is replayed. They stay, some
kilobytes a captured launch, for as long as the process: no graph tells when it ends."""


@dataclass(frozen=True)
class _Plan:
    """How a tensor is cut. Tensors of one `kind` can share their launches."""

    view: WeightView
    alignment: int
    programs: int
    tile: tuple[int, int]
    pieces: heuristics.channels.Pieces | None  # None for channels that are resident
    kind: tuple

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The sizes that the kernels take."""
        view, pieces = self.view, self.pieces
        if pieces is None:
            return dict(C=view.c, S=view.s)
        return dict(N=view.n, C=view.c, S=view.s, IMAGES=pieces.images, STEPS=pieces.steps)


def _plan(x, dim, activations, choose, kind) -> _Plan:
    """The plan of x, with accesses as wide as the addresses of all `activations` allow; `kind` is what
    else its launches depend on."""
    bits = 0
    for t in activations:
        bits |= t.data_ptr()
    aligned = bits % heuristics.common.WORD_BYTES == 0
    kind = x.device, x.dtype, *kind
    return _make_plan(x.shape, x.stride(), dim, x.element_size(), aligned, choose, kind)


@planned
def _make_plan(shape, strides, dim, itemsize, aligned, choose, kind) -> _Plan:
    view, word = weight_view(shape, strides, dim), heuristics.common.WORD_BYTES
    wide = aligned and view.line * itemsize % word == 0
    alignment = word // itemsize if wide else 1
    kind = (*kind, alignment)
    if view.n == 1 and view.adjacent == "s":
        forward = choose is heuristics.channels.channel_forward
        choices = heuristics.weights
        resident = choices.WEIGHT_FORWARD_RESIDENT if forward else choices.WEIGHT_BACKWARD_RESIDENT
        tile = choices.weight_tile(view.s, itemsize, resident, wide)
        if tile is not None:
            return _Plan(view, alignment, ceil(view.c / tile[0]), tile, None, kind)
    pieces = choose(view.n, view.c, view.s, itemsize, view.adjacent, over_batch=True)
    programs, tile = pieces.programs(view.n, view.c, view.s), (pieces.block_c, pieces.block_s)
    return _Plan(view, alignment, programs, tile, pieces, (*kind, tile, view.adjacent, pieces.num_warps))


def _of_one_kind(plans):
    """The numbers of the tensors whose plans are of the same kind, a list a kind."""
    if len(plans) == 1:
        return ([0],)
    kinds = {}
    for number, plan in enumerate(plans):
        kinds.setdefault(plan.kind, []).append(number)
    return kinds.values()


def _table(plans, operands, device):
    """The table of kernels/weight.py."""
    rows = [[0, *accumulate(plan.programs for plan in plans[:-1])]]
    rows += [[plan.sizes.get(size, 0) for plan in plans] for size in SIZES]
    for tensors in operands.values():
        if tensors is None:
            rows.append([0] * len(plans))
        else:
            first, itemsize = tensors[0].data_ptr(), tensors[0].element_size()
            rows.append([(t.data_ptr() - first) // itemsize for t in tensors])
    table = torch.tensor(rows, dtype=torch.int64, device="cpu")
    if device.type == "cuda":
        table = table.pin_memory()
        if torch.cuda.is_current_stream_capturing():
            _captured.append(table)
        table = table.to(device, non_blocking=True)
    return table


def _launch(kernel, plans, operands, **constants):
    """Launches a kernel on tensors of one kind. `operands` are its tensors in its order, a list each or
    None."""
    first = plans[0]
    table, sizes = None, first.sizes
    if len(plans) > 1:
        table = _table(plans, operands, first.kind[0])
        table.operands = operands  # for who observes launches: no argument has all of them
        sizes = dict.fromkeys(sizes, 0)
    if first.pieces is None:
        constants |= dict(
            TILES=tuple(sorted({plan.tile for plan in plans})),
            num_warps=heuristics.weights.WEIGHT_WARPS,
            maxnreg=heuristics.common.WIDE_REGISTERS,
        )
    else:
        constants |= dict(ADJACENT=first.view.adjacent, **in_pieces(first.pieces))
    kernel[(sum(plan.programs for plan in plans),)](
        **{f"{name}_ptr": None if tensors is None else tensors[0] for name, tensors in operands.items()},
        table_ptr=table,
        TENSORS=len(plans),
        BLOCK_T=1 << (len(plans) - 1).bit_length(),
        ALIGN=first.alignment,
        **(constants | sizes),
        **FP_FUSION,
    )


def _partials(plans, xs):
    """A partial result `[pieces, C]` of each tensor."""

    def partial(view, pieces, x):
        shape = pieces.count(view.n, view.s), view.c
        return torch.empty(shape, dtype=compute_dtype(x), device=x.device)

    return [partial(plan.view, plan.pieces, x) for plan, x in zip(plans, xs, strict=True)]


def _fold_step(plan, x) -> int:
    return heuristics.weights.weight_fold(plan.tile[0], x.element_size())


def is_dense(x) -> bool:
    """Whether the elements of x lie, in some order of its dimensions, without gaps."""
    return memory_order(x.shape, x.stride()) is not None


def _dense(x):
    return x if is_dense(x) else x.contiguous()


def _as_strided_as(x, like):
    """x with the strides of `like`, but for dimensions of one element."""
    steps = zip(x.shape, x.stride(), like.stride(), strict=True)
    if all(size == 1 or step == other for size, step, other in steps):
        return x
    return torch.empty_like(like).copy_(x)


def weights_forward(xs, gains, dims, *, save_statistics):
    """y = gain * x / ||x|| of each x, none of them empty, and its norms `[C]`, None unless
    `save_statistics`. A gain has as many elements as there are norms, contiguous."""
    xs = [_dense(x) for x in xs]
    ys = [torch.empty_like(x) for x in xs]
    plans = [
        _plan(x, dim, (x, y), heuristics.channels.channel_forward, (gain.dtype,))
        for x, y, gain, dim in zip(xs, ys, gains, dims, strict=True)
    ]
    spreads = [
        torch.empty(plan.view.c, dtype=compute_dtype(x), device=x.device) if save_statistics else None
        for plan, x in zip(plans, xs, strict=True)
    ]
    for numbers in _of_one_kind(plans):
        x, y, gain, spread, plan = (
            [tensors[i] for i in numbers] for tensors in (xs, ys, gains, spreads, plans)
        )
        outputs = dict(x=x, y=y, gain=gain, spread=spread if save_statistics else None)
        with on_device(x[0]):
            if plan[0].pieces is None:
                _launch(weight_forward, plan, outputs)
                continue
            partial = _partials(plan, x)
            _launch(weight_squares, plan, dict(x=x, squares_partial=partial))
            fold = _fold_step(plan[0], x[0])
            _launch(weight_normalize, plan, dict(**outputs, squares_partial=partial), BLOCK_P=fold)
    return ys, spreads


def weights_backward(dys, xs, gains, spreads, dims, needs_dx, needs_dgain):
    """dx and dgain of each x; None for those that are not needed."""
    xs = [_dense(x) for x in xs]
    dys = [_as_strided_as(dy, x) for dy, x in zip(dys, xs, strict=True)]
    dxs = [torch.empty_like(x) if needed else None for x, needed in zip(xs, needs_dx, strict=True)]
    # Of float64 input dgain is left in float64: Triton's interpreter casts it wrongly to 16 bits.
    dgains = [
        torch.empty_like(gain, dtype=torch.float64 if x.dtype == torch.float64 else gain.dtype)
        if needed
        else None
        for x, gain, needed in zip(xs, gains, needs_dgain, strict=True)
    ]
    plans = [
        _plan(
            x,
            dim,
            (x, dy) if dx is None else (x, dy, dx),
            heuristics.channels.channel_backward,
            (gain.dtype, dx is None, dgain is None),
        )
        for x, dy, dx, gain, dgain, dim in zip(xs, dys, dxs, gains, dgains, dims, strict=True)
    ]
    for numbers in _of_one_kind(plans):
        dy, x, gain, spread, dx, dgain, plan = (
            [tensors[i] for i in numbers] for tensors in (dys, xs, gains, spreads, dxs, dgains, plans)
        )
        inputs = dict(dy=dy, x=x, gain=gain, spread=spread)
        dx, dgain = (None if tensors[0] is None else tensors for tensors in (dx, dgain))
        with on_device(x[0]):
            if plan[0].pieces is None:
                _launch(weight_backward, plan, dict(**inputs, dx=dx, dgain=dgain))
                continue
            partial = _partials(plan, x)
            _launch(weight_gradient_sums, plan, dict(dy=dy, x=x, spread=spread, dgain_partial=partial))
            outputs = dict(**inputs, dgain_partial=partial, dx=dx, dgain=dgain)
            _launch(weight_input_gradient, plan, outputs, BLOCK_P=_fold_step(plan[0], x[0]))
    return dxs, [d if d is None else d.to(gain.dtype) for d, gain in zip(dgains, gains, strict=True)]
