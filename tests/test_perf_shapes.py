"""Shapes of the benchmarks, and the bytes that a case cannot do without."""

import pytest

from perf import bench, calls, gpu, roofline, shapes
from perf.shapes import (
    CHANNEL_OPERATORS,
    OPERATORS,
    PASSES,
    ROW_OPERATORS,
    SHAPE_SETS,
    WEIGHT_OPERATORS,
    Case,
    parse_shapes,
)
from perf.traffic import floor_bytes, tensor_bytes


@pytest.mark.parametrize("name", SHAPE_SETS)
def test_shape_sets_fit_a_gpu_of_80_gb(name):
    """Six float32 activations at once: x, dy, y, dx and what an unfused backward pass adds."""
    assert SHAPE_SETS[name].reason
    for case in bench.make_cases(OPERATORS, PASSES, ["fp32"], [SHAPE_SETS[name]]):
        assert 6 * tensor_bytes(case) < 80e9


@pytest.mark.parametrize("names", [shapes.DEFAULT_SETS, shapes.QUICK_SETS, gpu.FULL_SETS])
def test_every_operator_and_layout_is_measured_and_plotted(names):
    cases = bench.make_cases(OPERATORS, ["forward"], ["bf16"], [SHAPE_SETS[name] for name in names])
    large = [case for case in cases if tensor_bytes(case) >= roofline.LEAST_TENSOR_BYTES]
    both = {(operator, layout) for operator in CHANNEL_OPERATORS for layout in shapes.LAYOUTS}
    others = {(operator, "contiguous") for operator in (*ROW_OPERATORS, *WEIGHT_OPERATORS)}
    assert {(case.operator, case.layout) for case in large} == both | others


@pytest.mark.parametrize(
    ("operator", "shape", "groups", "set_size"),
    [
        ("layer_norm", (10, 64), None, 64),
        ("group_norm", (2, 12, 5, 7), 4, 3 * 35),
        ("instance_norm", (2, 12, 5, 7), None, 35),
        ("batch_norm", (2, 12, 5, 7), None, 2 * 35),
        ("batch_norm_eval", (2, 12), None, 2),
        ("weight_norm", (12, 5, 7), None, 35),
        ("weight_norm_dim1", (12, 5), None, 12),
        ("weight_norm_dim1", (12, 5, 7), None, 12 * 7),
        ("weight_norm_all", (12, 5, 7), None, 12 * 35),
        ("weight_norms", (2, 12, 5, 7), None, 35),
    ],
)
def test_elements_that_share_statistics(operator, shape, groups, set_size):
    case = Case(operator, "forward", shape, "bf16", groups=groups)
    assert case.set_size == set_size
    assert case.sets * set_size == case.elements


def test_layers_are_cases_of_their_own():
    layer = Case("weight_norm", "backward", (12, 5, 7), "fp32")
    stack = Case("weight_norms", "backward", (2, 12, 5, 7), "fp32")
    assert stack.layers == [layer, layer]
    assert layer.layers == [layer]
    assert floor_bytes(stack) == 2 * floor_bytes(layer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("layer_norm", (4, 4, 4)), "takes no tensor of 3 dimensions"),
        (("batch_norm", (4,)), "takes no tensor of 1 dimensions"),
        (("batch_norm", (4, 8), "channels_last"), "4x8: there is no layout 'channels_last'"),
        (("batch_norm", (4, 8, 2), "strided"), "there is no layout 'strided'"),
        (("batch_norm", (4, 8, 2), "contiguous", 2), "batch_norm of 2 groups"),
        (("group_norm", (4, 8, 2)), "group_norm of None groups"),
        (("group_norm", (4, 8, 2), "contiguous", 3), "4x8x2: 8 channels make no 3 groups"),
        (("weight_norm", (4,)), "takes no tensor of 1 dimensions"),
        (("weight_norm", (4, 8, 2), "channels_last"), "4x8x2: there is no layout 'channels_last'"),
        (("weight_norms", (4, 8)), "weight_norms takes no tensor of 2 dimensions"),
    ],
)
def test_a_case_that_its_operator_does_not_take_is_refused(arguments, message):
    operator, shape, *others = arguments
    with pytest.raises(ValueError, match=message):
        Case(operator, "forward", shape, "bf16", *others)


def made(texts, operators):
    """The labels of the cases of these shapes, without pass and dtype."""
    cases = bench.make_cases(operators, ["forward"], ["bf16"], parse_shapes(texts))
    return [case.label.replace(" forward", "").removesuffix(" bf16") for case in cases]


