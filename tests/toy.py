"""A generator small enough to train in a test: a Gaussian flow over 2×2 "images" plus a network, and a reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowalign.process import Posterior, Rectified, Time
from flowalign.protocols import Card


@dataclass(frozen=True)
class ToyCondition:
    """Prompts and nothing else."""

    prompts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: Tensor) -> ToyCondition:
        return ToyCondition(tuple(self.prompts[i] for i in rows.tolist()))


@dataclass(frozen=True)
class Asked(ToyCondition):
    """A condition whose guidance can be switched off: golden noise is what guidance tells a noise."""

    guided: bool = True

    def __getitem__(self, rows: Tensor) -> Asked:
        return Asked(tuple(self.prompts[i] for i in rows.tolist()), self.guided)

    def bare(self) -> Asked:
        return replace(self, guided=False)


class Toy:
    """``x0 ~ N(.5, .2²)`` per pixel, its exact velocity plus a tenth of a network's output."""

    process = Rectified()
    modality = "image"

    def __init__(self, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.denoiser = nn.Sequential(nn.Linear(13, 32), nn.Tanh(), nn.Linear(32, 12))
        for p in self.denoiser.parameters():
            p.data = 0.2 * torch.randn(p.shape, generator=g)

    def encode(self, prompts: Sequence[str], meta: Any = None) -> ToyCondition:
        return ToyCondition(tuple(prompts))

    def times(self, steps: int) -> Tensor:
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def shape(self, cond: ToyCondition) -> tuple[int, ...]:
        return (3, 2, 2)

    def start(self, noise: Tensor, t: float, cond: ToyCondition) -> Tensor:
        return noise

    def posterior(self, x: Tensor, t: Time, cond: ToyCondition) -> Posterior:
        flat = x.flatten(1)
        tt = torch.as_tensor(t).reshape(-1, 1).to(flat).expand(len(x), 1)
        gain = (1 - tt) * 0.04 / ((1 - tt) ** 2 * 0.04 + tt**2)
        x0 = 0.5 + gain * (flat - (1 - tt) * 0.5)
        v = (flat - x0) / tt + 0.1 * self.denoiser(torch.cat([flat, tt], 1))
        return self.process.posterior(x, t, v=v.reshape(x.shape))

    def decode(self, x: Tensor, cond: ToyCondition) -> Tensor:
        return x + (x.clamp(0, 1) - x).detach()

    def latents(self, media: Tensor, cond: ToyCondition) -> Tensor:
        return media

    def save(self, path: Path) -> None:
        raise AssertionError("the toy is never saved")


@dataclass(frozen=True)
class Bright:
    """Mean brightness; dark prompts want the opposite."""

    differentiable: bool = True

    @property
    def card(self) -> Card:
        return Card("bright", "mean brightness", differentiable=self.differentiable)

    def __call__(self, media: Tensor, prompts: Sequence[str], meta: Any = None) -> Tensor:
        sign = torch.tensor([-1.0 if "dark" in p else 1.0 for p in prompts])
        r = sign * media.mean((1, 2, 3))
        return r if self.differentiable else r.detach()
