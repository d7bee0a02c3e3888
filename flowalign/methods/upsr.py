"""Uncertainty-guided noise for super-resolution: little noise where the answer is plain (UPSR, 2503.18512).

    ψ = |g(y) - y↑|,    w = b + (1 - b) min(ψ / ψ_max, 1)                       y↑ the enlarged picture, g a first guess
    start at t         x_t = α_t g(y) + σ_t w ε                                 variance (σ_t w)² at each position
    step from t to s   std w g(t) √(t - s), drift coupled to it:  the marginals of the process are kept for any map

Flat regions agree with their enlargement and keep what the picture already says; edges and textures get noise to be
made from. The guess is the model's own posterior mean at pure noise, E[x0 | y]: the least-squares answer, one network
evaluation. All of it happens in the space of the states (pixels, latents, tokens), whatever their layout.

UPSR trains its network under this noise. Here the network is one that was trained with the same noise everywhere, so a
start below t = 1 with w < 1 shows it less noise than its time says; steps from t = 1 have no such gap.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flowalign.gaussian import per_sample
from flowalign.kernels import Ancestral, EulerMaruyama, Kernel
from flowalign.laws import Ddim, FlowGrpo, Spatial
from flowalign.methods.base import Candidates, Preset, Steering, Task
from flowalign.methods.particles import Rows, finish, rows_of
from flowalign.noise import START, Noise, mix
from flowalign.options import FitOptions
from flowalign.process import Process, Rectified
from flowalign.rollout import rollout
from flowalign.trajectory import Nodes, ranks

__all__ = ["UPSR", "spatial_kernel", "weight"]


def weight(guess: Tensor, low: Tensor, psi: float, floor: float) -> Tensor:
    """Return ``w`` in ``[floor, 1]``, of the shape of the guess ``(B, *)``."""
    return floor + (1 - floor) * ((guess - low).abs() / psi).clamp(0, 1)


def spatial_kernel(process: Process, noise: float, w: Tensor) -> Kernel:
    """Return the stochastic sampler whose noise is scaled by ``w (B, *)``; the ODE for no noise."""
    if noise == 0:
        return EulerMaruyama()
    if isinstance(process, Rectified):
        return EulerMaruyama(Spatial(FlowGrpo(noise), w))
    return Ancestral(Spatial(Ddim(noise), w))


@dataclass(frozen=True)
class UPSR(Steering):
    """Uncertainty-guided noise.

    Attributes:
        psi: difference at which the noise is full, in units of the states; published .1 of the pixels' range.
        floor: b: the share of noise where nothing differs; published .4. 1 is the same noise everywhere.
        start: time to start at; 1 for pure noise. Below it the start is the guess under spatial noise.
        noise: of the sampler: 0 for the ODE, else a of the flow's SDE, η of DDIM; scaled by the map.
        n: candidates per wanted result.
        even: spread each picture's noise evenly, at the mean of its map: the control that the map is measured against.
    """

    name: ClassVar[str] = "upsr"
    summary: ClassVar[str] = "super-resolution: noise by position, little where the enlarged picture is certain"
    reference: ClassVar[str] = """@inproceedings{zhang2025upsr,
  title={Uncertainty-guided Perturbation for Image Super-Resolution Diffusion Model},
  author={Zhang, Leheng and You, Weiyi and Shi, Kexuan and Gu, Shuhang},
  booktitle={Conference on Computer Vision and Pattern Recognition}, year={2025}, note={arXiv:2503.18512}}"""

    psi: float = 0.1
    floor: float = 0.4
    start: float = 0.6
    noise: float = 0.0
    n: int = 1
    even: bool = False

    def __post_init__(self) -> None:
        if self.psi <= 0 or not 0 < self.floor <= 1 or not 0 < self.start <= 1 or self.n < 1 or self.noise < 0:
            raise ValueError(f"need psi > 0, floor and start in (0, 1], noise >= 0, n >= 1; got {self}.")
        if self.start == 1 and self.noise == 0:
            raise ValueError("start=1 with noise=0 leaves no noise to shape: lower start, or set noise (.7 for flows).")

    def search(self, task: Task) -> Iterator[Candidates]:
        """Yield one sample per wanted result, n times: a budget ends the search between them.

        Raises:
            ValueError: for rows without a picture to enlarge.
        """
        rows = rows_of(task, per_sample=False)
        with torch.no_grad():
            guess, low = self._guess(rows), enlarged(task)
            w = weight(guess, low.to(guess), self.psi, self.floor)
            if self.even:
                w = w.mean(tuple(range(1, w.ndim)), keepdim=True).expand_as(w)
        row = torch.arange(len(rows.prompt)).repeat_interleave(task.draw.samples)
        for i in range(self.n):
            with torch.no_grad():
                drawn = rows_of(task, per_sample=False, seed=mix(task.seed, i, 43))
                level, nodes = self.enter(drawn, guess, w, row)
                kernel = spatial_kernel(task.policy.process, self.noise, w[row.to(w.device)])
                tree = rollout(
                    task.policy,
                    kernel,
                    task.times[level:],
                    nodes,
                    rows.cond,
                    noise=drawn.noise,
                    n_rows=len(rows.prompt),
                )
                found = finish(drawn, tree)
            yield found

    def enter(self, rows: Rows, guess: Tensor, w: Tensor, row: Tensor) -> tuple[int, Nodes]:
        """Return the level that is started at, and the states there, one for each entry of ``row``."""
        task, times = rows.task, rows.task.times
        level = min(int((times > self.start + 1e-9).sum()), len(times) - 2)
        z = rows.noise.normal(START, row, ranks(row), task.pipeline.shape(task.judge.cond)).to(guess)
        if level == 0:
            return 0, Nodes.enter(task.pipeline.start(z, float(times[0]), rows.cond[row]), row)
        alpha, sigma = (per_sample(c, guess) for c in task.policy.process(float(times[level])))
        of = row.to(guess.device)
        return level, Nodes.enter(alpha * guess[of] + sigma * w[of] * z, row)

    def _guess(self, rows: Rows) -> Tensor:
        """Return the posterior mean of each row at pure noise."""
        task, row = rows.task, torch.arange(len(rows.prompt))
        noise = Noise(mix(rows.noise.seed, 41), rows.noise.keys)
        z = noise.normal(START, row, torch.zeros_like(row), task.pipeline.shape(task.judge.cond))
        t = float(task.times[0])
        return task.policy.posterior(task.pipeline.start(z, t, rows.cond), t, rows.cond).x0

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the published map on pixels, and the demo's on latents."""
        return {
            "published": Preset(
                cls(), FitOptions(steps=5, size=1), note="ψ_max = .1, b = .4, 5 steps; its network is not this one."
            ),
            "demo": Preset(cls(psi=0.5), FitOptions(steps=10, size=4), guidance=False, note="shapes-sr, on latents."),
        }


def enlarged(task: Task) -> Tensor:
    """Return the clean states of the pictures that are to be made sharp, ``(P, *shape)``.

    Raises:
        ValueError: where a prompt comes without its picture.
    """
    # a stock pipeline may want its control_image in [-1, 1]: where both are given, image is the picture
    pictures = [m.get("image", m.get("control_image")) for m in task.draw.meta]
    missing = [i for i, p in enumerate(pictures) if not isinstance(p, Tensor)]
    if missing:
        raise ValueError(
            f"super-resolution needs every prompt's enlarged picture, a (3, H, W) or (1, 3, H, W) tensor in [0, 1] "
            f"under image or control_image of its meta; prompt {missing[0]} has none. Pass Prompt(text, meta={{...}})."
        )
    # a pipeline may want them as batches of one
    media = torch.stack([p.reshape(p.shape[-3:]) for p in pictures if isinstance(p, Tensor)])
    return task.pipeline.latents(media.to(torch.float32), task.judge.cond)
