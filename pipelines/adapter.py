"""Any diffusers pipeline, unmodified, as a flowalign generator.

>>> generator = load(pipe, height=512, width=512, guidance_scale=4.5)  # doctest: +SKIP
>>> cond = generator.encode(["a red circle", "two blue squares"])  # doctest: +SKIP
>>> times = generator.times(28)  # doctest: +SKIP
>>> x = generator.start(torch.randn(2, *generator.shape(cond)), float(times[0]), cond)  # doctest: +SKIP
>>> posterior = generator.posterior(x, float(times[0]), cond)  # doctest: +SKIP

Nothing of the pipeline is copied or rewritten: its own ``__call__`` is run for one step at a time
(:mod:`~flowalign.pipelines.tap`), so guidance, packing, image ids, shifts and decoders are its own. The state ``x`` is
the loop's variable as ``scheduler.step`` sees it.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowalign.pipelines import lora
from flowalign.pipelines.arguments import arguments
from flowalign.pipelines.batching import Batching
from flowalign.pipelines.condition import Inputs, Row
from flowalign.pipelines.convention import Convention
from flowalign.pipelines.decode import Decoder
from flowalign.pipelines.iterate import begin, evaluate
from flowalign.pipelines.knowledge import Knowledge
from flowalign.pipelines.latents import MediaEncoder
from flowalign.pipelines.memo import Memo
from flowalign.pipelines.memory import Setting, chosen, same_setting
from flowalign.pipelines.reading import convention
from flowalign.pipelines.rows import make_rows, modality_of, needs_inputs
from flowalign.pipelines.session import Session
from flowalign.pipelines.tap import Tap
from flowalign.pipelines.verdict import Verdict, examine
from flowalign.process import Posterior, Process, Time
from flowalign.protocols import Meta, Modality

__all__ = ["Adapter"]

log = logging.getLogger("flowalign")
PROBE_STEPS = 2
NETWORKS = ("transformer", "unet", "prior", "decoder", "model", "dit")


class Adapter:
    """The :class:`~flowalign.protocols.Pipeline` over an instantiated ``DiffusionPipeline``.

    Args:
        pipe: the user's pipeline. It is never written to: it works as before, during and after.
        call: arguments of every call (``height``, ``guidance_scale``, ``num_frames``, ``negative_prompt``, ...).
        modality: what it makes; guessed from the call's signature when None.
        guided: whether the pipeline's own guidance rule is on.
        check: whether the self-test is still to run, at the first :meth:`encode`.

    Raises:
        ValueError: if the call does not take one of the arguments, or the pipeline cannot be tapped.
    """

    def __init__(
        self,
        pipe: Any,
        call: Mapping[str, Any] | None = None,
        modality: Modality | None = None,
        guided: bool = True,
        check: bool = False,
    ) -> None:
        self.pipe, self.guided = pipe, guided
        self.memo = Memo()
        self.tap = Tap(pipe, self.memo)
        given = dict(call or {})
        if unknown := sorted(given.keys() - self.tap.accepted):
            raise ValueError(
                f"{type(pipe).__name__} takes no argument {', '.join(unknown)}; its call takes "
                f"{', '.join(sorted(self.tap.accepted))}."
            )
        self.texts = {k: v for k, v in given.items() if "prompt" in k and isinstance(v, str) and k != "prompt"}
        self.base = {k: v for k, v in given.items() if k not in self.texts}
        self.modality: Modality = modality or modality_of(self.tap.accepted)
        self.convention: Convention = convention(pipe.scheduler)
        self.steps = int(given.get("num_inference_steps", PROBE_STEPS))
        self.example: Inputs | None = None
        self.known = Knowledge(self)
        self.batching = Batching(self)
        self.decoder = Decoder(self)
        self.media_encoder = MediaEncoder(self.decoder)
        self.sdpa: str | None = None
        self.setting: Setting | None = None
        self.pending = check
        self.verdict = Verdict(type(pipe).__name__, "not tried", reason="the self-test was switched off")

    # -- what it is --------------------------------------------------------------------------------------------
    @property
    def process(self) -> Process:
        """The noising process of the states that ``scheduler.step`` sees."""
        return self.convention.process

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks that the loop runs, by component name; several for two experts or a ControlNet."""
        modules = self.tap.modules()
        seen = {name for plan in self.known.plans.values() for name, _ in plan.networks}
        experts = {k for k in modules if k in NETWORKS or k.removesuffix("_2") in NETWORKS}
        return {k: m for k, m in modules.items() if k in seen | experts}

    @property
    def denoiser(self) -> nn.Module:
        """The trainable network: LoRA goes here. Two experts come as a ``ModuleDict`` of both."""
        found = self.networks
        main = [k for k in NETWORKS if k in found] or list(found)
        if not main:
            raise ValueError(
                f"{type(self.pipe).__name__} has no network among its components {list(self.tap.modules())}."
            )
        experts = [k for k in found if k.removesuffix("_2") == main[0]]
        return found[main[0]] if len(experts) < 2 else nn.ModuleDict({k: found[k] for k in experts})

    # -- conditions --------------------------------------------------------------------------------------------
    def encode(self, prompts: Sequence[str], meta: Meta | None = None, seeds: Sequence[int] | None = None) -> Inputs:
        """Return the condition of these prompts; everything that can be encoded is encoded now, once.

        Args:
            prompts: one per row; "" where the pipeline takes no text.
            meta: per row, further arguments of the pipeline's call (``image``, ``mask_image``, ``negative_prompt``,
                ``class_labels``, ...); keys that the call does not take are left to the rewards.
            seeds: per row, of the pipeline's own draws other than the starting noise.

        Raises:
            ValueError: for an empty list, things that are not strings, a meta of another length, or prompts of which
                some have inputs that others lack.
        """
        rows = make_rows(prompts, meta, seeds, self.tap.accepted, self.texts)
        cond = Inputs(rows, self.guided)
        self.example = cond[torch.tensor([0])]
        for part in self.batching.calls(cond):
            session = Session(stop_at_entry=True, batch=len(part))
            self.run([rows[i] for i in part], self.guided, session)
        if self.pending:
            self.examine(self.example)
        return cond

    def needs_inputs(self) -> bool:
        """Return whether the pipeline cannot be called with a prompt alone."""
        return needs_inputs(self.tap, self.base)

    def examine(self, cond: Inputs | None = None) -> Verdict:
        """Run the self-test on a condition (an example prompt when None) and keep its verdict."""
        self.pending = False
        steps, kept, self.setting = self.steps, self.setting, None  # nobody compares densities with the self-test's
        self.verdict = examine(self, cond[torch.tensor([0])] if cond is not None else self.sample())
        self.steps, self.setting = steps, kept
        if self.verdict.status == "fails":
            warnings.warn(
                f"flowalign self-test: {self.verdict}. Results with this pipeline are not to be trusted.", stacklevel=2
            )
        else:
            log.info("flowalign self-test: %s", self.verdict)
        return self.verdict

    # -- times and shapes --------------------------------------------------------------------------------------
    def times(self, steps: int, cond: Inputs | None = None) -> Tensor:
        """Return ``(n + 1,)`` falling float64 times: the pipeline's own grid, resolution-dependent shift included.

        ``n`` is the number of network evaluations, which is ``steps`` but for solvers of higher order and for
        image-to-image pipelines, which start inside their grid.

        Args:
            steps: what the pipeline is given as ``num_inference_steps``.
            cond: whose resolution; the last one encoded when None.

        Raises:
            ValueError: for fewer than one step.
        """
        if steps < 1:
            raise ValueError(f"a grid needs at least one step; got {steps}.")
        self.steps = steps
        return self.known.grid(cond if cond is not None else self.sample(), steps).times.clone()

    def shape(self, cond: Inputs | None = None) -> tuple[int, ...]:
        """Return the shape of one sample's state."""
        return self.known.plan(cond if cond is not None else self.sample()).shape

    def sample(self) -> Inputs:
        """Return the condition last encoded, one row of it, or an example prompt."""
        if self.example is None:
            rows = make_rows(["a photo"], None, None, self.tap.accepted, self.texts)
            self.example = Inputs(rows, self.guided)
        return self.example

    # -- states ------------------------------------------------------------------------------------------------
    def start(self, noise: Tensor, t: float, cond: Inputs) -> Tensor:
        """Return the states at which the pipeline's loop begins for this standard normal ``(B, *shape)``.

        The pipeline's own ``prepare_latents`` says how: scaled by ``init_noise_sigma``, mixed with an input image, with
        pinned frames; see :func:`flowalign.pipelines.iterate.begin`.

        Raises:
            ValueError: if t is not the first time of a grid, or the noise has another shape.
        """
        self._check(noise, cond)
        return begin(self, noise, t, cond)

    def posterior(self, x: Tensor, t: Time, cond: Inputs) -> Posterior:
        """Return ``E[x0|x], E[ε|x]``: one iteration of the pipeline's own loop, guidance included; differentiable.

        Args:
            x: states ``(B, *shape)``.
            t: one time or ``(B,)`` times in (0, 1]; different times run in one batch where the pipeline allows it.
            cond: B rows.

        Raises:
            ValueError: for states of another shape, or a condition of another length.
        """
        self._check(x, cond)
        same_setting(self)
        raw, mean, seen = evaluate(self, x, t, cond)
        if "pred_original_sample" in self.known.plan(cond).echoed:  # Cosmos 1 hands its x0 to step()
            return replace(self.process.posterior(seen, t, x0=mean), output=raw)
        return replace(self.convention.read(seen, t, mean), output=raw)

    def _check(self, x: Tensor, cond: Inputs) -> None:
        want = self.known.plan(cond).shape
        if len(x) != len(cond) or tuple(x.shape[1:]) != want:
            raise ValueError(
                f"states must have shape ({len(cond)}, {', '.join(map(str, want))}): one row per condition, in "
                f"the layout that the pipeline's scheduler sees; got {tuple(x.shape)}."
            )

    # -- calls -------------------------------------------------------------------------------------------------
    def arguments(self, rows: Sequence[Row], guided: bool, steps: int, output_type: str = "pt") -> dict[str, Any]:
        """Return the arguments of one call; see :func:`flowalign.pipelines.arguments.arguments`."""
        return arguments(self.tap, self.base, rows, guided, steps, output_type)

    def forget_setting(self) -> None:
        """Allow another precision or attention backend from here on; densities of earlier rollouts no longer apply."""
        self.setting = None

    def relearn(self) -> None:
        """Forget everything that was learnt of the pipeline, e.g. after its precision has changed."""
        self.known = Knowledge(self)
        self.batching = Batching(self)
        self.memo.forget()
        self.decoder = Decoder(self)
        self.media_encoder = MediaEncoder(self.decoder)

    def free_encoders(self) -> list[str]:
        """Move the encoders to the CPU; they come back for the length of a call when a new prompt is encoded."""
        names = [k for k in self.tap.modules() if k.startswith(("text_encoder", "image_encoder"))]
        for name in names:
            self.tap.freed[name] = self.tap.modules()[name].to("cpu")
        return names

    def device(self) -> torch.device:
        """Return where the pipeline's networks are."""
        first = next(iter(self.tap.modules().values()), None)
        return torch.device("cpu") if first is None else next(first.parameters()).device

    def run(self, rows: Sequence[Row], guided: bool, session: Session, steps: int | None = None) -> Any:
        """Run the pipeline under a session, in the chosen attention kernel."""
        session.batch = len(rows)
        by_prompt = "encode_prompt" in vars(self.tap.shadow_class) and "prior" not in vars(self.pipe)
        session.module_memo = bool(rows[0].kind) or not by_prompt
        call = self.arguments(rows, guided, steps if steps is not None else max(self.steps, 2))
        with chosen(self.sdpa):
            return self.tap.call(call, session)

    # -- media -------------------------------------------------------------------------------------------------
    def decode(
        self,
        x: Tensor,
        cond: Inputs,
        *,
        chunk: int | None = None,
        frames: Sequence[int] | None = None,
        checkpoint: bool = False,
    ) -> Tensor:
        """Return media of states at data time; differentiable, also where pixels leave their range.

        Args:
            x: ``(B, *shape)``.
            cond: B rows.
            chunk: samples decoded at a time; all when None.
            frames: of a video, which to return, negative ones from the end; only the latents that they need are
                decoded, which of a causal autoencoder is everything up to the last of them
                (:mod:`flowalign.pipelines.frames`).
            checkpoint: recompute the decoder in the backward pass.
        """
        self._check(x, cond)
        return self.decoder(x, cond, chunk=chunk, frames=frames, checkpoint=checkpoint)

    def frames_apart(self, cond: Inputs) -> int:
        """Return how many frames can be decoded by themselves at the price of one each; 1 where they need others."""
        return self.decoder.frames_apart(cond) if self.modality == "video" else 1

    def latents(self, media: Tensor, cond: Inputs) -> Tensor:
        """Return clean states ``(B, *shape)`` of media: the way in."""
        return self.media_encoder(media, cond)

    # -- LoRA --------------------------------------------------------------------------------------------------
    @property
    def experts(self) -> dict[str, nn.Module]:
        """The networks to train, by component name: the denoiser, or both experts."""
        found = self.denoiser
        if isinstance(found, nn.ModuleDict):
            return dict(found.items())
        return {k: m for k, m in self.networks.items() if m is found}

    def add_lora(
        self, rank: int = 16, alpha: float | None = None, targets: Sequence[str] | None = None, seed: int = 0
    ) -> list[nn.Parameter]:
        """Put a fresh LoRA on the denoiser, freeze the rest of it, and return the trainable parameters.

        See :func:`flowalign.pipelines.lora.add`.
        """
        return lora.add(self.experts, rank, alpha, targets, seed=seed)

    def load_lora(self, path: Path | str) -> None:
        """Read LoRA weights in diffusers format; refuses those of another model before touching anything."""
        lora.load(self.pipe, self.experts, path)

    # -- files -------------------------------------------------------------------------------------------------
    def save(self, path: Path | str) -> None:
        """Write what was trained: LoRA weights if there are any, else the whole pipeline, in diffusers format."""
        lora.save(self.pipe, self.experts, Path(path))
