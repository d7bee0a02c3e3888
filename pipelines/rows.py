"""What comes in from outside: prompts and their extras become rows, or an error that names what is wrong."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from flowalign.pipelines.condition import Row
from flowalign.pipelines.tap import Tap
from flowalign.protocols import Meta, Modality

__all__ = ["make_rows", "modality_of", "needs_inputs"]


def make_rows(
    prompts: Sequence[str],
    meta: Meta | None,
    seeds: Sequence[int] | None,
    accepted: Collection[str],
    texts: Mapping[str, str],
) -> tuple[Row, ...]:
    """Return one row per prompt.

    Args:
        prompts: their texts.
        meta: per row, further arguments of the pipeline's call; those not in ``accepted`` are left to the rewards.
        seeds: per row; 0 when None.
        accepted: what the pipeline's call takes.
        texts: arguments of every row that run along the batch (``negative_prompt``).

    Raises:
        ValueError: for an empty list, things that are not strings, a meta of another length, or rows of which some
            have inputs that others lack or that have another size.
    """
    if isinstance(prompts, str) or not len(prompts) or not all(isinstance(p, str) for p in prompts):
        kinds = sorted({type(p).__name__ for p in prompts})
        raise ValueError(
            f"prompts must be a non-empty list of strings, one per row; got {type(prompts).__name__} of {kinds}."
        )
    for what, given in (("meta", meta), ("seeds", seeds)):
        if given is not None and len(given) != len(prompts):
            raise ValueError(f"{what} must have one entry per prompt; got {len(given)} for {len(prompts)} prompts.")
    extras = [
        {
            **texts,
            **{k: v for k, v in (meta[i] if meta else {}).items() if k in accepted and k != "prompt"},
        }
        for i in range(len(prompts))
    ]
    rows = tuple(Row(p, e, seeds[i] if seeds else 0) for i, (p, e) in enumerate(zip(prompts, extras, strict=True)))
    if len({frozenset(r.inputs) for r in rows}) > 1:
        lists = sorted({tuple(sorted(r.inputs)) for r in rows})
        raise ValueError(
            f"all rows of one batch need the same kinds of inputs; these have {' and '.join(map(str, lists))}. "
            "Give every row the same keys, or encode them in separate batches."
        )
    if len({r.kind for r in rows}) > 1:
        raise ValueError(
            f"all rows of one batch need inputs of the same size; "
            f"these have {sorted({str(r.kind) for r in rows})}. "
            "Resize them, or encode them in separate batches."
        )
    return rows


def needs_inputs(tap: Tap, base: Mapping[str, Any]) -> bool:
    """Return whether the pipeline cannot be called with a prompt and ``base`` alone."""
    wanted = [p.name for p in tap.signature.parameters.values() if p.default is p.empty and p.name != "self"]
    given = base.keys() | {"prompt"}
    pictures = {"image", "images", "video", "control_image", "mask_image", "source", "class_labels", "input_image"}
    extra = {k for k in tap.accepted & pictures if k not in given}
    return "prompt" not in tap.accepted or bool(set(wanted) - given) or bool(extra)


def modality_of(accepted: Collection[str]) -> Modality:
    """Guess what a pipeline makes from what its call takes."""
    if not {"num_frames", "video_length"}.isdisjoint(accepted):
        return "video"
    return "audio" if any("audio" in name for name in accepted) else "image"
