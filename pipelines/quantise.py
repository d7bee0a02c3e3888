"""Frozen parts in fewer bits: thin passes to torchao and to torch's own dynamic quantisation.

    int8, int4, float8     torchao's weight-only tensors: on any device, and gradients pass to the activations, so the
                           frozen base of a network under LoRA may be quantised too
    dynamic                torch's own int8 linear layers: nothing to install; on a CPU only, and without gradients, so
                           for encoders only

Only linear layers are touched, and of a denoiser only frozen ones (``add_lora`` freezes them). Each option is refused
where it would do nothing or is not installed, before any weight has changed; int4 packs groups of 128 weights and
passes over narrower layers in silence, which is found out afterwards. To quantise while
loading (bitsandbytes, quanto, GGUF), hand diffusers' own configuration to ``load(folder, quantization=...)``.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from flowalign.pipelines.adapter import Adapter

__all__ = ["QUANTIZERS", "plain", "quantise"]

TORCHAO = {"int8": "Int8WeightOnlyConfig", "int4": "Int4WeightOnlyConfig", "float8": "Float8WeightOnlyConfig"}
QUANTIZERS = (*TORCHAO, "dynamic")
ENCODERS = ("text_encoder", "image_encoder")


def plain(weight: Any) -> bool:
    """Return whether a weight is an ordinary floating-point tensor, not a quantised one."""
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()


def quantise(adapter: Adapter, how: str, parts: Sequence[str] = ()) -> dict[str, int]:
    """Quantise the frozen linear layers of some components in place.

    Args:
        adapter: whose pipeline.
        how: one of ``QUANTIZERS``.
        parts: component names; every text and image encoder when empty.

    Returns:
        How many layers were quantised, by component.

    Raises:
        ValueError: for an unknown name, a package that is not installed, or a component in which nothing would change.
    """
    chosen = _parts(adapter, how, parts)
    _available(adapter, how, chosen)
    trained = list(adapter.experts.values())
    layers = {name: _frozen(name, m, any(m is t for t in trained)) for name, m in chosen.items()}
    for name, module in chosen.items():
        if how == "dynamic":
            _dynamic(module, layers[name])
        else:
            _torchao(module, layers[name], how)
    done = {name: sum(not _is_plain(chosen[name], path) for path in paths) for name, paths in layers.items()}
    adapter.relearn()
    if idle := [name for name, count in done.items() if not count]:
        raise ValueError(
            f"quantize={how!r} passed over every layer of {', '.join(idle)}: they are too narrow for its groups of "
            f"weights. Leave them out of quantized=..., or use quantize='int8'."
        )
    return done


def _parts(adapter: Adapter, how: str, parts: Sequence[str]) -> dict[str, nn.Module]:
    if how not in QUANTIZERS:
        raise ValueError(f"there is no quantisation {how!r}; there are {', '.join(QUANTIZERS)}.")
    modules = adapter.tap.modules()
    if unknown := [name for name in parts if name not in modules]:
        raise ValueError(
            f"{type(adapter.pipe).__name__} has no component {', '.join(unknown)} to quantise; it has "
            f"{', '.join(modules)}."
        )
    chosen = {k: m for k, m in modules.items() if (k in parts if parts else k.startswith(ENCODERS))}
    if not chosen:
        raise ValueError(
            f"{type(adapter.pipe).__name__} has no text or image encoder, so quantize={how!r} would do nothing. Name "
            f"its frozen parts, e.g. quantized=({next(iter(modules), '')!r},)."
        )
    return chosen


def _available(adapter: Adapter, how: str, chosen: dict[str, nn.Module]) -> None:
    if how != "dynamic":
        if importlib.util.find_spec("torchao") is None:
            raise ValueError(
                f"quantize={how!r} needs torchao, which is not installed: pip install torchao. Without it, "
                "quantize='dynamic' makes int8 text encoders on a CPU."
            )
        return
    experts = [name for name in chosen if any(chosen[name] is m for m in adapter.experts.values())]
    if experts:
        raise ValueError(
            f"quantize='dynamic' passes no gradient, so {', '.join(experts)} could not be trained under LoRA. Use "
            "quantize='int8' (torchao)."
        )
    away = sorted({str(p.device) for m in chosen.values() for p in m.parameters() if p.device.type != "cpu"})
    if away:
        raise ValueError(
            f"quantize='dynamic' runs on a CPU only, and these parts are on {', '.join(away)}. Use quantize='int8' "
            "(torchao), or free_encoders() first."
        )


def _frozen(name: str, module: nn.Module, trained: bool) -> list[str]:
    """Return the paths of the linear layers that do not train: those of a denoiser that are frozen, all of the rest."""
    linear = {k: m for k, m in module.named_modules() if isinstance(m, nn.Linear)}
    still = {k: m for k, m in linear.items() if not (trained and any(p.requires_grad for p in m.parameters()))}
    frozen = [k for k, m in still.items() if plain(m.weight)]
    if frozen:
        return frozen
    why = "no frozen linear layer" if len(still) < len(linear) else "no linear layer, or they are quantised already"
    raise ValueError(
        f"{name} ({type(module).__name__}) has {why}, so quantising it would do nothing. Freeze a denoiser first "
        f"(add_lora does, or pipe.{name}.requires_grad_(False)), or leave it out."
    )


def _is_plain(module: nn.Module, path: str) -> bool:
    layer = module.get_submodule(path)
    return isinstance(layer, nn.Linear) and plain(layer.weight)


def _torchao(module: nn.Module, paths: list[str], how: str) -> None:
    quantization: Any = importlib.import_module("torchao.quantization")
    wanted = set(paths)
    quantization.quantize_(module, getattr(quantization, TORCHAO[how])(), lambda layer, path: path in wanted)


def _dynamic(module: nn.Module, paths: list[str]) -> None:
    from torch.ao.quantization import default_dynamic_qconfig, quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch points to torchao, and so does this file
        quantize_dynamic(module, dict.fromkeys(paths, default_dynamic_qconfig), dtype=torch.qint8, inplace=True)
