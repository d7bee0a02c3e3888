"""The report: one file with nothing outside it, that shows what is in the run's folder."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flowalign.config import default
from flowalign.folder import Folder
from flowalign.media_files import grid, picture, save_media
from flowalign.plots import Series, figure
from flowalign.report import Shown, _strip, headline, write_report
from flowalign.run import train

PROMPTS = '{"prompt": "a <b> night", "category": "light"}\n{"prompt": "c dark", "category": "dark"}\n'


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Folder]:
    """Two short runs."""
    root = tmp_path_factory.mktemp("runs")
    (root / "p.jsonl").write_text(PROMPTS)
    out = []
    for name in ("flow-grpo", "diffusion-nft"):
        base = default(name)
        config = replace(
            base, pipeline="tests.runworld:pipeline", reward="tests.runworld:Strict, tests.toy:Bright:0.5",
            prompts=str(root / "p.jsonl"), output=root / name, trackers=(), device="cpu",
            fit=replace(base.fit, iterations=4, groups=2, size=8, steps=4, lr=1e-2),
            evaluation=replace(base.evaluation, images=20, every=2, check=20, layouts="tests.runworld:quadrant"),
        )  # fmt: skip
        train(config, progress=False)
        out.append(Folder(config.folder))
    return out


class Reader(HTMLParser):
    """Collects what refers to something."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read(path: Path) -> tuple[str, Reader]:
    text, reader = path.read_text(encoding="utf-8"), Reader()
    reader.feed(text)
    return text, reader


def test_self_contained(folders: list[Folder]) -> None:
    """Pictures and curves are inside; nothing is fetched; tags are closed; prompts are escaped."""
    text, reader = read(folders[1].path / "report.html")
    assert len(reader.sources) >= 6 and all(s.startswith("data:image/png;base64,") for s in reader.sources)
    assert not reader.open and "http" not in re.sub(r"data:[^\"]*", "", text)
    assert "a &lt;b&gt; night" in text and "a <b> night" not in text


def test_figures_are_the_summary(folders: list[Folder]) -> None:
    """Accuracy, gain and layouts in the table are those of summary.json."""
    text, _ = read(folders[1].path / "report.html")
    words = " ".join(re.sub(r"<[^>]+>", " ", re.sub(r"data:[^\"]*", "", text)).split())
    for name, c in folders[1].summary()["accuracy"].items():
        assert f"{name} 20 {100 * c['before'][0]:.1f} % {100 * c['after'][0]:.1f} % {100 * c['gain'][0]:+.1f}" in words
    for title in ("Pictures", "Accuracy by category", "On the way", "Training reward", "Inside the optimiser", "Cost"):
        assert title in words
    assert "evaluate before" in words and "torch" in words


def test_several_runs(folders: list[Folder], tmp_path: Path) -> None:
    """Runs side by side have a column of pictures each, beside the base."""
    path = write_report(folders, tmp_path / "both.html", labels=["One", "Two"], notes=["x", "y"], title="Both")
    text, reader = read(path)
    assert "<title>Both" in text and text.count("<th>One</th>") == text.count("<th>base</th>") == 2
    assert len([s for s in reader.sources]) == 2 * 3 + 4  # two prompts, three strips each, four plots
    assert path.stat().st_size < 3_000_000


def test_unfinished_run(folders: list[Folder], tmp_path: Path) -> None:
    """A run that was interrupted still has a report."""
    folder = Folder(tmp_path / "cut")
    folder.path.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (folder.path / name).write_bytes((folders[0].path / name).read_bytes())
    assert "not finished" in write_report([folder], folder.path / "report.html").read_text()


def test_headline(folders: list[Folder]) -> None:
    """The category that gained most is the one shown first."""
    run = Shown.read(folders[0], "x", "red", "")
    summary = {"accuracy": {"p": {"gain": [0.1, 0.0]}, "q": {"gain": [0.3, 0.0]}, "r": {"gain": [-0.5, 0.0]}}}
    assert headline([replace(run, summary=summary)]) == "q" and headline([replace(run, summary={})]) == ""


def test_headline_of_a_world(folders: list[Folder], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the prompts dwell on a category it stands first, whatever gained more: it was chosen before."""
    run = Shown.read(folders[0], "x", "red", "")
    figures = {c: {"gain": [g, 0.0]} for c, g in (("mixed", 0.1), ("count", 0.3), ("relation", 0.0))}
    for world, prompts, wanted in (
        ("shapes", None, "mixed"),
        ("shapes", "shapes:focus7", "mixed"),
        ("shapes", "shapes:relation2", "relation"),
        ("runs/mine/model", "shapes:focus", "mixed"),
        ("shapes-turbo", "shapes-turbo:focus", "count"),
        ("shapes", "shapes:single", "count"),
        ("shapes", "shapes:train", "count"),
        ("shapes", "mine.txt", "count"),
    ):
        config = replace(run.folder.config(), pipeline=world, prompts=prompts)
        monkeypatch.setattr(Folder, "config", lambda self, config=config: config)
        assert headline([replace(run, summary={"accuracy": figures})]) == wanted
        monkeypatch.undo()


def test_grid_and_files(tmp_path: Path) -> None:
    """Tiles are where they belong, framed by their verdict; media are written in the formats promised."""
    images = torch.stack([torch.full((3, 4, 4), v) for v in (0.0, 0.5, 1.0)])
    sheet = grid(images, 2, good=[True, False, True], size=8, gap=6)
    assert sheet.size == (2 * 14 + 6, 2 * 14 + 6)
    assert [sheet.getpixel((10, 10))[0], sheet.getpixel((24, 10))[0], sheet.getpixel((10, 24))[0]] == [0, 128, 255]
    assert sheet.getpixel((4, 10)) == (46, 160, 67) and sheet.getpixel((18, 10)) == (215, 58, 73)
    assert picture(torch.rand(5, 3, 4, 6)).size == (6, 4)
    assert save_media(tmp_path, torch.rand(1, 3, 3, 8, 8), "video", ["v"]) == ["v.png"]
    assert save_media(tmp_path, torch.zeros(1, 2, 100), "audio", ["a"]) == ["a.wav"]
    assert (tmp_path / "a.wav").stat().st_size == 44 + 400


def test_no_points_no_plot() -> None:
    """A plot of nothing is left out."""
    assert figure({"a": [Series("", [], [])]}, "x") == ""
    assert figure({"a": [Series("l", [0, 1], [0.0, 1.0], [0.1, 0.1])]}, "x", percent=["a"]).startswith("data:image/png")


def test_metrics_are_json(folders: list[Folder]) -> None:
    """Every line reads as JSON and names both rewards."""
    lines = [json.loads(x) for x in (folders[0].path / "metrics.jsonl").read_text().splitlines()]
    assert {"reward/tests.runworld:Strict", "reward/tests.toy:Bright", "ratio", "ratio_gap", "reward"} <= lines[
        0
    ].keys()
    assert lines[0]["ratio_gap"] < 1e-5 or lines[0]["ratio"] == pytest.approx(1, abs=0.1)


def test_a_prompt_without_pictures_has_no_strip() -> None:
    """A run with a shorter exam kept fewer prompts: its place in a sheet stays empty, and nothing fails."""
    outcome = SimpleNamespace(
        shown=[0], row=torch.tensor([3]), judged=torch.tensor([1.0]), pictures=torch.rand(1, 3, 8, 8)
    )
    assert _strip(outcome, 5) == ""  # type: ignore[arg-type]
    assert _strip(outcome, 3).startswith("data:image/png")  # type: ignore[arg-type]
