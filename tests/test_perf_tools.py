"""The tools that measure, as far as that needs no GPU: what is written, drawn and refused."""

import csv
import re
import sys
from argparse import ArgumentParser

import pytest
import torch
from conftest import INTERPRETED
from guard import guarded

from perf import __main__ as perf_main
from perf import bench, compare, gpu, launches, machine, providers, roofline, shapes
from perf.providers import Provider, operators_of_torch, weight_operators
from perf.shapes import (
    BATCH_OPERATORS,
    CHANNEL_OPERATORS,
    DTYPES,
    OPERATORS,
    PASSES,
    ROW_OPERATORS,
    SHAPE_SETS,
    SINGLE_WEIGHT_OPERATORS,
    WEIGHT_OPERATORS,
    Case,
    ShapeSet,
    parse_shapes,
)
from perf.table import CASE_FIELDS, FIELDS, Table, case_fields, read_case, summary
from perf.timer import DeviceTimer, Timing
from perf.traffic import floor_bytes, tensor_bytes
from tritonnorm import launch
from tritonnorm.launch.common import CHOICES

ON_GPU = torch.cuda.is_available()
RUN = {"device": "NVIDIA H200", "tritonnorm_version": "0.1.0", "command": "python -m perf bench"}
TORCH = operators_of_torch()
TINY = Case("normalize", "forward", (1, 1), "bf16")


def small_cases(dtype):
    """Every operator and pass in every layout, each in chunks of a reference of 256 elements; but one
    norm of all is in one."""
    sets = [
        ShapeSet("rows", ((33, 64),)),
        ShapeSet("without anything spatial", ((5, 64),), BATCH_OPERATORS),
        ShapeSet("images", ((3, 64, 5, 3),), CHANNEL_OPERATORS),
        ShapeSet("lines and volumes", ((3, 8, 12), (2, 8, 3, 2, 5)), CHANNEL_OPERATORS, groups=4),
        ShapeSet("weights", ((33, 64), (9, 16, 3, 3)), SINGLE_WEIGHT_OPERATORS),
        ShapeSet("layers", ((3, 9, 16, 3),), ("weight_norms",)),
    ]
    return bench.make_cases(OPERATORS, PASSES, [dtype], sets)


def by_label(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.label)


def fake_timer(call):
    """A timer without a clock: the call runs, and takes 40 microseconds."""
    call()
    return Timing(median_us=40.0, p20_us=39.0, p80_us=41.0, host_us=5.0)


def raising(*_):
    raise RuntimeError("no kernel\nfor this row")


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["perf", *map(str, arguments)])
    return perf_main.main()


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def measured(path, measured_providers, cases, resume=False, seconds=100):
    bench.measure(cases, measured_providers, fake_timer, "cpu", Table(path, RUN, resume), seconds)
    return read(path)


# Shapes and bytes


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
    copied = providers.make_copy(case, "cpu")()
    assert floor_bytes(case) <= 2 * copied.nbytes <= floor_bytes(case) + 1


# What is compared


@by_label([case for dtype in ("bf16", "fp16", "fp32") for case in small_cases(dtype)])
def test_pytorch_is_within_the_tolerance(case, monkeypatch):
    monkeypatch.setattr(providers, "REFERENCE_ELEMENTS", 256)  # in chunks, the last one smaller
    inputs = providers.make_inputs(case, "cpu")
    outputs = providers.make_call(providers.LOADERS["torch"](), case, inputs)()
    expected = inputs.leaves
    if case.direction == "forward":
        others = inputs.running if case.operator == "batch_norm" else ()
        expected = (*inputs.leaves[: len(case.layers)], *others)
    assert [t.shape for t in outputs] == [t.shape for t in expected]
    part = 0.75 if case.operator == "weight_norm_all" else 0.5  # of operators that round one by one
    assert 0 < providers.max_error(case, inputs, outputs) < part * bench.TOLERANCES[case.dtype]


@by_label(small_cases("fp32"))
@pytest.mark.parametrize("spoil", [1.1, float("nan")])
def test_one_wrong_element_of_any_output_is_seen(case, spoil, monkeypatch):
    monkeypatch.setattr(providers, "REFERENCE_ELEMENTS", 256)
    inputs = providers.make_inputs(case, "cpu")
    right = providers.make_call(providers.LOADERS["torch"](), case, inputs)()
    for i in range(len(right)):
        outputs = [t.detach().clone(memory_format=torch.contiguous_format) for t in right]
        outputs[i].view(-1)[outputs[i].abs().argmax()] *= spoil
        assert not providers.max_error(case, inputs, outputs) <= 0.09


