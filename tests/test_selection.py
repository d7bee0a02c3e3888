"""Selections: unbiased evidence for every scheme and threshold, and the three faults that peers shipped are caught."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from worlds import F64, TwoPrompts

from flowalign.noise import Noise, Stream
from flowalign.potentials import Immediate
from flowalign.selection import SCHEMES, Branch, Chosen, Resample, Top
from flowalign.selection.base import by_row
from flowalign.selection.resample import BELOW_ONE, ess
from flowalign.trajectory import Trajectory

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
NW = torch.tensor([0.4, 0.4, 0.4, 0.4, 0.8, 0.8, 2.0, 2.8], dtype=F64)  # what TDS's and DAS's residual gets wrong
WEIGHTS = {
    "TDS counterexample": NW / NW.sum(),
    "zeros": torch.tensor([0.0, 0.3, 0.0, 0.0, 0.45, 0.25, 0.0], dtype=F64),
    "one": torch.tensor([0.0, 1.0, 0.0], dtype=F64),
    "equal": torch.full((5,), 0.2, dtype=F64),
    "whole copies": torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=F64),
    "tiny": torch.tensor([1e-12, 0.5, 0.5 - 1e-12], dtype=F64),
}


def uniforms(rows: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, n, dtype=F64, generator=torch.Generator().manual_seed(seed))


def offspring(ancestors: torch.Tensor, n: int) -> torch.Tensor:
    """Offspring counts ``(rows, n)``."""
    return torch.zeros(len(ancestors), n, dtype=F64).scatter_add(1, ancestors, torch.ones_like(ancestors, dtype=F64))


def check_offspring(scheme, weights: torch.Tensor, m: int, rows: int = 4000) -> torch.Tensor:
    """Assert ``E[offspring of i] = m W_i`` within 4.5 standard errors, and that items of weight 0 have none."""
    drawn = scheme(weights.expand(rows, -1).clone(), uniforms(rows, m))
    assert drawn.shape == (rows, m) and drawn.dtype == torch.long
    counts = offspring(drawn, len(weights))
    error = counts.std(0) / rows**0.5 + 1e-9
    assert ((counts.mean(0) - m * weights).abs() <= 4.5 * error).all(), counts.mean(0).tolist()
    assert not counts[:, weights == 0].any()
    return counts


@every_scheme
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("more", [0, 3])
def test_offspring_means(scheme, weights, more):
    m = len(weights) + more
    counts = check_offspring(SCHEMES[scheme], weights, m)
    if scheme in ("systematic", "ssp", "residual"):
        assert (counts >= (m * weights + 1e-9).floor()).all()
    if scheme in ("systematic", "ssp"):
        assert (counts <= (m * weights - 1e-9).ceil()).all()
    if scheme == "stratified":
        assert ((counts - m * weights).abs() < 2).all()


@every_scheme
def test_variance_is_what_the_scheme_is_chosen_for(scheme):
    w = WEIGHTS["TDS counterexample"]
    variance = check_offspring(SCHEMES[scheme], w, 8).var(0)
    binomial = 8 * w * (1 - w)
    if scheme == "multinomial":
        assert torch.allclose(variance, binomial, rtol=0.12)
    else:
        assert (variance < 1.02 * binomial + 1e-9).all() and variance.sum() < 0.75 * binomial.sum()


@every_scheme
def test_boundary_uniforms_never_draw_weight_zero(scheme):
    for value in (0.0, 0.5, BELOW_ONE):
        u = torch.full((1, 4), value, dtype=F64)
        for w in ([0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5], [0.0, 1.0, 0.0, 0.0], [0.3, 0.0, 0.7, 0.0]):
            drawn = SCHEMES[scheme](torch.tensor([w], dtype=F64), u)
            assert all(w[i] > 0 for i in drawn[0].tolist()), (w, value, drawn)


@every_scheme
def test_rows_do_not_see_each_other(scheme):
    w, u = torch.stack([NW / 8, NW.flip(0) / 8, torch.full((8,), 0.125, dtype=F64)]), uniforms(3, 8)
    whole = SCHEMES[scheme](w, u)
    for r in range(3):
        assert torch.equal(SCHEMES[scheme](w[r : r + 1], u[r : r + 1])[0], whole[r])
    assert torch.equal(whole[2].sort().values, torch.arange(8)) or scheme == "multinomial"


def test_multinomial_inverts_the_distribution_function():
    w = torch.tensor([[0.2, 0.5, 0.3]], dtype=F64)
    u = torch.tensor([[0.0, 0.19, 0.21, 0.69, 0.71]], dtype=F64)
    assert SCHEMES["multinomial"](w, u)[0].tolist() == [0, 0, 1, 1, 2]
    assert SCHEMES["systematic"](w, torch.tensor([[0.5, 0.0, 0.0, 0.0]], dtype=F64))[0].tolist() == [0, 1, 1, 2]
    assert SCHEMES["stratified"](w, torch.tensor([[0.9, 0.0, 0.9, 0.9]], dtype=F64))[0].tolist() == [1, 1, 2, 2]
    assert SCHEMES["residual"](w, torch.tensor([[0.9, 0.9, 0.1, 0.9]], dtype=F64))[0].tolist() == [1, 1, 2, 2]


def test_effective_sample_size():
    lw = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, -torch.inf, -torch.inf, -torch.inf], [1.0, 1.0, -torch.inf, 1.0]])
    assert torch.allclose(ess(lw), torch.tensor([4.0, 1.0, 3.0]))
    w = torch.tensor([0.1, 0.2, 0.7], dtype=F64)
    assert torch.allclose(ess(w.log() + 500), 1 / (w**2).sum())


# ---------------------------------------------------------------------------------------------------------------------
# evidence


def check_evidence(select, evidence=Trajectory.log_evidence, n: int = 4, scale: float = 1.5) -> None:
    """Assert that Ẑ is unbiased for both prompts of a batch; takes the implementation, so that faults can be planted.

    The immediate potential is the sharpest: its weights do not telescope, so a wrong resampler cannot hide.
    """
    world = TwoPrompts(copies={2: 2500, 4: 1500, 16: 500}[n], n=n)
    world.check(evidence(world.run(potential=Immediate(scale), select=select)), scale)


@every_scheme
@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("n", [2, 4, 16])
def test_evidence_is_unbiased(scheme, threshold, n):
    check_evidence(Resample(scheme, threshold), n=n)


def test_evidence_is_unbiased_between_resamplings():
    check_evidence(Resample("systematic", 2.0, every=2))
    check_evidence(Branch({0: 2, 3: 3}))
    check_evidence(None)


@dataclass(frozen=True)
class Forgetful(Resample):
    """The reference FK code: where a row is not resampled its weights are thrown away."""

    def __call__(self, level, log_w, row, n_rows, noise):
        chosen = super().__call__(level, log_w, row, n_rows, noise)
        if chosen is None:
            return Chosen(torch.arange(len(row)), torch.zeros_like(log_w), log_w.new_zeros(n_rows))
        return Chosen(chosen.parents, torch.zeros_like(chosen.log_w), chosen.dlog_z)


def piling_residual(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The residual resampler of TDS and DAS: inverting the remainder stops at its M-th item and piles up there."""
    m = u.shape[1]
    sure = (m * weights).floor()
    left = m * weights - sure
    out = torch.empty(u.shape, dtype=torch.long)
    for r in range(len(u)):
        copies = torch.arange(weights.shape[1]).repeat_interleave(sure[r].long())
        rest = m - len(copies)
        if rest:
            cdf = (left[r] / left[r].sum()).cumsum(0)
            drawn = torch.searchsorted(cdf, u[r, :rest], right=True).clamp_max(rest - 1)
            copies = torch.cat([copies, drawn])
        out[r] = copies
    return out


