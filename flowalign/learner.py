"""What learns beside the generator: parts of a method, and parts of a reward.

Once per iteration the training loop lets them learn, and a checkpoint holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from flowalign.state import Stateful

if TYPE_CHECKING:
    from flowalign.experience import Experience

__all__ = ["Learner", "Taught", "learners_of"]


class Learner(Stateful):
    """Something that learns beside the policy: value net, ψ(t), a window; a discriminator, a constraint's multiplier.

    A recipe's learners see the experience of an iteration (:meth:`observe`). Those of rewards hear what the reward told
    them while it judged the iteration's samples (:meth:`learn`), which backpropagation through sampling has as well.
    """

    def before(self, collector: Any, source: Any, options: Any) -> None:
        """Prepare once before the first iteration of a new run (calibration, choice of an exit step).

        Args:
            collector: samples and judges (:class:`flowalign.collect.Collector`).
            source: of prompts.
            options: :class:`flowalign.options.FitOptions`.
        """

    def enter(self, prompts: Sequence[str]) -> None:
        """Hear which prompts the rows of the coming rollout are."""

    def observe(self, experience: Experience) -> dict[str, float]:
        """Learn from an iteration; return metrics."""
        return {}

    def learn(self, heard: Sequence[Any], seed: int, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Learn from what was told of the iteration's samples; return metrics.

        Args:
            heard: what :func:`flowalign.hearing.tell` noted for this learner, in the order of the samples.
            seed: of the iteration: whatever is drawn must follow from it.
            gather: joins per-sample values of all processes, so that all learn the same.
        """
        return {}

    def export(self, folder: Path) -> None:
        """Write what of it outlives the run into the folder of the run's result; most have nothing."""


@runtime_checkable
class Taught(Protocol):
    """A reward that changes while it is trained against."""

    def learners(self) -> tuple[Learner, ...]:
        """Return what learns in it, in a fixed order; nothing where nothing does."""
        ...


def learners_of(rewards: Iterable[Any]) -> tuple[Learner, ...]:
    """Return what learns in some rewards, each learner once."""
    found = [learner for r in rewards if isinstance(r, Taught) for learner in r.learners()]
    return tuple({id(learner): learner for learner in found}.values())
