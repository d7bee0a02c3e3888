"""The demo: what it promises is held against what came, and the whole of it runs (slow: four processes)."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flowalign import demo
from flowalign.config import default
from flowalign.demo import Child, DemoOptions, run, wait
from flowalign.demo_verdict import free as note_of
from flowalign.demo_verdict import rewarded, verdict
from flowalign.folder import Folder


def summary(gain: float, se: float = 0.01, kept: float = 0.9, other: float = 0.0) -> dict[str, Any]:
    """Return the figures of a run."""
    part = {"images": 1000, "before": [0.5, 0.01], "after": [0.5 + gain, 0.01]}
    return {
        "accuracy": {
            "count": part | {"gain": [gain, se], "layouts_kept": kept},
            "single": part | {"gain": [other, 0.01], "layouts_kept": 1.0},
        },
        "drift": 0.1, "trained_seconds": 300.0, "evaluations": 1000,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("one", "two", "full", "wanted"),
    [
        (summary(0.12), summary(0.05), False, [True, True, True, True]),
        (summary(0.05), summary(0.12), False, [True, True, True, True]),
        (summary(0.12, se=0.03), summary(0.05), False, [False, True, True, True]),
        (summary(0.12), summary(0.03), False, [True, False, True, True]),
        (summary(0.12, kept=0.7), summary(0.05), False, [True, True, False, True]),
        (summary(0.12, other=-0.04), summary(0.05), False, [True, True, True, False]),
        (summary(0.12), summary(0.05), True, [False, True, True]),
        (summary(0.26), summary(0.01), True, [True, True, True]),
        (summary(0.26), summary(0.01, kept=0.7), True, [True, False, True]),
    ],
)
def test_verdict(one: dict, two: dict, full: bool, wanted: list[bool]) -> None:
    """Each promise is kept or broken by its own figure; the unregularised run promises nothing."""
    found = verdict({"a": one, "b": two, "unregularised": summary(0.4, kept=0.05, other=-0.2)}, "count", full)
    assert list(found["promises"].values()) == wanted and found["focus"] == "count"
    assert found["runs"]["unregularised"]["layouts_kept"] == 0.05


def test_existing_folder(tmp_path: Path) -> None:
    """Nothing is overwritten."""
    (tmp_path / "x").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        run(DemoOptions(output=tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_failed_run_is_not_swallowed(tmp_path: Path) -> None:
    """The end of the log is shown, and the other runs are ended."""
    (tmp_path / "bad.log").write_text("the reason")
    bad = Child("bad", Folder(tmp_path / "bad"), subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]), 1.0)
    good = Child(
        "good", Folder(tmp_path / "good"), subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]), 1.0
    )
    with pytest.raises(RuntimeError, match=r"failed with code 3(.|\n)*the reason"):
        wait([bad, good], progress=False)
    assert good.process.wait(timeout=10) != 0


@pytest.mark.parametrize(
    ("own", "method", "wanted"),
    [
        ("", "draft", "--preset unregularised --reward shapes-clip --prompts shapes:focus7"),
        ("--reward tests.runworld:Strict", "diffusion-nft", "--preset unregularised"),
    ],
)
def test_the_base_and_the_unregularised_run_are_judged_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, method: str, wanted: str
) -> None:
    """The same steps for all, whatever a method trains with; the reward of the run without a penalty has a gradient."""
    asked: list[str] = []

    def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
        asked.append(" ".join(command))
        return subprocess.Popen([sys.executable, "-c", ""])

    (tmp_path / "base").mkdir()
    (tmp_path / "base/summary.json").write_text('{"seconds": {"evaluate_before": 7.0}}')
    with monkeypatch.context() as m:
        m.setattr(demo, "start", start)
        seconds, more = demo._base(
            DemoOptions(output=tmp_path, images=50, options=own, precision="fp32", full=bool(own)), False
        )
    free, base = asked
    assert f"train {method} " in free and wanted in free and "--evaluation.images 10 " in free
    assert f"--max-wall {70 if own else 69} " in free, "a seventh of the time, and no more than it can bear"
    assert "evaluate --base" in base and "--evaluation.images 50 " in base
    assert all("--evaluation.steps 10" in a for a in (free, base, " ".join(more))) and seconds == 7.0
    assert free.endswith(own) and base.endswith(own)


@pytest.mark.parametrize(("full", "wanted"), [(False, []), (True, ["flow-grpo", "diffusion-nft", "control"])])
def test_the_long_demo_takes_smaller_steps(
    full: bool, wanted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so does the control, DiffusionNFT but for the permuted rewards."""
    asked: dict[str, tuple[str, ...]] = {}

    def begin(name: str, method: str, options: DemoOptions, seconds: float, *more: str) -> Child:
        asked[name] = more
        done = subprocess.Popen([sys.executable, "-c", ""])
        return Child(name, Folder(options.output / name), done, seconds)

    monkeypatch.setattr(Child, "start", begin)
    monkeypatch.setattr(Folder, "summary", lambda self: summary(0.3))
    monkeypatch.setattr(demo, "_base", lambda options, progress: (1.0, ["--x"]))
    monkeypatch.setattr(demo, "rewarded", lambda folder, categories: "count")
    monkeypatch.setattr(demo, "report", lambda output, folders, labels: output)
    run(DemoOptions(full=full, control=True, output=tmp_path / "d", precision="fp32"), progress=False)
    assert list(asked) == ["flow-grpo", "diffusion-nft", "control"] and all(a[0] == "--x" for a in asked.values())
    assert [n for n, a in asked.items() if a[1:3] == ("--preset", "demo-long")] == wanted
    assert [n for n, a in asked.items() if "--permute" in a] == ["control"]


