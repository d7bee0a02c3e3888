"""The training loop: every kind of objective learns, resumes bit for bit, and refuses what cannot learn."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowalign import checkpoint
from flowalign.adjoint import LeanAdjoint
from flowalign.aggregate import MinNorm
from flowalign.batches import TimeLaw
from flowalign.collect import Collector, collect
from flowalign.credit import Gains, Group, Normalise
from flowalign.fit import fit
from flowalign.kernels import EulerMaruyama
from flowalign.laws import FlowGrpo, Memoryless
from flowalign.ledger import Budget, BudgetSpent
from flowalign.methods.b2_diffurl import B2DiffuRL
from flowalign.objectives import AdjointMatching, Backprop, Clip, DiffusionNFT, FlowDPO, TrajectoryBalance
from flowalign.options import FitOptions
from flowalign.prepare import Lora, prepare
from flowalign.recipe import Recipe
from flowalign.rollout import Tape
from flowalign.scorer import Scorer
from flowalign.source import Prompt, Prompts
from tests.toy import Bright, Toy

ODE, SDE, MEMORYLESS = EulerMaruyama(), EulerMaruyama(FlowGrpo(0.7)), EulerMaruyama(Memoryless())
OPTIONS = FitOptions(iterations=24, groups=4, size=8, steps=6, lr=3e-3, batch=64, weight_decay=0.0)


def old(n: int) -> float:
    return min(0.02 * n, 0.5)


def recipes() -> dict[str, Recipe]:
    late = TimeLaw(0.05, 1.0)
    return {
        "clip": Recipe(SDE, Clip(SDE, 1e-2, kl=1e-3)),
        "guard": Recipe(SDE, Clip(SDE, 1e-2, ratio="guard"), keep=True),
        "dense": Recipe(SDE, Clip(SDE, 1e-2), credit=Gains()),
        "nft": Recipe(ODE, DiffusionNFT(kl=1e-3, times=late), role="old", old=old),
        "dpo": Recipe(ODE, FlowDPO(times=late), pairs=2),
        "rtb": Recipe(SDE, TrajectoryBalance(SDE, 100.0), credit=None),
        "rtb-learned": Recipe(SDE, TrajectoryBalance(SDE, 100.0, log_z="learned"), credit=None),
        "draft": Recipe(ODE, Backprop(), credit=None, tape=lambda i: Tape(4)),
        "draft-kl": Recipe(ODE, Backprop(kl=0.01), credit=None, tape=lambda i: Tape(4, checkpoint=True), keep=True),
        "adjoint": Recipe(MEMORYLESS, AdjointMatching(MEMORYLESS), credit=LeanAdjoint(MEMORYLESS, 100.0)),
        "marble": Recipe(
            ODE, DiffusionNFT(kl=1e-3, times=late), role="old", old=old, per_reward=True, aggregate=MinNorm()
        ),
    }  # fmt: skip


def run(recipe: Recipe, options: FitOptions = OPTIONS, toy: Toy | None = None, lora: Lora | None = None, **kwargs):
    toy = toy or Toy()
    rewards = {"bright": Bright(), "again": Bright()} if recipe.per_reward else {"bright": Bright()}
    scorer = Scorer(toy, rewards, ledger=kwargs.pop("ledger", None))
    policy, parameters = prepare(toy, lora, recipe.roles, old=recipe.old, ema=0.9)
    torch.manual_seed(1)
    source = Prompts(kwargs.pop("prompts", ["a", "b", "c dark"]))
    return toy, fit(toy, scorer, source, recipe, options, policy=policy, parameters=parameters, **kwargs)


@pytest.mark.parametrize("name", recipes())
def test_every_objective_learns(name: str) -> None:
    """On-policy reward of the last iterations beats the first ones by more than 4 standard errors."""
    options = replace(OPTIONS, lr=1e-2, iterations=48) if name.startswith("rtb") else OPTIONS
    reward = torch.tensor([m["reward"] for m in run(recipes()[name], options, prompts=["a"])[1]])
    early, late = reward[:6], reward[-6:]
    error = ((early.var() + late.var()) / 6).sqrt()
    assert late.mean() - early.mean() > 4 * error


@pytest.mark.parametrize("name", recipes())
def test_resume_is_bitwise(name: str, tmp_path: Path) -> None:
    """Stopping after 3 of 6 iterations and resuming equals running through: weights, roles, metrics."""
    o = replace(OPTIONS, iterations=6, checkpoint_every=1)
    whole_toy, whole = run(recipes()[name], o, folder=tmp_path / "whole")
    whole = list(whole)
    _, first = run(recipes()[name], o, folder=tmp_path / "cut")
    for _ in range(3):
        next(first)
    first.close()
    toy, rest = run(recipes()[name], o, folder=tmp_path / "cut", resume=True)
    rest = list(rest)
    drop = [{k: v for k, v in m.items() if "seconds" not in k} for m in whole[3:]]
    assert [{k: v for k, v in m.items() if "seconds" not in k} for m in rest] == drop
    for p, q in zip(toy.denoiser.parameters(), whole_toy.denoiser.parameters(), strict=True):
        assert torch.equal(p, q)
    a, b = (checkpoint.load(checkpoint.latest(tmp_path / n)) for n in ("whole", "cut"))
    for name_, role in a["roles"].items():
        assert all(torch.equal(x, y) for x, y in zip(role["copies"], b["roles"][name_]["copies"], strict=True))


def test_the_average_follows_every_so_many_optimiser_steps(tmp_path: Path) -> None:
    """``ema_every`` = 7, 4 steps an iteration: the copy moves at steps 7 and 14 alone; a resumed run goes on so."""
    o = replace(OPTIONS, iterations=5, batch=50, ema_every=7, checkpoint_every=1)
    _, whole = run(recipes()["clip"], o, folder=tmp_path / "whole", prompts=["a"])
    weights, copies, steps = [], [], []
    for _ in whole:
        state = checkpoint.load(checkpoint.latest(tmp_path / "whole"))
        weights.append(state["weights"][0])
        copies.append(state["roles"]["ema"]["copies"][0])
        steps.append((state["steps"], state["roles"]["ema"]["updates"]))
    per = steps[0][0]
    assert per == 4 and steps == [(4 * i, 4 * i // 7) for i in range(1, 6)]
    for i in range(1, 5):
        moved = not torch.equal(copies[i], copies[i - 1])
        assert moved == (steps[i][1] > steps[i - 1][1]) and not torch.equal(weights[i], weights[i - 1])
    for n, again in ((2, False), (5, True)):
        _, part = run(recipes()["clip"], replace(o, iterations=n), folder=tmp_path / "cut", resume=again, prompts=["a"])
        list(part)
    cut = checkpoint.load(checkpoint.latest(tmp_path / "cut"))
    assert cut["steps"] == steps[-1][0] and torch.equal(cut["roles"]["ema"]["copies"][0], copies[-1])
    with pytest.raises(ValueError, match="ema_every must be at least 1"):
        FitOptions(ema_every=0)


def test_a_method_whose_rewards_choose_its_samples_wants_one_process() -> None:
    """B²-DiffuRL trains as many samples as stand out: processes of other rewards would take other numbers of steps."""

    class Two:
        num_processes = 2

    toy, recipe = Toy(), B2DiffuRL(width=4).recipe(Toy().times(6))
    policy, parameters = prepare(toy, None, recipe.roles)
    stream = fit(
        toy, Scorer(toy, {"b": Bright()}), Prompts(["a"]), recipe, OPTIONS, policy=policy, parameters=parameters,
        accelerator=Two(),
    )  # fmt: skip
    with pytest.raises(ValueError, match="Use one process"):
        next(stream)


def test_a_resumed_run_goes_on_with_the_global_random_numbers(tmp_path: Path) -> None:
    """A reward of the user's may draw them: it draws after a resumption what it would have drawn."""

    class Noisy(Bright):
        def __call__(self, media: torch.Tensor, prompts: list[str], meta: object = None) -> torch.Tensor:
            return super().__call__(media, prompts, meta) + torch.randn(len(media))

    def noisy(iterations: int, seed: int, folder: Path | None) -> list[float]:
        toy = Toy()
        policy, parameters = prepare(toy, None)
        torch.manual_seed(seed)
        stream = fit(
            toy, Scorer(toy, {"n": Noisy()}), Prompts(["a"]), Recipe(SDE, Clip(SDE, 1e-2)),
            replace(OPTIONS, iterations=iterations), policy=policy, parameters=parameters, folder=folder, resume=True,
        )  # fmt: skip
        return [m["reward"] for m in stream]

    first, rest = noisy(2, 0, tmp_path), noisy(4, 1, tmp_path)
    assert len(first) == len(rest) == 2 and first + rest == noisy(4, 0, None)


