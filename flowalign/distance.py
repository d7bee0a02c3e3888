"""How far a policy's field has moved from its base's, on noised copies of given clean samples.

    drift     mean (v - v_base)², the papers' "KL"; on samples of the base it is the same question at every check
    path_kl   divergence of the Flow-GRPO SDE's paths (a = .7), nats per sample; on the policy's own samples it is
              KL ≈ Σ_t Δ · KL( p_θ(x_{t-h} | x_t) ‖ p_base(x_{t-h} | x_t) ) / h

Both ask the networks at the same five times, from the same noises; they differ in what they make of the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flowalign.kernels import EulerMaruyama
from flowalign.laws import FlowGrpo
from flowalign.policy import Policy
from flowalign.process import Posterior
from flowalign.protocols import Pipeline

__all__ = ["DRIFT_TIMES", "drift", "path_kl"]

DRIFT_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
SDE = EulerMaruyama(FlowGrpo(0.7))
STEP = 0.02

Gap = Callable[[Tensor, float, Posterior, Posterior], Tensor]  # (x, t, the role's, the base's) -> a scalar


def drift(
    pipeline: Pipeline, policy: Policy, prompts: Sequence[str], meta: Sequence[Any], x0: Tensor, role: str, seed: int
) -> float:
    """Return the mean squared difference of a role's velocities from the base's, at fixed noised samples.

    Args:
        pipeline: the generator.
        policy: with the role ``reference``.
        prompts: of each sample.
        meta: of each sample.
        x0: clean samples ``(B, *)``, usually the base's.
        role: whose drift.
        seed: of the noises.
    """
    return _mean_gap(
        pipeline, policy, prompts, meta, x0, role, seed,
        lambda x, t, now, base: ((now.velocity - base.velocity) ** 2).mean(),
    )  # fmt: skip


def path_kl(
    pipeline: Pipeline, policy: Policy, prompts: Sequence[str], meta: Sequence[Any], x0: Tensor, role: str, seed: int
) -> float:
    """Return the divergence of a role's sampling paths from the base's, in nats per sample; see the module.

    Args:
        pipeline: the generator.
        policy: with the role ``reference``.
        prompts: of each sample.
        meta: of each sample.
        x0: the role's own clean samples ``(B, *)``.
        role: whose divergence.
        seed: of the noises.
    """

    def divergence(x: Tensor, t: float, now: Posterior, base: Posterior) -> Tensor:
        law, other = (SDE(x, p, t, t - STEP)[0] for p in (now, base))
        return law.kl(other).mean() / STEP

    return _mean_gap(pipeline, policy, prompts, meta, x0, role, seed, divergence)


@torch.no_grad()
def _mean_gap(
    pipeline: Pipeline,
    policy: Policy,
    prompts: Sequence[str],
    meta: Sequence[Any],
    x0: Tensor,
    role: str,
    seed: int,
    gap: Gap,
) -> float:
    """Return the mean over times of a gap between a role's posterior and the base's at the same noised samples."""
    cond = pipeline.encode(list(prompts), list(meta))
    g = torch.Generator().manual_seed(seed)
    device = next(pipeline.denoiser.parameters()).device
    gaps = []
    for t in DRIFT_TIMES:
        x = policy.process.diffuse(x0, t, torch.randn(x0.shape, generator=g)).to(device)
        base = policy.posterior(x, t, cond, "reference")
        with policy.playing(role):
            now = policy.posterior(x, t, cond)
        gaps.append(gap(x, t, now, base))
    return float(torch.stack(gaps).mean())
