"""What L2 still holds of a tensor that is read a second time, and the traffic of DRAM that follows.

A pass over sets that no program holds reads its inputs twice. In the split form the second sweep is a
launch of its own. It finds in L2 what the first one read last, if it starts there: hence it runs
backwards (`kernels/channel.py`). Run forwards it would find nothing, unless all of it fits: each line is
evicted before its turn comes. Teams read again what they have just read, and hold that within L2 by
their number.
"""

from .common import DeviceFacts

KEPT_SHARE = 1 / 3
"""Part of L2 that keeps what was read until it is read again: beside it stand what is written
meanwhile, as many bytes in the forward pass, and lines that both halves of an H100's L2 hold
(unmeasured)."""


def kept_bytes(device: DeviceFacts) -> int:
    """Bytes that can be read again from L2."""
    return int(KEPT_SHARE * device.l2_bytes)


def one_read(read: int, written: int) -> int:
    """Bytes of DRAM traffic of a pass that holds its sets, in programs or in teams: `read` bytes of
    inputs and `written` bytes of output."""
    return read + written


def two_reads(read: int, written: int, kept: int, backwards: bool = True) -> int:
    """The same of two sweeps, of which the second finds up to `kept` bytes in L2."""
    found = min(read, kept) if backwards or read <= kept else 0
    return 2 * read - found + written
