"""Video transformers in rectified flow: Kandinsky 5, AnyFlow, Helios, Motif."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers as tf

from .case import Builder, Case, make
from .dit_image import BIG, euler
from .llm import sizes, vlm_parts
from .ltx import TEXT
from .media import picture
from .stable_diffusion import SIZE
from .text import WIDTH, clip_text, clip_tokenizer, t5_pieces, t5_tokenizer
from .vaes import flow_vae, hunyuan_video_vae
from .wan import FRAMES, parts

SHAPE: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "text_dim": WIDTH,
    "freq_dim": 16,
    "ffn_dim": 48,
    "num_layers": 2,
}
FIRST = {"image": picture(32)}


def kandinsky5(seen: bool, still: bool) -> dict[str, Any]:
    """Return the components of Kandinsky 5: ``seen`` adds a picture and a mask, ``still`` makes images."""
    net = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=16,
        out_visual_dim=16,
        in_text_dim=WIDTH,
        in_text_dim2=WIDTH,
        time_dim=16,
        model_dim=24,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 4, 4),
        visual_cond=seen,
    )
    text = vlm_parts()
    return {
        "text_encoder": text["text_encoder"],
        "tokenizer": text["processor"],
        "text_encoder_2": clip_text(),
        "tokenizer_2": clip_tokenizer(),
        "transformer": net,
        "vae": flow_vae(16, levels=4) if still else hunyuan_video_vae(16),
        **euler(5.0),
    }


def anyflow(net: diffusers.ModelMixin) -> dict[str, Any]:
    """Return the components of AnyFlow, a flow map between any two times."""
    return parts(transformer=net, scheduler=diffusers.FlowMapEulerDiscreteScheduler(shift=5.0))


def helios(**extra: Any) -> dict[str, Any]:
    """Return the components of Helios, which goes on from a compressed history."""
    net = diffusers.HeliosTransformer3DModel(**SHAPE, rope_dim=(4, 6, 6))
    solver = diffusers.HeliosScheduler(**extra)
    return parts(transformer=net, scheduler=solver)


def motif() -> dict[str, Any]:
    """Return the components of Motif Video."""
    text = {**sizes(), "vocab_size": len(t5_pieces()), "layer_types": ["full_attention"] * 2, "dropout_rate": 0.0}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = tf.T5Gemma2EncoderConfig(text_config=text, vision_config=vision)
    net = diffusers.MotifVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        patch_size=1,
        text_embed_dim=WIDTH,
        image_embed_dim=16,
        rope_axes_dim=(4, 4, 4),
    )
    encoder = tf.models.t5gemma2.modeling_t5gemma2.T5Gemma2Encoder(config)
    return parts(
        text_encoder=encoder,
        tokenizer=t5_tokenizer(),
        transformer=net,
        feature_extractor=tf.SiglipImageProcessor(size={"height": 16, "width": 16}),
        guider=diffusers.AdaptiveProjectedGuidance(guidance_scale=4.0),
        **euler(7.0),
    )


def fifth(kind: str, inputs: dict[str, Any]) -> Case:
    """Return a pipeline of Kandinsky 5."""
    still = kind.endswith("2I")
    given = kandinsky5(seen=not (still and kind.startswith("T")), still=still)
    call = TEXT | BIG | ({} if still else FRAMES) | inputs
    case = make(f"Kandinsky5{kind}", given, call, "image" if still else "video", "kandinsky5")
    if still:
        case.pipe.resolutions = [(32, 32)]  # the pipeline snaps to this list, whose members are megapixels
    return case


ANY = SHAPE | {"rope_max_seq_len": 32}
UNGUIDED = {key: value for key, value in TEXT.items() if key != "guidance_scale"}

BUILDERS: dict[str, Builder] = {
    "Kandinsky5T2V": lambda: fifth("T2V", {}),
    "Kandinsky5I2V": lambda: fifth("I2V", FIRST | {"num_frames": 17}),
    "Kandinsky5T2I": lambda: fifth("T2I", {}),
    "Kandinsky5I2I": lambda: fifth("I2I", FIRST | {"max_sequence_length": 256}),
    "AnyFlow": lambda: make(
        "AnyFlow", anyflow(diffusers.AnyFlowTransformer3DModel(**ANY)), TEXT | SIZE | FRAMES, "video", "anyflow"
    ),
    "AnyFlowFAR": lambda: make(
        "AnyFlowFAR",
        anyflow(diffusers.AnyFlowFARTransformer3DModel(**ANY, chunk_partition=(1, 1))),
        TEXT | SIZE | FRAMES,
        "video",
        "anyflow",
        notes="chunk by chunk; flex attention, which has no backward on CPU",
    ),
    "Helios": lambda: make(
        "Helios",
        helios(stages=1, stage_range=[0, 1], use_dynamic_shifting=True),
        TEXT | SIZE | FRAMES | {"num_latent_frames_per_chunk": 2},
        "video",
        "helios",
        notes="chunk by chunk",
    ),
    "MotifVideo": lambda: make("MotifVideo", motif(), UNGUIDED | SIZE | FRAMES, "video", "motif_video"),
    "MotifVideoImage2Video": lambda: make(
        "MotifVideoImage2Video", motif(), UNGUIDED | SIZE | FRAMES | {"image": picture()}, "video", "motif_video"
    ),
}
