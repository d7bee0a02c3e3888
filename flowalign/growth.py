"""How a taped batch is grown for reward backpropagation, where it is no plain rollout with a tape.

A growth samples without a graph, changes what it has, takes the steps that are to be trained with a graph, and has the
result judged with gradients:

    plain (none)     the last steps of the rollout                                  DRaFT, AlignProp, IPRO
    repeated         re-noise the finished sample, last step                        DRaFT-LV
    a Growth         known noise and closed-form recovery, part of the way and back, several noisings of one sample ...

Whatever is drawn follows from the seed and the iteration, so that a resumed run repeats it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from flowalign.gaussian import per_sample
from flowalign.noise import Noise, mix
from flowalign.objectives.backprop import Grown
from flowalign.rollout import Tape
from flowalign.source import Draw
from flowalign.trajectory import Nodes, Trajectory, ranks

if TYPE_CHECKING:
    from flowalign.collect import Collector
    from flowalign.policy import Policy
    from flowalign.process import Time
    from flowalign.scorer import Bound

__all__ = [
    "Clean",
    "Growth",
    "clean_states",
    "cut",
    "data_states",
    "ends",
    "fresh_noise",
    "judged",
    "recovered",
    "rows_of",
]

Clean = Literal["samples", "data"]


class Growth(ABC):
    """Makes one microbatch of reward backpropagation."""

    @abstractmethod
    def __call__(self, collector: Collector, draw: Draw, judge: Bound, iteration: int, tape: Tape) -> Grown:
        """Return taped samples with their rewards.

        Args:
            collector: samples; knows pipeline, policy, recipe and seed.
            draw: prompts of the microbatch.
            judge: of the draw's rows, with their conditions.
            iteration: names the random numbers of the microbatch.
            tape: of the iteration: whether to checkpoint, and from which level on to keep a graph.
        """


def clean_states(collector: Collector, draw: Draw, judge: Bound, iteration: int, of: Clean) -> tuple[Tensor, Tensor]:
    """Return the clean states ``(N, *)`` that a growth starts from, and their rows: samples without a graph, or data.

    Raises:
        ValueError: for ``data`` with a prompt that brings none.
    """
    if of == "data":
        return data_states(collector.pipeline, draw, judge.cond), rows_of(draw)
    leaves = collector.sample(draw, judge, iteration).leaves
    return leaves.x.detach(), leaves.row


def data_states(pipeline: Any, draw: Draw, cond: Any) -> Tensor:
    """Return the clean states ``(N, *)`` of each row's own medium, ``meta[row]["media"]``, once per sample.

    Args:
        pipeline: encodes media.
        draw: rows; ``media`` is a float tensor, ``(3, H, W)``, ``(F, 3, H, W)`` or ``(C, L)``.
        cond: by row.

    Raises:
        ValueError: for a row without a medium.
    """
    media = []
    for i, entry in enumerate(draw.meta):
        one = entry.get("media") if isinstance(entry, Mapping) else None
        if not isinstance(one, Tensor):
            raise ValueError(
                f"this setting starts from data, and prompt {i} ({draw.prompts[i]!r}) brings none: give every prompt "
                'meta["media"], a float tensor by the conventions of its modality, or start from samples.'
            )
        media.append(one)
    rows = rows_of(draw)
    with torch.no_grad():
        states: Tensor = pipeline.latents(torch.stack(media), cond)
    return states[rows.to(states.device)]


def rows_of(draw: Draw) -> Tensor:
    """Return the row of each sample of a draw, ``(N,)``."""
    return torch.arange(len(draw.prompts)).repeat_interleave(draw.samples)


def fresh_noise(collector: Collector, draw: Draw, iteration: int, purpose: int, row: Tensor, like: Tensor) -> Tensor:
    """Return standard normal noise for ``like (N, *)``, keyed by the prompt and the sample's number in its row."""
    noise = Noise(mix(collector.seed, iteration, purpose), draw.keys)
    return noise.normal(0, row, ranks(row), like.shape[1:]).to(like)


def judged(collector: Collector, judge: Bound, x: Tensor, row: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return the rewards of clean states by name and their weighted sum, with gradients."""
    with torch.enable_grad():
        rewards = judge(x, row, learn=True)
        return rewards, collector.total(rewards)


def recovered(
    policy: Policy, x0: Tensor, noise: Tensor, t: Time, s: Time, cond: object, *, checkpoint: bool = False
) -> Tensor:
    """Noise ``x0 (B, *)`` to t, take one deterministic step to s, and return the x̂0 that the known noise leaves.

    Args:
        policy: the network; it keeps a graph where the mode allows.
        x0: clean states.
        noise: ``(B, *)``, the same before and after.
        t: one time or ``(B,)``.
        s: where the step goes, α_s > 0.
        cond: of each sample.
        checkpoint: recompute the network in the backward pass.
    """
    x = policy.process.diffuse(x0, t, noise)
    p = policy.posterior(x, t, cond, checkpoint=checkpoint)
    alpha, sigma = (per_sample(c, x) for c in policy.process(s))
    return (alpha * p.x0 + sigma * p.eps - sigma * noise) / alpha


def ends(x: Tensor, row: Tensor) -> Trajectory:
    """Return a trajectory of finished samples alone, for a batch whose steps belong to no single grid."""
    return Trajectory(torch.zeros(1, dtype=torch.float64), (Nodes.enter(x, row),), torch.zeros(int(row.max()) + 1))


def cut(grid: Sequence[float] | Tensor, t: float) -> Tensor:
    """Return the times of a grid from the last one not below ``t`` on: where a partial chain enters.

    Raises:
        ValueError: if no step is left.
    """
    times = torch.as_tensor(grid, dtype=torch.float64)
    first = int((times >= t - 1e-6).sum()) - 1
    if first < 0 or first >= len(times) - 1:
        raise ValueError(
            f"time {t:.4g} leaves no step of a grid from {float(times[0]):.4g} to {float(times[-1]):.4g}: choose it "
            "strictly between them, or take more sampling steps."
        )
    return times[first:]
