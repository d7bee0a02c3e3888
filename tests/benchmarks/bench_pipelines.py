"""What the adapter costs: its ODE rollout against ``pipe(...)``, both in one run, alternating.

    python -m tests.benchmarks.bench_pipelines            CPU: tiny SD3 and Wan at batch 2, the demo model at batch 64
    python -m tests.benchmarks.bench_pipelines --demo     the demo model alone
    python -m tests.benchmarks.bench_pipelines --gpu      random SD3.5-medium-sized and Wan-1.3B-sized models, bf16

Targets: at most 2 ms more per step on the tiny models, 1.05x on the demo model at batch 64; 1.02x and equal peak memory
(within 2 %) on a GPU. The median of paired differences is reported, in processor time on CPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import diffusers
import torch

from flowalign.pipelines import Handover, load
from flowalign.pipelines.worlds import path
from tests.pipelines.contract import split
from tests.zoo import build


@dataclass(frozen=True)
class Result:
    """Medians of one comparison."""

    name: str
    steps: int
    stock_ms: float  # per step
    ours_ms: float
    extra_ms: float  # median of paired differences, per step
    peak: float | None = None  # ours over theirs

    def row(self) -> str:
        ratio = 1 + self.extra_ms / self.stock_ms
        memory = "-" if self.peak is None else f"{self.peak:.3f}"
        return (
            f"| {self.name} | {self.steps} | {self.stock_ms:.2f} | {self.ours_ms:.2f} | {self.extra_ms:+.2f} | "
            f"{ratio:.3f} | {memory} |"
        )


HEAD = "| model | steps | pipe ms | ours ms | extra ms | ratio | peak memory |\n|---|---|---|---|---|---|---|"


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Return milliseconds (of the processor on CPU, of the wall on a GPU) and peak bytes."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    clock = time.perf_counter if cuda else time.process_time
    begin = clock()
    run()
    if cuda:
        torch.cuda.synchronize()
    return 1e3 * (clock() - begin), float(torch.cuda.max_memory_allocated()) if cuda else 0.0


def compare(
    name: str, pipe: Any, call: dict[str, Any], prompts: list[str], meta: dict[str, Any], steps: int, repeats: int
) -> Result:
    """Time both, alternating, after one warm-up of each."""
    pipe.set_progress_bar_config(disable=True)
    generator = load(pipe, call, check=False)
    cond = generator.encode(prompts, [meta] * len(prompts))
    times = generator.times(steps, cond).tolist()
    kernel = Handover(generator)
    noise = torch.randn(len(prompts), *generator.shape(cond)).to(generator.device())
    arguments = {
        **generator.arguments(cond.rows, True, steps, "latent"),
        "generator": torch.Generator().manual_seed(0),
    }

    @torch.no_grad()
    def ours() -> None:
        x, carry = generator.start(noise, times[0], cond), None
        for t, s in pairwise(times):
            law, carry = kernel(x, generator.posterior(x, t, cond), t, s, carry)
            x = law.mean

    def theirs() -> None:
        pipe(**arguments)

    ours(), theirs()
    stock, mine, peaks = [], [], []
    for _ in range(repeats):
        a, theirs_peak = timed(theirs)
        b, ours_peak = timed(ours)
        stock.append(a / steps)
        mine.append(b / steps)
        peaks.append(ours_peak / theirs_peak if theirs_peak else 0.0)
    extra = statistics.median(b - a for a, b in zip(stock, mine, strict=True))
    peak = statistics.median(peaks) if torch.cuda.is_available() else None
    return Result(name, steps, statistics.median(stock), statistics.median(mine), extra, peak)


def tiny(repeats: int) -> list[Result]:
    """The tiny SD3 and Wan of the zoo at batch 2."""
    rows = []
    for name in ("StableDiffusion3", "Wan"):
        case = build(name)
        prompt, meta, call = split(case.inputs)
        rows.append(compare(f"tiny {name}", case.pipe, call, [prompt, prompt], meta, 20, repeats))
    return rows


def demo(repeats: int) -> list[Result]:
    """The demo model that the repository ships, at batch 64."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(path("shapes"))
    prompts = ["a red circle", "two blue squares", "a green circle above a red square", "three cyan triangles"] * 16
    return [compare("demo shapes, batch 64", pipe, {}, prompts, {}, 10, max(repeats // 3, 3))]


def large(repeats: int) -> list[Result]:
    """SD3.5-medium-sized and Wan-1.3B-sized networks with random weights in bf16, around the tiny text encoders."""
    rows = []
    for name, network, size in (("StableDiffusion3", sd35_medium, 1024), ("Wan", wan_13b, 480)):
        case = build(name)
        pipe, old = case.pipe, case.pipe.transformer
        torch.manual_seed(0)
        with torch.device("cuda"):
            pipe.transformer = network(old)
        pipe.to("cuda", torch.bfloat16)
        prompt, meta, call = split(case.inputs)
        scale = size // 16  # the tiny autoencoders compress less: ask for the latents of the real resolution
        factor = getattr(pipe, "vae_scale_factor", None) or pipe.vae_scale_factor_spatial
        call |= {"height": scale * 2 * factor, "width": scale * 2 * factor}
        if name == "Wan":
            call |= {"num_frames": 17}
        rows.append(compare(f"{name} ({size} px)", pipe, call, [prompt], meta, 10, repeats))
        del pipe, case
        torch.cuda.empty_cache()
    return rows


def sd35_medium(tiny: Any) -> Any:
    """24 layers of width 1536 with dual attention in the first 13 (2.2 B parameters)."""
    config = dict(tiny.config) | {
        "num_layers": 24,
        "num_attention_heads": 24,
        "attention_head_dim": 64,
        "caption_projection_dim": 1536,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
        "pos_embed_max_size": 192,
        "sample_size": 128,
    }
    return type(tiny).from_config(config)


def wan_13b(tiny: Any) -> Any:
    """30 layers of width 1536 (1.3 B parameters)."""
    config = dict(tiny.config) | {
        "num_layers": 30,
        "num_attention_heads": 12,
        "attention_head_dim": 128,
        "ffn_dim": 8960,
        "freq_dim": 256,
        "rope_max_seq_len": 1024,
    }
    return type(tiny).from_config(config)


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--demo", action="store_true", help="the demo model alone")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1 if not options.gpu else torch.get_num_threads())
    if options.gpu:
        rows = large(options.repeats)
    else:
        rows = ([] if options.demo else tiny(options.repeats)) + demo(options.repeats)
    print(f"load {', '.join(f'{load:.1f}' for load in os.getloadavg())} on {os.cpu_count()} cores")
    print(f"diffusers {diffusers.__version__}, torch {torch.__version__}")
    print(HEAD)
    for row in rows:
        print(row.row())


if __name__ == "__main__":
    main()
