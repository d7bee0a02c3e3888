"""More text-to-image transformers: AuraFlow, CogView 3, HunyuanDiT, Lumina, Ovis, OmniGen, HiDream."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers as tf

from .case import Builder, Case, make
from .dit_image import CFG, NO_BINS, cogview4, euler, t5_side
from .flux import flow_scheduler
from .llm import bpe_tokenizer, decoder
from .media import picture
from .stable_diffusion import BETAS, SIZE, TEXT
from .text import HEADS, WIDTH, clip_text, clip_tokenizer, t5, t5_pieces, t5_tokenizer, umt5
from .vaes import flow_vae, image_vae

BIG = {"height": 32, "width": 32}
TEXT_ONLY = {key: value for key, value in TEXT.items() if key != "negative_prompt"}


def auraflow() -> dict[str, Any]:
    """Return the components of AuraFlow."""
    net = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    text = {"text_encoder": umt5(), "tokenizer": t5_tokenizer()}
    return {**text, "vae": image_vae(), "transformer": net, **euler(1.73)}


def cogview3() -> dict[str, Any]:
    """Return the components of CogView 3 Plus: v-prediction, zero terminal signal-to-noise ratio."""
    net = diffusers.CogView3PlusTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=8,
        sample_size=8,
    )
    solver = diffusers.CogVideoXDDIMScheduler(**BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    return {**t5_side(), "vae": image_vae(), "transformer": net, "scheduler": solver}


DIT: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "patch_size": 2,
    "sample_size": 8,
    "hidden_size": 16,
    "cross_attention_dim": WIDTH,
    "cross_attention_dim_t5": WIDTH,
    "pooled_projection_dim": 8,
    "use_style_cond_and_image_meta_size": False,
}


def hunyuan_dit(**extra: Any) -> dict[str, Any]:
    """Return the components of HunyuanDiT: BERT and T5 read the prompt, the variance is cut off."""
    config = tf.BertConfig(
        vocab_size=len(t5_pieces()),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=24,
        max_position_embeddings=96,
    )
    return {
        "text_encoder": tf.BertModel(config),
        "tokenizer": t5_tokenizer(),
        "text_encoder_2": t5(),
        "tokenizer_2": t5_tokenizer(),
        "transformer": diffusers.HunyuanDiT2DModel(**DIT, num_layers=4),
        "vae": image_vae(),
        "scheduler": diffusers.DDPMScheduler(**BETAS, prediction_type="v_prediction"),
        "requires_safety_checker": False,
        **extra,
    }


def hunyuan_controlnet() -> diffusers.HunyuanDiT2DControlNetModel:
    """Return half as many blocks as :func:`hunyuan_dit` has."""
    return diffusers.HunyuanDiT2DControlNetModel(**DIT, transformer_num_layers=4)


def lumina() -> dict[str, Any]:
    """Return the components of Lumina Next: its output is negated and half of it cut off."""
    net = diffusers.LuminaNextDiT2DModel(
        sample_size=8,
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        cross_attention_dim=WIDTH,
    )
    text = {"text_encoder": decoder("Gemma", head="ForCausalLM"), "tokenizer": bpe_tokenizer()}
    return {**text, "vae": image_vae(), "transformer": net, **euler()}


def ovis() -> dict[str, Any]:
    """Return the components of Ovis-Image."""
    net = diffusers.OvisImageTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    text = {"text_encoder": decoder("Qwen3"), "tokenizer": bpe_tokenizer()}
    return {**text, "vae": flow_vae(), "transformer": net, "scheduler": flow_scheduler()}


def omnigen() -> dict[str, Any]:
    """Return the components of OmniGen: one decoder reads words and noise; time runs from 0 to 1."""
    net = diffusers.OmniGenTransformer2DModel(
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=24,
        num_layers=2,
        vocab_size=1024,
        pad_token_id=0,
        max_position_embeddings=512,
        original_max_position_embeddings=256,
        rope_scaling={"short_factor": [1.0] * 4, "long_factor": [1.0] * 4},
        pos_embed_max_size=16,
        time_step_dim=8,
    )
    solver = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1)
    return {"transformer": net, "vae": image_vae(levels=4), "scheduler": solver, "tokenizer": bpe_tokenizer()}


def hidream() -> dict[str, Any]:
    """Return the components of HiDream: four text encoders, a mixture of experts, a negated output."""
    net = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[WIDTH, WIDTH],
        text_emb_dim=2 * WIDTH,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=[0, 1],
    )
    long = {"max_position_embeddings": 224}
    return {
        "text_encoder": clip_text(projection=WIDTH, **long),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": clip_text(projection=WIDTH, **long),
        "tokenizer_2": clip_tokenizer(),
        "text_encoder_3": t5(),
        "tokenizer_3": t5_tokenizer(),
        "text_encoder_4": decoder("Llama", head="ForCausalLM"),
        "tokenizer_4": bpe_tokenizer(),
        "transformer": net,
        "vae": flow_vae(),
        **euler(),
    }


def small_hidream() -> Case:
    """Return HiDream; the pipeline enlarges every picture to its default area, which is made small here."""
    notes = "the experts run under no_grad unless the transformer is in training mode"
    case = make("HiDreamImage", hidream(), CFG, "image", "hidream", notes=notes)
    case.pipe.default_sample_size = 8
    return case


NET = {"control_image": picture()}

BUILDERS: dict[str, Builder] = {
    "AuraFlow": lambda: make("AuraFlow", auraflow(), CFG, "image", "auraflow"),
    "CogView3Plus": lambda: make("CogView3Plus", cogview3(), CFG, "image", "cogview3"),
    "CogView4Control": lambda: make(
        "CogView4Control", cogview4(8), CFG | {"control_image": picture()}, "image", "cogview4"
    ),
    "HunyuanDiT": lambda: make("HunyuanDiT", hunyuan_dit(), TEXT | SIZE | NO_BINS, "image", "hunyuan_dit"),
    "HunyuanDiTPAG": lambda: make(
        "HunyuanDiTPAG",
        hunyuan_dit(pag_applied_layers="blocks.1"),
        TEXT | SIZE | NO_BINS | {"pag_scale": 2.0},
        "image",
        "hunyuan_dit",
    ),
    "HunyuanDiTControlNet": lambda: make(
        "HunyuanDiTControlNet",
        hunyuan_dit(controlnet=hunyuan_controlnet()),
        TEXT | SIZE | NO_BINS | NET,
        "image",
        "hunyuan_dit",
    ),
    "Lumina": lambda: make("Lumina", lumina(), CFG | BIG | {"clean_caption": False}, "image", "lumina"),
    "OvisImage": lambda: make("OvisImage", ovis(), CFG, "image", "ovis_image"),
    "OmniGen": lambda: make("OmniGen", omnigen(), TEXT_ONLY | BIG, "image", "omnigen"),
    "HiDreamImage": small_hidream,
}
