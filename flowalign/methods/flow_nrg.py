"""Flow-NRG: reward guidance inside the flow, by rewards that read noisy latents (Liu et al. 2501.13918, VideoAlign).

    v' = v - s_t² λ_t Σ_i w_i ∇_x r_i(x_t, t),    s_t² λ_t = σ_t (σ̇_t - σ_t α̇_t / α_t);  rectified flow: t / (1 - t)

after classifier-free guidance. In words: the gradient is added to the score. With ``w r = V_t``, the soft value
``log E[exp(λ r0) | x_t]``, this is the velocity of the tilted flow, exactly, at every time, for ODE and SDE. A reward
trained on clean media is no such function: it must be trained on noisy latents (VideoAlign issue 17 shows the coloured
noise that comes out otherwise). So every reward gets a latent value network of its own (:mod:`flowalign.valuenet`),
trained before the search on re-noised samples of the frozen generator by one of two losses:

    mean    (v - r)²                                    →  E[r | x_t], what the paper trains
    soft    exp(λ (r - v)) - λ (r - v) - 1              →  (1/λ) log E[exp(λ r) | x_t], whose gradient is the exact one

Several objectives are weighted as the rewards are: ``--reward a:2,b:0.5``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from flowalign.guidance import Along
from flowalign.kernels import EulerMaruyama, Kernel
from flowalign.methods.base import Candidates, Preset, Steering, Task
from flowalign.methods.particles import finish, noisy_kernel, roll, rows_of
from flowalign.noise import Noise, mix
from flowalign.options import FitOptions
from flowalign.process import Posterior, Time
from flowalign.rollout import rollout
from flowalign.value_file import LatentValues
from flowalign.valuenet import LatentValue, word_ids

__all__ = ["FlowNRG", "Objective", "pushed", "read_values", "teach"]

FieldOf = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, t (B,), row) -> (B,)
STATE = "values.safetensors"


@dataclass(frozen=True)
class Objective:
    """A reward of noisy states, in units of the reward, with its weight.

    Attributes:
        value: ``(x, t (B,), row) → (B,)``, differentiable in x.
        weight: λ w.
    """

    value: FieldOf
    weight: float


def pushed(objectives: list[Objective]) -> Callable[[Tensor, Posterior, Time, Tensor], Tensor]:
    """Return ``Σ_i w_i ∇_x r_i(x_t, t)`` as a guide's field."""

    def push(x: Tensor, posterior: Posterior, t: Time, row: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            at = torch.as_tensor(t, dtype=torch.float64).reshape(-1).expand(len(x))
            total = torch.stack([o.weight * o.value(leaf, at, row).sum() for o in objectives]).sum()
            (g,) = torch.autograd.grad(total, leaf)
        return g

    return push


def teach(
    network: nn.Module,
    x0: Tensor,
    reward: Tensor,
    words: Tensor,
    noised: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    steps: int,
    soft: float,
    lr: float = 1e-3,
    batch: int = 128,
    seed: int = 0,
) -> float:
    """Train a value network on clean states re-noised to all times; return the mean loss of the last tenth.

    Args:
        network: ``(x, t, words) → (B,)``, standardised rewards.
        x0: clean states ``(N, *)``.
        reward: standardised, ``(N,)``.
        words: of their prompts, ``(N, L)``.
        noised: ``(x0, t, noise) → x_t``.
        steps: optimiser steps.
        soft: λ times the standard deviation of the reward, for the soft loss; 0 for the mean.
        lr: learning rate.
        batch: states per step.
        seed: of times, noises and order.
    """
    g = torch.Generator().manual_seed(mix(seed, 700))
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    seen = []
    for i in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, 4 * (1 - i / steps))
        index = torch.randint(len(x0), (min(batch, len(x0)),), generator=g)
        t = (torch.randperm(len(index), generator=g) + torch.rand(len(index), generator=g)) / len(index)
        z = torch.randn(len(index), *x0.shape[1:], generator=g)
        at = index.to(x0.device)
        gap = reward[at] - network(noised(x0[at], t.double(), z), t.to(x0.device), words[at])
        # exp is linearised beyond 3: one outlier must not undo the rest
        u = soft * gap
        grown = torch.where(u < 3, u.clamp_max(3).exp(), 20.0855 * (1 + u - 3)) - u - 1
        loss = (grown / soft**2).mean() if soft else 0.5 * (gap**2).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        seen.append(loss.detach())
    return float(torch.stack(seen[-max(1, steps // 10) :]).mean())


@dataclass(frozen=True)
class FlowNRG(Steering):
    """Flow-NRG.

    Attributes:
        n: samples per wanted result; the best are kept.
        scale: λ, on top of the rewards' own weights.
        loss: what the value networks are trained to be: mean (published) or soft (exact).
        collect: samples per prompt that they are trained on.
        train: optimiser steps of each.
        width: of each.
        noise: of the sampler: 0 for the ODE, or a of the flow's SDE, η of DDIM.
        first: no guidance before this time of the noise: at pure noise every value is flat.
        save: where to write the values, for fk-steering's ``learned`` and ttsnap's ``aware``; "" for nowhere.
    """

    name: ClassVar[str] = "flow-nrg"
    summary: ClassVar[str] = "gradients of rewards on noisy latents added to the score, several objectives"
    reference: ClassVar[str] = """@article{liu2025videoalign,
  title={Improving Video Generation with Human Feedback},
  author={Liu, Jie and Liu, Gongye and Liang, Jiajun and Yuan, Ziyang and Liu, Xiaokun and Zheng, Mingwu and others},
  journal={arXiv preprint arXiv:2501.13918}, year={2025}}"""

    n: int = 1
    scale: float = 1.0
    loss: Literal["mean", "soft"] = "soft"
    collect: int = 32
    train: int = 400
    width: int = 64
    noise: float = 0.0
    first: float = 0.98
    save: str = ""

    def __post_init__(self) -> None:
        if self.n < 1 or self.collect < 2 or self.train < 1:
            raise ValueError(f"need n >= 1, collect >= 2, train >= 1; got {self.n}, {self.collect}, {self.train}.")

    def search(self, task: Task) -> Iterator[Candidates]:
        """Train the values, then yield guided samples."""
        rows = rows_of(task, per_sample=False)
        objectives = self.objectives(task)
        guide = Along(pushed(objectives), where="posterior", window=lambda t: t <= self.first)
        kernel: Kernel = EulerMaruyama() if not self.noise else noisy_kernel(task.policy.process, self.noise)
        with torch.no_grad():
            yield finish(rows, roll(rows, kernel, rows.enter(self.n * int(task.draw.samples.max())), guide=guide))

    def objectives(self, task: Task) -> list[Objective]:
        """Return one trained value for each reward, from the task's folder where they are there already."""
        weights = {k: self.scale * w for k, w in task.judge.scorer.weights.items() if w}
        path = None if task.folder is None else task.folder / STATE
        saved = LatentValues.load(path) if path is not None and path.is_file() else LatentValues({}, {})
        networks, scale = dict(saved.networks), dict(saved.scale)
        data = None if set(weights) <= set(networks) else self._data(task)
        words, shape = word_ids(task.draw.prompts), task.pipeline.shape(task.judge.cond)
        for name in (k for k in weights if k not in networks):
            assert data is not None
            x0, row, rewards = data
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                network = LatentValue(shape, self.width).to(x0.device)
            mean, std = float(rewards[name].mean()), max(float(rewards[name].std()), 1e-3)
            teach(
                network, x0, ((rewards[name] - mean) / std).to(x0.device), words[row].to(x0.device),
                task.policy.process.diffuse, steps=self.train, soft=weights[name] * std if self.loss == "soft" else 0.0,
                seed=task.seed,
            )  # fmt: skip
            networks[name], scale[name] = [network], (mean, std)
        values = LatentValues(networks, scale)
        for file in [p for p in (path, Path(self.save) if self.save else None) if p is not None]:
            values.save(file)
        return [Objective(values.of(name, words), weight) for name, weight in weights.items()]

    def _data(self, task: Task) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sample the frozen generator and judge: clean states, their rows, and every reward."""
        rows = rows_of(task, per_sample=False, seed=mix(task.seed, 71))
        with torch.no_grad():
            leaves = rollout(
                task.policy, EulerMaruyama(), task.times, rows.enter(self.collect), rows.cond,
                noise=Noise(mix(task.seed, 72), rows.noise.keys), n_rows=len(rows.prompt),
            ).leaves  # fmt: skip
            rewards = task.judge(leaves.x, leaves.row)
        return leaves.x.float(), leaves.row, {k: r.float().cpu() for k, r in rewards.items()}

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return settings near the published ones, and the demo's."""
        return {
            "published": Preset(
                cls(loss="mean", scale=100.0), FitOptions(steps=40, size=1),
                note="the repository holds no code of it: λ and steps are unverified. Not run here.",
            ),
            "demo": Preset(
                cls(scale=5.0, collect=16), FitOptions(steps=10, size=4), guidance=False, note="shapes: the ODE."
            ),
        }  # fmt: skip


def read_values(
    path: Path, weights: Mapping[str, float], shape: Sequence[int], prompts: Sequence[str]
) -> list[Objective]:
    """Return trained values of noisy states with the weights by which they make up the weighted reward.

    Args:
        path: of a file that this method wrote (``save``), or Euphonium (in a run's result).
        weights: of the rewards by name; those of weight 0 need no value.
        shape: of a state.
        prompts: by row.

    Raises:
        ValueError: for a file that is none, that lacks a reward, that reads posterior means (ttsnap's), or states of
            another shape.
    """
    saved = LatentValues.load(path)
    if saved.sees != "state":
        raise ValueError(
            f"{path} holds students of posterior means, for ttsnap's aware; values of noisy states wanted."
        )
    parts, words = saved.parts(weights), word_ids(prompts)
    was = saved.networks[next(iter(parts))][0].shape
    if was != tuple(shape):
        raise ValueError(f"{path} holds values of states {was}; these are {tuple(shape)}.")
    return [Objective(saved.of(name, words), weight) for name, weight in parts.items()]
