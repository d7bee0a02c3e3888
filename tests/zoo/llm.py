"""Tiny language models that serve as text encoders, with byte-pair tokenizers of our own vocabulary.

Their published tokenizers differ; here all share one, of the class Qwen2Tokenizer, in which every special token that a
pipeline's template mentions is one token and each word of our vocabulary another.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import transformers as tf

from .text import BYTES, HEADS, WIDTH, WORDS, grow

__all__ = ["bpe_tokenizer", "decoder", "gemma3", "mistral3", "qwen25_vl", "vlm_parts"]

SPECIAL = (  # noqa: SIM905
    "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|> "
    "<pad> <bos> <eos> [IMG] [IMG_BREAK] [IMG_END] <think> </think>"
).split()
IDS = {token: i for i, token in enumerate(SPECIAL)}
ROOM = 1024  # the vocabulary's size, rounded up
TEMPLATE_WORDS = (  # noqa: SIM905
    "system user assistant Describe the image by detailing color , shape size texture quantity text spatial "
    "relationships of objects and background : You are an"
).split()
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary, special tokens first, and the merges."""
    words = [*TEMPLATE_WORDS, *WORDS]
    pieces, merges = grow([tuple(word) for word in words])
    spaced = ["Ġ" + word for word in dict.fromkeys(words)]
    tokens = dict.fromkeys([*SPECIAL, *BYTES, *pieces, *spaced])
    pairs = [tuple(m.split()) for m in merges] + [("Ġ", word[1:]) for word in spaced]
    return {t: i for i, t in enumerate(tokens)}, pairs


def bpe_tokenizer(image: str = "<|vision_start|><|image_pad|><|vision_end|>", **extra: Any) -> tf.Qwen2Tokenizer:
    """Return a byte-pair tokenizer with a chat template, in which a picture stands as the text ``image``."""
    vocab, merges = vocabulary()
    tokenizer = tf.Qwen2Tokenizer(vocab=dict(vocab), merges=list(merges), model_max_length=512, **extra)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = CHAT.replace("IMAGE", image)
    return tokenizer


def sizes(width: int = WIDTH, layers: int = 2) -> dict[str, Any]:
    """Return the fields that all decoder configurations share."""
    return {
        "vocab_size": ROOM,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": width // HEADS,
        "max_position_embeddings": 2048,
        "bos_token_id": IDS["<bos>"],
        "eos_token_id": IDS["<|im_end|>"],
        "pad_token_id": IDS["<|endoftext|>"],
    }


def decoder(kind: str, width: int = WIDTH, layers: int = 2, head: str = "Model", **extra: Any) -> tf.PreTrainedModel:
    """Return a text-only decoder.

    Args:
        kind: Prefix of transformers' class names: "Llama", "Gemma2", "Qwen3", "Glm", "Phi3", ...
        head: Suffix of the model class: "Model" or "ForCausalLM".
        width: Channels.
        layers: Blocks.
        extra: Further fields of the configuration.
    """
    config = getattr(tf, f"{kind}Config")(**{**sizes(width, layers), **extra})
    return getattr(tf, f"{kind}{head}")(config)


def mrope(width: int) -> dict[str, Any]:
    """Return the rotary parameters of Qwen's multimodal models: half a head's channels split over (t, y, x)."""
    half = width // HEADS // 2
    section = [half - 2 * (half // 3), half // 3, half // 3]
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}


def qwen25_vl(width: int = WIDTH, layers: int = 2) -> tf.Qwen2_5_VLForConditionalGeneration:
    """Return a Qwen2.5-VL with a vision tower of one block."""
    text = {**sizes(width, layers), "rope_parameters": mrope(width)}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": width,
        "patch_size": 14,
        "window_size": 56,
        "fullatt_block_indexes": [0],
    }
    config = tf.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IDS["<|image_pad|>"],
        video_token_id=IDS["<|video_pad|>"],
        vision_start_token_id=IDS["<|vision_start|>"],
        vision_end_token_id=IDS["<|vision_end|>"],
    )
    return tf.Qwen2_5_VLForConditionalGeneration(config)


def mistral3(width: int = WIDTH, layers: int = 2) -> tf.Mistral3ForConditionalGeneration:
    """Return a Mistral 3 with a vision tower of one block."""
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 28,
        "patch_size": 14,
    }
    text = {"model_type": "mistral", **sizes(width, layers)}
    config = tf.Mistral3Config(text_config=text, vision_config=vision, image_token_index=IDS["[IMG]"])
    return tf.Mistral3ForConditionalGeneration(config)


def gemma3(width: int = WIDTH, layers: int = 2) -> tf.Gemma3ForConditionalGeneration:
    """Return a Gemma 3 with a vision tower of one block."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = tf.Gemma3Config(
        text_config={**sizes(width, layers), "sliding_window": 64},
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=IDS["<|image_pad|>"],
        boi_token_index=IDS["<|vision_start|>"],
        eoi_token_index=IDS["<|vision_end|>"],
    )
    return tf.Gemma3ForConditionalGeneration(config)


def qwen_processor(tokenizer: tf.Qwen2Tokenizer) -> tf.Qwen2VLProcessor:
    """Return the processor that turns pictures into at most four visual tokens."""
    small = {"size": {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}}
    return tf.Qwen2VLProcessor(
        image_processor=tf.Qwen2VLImageProcessor(**small),
        tokenizer=tokenizer,
        video_processor=tf.Qwen2VLVideoProcessor(**small),
        chat_template=tokenizer.chat_template,
    )


def vlm_parts(width: int = WIDTH) -> dict[str, Any]:
    """Return the text side of Qwen-Image and its relatives: Qwen2.5-VL, tokenizer, processor."""
    tokenizer = bpe_tokenizer()
    return {"text_encoder": qwen25_vl(width), "tokenizer": tokenizer, "processor": qwen_processor(tokenizer)}


def qwen3_vl(width: int = WIDTH, layers: int = 2) -> tf.Qwen3VLForConditionalGeneration:
    """Return a Qwen3-VL with a vision tower of one block."""
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": width,
        "patch_size": 16,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    config = tf.Qwen3VLConfig(
        text_config={**sizes(width, layers), "rope_parameters": mrope(width)},
        vision_config=vision,
        image_token_id=IDS["<|image_pad|>"],
        video_token_id=IDS["<|video_pad|>"],
        vision_start_token_id=IDS["<|vision_start|>"],
        vision_end_token_id=IDS["<|vision_end|>"],
    )
    return tf.Qwen3VLForConditionalGeneration(config)


def vlm3_parts(width: int = WIDTH, layers: int = 2) -> dict[str, Any]:
    """Return Qwen3-VL, tokenizer and processor; a picture becomes at most four tokens."""
    tokenizer = bpe_tokenizer()
    small = {"size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}, "patch_size": 16}
    processor = tf.Qwen3VLProcessor(
        image_processor=tf.Qwen2VLImageProcessor(**small),
        tokenizer=tokenizer,
        video_processor=tf.Qwen3VLVideoProcessor(**small),
        chat_template=tokenizer.chat_template,
    )
    return {"text_encoder": qwen3_vl(width, layers), "tokenizer": tokenizer, "processor": processor}
