"""The signal of a gradient: the cosine against its closed form, and gradients that move nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign import build as building
from flowalign.config import default
from tests.benchmarks.gradient_signal import cosine, gradients


@pytest.mark.parametrize("signal", [0.0, 0.05, 0.5])
def test_cosine_of_signal_and_noise(signal: float) -> None:
    """s² / (1 + s²) within its own standard error, which covers: over 60 seeds the scaled misses have the size 1."""
    n, size, misses = 12, 3000, []
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        direction = torch.randn(size, generator=g)
        rows = torch.randn(n, size, generator=g) + direction / direction.norm() * (signal * size) ** 0.5
        found, error = cosine(rows)
        misses.append((found - signal / (1 + signal)) / error)
    scaled = torch.tensor(misses)
    assert abs(scaled.mean()) < 4 * scaled.std() / 60**0.5 + 0.1 and 0.6 < scaled.std() < 1.5


def test_gradients_move_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are taken at the base's weights; iterations have samples of their own; a run repeats bit for bit."""
    (tmp_path / "p.txt").write_text("a\nb\n")
    base = default("flow-grpo")
    config = replace(
        base, pipeline="tests.runworld:pipeline", reward="tests.hackable:Bright", prompts=str(tmp_path / "p.txt"),
        trackers=(), device="cpu", ema=None,
        fit=replace(base.fit, iterations=5, groups=2, size=8, steps=4, lr=1.0, warmup=0, accumulate=0),
    )  # fmt: skip
    jobs: list[Any] = []
    build = building.build

    def kept(config: Any) -> Any:
        jobs.append(build(config))
        return jobs[-1]

    monkeypatch.setattr(building, "build", kept)
    first, seconds = gradients(config)
    again, _ = gradients(config)
    fresh = build(config).pipeline.denoiser.state_dict()
    assert all(torch.equal(v, fresh[k]) for k, v in jobs[0].pipeline.denoiser.state_dict().items())
    assert torch.equal(first, again) and first.shape[0] == 5 and seconds > 0 and first.abs().sum() > 0
    assert not torch.equal(first[0], first[1])
    with pytest.raises(ValueError, match="2 gradients have no standard error; give it more --seconds"):
        gradients(replace(config, fit=replace(config.fit, iterations=2)))
