"""LoRA files: written and read in the format that ``pipe.load_lora_weights`` reads, and exported to others.

What they hold, ``W' = W + (alpha / rank) B A``, is put on and merged in :mod:`flowalign.pipelines.lora_layers`. All are
safetensors. Plain diffusers loads them with

    pipe.load_lora_weights(folder)                                                    any pipeline with a LoRA loader
    pipe.load_lora_weights(folder, weight_name="transformer_2.safetensors",
                           load_into_transformer_2=True)                               the second expert of Wan 2.2
    pipe.transformer.load_lora_adapter(folder, prefix=None)                            pipelines without one

Front ends that know Kohya's names (ComfyUI, A1111, Forge, InvokeAI) take :func:`export`'s file.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flowalign.pipelines.lora_layers import adapters, add, inject, merge, scale, unmerge

__all__ = ["add", "export", "load", "merge", "save", "scale", "unmerge"]

FILE = "pytorch_lora_weights.safetensors"
PREFIX = {"unet": "lora_unet_", "transformer": "lora_transformer_", "transformer_2": "lora_transformer_2_"}


def save(pipe: Any, networks: Mapping[str, nn.Module], path: Path, name: str = "default") -> None:
    """Write LoRA weights, or the whole pipeline where there are none.

    Args:
        pipe: whose loader will read them.
        networks: by component name.
        path: a folder; made if it does not exist.
        name: of the adapter.
    """
    with_lora = {k: m for k, m in networks.items() if name in adapters(m)}
    path.mkdir(parents=True, exist_ok=True)
    if not with_lora:
        pipe.save_pretrained(path)
        return
    from peft.utils import get_peft_model_state_dict

    writer = getattr(type(pipe), "save_lora_weights", None) if has_loader(pipe, with_lora) else None
    known = frozenset(inspect.signature(writer).parameters) if writer is not None else frozenset()
    for key, network in with_lora.items():
        state = {k: v.detach().contiguous() for k, v in get_peft_model_state_dict(network, adapter_name=name).items()}
        metadata = adapters(network)[name].to_dict()
        slot = key if f"{key}_lora_layers" in known else key.removesuffix("_2")
        if writer is not None and f"{slot}_lora_layers" in known:
            options: dict[str, Any] = {f"{slot}_lora_layers": state}
            if f"{slot}_lora_adapter_metadata" in known:
                options[f"{slot}_lora_adapter_metadata"] = metadata
            if slot != key:  # the loader has one slot for both experts
                options["weight_name"] = f"{key}.safetensors"
            writer(save_directory=str(path), **options)
        elif callable(getattr(network, "save_lora_adapter", None)):
            network.save_lora_adapter(str(path), adapter_name=name, weight_name=FILE)  # type: ignore[operator]
        else:
            plain = {k: sorted(v) if isinstance(v, set) else v for k, v in metadata.items()}
            text = json.dumps({k: v for k, v in plain.items() if isinstance(v, int | float | str | list | bool)})
            save_file(state, str(path / FILE), metadata={"format": "pt", "lora_config": text})


def load(pipe: Any, networks: Mapping[str, nn.Module], path: Path | str, name: str = "default") -> None:
    """Read LoRA weights written by :func:`save`, or by anybody else in diffusers format.

    Raises:
        ValueError: if the file is missing, or was made for another model (its layers or their sizes are not there,
            under diffusers' names or another front end's).
    """
    folder = Path(path)
    files = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no .safetensors file. Give the folder that save() wrote, or the file itself.")
    for file in files:
        second = file.stem.endswith("_2")
        _check_fits(file, networks)
        where = {"weight_name": file.name, "adapter_name": name}
        if has_loader(pipe, networks):
            try:
                pipe.load_lora_weights(
                    str(file.parent), **where, **({"load_into_transformer_2": True} if second else {})
                )
            except RuntimeError as problem:  # another front end's names, which only the loader could translate
                raise ValueError(f"{file} was made for another model: {problem}") from problem
            except AttributeError:  # the loader of Kolors goes on to a text_encoder_2 that it does not have
                if not any(name in adapters(network) for network in networks.values()):
                    raise
        else:
            network = next(iter(networks.values()))
            if callable(getattr(network, "load_lora_adapter", None)):
                network.load_lora_adapter(str(file.parent), prefix=None, **where)  # type: ignore[operator]
            else:
                _read(network, file, name)
    if not any(name in adapters(network) for network in networks.values()):  # diffusers only logs that
        raise ValueError(
            f"nothing in {', '.join(map(str, files))} fits {', '.join(networks)}: it was made for another model, or "
            "for its text encoders alone. Load it into a pipeline of the family it was trained with."
        )


def has_loader(pipe: Any, networks: Mapping[str, nn.Module]) -> bool:
    """Return whether plain ``pipe.load_lora_weights`` can load into these networks (Kandinsky 3's U-Net cannot)."""
    adapts = all(callable(getattr(network, "load_lora_adapter", None)) for network in networks.values())
    return adapts and callable(getattr(pipe, "load_lora_weights", None))


def _read(network: nn.Module, file: Path, name: str) -> None:
    """Read a file of a model that diffusers has no LoRA loader for; its configuration travels in the metadata."""
    from peft import LoraConfig
    from peft.utils import set_peft_model_state_dict

    with safe_open(str(file), framework="pt") as opened:
        config = json.loads((opened.metadata() or {}).get("lora_config", "{}"))
        state = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
    known = {key for key, _ in network.named_modules()}
    if not any(k.rsplit(".lora_", 1)[0] in known for k in state):  # "unet.mid_block..." from save_lora_weights
        state = {k.split(".", 1)[1]: v for k, v in state.items()}
    layers = sorted({k.rsplit(".lora_", 1)[0] for k in state})
    rank = int(config.get("r", next(v.shape[0] for k, v in state.items() if ".lora_A" in k)))
    inject(network, LoraConfig(r=rank, lora_alpha=config.get("lora_alpha", rank), target_modules=layers), name)
    set_peft_model_state_dict(network, state, adapter_name=name)


def _check_fits(file: Path, networks: Mapping[str, nn.Module]) -> None:
    """Compare layers and sizes before anything is touched."""
    with safe_open(str(file), framework="pt") as opened:
        shapes = {k: tuple(opened.get_slice(k).get_shape()) for k in opened.keys()}  # noqa: SIM118
    downs = {k: v for k, v in shapes.items() if k.endswith("lora_A.weight")}
    if not downs:
        return  # another front end's names: diffusers' own loader translates and checks
    layers = {k: m for name, net in networks.items() for k, m in _layers(name, net).items()}
    problems = []
    for key, shape in downs.items():
        layer = layers.get(key.removesuffix(".lora_A.weight"))
        if layer is None:
            problems.append(f"{key.removesuffix('.lora_A.weight')} is not there")
        elif layer.weight.numel() and shape[1] != layer.weight.shape[1]:
            problems.append(f"{key} reads {shape[1]} features where the layer has {layer.weight.shape[1]}")
    if problems:
        raise ValueError(
            f"{file} was made for another model: {problems[0]} ({len(problems)} of {len(downs)} layers do not fit). "
            f"Load it into a pipeline of the family it was trained with; this one has {', '.join(networks)}."
        )


def _layers(name: str, network: nn.Module) -> dict[str, Any]:
    """Return the layers that can carry a LoRA, under the names that files use, with and without the component."""
    found: dict[str, Any] = {}
    for key, module in network.named_modules():
        base = module.get_base_layer() if callable(getattr(module, "get_base_layer", None)) else module
        if isinstance(base, nn.Linear | nn.Conv2d | nn.Conv3d):
            found[key] = base
            found[f"{name.removesuffix('_2')}.{key}"] = base
    return found


def export(networks: Mapping[str, nn.Module], file: Path, name: str = "default") -> None:
    """Write one file with Kohya's names: ``lora_unet_down_blocks_0_...lora_down.weight``, ``lora_up``, ``alpha``.

    Raises:
        ValueError: if no network has such an adapter.
    """
    from peft.utils import get_peft_model_state_dict

    out: dict[str, Tensor] = {}
    for key, network in networks.items():
        if name not in adapters(network):
            continue
        alpha = torch.tensor(float(adapters(network)[name].lora_alpha))
        for weight, value in get_peft_model_state_dict(network, adapter_name=name).items():
            layer, part = weight.rsplit(".lora_", 1)
            stem = PREFIX.get(key, f"lora_{key}_") + layer.replace(".", "_")
            out[f"{stem}.lora_{'down' if part.startswith('A') else 'up'}.weight"] = value.detach().contiguous()
            out[f"{stem}.alpha"] = alpha.clone()
    if not out:
        raise ValueError(f"none of {list(networks)} has an adapter {name!r}; add one with add_lora().")
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(out, str(file), metadata={"format": "pt"})
