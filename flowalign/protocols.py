"""The three doors to the outside world: a generator, a judge, and the tensors that pass between them.

Media are floats: images ``(B, 3, H, W)`` and video ``(B, F, 3, H, W)`` in [0, 1], audio ``(B, C, L)`` in [-1, 1].
Rewards are ``(B,)``, higher is better. Anything else is refused by :func:`check_media` and :func:`check_scores`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from flowalign.process import Posterior, Process, Time

__all__ = ["Card", "Condition", "Framed", "Meta", "Modality", "Pipeline", "Reward", "check_media", "check_scores"]

Modality = Literal["image", "video", "audio"]
Meta = Sequence[Mapping[str, Any]]  # one mapping per sample: references, instructions, frame rate, ...
NDIM = {"image": 4, "video": 5, "audio": 3}
SHAPE = {
    "image": "(B, 3, H, W) in [0, 1]",
    "video": "(B, F, 3, H, W) in [0, 1]",
    "audio": "(B, C, L) in [-1, 1]",
}


@runtime_checkable
class Condition(Protocol):
    """What the generator is conditioned on, one entry per row; opaque to the core but for its length and indexing."""

    @property
    def prompts(self) -> Sequence[str]:
        """One prompt per row."""
        ...

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def __getitem__(self, rows: Tensor) -> Condition:
        """Return the rows selected by a ``(M,)`` index tensor, repeats allowed."""
        ...


@runtime_checkable
class Pipeline(Protocol):
    """A generator: the only thing that the core knows of diffusers.

    ``posterior`` is the only forward pass; guidance happens inside it.
    """

    process: Process
    modality: Modality

    @property
    def denoiser(self) -> nn.Module:
        """The trainable module: LoRA goes here."""
        ...

    def encode(self, prompts: Sequence[str], meta: Meta | None = None) -> Condition:
        """Encode prompts (and the images, masks, ... in ``meta``) once."""
        ...

    def times(self, steps: int, cond: Condition | None = None) -> Tensor:
        """Return ``(steps + 1,)`` falling float64 times, the pipeline's own grid; the last is data time 0.

        ``cond`` says whose: where the grid depends on the resolution, the condition last encoded counts when None.
        """
        ...

    def shape(self, cond: Condition) -> tuple[int, ...]:
        """Return the shape of one sample's state."""
        ...

    def start(self, noise: Tensor, t: float, cond: Condition) -> Tensor:
        """Turn standard normal ``(B, *shape)`` into states at time ``t``: scaled, or mixed with an input image."""
        ...

    def posterior(self, x: Tensor, t: Time, cond: Condition) -> Posterior:
        """Return ``E[x0|x], E[ε|x]`` at ``x`` ``(B, *)``, ``t`` one time or ``(B,)``; differentiable."""
        ...

    def decode(self, x: Tensor, cond: Condition) -> Tensor:
        """Return media of states at data time; differentiable."""
        ...

    def latents(self, media: Tensor, cond: Condition) -> Tensor:
        """Return clean states of media: the way in."""
        ...

    def save(self, path: Path) -> None:
        """Write what was trained so that plain diffusers loads it."""
        ...


@runtime_checkable
class Framed(Protocol):
    """A pipeline of videos whose frames can be decoded by themselves, to save memory."""

    def frames_apart(self, cond: Condition) -> int:
        """Return how many frames can be decoded by themselves; 1 where a frame needs the others."""
        ...

    def decode(self, x: Tensor, cond: Condition, *, frames: Sequence[int] | None, checkpoint: bool) -> Tensor:
        """Return the chosen frames ``(B, len(frames), 3, H, W)`` of states at data time."""
        ...


@dataclass(frozen=True)
class Card:
    """What a user must know of a reward before trusting it; ``flowalign rewards`` prints these.

    Attributes:
        name: how the command line calls it.
        summary: one line: what it measures.
        modality: what it looks at.
        differentiable: whether gradients reach the media.
        range: lowest and highest score that occur in practice.
        licence: of the weights; "-" for programmatic rewards.
        weights: hub id or file; "-" for none.
        text: what the prompt is cut at, in tokens; None where no text is read.
        reference: paper or repository.
        batch: False for a reward of a *set* of samples rather than of each one.
    """

    name: str
    summary: str
    modality: tuple[Modality, ...] = ("image",)
    differentiable: bool = False
    range: tuple[float, float] = (0.0, 1.0)
    licence: str = "-"
    weights: str = "-"
    text: int | None = None
    reference: str = ""
    batch: bool = True


@runtime_checkable
class Reward(Protocol):
    """A judge: media, prompts and per-sample extras in, ``(B,)`` float32 scores out, higher is better."""

    @property
    def card(self) -> Card:
        """What the reward is and needs."""
        ...

    def __call__(self, media: Tensor, prompts: Sequence[str], meta: Meta | None = None) -> Tensor:
        """Score each sample; a sample that cannot be judged raises, it is never scored 0."""
        ...


def check_media(media: Tensor, modality: Modality) -> Tensor:
    """Return ``media`` unchanged if it follows the conventions of its modality.

    Shape and dtype are checked always; the range only on the CPU, where looking costs no synchronisation.

    Raises:
        ValueError: naming what came and what is wanted.
    """
    want = SHAPE[modality]
    if not isinstance(media, Tensor) or not media.is_floating_point() or media.ndim != NDIM[modality]:
        got = f"{tuple(media.shape)} {media.dtype}" if isinstance(media, Tensor) else type(media).__name__
        raise ValueError(f"{modality} must be a float tensor {want}; got {got}.")
    if 0 in media.shape:
        raise ValueError(f"{modality} must not be empty; got {tuple(media.shape)}.")
    if modality != "audio" and media.shape[-3] != 3:
        raise ValueError(f"{modality} must be {want}; got {tuple(media.shape)}: channels come before height and width.")
    if media.device.type == "cpu":
        low, high = media.detach().amin().item(), media.detach().amax().item()
        floor = -1.0 if modality == "audio" else 0.0
        if not (low >= floor - 1e-3 and high <= 1 + 1e-3):
            raise ValueError(f"{modality} must lie in [{floor:g}, 1]; got values from {low:.4g} to {high:.4g}.")
    return media


def check_scores(scores: Tensor, count: int, name: str) -> Tensor:
    """Return ``scores`` if they are ``(count,)`` and finite.

    Raises:
        ValueError: a NaN reward is never a zero: it stops the run and names the samples.
    """
    if not isinstance(scores, Tensor) or tuple(scores.shape) != (count,):
        got = f"a tensor of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"reward {name!r} must return one score per sample, a tensor of shape ({count},); got {got}.")
    bad = (~torch.isfinite(scores)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"reward {name!r} returned {scores[bad[0]].item()} for sample {bad[0]} ({len(bad)} of {count} are not "
            "finite). Fix the reward, or mask such samples before scoring; they are never counted as zero."
        )
    return scores
