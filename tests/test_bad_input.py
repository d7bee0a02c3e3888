"""What is wrong with an input is said in one paragraph, before anything is loaded or written; nothing passes.

What no run is needed for; the rest is in test_cli and test_config.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign import demo
from flowalign.arguments import train_config
from flowalign.cli import main
from flowalign.config import default, from_yaml
from flowalign.demo import DemoOptions, Failed
from flowalign.demo_options import of_base
from flowalign.folder import Folder
from flowalign.methods import resolve
from flowalign.opening import open_pipeline
from flowalign.options import FitOptions
from flowalign.prompts import read_prompts
from flowalign.source import Prompt


def said(capsys: pytest.CaptureFixture[str], code: int, *args: str) -> str:
    """Run the command, which must end with a code, and return its words on one line."""
    with pytest.raises(SystemExit) as exit:
        main(args)
    captured = capsys.readouterr()
    assert exit.value.code == code and "Traceback" not in captured.err
    return " ".join((captured.err + captured.out).replace("│", " ").split())


# ------------------------------------------------------------------------------------------------------------ settings
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"betas": (5.0, 9.0)}, "betas are decays"),
        ({"betas": (0.9, 1.0)}, "betas are decays"),
        ({"betas": (float("nan"), 0.9)}, "betas are decays"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0; got -1"),
        ({"weight_decay": float("nan")}, "weight_decay must be at least 0; got nan"),
        ({"ratio_tolerance": -0.1}, "ratio_tolerance must be at least 0"),
    ],
)
def test_what_the_optimiser_would_refuse(settings: dict[str, Any], words: str) -> None:
    """AdamW refuses it too, but after the evaluation of the base, in a folder that then cannot be mended."""
    with pytest.raises(ValueError, match=words):
        FitOptions(**settings)
    assert FitOptions(betas=(0.0, 0.0), weight_decay=0.0, ratio_tolerance=0.0).betas == (0.0, 0.0)


def test_trackers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A tracker must exist and be installed; a run of another machine can be read where its own is not."""
    assert "no tracker 'tensorbord': write aim" in said(capsys, 2, *["train", "ddpo", "--trackers", "tensorbord"])
    monkeypatch.setattr("flowalign.ahead.find_spec", lambda name: None if name == "wandb" else object())
    assert train_config(["ddpo", "--trackers", "tensorboard"])[0].trackers == ("tensorboard",)
    assert "tracker wandb is not installed: pip install wandb" in said(
        capsys, 2, *["train", "ddpo", "--trackers", "wandb"]
    )
    assert replace(default("ddpo"), trackers=("wandb",)).trackers == ("wandb",)


