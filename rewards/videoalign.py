"""Reading a VideoAlign checkpoint: configuration, wording, and a Qwen2-VL with its LoRA merged in.

A release folder holds ``model_config.json`` and ``checkpoint-N/``, the latter either with ``model.pth`` (all weights of
the PEFT-wrapped model) or with ``adapter_model.safetensors`` and ``non_lora_state_dict.pth`` on top of Qwen2-VL. Keys
have the names of transformers 4.45. Merging is ``W + (α/r) B A`` (``α/√r`` for rank-stabilised LoRA), done in float32.

Nothing is executed: pickles are read with ``weights_only=True``, and the wording, which upstream keeps in a Python
file, is read from its syntax tree.
"""

from __future__ import annotations

import ast
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flowalign.rewards.loading import folder_or_id, read, rename

__all__ = ["SPECIAL", "Release", "clean", "merge_lora", "read_release", "read_template"]

SPECIAL = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
CONSTANT = "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"
NAMES = (
    ("model.visual.", "visual."),
    ("model.language_model.", "language_model."),
    ("model.", "language_model."),
)
FILES = ("model_config.json", "checkpoint-*/*")


@dataclass(frozen=True)
class Release:
    """What ``model_config.json`` says.

    Attributes:
        base: hub id or folder of the Qwen2-VL that was tuned.
        fps: frames per second that the model looks at.
        frames: fixed number of frames instead, or None.
        max_pixels: pixels of a frame at most.
        outputs: rows of the head: 3, one per token, or 1, shared.
        means: of VQ, MQ, TA on the authors' data.
        stds: likewise.
        lora_scale: factor of ``B A``.
    """

    base: str
    fps: float
    frames: int | None
    max_pixels: int
    outputs: int
    means: tuple[float, float, float]
    stds: tuple[float, float, float]
    lora_scale: float


def read_release(folder: Path) -> Release:
    """Return the configuration of a release.

    Raises:
        ValueError: where the file is missing, or describes a model without the three reward tokens.
    """
    path = folder / "model_config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no VideoAlign release: it has no model_config.json.")
    config = json.loads(path.read_text())
    data, model, lora = config["data_config"], config["model_config"], config["peft_lora_config"]
    if not model.get("use_special_tokens") or model.get("output_dim") not in (1, 3):
        raise ValueError(
            f"{path}: only releases with the three reward tokens are read (use_special_tokens, output_dim 1 or 3); got "
            f"use_special_tokens={model.get('use_special_tokens')}, output_dim={model.get('output_dim')}."
        )
    norm = config.get("inference_config") or {f"{k}_{s}": float(s == "std") for k in ("VQ", "MQ", "TA") for s in STATS}
    rank = lora["lora_r"]
    return Release(
        base=model["model_name_or_path"],
        fps=float(data.get("fps") or 2.0),
        frames=None if data.get("num_frames") is None else int(data["num_frames"]),
        max_pixels=int(data["max_frame_pixels"]),
        outputs=model["output_dim"],
        means=(norm["VQ_mean"], norm["MQ_mean"], norm["TA_mean"]),
        stds=(norm["VQ_std"], norm["MQ_std"], norm["TA_std"]),
        lora_scale=lora["lora_alpha"] / (math.sqrt(rank) if lora.get("use_rslora") else rank),
    )


STATS = ("mean", "std")


def fetch(weights: str | Path) -> Path:
    """Return the folder of a release: a local one, or the hub's, downloaded.

    Raises:
        ValueError: where there is neither.
    """
    source = folder_or_id(weights)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(FILES)))
    except OSError as error:
        raise ValueError(
            f"weights {source}: the hub cannot be reached and the cache has no copy. Download the release where there "
            f"is a network (`hf download {source}`) and pass the folder."
        ) from error


def read_template(path: Path) -> str:
    """Return the wording from a text file, or from upstream's ``prompt_template.py`` without running it.

    Raises:
        ValueError: where the prompt or one of the three reward tokens has no place in it, once and in order.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        constants = {
            target.id: node.value.value
            for node in ast.parse(text).body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        if CONSTANT not in constants:
            raise ValueError(f"{path} assigns no string to {CONSTANT}; it has {sorted(constants)}.")
        text = str(constants[CONSTANT])
    places = [text.find(token) for token in SPECIAL]
    if "{text_prompt}" not in text or min(places) < 0 or places != sorted(places):
        raise ValueError(f"{path}: the wording must contain {{text_prompt}} and, in this order, {', '.join(SPECIAL)}.")
    if any(text.count(token) != 1 for token in SPECIAL):
        raise ValueError(f"{path}: each of {', '.join(SPECIAL)} must occur once.")
    return text


def newest(folder: Path) -> Path:
    """Return the checkpoint folder with the highest step."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    if not found:
        raise ValueError(f"{folder} has no checkpoint-N folder.")
    return found[-1]


def clean(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Strip PEFT's wrapping from key names; ``.base_layer`` goes, LoRA factors keep their marks."""
    out = {}
    for key, value in state.items():
        if ".original_module." in key:
            continue
        key = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        key = key.replace(".modules_to_save.default.", ".").replace(".default.", ".")
        out[key] = value
    return rename(out, NAMES)


def merge_lora(state: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return the state with every ``lora_A``/``lora_B`` pair added to its weight.

    Raises:
        ValueError: where a factor has no partner or no weight to be added to.
    """
    out = {k: v for k, v in state.items() if ".lora_" not in k}
    for key in [k for k in state if k.endswith(".lora_A.weight")]:
        stem = key.removesuffix(".lora_A.weight")
        partner, weight = f"{stem}.lora_B.weight", f"{stem}.weight"
        if partner not in state or weight not in out:
            raise ValueError(f"LoRA factor {key} lacks {partner if partner not in state else weight}.")
        delta = scale * (state[partner].float() @ state[key].float())
        out[weight] = (out[weight].float() + delta).to(out[weight].dtype)
    stray = [k for k in state if ".lora_" in k and not k.endswith((".lora_A.weight", ".lora_B.weight"))]
    if stray:
        raise ValueError(f"LoRA keys of an unknown kind: {stray[:4]} ({len(stray)}).")
    return out


def read_weights(folder: Path, release: Release, base: str) -> dict[str, Tensor]:
    """Return the merged state under the names of ``Qwen2VLModel``, with ``rm_head.weight``."""
    checkpoint = newest(folder)
    full = checkpoint / "model.pth"
    if full.is_file():
        state = clean(read(full))
    else:
        from transformers import Qwen2VLForConditionalGeneration

        model: Any = Qwen2VLForConditionalGeneration.from_pretrained(base, dtype="auto")
        state = clean(model.state_dict())
        state.update(clean(read(checkpoint / "non_lora_state_dict.pth")))
        state.update(clean(read(checkpoint / "adapter_model.safetensors")))
    state = {k: v for k, v in state.items() if not k.startswith("lm_head.")}
    return merge_lora(state, release.lora_scale)
