"""One seeded, resumable trainer for all worlds: AdamW with a cosine, an average of the weights, a checkpoint, a bar.

A world is a :class:`World`: what it builds, which parts are trained in which order (:class:`Stage`), and the loss of
one batch drawn on the fly. Runs on the CPU or a GPU unchanged; bf16 autocast, and the mathematical attention kernel,
whose backward pass is the fast one on a CPU.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from flowalign import checkpoint
from flowalign.pipelines.worlds import store

__all__ = ["Stage", "World", "train"]

EVERY = 1000  # steps between checkpoints
Loss = Callable[[Any, torch.Generator], Tensor]


@dataclass(frozen=True)
class Stage:
    """One part of a world's training.

    Attributes:
        name: of the stage.
        modules: pipeline → the modules trained.
        loss: ``(pipeline, generator) → scalar``; draws its own batch on the generator's device.
        steps: optimiser steps.
        lr: peak learning rate.
        after: called with the pipeline when the averaged weights are in place.
        decay: of the averaged weights.
        before: called with the pipeline when the stage begins, e.g. to keep a copy as a teacher. Such a stage has no
            checkpoint within it, so that a resumed run begins it again, from the same teacher.
        until: share of the steps that are done; below 1 the next stage takes over before the cosine has fallen.
    """

    name: str
    modules: Callable[[Any], list[nn.Module]]
    loss: Loss
    steps: int
    lr: float = 1.5e-3
    after: Callable[[Any, torch.Generator], None] | None = None
    decay: float = 0.999
    until: float = 1.0
    before: Callable[[Any], None] | None = None


@dataclass(frozen=True)
class World:
    """A demo model of our own.

    Attributes:
        name: as the command line calls it.
        summary: one line.
        build: an untrained diffusers pipeline of stock components.
        stages: in order.
    """

    name: str
    summary: str
    build: Callable[[], DiffusionPipeline]
    stages: tuple[Stage, ...]


def train(
    world: World, out: Path, *, seed: int = 0, device: str = "cpu", resume: bool = True, shorten: float = 1.0
) -> DiffusionPipeline:
    """Train a world and save its pipeline to ``out``.

    Args:
        world: what to train.
        out: folder of the pipeline; checkpoints go to ``out/../NAME.checkpoints``.
        seed: of weights, data, times and noises.
        device: where to train.
        resume: continue from the newest checkpoint.
        shorten: fraction of the steps to do, for tests.
    """
    torch.manual_seed(seed)
    pipe = world.build().to(device)
    folder = out.parent / f"{world.name}.checkpoints"
    log: dict[str, Any] = {"seed": seed, "device": device, "torch": str(torch.__version__), "stages": {}}
    done = -1
    state = None
    if resume and (path := checkpoint.latest(folder)) is not None:
        state = checkpoint.load(path)
        done, log = state["stage"] - 1, state["log"]
        _load(pipe, state["components"])
        for k, config in state.get("configs", {}).items():
            pipe.components[k].register_to_config(**config)
    for i, stage in enumerate(world.stages):
        if i <= done:
            if stage.after is not None:  # what it sets (a scale in a config) is in no state_dict
                stage.after(pipe, torch.Generator(device).manual_seed(mixed(seed, i)))
            continue
        start, seconds = time.perf_counter(), log["stages"].get(stage.name, {}).get("seconds", 0.0)
        steps = max(1, round(stage.steps * shorten))  # of the cosine

        def save(
            inner: dict[str, Any], i: int = i, stage: Stage = stage, start: float = start, seconds: float = seconds
        ) -> None:
            log["stages"][stage.name] = {
                "steps": inner.get("step", 0),
                "seconds": seconds + time.perf_counter() - start,
            }
            number = i * 1_000_000 + inner.get("step", 0)
            checkpoint.save(
                folder,
                number,
                {"stage": i, "log": log, "components": _components(pipe), "configs": _configs(pipe), "inner": inner},
            )

        inner = state.get("inner") if state is not None and state["stage"] == i else None
        if stage.before is not None:
            stage.before(pipe)
        last = _run(pipe, stage, steps, mixed(seed, i), device, inner, save)
        log["stages"][stage.name] = {
            "steps": _done(stage, steps),
            "seconds": round(seconds + time.perf_counter() - start, 1),
            "loss": round(last, 5),
        }
        state = None
        finished = {"stage": i + 1, "log": log, "components": _components(pipe), "configs": _configs(pipe)}
        checkpoint.save(folder, (i + 1) * 1_000_000, finished)
    store.save(pipe, out)
    (out / "training.json").write_text(json.dumps(log, indent=1) + "\n")
    return pipe


def mixed(seed: int, stage: int) -> int:
    """Return the data seed of a stage."""
    return 1000 * seed + stage + 1


def _components(pipe: Any) -> dict[str, dict[str, Tensor]]:
    return {k: m.state_dict() for k, m in pipe.components.items() if isinstance(m, nn.Module)}


def _configs(pipe: Any) -> dict[str, dict[str, float]]:
    """Return what a stage may have written into the autoencoder's configuration: the scale of its latents."""
    keys = ("shift_factor", "scaling_factor")
    nets = {k: m for k, m in pipe.components.items() if isinstance(m, ConfigMixin) and isinstance(m, nn.Module)}
    found: dict[str, Any] = {k: m.config for k, m in nets.items()}
    return {k: {x: c[x] for x in keys if c.get(x) is not None} for k, c in found.items() if any(x in c for x in keys)}


