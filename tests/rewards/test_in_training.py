"""Rewards inside the one training loop: constraints, a discriminator, judges that are away, overlapped scoring."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign import checkpoint
from flowalign.build import Shuffled
from flowalign.collect import Collector, collect
from flowalign.fit import fit
from flowalign.hearing import hearing, tell
from flowalign.kernels import EulerMaruyama
from flowalign.laws import FlowGrpo
from flowalign.learner import Learner
from flowalign.methods.tree_grpo import TreeGRPO
from flowalign.objectives import Backprop, Clip, DiffusionNFT
from flowalign.options import FitOptions
from flowalign.pause import Away, Pause
from flowalign.prepare import prepare
from flowalign.protocols import Card
from flowalign.recipe import Recipe
from flowalign.rewards.algebra import Cached, Constrained, Constraint, LogSigmoid, MicroBatch, reward
from flowalign.rewards.backbones import VitBackbone
from flowalign.rewards.data import read_folder
from flowalign.rewards.discriminator import Discriminator
from flowalign.rewards.frames import FrameReward
from flowalign.rewards.quality import Smoothness
from flowalign.rewards.remote import Patience, RemoteReward
from flowalign.rewards.training import HeadSpec, Settings, Trained, train
from flowalign.rollout import Tape
from flowalign.scorer import Scorer
from flowalign.source import Prompts
from tests.rewards.tiny_judges import dino
from tests.toy import Bright, Toy

ODE, SDE = EulerMaruyama(), EulerMaruyama(FlowGrpo(0.7))
OPTIONS = FitOptions(iterations=6, groups=4, size=8, steps=6, lr=3e-3, batch=64, weight_decay=0.0, checkpoint_every=1)


def grpo() -> Recipe:
    return Recipe(SDE, Clip(SDE, 1e-2))


def draft() -> Recipe:
    return Recipe(ODE, Backprop(), credit=None, tape=lambda i: Tape(4))


def start(judge: Any, options: FitOptions = OPTIONS, recipe: Recipe | None = None, pause: Pause | None = None, **kw):
    toy, recipe = Toy(), recipe or grpo()
    scorer = Scorer(toy, {"r": judge}, pause=pause)
    policy, parameters = prepare(toy, None, recipe.roles, old=recipe.old)
    torch.manual_seed(1)
    stream = fit(toy, scorer, Prompts(["a", "b", "c"]), recipe, options, policy=policy, parameters=parameters, **kw)
    return toy, stream, scorer


def flat(toy: Toy) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in toy.denoiser.parameters()])


def timeless(metrics: Any) -> list[dict[str, float]]:
    return [{k: v for k, v in m.items() if "seconds" not in k} for m in metrics]


# ---- constraints ----------------------------------------------------------------------------------------------------


@reward("dark blue", differentiable=True, bounds=(-1.0, 0.0))
def dark_blue(media, prompts, meta):
    return -media[:, 2].mean((-1, -2))


LIMIT = -0.55  # at most .55 of blue; brightness pulls it up


def bounded(rate: float = 3.0, **kw: float) -> Constrained:
    return Constrained(Bright(), [Constraint(dark_blue, LIMIT, rate=rate, **kw)])


@pytest.mark.parametrize(("recipe", "rate", "begin"), [(grpo, 3.0, 1.0), (draft, 8.0, 0.0)])
def test_a_constraint_ends_satisfied_where_the_free_run_breaks_it(recipe: Any, rate: float, begin: float) -> None:
    """Over the last third of the run the blue of the free one is far beyond the bound, that of the other within it."""
    o = replace(OPTIONS, iterations=60, lr=4e-3, groups=2, size=16 if recipe is grpo else 8, max_grad_norm=10.0)
    runs = {r: list(start(bounded(r, start=s), o, recipe())[1]) for r, s in ((1e-9, 0.0), (rate, begin))}
    free, held = (sum(m["slack/dark blue"] for m in run[-20:]) / 20 for run in runs.values())
    assert free < -0.15 and held > 0.0
    moved = [m["lambda/dark blue"] for m in runs[rate]]
    assert min(moved) == 0.0 and max(moved) > 1.0  # it was needed, and it lets go


def test_the_loop_moves_multipliers_once_per_iteration_by_the_raw_values_of_its_samples() -> None:
    """In chunks, several updates, nested and micro-batched: one dual step, by the mean over all samples."""
    inner = bounded(rate=0.5, start=1.0)
    seen: list[torch.Tensor] = []

    class Watching(type(inner)):
        def step(self, values):
            seen.append(values)
            return super().step(values)

    inner.__class__ = Watching
    toy, stream, scorer = start(0.5 * MicroBatch(inner, 3) + Bright(), replace(OPTIONS, updates=2, iterations=1))
    scorer.chunk = 10
    probe = Collector(toy, scorer, prepare(toy, None)[0], grpo(), 2, 0)
    collect(probe, Prompts(["a"]).draw(0, 1, 2), 0)  # what a run does before it starts: of no account
    with torch.no_grad():
        scorer.judge(torch.rand(7, 3, 2, 2), ["a"] * 7)  # an evaluation, before: of no account
    first = next(stream)
    assert [tuple(v.shape) for v in seen] == [(32, 1)]
    want = 1.0 - 0.5 * (float(seen[0].double().mean()) - LIMIT)
    assert first["lambda/dark blue"] == pytest.approx(want, abs=1e-9) == float(inner.multipliers)
    assert first["slack/dark blue"] == pytest.approx(float(seen[0].double().mean()) - LIMIT, abs=1e-9)


def test_all_processes_move_a_multiplier_alike() -> None:
    """The mean goes over the samples of every process, not over one's own."""
    c = bounded(rate=1.0)
    with hearing() as heard:
        c(torch.full((2, 3, 2, 2), 0.9), ["", ""])
    other = torch.full((2, 1), -0.3)
    c.dual.learn([what for _, what in heard], 0, lambda mine: torch.cat([mine, other]))
    assert float(c.multipliers) == pytest.approx(LIMIT + 0.6, abs=1e-6)
    assert c.dual.learn([], 0, lambda v: v) == {}


