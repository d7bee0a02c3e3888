"""Feynman-Kac correctors: exact annealing, products and guidance of generators (Skreta et al. 2503.02819).

Classifier-free guidance adds scores, and no distribution has the sum as its score at every time: guided samples follow
no product of anything. The weights below put that right. Target at every time, for experts q_i (one network under
different prompts) with exponents β_i:

    π_t(x) ∝ Π_i q_{i,t}(x)^{β_i}        guidance: q_∅^{1-w} q_c^w     annealing: q_c^β     product: q_a^β q_b^β

Where the sampler reverses the forward process (memoryless noise: g² = 2 σ W/α, DDIM with η = 1), an expert's step is
``p_i(x_s | x_t) = q_{i,s}(x_s) F(x_t | x_s) / q_{i,t}(x_t)`` with one and the same forward law F. The importance weight
against the kernel K that one samples from, with F as the backward kernel, is therefore

    w(x_t, x_s) = Π_i p_i(x_s | x_t)^{β_i} F(x_t | x_s)^{1 - Σβ} / K(x_s | x_t)

All factors are Gaussian in x_s. Taking their normalised product as K leaves the normaliser, which depends on x_t alone:
particles are weighted *before* they step. For β = (1 - w, w) it is ``w (w - 1) |m_c - m_∅|² / 2 std²``, the paper's
``½ g² w (w - 1) |s_c - s_∅|² dt`` without its limit of small steps and without singular times. With exact steps
``E[Ẑ] = Z``, the mass of the product, for any number of particles; with the sampler's steps up to their own error, of
which a part stays, however many there are, where Σβ is not 1: the outermost steps have the wrong variance at any step
length (docs/steering.md). With less noise than the memoryless (a = .7) the identity does not hold at all, so the noise
is no setting here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from flowalign.gaussian import Gaussian, per_sample, sum_dims
from flowalign.kernels import Ancestral, EulerMaruyama, Kernel
from flowalign.laws import Ddim, Memoryless
from flowalign.ledger import Ledger
from flowalign.methods.base import Candidates, Preset, Steering, Task
from flowalign.methods.particles import Rows, finish, roll, rows_of
from flowalign.options import FitOptions
from flowalign.policy import Policy
from flowalign.potentials import Potential
from flowalign.process import Posterior, Process, Rectified, Time
from flowalign.selection import Resample
from flowalign.values import Value

__all__ = ["FKC", "Blend", "Corrected", "Corrector", "Experts", "Product"]

LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Blend(Posterior):
    """The posteriors of several experts at the same states; as a posterior, their weighted sum.

    Attributes:
        parts: ``(β, posterior)`` of each expert.
    """

    parts: tuple[tuple[float, Posterior], ...] = ()


class Experts:
    """A denoiser made of one policy under several conditions.

    Args:
        policy: evaluates, and books.
        conds: condition by row, of each expert; the first is that of the rollout.
        powers: β of each.
    """

    def __init__(self, policy: Policy, conds: tuple[Any, ...], powers: tuple[float, ...]) -> None:
        self.policy, self.conds, self.powers = policy, conds, powers
        self.row: Tensor | None = None

    @property
    def process(self) -> Process:
        """The noising process."""
        return self.policy.process

    def posterior(self, x: Tensor, t: Time, cond: Any) -> Blend:
        """Ask the network once for each expert; ``cond`` is the rows' numbers."""
        parts = tuple(
            (b, self.policy.posterior(x, t, None if c is None else c[cond]))
            for b, c in zip(self.powers, self.conds, strict=True)
        )
        x0, eps = (sum(b * getattr(p, k) for b, p in parts) / sum(self.powers) for k in ("x0", "eps"))
        return Blend(x0, eps, self.process, t, None, None, parts)


