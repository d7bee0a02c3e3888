"""What keeps a run near its base whatever the method is: a reward ceiling, the base's own samples, data.

    ceiling     r → min(r, τ): above τ a sample neither pulls nor is preferred (ReFL's relu(τ - r), for every method)
    mix         + w mean ‖v_θ(x_t) - (α̇ x0 + σ̇ ε)‖²  on samples x0 of the base for the iteration's own prompts
    pretrain    + w mean ‖v_θ(x_t) - (α̇ x0 + σ̇ ε)‖²  on the prompts' own media, ``meta["media"]``

The last two are the denoising loss of pre-training, the term that ReFL's paper has and its released code left out. They
are added to every optimiser step; with both weights 0 and no ceiling a run is what it was, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowalign.batches import Leaves, TimeLaw
from flowalign.growth import data_states
from flowalign.kernels import EulerMaruyama
from flowalign.noise import Noise, mix
from flowalign.objectives.matching import FlowMatching
from flowalign.policy import Policy
from flowalign.rollout import rollout
from flowalign.source import Draw

if TYPE_CHECKING:
    from flowalign.collect import Collector

__all__ = ["Anchor", "Restraint", "anchors"]


@dataclass(frozen=True)
class Restraint:
    """The restraints of a run; all off by default.

    Attributes:
        ceiling: weighted reward above which more counts for nothing; None for none.
        mix: weight of the denoising loss on samples of the base model.
        pretrain: weight of the denoising loss on the prompts' own media.
        samples: clean samples of each kind in an iteration, one for each prompt at most.
    """

    ceiling: float | None = None
    mix: float = 0.0
    pretrain: float = 0.0
    samples: int = 8

    def __post_init__(self) -> None:
        if self.mix < 0 or self.pretrain < 0 or self.samples < 1:
            raise ValueError(
                f"restraint.mix and restraint.pretrain must not be negative and samples at least 1; got {self.mix}, "
                f"{self.pretrain} and {self.samples}."
            )

    @property
    def roles(self) -> tuple[str, ...]:
        """The base, where its samples are mixed in."""
        return ("reference",) if self.mix else ()


@dataclass(frozen=True)
class Anchor:
    """Clean states that the policy must still be able to denoise.

    Attributes:
        name: of the term.
        weight: of the loss.
        x0: ``(M, *)``.
        cond: conditions by sample.
        seed: of the times and noises.
    """

    name: str
    weight: float
    x0: Tensor
    cond: object
    seed: int

    def loss(self, policy: Policy, step: int) -> Tensor:
        """Return the weighted denoising loss with the times and noises of an optimiser step."""
        g = torch.Generator().manual_seed(mix(self.seed, step))
        n = len(self.x0)
        batch = Leaves(
            self.x0, torch.arange(n), torch.ones(n), TimeLaw().draw(n, g),
            torch.randn(self.x0.shape, generator=g).to(self.x0),
        )  # fmt: skip
        return self.weight * FlowMatching()(policy, batch, self.cond).terms["flow_matching"]

    def backward(self, policy: Policy, step: int) -> dict[str, Tensor]:
        """Add the gradient of the loss; return it by name."""
        loss = self.loss(policy, step)
        loss.backward()
        return {f"loss/{self.name}": loss.detach()}


def anchors(restraint: Restraint, collector: Collector, draw: Draw, iteration: int) -> Sequence[Anchor]:
    """Return the anchors of an iteration: nothing where the restraint has none.

    Raises:
        ValueError: for ``pretrain`` with a prompt that brings no media.
    """
    out = []
    if restraint.mix or restraint.pretrain:
        few = draw.part(range(min(int(draw.group.max()) + 1, restraint.samples)))
        few = replace(few, samples=torch.ones_like(few.samples))
        cond = collector.pipeline.encode(few.prompts, few.meta)
        if restraint.mix:
            x0 = _base_samples(collector, few, cond, iteration)
            out.append(Anchor("mix", restraint.mix, x0, cond, mix(collector.seed, iteration, 701)))
        if restraint.pretrain:
            x0 = data_states(collector.pipeline, few, cond)
            out.append(Anchor("pretrain", restraint.pretrain, x0, cond, mix(collector.seed, iteration, 702)))
    return out


def _base_samples(collector: Collector, draw: Draw, cond: object, iteration: int) -> Tensor:
    """Return one sample of the base for each row of a draw, by its ODE, ``(R, *)``."""
    from flowalign.collect import enter

    row = torch.arange(len(draw.prompts))
    noise = Noise(mix(collector.seed, iteration, 700), draw.keys)
    times = collector.pipeline.times(collector.steps)
    with collector.policy.ledger.phase("rollout"):
        start = enter(collector.pipeline, cond, row, noise, float(times[0]))  # type: ignore[arg-type]
        tree = rollout(collector.policy, EulerMaruyama(), times, start, cond, noise=noise, role="reference")
    return tree.leaves.x