def assert_inputs_of_weights(case, inputs):
    """Every layer has memory, and so a gradient, of its own; and values."""
    layers = inputs.layers if case.operator == "weight_norms" else [inputs]
    for layer, one in zip(layers, case.layers, strict=True):
        (g,) = layer.parameters
        assert layer.x.is_leaf
        assert g.is_leaf
        assert layer.x.shape == layer.dy.shape == one.shape
        dim = OPERATORS[one.operator].dim
        assert g.shape == torch.norm_except_dim(layer.x, 2, -1 if dim is None else dim).shape
        assert {t.dtype for t in (layer.x, layer.dy, g)} == {torch.bfloat16}
    assert len({t.untyped_storage().data_ptr() for t in inputs.leaves}) == len(inputs.leaves)
    assert len({layer.x.sum().item() for layer in layers}) == len(layers)


@by_label(small_cases("bf16"))
def test_inputs_are_in_the_layout_of_the_case(case):
    inputs = providers.make_inputs(case, "cpu")
    if OPERATORS[case.operator].family == "weights":
        assert_inputs_of_weights(case, inputs)
        return
    for t in (inputs.x, inputs.dy):
        assert (t.shape, t.dtype) == (case.shape, torch.bfloat16)
        adjacent = t.movedim(1, -1) if case.layout == "channels_last" else t
        assert adjacent.is_contiguous()
        if case.layout == "channels_last" and t.dim() > 3:
            three = t.dim() == 5
            format_of_torch = torch.channels_last_3d if three else torch.channels_last
            assert t.is_contiguous(memory_format=format_of_torch)
    assert inputs.x.is_leaf
    assert not inputs.dy.requires_grad
    wide = case.operator in (*BATCH_OPERATORS, "instance_norm")
    for t in (*inputs.parameters, *inputs.running):
        assert (t.shape, t.dtype) == (case.shape[1:2], torch.float32 if wide else torch.bfloat16)
    assert len(inputs.running) == (2 if case.operator in BATCH_OPERATORS else 0)


@pytest.mark.parametrize("operator", CHANNEL_OPERATORS)
@pytest.mark.parametrize("direction", PASSES)
def test_a_provider_that_is_wrong_in_one_layout_is_seen(operator, direction, tmp_path):
    """It takes the memory of channels_last tensors for that of contiguous ones."""

    def confused(x, *others):
        images, channels, *spatial = x.shape
        if not x.is_contiguous():
            x = x.movedim(1, -1).reshape(images, channels, *spatial)
        return TORCH[operator](x, *others)

    provider = Provider("confused", "1", {operator: confused})
    image = ShapeSet("image", ((2, 64, 3, 5),), CHANNEL_OPERATORS)
    cases = bench.make_cases([operator], [direction], ["fp32"], [image])
    rows = measured(tmp_path / "bench.csv", [provider], cases)
    status = {row["layout"]: row["status"] for row in rows if row["provider"] == "confused"}
    assert status == {"contiguous": "ok", "channels_last": "wrong"}


@pytest.mark.parametrize("direction", PASSES)
def test_layers_that_are_taken_for_each_other_are_seen(direction, tmp_path):
    def swapped(vs, gs):
        return [torch._weight_norm(v, g, 0) for v, g in zip(vs, (gs[0], gs[2], gs[1]), strict=True)]

    provider = Provider("swapped", "1", weight_operators(torch._weight_norm, swapped))
    case = Case("weight_norms", direction, (3, 8, 16), "fp32")
    rows = measured(tmp_path / "bench.csv", [provider], [case])
    assert rows[1]["status"] == "wrong"


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU CPU tensors take PyTorch's operators")
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize(("provider", "count"), [("tritonnorm", 1), ("tritonnorm.single", 3)])
def test_a_launch_for_all_layers_or_one_for_each(provider, count, direction):
    """Both right, and of the same bits."""
    case = Case("weight_norms", direction, (3, 8, 16), "bf16")
    inputs = providers.make_inputs(case, "cpu")
    call = providers.make_call(providers.LOADERS[provider](), case, inputs)
    launched = []

    def run(kernel, grid, arguments):
        launched.append(kernel.__name__)
        kernel[grid](**arguments)

    with launches.observe(run):
        outputs = call()
    assert launched == [f"weight_{direction}"] * count
    assert providers.max_error(case, inputs, outputs) < bench.TOLERANCES["bf16"] / 2
    other = providers.make_call(providers.LOADERS["tritonnorm"](), case, inputs)()
    assert all(torch.equal(a, b) for a, b in zip(outputs, other, strict=True))


