"""Tokenizers from our own vocabulary and tiny text encoders, all without a download.

The vocabulary is one list of words plus every byte, so any prompt can be tokenised and a known word is one token.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import transformers as tf
from tokenizers import pre_tokenizers

__all__ = ["WIDTH", "clip_text", "clip_tokenizer", "t5", "t5_tokenizer", "umt5"]

WIDTH = 16
HEADS = 2
WORDS = (  # noqa: SIM905
    "a an the of in on and with at to is left right above below red green blue cyan yellow magenta white black grey "
    "circle circles square squares triangle triangles star stars two three four five one small large moving slow fast "
    "photo painting drawing picture image video sound music noise low high quality blurry bad good bell drum voice "
    "make turn move into from"
).split()
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def grow(words: list[tuple[str, ...]]) -> tuple[list[str], list[str]]:
    """Return (pieces, merges) of a byte-pair encoding in which each word, a tuple of symbols, becomes one token."""
    pieces, merges = [], []
    for word in words:
        left = word[0]
        for right in word[1:]:
            merges.append(f"{left} {right}")
            left += right
            pieces.append(left)
    return list(dict.fromkeys(pieces)), list(dict.fromkeys(merges))


@cache
def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary and merges of a CLIP tokenizer."""
    pieces, merges = grow([(*word[:-1], word[-1] + "</w>") for word in WORDS])
    tokens = [*BYTES, *(b + "</w>" for b in BYTES), *pieces, "<|startoftext|>", "<|endoftext|>"]
    return {t: i for i, t in enumerate(dict.fromkeys(tokens))}, [tuple(m.split()) for m in merges]


def clip_tokenizer(**extra: Any) -> tf.CLIPTokenizer:
    """Return a CLIP tokenizer of 77 tokens; ``extra`` goes to the class."""
    vocab, merges = clip_vocabulary()
    return tf.CLIPTokenizer(vocab=dict(vocab), merges=list(merges), model_max_length=77, **extra)


def clip_text(width: int = WIDTH, projection: int | None = None, **extra: Any) -> tf.PreTrainedModel:
    """Return a CLIP text tower, ``width`` channels; with ``projection`` the class that also projects."""
    vocab = clip_vocabulary()[0]
    config = tf.CLIPTextConfig(
        **{
            "vocab_size": len(vocab),
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_attention_heads": HEADS,
            "num_hidden_layers": 2,
            "projection_dim": projection or width,
            "bos_token_id": vocab["<|startoftext|>"],
            "eos_token_id": vocab["<|endoftext|>"],
            "pad_token_id": vocab["<|endoftext|>"],
            **extra,
        }
    )
    return tf.CLIPTextModelWithProjection(config) if projection else tf.CLIPTextModel(config)


@cache
def t5_pieces() -> tuple[tuple[str, float], ...]:
    """Return the unigram pieces of a T5 tokenizer with their log-probabilities."""
    letters = [chr(c) for c in range(33, 127)]
    return (
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -2.0),
        *(("▁" + w, -3.0) for w in WORDS if len(w) > 1),
        *((c, -6.0) for c in letters),
    )


def t5_tokenizer(**extra: Any) -> tf.T5TokenizerFast:
    """Return a T5 tokenizer over our words and the letters."""
    return tf.T5TokenizerFast(vocab=list(t5_pieces()), extra_ids=0, model_max_length=64, **extra)


def t5_config(kind: type, width: int) -> Any:
    """Return the configuration of a T5 or UMT5 encoder."""
    return kind(
        vocab_size=len(t5_pieces()),
        d_model=width,
        d_kv=width // HEADS,
        d_ff=2 * width,
        num_heads=HEADS,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8,
    )


def t5(width: int = WIDTH) -> tf.T5EncoderModel:
    """Return a T5 encoder."""
    return tf.T5EncoderModel(t5_config(tf.T5Config, width))


def umt5(width: int = WIDTH) -> tf.UMT5EncoderModel:
    """Return a UMT5 encoder (Wan, AuraFlow and their like)."""
    return tf.UMT5EncoderModel(t5_config(tf.UMT5Config, width))
