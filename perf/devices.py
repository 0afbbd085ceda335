"""Facts of GPUs: what datasheets state, and what follows from the compute capability.

`DEVICES` are the GPUs whose times `predict` works out; of others the bandwidth alone is known.
"""

from dataclasses import dataclass

from tritonnorm.heuristics.common import DeviceFacts

DATASHEET_GBPS = {
    "NVIDIA A10": 600,
    "NVIDIA A10G": 600,
    "NVIDIA A100-PCIE-40GB": 1555,
    "NVIDIA A100-SXM4-40GB": 1555,
    "NVIDIA A100 80GB PCIe": 1935,
    "NVIDIA A100-SXM4-80GB": 2039,
    "NVIDIA B200": 8000,
    "NVIDIA GB200": 8000,
    "NVIDIA GeForce RTX 3090": 936,
    "NVIDIA GeForce RTX 4090": 1008,
    "NVIDIA GeForce RTX 5090": 1792,
    "NVIDIA H100 80GB HBM3": 3350,
    "NVIDIA H100 NVL": 3900,
    "NVIDIA H100 PCIe": 2000,
    "NVIDIA H200": 4800,
    "NVIDIA L4": 300,
    "NVIDIA L40S": 864,
    "NVIDIA RTX 6000 Ada Generation": 960,
    "NVIDIA RTX A6000": 768,
}
"""Bandwidth of the device memory as the datasheet states it, GB/s, by the name that CUDA gives."""

KB, MB = 2**10, 2**20

WARP = 32
SCHEDULERS = 4
"""Of an SM: each issues one warp instruction a cycle (tuning guides of A100, H100 and Blackwell)."""

SM_REGISTERS, SM_WARPS, SM_BLOCKS = 65536, 64, 32
"""What an SM holds at most, of capability 8.0, 9.0 and 10.0 alike (CUDA C++ programming guide)."""

REGISTER_UNIT = 8
"""Registers a thread are given in units of so many (the same guide)."""

BLOCK_SHARED = 1 * KB
"""Shared memory that the system takes of every block (the same guide)."""


@dataclass(frozen=True)
class Device:
    """One GPU. Times are in nanoseconds, clocks in GHz."""

    name: str  # that CUDA gives
    short: str  # that a table has room for
    target: str
    processors: int  # SMs
    clock: float
    l2_bytes: int
    sm_shared: int  # bytes of shared memory an SM
    dram_latency: float
    l2_latency: float

    @property
    def gbps(self) -> float:
        """Bandwidth of the device memory, bytes a nanosecond."""
        return DATASHEET_GBPS[self.name]

    @property
    def facts(self) -> DeviceFacts:
        """What launch choices may know of it."""
        capability = divmod(int(self.target.removeprefix("sm_")), 10)
        return DeviceFacts(capability, self.processors, self.l2_bytes)

    @property
    def issue_rate(self) -> float:
        """Warp instructions a nanosecond that all SMs issue at most."""
        return self.processors * SCHEDULERS * self.clock

    @property
    def issue_budget(self) -> float:
        """Warp instructions that can be issued in the time that the memory takes for a byte."""
        return self.issue_rate / self.gbps


DEVICES = (
    Device("NVIDIA A100-SXM4-80GB", "A100", "sm_80", 108, 1.41, 40 * MB, 164 * KB, 500, 200),
    Device("NVIDIA H100 80GB HBM3", "H100", "sm_90", 132, 1.83, 50 * MB, 228 * KB, 650, 270),
    Device("NVIDIA H200", "H200", "sm_90", 132, 1.83, 50 * MB, 228 * KB, 650, 270),
    Device("NVIDIA B200", "B200", "sm_100", 148, 1.86, 126 * MB, 228 * KB, 800, 350),
)
"""SMs, L2 and shared memory: NVIDIA's A100 and H100 whitepapers and H200 datasheet, and of a B200 what
CUDA says. Clocks are those at which the datasheets' dense bfloat16 figures hold: 312, 989 and 2,250
TFLOP/s, of SMs that do 2,048, 4,096 and 8,192 operations a cycle. Latencies of device memory and of L2,
of a load without others, are round and approximate: unmeasured here, and published figures differ. They
decide nothing but where a launch is bound by bytes in flight, or by its tail."""


def find(name: str) -> Device | None:
    """The device of a name, long or short; None where no model of it is kept."""
    return next((d for d in DEVICES if name in (d.name, d.short)), None)


def of_target(target: str) -> list[Device]:
    """The devices that code for a target runs on."""
    return [d for d in DEVICES if d.target == target]


def resident(registers: int, num_warps: int, shared: int, sm_shared: int) -> int:
    """Blocks that an SM holds at once: as far as registers (a thread), warps and shared memory go."""
    given = -(-registers // REGISTER_UNIT) * REGISTER_UNIT * WARP * num_warps
    return min(
        SM_REGISTERS // given,
        SM_WARPS // num_warps,
        SM_BLOCKS,
        sm_shared // (shared + BLOCK_SHARED),
    )
