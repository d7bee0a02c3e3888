"""The equal-compute comparison: both budgets are met, what is done is not done again, the table adds up."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from flowalign.methods.flow_grpo import FlowGRPO
from tests.benchmarks import compare_credit as cc


def made(row: str, seed: int, gains: list[float], each: int = 250) -> dict:
    """A result with given gains at the parts of the budgets."""
    start = {"why": "start", "iteration": 0, "evaluations": 0, "seconds": 0.0, "accuracy": [0.1, 0.01],
             "gain": [0.0, 0.0], "spread": 2.0, "layouts_kept": 1.0}  # fmt: skip
    curve = [start]
    for unit in ("evaluations", "seconds"):
        for part, gain in zip(cc.PARTS, gains, strict=True):
            n = round(part * 4)
            curve.append({**start, "why": f"{unit}:{part:g}", "iteration": n, "evaluations": each * n, "seconds": n,
                          "accuracy": [0.1 + gain, 0.01], "gain": [gain, 0.01], "spread": 1.0})  # fmt: skip
    return {"row": row, "seed": seed, "lr": 1e-3, "budgets": {"evaluations": 1000, "seconds": 4.0}, "curve": curve}


def test_flow_grpo_is_compared_as_it_was() -> None:
    """The demo's settings have changed since; the stored results are of those of 21 November 2026."""
    config = cc.configuration(cc.WORLDS["shapes"], "flow-grpo", 0, None, "cpu")
    assert config.method == FlowGRPO(0.8, "cps", (0, 3), None, "mse", 0.0, "velocity", "group", False)
    assert (config.fit.lr, config.ema, config.lora, config.guidance) == (3.5e-4, 0.9, None, False)
    short = cc.configuration(cc.WORLDS["shapes-short"], "flow-sde", 0, None, "cpu")
    assert short.method == FlowGRPO(0.7, "flow", None, 1e-3, "per_dim", 0.0, "velocity", "group", False)
    assert short.fit.lr == 2.1e-4


def test_a_run_meets_both_budgets() -> None:
    """One iteration at a time until each budget is spent; a place of the curve for every part of either."""
    world = cc.replace(cc.WORLDS["toy"], evaluations=3000, seconds=0.02, images=40)
    found = cc.one(world, "branch-grpo", 0, None)
    whys = [p["why"] for p in found["curve"]]
    assert whys[0] == "start" and set(whys[1:]) == {f"{u}:{p:g}" for u in ("evaluations", "seconds") for p in cc.PARTS}
    for part in cc.PARTS:
        p = cc.at(found, "evaluations", part)
        assert p["evaluations"] >= 3000 * part and p["evaluations"] - 3000 * part < 800, "the iteration that reaches it"
        assert cc.at(found, "seconds", part)["seconds"] >= 0.02 * part
    assert found["curve"][0]["gain"] == (0.0, 0.0) and found["row"] == "branch-grpo"


def test_what_is_there_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid that was stopped goes on with what is missing, whole seeds first; a half-written file is no result."""
    done: list[tuple[str, int, float | None]] = []

    def one(world, row, seed, rate, device="cpu", out=None):
        if world.evaluations > 1:  # not the one that warms up
            done.append((row, seed, rate))
        return made(row, seed, [0.1, 0.2, 0.3, 0.4 if rate != 3e-3 else 0.9])

    monkeypatch.setattr(cc, "one", one)
    command = ["x", "run", "--world", "toy", "--rows", "ddpo", "g2rpo", "--seeds", "0", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    cc.main()
    assert [d[:2] for d in done] == [("ddpo", 0), ("g2rpo", 0), ("ddpo", 1), ("g2rpo", 1)]
    (tmp_path / "g2rpo-seed1.json").unlink()
    (tmp_path / "g2rpo-seed1.tmp").write_text("{")
    done.clear()
    cc.main()
    assert done == [("g2rpo", 1, None)]
    monkeypatch.setattr(sys, "argv", [*command, "--tune"])
    done.clear()
    cc.main()
    assert len(done) == 2 * 2 * 3 and {s for _, s, _ in done} == set(cc.TUNING)
    (tmp_path / "ddpo-seed0.json").unlink()
    monkeypatch.setattr(sys, "argv", command)
    done.clear()
    cc.main()
    assert done == [("ddpo", 0, 3e-3)], "with the learning rate of the best tuning runs"


def test_every_row_is_a_configuration() -> None:
    """Rows exist in every world, with the same groups, steps and batches for all."""
    for world in cc.WORLDS.values():
        for row in world.rows or cc.ROWS:
            config = cc.configuration(world, row, 3, None, "cpu")
            config.method.recipe(__import__("torch").linspace(1, 0, config.fit.steps + 1).double())
            same = {k: getattr(config.fit, k) for k in ("groups", "size", "steps", "batch")}
            assert same == {k: world.data["fit"][k] for k in same} and config.fit.seed == 3
    assert set(cc.SHORT) <= set(cc.ROWS)


def test_table_and_claims_by_hand(tmp_path: Path) -> None:
    """Means, standard errors over seeds, the order, paired differences, and the speed to the rival's end."""
    files = {
        ("dense-grpo", 0): [0.1, 0.2, 0.3, 0.40], ("dense-grpo", 1): [0.1, 0.2, 0.3, 0.44],
        ("flow-grpo", 0): [0.0, 0.1, 0.15, 0.20], ("flow-grpo", 1): [0.0, 0.1, 0.15, 0.20],
    }  # fmt: skip
    for (row, seed), gains in files.items():
        (tmp_path / f"{row}-seed{seed}.json").write_text(json.dumps(made(row, seed, gains)))
    results = cc.read(tmp_path, cc.ROWS)
    lines = cc.table(results).splitlines()
    assert lines[2].startswith("| dense-grpo | 2 | 0.001 | +42.0 ± 2.0 | +42.0 ± 2.0 | 50 % | 100 % | 250 |")
    assert lines[3].startswith("| flow-grpo | 2 | 0.001 | +20.0 ± 0.0 |")
    (claim,) = cc.claims(results).splitlines()[2:]
    assert "+22.0 ± 2.0" in claim and claim.endswith("| 2.00× |"), "it is at the rival's .20 after half the budget"
    assert cc.reach(results["flow-grpo"], 0.9) == math.inf
    cc.draw(results, tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 10_000
