"""Paired evaluation: same noises whatever the batch, honest standard errors, layouts that show a collapse."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from flowalign.evaluate import Exam, Outcome, compare, drift, effective_layouts, examine
from flowalign.policy import Policy
from flowalign.prepare import prepare
from flowalign.scorer import Scorer
from flowalign.source import Prompt
from tests.runworld import Saved, Strict, quadrant
from tests.toy import Bright

PROMPTS = [
    Prompt("a", {"category": "light"}),
    Prompt("b", {"category": "light"}),
    Prompt("c dark", {"category": "dark"}),
]
EXAM = Exam(PROMPTS, 30, 4, batch=7, seed=3, keep=6)


def look(exam: Exam = EXAM, toy: Saved | None = None, role: str = "current", policy: Policy | None = None) -> Outcome:
    toy = toy or Saved()
    scorer = Scorer(toy, {"strict": Strict(), "bright": Bright()})
    return examine(toy, policy or Policy(toy), scorer, exam, role=role, layouts=quadrant)


def outcome(score: list[float], layout: list[int], row: list[int] | None = None) -> Outcome:
    row = row or [0] * len(score)
    empty = torch.zeros(0, 3, 2, 2)
    return Outcome(
        torch.tensor(row), ["x"] * len(score), {"s": torch.tensor(score)}, torch.tensor(layout), empty, [], empty
    )


def test_images_are_spread_over_prompts() -> None:
    """So many per category, evenly over its prompts."""
    assert EXAM.rows().bincount().tolist() == [15, 15, 30] and EXAM.categories == ["light", "dark"]


def test_batch_does_not_matter() -> None:
    """An image depends on its prompt and number alone: batches of 7 and of 60, and a smaller exam, see the same."""
    one, two = look(), look(replace(EXAM, batch=60))
    assert torch.equal(one.layout, two.layout) and torch.equal(one.scores["strict"], two.scores["strict"])
    assert torch.allclose(one.scores["bright"], two.scores["bright"], atol=1e-6)
    few = look(replace(EXAM, images=10))
    light = one.of("light")
    first = torch.cat([light[one.row[light] == p][:5] for p in (0, 1)])
    assert torch.allclose(few.scores["bright"][few.of("light")], one.scores["bright"][first], atol=1e-6)


def test_pictures_are_kept_evenly() -> None:
    """Six per category, three of each of its two prompts, and the states they were decoded from."""
    o = look()
    assert o.pictures.shape == (12, 3, 2, 2) and o.x0.shape == (12, 3, 2, 2)
    assert torch.tensor([int(o.row[i]) for i in o.shown]).bincount().tolist() == [3, 3, 6]
    toy = Saved()
    assert torch.allclose(toy.decode(o.x0, None), o.pictures)
    assert torch.allclose(
        Bright()(o.pictures, [PROMPTS[int(o.row[i])].text for i in o.shown]), o.scores["bright"][o.shown]
    )


def test_short_exams_keep_pictures_of_the_same_prompts() -> None:
    """Of twenty prompts eight evenly chosen ones; an exam with less than an image each keeps those of them that have
    images, and others in place of those that have none."""
    exam = Exam([Prompt(str(i), {"category": "x"}) for i in range(20)], 40, 4, keep=10)
    spread = [0, 2, 5, 7, 10, 12, 15, 17]

    def kept(images: int) -> list[int]:
        o = look(replace(exam, images=images))
        return [int(o.row[i]) for i in o.shown]

    assert sorted(kept(40)) == sorted([*spread, 0, 2])
    assert set(kept(20)) == set(spread), "no others where all have images, though more could be kept"
    assert sorted(kept(13)) == sorted([0, 2, 5, 7, 10, 12, 1, 3])
    assert kept(2) == [0, 1]


def test_comparison_is_paired() -> None:
    """Gain and error are those of the differences, and the same weights differ by exactly nothing."""
    a, b = look(), look()
    for c in compare(a, b).values():
        assert c.gain == (0.0, 0.0) and c.kept == 1.0
    before, after = outcome([0.0, 0, 1, 1], [0] * 4), outcome([1.0, 0, 1, 1], [0] * 4)
    c = compare(before, after)["x"]
    d = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert c.gain == pytest.approx((0.25, float(d.std()) / 2)) and c.before == pytest.approx(
        (0.5, 0.57735 / 2), rel=1e-5
    )
    assert compare(a, b, "bright")["light"].before[0] == pytest.approx(float(a.scores["bright"][:30].mean()))


def test_other_exams_are_refused() -> None:
    """Outcomes of different images cannot be paired."""
    with pytest.raises(ValueError, match="would not be paired"):
        compare(outcome([1.0], [0]), outcome([1.0, 1.0], [0, 0]))


def test_layouts_show_a_collapse() -> None:
    """Four equally frequent layouts count four; wrong images do not count; both sides are cut to equal numbers."""
    layout = [0, 1, 2, 3] * 25
    even, one = outcome([1.0] * 100, layout), outcome([1.0] * 100, [2] * 100)
    assert effective_layouts(even, one, "x") == (pytest.approx((4.0, 1.0)), pytest.approx((4.0, 1.0)))
    assert compare(even, one)["x"].kept == pytest.approx(0.25)
    wrong = outcome([0.0] * 50 + [1.0] * 50, [5] * 50 + layout[:50])
    assert effective_layouts(wrong, wrong, "x")[0] == pytest.approx((3.9968, 3.9968), abs=1e-3)
    # 100 draws of 100 layouts against the first 30 of them: equal once they are equally many
    many, few = outcome([1.0] * 100, list(range(100))), outcome([1.0] * 30 + [0.0] * 70, list(range(100)))
    assert effective_layouts(many, few, "x")[0] == pytest.approx((30.0, 30.0))
    assert effective_layouts(few, many, "x")[0] == pytest.approx((30.0, 30.0))
    broken = outcome([1.0] * 19 + [0.0] * 81, list(range(100)))
    assert effective_layouts(many, broken, "x") == (None, None) and compare(many, broken)["x"].kept is None


def test_layouts_per_prompt_see_what_the_pool_does_not() -> None:
    """Each prompt stuck on a layout of its own: the pool still shows two, the prompts one each, and that counts."""
    row = [0] * 40 + [1] * 40
    free = outcome([1.0] * 80, [0, 1] * 40, row)
    stuck = outcome([1.0] * 80, [0] * 40 + [1] * 40, row)
    pool, per_prompt = effective_layouts(free, stuck, "x")
    assert pool == pytest.approx((2.0, 2.0)) and per_prompt == pytest.approx((2.0, 1.0))
    assert compare(free, stuck)["x"].kept == pytest.approx(0.5)


def test_no_layouts() -> None:
    """Without layouts, or without a correct image, nothing is claimed."""
    plain = replace(outcome([1.0, 1.0], [0, 0]), layout=None)
    assert compare(plain, plain)["x"].kept is None
    wrong = outcome([0.0, 0.0], [0, 1])
    assert compare(wrong, wrong)["x"].kept is None


def test_drift_is_the_velocity_gap() -> None:
    """A network moved by a constant drifts by its square; the base's own drift is zero."""
    toy = Saved()
    policy, parameters = prepare(toy, None, ("reference",))
    x0 = look(toy=toy).x0
    arguments = (["a"] * len(x0), [{}] * len(x0), x0, "current", 0)
    assert drift(toy, policy, *arguments) == 0.0
    with torch.no_grad():
        toy.denoiser[2].bias += 0.5  # the toy adds a tenth of the network's output to its velocity
    assert drift(toy, policy, *arguments) == pytest.approx(0.05**2, rel=1e-4)
    base = look(toy=toy, role="reference", policy=policy)
    assert torch.equal(base.scores["bright"], look().scores["bright"])
    assert not torch.equal(look(toy=toy).scores["bright"], base.scores["bright"]) and len(parameters) == 4


def test_standard_error_covers() -> None:
    """Over 200 repetitions, the mean lies within two standard errors of the truth about 95 % of the time."""
    g = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(200):
        s = (torch.rand(100, generator=g) < 0.3).float()
        mean, se = compare(outcome(s.tolist(), [0] * 100), outcome(s.tolist(), [0] * 100))["x"].before
        hits += abs(mean - 0.3) < 2 * se
    assert 180 <= hits <= 199 and not math.isnan(se)