def test_what_fails_or_is_not_listened_to_is_not_heard() -> None:
    """Outside of ``hearing`` nothing is noted; a listener inside keeps what it hears from the one outside."""
    tell("me", 1)
    with hearing() as outer:
        tell("me", 2)
        with hearing() as inner:
            tell("me", 3)
        tell("me", 4)
    assert outer == [("me", 2), ("me", 4)] and inner == [("me", 3)]


def test_a_reward_that_learns_is_found_wherever_it_stands_and_never_cached() -> None:
    c = bounded()
    assert (0.5 * c + Bright()).learners() == (c.dual,) == Shuffled(MicroBatch(c, 2)).learners()
    assert Scorer(Toy(), {"a": c, "b": 2 * c, "c": Bright()}).learners == (c.dual,)
    with pytest.raises(ValueError, match="Cache its members"):
        Cached(c)
    with pytest.raises(ValueError, match="2 multipliers were saved"):
        c.dual.load_state_dict({"multipliers": torch.zeros(2)})


# ---- the discriminator ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(3)
    return str(dino(tmp_path_factory.mktemp("dino")))


def adversarial(vit: str, **kw: Any) -> Discriminator:
    torch.manual_seed(4)
    g = torch.Generator().manual_seed(5)
    red = torch.rand(64, 3, 2, 2, generator=g) * 0.2 + torch.tensor([0.8, 0.2, 0.2]).view(3, 1, 1)
    kw = {"exemplars": red.clamp(0, 1), "hidden": 16, "size": 14, "steps": 4, "rate": 1e-2, **kw}
    return Discriminator(vit, **kw)


def redness(x: torch.Tensor) -> float:
    return float((x[:, 0] - x[:, 1:].mean(1)).mean())


