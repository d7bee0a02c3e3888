"""One value network, one file: Euphonium and Flow-NRG write it, FK steering and TTSnap prune and weigh by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flowalign import run as runs
from flowalign.fit import fit
from flowalign.methods.euphonium import Euphonium
from flowalign.methods.fk_steering import FKSteering
from flowalign.methods.flow_nrg import FlowNRG
from flowalign.methods.noise_aware import Distil, Verifier
from flowalign.methods.particles import rows_of
from flowalign.methods.promises import promise
from flowalign.methods.ttsnap import TTSnap
from flowalign.options import FitOptions
from flowalign.prepare import prepare
from flowalign.scorer import Scorer
from flowalign.source import Prompts
from flowalign.value_file import TOTAL, LatentValues
from flowalign.valuenet import LatentValue, ValueLearner, word_ids
from tests.searching import linear, task
from tests.toy import Bright, Toy

FILE = Path("value", "values.safetensors")


def trained(folder: Path) -> ValueLearner:
    """Train Euphonium for two iterations as a run does, and return its value; its file lies in the folder."""
    toy = Toy()
    recipe = Euphonium(eta=0.5, width=8).recipe(toy.times(4))
    policy, parameters = prepare(toy, None, recipe.roles)
    options = FitOptions(iterations=2, groups=2, size=4, steps=4, batch=100, lr=1e-3)
    source = Prompts(["p0", "p1"])
    scorer = Scorer(toy, {"r": Bright()}, {"r": 2.0})
    list(fit(toy, scorer, source, recipe, options, policy=policy, parameters=parameters))
    (value,) = recipe.learners
    assert isinstance(value, ValueLearner)
    value.export(folder)
    return value


def test_euphoniums_value_weighs_particles_and_prunes(tmp_path: Path) -> None:
    """FK's promise and TTSnap's verifier say what Euphonium's network said in training; the judge sees leaves alone."""
    value = trained(tmp_path)
    file = str(tmp_path / FILE)
    t = task({"r": linear}, prompts=2, weights={"r": 2.0})
    rows = rows_of(t, per_sample=False)
    x, row = torch.randn(6, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0])
    value.enter(["p0", "p1"])
    at = torch.full((6,), 0.4, dtype=torch.float64)
    with torch.no_grad():
        said = value(x, at, row)
        posterior = t.policy.posterior(x, 0.4, rows.cond)
        weighed = promise(rows, 1.0, learned=file)(x, posterior, 0.4, row)
        pruned = Verifier(rows, LatentValues.load(Path(file)))(x, posterior, 0.4, row)
    assert said.std() > 1e-4 and torch.allclose(weighed, said.to(x), atol=1e-6)
    assert torch.allclose(pruned, said.to(x), atol=1e-6)
    for method, asked in (
        (FKSteering(4, scale=1.0, learned=file), 8), (TTSnap(n=4, levels=(1,), keep=(0.5,), aware=file), 4),
    ):  # fmt: skip
        t = task({"r": linear}, prompts=2, weights={"r": 2.0})
        (found,) = list(method.search(t))
        assert len(found.row) == asked == t.policy.ledger.rewards


def test_a_learnt_sum_is_not_taken_for_another(tmp_path: Path) -> None:
    """In proportion it may differ: the value then has that weight; rewards or shares that are others are refused."""
    values = LatentValues(
        {TOTAL: [LatentValue((3, 2, 2), 8)]}, {TOTAL: (1.0, 2.0)}, weights={"a": 1.0, "b": 0.5, "c": 0}
    )
    values.save(tmp_path / "v")
    values = LatentValues.load(tmp_path / "v")
    assert values.parts({"a": 2.0, "b": 1.0}) == {TOTAL: 2.0}
    for other in ({"a": 1.0}, {"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 0.5, "d": 1.0}):
        with pytest.raises(ValueError, match="of the weighted sum"):
            values.parts(other)
        t = task(dict.fromkeys(other, linear), weights=other)
        for method in (
            FKSteering(learned=str(tmp_path / "v")),
            TTSnap(n=2, levels=(1,), keep=(0.5,), aware=str(tmp_path / "v")),
        ):
            with pytest.raises(ValueError, match="of the weighted sum"):
                next(method.search(t))
    with pytest.raises(ValueError, match="trained on states"):
        values(TOTAL, torch.zeros(1, 3, 4, 4), 0.5, word_ids(["a"]))


def test_each_method_reads_what_suits_it(tmp_path: Path) -> None:
    """TTSnap prunes by Flow-NRG's values too; its own students look at posterior means, and FK says so."""
    nrg, snap = tmp_path / "nrg", tmp_path / "snap"
    next(FlowNRG(collect=8, train=2, width=8, save=str(nrg)).search(task(linear)))
    list(
        TTSnap(n=4, levels=(1,), keep=(0.5,), train=4, save=str(snap), distil=Distil(False, epochs=1)).search(
            task(linear)
        )
    )
    found, students = LatentValues.load(nrg), LatentValues.load(snap)
    assert (found.sees, found.times, students.sees, len(students.times)) == ("state", [], "posterior", 1)
    t = task(linear)
    list(TTSnap(n=4, levels=(1,), keep=(0.5,), aware=str(nrg)).search(t))
    assert t.policy.ledger.rewards == 2
    with pytest.raises(ValueError, match="students of posterior means"):
        next(FKSteering(learned=str(snap)).search(task(linear)))
    with pytest.raises(ValueError, match="values of states"):
        next(FKSteering(learned=str(nrg)).search(task(linear, shape=(3, 4, 4))))


def test_flow_nrg_finds_its_values_in_the_tasks_folder(tmp_path: Path) -> None:
    """A resumed search trains nothing again and goes the same way."""
    method, asked, ends = FlowNRG(collect=8, train=2, width=8), [], []
    for _ in range(2):
        t = replace(task(linear), folder=tmp_path)
        ends.append(next(method.search(t)).x)
        asked.append(t.policy.ledger.rewards)
    assert asked == [9, 1] and torch.equal(ends[0], ends[1])
    assert [p.name for p in tmp_path.iterdir()] == ["values.safetensors"]


def test_a_run_saves_its_value_with_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What learns beside the policy is written into the result; resumed or not; not so where nothing was learnt."""
    value = trained(tmp_path / "direct")
    fresh = ValueLearner(width=8)
    fresh.load_state_dict(value.state_dict())

    class Playing(SimpleNamespace):
        def playing(self, role: str):
            import contextlib

            return contextlib.nullcontext()

    folder = SimpleNamespace(path=tmp_path, remember=lambda name, make: {})
    recipe = SimpleNamespace(learners=(fresh, ValueLearner()))
    made = SimpleNamespace(recipe=recipe, folder=folder, policy=Playing(), role="current", job=None)
    monkeypatch.setattr(runs, "start", lambda config, resume: made)
    for name in ("judge_base", "_learn", "judge_trained", "save_result", "summarise"):
        monkeypatch.setattr(runs, name, lambda *a: None)
    monkeypatch.setattr("flowalign.report.write_report", lambda *a: None)
    runs.train(None, progress=False)  # type: ignore[arg-type]
    a, b = (LatentValues.load(p) for p in (tmp_path / "direct" / FILE, tmp_path / "result" / FILE))
    assert a.weights == b.weights == {"r": 2.0} and a.scale == b.scale
    for p, q in zip(a.networks[TOTAL][0].parameters(), b.networks[TOTAL][0].parameters(), strict=True):
        assert torch.equal(p, q)
