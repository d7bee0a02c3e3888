"""Memory and speed: thin passes to what diffusers and torch have, with an error where an option would do nothing.

Many of these options are silent no-ops on some models: ``set_attention_backend`` on the U-Nets and SD3, gradient
checkpointing on networks that do not implement it, offloading without an accelerator. Here they raise, and say what to
use instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowalign.pipelines.quantise import plain, quantise

if TYPE_CHECKING:
    from flowalign.pipelines.adapter import Adapter

__all__ = ["Memory", "Setting", "apply", "chosen", "same_setting", "setting"]

SDPA = {  # torch's own kernels, chosen by a context around the network
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash_sdpa": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


@dataclass(frozen=True)
class Memory:
    """What to do about memory and speed.

    Attributes:
        attention: a backend of diffusers' dispatcher (``native``, ``flash``, ``sage``, ...), ``xformers``, one of
            torch's kernels (``math``, ``efficient``, ``flash_sdpa``, ``cudnn``), or None to leave it.
        compile: compile the repeated blocks of the networks (regional compilation).
        checkpoint: recompute blocks in the backward pass (gradient checkpointing inside the network).
        offload: move components to the accelerator only while they run (``enable_model_cpu_offload``).
        bf16: hold all frozen weights in bfloat16; trainable ones stay in float32.
        tiling: decode in tiles (the VAE's own).
        quantize: frozen linear layers in fewer bits: ``int8``, ``int4``, ``float8`` (torchao) or ``dynamic`` (torch's
            own int8, for encoders on a CPU); see :mod:`flowalign.pipelines.quantise`.
        quantized: names of the components to quantise; every text and image encoder when empty.
    """

    attention: str | None = None
    compile: bool = False
    checkpoint: bool = False
    offload: bool = False
    bf16: bool = False
    tiling: bool = False
    quantize: str | None = None
    quantized: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    """What must be the same in rollout and update: precision of the weights, autocast, and attention backend."""

    dtype: torch.dtype
    autocast: torch.dtype | None
    attention: str


def setting(network: nn.Module, sdpa: str | None) -> Setting:
    """Return the setting in which the network would run now."""
    first = next(network.parameters())
    kind = first.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return Setting(first.dtype, autocast, sdpa or _active())


def _active() -> str:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    return str(_AttentionBackendRegistry._active_backend.value)


def same_setting(adapter: Adapter) -> None:
    """Note the setting at the first network call, and hold every later one to it.

    Raises:
        RuntimeError: if it has changed: densities of a rollout and of an update would differ.
    """
    now = setting(next(iter(adapter.experts.values())), adapter.sdpa)
    if adapter.setting is None:
        adapter.setting = now
    elif adapter.setting != now:
        raise RuntimeError(
            f"the network ran as {adapter.setting} before and would now run as {now}: densities of a rollout and "
            "of an update would differ, and the ratio would not be 1. Use the same autocast, precision and "
            "attention backend in both, or call forget_setting() if that is meant."
        )


def chosen(kernel: str | None) -> AbstractContextManager[None]:
    """Return the context in which one of torch's attention kernels is the only one."""
    return nullcontext() if kernel is None else sdpa_kernel(SDPA[kernel])


def apply(adapter: Adapter, options: Memory) -> None:
    """Apply the options to the networks of an adapter; raises before anything has changed where one does nothing.

    Raises:
        ValueError: for an option that this pipeline, machine or installation cannot honour.
    """
    networks = adapter.networks
    if options.attention is not None:
        attention(adapter, networks, options.attention)
    if options.checkpoint:
        checkpointing(networks)
    if options.bf16:
        halve(adapter)
    if options.quantize is not None:
        quantise(adapter, options.quantize, options.quantized)
    elif options.quantized:
        raise ValueError(f"quantized={options.quantized!r} does nothing without quantize=..., e.g. quantize='int8'.")
    if options.tiling:
        tiling(adapter)
    if options.compile:
        regional(networks)
    if options.offload:
        offload(adapter)
    adapter.forget_setting()


def attention(adapter: Adapter, networks: Mapping[str, nn.Module], backend: str) -> None:
    """Choose the attention backend of every network."""
    if backend in SDPA:
        adapter.sdpa = backend
        return
    if backend == "xformers":
        from diffusers.utils.import_utils import is_xformers_available

        if not is_xformers_available():
            raise ValueError("xformers is not installed; pip install xformers, or use attention='native'.")
        for network in networks.values():
            network.enable_xformers_memory_efficient_attention()  # type: ignore[operator]
        return
    for name, network in networks.items():
        dispatched = [m for m in network.modules() if "_attention_backend" in _names(getattr(m, "processor", None))]
        if not dispatched:
            raise ValueError(
                f"{name} ({type(network).__name__}) has no dispatched attention, so the backend {backend!r} would "
                f"silently do nothing. Use attention='xformers', or one of torch's own kernels: {', '.join(SDPA)}."
            )
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    before = _AttentionBackendRegistry._active_backend
    try:
        for network in networks.values():
            network.set_attention_backend(backend)  # type: ignore[operator]
    finally:
        _AttentionBackendRegistry.set_active_backend(before)  # it also sets a global: other pipelines are not meant


def _names(processor: Any) -> set[str]:
    return set() if processor is None else set(dir(processor))


def checkpointing(networks: Mapping[str, nn.Module]) -> None:
    """Switch gradient checkpointing on."""
    for name, network in networks.items():
        if not getattr(network, "_supports_gradient_checkpointing", False):
            raise ValueError(
                f"{name} ({type(network).__name__}) has no gradient checkpointing of its own. Checkpoint whole network "
                "calls instead: Tape(checkpoint=True)."
            )
    for network in networks.values():
        network.enable_gradient_checkpointing()  # type: ignore[operator]


def halve(adapter: Adapter) -> None:
    """Cast frozen weights to bfloat16; the VAE keeps its precision where it asks for that, LoRA weights theirs."""
    for module in adapter.tap.modules().values():
        if getattr(getattr(module, "config", None), "force_upcast", False):
            continue
        for parameter in module.parameters():
            frozen = not parameter.requires_grad or module not in adapter.experts.values()
            if frozen and plain(parameter):  # quantised weights have their precision
                parameter.data = parameter.data.bfloat16()
        for name, buffer in module.named_buffers():
            if buffer.is_floating_point() and "inv_freq" not in name:
                buffer.data = buffer.data.bfloat16()
    adapter.relearn()


def tiling(adapter: Adapter) -> None:
    """Let the autoencoder decode in tiles."""
    vae = adapter.tap.modules().get("vae")
    if vae is None or not callable(getattr(vae, "enable_tiling", None)):
        raise ValueError(
            f"the autoencoder of {type(adapter.pipe).__name__} does not decode in tiles; use decode(chunk=1)."
        )
    vae.enable_tiling()  # type: ignore[operator]


def regional(networks: Mapping[str, nn.Module]) -> None:
    """Compile the repeated blocks."""
    for name, network in networks.items():
        if not getattr(network, "_repeated_blocks", None):
            raise ValueError(
                f"{name} ({type(network).__name__}) names no repeated blocks, so regional compilation would do "
                "nothing. Compile the whole network yourself: network.compile()."
            )
    for network in networks.values():
        network.compile_repeated_blocks(fullgraph=False)  # type: ignore[operator]


def offload(adapter: Adapter) -> None:
    """Move components to the accelerator only while they run."""
    if not torch.accelerator.is_available():
        raise ValueError("offload moves components between an accelerator and the CPU; there is no accelerator here.")
    adapter.pipe.enable_model_cpu_offload()
    adapter.tap.device = None
