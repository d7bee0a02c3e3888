"""Budgets in every unit end every search in time with the best so far; what breaks leaves what was found."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from flowalign.cli import main
from flowalign.ledger import UNITS, Budget, BudgetSpent, Ledger
from flowalign.methods import names, resolve
from flowalign.methods.best_of_n import BestOfN
from flowalign.methods.dts import DTS
from flowalign.methods.fk_steering import FKSteering
from flowalign.methods.fkc import FKC
from flowalign.methods.flow_nrg import FlowNRG
from flowalign.methods.golden_net import Refine
from flowalign.methods.golden_noise import GoldenNoise
from flowalign.methods.reno import ReNO
from flowalign.methods.svdd import SVDD
from flowalign.methods.ttsnap import TTSnap
from flowalign.methods.upsr import UPSR
from flowalign.process import Posterior
from flowalign.source import Prompt
from flowalign.steer import SearchFailed, Steered, steer
from tests.runworld import Broken, Saved
from tests.toy import Asked, Bright

METHODS = {n: resolve(n).presets()["demo"].method for n in names("steering")}
METHODS["golden-noise"] = GoldenNoise(n=16, pairs=3, margin=0.0, train=Refine(width=8, epochs=2))
METHODS["reno"] = ReNO(6)
METHODS["dts"] = DTS(rounds=12, scale=5.0, report=4)
METHODS["upsr"] = UPSR(n=8)
METHODS["ttsnap"] = TTSnap(6, (3, 6), (0.5, 0.5), rounds=2)
METHODS["flow-nrg"] = FlowNRG(collect=4, train=3, width=8, n=12)
METHODS["fkc"] = FKC(particles=2)
METHODS["fk-steering, twisted"] = FKSteering(6, twist=1.0)


class Guiding(Saved):
    """The toy with a rule of guidance that makes pictures brighter."""

    def encode(self, prompts: Sequence[str], meta: Any = None) -> Asked:
        return Asked(tuple(prompts))

    def posterior(self, x: Tensor, t: Any, cond: Any) -> Posterior:
        known = super().posterior(x, t, cond)
        push = torch.tensor([[-0.3 if "dark" in p else 0.3] for p in cond.prompts])[:, :, None, None]
        return self.process.posterior(x, t, x0=known.x0 + cond.guided * push)


class Clock:
    """A clock that a hundredth of a second passes on at every look."""

    now = 0.0

    def perf_counter(self) -> float:
        self.now += 0.01
        return self.now


def search(name: str, budget: Budget | None) -> Steered:
    """Run a method, with what it needs, under a clock of its own."""
    generator = Guiding() if name == "golden-noise" else Saved()
    picture = {"image": torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(0))}  # what upsr makes sharp
    prompts = [Prompt(text, picture) for text in ("a", "b dark")]
    ledger = Ledger(Clock().perf_counter)
    return steer(generator, METHODS[name], Bright(), prompts, steps=10, budget=budget, ledger=ledger)


def spent(found: Steered) -> dict[str, float]:
    """What the search itself took: results are decoded once more to be shown, on top of it."""
    every = {u: found.ledger.spent(u) for u in UNITS}
    return every | {"decodes": every["decodes"] - len(found.row)}


@cache
def whole(name: str) -> dict[str, float]:
    """What a method spends that nobody stops."""
    found = search(name, Budget(1e9, "seconds"))  # the clock is looked at as often as under any limit
    assert found.stopped == "finished" and not found.partial
    return spent(found)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", METHODS)
def test_every_search_keeps_to_every_budget(name: str, unit: str) -> None:
    """At three fifths of what it would spend a search is ended, goes over nothing and gives the best so far."""
    amount = 0.6 * whole(name)[unit]
    if amount == 0:
        assert unit == "gradients" and search(name, Budget(1, unit)).stopped == "finished"
        return
    if name == "fkc":  # all its particles go together, and none is judged before the end: there is no best so far
        with pytest.raises(ValueError, match="ended before a sample could be judged"):
            search(name, Budget(amount, unit))
        return
    found = search(name, Budget(amount, unit))
    assert found.stopped == "budget" and spent(found)[unit] <= amount + (0.05 if unit == "seconds" else 0)
    assert set(found.row.tolist()) == {0, 1} and torch.isfinite(found.total).all() and len(found.looks) > 0
    best = Bright()(found.media, ["b dark" if r else "a" for r in found.row.tolist()])
    assert torch.allclose(best, found.total, atol=1e-5)


def test_a_budget_is_read_in_any_unit() -> None:
    for text, amount, unit in (
        ("500nfe", 500, "evaluations"), ("30s", 30, "seconds"), ("5 min", 300, "seconds"), ("1.5h", 5400, "seconds"),
        ("64rewards", 64, "rewards"), ("64 decodes", 64, "decodes"), ("40gradients", 40, "gradients"),
        ("2e3", 2000, "evaluations"), (17, 17, "evaluations"), ("12 Seconds", 12, "seconds"),
    ):  # fmt: skip
        assert Budget.parse(text) == Budget(amount, unit)
    assert str(Budget(500)) == "500 evaluations"
    for bad in ("thirty", "30 dollars", "-3nfe", "nfe", ""):
        with pytest.raises(ValueError, match="is no budget"):
            Budget.parse(bad)
    for amount in (0, math.inf, math.nan):
        with pytest.raises(ValueError, match="positive number of evaluations"):
            Budget(amount)
    with pytest.raises(ValueError, match="unknown budget unit 'apples'"):
        Budget(3, "apples")


def test_a_ledger_refuses_what_would_go_over() -> None:
    """Nothing is booked of work that is refused; a limit ends with its block; other units run on."""
    ledger = Ledger()
    with ledger.within(Budget(10)):
        ledger.evaluations += 7
        ledger.rewards += 100
        with pytest.raises(BudgetSpent, match="7 of 10 evaluations"):
            ledger.evaluations += 4
        ledger.evaluations += 3
        assert ledger.evaluations == 10
    ledger.evaluations += 5
    assert ledger.evaluations == 15 and ledger.limit is None
    again = Ledger()
    again.load_state_dict(ledger.state_dict())
    assert again == ledger and again.rewards == 100


def test_an_interrupted_particle_system_leaves_its_best_sketch() -> None:
    """FK cut off in the middle has no samples: the best posterior means, and it says so."""
    whole = FKSteering(4, scale=20.0)
    found = steer(Saved(), whole, Bright(), ["a"], samples=2, steps=8, budget="40nfe", keep=True)
    assert found.partial and found.stopped == "budget" and len(found.total) == 2
    assert found.ledger.evaluations == 40 and found.log_z is None
    assert float(found.total[0]) == pytest.approx(max(look.best for look in found.looks), abs=1e-6)
    with pytest.raises(ValueError, match=r"budget of 3 evaluations ended before a sample could be judged"):
        steer(Saved(), whole, Bright(), ["a"], steps=8, budget="3nfe")


def test_looks_tell_reward_against_cost() -> None:
    """Costs rise, the best never falls, ESS and log Z are those of the weights."""
    found = steer(Saved(), FKSteering(6, scale=20.0, threshold=0.0), Bright(), ["a"], steps=5)
    spent = [look.spent["evaluations"] for look in found.looks]
    assert spent == sorted(spent) and spent[-1] == 6 * 5
    best = [look.best for look in found.looks]
    assert best == sorted(best) and best[-1] >= float(found.total.max())
    assert found.looks[-1].level == 4 and 0 < found.looks[-1].ess <= 1
    w = found.weights
    assert float(found.ess[0]) == pytest.approx(float(1 / (w**2).sum()), rel=1e-5) and len(w) == 6
    lam = 20.0 * found.total.double()
    assert float(found.log_z[0]) == pytest.approx(float(lam.logsumexp(0) - math.log(6)), abs=1e-4)
    assert float(found.log_z_error[0]) == pytest.approx(float(((6 * (w.double() ** 2).sum() - 1) / 5).sqrt()), rel=1e-4)


@pytest.mark.parametrize("method", [FKSteering(5, scale=20.0), SVDD(children=3), DTS(rounds=6, report=6), BestOfN(4)])
def test_chunks_and_batches_change_nothing(method) -> None:
    """Several prompts in one batch are each their own system, whatever the chunk."""
    prompts = ["a", "b dark", "c"]
    whole = steer(Saved(), method, Bright(), prompts, samples=2, steps=4)
    pieces = steer(Saved(), method, Bright(), prompts, samples=2, steps=4, chunk=2)
    assert (
        torch.allclose(whole.total, pieces.total, atol=1e-5) and whole.ledger.evaluations == pieces.ledger.evaluations
    )
    if not isinstance(method, DTS):  # a tree's paths are drawn from the number of the row
        alone = steer(Saved(), method, Bright(), prompts[1:2], samples=2, steps=4)
        assert torch.allclose(alone.total, whole.total[whole.row == 1], atol=1e-5)
        assert torch.allclose(alone.weights, whole.weights[whole.row == 1], atol=1e-5)


class Sometimes(Bright):
    """Breaks at its third call."""

    calls: ClassVar[list[int]] = [0]

    def __call__(self, media, prompts, meta=None):
        self.calls[0] += 1
        r = super().__call__(media, prompts, meta)
        return r * torch.nan if self.calls[0] == 3 else r


class Dark(Bright):
    """Minus infinity, as a user's log-probability may be."""

    def __call__(self, media, prompts, meta=None):
        return super().__call__(media, prompts, meta) - 1e38


