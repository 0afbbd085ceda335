"""PTX as data: the entry of a module, and what its instructions compute with NumPy's arrays.

After NVIDIA's "Parallel Thread Execution ISA". Approximate instructions are rounded as if they were
exact, and an FMA from the next wider type, in which that of float64 is not exact. What Triton does not
make of these kernels is refused.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class PtxError(Exception):
    """No GPU would do this, or not do the same twice; or we know no such instruction."""


@dataclass(frozen=True)
class Instruction:
    """`@guard opcode operands;`: the guard is a predicate's name, and what it has to be. An operand is a
    register, symbol or number as it stands, a tuple of such, or for an address a list of what is added
    up."""

    opcode: str
    operands: tuple
    guard: tuple[str, bool] | None


@dataclass(frozen=True)
class Entry:
    """A kernel: its parameters as (type, name), threads of a block, blocks of a cluster, instructions,
    and the number of the instruction behind each label."""

    name: str
    parameters: list[tuple[str, str]]
    threads: int
    cluster: int
    instructions: list[Instruction]
    labels: dict[str, int]


def _operand(text: str):
    if text[0] == "{":
        return tuple(re.split(r"[,\s]+", text[1:-1].strip()))
    if text[0] == "[":
        return text[1:-1].replace(" ", "").split("+")
    return text


@lru_cache(maxsize=64)
def parse(ptx: str) -> Entry:
    """Reads the one entry of a module."""
    ptx = re.sub(r"//[^\n]*", "", ptx)
    found = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\n\{(.*)\n\}", ptx, re.DOTALL)
    name, parameters, directives, body = found.groups()
    cluster = re.search(r"\.reqnctapercluster (\d+)", directives)
    body = re.sub(r"^\s*\.(loc|pragma|file)\b[^\n]*", "", body, flags=re.MULTILINE)
    instructions, labels = [], {}
    for text in re.split(r"\n|;", body):
        if text.count("{") != text.count("}"):  # of a scope
            text = re.sub(r"^[\s{}]+|[\s{}]+$", "", text)
        text = text.strip()
        while match := re.match(r"([\w$]+):\s*", text):
            labels[match[1]] = len(instructions)
            text = text[match.end() :]
        if match := re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)(?:\s+(.*))?", text):
            guard = (match[2], not match[1]) if match[2] else None
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", match[4] or "")
            instructions.append(Instruction(match[3], tuple(map(_operand, operands)), guard))
        elif text and not text.startswith(".reg"):
            raise PtxError(f"cannot read {text!r}")
    return Entry(
        name,
        re.findall(r"\.param \.(\w+)[^,\n]*?(\w+)(?=,|\n|$)", parameters),
        int(re.search(r"\.reqntid (\d+)", directives)[1]),
        int(cluster[1]) if cluster else 1,
        instructions,
        labels,
    )


UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS = {16: np.float16, 32: np.float32, 64: np.float64}
WIDER = {np.float16: np.float32, np.float32: np.float64, np.float64: np.longdouble}
WIDER |= {np.uint16: np.uint32, np.uint32: np.uint64, np.int16: np.int32, np.int32: np.int64}


def bits_of(kind: str) -> int:
    """Of a PTX type, such as "s32"; of two that are packed all."""
    bits = int(re.search(r"[a-z](\d+)", kind)[1])
    return 2 * bits if kind.endswith("x2") else bits


def numpy_type(kind: str):
    """NumPy's type of what is in a register; of bfloat16, which it has not, the bits."""
    by_bits = {"f": FLOATS, "s": SIGNED}.get(kind[0], UNSIGNED)
    return np.bool_ if kind == "pred" else by_bits[bits_of(kind)]


def number(text: str, kind: str) -> np.ndarray:
    """A number as it stands in an instruction."""
    if kind == "pred":
        return np.array(int(text) != 0)
    unsigned = UNSIGNED[bits_of(kind)]
    if text[:2] in ("0f", "0d"):
        return np.array(int(text[2:], 16), unsigned).view(numpy_type(kind))
    return np.array(int(text.rstrip("U"), 0) % (1 << bits_of(kind)), unsigned).view(numpy_type(kind))


