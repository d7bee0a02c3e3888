"""RewardDance: the probability that a vision-language model says "yes, the first picture is better than the second".

    score = p(yes | picture, reference picture, prompt, instruction, [reasoning])              in [0, 1]

Comparing against a reference with a criterion in words is what the method adds to a VQA score; the generative answer
keeps the reward in the model's own head instead of a regression head (Wu et al. 2025, arXiv 2509.08826; weights and
code are not released, and the wording below is this project's). With ``reasoning`` the model first writes down its
reasons, greedily and without gradient, and the probability is read after them.

The authors watch the variance of the reward within a batch: a judge that is being hacked gives everyone the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, final

import torch
from torch import Tensor

from flowalign.protocols import Card, Meta
from flowalign.rewards.base import Judge, field
from flowalign.rewards.vlm import VisionLanguage

__all__ = ["RewardDance"]

QUESTION = (
    'The prompt is: "{prompt}". Is the first image better than the second image with respect to {instruction}? {manner}'
)
MANNER = {False: "Answer yes or no.", True: "Reason step by step, then answer yes or no."}


@final
class RewardDance(Judge):
    """Probability that a picture beats its reference.

    ``meta[i]["reference"]`` is the reference picture ``(3, H, W)`` in [0, 1], of any size; ``meta[i]["instruction"]``
    the criterion, where it is not the same for all.

    Args:
        weights: hub id or folder of an image-text-to-text model that reads several pictures, or one already loaded.
        instruction: the default criterion.
        reasoning: at most so many tokens of reasons before the answer; 0 for none.
        yes: words that count as agreement, one token each; those that the model does not know as one token are left
            out, at least one must remain.
        no: likewise for disagreement; used by ``normalise="pair"``.
        normalise: "vocabulary": p(yes) among all words; "pair": p(yes) / (p(yes) + p(no)).
        dtype: of the network.
    """

    card = Card(
        name="rewarddance",
        summary='probability of "yes" to "is it better than the reference?" under a vision-language model',
        differentiable=True,
        range=(0.0, 1.0),
        licence="of the model chosen; the default's: Apache-2.0",
        weights="Qwen/Qwen2.5-VL-7B-Instruct",
        text=32768,
        reference="Wu et al., arXiv 2509.08826",
    )

    def __init__(
        self,
        weights: str | Path | VisionLanguage = "Qwen/Qwen2.5-VL-7B-Instruct",
        *,
        instruction: str = "how well it shows the prompt and how good it looks",
        reasoning: int = 0,
        yes: Sequence[str] = ("yes", "Yes"),
        no: Sequence[str] = ("no", "No"),
        normalise: Literal["vocabulary", "pair"] = "vocabulary",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        if normalise not in ("vocabulary", "pair"):
            raise ValueError(f"normalise must be 'vocabulary' or 'pair'; got {normalise!r}.")
        self.model = weights if isinstance(weights, VisionLanguage) else VisionLanguage(weights, dtype=dtype)
        self.instruction = instruction
        self.reasoning = reasoning
        self.yes, self.no = self._ids(yes), self._ids(no)
        self.normalise = normalise
        self.freeze()

    def _ids(self, words: Sequence[str]) -> list[int]:
        unknown = self.model.tokenizer.unk_token_id
        ids = [self.model.words(word).tolist() for word in words]
        single = sorted({i[0] for i in ids if len(i) == 1 and i[0] != unknown})
        if not single:
            raise ValueError(f"none of {list(words)} is one token of this model; got {ids}.")
        return single

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return ``(B,)`` probabilities.

        Raises:
            ValueError: where a reference is missing or no picture, or a text holds a special token of the model.
        """
        references = field(meta, "reference", self.card.name, len(media))
        pictures = [[x, self._reference(r, i)] for i, (x, r) in enumerate(zip(media, references, strict=True))]
        questions = [
            QUESTION.format(prompt=p, instruction=self._criterion(meta, i), manner=MANNER[self.reasoning > 0])
            for i, p in enumerate(prompts)
        ]
        reasons = None
        if self.reasoning:
            written = self.model.write(pictures, questions, self.reasoning)
            ask = self.model.words(" Answer:")
            reasons = [torch.cat((w, ask)) for w in written]
        logs = self.model.next_log_probs(pictures, questions, reasons)
        yes = logs[:, self.yes].logsumexp(1)
        if self.normalise == "pair":
            yes = yes - torch.logaddexp(yes, logs[:, self.no].logsumexp(1))
        return yes.exp().to(media.device)

    def _criterion(self, meta: Meta | None, i: int) -> str:
        return self.instruction if meta is None else str(meta[i].get("instruction", self.instruction))

    def _reference(self, picture: object, i: int) -> Tensor:
        if not isinstance(picture, Tensor) or picture.ndim != 3 or picture.shape[0] != 3 or 0 in picture.shape:
            got = tuple(picture.shape) if isinstance(picture, Tensor) else type(picture).__name__
            raise ValueError(f"meta[{i}]['reference'] must be a picture (3, H, W) in [0, 1]; got {got}.")
        if not picture.is_floating_point() or picture.amin() < -1e-3 or picture.amax() > 1 + 1e-3:
            raise ValueError(f"meta[{i}]['reference'] must be a float picture in [0, 1]; got {picture.dtype}.")
        return picture
