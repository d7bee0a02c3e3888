"""What the training loop refuses before any sampling: settings that cannot learn, or processes that would part."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from flowalign.adjoint import LeanAdjoint
from flowalign.credit import Group
from flowalign.options import FitOptions
from flowalign.protocols import Pipeline
from flowalign.recipe import Recipe, trained_steps
from flowalign.scorer import Scorer
from flowalign.source import Source

__all__ = ["check_gradients", "check_processes", "check_settings"]


@runtime_checkable
class Guided(Protocol):
    """A pipeline that can tell whether its own guidance rule is on."""

    guided: bool


def check_gradients(pipeline: Pipeline, scorer: Scorer, recipe: Recipe) -> None:
    """Refuse what has no gradient, or the wrong one, before any sampling.

    Raises:
        ValueError: a method that differentiates the reward with one that gives no gradient; guidance in the adjoint;
            a ceiling where each reward has an advantage of its own.
    """
    asked = recipe.credit is not None and recipe.credit.differentiates
    blind = [name for name, r in scorer.rewards.items() if not r.card.differentiable]
    if (asked or recipe.objective.wants == "grown") and blind:
        raise ValueError(
            f"this method differentiates the reward, and {', '.join(map(repr, blind))} gives no gradient (its card "
            "says differentiable=False). Take a differentiable reward (flowalign rewards marks them), or a method that "
            "only compares scores, e.g. diffusion-nft or flow-grpo."
        )
    guided = isinstance(pipeline, Guided) and pipeline.guided
    chained = isinstance(recipe.credit, LeanAdjoint) and recipe.credit.solver == "exact"
    if chained and (guided or recipe.guide is not None):
        raise ValueError(
            "guidance is on, and this method carries gradients back through the chain: a guided network's Jacobian is "
            "scaled up by the guidance at every step, and the adjoint blows up. Set guidance: false for training; the "
            "result can be sampled with guidance."
        )
    apart = recipe.per_reward or (isinstance(recipe.credit, Group) and recipe.credit.per_reward)
    if recipe.restraint.ceiling is not None and apart:
        raise ValueError(
            "restraint.ceiling cuts the weighted sum of the rewards, and this method has one advantage for each "
            "reward. Put a ceiling on the reward itself (flowalign.rewards.transforms.Clip)."
        )


def check_settings(pipeline: Pipeline, recipe: Recipe, options: FitOptions) -> None:
    """Refuse what cannot learn before any long work starts.

    Raises:
        ValueError: no step to train on, or groups too small to compare anything in.
    """
    wants = recipe.objective.wants
    if wants in ("transitions", "paths"):
        trained_steps(recipe, recipe.grid(pipeline.times(options.steps)), pipeline.process)
    if options.filter_groups and wants != "transitions":
        raise ValueError(
            f"fit.filter_groups leaves groups without variance out of a policy gradient; this objective trains on "
            f"{wants}, where they still count. Leave the option out."
        )
    if wants == "grown" and options.overlap > 1:
        raise ValueError(
            f"fit.overlap = {options.overlap} scores in another thread, without gradients; this method backpropagates "
            "through its rewards. Set overlap to 1."
        )
    if (wants == "pairs" or recipe.objective.paired) and options.size < 2:
        raise ValueError(f"preference pairs need size >= 2 samples per prompt; got {options.size}.")
    if recipe.objective.paired and options.batch % 2:
        raise ValueError(
            f"this objective compares samples in pairs, and batches of {options.batch} would part one: set fit.batch "
            "to an even number."
        )
    grouped = getattr(getattr(recipe.credit, "normalise", None), "center", None) == "group"
    if wants in ("transitions", "leaves") and grouped and options.size < 2 and recipe.select is None:
        raise ValueError(
            f"a group of {options.size} sample has no advantage: its reward is its group's mean. Set size to 2 or more."
        )


def check_processes(source: Source, options: FitOptions, accelerator: Any, uneven: bool = False) -> None:
    """Refuse what would make several processes draw or count differently, and hang.

    Raises:
        ValueError: for a source that follows rewards, or groups or samples left out by reward (``uneven``).
    """
    if accelerator is None or accelerator.num_processes == 1:
        return
    if uneven:
        raise ValueError(
            f"this method trains on the samples that its rewards choose: {accelerator.num_processes} processes would "
            "choose differently many and take different numbers of steps. Use one process."
        )
    if not source.alike or options.filter_groups:
        what = "fit.filter_groups" if options.filter_groups else "a source that follows the rewards"
        raise ValueError(
            f"{what} depends on the rewards that each process sees, so {accelerator.num_processes} processes would go "
            "different ways. Use one process, or even allocation without filtering."
        )
