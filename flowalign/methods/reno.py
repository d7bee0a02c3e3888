"""Noise optimisation: climb the reward through the sampler, with the noise as the variable (ReNO 2406.04312; DNO).

    min_z  - Σ_i w_i r_i(G(z)) + norm (|z|²/2 - (d - 1) log|z|) + probability P(z)

The norm term pulls the radius to √(d-1); P is the probability term of Direct Noise Optimization (DNO,
2405.18881); both are in :mod:`flowalign.methods.noise_penalties`.

ReNO moves the starting noise of a one-step generator (Nesterov SGD, gradients clipped), DNO all noises of a stochastic
sampler (AdamW). Each wanted result is a climb of its own; the best by reward, without the penalties, is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flowalign.kernels import EulerMaruyama, Kernel
from flowalign.methods.base import Candidates, Preset, Steering, Task
from flowalign.methods.candidates import better
from flowalign.methods.noise_penalties import norm_penalty, probability_penalty
from flowalign.methods.noise_search import play
from flowalign.methods.particles import Rows, noisy_kernel, rows_of
from flowalign.noise import START, Given, mix
from flowalign.options import FitOptions
from flowalign.rollout import Tape, rollout
from flowalign.trajectory import Nodes, ranks

__all__ = ["Climb", "ReNO"]


@dataclass(frozen=True)
class ReNO(Steering):
    """Noise optimisation.

    Attributes:
        iterations: gradient steps.
        optimizer: sgd (Nesterov, momentum .9; ReNO) or adamw (DNO).
        lr: learning rate.
        clip: largest norm of a sample's gradient.
        norm: weight of the norm term.
        probability: weight of DNO's probability term.
        piece: k of that term.
        orders: random orders per step of that term.
        over: start: the starting noise, ODE; all: every noise of the stochastic sampler (DNO).
        noise: of that sampler: a of the flow's SDE, η of DDIM.
        steps: of the sampler while climbing; 0 for those of the run. Otherwise the best noise is played by the run's.
        checkpoint: recompute the network in the backward pass: memory of one step, a forward pass more.
    """

    name: ClassVar[str] = "reno"
    summary: ClassVar[str] = "gradient ascent on the noise under several rewards (ReNO, DNO)"
    results: ClassVar[Literal["best", "last"]] = "last"
    reference: ClassVar[str] = """@inproceedings{eyring2024reno,
  title={ReNO: Enhancing One-step Text-to-Image Models through Reward-based Noise Optimization},
  author={Eyring, Luca and Karthik, Shyamgopal and Roth, Karsten and Dosovitskiy, Alexey and Akata, Zeynep},
  booktitle={Advances in Neural Information Processing Systems}, year={2024}, note={arXiv:2406.04312}}"""

    iterations: int = 50
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 5.0
    clip: float = 0.1
    norm: float = 0.01
    probability: float = 0.0
    piece: int = 4
    orders: int = 16
    over: Literal["start", "all"] = "start"
    noise: float = 1.0
    steps: int = 0
    checkpoint: bool = True

    def __post_init__(self) -> None:
        if min(self.iterations, self.piece, self.orders) < 1 or self.lr <= 0 or self.clip <= 0 or self.steps < 0:
            raise ValueError(f"need iterations, piece, orders >= 1, lr, clip > 0, steps >= 0; got {self}.")
        if self.norm < 0 or self.probability < 0:
            raise ValueError(f"penalties must not be negative; got {self.norm} and {self.probability}.")
        if self.over == "all" and self.noise <= 0:
            raise ValueError(
                f"over='all' moves the noises that a stochastic sampler draws, and noise = {self.noise} draws none. "
                "Set noise=1 (DDIM) or .7 (flows), or over='start'."
            )

    def search(self, task: Task) -> Iterator[Candidates]:
        """Yield the best so far of every climb after each step.

        Raises:
            ValueError: for a reward without gradients, before any sampling.
            FloatingPointError: for a gradient that is not finite; what was found before was yielded.
        """
        if not task.judge.scorer.differentiable:
            blind = [n for n, r in task.judge.scorer.rewards.items() if not r.card.differentiable]
            raise ValueError(
                f"noise optimisation climbs the reward's gradient, and {', '.join(blind)} gives none. Use a search "
                "without gradients (noise-search, ttsnap, rbf), or differentiable rewards (see flowalign rewards)."
            )
        short = replace(task, times=task.pipeline.times(self.steps)) if self.steps else task
        climb = Climb(self, rows_of(short, per_sample=True))
        best: Candidates | None = None
        noises = {k: z.detach().clone() for k, z in climb.noises.items()}
        for i in range(self.iterations):
            found = climb.step(i)
            best, won = better(best, found)
            for level, z in climb.before.items():
                noises[level][won] = z[won]
            yield best
        if self.steps:
            task = replace(task, times=task.pipeline.times(len(task.times) - 1))  # adapters remember the last grid
            yield play(rows_of(task, per_sample=True), noises[START], torch.arange(len(best.row)))  # type: ignore[union-attr]

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return ReNO's and DNO's published settings, and the demo's."""
        one = FitOptions(steps=1, size=1)
        dno = cls(100, "adamw", 0.01, 1.0, 0.0, 0.0, over="all", orders=100)
        return {
            "published": Preset(cls(), one, note="sd-turbo, one step; rewards hpsv2:5,imagereward:1,clip:.01,..."),
            "published-dno": Preset(dno, FitOptions(steps=50, size=1), note="SD 1.5, DDIM η = 1. Not run here."),
            "demo": Preset(cls(20), FitOptions(steps=4, size=4), guidance=False, note="shapes."),
        }  # fmt: skip


