"""The memory planner: the meter against known sizes, predictions against measurements, budgets kept or refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from flowalign.collect import Collector, grow
from flowalign.config import default
from flowalign.fit import fit
from flowalign.memory_costs import Line, probe
from flowalign.memory_plan import MemoryPlan, fit_memory, parse_bytes, predict, settings
from flowalign.meter import Meter, SavedBytes, tensor_bytes
from flowalign.methods.adjoint_matching import AdjointMatching
from flowalign.methods.base import Training
from flowalign.methods.draft import DRaFT
from flowalign.methods.flow_grpo import FlowGRPO
from flowalign.options import FitOptions
from flowalign.pipelines import load
from flowalign.prepare import Lora, prepare
from flowalign.protocols import Card
from flowalign.run import train
from flowalign.scorer import Scorer
from flowalign.source import Prompts
from tests.test_policy_gradient import judged
from tests.toy import Bright, Toy
from tests.zoo import build

STEPS, SIZE, GROUPS = 3, 2, 2
OPTIONS = FitOptions(iterations=1, groups=GROUPS, size=SIZE, steps=STEPS, batch=SIZE * GROUPS, accumulate=0)
CALLS = {"StableDiffusion3": {"height": 32, "width": 32}, "AnimateDiff": {}}
PROMPTS = Prompts(["a red circle", "two blue squares"])


class Convolved(nn.Module):
    """A reward with activations worth counting."""

    card = Card("conv", "", modality=("image", "video"), differentiable=True)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 3, padding=1))
        self.requires_grad_(False)

    def forward(self, media, prompts, meta=None):
        frames = media.flatten(0, 1) if media.ndim == 5 else media
        return self.net(frames).square().flatten(1).mean(1).reshape(len(media), -1).mean(1)


@cache
def opened(name: str):
    case = build(name)
    case.pipe.set_progress_bar_config(disable=True)
    call = {k: v for k, v in case.inputs.items() if k != "prompt"} | CALLS[name]
    pipe = load(case.pipe, call, guided=False, check=False)
    torch.manual_seed(0)
    policy, parameters = prepare(pipe, Lora(rank=2, alpha=2), ("reference",))
    return pipe, policy, parameters


def collector(name: str, method: Training) -> tuple[Collector, list[nn.Parameter]]:
    pipe, policy, parameters = opened(name)
    policy.chunk = None
    scorer = Scorer(pipe, {"conv": Convolved()}, ledger=policy.ledger)
    return Collector(pipe, scorer, policy, method.recipe(pipe.times(STEPS)), STEPS, 0), parameters


def measured(c: Collector, parameters: list[nn.Parameter], plan: MemoryPlan, saved: bool = False) -> int:
    """Peak bytes of one micro-batch, forward and backward, under a plan."""
    recipe, _ = plan.apply(c, OPTIONS)
    c = replace(c, recipe=recipe)
    for p in parameters:
        p.grad = None
    weights = [t for m in c.pipeline.tap.modules().values() for t in (*m.parameters(), *m.buffers())]
    with SavedBytes(weights) if saved else Meter() as meter:
        batch, cond = grow(c, PROMPTS.draw(0, plan.samples // SIZE, SIZE), 0, recipe.tape(0))
        sum(recipe.objective(c.policy, batch, cond).terms.values()).backward()
        return meter.peak


# -- the meter -------------------------------------------------------------------------------------------------------
def test_meter_counts_what_is_alive() -> None:
    """Outputs kept for the backward pass, views once, freed tensors no more, in and out of a checkpoint."""
    net = nn.Sequential(*[m for _ in range(8) for m in (nn.Linear(64, 64), nn.Tanh())])
    x, unit = torch.randn(1024, 64), 1024 * 64 * 4
    weights = list(net.parameters())
    with Meter() as meter, SavedBytes([*weights, x]) as saved:
        y = net(x)
        assert meter.kept == saved.now == saved.peak == 8 * unit and meter.peak == 9 * unit
        z = y.view(64, 1024)[3:]
        assert meter.kept == 8 * unit
        del y, z
        assert meter.kept == saved.now == 0 and meter.peak == 9 * unit
    with Meter() as meter:
        h = x.clone().requires_grad_()
        for i in range(0, 16, 4):
            h = checkpoint(net[i : i + 4], h, use_reentrant=False)
        assert meter.kept == 5 * unit
        h.sum().backward()
        assert 6 * unit < meter.peak < 9 * unit  # a segment's activations are made again on top


@pytest.mark.parametrize(("text", "size"), [("8GiB", 8 * 2**30), ("500 MB", 5e8), ("2e9", 2e9), ("1.5g", 1.5e9)])
def test_sizes_are_read(text: str, size: float) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "eight", "0", "-1GB", "5 apples", "1.2.3GB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="8GiB"):
        parse_bytes(text)


def test_lines() -> None:
    line = Line.through(7.0, 11.0)
    assert line(1) == 7 and line(2) == 11 and line(10) == 43 and line(0) == 0
    assert Line.through(5.0, 4.0)(9) == 5  # it never falls


# -- predictions -----------------------------------------------------------------------------------------------------
PLANS = {
    "plain": (STEPS, MemoryPlan(4, 4)),
    "recomputed": (STEPS, MemoryPlan(4, 4, recompute=True)),
    "judged in pieces, twice": (STEPS, MemoryPlan(4, 4, recompute=True, judge=1, again=True)),
    "network in pieces": (STEPS, MemoryPlan(4, 4, recompute=True, chunk=2, judge=2, again=True)),
    "last step": (1, MemoryPlan(4, 4)),
    "frame by frame": (1, MemoryPlan(4, 4, recompute=True, by_frame=True)),
    "frame by frame, twice": (1, MemoryPlan(4, 4, recompute=True, judge=1, again=True, by_frame=True)),
}
STILL = [k for k in PLANS if "frame" not in k]


CASES = [("StableDiffusion3", STILL), ("AnimateDiff", ["frame by frame", "judged in pieces, twice"])]
REST = pytest.param("AnimateDiff", PLANS, marks=pytest.mark.slow)


@pytest.mark.parametrize(("name", "which"), [*CASES, REST], ids=["image", "video", "video-all"])
def test_predictions_are_within_fifteen_percent(name: str, which: Iterable[str]) -> None:
    """Image and video, every kind of setting: live bytes; and what autograd saves, where nothing is recomputed."""
    for taped, plan in (PLANS[w] for w in which):
        c, parameters = collector(name, DRaFT(mode="last", depth=taped))
        costs = probe(c, PROMPTS.draw(0, 1, 2), parameters)
        want = max(predict(costs, plan, c.recipe, STEPS, taped).values())
        got = measured(c, parameters, plan)
        assert abs(want / got - 1) < 0.15, (name, plan, want, got)
        if not plan.recompute:
            saved = measured(c, parameters, plan, saved=True)
            held = taped * costs.step.kept(4) + costs.tail.kept(4)
            assert abs(held / saved - 1) < 0.15, (name, plan, held, saved)


@pytest.mark.parametrize("method", [FlowGRPO(), AdjointMatching(scale=1.0)], ids=["flow-grpo", "adjoint-matching"])
def test_predictions_of_what_is_not_taped(method: Training) -> None:
    """Whole iterations of a policy gradient and of Adjoint Matching: never more than predicted, nor far less."""
    c, parameters = collector("StableDiffusion3", method)
    options = replace(OPTIONS, batch=6)
    plan = MemoryPlan(6, 4)
    phases = predict(probe(c, PROMPTS.draw(0, 1, 2), parameters), plan, c.recipe, STEPS, 0)
    before = [p.detach().clone() for p in parameters]
    with Meter() as meter:
        list(fit(c.pipeline, c.scorer, PROMPTS, c.recipe, options, policy=c.policy, parameters=parameters))
        got = meter.peak - 3 * tensor_bytes(parameters)
    for p, b in zip(parameters, before, strict=True):
        p.data = b
    assert abs(max(phases.values()) / got - 1) < 0.15, (phases, got)


def clip_gradient(by_frame: bool, again: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Scores of two clips and their gradient in the latents, and the most bytes that took."""
    opened("AnimateDiff")
    torch.manual_seed(1)  # of the reward's weights
    c, _ = collector("AnimateDiff", DRaFT(depth=1))
    c.scorer.by_frame, c.scorer.checkpoint, c.scorer.chunk = by_frame, again, 1 if again else 256
    draw = PROMPTS.draw(0, 1, 2)
    judge, row = c.bind(draw), torch.tensor([0, 0])
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, *c.pipeline.shape(judge.cond), generator=g).requires_grad_()
    with Meter() as meter:
        total = judge.total(x, row)
        (slope,) = torch.autograd.grad(total.sum(), x)
    return total.detach(), slope, meter.peak


