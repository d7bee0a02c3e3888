"""Closed-form worlds with their answers: the ground truth that the core is held to.

Everything is float64. A world is a ``Denoiser``, so it goes into ``Policy`` as it is. ``tests/test_worlds.py`` checks
each formula against quadrature, finite differences or autograd before another test relies on it.

    Normal      x0 ~ N(m, c²) in every coordinate: affine posterior, Gaussian reverse kernel, any state shape
    Mixture     x0 ~ Σ w_k N(m_k, C_k): posterior, score, reverse kernel, tilted target, log Z, value function
    chain       a kernel on a Normal is a linear-Gaussian chain: exact output law, exact log Z of the *sampler*, V_k
    Finite      a chain over n states: exact values and tilted law
    Net         a small network, for whatever must hold for a function that nobody knows
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowalign.gaussian import Gaussian
from flowalign.kernels import Ancestral, Kernel
from flowalign.laws import Ddim
from flowalign.noise import Stream
from flowalign.policy import Policy
from flowalign.process import Posterior, Process, Rectified, Time, VariancePreserving
from flowalign.rollout import rollout
from flowalign.trajectory import Nodes, Trajectory
from flowalign.values import Tweedie

F64 = torch.float64


def sd_alphas(n: int = 1000) -> Tensor:
    """Stable Diffusion's scaled-linear schedule, ``alphas_cumprod (n,)``."""
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, n, dtype=F64) ** 2, 0)


def stable_diffusion() -> VariancePreserving:
    """The process of SD 1.5 with its own final alpha (``set_alpha_to_one=False``)."""
    alphas = sd_alphas()
    return VariancePreserving.from_alphas_cumprod(alphas, final=float(alphas[0]))


def cosine(low: float = 0.0, high: float = 1.5) -> VariancePreserving:
    """A variance-preserving process whose angle is linear in time: smooth, unlike a table of alphas."""
    angle = torch.linspace(low, high, 101, dtype=F64)
    return VariancePreserving.from_alphas_cumprod(angle[1:].cos() ** 2, float(angle[0].cos() ** 2))


def column(value: Tensor | float, like: Tensor) -> Tensor:
    """Shape times or coefficients ``()`` or ``(B,)`` for broadcasting against states ``(B, *)``."""
    v = torch.as_tensor(value, dtype=F64)
    return v.reshape(-1, *[1] * (like.ndim - 1)) if v.ndim else v


# ---------------------------------------------------------------------------------------------------------------------
# rewards that are quadratic: -x'Px/2 + h'x + g


class Quad(NamedTuple):
    """``r(x) = -x'Px/2 + h'x + g`` with ``P (D, D)``, ``h (D,)``; linear where P = 0."""

    P: Tensor
    h: Tensor
    g: float = 0.0

    def __call__(self, x: Tensor, row: Tensor | None = None) -> Tensor:
        """Return the reward of ``x (B, D)``."""
        return -0.5 * ((x @ self.P) * x).sum(-1) + x @ self.h + self.g

    def times(self, scale: float) -> Quad:
        """Return λ r."""
        return Quad(self.P * scale, self.h * scale, self.g * scale)


def linear(*h: float) -> Quad:
    """A linear reward."""
    return Quad(torch.zeros(len(h), len(h), dtype=F64), torch.tensor(h, dtype=F64))


def log_mean_exp(q: Quad, m: Tensor, C: Tensor) -> Tensor:
    """``log E exp q(x)`` for ``x ~ N(m, C)``, ``m (..., D)``, ``C (..., D, D)``: steering.md E3, R = (I + PC)⁻¹."""
    eye = torch.eye(len(q.h), dtype=F64)
    R = torch.linalg.inv(eye + q.P @ C)
    _, logdet = torch.linalg.slogdet(eye + C @ q.P)
    Rh = R @ q.h
    curved = 0.5 * torch.einsum("...i,...ij,...j->...", m, R @ q.P, m)
    return q.g - 0.5 * logdet + 0.5 * torch.einsum("...i,...ij,j->...", Rh, C, q.h) + (Rh * m).sum(-1) - curved