@dataclass(frozen=True)
class Product(Kernel):
    """The normalised product of the experts' steps (and of the forward law, where the powers do not sum to one).

    Attributes:
        inner: a stochastic kernel.
    """

    inner: Kernel

    def factors(self, x: Tensor, posterior: Blend, t: Time, s: Time) -> tuple[Gaussian, Tensor]:
        """Return the product's law and its log normaliser ``(B,)``, the weight of a particle that is about to step.

        Raises:
            ValueError: for a product that cannot be normalised: the experts that are divided by are too narrow.
        """
        laws = [(b, self.inner(x, p, t, s)[0]) for b, p in posterior.parts]
        total = sum(b for b, _ in laws)
        if not all(bool((law.std > 0).all()) for _, law in laws):
            # a step without noise has no weight: it goes to the weighted mean of where the experts go
            mean = torch.stack([b * law.mean for b, law in laws]).sum(0) / total
            return Gaussian(mean, laws[0][1].std), x.new_zeros(len(x))
        # natural parameters of Σ β log N(m, std²) as a function of x_s: -½ a x² + h x - ½ c
        a = torch.stack([b / law.std.expand_as(x) ** 2 for b, law in laws]).sum(0)
        h = torch.stack([b * law.mean / law.std**2 for b, law in laws]).sum(0)
        c = torch.stack([b * (law.mean**2 / law.std**2 + LOG_2PI + 2 * law.std.log()) for b, law in laws]).sum(0)
        (alpha_s, sig_s), (alpha_t, sig_t) = posterior.process(s), posterior.process(t)
        if abs(total - 1) > 1e-9 and bool((alpha_t > 0).all()):
            r = per_sample(alpha_t / alpha_s, x)
            var = per_sample(sig_t**2 - (alpha_t / alpha_s * sig_s) ** 2, x)
            a, h = a + (1 - total) * r**2 / var, h + (1 - total) * r * x / var
            c = c + (1 - total) * (x**2 / var + LOG_2PI + var.log())
        if not bool((a > 0).all()):
            raise ValueError(
                f"the product of the experts with powers {[b for b, _ in laws]} has no mass that can be normalised at "
                f"t = {float(torch.as_tensor(t).max()):.3g}. Take powers that sum to more, or more steps."
            )
        return Gaussian(h / a, a.rsqrt()), sum_dims(0.5 * (h**2 / a - c + LOG_2PI - a.log()))

    def __call__(
        self, x: Tensor, posterior: Posterior, t: Time, s: Time, carry: Any = None
    ) -> tuple[Gaussian, Any]:  # fmt: skip
        """Return the product's law."""
        assert isinstance(posterior, Blend)
        return self.factors(x, posterior, t, s)[0], None

    def stochastic(self, t: float, s: float) -> bool:
        """Return the inner kernel's answer."""
        return self.inner.stochastic(t, s)


@dataclass(frozen=True)
class Corrector(Value):
    """The log-weight that a particle gains at its next step; at data time the reward, where there is one.

    Attributes:
        kernel: the product.
        times: of the sampler.
        rows: judge the finished samples.
        scale: λ of the reward; 0 for no reward in the target.
    """

    kernel: Product
    times: Tensor
    rows: Rows | None = None
    scale: float = 0.0

    def __call__(self, x: Tensor, posterior: Posterior, t: Time, row: Tensor) -> Tensor:
        """Return ``(B,)`` log-weights."""
        if not isinstance(posterior, Blend):  # data time
            reward = x.new_zeros(len(x)) if self.rows is None else self.rows.score(x, row).to(x)
            return self.scale * reward
        k = int((self.times - float(torch.as_tensor(t))).abs().argmin())
        log_w = self.kernel.factors(x, posterior, t, float(self.times[k + 1]))[1]
        total = sum(b for b, _ in posterior.parts)
        if k == 0 and bool((posterior.process(t)[0] > 0).all()):
            # particles start from the normalised power of the noise: its mass, ∫ N(0, 1)^β
            log_w = log_w + x[0].numel() * 0.5 * ((1 - total) * LOG_2PI - math.log(total))
        return log_w


@dataclass(frozen=True)
class Corrected(Potential):
    """Weights that add up along a lineage: what the value says at each level is what is gained there."""

    def __call__(
        self, level: int, t: float, value: Tensor, trace: Any, log_w: Tensor, row: Tensor, n_rows: int, last: bool
    ) -> tuple[Tensor, Any]:
        """Return the value: nothing telescopes, and nothing is left to complete."""
        return value.detach(), None

    def gain(
        self, t: float, value: Tensor, own: Any, total: Tensor, log_w: Tensor, row: Tensor, n_rows: int
    ) -> tuple[Tensor, Any]:
        """Return the value."""
        return value, None


def reversal(process: Process) -> Kernel:
    """Return the kernel that reverses the forward process."""
    return EulerMaruyama(Memoryless()) if isinstance(process, Rectified) else Ancestral(Ddim(1.0))