def _from_bfloat16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(values):
    """The bits of bfloat16, rounded to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def _through_wider(function):
    """A function of floats that is computed in the next wider type, and rounded once."""

    def rounded(*values):
        kind = values[-1].dtype.type
        return function(*(value.astype(WIDER[kind]) for value in values)).astype(kind)

    return rounded


def _times_wide(a, b):
    return a.astype(WIDER[a.dtype.type]) * b.astype(WIDER[a.dtype.type])


def _quotient(a, b):
    """Rounded towards zero, of integers."""
    if a.dtype.kind == "f":
        return a / b
    quotient = a // b
    return quotient + ((quotient * b != a) & ((a < 0) != (b < 0))).astype(a.dtype)


def _bit_field(a, first, length):
    if (first + length > 8 * a.dtype.itemsize).any():
        raise PtxError("a field of more bits than there are")
    above = (8 * a.dtype.itemsize - length).astype(a.dtype)
    return a << (above - first.astype(a.dtype)) >> above


def _permute(a, b, selector):
    """Of the bytes of b and a one for each digit of the selector, of which bit 3 is for its sign."""
    pair = b.astype(np.uint64) << np.uint64(32) | a
    result = np.zeros(pair.shape, np.uint32)
    for i in range(4):
        digit = (selector >> np.uint32(4 * i)).astype(np.uint64) & np.uint64(15)
        byte = (pair >> np.uint64(8) * (digit & np.uint64(7))).astype(np.uint32) & np.uint32(0xFF)
        byte = np.where(digit & np.uint64(8), np.where(byte & 0x80, 0xFF, 0), byte).astype(np.uint32)
        result |= byte << np.uint32(8 * i)
    return result


def _funnel(low, high, amount):
    """The upper half of two words side by side, shifted to the left."""
    pair = high.astype(np.uint64) << np.uint64(32) | low
    shifted = pair << (amount & np.uint32(31)).astype(np.uint64)
    return (shifted >> np.uint64(32)).astype(np.uint32)


def _shift(function):
    """By so many bits, or by all that there are."""
    return lambda a, amount: function(a, np.minimum(amount, 8 * a.dtype.itemsize).astype(a.dtype))


def _extreme(of_floats, of_integers):
    return lambda a, b: of_floats(a, b) if a.dtype.kind == "f" else of_integers(a, b)


FUNCTIONS = {
    "mov": lambda a: a,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mul.wide": _times_wide,
    "mul.hi": lambda a, b: (_times_wide(a, b) >> 8 * a.dtype.itemsize).astype(a.dtype),
    "mad": lambda a, b, c: a * b + c,
    "mad.wide": lambda a, b, c: _times_wide(a, b) + c,
    "fma": _through_wider(lambda a, b, c: a * b + c),
    "div": _quotient,
    "rem": np.fmod,
    "neg": np.negative,
    "min": _extreme(np.fmin, np.minimum),
    "max": _extreme(np.fmax, np.maximum),
    "sqrt": np.sqrt,
    "rsqrt": _through_wider(lambda a: 1 / np.sqrt(a)),
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "shl": _shift(np.left_shift),
    "shr": _shift(np.right_shift),
    "shf.l": _funnel,
    "bfe": _bit_field,
    "prmt": _permute,
    "selp": lambda a, b, chosen: np.where(chosen, a, b),
}
"""What instructions compute, by the first two words of their opcode or by the first."""

WORDS = {"rn", "approx", "full", "ftz", "lo", "wide", "wrap", "l"}
"""What may stand between an instruction's name and its type; "hi" in a multiplication alone."""

TYPES = re.compile(r"pred|[bsu](8|16|32|64)|f(16|32|64)|f16x2|f32x2")

COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}

LAST_OPERAND = {"selp": "pred", "shl": "b32", "shr": "b32", "prmt": "b32"}


class Operation(NamedTuple):
    """A function of arrays, and the PTX types of these."""

    function: Callable
    operands: tuple[str, ...]


def _unknown(opcode: str) -> PtxError:
    return PtxError(f"unknown instruction {opcode}")


def _comparison(words, kind) -> Operation:
    """Unordered comparisons, with a "u" behind their name, hold of NaN; others do not."""
    unordered = words[1].endswith("u")
    compare = COMPARISONS.get(words[1].removesuffix("u"))
    if len(words) != 3 or compare is None or not TYPES.fullmatch(kind) or kind.endswith("x2"):
        raise _unknown(".".join(words))
    if kind[0] != "f":
        return Operation(compare, (kind, kind))

    def of_floats(a, b):
        return np.where(np.isnan(a) | np.isnan(b), unordered, compare(a, b))

    return Operation(of_floats, (kind, kind))


