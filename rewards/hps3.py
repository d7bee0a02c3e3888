"""HPSv3: a Qwen2-VL-7B reads picture and prompt; a small head on the token ``<|Reward|>`` gives a Gaussian.

    (μ, log σ) = MLP(h[<|Reward|>]),     score = μ,     P(a > b) = E[sigmoid(z)],  z ~ N(μ_a − μ_b, σ_a² + σ_b²)

σ says how unsure the judge is (:meth:`HPS3.gaussian`), which an uncertainty-weighted ensemble can use. The pixel path
is on tensors, so gradients reach the picture (the official code goes through PIL). As in the official code, text and
picture tokens have *sequential* positions, not Qwen2-VL's three-dimensional ones, and every picture is scaled to
about 256·28² pixels.

Reference: Ma et al., HPSv3 (2508.03789). The instruction is part of the model, as trained; it is its authors' text and
is not shipped here, so the user passes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flowalign.protocols import Card, Meta
from flowalign.rewards.base import Judge
from flowalign.rewards.loading import fill, find, folder_or_id, read, rename
from flowalign.rewards.qwen import Vision, chat, patches, tokenize

__all__ = ["HPS3", "preference"]

REWARD, PAD = "<|Reward|>", "<|image_pad|>"
KEYS = (
    ("model.visual.", "visual."),
    ("model.language_model.", "language_model."),
    ("model.", "language_model."),
)


def preference(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], nodes: int = 32) -> Float[Tensor, "b"]:
    """Return ``P(a > b)`` for two Gaussians ``(μ, σ)`` by Gauss-Hermite quadrature of ``E[sigmoid(z)]``.

    The official loss draws 1000 samples of z; quadrature gives the same number without noise.
    """
    import numpy as np

    x, w = (torch.as_tensor(v, dtype=a[0].dtype, device=a[0].device) for v in np.polynomial.hermite.hermgauss(nodes))
    mean, std = a[0] - b[0], (a[1] ** 2 + b[1] ** 2).sqrt()
    z = mean[:, None] + math.sqrt(2) * std[:, None] * x
    return (torch.sigmoid(z) * w).sum(-1) / math.sqrt(math.pi)


class HPS3(Judge):
    """HPS v3.

    Args:
        weights: file, folder or hub id of the published layout, all of Qwen2-VL and ``rm_head.*``.
        base: where Qwen2-VL's configuration and tokenizer lie: hub id or folder. No weights are read from it.
        instruction: the text that the release was trained with, holding ``{text_prompt}`` and ``<|Reward|>`` once each;
            a file, or the text itself.
        pixels: number of pixels that every picture is scaled to, about.
        dtype: of Qwen2-VL; the head is float32 in any case.
    """

    card = Card(
        "hps3",
        "human preference, mean of a Gaussian; a 7B judge",
        differentiable=True,
        range=(-5.0, 15.0),
        licence="MIT (code); weights: not verified",
        weights="MizzenAI/HPSv3:HPSv3.safetensors",
        text=32768,
        reference="arXiv:2508.03789",
    )

    def __init__(
        self,
        weights: str | Path = "MizzenAI/HPSv3:HPSv3.safetensors",
        base: str | Path = "Qwen/Qwen2-VL-7B-Instruct",
        *,
        instruction: str | Path | None = None,
        pixels: int = 256 * 28 * 28,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self.instruction = _instruction(instruction)
        from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLModel

        source = folder_or_id(base)
        self.tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        self.tokenizer.add_special_tokens({"additional_special_tokens": [REWARD]})
        special: Any = self.tokenizer.convert_tokens_to_ids(REWARD)
        self.special = int(special)
        config: Any = Qwen2VLConfig.from_pretrained(source)
        path = find(weights, "HPSv3.safetensors")
        state = {k: v for k, v in read(path).items() if not k.startswith("lm_head.")}
        head = {k.removeprefix("rm_head."): v.float() for k, v in state.items() if k.startswith("rm_head.")}
        state = rename({k: v for k, v in state.items() if not k.startswith("rm_head.")}, KEYS)
        config.text_config.vocab_size = _rows(state, path)
        loaded: Any = Qwen2VLModel.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
        self.model, info = loaded
        wrong = {k: sorted(v)[:4] for k, v in info.items() if v}
        if wrong:
            raise ValueError(f"weights {path} do not fit the configuration of {source}: {wrong}.")
        width = config.text_config.hidden_size
        self.rm_head = nn.Sequential(
            nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
        )
        fill(self.rm_head, head, path)
        sizes = config.vision_config
        self.sizes = Vision(sizes.patch_size, sizes.spatial_merge_size, sizes.temporal_patch_size, pixels, pixels)
        self.freeze()

    def gaussian(
        self, media: Float[Tensor, "b 3 h w"], prompts: Sequence[str]
    ) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
        """Return ``(μ, σ)``, each ``(B,)`` float32."""
        device = self.rm_head[0].weight.device
        assert isinstance(device, torch.device)
        rows, grid = patches(media.to(device).unsqueeze(1), self.sizes)
        count = int(grid[0].prod()) // self.sizes.merge**2
        texts = [chat(self.instruction.replace("{text_prompt}", p), count) for p in prompts]
        ids, mask = tokenize(self.tokenizer, texts, device)
        embeds = self.model.get_input_embeddings()(ids)
        seen = self.model.get_image_features(rows.to(embeds.dtype), grid).pooler_output
        place = ids == self.model.config.image_token_id
        if not (place.sum(1) == count).all():
            raise ValueError(f"a prompt holds Qwen2-VL's picture token {PAD}, which is not text: remove it.")
        embeds = embeds.masked_scatter(place.unsqueeze(-1), torch.cat(list(seen)).to(embeds.dtype))
        positions = torch.arange(ids.shape[1], device=device).expand(3, *ids.shape)
        hidden = self.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        last = _last(hidden, ids.eq(self.special))
        mu, log_sigma = self.rm_head(last.to(torch.promote_types(last.dtype, torch.float32))).unbind(-1)
        return mu.to(media.device), log_sigma.exp().to(media.device)

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return μ."""
        return self.gaussian(media, prompts)[0]


def _last(hidden: Float[Tensor, "b l d"], place: Tensor) -> Float[Tensor, "b d"]:
    """Return the state at the last marked position: a prompt that itself holds ``<|Reward|>`` changes nothing."""
    index = place.shape[1] - 1 - place.flip(1).int().argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), index]


def _rows(state: dict[str, Tensor], path: Path) -> int:
    """Return the vocabulary's size, which the release cut to the tokenizer's."""
    key = "language_model.embed_tokens.weight"
    if key not in state:
        raise ValueError(f"{path} is no HPSv3 checkpoint: it has neither model.embed_tokens nor the newer name of it.")
    return len(state[key])


def _instruction(given: str | Path | None) -> str:
    """Return the instruction's text.

    Raises:
        ValueError: if there is none, or it lacks the places of the prompt and of the score.
    """
    if given is None:
        raise ValueError(
            "hps3 needs instruction=: the text that its weights were trained on, which is not shipped here. Save it "
            "from the authors' release (github.com/MizzenAI/HPSv3) to a file and pass its path."
        )
    text = given if isinstance(given, str) and "{text_prompt}" in given else Path(given).read_text(encoding="utf-8")
    if text.count("{text_prompt}") != 1 or text.count(REWARD) != 1:
        raise ValueError(f"the instruction must hold {{text_prompt}} and {REWARD} once each; got {text[:80]!r}...")
    return text
