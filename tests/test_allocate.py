"""Adaptive allocation and filtering: samples go where rewards differ, and a resumed run repeats it bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowalign import checkpoint
from flowalign.allocate import Adaptive, Allocation, make_source, shares
from flowalign.build import build
from flowalign.config import compose, default
from flowalign.fit import fit
from flowalign.fit_checks import check_processes
from flowalign.methods.flow_grpo import FlowGRPO
from flowalign.methods.tree_grpo import TreeGRPO
from flowalign.options import FitOptions
from flowalign.prepare import prepare
from flowalign.protocols import Card
from flowalign.scorer import Scorer
from flowalign.source import Prompt, Prompts
from tests.toy import Toy

OPTIONS = FitOptions(iterations=6, groups=2, size=8, steps=4, lr=3e-3, batch=64)


class Partly:
    """Brightness, but the same for every picture of a dull prompt."""

    card = Card("partly", "brightness of prompts that are not dull")

    def __call__(self, media: Tensor, prompts, meta=None) -> Tensor:
        alive = torch.tensor([0.0 if p.startswith("dull") else 1.0 for p in prompts])
        return alive * media.mean((1, 2, 3))


def seen(source: Adaptive, **variance: float) -> Adaptive:
    source.variance = dict(variance)
    return source


def test_shares_by_hand() -> None:
    """Neyman: in proportion to the deviations, largest remainders, floors and whole units."""
    assert shares(torch.tensor([3.0, 1.0, 0.0]), 24, 2) == [2 + 14, 2 + 4, 2]  # 18 free: 13.5, 4.5, 0; ties go first
    assert shares(torch.tensor([1.0, 1.0, 2.0]), 10, 1) == [3, 3, 4]  # 7 free: 1.75, 1.75, 3.5
    assert shares(torch.zeros(3), 12, 2) == [4, 4, 4]
    assert shares(torch.tensor([5.0, 0.0]), 32, 2, unit=8) == [24, 8]
    with pytest.raises(ValueError, match="cannot give"):
        shares(torch.ones(3), 4, 2)


def test_sizes_follow_the_spread() -> None:
    """The samples of an iteration are shared out; their number stays, wordings of a prompt share its part."""
    prompts = [Prompt("a"), Prompt("b", variants=("bb",)), Prompt("c")]
    source = seen(Adaptive(prompts, Allocation("size")), a=9.0, b=1.0, c=0.0)
    draw = source.draw(0, 3, 8)
    found = {p: n for p, n in zip(draw.prompts, draw.samples.tolist(), strict=True)}
    assert found == {"a": 2 + 14, "b": 3, "bb": 3, "c": 2} and int(draw.samples.sum()) == 24
    assert source.draw(0, 3, 8).prompts == Prompts(prompts).draw(0, 3, 8).prompts


def test_draws_follow_the_spread() -> None:
    """Distinct prompts; the frequencies of single draws are (1 - floor) s / Σs + floor / P."""
    source = seen(Adaptive([*"abcd"], Allocation("prompt", floor=0.4)), a=16.0, b=1.0, c=1.0, d=0.0)
    assert all(len(set(source.draw(i, 3, 2).prompts)) == 3 for i in range(20))
    n = 4000
    first = [source.draw(i, 1, 2).prompts[0] for i in range(n)]
    for name, s in {"a": 4.0, "b": 1.0, "c": 1.0, "d": 0.0}.items():
        p = 0.6 * s / 6 + 0.1
        assert abs(first.count(name) / n - p) < 4 * (p * (1 - p) / n) ** 0.5
    assert len(source.draw(0, 6, 2).prompts) == 6  # more groups than prompts: all of them, and some again
    assert source.draw(7, 3, 2).prompts == source.draw(7, 3, 2).prompts


def test_variance_is_remembered_and_the_unknown_comes_first() -> None:
    """Running variance by hand; a prompt never seen counts as the most varied; one sample says nothing."""
    source = Adaptive([*"abc"], Allocation("size", memory=0.5))
    draw = Prompts([*"ab"]).draw(0, 2, 3)
    order = {p: i for i, p in enumerate(draw.prompts)}
    rewards = {"a": torch.tensor([0.0, 1.0, 2.0]), "b": torch.tensor([1.0, 1.0, 1.0])}
    total = torch.cat([rewards[p] for p in draw.prompts])
    row = torch.arange(2).repeat_interleave(3)
    source.observe(draw, total, row)
    source.observe(draw, 3 * total, row)
    assert source.variance == {"a": 0.5 * 1 + 0.5 * 9, "b": 0.0} and order.keys() == {"a", "b"}
    assert source.spread([Prompt(p) for p in "abc"]).tolist() == pytest.approx([5**0.5, 0, 5**0.5])
    source.observe(Prompts(["c"]).draw(0, 1, 1), torch.ones(1), torch.zeros(1, dtype=torch.long))
    assert "c" not in source.variance


def run(source, options: FitOptions = OPTIONS, method=None, **kwargs):
    toy = Toy()
    recipe = (method or FlowGRPO(kl=0.0, clip=1e-2)).recipe(toy.times(options.steps))
    policy, parameters = prepare(toy, None, recipe.roles)
    stream = fit(toy, Scorer(toy, {"r": Partly()}), source, recipe, options, policy=policy, parameters=parameters,
                 **kwargs)  # fmt: skip
    return toy, policy, stream


@pytest.mark.parametrize("by", ["prompt", "size"])
def test_resumes_bitwise(by: str, tmp_path: Path) -> None:
    """Six iterations equal three, a restart, and three: weights and running variances."""
    prompts, o = ["a", "dull b", "c dark", "dull d"], replace(OPTIONS, checkpoint_every=1)
    whole, _, stream = run(make_source(prompts, Allocation(by)), o, folder=tmp_path / "a")
    list(stream)
    stream = run(make_source(prompts, Allocation(by)), o, folder=tmp_path / "b")[2]
    next(stream), next(stream), next(stream)
    stream.close()
    cut, _, stream = run(make_source(prompts, Allocation(by)), o, folder=tmp_path / "b", resume=True)
    assert len(list(stream)) == 3
    for p, q in zip(whole.denoiser.parameters(), cut.denoiser.parameters(), strict=True):
        assert torch.equal(p, q)
    a, b = (checkpoint.load(checkpoint.latest(tmp_path / n))["source"] for n in "ab")
    assert a == b and a["variance"]["dull b"] == 0 < a["variance"]["a"]


def test_wordings_are_one_prompt() -> None:
    """The variance is that of the whole group and is remembered under the prompt's own words, which are asked for."""
    prompts = [Prompt("a", variants=("aa", "aaa")), Prompt("b")]
    source = Adaptive(prompts, Allocation("size", memory=0.25))
    draw = Prompts(prompts).draw(0, 2, 3)
    row = torch.arange(len(draw.prompts)).repeat_interleave(draw.samples)
    order = [draw.prompts.index(p) for p in ("a", "aa", "aaa", "b")]
    total = torch.empty(6)
    for r, values in zip(order, ([0.0], [1.0], [2.0], [5.0, 5.0, 5.0]), strict=True):
        total[row == r] = torch.tensor(values)
    source.observe(draw, total, row)
    source.observe(draw, 3 * total, row)
    assert source.variance == {"a": 0.25 * 1 + 0.75 * 9, "b": 0.0}


