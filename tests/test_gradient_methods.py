"""The gradient family: truncation laws, DRaFT-LV, ReFL, Adjoint Matching, RTB; each learns and resumes on the toy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from flowalign import checkpoint
from flowalign.collect import Collector, grow
from flowalign.fit import fit
from flowalign.kernels import EulerMaruyama
from flowalign.laws import FlowGrpo, Memoryless
from flowalign.methods.adjoint_matching import AdjointMatching, late_and_random
from flowalign.methods.draft import DRaFT, Jump, depth_law
from flowalign.methods.forward_looking import ForwardLooking
from flowalign.methods.rtb import RTB
from flowalign.noise import Noise
from flowalign.objectives.balance import TrajectoryBalance
from flowalign.options import FitOptions
from flowalign.prepare import prepare
from flowalign.rollout import Tape, rollout
from flowalign.scorer import Scorer
from flowalign.source import Prompts
from flowalign.trajectory import Nodes
from tests.test_policy_gradient import judged
from tests.toy import Bright, Toy
from tests.worlds import F64, Net

OPTIONS = FitOptions(iterations=24, groups=4, size=8, steps=6, lr=3e-3, batch=64, weight_decay=0.0)
SMALL = {
    "full": DRaFT(mode="full"),
    "draft-3": DRaFT(depth=3),
    "lv": DRaFT(depth=1, repeats=4),
    "alignprop": DRaFT(mode="random", eta=1.0),
    "refl": DRaFT(mode="refl", depth=3, ceiling=2.0),
    "kl": DRaFT(depth=3, kl=0.01),
    "adjoint": AdjointMatching(scale=100.0),
    "adjoint-truncated": AdjointMatching(scale=100.0, truncate=3, clip=None),
    "adjoint-subset": AdjointMatching(scale=100.0, late=2, early=2, clip=None),
    "rtb": RTB(scale=100.0),
    "rtb-subset": RTB(scale=100.0, subset=0.5),
}


def start(name: str, options: FitOptions = OPTIONS, **kwargs):
    toy = Toy()
    options = replace(options, lr=1e-2, iterations=max(options.iterations, 6) * 2) if "rtb" in name else options
    recipe = SMALL[name].recipe(toy.times(options.steps))
    policy, parameters = prepare(toy, None, recipe.roles, old=recipe.old, ema=0.9)
    scorer = Scorer(toy, {"bright": Bright()})
    return toy, fit(toy, scorer, Prompts(["a"]), recipe, options, policy=policy, parameters=parameters, **kwargs)


@pytest.mark.parametrize("name", SMALL)
def test_learns(name: str) -> None:
    """On the same noises the trained policy's rewards beat the base's by more than 5 standard errors, paired."""
    toy, metrics = start(name)
    before = judged(toy)
    list(metrics)
    gain = judged(toy) - before
    assert gain.mean() > 5 * gain.std() / len(gain) ** 0.5 and gain.mean() > 0.005


@pytest.mark.parametrize("name", ["alignprop", "refl", "lv", "rtb-subset"])
def test_resumes_bitwise(name: str, tmp_path: Path) -> None:
    """Random truncation, jumps, re-noisings and subsets are functions of (seed, iteration)."""
    o = replace(OPTIONS, iterations=4, checkpoint_every=1)
    whole, metrics = start(name, o, folder=tmp_path / "a")
    list(metrics)
    _, metrics = start(name, o, folder=tmp_path / "b")
    next(metrics), next(metrics)
    metrics.close()
    cut, metrics = start(name, o, folder=tmp_path / "b", resume=True)
    list(metrics)
    assert checkpoint.latest(tmp_path / "a").name == checkpoint.latest(tmp_path / "b").name
    for p, q in zip(whole.denoiser.parameters(), cut.denoiser.parameters(), strict=True):
        assert torch.equal(p, q)


def test_truncation_is_one_suffix() -> None:
    """AlignProp's depth follows N(42, 5)·K/50 truncated to [1, K-1], and is one number for the whole iteration."""
    law = depth_law("random", 1, 50, seed=3)
    firsts = torch.tensor([50 - law(i) for i in range(4000)], dtype=F64)
    assert firsts.min() >= 1 and firsts.max() <= 49
    normal = torch.distributions.Normal(42.0, 5.0)
    edges = torch.arange(0.5, 50.0, 1.0, dtype=F64)
    p = normal.cdf(edges[1:]) - normal.cdf(edges[:-1])
    mean = (p / p.sum() * torch.arange(1, 50)).sum()
    assert abs(firsts.mean() - mean) < 4 * firsts.std() / 4000**0.5
    assert law(7) == law(7)