def test_planted_fault_weights_dropped_when_not_resampling():
    with pytest.raises(AssertionError, match=r"E\[Ẑ\]/Z"):
        check_evidence(Forgetful("systematic", 0.9), n=16)
    check_evidence(Resample("systematic", 0.9), n=16)


def test_planted_fault_last_weight_lost():
    with pytest.raises(AssertionError, match=r"E\[Ẑ\]/Z"):
        check_evidence(Resample("systematic", 2.0), evidence=lambda t: t.log_z)


def test_planted_fault_residual_that_piles_up(monkeypatch):
    with pytest.raises(AssertionError):
        check_offspring(piling_residual, NW / 8, 8, rows=1000)
    monkeypatch.setitem(SCHEMES, "piling", piling_residual)
    with pytest.raises(AssertionError, match=r"E\[Ẑ\]/Z"):
        check_evidence(Resample("piling", 2.0))


# ---------------------------------------------------------------------------------------------------------------------
# what a selection returns


def test_resample_by_hand():
    row = torch.tensor([0, 1, 0, 1, 1, 0])
    log_w = torch.tensor([0.0, 3.0, -torch.inf, 3.0, 3.0, -torch.inf])
    got = Resample("systematic", 0.5)(0, log_w, row, 2, Noise(0))
    assert got.parents.tolist() == [0, 1, 0, 3, 4, 0]  # row 0 is down to one particle, row 1 is even and left alone
    assert torch.equal(got.log_w, torch.tensor([0.0, 3.0, 0.0, 3.0, 3.0, 0.0]))
    assert torch.allclose(got.dlog_z, torch.tensor([-torch.log(torch.tensor(3.0)), 0.0]))
    assert got.log_w.dtype == log_w.dtype
    assert Resample("systematic", 0.3)(0, log_w, row, 2, Noise(0)) is None  # ESS 1 of 3 is above .9
    even = torch.zeros(6)
    assert Resample("systematic", 1.0)(0, even, row, 2, Noise(0)) is None
    assert Resample("systematic", 1.01)(0, even, row, 2, Noise(0)) is not None
    assert Resample("systematic", 2.0, every=3)(4, log_w, row, 2, Noise(0)) is None
    assert Resample("systematic", 2.0, every=3)(6, log_w, row, 2, Noise(0)) is not None
    assert Resample() == Resample("systematic", 0.5, 1)


