"""What each instruction of PTX does to the threads that are at it."""

import re
from collections.abc import Callable

import numpy as np
from ptx import UNSIGNED, PtxError, bits_of, number, numpy_type, operation
from ptx_machine import CLUSTER_SHIFT, COPIED_WORD, WARP, Blocks

SPECIAL = {"%tid.x", "%ctaid.x", "%ctaid.y", "%nctaid.x", "%nctaid.y", "%cluster_ctarank"}


def _register(name: str) -> str:
    """The name, if it is one of a register."""
    if name not in SPECIAL and not re.fullmatch(r"%(p|r|rd|rs|pair)\d+", name):
        raise PtxError(f"unknown register {name}")
    return name


def _reader(operand, kind: str) -> Callable[[Blocks], np.ndarray]:
    """Reads a register, a number, or the one symbol, where shared memory begins."""
    if operand[0] != "%":
        value = number("0" if operand == "global_smem" else operand, kind)
        return lambda blocks: value
    _register(operand)
    numpy_kind, undefined = numpy_type(kind), number("-1", kind)

    def read(blocks):
        value = blocks.registers.get(operand, undefined)
        if value.dtype.itemsize > np.dtype(numpy_kind).itemsize:
            value = value.astype(UNSIGNED[bits_of(kind)])  # the lower bits
        return value.view(numpy_kind)

    return read


def _guarded(instruction) -> Callable[[Blocks], np.ndarray]:
    """The active threads whose predicate is as the guard wants it."""
    if instruction.guard is None:
        return lambda blocks: blocks.active
    name, expected = instruction.guard
    return lambda blocks: blocks.active & (blocks.registers[name] == expected)


def _members(operand) -> tuple[str, ...]:
    return operand if isinstance(operand, tuple) else (operand,)


def _named(operand) -> tuple[str, ...]:
    """The registers that are written."""
    return tuple(_register(name) for name in _members(operand))


def _branch(instruction, entry):
    target, guarded = entry.labels[instruction.operands[0]], _guarded(instruction)

    def step(blocks):
        taken = guarded(blocks)
        if taken.any():
            blocks.leave(target, taken)

    return step


def _return(instruction, entry):
    def step(blocks):
        blocks.live = blocks.live & ~blocks.active
        blocks.next, blocks.idle = None, 0

    return step


def _barrier(instruction, entry):
    of_cluster = instruction.opcode.startswith("barrier.cluster")
    if instruction.opcode == "bar.sync" and instruction.operands != ("0",):
        raise PtxError("a barrier of some warps")

    def step(blocks):
        here = blocks.meet(entry.threads * (entry.cluster if of_cluster else 1))
        here = here.repeat(entry.cluster) if of_cluster else here
        blocks.shared.barrier(here)
        blocks.stored &= ~here.repeat(entry.threads)

    return step


def _nothing(instruction, entry):
    """What needs nothing done where the threads of a warp are in step."""
    return lambda blocks: None


def _access(words, operand, size: int, count: int, guarded):
    """A function that gives the threads that access memory, and for each of `count` words side by side
    where they are; and whether it is shared memory."""
    shared = words[1].startswith("shared")
    readers = [_reader(term, "b32" if shared else "b64") for term in operand]

    def locate(blocks):
        active = guarded(blocks)
        addresses = sum(read(blocks) for read in readers[1:]) + readers[0](blocks)
        addresses = np.broadcast_to(addresses, blocks.threads)[active]
        if (addresses % addresses.dtype.type(size * count)).any():
            raise PtxError(f"an access of {size * count} bytes is not aligned")
        words = [addresses + addresses.dtype.type(size * i) for i in range(count)]
        return active, [blocks.shared_places(w, size, active) for w in words] if shared else words

    return locate, shared


def _load_parameter(instruction, entry):
    kind = numpy_type(instruction.opcode.split(".")[-1])
    name, (parameter,) = instruction.operands
    return lambda blocks: blocks.write(name, blocks.parameters[parameter].view(kind))


def _load(instruction, entry):
    words = instruction.opcode.split(".")
    size, names = bits_of(words[-1]) // 8, _named(instruction.operands[0])
    locate, shared = _access(words, instruction.operands[1], size, len(names), _guarded(instruction))

    def step(blocks):
        active, found = locate(blocks)
        for name, places in zip(names, found, strict=True):
            value = np.zeros(blocks.threads, UNSIGNED[8 * size])
            if shared:
                value[active] = blocks.shared.load(places, size, blocks.warp[active])
            else:
                value[active] = blocks.memory.load(places, size)
            blocks.write(name, value, active)
        if "acquire" in words:  # of what another block may still have to write
            blocks.waiting |= blocks.active
            blocks.leave(blocks.next)

    return step