def test_the_discriminator_learns_in_the_loop_and_pulls_samples_towards_the_exemplars(vit: str) -> None:
    """Its loss falls, it tells exemplars from the first samples, and the generator turns red as they are."""
    d = adversarial(vit)
    o = replace(OPTIONS, iterations=40, lr=1e-2, groups=2, size=16)
    toy, stream, _ = start(d, o)
    untouched = adversarial(vit)
    before = sample(toy)
    metrics = list(stream)
    after = sample(toy)
    assert redness(after) > redness(before) + 0.05
    assert metrics[-1]["discriminator/loss"] < metrics[0]["discriminator/loss"]
    real = d.adversary.real.float() / 255
    gap = lambda judge: float(judge(real, [""] * 64).mean() - judge(before, [""] * len(before)).mean())  # noqa: E731
    assert gap(d) > 0.5 > gap(untouched)


def sample(toy: Toy) -> torch.Tensor:
    policy, recipe = prepare(toy, None)[0], Recipe(ODE, DiffusionNFT())
    collector = Collector(toy, Scorer(toy, {"b": Bright()}), policy, recipe, 6, 0)
    draw = Prompts(["a"]).draw(0, 1, 64)
    return toy.decode(collector.sample(draw, collector.bind(draw), 0).leaves.x, None).detach().clamp(0, 1)


def test_scoring_elsewhere_never_trains_the_head(vit: str, tmp_path: Path) -> None:
    """Without exemplars nothing learns; evaluation leaves the head alone; a folder will do for exemplars."""
    from torchvision.utils import save_image

    d = adversarial(vit)
    head = [p.clone() for p in d.head.parameters()]
    scorer = Scorer(Toy(), {"d": d})
    scorer.judge(torch.rand(4, 3, 2, 2), [""] * 4)
    assert not scorer.heard and all(torch.equal(a, b) for a, b in zip(head, d.head.parameters(), strict=True))
    assert Discriminator(vit, size=14).learners() == ()
    for i in range(3):
        save_image(torch.full((3, 4 + i, 6), 0.2 * i), tmp_path / f"{i}.png")
    real = Discriminator(vit, str(tmp_path), size=14).adversary.real
    assert real.shape == (3, 3, 14, 14) and real.float().mean((1, 2, 3)).tolist() == [0.0, 51.0, 102.0]
    for bad in (lambda: Discriminator(vit, str(tmp_path / "none"), size=14), lambda: Discriminator(vit, steps=0)):
        with pytest.raises(ValueError):
            bad()


class Film(Toy):
    """The toy's picture as a video that fades in."""

    modality = "video"

    def decode(self, x: torch.Tensor, cond: Any) -> torch.Tensor:
        return super().decode(x, cond).unsqueeze(1) * torch.linspace(0.2, 1, 8).view(1, 8, 1, 1, 1)


