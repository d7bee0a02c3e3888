"""Rewards made of rewards: values, gradients, one evaluation each, state."""

import math

import pytest
import torch

from flowalign.hearing import hearing
from flowalign.protocols import Card, Reward
from flowalign.rewards.algebra import (
    Cached,
    Clip,
    Composite,
    Constrained,
    Constraint,
    LogSigmoid,
    Masked,
    MicroBatch,
    Product,
    SoftMin,
    Standardise,
    Substitute,
    Weighted,
    reward,
    soft_min,
)
from flowalign.rewards.base import Judge, Unjudged
from flowalign.rewards.caching import content_key

torch.set_num_threads(1)


class Channel(Judge):
    """The mean of one colour; counts its calls and the samples it saw."""

    def __init__(self, index, name, **card):
        super().__init__()
        self.index, self.calls, self.seen = index, 0, 0
        self.card = Card(name, name, **{"differentiable": True, **card})

    def score(self, media, prompts, meta):
        self.calls, self.seen = self.calls + 1, self.seen + len(media)
        return media[:, self.index].mean((-1, -2))


@pytest.fixture
def red():
    return Channel(0, "red", licence="MIT", text=77)


@pytest.fixture
def green():
    return Channel(1, "green", range=(-1.0, 2.0), licence="BSD", text=35)


@pytest.fixture
def x():
    return torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))


P = list("abcde")


def means(x):
    return x[:, 0].mean((-1, -2)), x[:, 1].mean((-1, -2))


def test_operators_are_sums_and_products(red, green, x):
    r, g = means(x)
    for expression, want in (
        (0.5 * red + green, 0.5 * r + g),
        (red - 2 * green, r - 2 * g),
        (-red, -r),
        (red * green, r * g),
        (2 * (red + green) * 3, 6 * (r + g)),
        (red / 2, r / 2),
        (sum([red, green, red]), 2 * r + g),
        ((red + green) * green, (r + g) * g),
    ):
        assert isinstance(expression, Reward) and torch.allclose(expression(x, P), want, atol=1e-6)
    flat = 0.5 * red + green + red
    assert isinstance(flat, Weighted) and len(flat.members) == 3 and flat.weights == (0.5, 1.0, 1.0)
    assert flat.card.name == "0.5*red + green + red"


def test_cards_combine(red, green):
    card = (0.5 * red - green).card
    assert card.range == (-2.0, 1.5) and card.differentiable and card.text == 35 and card.licence == "MIT; BSD"
    assert (red * green).card.range == (-1.0, 2.0)
    assert not (red + Channel(2, "blue", differentiable=False)).card.differentiable
    with pytest.raises(ValueError, match="share no modality"):
        red + Channel(0, "sound", modality=("audio",))


def test_a_reward_used_twice_is_computed_once(red, green, x):
    expression = Weighted([red, red * green, Clip(red, 0.4)], [1, 1, 1])
    r, g = means(x)
    assert torch.allclose(expression(x, P), r + r * g + r.clamp_min(0.4))
    assert red.calls == 1 and green.calls == 1
    parts = expression.parts(x, P)
    assert set(parts) == {"red", "green", "total"} and torch.allclose(parts["red"], r)
    twins = (Channel(0, "same") + Channel(1, "same")).parts(x, P)
    assert set(twins) == {"same", "same#2", "total"} and torch.allclose(twins["same#2"], g)
    assert red.calls == 2 and torch.allclose(parts["total"], r + r * g + r.clamp_min(0.4))


def test_gradients_flow_through_every_composite(red, green, x):
    y = (0.2 + 0.5 * x).double().requires_grad_()
    for make in (
        lambda: 0.5 * red + green,
        lambda: red * green,
        lambda: Clip(red, -1, 2),
        lambda: Standardise(red, 0.3, 2.0),
        lambda: LogSigmoid(red, 0.4, 0.1),
        lambda: SoftMin([red, green], 0.1),
        lambda: Constrained(red, [Constraint(green, 0.5, start=2.0)]),
        lambda: MicroBatch(red + green, 2),
        lambda: Cached(red + green),
    ):
        composite = make()
        assert torch.autograd.gradcheck(lambda v, c=composite: c(v, P), (y,), fast_mode=True), composite.card.name
    outside = Clip(red, 2.0, 3.0)(y, P)
    assert torch.autograd.grad(outside.sum(), y)[0].abs().sum() == 0  # good enough: it stops pulling


