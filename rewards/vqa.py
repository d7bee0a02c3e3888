"""VQA score: the probability that a vision-language model answers "Yes" to whether the picture shows the prompt.

    score = p("Yes" | picture, 'Does this figure show "{prompt}"? Please answer yes or no.')          in [0, 1]

Lin et al. 2024 (arXiv 2404.01291), who use CLIP-FlanT5; here any decoder-only model of transformers. With
``log=True`` the logarithm, whose gradient does not fade where the answer is a confident no.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from flowalign.protocols import Card, Meta
from flowalign.rewards.base import Judge
from flowalign.rewards.vlm import VisionLanguage

__all__ = ["VQAScore"]


@final
class VQAScore(Judge):
    """Probability of "Yes" to a question about the picture.

    Args:
        weights: hub id or folder of any image-text-to-text model of transformers, or one already loaded.
        question: must contain ``{prompt}``.
        answer: the word whose probability is the score; one token.
        log: return the log-probability.
        dtype: of the network.
    """

    card = Card(
        name="vqa",
        summary='probability of "Yes" to "does this figure show <prompt>?" under a vision-language model',
        differentiable=True,
        range=(0.0, 1.0),
        licence="of the model chosen; the default's: Apache-2.0",
        weights="Qwen/Qwen2.5-VL-7B-Instruct",
        text=32768,
        reference="Lin et al., arXiv 2404.01291",
    )

    def __init__(
        self,
        weights: str | Path | VisionLanguage = "Qwen/Qwen2.5-VL-7B-Instruct",
        *,
        question: str = 'Does this figure show "{prompt}"? Please answer yes or no.',
        answer: str = "Yes",
        log: bool = False,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        if "{prompt}" not in question:
            raise ValueError(f"the question must contain {{prompt}}; got {question!r}.")
        self.model = weights if isinstance(weights, VisionLanguage) else VisionLanguage(weights, dtype=dtype)
        self.question = question
        self.answer = self.model.single(answer)
        self.log = log
        if log:
            self.card = replace(self.card, range=(-20.0, 0.0))
        self.freeze()

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return ``(B,)`` (log-)probabilities.

        Raises:
            ValueError: where a prompt is empty (there is nothing to ask for) or holds a special token of the model.
        """
        for i, prompt in enumerate(prompts):
            if not prompt.strip():
                raise ValueError(f"vqa asks whether the picture shows the prompt, and prompt {i} is empty.")
        questions = [self.question.replace("{prompt}", p) for p in prompts]
        logs = self.model.next_log_probs([[x] for x in media], questions)[:, self.answer].to(media.device)
        return logs if self.log else logs.exp()