@pytest.mark.parametrize("kind", ["constraint", "discriminator", "drawn frames"])
def test_what_rewards_learn_resumes_bit_for_bit(
    kind: str, vit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Multipliers, head, optimiser and draws go on where the checkpoint left them, in a fresh reward."""
    make = {
        "constraint": lambda: 2 * bounded(),
        "discriminator": lambda: adversarial(vit),
        "drawn frames": lambda: 2 * FrameReward(reward("bright", differentiable=True)(lambda x, p, m: Bright()(x, p))),
    }[kind]
    if kind == "drawn frames":
        monkeypatch.setattr(sys.modules[__name__], "Toy", Film)
    whole, stream, scorer = start(make(), folder=tmp_path / "a")
    metrics = timeless(stream)
    if kind == "drawn frames":
        assert scorer.learners[0].state_dict() == {"draws": 6}
    _, stream, _ = start(make(), folder=tmp_path / "b")
    for _ in range(3):
        next(stream)
    stream.close()
    judge = make()
    if kind == "discriminator":
        torch.nn.init.zeros_(judge.head[0].weight)  # whatever it was, the checkpoint's counts
    cut, stream, _ = start(judge, folder=tmp_path / "b", resume=True)
    assert timeless(stream) == metrics[3:] and torch.equal(flat(whole), flat(cut))
    a, b = (checkpoint.load(checkpoint.latest(tmp_path / n)) for n in "ab")
    assert len(a["learners"]) == 1 and repr(a["learners"]) == repr(b["learners"])


# ---- an artifact classifier as regulariser --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifacts(vit: str, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A classifier taught on a folder: natural pictures are good, green casts are artifacts."""
    from torchvision.utils import save_image

    home, g = tmp_path_factory.mktemp("judged"), torch.Generator().manual_seed(6)
    for side, cast in (("good", 0.0), ("bad", 0.45)):
        (home / side).mkdir()
        for i in range(24):
            noise = torch.randn(3, 2, 2, generator=g) * 0.15 + 0.5
            noise[1] += cast
            save_image(noise.clamp(0, 1), home / side / f"{i}.png")
    torch.manual_seed(0)
    model = Trained(VitBackbone(vit, size=14), HeadSpec("pooled", hidden=16), name="clean")
    assert train(model, read_folder(home), Settings(loss="bce", epochs=12, rate=5e-3)).accuracy > 0.85
    return model


def test_an_artifact_classifier_keeps_samples_clean_while_the_reward_rises(artifacts: Trained) -> None:
    """A judge that loves green turns nearly all samples into what the classifier calls artifacts; log σ(clean) added
    to it keeps them clean, and the green rises all the same. (How well that holds for eyes is the classifier's merit:
    this one rests on a random network.)"""

    @reward("green", differentiable=True)
    def green(media, prompts, meta):
        return media[:, 1].mean((-1, -2))

    o, ends = replace(OPTIONS, iterations=40, lr=1e-2, groups=2, size=8, max_grad_norm=10.0), {}
    for name, judge in {"hacked": green, "held": green + 0.3 * LogSigmoid(artifacts)}.items():
        toy, stream, _ = start(judge, o, draft())
        before = float(sample(toy)[:, 1].mean())
        list(stream)
        x = sample(toy)
        ends[name] = (float((artifacts(x, [""] * len(x)) > 0).float().mean()), float(x[:, 1].mean()) - before)
    assert ends["hacked"][0] < 0.3 and ends["held"][0] > 0.9, ends
    assert ends["held"][1] > 0.2, ends


# ---- judges that are away -------------------------------------------------------------------------------------------


class Flickering:
    """A judge that is away for some calls."""

    card = Card("flickering", "brightness, when it is there")

    def __init__(self, away: set[int]) -> None:
        self.away, self.calls = away, 0

    def __call__(self, media, prompts, meta=None):
        self.calls += 1
        if self.calls in self.away:
            raise Away("the judge is down.")
        return Bright()(media, prompts).detach()


def quick(said: list[str], **kw: Any) -> Pause:
    return Pause(first=0.01, longest=0.02, say=said.append, **kw)


def test_what_was_told_before_a_judge_fell_away_is_told_once() -> None:
    """A sum of a constraint and a judge that is away at first: asked again, the constraint's values count once."""
    judge = Scorer(Toy(), {"r": bounded() + Flickering({1, 2})}, pause=quick([]))
    judge.judge(torch.rand(5, 3, 2, 2), [""] * 5, learn=True)
    assert [tuple(what.shape) for _, what in judge.heard] == [(5, 1)]


@pytest.mark.parametrize("overlap", [1, 4])
def test_a_pause_changes_nothing_but_time(overlap: int, tmp_path: Path) -> None:
    """Away in the third iteration: one message, a checkpoint of its beginning, and the run ends at the same bits."""
    o = replace(OPTIONS, checkpoint_every=0, overlap=overlap)
    whole, stream, _ = start(Flickering(set()), o, folder=tmp_path / "a")
    want = timeless(stream)
    said: list[str] = []
    first = 2 * overlap + 1
    toy, stream, scorer = start(
        Flickering({first, first + overlap, first + overlap + 1}), o, pause=quick(said), folder=tmp_path / "b"
    )
    got = [next(stream), next(stream)]
    assert not said and checkpoint.latest(tmp_path / "b") is None
    got.append(next(stream))
    assert len(said) == 2 and "paused and nothing is lost" in said[0] and "is back" in said[1]
    path = checkpoint.latest(tmp_path / "b")
    assert path is not None and path.name == checkpoint.name(2) and str(path) in said[0]
    assert timeless([*got, *stream]) == want and torch.equal(flat(whole), flat(toy))
    assert scorer.pause.stop() is False and scorer.pause.save() == ""  # the loop's own are taken back


@pytest.mark.parametrize("recipe", [grpo, draft, lambda: TreeGRPO(eta=0.5, splits=(0, 2, 3)).recipe(Toy().times(6))])
def test_a_judge_that_stays_away_ends_the_run_resumably(recipe: Any, tmp_path: Path) -> None:
    """Patience ends: an error that says where to resume from; resumed, the run ends at the same bits."""
    o = replace(OPTIONS, checkpoint_every=0, size=8)

    class Gone(Flickering):
        card = Card("flickering", "brightness, when it is there", differentiable=True)

        def __call__(self, media, prompts, meta=None):
            self.calls += 1
            if self.calls >= min(self.away, default=10**9):
                raise Away("the judge is down.")
            return Bright()(media, prompts)

    whole, stream, scorer = start(Gone(set()), o, recipe(), folder=tmp_path / "a")
    want, per = timeless(stream), scorer.rewards["r"].calls // 6
    said: list[str] = []
    judge = Gone({3 * per + 1})
    _, stream, _ = start(judge, o, recipe(), quick(said, patience=0.1), folder=tmp_path / "b")
    with pytest.raises(Away, match=r"waited .* s for it\. Resuming would go on from .*step-00000003\.pt"):
        list(stream)
    assert len(said) == 1
    toy, stream, _ = start(Gone(set()), o, recipe(), folder=tmp_path / "b", resume=True)
    assert timeless(stream) == want[3:] and torch.equal(flat(whole), flat(toy))


def test_a_run_asked_to_stop_while_it_waits_ends_without_an_error(tmp_path: Path) -> None:
    """Ctrl-C in a pause: the run ends at once, with a checkpoint of where it was."""
    said: list[str] = []
    o = replace(OPTIONS, checkpoint_every=0)
    judge = Flickering(set(range(3, 10_000)))
    _, stream, _ = start(judge, o, None, quick(said), folder=tmp_path, stop=lambda: bool(said))
    began = time.monotonic()
    assert len(list(stream)) == 2 and time.monotonic() - began < 30
    assert checkpoint.latest(tmp_path).name == checkpoint.name(2)
    _, stream, _ = start(Flickering({1, 2}), o, None, quick([], patience=0.0), folder=tmp_path / "new")
    with pytest.raises(Away, match="Resuming would begin anew"):
        next(stream)
    _, stream, _ = start(Flickering({1, 2}), o, None, quick([], patience=0.0))
    with pytest.raises(Away, match="No folder was given"):
        next(stream)


def test_a_pause_in_the_middle_of_updates_saves_nothing_wrong(tmp_path: Path) -> None:
    """Backpropagation judges between updates: the weights have moved, so the checkpoint before is what counts."""
    o = replace(OPTIONS, checkpoint_every=2, batch=8)  # four optimiser steps an iteration, one per group
    whole, stream, _ = start(Bright(), o, draft(), folder=tmp_path / "a")
    want = timeless(stream)

    class Gone(Bright):
        calls = 0

        def __call__(self, media, prompts, meta=None):
            Gone.calls += 1
            if Gone.calls > 4 * 3 + 2:
                raise Away("the judge is down.")
            return super().__call__(media, prompts)

    _, stream, _ = start(Gone(), o, draft(), quick([], patience=0.0), folder=tmp_path / "b")
    with pytest.raises(Away, match=r"step-00000002\.pt"):
        list(stream)
    toy, stream, _ = start(Bright(), o, draft(), folder=tmp_path / "b", resume=True)
    assert timeless(stream) == want[2:] and torch.equal(flat(whole), flat(toy))


class Served:
    """``flowalign serve smoothness`` as a process of its own, which can be killed and started again on its port."""

    def __init__(self) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.start()

    def start(self) -> None:
        command = ["serve", "smoothness", "--port", str(self.port), "--device", "cpu"]
        self.process = subprocess.Popen([sys.executable, "-m", "flowalign", *command], stderr=subprocess.DEVNULL)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)


