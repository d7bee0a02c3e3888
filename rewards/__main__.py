"""Make the judges that the project trains itself: ``python -m flowalign.rewards inverse-dynamics``.

inverse-dynamics    reads the moves of `shapes-video` (left, right, up, down, still) back from its frames; some ten
                    seconds on one CPU core. A command may join generators and judges; their packages may not.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from flowalign.rewards.idm import WEIGHTS, ActionAgreement, InverseDynamicsConfig, fit_inverse_dynamics


def moves(seed: int, count: int, split: str, still: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return drawn videos of `shapes-video` that carry actions, and the actions ``(B, 8)``.

    Args:
        seed: of the draw.
        count: videos drawn, of which those with actions are kept.
        split: of the compositions, see :func:`flowalign.pipelines.worlds.video.compositions`.
        still: share of the videos that are frozen at their first frame, with the action "still" throughout.
    """
    from flowalign.pipelines.worlds.video import ACTIONS, draw

    generator = torch.Generator().manual_seed(seed)
    batch = draw(generator, count, split)
    kept = batch.actions()[:, 0] >= 0
    video, actions = batch.video[kept], batch.actions()[kept]
    frozen = torch.rand(len(video), generator=generator) < still
    video = torch.where(frozen[:, None, None, None, None], video[:, :1], video)
    return video, torch.where(frozen[:, None], ACTIONS.index("still"), actions)


def inverse_dynamics(folder: Path, seed: int = 0) -> dict[str, float]:
    """Train, save and measure the demo world's inverse-dynamics model; return its accuracy by split."""
    from flowalign.pipelines.worlds.video import ACTIONS, SIZE

    config = InverseDynamicsConfig(actions=len(ACTIONS), size=SIZE, width=16)
    model = fit_inverse_dynamics(lambda i: moves(1000 * seed + i, 48, "train", still=0.15), config, seed=seed)
    model.save(folder)
    found = {}
    for split in ("train", "select", "report", "withheld"):
        video, actions = moves(10**6 + seed, 400, split, still=0.15)
        scores = ActionAgreement(folder)(video, [""] * len(video), [{"actions": a} for a in actions])
        found[split] = scores.mean().item()
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="python -m flowalign.rewards", description=__doc__)
    parser.add_argument("name", choices=["inverse-dynamics"])
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for split, accuracy in inverse_dynamics(options.out, options.seed).items():
        sys.stdout.write(f"{split:10} actions read rightly: {accuracy:.4f}\n")


if __name__ == "__main__":
    main()