def _store(instruction, entry):
    words = instruction.opcode.split(".")
    size, names = bits_of(words[-1]) // 8, _members(instruction.operands[1])
    locate, shared = _access(words, instruction.operands[0], size, len(names), _guarded(instruction))
    readers = [_reader(name, words[-1]) for name in names]

    def step(blocks):
        active, found = locate(blocks)
        for read, places in zip(readers, found, strict=True):
            values = np.broadcast_to(read(blocks), blocks.threads)[active]
            if shared:
                blocks.shared.store(places, size, values, blocks.warp[active])
            else:
                blocks.memory.store(places, size, values)
                blocks.stored |= active
                blocks.idle = 0

    return step


def _arrive(instruction, entry):
    """An atomic addition, which tells other blocks of all that this block has stored."""
    name, address, operand = instruction.operands
    (name,), read = _named(name), _reader(operand, "u32")
    locate, _ = _access(["atom", "global"], address, 4, 1, _guarded(instruction))

    def step(blocks):
        active, (addresses,) = locate(blocks)
        added = np.broadcast_to(read(blocks), blocks.threads)[active]
        others = np.isin(blocks.block, blocks.block[active]) & ~np.isin(blocks.warp, blocks.warp[active])
        if (blocks.stored & others).any():
            raise PtxError("other warps have stored, and no barrier is before the arrival")
        found = np.zeros(blocks.threads, np.uint32)
        for thread, at, more in zip(np.flatnonzero(active), addresses, added, strict=True):
            old = blocks.memory.load(at[None], 4)
            found[thread] = old[0]
            blocks.memory.store(at[None], 4, old + more)
        blocks.write(name, found, active)
        blocks.idle = 0

    return step


def _copy(instruction, entry):
    """cp.async: bytes from global to shared memory; those beyond a number of them are zero."""
    to, source, size, *present = instruction.operands
    size = int(size, 0)
    locate, _ = _access(["cp", "shared"], to, size, 1, _guarded(instruction))
    locate_source, _ = _access(["cp", "global"], source, size, 1, _guarded(instruction))
    read_present = _reader(present[0] if present else str(size), "b32")

    def step(blocks):
        active, (places,) = locate(blocks)
        _, (addresses,) = locate_source(blocks)
        present = np.broadcast_to(read_present(blocks), blocks.threads)[active]
        if (present % COPIED_WORD).any() or (present > size).any():
            raise PtxError(f"a copy of {present.max()} bytes of {size}")
        for at in range(0, size, COPIED_WORD):
            blocks.copy(active, places + at, addresses + np.uint64(at), present > at)

    return step


def _close_copies(instruction, entry):
    def step(blocks):
        blocks.groups += blocks.active

    return step


def _wait_for_copies(instruction, entry):
    but = int(instruction.operands[0])
    return lambda blocks: blocks.wait_for_copies(but)


def _matrices(instruction, entry):
    """ldmatrix and stmatrix: matrices of 8 x 8 elements of 16 bits. Thread i gives the address of row
    i % 8 of matrix i // 8, and holds of every matrix two elements of row i // 4, from 2 * (i % 4) on."""
    words = instruction.opcode.split(".")
    loads, transposed = words[0] == "ldmatrix", "trans" in words
    names, address = instruction.operands if loads else instruction.operands[::-1]
    names, read = _named(names), [_reader(term, "b32") for term in address]
    sources = [_reader(name, "b32") for name in names]

    def step(blocks):
        blocks.meet(WARP)
        starts = np.broadcast_to(sum(r(blocks) for r in read), blocks.threads).astype(np.int64)
        lane = np.arange(blocks.threads) % WARP
        first = np.arange(blocks.threads) - lane
        if (starts[(lane < 8 * len(names)) & blocks.active] % 16).any():
            raise PtxError("a row of a matrix that is not aligned")
        for i, (name, source) in enumerate(zip(names, sources, strict=True)):
            value = np.zeros(blocks.threads, np.uint32)
            if not loads:
                value = np.broadcast_to(source(blocks), blocks.threads)
            halves = []
            for half in range(2):
                row, column = lane // 4, lane % 4 * 2 + half
                if transposed:
                    row, column = column, row
                at = (starts[first + 8 * i + row] + 2 * column)[blocks.active]
                places = blocks.shared_places(at, 2, blocks.active)
                warps = blocks.warp[blocks.active]
                if loads:
                    halves.append(blocks.shared.load(places, 2, warps).astype(np.uint32))
                else:
                    part = (value >> np.uint32(16 * half)).astype(np.uint16)[blocks.active]
                    blocks.shared.store(places, 2, part, warps)
            if loads:
                value[blocks.active] = halves[1] << np.uint32(16) | halves[0]
                blocks.write(name, value, blocks.active)

    return step


