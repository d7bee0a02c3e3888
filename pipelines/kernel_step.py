"""One step of a kernel inside a diffusers scheduler: read the network's output, draw, record.

Each step leaves a :class:`StepRecord` with mean, std, noise and log-probability in ``scheduler.trace``.

Most flow pipelines do not hand their ``generator`` to ``step``. The noise is therefore a pure function of the first
sample of the call (per sample: its bytes, hashed) and the number of the step: the pipeline draws that first sample from
``generator``, so the whole call is reproducible from it, and a sample does not depend on its neighbours in the batch. A
generator that does arrive at ``step`` is used instead.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from flowalign.kernels import Ancestral, EulerMaruyama, Kernel
from flowalign.laws import Consistency, Constant, Cps, Ddim, FlowGrpo, Memoryless, Ode
from flowalign.noise import mix
from flowalign.pipelines.convention import Convention

__all__ = ["KERNELS", "Sampler", "StepOutput", "StepRecord", "kernel_of"]

KERNELS = ("ode", "flow_grpo", "constant", "memoryless", "cps", "ddim", "consistency")


def kernel_of(name: str, level: float) -> Kernel:
    """Return the kernel of a name and its noise level (a, η; memoryless and consistency have none).

    Raises:
        ValueError: for an unknown name or a negative level.
    """
    if level < 0:
        raise ValueError(f"the noise level of a kernel must not be negative; got {level}.")
    table: dict[str, Kernel] = {
        "ode": EulerMaruyama(Ode()),
        "flow_grpo": EulerMaruyama(FlowGrpo(level)),
        "constant": EulerMaruyama(Constant(level)),
        "memoryless": EulerMaruyama(Memoryless()),
        "cps": Ancestral(Cps(level)),
        "ddim": Ancestral(Ddim(level)),
        "consistency": Ancestral(Consistency()),
    }
    if name not in table:
        raise ValueError(f"there is no kernel {name!r} among {', '.join(KERNELS)}.")
    return table[name]


@dataclass(frozen=True)
class StepRecord:
    """One step of the last call: ``prev_sample = mean + std · noise``.

    Attributes:
        t, s: float times.
        mean, noise: ``(B, *)``.
        std: broadcastable to the mean; zero where the step is deterministic.
        log_prob: ``(B,)``, the log-density of the step; 0 where it is deterministic.
    """

    t: float
    s: float
    mean: Tensor
    std: Tensor
    noise: Tensor
    log_prob: Tensor


@dataclass
class StepOutput(BaseOutput):
    """What ``step`` returns: the next sample and its law."""

    prev_sample: Tensor
    pred_original_sample: Tensor
    mean: Tensor
    std: Tensor
    noise: Tensor
    log_prob: Tensor


class Sampler(ABC):
    """What a scheduler has beside diffusers' own; its ``set_timesteps`` calls ``_restart``, its ``step`` ``_take``."""

    config: Any
    timesteps: Tensor

    @abstractmethod
    def _convention(self) -> Convention:
        """Return how the network's output and the grid are to be read."""

    def _restart(self) -> None:
        """Read the grid; forget the call before."""
        self.law = kernel_of(self.config.kernel, self.config.level)
        self.reading = self._convention()
        self.times = tuple(self.reading.times(self).tolist())
        self.trace: list[StepRecord] = []
        self.roots: list[int] | None = None

    def _take(self, output: Tensor, timestep: Any, sample: Tensor, generator: Any) -> StepOutput:
        """Draw the next sample, and record the step."""
        at = self._place(timestep)
        if len(self.trace) > at:  # another call without set_timesteps in between
            self.trace, self.roots = [], None
        t, s = self.times[at], self.times[at + 1]
        if self.roots is None:
            self.roots = [_root(row) for row in sample]
        x = sample.float()
        posterior = self.reading.read(x, t, output)
        law, _ = self.law(x, posterior, t, s)
        noisy = self.law.stochastic(t, s)
        noise = self._noise(at, law.mean, generator) if noisy else torch.zeros_like(law.mean)
        drawn = law.sample(noise) if noisy else law.mean
        log_prob = law.log_prob(drawn) if noisy else drawn.new_zeros(len(drawn))
        self.trace.append(StepRecord(t, s, law.mean, law.std, noise, log_prob))
        return StepOutput(drawn.to(sample.dtype), posterior.x0, law.mean, law.std, noise, log_prob)

    def _place(self, timestep: Any) -> int:
        found = (self.timesteps == torch.as_tensor(timestep).to(self.timesteps)).nonzero().flatten()
        if not len(found):
            raise ValueError(f"timestep {float(timestep)} is not on the grid {self.timesteps.tolist()}.")
        return int(found[0])

    def _noise(self, at: int, like: Tensor, generator: Any) -> Tensor:
        from diffusers.utils.torch_utils import randn_tensor

        if generator is not None:
            return randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)
        assert self.roots is not None
        draws = [torch.Generator().manual_seed(mix(root, at)) for root in self.roots]
        return torch.stack([torch.randn(like.shape[1:], generator=g) for g in draws]).to(like)


def _root(row: Tensor) -> int:
    """Return a seed that depends on the content of one sample alone."""
    data = row.detach().float().cpu().contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "big")
