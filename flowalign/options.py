"""How long and how hard to train: one dataclass, whose fields are the keys of a configuration file."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FitOptions"]


@dataclass(frozen=True)
class FitOptions:
    """How long and how hard to train.

    Attributes:
        iterations: rollouts-and-updates to do in all.
        groups: prompts per iteration.
        size: samples per prompt.
        steps: sampling steps.
        updates: passes over an iteration's experience.
        filter_groups: leave groups whose rewards do not differ out of the update (policy gradients).
        batch: items per forward pass of the loss.
        accumulate: batches per optimiser step; 0 for one step per pass.
        overlap: parts that an iteration's groups are cut into: one is scored while the next is rolled out; 1 for none.
            Worth it where rewards run elsewhere (another machine, another device); not for backpropagation.
        lr: learning rate of the policy (AdamW).
        lr_objective: learning rate of the objective's own parameters (log Z, flow networks).
        betas: AdamW's.
        weight_decay: AdamW's.
        warmup: optimiser steps of linear warm-up.
        ema_every: optimiser steps between updates of the averaged weights (``ema``; its warm-up counts the updates).
        max_grad_norm: gradient clipping.
        seed: of the run.
        max_seconds: stop in time.
        max_evaluations: stop after so many network evaluations.
        checkpoint_every: iterations between checkpoints; 0 for none but the last.
        ratio_tolerance: largest |ratio - 1| allowed before the first update of an iteration, as a fraction of the clip
            range.
    """

    iterations: int = 100
    groups: int = 8
    size: int = 16
    steps: int = 10
    updates: int = 1
    filter_groups: bool = False
    batch: int = 64
    accumulate: int = 1
    overlap: int = 1
    lr: float = 3e-4
    lr_objective: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    warmup: int = 0
    ema_every: int = 1
    max_grad_norm: float = 1.0
    seed: int = 0
    max_seconds: float | None = None
    max_evaluations: int | None = None
    checkpoint_every: int = 10
    ratio_tolerance: float = 0.1

    def __post_init__(self) -> None:
        least = {
            "iterations": 1,
            "groups": 1,
            "size": 1,
            "steps": 1,
            "updates": 1,
            "batch": 1,
            "accumulate": 0,
            "overlap": 1,
            "warmup": 0,
            "ema_every": 1,
            "checkpoint_every": 0,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}; got {getattr(self, name)}.")
        for name in ("lr", "lr_objective", "max_grad_norm", "max_seconds", "max_evaluations"):
            value = getattr(self, name)
            if value is not None and not value > 0:  # not a number is not positive either
                raise ValueError(f"{name} must be positive; got {value}.")
        for name in ("weight_decay", "ratio_tolerance"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0; got {getattr(self, name)}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are decays: at least 0 and below 1; got {self.betas}.")
