"""What is measured: operators, passes and shapes, each with its reason."""

import re
from dataclasses import dataclass, replace
from math import prod

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
PASSES = ("forward", "backward")

LAYOUTS = ("contiguous", "channels_last")
"""What is adjacent in memory of `[images, channels, *spatial]`: its last dimension, or channels. With
three spatial dimensions PyTorch calls the latter channels_last_3d."""

DEFAULT_GROUPS = 32
"""Groups of GroupNorm, as in its paper (Wu and He, arXiv:1803.08494) and in diffusion models."""


@dataclass(frozen=True)
class Operator:
    """A normalization as it is measured: what shares statistics, and which tensors it takes."""

    family: str  # "rows": [m, n], "channels": [images, channels, *spatial], or "weights": of any shape
    sets: tuple[str, ...]  # sizes of a Case, whose product counts the sets that share statistics
    norm: str  # the kernel's NORM
    parameters: tuple[str, ...]
    running: str | None = None  # running statistics are "updated" or "read"
    wide_parameters: bool = False
    """Parameters and running statistics in float32 for 16-bit inputs: what training under autocast has
    where it does not widen the input itself, and what cuDNN requires."""
    dim: int | None = None  # of weights, along which their norms lie; None for one norm of all

    @property
    def images_share(self) -> bool:
        """Whether a channel's statistics are over all images."""
        return self.sets == ("channels",)

    @property
    def stacked(self) -> bool:
        """Whether the first dimension counts layers: tensors of their own, normalized together."""
        return "stack" in self.sets


AFFINE = ("weight", "bias")

OPERATORS = {
    "layer_norm": Operator("rows", ("m",), "layer", AFFINE),
    "rms_norm": Operator("rows", ("m",), "rms", ("weight",)),
    "normalize": Operator("rows", ("m",), "l2", ()),
    "batch_norm": Operator(
        "channels", ("channels",), "layer", AFFINE, running="updated", wide_parameters=True
    ),
    "batch_norm_eval": Operator(
        "channels", ("channels",), "layer", AFFINE, running="read", wide_parameters=True
    ),
    "group_norm": Operator("channels", ("images", "groups"), "layer", AFFINE),
    "instance_norm": Operator("channels", ("images", "channels"), "layer", AFFINE, wide_parameters=True),
    "weight_norm": Operator("weights", ("m",), "l2", ("gain",), dim=0),
    "weight_norm_dim1": Operator("weights", ("channels",), "l2", ("gain",), dim=1),
    "weight_norm_all": Operator("weights", (), "l2", ("gain",)),
    "weight_norms": Operator("weights", ("stack", "channels"), "l2", ("gain",), dim=0),
}


def of_family(family: str) -> tuple[str, ...]:
    """The operators of a family."""
    return tuple(name for name, operator in OPERATORS.items() if operator.family == family)


ROW_OPERATORS, CHANNEL_OPERATORS, WEIGHT_OPERATORS = map(of_family, ("rows", "channels", "weights"))
BATCH_OPERATORS = ("batch_norm", "batch_norm_eval")
SINGLE_WEIGHT_OPERATORS = tuple(name for name in WEIGHT_OPERATORS if not OPERATORS[name].stacked)

BRIEF_OPERATORS = ("layer_norm", "rms_norm")
BRIEF_SIZES = (128, 1000, 4096, 8192, 16384, 65536)
"""What a table that is to be read at a glance shows: short and long rows, resident and not."""