def test_standardise_with_frozen_statistics(red, x):
    base = torch.tensor([0.1, 0.2, 0.6])
    z = Standardise.fit(red, base)
    assert torch.allclose(z(x, P), (means(x)[0] - base.mean()) / base.std(), atol=1e-6)
    before = z(x, P)
    z(x * 0.1, P)
    assert torch.equal(z(x, P), before)  # nothing drifts with what is scored
    other = Standardise(red, 0.0, 1.0)
    other.load_state_dict(z.state_dict())
    assert torch.equal(other(x, P), before)
    for bad in (torch.ones(4), torch.tensor([1.0]), torch.tensor([1.0, math.nan])):
        with pytest.raises(ValueError):
            Standardise.fit(red, bad)


def test_log_sigmoid(red, x):
    want = torch.log(torch.sigmoid((means(x)[0] - 0.4) / 0.2))
    assert torch.allclose(LogSigmoid(red, 0.4, 0.2)(x, P), want, atol=1e-6)


def test_soft_min_holds_mean_min_and_variance():
    g = torch.Generator().manual_seed(1)
    r = torch.randn(4, 100, generator=g, dtype=torch.float64)
    assert torch.allclose(soft_min(r, math.inf), r.mean(0)) and torch.allclose(soft_min(r, 0.0), r.amin(0))
    assert torch.allclose(soft_min(r, 1e6), r.mean(0), atol=1e-5)
    assert torch.allclose(soft_min(r, 1e-3), r.amin(0), atol=5e-3)
    gaps = []
    for beta in (50.0, 100.0):  # second order: the error of mean - var / 2 beta falls as beta^-2
        second = r.mean(0) - r.var(0, correction=0) / (2 * beta)
        gaps.append((soft_min(r, beta) - second).abs().max())
    assert 3.5 < gaps[0] / gaps[1] < 4.5
    assert (soft_min(r, 1.0) <= r.mean(0)).all() and (soft_min(r, 1.0) >= r.amin(0)).all()


def test_ensembles(red, green, x):
    both = torch.stack(means(x))
    assert torch.allclose(SoftMin([red, green], 0.0)(x, P), both.amin(0))
    assert torch.allclose(SoftMin([red, green], math.inf)(x, P), both.mean(0))
    uwo = SoftMin.uncertainty_weighted([red, green], 0.01)
    assert uwo.beta == 50 and torch.allclose(uwo(x, P), both.mean(0) - 0.01 * both.var(0, correction=0), atol=1e-5)
    assert SoftMin.uncertainty_weighted([red, green], 0.0).beta == math.inf
    with pytest.raises(ValueError):
        SoftMin([red], -1.0)


def taught(c, x):
    """One iteration of the loop: score while it listens, then let the multipliers learn."""
    with hearing() as heard:
        scores = c(x, P[: len(x)])
    return scores, c.dual.learn([what for _, what in heard], 0, lambda v: v)


def test_lagrangian_multiplier_grows_while_broken_and_resumes(red, green, x):
    c = Constrained(red, [Constraint(green, bound=0.9, rate=0.5, limit=1.0)])
    r, g = means(x)
    assert torch.allclose(c(x, P), r)  # the multiplier starts at 0
    assert c.multipliers.item() == 0  # scoring, as in an evaluation, moves nothing
    scores, metrics = taught(c, x)
    want = 0.5 * (0.9 - g.double().mean())
    assert torch.allclose(scores, r) and c.multipliers.item() == pytest.approx(want.item(), abs=1e-6)
    assert metrics == pytest.approx({"lambda/green": want.item(), "slack/green": -2 * want.item()}, abs=1e-6)
    assert torch.allclose(c(x, P), r + want * (g - 0.9), atol=1e-6)
    for state in ("state_dict", "dual"):
        twin = Constrained(red, [Constraint(green, bound=0.9, rate=0.5, limit=1.0)])
        if state == "dual":
            twin.dual.load_state_dict(c.dual.state_dict())
        else:
            twin.load_state_dict(c.state_dict())
        assert torch.equal(twin(x, P), c(x, P))
    assert "lambda/green" in c.parts(x, P)
    for _ in range(20):
        taught(c, x)
    assert c.multipliers.item() == 1.0  # held at its limit
    for _ in range(20):
        taught(c, torch.ones_like(x))
    assert c.multipliers.item() == 0.0  # slack brings it back