def test_a_place_that_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found before a model loads; a folder yet to be made, however deep, is fine and is not made."""
    (tmp_path / "file").write_text("mine")
    text = said(capsys, 2, "train", "ddpo", "--output", str(tmp_path / "file/run"))
    assert f"{tmp_path}/file is no folder. Choose another one with --output" in text
    assert "is no folder" in said(capsys, 2, "demo", "--output", str(tmp_path / "file/demo"))
    assert train_config(["ddpo", "--output", str(tmp_path / "a/b/c")])[0].folder == tmp_path / "a/b/c"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# --------------------------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"1: 2\nmethod: flow-grpo", "no key 1 in RunConfig"),
        (b"method: [flow-grpo]", "run.yaml: method must be a name, or a mapping"),
        (b"method: 5", "method must be a name, or a mapping.*got 5"),
        (b"method: {name: 5}", "the name of the method must be a string; got 5"),
        (b"method: {1: 2, name: flow-grpo}", "no key 1 in FlowGRPO"),
        (b"method: flow-grpo\nfit: {lr: 1}\nfit: {lr: 2}", "run.yaml cannot be read.*'fit' comes twice(.|\n)*line 3"),
        (b"method: flow-grpo\nfit: {lr: 1, size: 4, lr: 2}", "'lr' comes twice"),
        (b"method: \xff\xfe", "run.yaml cannot be read.*utf-8"),
    ],
)
def test_bad_files(tmp_path: Path, text: bytes, words: str) -> None:
    """Wrong types, double keys and other encodings are named, with the file."""
    path = tmp_path / "run.yaml"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=f"(?s){words}"):
        from_yaml(path)


def test_a_file_may_merge(tmp_path: Path) -> None:
    """What YAML itself says of keys that come twice holds: a merged one gives way; equal ones in two places are two."""
    path = tmp_path / "run.yaml"
    path.write_text("method: flow-grpo\nfit: &a {size: 4, lr: 1e-3}\ncall: {<<: {height: 8}, height: 16}\n")
    config = from_yaml(path)
    assert (config.fit.size, config.call) == (4, {"height": 16})


def test_prompts_of_every_editor(tmp_path: Path) -> None:
    """A byte order mark is no part of a prompt, and U+2028 inside a JSON string ends no line."""
    record = json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False)
    for name, text in {"p.txt": "a cat\r\nb\n", "p.jsonl": f'{record}\n{{"prompt": "b"}}\n'}.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig", newline="")
    assert read_prompts(str(tmp_path / "p.txt")) == [Prompt("a cat"), Prompt("b")]
    assert read_prompts(str(tmp_path / "p.jsonl")) == [Prompt("a\u2028b\x85c"), Prompt("b")]


# ----------------------------------------------------------------------------------------------------------- pipelines
@pytest.mark.parametrize(
    ("there", "words"),
    [(True, "world cannot be loaded as a diffusers pipeline"), (False, "there is no folder my/world, and the hub id")],
)
def test_a_pipeline_that_cannot_be_loaded(
    there: bool, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with files missing, and a hub id that is not there or cannot be reached: one short paragraph."""

    def load(*args: Any, **kwargs: Any) -> Any:
        raise OSError("it does not\n   connect " + "at all " * 100)

    monkeypatch.chdir(tmp_path)
    if there:
        (tmp_path / "my/world").mkdir(parents=True)
    monkeypatch.setattr("flowalign.pipelines.load", load)
    with pytest.raises(ValueError, match=f"{words}.*: it does not connect at all") as error:
        open_pipeline("my/world", {}, [True], torch.device("cpu"))
    assert len(str(error.value)) < 450 and "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------------------- resume
def test_a_resumed_run_hears_its_file(tmp_path: Path) -> None:
    """A file is applied as options are: the folder refuses what differs, and takes budgets."""
    file, run = tmp_path / "a.yaml", tmp_path / "run"
    again = ["--config", str(file), "--resume"]

    def write(fit: str, more: str = "") -> None:
        file.write_text(f"method: flow-grpo\noutput: {run}\nfit: {{{fit}}}\n{more}")

    write("iterations: 5, lr: 1e-4")
    Folder.open(train_config(["--config", str(file), "--fit.size", "8"])[0])
    same, resume, _ = train_config(list(again))
    assert resume and same.fit.size == 8 and same.fit.lr == 1e-4, "options of then need not be told again"
    Folder.check(same, True)
    write("iterations: 50, lr: 1e-4, max_seconds: 9")
    longer = train_config(list(again))[0]
    Folder.check(longer, True)
    assert (longer.fit.iterations, longer.fit.max_seconds) == (50, 9.0)
    for fit, more, words in (
        ("lr: 5e-4", "", "run with fit.lr = 0.0001 and cannot be resumed with 0.0005"),
        ("lr: 1e-4", "reward: aesthetic", "reward = 'shapes' and cannot be resumed with 'aesthetic'"),
        ("lr: 1e-4", "preset: published", "cannot be resumed"),
    ):
        write(fit, more)
        with pytest.raises(ValueError, match=words):
            Folder.check(train_config(list(again))[0], True)
    file.write_text(f"method: ddpo\noutput: {run}")
    with pytest.raises(ValueError, match="is a run of flow-grpo, not of ddpo"):
        train_config(list(again))


def test_a_resumed_run_hears_its_preset(tmp_path: Path) -> None:
    """The same one again is right, with its budget as it was; another one is refused."""
    run = ["flow-grpo", "--output", str(tmp_path / "run")]
    Folder.open(train_config([*run, "--preset", "published", "--iterations", "7"])[0])
    same = train_config([*run, "--preset", "published", "--resume"])[0]
    Folder.check(same, True)
    assert same.fit.iterations == 7
    Folder.check(train_config([*run, "--resume"])[0], True)
    with pytest.raises(ValueError, match="cannot be resumed"):
        Folder.check(train_config([*run, "--preset", "demo", "--resume"])[0], True)