def test_only_stacks_are_normalized_one_after_another():
    single = providers.LOADERS["tritonnorm.single"]()
    assert [c.operator for c in small_cases("bf16") if single.offers(c)] == ["weight_norms"] * 2


@pytest.mark.skipif(not INTERPRETED, reason="with a CUDA device no CPU tensor takes a kernel")
@pytest.mark.parametrize("direction", PASSES)
def test_the_tensors_of_a_table_are_named(direction):
    seen = []
    case = Case("weight_norms", direction, (2, 8, 16), "fp32")
    with launches.observe(lambda kernel, grid, arguments: seen.append(launches.tensors(arguments))):
        launches.run(case)
        launches.run(case, "halved")
    names = {"forward": "x y gain spread", "backward": "dy x gain spread dx dgain"}[direction].split()
    of_layers = {f"{name}[{i}]" for name in names for i in range(2)}
    assert [set(found) for found in seen] == [of_layers | {"table"}] * 2
    assert [found["x[1]"].shape for found in seen] == [(8, 16), (8, 8)]


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU nothing is interpreted")
def test_the_tensors_of_a_table_are_guarded():
    def elsewhere(kernel, grid, arguments):
        operands = arguments["table_ptr"].operands
        operands["x"] = [operands["x"][0], operands["x"][1].clone()]  # not what the kernel reads
        guarded(kernel, grid, arguments)

    with launches.observe(elsewhere), pytest.raises(Exception, match="load outside the tensors"):
        launches.run(Case("weight_norms", "forward", (2, 8, 16), "fp32"))


@pytest.mark.parametrize("wrong", ["batch", "kept", "biased", "running"])
def test_wrong_running_statistics_are_seen(wrong, tmp_path):
    """Evaluation with the batch's statistics; training that does not move the running ones, moves them
    by the biased variance, or normalizes with them."""

    def batch_norm(x, weight, bias, running_mean, running_var):
        if wrong == "batch":
            running_mean = running_var = None
        elif wrong == "kept":
            running_mean, running_var = running_mean.clone(), running_var.clone()
        y = torch.nn.functional.batch_norm(
            x, running_mean, running_var, weight, bias, wrong != "running", eps=1e-5
        )
        if wrong == "biased":
            running_var -= 0.1 * (x.detach().var((0, 2)) - x.detach().var((0, 2), unbiased=False))
        return y

    operator = "batch_norm_eval" if wrong == "batch" else "batch_norm"
    case = Case(operator, "forward", (3, 8, 5), "fp32")
    rows = measured(tmp_path / "bench.csv", [Provider("peer", "1", {operator: batch_norm})], [case])
    assert rows[1]["status"] == "wrong"


def test_every_provider_begins_with_the_same_running_statistics():
    case = Case("batch_norm", "forward", (3, 8, 5), "fp32")
    inputs = providers.make_inputs(case, "cpu")
    before = [t.clone() for t in inputs.running]
    call = providers.make_call(providers.LOADERS["torch"](), case, inputs)
    call()
    call()
    assert all(torch.equal(t, b) for t, b in zip(inputs.running, before, strict=True))


def test_teams_are_preferred_within_their_providers_calls_alone(monkeypatch):
    """Forward and backward; and its results are those of the split form."""
    ours, team = providers.LOADERS["tritonnorm"](), providers.LOADERS["tritonnorm.team"]()
    seen, preferred = [], launch.pieces._prefers_teams

    def note(*arguments):
        seen.append(preferred(*arguments))
        return seen[-1]

    monkeypatch.setattr(launch.pieces, "_prefers_teams", note)
    case = Case("batch_norm", "backward", (4, 32, 16, 16), "fp32")
    inputs = providers.make_inputs(case, "cpu")
    expected = providers.make_call(ours, case, inputs)()
    unaware = len(seen)
    found = providers.make_call(team, case, inputs)()
    if INTERPRETED:  # elsewhere PyTorch's operators serve CPU tensors
        assert 0 < unaware < len(seen)
    assert not any(seen[:unaware])
    assert all(seen[unaware:])
    assert CHOICES[-1] is not launches.TEAMS
    torch.testing.assert_close(found, expected)


