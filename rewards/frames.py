"""Image rewards on video: InstructVideo's segmental sampling (SVR) and temporally attenuated weights (TAR).

The F frames are cut into S equal segments, one frame is drawn in each, and an image reward r scores the drawn frames:

    score = (1/S) Σ_i f_i r(frame_i, prompt),     f_i = exp(-λ |i - (S-1)/2|) / max_j exp(-λ |j - (S-1)/2|)

The weights are symmetric and 1 at the centre (at both middle segments where S is even): guarding the ends less keeps
the later frames from being repainted away from the first. Yuan et al. 2024, arXiv 2312.12490 (published: S = 4 of
F = 16 frames, λ = 1, HPS v2); ``i`` counts segments here, and the paper's centre S/2 would make the weights lopsided.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, final

import torch
from torch import Tensor

from flowalign.learner import Learner, learners_of
from flowalign.protocols import Card, Meta, Reward
from flowalign.rewards.base import Judge
from flowalign.rewards.names import load

__all__ = ["Draws", "FrameReward", "attenuation", "segment_frames"]


def attenuation(segments: int, rate: float = 1.0) -> Tensor:
    """Return the ``(S,)`` weights ``exp(-λ |i - (S-1)/2|)``, scaled so that the centre is 1.

    Raises:
        ValueError: for no segments or a negative rate.
    """
    if segments < 1 or rate < 0:
        raise ValueError(f"need at least one segment and λ ≥ 0; got {segments} segments, λ = {rate}.")
    away = (torch.arange(segments, dtype=torch.float64) - (segments - 1) / 2).abs()
    return torch.exp(-rate * (away - away.min()))


def segment_frames(frames: int, segments: int, generator: torch.Generator | None = None) -> Tensor:
    """Return ``(S,)`` frame indices, one in each of S equal segments: drawn, or the middle ones without a generator.

    Raises:
        ValueError: where S does not divide F: unequal segments would weigh frames unequally without saying so.
    """
    if segments < 1 or frames % segments:
        raise ValueError(f"the number of segments must divide the number of frames; got {segments} and {frames}.")
    length = frames // segments
    if generator is None:
        offset = torch.full((segments,), (length - 1) // 2)
    else:
        offset = torch.randint(length, (segments,), generator=generator)
    return torch.arange(segments) * length + offset


@final
class FrameReward(Judge):
    """An image reward made into a video reward.

    One draw of frames serves a whole iteration, so that the samples of a group are compared on the same frames whatever
    batches they come in. The training loop moves on to the next draw once per iteration and saves where it is
    (:class:`Draws`); in a loop of your own, raise ``draws`` by one. The n-th draw of a seed is the same everywhere.

    Args:
        reward: the image reward, or its name; it sees ``(B S, 3, H, W)`` in one call.
        segments: S; must divide the number of frames.
        rate: λ of the temporal attenuation; 0 weighs all segments alike.
        draw: "random" (published) or "middle", the deterministic choice for evaluation.
        seed: of the draws.
    """

    card = Card(
        name="frames",
        summary="an image reward on frames of a video, one drawn per segment, weighted towards the middle",
        modality=("video",),
        differentiable=True,
        reference="InstructVideo, arXiv 2312.12490",
    )

    def __init__(
        self,
        reward: Reward | str = "hps",
        *,
        segments: int = 4,
        rate: float = 1.0,
        draw: Literal["random", "middle"] = "random",
        seed: int = 0,
    ) -> None:
        super().__init__()
        inner = load(reward) if isinstance(reward, str) else reward
        if "image" not in inner.card.modality or not inner.card.batch:
            raise ValueError(
                f"FrameReward wraps a reward of single images; {inner.card.name!r} judges {inner.card.modality}"
                f"{'' if inner.card.batch else ' as sets'}."
            )
        if draw not in ("random", "middle"):
            raise ValueError(f"draw must be 'random' or 'middle'; got {draw!r}.")
        self.reward = inner
        self.segments = segments
        self.weights = attenuation(segments, rate)
        self.draw = draw
        self.seed = seed
        self.draws = 0
        self.turn = Draws(self)
        self.card = self._card(inner.card)

    def _card(self, inner: Card) -> Card:
        low, high = (bound * self.weights.mean().item() for bound in inner.range)
        return replace(
            inner,
            name=f"frames({inner.name})",
            summary=f"{inner.summary}; on {self.segments} frames of a video, weighted towards the middle",
            modality=("video",),
            range=(low, high),
            reference=f"{inner.reference}; InstructVideo, arXiv 2312.12490".lstrip("; "),
        )

    def learners(self) -> tuple[Learner, ...]:
        """Return what counts the draws, after what learns in the reward inside."""
        return (*learners_of([self.reward]), self.turn)

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return ``(B,)`` scores of videos ``(B, F, 3, H, W)``, S dividing F."""
        index = segment_frames(media.shape[1], self.segments, self._generator())
        stills = media[:, index.to(media.device)].flatten(0, 1)
        words = [prompt for prompt in prompts for _ in range(self.segments)]
        extras = None if meta is None else [entry for entry in meta for _ in range(self.segments)]
        scores = self.reward(stills, words, extras).unflatten(0, (len(media), self.segments))
        return (scores * self.weights.to(scores)).mean(1)

    def _generator(self) -> torch.Generator | None:
        if self.draw == "middle":
            return None
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.draws)

    def get_extra_state(self) -> dict[str, int]:
        """Return the number of draws so far; part of ``state_dict``."""
        return {"draws": self.draws}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Resume the sequence of draws."""
        self.draws = int(state["draws"])


class Draws(Learner):
    """Which draw of frames a :class:`FrameReward` is at: the next one each iteration, saved with the run."""

    def __init__(self, reward: FrameReward) -> None:
        self.reward = reward

    def learn(self, heard: Sequence[Any], seed: int, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Move on."""
        self.reward.draws += 1
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the number of the draw."""
        return {"draws": self.reward.draws}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.reward.draws = int(state["draws"])
