"""BatchNorm, GroupNorm and InstanceNorm against the float64 reference, in both memory formats."""

import channels
import pytest
import reference
import torch
from channels import (
    BATCH_NORM,
    EPS,
    FORMATS,
    GROUP_NORM,
    INSTANCE_NORM,
    NAMES,
    every_format,
    every_operator,
    every_shape,
    in_format,
    inputs,
    make_small,
    run,
)
from tolerances import assert_close, assert_no_worse_than, wide

import tritonnorm.functional as tF
from tritonnorm.autograd import normalize_channels
from tritonnorm.heuristics import channels as channel_choices
from tritonnorm.heuristics import common as common_choices
from tritonnorm.launch.common import forget_plans

GROUPS = {"batch_norm": None, "group_norm": 2, "instance_norm": None}


@pytest.fixture(params=["resident", "in pieces", "columns"])
def shape(request, monkeypatch):
    """A shape whose sets one program holds, but for BatchNorm's; or one whose sets are cut into several
    pieces of several steps, as larger ones are: limits and tiles are made small for that. Or contiguous
    images that BatchNorm takes as columns, in several pieces of several steps as well."""
    if request.param == "resident":
        return (2, 6, 4, 5)
    make_small(monkeypatch)
    return (2, 4, 13, 11) if request.param == "in pieces" else (19, 8, 5, 3)


def compare(operator, x, weight, bias, dy, groups=None):
    """Checks y and every gradient."""
    y, gradients = run(operator, x, weight, bias, dy, groups)
    exact_y, exact = reference.gradients(
        lambda *leaves: operator.exact(*leaves, groups), (x, weight, bias), dy
    )
    n = operator.set_size(x, groups)
    m = x.numel() // x.shape[1]
    assert y.dtype == x.dtype
    assert_close(y, exact_y, terms=n, what="y")
    for what, gradient, expected, leaf in zip(NAMES, gradients, exact, (x, weight, bias), strict=True):
        if leaf is None:
            continue
        assert gradient.dtype == leaf.dtype
        assert gradient.shape == leaf.shape
        if what == "dx":
            along = (-1, *[1] * (x.dim() - 2))
            wdy = dy.double() * (1 if weight is None else weight.double().view(along))
            largest = operator.per_element(wdy.abs(), groups, lambda t, dims: t.amax(dims, keepdim=True))
            spread = operator.per_element(x.double(), groups, standard_deviation)
            assert_close(gradient, expected, terms=n, scale=(largest / spread).to(x.device), what=what)
        else:
            x_hat = operator.exact(x, None, None, groups) if what == "dweight" else torch.ones_like(dy)
            scale = (dy.double() * x_hat).abs().max().item()
            assert_close(
                gradient, expected, terms=m, scale=scale * m**0.5, wide_dtype=wide(x.dtype), what=what
            )


def standard_deviation(x, dims):
    return torch.sqrt((x - x.mean(dims, keepdim=True)).square().mean(dims, keepdim=True) + EPS)


@every_shape
@every_format
def test_forward_and_backward(case, memory_format, device):
    x, *others = inputs(case, memory_format, torch.float32, device)
    compare(case.operator, x, *others, case.groups)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", channels.TYPICAL, ids=str)
