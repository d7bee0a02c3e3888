"""Rewards of sets: closed forms, finite gradients at duplicates, unbiasedness, leave-one-out credit, pairing."""

import math

import pytest
import torch
from safetensors.torch import save_file
from scipy import linalg

from flowalign.protocols import Reward
from flowalign.rewards.set_distances import frechet, mmd2, moments, symmetric_root, vendi
from flowalign.rewards.sets import FrechetSet, MMDSet, VendiSet, colours


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=generator(seed), dtype=torch.float64)


# -- Vendi -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_vendi_of_orthonormal_and_of_identical_samples(n):
    assert vendi(torch.eye(8, dtype=torch.float64)[:n] * 3.7).item() == pytest.approx(n, rel=1e-12)
    assert vendi(normal(1, 6).expand(n, 6)).item() == pytest.approx(1, rel=1e-9)


def test_vendi_equals_the_entropy_of_its_eigenvalues():
    z = torch.nn.functional.normalize(normal(7, 4), dim=1)
    values = linalg.eigvalsh((z @ z.T / 7).numpy())
    entropy = -sum(v * math.log(v) for v in values if v > 1e-12)
    assert vendi(z).item() == pytest.approx(math.exp(entropy), rel=1e-10)
    two = torch.tensor([[1.0, 0.0], [math.cos(1.0), math.sin(1.0)]], dtype=torch.float64)
    a, b = (1 + math.cos(1)) / 2, (1 - math.cos(1)) / 2
    assert vendi(two).item() == pytest.approx(math.exp(-a * math.log(a) - b * math.log(b)), rel=1e-12)


def test_vendi_gradient_is_right_and_finite_at_duplicates():
    assert torch.autograd.gradcheck(vendi, normal(5, 6).requires_grad_())
    twins = normal(3, 6)[[0, 1, 1, 2, 2, 2]].clone().requires_grad_()
    vendi(twins).backward()
    assert torch.isfinite(twins.grad).all()
    same = torch.ones(4, 6, dtype=torch.float64, requires_grad=True)
    vendi(same).backward()
    assert torch.isfinite(same.grad).all()


# -- Fréchet -----------------------------------------------------------------------------------------------------------


def test_frechet_of_two_gaussians_closed_forms():
    d = 4
    eye = torch.eye(d, dtype=torch.float64)
    mean, away = torch.zeros(d, dtype=torch.float64), torch.full((d,), 0.5, dtype=torch.float64)
    assert frechet(mean, 4 * eye, away, eye).item() == pytest.approx(d * 0.25 + d * (2 - 1) ** 2, rel=1e-12)
    a, b = normal(9, d, 1), normal(9, d, 2)
    (m1, s1), (m2, s2) = moments(a), moments(b)
    cross = linalg.sqrtm((s1 @ s2).numpy()).real  # the textbook form, by another algorithm
    want = ((m1 - m2) ** 2).sum() + s1.trace() + s2.trace() - 2 * cross.trace()
    assert frechet(m1, s1, m2, symmetric_root(s2)).item() == pytest.approx(want.item(), rel=1e-9)
    assert frechet(m1, s1, m1, symmetric_root(s1)).item() == pytest.approx(0, abs=1e-9)
    assert torch.allclose(s1, torch.cov(a.T), atol=1e-12)


def test_frechet_with_fewer_samples_than_dimensions_has_finite_gradients():
    exemplars = normal(40, 12, 3)
    mean, cov = moments(exemplars, 0.1)
    root = symmetric_root(cov)
    z = normal(5, 12, 4)[[0, 1, 2, 2, 2]].clone().requires_grad_()  # rank 2
    for shrinkage in (0.0, 0.1, 1.0):
        m, s = moments(z, shrinkage)
        (grad,) = torch.autograd.grad(frechet(m, s, mean, root), z)
        assert torch.isfinite(grad).all() and grad.abs().sum() > 0
    score = lambda x: frechet(*moments(x, 0.2), mean, root)  # noqa: E731
    assert torch.autograd.gradcheck(score, normal(5, 12, 4).requires_grad_())
    shrunk = moments(z.detach(), 0.3)[1]
    raw = moments(z.detach())[1]
    assert torch.allclose(shrunk, 0.7 * raw + 0.3 * raw.trace() / 12 * torch.eye(12), atol=1e-12)


# -- MMD ---------------------------------------------------------------------------------------------------------------


