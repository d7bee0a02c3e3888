"""``flowalign score`` and ``flowalign evaluate --models``: tables, intervals, paired differences, a gallery."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from flowalign.cli import main
from flowalign.intervals import interval, student
from flowalign.panel import PanelOptions, open_model, run
from flowalign.protocols import Card
from flowalign.rewards.base import Judge
from tests.runworld import Saved, sizes


# ---- intervals ------------------------------------------------------------------------------------------------------
def test_students_quantile_is_right() -> None:
    """Tables of Student's t, two-sided 95 %."""
    for freedom, want in {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 10: 2.228, 30: 2.042, 1000: 1.962}.items():
        assert student(freedom) == pytest.approx(want, rel=0.01)
    assert student(0) == math.inf


def test_an_interval_of_independent_samples_is_the_classic_one() -> None:
    x = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, half = interval(x)
    assert mean == pytest.approx(float(x.mean())) and half == pytest.approx(student(19) * float(x.std()) / 20**0.5)
    with_gap = torch.cat([x, torch.tensor([math.nan])])
    assert interval(with_gap) == (mean, half)
    assert math.isnan(interval(x, torch.zeros(20))[1]) and math.isnan(interval(torch.tensor([math.nan]))[0])


def test_images_of_one_prompt_do_not_count_as_independent() -> None:
    """Copies of a sample tell nothing new; coverage over many draws is what it says."""
    x = torch.randn(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    copies, cluster = x.repeat_interleave(5), torch.arange(12).repeat_interleave(5)
    assert interval(copies, cluster) == pytest.approx(interval(x)) and interval(copies)[1] < 0.6 * interval(x)[1]
    g, hits = torch.Generator().manual_seed(2), 0
    for _ in range(400):
        prompt = torch.randn(15, generator=g).repeat_interleave(4)
        mean, half = interval(prompt + torch.randn(60, generator=g), torch.arange(15).repeat_interleave(4))
        hits += abs(mean) <= half
    assert 0.92 < hits / 400 < 0.98


# ---- score ----------------------------------------------------------------------------------------------------------
class Picky(Judge):
    """Brightness of pictures, but for the word "blind", and the length of ``meta["note"]``."""

    card = Card("picky", "brightness")

    def __init__(self) -> None:
        super().__init__()

    def score(self, media: Tensor, prompts, meta) -> Tensor:
        sizes.append(len(media))
        note = torch.tensor([float(len(m.get("note", ""))) for m in meta])
        reasons = {i: "it is blind" for i, p in enumerate(prompts) if p == "blind"}
        scores = media.mean((1, 2, 3)) + note
        scores[list(reasons)] = math.nan
        self.unjudged(scores, reasons)
        return scores


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sizes.clear()
    for i, (level, side) in enumerate([(0, 4), (51, 4), (102, 6), (255, 6)]):
        Image.new("RGB", (side, 4), (level,) * 3).save(tmp_path / f"{i}.png")
    return tmp_path


def scored(capsys: pytest.CaptureFixture[str], *args: str) -> list[dict]:
    main(["score", *args, "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_score_reads_folders_prompts_and_several_rewards(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The issue's own form; pictures of one size go together; prompts pair by file name whatever their order."""
    lines = [{"file": f"{i}.png", "prompt": p, "note": "x" * i} for i, p in enumerate(["a", "b", "blind", "d"])]
    (folder / "p.jsonl").write_text("\n".join(json.dumps(v) for v in reversed(lines)))
    spec = "tests.test_panel:Picky:2, compressibility:0.5"
    found = scored(capsys, str(folder), "--prompts", str(folder / "p.jsonl"), "--reward", spec)
    picky = [r["scores"]["tests.test_panel:Picky"] for r in found]
    assert [r["prompt"] for r in found] == ["a", "b", "blind", "d"] and picky[2] is None
    assert [picky[0], picky[1], picky[3]] == pytest.approx([0.0, 1.2, 4.0]) and found[2]["score"] is None
    assert found[2]["unjudged"] == {"tests.test_panel:Picky": "it is blind"} and sizes == [2, 2]
    for r in (found[0], found[3]):
        assert r["score"] == pytest.approx(
            2 * r["scores"]["tests.test_panel:Picky"] + 0.5 * r["scores"]["compressibility"]
        )
    sizes.clear()
    scored(capsys, str(folder), "--prompt", "a", "--reward", "tests.test_panel:Picky", "--batch", "1")
    assert sizes == [1, 1, 1, 1]


def test_score_prints_a_table_with_means_and_intervals(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "p.txt").write_text("a\nb\nblind\nd\n")
    main(["score", str(folder), "--reward", "tests.test_panel:Picky", "--prompts", str(folder / "p.txt")])
    text = capsys.readouterr().out
    mean, half = interval(torch.tensor([0.0, 0.2, 1.0]))
    assert "4 pictures, 4 prompts" in text and f"{mean:.4f} ± {half:.4f}   of 3 judged" in text
    assert "(tests.test_panel:Picky: it is blind)" in text and "1.0000" in text
    main(["score", "tests.test_panel:Picky", str(folder / "0.png"), "--prompt", "blind"])
    assert "mean" not in capsys.readouterr().out


def test_score_refuses_what_does_not_pair(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "few.txt").write_text("a\nb\n")
    (folder / "stray.jsonl").write_text('{"file": "9.png", "prompt": "a"}')
    (folder / "empty").mkdir()
    for args, words in {
        ("--prompts", str(folder / "few.txt")): "2 prompts for 4 pictures",
        ("--prompts", str(folder / "stray.jsonl")): 'no line with "file": "0.png"',
        ("--prompt", "a", "--prompts", "b"): "not both",
        ("--prompt", "a", "--batch", "0"): "batch must be at least 1",
        (): "has no prompt",
    }.items():
        with pytest.raises(SystemExit) as end:
            main(["score", str(folder), "--reward", "tests.test_panel:Picky", *args])
        assert end.value.code == 2 and words in capsys.readouterr().err
    for args, words in {
        (str(folder / "empty"), "--reward", "smoothness", "--prompt", "a"): "holds no pictures",
        (str(folder), "--reward", "vendi", "--prompt", "a"): "several sizes",
        (str(folder), "--reward", "smothness", "--prompt", "a"): "Nearest",
        ("smoothness",): "name a reward",
    }.items():
        with pytest.raises(SystemExit):
            main(["score", *args])
        assert words in capsys.readouterr().err


# ---- models × prompts × rewards -------------------------------------------------------------------------------------
def bright() -> Saved:
    """The same generator, a constant brighter."""
    toy = Saved()
    plain = toy.decode
    toy.decode = lambda x, cond: (plain(x, cond) + 0.1).clamp(0, 1)
    return toy


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.images, self.open, self.text, self.outside = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs) -> None:
        found = dict(attrs)
        self.outside += [v for k, v in attrs if k in ("src", "href") and not v.startswith("data:")]
        if tag == "img":
            self.images.append(found)
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    prompts = [{"prompt": f"{c} <{i}>", "category": c} for c in ("light", "dark") for i in range(3)]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(p) for p in prompts))
    return [
        "evaluate", "--models", "base=tests.runworld:pipeline", "tests.test_panel:bright", "--rewards",
        "tests.toy:Bright, smoothness", "--prompts", str(tmp_path / "p.jsonl"), "--images", "12", "--steps", "4",
        "--shown", "6", "--output", str(tmp_path / "panel"),
    ]  # fmt: skip


