"""Hacking is visible: what is measured, the rule against made-up and simulated runs, and a run that does hack."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowalign import checkpoint
from flowalign.build import WORLDS, Facts, build
from flowalign.config import Evaluation, RunConfig, default
from flowalign.evaluate import DRIFT_TIMES, Exam, Outcome, thumbnails
from flowalign.folder import Folder
from flowalign.methods.flow_grpo import FlowGRPO
from flowalign.monitor import grouped, hacking, marks, path_kl, spread, within
from flowalign.prepare import prepare
from flowalign.run import train
from flowalign.source import Prompt
from tests.toy import Toy

# ------------------------------------------------------------------------------------------------ what is measured


def outcome(row: list[int], thumbs: torch.Tensor) -> Outcome:
    n = len(row)
    zero = torch.zeros(n)
    return Outcome(torch.tensor(row), ["all"] * n, {"r": zero}, None, torch.zeros(0, 3, 1, 1), [], zero, thumbs)


def test_spread_is_the_mean_pairwise_distance() -> None:
    """2 · spread² is the mean squared distance of two images of one prompt; a prompt of one image says nothing."""
    g = torch.Generator().manual_seed(0)
    thumbs, row = torch.randn(7, 5, generator=g), [0, 0, 0, 1, 1, 1, 2]
    pairs = [((thumbs[i] - thumbs[j]) ** 2).sum() for i in range(7) for j in range(i) if row[i] == row[j]]
    assert 2 * spread(outcome(row, thumbs)) ** 2 == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-5)
    assert spread(outcome(row, 0 * thumbs)) == 0.0 and spread(outcome([0, 1], thumbs[:2])) is None
    values = torch.tensor([1.0, 2.0, 3.0, 7.0, 7.0, 7.0, 9.0])
    assert within(values, torch.tensor(row)) == pytest.approx((2 / 4) ** 0.5)


def test_thumbnails() -> None:
    """Means over blocks; loudness for audio; four frames for video."""
    image = torch.zeros(2, 3, 16, 16)
    image[0, 1, :2, :2] = 1.0
    small = thumbnails(image)
    assert small.shape == (2, 192) and small[0].reshape(3, 8, 8)[1, 0, 0] == 1 and small.sum() == 1
    assert thumbnails(torch.rand(2, 9, 3, 16, 16)).shape == (2, 3 * 4 * 64)
    assert torch.allclose(thumbnails(-0.5 * torch.ones(2, 1, 640)), torch.full((2, 64), 0.5))


def test_exam_of_few_prompts() -> None:
    """Every prompt gets several images, every category keeps some, and the choice is even."""
    prompts = [Prompt(f"{c}{i}", {"category": c}) for c in "pq" for i in range(20)]
    exam = grouped(Exam(prompts, 16, 4))
    assert [p.text for p in exam.prompts] == ["p0", "p5", "p10", "p15", "q0", "q5", "q10", "q15"]
    assert torch.bincount(exam.rows()).tolist() == [4] * 8
    assert len(grouped(Exam(prompts, 2, 4)).prompts) == 2


def test_path_kl_of_a_shifted_field() -> None:
    """Velocities that differ by δ in each of D dimensions: KL = D δ² (1 + a²/2)² / 2a² · mean_t (1 - t)/t, exactly."""
    toy = Toy()
    policy, _ = prepare(toy, None, ("reference",))
    with torch.no_grad():
        toy.denoiser[2].bias += 0.5
    x0 = torch.rand(6, 3, 2, 2)
    found = path_kl(toy, policy, ["a"] * 6, [{}] * 6, x0, "current", 0)
    factor = sum((1 - t) / t for t in DRIFT_TIMES) / len(DRIFT_TIMES)
    expected = 12 * 0.05**2 * (1 + 0.49 / 2) ** 2 / (2 * 0.49) * factor
    assert found == pytest.approx(expected, rel=1e-3)
    assert path_kl(toy, policy, ["a"] * 6, [{}] * 6, x0, "reference", 0) == 0.0


# ------------------------------------------------------------------------------------------------ the rule


def steady(values: list[float], error: float = 0.01) -> list[tuple[float, float]]:
    return [(v, error if i else 0.0) for i, v in enumerate(values)]


def test_the_rule_by_hand() -> None:
    """Marked at the second check that speaks in a row; began at the best of the held-out; neither alone is enough."""
    rising, falling = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5], [0.0, 0.05, 0.1, 0.04, -0.05, -0.1]
    mark = hacking(steady(rising), steady(falling))
    assert mark is not None and (mark.began, mark.seen) == (2, 4)
    assert mark.rise == pytest.approx((0.2, 0.01 * 2**0.5)) and mark.fall[0] == pytest.approx(0.15)
    assert hacking(steady([0.0] * 6), steady(falling)) is None, "everything falls: that is not hacking"
    assert hacking(steady(rising), steady(rising)) is None, "both rise"
    assert hacking(steady(rising), steady([0.0, 0.05, 0.1, 0.0, 0.1, 0.0])) is None, "one dip is not enough"
    assert hacking(steady(rising), steady(falling, 0.06)) is None, "within the errors"
    assert hacking(steady(rising), [(v, math.nan) for v in falling]) is None, "an error nobody knows"
    assert hacking([], []) is None and hacking(steady([0.0]), steady([0.0])) is None


def test_false_alarms_are_rare() -> None:
    """Thirty checks of independent errors, the trained reward rising, the held-out one flat: 2.7 % are marked here."""
    g = torch.Generator().manual_seed(0)
    flat = torch.randn(2000, 30, generator=g) * 0.01
    flat[:, 0] = 0.0
    rising = steady([0.1 * i for i in range(30)])
    alarms = sum(hacking(rising, steady(row)) is not None for row in flat.tolist())
    assert alarms < 80
    fall = [max(0.0, 0.01 * (i - 10)) for i in range(30)]
    seen = [hacking(rising, steady([v - f for v, f in zip(row, fall, strict=True)])) for row in flat[:200].tolist()]
    assert all(m is not None for m in seen), "a fall of one standard error a check is found in every run"
    assert sum(m.seen for m in seen) / 200 < 20


# ------------------------------------------------------------------------------------------------ a run that hacks


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Brightness is trained; what pleases is held out, and so is what brightness serves."""
    root = tmp_path_factory.mktemp("hacked")
    (root / "p.txt").write_text("a\nb\n")
    base = default("flow-grpo")
    method = FlowGRPO(noise=0.8, noise_law="cps", window=(0, 3), clip=None, ratio="mse", kl=0.0, std="group")
    return replace(
        base, pipeline="tests.runworld:pipeline", reward="tests.hackable:Bright", prompts=str(root / "p.txt"),
        output=root / "run", trackers=(), device="cpu", ema=None, method=method,
        fit=replace(base.fit, iterations=24, groups=2, size=16, steps=4, lr=4e-2, warmup=0),
        evaluation=Evaluation(
            rewards="tests.hackable:Pleasant, tests.hackable:Honest", images=20, every=3, check=40
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(config: RunConfig) -> Folder:
    train(config, progress=False)
    return Folder(config.folder)


def test_every_check_measures_it_all(whole: Folder) -> None:
    """Trained and held-out rewards, diversity, distance and variance, from the first check on."""
    first, *rest = whole.lines("checks.jsonl")
    assert len(rest) == 8 and first["kl"] == first["trained"]["gain"][0] == 0 and first["spread"] == 1.0
    for c in rest:
        assert set(c["held_out"]) == {"tests.hackable:Pleasant", "tests.hackable:Honest"}
        assert c["kl"] > 0 and c["drift"] > 0 and c["trained"]["std"] > 0 and 0 < c["spread"] < 3
        assert c["trained"]["mean"] == pytest.approx(first["trained"]["mean"] + c["trained"]["gain"][0], abs=1e-5)
    kl = [c["kl"] for c in whole.lines("checks.jsonl")]
    assert kl[-1] > kl[4] > kl[1] and c["spread"] < 0.5, "the pictures have become one"


def test_it_is_marked_where_the_truth_turns(whole: Folder) -> None:
    """The mark lies where brightness passes .62; a held-out reward that brightness serves has none."""
    checks, found = whole.lines("checks.jsonl"), whole.summary()["hacking"]
    assert set(found) == {"tests.hackable:Pleasant"} and found == marks(checks)
    mark = found["tests.hackable:Pleasant"]
    bright = {c["iteration"]: c["trained"]["mean"] for c in checks}
    before, after = (bright[mark["began"] + d] for d in (-3, 3))
    assert before < 0.62 < after and mark["began"] < mark["seen"] < 22
    text = (whole.path / "report.html").read_text()
    words = f"hacking began at iteration {mark['began']} and was certain at {mark['seen']}"
    assert "Trained against held out" in text and words in text and "held-out Pleasant fell by" in text


def test_it_stops_there_if_asked(whole: Folder, config: RunConfig) -> None:
    """The run ends with the iteration after the mark, as it was until then; resuming takes it no further."""
    seen = whole.summary()["hacking"]["tests.hackable:Pleasant"]["seen"]
    stop = replace(
        config, output=config.folder.parent / "stopped", fit=replace(config.fit, checkpoint_every=1),
        evaluation=replace(config.evaluation, stop_on_hacking=True),
    )  # fmt: skip
    summary = train(stop, progress=False)
    assert summary["iterations"] == seen + 1 and summary["status"] == "done" and "accuracy" in summary
    a, b = (f.lines("metrics.jsonl")[seen]["reward"] for f in (whole, Folder(stop.folder)))
    assert a == b
    result = {p.name: p.read_bytes() for p in (stop.folder / "result").glob("*.safetensors")}
    again = train(stop, resume=True, progress=False)
    assert again["iterations"] == seen + 1
    assert result == {p.name: p.read_bytes() for p in (stop.folder / "result").glob("*.safetensors")} != {}
    checkpoint.latest(stop.folder / "checkpoints").unlink()  # as if killed right after the check that marked it
    assert checkpoint.load(checkpoint.latest(stop.folder / "checkpoints"))["iteration"] == seen
    assert train(stop, resume=True, progress=False)["iterations"] == seen + 1
    on = replace(stop, evaluation=config.evaluation, fit=replace(stop.fit, iterations=seen + 5))
    assert train(on, resume=True, progress=False)["iterations"] == seen + 5, "switched off, it goes on"


def test_nothing_held_out_is_said(config: RunConfig) -> None:
    """A run that is judged by what it trains on says so instead of finding nothing."""
    plain = replace(
        config, output=config.folder.parent / "plain", fit=replace(config.fit, iterations=4),
        evaluation=replace(config.evaluation, rewards=None),
    )  # fmt: skip
    assert train(plain, progress=False)["hacking"] == {}
    assert "nothing is held out" in (plain.folder / "report.html").read_text()
    watched = build(replace(config, permute=True)).watch.rewards
    assert list(watched)[-1] == "tests.hackable:Bright" and type(watched["tests.hackable:Bright"]).__name__ == "Bright"


def test_a_world_holds_a_reward_out(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks of a demo world watch its held-out reward unless others are named; the final exam stays as it is."""
    assert {w.held for w in WORLDS.values()} == {"shapes-clip"}
    world = Facts("tests.hackable:Pleasant", held="tests.hackable:Honest")
    monkeypatch.setitem(WORLDS, config.pipeline, world)
    plain = replace(config.evaluation, rewards=None, prompts=config.prompts, check_prompts=config.prompts)

    def watched(**change: object) -> list[str]:
        job = build(replace(config, evaluation=replace(plain, **change)))  # type: ignore[arg-type]
        assert "Honest" not in str(list(job.judge.rewards)) and len(job.exam.prompts) == 2
        return [n.rpartition(":")[2] for n in job.watch.rewards]

    assert watched() == ["Pleasant", "Honest", "Bright"]
    assert watched(rewards="") == watched(every=0) == ["Pleasant", "Bright"]
    assert watched(rewards="tests.hackable:Bright") == ["Pleasant", "Bright"]
    trained = build(replace(config, reward="tests.hackable:Honest", evaluation=plain))
    assert list(trained.watch.rewards) == ["tests.hackable:Pleasant", "tests.hackable:Honest"]


def test_checks_are_on_by_default() -> None:
    """Every run is watched unless it says no; stopping without watching is refused."""
    assert default("ddpo").evaluation.every > 0
    with pytest.raises(ValueError, match=r"every = 0 makes none"):
        Evaluation(every=0, stop_on_hacking=True)


def test_older_checks_are_read(whole: Folder, tmp_path: Path) -> None:
    """A folder of an older version has a report that says what it lacks."""
    from flowalign.report import write_report

    old = Folder(tmp_path)
    old.path.mkdir(exist_ok=True)
    (old.path / "config.yaml").write_bytes((whole.path / "config.yaml").read_bytes())
    lines = [{k: v for k, v in c.items() if k not in ("trained", "held_out", "spread", "kl")}
             for c in whole.lines("checks.jsonl")]  # fmt: skip
    old.write("checks.jsonl", "".join(json.dumps(c) + "\n" for c in lines))
    text = write_report([old], tmp_path / "r.html").read_text()
    assert "Trained against held out" not in text and marks(lines) == {}
