"""Models with every kind of normalization, converted: outputs, gradients, running statistics and
state_dict are those of the original."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonnorm as tn


class BasicBlock(nn.Module):
    """ResNet's (He et al., arXiv:1512.03385), with ResNet-D's shortcut (He et al., arXiv:1812.01187): in
    channels_last the gradient of a 1x1 convolution with stride 2 crashes torch 2.13 on the CPU."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut.append(nn.AvgPool2d(stride))
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(y)) + self.shortcut(x)).relu()


class ResNet(nn.Module):
    """ResNet-18's layout, half as deep, and narrower. One norm averages cumulatively, and the head has a
    BatchNorm1d."""

    def __init__(self, widths=(8, 16, 24, 32)):
        super().__init__()
        first, last = widths[0], widths[-1]
        self.stem = nn.Sequential(
            nn.Conv2d(3, first, 3, padding=1, bias=False), nn.BatchNorm2d(first, momentum=None)
        )
        self.stages = nn.Sequential()
        for inputs, outputs in zip((first, *widths), widths, strict=False):
            self.stages.append(BasicBlock(inputs, outputs, 1 if inputs == outputs else 2))
        self.head = nn.Sequential(nn.Linear(last, 16, bias=False), nn.BatchNorm1d(16), nn.Linear(16, 10))

    def forward(self, x):
        return self.head(self.stages(self.stem(x).relu()).mean((2, 3)))


class DiffusionBlock(nn.Module):
    """A residual block of a diffusion model's U-Net (Ho et al., arXiv:2006.11239): GroupNorm, SiLU and
    convolution, twice, with the embedded time in between."""

    def __init__(self, inputs, outputs, time):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, inputs), nn.GroupNorm(32, outputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x, time):
        y = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class UNet(nn.Module):
    """32 channels, 64 at half the resolution, attention there, and back with a skip connection."""

    def __init__(self):
        super().__init__()
        self.inputs, self.outputs = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 3, 3, padding=1)
        self.down, self.middle = DiffusionBlock(32, 32, 8), DiffusionBlock(32, 64, 8)
        self.norm = nn.GroupNorm(32, 64)
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)
        self.up = DiffusionBlock(96, 32, 8)
        self.last = nn.GroupNorm(32, 32)

    def forward(self, x):
        time = torch.linspace(-1, 1, 8, dtype=x.dtype, device=x.device).expand(len(x), 8)
        skip = self.down(self.inputs(x), time)
        x = self.middle(F.avg_pool2d(skip, 2), time)
        tokens = self.norm(x).flatten(2).mT
        x = x + self.attention(tokens, tokens, tokens)[0].mT.reshape(x.shape)
        x = self.up(torch.cat([F.interpolate(x, scale_factor=2), skip], 1), time)
        return self.outputs(F.silu(self.last(x)))


class VolumeNet(nn.Module):
    """A block of nnU-Net's kind (Isensee et al., arXiv:1809.10486): InstanceNorm3d of volumes."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(1, 8, 3, padding=1),
            nn.InstanceNorm3d(8, affine=True),
            nn.LeakyReLU(0.01),
            nn.Conv3d(8, 16, 3, 2, padding=1),
            nn.InstanceNorm3d(16, track_running_stats=True),
            nn.LeakyReLU(0.01),
            nn.Conv3d(16, 4, 1),
            nn.BatchNorm3d(4),
        )

    def forward(self, x):
        return self.layers(x)


class LayerNorm2d(nn.LayerNorm):
    """torchvision's."""

    def forward(self, x):
        return F.layer_norm(
            x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps
        ).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """A stem, a block and a downsampling of ConvNeXt (Liu et al., arXiv:2201.03545)."""

    def __init__(self, norm=LayerNorm2d):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 4, 4), norm(24, eps=1e-6))
        self.depthwise = nn.Conv2d(24, 24, 7, padding=3, groups=24)
        self.norm = nn.LayerNorm(24, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 24))
        self.downsample = nn.Sequential(norm(24, eps=1e-6), nn.Conv2d(24, 48, 2, 2))

    def forward(self, x):
        x = self.stem(x)
        y = self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))
        return self.downsample(x + y.permute(0, 3, 1, 2))


MODELS = {
    # model, its input, and what is replaced
    "ResNet": (ResNet, (6, 3, 8, 8), 1 + 2 * 4 + 3 + 1),
    "UNet": (UNet, (2, 3, 8, 8), 2 * 3 + 2),
    "VolumeNet": (VolumeNet, (2, 1, 4, 6, 6), 3),
    "ConvNeXt": (ConvNeXt, (2, 3, 16, 16), 1),
}


def converted(name, original):
    """A converted copy. torchvision's LayerNorm2d is a class that `convert` leaves: ours is built in."""
    model = copy.deepcopy(original)
    if name == "ConvNeXt":
        model = ConvNeXt(tn.LayerNorm2d).to(next(original.parameters()))
        model.load_state_dict(original.state_dict())
    assert len(tn.convert(model).replaced) == MODELS[name][2]
    return model


def step(model, optimizer, x, target):
    """A step of training: the output, the gradient of the input, and those of the parameters."""
    x = x.detach().requires_grad_()
    y = model(x)
    optimizer.zero_grad()
    (y - target).square().mean().backward()
    optimizer.step()
    return [y.detach()], [x.grad], [p.grad.clone() for p in model.parameters()]


def assert_close(ours, theirs):
    """Within 5e-5 of each tensor's largest element: PyTorch's float32 models are up to 6e-6 from the
    same in float64. A gradient that is zero but for rounding (of a bias that a norm takes away again)
    is measured against a tenth of the largest."""
    largest = max(t.abs().max().item() for t in theirs)
    for t, expected in zip(ours, theirs, strict=True):
        scale = max(expected.abs().max().item(), largest / 10)
        torch.testing.assert_close(t, expected, rtol=0, atol=5e-5 * scale)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", MODELS)
def test_converted_model(name, channels_last, device):
    """Two steps of training and an evaluation."""
    cls, shape, _ = MODELS[name]
    original = cls().to(device)
    x = torch.randn(2, *shape, device=device)
    if channels_last:
        memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        original = original.to(memory_format=memory_format)
        x = [batch.contiguous(memory_format=memory_format) for batch in x]
    model = converted(name, original)
    optimizers = [torch.optim.SGD(m.parameters(), 0.01) for m in (model, original)]
    target = torch.randn_like(original.eval()(x[0]))

    model.train(), original.train()
    for batch in x:
        pairs = zip((model, original), optimizers, strict=True)
        for found in zip(*(step(m, optimizer, batch, target) for m, optimizer in pairs), strict=True):
            assert_close(*found)
    model.eval(), original.eval()
    with torch.inference_mode():
        assert_close([model(x[0])], [original(x[0])])
    assert list(model.state_dict()) == list(original.state_dict())
    for ours, theirs in zip(model.buffers(), original.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
