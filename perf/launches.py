"""Watching the launches that tritonnorm makes, without a second copy of how it makes them."""

from contextlib import contextmanager, nullcontext
from weakref import WeakKeyDictionary

import torch

from tritonnorm import calls, heuristics, launch
from tritonnorm.dtypes import compute_dtype
from tritonnorm.formulas import RowOptions
from tritonnorm.heuristics.table import Choices
from tritonnorm.launch import Running
from tritonnorm.launch.common import CHOICES, TRITON_VERSION, forget_plans

from . import devices
from .shapes import DTYPES, OPERATORS, Case

ACTIVATIONS = ("x", "y", "dy", "dx")
EPS = 1e-5


H100 = devices.find("H100").facts

MEMORY_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def in_layout(x, layout: str):
    """x `[images, channels, *spatial]` in one of shapes.LAYOUTS."""
    if layout == "contiguous":
        return x
    if x.dim() in MEMORY_FORMATS:
        return x.contiguous(memory_format=MEMORY_FORMATS[x.dim()])
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


class _Observed:
    def __init__(self, kernel, observer):
        self.kernel, self.observer = kernel, observer
        self.__name__ = kernel.__name__

    def __getattr__(self, name):
        return getattr(self.kernel, name)

    def __getitem__(self, grid):
        return lambda **arguments: self.observer(self.kernel, grid, arguments)


@contextmanager
def observe(observer):
    """While open, a launch calls `observer(kernel, grid, arguments)` in its stead, which may run it.

    Of observers within each other the inner one is called; what it runs, the outer one sees.
    """
    kernels = [(launched, launched.kernel) for launched in launch.common.Kernel.every]
    forget_plans()  # what was recorded calls compiled kernels
    for launched, kernel in kernels:
        launched.kernel = _Observed(kernel, observer)
    try:
        yield
    finally:
        for launched, kernel in kernels:
            launched.kernel = kernel
        forget_plans()


def tensors(arguments):
    """The tensors of a launch by the names that kernels/README.md gives them; of many weights at once,
    whose pointers are in a table, `x[0]`, `x[1]` and so on."""
    found = {
        name.removesuffix("_ptr"): value
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor)
    }
    if "table" in found:
        for name, members in found["table"].operands.items():
            if members is not None:
                del found[name]
                found |= {f"{name}[{i}]": member for i, member in enumerate(members)}
    return found


def _parameters(case: Case):
    """weight and bias of ones, or None, along the rows or the channels."""
    operator = OPERATORS[case.operator]
    return [
        torch.ones(case.parameter_size, dtype=case.parameter_dtype)
        if name in operator.parameters
        else None
        for name in ("weight", "bias")
    ]


def _run_rows(case: Case, x, from_output=False, **options) -> None:
    options = RowOptions(OPERATORS[case.operator].norm, EPS, **options)
    weight, bias = _parameters(case)
    memory_format = torch.contiguous_format if x.is_contiguous() else torch.preserve_format
    if case.direction == "forward":
        launch.row_forward(
            x,
            weight,
            bias,
            1,
            options,
            dtype=x.dtype,
            memory_format=memory_format,
            save_statistics=True,
        )
        return
    size = launch.statistics_size(case.m, launch.kinds_of_statistics(options))
    statistics = torch.ones(size, dtype=compute_dtype(x))
    launch.row_backward(
        torch.ones_like(x),
        x,
        weight,
        statistics,
        1,
        options,
        memory_format=memory_format,
        needs_dx=True,
        dweight_dtype=weight if weight is None else weight.dtype,
        dbias_dtype=bias if bias is None else bias.dtype,
        recover=(bias,) if from_output else None,
    )


def _run_channels(case: Case, x) -> None:
    operator = OPERATORS[case.operator]
    weight, bias = _parameters(case)
    over = "batch" if operator.images_share else "group"
    groups = case.channels if operator.images_share else case.sets // case.images
    mean, variance = (torch.ones(case.sets, dtype=compute_dtype(x)) for _ in range(2))
    statistics = torch.ones(launch.statistics_size(case.sets, 2), dtype=compute_dtype(x))
    needed = dict(needs_dx=True, dweight_dtype=weight.dtype, dbias_dtype=bias.dtype)
    if operator.running == "read" and case.direction == "forward":
        launch.channel_apply(x, weight, bias, mean, variance, EPS, dtype=x.dtype)
    elif operator.running == "read":
        launch.channel_apply_backward(torch.ones_like(x), x, weight, statistics, EPS, **needed)
    elif case.direction == "forward":
        running = Running(mean, variance, momentum=0.1) if operator.running else None
        launch.channel_forward(
            x, weight, bias, groups, over, EPS, dtype=x.dtype, running=running, save_statistics=True
        )
    else:
        launch.channel_backward(torch.ones_like(x), x, weight, statistics, groups, over, **needed)


def _run_weights(case: Case, shapes) -> None:
    """A tensor of each shape, all at once."""
    dim = OPERATORS[case.operator].dim
    xs = [torch.ones(shape, dtype=DTYPES[case.dtype]) for shape in shapes]
    norms, dims = case.sets // len(xs), [dim] * len(xs)
    gains = [torch.ones(norms, dtype=case.parameter_dtype) for _ in xs]
    if case.direction == "forward":
        launch.weights_forward(xs, gains, dims, save_statistics=True)
        return
    spreads = [torch.ones(norms, dtype=compute_dtype(x)) for x in xs]
    needed = [True] * len(xs)
    launch.weights_backward([torch.ones_like(x) for x in xs], xs, gains, spreads, dims, needed, needed)


