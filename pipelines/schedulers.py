"""The kernels as diffusers schedulers: a plain ``pipe(...)`` call samples with the SDE.

>>> config = pipe.scheduler.config  # doctest: +SKIP
>>> pipe.scheduler = FlowSdeScheduler.from_config(config, kernel="flow_grpo", level=0.7)  # doctest: +SKIP
>>> pipe("a red circle", generator=torch.Generator().manual_seed(0))  # doctest: +SKIP
>>> pipe.scheduler.trace[0].log_prob  # doctest: +SKIP

What a step does, and where its noise comes from, says :mod:`flowalign.pipelines.kernel_step`; the classes here take the
configurations of diffusers' own schedulers and make their grids.

A pipeline saved with one of these is read by plain ``DiffusionPipeline.from_pretrained``, kernel and level included,
once ``flowalign.pipelines.schedulers`` has been imported (diffusers imports no module because a folder names it, and
says so). ``FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)`` gives the stock one of the same grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers import SchedulerMixin as SchedulerMixin  # diffusers looks here for the base class of a saved scheduler
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from flowalign.pipelines.convention import Convention, Flow
from flowalign.pipelines.kernel_step import KERNELS, Sampler, StepOutput, StepRecord, kernel_of
from flowalign.pipelines.reading import convention
from flowalign.process import Rectified

__all__ = ["KERNELS", "DiffusionSdeScheduler", "FlowSdeScheduler", "StepOutput", "StepRecord", "kernel_of"]


class FlowSdeScheduler(Sampler, FlowMatchEulerDiscreteScheduler):
    """Flow-matching schedulers (FlowMatchEuler, and UniPC or DPM++ with flow sigmas) with a kernel.

    ``from_config`` takes the configuration of the scheduler that it replaces: shift, dynamic shift and sigma schedule
    stay; a UniPC's ``flow_shift`` becomes ``shift``.

    Args:
        kernel: one of ``KERNELS``.
        level: its noise level.
        num_train_timesteps, shift, use_dynamic_shifting, base_shift, max_shift, base_image_seq_len, max_image_seq_len,
            invert_sigmas, shift_terminal, use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, time_shift_type,
            stochastic_sampling: as in diffusers.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        stochastic_sampling: bool = False,
        kernel: str = "flow_grpo",
        level: float = 0.7,
    ) -> None:
        kernel_of(kernel, level)
        super().__init__(  # by name: diffusers takes positional arguments for defaults, and drops them
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
            invert_sigmas=invert_sigmas,
            shift_terminal=shift_terminal,
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
            time_shift_type=time_shift_type,
            stochastic_sampling=stochastic_sampling,
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Make one from the configuration of any flow scheduler."""
        if "flow_shift" in config and "shift" not in kwargs:
            kwargs["shift"] = config["flow_shift"]
        flow = config.get("prediction_type") in ("flow", "flow_prediction") or config.get("use_flow_sigmas")
        if "alphas_cumprod" in config or ("beta_schedule" in config and not flow):
            raise ValueError(
                "this configuration is a diffusion scheduler's (it has betas and no flow sigmas): use "
                "DiffusionSdeScheduler.from_config."
            )
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def _convention(self) -> Convention:
        return Flow(Rectified(), float(self.config.num_train_timesteps), bool(self.config.invert_sigmas))

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """Make the grid as diffusers does, and start a new trace."""
        super().set_timesteps(*args, **kwargs)
        self._restart()

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple[Tensor]:
        """Take one step of the kernel and record it."""
        if self.step_index is None:
            self._init_step_index(timestep)
        out = self._take(model_output, timestep, sample, generator)
        self._step_index += 1
        return out if return_dict else (out.prev_sample,)


class DiffusionSdeScheduler(Sampler, DDIMScheduler):
    """Variance-preserving schedulers (DDIM, PNDM, DDPM, DPM++, Euler's configurations) with a kernel.

    Args:
        kernel: one of ``KERNELS``; ``ddim`` with level 0 is the stock DDIM.
        level: its noise level.
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, clip_sample, set_alpha_to_one,
            steps_offset, prediction_type, thresholding, dynamic_thresholding_ratio, clip_sample_range,
            sample_max_value, timestep_spacing, rescale_betas_zero_snr: as in diffusers; clipping and thresholding are
            not applied, since the mean of a clipped prediction has no gradient.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        clip_sample: bool = False,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        kernel: str = "ddim",
        level: float = 1.0,
    ) -> None:
        kernel_of(kernel, level)
        super().__init__(  # by name: diffusers takes positional arguments for defaults, and drops them
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            clip_sample=clip_sample,
            set_alpha_to_one=set_alpha_to_one,
            steps_offset=steps_offset,
            prediction_type=prediction_type,
            thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            clip_sample_range=clip_sample_range,
            sample_max_value=sample_max_value,
            timestep_spacing=timestep_spacing,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )

    def _convention(self) -> Convention:
        return convention(self)

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """Make the grid as diffusers does, and start a new trace."""
        super().set_timesteps(*args, **kwargs)
        self._restart()

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple[Tensor, Tensor]:
        """Take one step of the kernel and record it."""
        out = self._take(model_output, timestep, sample, generator)
        return out if return_dict else (out.prev_sample, out.pred_original_sample)
