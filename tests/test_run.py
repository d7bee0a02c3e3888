"""The main job: what a run leaves behind, that nothing is lost by a kill, and that nothing is overwritten."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowalign import checkpoint
from flowalign.build import build
from flowalign.config import RunConfig, default
from flowalign.evaluate import examine
from flowalign.folder import Folder
from flowalign.policy import Policy
from flowalign.run import Bars, patience, train

PROMPTS = """{"prompt": "a", "category": "light"}
{"prompt": "b", "category": "light"}
{"prompt": "c dark", "category": "dark"}
"""


@pytest.fixture(autouse=True)
def _no_report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no curves where they are not looked at."""
    if request.node.name != "test_a_run_leaves_everything":
        monkeypatch.setattr("flowalign.report.write_report", lambda folders, path: path)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run of a second."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(PROMPTS)
    base = default("diffusion-nft")
    return replace(
        base, pipeline="tests.runworld:pipeline", reward="tests.runworld:Strict", prompts=str(prompts),
        output=tmp_path / "run", trackers=(), device="cpu", method=replace(base.method, kl=0.01),
        fit=replace(base.fit, iterations=6, groups=3, size=8, steps=4, lr=5e-2, checkpoint_every=2),
        evaluation=replace(base.evaluation, images=40, every=2, check=40, layouts="tests.runworld:quadrant"),
    )  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "result" / "toy.safetensors")


def clean(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in m.items() if "seconds" not in k} for m in lines]


def test_a_run_leaves_everything(config: RunConfig) -> None:
    """Every promised file is there and says what happened."""
    summary = train(config, progress=False)
    folder = Folder(config.folder)
    for name in ("config.yaml", "metrics.jsonl", "checks.jsonl", "summary.json", "report.html", "result/README.md"):
        assert (folder.path / name).stat().st_size > 50, name
    assert folder.config() == config
    assert summary == folder.summary() and summary["status"] == "done" and summary["iterations"] == 6
    assert len(folder.lines("metrics.jsonl")) == 6
    assert [c["iteration"] for c in folder.lines("checks.jsonl")] == [0, 2, 4, 6]
    assert {"rollout", "reward", "update", "evaluate_before", "evaluate_after"} <= summary["seconds"].keys()
    assert summary["versions"]["torch"] == torch.__version__.split("+")[0] and summary["seed"] == 0
    light = summary["accuracy"]["light"]
    assert light["images"] == 40 and light["before"][1] > 0 and light["gain"][0] != 0
    # 3 groups x 8 samples, 4 steps to sample; 2 passes of (current, old, reference) to update; 6 iterations
    assert summary["evaluations"] == 6 * (24 * 4 + 2 * 24 * 3)
    assert summary["decodes"] == summary["rewards"] == 6 * 24
    averaged = checkpoint.load(checkpoint.latest(folder.path / "checkpoints"))["roles"]["ema"]["copies"]
    names, saved = ("0.weight", "0.bias", "2.weight", "2.bias"), weights(folder.path)
    assert all(torch.equal(a, saved[n]) for n, a in zip(names, averaged, strict=True))
    job = build(config)
    job.judged.denoiser.load_state_dict(saved)
    again = examine(job.judged, Policy(job.judged), job.judge, job.exam)
    kept = folder.recall("after.pt")
    assert torch.equal(again.x0, kept["x0"]) and torch.equal(again.judged, kept["scores"]["tests.runworld:Strict"])
    latest = checkpoint.load(checkpoint.latest(folder.path / "checkpoints"))["weights"]
    assert not any(torch.equal(a, w) for a, w in zip(averaged, latest, strict=True))


