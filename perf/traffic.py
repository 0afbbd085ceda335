"""Bytes moved to and from memory: the floor, and what a launch moves."""

from .shapes import OPERATORS, Case


def tensor_bytes(case: Case) -> int:
    """T, the bytes of one activation tensor."""
    return case.m * case.n * case.itemsize


def floor_bytes(case: Case) -> int:
    """The least a pass can move: each activation, statistic and parameter once.

    Forward: x, y, the parameters, and the saved statistics. Backward: dy, x, dx, the statistics, the
    weight, and the parameters' gradients. Activations alone are 2T and 3T.
    """
    operator = OPERATORS[case.operator]
    statistics = case.m * max(case.itemsize, 4) * (2 if operator.norm == "layer" else 1)
    parameter = case.n * case.itemsize
    if case.direction == "forward":
        return 2 * tensor_bytes(case) + statistics + parameter * len(operator.parameters)
    weights = parameter * ("weight" in operator.parameters)
    return 3 * tensor_bytes(case) + statistics + weights + parameter * len(operator.parameters)