@pytest.mark.parametrize("overlap", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_server_killed_in_the_middle_and_started_again_costs_only_time(overlap: int, tmp_path: Path) -> None:
    """A process killed with -9 between two iterations, back when the pause is announced: same bits to the end."""
    o = replace(OPTIONS, checkpoint_every=0, iterations=4, overlap=overlap)
    whole, stream, _ = start(Smoothness(), o, folder=tmp_path / "a")
    want = timeless(stream)
    server, said = Served(), []

    def say(message: str) -> None:
        said.append(message)
        if "paused" in message:
            server.start()

    try:
        patience = Patience(
            timeout=300, grace=300, first=0.1, longest=0.2
        )  # a busy machine is not a server that is down
        judge = RemoteReward(f"http://127.0.0.1:{server.port}", patience=patience)
        toy, stream, _ = start(judge, o, None, Pause(first=0.2, longest=0.5, say=say), folder=tmp_path / "b")
        got = [next(stream), next(stream)]
        assert not said
        server.kill()
        judge.patience = replace(patience, grace=0.1)
        got += list(stream)
    finally:
        server.kill()
    assert len(said) == 2 and f"127.0.0.1:{server.port} is down" in said[0] and "flowalign serve" in said[0]
    assert timeless(got) == want and torch.equal(flat(whole), flat(toy))


@pytest.mark.parametrize("bad", [dict(patience=-1.0), dict(first=0.0), dict(first=9.0, longest=1.0)])
def test_bad_pauses_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="a pause wants"):
        Pause(**bad)