@dataclass(frozen=True)
class FKC(Steering):
    """Feynman-Kac correctors.

    Attributes:
        target: guidance (``q_∅^{1-w} q_c^w``), anneal (``q_c^w``), or product (``q_c^w q_other^w``).
        weight: w.
        other: the prompt of the other expert: the negative prompt of guidance, the second one of a product.
        scale: λ of the reward in the target, ``π exp(λ r)``, weighted in at the end; 0 leaves it out.
        particles: per wanted result.
        scheme: of resampling.
        threshold: resample where the ESS is below this part of the particles.
        correct: whether to weight; False is plain guidance, for comparison.
    """

    name: ClassVar[str] = "fkc"
    summary: ClassVar[str] = "exact guidance, annealing and products of prompts by Feynman-Kac corrector weights"
    results: ClassVar[Literal["best", "last"]] = "last"
    reference: ClassVar[str] = """@inproceedings{skreta2025fkc,
  title={Feynman-Kac Correctors in Diffusion: Annealing, Guidance, and Product of Experts},
  author={Skreta, Marta and Akhound-Sadegh, Tara and Ohanesian, Viktor and Bondesan, Roberto and Aspuru-Guzik, Al{\\'a}n
          and Doucet, Arnaud and Brekelmans, Rob and Tong, Alexander and Neklyudov, Kirill},
  booktitle={International Conference on Machine Learning}, year={2025}, note={arXiv:2503.02819}}"""

    target: Literal["guidance", "anneal", "product"] = "guidance"
    weight: float = 2.0
    other: str = ""
    scale: float = 0.0
    particles: int = 8
    scheme: Literal["systematic", "stratified", "multinomial", "residual", "ssp"] = "systematic"
    threshold: float = 0.5
    correct: bool = True

    def __post_init__(self) -> None:
        if self.particles < 2 or not self.weight > 0:
            raise ValueError(f"need particles >= 2 and weight > 0; got {self.particles} and {self.weight}.")

    def search(self, task: Task) -> Iterator[Candidates]:
        """Yield the weighted particles of all prompts.

        Raises:
            ValueError: for a product without a second prompt.
        """
        if self.target == "product" and not self.other:
            raise ValueError("a product needs the second prompt: set other.")
        rows = rows_of(task, per_sample=False)
        experts = self.experts(task, rows)
        kernel = Product(reversal(task.policy.process))
        start = rows.enter(self.particles * int(task.draw.samples.max()))
        start = replace(start, x=start.x * sum(experts.powers) ** -0.5)  # the noise's own power: N(0, 1)^β is N(0, 1/β)
        tree = roll(
            # the experts book on the task's ledger themselves, once for each of them
            replace(rows, cond=torch.arange(len(rows.prompt))), kernel, start, policy=Policy(experts, ledger=Ledger()),
            value=Corrector(kernel, task.times, rows, self.scale) if self.correct else None,
            potential=Corrected() if self.correct else None,
            select=Resample(self.scheme, self.threshold) if self.correct else None,
        )  # fmt: skip
        # where the powers do not add up to one, a sampler's steps, which are not the exact reverse kernel, leave an
        # error in the evidence of which finer steps remove only a part (docs/steering.md): then none is given
        known = self.correct and math.isclose(sum(experts.powers), 1.0)
        yield replace(finish(rows, tree), log_z=tree.log_evidence() if known else None)

    def experts(self, task: Task, rows: Rows) -> Experts:
        """Return the network under its prompts, with their powers."""
        w = self.weight
        if self.target == "anneal":
            return Experts(task.policy, (rows.cond,), (w,))
        texts = [self.other] * len(task.draw.prompts)
        other = task.pipeline.encode(texts, task.draw.meta)[rows.prompt]
        return Experts(task.policy, (rows.cond, other), (w, 1 - w) if self.target == "guidance" else (w, w))

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return settings near the paper's for SDXL, and the demo's."""
        return {
            "published": Preset(
                cls(weight=7.5), FitOptions(steps=100, size=1), guidance=False,
                note="SDXL, guidance 7.5, DDIM η = 1, 8 particles; read from the paper's abstract. Not run here.",
            ),
            "demo": Preset(cls(weight=1.5), FitOptions(steps=10, size=2), guidance=False, note="shapes."),
        }  # fmt: skip
