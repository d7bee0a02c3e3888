"""Noise-aware distillation: foresee, from a half-denoised picture, what a judge will say of the finished one.

A student with the time as a second input learns ``s(E[x0|x_t], t) ≈ r(x0)`` by regression on the teacher's scores,
admitting noisier pictures as training goes on. It then serves wherever the value of an unfinished sample is wanted
(particle weights, early pruning of bad candidates, process rewards), where a judge of finished pictures misjudges.

Reference: TTSnap (2511.22242): noise-aware rewards with a curriculum from clean to noisy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowalign.rewards.training import Trained

__all__ = ["distil"]


def distil(
    student: Trained,
    previews: Tensor,
    times: Tensor,
    prompts: Sequence[str],
    teacher: Tensor,
    *,
    steps: int = 300,
    batch: int = 64,
    rate: float = 1e-3,
    curriculum: float = 0.5,
    seed: int = 0,
) -> tuple[float, ...]:
    """Teach a noise-aware student what the teacher says of the *finished* pictures.

    Args:
        student: with ``HeadSpec(noise_aware=True)``.
        previews: ``(N, 3, H, W)`` in [0, 1], ``E[x0|x_t]`` decoded, or noisy pictures.
        times: ``(N,)`` in [0, 1], 1 = noise.
        prompts: one each.
        teacher: ``(N,)`` scores of the finished pictures.
        steps: of AdamW.
        batch: previews per step.
        rate: learning rate.
        curriculum: share of the steps over which the latest admitted time grows from the earliest to 1.
        seed: of the batches.

    Returns:
        The loss of each step.
    """
    if not student.spec.noise_aware:
        raise ValueError("distil needs a student that reads the time: Trained(backbone, HeadSpec(noise_aware=True)).")
    if not len(previews) == len(times) == len(prompts) == len(teacher):
        sizes = [len(v) for v in (previews, times, prompts, teacher)]
        raise ValueError(f"previews, times, prompts and teacher must be of one length; got {sizes}.")
    with torch.no_grad():
        parts = [student.backbone(previews[i : i + 32], prompts[i : i + 32]) for i in range(0, len(previews), 32)]
        tokens = [torch.cat([p[i] for p in parts]) for i in range(len(parts[0]))]
    mean, std = teacher.double().mean(), teacher.double().std().clamp_min(1e-8)
    target = ((teacher.double() - mean) / std).to(tokens[0])
    g = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(student.head.parameters(), rate)
    losses: list[float] = []
    easiest = float(times.min())
    for step in range(steps):
        progress = min(1.0, (step + 1) / max(1, round(curriculum * steps)))
        admitted = (times.cpu() <= easiest + (1 - easiest) * progress + 1e-6).nonzero().flatten()
        rows = admitted[torch.randint(len(admitted), (batch,), generator=g)].to(tokens[0].device)
        scores = student.head([t[rows] for t in tokens], times.to(tokens[0])[rows])
        loss = F.mse_loss(scores, target[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    _unstandardise(student.head, mean.item(), std.item())
    return tuple(losses)


@torch.no_grad()
def _unstandardise(head: Any, mean: float, std: float) -> None:
    """Fold the teacher's scale into the last layer, so that the student speaks the teacher's units."""
    last: Any = head.out[-1] if isinstance(head.out, nn.Sequential) else head.out
    last.weight.mul_(std)
    last.bias.mul_(std).add_(mean)
