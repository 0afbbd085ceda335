"""Models of Hugging Face's transformers, built from configurations with random weights: `convert`
changes neither outputs nor gradients nor state_dict, and `restore` gives back what was there."""

import copy
from collections import Counter

import pytest
import torch
import transformers as hf
from transformers.models.vibevoice.configuration_vibevoice import VibeVoiceDiffusionHeadConfig
from transformers.models.vibevoice.modeling_vibevoice import VibeVoiceDiffusionHead

import tritonnorm as tn

# Sizes under the names that most configurations share, and those that differ.
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
}
GROUPED = TEXT | {"num_key_value_heads": 2, "head_dim": 8}
QK_NORM = {"qk_layernorm": True, "use_qk_norm": True}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
MAMBA2 = TEXT | {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 4}
MOE = {"num_local_experts": 2, "num_experts_per_tok": 1}
VIT = TEXT | {"image_size": 32, "patch_size": 8}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8, "out_features": ["stage2"]}
SWIN = {"image_size": 32, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
POOLFORMER = {
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "num_encoder_blocks": 2,
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "padding": [2, 1],
}
SAM = VIT | {"output_channels": 16, "num_pos_feats": 8, "window_size": 2, "global_attn_indexes": [1]}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
WHISPER = SEQ2SEQ | {"vocab_size": 64, "num_mel_bins": 8, "max_source_positions": 16}
WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
DETR = SEQ2SEQ | {"num_queries": 4, "use_timm_backbone": False, "backbone": None}
DETR |= {"backbone_config": {"model_type": "resnet", "layer_type": "basic", **STAGES}}
WAV2VEC2 = TEXT | {
    "conv_dim": [16, 16],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}
ENCODEC = {"hidden_size": 8, "num_filters": 4, "upsampling_ratios": [4], "codebook_size": 16}
UNIVNET = {
    "model_in_channels": 8,
    "model_hidden_channels": 8,
    "num_mel_bins": 8,
    "resblock_kernel_sizes": [3],
    "resblock_stride_sizes": [2],
    "resblock_dilation_sizes": [[1, 3]],
    "kernel_predictor_hidden_channels": 8,
    "kernel_predictor_num_blocks": 1,
}
DIFFUSION = {"hidden_size": 16, "latent_size": 8, "intermediate_size": 24, "num_hidden_layers": 2}


def tokens():
    return {"input_ids": torch.randint(1, 64, (2, 7))}


def token_pairs():
    return tokens() | {"decoder_input_ids": torch.randint(1, 64, (2, 5))}


def image():
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def wave():
    return {"input_values": torch.randn(2, 1, 96)}


def long_wave():
    return {"input_values": torch.randn(2, 400)}


def spectrum():
    return {
        "input_features": torch.randn(2, 8, 32),
        "decoder_input_ids": torch.randint(1, 64, (2, 5)),
    }


def noise():
    return {"input_features": torch.randn(1, 6, 8), "noise_sequence": torch.randn(1, 6, 8)}


def noisy_latents():
    return {
        "noisy_images": torch.randn(2, 8),
        "timesteps": torch.rand(2),
        "condition": torch.randn(2, 16),
    }


# class: configuration, inputs, what is replaced (a family, or torch's class) and how often, what is left
MODELS = {
    hf.LlamaForCausalLM: (GROUPED, tokens, {"rounded_rms_norm": 5}, {}),
    hf.MistralForCausalLM: (GROUPED, tokens, {"rounded_rms_norm": 5}, {}),
    hf.Qwen3ForCausalLM: (GROUPED, tokens, {"rounded_rms_norm": 9}, {}),
    hf.Gemma2ForCausalLM: (GROUPED, tokens, {"offset_rms_norm": 9}, {}),
    hf.Gemma3ForCausalLM: (GROUPED, tokens, {"offset_rms_norm": 13}, {}),
    hf.OlmoForCausalLM: (TEXT, tokens, {"layer_norm": 5}, {}),
    hf.Olmo2ForCausalLM: (TEXT, tokens, {"rms_norm": 9}, {}),
    hf.GptOssForCausalLM: (GROUPED | MOE, tokens, {"rms_norm": 5}, {}),
    # Cohere's q and k have a weight for each head, but statistics of one.
    hf.CohereForCausalLM: (GROUPED | QK_NORM, tokens, {"layer_norm": 3}, {"CohereLayerNorm": 4}),
    hf.NemotronForCausalLM: (GROUPED, tokens, {"offset_layer_norm": 5}, {}),
    hf.T5Model: (T5, token_pairs, {"t5_norm": 12}, {}),
    hf.Mamba2ForCausalLM: (MAMBA2, tokens, {"rounded_rms_norm": 3, "gated_rms_norm": 2}, {}),
    hf.GPT2LMHeadModel: (GPT2, tokens, {"LayerNorm": 5}, {}),
    hf.GPTNeoXForCausalLM: (TEXT, tokens, {"LayerNorm": 5}, {}),
    hf.PhiForCausalLM: (TEXT | QK_NORM, tokens, {"LayerNorm": 7}, {}),
    hf.BertModel: (TEXT, tokens, {"LayerNorm": 5}, {}),
    hf.DebertaModel: (TEXT, tokens, {"layer_norm_then_affine": 5}, {}),
    hf.ConvNextModel: (
        STAGES | {"num_stages": 2},
        image,
        {"formatted_layer_norm": 4, "LayerNorm": 1},
        {},
    ),
    hf.ViTModel: (VIT, image, {"LayerNorm": 5}, {}),
    hf.SwinModel: (SWIN, image, {"LayerNorm": 7}, {}),
    hf.SamVisionModel: (SAM, image, {"LayerNorm": 4, "formatted_layer_norm": 2}, {}),
    hf.PoolFormerModel: (POOLFORMER, image, {"group_norm": 4}, {}),
    hf.ResNetModel: (STAGES | {"layer_type": "basic"}, image, {"BatchNorm2d": 6}, {}),
    hf.BitModel: (STAGES | {"num_groups": 4}, image, {}, {"BitGroupNormActivation": 7}),
    hf.DetrModel: (DETR, image, {"LayerNorm": 6}, {"DetrFrozenBatchNorm2d": 6}),
    hf.Wav2Vec2Model: (WAV2VEC2, long_wave, {"GroupNorm": 1, "LayerNorm": 6, "_WeightNorm": 1}, {}),
    hf.WhisperModel: (WHISPER, spectrum, {"LayerNorm": 7}, {}),
    hf.EncodecModel: (ENCODEC, wave, {"_WeightNorm": 12}, {}),
    hf.UnivNetModel: (UNIVNET, noise, {"_WeightNorm": 10}, {}),
    VibeVoiceDiffusionHead: (DIFFUSION, noisy_latents, {"rounded_rms_norm": 2}, {}),
}


def build(cls, dtype=torch.float32):
    """With norms that do something: their weights and biases are moved from one and zero."""
    make_config = getattr(cls, "config_class", None) or VibeVoiceDiffusionHeadConfig
    model = cls(make_config(**MODELS[cls][0])).eval()
    if cls is hf.UnivNetModel:
        model.apply_weight_norm()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.to(dtype)


def results(model, inputs):
    """The first output, and the gradients of all parameters that have one."""
    model.zero_grad()
    y = model(**inputs)
    if not isinstance(y, torch.Tensor):
        y = next(v for v in y.values() if isinstance(v, torch.Tensor) and v.is_floating_point())
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    return {"output": y.detach()} | {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None
    }


def assert_near(actual, expected, bound):
    """Every tensor within `bound` of its largest element."""
    assert actual.keys() == expected.keys()
    for name, theirs in expected.items():
        scale = theirs.abs().max().item()
        torch.testing.assert_close(actual[name], theirs, rtol=0, atol=bound * scale + 1e-6, msg=name)


def kinds(model, entries):
    """Families by the name of the function, other classes by theirs."""
    modules = dict(model.named_modules())
    for entry in entries:
        forward = type(modules.get(entry.name)).__dict__.get("forward")
        is_family = getattr(forward, "__module__", None) == tn.families.__name__
        yield forward.__name__ if is_family else entry.cls.split(".")[-1]


def classes(model):
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)
def test_float32(cls):
    _, inputs, replaced, left = MODELS[cls]
    model, inputs = build(cls), inputs()
    expected, before = results(model, inputs), classes(model)
    state = model.state_dict(keep_vars=True)

    report = tn.convert(model)
    assert Counter(kinds(model, report.replaced)) == replaced
    assert Counter(kinds(model, report.left)) == left
    assert all(entry.reason for entry in report.left)
    now = model.state_dict(keep_vars=True)
    assert now.keys() == state.keys()
    assert all(now[name] is state[name] for name in state)
    assert_near(results(model, inputs), expected, 1e-4)

    assert len(tn.restore(model).replaced) == len(report.replaced)
    assert classes(model) == before
    assert_near(results(model, inputs), expected, 0)


