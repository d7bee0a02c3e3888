"""From a configuration to the parts of a run: each setting reaches the part that it is for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flowalign.arguments import train_config
from flowalign.build import build
from flowalign.config import Evaluation, RunConfig, default
from flowalign.methods import names, resolve
from tests.runworld import pipeline


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    for name, text in (("train", "a\nb\n"), ("held", "c dark\n"), ("check", "d dark\ne\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    base = default("diffusion-nft")
    evaluation = replace(
        base.evaluation, prompts=f"{tmp_path}/held.txt", check_prompts=f"{tmp_path}/check.txt", images=7, steps=3,
        rewards="tests.toy:Bright", every=2, check=4,
    )  # fmt: skip
    return replace(
        base, pipeline="tests.runworld:pipeline", reward="tests.runworld:Strict:0.5, tests.toy:Bright:-2",
        prompts=f"{tmp_path}/train.txt", device="cpu", evaluation=evaluation,
    )  # fmt: skip


def test_every_part_gets_its_own(config: RunConfig) -> None:
    """Rewards with weights train, others judge, the checks watch both; each set of prompts goes where it belongs."""
    job = build(config)
    assert job.scorer.weights == {"tests.runworld:Strict": 0.5, "tests.toy:Bright": -2.0}
    assert list(job.judge.rewards) == ["tests.toy:Bright"] and job.judge.weights == {"tests.toy:Bright": 1.0}
    assert set(job.watch.rewards) == {"tests.toy:Bright", "tests.runworld:Strict"}
    assert next(iter(job.watch.rewards)) == "tests.toy:Bright"
    assert {p for i in range(4) for p in job.source.draw(i, 2, 2).prompts} == {"a", "b"}
    assert [p.text for p in job.exam.prompts] == ["c dark"] and (job.exam.images, job.exam.steps) == (7, 3)
    assert job.check is not None and [p.text for p in job.check.prompts] == ["d dark", "e"]
    assert job.check.images == 4 and job.check.seed != job.exam.seed == config.evaluation.seed
    plain = build(replace(config, evaluation=replace(config.evaluation, every=0, prompts=None, rewards=None)))
    assert plain.check is None and [p.text for p in plain.exam.prompts] == ["a", "b"]
    assert list(plain.judge.rewards) == list(config_rewards := plain.scorer.rewards) and len(config_rewards) == 2


def test_guidance_of_training_and_of_evaluation(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator is opened as it is trained, then as it is judged; which is which is not mixed up."""
    asked: list[Any] = []

    def opened(name: str, call: Any, guided: Any, device: Any) -> list[Any]:
        asked.append(list(guided))
        return [pipeline(), pipeline()]

    monkeypatch.setattr("flowalign.build.open_pipeline", opened)
    job = build(replace(config, guidance=False, evaluation=replace(config.evaluation, guidance=True)))
    assert asked == [[False, True]] and job.scorer.pipeline is job.pipeline is not job.judged
    assert job.judge.pipeline is job.watch.pipeline is job.judged


@pytest.mark.parametrize("method", names("training"))
def test_a_preset_reaches_the_configuration(method: str) -> None:
    """All of it: the method's choices, how long to fit, the adapter, the average, the guidance."""
    for name, preset in resolve(method).presets().items():
        c = default(method, name)
        assert (c.method, c.fit, c.lora, c.ema, c.guidance) == (
            preset.method, preset.fit, preset.lora, preset.ema, preset.guidance,
        )  # fmt: skip


def test_short_options_are_what_they_stand_for() -> None:
    short = ["--max-seconds", "9", "--max-evaluations=8", "--iterations", "7", "--seed=6", "--stop-on-hacking"]
    config, resume, quiet = train_config(["flow-grpo", *short, "--quiet"])
    f = config.fit
    assert (f.max_seconds, f.max_evaluations, f.iterations, f.seed) == (9.0, 8, 7, 6) and quiet and not resume
    assert config.evaluation.stop_on_hacking and config.evaluation.seed == default("flow-grpo").evaluation.seed


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"pipeline": "tests.toy:Toy"}, "pipeline"),
        ({"call": {"guidance_scale": 2.0}}, "call"),
        ({"precision": "bf16"}, "precision"),
        ({"reward": "tests.runworld:Bright"}, "rewards"),
        ({"evaluation": Evaluation(guidance=False)}, "guidance"),
        ({"evaluation": Evaluation(layouts="tests.runworld:quadrant")}, "layouts"),
        ({"evaluation": Evaluation(steps=7)}, "steps"),
        ({"evaluation": Evaluation(images=7)}, "images"),
        ({"evaluation": Evaluation(seed=7)}, "seed"),
        ({}, "prompts"),
    ],
)
def test_two_evaluations_are_paired_only_if_all_agrees(change: dict[str, Any], key: str, tmp_path: Path) -> None:
    """The mark of an evaluation holds what makes a figure, not where the run is written or how it trains."""
    (tmp_path / "p.txt").write_text("a\nb\n")
    (tmp_path / "q.txt").write_text("a\nc\n")
    plain = replace(
        default("diffusion-nft"), pipeline="tests.runworld:pipeline", reward="tests.runworld:Strict",
        prompts=str(tmp_path / "p.txt"), device="cpu",
    )  # fmt: skip
    change = change or {"evaluation": Evaluation(prompts=str(tmp_path / "q.txt"))}
    before, after = build(plain).mark, build(replace(plain, **change)).mark
    assert [k for k in before if before[k] != after[k]] == [key]
    assert build(replace(plain, output=tmp_path, fit=replace(plain.fit, lr=1.0, groups=3))).mark == before
