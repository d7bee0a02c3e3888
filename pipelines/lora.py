"""LoRA: put on, written, read, merged; in the format that ``pipe.load_lora_weights`` reads.

``W' = W + (alpha / rank) B A`` (Hu et al. 2106.09685). Files are safetensors. Plain diffusers loads them with

    pipe.load_lora_weights(folder)                                                    any pipeline with a LoRA loader
    pipe.load_lora_weights(folder, weight_name="transformer_2.safetensors",
                           load_into_transformer_2=True)                               the second expert of Wan 2.2
    pipe.transformer.load_lora_adapter(folder, prefix=None)                            pipelines without one

Front ends that know Kohya's names (ComfyUI, A1111, Forge, InvokeAI) take :func:`export`'s file.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flowalign.pipelines.quantise import plain

__all__ = ["add", "export", "load", "merge", "save", "scale", "unmerge"]

FILE = "pytorch_lora_weights.safetensors"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "qkv", "q_proj", "k_proj", "v_proj", "o_proj", "to_qkv", "attn1")
PREFIX = {"unet": "lora_unet_", "transformer": "lora_transformer_", "transformer_2": "lora_transformer_2_"}


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
            _inject(network, config, name)
            for parameter in network.parameters():
                if parameter.requires_grad:  # half-precision LoRA weights do not train: keep them in float32
                    if parameter.dtype in (torch.float16, torch.bfloat16):
                        parameter.data = parameter.data.float()
                    found.append(parameter)
    return found


def _inject(network: nn.Module, config: Any, name: str) -> None:
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
    _inject(network, LoraConfig(r=rank, lora_alpha=config.get("lora_alpha", rank), target_modules=layers), name)
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