def test_mmd_is_unbiased():
    """Its mean over draws is the population value: 0 for equal laws, the closed form of two Gaussians otherwise."""
    d, h, draws = 2, 1.0, 1500

    def mean_and_error(shift):
        values = torch.stack([mmd2(normal(4, d, 2 * i), normal(5, d, 2 * i + 1) + shift, h) for i in range(draws)])
        return values.mean().item(), values.std().item() / math.sqrt(draws)

    # E k(x, y) for x - y ~ N(m, 2 I): (h²/(h² + 2))^(d/2) exp(-|m|²/(2 (h² + 2)))
    same = (h**2 / (h**2 + 2)) ** (d / 2)
    for shift in (0.0, 1.0):
        mean, error = mean_and_error(shift)
        want = 2 * same * (1 - math.exp(-d * shift**2 / (2 * (h**2 + 2))))
        assert abs(mean - want) < 4 * error
        biased = mean + (1 - same) * (1 / 4 + 1 / 5)  # what keeping the diagonals would add
        assert abs(biased - want) > 20 * error


def test_mmd_by_hand():
    z, y = normal(3, 2, 1), normal(4, 2, 2)
    k = lambda a, b: math.exp(-((a - b) ** 2).sum().item() / (2 * 0.7**2))  # noqa: E731
    within = lambda a: sum(k(p, q) for i, p in enumerate(a) for j, q in enumerate(a) if i != j)  # noqa: E731
    want = within(z) / 6 + within(y) / 12 - 2 * sum(k(p, q) for p in z for q in y) / 12
    assert mmd2(z, y, 0.7).item() == pytest.approx(want, rel=1e-10)
    assert torch.autograd.gradcheck(lambda a: mmd2(a, y, 0.7), normal(3, 2, 5).requires_grad_())
    distance = lambda a, b: -(a - b).norm().item()  # noqa: E731
    pairs = lambda a, b: [distance(p, q) for i, p in enumerate(a) for j, q in enumerate(b) if a is not b or i != j]  # noqa: E731
    everything = sum(k(p, q) for p in z for q in z) / 9 + sum(k(p, q) for p in y for q in y) / 16
    assert mmd2(z, y, 0.7, unbiased=False).item() == pytest.approx(
        everything - 2 * sum(k(p, q) for p in z for q in y) / 12, rel=1e-9
    )
    assert mmd2(z, z, unbiased=False).item() == pytest.approx(0, abs=1e-12)
    energy = sum(pairs(z, z)) / 6 + sum(pairs(y, y)) / 12 - 2 * sum(pairs(z, y)) / 12
    assert mmd2(z, y).item() == pytest.approx(energy, rel=1e-9)
    assert torch.autograd.gradcheck(lambda a: mmd2(a, y), normal(3, 2, 5).requires_grad_())
    for h in (0.7, None):
        twins = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
        mmd2(twins, y, h).backward()
        assert torch.isfinite(twins.grad).all()


# -- rewards -----------------------------------------------------------------------------------------------------------


def first_pixels(media):
    return media.flatten(1)[:, :6].double()


def rewards(exemplars):
    return [
        VendiSet(features=first_pixels),
        FrechetSet(exemplars, features=first_pixels),
        MMDSet(exemplars, features=first_pixels),
        MMDSet(exemplars, features=first_pixels, kernel="gaussian"),
    ]


def test_leave_one_out_credit_by_hand():
    media, exemplars = torch.rand(5, 3, 4, 4, generator=generator(1)), torch.rand(20, 3, 4, 4, generator=generator(2))
    for reward in rewards(exemplars):
        assert isinstance(reward, Reward) and not reward.card.batch
        credit = reward(media, ["a"] * 5)
        z = first_pixels(media)
        whole = reward.score_set(z)
        for i in range(5):
            rest = torch.cat((z[:i], z[i + 1 :]))
            assert credit[i].item() == pytest.approx((whole - reward.score_set(rest)).item(), abs=1e-6)
        reward.credit = "broadcast"
        assert torch.allclose(reward(media, ["a"] * 5), whole.float().expand(5))


def test_credit_goes_where_it_is_due():
    same = torch.full((4, 3, 4, 4), 0.5)
    odd = torch.cat((same, torch.rand(1, 3, 4, 4, generator=generator(3))))
    credit = VendiSet()(odd, ["a"] * 5)
    assert credit.argmax() == 4 and torch.allclose(credit[:4], credit[:1].expand(4), atol=1e-5)
    target = 0.7 + 0.05 * torch.randn(64, 3, 4, 4, generator=generator(4))
    near = 0.7 + 0.05 * torch.randn(7, 3, 4, 4, generator=generator(5))
    stray = torch.cat((near, torch.full((1, 3, 4, 4), 0.1))).clamp(0, 1)
    target, stray, near = target.clamp(0, 1), stray.clamp(0, 1), near.clamp(0, 1)
    for make, options in [(FrechetSet, {}), (MMDSet, {}), (MMDSet, {"kernel": "gaussian"})]:
        credit = make(target, **options)(stray, ["a"] * 8)
        assert credit[:7].min() - credit[7] > 3 * credit[:7].std()
    blind = MMDSet(target, unbiased=True)(stray, ["a"] * 8)
    assert blind[7] > blind.min()  # why the credit does not use the unbiased estimate: a lone stray is invisible to it
    two = torch.cat((near[:6], stray[7:], stray[7:]))
    full = MMDSet(target, credit="broadcast")
    assert full(near, ["a"] * 7)[0] > full(two, ["a"] * 8)[0] + 0.05  # two that agree with each other are not


