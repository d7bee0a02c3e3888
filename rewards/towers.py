"""Two-tower models behind one small interface: pictures and texts in, features out.

Both open_clip and transformers hold CLIP-like models; scores differ only in what they do with the two features. A
tower knows its own preprocessing (from the model's configuration), cuts the text at its own context length, computes
in its own dtype and hands back float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from flowalign.rewards.base import unique
from flowalign.rewards.loading import fill, find, folder_or_id, read
from flowalign.rewards.preprocess import CLIP_MEAN, CLIP_STD, Fit, Preprocess, triple

__all__ = ["HFTower", "OpenClipTower", "Tower"]


class Tower(nn.Module, ABC):
    """Image and text encoders of one embedding space.

    Attributes:
        preprocess: from media to the image encoder's input.
        context: the text's length in tokens, end of text included.
    """

    preprocess: Preprocess
    context: int

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the encoders compute in; features come back in float32 at least."""
        return next(self.parameters()).dtype

    @property
    @abstractmethod
    def scale(self) -> Float[Tensor, ""]:
        """The learned temperature's inverse, ``exp(logit_scale)``."""

    @abstractmethod
    def encode_image(self, pixels: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b d"]:
        """Encode preprocessed pictures; unnormalised."""

    @abstractmethod
    def encode_text(self, prompts: list[str]) -> Float[Tensor, "b d"]:
        """Tokenize, cut and encode prompts; unnormalised."""

    def image(self, media: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Return unit features ``(B, D)`` of media in [0, 1], with gradients to the media."""
        pixels = self.preprocess(media.to(self.device))
        return F.normalize(_head(self.encode_image(pixels.to(self.dtype))), dim=-1)

    def text(self, prompts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Return unit features ``(B, D)``; equal prompts are encoded once."""
        distinct, index = unique(prompts)
        features = F.normalize(_head(self.encode_text(distinct)), dim=-1)
        return features[torch.tensor(index, device=features.device)]

    def cosine(self, media: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, "b"]:
        """Return ``cos(image_i, text_i)``, on the media's device."""
        return (self.image(media) * self.text(prompts)).sum(-1).to(media.device)


def _head(features: Tensor) -> Tensor:
    """Leave half precision before anything is normalised or subtracted: bf16 steps by .002 at an HPS of .28."""
    return features.to(torch.promote_types(features.dtype, torch.float32))


class OpenClipTower(Tower):
    """Any model of open_clip.

    Args:
        model: an ``open_clip.CLIP`` (or ``CustomTextCLIP``).
        tokenizer: prompts to ``(B, L)`` token ids.
        fit: overrides how the model's own configuration fits pictures.
    """

    def __init__(self, model: nn.Module, tokenizer: Callable[[list[str]], Tensor], fit: Fit | None = None) -> None:
        super().__init__()
        import open_clip

        cfg = open_clip.get_model_preprocess_cfg(model)
        size = cfg["size"] if isinstance(cfg["size"], int) else cfg["size"][0]
        own: dict[str, Fit] = {"shortest": "crop", "longest": "pad", "squash": "squash"}
        self.preprocess = Preprocess(
            size,
            fit or own[cfg.get("resize_mode") or "shortest"],
            triple(cfg.get("mean") or CLIP_MEAN),
            triple(cfg.get("std") or CLIP_STD),
            cfg.get("interpolation") or "bicubic",
        )
        self.model, self.tokenizer = model.eval(), tokenizer
        self.context = int(model.context_length)  # type: ignore[arg-type]

    @classmethod
    def load(
        cls,
        name: str,
        weights: str | Path | None,
        *files: str,
        fit: Fit | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> OpenClipTower:
        """Build architecture ``name`` and fill it.

        Args:
            name: of open_clip's models, or ``hf-hub:owner/name`` or ``local-dir:/path``, which bring their own weights.
            weights: a tag of open_clip's (``openai``, ``laion2b_s32b_b79k``), a path, or a hub id; None with a schema.
            files: file names to look for behind a folder or a hub id.
            fit: see the class.
            dtype: of the encoders.
        """
        import open_clip

        tags = [tag for model, tag in open_clip.list_pretrained() if model == name]
        own = weights is None or str(weights) in tags
        tag = str(weights) if own and weights is not None else None
        model = open_clip.create_model(name, pretrained=tag, load_weights=own)
        if not own:
            assert weights is not None
            path = find(weights, *files, "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
            fill(model, read(path), path, ignore=lambda k: k.endswith(("attn_mask", "position_ids")))
        return cls(model.to(dtype), open_clip.get_tokenizer(name), fit)

    @property
    def scale(self) -> Tensor:
        """``exp(logit_scale)``."""
        return self.model.logit_scale.exp().float()  # type: ignore[operator]

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Encode preprocessed pictures."""
        return self.model.encode_image(pixels)  # type: ignore[operator]

    def encode_text(self, prompts: list[str]) -> Tensor:
        """Tokenize, cut at the context length with the end of text kept, and encode."""
        return self.model.encode_text(self.tokenizer(prompts).to(self.device))  # type: ignore[operator]


class HFTower(Tower):
    """A transformers ``CLIPModel``.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        preprocess: its picture processing.
    """

    def __init__(self, model: Any, tokenizer: Any, preprocess: Preprocess) -> None:
        super().__init__()
        self.model, self.tokenizer, self.preprocess = model.eval(), tokenizer, preprocess
        self.context = int(model.config.text_config.max_position_embeddings)

    @classmethod
    def load(
        cls, weights: str | Path, processor: str | Path | None = None, dtype: torch.dtype = torch.float32
    ) -> HFTower:
        """Load ``weights`` (hub id or folder), and tokenizer and picture sizes from ``processor``, or the same place.

        A folder that holds its own ``preprocessor_config.json`` is its own processor.
        """
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        source = folder_or_id(weights)
        if processor is None or (Path(source) / "preprocessor_config.json").is_file():
            processor = source
        helper = folder_or_id(processor)
        model = CLIPModel.from_pretrained(source, dtype=dtype, trust_remote_code=False)
        pictures = CLIPImageProcessor.from_pretrained(helper)
        fit = Preprocess(
            int(pictures.crop_size["height"]),
            "crop",
            triple(pictures.image_mean),
            triple(pictures.image_std),
            centre="floor",  # transformers' rounding of the crop's offset
        )
        return cls(model, CLIPTokenizer.from_pretrained(helper), fit)

    @property
    def scale(self) -> Tensor:
        """``exp(logit_scale)``."""
        return self.model.logit_scale.exp().float()

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Encode preprocessed pictures."""
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def encode_text(self, prompts: list[str]) -> Tensor:
        """Tokenize, cut at the context length with the end of text kept, and encode."""
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.context, return_tensors="pt"
        ).to(self.device)
        features = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return features.pooler_output