def test_the_rewarded_category_is_fixed_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that the prompts dwell on, a world's where they do not say, and elsewhere the first."""
    folder = Folder(tmp_path)
    for pipeline, prompts, wanted in (
        ("shapes", "shapes:relation7", "relation"),
        ("shapes", "mine.txt", "mixed"),
        ("shapes-turbo", None, "count"),
        ("my:pipeline", "mine.txt", "single"),
    ):
        config = replace(default("flow-grpo"), pipeline=pipeline, prompts=prompts)
        monkeypatch.setattr(Folder, "config", lambda self, config=config: config)
        assert rewarded(folder, ["single", "relation"]) == wanted


def test_the_note_on_the_run_that_is_let_go_is_its_figures(tmp_path: Path) -> None:
    """Nothing is claimed of it that it did not do."""
    folder = Folder(tmp_path)
    folder.append("checks.jsonl", {"iteration": 8, "trained": {"gain": [-0.021, 0.004]}})
    folder.write("summary.json", json.dumps(summary(-0.4, se=0.05, kept=0.71, other=-0.06) | {"drift": 0.234}))
    text = note_of(folder)
    assert "own reward changed by -0.021 ± 0.004" in text and "count by -40.0 ± 5.0 points" in text
    assert "single by -6.0" in text and "layouts of count 71% are left" in text and text.endswith("drift 0.23.")


@pytest.mark.slow
def test_the_whole_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the toy: base, two methods, the unregularised run and the control; a table, one report, a verdict."""
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a", "category": "light"}\n{"prompt": "c dark", "category": "dark"}\n')
    options = (
        f"--pipeline tests.runworld:pipeline --reward tests.runworld:Strict --prompts {prompts} "
        "--evaluation.layouts tests.runworld:quadrant --device cpu"
    )
    found = run(
        DemoOptions(minutes=1.2, images=60, output=tmp_path / "demo", control=True, options=options), progress=False
    )
    text = capsys.readouterr().out
    assert "Flow-GRPO" in text and "control" in text and "report.html" in text
    assert json.loads((tmp_path / "demo/summary.json").read_text())["promises"] == found["promises"]
    assert (tmp_path / "demo/report.html").stat().st_size > 50_000
    bases = {(tmp_path / "demo" / n / "before.pt").read_bytes() for n in ("flow-grpo", "diffusion-nft", "control")}
    assert len(bases) == 1
    assert Folder(tmp_path / "demo/control").config().permute
