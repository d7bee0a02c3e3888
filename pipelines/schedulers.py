"""The kernels as diffusers schedulers: a plain ``pipe(...)`` call samples with the SDE.

>>> config = pipe.scheduler.config  # doctest: +SKIP
>>> pipe.scheduler = FlowSdeScheduler.from_config(config, kernel="flow_grpo", level=0.7)  # doctest: +SKIP
>>> pipe("a red circle", generator=torch.Generator().manual_seed(0))  # doctest: +SKIP
>>> pipe.scheduler.trace[0].log_prob  # doctest: +SKIP

Each step leaves a :class:`StepRecord` with mean, std, noise and log-probability in ``scheduler.trace``.

A pipeline saved with one of these is read by plain ``DiffusionPipeline.from_pretrained``, kernel and level included,
once ``flowalign.pipelines.schedulers`` has been imported (diffusers imports no module because a folder names it, and
says so). ``FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)`` gives the stock one of the same grid.

Most flow pipelines do not hand their ``generator`` to ``step``. The noise is therefore a pure function of the first
sample of the call (per sample: its bytes, hashed) and the number of the step: the pipeline draws that first sample from
``generator``, so the whole call is reproducible from it, and a sample does not depend on its neighbours in the batch. A
generator that does arrive at ``step`` is used instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers import SchedulerMixin as SchedulerMixin  # diffusers looks here for the base class of a saved scheduler
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor

from flowalign.kernels import Ancestral, EulerMaruyama, Kernel
from flowalign.laws import Consistency, Constant, Cps, Ddim, FlowGrpo, Memoryless, Ode
from flowalign.noise import mix
from flowalign.pipelines.convention import Convention, Flow
from flowalign.pipelines.reading import convention
from flowalign.process import Rectified

__all__ = ["KERNELS", "DiffusionSdeScheduler", "FlowSdeScheduler", "StepOutput", "StepRecord", "kernel_of"]

KERNELS = ("ode", "flow_grpo", "constant", "memoryless", "cps", "ddim", "consistency")


def kernel_of(name: str, level: float) -> Kernel:
    """Return the kernel of a name and its noise level (a, η; memoryless and consistency have none).

    Raises:
        ValueError: for an unknown name or a negative level.
    """
    if level < 0:
        raise ValueError(f"the noise level of a kernel must not be negative; got {level}.")
    table: dict[str, Kernel] = {
        "ode": EulerMaruyama(Ode()),
        "flow_grpo": EulerMaruyama(FlowGrpo(level)),
        "constant": EulerMaruyama(Constant(level)),
        "memoryless": EulerMaruyama(Memoryless()),
        "cps": Ancestral(Cps(level)),
        "ddim": Ancestral(Ddim(level)),
        "consistency": Ancestral(Consistency()),
    }
    if name not in table:
        raise ValueError(f"there is no kernel {name!r} among {', '.join(KERNELS)}.")
    return table[name]


@dataclass(frozen=True)
class StepRecord:
    """One step of the last call: ``prev_sample = mean + std · noise``.

    Attributes:
        t, s: float times.
        mean, noise: ``(B, *)``.
        std: broadcastable to the mean; zero where the step is deterministic.
        log_prob: ``(B,)``, the log-density of the step; 0 where it is deterministic.
    """

    t: float
    s: float
    mean: Tensor
    std: Tensor
    noise: Tensor
    log_prob: Tensor


@dataclass
class StepOutput(BaseOutput):
    """What ``step`` returns: the next sample and its law."""

    prev_sample: Tensor
    pred_original_sample: Tensor
    mean: Tensor
    std: Tensor
    noise: Tensor
    log_prob: Tensor


class _Sampler:
    """The step, shared by both schedulers; state is made anew by ``set_timesteps``."""

    config: Any
    timesteps: Tensor

    def _convention(self) -> Convention:
        raise NotImplementedError

    def _restart(self) -> None:
        """Read the grid; forget the call before."""
        self.law = kernel_of(self.config.kernel, self.config.level)
        self.reading = self._convention()
        self.times = tuple(self.reading.times(self).tolist())
        self.trace: list[StepRecord] = []
        self.roots: list[int] | None = None

    def _take(self, output: Tensor, timestep: Any, sample: Tensor, generator: Any) -> StepOutput:
        at = self._place(timestep)
        if len(self.trace) > at:  # another call without set_timesteps in between
            self.trace, self.roots = [], None
        t, s = self.times[at], self.times[at + 1]
        if self.roots is None:
            self.roots = [_root(row) for row in sample]
        x = sample.float()
        posterior = self.reading.read(x, t, output)
        law, _ = self.law(x, posterior, t, s)
        noisy = self.law.stochastic(t, s)
        noise = self._noise(at, law.mean, generator) if noisy else torch.zeros_like(law.mean)
        drawn = law.sample(noise) if noisy else law.mean
        log_prob = law.log_prob(drawn) if noisy else drawn.new_zeros(len(drawn))
        self.trace.append(StepRecord(t, s, law.mean, law.std, noise, log_prob))
        return StepOutput(drawn.to(sample.dtype), posterior.x0, law.mean, law.std, noise, log_prob)

    def _place(self, timestep: Any) -> int:
        found = (self.timesteps == torch.as_tensor(timestep).to(self.timesteps)).nonzero().flatten()
        if not len(found):
            raise ValueError(f"timestep {float(timestep)} is not on the grid {self.timesteps.tolist()}.")
        return int(found[0])

    def _noise(self, at: int, like: Tensor, generator: Any) -> Tensor:
        from diffusers.utils.torch_utils import randn_tensor

        if generator is not None:
            return randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)
        assert self.roots is not None
        draws = [torch.Generator().manual_seed(mix(root, at)) for root in self.roots]
        return torch.stack([torch.randn(like.shape[1:], generator=g) for g in draws]).to(like)


class FlowSdeScheduler(_Sampler, FlowMatchEulerDiscreteScheduler):
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


class DiffusionSdeScheduler(_Sampler, DDIMScheduler):
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


def _root(row: Tensor) -> int:
    """Return a seed that depends on the content of one sample alone."""
    data = row.detach().float().cpu().contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "big")