def test_accumulation_equals_one_batch() -> None:
    """Four batches accumulated are the gradient of one (up to the order of a sum)."""
    weights = []
    for batch, accumulate in ((256, 1), (64, 0)):
        o = replace(OPTIONS, iterations=1, batch=batch, accumulate=accumulate, size=8, groups=4)
        toy, metrics = run(Recipe(SDE, Clip(SDE, 1e-2)), o)
        list(metrics)
        weights.append(torch.cat([p.flatten() for p in toy.denoiser.parameters()]))
    assert torch.allclose(weights[0], weights[1], atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_ratio_is_exactly_one(dtype: torch.dtype) -> None:
    """The recomputed ratio at the first update is 1 to the last bit where batches have the same shape."""
    toy = Toy()
    recipe = Recipe(SDE, Clip(SDE, 1e-2))
    policy, _ = prepare(toy, None, context=lambda: torch.autocast("cpu", dtype, enabled=dtype != torch.float32))
    collector = Collector(toy, Scorer(toy, {"bright": Bright()}), policy, recipe, 6, 0)
    e = collect(collector, Prompts(["a", "b"]).draw(0, 2, 16), 0)
    steps = e.trajectory.transitions(recipe.credit(e))
    for k in range(5):
        batch = steps[(steps.level == k).nonzero().flatten()]
        assert recipe.objective(policy, batch, e.cond).metrics["ratio_gap"] == 0


class Dropped(torch.nn.Module):
    """A layer that answers differently with gradients on: what a wrong backend or dropout does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1.3 if torch.is_grad_enabled() else x


def test_guard_stops_a_mismatch() -> None:
    """Rollout and update that differ are stopped with an explanation before the first step is taken."""
    toy = Toy()
    toy.denoiser.append(Dropped())
    before = copy.deepcopy(toy.denoiser.state_dict())
    with pytest.raises(RuntimeError, match="do not compute the same"):
        list(run(Recipe(SDE, Clip(SDE, 1e-4)), toy=toy)[1])
    assert all(torch.equal(v, before[k]) for k, v in toy.denoiser.state_dict().items())


def test_bad_gradient_keeps_the_weights() -> None:
    """A gradient that is not finite stops the run, names the step, and leaves the weights as they were."""
    toy, metrics = run(Recipe(ODE, Backprop(), credit=None, tape=lambda i: Tape(0)), replace(OPTIONS, lr=1e-3))
    next(metrics)
    before = copy.deepcopy(toy.denoiser.state_dict())
    handle = toy.denoiser[0].weight.register_hook(lambda g: g * torch.nan)
    with pytest.raises(FloatingPointError, match="optimiser step 2"):
        next(metrics)
    handle.remove()
    assert all(torch.equal(v, before[k]) for k, v in toy.denoiser.state_dict().items())


def test_lora_reference_is_the_base() -> None:
    """With an adapter, only it is trained, and the reference role still is the base model after training."""
    toy = Toy()
    base = Toy()
    lora = Lora(rank=2, alpha=4, targets=("0", "2"))
    recipe = Recipe(SDE, Clip(SDE, 1e-2, kl=1e-3))
    policy, parameters = prepare(toy, lora, recipe.roles)
    assert all("lora" in n for n, p in toy.denoiser.named_parameters() if p.requires_grad) and len(parameters) == 4
    list(fit(toy, Scorer(toy, {"b": Bright()}), Prompts(["a"]), recipe, replace(OPTIONS, iterations=4),
             policy=policy, parameters=parameters))  # fmt: skip
    x = torch.randn(5, 3, 2, 2)
    assert torch.equal(policy.posterior(x, 0.5, None, "reference").x0, base.posterior(x, 0.5, None).x0)
    assert not torch.allclose(policy.posterior(x, 0.5, None).x0, base.posterior(x, 0.5, None).x0)
    assert all(p.requires_grad for p in parameters)


def test_no_unused_forward() -> None:
    """Network evaluations: N·K to sample, N·K to update, and N·K more only if the KL is on."""
    for kl, passes in ((0.0, 2), (0.1, 3)):
        metrics = list(run(Recipe(SDE, Clip(SDE, 1e-2, kl=kl)), replace(OPTIONS, iterations=1))[1])
        assert metrics[0]["ledger/evaluations"] == passes * 32 * 6


def test_budgets_end_a_run() -> None:
    """max_evaluations ends the run at the first iteration that reaches it."""
    o = replace(OPTIONS, max_evaluations=3 * 2 * 32 * 6)
    assert len(list(run(Recipe(SDE, Clip(SDE, 1e-2)), o)[1])) == 3


@pytest.mark.parametrize(
    ("recipe", "options", "words"),
    [
        (Recipe(ODE, Clip(ODE)), OPTIONS, "draws noise"),
        (Recipe(SDE, Clip(SDE)), replace(OPTIONS, size=1), "no advantage"),
        (Recipe(ODE, FlowDPO()), replace(OPTIONS, size=1), "size >= 2"),
        (Recipe(ODE, Backprop(), credit=None), OPTIONS, "tape"),
    ],
)
def test_bad_settings(recipe: Recipe, options: FitOptions, words: str) -> None:
    """What cannot learn is refused before anything is sampled."""
    with pytest.raises(ValueError, match=words):
        next(run(recipe, options)[1])


def test_backprop_needs_gradients() -> None:
    """A reward without gradients is refused by name of the cause."""
    toy = Toy()
    policy, parameters = prepare(toy, None)
    recipe = Recipe(ODE, Backprop(), credit=None, tape=lambda i: Tape(0))
    scorer = Scorer(toy, {"b": Bright(differentiable=False)})
    with pytest.raises(ValueError, match="differentiable"):
        next(fit(toy, scorer, Prompts(["a"]), recipe, OPTIONS, policy=policy, parameters=parameters))


class Broken:
    """A reward that goes wrong in a chosen way."""

    def __init__(self, how: str) -> None:
        self.how, self.card = how, Bright().card

    def __call__(self, media: torch.Tensor, prompts: list[str], meta: object = None) -> torch.Tensor | None:
        good = media.mean((1, 2, 3))
        return {"nan": good * torch.nan, "shape": good[:, None], "none": None}[self.how]


@pytest.mark.parametrize(
    ("how", "words"), [("nan", "never counted as zero"), ("shape", "one score"), ("none", "NoneType")]
)
def test_bad_rewards(how: str, words: str) -> None:
    """NaN, the wrong shape or None is an error that says which reward and what came."""
    toy = Toy()
    policy, parameters = prepare(toy, None)
    with pytest.raises(ValueError, match=words):
        next(fit(toy, Scorer(toy, {"b": Broken(how)}), Prompts(["a"]), Recipe(SDE, Clip(SDE)), OPTIONS,
                 policy=policy, parameters=parameters))  # fmt: skip


def test_calls_are_paid_for_before_they_are_made() -> None:
    """A reward that raises is booked, one that was not reached is not, and over a budget none is asked at all."""
    toy, asked = Toy(), []

    class Counting(Bright):
        def __call__(self, media: torch.Tensor, prompts: list[str], meta: object = None) -> torch.Tensor:
            asked.append(len(media))
            return super().__call__(media, prompts, meta)

    scorer = Scorer(toy, {"a": Counting(), "b": Broken("nan"), "c": Counting()})
    media, prompts = torch.rand(5, 3, 2, 2), ["a"] * 5
    with pytest.raises(ValueError, match="never counted as zero"):
        scorer.judge(media, prompts)
    assert scorer.ledger.rewards == 2 * 5 and asked == [5]
    scorer = Scorer(toy, {"a": Counting(), "c": Counting()})
    with scorer.ledger.within(Budget.parse("14rewards")):
        scorer.judge(media, prompts)
        assert scorer.ledger.rewards == 10 and asked == [5, 5, 5]
        with pytest.raises(BudgetSpent):
            scorer.judge(media, prompts)
    assert scorer.ledger.rewards == 10 and asked == [5, 5, 5]


def test_every_iteration_has_noise_of_its_own() -> None:
    """The same prompts drawn again are sampled anew, and the same iteration is always the same."""
    toy = Toy()
    recipe = Recipe(SDE, Clip(SDE, 1e-2))
    collector = Collector(toy, Scorer(toy, {"bright": Bright()}), prepare(toy, None)[0], recipe, 6, 0)
    draw = Prompts(["a", "b"]).draw(0, 2, 4)
    x = [collect(collector, draw, i).trajectory.leaves.x for i in (0, 1, 0)]
    assert torch.equal(x[0], x[2]) and not (x[0] == x[1]).any()
    other = collect(replace(collector, seed=1), draw, 0).trajectory.leaves.x
    assert not (x[0] == other).any()


def test_variants_share_a_group() -> None:
    """Wordings of one prompt are rows of one group: advantages are centred over all of them."""
    toy = Toy()
    recipe = Recipe(SDE, Clip(SDE, 1e-2), credit=Group(Normalise(scale="none", clamp=None)))
    policy, _ = prepare(toy, None)
    collector = Collector(toy, Scorer(toy, {"bright": Bright()}), policy, recipe, 6, 0)
    draw = Prompts([Prompt("a", variants=("an a dark",))]).draw(0, 1, 8)
    assert draw.prompts == ["a", "an a dark"] and draw.group.tolist() == [0, 0] and draw.samples.tolist() == [4, 4]
    e = collect(collector, draw, 0)
    leaves = recipe.credit(e)[-1]
    assert abs(leaves.mean()) < 1e-6 and abs(leaves[:4].mean()) > 0.1


def _two_processes(path: str) -> None:
    from accelerate import Accelerator

    accelerator, asked = Accelerator(cpu=True), []

    def stop() -> bool:
        asked.append(1)
        # asked before the first iteration and after each; one of the two has had enough after the second
        return not accelerator.is_main_process and len(asked) == 3

    torch.set_num_threads(1)
    toy, recipe = Toy(), Recipe(SDE, Clip(SDE, 1e-2), credit=Group(Normalise(scale="batch")))
    policy, parameters = prepare(toy, None, recipe.roles)
    scorer, source = Scorer(toy, {"b": Bright()}), Prompts(["a", "b", "c dark"])
    options = replace(OPTIONS, iterations=5, batch=1000, checkpoint_every=1)
    metrics = list(
        fit(
            toy, scorer, source, recipe, options, policy=policy, parameters=parameters, accelerator=accelerator,
            folder=Path(path).parent / "checkpoints", stop=stop,
        )
    )  # fmt: skip
    if accelerator.is_main_process:
        torch.save({"w": [p.detach() for p in parameters], "n": len(metrics)}, path)
    accelerator.wait_for_everyone()


@pytest.mark.slow
def test_two_processes_share_one_batch(tmp_path: Path) -> None:
    """Two processes with half the groups each take the steps of one process with all; they end and save together."""
    from accelerate import debug_launcher

    path = tmp_path / "two.pt"
    debug_launcher(_two_processes, (str(path),), num_processes=2)
    two = torch.load(path, weights_only=True)
    assert two["n"] == 2
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [checkpoint.name(1), checkpoint.name(2)]
    saved = checkpoint.load(checkpoint.latest(tmp_path / "checkpoints"))["weights"]
    assert all(torch.equal(a, b) for a, b in zip(saved, two["w"], strict=True))
    toy, recipe = Toy(), Recipe(SDE, Clip(SDE, 1e-2), credit=Group(Normalise(scale="batch")))
    policy, parameters = prepare(toy, None, recipe.roles)
    scorer, source, options = (
        Scorer(toy, {"b": Bright()}),
        Prompts(["a", "b", "c dark"]),
        replace(OPTIONS, iterations=2),
    )
    list(fit(toy, scorer, source, recipe, replace(options, batch=1000), policy=policy, parameters=parameters))
    for a, b in zip(two["w"], parameters, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
