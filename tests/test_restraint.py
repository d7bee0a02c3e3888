"""What restrains any method (ceiling, base samples, data), what is refused before a run, and what stops one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from flowalign import checkpoint
from flowalign.blame import blame, finite_gradient
from flowalign.collect import collect, grow
from flowalign.config import compose, to_dict
from flowalign.fit import fit
from flowalign.fit_checks import check_gradients
from flowalign.kernels import EulerMaruyama
from flowalign.methods import resolve
from flowalign.methods.adjoint_matching import AdjointMatching
from flowalign.methods.dance_grpo import DanceGRPO
from flowalign.methods.draft import DRaFT
from flowalign.methods.flow_grpo import FlowGRPO
from flowalign.methods.nabla_db import NablaDB
from flowalign.methods.rtb import RTB
from flowalign.noise import START, Noise, mix
from flowalign.objectives.base import Losses, Objective
from flowalign.options import FitOptions
from flowalign.policy import Policy
from flowalign.prepare import prepare
from flowalign.process import Rectified
from flowalign.replay import checkpointed
from flowalign.restraint import Restraint, anchors
from flowalign.rollout import Tape, rollout
from flowalign.scorer import Scorer
from flowalign.source import Prompt, Prompts
from flowalign.trainer import Trainer
from flowalign.trajectory import Nodes
from tests.test_reward_gradients import bench, grown_loss, slope_gap
from tests.toy import Bright, Toy
from tests.worlds import F64

OPTIONS = FitOptions(iterations=5, groups=2, size=4, steps=6, lr=3e-3, batch=64, weight_decay=0.0, checkpoint_every=2)


def run(method, toy=None, reward=None, options=OPTIONS, restraint=None, source=None, **kwargs):
    """A training run on the toy."""
    toy = toy or Toy()
    recipe = replace(method.recipe(toy.times(options.steps)), restraint=restraint or Restraint())
    policy, parameters = prepare(toy, None, recipe.roles, old=recipe.old)
    scorer = Scorer(toy, {"bright": reward or Bright()})
    stream = fit(
        toy, scorer, source or Prompts(["a", "b"]), recipe, options, policy=policy, parameters=parameters, **kwargs
    )
    return toy, scorer, stream


# ------------------------------------------------------------------------------------------------------------ ceiling


def test_ceiling_of_backpropagation() -> None:
    """The gradient is that of the samples below it alone; a ceiling above all changes no bit, one below all stops."""
    collector, parameters, draw = bench(DRaFT(mode="full"))
    rewards = grow(collector, draw, 0, Tape())[0].total.detach()
    top = float(rewards.sort().values[2:4].mean())

    def gradient(ceiling: float | None, mask: torch.Tensor | None = None) -> torch.Tensor:
        recipe = replace(collector.recipe, restraint=Restraint(ceiling=ceiling))
        data, _ = grow(replace(collector, recipe=recipe), draw, 0, Tape())
        loss = -(data.total if mask is None else data.total * mask).mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    assert torch.allclose(gradient(top), gradient(None, (rewards < top).double()), atol=1e-12)
    assert (gradient(top) - gradient(None)).abs().max() > 1e-4
    assert torch.equal(gradient(float(rewards.max()) + 1), gradient(None))
    assert (gradient(float(rewards.min()) - 1) == 0).all()


def test_ceiling_of_a_policy_gradient() -> None:
    """Credit sees the weighted sum cut: whoever is above ties; the rewards by name, as reported, do not change."""
    method = FlowGRPO(clip=1e-2, kl=0.0)
    (free, _, draw), (cut, _, _) = (bench(method, restraint=Restraint(ceiling=c)) for c in (None, 0.0))
    a, b = (collect(c, draw, 0) for c in (free, cut))
    assert torch.equal(a.rewards["r"], b.rewards["r"]) and torch.equal(b.total, a.total.clamp_max(0.0))
    assert (a.total > 0).sum() >= 2 and (a.total < 0).any()
    by_hand = free.recipe.credit(replace(a, ceiling=0.0))[-1]
    assert torch.equal(cut.recipe.credit(b)[-1], by_hand) and not torch.equal(by_hand, free.recipe.credit(a)[-1])
    x = b.trajectory.leaves
    assert torch.equal(b.judge(x.x, x.row), b.total)


def test_ceiling_where_rewards_are_apart_is_refused() -> None:
    toy = Toy()
    recipe = replace(DanceGRPO(per_reward=True).recipe(toy.times(6)), restraint=Restraint(ceiling=0.5))
    with pytest.raises(ValueError, match="one advantage for each"):
        check_gradients(toy, Scorer(toy, {"b": Bright()}), recipe)


# ------------------------------------------------------------------------------------------------- mix, pre-training


@pytest.mark.parametrize("kind", ["mix", "pretrain"])
def test_anchor_is_the_denoising_loss(kind: str) -> None:
    """On the base's own samples, or on the prompts' media: weight · mean ‖v - (ε - x0)‖², gradient and all."""
    media = [torch.full((3, 2, 2), v, dtype=F64) for v in (0.2, 0.8)]
    source = Prompts([Prompt("a", {"media": media[0]}), Prompt("bb", {"media": media[1]})])
    restraint = Restraint(**{kind: 0.3}, samples=8)
    collector, parameters, draw = bench(DRaFT(), source=source, restraint=restraint)
    (anchor,) = anchors(restraint, collector, draw, 4)
    if kind == "pretrain":
        assert torch.equal(anchor.x0, torch.stack([m["media"] for m in draw.meta]))
    else:  # the base's ODE from noises of its own: the toy runs its first weights where no graph is kept
        row = torch.arange(2)
        z = Noise(mix(3, 4, 700), draw.keys).normal(START, row, torch.zeros_like(row), (3, 2, 2)).double()
        tree = rollout(collector.policy, EulerMaruyama(), collector.pipeline.times(6), Nodes.enter(z),
                       collector.bind(draw).cond, noise=Noise(0))  # fmt: skip
        assert torch.equal(anchor.x0, tree.leaves.x)
    assert len(anchor.x0) == 2
    for p in parameters:
        p.data = p.data + 0.1
    slope, gap = slope_gap(lambda: anchor.loss(collector.policy, 3), parameters)
    assert abs(slope) > 1e-3 and gap < 1e-7
    assert torch.equal(anchor.loss(collector.policy, 3), anchor.loss(collector.policy, 3))
    assert not torch.equal(anchor.loss(collector.policy, 3), anchor.loss(collector.policy, 4))

    class Knows:  # what says ε - x0 exactly has no loss
        process = Rectified()

        def posterior(self, x, t, cond):
            return self.process.posterior(x, t, x0=anchor.x0)

    assert anchor.loss(Policy(Knows()), 3) < 1e-20


def test_mix_adds_exactly_its_gradient() -> None:
    """The gradient with it is the gradient without it plus weight times the loss's own: for any method."""
    for method in (DRaFT(depth=2), FlowGRPO(clip=1e-2, kl=0.0)):
        restraint = Restraint(mix=0.7)
        collector, parameters, draw = bench(method, restraint=restraint)
        for p in parameters:
            p.data = p.data + 0.1
        trainer = Trainer(collector.policy, parameters, collector.recipe, Prompts(["a"]), OPTIONS, None)
        held = anchors(restraint, collector, draw, 0)
        expected = torch.autograd.grad(held[0].loss(collector.policy, 0), parameters)
        from flowalign.minibatch import minibatches

        e = None if method.recipe(torch.linspace(1, 0, 7)).tape else collect(collector, draw, 0)
        (batch,) = minibatches(collector.recipe, collector, e, draw, OPTIONS, 0, 0)
        trainer.backward(batch, 1.0, False)
        before = [p.grad.clone() for p in parameters]
        metrics = trainer.hold(held)
        assert set(metrics) == {"loss/mix"}
        for p, old, g in zip(parameters, before, expected, strict=True):
            assert torch.allclose(p.grad - old, g, atol=1e-12) and g.abs().max() > 0


