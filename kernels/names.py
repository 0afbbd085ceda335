"""What profilers are told: a compiled function's name, and the shape, bytes and operations of a launch.

`kernel` is `triton.jit` for what is launched. Functions that kernels are made of have no launch to be
described, and remain `triton.jit`.

Bytes are those that a launch has to move, from the sizes of its tensors: activations as often as the
kernel reads or writes them, running statistics twice, and everything else, which L2 serves where many
programs read it, once. Operations are additions and multiplications of an element of 16 bits, with all
the parameters that a normalization can have.
"""

import triton
from triton import knobs
from triton.runtime.jit import JITFunction

DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}
"""PyTorch's names of dtypes, as Triton has them."""

OPERATORS = {"layer": "layer_norm", "rms": "rms_norm", "l2": "normalize"}
"""What users call a NORM of rows."""

PASSES = {"forward": "fwd", "backward": "bwd"}

SWEPT_TWICE = {"row_forward_looped": ("x",), "team_forward": ("x",), "team_backward": ("dy", "x")}
"""Activations that a kernel reads twice."""

RUNNING = ("running_mean", "running_var")
"""What is read and then written."""

SOURCES = ("x", "dy", "dweight_partial", "dbias_partial", "mean_partial")
"""The first of these that a launch has is what it works on: its elements and dtype are the launch's. Of
a launch that has none of them it is any tensor: a description must not end somebody's program."""

TILES = (("BLOCK_C", "BLOCK_S"), ("BLOCK_P", "BLOCK_C"), ("BLOCK_P", "BLOCK_N"))
"""Parameters that name a tile where no length of a row does."""

OPERATIONS = {
    "row_forward_resident": 7,  # sum, less the mean, square and sum, scale, weight, bias
    "row_forward_looped": 12,  # Welford's algorithm takes seven, x less the mean in two steps two
    "row_gradient_means": 6,  # x_hat two, weight, two sums of which one is of products
    "row_backward": 13,  # x_hat two, three for the parameters, weight, three for c1 and c2, four for dx
    "row_team_forward": 10,  # of 32 bits, whose mean is taken twice; and moved to that of the row
    "row_team_backward": 13,
    "group_forward": 6,
    "group_backward": 9,
    "channel_moments": 8,  # Welford's algorithm six; and merging lanes, at the end of a few steps
    "channel_normalize": 3,
    "channel_gradient_sums": 5,
    "channel_input_gradient": 6,
    "team_forward": 10,
    "team_backward": 11,
    "weight_forward": 3,
    "weight_backward": 6,
    "weight_squares": 2,
    "weight_normalize": 1,
    "weight_gradient_sums": 3,
    "weight_input_gradient": 4,
    "fold_parameter_gradients": 2,  # of each element of dweight_partial, and of dbias_partial's
    "fold_moments": 7,
    "fold_gradient_means": 2,
}
"""Additions and multiplications an element of what a launch works on."""

WITHOUT_MEAN = {
    "row_forward_resident": 4,
    "row_forward_looped": 4,
    "row_gradient_means": 5,
    "row_backward": 11,
    "row_team_forward": 4,
    "row_team_backward": 11,
}
"""The same of rows that have no mean, nor a bias."""


def function_name(name, specialization):
    """The compiled function's name, from what its code depends on, as far as that is short:
    `row_forward_resident_layer_bf16_n4096`.

    `specialization` has the constants by parameter, and the signature: `*bf16` for a pointer.
    """
    constants = specialization.constants
    dtypes = [specialization.signature.get(f"{source}_ptr", "") for source in SOURCES]
    parts = [name, constants.get("NORM"), next((d[1:] for d in dtypes if d.startswith("*")), None)]
    if constants.get("N") is not None:
        parts.append(f"n{constants['N']}")
    else:
        tile = next((tile for tile in TILES if all(size in constants for size in tile)), ())
        parts.append("x".join(str(constants[size]) for size in tile))
    if constants.get("ADJACENT") is not None:
        parts.append(f"along_{constants['ADJACENT']}")
    if constants.get("SAVED") == "y":
        parts.append("from_y")
    return "_".join(str(part) for part in parts if part)


