"""A GPU's threads and memory on the CPU, for `ptx_steps.py`.

The threads of some blocks go in step; a register is a NumPy array with an element for each. What a GPU
would refuse, or might not do the same twice, is a PtxError: an access outside of the memory that was
given; accesses of two warps to the same shared memory with no barrier between, or two values for one
place; an access to shared memory that a copy is on its way to; an arrival with no barrier after what
other warps stored; threads that wait for each other.
"""

import ctypes
from dataclasses import dataclass, fields

import numpy as np
from ptx import UNSIGNED, Entry, PtxError

WARP = 32

CLUSTER_SHIFT = 24
"""The bits of an address of shared memory above these are a block of the cluster, counted from one; or
zero, for the thread's own block."""

UNDEFINED = np.array(-1)
"""All bits of a register that was not written: NaN of any type."""

WIDTHS = {"%rd": 8, "%rs": 2, "%r": 4, "%pair": 8}
"""Bytes of registers, by the first of these that their names begin with: what is written is widened."""

COPIED_WORD = 4
"""Bytes that copies to shared memory are made of."""

MOST_IDLE = 1000
"""How often all threads may wait, one after the other, with nothing written between."""


class Memory:
    """The host's memory from some addresses up to others, which stands in for a GPU's."""

    def __init__(self, ranges):
        ranges = sorted({(start, stop) for start, stop in ranges if stop > start})
        self.starts = np.array([start for start, _ in ranges], np.uint64)
        self.stops = np.array([stop for _, stop in ranges], np.uint64)
        self.bytes = [
            np.frombuffer((ctypes.c_uint8 * (stop - start)).from_address(start), np.uint8)
            for start, stop in ranges
        ]

    def _words(self, addresses, size: int):
        """For each range that is accessed: which of the addresses are in it, its memory as words of
        `size` bytes, and the numbers of those."""
        found = np.searchsorted(self.starts, addresses, side="right") - 1
        if (found < 0).any() or (addresses + np.uint64(size) > self.stops[found]).any():
            raise PtxError("an access outside of the launch's tensors")
        for i in np.unique(found):
            start = int(self.starts[i])
            first = start + -start % size  # a word's address; a tensor may begin between two
            memory = self.bytes[i][first - start :]
            words = memory[: len(memory) // size * size].view(UNSIGNED[8 * size])
            here = found == i
            yield here, words, (addresses[here] - np.uint64(first)) // np.uint64(size)

    def load(self, addresses, size: int):
        values = np.empty(addresses.shape, UNSIGNED[8 * size])
        for here, words, numbers in self._words(addresses, size):
            values[here] = words[numbers]
        return values

    def store(self, addresses, size: int, values):
        for here, words, numbers in self._words(addresses, size):
            words[numbers] = values[here]


class Shared:
    """The shared memory of some blocks, and which warp has accessed each byte of it since the last
    barrier of its block, or of the cluster: -1 none, -2 several. (That another block has accessed it, a
    barrier of the block would not end on a GPU.)"""

    def __init__(self, blocks: int, size: int):
        self.size = size
        self.bytes = np.full(blocks * size, 0xFF, np.uint8)  # NaN in every type
        self.writer, self.reader = (np.full((blocks, size), -1) for _ in range(2))
        self.awaited = np.zeros(blocks * size, bool)  # what a copy is on its way to

    def barrier(self, blocks):
        self.writer[blocks] = self.reader[blocks] = -1

    def load(self, places, size: int, warps):
        """Words at places `[count]`, counted in bytes over all blocks, for a warp each."""
        places, warps = self._bytes(places, size, warps)
        writer, reader = self.writer.reshape(-1), self.reader.reshape(-1)
        self._check_awaited(places)
        if ((writer[places] != -1) & (writer[places] != warps)).any():
            raise PtxError("a warp reads shared memory that another wrote before a barrier")
        before = reader[places]
        reader[places] = np.where((before == -1) | (before == warps), warps, -2)
        reader[places[reader[places] != warps]] = -2
        return self.bytes[places].view(UNSIGNED[8 * size])[:, 0]

    def store(self, places, size: int, values, warps):
        places, warps = self._to_be_written(places, size, warps)
        self._write(places, values, warps)

    def expect(self, places, size: int, warps):
        """A copy to these places has begun: it may write them at any time until it has `arrived`."""
        places, _ = self._to_be_written(places, size, warps)
        self.awaited[places] = True

    def arrived(self, places, size: int, values, warps):
        places, warps = self._bytes(places, size, warps)
        self.awaited[places] = False
        self._write(places, values, warps)

    def _check_awaited(self, places):
        if self.awaited[places].any():
            raise PtxError("shared memory is accessed that a copy is on its way to")

    def _to_be_written(self, places, size, warps):
        places, warps = self._bytes(places, size, warps)
        self._check_awaited(places)
        for accessed in (self.writer.reshape(-1)[places], self.reader.reshape(-1)[places]):
            if ((accessed != -1) & (accessed != warps)).any():
                raise PtxError("a warp writes shared memory that another accessed before a barrier")
        return places, warps

    def _write(self, places, values, warps):
        writer = self.writer.reshape(-1)
        stored = np.ascontiguousarray(values)[:, None].view(np.uint8)
        self.bytes[places], writer[places] = stored, warps
        if (self.bytes[places] != stored).any():
            raise PtxError("two values are written to the same shared memory")
        writer[places[writer[places] != warps]] = -2  # one value, by several warps

    @staticmethod
    def _bytes(places, size, warps):
        places = places[:, None] + np.arange(size)
        return places, np.broadcast_to(warps[:, None], places.shape)


@dataclass
class Copy:
    """A word that each of some threads copies to shared memory, or zero where it is not `present`."""

    threads: np.ndarray
    groups: np.ndarray  # of each thread's copies, from 0 on
    places: np.ndarray
    addresses: np.ndarray
    present: np.ndarray
    values: np.ndarray  # that were there when it began

    def of(self, some) -> "Copy":
        return Copy(*(getattr(self, field.name)[some] for field in fields(self)))


class Blocks:
    """Some blocks of a launch. While an instruction is done, `active` are the threads that do it, and
    `next` the number of the instruction behind it, None where it has set their `counters` itself."""

    def __init__(self, entry: Entry, numbers, grid, memory: Memory, shared_bytes: int, parameters):
        self.entry, self.memory, self.parameters = entry, memory, parameters
        self.blocks, self.threads = len(numbers), len(numbers) * entry.threads
        self.shared = Shared(self.blocks, shared_bytes)
        self.block = np.repeat(np.arange(self.blocks), entry.threads)
        self.warp = np.arange(self.threads) // WARP
        thread = np.tile(np.arange(entry.threads, dtype=np.uint32), self.blocks)
        number = np.repeat(np.array(numbers, np.uint32), entry.threads)
        self.registers = {
            "%tid.x": thread,
            "%ctaid.x": number % np.uint32(grid[0]),
            "%ctaid.y": number // np.uint32(grid[0]),
            "%nctaid.x": np.full(self.threads, grid[0], np.uint32),
            "%nctaid.y": np.full(self.threads, grid[1], np.uint32),
            "%cluster_ctarank": number % np.uint32(entry.cluster),
        }
        self.counters = np.zeros(self.threads, np.int64)
        self.live = np.ones(self.threads, bool)
        self.waiting = np.zeros(self.threads, bool)
        self.copies: list[Copy] = []
        self.groups = np.zeros(self.threads, np.int64)  # of copies that a thread has closed
        self.stored = np.zeros(self.threads, bool)  # to global memory, since the block's last barrier
        self.active, self.everyone, self.next = self.live, True, 0
        self.idle = 0  # how often all waited, since something was last written

    def run(self, steps):
        """The threads that are furthest behind go first; those that wait for others, last."""
        while self.live.any():
            ready = self.live & ~self.waiting
            if not ready.any():
                self.waiting[:] = False
                self.idle += 1
                if self.idle > MOST_IDLE:
                    raise PtxError("threads wait for each other, or for none")
                continue
            counters = self.counters[ready]
            self.next = int(counters.min())
            ahead = counters[counters > self.next]
            stop = int(ahead.min()) if ahead.size else len(steps)
            self.active = ready & (self.counters == self.next)
            self.everyone = bool(self.active.all())
            while self.next is not None and self.next < stop:
                step, self.next = steps[self.next], self.next + 1
                try:
                    step(self)
                except Exception as error:
                    error.add_note(f"{self.entry.name}: {self.entry.instructions[self.next - 1]}")
                    raise
            if self.next is not None:
                self.counters[self.active] = self.next

    def leave(self, counter: int, active=None):
        """Threads, of those that are active, go on elsewhere; the others with the next instruction."""
        self.counters[self.active] = self.next
        self.counters[self.active if active is None else active] = counter
        self.next = None

    def write(self, name: str, value, active=None):
        """Sets a register, which may be wider, of the threads that are active or of some of them."""
        value = np.broadcast_to(value, self.threads)
        if value.dtype != np.bool_:
            least = next((size for kind, size in WIDTHS.items() if name.startswith(kind)), 0)
            if value.dtype.kind == "f":
                value = value.view(UNSIGNED[8 * value.dtype.itemsize])
            if value.dtype.itemsize < least:
                value = value.astype(f"{value.dtype.kind}{least}")
            value = value.view(UNSIGNED[8 * value.dtype.itemsize])
        if active is None and not self.everyone:
            active = self.active
        if active is not None:
            value = np.where(active, value, self.registers.get(name, UNDEFINED.astype(value.dtype)))
        self.registers[name] = value

    def meet(self, size: int) -> np.ndarray:
        """Of every `size` threads, which are all here; parts have to wait, and are active no more."""
        active, live = (t.reshape(-1, size) for t in (self.active, self.live))
        whole = active.any(1) & (active == live).all(1)
        if not self.everyone:
            self.active = whole.repeat(size)
            parts = active.reshape(-1) & ~self.active
            self.counters[parts] = self.next - 1
            self.waiting |= parts
            if not self.active.any():
                self.next = None
        return whole

    def copy(self, active, places, addresses, present):
        """Words begin to be copied to shared memory, one for each of the threads."""
        threads = np.flatnonzero(active)
        self.shared.expect(places, COPIED_WORD, self.warp[threads])
        values = self._copied(addresses, present)
        self.copies.append(Copy(threads, self.groups[threads], places, addresses, present, values))

    def _copied(self, addresses, present):
        values = np.zeros(len(addresses), UNSIGNED[8 * COPIED_WORD])
        values[present] = self.memory.load(addresses[present], COPIED_WORD)
        return values

    def wait_for_copies(self, but: int):
        """The copies of active threads end, but for those of so many groups that were closed last."""
        waiting = []
        for copy in self.copies:
            ends = self.active[copy.threads] & (copy.groups < self.groups[copy.threads] - but)
            done = copy.of(ends)
            if (self._copied(done.addresses, done.present) != done.values).any():
                raise PtxError("memory was written while it was copied")
            self.shared.arrived(done.places, COPIED_WORD, done.values, self.warp[done.threads])
            if not ends.all():
                waiting.append(copy.of(~ends))
        self.copies = waiting

    def shared_places(self, addresses, size: int, active):
        """Where words are in the shared memory of all blocks."""
        addresses = addresses.astype(np.int64)
        rank, within = addresses >> CLUSTER_SHIFT, addresses & (1 << CLUSTER_SHIFT) - 1
        block, cluster = self.block[active], self.entry.cluster
        block = np.where(rank > 0, block // cluster * cluster + rank - 1, block)
        if (within + size > self.shared.size).any() or (rank > cluster).any():
            raise PtxError("an access outside of shared memory")
        return block * self.shared.size + within
