"""Steering: best of N finds what it says, within its budget, and leaves a folder."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

import flowalign as fa
from flowalign.cli import main
from flowalign.methods.best_of_n import BestOfN
from flowalign.methods.flow_grpo import FlowGRPO
from flowalign.steer import steer
from tests.runworld import Saved
from tests.toy import Bright


def test_best_is_the_best_of_all() -> None:
    """The results are the top of the very candidates that were drawn, per prompt, best first."""
    everything = steer(Saved(), BestOfN(n=1), Bright(), ["a", "c dark"], samples=12, steps=4)
    found = steer(Saved(), BestOfN(n=6, per_round=6), Bright(), ["a", "c dark"], samples=2, steps=4)
    for row in (0, 1):
        top = everything.total[everything.row == row].sort(descending=True).values[:2]
        assert torch.allclose(found.total[found.row == row], top, atol=1e-6)
    assert torch.allclose(Bright()(found.media, ["a", "a", "c dark", "c dark"]), found.total, atol=1e-6)
    assert torch.equal(found.weights, torch.full((4,), 0.5))


def test_expected_maximum() -> None:
    """Over many prompts the best of 8 gains what the maximum of 8 normals does: 1.42 standard deviations."""
    prompts = [f"a {i}" for i in range(150)]
    one = steer(Saved(), BestOfN(n=1), Bright(), prompts, samples=8, steps=4)
    best = steer(Saved(), BestOfN(n=8, per_round=8), Bright(), prompts, samples=1, steps=4)
    gain = float((best.total.mean() - one.total.mean()) / one.total.std())
    assert gain == pytest.approx(1.4236, abs=0.12)
    assert torch.allclose(best.candidates, one.candidates, atol=1e-6)


def test_budget() -> None:
    """The search ends after the first round that reaches the budget; N·K evaluations are booked."""
    whole = steer(Saved(), BestOfN(n=8, per_round=2), Bright(), ["a"], steps=4)
    assert whole.ledger.evaluations == 8 * 4 and whole.ledger.rewards == 8 and whole.ledger.decodes == 9
    short = steer(Saved(), BestOfN(n=8, per_round=2), Bright(), ["a"], steps=4, budget="17nfe")
    assert short.ledger.evaluations == 2 * 2 * 4 and short.stopped == "budget" and not short.partial
    assert short.total[0] <= whole.total[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": FlowGRPO()}, "is a training method"),
        ({"prompts": []}, "no prompts"),
        ({"budget": "3dollars"}, "is no budget"),
    ],
)
def test_bad_input(change: dict, words: str) -> None:
    """Refused before anything is sampled."""
    arguments = {"method": BestOfN(), "prompts": ["a"]} | change
    method, prompts = arguments.pop("method"), arguments.pop("prompts")
    with pytest.raises(ValueError, match=words):
        steer(Saved(), method, Bright(), prompts, **arguments)
    with pytest.raises(ValueError, match="at least 1"):
        BestOfN(n=0)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command writes pictures, scores, weights and cost, and refuses a folder that is not empty."""
    options = ["--pipeline", "tests.runworld:pipeline", "--reward", "tests.toy:Bright", "--prompts", "a dark night",
               "--samples", "3", "--method.n", "4", "--steps", "4", "--output", str(tmp_path / "s")]  # fmt: skip
    main(["steer", "best-of-n", *options])
    assert "network evaluations" in capsys.readouterr().out
    summary = json.loads((tmp_path / "s/summary.json").read_text())
    assert [r["prompt"] for r in summary["results"]] == ["a dark night"] * 3
    assert all((tmp_path / "s/media" / r["file"]).is_file() for r in summary["results"])
    assert summary["reward_of_results"] > summary["reward_of_candidates"]
    assert summary["ledger"]["evaluations"] == 12 * 4 and sum(r["weight"] for r in summary["results"]) == pytest.approx(
        1
    )
    with pytest.raises(SystemExit) as exit:
        main(["steer", "best-of-n", *options])
    assert exit.value.code == 2 and "is not empty" in capsys.readouterr().err


def test_public_names() -> None:
    """Everything a notebook needs is there, functions stay functions when their modules are imported."""
    for module in ("fit", "rollout", "steer", "config"):
        importlib.import_module(f"flowalign.{module}")
    assert callable(fa.fit) and callable(fa.rollout) and callable(fa.steer) and callable(fa.config)
    assert all(getattr(fa, name) is not None for name in fa.__all__)
    assert fa.method("best-of-n") is BestOfN
    with pytest.raises(AttributeError, match="no attribute 'fti'"):
        _ = fa.fti
