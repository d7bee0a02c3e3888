"""PromptEcho: how readily would a vision-language model have written this prompt on seeing this picture?

    score = (1/T) Σ_t log p(prompt_t | picture, instruction, prompt_<t)         ≤ 0

A mean over tokens, since the sum makes long prompts score low whatever the picture; compare within one prompt all the
same. No training, no labels: any frozen model will do, and gradients reach the pixels. After PromptEcho (arXiv
2604.12652), whose README gives this query; its reward code is not public.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from flowalign.protocols import Card, Meta
from flowalign.rewards.base import Judge
from flowalign.rewards.vlm import VisionLanguage

__all__ = ["PromptEcho"]


@final
class PromptEcho(Judge):
    """Mean log-probability of the prompt's tokens under a frozen vision-language model.

    Args:
        weights: hub id or folder of any image-text-to-text model of transformers, or one already loaded.
        instruction: what the model is asked before it "answers" with the prompt.
        dtype: of the network, see :class:`flowalign.rewards.vlm.VisionLanguage`.
    """

    card = Card(
        name="promptecho",
        summary="mean log-probability of the prompt's tokens given the picture, under a vision-language model",
        differentiable=True,
        range=(-8.0, 0.0),
        licence="of the model chosen; the default's: Apache-2.0",
        weights="Qwen/Qwen2.5-VL-7B-Instruct",
        text=32768,
        reference="PromptEcho, arXiv 2604.12652",
    )

    def __init__(
        self,
        weights: str | Path | VisionLanguage = "Qwen/Qwen2.5-VL-7B-Instruct",
        *,
        instruction: str = "Describe this image in detail.",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self.model = weights if isinstance(weights, VisionLanguage) else VisionLanguage(weights, dtype=dtype)
        self.instruction = instruction
        self.freeze()

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return ``(B,)`` mean log-probabilities.

        Raises:
            ValueError: where a prompt has no tokens (an empty one has no probability to average), holds a special
                token of the model, or is longer than the model's context.
        """
        for i, prompt in enumerate(prompts):
            if len(self.model.words(prompt)) == 0:
                raise ValueError(f"promptecho averages over the prompt's tokens, and prompt {i} ({prompt!r}) has none.")
        logs = self.model.answer_log_probs([[x] for x in media], [self.instruction] * len(media), prompts)
        return torch.stack([log.mean() for log in logs]).to(media.device)
