"""What is timed: the inputs of a case, and a provider's call on them; and how far results are from the
float64 reference."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from math import ceil

import torch

from .providers import Provider, operators_of_torch
from .shapes import DTYPES, OPERATORS, Case
from .traffic import floor_bytes

REFERENCE_ELEMENTS = 2**24
"""Elements a step of the float64 reference: 128 MB a tensor."""


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case: x and dy in its shape and layout, parameters in `case.parameter_shape`, and
    running mean and variance `[channels]` where the operator has them."""

    x: torch.Tensor
    parameters: tuple[torch.Tensor, ...]
    dy: torch.Tensor
    running: tuple[torch.Tensor, ...] = ()

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        """What has gradients, in the order of a provider's arguments."""
        return (self.x, *self.parameters)


@dataclass(frozen=True)
class StackInputs:
    """The tensors of a case of many layers: those of each, so that no gradient has to be stacked."""

    layers: tuple[Inputs, ...]
    running = ()

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        """The x of every layer, then the parameters."""
        return (*(layer.x for layer in self.layers), *(p for i in self.layers for p in i.parameters))

    @property
    def dy(self) -> tuple[torch.Tensor, ...]:
        return tuple(layer.dy for layer in self.layers)


def make_inputs(case: Case, device) -> Inputs | StackInputs:
    """Normally distributed inputs, the same at every run. Means of 1, and a dy that goes with x, make
    the mean, c1 and c2 as large as what they are subtracted from: a provider without is found out. So
    is one that takes the batch's statistics for running ones, which are others, or one layer for
    another."""
    generator = torch.Generator(device).manual_seed(0)
    if OPERATORS[case.operator].stacked:
        return StackInputs(tuple(_make_inputs(layer, generator) for layer in case.layers))
    return _make_inputs(case, generator)


def _make_inputs(case: Case, generator) -> Inputs:
    operator = OPERATORS[case.operator]

    def normal(*shape, dtype=case.parameter_dtype):
        return torch.randn(shape, dtype=dtype, device=generator.device, generator=generator)

    def activation():
        dtype = DTYPES[case.dtype]
        if case.layout == "contiguous":
            return normal(*case.shape, dtype=dtype)
        images, channels, *spatial = case.shape
        return normal(images, *spatial, channels, dtype=dtype).movedim(-1, 1)

    x = activation().add_(1)
    dy = activation().add_(x).add_(1)
    shape = case.parameter_shape
    parameters = tuple((normal(*shape) + 1).requires_grad_() for _ in operator.parameters)
    running = (normal(*shape) + 1, normal(*shape).square() + 0.5) if operator.running else ()
    return Inputs(x.requires_grad_(), parameters, dy, running)


def make_call(provider: Provider, case: Case, inputs: Inputs) -> Callable[[], tuple[torch.Tensor, ...]]:
    """What is timed, within what the provider has around it."""
    with provider.around():
        call = _make_call(provider, case, inputs)
    if provider.around is nullcontext:
        return call

    def call_within():
        with provider.around():
            return call()

    return call_within


def _make_call(provider: Provider, case: Case, inputs: Inputs):
    """The forward pass to y and the running statistics that it updates, or the backward
    pass alone to the gradients of x and of every parameter; of a stack to those of every layer. Both as
    in training: the forward pass saves what the backward needs."""
    function = provider.prepare(provider.operators[case.operator])
    leaves = inputs.leaves
    if case.operator in provider.float32_parameters:
        leaves = (inputs.x, *(p.detach().float().requires_grad_() for p in inputs.parameters))
    running = tuple(r.clone() for r in inputs.running)  # every provider begins with the same
    others = (*running, *_groups(case))
    if case.direction == "forward":
        if OPERATORS[case.operator].stacked:
            return lambda: function(*leaves)
        updated = _updated(case, running)
        return lambda: (function(*leaves, *others), *updated)
    y = function(*leaves, *others)
    return lambda: torch.autograd.grad(y, leaves, inputs.dy, retain_graph=True)


def _groups(case: Case) -> tuple[int, ...]:
    """The argument that GroupNorm has in addition."""
    return () if case.groups is None else (case.groups,)


def _updated(case: Case, running) -> tuple[torch.Tensor, ...]:
    """Of running statistics, those that are a forward pass's results."""
    return running if OPERATORS[case.operator].running == "updated" else ()


def make_copy(case: Case, device) -> Callable[[], torch.Tensor]:
    """The roof: a copy that reads and writes as many bytes as the case's floor, half of them each."""
    source = torch.zeros(ceil(floor_bytes(case) / 2), dtype=torch.int8, device=device)
    return partial(torch.empty_like(source).copy_, source)


def _chunks(case: Case) -> Iterator[tuple]:
    """Where a chunk of the reference lies in x, and in the parameters: so many rows, images or, where
    images share statistics, channels that it is small beside the inputs; all, where all share them."""
    operator = OPERATORS[case.operator]
    if not operator.sets:
        yield ..., ...
        return
    size = case.channels if operator.images_share else case.shape[0]
    step = max(REFERENCE_ELEMENTS * size // case.elements, 1)
    for start in range(0, size, step):
        part = slice(start, start + step)
        chunk = (slice(None), part) if operator.images_share else part
        if operator.family == "weights":
            yield chunk, chunk
        else:
            yield chunk, part if operator.images_share else slice(None)


def max_error(case: Case, inputs: Inputs | StackInputs, outputs) -> float:
    """The largest difference of any output from PyTorch's float64 result, relative to the largest
    magnitude of that output; NaN if there is one.

    The reference is computed in chunks of contiguous tensors, whatever the layout of the case.
    """
    if OPERATORS[case.operator].stacked:
        layers = zip(case.layers, inputs.layers, strict=True)
        errors = [max_error(*layer, outputs[i :: case.stack]) for i, layer in enumerate(layers)]
        return torch.tensor(errors).max().item()
    function = operators_of_torch()[case.operator]
    backward = case.direction == "backward"
    difference = largest = torch.zeros((), dtype=torch.float64, device=inputs.x.device)
    # What is not of x's shape: every chunk has its part of it by channels, or adds to all of it.
    totals = [torch.zeros_like(t, dtype=torch.float64) for t in outputs[1:]]
    for chunk, columns in _chunks(case):
        x, dy = (t.detach()[chunk].contiguous().double() for t in (inputs.x, inputs.dy))
        x.requires_grad_(backward)
        parameters = [p.detach()[columns].double().requires_grad_() for p in inputs.parameters]
        running = [r[columns].double().clone() for r in inputs.running]
        with torch.set_grad_enabled(backward):
            reference = function(x, *parameters, *running, *_groups(case))
        others = _updated(case, running)
        if backward:
            reference, *others = torch.autograd.grad(reference, (x, *parameters), dy)
        for total, other in zip(totals, others, strict=True):
            total[columns] += other
        difference = torch.maximum(difference, (outputs[0].detach()[chunk] - reference).abs().max())
        largest = torch.maximum(largest, reference.abs().max())
    errors = [
        (got - total).abs().max() / total.abs().max()
        for got, total in zip(outputs[1:], totals, strict=True)
    ]
    return torch.stack([difference / largest, *errors]).max().item()