def test_a_folder_with_a_run_is_safe(config: RunConfig) -> None:
    """A second run into the same folder is refused and changes no file; a resumed one may only change its budget."""
    train(config, progress=False)
    before = {p: p.read_bytes() for p in config.folder.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"holds a run already.*--resume"):
        train(config, progress=False)
    with pytest.raises(ValueError, match=r"run with fit.lr = 0.05 .* cannot be resumed with 0.1"):
        train(replace(config, fit=replace(config.fit, lr=0.1)), resume=True, progress=False)
    assert {p: p.read_bytes() for p in config.folder.rglob("*") if p.is_file()} == before
    other = config.folder.parent / "other"
    other.mkdir()
    (other / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        train(replace(config, output=other), progress=False)
    assert [p.name for p in other.iterdir()] == ["precious.txt"]
    with pytest.raises(ValueError, match="is a file, and a run needs a folder"):
        train(replace(config, output=other / "precious.txt"), progress=False)


def test_a_folder_is_refused_before_anything_is_loaded(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full, of another run, resumed with other settings: nobody waits for a model to be told."""
    train(config, progress=False)
    monkeypatch.setattr("flowalign.run.build", lambda config: pytest.fail("something was loaded"))
    full, tmp = config.folder.parent / "full", config.folder.parent / "new"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    for changed, resume, words in (
        (config, False, "holds a run already"),
        (replace(config, output=full), False, "not empty"),
        (replace(config, reward="tests.runworld:Bright"), True, "cannot be resumed"),
        (
            replace(config, output=tmp, evaluation=replace(config.evaluation, base=tmp / "no.pt")),
            False,
            "there is no file .*no.pt",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            train(changed, resume=resume, progress=False)


def test_resume_with_a_larger_budget_is_one_run(config: RunConfig) -> None:
    """Four iterations, then resumed to six, equal six in one go."""
    train(config, progress=False)
    short = replace(config, output=config.folder.parent / "short", fit=replace(config.fit, iterations=4))
    train(short, progress=False)
    train(replace(short, fit=config.fit), resume=True, progress=False)
    a, b = weights(config.folder), weights(short.folder)
    assert all(torch.equal(a[k], b[k]) for k in a)
    one, two = (Folder(c.folder).summary() for c in (config, short))
    assert one["accuracy"] == two["accuracy"] and one["drift"] == two["drift"], "the old end's figures were kept"
    # the weights of the fourth iteration were judged as well: 80 images of 4 steps
    assert two["evaluation_network_evaluations"] == one["evaluation_network_evaluations"] + 80 * 4
    assert {"evaluate_before", "checks"} <= two["seconds"].keys() and two["clock_seconds"] > 0


def test_the_clock_goes_on_over_a_resume(config: RunConfig) -> None:
    """A run whose time is up is not given it again."""
    config = replace(config, fit=replace(config.fit, iterations=10**6), max_wall=0.3)
    first = train(config, progress=False)
    again = train(config, resume=True, progress=False)
    assert again["iterations"] == first["iterations"] and again["clock_seconds"] >= 0.3
    more = train(replace(config, max_wall=0.8), resume=True, progress=False)
    assert more["iterations"] > again["iterations"]


def test_half_a_first_check_is_written_again(config: RunConfig) -> None:
    """A kill within the very first line of the checks does not end the run for good."""
    train(config, progress=False)
    folder = Folder(config.folder)
    checks = folder.lines("checks.jsonl")
    folder.write("checks.jsonl", '{"iteration": 0, "sec')
    train(config, resume=True, progress=False)
    assert [c["iteration"] for c in folder.lines("checks.jsonl")] == [0, 6]
    assert clean(folder.lines("checks.jsonl")) == clean([checks[0], checks[-1]])


def _child(config: RunConfig) -> int:
    """Start the run in a forked process; return its id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            train(config, resume=True, progress=False)
            code = 0
        finally:
            os._exit(code)
    return pid


@pytest.mark.parametrize("method", ["diffusion-nft", "ddpo"])
def test_kill_at_random_moments(config: RunConfig, method: str) -> None:
    """Killed -9 at eleven random moments and resumed, a run ends bit for bit where an undisturbed one does.

    DiffusionNFT has averaged and lagging weights to restore; DDPO each prompt's history of rewards, with prompts that
    are drawn by what they were worth.
    """
    config = replace(config, fit=replace(config.fit, iterations=24, checkpoint_every=3))
    if method == "ddpo":
        config = replace(config, method=default("ddpo").method, allocation=replace(config.allocation, by="prompt"))
    began = time.perf_counter()
    train(config, progress=False)
    whole = time.perf_counter() - began
    cut = replace(config, output=config.folder.parent / "cut")
    rng, kills, ends = random.Random(0), 0, set()
    for _attempt in range(200):
        pid = _child(cut)
        if kills < 11:
            time.sleep(rng.uniform(0.05, 0.35) * whole)
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            kills += 1
            newest = checkpoint.latest(cut.folder / "checkpoints")
            ends.add(newest.name if newest else "none")
            continue
        assert os.WEXITSTATUS(status) == 0
        if kills >= 10:
            break
        # it ended before enough kills: give it something further to do by taking its end away
        checkpoint.latest(cut.folder / "checkpoints").unlink()
    assert kills >= 10 and len(ends) >= 3, f"{kills} kills at {ends}"
    a, b = (checkpoint.load(checkpoint.latest(f.folder / "checkpoints")) for f in (config, cut))
    assert a["iteration"] == b["iteration"] == 24
    for key in ("weights", "optimizer", "roles", "objective", "credit", "aggregate", "source", "learners", "rng"):
        assert _same(a[key], b[key]), key
    assert method != "ddpo" or (a["credit"] and a["source"]), "nothing named was there to be restored"
    for name in ("metrics.jsonl", "checks.jsonl"):
        assert clean(Folder(cut.folder).lines(name)) == clean(Folder(config.folder).lines(name))
    assert all(torch.equal(weights(config.folder)[k], v) for k, v in weights(cut.folder).items())


def _same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


def test_a_lost_line_and_check_are_made_again(config: RunConfig) -> None:
    """A kill between a checkpoint and its records loses neither the line nor the check."""
    train(config, progress=False)
    folder = Folder(config.folder)
    lines, checks = folder.lines("metrics.jsonl"), folder.lines("checks.jsonl")
    for name, found in (("metrics.jsonl", lines), ("checks.jsonl", checks)):
        folder.write(name, "".join(json.dumps(r) + "\n" for r in found[:-1]) + '{"iteration": 6, "rewa')
    train(config, resume=True, progress=False)
    assert folder.lines("metrics.jsonl") == lines
    assert clean(folder.lines("checks.jsonl")) == clean(checks)


def test_ctrl_c_saves_and_goes_on(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first Ctrl-C ends the run after its iteration, with a checkpoint and a result; --resume completes it."""
    train(config, progress=False)
    cut = replace(config, output=config.folder.parent / "cut", fit=replace(config.fit, checkpoint_every=0))
    seen = []
    real = Folder.append

    def append(self: Folder, name: str, record: dict) -> None:
        real(self, name, record)
        if name == "metrics.jsonl":
            seen.append(record)
            if len(seen) == 2:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Folder, "append", append)
    summary = train(cut, progress=False)
    assert summary["status"] == "interrupted" and summary["iterations"] == 3 and "accuracy" not in summary
    assert (cut.folder / "result").is_dir()
    summary = train(cut, resume=True, progress=False)
    assert summary["status"] == "done" and summary["iterations"] == 6
    assert all(torch.equal(weights(config.folder)[k], v) for k, v in weights(cut.folder).items())


def test_second_ctrl_c_stops_at_once() -> None:
    """Patience ends with the second one, and the old handler comes back."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), patience() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
    assert signal.getsignal(signal.SIGINT) is before


def test_budgets(config: RunConfig) -> None:
    """max_evaluations, max_seconds and the clock end a run early, and it is a whole run."""
    per = 24 * 4 + 2 * 24 * 3
    long = replace(config.fit, iterations=10**6)
    summary = train(replace(config, fit=replace(long, max_evaluations=2 * per)), progress=False)
    assert summary["iterations"] == 2 and summary["status"] == "done" and "accuracy" in summary
    for name, c in {
        "seconds": replace(config, fit=replace(long, max_seconds=0.2)),
        "wall": replace(config, fit=long, max_wall=0.2),
    }.items():
        began = time.perf_counter()
        summary = train(replace(c, output=config.folder.parent / name), progress=False)
        assert 0 < summary["iterations"] < 1000 and time.perf_counter() - began < 60


def test_permuted_rewards_keep_their_groups(config: RunConfig) -> None:
    """The control shuffles scores among samples of one prompt, the same way each time."""
    from flowalign.build import Shuffled
    from tests.runworld import Strict

    media = torch.rand(64, 3, 2, 2)
    prompts = ["a"] * 32 + ["c dark"] * 32
    plain, mixed = Strict()(media, prompts), Shuffled(Strict())(media, prompts)
    assert not torch.equal(plain, mixed) and torch.equal(mixed, Shuffled(Strict())(media, prompts))
    for part in (slice(0, 32), slice(32, 64)):
        assert torch.equal(plain[part].sort().values, mixed[part].sort().values)


def test_a_base_of_another_exam_is_refused(config: RunConfig) -> None:
    """A base evaluation is shared only between runs that ask the same."""
    train(config, progress=False)
    shared = replace(config.evaluation, base=config.folder / "before.pt")
    again = replace(config, output=config.folder.parent / "again", evaluation=shared)
    assert train(again, progress=False)["accuracy"] == Folder(config.folder).summary()["accuracy"]
    other = replace(again, output=config.folder.parent / "third", evaluation=replace(shared, seed=5))
    judged = replace(again, output=config.folder.parent / "third", reward="tests.runworld:Bright")
    for changed in (other, judged, replace(other, evaluation=shared, precision="bf16")):
        with pytest.raises(ValueError, match="cannot be paired"):
            train(changed, progress=False)
        assert not changed.folder.exists(), "the folder was opened before its base was looked at"
    (config.folder.parent / "bad.pt").write_text("no tensors")
    bad = replace(config.evaluation, base=config.folder.parent / "bad.pt")
    with pytest.raises(ValueError, match=r"bad.pt is no before.pt of a run"):
        train(replace(config, output=config.folder.parent / "fourth", evaluation=bad), progress=False)


def test_trackers_get_the_metrics(config: RunConfig) -> None:
    """The tensorboard file holds each iteration's reward."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(replace(config, trackers=("tensorboard",)), progress=False)
    found = EventAccumulator(str(next((config.folder / "trackers").rglob("events*.0")).parent))
    found.Reload()
    rewards = [e.value for e in found.Scalars("reward")]
    assert rewards == pytest.approx([m["reward"] for m in Folder(config.folder).lines("metrics.jsonl")], abs=1e-6)


def test_bars_count(capsys: pytest.CaptureFixture[str]) -> None:
    """A hidden bar prints nothing."""
    with Bars(False).bar(3, "x") as tick:
        tick(1, {"reward": 0.5})
    assert capsys.readouterr().err == ""
