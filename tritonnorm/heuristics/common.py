"""What launch choices of all views share."""

from dataclasses import dataclass
from math import ceil

WARP = 32
MIN_WARPS = 4
MAX_WARPS = 32
SM_REGISTERS = 65536  # and the most that a block can have

PARTIAL_SHARE = 0.05
"""Partial weight gradients may cost this part of a backward pass's traffic ..."""

PARTIAL_BYTES = 8 * 2**20
"""... or this much memory, a fifth of the L2 of an A100 (40 MB) and less of its successors', whichever
is more: it is read again at once, and should not reach DRAM (unmeasured)."""

MAX_PARTIALS = 1024
"""Programs, at most, that walk through the rows: at 4 warps and 64 registers, or 2 and 128, 8 fit on an
SM, 1,056 on an H100 (unmeasured)."""

SMALL_TRAFFIC, SMALL_PARTIALS = 24 * 2**20, 512
"""Bytes of a backward pass over tensors of 8 MB, and programs, at most, of those that move no more: one
wave of 4 warps of 16-bit rows on an H100. A second one, with as many partial gradients again, takes
longer by the model, and fewer leave SMs of a B200 idle (perf/NOTES.md; unmeasured)."""

FOLD_ELEMENTS, FOLD_COLUMNS, FOLD_WARPS = 4096, 16, 8
"""Elements of a step of the fold of partial gradients, its fewest columns, and its warps: at most 4
loads one after another (MAX_PARTIALS / 256 rows), and at N = 128 still 8 programs (unmeasured)."""

FOLD_STEPS = 4
"""Steps of a fold, at most, as far as its tile can be made narrower for it: the pieces of channels are
many where channels are few, and each step waits for memory (unmeasured)."""

WORD_BYTES = 16
"""The widest access. Lines that are no multiple of it are accessed in less, with an address each: the
tiles of pieces then have half as many elements a thread."""

WIDE_REGISTERS = 128
"""Registers a thread, at most, that the assembler is told to use in float64, tensors' or folds'. Left
alone it takes fewer (64 for the moments on sm_100) and spills one or two."""


@dataclass(frozen=True)
class RowTile:
    """`rows` x `block_n` elements a program, one step of a loop if `block_n` < N. The columns are held
    in `chunks` tiles side by side, whose widths are powers of two. A program is a cluster of `num_ctas`
    blocks of `num_warps` each, which have a part of the columns each.

    `registers` are a thread's, at most, that the assembler is told to use; None leaves it alone. Of the
    steps of a program that walks through rows `stages` are under way at once.
    """

    rows: int
    block_n: int
    num_warps: int
    num_ctas: int = 1
    chunks: int = 1
    registers: int | None = None
    stages: int = 1


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def warps(elements: int, a_thread: int) -> int:
    return min(max(elements // (a_thread * WARP), MIN_WARPS), MAX_WARPS)


def warps_of(elements: int, a_thread: int) -> int:
    """Warps of a tile that may be too small for `MIN_WARPS`."""
    return min(max(elements // (a_thread * WARP), 1), MAX_WARPS)


def registers(warps: int, itemsize: int) -> int | None:
    """Registers a thread, at most, of a block of so many warps; None to leave it to the assembler."""
    return min(WIDE_REGISTERS, SM_REGISTERS // (warps * WARP)) if itemsize == 8 else None


def partials(steps: int, program_bytes: int, traffic: int, programs: int | None = None) -> int:
    """Programs, at most `programs` or MAX_PARTIALS, that share so many steps, each leaving
    `program_bytes` of partial parameter gradients, in a backward pass that moves `traffic` bytes."""
    most = MAX_PARTIALS if programs is None else programs
    if program_bytes == 0:
        return min(steps, most)
    if traffic <= SMALL_TRAFFIC:
        most = min(most, SMALL_PARTIALS)
    share = PARTIAL_SHARE * traffic / (2 * program_bytes)  # written once, read once
    return max(min(steps, int(max(share, PARTIAL_BYTES / program_bytes)), most), 1)


def fold(partials: int) -> RowTile:
    """The fold of so many partial gradients."""
    enough = min(power_of_two(ceil(partials / FOLD_STEPS)), FOLD_ELEMENTS)
    rows = min(power_of_two(partials), max(enough, FOLD_ELEMENTS // FOLD_COLUMNS))
    return RowTile(rows, FOLD_ELEMENTS // rows, FOLD_WARPS)


def whole_words(elements: int, itemsize: int) -> bool:
    """Whether lines of so many adjacent elements can be accessed in 16 bytes."""
    return elements * itemsize % WORD_BYTES == 0


@dataclass(frozen=True)
class DeviceFacts:
    """What is known of a GPU: compute capability, number of SMs, bytes of L2."""

    capability: tuple[int, int]
    processors: int
    l2_bytes: int
