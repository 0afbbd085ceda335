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
