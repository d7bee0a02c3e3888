"""LoRA on a network: ``W' = W + weight · (alpha / rank) B A`` put on, scaled, merged (Hu et al. 2106.09685).

Files are :mod:`flowalign.pipelines.lora`'s, which has these functions too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from flowalign.pipelines.quantise import plain

__all__ = ["adapters", "add", "inject", "merge", "scale", "tuned", "unmerge"]

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "qkv", "q_proj", "k_proj", "v_proj", "o_proj", "to_qkv", "attn1")


def add(
    networks: Mapping[str, nn.Module],
    rank: int = 16,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    name: str = "default",
    seed: int = 0,
) -> list[nn.Parameter]:
    """Put a fresh LoRA on each network, freeze everything else in it, and return the trainable parameters.

    Args:
        networks: by component name, e.g. ``adapter.experts``.
        rank: of the update.
        alpha: its scale is ``alpha / rank``; alpha = rank when None.
        targets: ends of the names of linear layers; attention projections when None, every linear layer inside the
            blocks where there are none of such names.
        name: of the adapter.
        seed: of the initialisation (A is random, B is zero: the network is unchanged).

    Raises:
        ValueError: for a rank below 1, targets that match nothing, or a network that already has such an adapter.
    """
    from peft import LoraConfig

    if rank < 1:
        raise ValueError(f"the rank of a LoRA must be at least 1; got {rank}.")
    found: list[nn.Parameter] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for key, network in networks.items():
            if name in vars(network).get("peft_config", {}):
                raise ValueError(
                    f"{key} already has an adapter {name!r}; remove it with delete_adapters, or name another."
                )
            matched = _targets(key, network, targets)
            network.requires_grad_(False)
            config = LoraConfig(
                r=rank,
                lora_alpha=rank if alpha is None else alpha,
                target_modules=matched,
                init_lora_weights=True,
            )
            inject(network, config, name)
            for parameter in network.parameters():
                if parameter.requires_grad:  # half-precision LoRA weights do not train: keep them in float32
                    if parameter.dtype in (torch.float16, torch.bfloat16):
                        parameter.data = parameter.data.float()
                    found.append(parameter)
    return found


def inject(network: nn.Module, config: Any, name: str) -> None:
    """Put the layers of a PEFT configuration on a network, under the name of an adapter."""
    from peft import inject_adapter_in_model

    if callable(getattr(network, "add_adapter", None)):
        network.add_adapter(config, adapter_name=name)  # type: ignore[operator]
        return
    inject_adapter_in_model(config, network, adapter_name=name)  # a model without diffusers' adapter mixin (PixArt)
    vars(network)["peft_config"] = {**adapters(network), name: config}


def _targets(key: str, network: nn.Module, targets: Sequence[str] | None) -> list[str]:
    linear = [n for n, m in network.named_modules() if isinstance(m, nn.Linear)]
    ends = tuple(targets) if targets is not None else ATTENTION
    matched = [n for n in linear if any(n == e or n.endswith("." + e) for e in ends)]
    if not matched and targets is None:
        matched = [n for n in linear if "block" in n or "layer" in n] or linear
    if not matched:
        known = sorted({n.rsplit(".", 1)[-1] for n in linear})
        raise ValueError(f"no linear layer of {key} ends in {list(ends)}; its layers end in {known}.")
    return matched


def adapters(network: nn.Module) -> Mapping[str, Any]:
    """Return the configurations of the adapters on a network, by name."""
    return vars(network).get("peft_config", {})


def tuned(networks: Mapping[str, nn.Module], name: str) -> Iterator[Any]:
    """Yield the layers that carry the adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for network in networks.values():
        for module in network.modules():
            if isinstance(module, BaseTunerLayer) and name in getattr(module, "lora_A", {}):
                yield module


def scale(networks: Mapping[str, nn.Module], weight: float, name: str = "default") -> None:
    """Set the strength of an adapter: 0 is the network without it, 1 as trained."""
    for layer in tuned(networks, name):
        layer.set_scale(name, weight)


def merge(networks: Mapping[str, nn.Module], weight: float = 1.0, name: str = "default") -> None:
    """Add the update into the weights, ``W += weight · (alpha/rank) B A``; :func:`unmerge` takes it out again.

    Raises:
        ValueError: if the weights below are quantised.
    """
    layers = list(tuned(networks, name))
    packed = [layer for layer in layers if not plain(layer.get_base_layer().weight)]
    if packed:
        raise ValueError(
            f"{len(packed)} of {len(layers)} layers under this LoRA are quantised, and an update cannot be added into "
            "rounded weights. Save the LoRA and merge it into the pipeline loaded in full precision."
        )
    for layer in layers:
        layer.set_scale(name, weight)
        layer.merge(safe_merge=True, adapter_names=[name])


def unmerge(networks: Mapping[str, nn.Module], name: str = "default") -> None:
    """Undo :func:`merge` (to round-off)."""
    for layer in tuned(networks, name):
        layer.unmerge()