@pytest.mark.parametrize("again", [False, True])
def test_frame_by_frame_is_the_clip_in_less_memory(again: bool) -> None:
    """Decoding every frame by itself: the same scores and gradients, and far fewer bytes."""
    (whole, slope, most), (apart, other, less) = (clip_gradient(f, again) for f in (False, True))
    assert torch.allclose(whole, apart, rtol=1e-5) and torch.allclose(slope, other, rtol=1e-4, atol=1e-9)
    assert slope.abs().max() > 0 and less < (0.95 if again else 0.8) * most, (less, most)


def test_frames_that_need_each_other_are_not_taken_apart() -> None:
    """AnimateDiff's autoencoder sees images; Wan's is causal in time, and pictures have no frames."""
    for name, count in (("AnimateDiff", 2), ("Wan", 1), ("StableDiffusion3", 1)):
        case = build(name)
        case.pipe.set_progress_bar_config(disable=True)
        call = {k: v for k, v in case.inputs.items() if k not in ("prompt", "guidance_scale_2")}
        pipe = load(case.pipe, call, guided=False, check=False)
        found = Scorer(pipe, {"conv": Convolved()}).frames_apart(pipe.encode(["a red circle"]))
        assert (found > 1) == (count > 1), (name, found)
        offered = {p.by_frame for p in settings(DRaFT().recipe(torch.linspace(1, 0, 4)), OPTIONS, found > 1)}
        assert offered == ({False, True} if count > 1 else {False})


