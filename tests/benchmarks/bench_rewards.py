"""Images per second of each reward at batch 1 and 64, and what asynchronous scoring saves.

    python tests/benchmarks/bench_rewards.py [--size 512] [--seconds 2] [--real] [--device cpu] [--json out.json]

Networks have random weights of the *published* sizes with ``--real`` (a GPU and tens of GB are then in order for the
largest), and tiny ones otherwise, which shows the cost of everything but the network: checks, resizing, tokenizing.
The overlap is measured on a real kernel: a rollout of matrix products and a tiny CLIP judge, one after the other and
with :class:`~flowalign.rewards.asynchronous.Asynchronous`, and against a judge behind HTTP.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "rewards"))
from flowalign.rewards.asynchronous import Asynchronous
from tiny_judges import (
    aesthetic_head,
    bert_vocab,
    dino,
    hf_clip,
    hps3_checkpoint,
    hps_checkpoint,
    image_reward,
    iresnet,
    qwen_base,
)

from flowalign.protocols import Reward
from flowalign.rewards.aesthetic import Aesthetic
from flowalign.rewards.clip import HFClipScore
from flowalign.rewards.dino import DinoSimilarity
from flowalign.rewards.discriminator import Discriminator
from flowalign.rewards.face import FaceIdentity
from flowalign.rewards.hps import HPS, HPSCrop
from flowalign.rewards.hps3 import HPS3
from flowalign.rewards.imagereward import ImageReward
from flowalign.rewards.jpeg import Compressibility
from flowalign.rewards.ocr import OCR
from flowalign.rewards.pickscore import PickScore
from flowalign.rewards.quality import ClipIqa, FullReference, Smoothness


def judges(home: Path) -> dict[str, Callable[[], Reward]]:
    """Return makers of each reward on tiny networks of the published layout."""
    clip, vit, hps = hf_clip(home / "clip"), dino(home / "dino"), hps_checkpoint(home / "HPS_v2.1_compressed.pt")
    base, config, vocab = qwen_base(home / "qwen")
    weights = hps3_checkpoint(home / "HPSv3.safetensors", config, vocab + 1)
    pool = torch.nn.functional.normalize(torch.randn(3, 16), dim=-1)
    return {
        "clip-hf": lambda: HFClipScore(clip),
        "pickscore": lambda: PickScore(clip),
        "hps": lambda: HPS(hps, model="flowalign-tiny"),
        "hps-crop": lambda: HPSCrop(hps, model="flowalign-tiny"),
        "aesthetic": lambda: Aesthetic(aesthetic_head(home / "a.pth"), clip),
        "imagereward": lambda: ImageReward(image_reward(home / "IR.pt", 160), bert_vocab(home / "bert"), head_dim=8),
        "hps3": lambda: HPS3(
            weights, base, instruction="Rate {text_prompt}: <|Reward|>", pixels=56 * 56, dtype=torch.float32
        ),
        "dino": lambda: DinoSimilarity(vit, torch.rand(3, 3, 30, 30), size=28),
        "dino-adversarial": lambda: Discriminator(vit, size=28),
        "clip-iqa": lambda: ClipIqa(clip),
        "face": lambda: FaceIdentity(iresnet(home / "backbone.pth"), pool, aligned=True),
        "psnr": lambda: FullReference("psnr"),
        "ssim": lambda: FullReference("ssim"),
        "smoothness": Smoothness,
        "compressibility": Compressibility,
        "ocr": OCR,
    }


def real(device: str) -> dict[str, Callable[[], Reward]]:
    """Return two-tower rewards on networks of the published size, randomly initialised: speed does not ask for more."""
    import open_clip

    from flowalign.rewards.clip import ClipScore
    from flowalign.rewards.towers import OpenClipTower

    def tower(name: str) -> ClipScore:
        model = open_clip.create_model(name, load_weights=False)
        return ClipScore(OpenClipTower(model, open_clip.get_tokenizer(name))).to(device)

    return {f"clip {name}": lambda n=name: tower(n) for name in ("ViT-L-14", "ViT-H-14")}


def rate(reward: Reward, batch: int, size: int, seconds: float, device: str) -> float:
    """Return images per second, after one call to warm up."""
    x = torch.rand(batch, 3, size, size, device=device)
    prompts = [f'a sign "a {i % 8}"' for i in range(batch)]
    meta = [{"reference": v} for v in torch.rand(batch, 3, size, size, device=device)]
    done, start = 0, 0.0
    with torch.no_grad():
        reward(x, prompts, meta)
        start = time.perf_counter()
        while done == 0 or time.perf_counter() - start < seconds:
            reward(x, prompts, meta)
            done += batch
            if device != "cpu":
                torch.cuda.synchronize()
    return done / (time.perf_counter() - start)


class Distant:
    """A reward whose work is done elsewhere: waits as long as a network and a busy GPU would."""

    def __init__(self, reward: Reward, seconds: float) -> None:
        self.reward, self.seconds, self.card = reward, seconds, reward.card

    def __call__(self, media, prompts, meta=None):
        time.sleep(self.seconds)
        return self.reward(media, prompts, meta)


def overlap(reward: Reward, seconds: float, rounds: int = 8) -> dict[str, float]:
    """Return seconds of ``rounds`` rollouts of ``seconds`` each with scoring in turn and overlapped."""
    x, prompts, m = torch.rand(16, 3, 64, 64), ["a cat"] * 16, torch.rand(128, 128)

    def rollout() -> torch.Tensor:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            m @ m
        return x

    reward(x, prompts)
    start = time.perf_counter()
    for _ in range(rounds):
        reward(rollout(), prompts)
    apart = time.perf_counter() - start
    start = time.perf_counter()
    with Asynchronous(reward) as judge:
        for future in [judge.submit(rollout(), prompts) for _ in range(rounds)]:
            future.result()
    return {"in turn": apart, "overlapped": time.perf_counter() - start}


def remote(reward: Reward):
    """Return the reward behind HTTP on this machine."""
    import socket

    import uvicorn

    from flowalign.rewards.remote import RemoteReward
    from flowalign.rewards.serve import make_app

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(make_app(reward), host="127.0.0.1", port=port, log_level="critical"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    return RemoteReward(f"http://127.0.0.1:{port}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--size", type=int, default=512)
    options.add_argument("--seconds", type=float, default=1.0)
    options.add_argument("--device", default="cpu")
    options.add_argument("--real", action="store_true")
    options.add_argument("--json")
    o = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        makers = judges(Path(folder))
        if o.real:
            makers = {**makers, **real(o.device)}
        for name, make in makers.items():
            reward = make()
            if isinstance(reward, torch.nn.Module):
                reward.to(o.device)
            table[name] = {f"batch {b}": rate(reward, b, o.size, o.seconds, o.device) for b in (1, 64) if name != "ocr"}
            if name == "ocr":
                table[name] = {"batch 1": rate(reward, 1, min(o.size, 128), o.seconds, o.device)}
            print(f"{name:20}" + "".join(f"{k}: {v:9.1f} images/s   " for k, v in table[name].items()), flush=True)
        clip = makers["clip-hf"]()
        far = remote(clip)
        table["clip-hf over HTTP"] = {f"batch {b}": rate(far, b, o.size, o.seconds, "cpu") for b in (1, 64)}
        table["overlap, judge elsewhere (.25 s)"] = overlap(Distant(clip, 0.25), 0.25)
        table["overlap, judge on this CPU"] = overlap(clip, 0.05)
    for name in list(table)[-3:]:
        print(f"{name:36}" + "".join(f"{k}: {v:8.2f}   " for k, v in table[name].items()))
    if o.json:
        Path(o.json).write_text(json.dumps({"options": vars(o), "results": table}, indent=2))


if __name__ == "__main__":
    main()