def layouts_of(operator: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    """The layouts in which an operator takes a shape: one where nothing is spatial."""
    spatial = OPERATORS[operator].family == "channels" and len(shape) > 2
    return LAYOUTS if spatial else LAYOUTS[:1]


@dataclass(frozen=True)
class Case:
    """One operator and pass on a tensor of rows, of images with channels, or of weights.

    Raises:
        ValueError: the operator does not take this shape, layout or number of groups.
    """

    operator: str
    direction: str  # "forward" or "backward"
    shape: tuple[int, ...]  # [m, n], [images, channels, *spatial], or [layers, *shape of a layer]
    dtype: str
    layout: str = "contiguous"
    groups: int | None = None  # of group_norm alone

    def __post_init__(self):
        operator, dimensions = OPERATORS[self.operator], len(self.shape)
        least = 3 if operator.stacked else 2
        if dimensions < least or (operator.family == "rows" and dimensions > 2):
            raise ValueError(f"{self.operator} takes no tensor of {dimensions} dimensions")
        if self.layout not in layouts_of(self.operator, self.shape):
            raise ValueError(f"{self.name}: there is no layout {self.layout!r}")
        if (self.groups is not None) != ("groups" in operator.sets):
            raise ValueError(f"{self.operator} of {self.groups} groups")
        if self.groups is not None and (self.groups < 1 or self.channels % self.groups):
            raise ValueError(f"{self.name}: {self.channels} channels make no {self.groups} groups")

    @property
    def name(self) -> str:
        """The shape as text: `8x320x64x64`."""
        return "x".join(map(str, self.shape))

    def _text(self, *shape: str) -> str:
        layout = [self.layout] if OPERATORS[self.operator].family == "channels" else []
        return " ".join((self.operator, self.direction, *shape, *layout, self.dtype))

    @property
    def kind(self) -> str:
        """The case but for its shape: `group_norm forward channels_last bf16`."""
        return self._text()

    @property
    def label(self) -> str:
        """The case in a line: `group_norm forward 8x320x64x64:32 channels_last bf16`."""
        return self._text(f"{self.name}:{self.groups}" if self.groups else self.name)

    @property
    def m(self) -> int:
        """The number of rows."""
        return self.shape[0]

    @property
    def n(self) -> int:
        """The length of a row."""
        return self.shape[1]

    @property
    def images(self) -> int:
        return self.shape[0]

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def stack(self) -> int:
        """The number of layers."""
        return self.shape[0]

    @property
    def layers(self) -> list["Case"]:
        """The case of each tensor of weights that is normalized: of a stack, those of its layers."""
        if not OPERATORS[self.operator].stacked:
            return [self]
        return [replace(self, operator="weight_norm", shape=self.shape[1:])] * self.stack

    @property
    def parameter_size(self) -> int:
        """Elements of a parameter: a row's, the channels, or of weights one a norm."""
        return self.sets if OPERATORS[self.operator].family == "weights" else self.shape[1]

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """One dimension; of weights those of the tensor, but for the one norm of all, which has none."""
        operator = OPERATORS[self.operator]
        if operator.family != "weights":
            return (self.parameter_size,)
        if operator.dim is None:
            return ()
        return tuple(size if d == operator.dim else 1 for d, size in enumerate(self.shape))

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def sets(self) -> int:
        """How many sets of elements share statistics: rows, groups, channels of an image or of a layer,
        channels."""
        return prod(getattr(self, size) for size in OPERATORS[self.operator].sets)

    @property
    def set_size(self) -> int:
        """Elements that share statistics."""
        return self.elements // self.sets

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def parameter_dtype(self) -> torch.dtype:
        """Of weight, bias and running statistics."""
        dtype = DTYPES[self.dtype]
        wide = OPERATORS[self.operator].wide_parameters and dtype.itemsize < 4
        return torch.float32 if wide else dtype


@dataclass(frozen=True)
class ShapeSet:
    """Shapes that belong together, why they are measured, and for which operators."""

    reason: str
    shapes: tuple[tuple[int, ...], ...]
    operators: tuple[str, ...] = ROW_OPERATORS
    layouts: tuple[str, ...] = LAYOUTS  # of those in which an operator takes a shape
    groups: int = DEFAULT_GROUPS  # of group_norm

    def cases(self, operator: str, direction: str, dtype: str) -> list[Case]:
        """The cases of an operator and pass; none if the set is not for the operator."""
        if operator not in self.operators:
            return []
        groups = self.groups if "groups" in OPERATORS[operator].sets else None
        return [
            Case(operator, direction, shape, dtype, layout, groups)
            for shape in self.shapes
            for layout in layouts_of(operator, shape)
            if layout in self.layouts
        ]


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
    "quick_channels": ShapeSet(
        "a layer of large images and one of small, at sizes that hide the launch",
        ((32, 320, 64, 64), (512, 2048, 7, 7)),
        CHANNEL_OPERATORS,
    ),
    "networks": ShapeSet(
        "layers of ResNet-50 and of a diffusion model's UNet, at batches that make 64 MB or more",
        (
            *((512, 64, 112, 112), (512, 256, 56, 56), (512, 512, 28, 28)),
            *((512, 1024, 14, 14), (512, 2048, 7, 7)),
            *((32, 320, 64, 64), (64, 640, 32, 32), (128, 1280, 16, 16), (256, 2560, 8, 8)),
        ),
        CHANNEL_OPERATORS,
    ),
    "gn": ShapeSet(
        "GroupNorm where peers measure it: diffusion, ResNet-50, and a video decoder (sglang)",
        (
            *((images, 320, 64, 64) for images in (1, 4, 8)),
            *((32, 256, 56, 56), (1, 128, 20, 256, 256)),
        ),
        ("group_norm",),
        ("contiguous",),
    ),
    "gn_8_groups": ShapeSet(
        "GroupNorm of few and long groups, 2 million elements, where peers measure it",
        ((112, 64, 512, 512),),
        ("group_norm",),
        ("contiguous",),
        groups=8,
    ),
    "unet": ShapeSet(
        "GroupNorm of channels_last images, at the sizes of a diffusion model's UNet; 8 images",
        tuple(
            (8, channels, side, side)
            for side, widths in (
                (8, (1280, 2560)),
                (16, (640, 1280, 1920, 2560)),
                (32, (320, 640, 960, 1280, 1920)),
                (64, (320, 640, 960)),
            )
            for channels in widths
        ),
        ("group_norm",),
        ("channels_last",),
    ),
    "bn": ShapeSet(
        "BatchNorm where peers measure it: without images, of small and large ones, and ResNet-50's",
        (
            *((32, 64), (8, 64, 32, 32), (4, 256, 28, 28), (4, 128, 1024, 1024)),
            *((256, 64, 112, 112), (256, 512, 7, 7), (64, 64, 512, 512)),
        ),
        BATCH_OPERATORS,
    ),
    "in": ShapeSet(
        "InstanceNorm where peers measure it: large images, and nnU-Net's volumes",
        ((112, 64, 512, 512), (2, 32, 128, 128, 128)),
        ("instance_norm",),
    ),
    "quick_weights": ShapeSet(
        "a weight of 64 MB",
        ((8192, 4096),),
        SINGLE_WEIGHT_OPERATORS,
    ),
    "quick_layers": ShapeSet(
        "layers of 64 MB together",
        ((64, 512, 1024),),
        ("weight_norms",),
    ),
    "wn": ShapeSet(
        "WeightNorm where peers measure it, and weights of 64 MB and more, which hide the launch",
        ((1024, 1024), (4096, 4096), (64, 512, 512), (32768, 1024), (8192, 8192)),
        SINGLE_WEIGHT_OPERATORS,
    ),
    "wn_layers": ShapeSet(
        "60 convolutions, as of a WaveNet or a vocoder: one launch or 60; and larger ones, of 64 MB",
        ((60, 256, 256, 3), (60, 512, 512, 3)),
        ("weight_norms",),
    ),
}

