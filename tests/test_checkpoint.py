"""Checkpoints: the newest two are kept, half a file is never taken for one, and nothing in one can run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowalign import checkpoint


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    """By number, not by name's length or date; other files of the folder are left alone."""
    assert checkpoint.latest(tmp_path / "none") is None
    kept = checkpoint.write(tmp_path / checkpoint.LAST_GOOD, {"x": torch.zeros(1)})
    for i in (9, 10, 11, 100):
        path = checkpoint.save(tmp_path, i, {"iteration": i, "x": torch.full((2,), float(i))})
        assert path == checkpoint.latest(tmp_path) and path.name == checkpoint.name(i)
    assert [p.name for p in sorted(tmp_path.glob("step-*"))] == [checkpoint.name(11), checkpoint.name(100)]
    assert kept.is_file() and torch.equal(checkpoint.load(path)["x"], torch.full((2,), 100.0))


def test_half_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    """What a kill leaves while a file is written is passed over; a damaged file says what to do."""
    path = checkpoint.save(tmp_path, 1, {"iteration": 1})
    (tmp_path / "step-00000002.tmp").write_bytes(path.read_bytes()[:50])
    assert checkpoint.latest(tmp_path) == path
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"not a readable checkpoint .* Delete it to resume from the one before"):
        checkpoint.load(path)


class Evil:
    def __reduce__(self) -> tuple:
        return print, ("this must not run",)


def test_nothing_in_a_checkpoint_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"iteration": 1, "x": Evil()}, tmp_path / checkpoint.name(1))
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        checkpoint.load(tmp_path / checkpoint.name(1))
    assert capsys.readouterr().out == ""
