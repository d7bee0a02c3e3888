"""The random draws of a solver's ``step``: held at constants to read off its law, or watched to know its noise.

Diffusers' solvers draw with ``randn_tensor``, or from a Brownian tree (DPM-Solver SDE, its cosine variant). A step is
affine in its draws, ``prev = mean + Σ_j c_j z_j``: with all draws zero it returns the mean, with draw j one it returns
mean + c_j. ``std = √Σ c_j²``, and the noise of the whole step is ``Σ_j c_j z_j / std``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from flowalign.pipelines.patching import replaced

__all__ = ["combined", "constant_draws", "watched_draws"]


@contextmanager
def constant_draws(solver: Any, one: int | None = None) -> Iterator[list[int]]:
    """Let every draw of a solver be zero, but for number ``one``; the list gets an entry per draw."""
    drew: list[int] = []

    def constant(
        shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None
    ) -> Tensor:
        drew.append(1)
        return torch.full(tuple(shape), float(len(drew) - 1 == one), device=device, dtype=dtype)

    with replaced(_spaces(solver), "randn_tensor", constant):
        if "noise_sampler" in vars(solver):  # called with two sigmas, returns noise of the sample's shape
            solver.noise_sampler = _Sampler(one, drew)
        yield drew


class _Sampler:
    """Stands where a Brownian tree would."""

    def __init__(self, one: int | None, drew: list[int]) -> None:
        self.one, self.drew = one, drew

    def __call__(self, *_: Any) -> Tensor:
        """Return the constant, which broadcasts."""
        self.drew.append(1)
        return torch.tensor(float(len(self.drew) - 1 == self.one))


@contextmanager
def watched_draws(solver: Any) -> Iterator[list[Tensor]]:
    """Let a solver draw as it does, and put each draw on the list."""
    drawn: list[Tensor] = []
    spaces = _spaces(solver)
    with ExitStack() as stack:
        for own in {id(s["randn_tensor"]): s["randn_tensor"] for s in spaces if "randn_tensor" in s}.values():

            def watched(*args: Any, own: Any = own, **kwargs: Any) -> Tensor:
                drawn.append(own(*args, **kwargs))
                return drawn[-1].clone()  # some scale their noise in place

            stack.enter_context(replaced(spaces, "randn_tensor", watched))
        for space in spaces:
            tree = space.get("BrownianTreeNoiseSampler")
            if tree is not None:
                stack.enter_context(replaced([space], "BrownianTreeNoiseSampler", _watching(tree, drawn)))
        sampler = vars(solver).get("noise_sampler")
        if sampler is not None:
            stack.enter_context(replaced([vars(solver)], "noise_sampler", _Watched(sampler, drawn)))
        yield drawn


def _watching(tree: Any, drawn: list[Tensor]) -> Any:
    return lambda *args, **kwargs: _Watched(tree(*args, **kwargs), drawn)


class _Watched:
    """A Brownian tree whose answers are written down; stays on the solver for the steps to come."""

    def __init__(self, sampler: Any, drawn: list[Tensor]) -> None:
        self.sampler: Any = sampler.sampler if isinstance(sampler, _Watched) else sampler
        self.drawn = drawn

    def __call__(self, *sigmas: Any) -> Tensor:
        """Return what the tree returns."""
        self.drawn.append(self.sampler(*sigmas))
        return self.drawn[-1].clone()


def _spaces(solver: Any) -> list[dict[str, Any]]:
    """Return the namespaces that the solver's code looks its functions up in."""
    return [vars(inspect.getmodule(kind)) for kind in type(solver).__mro__ if kind is not object]


def combined(coefficients: Sequence[Tensor], draws: Sequence[Tensor], std: Tensor, like: Tensor) -> Tensor:
    """Return the noise z of a step with these draws, ``prev = mean + std · z``; zeros where it drew none.

    Raises:
        ValueError: if the numbers of draws and coefficients differ.
    """
    if len(coefficients) != len(draws):
        raise ValueError(f"{len(draws)} draws in a step that was seen to make {len(coefficients)}.")
    total = torch.zeros_like(like)
    for c, z in zip(coefficients, draws, strict=True):
        total = total + c * z.to(like)
    return torch.where(std > 0, total / std.clamp_min(1e-30), torch.zeros_like(total))