def test_a_provider_of_contiguous_inputs_has_no_row_of_others(tmp_path):
    provider = Provider("peer", "1", {"group_norm": TORCH["group_norm"]}, contiguous_only={"group_norm"})
    cases = bench.make_cases(["group_norm"], ["forward"], ["fp32"], parse_shapes(["2x8x3:4"]))
    rows = measured(tmp_path / "bench.csv", [provider], cases)
    assert [(row["layout"], row["provider"]) for row in rows] == [
        *(("contiguous", "copy"), ("contiguous", "peer"), ("channels_last", "copy"))
    ]


def test_pytorchs_version_names_cudnn(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    assert providers.LOADERS["torch"]().version == f"{torch.__version__}, cuDNN 9.10"
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert providers.LOADERS["torch"]().version == torch.__version__


def test_float32_parameters_are_made_before_the_call():
    seen = []

    def layer_norm(x, weight, bias):
        seen.append((x.dtype, weight.dtype, bias.dtype))
        return TORCH["layer_norm"](x.float(), weight, bias).to(x.dtype)

    provider = Provider("wide", "1", {"layer_norm": layer_norm}, float32_parameters={"layer_norm"})
    case = Case("layer_norm", "backward", (8, 16), "bf16")
    gradients = providers.make_call(provider, case, providers.make_inputs(case, "cpu"))()
    assert seen == [(torch.bfloat16, torch.float32, torch.float32)]
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32, torch.float32]


def test_a_peer_that_cannot_be_imported_is_absent(monkeypatch):
    def broken():
        raise OSError("libcuda.so.1 is\nmissing")

    monkeypatch.setitem(providers.LOADERS, "quack", broken)
    present, absent = providers.load(["torch", "quack"])
    assert [p.name for p in present] == ["torch"]
    assert absent == {"quack": "OSError: libcuda.so.1 is missing"}


# bench


def test_bench_writes_a_row_for_right_wrong_and_failing_providers(tmp_path):
    rms = TORCH["rms_norm"]
    table = [
        Provider("tritonnorm", "0.1.0", {"rms_norm": rms}),
        Provider("wrong", "2", {"rms_norm": lambda x, weight: 1.1 * rms(x, weight)}),
        Provider("failing", "3", {"rms_norm": raising}),
        Provider("another", "4", {"layer_norm": raising}),
    ]
    case = Case("rms_norm", "backward", (8, 16), "fp32")
    rows = measured(tmp_path / "sub" / "bench.csv", table, [case])
    assert [row["provider"] for row in rows] == ["copy", "tritonnorm", "wrong", "failing"]
    copy, ours, wrong, failing = rows
    assert tuple(ours) == FIELDS
    assert ours["status"] == copy["status"] == "ok"
    assert (ours["shape"], ours["layout"], ours["groups"]) == ("8x16", "contiguous", "")
    assert float(ours["max_error"]) < 1e-5
    assert (ours["median_us"], ours["p20_us"], ours["p80_us"]) == ("40.000", "39.000", "41.000")
    assert float(ours["gbps"]) == pytest.approx(floor_bytes(case) / 40e-6 / 1e9, abs=0.05)
    assert float(ours["fraction_of_copy"]) == 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", ours["date"])
    assert {name: ours[name] for name in RUN} == RUN
    assert wrong["status"] == "wrong"
    assert float(wrong["max_error"]) == pytest.approx(0.1, rel=0.01)
    assert wrong["median_us"]
    assert failing["status"] == "error"
    assert failing["error"] == "RuntimeError: no kernel for this row"
    assert failing["median_us"] == failing["gbps"] == ""


