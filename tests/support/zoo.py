"""Tiny models with random weights of the architectures that the zoo walks: transformers, timm and torchvision.

Nothing is downloaded: each is made from a configuration of about 32 channels and two layers.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""A text model's sizes under the names that most configurations of transformers use."""

IMAGES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
}

EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@dataclass(frozen=True)
class Case:
    """One architecture: how its model is built, and what it is given. `inputs` names the batch: text, images, …"""

    name: str
    build: Callable[[], nn.Module]
    inputs: str


def _transformers(config: str, inputs: str = "text", **sizes: Any) -> Case:
    def build() -> nn.Module:
        import transformers

        made = getattr(transformers, f"{config}Config")(**sizes)
        made._experts_implementation = "eager"  # the grouped product knows no float64
        made.use_cache = False
        return transformers.AutoModel.from_config(made)

    return Case(config, build, inputs)


def _text(config: str, **sizes: Any) -> Case:
    return _transformers(config, "text", **{k: v for k, v in {**SIZES, **sizes}.items() if v is not None})


def _images(config: str, **sizes: Any) -> Case:
    return _transformers(config, "images", **{**IMAGES, **sizes})


_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "head_dim": None,
}
_STAGES = {"num_channels": 3, "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
_SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
_BART = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_GATED_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}

TRANSFORMERS = [
    _text("GPT2", n_embd=32, n_layer=2, n_head=4, n_positions=64),
    _text("GPTNeoX"),
    _text("GPTJ", n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4),
    _text("OPT", ffn_dim=48, word_embed_proj_dim=32),
    _text("Bloom", n_layer=2, n_head=4),
    _text("Falcon", head_dim=None, num_key_value_heads=None),
    _text("Mpt", d_model=32, n_layers=2, n_heads=4, expansion_ratio=2),
    _text("Phi"),
    _text("Bert"),
    _text("DebertaV2"),
    _text("ModernBert", global_attn_every_n_layers=2, local_attention=4, cls_token_id=1, sep_token_id=2),
    _images("ViT"),
    _images("Dinov2", mlp_ratio=2),
    _transformers("Swin", "images", **_SWIN),
    _transformers("Swinv2", "images", **_SWIN),
    _transformers("ConvNext", "images", patch_size=2, **_STAGES),
    _transformers("ConvNextV2", "images", patch_size=2, **_STAGES),
    _images("VitDet", window_size=2, window_block_indices=[0]),
    _transformers(
        "Segformer",
        "images",
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
    ),
    _transformers("Bart", "pair", **_BART),
    _transformers("Whisper", "audio", **_BART, num_mel_bins=8, max_source_positions=8, max_target_positions=16),
    _transformers(
        "Wav2Vec2",
        "wave",
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=[8, 8],
        conv_stride=[4, 2],
        conv_kernel=[8, 3],
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
    ),
    _transformers("T5", "pair", **_T5),
    _transformers("LongT5", "pair", **_T5, local_radius=4),
    _text("Llama"),
    _text("Mistral"),
    _text("Qwen2"),
    _text("Qwen3"),
    _text("Qwen3Next", **EXPERTS, **_GATED_DELTA, shared_expert_intermediate_size=16, num_heads=4),
    _text("Gemma"),
    _text("Gemma2", sliding_window=4),
    _text("Gemma3Text", sliding_window=4),
    _text(
        "Gemma3nText",
        sliding_window=4,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=99,
        laurel_rank=4,
        num_kv_shared_layers=0,
    ),
    _text("Mixtral", **EXPERTS),
    _text("DeepseekV3", **{**EXPERTS, **_MLA}),
    _text("Llama4Text", **EXPERTS, intermediate_size_mlp=48, interleave_moe_layer_step=2),
    _text("GptOss", **EXPERTS, sliding_window=4),
    _text("Phi3", rms_norm_eps=1e-6),
    _text("Cohere", use_qk_norm=True),
    _text("Cohere2", sliding_window=4),
    _text("Olmo"),
    _text("Olmo2"),
    _text("StableLm", qk_layernorm=True),
    _text("Nemotron"),
    _text("Persimmon"),
    _text("Starcoder2"),
    _text("Glm4"),
    _text("Granite"),
    _text("Helium"),
    _text("NanoChat"),
    _text("Mamba", state_size=4),
    _text("Mamba2", state_size=4, num_heads=8, n_groups=2, chunk_size=4, expand=2),
    _text("RecurrentGemma", lru_width=32, attention_window_size=4, block_types=["recurrent", "attention"]),
    _text(
        "Zamba2",
        n_mamba_heads=4,
        mamba_d_state=4,
        mamba_headdim=16,
        num_mem_blocks=1,
        layers_block_type=["mamba", "hybrid"],
        head_dim=None,
    ),
    _text("Bamba", mamba_n_heads=4, mamba_d_head=16, mamba_d_state=4, mamba_n_groups=1, attn_layer_indices=[1]),
    _text("Jamba", attn_layer_period=2, attn_layer_offset=1, **EXPERTS, use_mamba_kernels=False, mamba_dt_rank=4),
    _text("Rwkv", attention_hidden_size=32, context_length=64),
]


