"""ImageReward: BLIP reads the picture through the prompt's cross-attention; an affine head scores the first token.

    score = (w · BERT(prompt ⟵ ViT(image))[CLS] + b − .16717) / 1.03334          about -2.3 to 2

Built on the BLIP parts of transformers, with the published checkpoint's own key names mapped onto them (the published
package breaks with current transformers). Two traps: the text is cut at **35 tokens** (peers use 512), and BLIP's
vision layer norms use ε = 1e-6 where transformers' default is 1e-5.

Reference: Xu et al., ImageReward (2304.05977); weights Apache-2.0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign.protocols import Card, Meta
from flowalign.rewards.aesthetic import affine_mlp
from flowalign.rewards.base import Judge, unique
from flowalign.rewards.loading import fill, find, folder_or_id, read, rename
from flowalign.rewards.preprocess import Preprocess

__all__ = ["ImageReward"]

MEAN, STD, TOKENS = 0.16717362830052426, 1.0333394966054072, 35
VISION = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("norm.", "post_layernorm."),
)
BLOCK = (
    (".norm1.", ".layer_norm1."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
    (".norm2.", ".layer_norm2."),
)


class ImageReward(Judge):
    """ImageReward v1.0.

    Args:
        weights: hub id, folder or file of the published layout (``blip.visual_encoder.*``, ``blip.text_encoder.*``,
            ``mlp.layers.*``).
        tokenizer: BERT's uncased vocabulary: hub id or folder.
        head_dim: width of an attention head in both encoders, which a checkpoint does not tell; 64 as published.
        dtype: of BLIP; the head is float32 in any case.
    """

    card = Card(
        "imagereward",
        "human preference for a picture given its prompt",
        differentiable=True,
        range=(-2.3, 2.0),
        licence="Apache-2.0",
        weights="zai-org/ImageReward:ImageReward.pt",
        text=TOKENS,
        reference="arXiv:2304.05977",
    )

    def __init__(
        self,
        weights: str | Path = "zai-org/ImageReward:ImageReward.pt",
        tokenizer: str | Path = "google-bert/bert-base-uncased",
        *,
        head_dim: int = 64,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        from transformers import BertTokenizer

        path = find(weights, "ImageReward.safetensors", "ImageReward.pt")
        state = {k: v.float() for k, v in read(path).items()}
        self.vision = _vision(_part(state, "blip.visual_encoder."), head_dim, path).to(dtype)
        self.text = _text(_part(state, "blip.text_encoder."), head_dim, path).to(dtype)
        head = _part(state, "mlp.layers.")
        self.head = affine_mlp(self.text.config.hidden_size)
        fill(self.head, head, path)
        self.tokenizer = BertTokenizer.from_pretrained(folder_or_id(tokenizer))
        if len(self.tokenizer) > self.text.config.vocab_size:
            raise ValueError(
                f"tokenizer {tokenizer} has {len(self.tokenizer)} words, the weights {path} only "
                f"{self.text.config.vocab_size}: wanted BERT's uncased vocabulary."
            )
        self.preprocess = Preprocess(int(self.vision.config.image_size))
        self.freeze()

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return the standardised head of the first token."""
        weight = self.text.embeddings.word_embeddings.weight
        pixels = self.preprocess(media.to(weight.device)).to(weight.dtype)
        patches = self.vision(pixel_values=pixels).last_hidden_state
        distinct, index = unique(prompts)
        tokens = self.tokenizer(
            distinct, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(weight.device)
        rows = torch.tensor(index, device=weight.device)
        hidden = self.text(
            input_ids=tokens.input_ids[rows],
            attention_mask=tokens.attention_mask[rows],
            encoder_hidden_states=patches,
            is_decoder=False,
        ).last_hidden_state
        first = hidden[:, 0].to(torch.promote_types(hidden.dtype, torch.float32))
        return ((self.head(first).squeeze(-1) - MEAN) / STD).to(media.device)


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries under ``prefix``, without it; BERT's position_ids buffer is not a weight."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix) and "position_ids" not in k}


def _depth(state: dict[str, Tensor], pattern: str) -> int:
    """Return the number of layers whose keys match ``pattern``, which has one group for the index."""
    return 1 + max((int(m[1]) for m in map(re.compile(pattern).match, state) if m), default=-1)


def _vision(state: dict[str, Tensor], head_dim: int, path: Path) -> Any:
    """Build BLIP's ViT of the checkpoint's own sizes and fill it."""
    from transformers import BlipVisionConfig, BlipVisionModel

    if not {"patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"} <= set(state):
        raise ValueError(f"{path} is no ImageReward checkpoint: it lacks blip.visual_encoder.*.")
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(state["blocks.0.mlp.fc1.weight"]),
        num_hidden_layers=_depth(state, r"blocks\.(\d+)\."),
        num_attention_heads=width // head_dim,
        image_size=patch * round((state["pos_embed"].shape[1] - 1) ** 0.5),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    renamed = {}
    for key, value in rename(state, VISION).items():
        for old, new in BLOCK:
            key = key.replace(old, new)
        renamed[re.sub(r"^blocks\.", "encoder.layers.", key)] = value
    model = BlipVisionModel(config)
    fill(model, renamed, path)
    return model


def _text(state: dict[str, Tensor], head_dim: int, path: Path) -> Any:
    """Build BLIP's BERT with cross-attention of the checkpoint's own sizes and fill it."""
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    vocab, width = state["embeddings.word_embeddings.weight"].shape
    config = BlipTextConfig(
        vocab_size=vocab,
        hidden_size=width,
        encoder_hidden_size=state["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(state["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=_depth(state, r"encoder\.layer\.(\d+)\."),
        num_attention_heads=width // head_dim,
        max_position_embeddings=len(state["embeddings.position_embeddings.weight"]),
        is_decoder=True,  # builds the cross-attention; each call says is_decoder=False, so attention is not causal
        pad_token_id=0,
        bos_token_id=0,  # unused here; the defaults would warn on small vocabularies
        sep_token_id=0,
        eos_token_id=0,
    )
    model = BlipTextModel(config, add_pooling_layer=False)
    fill(model, state, path)
    return model