# ------------------------------------------------------------------------------------------------- methods of one's own
def test_a_method_of_one_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found in the working directory without PYTHONPATH, and known again by the name that it was given."""
    (tmp_path / "a_method_here.py").write_text(
        "from dataclasses import dataclass\nfrom flowalign.methods.diffusion_nft import DiffusionNFT\n"
        "@dataclass(frozen=True)\nclass Mine(DiffusionNFT):\n    name = 'mine'\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    assert resolve("a_method_here:Mine").name == "mine"
    Folder.open(train_config(["a_method_here:Mine", "--output", "run"])[0])
    for args in (["a_method_here:Mine"], []):
        config = train_config([*args, "--output", "run", "--resume"])[0]
        assert config.method.name == "mine"
    with pytest.raises(ValueError, match="is a run of mine, not of ddpo"):
        train_config(["ddpo", "--output", "run", "--resume"])


# ----------------------------------------------------------------------------------------------------------- the demo
@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--images 0", "images must be at least 2"),
        ("--minutes -1", "minutes must be positive; got -1"),
        ("--minutes 0", "minutes must be positive; got 0"),
        ("--precision fp8", "precision is fp32 or bf16"),
        ("--full --quick", "choose one"),
        ("--options=--output=x", "--output belongs to the demo"),
        ("--options='", "cannot be read"),
        ("--options=--fit.grups=4", "--fit.grups"),
        ("--options=--fit.groups=0", "groups must be at least 1"),
        ("--options=--pipeline=shpes", "no pipeline is called 'shpes'"),
        ("--options=--reward=shpes", "no reward is called 'shpes'"),
    ],
)
def test_bad_options_of_the_demo(args: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before the first run starts: no folder is left behind."""
    assert words in said(capsys, 2, "demo", "--output", str(tmp_path / "demo"), *args.split())
    assert not (tmp_path / "demo").exists()


def test_the_base_hears_what_applies_to_it() -> None:
    """Options of the training are not handed to the judging of the base, which has none."""
    words = "--fit.groups 4 --call height 32 width 32 --reward=a,b --method.kl -1 --evaluation.no-guidance --chunk 3"
    assert of_base(words.split()) == [
        "--call",
        "height",
        "32",
        "width",
        "32",
        "--reward=a,b",
        "--evaluation.no-guidance",
    ]
    assert DemoOptions(minutes=0.1).total == pytest.approx(6.0) and DemoOptions().total == 480.0


def test_a_run_of_the_demo_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One paragraph with the reason and where the rest of it is; Ctrl-C promises no --resume, which the demo lacks."""

    def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
        log.write_text("Traceback (most recent call last):\n  File x\nKeyError: 'target'\n")
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])

    monkeypatch.setattr(demo, "start", start)
    text = said(capsys, 1, "demo", "--output", str(tmp_path / "demo"), "--precision", "fp32")
    assert "failed with code 3: KeyError: 'target' More is in" in text and "to begin again" in text
    assert issubclass(Failed, RuntimeError)
    assert demo._reason("╭─ Value error ─╮\n│ max_wall must │\n╰──╯\n") == "Value error max_wall must"

    def stop(options: DemoOptions) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", stop)
    text = said(capsys, 130, "demo", "--output", str(tmp_path / "demo"))
    assert "stopped" in text and "--resume" not in text and f"{tmp_path}/demo keeps" in text


# -------------------------------------------------------------------------------------------------------------- Ctrl-C
@pytest.mark.parametrize(("status", "code"), [("interrupted", 130), ("done", None)])
def test_an_interrupted_run_says_so(
    status: str, code: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The code that a shell expects after Ctrl-C, though the run ended in order; one that is done ends with 0."""
    summary = {
        "method": "ddpo", "pipeline": "shapes", "iterations": 3, "trained_seconds": 1.0, "evaluations": 9,
        "status": status,
    }  # fmt: skip
    monkeypatch.setattr("flowalign.run.train", lambda config, resume, progress: summary)
    args = ["train", "ddpo", "--output", str(tmp_path / "run")]
    if code is None:
        main(args)
        assert "report.html" in capsys.readouterr().out
    else:
        assert "interrupted: no final evaluation; --resume goes on" in said(capsys, code, *args)