def test_dual_ascent_solves_a_constrained_problem(green):
    """max -share² subject to share ≥ .6: the answer is share = .6 with multiplier 2 · .6."""

    @reward("less", differentiable=True)
    def less(media, prompts, meta):
        return -(media[:, 1].mean((-1, -2)) ** 2)

    c = Constrained(less, [Constraint(green, 0.6, rate=0.5)])
    share = torch.tensor(0.2)
    for _ in range(80):
        x = share.view(1, 1, 1, 1).expand(1, 3, 2, 2).clone().requires_grad_()
        share = share + 0.2 * torch.autograd.grad(taught(c, x)[0].sum(), x)[0].sum()
    assert abs(share.item() - 0.6) < 0.01 and abs(c.multipliers.item() - 1.2) < 0.03


def test_micro_batches_equal_one_batch(red, x):
    meta = [{"i": i} for i in range(5)]

    @reward("pair")
    def pair(media, prompts, meta):
        return torch.tensor([ord(p) + m["i"] for p, m in zip(prompts, meta, strict=True)], dtype=torch.float32)

    for size in (1, 2, 5, 9):
        assert torch.equal(MicroBatch(red, size)(x, P), red(x, P))
        assert torch.equal(MicroBatch(pair, size)(x, P, meta), pair(x, P, meta))
    with pytest.raises(ValueError, match="reward of a set"):
        MicroBatch(Channel(0, "vendi", batch=False), 2)


def test_cache_answers_by_content_and_forgets_the_oldest(red, x):
    cached = Cached(red, size=4)
    want = red(x[:3], P[:3])
    red.seen = 0
    assert torch.equal(cached(x[:3], P[:3]), want) and red.seen == 3
    assert torch.equal(cached(x[[2, 0, 1]], [P[2], P[0], P[1]]), want[[2, 0, 1]]) and red.seen == 3
    assert (cached.hits, cached.misses) == (3, 3)
    cached(x[:1], ["other"])  # another prompt is another sample
    cached(x[:1], [P[0]], [{"k": 1}])  # and so is another meta
    assert red.seen == 5 and len(cached.memory) == 4
    cached(x[2:3], [P[2]])  # asked for longest ago, so forgotten
    assert red.seen == 6
    same = x[[0, 0, 0]]
    fresh = Cached(red)
    red.seen = 0
    assert torch.equal(fresh(same, ["a"] * 3), red(same, ["a"] * 3)) and red.seen == 1 + 3


def test_cache_is_transparent_to_gradients(red, x):
    cached = Cached(red)
    cached(x, P)
    y = x.clone().requires_grad_()
    assert torch.autograd.grad(cached(y, P).sum(), y)[0].abs().sum() > 0


def test_content_key_tells_everything_apart():
    x = torch.zeros(2, 2)
    keys = [
        content_key(x, "a", None),
        content_key(x, "b", None),
        content_key(x + 1e-7, "a", None),
        content_key(x.double(), "a", None),
        content_key(x.view(4, 1), "a", None),
        content_key(x, "a", {}),
        content_key(x, "a", {"k": "1"}),
        content_key(x, "a", {"k": 1}),
        content_key(x, "a", {"k": [1, 2]}),
        content_key(x, "a", {"k": [12]}),
        content_key(x, "a", {"k": torch.ones(2)}),
        content_key(x, "a", {"k": torch.ones(3)}),
        content_key(x, "a", {"j": 1}),
    ]
    assert len(set(keys)) == len(keys)
    assert content_key(x.bfloat16(), "a", {"b": 1, "a": 2}) == content_key(x.bfloat16(), "a", {"a": 2, "b": 1})
    with pytest.raises(TypeError, match="content is unknown"):
        content_key(x, "a", {"k": object()})