def test_sets_are_formed_by_batch_prompt_or_meta():
    media = torch.rand(6, 3, 4, 4, generator=generator(6))
    prompts = ["a", "b", "a", "b", "a", "b"]
    by_prompt = VendiSet(by="prompt")(media, prompts)
    by_meta = VendiSet()(media, ["x"] * 6, [{"set": p} for p in prompts])
    alone = torch.zeros(6)
    for p in "ab":
        rows = [i for i, q in enumerate(prompts) if q == p]
        alone[rows] = VendiSet()(media[rows], [p] * 3)
    assert torch.equal(by_prompt, by_meta) and torch.allclose(by_prompt, alone)
    assert not torch.allclose(by_prompt, VendiSet()(media, prompts))
    order = torch.randperm(6, generator=generator(7))
    shuffled = VendiSet(by="prompt")(media[order], [prompts[i] for i in order])
    assert torch.allclose(shuffled, by_prompt[order], atol=1e-6)


def test_gradients_reach_media_and_autocast_changes_nothing():
    media = torch.rand(4, 3, 8, 8, generator=generator(8)).requires_grad_()
    exemplars = torch.rand(10, 3, 8, 8, generator=generator(9))
    for reward in (VendiSet(), FrechetSet(exemplars), MMDSet(exemplars)):
        assert reward.card.differentiable
        score = reward(media, ["a"] * 4)
        (grad,) = torch.autograd.grad(score[0], media)
        assert torch.isfinite(grad).all() and grad.abs().sum() > 0
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(reward(media, ["a"] * 4), score)


def test_exemplars_from_a_file_and_of_features(tmp_path):
    exemplars = torch.rand(12, 3, 8, 8, generator=generator(1))
    z = colours(exemplars)
    save_file({"features": z}, tmp_path / "e.safetensors")
    media = torch.rand(4, 3, 8, 8, generator=generator(2))
    for make in (FrechetSet, MMDSet):
        scores = [r(media, [""] * 4) for r in (make(exemplars), make(z), make(weights=tmp_path / "e.safetensors"))]
        assert torch.allclose(scores[0], scores[1], atol=1e-6) and torch.allclose(scores[0], scores[2], atol=1e-6)
        with pytest.raises(ValueError, match="compares with exemplars"):
            make()
        with pytest.raises(ValueError, match="compares with exemplars"):
            make(z, weights=tmp_path / "e.safetensors")
        with pytest.raises(ValueError, match="at least 2 exemplars"):
            make(z[:1])


def test_refusals():
    media = torch.rand(2, 3, 4, 4)
    exemplars = torch.rand(5, 3, 4, 4)
    VendiSet()(media, ["a"] * 2)
    for reward in (FrechetSet(exemplars), MMDSet(exemplars)):
        with pytest.raises(ValueError, match="needs 3 samples in a set"):
            reward(media, ["a"] * 2)
    with pytest.raises(ValueError, match="needs 2 samples in a set"):
        VendiSet(by="prompt")(media, ["a", "b"])
    with pytest.raises(ValueError, match=r"features must be \(2, d\)"):
        VendiSet(features=lambda x: x)(media, ["a"] * 2)
    with pytest.raises(ValueError, match="not finite"):
        FrechetSet(exemplars, features=lambda x: x.flatten(1)[:, :3] + (math.nan if len(x) == 3 else 0))(
            torch.rand(3, 3, 4, 4), ["a"] * 3
        )
    with pytest.raises(ValueError, match="bandwidth must be positive"):
        MMDSet(exemplars[:1].expand(4, -1, -1, -1), kernel="gaussian")
    with pytest.raises(ValueError, match="no bandwidth"):
        MMDSet(exemplars, bandwidth=1.0)
    with pytest.raises(ValueError, match="shrinkage"):
        FrechetSet(exemplars, shrinkage=1.5)
    with pytest.raises(ValueError, match="credit must be"):
        VendiSet(credit="shapley")
    with pytest.raises(ValueError, match="give features"):
        VendiSet(modality="audio")