def test_mix_holds_a_run_and_nothing_is_nothing() -> None:
    """A heavy mix keeps the weights near their start; no restraint costs no evaluation and changes no bit."""
    moved, paid = {}, {}
    for name, restraint in {"none": None, "off": Restraint(samples=3), "mix": Restraint(mix=30.0)}.items():
        toy = Toy()
        start = [p.detach().clone() for p in toy.denoiser.parameters()]
        _, scorer, stream = run(DRaFT(depth=2), toy, restraint=restraint, options=replace(OPTIONS, iterations=12))
        list(stream)
        moved[name] = torch.cat([(p - q).flatten() for p, q in zip(toy.denoiser.parameters(), start, strict=True)])
        paid[name] = scorer.ledger.evaluations
    assert torch.equal(moved["none"], moved["off"]) and paid["none"] == paid["off"] < paid["mix"]
    assert moved["mix"].detach().norm() < 0.7 * moved["none"].detach().norm()


def test_pretraining_without_data_is_refused() -> None:
    _, _, stream = run(DRaFT(), restraint=Restraint(pretrain=1.0))
    with pytest.raises(ValueError, match=r"brings none"):
        next(stream)
    with pytest.raises(ValueError, match="must not be negative"):
        Restraint(mix=-1.0)


def test_restraint_in_a_configuration() -> None:
    """A key of the file and the command line; the method's own where it is not given; the base is a role of it."""
    config = compose({"method": "draft", "restraint": {"mix": 0.1, "ceiling": 2.0}}, None)
    assert config.restraint == Restraint(2.0, 0.1) and compose(to_dict(config), None).restraint == config.restraint
    assert compose({"method": "draft"}, None).restraint is None
    recipe = DRaFT().recipe(torch.linspace(1, 0, 7))
    assert recipe.roles == () and replace(recipe, restraint=config.restraint).roles == ("reference",)
    with pytest.raises(ValueError, match="no key 'mixx'"):
        compose({"method": "draft", "restraint": {"mixx": 0.1}}, None)


