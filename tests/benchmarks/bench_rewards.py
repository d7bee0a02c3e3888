"""Images per second of each reward at batch 1 and 64, and what asynchronous scoring saves.

    python tests/benchmarks/bench_rewards.py [--size 512] [--seconds 1] [--only NAME ...] [--real] [--device cpu]

Networks have random weights of the *published* sizes with ``--real`` (a GPU and tens of GB are then in order for the
largest), and tiny ones otherwise, which shows the cost of everything but the network: checks, resizing, tokenizing.
The overlap is measured in the training loop itself (``FitOptions.overlap``), on a toy generator that keeps the
processor busy and a judge that waits elsewhere, or works on the same processor; the variants take turns, so that
whatever else the machine does touches all alike.
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
sys.path.insert(0, str(Path(__file__).parents[2]))
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

from flowalign.fit import fit
from flowalign.kernels import EulerMaruyama
from flowalign.laws import FlowGrpo
from flowalign.objectives import Clip
from flowalign.options import FitOptions
from flowalign.prepare import prepare
from flowalign.protocols import Reward
from flowalign.recipe import Recipe
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
from flowalign.scorer import Scorer
from flowalign.source import Prompts
from tests.toy import Toy


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
    """Return images per second, after one call to warm up.

    On a CPU the seconds are those of the process on its one thread, so that a busy machine tells the truth too.
    """
    clock = time.process_time if device == "cpu" else time.perf_counter
    x = torch.rand(batch, 3, size, size, device=device)
    prompts = [f'a sign "a {i % 8}"' for i in range(batch)]
    meta = [{"reference": v} for v in torch.rand(batch, 3, size, size, device=device)]
    done = 0
    with torch.no_grad():
        reward(x, prompts, meta)
        start = clock()
        while done == 0 or clock() - start < seconds:
            reward(x, prompts, meta)
            done += batch
            if device != "cpu":
                torch.cuda.synchronize()
    return done / (clock() - start)


class Distant:
    """A reward whose work is done elsewhere: waits as long as a network and a busy GPU would, by the sample."""

    def __init__(self, reward: Reward, seconds: float) -> None:
        self.reward, self.seconds, self.card = reward, seconds, reward.card

    def __call__(self, media, prompts, meta=None):
        time.sleep(self.seconds * len(media))
        return self.reward(media, prompts, meta)


class Busy(Toy):
    """The toy generator, as slow as one whose network takes ``seconds`` per sample and step."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.m = seconds, torch.rand(64, 64)

    def posterior(self, x, t, cond):
        end = time.perf_counter() + self.seconds * len(x)
        while time.perf_counter() < end and not torch.is_grad_enabled():  # the update costs what it costs
            _ = self.m @ self.m
        return super().posterior(x, t, cond)


def overlap(judge: Reward, parts: int, seconds: float) -> float:
    """Return the seconds of one iteration of the training loop (the second of two), scoring in ``parts`` parts."""
    toy, kernel = Busy(seconds), EulerMaruyama(FlowGrpo(0.7))
    recipe, o = Recipe(kernel, Clip(kernel, 1e-2)), FitOptions(2, groups=8, size=8, steps=8, batch=512, overlap=parts)
    policy, parameters = prepare(toy, None)
    stream = fit(toy, Scorer(toy, {"r": judge}), Prompts(["a"]), recipe, o, policy=policy, parameters=parameters)
    next(stream)
    began = time.perf_counter()
    next(stream)
    return time.perf_counter() - began


def overlaps(judge: Reward, seconds: float, rounds: int = 5) -> dict[str, float]:
    """Return median seconds of an iteration scored at the end and in parts, taken in turn, and their ratio."""
    found: dict[int, list[float]] = {1: [], 2: [], 4: [], 8: []}
    for _ in range(rounds):
        for parts, times in found.items():
            times.append(overlap(judge, parts, seconds))
    middle = {parts: sorted(times)[len(times) // 2] for parts, times in found.items()}
    return {f"{parts} parts": s for parts, s in middle.items()} | {"gain": middle[1] / min(middle.values())}


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
    options.add_argument("--only", nargs="*", help="rewards to time; `overlap` for the loop; all when left out")
    options.add_argument("--json")
    o = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        makers = judges(Path(folder))
        if o.real:
            makers = {**makers, **real(o.device)}
        chosen = o.only or [*makers, "overlap"]
        for name, make in ((n, m) for n, m in makers.items() if n in chosen):
            reward = make()
            if isinstance(reward, torch.nn.Module):
                reward.to(o.device)
            table[name] = {f"batch {b}": rate(reward, b, o.size, o.seconds, o.device) for b in (1, 64) if name != "ocr"}
            if name == "ocr":
                table[name] = {"batch 1": rate(reward, 1, min(o.size, 128), o.seconds, o.device)}
            print(f"{name:20}" + "".join(f"{k}: {v:9.1f} images/s   " for k, v in table[name].items()), flush=True)
        if "overlap" in chosen:
            clip = makers["clip-hf"]()
            far = remote(clip)
            table["clip-hf over HTTP"] = {f"batch {b}": rate(far, b, o.size, o.seconds, "cpu") for b in (1, 64)}
            table["iteration, judge elsewhere"] = overlaps(Distant(clip, 0.01), 0.00125)
            table["iteration, judge on this CPU"] = overlaps(clip, 0.00125)
            for name in list(table)[-3:]:
                print(f"{name:36}" + "".join(f"{k}: {v:8.2f}   " for k, v in table[name].items()))
    if o.json:
        Path(o.json).write_text(json.dumps({"options": vars(o), "results": table}, indent=2))


if __name__ == "__main__":
    main()