class Full(Saved):
    """Runs out of memory where more than four states come at once."""

    def posterior(self, x, t, cond):
        if len(x) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return super().posterior(x, t, cond)


def test_what_breaks_leaves_what_was_found() -> None:
    """NaN rewards, weights of zero and a full memory say what to do; results until then are in the error."""
    Sometimes.calls[0] = 0
    with pytest.raises(SearchFailed, match="What was found until then is kept") as caught:
        steer(Saved(), BestOfN(8, 2), Sometimes(), ["a"], samples=2, steps=3)
    assert len(caught.value.found.total) == 2 and torch.isfinite(caught.value.found.total).all()
    with pytest.raises(ValueError, match="are never counted as zero"):
        steer(Saved(), BestOfN(2), Broken(), ["a"], steps=3)
    with pytest.raises(ValueError, match="weight zero"):
        steer(Saved(), FKSteering(4, scale=1e300), Dark(), ["a"], steps=3)
    with pytest.raises(ValueError, match=r"memory ran out .*--chunk 8"):
        steer(Full(), FKSteering(6), Bright(), ["a"], steps=3)
    assert len(steer(Full(), FKSteering(6), Bright(), ["a"], steps=3, chunk=4).total) == 6
    with pytest.raises(ValueError, match="at least 1; got 0"):
        steer(Saved(), BestOfN(), Bright(), ["a"], samples=0)