def error(actual, exact):
    """Root mean square over all tensors of their relative errors."""
    relative = [(actual[k].float() - exact[k]).norm() / exact[k].norm().clamp(min=1e-9) for k in exact]
    return torch.stack(relative).square().mean().sqrt().item()


@pytest.mark.parametrize(
    ("cls", "dtype"),
    [
        (hf.LlamaForCausalLM, torch.float16),
        (hf.LlamaForCausalLM, torch.bfloat16),
        (hf.Gemma3ForCausalLM, torch.float16),
        (hf.Gemma3ForCausalLM, torch.bfloat16),
        (hf.Olmo2ForCausalLM, torch.float16),
        (hf.T5Model, torch.float16),
        (hf.T5Model, torch.bfloat16),
        (hf.Mamba2ForCausalLM, torch.bfloat16),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_16_bits(cls, dtype):
    """From the float32 model of the same weights it is as far as the original is. (In bfloat16 up to
    four times: what the interpreter cuts off is twice what rounding leaves, and towards zero.)"""
    model, inputs = build(cls, dtype), MODELS[cls][1]()
    exact = results(copy.deepcopy(model).float(), inputs)
    theirs = results(model, inputs)
    report = tn.convert(model)
    assert Counter(kinds(model, report.replaced)) == MODELS[cls][2]
    ours = results(model, inputs)
    assert all(ours[name].dtype == theirs[name].dtype for name in theirs)
    assert error(ours, exact) <= (1.2 if dtype == torch.float16 else 4) * error(theirs, exact)
