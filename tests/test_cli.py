"""The command line: help that teaches, and one-paragraph errors before any work, with a non-zero exit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flowalign.arguments import train_config
from flowalign.cli import main
from flowalign.facts import WORLDS, judged_by
from flowalign.folder import Folder

PROMPTS = '{"prompt": "a", "category": "light"}\n{"prompt": "c dark", "category": "dark"}\n'


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options of a run of a second."""
    monkeypatch.setattr("flowalign.report.write_report", lambda folders, path: path)
    (tmp_path / "p.jsonl").write_text(PROMPTS)
    text = (
        "--pipeline tests.runworld:pipeline --reward tests.runworld:Strict --quiet --trackers --fit.groups 2 "
        f"--fit.size 8 --fit.steps 4 --iterations 2 --evaluation.images 20 --prompts {tmp_path}/p.jsonl "
        f"--output {tmp_path}/run"
    )
    return text.split()


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as exit:
        main(args)
    captured = capsys.readouterr()
    assert exit.value.code == 2 and "Traceback" not in captured.err
    return captured.err + captured.out


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    """Help names every command, and the methods that are there."""
    main([])
    text = capsys.readouterr().out
    assert all(
        c in text for c in ("demo", "train", "steer", "score", "evaluate", "rewards", "cite", "--output runs/first")
    )
    main(["train", "--help"])
    text = capsys.readouterr().out
    assert "diffusion-nft" in text and "flow-grpo" in text and max(map(len, text.splitlines())) <= 120
    main(["steer", "--help"])
    assert "best-of-n" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit:
        main(["train", "flow-grpo", "--help"])
    assert exit.value.code == 0 and "--method.noise" in capsys.readouterr().out


def test_train_and_options(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options reach the run: presets, short forms, a LoRA, and a table at the end."""
    main(
        [
            "train",
            "flow-grpo",
            *options,
            "--fit.lr=1e-3",
            "--lora.rank",
            "2",
            "--lora.targets",
            "0",
            "2",
            "--method.kl",
            "0.1",
        ]
    )
    text = capsys.readouterr().out
    assert "held-out prompts" in text and "light" in text
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    c = summary["config"]
    assert (c["fit.lr"], c["lora.rank"], c["method.kl"], c["fit.iterations"]) == (1e-3, 2, 0.1, 2)
    main(["train", "--resume", "--quiet", "--output", str(tmp_path / "run"), "--iterations", "3"])
    assert json.loads((tmp_path / "run/summary.json").read_text())["iterations"] == 3


def test_a_resumed_run_keeps_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by --output FOLDER, --output=FOLDER or the folder that it takes by itself, they need not be told again."""
    monkeypatch.chdir(tmp_path)
    first = train_config(["flow-grpo", "--fit.lr", "1e-3", "--pipeline", "mine/world"])[0]
    assert first.folder == Path("runs/flow-grpo-world")
    Folder.open(first)
    Folder.open(replace(first, output=tmp_path / "there"))
    for args in (
        ["flow-grpo", "--pipeline", "mine/world"],
        ["flow-grpo", "--output", str(tmp_path / "there")],
        [f"--output={tmp_path}/there"],
    ):
        config, resume, _ = train_config([*args, "--resume", "--iterations=7"])
        assert resume and config.fit.lr == 1e-3 and config.fit.iterations == 7 and config.pipeline == "mine/world"
    assert train_config(["flow-grpo", "--pipeline", "mine/world"])[0].fit.lr != 1e-3
    with pytest.raises(ValueError, match="is a run of flow-grpo, not of ddpo"):
        train_config(["ddpo", f"--output={tmp_path}/there", "--resume"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "flow-gpro"}, "no method is called 'flow-gpro'. Nearest: flow-grpo"),
        ({"method": "best-of-n"}, "is a steering method: run flowalign steer best-of-n"),
        ({"--pipeline": "shapse"}, "no pipeline is called 'shapse'"),
        ({"--reward": "pikscore"}, "no reward is called 'pikscore'. Nearest: pickscore"),
        ({"--fit.lrr": "1"}, "--fit.lr"),
        ({"--prompts": "nothing.txt"}, "nothing.txt does not exist"),
        ({"--fit.size": "1"}, "has no advantage"),
        ({"method": "flow-grpo", "--fit.steps": "1", "--method.window": "None"}, "draws noise"),
        ({"method": "flow-grpo", "--method.window": "3 9"}, "a window of steps 3 to 9 does not lie in the 4 steps"),
        ({"--reward": "tests.runworld:Broken"}, "returned nan for sample 0"),
        ({"--reward": "tests.runworld:BrokenShape"}, "one score per sample"),
        ({"--reward": "tests.runworld:BrokenNone"}, "got NoneType"),
        ({"--config": "nothing.yaml"}, "nothing.yaml cannot be read"),
        ({"--preset": "fast"}, "no preset 'fast'"),
        ({"--device": "gpu"}, "there is no device 'gpu': write auto, cpu"),
        ({"--device": "cuda:77"}, "device 'cuda:77' is a CUDA device, and torch finds"),
        ({"--reward": "tests.runworld:Strict,tests.runworld:Strict:2"}, "names 'tests.runworld:Strict' twice"),
        ({"--call": "hight 32"}, "takes no argument hight"),
    ],
)  # fmt: skip
def test_bad_input(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, str], words: str
) -> None:
    """Every mistake is one paragraph, found before any long work, and leaves no folder behind."""
    method = change.pop("method", "diffusion-nft")
    if "--call" in change:
        change["--pipeline"] = "shapes"
    for key, value in change.items():
        if key in options:
            options[options.index(key) + 1] = value
        else:
            options += [key, *value.split()]
    text = " ".join(fails(capsys, "train", method, *options).replace("│", " ").split())
    assert words in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["train flow-grpo", "steer best-of-n"])
