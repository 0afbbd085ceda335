"""Reading PTX and SASS: which tensor every access goes to and how wide it is, and what each loop holds.

A region is the code of a kernel outside of its loops, or of one loop outside of those within it. PTX and
SASS have the same loops in the same order; which the compiler merged or split are told apart by their
number.
"""

import hashlib
import re
import subprocess
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.runtime.cache import get_cache_manager

ACCESS = r"(ld|st|atom)[\w.:]*?\.global(?:[\w.:]*?\.v(\d)|[\w.:]*?)\.[bfus](\d+)\s(.*)"
"""A load, store or atomic of PTX: vector length, bits, operands; with any cache hints between."""

COPY = r"cp\.async\.c[ag]\.shared\.global\s+\[[^\]]*\], \[ (%\w+)[^\]]*\], (0x\w+)"
"""A load that goes to shared memory on its way: address, bytes."""

LABEL, BRANCH = r"^(\$L__BB\w+):", r"\bbra(?:\.uni)?\s+(\$L__BB\w+)"
DIVISION = r"(div|rem)\.[su](32|64)\b"
"""Of integers, by a number that is not known when it is compiled: others are multiplications."""

BARRIERS = ("bar.sync", "barrier.sync", "barrier.cluster.wait")
"""Of a block's warps, and of a cluster's."""

SASS_INSTRUCTION = r"^\s+/\*([0-9a-f]{4,})\*/\s+(?!NOP)(\S.*?);"
SASS_ACCESS = r"\b(LDG|LDGSTS|STG|ATOMG|ATOM|RED|REDG)\b"


@dataclass
class Region:
    """The straight code of a kernel, or one loop less those within it."""

    parent: int | None = None  # the region around a loop
    loads: dict[str, int] = field(default_factory=dict)  # bytes a thread reads, by tensor
    stores: dict[str, int] = field(default_factory=dict)
    accesses: int = 0  # instructions that access memory
    barriers: int = 0
    divisions: int = 0

    @property
    def touched(self) -> dict[str, int]:
        """Bytes that a thread reads or writes, by tensor."""
        both = {*self.loads, *self.stores}
        return {name: self.loads.get(name, 0) + self.stores.get(name, 0) for name in both}


def tool(name: str, *arguments: str) -> str:
    """What one of Triton's own tools for NVIDIA's machine code prints."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def on_cubin(name: str, option: str, cubin: bytes) -> str:
    """What a tool prints of machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tool(name, option, file.name)


def _spans(starts: dict[str, int], branches) -> list[tuple[int, int]]:
    """First and last line of each loop, outer ones first: of the branches (line, label) that go back."""
    ends = {}
    for line, label in branches:
        if label in starts and starts[label] < line:  # a branch to itself only pads the end
            ends[starts[label]] = max(line, ends.get(starts[label], 0))
    return sorted(ends.items(), key=lambda span: (span[0], -span[1]))


def _narrowest(spans, some) -> int:
    """The region of the narrowest of some of the spans; 0 where there are none."""
    return 1 + spans.index(min(some, key=lambda s: s[1] - s[0])) if some else 0


def _innermost(spans, line: int) -> int:
    """The region of a line: 0 is outside of all loops, i + 1 within the loop of span i."""
    return _narrowest(spans, [(first, last) for first, last in spans if first <= line <= last])


def _parents(spans) -> list[int | None]:
    """The region around each region."""
    parents: list[int | None] = [None]
    for first, last in spans:
        around = [s for s in spans if s[0] <= first and last <= s[1] and s != (first, last)]
        parents.append(_narrowest(spans, around))
    return parents


