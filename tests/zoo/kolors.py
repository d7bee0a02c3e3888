"""Kolors: an SDXL U-Net that reads ChatGLM."""

from __future__ import annotations

import io
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import sentencepiece
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer

from .case import Builder, Case, make
from .sdxl import unet
from .stable_diffusion import BETAS, CHANGE, SIZE, TEXT
from .text import WIDTH, WORDS
from .vaes import image_vae


@cache
def pieces() -> bytes:
    """Return a sentencepiece model trained on our own words."""
    model = io.BytesIO()
    lines = [" ".join(WORDS[k:] + WORDS[:k]) for k in range(len(WORDS))]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=80, minloglevel=2, hard_vocab_limit=False
    )
    return model.getvalue()


def tokenizer() -> ChatGLMTokenizer:
    """Return the tokenizer, which insists on reading its model from a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        path.write_bytes(pieces())
        return ChatGLMTokenizer(str(path))


def glm() -> ChatGLMModel:
    """Return two blocks of ChatGLM."""
    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=128,
        hidden_size=WIDTH,
        ffn_hidden_size=24,
        kv_channels=8,
        num_attention_heads=2,
        seq_length=64,
        add_qkv_bias=True,
        multi_query_attention=True,
        multi_query_group_num=1,
        original_rope=True,
    )
    return ChatGLMModel(config)


def parts() -> dict[str, Any]:
    """Return the components of Kolors."""
    return {
        "text_encoder": glm(),
        "tokenizer": tokenizer(),
        "unet": unet(cross_attention_dim=WIDTH),
        "vae": image_vae(),
        "scheduler": diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
    }


def kolors(kind: str, inputs: dict[str, Any]) -> Case:
    """Return a pipeline of the Kolors family."""
    return make(f"Kolors{kind}", parts(), TEXT | SIZE | {"max_sequence_length": 16} | inputs, "image", "kolors")


BUILDERS: dict[str, Builder] = {
    "Kolors": lambda: kolors("", {}),
    "KolorsImg2Img": lambda: kolors("Img2Img", CHANGE),
    "KolorsPAG": lambda: kolors("PAG", {"pag_scale": 2.0}),
}
