"""Timing calls on the GPU with CUDA events, every repetition with a cold L2."""

import statistics
import time
from dataclasses import dataclass
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


def _timing(microseconds: list[float], host_us: float) -> Timing:
    p20, _, _, p80 = statistics.quantiles(microseconds, n=5, method="inclusive")
    return Timing(statistics.median(microseconds), p20, p80, host_us)


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
        """Times `call`, whose results are dropped. What it compiles at its first run is not counted."""
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
        return _timing([1e3 * start.elapsed_time(end) for start, end in events], host_us)
