"""The zoo builds, runs, repeats, and names every pipeline class of the installed diffusers exactly once."""

from __future__ import annotations

import inspect

import pytest
import torch

from . import build, names

REPRESENTATIVE = ["Flux", "StableDiffusion", "StableDiffusion3", "StableDiffusionXL", "Wan", "Wan_22"]


def run(name: str, seed: int = 0) -> torch.Tensor:
    """Build a case, call it, and return its first output as one tensor."""
    case = build(name, seed)
    extra = {}
    if "generator" in inspect.signature(inspect.unwrap(type(case.pipe).__call__)).parameters:
        extra["generator"] = torch.Generator().manual_seed(seed)
    out = case.pipe(**case.inputs, **extra, num_inference_steps=case.steps, output_type=case.output_type)[0]
    while isinstance(out, list | tuple):
        out = out[0]
    return torch.as_tensor(out)


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_representative_runs(name):
    out = run(name)
    assert out.isfinite().all() and out.float().std() > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_runs(name):
    out = run(name)
    assert out.isfinite().all() and out.float().std() > 0
