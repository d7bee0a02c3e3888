"""What a training run takes, measured: bytes of a step, of the decoder and of the rewards, for one and two samples.

A probe runs each part forward and backward and looks at what it keeps and needs (:mod:`flowalign.meter`); bytes are
affine in the samples, so two sizes tell all. What is made of the figures: :mod:`flowalign.memory_plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_checkpointed

from flowalign.collect import Collector, enter
from flowalign.meter import Meter, tensor_bytes
from flowalign.noise import Noise
from flowalign.policy import Weights
from flowalign.rollout import Tape, rollout
from flowalign.source import Draw
from flowalign.trajectory import Nodes

__all__ = ["Costs", "Line", "Stage", "probe"]


@dataclass(frozen=True)
class Line:
    """Bytes that are affine in the number of samples: ``base + each·n``."""

    base: float
    each: float

    @classmethod
    def through(cls, one: float, two: float) -> Line:
        """Return the line through the bytes of one and two samples; it never falls."""
        each = max(two - one, 0.0)
        return cls(max(one - each, 0.0), each)

    def __call__(self, n: int) -> float:
        """Return the bytes of n samples, none of none."""
        return self.base + self.each * n if n else 0.0


@dataclass(frozen=True)
class Stage:
    """What one part of the way needs.

    Attributes:
        kept: held for the backward pass, results included.
        forward: most that is alive while it runs with gradients.
        backward: most that is alive in its backward pass, what it holds included.
        silent: most that is alive while it runs without gradients.
    """

    kept: Line
    forward: Line
    backward: Line
    silent: Line


@dataclass(frozen=True)
class Costs:
    """What was measured.

    Attributes:
        step: one sampling step.
        light: the same under a checkpoint: what is kept between forward and backward pass.
        decode: states to media.
        reward: media to scores.
        tail: both.
        again: both under a checkpoint.
        framed: both, every frame of a video decoded by itself and again in the backward pass; None where frames of a
            clip cannot be decoded apart.
        framed_again: the same under a checkpoint besides.
        state: one level of a trajectory without its graph.
        fixed: weights, their copies in other roles, gradients and optimiser.
        gradients: of the trained weights; part of ``fixed`` and of every step's backward pass.
    """

    step: Stage
    light: Stage
    decode: Stage
    reward: Stage
    tail: Stage
    again: Stage
    state: Line
    fixed: float
    gradients: float
    framed: Stage | None = None
    framed_again: Stage | None = None


def probe(collector: Collector, draw: Draw, parameters: list[nn.Parameter]) -> Costs:
    """Measure one step, decoder and rewards on one and two samples of a draw of two.

    Raises:
        ValueError: where the draw is smaller.
    """
    if int(draw.samples.sum()) < 2:
        raise ValueError("a memory probe needs a draw of two samples.")
    judge, device = collector.bind(draw), parameters[0].device
    rows = torch.arange(len(draw.prompts)).repeat_interleave(draw.samples)[:2]
    times = collector.recipe.grid(collector.pipeline.times(collector.steps))
    noise = Noise(collector.seed, draw.keys)
    start = enter(collector.pipeline, judge.cond, rows, noise, float(times[0])).x.detach()
    measured: list[dict[str, tuple[float, ...]]] = []
    _visit(collector, judge, start[:1], rows[:1], times, device, parameters)  # what is learnt once is not counted
    for n in (1, 2):
        measured.append(_visit(collector, judge, start[:n], rows[:n], times, device, parameters))
    one, two = measured
    stage = {k: Stage(*(Line.through(a, b) for a, b in zip(one[k], two[k], strict=True))) for k in one if k != "state"}
    state = Line.through(one["state"][0], two["state"][0])
    trained = tensor_bytes(parameters)
    return Costs(**stage, state=state, fixed=_fixed(collector, parameters), gradients=trained)


def _fixed(collector: Collector, parameters: list[nn.Parameter]) -> float:
    """Return the bytes of all weights, their copies, the gradients and Adam's two moments."""
    modules = {id(m): m for m in _modules(collector)}
    weights = [t for m in modules.values() for t in (*m.parameters(), *m.buffers())]
    copies = [c for r in collector.policy.roles.values() if isinstance(r, Weights) for c in r.copies]
    return tensor_bytes([*weights, *copies]) + 3 * tensor_bytes(parameters)


