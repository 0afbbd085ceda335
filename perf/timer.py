"""Timing calls on the GPU with CUDA events, every repetition with a cold L2."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from math import ceil

import torch

WARM_UP_SECONDS = 0.05
"""Long enough for the clocks to rise from idle."""

REPETITION_SECONDS = 0.15
MIN_REPETITIONS, MAX_REPETITIONS = 20, 500

HOST_CALLS = 20
"""Calls of which the host time is the median, and that an estimate of the device time is taken from."""

HOST_MARGIN = 1.5
"""The device is kept busy, before each timed call, for this many times what issuing it takes."""

MAX_FLUSHES = 256
"""A call that waits for the device looks as if it took very long to issue. Sixty layers, one after
another, may take 3 ms (unmeasured), which are more than a hundred flushes."""


@dataclass(frozen=True)
class Timing:
    """Device time of a call in microseconds: median, 20th and 80th percentile; and the host's time to
    issue it, in microseconds."""

    median_us: float
    p20_us: float
    p80_us: float
    host_us: float


ROUNDS = 7
"""Turns of each of several calls that are timed together: of the seven that there are at most, a copy
among them, each is the first once."""


@dataclass(frozen=True)
class Prepared:
    """A call that has run, and was compiled: device times in microseconds of so many repetitions, how
    many of them are enough, and the host's time to issue one, in microseconds."""

    times: Callable[[int], list[float]]
    repetitions: int
    host_us: float


class TurnFailed(RuntimeError):
    """The call `name` failed at its turn."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


def _timing(rounds: list[list[float]], host_us: float) -> Timing:
    """The median of the rounds' medians."""
    p20, _, _, p80 = statistics.quantiles(chain(*rounds), n=5, method="inclusive")
    return Timing(statistics.median(map(statistics.median, rounds)), p20, p80, host_us)


def alternate(calls: Mapping[str, Prepared], rounds: int = ROUNDS) -> dict[str, Timing]:
    """Times calls together: in each round each has a turn, and in the next one another begins, so that
    what drifts, as clocks do, meets all of them. The first repetition of a turn, whose code is not in
    the caches, is not counted.

    Raises:
        TurnFailed: from what a call raised.
    """
    names, found = list(calls), {name: [] for name in calls}
    for i in range(rounds):
        start = i % len(names)
        for name in names[start:] + names[:start]:
            repetitions = ceil(calls[name].repetitions / rounds)
            try:
                found[name].append(calls[name].times(1 + repetitions)[1:])
            except Exception as error:
                raise TurnFailed(name) from error
    return {name: _timing(found[name], calls[name].host_us) for name in names}


class DeviceTimer:
    """Times calls on the current CUDA device.

    Between repetitions a buffer of twice the L2 is zeroed, so that no call finds its inputs there. It
    is zeroed as often as it takes the host to issue the call meanwhile: then the events enclose the
    call's kernels, and no wait for the host. Host time is reported apart.
    """

    def __init__(self):
        l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._buffer = torch.empty(2 * l2_bytes, dtype=torch.int8, device="cuda")
        self._flush_us = self._elapsed_us(self._buffer.zero_, HOST_CALLS)

    def _elapsed_us(self, call, times: int) -> float:
        """Mean time of `times` calls in a row, the first of them after a warm one."""
        call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            call()
        end.record()
        torch.cuda.synchronize()
        return 1e3 * start.elapsed_time(end) / times

    def _host_us(self, call) -> float:
        times = []
        for _ in range(HOST_CALLS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            times.append(1e6 * (time.perf_counter() - start))
        torch.cuda.synchronize()
        return statistics.median(times)

    def __call__(self, call) -> Timing:
        """Times `call`, whose results are dropped."""
        prepared = self.prepare(call)
        return _timing([prepared.times(prepared.repetitions)], prepared.host_us)

    def prepare(self, call) -> Prepared:
        """`call`, whose results are dropped, to be timed: it has compiled what it does at its first run,
        and the clocks have risen."""
        call()
        host_us = self._host_us(call)
        flushes = min(max(ceil(HOST_MARGIN * host_us / self._flush_us), 1), MAX_FLUSHES)

        def repetition():
            for _ in range(flushes):
                self._buffer.zero_()
            call()

        a_repetition = self._elapsed_us(repetition, HOST_CALLS)
        for _ in range(ceil(1e6 * WARM_UP_SECONDS / a_repetition)):
            repetition()
        repetitions = int(1e6 * REPETITION_SECONDS / a_repetition)
        repetitions = min(max(repetitions, MIN_REPETITIONS), MAX_REPETITIONS)

        def times(repetitions):
            events = []
            for _ in range(repetitions):
                for _ in range(flushes):
                    self._buffer.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                events.append((start, end))
            torch.cuda.synchronize()
            return [1e3 * start.elapsed_time(end) for start, end in events]

        return Prepared(times, repetitions, host_us)
