"""Noise by position: exact variances at the start and in every step, the marginals of the process kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowalign.kernels import Ancestral, EulerMaruyama
from flowalign.laws import Ddim, FlowGrpo
from flowalign.methods.particles import rows_of
from flowalign.methods.upsr import UPSR, spatial_kernel, weight
from flowalign.noise import START
from flowalign.source import Prompt
from flowalign.steer import steer
from flowalign.trajectory import ranks
from tests.searching import task
from tests.toy import Bright, Toy
from tests.worlds import F64, Normal, cosine


def test_weight_by_hand() -> None:
    """The published map: .4 where nothing differs, 1 from ψ_max on, linear between."""
    guess, low = torch.tensor([[0.5, 0.55, 0.4, 0.9]]), torch.full((1, 4), 0.5)
    assert torch.allclose(weight(guess, low, 0.1, 0.4), torch.tensor([[0.4, 0.7, 1.0, 1.0]]), atol=1e-6)


@pytest.mark.parametrize("process", [Normal().process, cosine()], ids=["flow", "vp"])
def test_step_noise_is_the_map_times_the_law(process) -> None:
    """At each position the step is that of a sampler whose noise everywhere is what the map says there: its std is
    exact, and so is its drift, which is what keeps the marginals."""
    world, w = Normal(0.5, 0.8, process), torch.tensor([[0.2, 0.5], [1.0, 0.7]], dtype=F64)
    x, t, s = torch.randn(3, 2, 2, dtype=F64), 0.6, 0.45
    posterior = world.posterior(x, t)
    law = spatial_kernel(process, 0.9, w.expand(3, 2, 2))(x, posterior, t, s)[0]
    for i in range(2):
        for j in range(2):
            same = 0.9 * float(w[i, j])
            one = EulerMaruyama(FlowGrpo(same)) if process == Normal().process else Ancestral(Ddim(same))
            plain = one(x, posterior, t, s)[0]
            assert torch.allclose(law.mean[:, i, j], plain.mean[:, i, j], atol=1e-12)
            assert torch.allclose(law.std.expand_as(x)[:, i, j], plain.std.expand_as(x)[:, i, j], atol=1e-12)
    assert spatial_kernel(process, 0.0, w) == EulerMaruyama()


def sharp(prompts: int = 2, samples: int = 3, steps: int = 8):
    """A task with pictures to enlarge: the states of a Gaussian world."""
    t = task(lambda x, r: x.flatten(1).sum(1), prompts, samples, shape=(3, 2, 2), steps=steps)
    g = torch.Generator().manual_seed(4)
    low = torch.randn(prompts, 3, 2, 2, dtype=F64, generator=g)
    t.pipeline.latents = lambda media, cond: media
    draw = replace(t.draw, meta=[{"image": p} for p in low])
    return replace(t, draw=draw), low


def test_start_noise_has_the_variance_of_the_map() -> None:
    """Between the guess and the start lies the map times the sample's own normal noise, position by position."""
    t, low = sharp()
    rows, row = rows_of(t, per_sample=False), torch.arange(2).repeat_interleave(3)
    guess, w = low + 0.3, torch.linspace(0.4, 1, 24, dtype=F64).reshape(2, 3, 2, 2)
    level, nodes = UPSR(start=0.6).enter(rows, guess, w, row)
    time = float(t.times[level])
    assert level == 4 and time == 0.5  # the first time of the grid that is not above .6
    z = rows.noise.normal(START, row, ranks(row), (3, 2, 2)).double()
    assert torch.allclose((nodes.x - (1 - time) * guess[row]) / time, w[row] * z, atol=1e-6)
    assert UPSR(start=1.0, noise=0.7).enter(rows, guess, w, row)[0] == 0


def test_flat_regions_keep_the_guess() -> None:
    """The whole method: samples spread less where the picture is certain, and the cost is one look and the rest of the
    grid."""
    t, low = sharp(1, 400)
    # two thirds of the picture are what the model would have guessed
    low[0, :2] = t.policy.denoiser.mean
    t.draw.meta[0]["image"] = low[0]
    found = next(UPSR(psi=0.05, floor=0.2, start=0.8).search(t))
    spread = found.x.std(0)
    assert spread[:2].max() < 0.5 * spread[2].min()
    assert t.policy.ledger.evaluations == 1 + 400 * 6
    even, low = sharp(1, 400)
    spread = next(UPSR(psi=0.05, floor=1.0, start=0.8).search(even)).x.std(0)
    assert spread.max() < 1.2 * spread.min()


