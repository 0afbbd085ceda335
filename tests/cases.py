"""Shapes, each with its reason. Small: the interpreter's time is programs launched."""

from dataclasses import dataclass

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Shape:
    m: int
    n: int
    reason: str

    def __str__(self):
        return f"{self.m}x{self.n}"


ROWS = (
    Shape(5, 1, "a row of one element"),
    Shape(3, 7, "shorter than any access is wide"),
    Shape(37, 64, "many short rows a program, and a last tile that is not full"),
    Shape(9, 127, "odd: one element short of a power of two"),
    Shape(3, 1000, "rows of a multiple of 16 bytes that is no power of two"),
    Shape(2, 1024, "a power of two, two rows a program"),
    Shape(2, 5124, "three tiles side by side, with padding in the last"),
    Shape(3, 4097, "odd, one element past a power of two"),
    Shape(1, 8192, "the longest resident backward of 16 and 32 bits"),
    Shape(2, 16392, "past the longest resident forward: looped and split, with a last chunk"),
    Shape(1, 65537, "long and odd"),
)

COMPARED = (
    Shape(37, 64, "several tiles"),
    Shape(3, 1000, "one row a program"),
    Shape(2, 20000, "looped"),
)
"""Large enough that the size of an error is not chance."""
