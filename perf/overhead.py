"""The host time of a call, beside that of torch.nn.functional's own in the same run.

On a GPU calls are issued and not waited for. Without one, CPU tensors take the kernels' path to a
launcher that does nothing: what is timed is all that tritonnorm itself does before a launch. PyTorch's
operators then compute, on tensors of a few KB, which takes about a microsecond, and launch nothing. What
Triton's way to launch adds is timed by itself, on the same launches: binding the arguments and looking
up the compiled kernel, but not the call into CUDA behind it. Calls take it until they are recorded, and
not from then on; what is timed beside PyTorch are recorded calls.
"""

import gc
import json
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial

import torch
import triton
from triton.runtime.jit import JITFunction

from tritonnorm import dispatch, functional
from tritonnorm.launch import replay

from .compiled import AbsentDriver
from .launches import observe
from .providers import operators_of_torch, weight_operators, with_signatures_of_torch
from .shapes import OPERATORS, ROW_OPERATORS, WEIGHT_OPERATORS

MEASURED = tuple(name for name in OPERATORS if name == "weight_norm" or name not in WEIGHT_OPERATORS)
"""One function each; weight normalization once, for a layer."""

SHAPES = {"tokens": (2, 8, 64), "images": (2, 16, 4, 4)}
"""Small enough for PyTorch's arithmetic not to count on a CPU, and for a GPU never to fall behind."""

GROUPS = 4
PASSES = ("forward", "forward + backward")
"""As in inference, without a graph; and the gradients of everything that has one."""

LIMIT = 1.5
"""Host time, at most, in multiples of PyTorch's. The aim is 1."""

BATCH, ROUNDS = 5, 300
"""Calls timed together: a GPU's queue, which holds about a thousand launches, does not fill, and few
batches are interrupted where others share the machine. And how often, one after the other."""


@dataclass(frozen=True)
class Host:
    """Host time of a call in microseconds: median, 20th and 80th percentile."""

    median_us: float
    p20_us: float
    p80_us: float


@dataclass(frozen=True)
class Overhead:
    """One operator, shape and pass."""

    operator: str
    shape: str
    direction: str
    ours: Host
    torch: Host
    ratio: float  # median of the rounds'
    launches: int | None = None  # that a call makes, and what Triton's own way to make them takes; None
    triton_us: float | None = None  # on a GPU, whose recorded calls do not go it, and in the interpreter

    @property
    def exceeds(self) -> bool:
        return self.ratio > LIMIT


def _inputs(operator: str, shape, device):
    """x and parameters, which have gradients, and what else a provider's function takes."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(shape):
        return torch.randn(shape, device=device, generator=generator)

    described = OPERATORS[operator]
    if operator in ROW_OPERATORS:
        size = shape[2:] if len(shape) == 3 else shape[1:]  # a token's; of an image all of it
    elif operator in WEIGHT_OPERATORS:
        size = (shape[0], *(1 for _ in shape[1:]))
    else:
        size = shape[1:2]
    leaves = [normal(shape), *(normal(size) for _ in described.parameters)]
    others = [normal(size), normal(size).square()] if described.running else []
    others += [GROUPS] if "groups" in described.sets else []
    return [leaf.requires_grad_() for leaf in leaves], others


def _make_call(function, direction: str, leaves, others) -> Callable[[], object]:
    if direction == "forward":
        return partial(function, *(leaf.detach() for leaf in leaves), *others)
    dy = torch.ones_like(leaves[0])
    return lambda: torch.autograd.grad(function(*leaves, *others), leaves, dy)


def _synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _batch_us(call) -> float:
    """Mean host time of the calls of a batch, which a GPU has finished before the next begins."""
    _synchronize()
    start = time.perf_counter()
    for _ in range(BATCH):
        call()
    elapsed = time.perf_counter() - start
    _synchronize()
    return 1e6 * elapsed / BATCH


def _host(times) -> Host:
    p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive")
    return Host(statistics.median(times), p20, p80)


def alternating(calls, rounds: int) -> list[list[float]]:
    """The times of each call, a batch of each after the other."""
    for call in calls:
        _batch_us(call)  # compiles, fills caches, and is recorded
    collecting = gc.isenabled()
    gc.disable()
    try:
        found = [[_batch_us(call) for call in calls] for _ in range(rounds)]
    finally:
        if collecting:
            gc.enable()
    return [list(times) for times in zip(*found, strict=True)]


@contextmanager
def kernel_path(launcher):
    """While open, CPU tensors take the path of CUDA tensors up to a launch, which calls
    `launcher(kernel, grid, arguments)` instead."""
    saved = dispatch.INTERPRETED
    dispatch.INTERPRETED = True
    try:
        with observe(launcher):
            yield
    finally:
        dispatch.INTERPRETED = saved


@contextmanager
def _one_thread():
    """PyTorch's operators share even few elements among threads, and wait for them."""
    saved = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(saved)


def do_nothing(kernel, grid, arguments):
    """A launcher."""