def _shuffle(instruction, entry):
    _, _, mode, kind = instruction.opcode.split(".")
    name, operand, lane, clamp, members = instruction.operands
    _register(name)
    if (clamp, members) != ("31", "-1") or mode not in ("bfly", "idx"):
        raise PtxError(f"unknown instruction {instruction.opcode} {clamp}, {members}")
    read, read_lane = _reader(operand, kind), _reader(lane, "b32")

    def step(blocks):
        blocks.meet(WARP)
        own = np.arange(blocks.threads) % WARP
        lanes = np.broadcast_to(read_lane(blocks), blocks.threads).astype(np.int64) % WARP
        source = own ^ lanes if mode == "bfly" else lanes
        values = np.broadcast_to(read(blocks), blocks.threads)
        blocks.write(name, values[np.arange(blocks.threads) - own + source])

    return step


def _reduce(instruction, entry):
    name, operand, _ = instruction.operands
    _register(name)
    read = _reader(operand, instruction.opcode.split(".")[-1])

    def step(blocks):
        blocks.meet(WARP)
        values = np.broadcast_to(read(blocks), blocks.threads).reshape(-1, WARP)
        blocks.write(name, values.sum(1, dtype=values.dtype).repeat(WARP))

    return step


def _map_address(instruction, entry):
    name, address, rank = instruction.operands
    _register(name)
    read, read_rank = _reader(address, "b32"), _reader(rank, "b32")

    def step(blocks):
        block = read_rank(blocks) + np.uint32(1)
        blocks.write(name, read(blocks) + (block << np.uint32(CLUSTER_SHIFT)))

    return step


def _move_parts(instruction, entry):
    """A register to several that are its parts, or the reverse; the first is the lowest."""
    to, of = instruction.operands
    kind = instruction.opcode.split(".")[-1]
    names = tuple(name if name == "_" else _register(name) for name in _members(to))
    if isinstance(to, tuple):
        part, read = UNSIGNED[bits_of(kind) // len(to)], _reader(of, kind)

        def split(blocks):
            values = np.ascontiguousarray(np.broadcast_to(read(blocks), blocks.threads))
            parts = values.view(part).reshape(blocks.threads, -1)
            for i, name in enumerate(names):
                if name != "_":
                    blocks.write(name, np.ascontiguousarray(parts[:, i]))

        return split
    readers = [_reader(name, f"b{bits_of(kind) // len(of)}") for name in of]

    def join(blocks):
        parts = [np.broadcast_to(read(blocks), blocks.threads) for read in readers]
        blocks.write(to, np.stack(parts, axis=1).view(numpy_type(kind))[:, 0])

    return join


def _compute(instruction, entry):
    name, *operands = instruction.operands
    function, kinds = operation(instruction.opcode, len(operands))
    _register(name)
    readers = [_reader(operand, kind) for operand, kind in zip(operands, kinds, strict=True)]
    guarded = None if instruction.guard is None else _guarded(instruction)

    def step(blocks):
        value = function(*(read(blocks) for read in readers))
        blocks.write(name, value, guarded and guarded(blocks))

    return step


STEPS = {
    "bra": _branch,
    "ret": _return,
    "bar.sync": _barrier,
    "barrier.cluster": _barrier,
    "bar.warp": _nothing,
    "cp.async.ca.shared.global": _copy,
    "cp.async.cg.shared.global": _copy,
    "cp.async.commit_group": _close_copies,
    "cp.async.wait_group": _wait_for_copies,
    "ld.param": _load_parameter,
    "ld": _load,
    "st": _store,
    "atom.global.gpu.acq_rel.add.u32": _arrive,
    "ldmatrix.sync.aligned.m8n8": _matrices,
    "stmatrix.sync.aligned.m8n8": _matrices,
    "shfl": _shuffle,
    "redux.sync.add.s32": _reduce,
    "mapa": _map_address,
}
"""What an instruction does beside computing, by the longest beginning of its opcode."""


MAY_BE_GUARDED = {_branch, _load, _store, _arrive, _copy, _compute}


def _maker(instruction):
    words = instruction.opcode.split(".")
    for count in range(len(words), 0, -1):
        if make := STEPS.get(".".join(words[:count])):
            return make
    if any(isinstance(operand, tuple) for operand in instruction.operands):
        return _move_parts
    return _compute


def step_of(instruction, entry) -> Callable[[Blocks], None]:
    """What an instruction does to the active threads."""
    make = _maker(instruction)
    if instruction.guard is not None and make not in MAY_BE_GUARDED:
        raise PtxError(f"{instruction.opcode} with a guard")
    return make(instruction, entry)