def test_even_noise_has_the_mean_of_the_map() -> None:
    """The control: each picture's noise spread evenly. The map's samples spread from place to place, its do not."""
    t, low = sharp(2, 300)
    low[0, :2] = t.policy.denoiser.mean  # certain in two thirds of the first picture, nowhere in the second
    low[1] = 9.0
    for p in (0, 1):
        t.draw.meta[p]["image"] = low[p]
    found = next(UPSR(psi=0.05, floor=0.2, start=0.8, even=True).search(t))
    rows = rows_of(t, per_sample=False)
    mean = weight(UPSR()._guess(rows), low, 0.05, 0.2).flatten(1).mean(1)
    start = found.x  # the ODE from a start of even noise scales it evenly
    first, second = (start[found.row == p].std(0) for p in (0, 1))
    assert first.max() < 1.35 * first.min() and mean[0] < 0.6 * mean[1]
    assert float(first.mean() / second.mean()) == pytest.approx(float(mean[0] / mean[1]), rel=0.05)


def test_the_steps_take_the_map_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stochastic sampler draws each of its noises by the map of its own picture."""
    t, low = sharp(2, 3)
    low[0, :2] = t.policy.denoiser.mean
    for p in (0, 1):
        t.draw.meta[p]["image"] = low[p]
    seen = []

    def spy(process, level, w):
        seen.append((level, w))
        return spatial_kernel(process, level, w)

    monkeypatch.setattr("flowalign.methods.upsr.spatial_kernel", spy)
    next(UPSR(psi=0.05, floor=0.2, noise=0.7).search(t))
    maps = weight(UPSR()._guess(rows_of(t, per_sample=False)), low, 0.05, 0.2)
    assert [level for level, _ in seen] == [0.7] and maps.std() > 0.1
    assert torch.allclose(seen[0][1], maps[[0, 0, 0, 1, 1, 1]])


def test_rounds_draw_noises_of_their_own() -> None:
    """n candidates of one result are n different samples, the same ones each time."""
    found, again = (list(UPSR(n=3).search(sharp(1, 1)[0])) for _ in range(2))
    assert len(found) == 3 and len({round(float(c.x.sum()), 6) for c in found}) == 3
    assert all(torch.equal(a.x, b.x) for a, b in zip(found, again, strict=True))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="no noise to shape"):
        UPSR(start=1.0, noise=0.0)
    with pytest.raises(ValueError, match="psi > 0"):
        UPSR(psi=0.0)
    with pytest.raises(ValueError, match="prompt 0 has none"):
        steer(Toy(), UPSR(), Bright(), ["a"], steps=4)


def test_budget_and_prompts() -> None:
    """From the public door, with pictures in the prompts' meta."""
    prompts = [Prompt(p, {"image": torch.rand(*shape)}) for p, shape in (("a", (3, 2, 2)), ("c dark", (1, 3, 2, 2)))]
    found = steer(Toy(), UPSR(n=2), Bright(), prompts, samples=2, steps=5)
    assert found.row.tolist() == [0, 0, 1, 1] and found.ledger.evaluations == 2 + 8 * 3
    short = steer(Toy(), UPSR(n=4, start=1.0, noise=0.7), Bright(), prompts, samples=2, steps=5, budget="100rewards")
    assert short.ledger.rewards <= 100


@pytest.mark.slow
def test_on_the_super_resolution_world() -> None:
    """The world's own pipeline, untrained: maps over its packed tokens, from its pairs."""
    from flowalign.loading import load
    from flowalign.pipelines.worlds import superres

    generator = load(superres.build(), {"height": 32, "width": 32, "max_sequence_length": superres.TOKENS})
    pairs = superres.draw(torch.Generator().manual_seed(0), 2)
    prompts = [Prompt(p, m) for p, m in zip(pairs.prompts, pairs.meta(), strict=True)]
    for method, evaluations in ((UPSR(psi=0.5), 2 + 4 * 2), (UPSR(psi=0.5, start=1.0, noise=0.7), 2 + 4 * 5)):
        found = steer(generator, method, Bright(), prompts, samples=2, steps=5)
        assert found.media.shape == (4, 3, 32, 32) and found.ledger.evaluations == evaluations