def test_huge_and_tiny_weights_are_kept_apart_in_float32():
    row = torch.zeros(4, dtype=torch.long)
    log_w = torch.tensor([5000.0, 4999.0, -5000.0, 4990.0])
    got = Resample("multinomial", 2.0)(0, log_w, row, 1, Stream(torch.Generator().manual_seed(0)))
    want = log_w.double().logsumexp(0) - torch.log(torch.tensor(4.0, dtype=F64))
    assert float(got.dlog_z) == pytest.approx(float(want), abs=1e-3)
    assert 2 not in got.parents.tolist()


def test_each_row_draws_from_its_own_particles():
    row = torch.arange(6) % 3
    log_w = torch.randn(6, generator=torch.Generator().manual_seed(2)) * 3
    noise = Noise(3, (7, 8, 9))
    got = Resample("multinomial", 2.0)(2, log_w, row, 3, noise)
    assert torch.equal(row[got.parents], row)
    for r in range(3):
        own = (row == r).nonzero().flatten()
        alone = Resample("multinomial", 2.0)(2, log_w[own], torch.zeros(2, dtype=torch.long), 1, Noise(3, (7 + r,)))
        assert torch.equal(own[alone.parents], got.parents[own])
        assert torch.allclose(alone.dlog_z[0], got.dlog_z[r])


def test_bad_weights_and_settings_stop():
    row = torch.tensor([0, 0, 1, 1])
    for bad in ([0.0, 0.0, -torch.inf, -torch.inf], [0.0, 0.0, torch.nan, 0.0], [0.0, 0.0, torch.inf, 0.0]):
        with pytest.raises(FloatingPointError, match="all 2 particles of prompt row 1 have weight zero at level 3"):
            Resample()(3, torch.tensor(bad), row, 2, Noise(0))
    with pytest.raises(ValueError, match="unknown resampling scheme 'best'; choose one of systematic"):
        Resample("best")
    for settings in ({"threshold": -0.1}, {"every": 0}):
        with pytest.raises(ValueError, match="threshold >= 0 and every >= 1"):
            Resample(**settings)
    with pytest.raises(ValueError, match=r"same number of nodes for every prompt; got \[2, 1\]"):
        by_row(torch.tensor([0, 1, 0]), 2)
    with pytest.raises(ValueError, match=r"got \[2, 0\]"):
        Resample()(0, torch.zeros(2), torch.zeros(2, dtype=torch.long), 2, Noise(0))
    with pytest.raises(ValueError, match="same number"):
        by_row(torch.zeros(0, dtype=torch.long), 0)
    assert by_row(torch.tensor([1, 0, 1, 0]), 2).tolist() == [[1, 3], [0, 2]]


def test_branch():
    row, log_w = torch.tensor([0, 1]), torch.tensor([0.5, -1.0])
    got = Branch({1: 3})(1, log_w, row, 2, Noise(0))
    assert got.parents.tolist() == [0, 0, 0, 1, 1, 1] and torch.equal(got.log_w, log_w[got.parents])
    assert torch.equal(got.dlog_z, torch.zeros(2))
    assert Branch({1: 3})(0, log_w, row, 2, Noise(0)) is None and Branch({1: 1})(1, log_w, row, 2, Noise(0)) is None
    with pytest.raises(ValueError, match=r"at least 1; got \{2: 0\}"):
        Branch({1: 2, 2: 0})


def test_top():
    row = torch.tensor([0, 1, 0, 1, 0, 1])
    log_w = torch.tensor([0.1, 5.0, 0.3, 7.0, 0.2, 6.0])
    got = Top({2: 2})(2, log_w, row, 2, Noise(0))
    assert got.parents.tolist() == [2, 4, 3, 5] and torch.equal(got.log_w, log_w[got.parents])
    assert torch.equal(got.dlog_z, torch.zeros(2))
    assert Top({2: 1}, children=2)(2, log_w, row, 2, Noise(0)).parents.tolist() == [2, 2, 3, 3]
    assert Top({2: 3})(2, log_w, row, 2, Noise(0)).parents.tolist() == [2, 4, 0, 3, 5, 1]
    assert Top({2: 2})(1, log_w, row, 2, Noise(0)) is None
    ties = Top({0: 2})(0, torch.zeros(6), row, 2, Noise(0))
    assert ties.parents.tolist() == [0, 2, 1, 3]  # stable: the first come first
    with pytest.raises(ValueError, match="cannot keep 4 of 3 nodes per prompt at level 2"):
        Top({2: 4})(2, log_w, row, 2, Noise(0))
    for bad in ({"keep": {0: 0}}, {"keep": {0: 1}, "children": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            Top(**bad)
