"""Who is measured, on which inputs, and that wrong results are seen."""

import pytest
import torch
from conftest import INTERPRETED
from guard import guarded
from measuring import TORCH, by_label, measured, small_cases

from perf import bench, calls, launches, providers
from perf.providers import Provider, weight_operators
from perf.shapes import (
    BATCH_OPERATORS,
    CHANNEL_OPERATORS,
    OPERATORS,
    PASSES,
    Case,
    ShapeSet,
    parse_shapes,
)
from tritonnorm import launch
from tritonnorm.launch.common import CHOICES


@by_label([case for dtype in ("bf16", "fp16", "fp32") for case in small_cases(dtype)])
def test_pytorch_is_within_the_tolerance(case, monkeypatch):
    monkeypatch.setattr(calls, "REFERENCE_ELEMENTS", 256)  # in chunks, the last one smaller
    inputs = calls.make_inputs(case, "cpu")
    outputs = calls.make_call(providers.LOADERS["torch"](), case, inputs)()
    expected = inputs.leaves
    if case.direction == "forward":
        others = inputs.running if case.operator == "batch_norm" else ()
        expected = (*inputs.leaves[: len(case.layers)], *others)
    assert [t.shape for t in outputs] == [t.shape for t in expected]
    part = 0.75 if case.operator == "weight_norm_all" else 0.5  # of operators that round one by one
    assert 0 < calls.max_error(case, inputs, outputs) < part * bench.TOLERANCES[case.dtype]


@by_label(small_cases("fp32"))
@pytest.mark.parametrize("spoil", [1.1, float("nan")])
def test_one_wrong_element_of_any_output_is_seen(case, spoil, monkeypatch):
    monkeypatch.setattr(calls, "REFERENCE_ELEMENTS", 256)
    inputs = calls.make_inputs(case, "cpu")
    right = calls.make_call(providers.LOADERS["torch"](), case, inputs)()
    for i in range(len(right)):
        outputs = [t.detach().clone(memory_format=torch.contiguous_format) for t in right]
        outputs[i].view(-1)[outputs[i].abs().argmax()] *= spoil
        assert not calls.max_error(case, inputs, outputs) <= 0.09


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
    inputs = calls.make_inputs(case, "cpu")
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
    inputs = calls.make_inputs(case, "cpu")
    call = calls.make_call(providers.LOADERS[provider](), case, inputs)
    launched = []

    def run(kernel, grid, arguments):
        launched.append(kernel.__name__)
        kernel[grid](**arguments)

    with launches.observe(run):
        outputs = call()
    assert launched == [f"weight_{direction}"] * count
    assert calls.max_error(case, inputs, outputs) < bench.TOLERANCES["bf16"] / 2
    other = calls.make_call(providers.LOADERS["tritonnorm"](), case, inputs)()
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
    inputs = calls.make_inputs(case, "cpu")
    before = [t.clone() for t in inputs.running]
    call = calls.make_call(providers.LOADERS["torch"](), case, inputs)
    call()
    call()
    assert all(torch.equal(t, b) for t, b in zip(inputs.running, before, strict=True))


def test_teams_are_preferred_within_their_providers_calls_alone(monkeypatch):
    """Forward and backward; and its results are those of the split form. A call that was prepared and
    recorded with other choices is not made again."""
    ours, team = providers.LOADERS["tritonnorm"](), providers.LOADERS["tritonnorm.team"]()
    seen, preferred = [], launch.pieces._prefers_teams

    def note(*arguments):
        seen.append(preferred(*arguments))
        return seen[-1]

    monkeypatch.setattr(launch.pieces, "_prefers_teams", note)
    case = Case("batch_norm", "backward", (4, 32, 16, 16), "fp32")
    inputs = calls.make_inputs(case, "cpu")
    for _ in range(5):
        expected = calls.make_call(ours, case, inputs)()
    unaware = len(seen)
    found = calls.make_call(team, case, inputs)()
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
    gradients = calls.make_call(provider, case, calls.make_inputs(case, "cpu"))()
    assert seen == [(torch.bfloat16, torch.float32, torch.float32)]
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32, torch.float32]


def test_a_peer_that_cannot_be_imported_is_absent(monkeypatch):
    def broken():
        raise OSError("libcuda.so.1 is\nmissing")

    monkeypatch.setitem(providers.LOADERS, "quack", broken)
    present, absent = providers.load(["torch", "quack"])
    assert [p.name for p in present] == ["torch"]
    assert absent == {"quack": "OSError: libcuda.so.1 is missing"}


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
    inputs = calls.make_inputs(case, "cpu")
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
    assert calls.max_error(case, inputs, outputs()) < limit / 2
    assert calls.max_error(case, inputs, outputs(**{names[without]: 0})) > 2 * limit


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
    inputs = calls.make_inputs(case, "cpu")
    v, g, dw = (t.detach().double() for t in (*inputs.leaves, inputs.dy))
    dim = OPERATORS[operator].dim
    norm = torch.norm_except_dim(v, 2, -1 if dim is None else dim)
    dg = (dw * v / norm).sum_to_size(g.shape)

    def outputs(factor):
        dv = (dw - factor * v / norm * dg) * g / norm
        return dv.bfloat16(), dg.bfloat16()

    limit = bench.TOLERANCES["bf16"]
    assert calls.max_error(case, inputs, outputs(1)) < limit / 2
    assert calls.max_error(case, inputs, outputs(0)) > 2 * limit