def test_draws_are_the_seeds_and_go_on() -> None:
    """Other seeds, other prompts; by size the iterations read on through the epochs as even allocation does."""
    names = [f"p{i}" for i in range(9)]
    drawn = [[Adaptive(names, Allocation("prompt"), s).draw(i, 3, 2).prompts for i in range(5)] for s in (0, 1, 0)]
    assert drawn[0] == drawn[2] != drawn[1]
    source = Adaptive(names, Allocation("size"), 4)
    for i in range(4):
        assert source.draw(i, 3, 4).prompts == Prompts(names, 4).draw(i, 3, 4).prompts


def test_dull_prompts_get_the_least() -> None:
    """After a look at every prompt, those whose rewards never differ get the least there is; trees get whole units."""
    source = make_source(["a", "dull b"], Allocation("size", least=2))
    list(run(source, replace(OPTIONS, iterations=2))[2])
    draw = source.draw(2, 2, 8)
    assert dict(zip(draw.prompts, draw.samples.tolist(), strict=True)) == {"a": 14, "dull b": 2}
    source = make_source(["a", "dull b"], Allocation("size", unit=4))
    tree = TreeGRPO(eta=0.5, splits=(0, 1), clip=1e-2)
    _, policy, stream = run(source, replace(OPTIONS, iterations=2, batch=1000), tree)
    list(stream)
    # 4 trees of 4 leaves in all, whoever has them: 1 + 2 + 4 + 4 calls to sample, and the first 1 + 2 + 4 to update
    assert policy.ledger.evaluations == 2 * 4 * (11 + 7)