def test_substitute_fills_only_what_cannot_be_judged(red, x):
    class Picky(Channel):
        def score(self, media, prompts, meta):
            scores = super().score(media, prompts, meta)
            reasons = {i: "no" for i, p in enumerate(prompts) if p in "bd"}
            scores[list(reasons)] = torch.nan
            self.unjudged(scores, reasons)
            return scores

    picky = Picky(0, "picky")
    with pytest.raises(Unjudged, match="2 of 5"):
        picky(x, P)
    with pytest.raises(Unjudged):
        (picky + red)(x, P)
    got = Substitute(picky, -3.0)(x, P)
    want = means(x)[0].clone()
    want[[1, 3]] = -3.0
    assert torch.allclose(got, want)
    assert torch.allclose((Substitute(picky, 0.0) + red)(x, P)[[0, 2, 4]], 2 * means(x)[0][[0, 2, 4]])
    with pytest.raises(ValueError, match="finite"):
        Substitute(picky, math.nan)


def test_masked_samples_have_no_advantage(red, x):
    """What cannot be judged gets the mean of its prompt's judged samples: nobody's advantage changes, its own is 0."""

    class Picky(Channel):
        blind: tuple[int, ...] = (1, 4)

        def score(self, media, prompts, meta):
            scores = super().score(media, prompts, meta)
            scores[list(self.blind)] = torch.nan
            self.unjudged(scores, dict.fromkeys(self.blind, "no"))
            return scores

    picky, prompts = Picky(0, "picky"), ["a", "a", "a", "b", "c"]
    got, true = Masked(picky)(x, prompts), means(x)[0]
    assert torch.equal(got[[0, 2, 3]], true[[0, 2, 3]]) and torch.allclose(got[1], true[[0, 2]].mean())
    assert torch.allclose(got[4], true[[0, 2, 3]].mean())  # nothing of its own prompt is known
    assert torch.allclose(
        got[:3] - got[:3].mean(), torch.stack([true[0], got[1], true[2]]) - true[[0, 2]].mean(), atol=1e-6
    )
    assert torch.allclose(got[1], got[:3].mean()) and torch.allclose((Masked(picky) + red)(x, prompts), got + true)
    picky.blind = tuple(range(5))
    with pytest.raises(Unjudged, match="5 of 5"):
        Masked(picky)(x, prompts)


def test_a_function_is_a_reward(x):
    @reward("red", differentiable=True)
    def red(media, prompts, meta):
        """How red the picture is."""
        return media[:, 0].mean((-1, -2))

    assert isinstance(red, Reward) and red.card.summary == "How red the picture is." and red.card.differentiable
    assert torch.allclose((2 * red)(x, P), 2 * means(x)[0])

    @reward("broken")
    def broken(media, prompts, meta):
        return [1.0] * len(media)

    with pytest.raises(ValueError, match="must return one score per sample"):
        broken(x, P)

    @reward("nan")
    def nan(media, prompts, meta):
        return torch.full((len(media),), torch.nan)

    with pytest.raises(ValueError, match="never counted as zero"):
        (nan + red)(x, P)


def test_foreign_rewards_compose(red, x):
    """Any object with a card and a call is a reward; no base class is asked for."""

    class Mine:
        card = Card("mine", "mine")

        def __call__(self, media, prompts, meta=None):
            return torch.ones(len(media)) * 7

    assert torch.allclose((red + Mine())(x, P), means(x)[0] + 7)
    assert torch.allclose((Mine() + 2 * red)(x, P), 2 * means(x)[0] + 7)
    for wrong in (lambda: red + 1.0, lambda: red - "x", lambda: red * "x", lambda: 1.0 + red, lambda: red / red):
        with pytest.raises(TypeError):
            wrong()
    assert isinstance(Product([Mine(), red]), Composite)


def test_bad_settings_are_refused(red):
    for make in (
        lambda: Weighted([red], [1.0, 2.0]),
        lambda: Weighted([red], [math.inf]),
        lambda: Weighted([], []),
        lambda: Clip(red, 1.0, 1.0),
        lambda: Standardise(red, 0.0, 0.0),
        lambda: LogSigmoid(red, 0.0, 0.0),
        lambda: MicroBatch(red, 0),
        lambda: Cached(red, 0),
        lambda: Constraint(red, math.nan),
        lambda: Constrained(red, []),
    ):
        with pytest.raises(ValueError):
            make()