# ------------------------------------------------------------------------------------------ refused before any sampling

BY_GRADIENT = ("draft", "srpo", "instruct-video", "ipro", "ctrl-u", "r0", "adjoint-matching", "nabla-db")


@pytest.mark.parametrize("name", BY_GRADIENT)
def test_a_reward_without_gradient_is_refused(name: str) -> None:
    """Before a single evaluation, with the reward's name and what to do; losses that only compare scores take it."""
    method = resolve(name).presets()["demo"].method
    _, scorer, stream = run(method, reward=Bright(differentiable=False), options=replace(OPTIONS, steps=8))
    with pytest.raises(ValueError, match=r"'bright' gives no gradient .* flow-grpo"):
        next(stream)
    assert scorer.ledger.evaluations == scorer.ledger.rewards == 0


@pytest.mark.parametrize("name", ["rtb", "forward-looking", "flow-grpo"])
def test_a_reward_without_gradient_is_enough_for_the_others(name: str) -> None:
    method = resolve(name).presets()["demo"].method
    _, _, stream = run(method, reward=Bright(differentiable=False), options=replace(OPTIONS, iterations=1))
    assert len(list(stream)) == 1


def test_guidance_inside_the_adjoint_is_refused() -> None:
    """A pipeline whose guidance is on, or a guide of the rollout; not where nothing is carried through the chain."""

    class WithGuidance(Toy):
        guided = True

    toy = WithGuidance()
    scorer = Scorer(toy, {"b": Bright()})
    exact = AdjointMatching().recipe(toy.times(6))
    with pytest.raises(ValueError, match=r"guidance is on.*guidance: false"):
        check_gradients(toy, scorer, exact)
    from flowalign.guidance import Along

    guided = replace(exact, guide=Along(lambda x, p, t, row: x))
    plain = Toy()
    with pytest.raises(ValueError, match="guidance is on"):
        check_gradients(plain, Scorer(plain, {"b": Bright()}), guided)
    for method in (AdjointMatching(solver="linear"), NablaDB(), DRaFT(), RTB()):
        check_gradients(toy, scorer, method.recipe(toy.times(6)))
    toy.guided = False
    check_gradients(toy, scorer, exact)


# ----------------------------------------------------------------------------------------------------- not finite: stop


class Sharp(Bright):
    """Turns into √|m - m| after so many calls: its value is fine, its gradient is not."""

    def __init__(self, after: int) -> None:
        object.__setattr__(self, "differentiable", True)
        object.__setattr__(self, "left", after)

    def __call__(self, media, prompts, meta=None):
        object.__setattr__(self, "left", self.left - 1)
        m = media.mean((1, 2, 3))
        return m if self.left >= 0 else m + (m - m.detach()).abs().sqrt()


