"""flowalign: align diffusion and flow-matching generators with reward models.

    import flowalign as fa

    generator = fa.load("shapes")                              any diffusers pipeline, folder or hub id
    reward = fa.reward("shapes")                               fa.rewards.REWARDS names them all
    found = fa.steer(generator, fa.method("best-of-n")(n=8), reward, ["three cyan circles"])
    summary = fa.train(fa.config("diffusion-nft"))             the whole job, as the command line does it
    for metrics in fa.fit(...): ...                            the training loop by itself

Names are imported on first use: ``import flowalign`` costs nothing.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from flowalign import kernels, laws, methods, objectives, pipelines, rewards
    from flowalign.config import RunConfig
    from flowalign.config import default as config
    from flowalign.evaluate import Exam, compare, examine
    from flowalign.fit import FitOptions, fit
    from flowalign.gaussian import Gaussian
    from flowalign.ledger import Ledger
    from flowalign.loading import load
    from flowalign.methods import METHODS
    from flowalign.methods import resolve as method
    from flowalign.opening import open_reward as reward
    from flowalign.policy import Policy
    from flowalign.prepare import Lora, prepare
    from flowalign.recipe import Recipe
    from flowalign.rollout import rollout
    from flowalign.run import train
    from flowalign.scorer import Scorer
    from flowalign.source import Prompt, Prompts
    from flowalign.steer import Steered, steer
    from flowalign.trajectory import Trajectory

HOMES = {
    "FitOptions": "fit",
    "Gaussian": "gaussian",
    "Ledger": "ledger",
    "Lora": "prepare",
    "METHODS": "methods",
    "Policy": "policy",
    "Prompt": "source",
    "Prompts": "source",
    "Recipe": "recipe",
    "RunConfig": "config",
    "Exam": "evaluate",
    "Scorer": "scorer",
    "Steered": "steer",
    "Trajectory": "trajectory",
    "compare": "evaluate",
    "config": "config:default",
    "examine": "evaluate",
    "fit": "fit",
    "load": "loading",
    "method": "methods:resolve",
    "prepare": "prepare",
    "reward": "build:open_reward",
    "rollout": "rollout",
    "steer": "steer",
    "train": "run",
}
ROOMS = ("kernels", "laws", "methods", "objectives", "pipelines", "rewards")

__all__ = [
    "METHODS", "Exam", "FitOptions", "Gaussian", "Ledger", "Lora", "Policy", "Prompt", "Prompts", "Recipe", "RunConfig",
    "Scorer", "Steered", "Trajectory", "__version__", "compare", "config", "examine", "fit", "kernels", "laws", "load",
    "method", "methods", "objectives", "pipelines", "prepare", "reward", "rewards", "rollout", "steer", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import on first use."""
    from importlib import import_module

    if name in ROOMS:
        return import_module(f"{__name__}.{name}")
    if name not in HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name!r}")
    module, _, attribute = HOMES[name].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), attribute or name)


class _Package(ModuleType):
    """The package: importing ``flowalign.fit``, the module, must not hide ``fa.fit``, the function.

    The import system binds every submodule as an attribute of its package; for a public name it binds what is meant.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in HOMES:
            module, _, attribute = HOMES[name].partition(":")
            value = getattr(value, attribute or name) if module == name else value
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
