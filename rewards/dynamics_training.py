"""Train the small inverse-dynamics model on videos whose actions are known.

    min E -log softmax(g(frame_t, frame_{t+1}))[a_t]

Videos are drawn by the caller (this room knows no generator), lightly degraded so that the model reads generated frames
as well as drawn ones: noise, a gain per video, and in one of five pairs "still" (the same frame twice).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from flowalign.rewards.idm import InverseDynamics, InverseDynamicsConfig

__all__ = ["accuracy", "train_dynamics"]

Draw = Callable[[torch.Generator, int], tuple[Tensor, Tensor]]  # -> videos (B, F, 3, H, W), actions (B, F-1)


def degrade(video: Tensor, g: torch.Generator) -> Tensor:
    """Return videos with noise of up to .06 and a gain of .85 to 1.15."""
    b = len(video)
    gain = 0.85 + 0.3 * torch.rand(b, 1, 1, 1, 1, generator=g, device=g.device)
    level = 0.06 * torch.rand(b, 1, 1, 1, 1, generator=g, device=g.device)
    return (video * gain + level * torch.randn(video.shape, generator=g, device=g.device)).clamp(0, 1)


def still(video: Tensor, actions: Tensor, g: torch.Generator, action: int, share: float = 0.2) -> tuple[Tensor, Tensor]:
    """Replace frame t + 1 by frame t in a ``share`` of pairs, whose action is then ``action``; later pairs follow."""
    hold = torch.rand(actions.shape, generator=g, device=g.device) < share
    step = (~hold).long()
    frame = torch.cat([torch.zeros_like(step[:, :1]), step.cumsum(1)], 1)
    index = frame[..., None, None, None].expand_as(video)
    moved = actions.gather(1, (frame[:, 1:] - 1).clamp_min(0))
    return video.gather(1, index), torch.where(hold, action, moved)


def train_dynamics(
    draw: Draw, config: InverseDynamicsConfig, *, steps: int = 600, batch: int = 32, lr: float = 3e-3, seed: int = 0
) -> InverseDynamics:
    """Return a trained model; the last action of ``config`` means "still"."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    model = InverseDynamics(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(steps):
        video, actions = draw(g, batch)
        video, actions = still(video, actions, g, config.actions - 1)
        loss = F.cross_entropy(model(degrade(video, g)).flatten(0, 1), actions.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.requires_grad_(False).eval()


@torch.no_grad()
def accuracy(model: InverseDynamics, video: Tensor, actions: Tensor) -> float:
    """Return the share of pairs of frames whose action is read rightly."""
    return float((model(video).argmax(-1) == actions).float().mean())
