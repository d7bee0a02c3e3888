"""What keeps some of diffusers' networks from being differentiated, put right for the length of a call with gradients.

The mixture of experts of HiDream runs under ``no_grad`` and writes in place when its network is in evaluation mode.
Networks that read ``gradient_checkpointing`` in their forward pass without ever setting it (the ControlNet of Z-Image
in 0.42) fail as soon as gradients are on. Nothing of the values changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["QUIRKS", "repairs"]


def mixture(self: Any, x: Tensor, flat_expert_indices: Tensor, flat_expert_weights: Tensor) -> Tensor:
    """Return ``Σ_e w_e expert_e(x)`` over the experts chosen for each token.

    Args:
        self: HiDream's feed-forward layer.
        x: tokens ``(N, D)``.
        flat_expert_indices: ``(N k,)``, k experts a token.
        flat_expert_weights: ``(N k, 1)``.
    """
    out = torch.zeros_like(x)
    for number, expert in enumerate(self.experts):
        places = (flat_expert_indices == number).nonzero().flatten()
        if len(places):
            tokens = places // self.num_activated_experts
            out = out.index_add(0, tokens, (expert(x[tokens]) * flat_expert_weights[places]).to(out.dtype))
    return out


# class of diffusers -> method -> what to run in its place
QUIRKS: dict[str, dict[str, Callable[..., Any]]] = {"MOEFeedForwardSwiGLU": {"moe_infer": mixture}}


def repairs(networks: Iterable[nn.Module]) -> list[tuple[nn.Module, str, Any]]:
    """Return (module, attribute, value) for everything that is to be set while gradients are on."""
    own = [m for part in networks for m in part.modules() if type(m).__module__.startswith("diffusers.")]
    found: list[tuple[nn.Module, str, Any]] = []
    for module in own:
        methods = QUIRKS.get(type(module).__name__, {})
        found += [(module, name, MethodType(function, module)) for name, function in methods.items()]
        forgetful = getattr(module, "_supports_gradient_checkpointing", False)
        if forgetful and "gradient_checkpointing" not in dir(module):
            found.append((module, "gradient_checkpointing", False))
    return found