# -- choices ---------------------------------------------------------------------------------------------------------
def test_budgets_are_kept_with_the_cheapest_setting() -> None:
    """A generous budget changes nothing, a smaller one recomputes, an impossible one says what is needed."""
    c, parameters = collector("StableDiffusion3", DRaFT(mode="full"))
    draw = PROMPTS.draw(0, 1, 2)
    wide = fit_memory(c, draw, parameters, OPTIONS, parse_bytes("1GiB"))
    assert (wide.batch, wide.recompute, wide.chunk, wide.again) == (4, False, None, False)
    before = measured(c, parameters, wide)
    seen = {str(wide)}
    for share in (0.7, 0.4, 0.2):
        plan = fit_memory(c, draw, parameters, OPTIONS, int(wide.fixed + share * wide.peak))
        took = measured(c, parameters, plan)
        assert took < 1.1 * share * before
        assert plan.total <= wide.fixed + share * wide.peak
        seen.add(str(plan))
    assert len(seen) == 4
    with pytest.raises(ValueError, match=r"budget of 300 KiB cannot be met: the leanest .* Give at least .* lower"):
        fit_memory(c, draw, parameters, OPTIONS, 300 * 1024)


def test_settings_begin_with_the_runs_own_and_divide_its_batches() -> None:
    options = replace(OPTIONS, groups=6, size=4, batch=24)
    every = settings(DRaFT(depth=1).recipe(torch.linspace(1, 0, 4)), options)
    assert (every[0].batch, every[0].recompute, every[0].again, every[0].judge) == (24, False, False, 24)
    assert {p.batch for p in every} == {24, 12, 8, 4}
    assert all(24 % p.batch == 0 for p in every)


@pytest.mark.parametrize("batch", [16, 8])
def test_a_plan_changes_memory_and_nothing_else(batch: int) -> None:
    """The same weights to round-off, the same counts in the ledger."""
    ends, counts = [], []
    for plan in (MemoryPlan(16, 16), MemoryPlan(batch, batch, True, 3, 5, True)):
        toy = Toy()
        policy, parameters = prepare(toy, None)
        scorer = Scorer(toy, {"bright": Bright()}, ledger=policy.ledger)
        options = FitOptions(iterations=3, groups=4, size=4, steps=4, batch=16, accumulate=0, lr=1e-2)
        c = Collector(toy, scorer, policy, DRaFT(mode="full").recipe(toy.times(4)), 4, 0)
        recipe, options = plan.apply(c, options)
        list(fit(toy, scorer, Prompts(["a", "b"]), recipe, options, policy=policy, parameters=parameters))
        ends.append(judged(toy))
        counts.append((policy.ledger.decodes, policy.ledger.rewards, policy.ledger.evaluations))
    assert torch.allclose(*ends, atol=1e-5) and counts[0] == counts[1]


def test_a_run_takes_a_budget(tmp_path: Path) -> None:
    """``memory_budget`` reaches the run, leaves a note and the same result; too small or unreadable is refused."""
    base = default("draft")
    config = replace(
        base, pipeline="tests.runworld:pipeline", reward="tests.toy:Bright", prompts=str(tmp_path / "p.txt"),
        output=tmp_path / "a", trackers=(), device="cpu", method=DRaFT(mode="full"),
        fit=replace(base.fit, iterations=2, groups=4, size=4, steps=4, batch=16, lr=1e-2),
        evaluation=replace(base.evaluation, images=8, every=0, layouts="tests.runworld:quadrant"),
    )  # fmt: skip
    (tmp_path / "p.txt").write_text("a\nb\n")
    train(config, progress=False)
    tight = replace(config, output=tmp_path / "b", memory_budget="30kB")
    train(tight, progress=False)
    note = (tmp_path / "b" / "memory.txt").read_text()
    assert "samples at a time" in note and not note.startswith("16 ")
    a, b = (load_file(tmp_path / x / "result" / "toy.safetensors") for x in "ab")
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
    for wrong, words in (("1kB", "cannot be met"), ("much", "8GiB")):
        with pytest.raises(ValueError, match=words):
            train(replace(config, output=tmp_path / wrong, memory_budget=wrong), progress=False)
        assert not (tmp_path / wrong).exists()
