"""DenseGRPO's calibration on a world where the right ψ is known, through its own rollouts, completions and gains."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from flowalign.collect import Collector
from flowalign.methods.dense_grpo import Calibration, DenseGRPO
from flowalign.options import FitOptions
from flowalign.policy import Policy
from flowalign.process import Posterior, Rectified
from flowalign.protocols import Card
from flowalign.scorer import Scorer
from flowalign.source import Prompts
from tests.toy import ToyCondition
from tests.worlds import F64

TIMES = torch.tensor([0.8, 0.6, 0.4, 0.0], dtype=F64)
BEST, AWAY = 0.5, 0.02  # where the reward is highest, and how far from it every sample starts
OPTIONS = FitOptions(groups=1, size=1200, steps=3)


class Signal:
    """A network that sees no noise in what it is given: x_t = (1 - t) x0, so every step's gain is its own noise's.

    The ODE is exact in one Euler step or many; noise of level ψ in the step from t to s moves x0 by ψ √(t-s)/(1-s) z.
    """

    process = Rectified()
    modality = "image"
    denoiser = nn.Identity()

    def encode(self, prompts, meta=None) -> ToyCondition:
        return ToyCondition(tuple(prompts))

    def times(self, steps: int) -> Tensor:
        return TIMES

    def shape(self, cond: ToyCondition) -> tuple[int, ...]:
        return (3, 1, 1)

    def start(self, noise: Tensor, t: float, cond: ToyCondition) -> Tensor:
        return torch.full_like(noise, (1 - t) * (BEST + AWAY)).double()

    def posterior(self, x: Tensor, t, cond=None) -> Posterior:
        tt = torch.as_tensor(t, dtype=F64).reshape(-1, *[1] * (x.ndim - 1))
        return self.process.posterior(x, t, v=-x / (1 - tt))

    def decode(self, x: Tensor, cond: ToyCondition) -> Tensor:
        return x

    def latents(self, media: Tensor, cond: ToyCondition) -> Tensor:
        return media


@dataclass(frozen=True)
class Near:
    """Minus the distance of the first channel from the best value."""

    @property
    def card(self) -> Card:
        return Card("near", "distance", differentiable=False)

    def __call__(self, media: Tensor, prompts, meta=None) -> Tensor:
        return -(media[:, 0, 0, 0] - BEST).abs()


def lean(spread: float, away: Tensor) -> float:
    """E[sign ΔR] of x0's of these distances moved by N(0, spread²): up if the move is towards the best, at most 2 d."""
    up = torch.special.ndtr(2 * away / spread) - 0.5
    return float((2 * up - 1).mean())


def right(tolerance: float) -> list[float]:
    """The ψ of the first two steps at which the signs are just no longer balanced, each by bisection.

    The second step starts from where the first one's noise, at its own right level, has moved the samples.
    """
    z = torch.special.ndtri((torch.arange(20_000, dtype=F64) + 0.5) / 20_000)
    moved, out = torch.full_like(z, AWAY), []
    for t, s in ((0.8, 0.6), (0.6, 0.4)):
        reach, low, high = (t - s) ** 0.5 / (1 - s), 1e-4, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if abs(lean(middle * reach, moved.abs())) < tolerance / 24 else (low, middle)
        out.append(low)
        moved = moved + low * reach * z
    return out


@pytest.mark.parametrize(("tolerance", "completion", "noise"), [(2.0, None, 0.025), (2.0, 1, 0.004), (4.0, None, 0.01)])
def test_calibration_finds_the_level_of_a_known_world(tolerance: float, completion: int | None, noise: float) -> None:
    """ψ climbs or falls to where the noise begins to drown the sign of the gain, whatever it starts from."""
    want = right(tolerance)
    method = DenseGRPO(noise=noise, completion=completion, rounds=35, tolerance=tolerance, step=0.001)
    recipe = method.recipe(TIMES)
    (calibration,) = recipe.learners
    assert isinstance(calibration, Calibration)
    calibration.floor = 0.001
    assert max(abs(a - b) for a, b in zip(calibration.table.values.tolist(), want, strict=False)) > 0.008, "to be found"
    world = Signal()
    collector = Collector(world, Scorer(world, {"near": Near()}), Policy(world), recipe, 3, 0)
    calibration.before(collector, Prompts(["a"]), OPTIONS)
    assert calibration.table.values[:2].tolist() == pytest.approx(want, rel=0.2)
