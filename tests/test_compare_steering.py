"""The comparison of searches: each is made for its budget, the tables add up, what the curves say is read off right."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from flowalign.steer import steer
from tests.benchmarks import compare_steering as cs
from tests.benchmarks import steering_table as table
from tests.benchmarks.steering_contenders import CHOSEN, contenders
from tests.toy import Bright, Toy

SEARCHES = {"best-of-n", "fk", "svdd", "das", "dts", "dts*", "ttsnap", "ttsnap, noise-aware", "reno"}


def test_every_search_is_compared_and_made_for_its_budget() -> None:
    """All eight of the issue are there; at equal evaluations (a gradient is two) each spends its share."""
    found = {k: contenders(k, 80, 10, CHOSEN[k], Path("none")) for k in ("graded", "clip")}
    assert set(found["graded"]) | set(found["clip"]) >= SEARCHES
    for name, entry in (found["graded"] | found["clip"]).items():
        if name == "ttsnap, noise-aware":  # needs a trained file; its size is that of ttsnap
            assert entry.method.n == found["graded"]["ttsnap"].method.n
            continue
        got = steer(Toy(), entry.method, Bright(), ["a", "b dark"], samples=entry.samples, steps=10,
                    budget="160nfe" if entry.anytime else None)  # fmt: skip
        spent = (got.ledger.evaluations + 2 * got.ledger.gradients) / 2
        assert 0.9 * 80 <= spent <= 1.06 * 80, (name, spent)


def write(folder: Path, kind: str, unit: str, name: str, seed: int, strict: list[float], reward: float) -> None:
    row = {"method": name, "seed": seed, "unit": unit, "strict": strict, "graded": strict,
           "reward": [reward] * len(strict), "seconds": 2.0, "ledger": {"evaluations": 70, "gradients": 5}}  # fmt: skip
    table.file_of(folder, kind, unit, name, seed).write_text(json.dumps(row))


def test_tables_are_paired_by_seed(tmp_path: Path) -> None:
    """Gains are of the seeds that both have, errors over seeds; a gradient counts as two evaluations."""
    for seed, (base, fk) in enumerate([(0.0, 0.5), (0.5, 0.5), (0.5, 1.0)]):
        write(tmp_path, "graded", "nfe", "best-of-n", seed, [base, base], 1.0)
        write(tmp_path, "graded", "nfe", "fk", seed, [fk, fk], 2.0)
    write(tmp_path, "graded", "nfe", "fk", 7, [0.0, 0.0], 2.0)  # no rival of this seed
    rows = table.read(tmp_path)["graded", "nfe"]
    assert table.paired(rows["fk"], rows["best-of-n"], "strict") == [0.5, 0.0, 0.5]
    mean, error = table.mean_error([0.5, 0.0, 0.5])
    assert mean == pytest.approx(1 / 3) and error == pytest.approx(math.sqrt(1 / 12) / math.sqrt(3))
    text = table.tables(tmp_path)
    assert (
        "| fk | 4 | 0.500 ± 0.204 | +0.333 ± 0.167 | 2.000 ± 0.000 | +1.000 ± 0.000 |" in text
        and "| 80 | 2.00 |" in text
    )
    assert table.mean_seconds(tmp_path, "graded", "fk") == 2.0
    assert math.isnan(table.mean_seconds(tmp_path, "clip", "fk"))


def test_savings_are_read_off_the_curves(tmp_path: Path) -> None:
    """Best-of-N gains .1 per doubling; a search that is two doublings ahead needs a quarter of its budget."""
    for unit, part in (("nfe0.5", 0.5), ("nfe", 1.0), ("nfe2", 2.0), ("nfe4", 4.0)):
        for seed in (0, 1):
            write(tmp_path, "graded", unit, "best-of-n", seed, [0.0], 1 + 0.1 * math.log2(part))
            write(tmp_path, "graded", unit, "dts*", seed, [0.0], 1.2 + 0.1 * math.log2(part))
            write(tmp_path, "graded", unit, "ttsnap", seed, [0.0], 0.9 + 0.1 * math.log2(part))
    text = table.tables(tmp_path)
    assert "dts*: best-of-N's reward at 4 × takes 1.00 × (4.0 times less)" in text
    assert "ttsnap: best-of-N's reward at 4 × is not reached" in text
    assert table.reaches([(1.0, 0.0), (4.0, 1.0)], 0.5) == pytest.approx(2.0)  # half-way on the logarithm
    assert table.reaches([(1.0, 0.7), (4.0, 1.0)], 0.5) == 1.0
    assert math.isnan(table.reaches([(1.0, 0.0), (4.0, 0.4)], 0.5))
    table.draw(tmp_path, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_sizes_for_equal_seconds(tmp_path: Path) -> None:
    """A method that takes .5 s and 10 ms an evaluation gets the evaluations that fill best-of-N's seconds; kept."""
    takes = lambda e: 0.5 + 0.01 * e  # noqa: E731
    for seed in (0, 1):
        write(tmp_path, "graded", "nfe", "best-of-n", seed, [0.0], 1.0)
        path = table.file_of(tmp_path, "graded", "nfe", "fk", seed)
        path.write_text(json.dumps({"method": "fk", "seed": seed, "seconds": takes(80)}))
    path = table.file_of(tmp_path, "graded", "nfe", "best-of-n", 0)
    path.write_text(json.dumps({"seconds": 1.0}))
    table.file_of(tmp_path, "graded", "nfe", "best-of-n", 1).write_text(json.dumps({"seconds": 1.2}))
    assert cs.sized(takes, tmp_path, "graded", "fk", 80) == pytest.approx(60)  # 1.1 s
    assert cs.sized(lambda e: 1 / 0, tmp_path, "graded", "fk", 80) == pytest.approx(60)
    assert math.isnan(cs.sized(takes, tmp_path, "clip", "fk", 80))
