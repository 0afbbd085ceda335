"""What is measured: operators, passes and sizes, each with its reason."""

from dataclasses import dataclass

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
PASSES = ("forward", "backward")


@dataclass(frozen=True)
class Operator:
    """A normalization as it is measured: the kernel's NORM and the parameters it has."""

    norm: str
    parameters: tuple[str, ...]


OPERATORS = {
    "layer_norm": Operator("layer", ("weight", "bias")),
    "rms_norm": Operator("rms", ("weight",)),
    "normalize": Operator("l2", ()),
}


BRIEF_OPERATORS = ("layer_norm", "rms_norm")
BRIEF_SIZES = (128, 1000, 4096, 8192, 16384, 65536)
"""What a table that is to be read at a glance shows: short and long rows, resident and not."""


@dataclass(frozen=True)
class Case:
    """One operator and pass on `[m, n]` rows. Parameters have the dtype of the input."""

    operator: str
    direction: str  # "forward" or "backward"
    m: int
    n: int
    dtype: str

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class ShapeSet:
    """Row shapes (m, n) that belong together, and why they are measured."""

    reason: str
    shapes: tuple[tuple[int, int], ...]


SHAPE_SETS = {
    "quick": ShapeSet(
        "one row length for each way a row is held, at a size that hides the launch: about a minute",
        ((131072, 256), (32768, 1024), (8192, 4096), (4096, 16384), (1024, 65536)),
    ),
    "sweep": ShapeSet(
        "row lengths from 64 to 262,144; from 256 up at quack's sizes, below 1,024 at 64 MB as well",
        (
            *((2**25 // n, n) for n in (64, 128, 256, 512)),
            *((32768, 2**k) for k in range(8, 17)),
            (16384, 131072),
            (8192, 262144),
        ),
    ),
    "llm": ShapeSet(
        "hidden sizes of language models, multiples of 512 as in tritonbench, at 4,096 tokens",
        tuple(
            (4096, n) for n in (1024, 1536, 2048, 2560, 3584, 4096, 5120, 6656, 7168, 8192, 12288, 15872)
        ),
    ),
    "odd": ShapeSet(
        "not powers of two, some with rows that are no multiple of 16 bytes (helion's sizes)",
        tuple((2048, n) for n in (48, 96, 127, 768, 1023, 1536, 3072, 5120, 6144)),
    ),
    "decode": ShapeSet(
        "one token: the time of a launch, not of memory",
        ((1, 4096), (1, 8192), (1, 16384)),
    ),
    "short": ShapeSet(
        "many short rows: the query and key norm of a video model (sglang), and helion's longest",
        ((648720, 128), (1179648, 256)),
    ),
}


def parse_shapes(names) -> list[tuple[int, int]]:
    """The shapes of set names and of texts such as `4096x1024`, in order, each once.

    Raises:
        ValueError: a text is neither.
    """
    shapes = []
    for name in names:
        m, x, n = name.partition("x")
        if name in SHAPE_SETS:
            shapes += SHAPE_SETS[name].shapes
        elif x and m.isdecimal() and n.isdecimal() and int(m) and int(n):
            shapes.append((int(m), int(n)))
        else:
            raise ValueError(f"{name!r} is neither a set ({', '.join(SHAPE_SETS)}) nor ROWSxCOLUMNS")
    return list(dict.fromkeys(shapes))
