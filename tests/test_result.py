"""The result of a run on the demo world loads into plain diffusers, without flowalign, and makes the same pictures."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from flowalign.config import default
from flowalign.evaluate import Outcome
from flowalign.folder import Folder
from flowalign.judge_run import again
from flowalign.noise import Noise, mix
from flowalign.prepare import Lora
from flowalign.prompts import read_prompts
from flowalign.run import train
from flowalign.source import text_key
from flowalign.trajectory import ranks

# what a user runs: the code of the card, where the import of flowalign fails; then its own call from given noises
PLAIN = """
import ast, sys
sys.modules["flowalign"] = None
import torch
import yaml
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
card, work = sys.argv[1:]
code = open(card).read().split("```python")[1].split("```")[0]
exec(code)
call = next(n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "pipe")
settings = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg != "prompt"}
assert out.images[0].size == (32, 32)
pipe.set_progress_bar_config(disable=True)
noise = load_file(work + "/noise.safetensors")["noise"]
prompts = open(work + "/prompts.txt").read().split(chr(10))
out = pipe(prompts, latents=noise, output_type="pt", **settings).images
save_file({"images": out.float().contiguous()}, work + "/images.safetensors")
"""


@pytest.mark.parametrize("lora", [None, Lora(rank=2, alpha=4)], ids=["full", "lora"])
def test_plain_diffusers_reproduces(lora: Lora | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures by plain diffusers, from the evaluation's own noises, are those that were judged; so are the figures."""
    monkeypatch.setattr("flowalign.report.write_report", lambda folders, path: path)
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "three cyan circles", "category": "count"}\n{"prompt": "a red square", "category": "single"}\n'
    )
    base = default("diffusion-nft")
    config = replace(
        base, reward="shapes-clip", lora=lora, prompts=str(tmp_path / "p.jsonl"), output=tmp_path / "run", trackers=(),
        device="cpu", ema=None,
        fit=replace(base.fit, iterations=1, groups=1, size=4, steps=4, batch=8, lr=2e-2, warmup=0),
        evaluation=replace(base.evaluation, images=4, steps=4, prompts=str(tmp_path / "p.jsonl")),
    )  # fmt: skip
    summary = train(config, progress=False)
    folder = Folder(config.folder)
    spelled = yaml.safe_load((folder.path / "resolved.yaml").read_text())
    assert spelled["call"] == {"guidance_scale": 1.0} and spelled["device"] == "cpu"
    assert spelled["evaluation"]["layouts"] == "flowalign.layouts:shapes"
    assert summary["config"]["call.guidance_scale"] == 1.0 and folder.config() == config
    before, after = (Outcome.recall(folder.recall(n)) for n in ("before.pt", "after.pt"))
    assert (before.pictures - after.pictures).abs().max() > 0.05, "the run changed nothing that could be lost"

    prompts, slot = read_prompts(config.prompts), ranks(after.row)
    texts = [prompts[int(after.row[i])].text for i in after.shown]
    keys = tuple(mix(text_key(t), int(slot[i])) for t, i in zip(texts, after.shown, strict=True))
    alone = torch.arange(len(keys))
    noise = Noise(config.evaluation.seed, keys).normal(-1, alone, torch.zeros_like(alone), after.x0.shape[1:])
    save_file({"noise": noise}, tmp_path / "noise.safetensors")
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    command = [sys.executable, "-c", PLAIN, str(folder.path / "result/README.md"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    images = load_file(tmp_path / "images.safetensors")["images"]
    # the shipped denoiser and the saved one may differ by rounding to the stored precision, not more
    assert (images - after.pictures).abs().max() < 2e-3
    for name, c in again(folder)["accuracy"].items():
        assert c["after"] == pytest.approx(summary["accuracy"][name]["after"])