def test_an_operator_takes_the_shapes_of_its_kind_once():
    assert made(["3x5", "decode", "1x4096", "quick_channels"], ["rms_norm"]) == [
        *("rms_norm 3x5", "rms_norm 1x4096", "rms_norm 1x8192", "rms_norm 1x16384")
    ]
    assert made(["3x5"], OPERATORS) == [
        *("layer_norm 3x5", "rms_norm 3x5", "normalize 3x5"),
        *("batch_norm 3x5 contiguous", "batch_norm_eval 3x5 contiguous"),
        *("weight_norm 3x5", "weight_norm_dim1 3x5", "weight_norm_all 3x5"),
    ]
    assert made(["3x5x7"], WEIGHT_OPERATORS) == [f"{name} 3x5x7" for name in WEIGHT_OPERATORS]
    assert made(["3x6:2"], ["group_norm"]) == ["group_norm 3x6:2 contiguous"]
    assert made(["3x64x5x5", "3x6x5:2"], ["layer_norm", "group_norm", "instance_norm"]) == [
        *("group_norm 3x64x5x5:32 contiguous", "group_norm 3x64x5x5:32 channels_last"),
        *("instance_norm 3x64x5x5 contiguous", "instance_norm 3x64x5x5 channels_last"),
        *("group_norm 3x6x5:2 contiguous", "group_norm 3x6x5:2 channels_last"),
        *("instance_norm 3x6x5 contiguous", "instance_norm 3x6x5 channels_last"),
    ]


def test_a_set_may_fix_layout_and_groups():
    assert made(["gn_8_groups"], OPERATORS) == ["group_norm 112x64x512x512:8 contiguous"]
    assert all(label.endswith(":32 channels_last") for label in made(["unet"], OPERATORS))


def test_shapes_for_none_of_the_operators_are_refused():
    with pytest.raises(ValueError, match="no shape for layer_norm, rms_norm"):
        made(["bn", "3x64x5x5"], ["layer_norm", "rms_norm"])


@pytest.mark.parametrize(
    "text", ["large", "4096", "4096x", "0x16", "-1x16", "4x4:", "4x4:0", "4x4:2:2", "quick:8"]
)
def test_parse_shapes_refuses_other_texts(text):
    with pytest.raises(ValueError, match="neither a set"):
        parse_shapes([text])


@pytest.mark.parametrize(
    ("case", "by_hand"),
    [
        # x and y; mean and rstd in float32; weight and bias
        (Case("layer_norm", "forward", (10, 64), "bf16"), 2 * 1280 + 2 * 40 + 2 * 128),
        # dy, x and dx; mean and rstd; weight; the gradients of weight and bias
        (Case("layer_norm", "backward", (10, 64), "bf16"), 3 * 1280 + 2 * 40 + 128 + 2 * 128),
        (Case("rms_norm", "backward", (10, 64), "fp32"), 3 * 2560 + 40 + 256 + 256),
        (Case("normalize", "forward", (10, 64), "fp64"), 2 * 5120 + 80),
        # of 3 images of 8 channels of 4 x 5; mean and rstd of 3 x 2 groups
        (
            Case("group_norm", "forward", (3, 8, 4, 5), "bf16", "channels_last", groups=2),
            2 * 960 + 2 * 24 + 2 * 16,
        ),
        (
            Case("group_norm", "backward", (3, 8, 4, 5), "fp32", groups=2),
            3 * 1920 + 2 * 24 + 32 + 2 * 32,
        ),
        # of 3 x 8 channels; weight and bias in float32
        (Case("instance_norm", "forward", (3, 8, 4, 5), "bf16"), 2 * 960 + 2 * 96 + 2 * 32),
        # of 8 channels; running mean and variance are read and written
        (Case("batch_norm", "forward", (3, 8, 4, 5), "bf16"), 2 * 960 + 2 * 32 + 4 * 32 + 2 * 32),
        (Case("batch_norm", "backward", (3, 8, 4, 5), "fp64"), 3 * 3840 + 2 * 64 + 64 + 2 * 64),
        # the same are read, and nothing saved
        (Case("batch_norm_eval", "forward", (3, 8, 4, 5), "bf16"), 2 * 960 + 2 * 32 + 2 * 32),
        (Case("batch_norm_eval", "backward", (3, 8), "bf16"), 3 * 48 + 2 * 32 + 32 + 2 * 32),
        # v and w; the norms in float32; g
        (Case("weight_norm", "forward", (10, 8, 3), "bf16"), 2 * 480 + 40 + 20),
        # dw, v and dv; the norms; g and its gradient
        (Case("weight_norm", "backward", (10, 8, 3), "bf16"), 3 * 480 + 40 + 20 + 20),
        (Case("weight_norm_dim1", "forward", (10, 8, 3), "fp64"), 2 * 1920 + 64 + 64),
        (Case("weight_norm_dim1", "backward", (10, 8), "fp32"), 3 * 320 + 32 + 32 + 32),
        (Case("weight_norm_all", "backward", (10, 8, 3), "bf16"), 3 * 480 + 4 + 2 + 2),
        (Case("weight_norms", "forward", (4, 10, 8, 3), "bf16"), 4 * (2 * 480 + 40 + 20)),
    ],
)
def test_floor_bytes(case, by_hand):
    assert floor_bytes(case) == by_hand


def test_a_copy_moves_the_floor():
    case = Case("rms_norm", "forward", (5, 7), "bf16")
    copied = calls.make_copy(case, "cpu")()
    assert floor_bytes(case) <= 2 * copied.nbytes <= floor_bytes(case) + 1