def test_filtered_groups_cost_nothing() -> None:
    """Groups without variance are left out of the update, all of them if need be; the gradient is that of the rest."""
    o = replace(OPTIONS, iterations=1, batch=1000)
    both, policy, stream = run(Prompts(["a", "dull b"]), replace(o, filter_groups=True))
    metrics = list(stream)
    assert metrics[0]["dead"] == 0.5 and policy.ledger.evaluations == 16 * 4 + 8 * 3  # the last step is not trained
    still, policy, stream = run(Prompts(["dull a", "dull b"]), replace(o, filter_groups=True))
    metrics = list(stream)
    assert policy.ledger.evaluations == 16 * 4 and "grad_norm" not in metrics[0]
    assert all(torch.equal(p, q) for p, q in zip(still.denoiser.parameters(), Toy().denoiser.parameters(), strict=True))
    assert not torch.equal(both.denoiser[0].weight, still.denoiser[0].weight)


def test_it_is_reached_from_the_configuration() -> None:
    """``allocation.by`` and ``fit.filter_groups`` are keys of a configuration file."""
    plain = {"pipeline": "tests.runworld:pipeline", "reward": "tests.toy:Bright", "device": "cpu"}
    plain["prompts"] = str(Path(__file__).parents[1] / "pipelines/worlds/prompts/select.jsonl")
    config = compose({**plain, "allocation": {"by": "prompt", "floor": 0.1}, "fit": {"filter_groups": True}}, "ddpo")
    source = build(config).source
    assert isinstance(source, Adaptive) and source.allocation == Allocation("prompt", floor=0.1)
    assert config.fit.filter_groups and isinstance(build(compose(plain, "ddpo")).source, Prompts)
    assert default("ddpo").allocation == Allocation()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Allocation(floor=0.0), "floor"),
        (lambda: Allocation(unit=0), "at least 1"),
        (lambda: Adaptive(["a"], Allocation("size", unit=4)).draw(0, 1, 6), "multiple"),
        (lambda: compose({"allocation": {"by": "luck"}}, "ddpo"), "one of even, prompt, size"),
        (lambda: compose({"fit": {"filter_groups": True}}, "diffusion-nft"), None),
    ],
)
def test_bad_settings(make, words: str | None) -> None:
    if words is None:
        toy, config = Toy(), make()
        recipe = config.method.recipe(toy.times(4))
        policy, parameters = prepare(toy, None, recipe.roles, old=recipe.old)
        with pytest.raises(ValueError, match="filter_groups"):
            next(fit(toy, Scorer(toy, {"r": Partly()}), Prompts(["a"]), recipe, config.fit, policy=policy,
                     parameters=parameters))  # fmt: skip
        return
    with pytest.raises(ValueError, match=words):
        make()


def test_several_processes_are_refused() -> None:
    """Each process sees its own rewards: they would draw different prompts."""

    class Two:
        num_processes = 2

    with pytest.raises(ValueError, match="follows the rewards"):
        check_processes(Adaptive(["a"], Allocation("prompt")), OPTIONS, Two())
    with pytest.raises(ValueError, match="filter_groups"):
        check_processes(Prompts(["a"]), replace(OPTIONS, filter_groups=True), Two())
    check_processes(Prompts(["a"]), OPTIONS, Two())