def read_ptx(ptx: str, pointers: dict[int, str]) -> tuple[dict[str, list[int]], list[Region]]:
    """Bytes of every global access, by the tensor it goes to, and the regions of the code.

    `pointers` names the kernel's parameters that are pointers. An address is traced back through the
    instructions that made it to the one pointer among the parameters.

    Raises:
        ValueError: there is an access of a kind that is not known.
    """
    sources = defaultdict(list)  # register -> the instructions that write it
    accesses, labels, branches, barriers, divisions = [], {}, [], [], []
    for number, line in enumerate(ptx.splitlines()):
        if label := re.match(LABEL, line):
            labels[label[1]] = number
        text = line.split("//")[0].strip().rstrip(";")
        text = re.sub(r"^@!?%p\d+\s+", "", text)
        if access := re.match(ACCESS, text):
            address = re.search(r"\[\s*(%\w+)", access[4])
            size = int(access[2] or 1) * int(access[3]) // 8
            accesses.append((number, access[1], address[1], size))
        elif copy := re.match(COPY, text):
            accesses.append((number, "ld", copy[1], int(copy[2], 16)))
        elif re.match(r"(ld|st|red|atom|cp)\S*\.global", text):
            raise ValueError(f"an access of a kind that is not counted: {text}")
        elif match := re.match(r"ld\.param\S*\s+(%\w+),\s*\[\w+_param_(\d+)", text):
            sources[match[1]].append(int(match[2]))
        elif branch := re.search(BRANCH, text):
            branches.append((number, branch[1]))
        elif text.startswith(BARRIERS):
            barriers.append(number)
        elif match := re.match(r"[a-z][\w.:]*\s+(%\w+),\s*(.*)", text):
            sources[match[1]].append(re.findall(r"%[a-z]+\d+", match[2]))
            if re.match(DIVISION, text):
                divisions.append(number)

    spans = _spans(labels, branches)
    regions = [Region(parent) for parent in _parents(spans)]
    widths = {name: [] for name in pointers.values()}
    for number, kind, register, size in accesses:
        name = _tensor_of(register, sources, pointers)
        widths[name].append(size)
        region = regions[_innermost(spans, number)]
        region.accesses += 1
        bytes_of = region.loads if kind == "ld" else region.stores
        bytes_of[name] = bytes_of.get(name, 0) + size
    for number in barriers:
        regions[_innermost(spans, number)].barriers += 1
    for number in divisions:
        regions[_innermost(spans, number)].divisions += 1
    return widths, regions


def _tensor_of(register: str, sources, pointers: dict[int, str]) -> str:
    """The tensor that an address is in."""
    seen, waiting, names = set(), [register], set()
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        for source in sources[current]:
            if isinstance(source, int):
                names |= {pointers[source]} if source in pointers else set()
            else:
                waiting += source
    (name,) = names
    return name


def uneven_sums(ptx: str) -> int:
    """Additions of a product to that of another lane which are FMAs: the lane's own is then not rounded,
    the other's is, and the two lanes have different sums of the same numbers."""
    factors, shuffled, whole, found = {}, {}, {}, 0
    for line in ptx.splitlines():
        opcode, operands = [*line.split(None, 1), "", ""][:2]
        names = re.findall(r"%\w+", operands)
        if opcode.startswith("mul.f"):
            factors[names[0]] = {*names[1:]}
        elif opcode.startswith("shfl."):
            source = names[1]
            shuffled[names[0]] = whole.get(source, source)
        elif opcode == "mov.b64" and operands.startswith("{"):
            whole |= dict.fromkeys(names[:-1], names[-1])  # two numbers, to shuffle each
        elif opcode == "mov.b64" and {*names[1:]} <= {*shuffled} and len(names) == 3:
            shuffled[names[0]] = shuffled[names[1]]
        elif opcode.startswith("fma.") and names[-1] in shuffled:
            found += factors.get(shuffled[names[-1]]) == {*names[1:-1]}
    return found


def disassemble(cubin: bytes) -> str:
    """SASS of machine code. The disassembler takes half a second: its answer stays in Triton's cache."""
    cache = get_cache_manager(hashlib.sha256(cubin).hexdigest())
    if kept := cache.get_file("kernel.sass"):
        return Path(kept).read_text()
    sass = on_cubin("cuobjdump", "-sass", cubin)
    cache.put(sass, "kernel.sass", binary=False)
    return sass


def read_sass(sass: str) -> tuple[list[int], list[int]]:
    """Instructions, and accesses of memory, of each region, as far as a program without special cases
    goes: what follows the last exit are subroutines for the edges of divisions and roots."""
    found = re.findall(SASS_INSTRUCTION, sass, re.MULTILINE)
    exits = [i for i, (_, text) in enumerate(found) if re.search(r"\bEXIT\b", text)]
    found = found[: exits[-1] + 1] if exits else found
    lines = {f"0x{int(address, 16):x}": i for i, (address, _) in enumerate(found)}
    branches = [
        (i, f"0x{int(branch[1], 16):x}")
        for i, (_, text) in enumerate(found)
        if (branch := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text))
    ]
    spans = _spans(lines, branches)
    instructions, accesses = [0] * (len(spans) + 1), [0] * (len(spans) + 1)
    for i, (_, text) in enumerate(found):
        region = _innermost(spans, i)
        instructions[region] += 1
        accesses[region] += bool(re.search(SASS_ACCESS, text))
    return instructions, accesses