def test_bench_keeps_its_rows_when_interrupted_and_resumes(tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    path = tmp_path / "bench.csv"
    cases = bench.make_cases(["normalize"], ["forward"], ["fp32"], parse_shapes(["4x8", "4x16"]))
    ours = Provider("tritonnorm", "0.1.0", {"normalize": TORCH["normalize"]})
    with pytest.raises(KeyboardInterrupt):
        measured(path, [ours, Provider("peer", "1", {"normalize": interrupted})], cases)
    assert [row["provider"] for row in read(path)] == ["copy", "tritonnorm"]

    rows = measured(path, [ours, Provider("peer", "1", {"normalize": raising})], cases, resume=True)
    assert [(row["shape"], row["provider"]) for row in rows] == [
        (shape, provider) for shape in ("4x8", "4x16") for provider in ("copy", "tritonnorm", "peer")
    ]


@by_label(small_cases("bf16"))
def test_a_case_is_found_in_its_row(case, tmp_path):
    path = tmp_path / "bench.csv"
    Table(path, RUN, resume=False).add(**case_fields(case), provider="torch", status="ok")
    (row,) = read(path)
    assert read_case(row) == case
    assert row["groups"] == str(case.groups or "")
    table = Table(path, RUN, resume=True)
    assert table.find(case, "torch") == row
    others = [other for other in small_cases("bf16") if other != case]
    assert not any(table.find(other, "torch") for other in others)


def test_bench_resumes_no_other_csv(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        Table(path, RUN, resume=True)


def test_bench_starts_no_case_when_the_time_is_over(tmp_path, capsys):
    case = Case("normalize", "forward", (4, 8), "fp32")
    assert measured(tmp_path / "bench.csv", [], [case], seconds=-1) == []
    assert "left out" in capsys.readouterr().err


def test_progress_is_a_few_lines_without_a_terminal(capsys):
    progress = bench.Progress(200)
    for _ in range(200):
        progress.step("a case")
    assert len(capsys.readouterr().err.splitlines()) == 10


def test_summary_names_faster_peers_and_failures():
    image = Case("group_norm", "forward", (8, 64, 4, 4), "bf16", "channels_last", 32)

    def row(provider, median_us, status="ok", n=64, case=None):
        case = case or Case("rms_norm", "forward", (8, n), "bf16")
        return {**case_fields(case), "provider": provider, "median_us": median_us, "status": status}

    rows = [
        *(row("copy", "9"), row("tritonnorm", "10"), row("quack", "9.5"), row("torch", "9.9")),
        *(row("liger", "1", "wrong"), row("fla", "", "error")),
        *(row("copy", "10", n=128), row("tritonnorm", "10", n=128)),
        *(row("copy", "5", case=image), row("tritonnorm", "10", case=image)),
        row("torch", "8", case=image),
        {"provider": "absent", "status": "absent"},
    ]
    assert summary(rows).splitlines() == [
        "rms_norm forward bf16: 90% to 100% of a copy's bandwidth, median 95%, 2 shapes",
        "group_norm forward channels_last bf16: 50% to 50% of a copy's bandwidth, median 50%, 1 shapes",
        "a peer is faster by more than 2% in:",
        "  rms_norm forward 8x64 bf16: quack takes 95% of our time",
        "  group_norm forward 8x64x4x4:32 channels_last bf16: torch takes 80% of our time",
        "liger: 1 rows wrong",
        "fla: 1 rows error",
    ]


def test_bench_starts_anew_when_the_device_is_lost(monkeypatch, tmp_path, capsys):
    """An illegal access ends the context of the process, but not the run."""
    started = []

    def lost(*_):
        raise bench.DeviceLost("an illegal memory access was encountered")

    def execv(path, command):
        started.append(command)
        raise SystemExit

    monkeypatch.setattr(machine, "refusal", lambda: None)
    monkeypatch.setattr(bench, "DeviceTimer", lambda: fake_timer)
    monkeypatch.setattr(bench, "measure", lost)
    monkeypatch.setattr(bench.os, "execv", execv)
    options = ("bench", "--out", str(tmp_path / "bench.csv"), "--providers", "torch")
    with pytest.raises(SystemExit):
        main(monkeypatch, *options)
    assert started == [[sys.executable, "-m", "perf", *options, "--resume", "--seconds", "inf"]]
    assert "illegal memory access" in capsys.readouterr().err


def test_an_error_that_loses_the_device_is_in_its_row(monkeypatch, tmp_path):
    def lost():
        raise bench.DeviceLost

    monkeypatch.setattr(bench, "check_device", lost)
    peers = [Provider(name, "1", {"normalize": raising}) for name in ("first", "second")]
    cases = [Case("normalize", "forward", (4, 8), "fp32")]
    path = tmp_path / "bench.csv"
    for names in (["copy", "first"], ["copy", "first", "second"]):
        with pytest.raises(bench.DeviceLost):
            measured(path, peers, cases, resume=True)
        assert [row["provider"] for row in read(path)] == names


@pytest.mark.skipif(ON_GPU, reason="needs a machine without a CUDA device, and this one has one")
@pytest.mark.parametrize("command", ["bench", "gpu"])
def test_without_a_gpu_nothing_is_timed(command, monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    status = main(monkeypatch, command, "--out", tmp_path / "out")
    captured = capsys.readouterr()
    assert status == machine.NO_DEVICE_STATUS == 3
    assert captured.out == ""
    assert captured.err == f"{command}: no CUDA device: nothing is timed\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["bench", "gpu"])
def test_the_interpreter_is_not_timed(command, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(monkeypatch, command, "--out", tmp_path / "out") == machine.NO_DEVICE_STATUS
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert "TRITON_INTERPRET" in captured.err


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_the_timer_on_a_device():
    case = Case("rms_norm", "forward", (8192, 4096), "bf16")
    timing = DeviceTimer()(providers.make_copy(case, "cuda"))
    assert 0 < timing.p20_us <= timing.median_us <= timing.p80_us
    assert timing.host_us > 0


# gpu


@pytest.mark.parametrize(("tests_status", "status"), [(0, 0), (1, 1)])
def test_gpu_benchmarks_compares_and_plots_even_if_tests_fail(
    tests_status, status, monkeypatch, tmp_path, capsys
):
    steps = []

    def step(*arguments, log=None):
        steps.append(arguments)
        if "compare" in arguments:
            return compare.LOSS_STATUS  # which is no failure
        return tests_status if "pytest" in arguments else 0

    monkeypatch.setattr(machine, "refusal", lambda: None)
    monkeypatch.setattr(gpu, "step", step)
    assert main(monkeypatch, "gpu", "--quick", "--out", tmp_path) == status
    assert [arguments[1:3] for arguments in steps] == [
        *(("pip", "install"), ("pytest",), ("perf", "bench"), ("perf", "compare"), ("perf", "roofline"))
    ]
    assert capsys.readouterr().out.endswith(f"results in {tmp_path}\n")
    parser = ArgumentParser()
    bench.add_arguments(parser)
    parsed = parser.parse_args(steps[2][3:])
    assert (parsed.shapes, parsed.dtypes) == (list(shapes.QUICK_SETS), ["bf16"])
    assert (machine.ROOT / parsed.out).resolve() == tmp_path / "bench.csv"
    parser = ArgumentParser()
    compare.add_arguments(parser)
    parsed = parser.parse_args(steps[3][3:])
    assert parsed.shapes == list(shapes.QUICK_SETS)
    assert (machine.ROOT / parsed.out).resolve() == tmp_path / "compare.csv"


def test_gpu_shows_and_keeps_the_output_of_a_step(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code = "import os, sys; print(os.environ.get('TRITON_INTERPRET')); sys.exit(7)"
    assert gpu.step("-c", code, log=tmp_path / "log.txt") == 7
    assert (tmp_path / "log.txt").read_text() == "None\n"
    assert capfd.readouterr().out.endswith("None\n")


def test_a_devices_folder_has_a_plain_name():
    assert machine.device_slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


# roofline


def bench_rows(device="NVIDIA H200"):
    """Of each family two operators forward and one backward in bfloat16; figures that no device
    measured."""
    facts = dict.fromkeys(FIELDS, "1") | {"device": device, "date": "2000-01-01T00:00:00+00:00"}
    speeds = {"copy": 4000, "tritonnorm": 3900, "torch": 2000}
    rows = [facts | dict.fromkeys((*CASE_FIELDS, "gbps"), "") | dict(provider="fla", status="absent")]
    row_shapes = parse_shapes(["32768x1024", "65536x1024", "32768x8192", "16x4096"])
    image_shapes = parse_shapes(["64x64x112x112", "128x64x112x112", "512x512x28x28", "1x64x8x8"])
    weight_shapes = parse_shapes(["32768x1024", "8192x8192"])
    cases = [
        *bench.make_cases(["layer_norm"], PASSES, ["bf16"], row_shapes),
        *bench.make_cases(["rms_norm"], ["forward"], ["bf16"], row_shapes),
        *bench.make_cases(["group_norm"], PASSES, ["bf16"], image_shapes),
        *bench.make_cases(["batch_norm"], ["forward"], ["bf16"], image_shapes),
        *bench.make_cases(["weight_norm"], PASSES, ["bf16"], weight_shapes),
        *bench.make_cases(["weight_norms"], ["forward"], ["bf16"], parse_shapes(["wn_layers"])),
    ]
    for case in cases:
        m = case.shape[0]
        for provider, speed in speeds.items():
            if case.layout == "channels_last":
                speed /= 2
            status = "wrong" if (provider, case.set_size) == ("torch", 8192) else "ok"
            figure = dict(provider=provider, gbps=speed * m / (m + 1000), status=status)
            rows.append(facts | case_fields(case) | figure)
    return rows


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_roofline_draws_png_and_svg(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    path = write(tmp_path / "bench.csv", bench_rows())
    assert main(monkeypatch, "roofline", path, "--out", tmp_path / "plots") == 0
    names = {file.name for file in (tmp_path / "plots").iterdir()}
    assert names == {
        f"roofline{family}-bf16.{kind}"
        for family in ("", "-channels", "-weights")
        for kind in ("png", "svg")
    }
    assert {line.rpartition("/")[2] for line in capsys.readouterr().out.splitlines()} == names


@pytest.mark.parametrize(("device", "roofs"), [("NVIDIA H200", 2), ("NVIDIA Unknown", 1)])
@pytest.mark.parametrize(
    ("family", "panels"),
    [
        ("rows", ["LayerNorm, forward", "RMSNorm, forward", "LayerNorm, backward"]),
        ("channels", ["BatchNorm, forward", "GroupNorm, forward", "GroupNorm, backward"]),
        ("weights", ["WeightNorm, forward", "WeightNorm of many, forward", "WeightNorm, backward"]),
    ],
)
def test_roofline_has_a_panel_an_operator_and_direction(tmp_path, device, roofs, family, panels):
    pytest.importorskip("matplotlib")
    rows = roofline.read(write(tmp_path / "bench.csv", bench_rows(device)))
    figure = roofline.draw(rows, family, "bf16")
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()]
    assert titles == panels
    panel = figure.axes[0]
    horizontal = [line for line in panel.lines if len(set(line.get_ydata())) == 1]
    assert len(horizontal) == roofs
    assert len(panel.texts) == 0  # labels stand at the last column alone


def test_roofline_takes_the_largest_tensor_of_a_length(tmp_path):
    rows = roofline.read(write(tmp_path / "bench.csv", bench_rows()))
    found = roofline.lines(rows, "layer_norm", "forward")
    assert list(found) == [(name, "contiguous") for name in ("tritonnorm", "torch", "copy")]
    torch_points = found["torch", "contiguous"]
    assert [(n, status) for n, _, status in torch_points] == [(1024, "ok"), (8192, "wrong")]
    assert found["copy", "contiguous"][0][1] == pytest.approx(4 * 65536 / 66536)


def test_roofline_has_a_line_a_provider_and_layout(tmp_path):
    """And one of copies, which have no layout. 64 x 112 x 112 makes groups of 25,088 elements."""
    rows = roofline.read(write(tmp_path / "bench.csv", bench_rows()))
    found = roofline.lines(rows, "group_norm", "forward")
    ours = [("tritonnorm", "contiguous"), ("tritonnorm", "channels_last")]
    theirs = [("torch", "contiguous"), ("torch", "channels_last")]
    assert list(found) == [*ours, *theirs, ("copy", "contiguous")]
    for (provider, layout), speed in zip(ours, (3.9, 1.95), strict=True):
        assert found[provider, layout] == [
            (512 // 32 * 28 * 28, pytest.approx(speed * 512 / 1512), "ok"),
            (64 // 32 * 112 * 112, pytest.approx(speed * 128 / 1128), "ok"),
        ]


def test_roofline_draws_channels_last_dashed(tmp_path):
    pytest.importorskip("matplotlib")
    rows = roofline.read(write(tmp_path / "bench.csv", bench_rows()))
    panel = roofline.draw(rows, "channels", "bf16").axes[0]
    ours = [line.get_linestyle() for line in panel.lines if line.get_label() == "tritonnorm"]
    assert ours == ["-", "--"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda row: {k: v for k, v in row.items() if k not in ("gbps", "date")},
            "no column gbps, date",
        ),
        (lambda row: row | {"gbps": ""}, "no figure"),
        (lambda row: row | case_fields(TINY), "no figure of a tensor of 64 MiB"),
        (lambda row: row | case_fields(TINY) | {"layout": "sideways"}, "no layout 'sideways'"),
        (lambda row: row | {"device": row["provider"]}, "several devices: copy, torch, tritonnorm"),
    ],
)
def test_roofline_refuses_a_csv_it_cannot_draw(change, message, tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "bench.csv", [change(row) for row in bench_rows()])
    assert main(monkeypatch, "roofline", path) == 1
    assert message in capsys.readouterr().err
    assert main(monkeypatch, "roofline", tmp_path / "absent.csv") == 1


def test_every_provider_and_dtype_has_a_style():
    assert set(roofline.STYLES) == {*providers.LOADERS, "copy"}
    assert set(roofline.TITLES) == set(TORCH) == set(OPERATORS)
    assert {*providers.EPS, *WEIGHT_OPERATORS} == set(OPERATORS)
    assert set(bench.TOLERANCES) == set(DTYPES)
    assert set(roofline.FAMILIES) == {operator.family for operator in OPERATORS.values()}
    assert set(roofline.LAYOUT_STYLES) == set(shapes.LAYOUTS)


@pytest.mark.parametrize("without", ["mean", "c1", "c2"])
@pytest.mark.parametrize(
    ("operator", "shape", "groups"),
    [
        ("layer_norm", (8, 256), None),
        ("layer_norm", (8, 65536), None),
        ("group_norm", (2, 64, 32, 32), 4),
        ("instance_norm", (2, 16, 128, 128), None),
        ("batch_norm", (8, 16, 64, 64), None),
    ],
)
def test_a_missing_reduction_is_wrong(without, operator, shape, groups):
    """Also for large sets in bfloat16, where centered inputs would hide it."""
    direction = "forward" if without == "mean" else "backward"
    case = Case(operator, direction, shape, "bf16", groups=groups)
    inputs = providers.make_inputs(case, "cpu")
    sets = groups or (1 if operator == "layer_norm" else case.channels)  # of an image, or row
    over = (0, 2, 3) if operator == "batch_norm" else (2, 3)

    def view(t):
        """`[images, groups, channels of a group, elements of a channel]` in float64."""
        images = shape[0] if t.shape == shape else 1
        return t.detach().double().reshape(images, sets, case.channels // sets, -1)

    x, weight, bias, dy = map(view, (inputs.x, *inputs.parameters, inputs.dy))
    deviation = x - x.mean(over, keepdim=True)
    variance = deviation.square().mean(over, keepdim=True)
    rstd = torch.rsqrt(variance + providers.EPS[operator])
    x_hat, wdy = deviation * rstd, weight * dy
    c1, c2 = (wdy * x_hat).mean(over, keepdim=True), wdy.mean(over, keepdim=True)
    running = []
    if operator == "batch_norm":
        batch = x.mean(over).flatten(), x.transpose(0, 1).flatten(1).var(1)
        running = [0.9 * r + 0.1 * b for r, b in zip(inputs.running, batch, strict=True)]

    def outputs(mean=1, c1_factor=1, c2_factor=1):
        if direction == "forward":
            y = (x if mean == 0 else deviation) * rstd * weight + bias
            return y.reshape(shape).bfloat16(), *running
        dx = (wdy - c1_factor * x_hat * c1 - c2_factor * c2) * rstd
        gradients = ((dy * x_hat).sum((0, 3)).flatten(), dy.sum((0, 3)).flatten())
        return dx.reshape(shape).bfloat16(), *(g.to(case.parameter_dtype) for g in gradients)

    names = {"mean": "mean", "c1": "c1_factor", "c2": "c2_factor"}
    limit = bench.TOLERANCES["bf16"]
    assert providers.max_error(case, inputs, outputs()) < limit / 2
    assert providers.max_error(case, inputs, outputs(**{names[without]: 0})) > 2 * limit


@pytest.mark.parametrize(
    ("operator", "shape"),
    [
        ("weight_norm", (8, 16384)),
        ("weight_norm_dim1", (512, 64)),
        ("weight_norm_dim1", (64, 8, 256)),
        ("weight_norm_all", (64, 2048)),
    ],
)
def test_a_missing_gradient_of_the_norm_is_wrong(operator, shape):
    """Also for long channels in bfloat16, where centered inputs would hide it."""
    case = Case(operator, "backward", shape, "bf16")
    inputs = providers.make_inputs(case, "cpu")
    v, g, dw = (t.detach().double() for t in (*inputs.leaves, inputs.dy))
    dim = OPERATORS[operator].dim
    norm = torch.norm_except_dim(v, 2, -1 if dim is None else dim)
    dg = (dw * v / norm).sum_to_size(g.shape)

    def outputs(factor):
        dv = (dw - factor * v / norm * dg) * g / norm
        return dv.bfloat16(), dg.bfloat16()

    limit = bench.TOLERANCES["bf16"]
    assert providers.max_error(case, inputs, outputs(1)) < limit / 2
    assert providers.max_error(case, inputs, outputs(0)) > 2 * limit