DEFAULT_SETS = ("sweep", "networks", "wn", "wn_layers")
QUICK_SETS = ("quick", "quick_channels", "quick_weights", "quick_layers")
"""Sets that together cover all operators."""


def parse_shapes(texts) -> list[ShapeSet]:
    """The sets of these names, and a set for each text such as `4096x1024` or `8x64x32x32:16`.

    Two sizes are rows and columns, images and channels without anything spatial, or outputs and inputs
    of a weight: BatchNorm takes those too, and GroupNorm where its groups are given behind the colon.
    Three and more are images, a weight, or layers.

    Raises:
        ValueError: a text is neither.
    """
    sets = []
    for text in texts:
        if text in SHAPE_SETS:
            sets.append(SHAPE_SETS[text])
        elif match := re.fullmatch(r"([1-9]\d*(?:x[1-9]\d*)+)(?::([1-9]\d*))?", text, re.ASCII):
            shape = tuple(int(size) for size in match[1].split("x"))
            groups = {"groups": int(match[2])} if match[2] else {}
            operators = (*CHANNEL_OPERATORS, *WEIGHT_OPERATORS)
            if len(shape) == 2:
                operators = (*ROW_OPERATORS, *BATCH_OPERATORS, *SINGLE_WEIGHT_OPERATORS)
                operators += ("group_norm",) if groups else ()
            sets.append(ShapeSet("given", (shape,), operators, **groups))
        else:
            raise ValueError(
                f"{text!r} is neither a set ({', '.join(SHAPE_SETS)}) nor sizes joined by x"
            )
    return sets


def make_cases(operators, directions, dtypes, shape_sets) -> list[Case]:
    """All that the sets have for these operators, each once; the types one after the other, so that a
    run cut short has finished some.

    Raises:
        ValueError: the sets have nothing, or an operator does not take a shape.
    """
    cases = [
        case
        for dtype in dtypes
        for shape_set in shape_sets
        for operator in operators
        for direction in directions
        for case in shape_set.cases(operator, direction, dtype)
    ]
    if not cases:
        raise ValueError(f"no shape for {', '.join(operators)}")
    return list(dict.fromkeys(cases))