def _timm(name: str, variant: str = "", inputs: str = "image tensor", **sizes: Any) -> Case:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=5, **sizes)

    return Case(" ".join(["timm", name, variant]).strip(), build, inputs)


_VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
_STAGED = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "inputs": "large image tensor"}
_SHIFTED = {"img_size": 16, "patch_size": 2, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4}

TIMM = [
    _timm("vit_tiny_patch16_224", **_VIT),
    _timm("vit_tiny_patch16_224", "qk_norm", **_VIT, qk_norm=True, pre_norm=True, fc_norm=True, global_pool="avg"),
    _timm("vit_tiny_patch16_224", "rmsnorm", **_VIT, norm_layer="rmsnorm"),
    _timm("vit_tiny_patch16_224", "simplenorm", **_VIT, norm_layer="simplenorm"),
    _timm("eva02_tiny_patch14_224", **_VIT),
    _timm("aimv2_large_patch14_224", **_VIT),
    _timm("cait_xxs24_224", **_VIT),
    _timm("swin_tiny_patch4_window7_224", **_SHIFTED),
    _timm("swinv2_tiny_window8_256", **_SHIFTED),
    _timm("convnext_atto", **_STAGED, patch_size=2),
    _timm("convnext_atto_rms", **_STAGED, patch_size=2),
    _timm("convnextv2_atto", **_STAGED, patch_size=2),
    _timm("edgenext_xx_small", **_STAGED),
    _timm("mambaout_femto", **_STAGED),
    _timm("inception_next_atto", **_STAGED),
    _timm(
        "pvt_v2_b0", inputs="large image tensor", depths=(1, 1, 1, 1), embed_dims=(8, 8, 16, 16), num_heads=(1, 1, 2, 2)
    ),
]


def _torchvision(name: str, build: Callable[[Any], nn.Module]) -> Case:
    def made() -> nn.Module:
        import torchvision.models

        return build(torchvision.models)

    return Case(f"torchvision {name}", made, "image tensor")


def _swin_v2(models: Any) -> nn.Module:
    parts = models.swin_transformer
    return models.SwinTransformer(
        *_WINDOWS, block=parts.SwinTransformerBlockV2, downsample_layer=parts.PatchMergingV2, num_classes=5
    )


def _convnext(models: Any) -> nn.Module:
    stages = [models.convnext.CNBlockConfig(8, 16, 1), models.convnext.CNBlockConfig(16, None, 1)]
    return models.ConvNeXt(stages, num_classes=5)


_WINDOWS = ([2, 2], 16, [1, 1], [2, 4], [4, 4])

TORCHVISION = [
    _torchvision("swin", lambda models: models.SwinTransformer(*_WINDOWS, num_classes=5)),
    _torchvision("swin_v2", _swin_v2),
    _torchvision("convnext", _convnext),
    _torchvision("vit", lambda models: models.VisionTransformer(16, 4, 2, 4, 32, 48, num_classes=5)),
]


def batch_of(inputs: str, seed: int = 0) -> Batch:
    """Return a batch of two, seeded."""
    generator = torch.Generator().manual_seed(seed)
    randn = functools.partial(torch.randn, generator=generator)
    ids = torch.randint(3, 99, (2, 7), generator=generator)
    return {
        "text": lambda: {"input_ids": ids},
        "pair": lambda: {"input_ids": ids, "decoder_input_ids": ids[:, :5]},
        "images": lambda: {"pixel_values": randn(2, 3, 16, 16)},
        "image tensor": lambda: {"x": randn(2, 3, 16, 16)},
        "large image tensor": lambda: {"x": randn(2, 3, 32, 32)},
        "audio": lambda: {"input_features": randn(2, 8, 16), "decoder_input_ids": ids[:, :5]},
        "wave": lambda: {"input_values": randn(2, 160)},
    }[inputs]()


def prepared(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[nn.Module, Batch]:
    """Return the case's model in this dtype and in eval mode, with parameters that are not as they begin, and its batch."""
    torch.manual_seed(seed)
    model = case.build().to(dtype).eval()
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch_of(case.inputs, seed).items()}
    with torch.no_grad():
        for p in model.parameters():
            p += (0.2 if p.dim() == 1 else 0.05) * torch.randn_like(p)
    return model, batch


def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Return the mean squared distance of the model's first output from a fixed random target, and its number of tokens."""
    output = model(*batch.values()) if "x" in batch else next(iter(model(**batch).values()))
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return (output - target).square().mean(), output[..., 0].numel()