OPTIONS = ["--pipeline", "tests.runworld:pipeline", "--reward", "tests.toy:Bright", "--prompts", "a dark night",
           "--samples", "2", "--steps", "5", "--no-progress"]  # fmt: skip


@pytest.mark.parametrize("name", ["fk-steering", "dts", "svdd", "best-of-n"])
def test_the_folder_of_a_search(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images, scores, weights, summary and a report that needs nothing outside it, with the genealogy where one is."""
    more = ["--method.particles", "5"] if name == "fk-steering" else []
    main(["steer", name, *OPTIONS, *more, "--budget", "400nfe", "--output", str(tmp_path / "s")])
    assert "report.html" in capsys.readouterr().out
    summary = json.loads((tmp_path / "s/summary.json").read_text())
    assert summary["ledger"]["evaluations"] <= 400 and summary["status"] in ("finished", "budget")
    p = summary["prompts"][0]
    assert p["results"] == len(summary["results"]) and p["best"] == max(r["reward"] for r in summary["results"])
    assert (p["log_z"] is not None) == (name in ("fk-steering", "dts"))
    if name == "fk-steering":
        assert p["log_z_error"] > 0 and p["ess"] <= 10 and len(summary["results"]) == 10
    html = (tmp_path / "s/report.html").read_text()
    assert ("<svg" in html) == (name != "best-of-n") and "data:image/png" in html
    assert "http://" not in html and "https://" not in html and 'src="media' not in html
    lines = (tmp_path / "s/looks.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["evaluations"] <= 400


def test_a_search_goes_on_another_day(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tree cut off by its budget and continued equals one grown at a stretch, and pays for nothing twice."""
    tree = ["--method.rounds", "40", "--method.report", "40", "--method.widen", "1", "--method.power", "0.6"]
    main(["steer", "dts", *OPTIONS, *tree, "--budget", "60nfe", "--output", str(tmp_path / "a")])
    first = json.loads((tmp_path / "a/summary.json").read_text())
    assert first["status"] == "budget" and first["ledger"]["evaluations"] <= 60
    main(["steer", "dts", *OPTIONS, *tree, "--resume", "--output", str(tmp_path / "a")])
    main(["steer", "dts", *OPTIONS, *tree, "--output", str(tmp_path / "b")])
    a, b = (json.loads((tmp_path / k / "summary.json").read_text()) for k in "ab")
    assert a["results"] == b["results"] and a["status"] == "finished"
    tried = a["ledger"]["evaluations"] - b["ledger"]["evaluations"]
    assert 0 <= tried <= 5  # no more than the round that the budget cut short
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["steer", "dts", *OPTIONS, "--output", str(tmp_path / "a")])
    assert "go on with --resume" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["steer", "best-of-n", *OPTIONS, "--resume", "--output", str(tmp_path / "c")])
    assert "keeps nothing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["steer", "dts", *OPTIONS, "--method.scale", "3", "--resume", "--output", str(tmp_path / "a")])
    assert "this search has 1, 5 and 3" in capsys.readouterr().err


def test_a_broken_search_keeps_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command exits with an error that names the folder, which holds what was found."""
    Sometimes.calls[0] = 0
    options = [o if o != "tests.toy:Bright" else "tests.test_steer_budget:Sometimes" for o in OPTIONS]
    with pytest.raises(SystemExit) as code:
        main(["steer", "best-of-n", *options, "--method.per-round", "1", "--output", str(tmp_path / "s")])
    assert code.value.code == 2 and "It is in" in capsys.readouterr().err
    summary = json.loads((tmp_path / "s/summary.json").read_text())
    assert summary["status"].startswith("failed") and len(summary["results"]) == 2


def test_dts_settings() -> None:
    for bad in ({"rounds": 0}, {"report": 0}, {"widen": 0.0}, {"scale": 0.0}, {"power": 1.5}):
        with pytest.raises(ValueError, match="need rounds >= 1"):
            DTS(**bad)
    with pytest.raises(ValueError, match="number of MiB greater than 0"):
        replace(DTS(), memory=0.0)
