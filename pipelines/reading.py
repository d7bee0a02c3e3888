"""Which convention a scheduler follows, read from its attributes and configuration."""

from __future__ import annotations

import math
from typing import Any

import torch

from flowalign.pipelines.convention import Convention, Diffusion, Flow, KDiffusion, Ratio
from flowalign.pipelines.edm import Arc, Edm, Trig
from flowalign.process import Karras, Rectified, Rescaled, VariancePreserving

__all__ = ["convention"]

CONSISTENCY = ("LCMScheduler",)


def convention(scheduler: Any) -> Convention:
    """Return what ``scheduler`` means, read from its attributes and configuration after ``set_timesteps``.

    Raises:
        ValueError: if it follows none of the known conventions; the pipeline's own solver can still be replayed by
            :class:`~flowalign.pipelines.handover.Handover`, but no other kernel has a meaning there.
    """
    config, name, state = scheduler.config, type(scheduler).__name__, vars(scheduler)
    prediction = config.get("prediction_type", "epsilon")
    n = float(config.get("num_train_timesteps", 1000) or 1000)
    flow = prediction in ("flow", "flow_prediction") or bool(config.get("use_flow_sigmas", False))
    kinds = [kind.__name__ for kind in type(scheduler).__mro__]  # flowalign's own schedulers are subclasses
    if flow or any(kind.startswith(("FlowMatch", "FlowMap", "LTXEulerAncestralRF", "Helios")) for kind in kinds):
        top = float(config.get("sigma_max") or 1.0)
        if top > 1 and config.get("use_karras_sigmas"):  # Cosmos 2: σ up to 80, and the "velocity" is dx/dσ = ε
            return KDiffusion(Karras(top, 7.0), "epsilon", int(n))
        return Flow(Rectified(), n, bool(config.get("invert_sigmas", False)))
    if prediction == "trigflow":
        return Trig(Arc(float(config.sigma_data)))
    if name == "DDPMWuerstchenScheduler":
        return _ratio(scheduler)
    if config.get("sigma_data") is not None and "sigmas" in state and "alphas_cumprod" not in state:
        return _edm(scheduler, prediction)
    if "alphas_cumprod" in state:
        return _diffusion(scheduler, prediction, int(n))
    raise ValueError(
        f"{name} follows no convention that is known here (flow sigmas, alphas_cumprod, k-diffusion or EDM sigmas, "
        "TrigFlow). Give the pipeline a scheduler of one of these kinds, or use its own solver through Handover alone."
    )


def _edm(scheduler: Any, prediction: str) -> Edm:
    config = scheduler.config
    consistency = type(scheduler).__name__ == "CMStochasticIterativeScheduler"
    top = float(scheduler.sigmas.max()) if not consistency else float(config.sigma_max)
    return Edm(
        Karras(top, float(config.get("rho", 7.0))),
        float(config.sigma_data),
        float(config.sigma_min) if consistency else 0.0,
        -1.0 if prediction == "v_prediction" else 1.0,
        consistency,
    )


def _diffusion(scheduler: Any, prediction: str, n: int) -> Convention:
    config, state = scheduler.config, vars(scheduler)
    name = type(scheduler).__name__
    scaled = "sigmas" in state and name.startswith(("Euler", "Heun", "LMS", "KDPM2", "DPMSolverSDE"))
    final = state.get("final_alpha_cumprod")
    if config.get("final_sigmas_type") == "sigma_min":
        final = scheduler.alphas_cumprod[0]
    process = VariancePreserving.from_alphas_cumprod(scheduler.alphas_cumprod, None if final is None else float(final))
    if not scaled:
        boundary = None
        if name in CONSISTENCY:
            boundary = (float(config.timestep_scaling), 0.5)
        return Diffusion(process, prediction, n, "sigmas" in state, boundary)
    top = float(scheduler.sigmas.max())
    if config.get("use_karras_sigmas") and config.get("sigma_max") is not None:
        top = float(config.sigma_max)  # before set_timesteps, sigmas still are those of the table
    continuous = config.get("timestep_type") == "continuous"
    if continuous or math.atan(top) > process.angles[-1] + 1e-4:
        return KDiffusion(Karras(top, 7.0), prediction, n, continuous)
    return KDiffusion(Rescaled(process), prediction, n)


def _ratio(scheduler: Any, knots: int = 4096) -> Ratio:
    grid = torch.arange(1, knots + 1, dtype=torch.float64) / knots
    alphas = scheduler._alpha_cumprod(grid, torch.device("cpu")).double()
    final = scheduler._alpha_cumprod(torch.zeros(1, dtype=torch.float64), torch.device("cpu"))
    table = VariancePreserving.from_alphas_cumprod(alphas.cummin(0).values, float(final))
    return Ratio(table, "epsilon", knots)
