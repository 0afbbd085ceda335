"""Arithmetic of tiles, two float32 elements an instruction where there are such instructions."""

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq, is_cuda


@triton.constexpr_function
def runs_ptx():
    """Whether a kernel becomes PTX, some of which can then be its own."""
    return is_cuda() and not triton.knobs.runtime.interpret


@triton.constexpr_function
def come_in_pairs(shape):
    """Whether the elements of a tile are an even number, as its sizes are powers of two."""
    return any(size > 1 for size in shape)


@triton.constexpr_function
def in_pairs(shape, *dtypes):
    """Whether an instruction computes two elements of tiles at once: of float32, from sm_100 on. Left to
    itself the compiler finds only some; those given to it it does not simplify, not even sums with 0."""
    floats = all(dtype == tl.float32 for dtype in dtypes)
    return floats and come_in_pairs(shape) and runs_ptx() and cuda_capability_geq(10)


@triton.constexpr_function
def pair_instruction(name, operands):
    """PTX of an instruction of two float32 at once: two registers of the result, two of each operand."""
    pairs = [f"%pair{i}" for i in range(operands)]
    return "\n".join(
        [
            "{",
            f".reg .b64 {', '.join(pairs)};",
            *(f"mov.b64 {pair}, {{${2 * i + 2}, ${2 * i + 3}}};" for i, pair in enumerate(pairs)),
            f"{name}.rn.f32x2 %pair0, {', '.join(pairs)};",
            "mov.b64 {$0, $1}, %pair0;",
            "}",
        ]
    )


@triton.constexpr_function
def pair_registers(operands):
    """The kinds of these registers."""
    return ",".join(["=f,=f", *["f,f"] * operands])


@triton.jit
def of_pairs(NAME: tl.constexpr, operands):
    """An instruction of two float32 at once, of tiles."""
    return tl.inline_asm_elementwise(
        pair_instruction(NAME, len(operands)),
        pair_registers(len(operands)),
        operands,
        dtype=tl.float32,
        is_pure=True,
        pack=2,
    )


@triton.jit
def add(a, b):
    """a + b, where a has the shape of the sum. This and what follows are in pairs if `in_pairs`."""
    return of_pairs("add", (a, b)) if in_pairs(a.shape, a.dtype, b.dtype) else a + b


@triton.jit
def subtract(a, b):
    """a - b."""
    return of_pairs("sub", (a, b)) if in_pairs(a.shape, a.dtype, b.dtype) else a - b


@triton.jit
def multiply(a, b):
    """a * b. In pairs it is rounded whatever becomes of it; else the compiler may make an FMA of it."""
    return of_pairs("mul", (a, b)) if in_pairs(a.shape, a.dtype, b.dtype) else a * b


@triton.jit
def multiply_add(a, b, c):
    """a * b + c, rounded once."""
    paired: tl.constexpr = in_pairs(a.shape, a.dtype, b.dtype, c.dtype)
    return of_pairs("fma", (a, b, c)) if paired else tl.fma(a, b, c)


@triton.jit
def product(a, b, ALONE: tl.constexpr):
    """a * b, of which sums over lanes are wanted. ALONE says that a thread may have one element of a
    sum: no FMA may then add its product to another lane's, which is rounded as its own would not be.
    The two lanes would have two sums, of which shared memory takes either."""
    if ALONE and not in_pairs(a.shape, a.dtype, b.dtype):
        found = tl.fma(a, b, tl.zeros_like(a))
    else:
        found = multiply(a, b)
    return found