def test_evaluate_compares_models_on_the_same_noises(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Table, summary, one line per image, and a page with every model's picture of the same prompt side by side."""
    main(options)
    text, home = capsys.readouterr().out, tmp_path / "panel"
    summary = json.loads((home / "summary.json").read_text())
    found = summary["figures"]["tests.toy:Bright"]["tests.test_panel:bright"]
    assert list(found) == ["all", "light", "dark"] and found["all"]["images"] == 24
    # the brighter model gains .1 on light prompts and loses it on dark ones, image by image: hardly any spread
    assert found["light"]["difference"] == pytest.approx(0.1, abs=0.01) and found["light"]["difference_half"] < 0.02
    assert found["dark"]["difference"] == pytest.approx(-0.1, abs=0.01)
    assert found["light"]["half"] > 2 * found["light"]["difference_half"]
    assert "24 images of 6 prompts per model" in text and "difference" in text and "+0.100 ±" in text
    rows = list(csv.DictReader(io.StringIO((home / "scores.csv").read_text())))
    assert len(rows) == 48 and {r["model"] for r in rows} == {"base", "tests.test_panel:bright"}
    light = [float(r["tests.toy:Bright"]) for r in rows if r["model"] == "base" and r["category"] == "light"]
    base = summary["figures"]["tests.toy:Bright"]["base"]["light"]
    prompts = [r["prompt"] for r in rows if r["model"] == "base" and r["category"] == "light"]
    cluster = [sorted(set(prompts)).index(p) for p in prompts]
    assert interval(torch.tensor(light), cluster) == pytest.approx((base["mean"], base["half"]), abs=1e-5)
    page = Page((home / "gallery.html").read_text())
    assert not page.open and not page.outside and len(page.images) == 2 * 2 * 6 and "light <0>" in page.text
    for picture in page.images:
        with Image.open(io.BytesIO(base64.b64decode(picture["src"].partition(",")[2]))) as image:
            assert image.size == (2, 2)
    with pytest.raises(SystemExit):
        main(options)
    assert "is not empty" in capsys.readouterr().err


def test_a_run_is_judged_by_its_result_and_a_single_image_has_no_interval(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run without a result, one of a class of one's own, and names that clash are refused before any sampling."""
    from flowalign.config import default, to_dict

    folder = tmp_path / "run"
    folder.mkdir()
    import yaml

    config = to_dict(default("diffusion-nft")) | {"pipeline": "tests.runworld:pipeline"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    o = PanelOptions(prompts=str(tmp_path / "p.jsonl"), output=tmp_path / "x")
    with pytest.raises(ValueError, match="has no result yet"):
        open_model(str(folder), o, torch.device("cpu"))
    (folder / "result").mkdir()
    with pytest.raises(ValueError, match="only diffusers pipelines"):
        open_model(str(folder), o, torch.device("cpu"))
    for models, words in {("a=x", "a=y"): "two models are called 'a'", ("=x",): "no name", (): "at least one"}.items():
        with pytest.raises(ValueError, match=words):
            run(PanelOptions(models, prompts=o.prompts, output=o.output))
    with pytest.raises(ValueError, match="give --prompts"):
        run(PanelOptions(("tests.runworld:pipeline",), output=o.output))
    (tmp_path / "one.txt").write_text("a\n")
    small = PanelOptions(
        ("a=tests.runworld:pipeline", "b=tests.test_panel:bright"), "tests.toy:Bright", str(tmp_path / "one.txt"),
        images=1, steps=2, output=tmp_path / "one",
    )  # fmt: skip
    found = run(small)["figures"]["tests.toy:Bright"]["b"]["all"]
    assert (
        found["half"] is None
        and found["difference_half"] is None
        and "NaN" not in (tmp_path / "one/summary.json").read_text()
    )