class Instead(Choices):
    """Choices in which some heuristics have given answers, whatever their arguments."""

    def __init__(self, answers, entries=None):
        super().__init__(entries)
        self.answers = answers

    def __call__(self, heuristic, *arguments):
        if heuristic in self.answers:
            return self.answers[heuristic]
        return super().__call__(heuristic, *arguments)


TEAMS = Instead({heuristics.teams.prefer_teams: True, heuristics.teams.prefer_row_teams: True})
"""Choices by which teams take whatever they can."""

_prepared = WeakKeyDictionary()
"""The calls that were prepared with other choices than a device's own, by these."""


@contextmanager
def choosing(choices: Choices):
    """While open, these choices decide every launch, on the CPU and on all GPUs."""
    saved = dict(CHOICES)
    CHOICES.update(dict.fromkeys(range(-1, torch.cuda.device_count()), choices))
    try:
        with calls.kept_in(_prepared.setdefault(choices, {})):
            yield
    finally:
        CHOICES.clear()
        CHOICES.update(saved)


class Noted(Choices):
    """Choices that note what they were asked for, and what they answered."""

    def __init__(self, entries=None):
        super().__init__(entries)
        self.noted = {}

    def __call__(self, heuristic, *arguments):
        answer = super().__call__(heuristic, *arguments)
        self.noted[(heuristic.__name__, *arguments)] = answer
        return answer


@contextmanager
def device_facts(facts: heuristics.common.DeviceFacts):
    """While open, launch choices take the device for this one: clusters among them, where it and this
    Triton have them."""
    modules = (launch.pieces, launch.row_teams)
    saved = [module.device_facts for module in modules]
    for module in modules:
        module.device_facts = lambda device: facts
    try:
        with clusters(heuristics.rows.largest_cluster(facts, TRITON_VERSION)):
            yield
    finally:
        for module, of_module in zip(modules, saved, strict=True):
            module.device_facts = of_module


@contextmanager
def teams(facts=H100):
    """While open, teams take whatever they can, as if on a GPU of these facts; and no clusters do."""
    with device_facts(facts), clusters(largest=1), choosing(TEAMS):
        yield


def in_cluster(case: Case, largest: int = heuristics.rows.LARGEST_CLUSTER) -> bool:
    """Whether a cluster of at most so many blocks holds the rows of a case."""
    choose = getattr(heuristics.rows, f"row_{case.direction}")
    return choose(case.n, case.itemsize, strided=False, cluster=largest).num_ctas > 1


@contextmanager
def clusters(largest: int = heuristics.rows.LARGEST_CLUSTER):
    """While open, rows are held by clusters of at most so many blocks, as on an H100 with a Triton that
    compiles them."""
    saved = launch.rows.largest_cluster
    launch.rows.largest_cluster = lambda index: largest
    try:
        yield
    finally:
        launch.rows.largest_cluster = saved


def plan_channels(case: Case, facts) -> list:
    """(kernel, grid, arguments) of the launches that a case of the channel view takes on a GPU where
    teams are allowed. Tensors without memory stand in for its own."""
    planned = []
    x = in_layout(torch.empty(case.shape, dtype=DTYPES[case.dtype], device="meta"), case.layout)
    with teams(facts), observe(lambda *launch: planned.append(launch)):
        _run_channels(case, x)
    return planned


def run(case: Case, variant: str | None = None) -> None:
    """Runs one pass of a case on CPU tensors of ones: for observers that look at launches and
    addresses, not at values. The variant "strided" takes rows from the channels of `[1, n, m]`;
    "rounded" rounds x_hat and offsets the weight, as models do; "output" starts a backward pass from the
    output; "cluster" has clusters hold rows that are too long for a program alone, and "team" has teams
    hold them, or take what is in pieces; with "cluster output" and "team output" they start from the
    output; "halved" has each layer of a stack take channels half as long as those of the one before."""
    dtype = DTYPES[case.dtype]
    if OPERATORS[case.operator].family == "weights":
        shapes = [layer.shape for layer in case.layers]
        if variant == "halved":
            shapes = [(*shape[:-1], shape[-1] >> i) for i, shape in enumerate(shapes)]
        _run_weights(case, shapes)
    elif OPERATORS[case.operator].family == "channels":
        with teams() if variant == "team" else nullcontext():
            _run_channels(case, in_layout(torch.ones(case.shape, dtype=dtype), case.layout))
    elif variant is not None and variant.startswith(("cluster", "team")):
        with teams() if variant.startswith("team") else clusters():
            _run_rows(case, torch.ones(case.shape, dtype=dtype), from_output="output" in variant)
    elif variant == "strided":
        _run_rows(case, torch.ones(1, case.n, case.m, dtype=dtype).mT)
    elif variant == "output":
        _run_rows(case, torch.ones(case.shape, dtype=dtype), from_output=True)
    elif variant == "rounded":
        _run_rows(case, torch.ones(case.shape, dtype=dtype), weight_offset=1.0, round_to=dtype)
    else:
        _run_rows(case, torch.ones(case.shape, dtype=dtype))
