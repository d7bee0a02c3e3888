"""Every notebook runs from top to bottom in a kernel of its own, as a reader would run it."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def run(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Execute a notebook and return what its cells printed; a cell that raises fails the test."""
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    book = nbformat.read(path, as_version=4)
    NotebookClient(
        book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    outputs = [o for cell in book.cells if cell.cell_type == "code" for o in cell.outputs]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 1, f"{path.name} draws nothing"
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")


def test_there_are_notebooks():
    assert [p.name for p in NOTEBOOKS][:1] == ["01_a_step_is_a_gaussian.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
def test_notebook(path, monkeypatch):
    printed = run(path, monkeypatch)
    if path.stem.startswith("01"):
        log_z, mean = (
            [float(w) for w in line.split() if w.replace(".", "").isdigit()] for line in printed.splitlines()
        )
        assert abs(log_z[0] - log_z[1]) < 0.08 and abs(mean[0] - mean[1]) < 0.08  # beside the exact answers
    if path.stem.startswith("02"):
        lines = [line.split() for line in printed.splitlines() if line.strip()]
        (_, _, _, log_z, _, error, _, exact), (_, _, mean, _, truth) = lines[:2]
        assert abs(float(log_z) - float(exact)) < 4 * float(error) and abs(float(mean) - float(truth)) < 0.06
        rest = [w[w.index("E[Z^]/Z") + 1 :] for w in lines if "E[Z^]/Z" in w]
        ratios = [(float(w[0]), float(w[2].strip(","))) for w in rest]
        assert len(ratios) == 7 and all(abs(r - 1) < 4 * e for r, e in ratios)
    if path.stem.startswith("03"):
        walked, exact = (float(w) for w in printed.splitlines()[0].split()[4:7:2])
        assert abs(walked - exact) < 0.25
        words = printed.split()
        assert words[words.index("ledger") + 1] == words[words.index("formula") + 1]
        row = words.index("best-of-n")  # its mean, ±, its error; the exact expectation stands above
        assert abs(float(words[row + 1]) - float(words[row - 1])) < 4 * float(words[row + 3])
    if path.stem.startswith("04"):
        lines = printed.splitlines()
        assert float(lines[0].split()[-1]) < 1e-5, "gains telescope"
        ends = {w[0]: (float(w[-2]), float(w[-1])) for w in (line.split() for line in lines[-6:])}
        assert all(last > first for first, last in ends.values()) and ends["BranchGRPO"][1] > ends["Flow-GRPO"][1]
    if path.stem.startswith("05"):
        rows = {line[:18].strip(): line[18:].split() for line in printed.splitlines()}
        mean, variance = float(rows["target"][1]), float(rows["target"][3])
        for name in ("Adjoint Matching", "RTB"):
            first = next(line[18:].split() for line in printed.splitlines() if line.startswith(name))
            assert abs(float(first[1]) - mean) < 0.15 and abs(float(first[3]) / variance - 1) < 0.15, name
        needle = next(line[18:].split() for line in printed.splitlines() if line.startswith("DRaFT"))
        assert float(needle[3]) < 0.1 * variance and float(needle[5]) > -0.05
        assert int(rows["Flow-GRPO noise"][0][:-1]) < int(rows["memoryless noise"][0][:-1])
