"""Peak bytes of reward backpropagation: rollout, decoder and reward apart, with and without recomputation.

    python -m tests.benchmarks.bench_memory            tiny random pipelines on the CPU: which way each part grows
    python -m tests.benchmarks.bench_memory --demo     the demo model ``shapes`` too

Rollout: K taped steps of two samples and their backward pass. Decoder and reward: one forward and backward pass of two
samples. "Recomputed" puts each under a gradient checkpoint: every network call, and every sample's decoding; "by frame"
every frame's, where the autoencoder makes each frame by itself. Live bytes above those before (:mod:`flowalign.meter`);
on a GPU the same figures come from its allocator.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowalign.kernels import EulerMaruyama
from flowalign.meter import Meter
from flowalign.noise import Noise
from flowalign.pipelines import load
from flowalign.prepare import Lora, prepare
from flowalign.rollout import Tape, rollout
from flowalign.trajectory import Nodes
from tests.zoo import build

HEAD = (
    "| pipeline | what varies | rollout | recomputed | decode | recomputed | by frame | reward | recomputed |\n"
    + "|---" * 9
    + "|"
)


class Clip(nn.Module):
    """The image tower of the small CLIP with random weights: it looks at 32 × 32 pixels whatever comes."""

    def __init__(self) -> None:
        super().__init__()
        from flowalign.rewards.shapes_clip import build as build_clip

        torch.manual_seed(0)
        self.model: Any = build_clip().requires_grad_(False)

    def forward(self, media: Tensor) -> Tensor:
        frames = media.flatten(0, 1) if media.ndim == 5 else media
        small = nn.functional.interpolate(frames, (32, 32), mode="bilinear", antialias=True)
        return self.model.encode_image(2 * small - 1, normalize=True).sum()


def peak(run: Callable[[Tensor], Tensor], x: Tensor, parameters: list[nn.Parameter]) -> float:
    """Return the peak of a forward and backward pass, after one that is not counted, in megabytes."""
    for measured in (False, True):
        leaf = x.detach().requires_grad_()
        with Meter(x.device) as meter:
            torch.autograd.grad(run(leaf).sum(), [leaf, *parameters], allow_unused=True)
        if measured:
            return meter.peak / 1e6
    raise AssertionError


def opened(name: str, device: str, **call: Any) -> Any:
    """Return a pipeline of the zoo, or the demo world."""
    if name == "shapes":
        from flowalign.build import open_pipeline

        return open_pipeline("shapes", call, [False], torch.device(device))[0]
    case = build(name)
    case.pipe.set_progress_bar_config(disable=True)
    inputs = {k: v for k, v in case.inputs.items() if k not in ("prompt", "guidance_scale_2")}
    return load(case.pipe.to(device), inputs | call, guided=False, check=False)


def row(name: str, what: str, steps: int, device: str, **call: Any) -> str:
    """Measure one line of the table."""
    pipe = opened(name, device, **call)
    policy, parameters = prepare(pipe, Lora(rank=2, alpha=2))
    cond = pipe.encode(["a red circle"] * 2)
    x = torch.randn(2, *pipe.shape(cond)).to(device)
    times = pipe.times(steps)
    clip = Clip().to(device)

    def sample(x: Tensor, again: bool) -> Tensor:
        start = Nodes.enter(pipe.start(x, float(times[0]), cond))
        return rollout(
            policy, EulerMaruyama(), times, start, cond, noise=Noise(0), tape=Tape(0, checkpoint=again)
        ).leaves.x

    def decode(x: Tensor, again: bool) -> Tensor:
        return pipe.decode(x, cond, chunk=1 if again else None, checkpoint=again)

    def judge(media: Tensor, again: bool) -> Tensor:
        if not again:
            return clip(media)
        return torch.stack([checkpoint(clip, m[None], use_reentrant=False) for m in media]).sum()

    def framed(x: Tensor) -> Tensor:
        return torch.cat([pipe.decode(x, cond, frames=[f], checkpoint=True) for f in range(pipe.frames_apart(cond))], 1)

    with torch.no_grad():
        media = pipe.decode(x, cond)
    parts = [(sample, x, parameters), (decode, x, []), (judge, media, [])]
    figures = [peak(partial(f, again=again), z, p) for f, z, p in parts for again in (False, True)]
    cells = [f"{v:.2f}" for v in figures]
    cells.insert(4, f"{peak(framed, x, []):.2f}" if pipe.frames_apart(cond) > 1 else "-")
    return f"| {name} | {what} | " + " | ".join(cells) + " |"


def rows(device: str, demo: bool) -> Iterator[str]:
    """Yield the table's lines."""
    for steps in (1, 2, 4, 8):
        yield row("StableDiffusion3", f"K = {steps}, 32 px", steps, device, height=32, width=32)
    for side in (16, 24):
        yield row("StableDiffusion3", f"K = 2, {side} px", 2, device, height=side, width=side)
    for frames in (2, 4, 8):
        yield row("AnimateDiff", f"K = 2, {frames} frames", 2, device, num_frames=frames)
    for frames in (5, 9):
        yield row("Wan", f"K = 2, {frames} frames", 2, device, num_frames=frames)
    for steps in (1, 4, 10) if demo else ():
        yield row("shapes", f"K = {steps}", steps, device)


def main() -> None:
    """Print the table as it is made."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--demo", action="store_true")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    torch.set_num_threads(1)
    print(HEAD)
    for line in rows(args.device, args.demo):
        print(line, flush=True)


if __name__ == "__main__":
    main()
