"""The normalizations of Hugging Face's transformers, by family.

Its models have hundreds of classes, most of them copies of a few under other names. A function here is
what the classes of one family compute. Names only say for which classes a family is tried: which one it
is, the probe of `convert` decides. So classes of newer versions, and of models that bring code of their
own, are found as well, and transformers is never imported.

Attributes are read from the module at each call, as parametrizations and FSDP change them.
"""

import torch
import torch.nn.functional as F

from . import functional
from .dtypes import HALF
from .registry import register

RMS_NORMS = ("transformers*RMSNorm", "transformers*RmsNorm", "transformers*L2Norm")
LAYER_NORMS = ("transformers*LayerNorm", "transformers*LayerNorm1P")
T5_NORMS = ("transformers*RMSNorm", "transformers*LayerNorm")
GATED = ("transformers*RMSNormGated",)
IMAGE_NORMS = ("transformers*LayerNorm", "transformers*LayerNorm2d")


def _eps(module):
    """Under either of its names; a class that has it as a constant, as OLMo's, takes torch's."""
    attributes = vars(module)
    return attributes.get("variance_epsilon", attributes.get("eps", 1e-5))


def _row(module, x):
    """normalized_shape and weight."""
    weight = getattr(module, "weight", None)
    shape = getattr(module, "normalized_shape", x.shape[-1:]) if weight is None else weight.shape
    return shape, weight


def _save(module):
    """What is kept for the backward pass, as of `tritonnorm.RMSNorm`: its attribute `save`."""
    return getattr(module, "save", "input")


@register(*RMS_NORMS)
def unweighted_rms_norm(module, hidden_states):
    """y = x_hat, also where there is a weight that is not used: FalconMamba's."""
    return functional.rms_norm_variant(hidden_states, hidden_states.shape[-1:], eps=_eps(module))


@register(*T5_NORMS)
def t5_norm(module, hidden_states):
    """x_hat is rounded if the weight is 16-bit, and y has the weight's dtype: T5."""
    shape, weight = _row(module, hidden_states)
    promoted = torch.promote_types(weight.dtype, hidden_states.dtype)
    dtype = weight.dtype if weight.dtype in HALF else promoted
    return functional.rms_norm_variant(
        hidden_states, shape, weight, _eps(module), round_to="weight", dtype=dtype, save=_save(module)
    )


@register(*RMS_NORMS)
def rounded_offset_rms_norm(module, hidden_states):
    """y = x_hat * (1 + weight), with the sum rounded to the weight's dtype: Muse Spark."""
    shape, weight = _row(module, hidden_states)
    return functional.rms_norm_variant(hidden_states, shape, weight + 1, _eps(module))


@register(*RMS_NORMS)
def offset_rms_norm(module, hidden_states):
    """y = x_hat * (1 + weight), rounded once: Gemma, Qwen3-Next."""
    shape, weight = _row(module, hidden_states)
    return functional.rms_norm_variant(
        hidden_states, shape, weight, _eps(module), weight_offset=1.0, save=_save(module)
    )


@register(*RMS_NORMS)
def rms_norm(module, hidden_states):
    """y = x_hat * weight, rounded once: OLMo2, GPT-OSS, Gemma 3n and, without weight, Llama 4's L2."""
    shape, weight = _row(module, hidden_states)
    return functional.rms_norm_variant(hidden_states, shape, weight, _eps(module), save=_save(module))


@register(*RMS_NORMS, "transformers*.CpmAntLayerNorm")
def rounded_rms_norm(module, hidden_states):
    """x_hat is rounded to the input's dtype before the weight multiplies it: Llama, Mistral, Qwen."""
    shape, weight = _row(module, hidden_states)
    dtype = torch.promote_types(weight.dtype, hidden_states.dtype)
    return functional.rms_norm_variant(
        hidden_states, shape, weight, _eps(module), round_to="input", dtype=dtype, save=_save(module)
    )


def _gated_shapes(module):
    return [(4, 16, *module.weight.shape)] * 2


@register(*GATED, shapes=_gated_shapes)
def rms_norm_gated(module, hidden_states, gate=None):
    """The gate multiplies after the weight, in float32: Kimi."""
    y = functional.rms_norm_variant(
        hidden_states, *_row(module, hidden_states), _eps(module), dtype=torch.float32
    )
    return (y * getattr(F, module.activation)(gate.float())).to(hidden_states.dtype)


@register(*GATED, shapes=_gated_shapes)
def rounded_rms_norm_gated(module, hidden_states, gate=None):
    """The same, with x_hat rounded before the weight: Qwen3-Next."""
    y = rounded_rms_norm(module, hidden_states)
    return (y * getattr(F, module.activation)(gate.float())).to(hidden_states.dtype)


@register(*GATED, shapes=_gated_shapes)
def gated_rms_norm(module, hidden_states, gate=None):
    """The gate multiplies before the statistics, which are those of groups of channels: Mamba2."""
    x = hidden_states.float()
    if gate is not None:
        x = x * F.silu(gate.float())
    groups = x.unflatten(-1, (-1, module.group_size))
    x_hat = functional.rms_norm_variant(
        groups, groups.shape[-1:], eps=_eps(module), dtype=hidden_states.dtype
    )
    return module.weight * x_hat.flatten(-2)


@register(*LAYER_NORMS)
def layer_norm_then_affine(module, hidden_states):
    """x_hat is rounded before weight and bias: DeBERTa, and Chameleon's q and k, whose weights differ
    from head to head."""
    shape = hidden_states.shape[-1:]
    x_hat = functional.layer_norm(hidden_states, shape, eps=_eps(module))
    return module.weight * x_hat + module.bias


@register(*LAYER_NORMS)
def offset_layer_norm(module, hidden_states):
    """The weight is 1 + weight, of its dtype: Nemotron, VideoPrism."""
    shape, weight = _row(module, hidden_states)
    return functional.layer_norm(hidden_states, shape, weight + 1, module.bias, _eps(module))


@register(*LAYER_NORMS)
def layer_norm(module, hidden_states):
    """torch's formula under another name, with or without weight and bias: Cohere, OLMo, ESM."""
    bias = getattr(module, "bias", None)
    return functional.layer_norm(hidden_states, *_row(module, hidden_states), bias, _eps(module))


def _image_shapes(module):
    return [(4, *module.weight.shape, 5, 7)]


@register(*IMAGE_NORMS, shapes=_image_shapes)
def layer_norm2d(module, hidden_states):
    """Over the channels of `[N, C, H, W]`: EoMT."""
    return functional.layer_norm2d(hidden_states, module.weight, module.bias, _eps(module))


def _formatted_shapes(module):
    shape = tuple(module.weight.shape)
    return [(4, *shape, 5, 7) if module.data_format == "channels_first" else (4, 5, 7, *shape)]


@register(*LAYER_NORMS, shapes=_formatted_shapes)
def formatted_layer_norm(module, features):
    """`[N, C, H, W]` or `[N, H, W, C]`, as the module's data_format says: ConvNeXt, SAM."""
    if module.data_format == "channels_first":
        return layer_norm2d(module, features)
    return layer_norm(module, features)


@register("transformers*GroupNorm", shapes=_image_shapes)
def group_norm(module, input):
    """A subclass with other arguments to its constructor: PoolFormer."""
    return functional.group_norm(input, module.num_groups, module.weight, module.bias, module.eps)