# ---- overlapped scoring ---------------------------------------------------------------------------------------------


class Timed:
    """Brightness after a while; notes when it worked, and in which thread."""

    card = Card("timed", "brightness, slowly")

    def __init__(self, seconds: float) -> None:
        self.seconds, self.spans, self.threads = seconds, [], set()

    def __call__(self, media, prompts, meta=None):
        began = time.perf_counter()
        time.sleep(self.seconds)
        self.spans.append((began, time.perf_counter()))
        self.threads.add(threading.get_ident())
        return Bright()(media, prompts).detach()


@contextmanager
def timed_rollouts(seconds: float, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[float, float]]]:
    spans: list[tuple[float, float]] = []
    real = Collector.sample

    def sample(self, *args, **kwargs):
        began = time.perf_counter()
        time.sleep(seconds)
        tree = real(self, *args, **kwargs)
        spans.append((began, time.perf_counter()))
        return tree

    monkeypatch.setattr(Collector, "sample", sample)
    yield spans


def together(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> float:
    return sum(max(0.0, min(p[1], q[1]) - max(p[0], q[0])) for p in a for q in b)


def test_the_loop_scores_one_part_while_it_rolls_out_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """With four parts, three of four scorings run beside a rollout, in another thread; with one part none does."""
    shared = {}
    for parts in (1, 4):
        judge = Timed(0.1)
        with timed_rollouts(0.1, monkeypatch) as spans:
            _, stream, _ = start(judge, replace(OPTIONS, iterations=1, overlap=parts))
            assert len(list(stream)) == 1
        shared[parts] = together(spans, judge.spans)
        assert len(spans) == len(judge.spans) == parts
        assert (threading.get_ident() in judge.threads) == (parts == 1)
        monkeypatch.undo()
    assert shared[1] == 0.0 and shared[4] > 0.15


@pytest.mark.parametrize("name", ["chain", "tree", "kept"])
def test_parts_side_by_side_are_the_one_rollout(name: str) -> None:
    """States, rewards, parents, rows and credit of a cut rollout are those of a single one; prompts in their places."""
    recipe = {
        "chain": grpo(),
        "tree": TreeGRPO(eta=0.5, splits=(0, 2, 3)).recipe(Toy().times(6)),
        "kept": replace(grpo(), keep=True),
    }[name]
    toy = Toy()
    policy, _ = prepare(toy, None, recipe.roles)
    draw = Prompts(["a", "b dark", "c", "d dark", "e"]).draw(0, 5, 8)
    made = {}
    for parts in (1, 2, 9):
        scorer = Scorer(toy, {"b": Bright(differentiable=False), "c": bounded(start=1.0)})
        made[parts] = collect(Collector(toy, scorer, policy, recipe, 6, 0, overlap=parts), draw, 3)
        heard = torch.cat([what for _, what in scorer.heard])
        one = made[1].trajectory
        assert heard.shape == (len(one.leaves), 1)
        tree = made[parts].trajectory
        for k in range(7):
            for f in ("x", "row", "parent", "origin", "log_prob", "log_w"):
                assert torch.allclose(getattr(tree.at(k), f), getattr(one.at(k), f), atol=1e-5), (k, f)
        for n, r in made[1].rewards.items():
            assert torch.allclose(made[parts].rewards[n], r, atol=1e-6)
        for a, b in zip(recipe.credit(made[1]), recipe.credit(made[parts]), strict=True):
            assert (a is None and b is None) or torch.allclose(a, b, atol=1e-3, equal_nan=True)
        steps = tree.transitions(recipe.credit(made[parts]))
        assert (steps.mean is not None) == (name == "kept") and len(steps) > 0


def test_learners_know_the_prompts_of_the_part_and_then_of_the_whole() -> None:
    """A value network looks prompts up by row: those of the part while it is rolled out, of the draw for the credit."""

    class Ears(Learner):
        def __init__(self) -> None:
            self.calls: list[list[str]] = []

        def enter(self, prompts) -> None:
            self.calls.append(list(prompts))

    ears, toy = Ears(), Toy()
    recipe = replace(grpo(), learners=(ears,))
    collector = Collector(toy, Scorer(toy, {"b": Bright()}), prepare(toy, None)[0], recipe, 4, 0, overlap=2)
    draw = Prompts(["a", "b", "c"]).draw(0, 3, 2)
    collect(collector, draw, 0)
    assert ears.calls == [draw.prompts[:2], draw.prompts[2:], draw.prompts]


def test_overlapped_runs_resume_bit_for_bit(tmp_path: Path) -> None:
    o = replace(OPTIONS, overlap=3)
    whole, stream, _ = start(bounded(), o, folder=tmp_path / "a")
    want = timeless(stream)
    _, stream, _ = start(bounded(), o, folder=tmp_path / "b")
    next(stream), next(stream)
    stream.close()
    toy, stream, _ = start(bounded(), o, folder=tmp_path / "b", resume=True)
    assert timeless(stream) == want[2:] and torch.equal(flat(whole), flat(toy))


def test_overlap_is_refused_where_it_would_be_wrong() -> None:
    @reward("pair")
    def pair(media, prompts, meta):
        return Bright()(media, prompts).detach()

    pair.card = replace(pair.card, batch=False)
    with pytest.raises(ValueError, match="would cut the set"):
        next(start(pair, replace(OPTIONS, overlap=2))[1])
    with pytest.raises(ValueError, match="without gradients"):
        next(start(Bright(), replace(OPTIONS, overlap=2), draft())[1])
    with pytest.raises(ValueError, match="overlap must be at least 1"):
        replace(OPTIONS, overlap=0)


def test_an_error_of_the_judge_in_the_other_thread_ends_the_run() -> None:
    @reward("broken")
    def broken(media, prompts, meta):
        return torch.full((len(media),), torch.nan)

    with pytest.raises(ValueError, match="never counted as zero"):
        next(start(broken, replace(OPTIONS, overlap=4))[1])
