"""LoRA in and out, in the format that ``pipe.load_lora_weights`` reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

__all__ = ["save"]


def save(pipe: Any, networks: Mapping[str, nn.Module], path: Path) -> None:
    """Write LoRA weights, or the whole pipeline where none are."""
    from peft.utils import get_peft_model_state_dict

    layers = {f"{k}_lora_layers": get_peft_model_state_dict(m) for k, m in networks.items() if "peft_config" in vars(m)}
    path.mkdir(parents=True, exist_ok=True)
    if layers:
        pipe.save_lora_weights(path, **layers)
    else:
        pipe.save_pretrained(path)