def tilt(q: Quad, m: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of ``N(m, C) exp q``."""
    A = torch.linalg.inv(torch.eye(len(q.h), dtype=F64) + C @ q.P)
    return (A @ (m + C @ q.h)[..., None])[..., 0], A @ C


# ---------------------------------------------------------------------------------------------------------------------
# continuous worlds


@dataclass(frozen=True)
class Normal:
    """``x0 ~ N(mean, std²)`` in every coordinate, states of any shape."""

    mean: float = 0.7
    std: float = 0.5
    process: Process = Rectified()  # noqa: RUF009 - frozen

    def moments(self, t: Time) -> tuple[Tensor, Tensor]:
        """Mean and variance of ``x_t``."""
        a, s = self.process(t)
        return a * self.mean, a**2 * self.std**2 + s**2

    def posterior(self, x: Tensor, t: Time, cond: Any = None) -> Posterior:
        """The affine posterior."""
        a, s = self.process(t)
        mean, var = self.moments(t)
        gap = x.double() - column(mean, x)
        return Posterior(
            self.mean + column(a * self.std**2 / var, x) * gap, column(s / var, x) * gap, self.process, t
        )  # fmt: skip

    def spread(self, t: Time) -> Tensor:
        """Std of ``x0 | x_t``."""
        a, _ = self.process(t)
        return (self.std**2 - a**2 * self.std**4 / self.moments(t)[1]).sqrt()

    def start(self, noise: Tensor, t: float = 1.0) -> Tensor:
        """Exact draws of ``x_t``."""
        mean, var = self.moments(t)
        return mean + var.sqrt() * noise.double()


@dataclass(frozen=True)
class ExactReverse(Kernel):
    """``p(x_s | x_t)`` of a ``Normal``: no discretisation error, so every identity of steering holds to round-off."""

    world: Normal

    def __call__(
        self, x: Tensor, posterior: Posterior, t: Time, s: Time, carry: Any = None
    ) -> tuple[Gaussian, Any]:  # fmt: skip
        (m_t, v_t), (m_s, v_s) = self.world.moments(t), self.world.moments(s)
        r = self.world.process(t)[0] / self.world.process(s)[0]
        mean = column(m_s, x) + column(r * v_s / v_t, x) * (x - column(m_t, x))
        return Gaussian(mean, column((v_s - (r * v_s) ** 2 / v_t).clamp_min(0).sqrt(), x)), None

    def stochastic(self, t: float, s: float) -> bool:
        return True


@dataclass(frozen=True)
class Mixture:
    """``x0 ~ Σ_k w_k N(m_k, C_k)`` in D dimensions; states ``(B, D)``.

    Attributes:
        w: ``(K,)``, summing to one.
        m: ``(K, D)``.
        C: ``(K, D, D)``.
        process: any.
    """

    w: Tensor
    m: Tensor
    C: Tensor
    process: Process = Rectified()  # noqa: RUF009 - frozen

    def _coefficients(self, t: Time) -> tuple[Tensor, Tensor]:
        a, s = self.process(t)
        return a.reshape(-1, 1, 1, 1), s.reshape(-1, 1, 1, 1)

    def _parts(self, x: Tensor, t: Time) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Component log-densities of x_t, whitened gaps S⁻¹(x - a m), S and a."""
        a, s = self._coefficients(t)
        S = a**2 * self.C + s**2 * torch.eye(self.m.shape[1], dtype=F64)  # (1 | B, K, D, D)
        gap = x.double()[:, None] - a[..., 0] * self.m
        white = torch.linalg.solve(S, gap[..., None])[..., 0]
        dim = self.m.shape[1]
        log_p = -0.5 * (gap * white).sum(-1) - 0.5 * torch.logdet(S) - 0.5 * dim * math.log(2 * math.pi)
        return self.w.log() + log_p, white, S, a

    def log_prob(self, x: Tensor, t: Time) -> Tensor:
        """``log p_t(x)``, ``(B,)``."""
        return self._parts(x, t)[0].logsumexp(1)

    def components(self, x: Tensor, t: Time) -> tuple[Tensor, Tensor, Tensor]:
        """``p(x0 | x_t)`` as ``log γ (B, K)``, ``μ (B, K, D)``, ``Σ (1 | B, K, D, D)`` (E2)."""
        log_p, white, S, a = self._parts(x, t)
        aC = a * self.C
        mu = self.m + (aC @ white[..., None])[..., 0]
        return log_p.log_softmax(1), mu, self.C - aC @ torch.linalg.solve(S, aC)

    def posterior(self, x: Tensor, t: Time, cond: Any = None) -> Posterior:
        """``E[x0|x]``, ``E[ε|x]``: from the score, so that both exist where σ or α is 0."""
        log_p, white, _, _ = self._parts(x, t)
        _, s = self._coefficients(t)
        gamma = log_p.softmax(1)[..., None]
        _, mu, _ = self.components(x, t)
        return Posterior((gamma * mu).sum(1), s[..., 0, 0] * (gamma * white).sum(1), self.process, t)

    def reverse(self, x: Tensor, t: float, s: float) -> tuple[Tensor, Tensor, Tensor]:
        """``p(x_s | x_t)``: log-weights, means and covariances of its components (E7)."""
        (a_s, sig_s), (a_t, sig_t) = self.process(s), self.process(t)
        r = a_t / a_s
        eye = torch.eye(self.m.shape[1], dtype=F64)
        V_s, V_t = a_s**2 * self.C + sig_s**2 * eye, a_t**2 * self.C + sig_t**2 * eye
        gain = r * V_s @ torch.linalg.inv(V_t)
        mean = a_s * self.m + (gain @ (x[:, None] - a_t * self.m)[..., None])[..., 0]
        return self._parts(x, t)[0].log_softmax(1), mean, V_s - gain @ (r * V_s)

    def tilted(self, q: Quad) -> tuple[Mixture, Tensor]:
        """``p exp(q) / Z`` and ``log Z`` (E4)."""
        logits = self.w.log() + log_mean_exp(q, self.m, self.C)
        m, C = tilt(q, self.m, self.C)
        return Mixture(logits.softmax(0), m, C, self.process), logits.logsumexp(0)

    def value(self, q: Quad, x: Tensor, t: Time) -> Tensor:
        """``V_t(x) = log E[exp q(x0) | x_t = x]`` (E5)."""
        gamma, mu, Sigma = self.components(x, t)
        return (gamma + log_mean_exp(q, mu, Sigma)).logsumexp(1)

    def mean(self) -> Tensor:
        """``E[x0]``, ``(D,)``."""
        return self.w @ self.m

    def kl(self, q: Quad) -> Tensor:
        """``KL(tilted || prior) = E_tilted[q] - log Z`` (E4)."""
        target, log_z = self.tilted(q)
        second = target.C + target.m[:, :, None] * target.m[:, None]
        value = -0.5 * (second * q.P).sum((1, 2)) + target.m @ q.h + q.g
        return target.w @ value - log_z

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` samples of x0."""
        k = torch.multinomial(self.w, n, True, generator=generator)
        z = torch.randn(n, self.m.shape[1], dtype=F64, generator=generator)
        return self.m[k] + (torch.linalg.cholesky(self.C)[k] @ z[..., None])[..., 0]


def two_modes(process: Process | None = None) -> Mixture:
    """A mixture of two, in one dimension."""
    return Mixture(
        torch.tensor([0.7, 0.3], dtype=F64), torch.tensor([[-1.0], [1.5]], dtype=F64),
        torch.tensor([[[0.25]], [[0.16]]], dtype=F64), process or Rectified(),
    )  # fmt: skip


def plane(process: Process | None = None) -> Mixture:
    """A mixture of three correlated Gaussians in the plane."""
    C = torch.tensor([[[0.4, 0.1], [0.1, 0.2]], [[0.3, -0.12], [-0.12, 0.25]], [[0.2, 0.0], [0.0, 0.5]]], dtype=F64)
    m = torch.tensor([[1.0, 0.5], [-1.2, 0.8], [0.3, -1.5]], dtype=F64)
    return Mixture(torch.tensor([0.5, 0.3, 0.2], dtype=F64), m, C, process or Rectified())


def multimodal(quads: list[Quad]) -> Any:
    """``r(x) = log Σ_j exp q_j(x)`` (E9): every formula of a quadratic holds after a logsumexp over j."""
    return lambda x: torch.stack([q(x) for q in quads]).logsumexp(0)


# ---------------------------------------------------------------------------------------------------------------------
# a kernel on a Normal is a linear-Gaussian chain


class Link(NamedTuple):
    """``x_{k+1} ~ N(A x_k + b, std²)``."""

    A: Tensor
    b: Tensor
    std: Tensor


def chain(world: Normal, kernel: Kernel, times: Tensor) -> list[Link]:
    """Read the affine maps off the kernel itself, by probing every step at two states (kernels without memory)."""
    start, end = times[:-1], times[1:]
    low, high = torch.zeros(len(start), 1, dtype=F64), torch.ones(len(start), 1, dtype=F64)
    a, b = (kernel(x, world.posterior(x, start), start, end)[0] for x in (low, high))
    slope, offset, std = b.mean - a.mean, a.mean, a.std.expand_as(low)
    return [Link(*parts) for parts in zip(slope[:, 0], offset[:, 0], std[:, 0], strict=True)]


def output(world: Normal, links: list[Link], t: float) -> tuple[Tensor, Tensor]:
    """Exact mean and variance at the end of a chain that starts from the exact marginal at t."""
    mean, var = world.moments(t)
    for A, b, std in links:
        mean, var = A * mean + b, A**2 * var + std**2
    return mean, var


def path_output(world: Normal, kernel: Kernel, times: Tensor) -> tuple[Tensor, Tensor]:
    """The same for a deterministic kernel with memory: the mean and the one-sigma point are two solutions."""
    mean, var = world.moments(float(times[0]))
    x, carry = torch.stack([mean, mean + var.sqrt()])[:, None], None
    for t, s in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        law, carry = kernel(x, world.posterior(x, t), t, s, carry)
        x = law.mean
    return x[0, 0], (x[1, 0] - x[0, 0]) ** 2


class Value1(NamedTuple):
    """``V(x) = -p x²/2 + q x + c`` in one dimension."""

    p: Tensor
    q: Tensor
    c: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return -0.5 * self.p * x**2 + self.q * x + self.c

    def smooth(self, mean_slope: Tensor, mean_offset: Tensor, std: Tensor) -> Value1:
        """``log E exp V(y)`` for ``y ~ N(A x + b, std²)`` as a function of x."""
        A, b, v = mean_slope, mean_offset, std**2
        n = 1 + v * self.p
        q, p = self.q / n, self.p / n
        c = self.c - 0.5 * n.log() + 0.5 * v * self.q**2 / n + q * b - 0.5 * p * b**2
        return Value1(A**2 * p, A * (q - p * b), c)


def riccati(links: list[Link], p: float, q: float, c: float = 0.0) -> list[Value1]:
    """Soft values ``V_k`` of every level for the reward ``-p x²/2 + q x + c`` (log units), backwards (E8)."""
    out = [Value1(*(torch.tensor(z, dtype=F64) for z in (p, q, c)))]
    for A, b, std in reversed(links):
        out.append(out[-1].smooth(A, b, std))
    return out[::-1]


def chain_log_z(world: Normal, values: list[Value1], t: float) -> Tensor:
    """``log E exp(reward)`` under the sampler's own output law, started from the exact marginal at t."""
    mean, var = world.moments(t)
    return values[0].smooth(torch.zeros((), dtype=F64), mean, var.sqrt()).c


# ---------------------------------------------------------------------------------------------------------------------
# two prompts with known evidence: many copies of both in one batch make a sharp test of unbiasedness


@dataclass(frozen=True)
class TwoPrompts:
    """Even rows love large x, odd rows small ones: ``r = -p x²/2 + q x`` with its own p and q.

    Attributes:
        copies: of each prompt.
        n: particles per row.
        steps: of the chain.
    """

    copies: int = 1500
    n: int = 4
    steps: int = 6
    world: Normal = Normal()
    kernel: Kernel = Ancestral(Ddim(1.0))  # noqa: RUF009 - frozen
    p: tuple[float, float] = (0.3, 0.1)
    q: tuple[float, float] = (0.7, -0.5)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return 2 * self.copies

    @property
    def times(self) -> Tensor:
        """The grid."""
        return torch.linspace(1, 0, self.steps + 1, dtype=F64)

    def score(self, x: Tensor, row: Tensor) -> Tensor:
        """Reward of states ``(B, 1)``."""
        kind = row % 2
        p, q = torch.tensor(self.p, dtype=F64)[kind], torch.tensor(self.q, dtype=F64)[kind]
        return -0.5 * p * x[:, 0] ** 2 + q * x[:, 0]

    def log_z(self, scale: float = 1.0) -> Tensor:
        """Exact ``log Z`` of the sampler for both prompts, ``(2,)``."""
        links = chain(self.world, self.kernel, self.times)
        values = [riccati(links, scale * p, scale * q) for p, q in zip(self.p, self.q, strict=True)]
        return torch.stack([chain_log_z(self.world, v, 1.0) for v in values])

    def run(self, seed: int = 0, **slots: Any) -> Trajectory:
        """Roll out all particles of all rows in one batch; ``slots`` are the rollout's."""
        g = torch.Generator().manual_seed(seed)
        row = torch.arange(self.rows).repeat_interleave(self.n)
        start = Nodes.enter(self.world.start(torch.randn(len(row), 1, generator=g, dtype=F64)), row)
        slots = {"value": Tweedie(self.score)} | slots
        return rollout(Policy(self.world), self.kernel, self.times, start, noise=Stream(g), **slots)

    def ratios(self, log_evidence: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Mean of ``Ẑ/Z`` and its standard error for both prompts."""
        ratio = (log_evidence.reshape(self.copies, 2) - self.log_z(scale)).exp()
        return ratio.mean(0), ratio.std(0) / self.copies**0.5

    def check(self, log_evidence: Tensor, scale: float = 1.0, limit: float = 0.02) -> None:
        """Assert ``E[Ẑ] = Z`` within 4 standard errors, each at most ``limit`` of Z."""
        mean, error = self.ratios(log_evidence, scale)
        assert ((mean - 1).abs() <= 4 * error).all(), f"E[Ẑ]/Z = {mean.tolist()} ± {error.tolist()}"
        assert (error <= limit).all(), f"too noisy to tell: s.e. {error.tolist()}"


# ---------------------------------------------------------------------------------------------------------------------
# finite chains


@dataclass(frozen=True)
class Finite:
    """A chain over n states: ``start (n,)``, transition matrices ``(n, n)``, reward ``(n,)`` in log units (E10)."""

    start: Tensor
    steps: tuple[Tensor, ...]
    reward: Tensor

    def values(self) -> list[Tensor]:
        """Exact soft values, level by level."""
        out = [self.reward]
        for T in reversed(self.steps):
            out.append((T @ out[-1].exp()).log())
        return out[::-1]

    def log_z(self) -> Tensor:
        """``log E exp(reward)``."""
        return (self.start @ self.values()[0].exp()).log()

    def output(self) -> Tensor:
        """Law of the last state."""
        p = self.start
        for T in self.steps:
            p = p @ T
        return p


def five_states(levels: int = 4) -> Finite:
    """Five states on a ring."""
    g = torch.Generator().manual_seed(5)
    T = tuple(torch.rand(5, 5, dtype=F64, generator=g).softmax(1) for _ in range(levels))
    return Finite(torch.full((5,), 0.2, dtype=F64), T, torch.randn(5, dtype=F64, generator=g))


# ---------------------------------------------------------------------------------------------------------------------
# a function that nobody knows


class Net(nn.Module):
    """A small velocity network with a row embedding; computes in its own dtype whatever it is handed."""

    def __init__(self, dim: int = 3, rows: int = 8, width: int = 16, process: Process | None = None) -> None:
        super().__init__()
        self.process = process or Rectified()
        self.inner = nn.Linear(dim + 2, width)
        self.outer = nn.Linear(width, dim)
        self.embed = nn.Embedding(rows, width)
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor, row: Tensor) -> Tensor:
        self.calls += 1
        hint = torch.stack([t, t**2], 1)
        return self.outer(torch.tanh(self.inner(torch.cat([x, hint], 1)) + self.embed(row)))

    def posterior(self, x: Tensor, t: Time, cond: Any = None) -> Posterior:
        dtype = self.inner.weight.dtype
        times = torch.as_tensor(t, dtype=F64).reshape(-1).expand(len(x)).to(dtype)
        row = torch.zeros(len(x), dtype=torch.long) if cond is None else cond
        return self.process.posterior(x, t, v=self(x.to(dtype), times, row))
