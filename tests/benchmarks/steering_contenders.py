"""The searches that ``compare_steering`` compares, each made for a number of network evaluations per prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

WALKS = 8  # results that DTS draws: walking a tree costs nothing
LEVELS, KEEP = (3, 6), (0.5, 0.5)  # TTSnap's, of ten steps


@dataclass(frozen=True)
class Contender:
    """A method of a given size.

    Attributes:
        method: it.
        anytime: whether the budget ends it; else its size keeps to the budget beforehand.
        samples: results asked for; the best is taken.
    """

    method: Any
    anytime: bool = False
    samples: int = 1


@dataclass(frozen=True)
class Settings:
    """What was chosen on the tuning prompts, per reward.

    Attributes:
        scale: λ of the particle methods.
        noise: a of the flow's SDE.
        soft: λ of the trees.
        explore: c of UCT, in the reward's unit.
        widen: C of the trees.
        power: α of the trees.
        climb: ReNO's steps of the sampler while climbing.
        lr: ReNO's learning rate.
        das: DAS's λ.
    """

    scale: float
    noise: float
    soft: float
    explore: float
    widen: float = 2.0
    power: float = 0.5
    climb: int = 2
    lr: float = 5.0
    das: float = 300.0


CHOSEN = {"graded": Settings(30.0, 0.4, 30.0, 0.1), "clip": Settings(300.0, 0.4, 300.0, 0.01)}


def contenders(kind: str, evaluations: float, steps: int, s: Settings, aware: Path) -> dict[str, Contender]:
    """Return the methods by name, for so many evaluations per prompt; a gradient counts as two.

    Trees get more rounds than they can use.
    """
    from flowalign.methods.best_of_n import BestOfN
    from flowalign.methods.dts import DTS
    from flowalign.methods.fk_steering import FKSteering
    from flowalign.methods.reno import ReNO
    from flowalign.methods.svdd import SVDD
    from flowalign.methods.ttsnap import TTSnap

    n = max(2, round(evaluations / steps))
    tree = DTS(100_000, s.soft, widen=s.widen, power=s.power, explore=s.explore, noise=s.noise, report=100_000)
    many = max(k for k in range(1, n * 4) if k == 1 or spent(TTSnap(k, LEVELS, KEEP), steps) <= evaluations)
    out = {
        "best-of-n": Contender(BestOfN(n, n)),
        "best-of-n, SDE": Contender(FKSteering(n, scale=1e-9, threshold=0.0, noise=s.noise)),  # FK without its weights
        "fk": Contender(FKSteering(n, scale=s.scale, noise=s.noise)),
        "svdd": Contender(SVDD(max(2, int((evaluations - 1) / (steps - 1))), s.scale, noise=s.noise)),
        "dts": Contender(tree, True, WALKS),
        "dts*": Contender(replace(tree, select="uct"), True),
        "ttsnap": Contender(TTSnap(many, LEVELS, KEEP)),
        "ttsnap, noise-aware": Contender(TTSnap(many, LEVELS, KEEP, aware=str(aware))),
    }
    if kind == "graded":
        out["dts*, wide"] = Contender(replace(tree, select="uct", widen=2.0, power=0.8), True)  # hardly ever branches
    if kind == "clip":
        # N K evaluations and N (K - 1) gradients
        das = max(2, round(evaluations / (steps + 2 * (steps - 1))))
        out["das"] = Contender(
            FKSteering(das, scale=s.das, scheme="ssp", noise=s.noise, twist=1.0, temper="geometric", gamma=0.05)
        )
        climbs = max(1, round((evaluations - steps) / (3 * s.climb)))
        for name in ("best-of-n, SDE", "svdd", "dts"):  # no question of the gradient's methods
            del out[name]
        out["reno"] = Contender(ReNO(climbs, lr=s.lr, steps=s.climb, checkpoint=False))
    return out


def spent(method: Any, steps: int) -> int:
    """Return TTSnap's evaluations per prompt, as its schedule rounds."""
    left, bounds = [method.n, *method.schedule(method.n, 1).values()], [-1, *method.levels, steps - 1]
    return sum(k * (b - a) for k, a, b in zip(left, bounds[:-1], bounds[1:], strict=True))
