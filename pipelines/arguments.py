"""The keyword arguments of one call of a pipeline, and those that switch its guidance off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flowalign.pipelines.condition import Row, call_arguments
from flowalign.pipelines.tap import Tap

__all__ = ["arguments", "unguided"]

SCALES = ("true_cfg_scale", "guidance_scale", "guidance_scale_2", "audio_guidance_scale")


def arguments(
    tap: Tap, base: Mapping[str, Any], rows: Sequence[Row], guided: bool, steps: int, output_type: str = "pt"
) -> dict[str, Any]:
    """Return the arguments of one call for rows that can share it; those that the call does not take are left out.

    Each row's draws have a generator of their own where it has pictures, so that its noise does not depend on its place
    in the batch.
    """
    own = call_arguments(rows, tap.accepted)
    assert own is not None, "rows that cannot share a call"
    call = {**base, **own, "num_inference_steps": steps, "output_type": output_type, "return_dict": False}
    if "sigmas" in base or "timesteps" in base:
        call.pop("num_inference_steps")
    if len(rows) > 1 and "batch_size" in tap.accepted:
        call["batch_size"] = len(rows)
    draws = [torch.Generator().manual_seed(r.seed) for r in (rows if rows[0].kind else rows[:1])]
    call["generator"] = draws[0] if len(draws) == 1 else draws
    if not guided:
        call |= unguided(tap)
    return {k: v for k, v in call.items() if k in tap.accepted}


def unguided(tap: Tap) -> dict[str, Any]:
    """Return what switches the guidance rule off; embedded guidance is the network's own and stays.

    Pipelines disagree on what off is: a scale of 1, or of 0 in Z-Image. The pipeline's own property is asked.
    """
    scales = [k for k in SCALES if k in tap.accepted]
    if tap.pipe.config.get("boundary_ratio") is None:  # Wan with one expert refuses a scale for the second
        scales = [k for k in scales if k != "guidance_scale_2"]
    if "true_cfg_scale" in scales:
        return {"true_cfg_scale": 1.0}
    rule = getattr(type(tap.pipe), "do_classifier_free_guidance", None)
    off = 1.0
    if isinstance(rule, property) and rule.fget is not None:
        bare: Any = object.__new__(tap.shadow_class)
        vars(bare).update({**vars(tap.pipe), "_guidance_scale": 1.0})
        off = 0.0 if rule.fget(bare) else 1.0
    return dict.fromkeys(scales, off)