class Climb:
    """One gradient ascent per row, in one batch.

    Args:
        method: its settings.
        rows: one per climb.

    Attributes:
        noises: level → standard normal at the start, ``(R, *shape)``; they move.
        before: the noises that the candidates of the last step came from.
    """

    def __init__(self, method: ReNO, rows: Rows) -> None:
        self.method, self.rows, task = method, rows, rows.task
        self.row = torch.arange(len(rows.prompt))
        shape = task.pipeline.shape(task.judge.cond)
        last = len(task.times) - 1
        self.kernel: Kernel = EulerMaruyama()
        if method.over == "all":
            self.kernel = noisy_kernel(task.policy.process, method.noise)
        drawn = [k for k in range(last) if self.kernel.stochastic(float(task.times[k]), float(task.times[k + 1]))]
        self.noises = {
            k: rows.noise.normal(k, self.row, ranks(self.row), shape).requires_grad_() for k in (START, *drawn)
        }  # fmt: skip
        self.before: dict[int, Tensor] = {}
        z = list(self.noises.values())
        if method.optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(z, lr=method.lr, momentum=0.9, nesterov=True)
        else:
            self.optimizer = torch.optim.AdamW(z, lr=method.lr)

    def step(self, number: int) -> Candidates:
        """Play the noises, then move them; return what they gave."""
        self.before = {k: z.detach().clone() for k, z in self.noises.items()}
        found, reward = self.play()
        loss = (self.penalty(number) - reward).sum()
        # one product with the network's Jacobian per step and sample
        self.rows.task.policy.ledger.gradients += len(self.row) * (len(self.rows.task.times) - 1)
        grads = torch.autograd.grad(loss, list(self.noises.values()))
        norm = torch.stack([g.flatten(1).double().norm(dim=1) for g in grads]).norm(dim=0)
        if not torch.isfinite(norm).all():
            bad = (~torch.isfinite(norm)).nonzero().flatten().tolist()
            raise FloatingPointError(
                f"the gradient of the noise is not finite in step {number} for {len(bad)} of {len(norm)} samples (the "
                f"first is sample {bad[0]}): a reward or a precision overflows. Use fp32 or bf16, or fewer steps."
            )
        scale = (self.method.clip / norm.clamp_min(1e-12)).clamp_max(1.0)
        for z, g in zip(self.noises.values(), grads, strict=True):
            z.grad = g * scale.to(g).reshape(-1, *[1] * (g.ndim - 1))
        self.optimizer.step()
        return found

    def play(self) -> tuple[Candidates, Tensor]:
        """Return what the noises give, and its reward with a graph."""
        task, rows = self.rows.task, self.rows
        with torch.enable_grad():
            x = task.pipeline.start(self.noises[START], float(task.times[0]), rows.cond)
            tree = rollout(
                task.policy, self.kernel, task.times, Nodes.enter(x, self.row), rows.cond,
                noise=Given(self.noises, rows.noise), n_rows=len(self.row), tape=Tape(0, self.method.checkpoint),
            )  # fmt: skip
            leaves = tree.leaves.x
            scores = task.judge(leaves, rows.prompt)
            reward = torch.stack([task.judge.scorer.weights[k] * r for k, r in scores.items()]).sum(0)
        kept = {k: r.detach() for k, r in scores.items()}
        return Candidates(leaves.detach(), rows.prompt, kept, reward.detach(), torch.zeros(len(self.row))), reward

    def penalty(self, number: int) -> Tensor:
        """Return the regularisers of each climb, ``(R,)``."""
        m = self.method
        z = torch.cat([v.flatten(1) for v in self.noises.values()], 1)
        out = z.new_zeros(len(z))
        if m.norm:
            out = out + m.norm * torch.stack([norm_penalty(v) for v in self.noises.values()]).sum(0)
        if m.probability:
            g = torch.Generator().manual_seed(mix(self.rows.noise.seed, number, 17))
            orders = torch.stack([torch.randperm(z.shape[1], generator=g) for _ in range(m.orders)])
            out = out + m.probability * probability_penalty(z, m.piece, orders.to(z.device))
        return out
