"""Launch choices: pure functions of sizes and dtype widths, nothing else. Where a table of
measured choices has an entry (`table.py`), it decides instead.

What changes the order of a reduction depends on the reduced size, on the dtype and on the memory format,
so that the bits of a row, or of an image, do not depend on how many there are; the number of partial
weight gradients depends on the tensor and not on the GPU. No choice is ever made by timing at run time.

Registers and spills were read off the compiler (`python -m perf lowering`); choices between forms
that compile equally clean wait for a measurement and say so.
"""

from . import channels, common, l2, rows, table, teams, weights

__all__ = ["channels", "common", "l2", "rows", "table", "teams", "weights"]