def test_a_misspelt_world_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    """Without prompts too, which a world would have brought: the name is what is wrong."""
    text = fails(capsys, *command.split(), "--pipeline", "shpes", "--output", str(tmp_path / "run"))
    assert "no pipeline is called 'shpes'. Nearest demo worlds: shapes" in text


def test_a_world_s_judge_is_asked_once() -> None:
    """The world's judge comes first, and what is asked for beside it is not judged twice."""
    facts = WORLDS["shapes"]
    assert judged_by(facts, None) == "shapes" and judged_by(None, "a:2, b") == "a:2, b" and judged_by(None, None) == ""
    assert judged_by(facts, "shapes, shapes?aspect=graded") == "shapes, shapes?aspect=graded"


def test_empty_prompts(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompt files are checked with their line."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt"}\n')
    assert "line 2" in fails(capsys, "train", "diffusion-nft", *options)


def test_existing_run(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with a run is refused in one line; a resumed run where there is none says that it begins one."""
    main(["train", "diffusion-nft", *options, "--resume"])
    assert f"{tmp_path}/run holds no run to go on with: a new one begins." in capsys.readouterr().err
    assert "holds a run already" in fails(capsys, "train", "diffusion-nft", *options)


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    """The nearest one is named."""
    assert "there is no command 'trian'. Nearest: train" in fails(capsys, "trian")


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    """Methods, their settings, references and rewards are printed without loading weights."""
    main(["methods"])
    assert "diffusion-nft" in capsys.readouterr().out
    main(["methods", "flow-grpo", "ddpo"])
    text = capsys.readouterr().out
    assert "preset published" in text and "Flow-GRPO" in text and "DDPO" in text and "noise=0.7, noise_law=flow" in text
    assert max(map(len, text.splitlines())) <= 120
    main(["cite", "flow-grpo"])
    assert "arXiv:2505.05470" in capsys.readouterr().out
    main(["rewards"])
    pick = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("pickscore"))
    assert all(word in pick for word in ("image", "yes", "16 to 26", "77 tokens", "MIT", "yuvalkirstain/PickScore_v1"))
    main(["rewards", "--json"])
    assert any(c["name"] == "pickscore" for c in json.loads(capsys.readouterr().out))
    main(["rewards", "hps3", "clap"])
    rows = capsys.readouterr().out.splitlines()
    assert [r.split()[0] for r in rows[2::2]] == ["hps3", "clap"] and "32768 tokens  " in rows[2]
    assert rows[2].index("32768") == rows[0].index("text cut at") == rows[4].index("77 tokens")
    for what in ("methods", "rewards", "pipelines", "cite"):
        main([what, "--help"])
        assert f"usage: flowalign {what}" in capsys.readouterr().out
        assert "got --jason" in fails(capsys, what, "--jason")
    assert "no reward is called 'pikscore'" in fails(capsys, "rewards", "pikscore")
    main(["--version"])
    assert capsys.readouterr().out.strip() == "0.1.0"


def test_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pictures are scored in order; a missing prompt or file is an error."""
    from PIL import Image

    for name, level in (("dim", 50), ("bright", 200)):
        Image.new("RGB", (4, 4), (level,) * 3).save(tmp_path / f"{name}.png")
    main(["score", "tests.toy:Bright", str(tmp_path), "--prompt", "a", "--json"])
    lines = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
    assert [round(x["score"], 3) for x in lines] == [round(200 / 255, 3), round(50 / 255, 3)]
    assert "has no prompt" in fails(capsys, "score", "tests.toy:Bright", str(tmp_path))
    assert "there is no file" in fails(capsys, "score", "tests.toy:Bright", "x.png", "--prompt", "a")
    whole = (tmp_path / "dim.png").read_bytes()
    for broken in (b"no picture", whole[: len(whole) // 2]):
        (tmp_path / "broken.png").write_bytes(broken)
        text = fails(capsys, "score", "tests.toy:Bright", str(tmp_path), "--prompt", "a")
        assert "broken.png cannot be read as a picture" in text


def test_evaluate_base(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A base is judged by itself, and a folder that is no run is refused."""
    folder = tmp_path / "base"
    main(["evaluate", "--base", "--pipeline", "tests.runworld:pipeline", "--reward", "tests.runworld:Strict",
          "--prompts", str(tmp_path / "p.jsonl"), "--evaluation.images", "20", "--output", str(folder)])  # fmt: skip
    assert json.loads(capsys.readouterr().out)["light"]["images"] == 20 and (folder / "before.pt").is_file()
    assert "holds no run" in fails(capsys, "evaluate", str(tmp_path / "nothing"))
    assert "holds no run" in fails(capsys, "report", str(tmp_path / "nothing"))