def test_lv_variance_falls_as_one_over_n() -> None:
    """DRaFT-LV given the finished sample: the gradient's conditional variance is halved by twice the re-noisings."""
    toy = Toy()
    grads: dict[int, list[torch.Tensor]] = {1: [], 4: []}
    for n in grads:
        recipe = replace_repeats(n).recipe(toy.times(6))
        policy, parameters = prepare(toy, None)
        collector = Collector(toy, Scorer(toy, {"b": Curved()}), policy, recipe, 6, 0)
        draw = Prompts(["a"]).draw(0, 1, 4)
        fixed = collector.sample(draw, collector.bind(draw), 0)
        for i in range(300):
            from flowalign.collect import repeated

            tree = repeated(collector, fixed, collector.bind(draw), i)
            r = Curved()(toy.decode(tree.leaves.x, None), [])
            grads[n].append(torch.autograd.grad(r.mean(), parameters[-1])[0])
    one, four = (torch.stack(grads[n]) for n in (1, 4))
    ratio = one.var(0).sum() / four.var(0).sum()
    assert 3.2 < ratio < 5.0
    gap = (one.mean(0) - four.mean(0)).norm() / (one.var(0).sum() / 300 + four.var(0).sum() / 300).sqrt()
    assert gap < 3


def replace_repeats(n: int) -> DRaFT:
    return DRaFT(depth=1, repeats=n)


class Curved(Bright):
    """A reward whose gradient depends on the sample, so that re-noising matters."""

    def __call__(self, media, prompts, meta=None):
        return torch.sin(6 * media).mean((1, 2, 3))


def test_refl_jumps_to_the_data() -> None:
    """No gradient before the drawn step; the taped part is one step; every late step is drawn."""
    jump = Jump(10, 4, seed=0)
    seen = set()
    for i in range(60):
        tape = jump.tape(i)
        grid = jump.grid(torch.linspace(1, 0, 11))
        assert tape.first == len(grid) - 2 and grid[-1] == 0
        seen.add(tape.first)
    assert seen == {6, 7, 8, 9}