def _conversion(words) -> Operation:
    to, of = words[-2:]
    known = TYPES.fullmatch(to.replace("bf", "f")) and TYPES.fullmatch(of.replace("bf", "f"))
    to_integer = "f" in of and "f" not in to
    if not known or to_integer or not {*words[1:-2]} <= {"rn"}:
        raise _unknown(".".join(words))
    if to.endswith("x2"):  # the first operand becomes the upper half
        narrow = _conversion([*words[:-2], to.removesuffix("x2"), of]).function

        def pack(high, low):
            high, low = (narrow(half).view(np.uint16).astype(np.uint32) for half in (high, low))
            return high << np.uint32(16) | low

        return Operation(pack, (of, of))
    if to == "bf16":
        return Operation(_to_bfloat16, (of,))
    if of == "bf16":
        return Operation(lambda a: _from_bfloat16(a).astype(numpy_type(to)), ("b16",))
    return Operation(lambda a: a.astype(numpy_type(to)), (of,))


def _of_pairs(operation: Operation, kind: str) -> Operation:
    """The same of two floats side by side."""
    single, both = numpy_type(kind.removesuffix("x2")), f"b{bits_of(kind)}"

    def of_pairs(*packed):
        values = np.broadcast_arrays(*packed)
        pairs = [np.ascontiguousarray(value).view(single) for value in values]
        return operation.function(*pairs).view(numpy_type(both))

    return Operation(of_pairs, (both,) * len(operation.operands))


def _of_mixed(operation: Operation, narrow: str, wide: str) -> Operation:
    """The same of operands in 16 bits but for the last one."""
    widen = _from_bfloat16 if narrow == "bf16" else lambda a: a.astype(numpy_type(wide))

    def of_mixed(*values):
        return operation.function(*map(widen, values[:-1]), values[-1])

    kinds = (narrow if narrow == "f16" else "b16",) * (len(operation.operands) - 1)
    return Operation(of_mixed, (*kinds, wide))


def _with_one_nan(function):
    """The same, with NaN of one kind, as a GPU's arithmetic makes it."""

    def of_one_nan(*values):
        result = function(*values)
        if result.dtype.kind == "f" and np.isnan(result).any():
            result = np.where(np.isnan(result), number("-1", f"f{8 * result.itemsize}"), result)
        return result

    return of_one_nan


def _flushed(operation: Operation) -> Operation:
    """The same with zero for subnormal numbers."""

    def flush(a):
        return np.where(np.abs(a) < np.finfo(a.dtype).tiny, np.copysign(a.dtype.type(0), a), a)

    def function(*values):
        return flush(operation.function(*map(flush, values)))

    return Operation(function, operation.operands)


@lru_cache(maxsize=1024)
def operation(opcode: str, operands: int) -> Operation:
    """What an instruction that is neither control nor memory computes from so many operands."""
    words = opcode.split(".")
    name, kind = words[0], words[-1]
    if name == "cvt":
        return _conversion(words)
    if name == "setp":
        return _comparison(words, kind)
    function = FUNCTIONS.get(".".join(words[:2]), FUNCTIONS.get(name))
    mixed = kind in ("f16", "bf16") and words[-2] == "f32"
    modifiers = {*words[1 : -2 if mixed else -1]}
    known = WORDS | {"hi"} if name == "mul" else WORDS
    if function is None or not modifiers <= known or not (mixed or TYPES.fullmatch(kind)):
        raise _unknown(opcode)
    if kind in ("f16x2", "f32x2"):
        return _of_pairs(operation(opcode.removesuffix("x2"), operands), kind)
    if mixed:
        return _of_mixed(operation(opcode.removesuffix(f".{kind}"), operands), kind, "f32")
    kinds = [kind] * operands
    if words[1] == "wide":
        kinds[2:] = [kind[0] + str(2 * bits_of(kind))] * (operands - 2)
    elif name == "bfe":
        kinds[1:] = ["b32"] * (operands - 1)
    elif name in LAST_OPERAND:
        kinds[-1] = LAST_OPERAND[name]
    found = Operation(_with_one_nan(function), tuple(kinds))
    return _flushed(found) if "ftz" in words else found