@every_format
def test_dtypes(case, memory_format, dtype, device):
    x, *others = inputs(case, memory_format, dtype, device)
    compare(case.operator, x, *others, case.groups)


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("case", channels.TYPICAL, ids=str)
def test_mixed_dtypes(case, dtypes, device):
    x, *others = inputs(case, "channels_last", dtypes[0], device, parameters=dtypes[1])
    compare(case.operator, x, *others, case.groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", channels.COMPARED, ids=str)
@every_format
def test_no_worse_than_torch(case, memory_format, dtype, device):
    operator = case.operator
    x, weight, bias, dy = inputs(case, memory_format, dtype, device)
    y, gradients = run(operator, x, weight, bias, dy, case.groups)
    exact_y, exact = reference.gradients(
        lambda *leaves: operator.exact(*leaves, case.groups), (x, weight, bias), dy
    )
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    their_y = operator.theirs(*leaves, case.groups)
    theirs = torch.autograd.grad(their_y, leaves, dy)
    assert_no_worse_than(their_y.detach(), y, exact_y, what="y")
    for what, gradient, expected, their in zip(NAMES, gradients, exact, theirs, strict=True):
        assert_no_worse_than(their, gradient, expected, what=what)


@every_operator
@every_format
def test_output_keeps_the_memory_format(operator, shape, memory_format, device):
    x = in_format(torch.randn(shape, device=device), memory_format)
    y, (dx, *_) = run(operator, x, None, None, torch.randn(shape, device=device), GROUPS[operator.name])
    assert y.stride() == dx.stride() == x.stride()


@every_operator
@every_format
def test_large_mean(operator, shape, memory_format, device):
    """A mean of 10,000 standard deviations: y is as exact as the input's differences are."""
    groups = GROUPS[operator.name]
    x = in_format(torch.randn(shape, device=device) + 1e4, memory_format)
    dy = torch.randn_like(x)
    y, (dx, *_) = run(operator, x, None, None, dy, groups)
    exact_y, (expected, *_) = reference.gradients(
        lambda *leaves: operator.exact(*leaves, groups), (x, None, None), dy
    )
    assert_close(y, exact_y, terms=operator.set_size(x, groups), what="y")
    # As for rows: the backward pass has the mean in float32, off by half of 1e4's ulp.
    assert (dx.double() - expected).abs().max() < 2 * torch.finfo(torch.float32).eps / 2 * 1e4


@every_operator
def test_mean_of_one_part(operator, shape, device):
    """Sets whose first part is like nothing that follows: no shifted sum of squares survives this."""
    groups = GROUPS[operator.name]
    x = torch.randn(shape, device=device) + 1e4
    x[:, :, : shape[2] // 3] = 0
    y = operator.ours(x, None, None, groups)
    exact = operator.exact(x, None, None, groups)
    assert_close(y, exact, terms=operator.set_size(x, groups), what="y")


@every_operator
def test_float16_of_standard_deviation_300(operator, shape, device):
    x = (300 * torch.randn(shape, device=device)).half()
    weight, bias = torch.randn(2, shape[1], device=device).half()
    compare(operator, x, weight, bias, torch.randn_like(x), GROUPS[operator.name])


@every_operator
@pytest.mark.parametrize("value", [3.0, -1000.0, 0.1])
def test_zero_variance(operator, shape, value, device):
    """Sets of one value: y is the bias exactly, dx finite."""
    x = torch.full(shape, value, device=device)
    weight, bias = torch.randn(2, shape[1], device=device)
    y, (dx, *_) = run(operator, x, weight, bias, torch.randn_like(x), GROUPS[operator.name])
    assert torch.equal(y, bias.view(-1, 1, 1).expand_as(y))
    assert dx.isfinite().all()


@every_operator
def test_special_values(operator, shape, device):
    """NaN and infinities spoil their own set alone, as in PyTorch."""
    x = torch.randn(shape, device=device)
    x[0, 0, 0, 1] = float("nan")
    x[0, 2, 1, 0] = float("inf")
    groups = GROUPS[operator.name]
    y = operator.ours(x, None, None, groups)
    expected = operator.theirs(x, None, None, groups)
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-5, atol=1e-5)


@every_format
@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("channels", [6, 8])
def test_nan_stays_in_its_group(channels, group, memory_format, device):
    """Also in the backward pass, of groups that share a tile: of three channels, where the last one's
    are followed by padding, and of four."""
    x, dy = (in_format(torch.randn(2, channels, 3, 3, device=device), memory_format) for _ in range(2))
    weight, bias = torch.randn(2, channels, device=device)
    x[:, group * channels // 2, 0, 0] = torch.nan
    y, (dx, *_) = run(GROUP_NORM, x, weight, bias, dy, 2)
    for found in (y, dx):
        spoilt = found.isnan().reshape(2, 2, -1)
        assert spoilt[:, group].all()
        assert not spoilt[:, 1 - group].any()


CROPPED = (slice(None), slice(None), slice(1, -1), slice(2, -1))
STRIDED = {
    "some channels": lambda x: torch.cat([x, x], 1)[:, 1 : 1 + x.shape[1]],
    "some channels of channels_last": lambda x: in_format(torch.cat([x, x], 1), "channels_last")[
        :, 1 : 1 + x.shape[1]
    ],
    "every other image": lambda x: x.repeat_interleave(2, 0)[::2],
    "every other column": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "cropped": lambda x: torch.nn.functional.pad(x, (2, 1, 1, 1), value=9.0)[CROPPED],
    "transposed image": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "images and channels swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "misaligned": lambda x: torch.cat([x.flatten(), x.flatten()])[1 : 1 + x.numel()].view(x.shape),
    "expanded": lambda x: x[:, :1].expand(x.shape),
}


@every_operator
@pytest.mark.parametrize("layout", STRIDED)
def test_strides(operator, shape, layout, device):
    x = STRIDED[layout](torch.randn(shape, device=device))
    assert x.shape == torch.Size(shape)
    weight, bias = torch.randn(2, shape[1], device=device)
    compare(operator, x, weight, bias, torch.randn(shape, device=device), GROUPS[operator.name])


GRADIENTS = {
    "sum": lambda dy: dy.flatten()[0].expand(dy.shape),
    "mean of positions": lambda dy: dy[:, :, :1, :1].expand(dy.shape),
    "contiguous": lambda dy: dy.contiguous(),
    "channels_last": lambda dy: in_format(dy, "channels_last"),
    "cropped": STRIDED["cropped"],
}


@every_operator
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradient_strides(operator, shape, gradient, device):
    """Gradients as autograd delivers them: broadcast, or in another memory format than x."""
    x, dy = (in_format(torch.randn(shape, device=device), "channels_last") for _ in range(2))
    weight, bias = torch.randn(2, shape[1], device=device)
    compare(operator, x, weight, bias, GRADIENTS[gradient](dy), GROUPS[operator.name])


@every_operator
@pytest.mark.parametrize("present", [(True, False), (False, True), (False, False)], ids=str)
def test_absent_parameters(operator, shape, present, device):
    x, dy = torch.randn(2, *shape, device=device)
    parameters = torch.randn(2, shape[1], device=device)
    weight, bias = (p if there else None for p, there in zip(parameters, present, strict=True))
    compare(operator, x, weight, bias, dy, GROUPS[operator.name])


def test_parameters_that_are_views(device):
    x = torch.randn(2, 6, 4, 5, device=device)
    weight = torch.randn(12, device=device)[::2]
    bias = torch.randn(1, device=device).expand(6)
    compare(GROUP_NORM, x, weight, bias, torch.randn_like(x), 3)


@pytest.mark.parametrize("operator", [BATCH_NORM, GROUP_NORM], ids=str)
@pytest.mark.parametrize("needed", ["x", "weight", "bias", "x bias", "weight bias"])
def test_only_the_needed_gradients(operator, shape, needed, device):
    """Each subset of gradients is that of the full backward pass, bit for bit."""
    x, dy = torch.randn(2, *shape, device=device)
    tensors = (x, *torch.randn(2, shape[1], device=device))
    _, everything = run(operator, *tensors, dy, GROUPS[operator.name])
    names = ("x", "weight", "bias")
    leaves = [t.clone().requires_grad_(name in needed) for name, t in zip(names, tensors, strict=True)]
    operator.ours(*leaves, GROUPS[operator.name]).backward(dy)
    for name, leaf, full in zip(names, leaves, everything, strict=True):
        assert (leaf.grad is None) if name not in needed else torch.equal(leaf.grad, full)


@pytest.mark.parametrize(("operator", "groups"), [(GROUP_NORM, 8), (INSTANCE_NORM, None)], ids=str)
def test_an_expanded_gradient_of_long_lines(operator, groups, device):
    """With it nothing is adjacent, and a line lies across all warps."""
    x, dy = torch.randn(1, 16, 196, device=device), torch.randn(1, 16, 1, device=device)
    weight, bias = torch.randn(2, 16, device=device)
    compare(operator, x, weight, bias, dy.expand(x.shape), groups)


@every_operator
def test_same_bits_again(operator, shape, device):
    x, dy = torch.randn(2, *shape, device=device)
    weight, bias = torch.randn(2, shape[1], device=device)
    first, second = (run(operator, x, weight, bias, dy, GROUPS[operator.name]) for _ in range(2))
    assert torch.equal(first[0], second[0])
    for a, b in zip(first[1], second[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("operator", "size", "groups", "small"),
    [
        (GROUP_NORM, (6, 9, 5, 3), 3, False),
        (GROUP_NORM, (5, 320, 2, 3), 32, False),
        (GROUP_NORM, (5, 20), 4, False),
        (GROUP_NORM, (4, 6, 13, 11), 2, True),
        (INSTANCE_NORM, (6, 5, 5, 3), None, False),
        (INSTANCE_NORM, (4, 5, 13, 11), None, True),
    ],
)
@every_format
def test_batch_invariance(operator, size, groups, small, memory_format, device, monkeypatch):
    """The bits of an image do not depend on the other images: not on how many, nor on its place."""
    if small:
        make_small(monkeypatch)

    x, dy = (in_format(torch.randn(size, device=device), memory_format) for _ in range(2))
    weight, bias = torch.randn(2, size[1], device=device)
    y, (dx, *_) = run(operator, x, weight, bias, dy, groups)
    n = size[0]
    for start, stop in [(0, 1), (1, 2), (1, n), (n - 1, n)]:
        part_y, (part_dx, *_) = run(operator, x[start:stop], weight, bias, dy[start:stop], groups)
        assert torch.equal(part_y, y[start:stop])
        assert torch.equal(part_dx, dx[start:stop])


@every_operator
def test_inputs_are_not_written(operator, shape, device):
    x, dy = torch.randn(2, *shape, device=device)
    tensors = [x, *torch.randn(2, shape[1], device=device), dy]
    before = [t.clone() for t in tensors]
    run(operator, *tensors, GROUPS[operator.name])
    for now, then in zip(tensors, before, strict=True):
        assert torch.equal(now, then)


@every_operator
@every_format
def test_gradcheck_twice(operator, memory_format, device):
    """First and second derivatives, numerically, in float64."""
    x = in_format(torch.randn(2, 4, 2, device=device, dtype=torch.float64), memory_format)
    weight, bias = torch.randn(2, 4, device=device, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    groups = GROUPS[operator.name]
    assert torch.autograd.gradcheck(lambda *t: operator.ours(*t, groups), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: operator.ours(*t, groups), leaves, fast_mode=True)


@every_operator
def test_batched_gradients(operator, device):
    """Vectorized Jacobians, and gradients that are known to be zero."""
    x = torch.randn(2, 4, 3, device=device, requires_grad=True)
    groups = GROUPS[operator.name]
    ours, theirs = (
        torch.autograd.functional.jacobian(lambda t, f=f: f(t, None, None, groups), x, vectorize=v)
        for f, v in ((operator.ours, True), (operator.theirs, False))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    zeros = torch._efficientzerotensor(x.shape, device=device)
    (dx,) = torch.autograd.grad(operator.ours(x, None, None, groups), x, zeros)
    assert torch.equal(dx, torch.zeros_like(dx))


@every_format
def test_more_images_than_programs(memory_format, device, monkeypatch):
    """The resident backward pass walks through images when there are more of them than programs."""
    x, dy = (in_format(torch.randn(7, 6, 4, 5, device=device), memory_format) for _ in range(2))
    weight, bias = torch.randn(2, 6, device=device)
    _, alone = run(GROUP_NORM, x, weight, bias, dy, 3)
    monkeypatch.setattr(common_choices, "MAX_PARTIALS", 3)
    forget_plans()
    compare(GROUP_NORM, x, weight, bias, dy, 3)
    _, few = run(GROUP_NORM, x, weight, bias, dy, 3)
    assert torch.equal(alone[0], few[0])


@every_format
@pytest.mark.parametrize("over", ["batch", "group"])
def test_resident_and_in_pieces_agree(over, memory_format, device, monkeypatch):
    """The same set, held in either way."""
    x = in_format(torch.randn(2, 8, 12, 11, device=device), memory_format)
    weight, bias = torch.randn(2, 8, device=device)
    groups = 8 if over == "batch" else 4
    resident = normalize_channels(x, weight, bias, groups, over, EPS, x.dtype, key=over)
    monkeypatch.setattr(channel_choices, "group_forward", lambda *_: None)
    forget_plans()
    in_pieces = normalize_channels(x, weight, bias, groups, over, EPS, x.dtype, key=over)
    torch.testing.assert_close(resident, in_pieces, rtol=0, atol=1e-6)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_columns_and_images_agree(itemsize, device, monkeypatch):
    """The same batch with its images as positions, and as they are; one of its channels alone is not
    finite."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
    x, dy = torch.randn(2, 200, 8, 5, 3, device=device).to(dtype)
    x[7, 3, 2, 1] = float("nan")
    weight, bias = torch.randn(2, 8, device=device)
    y, gradients = run(BATCH_NORM, x, weight, bias, dy)
    asked = []
    monkeypatch.setattr(channel_choices, "prefer_columns", lambda *sizes: asked.append(sizes))
    forget_plans()
    images_y, of_images = run(BATCH_NORM, x, weight, bias, dy)
    assert asked == [(200, 8, 15, itemsize)] * 2
    assert y[:, 3].isnan().all()
    assert not y[:, 4:].isnan().any()
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(y, images_y, rtol=tolerance, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(
        gradients[0], of_images[0], rtol=tolerance, atol=tolerance, equal_nan=True
    )
    for columns, images in zip(gradients[1:], of_images[1:], strict=True):
        torch.testing.assert_close(columns, images, rtol=1e-5, atol=1e-4, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS)
@every_operator
def test_offsets_beyond_int32(operator, memory_format, device):
    """More than 2^31 elements, forward and backward; the last image is looked at."""
    shape = (129, 256, 256, 256)
    x = in_format(torch.randn(shape, device=device, dtype=torch.bfloat16), memory_format)
    weight, bias = torch.randn(2, shape[1], device=device)
    groups = 32 if operator is GROUP_NORM else None
    y, (dx, *_) = run(operator, x, weight, bias, x, groups)
    if operator is BATCH_NORM:
        mean = x.float().mean((0, 2, 3)) if x.is_cuda else None
        var = x.float().var((0, 2, 3), unbiased=False)
        expected = tF.batch_norm(x[-1:], mean, var, weight, bias, False, 0.1, EPS)
        torch.testing.assert_close(y[-1:], expected, rtol=2e-2, atol=2e-2)
    else:
        tail = x[-1:].clone()
        tail_y, (tail_dx, *_) = run(operator, tail, weight, bias, tail, groups)
        assert torch.equal(y[-1:], tail_y)
        assert torch.equal(dx[-1:], tail_dx)


@every_operator
def test_values_whose_squares_overflow(operator, shape, device):
    """Finite everywhere, with a variance that is not: zeros, as in PyTorch."""
    x = 1e20 * torch.randn(shape, device=device)
    groups = GROUPS[operator.name]
    y = operator.ours(x, None, None, groups)
    assert torch.equal(y, torch.zeros_like(y))
    torch.testing.assert_close(y, operator.theirs(x, None, None, groups))


@every_operator
def test_second_derivative_of_an_empty_tensor(operator, device):
    x = torch.randn(0, 4, 3, device=device, requires_grad=True)
    weight, bias = (torch.randn(4, device=device, requires_grad=True) for _ in range(2))
    y = operator.ours(x, weight, bias, GROUPS[operator.name])
    dx, _, _ = torch.autograd.grad(y.sum(), (x, weight, bias), create_graph=True)
    assert dx.shape == x.shape