def saved_bytes(steps: int, last: int, checkpointed: bool) -> int:
    """Bytes that autograd keeps for a rollout of ``steps`` of which the last are taped."""
    toy, total = Toy(), 0
    toy.denoiser = nn.Sequential(nn.Linear(13, 512), nn.Tanh(), nn.Linear(512, 12))
    policy, _ = prepare(toy, None)

    def pack(t: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        rollout(policy, EulerMaruyama(), toy.times(steps), Nodes.enter(torch.randn(16, 3, 2, 2)),
                toy.encode(["a"] * 16), noise=Noise(0), tape=Tape(steps - last, checkpointed))  # fmt: skip
    return total


@pytest.mark.parametrize("last", [2, 6])
def test_saved_bytes_do_not_depend_on_the_prefix(last: int) -> None:
    """The same for any untaped prefix, linear in the taped steps, and far flatter per step with checkpointing."""
    assert saved_bytes(8, last, False) == saved_bytes(16, last, False)
    plain, thin = (
        (saved_bytes(8, last, c) - saved_bytes(8, 1, c)) / (last - 1) for c in (False, True)
    )  # fmt: skip
    assert plain > 0 and thin < 0.3 * plain


def test_rtb_subset_gradient_is_unbiased() -> None:
    """The gradient of random halves, averaged over many draws, is the full gradient."""
    torch.manual_seed(0)
    net = Net(dim=2, rows=1).double()
    from flowalign.batches import paths
    from flowalign.experience import Experience
    from flowalign.policy import Policy, Weights

    policy = Policy(net, {"reference": Weights(list(net.parameters()))})
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn_like(p)
    kernel, times = EulerMaruyama(Memoryless()), torch.linspace(1, 0, 5, dtype=F64)
    one_row = torch.zeros(8, dtype=torch.long)
    diffs = []
    for i in range(150):
        z = torch.randn(8, 2, dtype=F64, generator=torch.Generator().manual_seed(i))
        tree = rollout(policy, kernel, times, Nodes.enter(z, one_row), noise=Noise(i))
        e = Experience(
            policy, tree, None, one_row[:1], {"r": tree.leaves.x[:, 0]}, {"r": 1.0}, lambda x, r: {}, iteration=i
        )
        pair = []
        for subset in (0.5, 1.0):
            loss = TrajectoryBalance(kernel, 2.0, subset=subset)(policy, paths(e)).terms["balance"]
            pair.append(torch.autograd.grad(loss, [net.outer.weight, net.inner.bias]))
        diffs.append(torch.cat([(a - b).flatten() for a, b in zip(*pair, strict=True)]))
    diff = torch.stack(diffs)  # on the same paths: paired
    z = diff.mean(0) / (diff.std(0) / len(diff) ** 0.5)
    assert z.abs().max() < 4.5 and diff.abs().max() > 1e-3


def test_late_and_random_steps() -> None:
    toy = Toy()
    policy, _ = prepare(toy, None)
    tree = rollout(policy, EulerMaruyama(Memoryless()), toy.times(8), Nodes.enter(torch.randn(3, 3, 2, 2)),
                   toy.encode(["a"] * 3), noise=Noise(0))  # fmt: skip
    from flowalign.experience import Experience

    e = Experience(policy, tree, None, torch.zeros(3, dtype=torch.long), {}, {}, lambda x, r: {}, iteration=4)
    kept = late_and_random(3, 2, 8)(tree.transitions(), e)
    levels = sorted(set(kept.level.tolist()))
    assert levels[-3:] == [5, 6, 7] and len(levels) == 5 and len(kept) == 15
    draws = [late_and_random(3, 2, 8)(tree.transitions(), replace(e, iteration=i)).level.tolist() for i in range(20)]
    assert {k for d in draws for k in d} == set(range(8)) and len({tuple(d) for d in draws}) > 5


def test_balance_samples_with_the_noise_that_is_asked_for() -> None:
    times = torch.linspace(1, 0, 7)
    for method in (RTB, ForwardLooking):
        free, other = (method(memoryless=m, noise=0.4).recipe(times).kernel.law for m in (True, False))
        assert isinstance(free, Memoryless) and other == FlowGrpo(0.4)


@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_the_clip_grows_with_the_square_of_the_scale(scale: float) -> None:
    """Losses at the base are λ² times what they are for λ = 1, so the same samples are clipped whatever λ is."""
    assert AdjointMatching(scale=scale, clip=1.6).recipe(torch.linspace(1, 0, 5)).objective.clip == 1.6 * scale**2
    assert AdjointMatching(scale=scale, clip=None).recipe(torch.linspace(1, 0, 5)).objective.clip is None


def test_grown_batches_keep_the_noise_of_their_samples() -> None:
    """A microbatch's samples start from the same noise as in the whole draw: keys travel with the rows."""
    toy = Toy()
    recipe = DRaFT(mode="full").recipe(toy.times(4))
    policy, _ = prepare(toy, None)
    collector = Collector(toy, Scorer(toy, {"b": Bright()}), policy, recipe, 4, 0)
    draw = Prompts(["a", "b", "c"]).draw(0, 3, 4)
    whole, _ = grow(collector, draw, 0, Tape())
    part, _ = grow(collector, draw.part([2]), 0, Tape())
    assert torch.allclose(whole.trajectory.leaves.x[8:], part.trajectory.leaves.x, atol=1e-6)


@pytest.mark.parametrize("bad", [DRaFT(depth=9), DRaFT(depth=2, repeats=2)])
def test_bad_settings(bad: DRaFT) -> None:
    with pytest.raises(ValueError, match=r"depth|repeats"):
        bad.recipe(torch.linspace(1, 0, 7))


class Fixed(Bright):
    """What a prompt is worth, whatever the picture."""

    def __call__(self, media, prompts, meta=None):
        return 0 * media.mean((1, 2, 3)) + torch.tensor([0.2 if p == "a" else 0.8 for p in prompts])


@pytest.mark.parametrize(
    "method", [RTB(scale=5.0, log_z="learned"), ForwardLooking(scale=5.0, log_z="learned", span=6)]
)
def test_every_prompt_learns_a_log_z_of_its_own(method: RTB | ForwardLooking) -> None:
    """One prompt per iteration, so that all are row 0: log Z is λ r of each prompt, .2 and .8 of 5."""
    toy, source = Toy(), Prompts(["a", "b"])
    recipe = method.recipe(toy.times(6))
    policy, parameters = prepare(toy, None, recipe.roles)
    options = replace(OPTIONS, iterations=120, groups=1, size=4, lr=1e-12, lr_objective=0.1)
    list(fit(toy, Scorer(toy, {"r": Fixed()}), source, recipe, options, policy=policy, parameters=parameters))
    learned = recipe.objective.log_z(torch.arange(2), toy.encode(["a", "b"]))
    assert torch.allclose(learned, torch.tensor([1.0, 4.0]), atol=0.1)