@contextmanager
def _nothing_launched():
    """`kernel_path` of a launcher that does nothing. Recorded calls hand their pointers to a function
    that takes what a compiled kernel does."""

    def bind(launch):
        return lambda *_: None, (*launch.grid, 1, 1)[:3], (None,) * 5

    saved, replay.bind = replay.bind, bind
    try:
        with kernel_path(do_nothing):
            yield
    finally:
        replay.bind = saved


class _NoKernel:
    """Stands in for a compiled kernel."""

    function = packed_metadata = None

    def launch_metadata(self, *_):
        return None

    def run(self, *_):
        return None


class _NoDevice(AbsentDriver):
    def get_current_device(self):
        return "overhead"  # no device's: Triton keeps its compiled kernels by device


@contextmanager
def _nothing_compiled():
    """While open, Triton launches kernels that are none, with all that it does before."""

    def compile_nothing(kernel, key, signature, device, *_):
        return kernel.device_caches[device][0].setdefault(key, _NoKernel())

    driver = triton.runtime.driver
    saved = JITFunction._do_compile, driver._active
    JITFunction._do_compile = compile_nothing
    driver.set_active(_NoDevice("sm_90"))
    try:
        yield
    finally:
        JITFunction._do_compile, _ = saved
        driver.set_active(saved[1])


def launches_of(call) -> list[tuple]:
    """What a call launches, (kernel, grid, arguments) each; none of them runs."""
    found = []
    with kernel_path(lambda *launch: found.append(launch)):
        call()
    return found


def _triton_us(launches, rounds: int) -> float | None:
    """Host time that Triton takes for these launches, without the call into CUDA."""
    if not all(isinstance(kernel, JITFunction) for kernel, _, _ in launches):
        return None

    def launch_all():
        for kernel, grid, arguments in launches:
            kernel[grid](**arguments)

    for kernel, _, _ in launches:
        hash(kernel)  # from then on Triton compares the globals that a kernel uses
    with _nothing_compiled():
        (times,) = alternating([launch_all], rounds)
    for kernel, _, _ in launches:
        kernel.device_caches.pop("overhead", None)
    return statistics.median(times)


def measure(operator: str, shape: str, direction: str, rounds: int = ROUNDS) -> Overhead:
    """Times tritonnorm.functional and torch.nn.functional on the same tensors."""
    on_gpu = torch.cuda.is_available()
    leaves, others = _inputs(operator, SHAPES[shape], "cuda" if on_gpu else "cpu")
    ours = with_signatures_of_torch(functional) | weight_operators(functional.weight_norm)
    calls = [
        _make_call(functions[operator], direction, leaves, others)
        for functions in (ours, operators_of_torch())
    ]
    with _one_thread(), nullcontext() if on_gpu else _nothing_launched():
        times = alternating(calls, rounds)
    ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
    found = Overhead(operator, shape, direction, *map(_host, times), ratio)
    if on_gpu:
        return found
    launches = launches_of(calls[0])
    return Overhead(
        **{name: getattr(found, name) for name in ("operator", "shape", "direction", "ours", "torch")},
        ratio=ratio,
        launches=len(launches),
        triton_us=_triton_us(launches, rounds),
    )


def table(records: list[Overhead]) -> str:
    """A line a record, times in microseconds."""

    def host(times: Host) -> str:
        return f"{times.median_us:6.1f} {f'({times.p20_us:.1f} to {times.p80_us:.1f})':<16}"

    def number(value, form) -> str:
        return "-" if value is None else f"{value:{form}}"

    lines = [
        f"{'operator':<15} {'shape':<6} {'pass':<18} {'tritonnorm':<23} {'torch':<23} {'ratio':>5} "
        f"{'launches':>8} {'Triton':>6}"
    ]
    lines += [
        f"{r.operator:<15} {r.shape:<6} {r.direction:<18} {host(r.ours)} {host(r.torch)} {r.ratio:5.2f} "
        f"{number(r.launches, 'd'):>8} {number(r.triton_us, '.1f'):>6}" + ("  <-" if r.exceeds else "")
        for r in records
    ]
    return "\n".join(lines)


def add_arguments(parser):
    parser.add_argument(
        "--operators", nargs="+", choices=MEASURED, default=list(MEASURED), metavar="NAME",
        help=f"of {', '.join(MEASURED)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help=f"of {BATCH} calls each (default: {ROUNDS})"
    )
    parser.add_argument(
        "--gate", action="store_true", help=f"end with status 1 where a ratio exceeds {LIMIT}"
    )
    parser.add_argument("--json", action="store_true", help="records instead of a table")


def run(arguments) -> int:
    records = [
        measure(operator, shape, direction, max(arguments.rounds, 2))
        for operator in arguments.operators
        for shape in SHAPES
        for direction in PASSES
    ]
    if arguments.json:
        print(json.dumps([asdict(r) | {"exceeds": r.exceeds} for r in records]))
    else:
        on_gpu = torch.cuda.is_available()
        how = torch.cuda.get_device_name() if on_gpu else "no GPU: launches do nothing"
        print(f"host microseconds a call, torch {torch.__version__}, Triton {triton.__version__}, {how}")
        print(table(records))
        print(f"{len(records)} calls, {sum(r.exceeds for r in records)} of more than {LIMIT} x torch's")
    return int(arguments.gate and any(r.exceeds for r in records))