def test_a_reward_whose_gradient_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    """The step is named and not taken, the term and the place are named, and the last good weights are saved."""
    good, _, stream = run(DRaFT(depth=2), options=replace(OPTIONS, iterations=3))
    list(stream)
    toy, _, stream = run(DRaFT(depth=2), reward=Sharp(3), folder=tmp_path)  # checkpoints are due after 2, 4
    assert [next(stream)["iteration"] for _ in range(3)] == [1.0, 2.0, 3.0]
    with pytest.raises(FloatingPointError) as caught:
        next(stream)
    words = str(caught.value)
    assert "optimiser step 4 (iteration 3) was not taken" in words and "last good ones" in words
    assert "term 'reward'" in words and "already at the finished sample: the decoder or the reward" in words
    assert f"The last good weights are in {checkpoint.latest(tmp_path)}, and a resumed run goes on from there" in words
    saved = checkpoint.load(checkpoint.latest(tmp_path))
    assert saved["iteration"] == 3
    for p, q, w in zip(toy.denoiser.parameters(), good.denoiser.parameters(), saved["weights"], strict=True):
        assert torch.equal(p, q) and torch.equal(p, w) and torch.isfinite(p).all() and p.grad is None
    again, _, stream = run(DRaFT(depth=2), folder=tmp_path, resume=True)  # with the reward mended
    assert [m["iteration"] for m in stream] == [4.0, 5.0]
    whole, _, stream = run(DRaFT(depth=2))
    list(stream)
    for p, q in zip(again.denoiser.parameters(), whole.denoiser.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_stop_between_the_updates_of_an_iteration_resumes_exactly(tmp_path: Path) -> None:
    """What is resumed from is a whole iteration; the last good weights, of half a one, lie beside it."""
    options = replace(OPTIONS, updates=2)
    toy, _, stream = run(DRaFT(depth=2), reward=Sharp(7), options=options, folder=tmp_path)  # due after 2, 4
    assert [next(stream)["iteration"] for _ in range(3)] == [1.0, 2.0, 3.0]
    with pytest.raises(FloatingPointError, match=r"optimiser step 8 \(iteration 3\) was not taken") as caught:
        next(stream)
    good, newest = checkpoint.load(tmp_path / checkpoint.LAST_GOOD), checkpoint.latest(tmp_path)
    assert newest.name == checkpoint.name(2) and (good["iteration"], good["steps"]) == (3, 7)
    assert all(torch.equal(p, w) for p, w in zip(toy.denoiser.parameters(), good["weights"], strict=True))
    assert f"{tmp_path / checkpoint.LAST_GOOD}; a resumed run goes on from {newest}" in str(caught.value)
    again, _, stream = run(DRaFT(depth=2), options=options, folder=tmp_path, resume=True)  # with the reward mended
    assert [m["iteration"] for m in stream] == [3.0, 4.0, 5.0]
    whole, _, stream = run(DRaFT(depth=2), options=options)
    list(stream)
    for p, q in zip(again.denoiser.parameters(), whole.denoiser.parameters(), strict=True):
        assert torch.equal(p, q)
    _, _, stream = run(DRaFT(depth=2), reward=Sharp(1), options=options, folder=tmp_path / "first")
    with pytest.raises(FloatingPointError, match="a resumed run begins anew"):
        next(stream)
    assert checkpoint.load(tmp_path / "first" / checkpoint.LAST_GOOD)["steps"] == 1


class Cracked(Toy):
    """A network whose Jacobian is infinite at one time: the value is the same."""

    def posterior(self, x, t, cond):
        if abs(float(torch.as_tensor(t).reshape(-1)[0]) - 4 / 6) < 1e-6 and x.requires_grad:
            x = x + (x - x.detach()).abs().sqrt()
        return super().posterior(x, t, cond)


def test_the_sampling_step_is_named() -> None:
    """A network that breaks at t = 4/6: in backpropagation from that step on, in the adjoint over it."""
    _, _, stream = run(DRaFT(mode="full"), Cracked())
    with pytest.raises(FloatingPointError, match=r"term 'reward' .* from sampling step 2 \(t = 0.6667\) on"):
        next(stream)
    _, _, stream = run(AdjointMatching(scale=10.0), Cracked())
    with pytest.raises(FloatingPointError, match=r"adjoint carried back over step 2 \(t = 0.6667\) is not finite"):
        next(stream)
    _, _, stream = run(AdjointMatching(scale=10.0), reward=Sharp(1))
    with pytest.raises(FloatingPointError, match="the reward's gradient is not finite for sample 0"):
        next(stream)


class Three(Objective):
    """A good term, one that is infinite, one whose gradient is not a number."""

    wants = "transitions"

    def __init__(self, names: str) -> None:
        super().__init__()
        self.names = names
        self.w = nn.Parameter(torch.ones(2))

    def forward(self, policy, batch, cond=None):
        w = self.w
        terms = {"good": w.sum(), "big": w.sum() * torch.inf, "edge": (w - w.detach()).abs().sqrt().sum()}
        return Losses({k: terms[k] for k in terms if k[0] in self.names}, {})


def test_blame_names_terms() -> None:
    loss = Three("gbe")
    words = blame(loss, None, None, None, list(loss.parameters()))
    assert "'big' itself is inf" in words and "'edge' (0) has a gradient that is not finite in 1 tensors" in words
    assert "good" not in words
    good = Three("g")
    assert "their sum overflows" in blame(good, None, None, None, list(good.parameters()))
    assert finite_gradient(list(good.parameters()))  # no gradient yet
    good.w.grad = torch.tensor([1.0, torch.inf])
    assert not finite_gradient(list(good.parameters()))


def test_a_mix_that_is_not_finite_is_named() -> None:
    media = torch.full((3, 2, 2), 0.5)
    source = Prompts([Prompt("a", {"media": media}), Prompt("b", {"media": media * torch.nan})])
    _, _, stream = run(DRaFT(), restraint=Restraint(pretrain=1.0), source=source)
    with pytest.raises(FloatingPointError, match=r"restraint's term 'pretrain'"):
        next(stream)


# ------------------------------------------------------------------------------------------- what cannot be recomputed


def test_checkpointed_is_the_function() -> None:
    """Values, gradients and, on a tuple, both of each."""
    x = torch.randn(3, 4, dtype=F64, requires_grad=True)
    f = lambda z: (torch.sin(z) ** 2, z.exp().sum(1))  # noqa: E731
    for out, same in zip(f(x), checkpointed(f, x, "f"), strict=True):
        assert torch.equal(out, same)
        a, b = (torch.autograd.grad(z.sum(), x, retain_graph=True)[0] for z in (out, same))
        assert torch.equal(a, b)


@pytest.mark.parametrize("fault", ["remembers", "raises"])
def test_what_cannot_be_checkpointed_says_so(fault: str) -> None:
    """A decoder that counts: the second run differs, or fails as diffusers' causal ones did; nothing is silent."""
    runs = 0

    def decode(z: torch.Tensor) -> torch.Tensor:
        nonlocal runs
        runs += 1
        if runs > 1 and fault == "raises":
            raise IndexError("feat_idx out of range")
        return torch.sin(z * runs)

    x = torch.randn(2, 3, 300, requires_grad=True)
    media = checkpointed(decode, x, "the decoder of Counting")
    why = "the second run ended up" if fault == "remembers" else r"raised IndexError: feat_idx out of range"
    with pytest.raises(RuntimeError, match=rf"the decoder of Counting cannot be checkpointed: .*{why}"):
        media.mean().backward()
    assert x.grad is None


def test_an_error_of_the_first_run_is_its_own() -> None:
    def broken(z: torch.Tensor) -> torch.Tensor:
        raise IndexError("at once")

    with pytest.raises(IndexError, match="at once"):
        checkpointed(broken, torch.ones(1, requires_grad=True), "it")


class Counting(Bright):
    """Looks at another pixel each time."""

    def __init__(self) -> None:
        object.__setattr__(self, "differentiable", True)
        object.__setattr__(self, "calls", 0)

    def __call__(self, media, prompts, meta=None):
        object.__setattr__(self, "calls", self.calls + 1)
        return torch.sin(3 * media.flatten(1)[:, self.calls])


def test_a_reward_that_remembers_cannot_be_recomputed() -> None:
    """One that looks elsewhere in the second run is refused; one that does not gives the plain gradient to the bit."""
    collector, parameters, draw = bench(DRaFT())
    plain = torch.autograd.grad(grown_loss(collector, draw), parameters)
    collector.scorer.checkpoint = True
    for a, b in zip(plain, torch.autograd.grad(grown_loss(collector, draw), parameters), strict=True):
        assert torch.equal(a, b)
    collector, parameters, draw = bench(DRaFT(), reward=Counting())
    collector.scorer.checkpoint = True
    loss = grown_loss(collector, draw)
    with pytest.raises(RuntimeError, match="the decoder or a reward cannot be checkpointed"):
        torch.autograd.grad(loss, parameters)
