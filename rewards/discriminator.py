"""The adversarial reward of Adv-GRPO: how real a picture looks to a head that is trained against the generator.

    score     .7 · h(class token) + .3 · mean_j h(patch_j),         h a small head on frozen DINOv2 tokens
    loss      ½ [relu(1 − h(real)) + relu(1 + h(fake))] on class tokens, plus .3 times the same on patches

Given exemplars, the head learns in the training loop: after each iteration it takes some steps on exemplars against
the samples of that iteration, on all processes' samples alike, and is saved with the run (:class:`Adversary`). Samples
are rounded to a saved picture's bytes first, as the exemplars were: else the head could tell them by their fractions.

Tokens are normalised in training and in scoring alike (the published code does so only when scoring). The head is the
only part that learns, and scores carry no gradient to it. Its optimiser's settings are ours.

References: Adv-GRPO (2511.20256); Oquab et al., DINOv2 (2304.07193), Apache-2.0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowalign.hearing import tell
from flowalign.learner import Learner
from flowalign.protocols import Card, Meta, check_media
from flowalign.rewards.base import Judge
from flowalign.rewards.data import picture, pictures
from flowalign.rewards.dino import Dino
from flowalign.rewards.preprocess import resize, to_bytes

__all__ = ["Adversary", "Discriminator"]


class Discriminator(Judge):
    """A reward that is retrained against the generator's own samples.

    Args:
        weights: hub id or folder of the frozen backbone.
        exemplars: what is real: media ``(N, 3, H, W)`` in [0, 1], or a folder of pictures; None for a head that stays
            as it is.
        hidden: width of the head.
        class_weight: share of the class token in the score; the patches have the rest.
        patch_weight: weight of the patches' hinge loss.
        patches: how many patches per picture the loss looks at, drawn anew each time; None for all.
        size: see :class:`flowalign.rewards.dino.Dino`.
        dtype: of the backbone; the head is float32.
        steps: of the head per iteration.
        batch: exemplars, and samples, in each step.
        rate: learning rate of the head (Adam).
    """

    card = Card(
        "dino-adversarial",
        "how real a picture looks to a head trained against the generator",
        differentiable=True,
        range=(-3.0, 3.0),
        licence="Apache-2.0",
        weights="facebook/dinov2-base",
        reference="arXiv:2511.20256",
    )

    def __init__(
        self,
        weights: str | Path = "facebook/dinov2-base",
        exemplars: Tensor | str | Path | None = None,
        *,
        hidden: int = 512,
        class_weight: float = 0.7,
        patch_weight: float = 0.3,
        patches: int | None = 64,
        size: int = 518,
        dtype: torch.dtype = torch.float32,
        steps: int = 1,
        batch: int = 32,
        rate: float = 1e-4,
    ) -> None:
        super().__init__()
        if steps < 1 or batch < 1 or rate <= 0:
            raise ValueError(f"steps and batch must be at least 1 and rate positive; got {steps}, {batch}, {rate}.")
        real = _exemplars(exemplars, size)
        self.dino = Dino(weights, size, dtype)
        self.freeze()
        width = int(self.dino.model.config.hidden_size)
        self.head = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 1))
        self.class_weight, self.patch_weight, self.patches = class_weight, patch_weight, patches
        self.adversary = None if real is None else Adversary(self, real, steps, batch, rate)

    def learners(self) -> tuple[Learner, ...]:
        """Return what trains the head, where there are exemplars."""
        return () if self.adversary is None else (self.adversary,)

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return the mixed logit; gradients reach the media, never the head."""
        if self.adversary is not None:
            tell(self.adversary, to_bytes(media))
        frozen = {k: v.detach() for k, v in self.head.named_parameters()}
        logits = torch.func.functional_call(self.head, frozen, (self.dino(media),)).squeeze(-1)
        mixed = self.class_weight * logits[:, 0] + (1 - self.class_weight) * logits[:, 1:].mean(1)
        return mixed.to(media.device)

    def loss(self, real: Tensor, fake: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the hinge loss of the head on real ``(N, 3, H, W)`` and generated ``(M, 3, H, W)`` pictures."""
        total: Tensor = torch.zeros((), device=real.device)
        for media, sign in ((real, 1.0), (fake, -1.0)):
            with torch.no_grad():
                tokens = self.dino(media.detach())
            keep = tokens[:, 1:]
            if self.patches is not None and self.patches < keep.shape[1]:
                index = torch.rand(keep.shape[:2], generator=generator).argsort(1)[:, : self.patches].to(keep.device)
                keep = keep.gather(1, index.unsqueeze(-1).expand(-1, -1, keep.shape[-1]))
            hinge = F.relu(1 - sign * self.head(tokens[:, 0])).mean()
            total = total + 0.5 * (hinge + self.patch_weight * F.relu(1 - sign * self.head(keep)).mean()).to(total)
        return total


class Adversary(Learner):
    """What trains a :class:`Discriminator`'s head, in the training loop.

    Args:
        reward: the discriminator.
        real: exemplars as bytes ``(N, 3, H, W)``.
        steps: per iteration.
        batch: exemplars, and samples, in each step.
        rate: learning rate.
    """

    def __init__(self, reward: Discriminator, real: Tensor, steps: int, batch: int, rate: float) -> None:
        self.reward, self.real, self.steps, self.batch = reward, real, steps, batch
        self.optimizer = torch.optim.Adam(reward.head.parameters(), lr=rate)

    @torch.enable_grad()
    def learn(self, heard: Sequence[Any], seed: int, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Take the iteration's steps; return the mean loss."""
        if not heard:
            return {}
        fake = gather(torch.cat(list(heard)))
        g = torch.Generator().manual_seed(seed)
        self.reward.head.requires_grad_(True)  # a reward that this one is a member of has frozen all of it
        losses = []
        for _ in range(self.steps):
            loss = self.reward.loss(self._some(self.real, fake, g), self._some(fake, fake, g), g)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        return {"discriminator/loss": float(torch.stack(losses).mean())}

    def _some(self, pictures: Tensor, like: Tensor, g: torch.Generator) -> Tensor:
        """Return a batch of distinct pictures, as floats on the device of the samples."""
        index = torch.randperm(len(pictures), generator=g)[: self.batch]
        return pictures[index.to(pictures.device)].to(like.device).float() / 255

    def state_dict(self) -> dict[str, Any]:
        """Return the head and its optimiser."""
        return {"head": self.reward.head.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.reward.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])


def _exemplars(given: Tensor | str | Path | None, size: int) -> Tensor | None:
    """Return exemplars as bytes ``(N, 3, H, W)``; pictures of a folder are squashed to ``size``, as they will be seen.

    Raises:
        ValueError: for an empty folder, or media outside the conventions.
    """
    if given is None or isinstance(given, Tensor):
        return None if given is None else to_bytes(check_media(given, "image"))
    return torch.cat([to_bytes(resize(picture(p)[None], (size, size))) for p in pictures(Path(given))])