def _modules(collector: Collector) -> Iterator[nn.Module]:
    yield collector.pipeline.denoiser
    tap = getattr(collector.pipeline, "tap", None)  # the adapter of a diffusers pipeline holds autoencoder and encoders
    yield from () if tap is None else tap.modules().values()
    for reward in collector.scorer.rewards.values():
        yield from (m for m in vars(reward).values() if isinstance(m, nn.Module))
        if isinstance(reward, nn.Module):
            yield reward


def _visit(
    collector: Collector, judge: Any, x: Tensor, row: Tensor, times: Tensor, device: torch.device,
    parameters: list[nn.Parameter],
) -> dict[str, tuple[float, ...]]:  # fmt: skip
    """Return kept, forward, backward and silent bytes of every stage for these samples."""
    grid, cond, policy = times[:2], judge.cond, collector.policy
    booked = policy.ledger.state_dict(), collector.scorer.ledger.state_dict()

    def step(x: Tensor, checkpoint: bool, tape: bool = True) -> Any:
        return rollout(
            policy, collector.recipe.kernel, grid, Nodes.enter(x, row), cond, noise=Noise(0), n_rows=len(judge.prompts),
            tape=Tape(0, checkpoint) if tape else None, keep=collector.recipe.keep,
        )  # fmt: skip

    def score(media: Tensor) -> Tensor:
        return torch.stack(list(collector.scorer.judge(media, *_words(judge, row)).values())).sum(0)

    out = {
        "step": _measure(lambda z: step(z, False), x, device, parameters, lambda t: t.leaves.x),
        "light": _measure(lambda z: step(z, True), x, device, parameters, lambda t: t.leaves.x),
    }
    with torch.no_grad():
        media = judge.media(x, row)
    with_gradient = collector.scorer.differentiable
    out["decode"] = _measure(lambda z: judge.media(z, row), x, device, [], lambda m: m)
    out["reward"] = _measure(score, media, device, [], lambda r: r, with_gradient)
    out |= _tails(collector, judge, x, row, device, score)
    with Meter(device) as meter:
        tree = step(x.detach(), False, tape=False)
    out["state"] = (float(meter.kept),)
    del tree
    policy.ledger.load_state_dict(booked[0])
    collector.scorer.ledger.load_state_dict(booked[1])
    return out


def _tails(
    collector: Collector, judge: Any, x: Tensor, row: Tensor, device: torch.device, score: Callable[[Tensor], Tensor]
) -> dict[str, tuple[float, ...]]:
    """Return the bytes of decoder and rewards together, in every way that there is to take them."""
    scorer = collector.scorer
    out: dict[str, tuple[float, ...]] = {}

    def whole(z: Tensor) -> Tensor:
        return score(judge.media(z, row))

    def again(z: Tensor) -> Tensor:
        out: Tensor = run_checkpointed(whole, z, use_reentrant=False)
        return out

    apart = scorer.frames_apart(judge.cond[row]) > 1
    before = scorer.by_frame
    for by_frame in (False, True) if apart else (False,):
        scorer.by_frame = by_frame
        for name, run in (("tail", whole), ("again", again)):
            key = {"tail": "framed", "again": "framed_again"}[name] if by_frame else name
            out[key] = _measure(run, x, device, [], lambda r: r, scorer.differentiable)
    scorer.by_frame = before
    return out


def _words(judge: Any, row: Tensor) -> tuple[list[str], list | None]:
    rows = row.tolist()
    return [judge.prompts[r] for r in rows], None if judge.meta is None else [judge.meta[r] for r in rows]


def _measure(
    run: Any, x: Tensor, device: torch.device, parameters: list[nn.Parameter], end: Any, gradient: bool = True
) -> tuple[float, ...]:
    """Return bytes kept, and at most alive in the forward, the backward and a silent forward pass."""
    with torch.no_grad(), Meter(device) as meter:
        run(x.detach())
        silent = float(meter.peak)
    if not gradient:
        return silent, silent, silent, silent
    leaf = x.detach().requires_grad_()
    with torch.enable_grad(), Meter(device) as meter:
        result = run(leaf)
        kept, forward = float(meter.kept), float(meter.peak)
        meter.restart()
        torch.autograd.grad(end(result).sum(), [leaf, *parameters], allow_unused=True)
        backward = float(meter.peak)
        del result
    return kept, forward, backward, silent