def _load(pipe: Any, state: dict[str, dict[str, Tensor]]) -> None:
    for k, s in state.items():
        pipe.components[k].load_state_dict(s)


def _run(
    pipe: Any, stage: Stage, steps: int, seed: int, device: str, inner: dict[str, Any] | None,
    save: Callable[[dict[str, Any]], None],
) -> float:  # fmt: skip
    """Run one stage; leave the averaged weights in the pipeline; return the mean of the last losses."""
    modules = stage.modules(pipe)
    parameters = [p for m in modules for p in m.parameters()]
    for m in modules:
        m.train().requires_grad_(True)
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=stage.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    first, g = 0, torch.Generator(device)
    if inner is not None:
        first = int(inner["step"])
        for a, s in zip(average, inner["average"], strict=True):
            a.copy_(s)
        optimizer.load_state_dict(inner["optimizer"])
    recent: list[float] = []
    for step in _bar(stage.name, first, _done(stage, steps), recent):
        g.manual_seed(seed * 1_000_003 + step)  # a step's data depend on its number alone: resuming changes nothing
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.autocast(torch.device(device).type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            loss = stage.loss(pipe, g)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rate = min(stage.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - rate)
        if step % 50 == 0:
            recent[:] = [*recent[-9:], float(loss.detach())]
        if (step + 1) % EVERY == 0 and step + 1 < steps and stage.before is None:
            save({"step": step + 1, "average": average, "optimizer": optimizer.state_dict()})
    _settle(modules, parameters, average)
    if stage.after is not None:
        stage.after(pipe, g.manual_seed(seed))
    return sum(recent) / max(len(recent), 1)


def _done(stage: Stage, steps: int) -> int:
    """Return how many of the cosine's steps the stage does."""
    return max(1, round(steps * stage.until))


@torch.no_grad()
def _settle(modules: list[nn.Module], parameters: list[nn.Parameter], average: list[Tensor]) -> None:
    """Put the averaged weights in place and freeze them."""
    for p, a in zip(parameters, average, strict=True):
        p.copy_(a)
    for m in modules:
        m.eval().requires_grad_(False)


def _bar(name: str, first: int, steps: int, recent: list[float]) -> Iterator[int]:
    with tqdm(total=steps, initial=first, desc=name, mininterval=2.0) as bar:
        for step in range(first, steps):
            yield step
            bar.update()
            if recent and step % 50 == 0:
                bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}")