def tensors(arguments):
    """The tensors of a launch, a list by name: of many at once, whose pointers are in a table, all."""
    operands = getattr(arguments.get("table_ptr"), "operands", {})
    found = {}
    for parameter, value in arguments.items():
        name = parameter.removesuffix("_ptr")
        if name != parameter and value is not None:
            found[name] = operands.get(name) or [value]
    return found


def elements(members):
    """Elements of all of these tensors."""
    return sum(tensor.numel() for tensor in members)


def source_of(found):
    """What a launch works on, of its tensors."""
    return next((found[source] for source in SOURCES if source in found), next(iter(found.values())))


def moved_bytes(name, arguments):
    """The bytes that a launch has to read and write."""
    found = tensors(arguments)
    moved = 0
    for tensor, members in found.items():
        times = 2 if tensor in (*SWEPT_TWICE.get(name, ()), *RUNNING) else 1
        moved += times * elements(members) * members[0].element_size()
    if name == "row_forward_looped" and arguments["NORM"] == "layer":
        # The first chunk once more, whose mean the others are shifted by.
        first = arguments["M"] * min(arguments["BLOCK_N"], arguments["N"])
        moved += first * found["x"][0].element_size()
    if "mean_partial" in found and "x" in found:
        # The first element of every channel of a piece, likewise.
        moved += elements(found["mean_partial"]) * found["x"][0].element_size()
    return moved


def _shape(arguments, source):
    """What a launch works on, in words: `[4096, 8192]`, or how many tensors."""
    if len(source) > 1:
        return f"{len(source)} tensors"
    if "ROWS" in arguments:
        names = ("M", "N")
    elif "x_ptr" in arguments:
        names = [size for size in ("N", "C", "S") if size in arguments]
    else:
        return str(list(source[0].shape))
    return str([arguments[size] for size in names])


def label(name, arguments):
    """A launch in a line: `layer_norm_bwd [4096, 8192] bf16`."""
    source = source_of(tensors(arguments))
    if "NORM" in arguments:
        norm = arguments["NORM"]
        step = name.removeprefix("row_").removesuffix("_resident").removesuffix("_looped")
        name = f"{OPERATORS.get(norm, norm)}_{PASSES.get(step, step)}"
    dtype = str(source[0].dtype).rpartition(".")[2]
    words = [name, _shape(arguments, source), DTYPES.get(dtype, dtype)]
    if "CG" in arguments:
        if arguments["CG"] > 1:
            words.append(f"groups of {arguments['CG']}")
        elif arguments.get("SETS") == 0:
            words.append("over the batch")
    return " ".join(words)


def describe(name, arguments):
    """What Triton's `launch_metadata` returns: the keys that proton knows."""
    source = source_of(tensors(arguments))
    description = {"name": label(name, arguments), "bytes": moved_bytes(name, arguments)}
    if name in OPERATIONS:
        width = max(8 * source[0].element_size(), 32)  # kernels compute in float32 at least
        has_mean = arguments.get("NORM", "layer") == "layer"
        operations = OPERATIONS[name] if has_mean else WITHOUT_MEAN.get(name, OPERATIONS[name])
        if name == "row_backward" and arguments["c1_ptr"] is not None:
            operations -= 3  # c1 and c2 are there
        description[f"flops{width}"] = operations * elements(source)
    return description


class Kernel(JITFunction):
    """A kernel that describes its launches while a hook asks for it. Triton always has a chain of hooks,
    which may be empty, and would gather all arguments for a description that nobody reads."""

    @property
    def launch_metadata(self):
        hook = knobs.runtime.launch_enter_hook
        return self.describe_launch if getattr(hook, "calls", hook) else None


def kernel(**options):
    """Decorates what is launched, with the options of `triton.jit`."""

    def decorate(function):
        name = function.__name__
        jitted = triton.jit(function, repr=lambda found: function_name(name, found), **options)
        if isinstance(jitted, JITFunction):  # and not the interpreter's, which launches nothing
            jitted.__class__ = Kernel
        jitted.describe_launch = lambda grid, metadata, arguments: describe(name, arguments)
        return jitted

    return decorate
