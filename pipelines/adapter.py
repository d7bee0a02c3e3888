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
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowalign.pipelines import lora
from flowalign.pipelines.arguments import arguments
from flowalign.pipelines.batching import Batching
from flowalign.pipelines.condition import Inputs, Row
from flowalign.pipelines.convention import Convention, convention
from flowalign.pipelines.decode import Decoder
from flowalign.pipelines.grid import Grid
from flowalign.pipelines.memo import Memo
from flowalign.pipelines.memory import Setting, setting
from flowalign.pipelines.plan import Plan, learn
from flowalign.pipelines.tap import Session, Tap, Visit
from flowalign.pipelines.verdict import Verdict, examine
from flowalign.process import Posterior, Process, Time
from flowalign.protocols import Meta, Modality

__all__ = ["Adapter"]

log = logging.getLogger("flowalign")
PROBE_STEPS = 2
KERNELS = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash_sdpa": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
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
        self.modality: Modality = modality or _modality(self.tap.accepted)
        self.convention: Convention = convention(pipe.scheduler)
        self.steps = int(given.get("num_inference_steps", PROBE_STEPS))
        self.example: Inputs | None = None
        self.plans: dict[Any, Plan] = {}
        self.grids: dict[Any, Grid] = {}
        self.starts: dict[Any, tuple[Tensor, Tensor]] = {}
        self.batching = Batching(self)
        self.decoder = Decoder(self)
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
        seen = {name for plan in self.plans.values() for name, _ in plan.networks}
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
        rows = self._rows(prompts, meta, seeds)
        cond = Inputs(rows, self.guided)
        self.example = cond[torch.tensor([0])]
        for part in self.batching.calls(cond):
            session = Session(stop_at_entry=True, batch=len(part))
            self._run([rows[i] for i in part], self.guided, session)
        if self.pending:
            self.examine(self.example)
        return cond

    def needs_inputs(self) -> bool:
        """Return whether the pipeline cannot be called with a prompt alone."""
        wanted = [p.name for p in self.tap.signature.parameters.values() if p.default is p.empty and p.name != "self"]
        given = self.base.keys() | {"prompt"}
        pictures = {"image", "images", "video", "control_image", "mask_image", "source", "class_labels", "input_image"}
        extra = {k for k in self.tap.accepted & pictures if k not in given}
        return "prompt" not in self.tap.accepted or bool(set(wanted) - given) or bool(extra)

    def examine(self, cond: Inputs | None = None) -> Verdict:
        """Run the self-test on a condition (an example prompt when None) and keep its verdict."""
        self.pending = False
        steps = self.steps
        self.verdict = examine(self, cond[torch.tensor([0])] if cond is not None else self._example())
        self.steps = steps
        if self.verdict.status == "fails":
            warnings.warn(
                f"flowalign self-test: {self.verdict}. Results with this pipeline are not to be trusted.", stacklevel=2
            )
        else:
            log.info("flowalign self-test: %s", self.verdict)
        return self.verdict

    def _rows(self, prompts: Sequence[str], meta: Meta | None, seeds: Sequence[int] | None) -> tuple[Row, ...]:
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
                **self.texts,
                **{k: v for k, v in (meta[i] if meta else {}).items() if k in self.tap.accepted and k != "prompt"},
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
        return self._grid(cond if cond is not None else self._example(), steps).times.clone()

    def shape(self, cond: Inputs | None = None) -> tuple[int, ...]:
        """Return the shape of one sample's state."""
        return self._plan(cond if cond is not None else self._example()).shape

    def _example(self) -> Inputs:
        if self.example is None:
            self.example = Inputs(self._rows(["a photo"], None, None), self.guided)
        return self.example

    def _plan(self, cond: Inputs) -> Plan:
        key = (cond.rows[0].kind, cond.guided)
        if key not in self.plans:
            steps = self._two(cond)
            self.plans[key] = learn(self.tap, self.arguments(cond.rows[:1], cond.guided, steps))
        return self.plans[key]

    def _two(self, cond: Inputs) -> int:
        """Return a number of steps whose grid has at least two entries (image-to-image starts inside its grid)."""
        steps = max(self.steps, 2)
        while len(self._grid(cond, steps)) < 2 and steps < 64:
            steps *= 2
        return steps

    def _grid(self, cond: Inputs, steps: int) -> Grid:
        key = (cond.rows[0].kind, steps)
        if key not in self.grids:
            session = Session(stop_at_entry=True)
            self._run(cond.rows[:1], cond.guided, session, steps)
            if session.track is None:
                raise ValueError(
                    f"{type(self.pipe).__name__} ended without iterating the grid that scheduler.set_timesteps made; "
                    "its loop cannot be tapped."
                )
            self.grids[key] = Grid.of(session.track, session.offset, session.scheduler, self.convention)
        return self.grids[key]

    def _locate(self, cond: Inputs, t: float) -> tuple[Grid, int]:
        """Return the grid on which ``t`` lies, the current one first, and its number of steps."""
        current = self._grid(cond, self.steps)
        if current.find(t) is None:
            for (kind, steps), grid in self.grids.items():
                if kind == cond.rows[0].kind and grid.find(t) is not None:
                    return grid, steps
        return current, self.steps

    def known_grids(self) -> list[Grid]:
        """Return the grids asked for so far, those of the current number of steps first."""
        return [g for _, g in sorted(self.grids.items(), key=lambda item: item[0][1] != self.steps)]

    def any_plan(self) -> Plan:
        """Return the plan of the last kind of call (solver arguments do not differ between kinds)."""
        return next(reversed(self.plans.values())) if self.plans else self._plan(self._example())

    @property
    def settles(self) -> bool:
        """Whether the pipeline changes its latents between two steps (blending, pinned frames)."""
        return any(plan.settle for plan in self.plans.values())

    # -- states ------------------------------------------------------------------------------------------------
    def start(self, noise: Tensor, t: float, cond: Inputs) -> Tensor:
        """Return the states at which the pipeline's loop begins for this standard normal ``(B, *shape)``.

        The pipeline's own ``prepare_latents`` says how: scaled by ``init_noise_sigma``, mixed with an input image, with
        pinned frames. It is affine in the noise, so two calls with constant noise tell.

        Raises:
            ValueError: if t is not the first time of a grid, or the noise has another shape.
        """
        self._check(noise, cond)
        grid, steps = self._locate(cond, float(t))
        if float(t) != grid.listed[0]:
            raise ValueError(
                f"{type(self.pipe).__name__} starts at t = {grid.listed[0]:.6g} "
                f"with {steps} steps, not at {float(t):.6g}. "
                "Start at times[0]; for a clean state x0 use process.diffuse(x0, t, noise)."
            )
        key = (cond.rows[0].kind, steps, cond.guided) if not cond.rows[0].kind else None
        if key is None or key not in self.starts:
            who = cond[torch.tensor([0])] if key is not None else cond
            offset, one = (self._begin(who, steps, value) for value in (0.0, 1.0))
            if torch.equal(offset, one):
                raise ValueError(
                    f"{type(self.pipe).__name__} does not draw its starting noise with randn_tensor, so start() cannot "
                    "replace it. Make the first state yourself: noise * pipe.scheduler.init_noise_sigma."
                )
            pair = (offset, one - offset)
            if key is not None:
                self.starts[key] = pair
        else:
            pair = self.starts[key]
        return pair[0] + pair[1] * noise.to(pair[0])

    def _begin(self, cond: Inputs, steps: int, value: float) -> Tensor:
        plan = self._plan(cond)
        found: list[Tensor] = []
        with torch.no_grad():
            for part in self.batching.calls(cond):
                session = plan.session(len(part), visits=[Visit(0, real=False)], noise=value)
                self._run([cond.rows[i] for i in part], cond.guided, session, steps)
                found.append(plan.pack([c.sample for c in session.captured], len(part)))
        return torch.cat(found).float()

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
        self._same_setting()
        raw, mean, seen = self._evaluate(x, t, cond)
        if "pred_original_sample" in self._plan(cond).echoed:  # Cosmos 1 hands its x0 to step()
            return replace(self.process.posterior(seen, t, x0=mean), output=raw)
        return replace(self.convention.read(seen, t, mean), output=raw)

    def _check(self, x: Tensor, cond: Inputs) -> None:
        want = self._plan(cond).shape
        if len(x) != len(cond) or tuple(x.shape[1:]) != want:
            raise ValueError(
                f"states must have shape ({len(cond)}, {', '.join(map(str, want))}): one row per condition, in "
                f"the layout that the pipeline's scheduler sees; got {tuple(x.shape)}."
            )

    def _evaluate(self, x: Tensor, t: Time, cond: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Return the raw output, the part of it that predicts the mean, and the states that the network really saw.

        Times and rows may be mixed freely. The states are x itself but where the pipeline blends or pins between steps.
        """
        times = torch.as_tensor(t, dtype=torch.float64).cpu()
        single = times.ndim == 0 or bool((times == times[0]).all())
        groups: list[tuple[Any, list[int]]]
        if single or self.batching.spreads(x, times, cond):
            shared: Any = float(times.reshape(-1)[0]) if single else times
            groups = [(shared, list(range(len(x))))]
        else:
            groups = [(float(v), (times == v).nonzero().flatten().tolist()) for v in times.unique()]
        pieces: list[tuple[list[int], tuple[Tensor, Tensor, Tensor]]] = []
        for when, members in groups:
            index = torch.tensor(members)
            for part in self.batching.calls(cond[index]):
                own = index[torch.tensor(part)]
                whole = len(own) == len(x)
                part_t = when[own] if isinstance(when, Tensor) else when
                got = self._step(x if whole else x[own.to(x.device)], part_t, cond if whole else cond[own])
                pieces.append((own.tolist(), got))
        if len(pieces) == 1:
            return pieces[0][1]
        back = torch.tensor([i for own, _ in pieces for i in own]).argsort().to(x.device)
        raw, mean, seen = (torch.cat([got[k] for _, got in pieces])[back] for k in range(3))
        return raw, mean, seen

    def _step(self, x: Tensor, t: Any, cond: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Run one iteration for rows that fit in one call."""
        plan, batch = self._plan(cond), len(x)
        first = float(t[0]) if isinstance(t, Tensor) else float(t)
        grid, steps = self._locate(cond, first)
        spot = grid.spot(first)
        time = None
        if isinstance(t, Tensor):
            values = [grid.spot(float(v)) for v in t]
            stamps = [grid.timesteps[s.index] if s.timestep is None else torch.tensor(s.timestep) for s in values]
            time = torch.stack([s.to(grid.timesteps) for s in stamps])
        parts = plan.unpack(x)
        visits = [Visit(0, put=parts, real=plan.warm == "real")] if plan.warm and spot.index > 0 else []
        enters = plan.way == "P" or (plan.way == "PS" and spot.index == 0)
        if not enters or (plan.settle and spot.index > 0):
            visits.append(Visit(max(spot.index - 1, 0), put=parts, real=False))
        visits.append(Visit(spot.index, time=time))
        edit = None
        if spot.timestep is not None and spot.sigma is not None:
            edit = (spot.index + grid.offset, spot.timestep, spot.sigma)
        session = plan.session(batch, visits=visits, x=parts[0] if enters else None, edit=edit)
        self._run(cond.rows, cond.guided, session, steps)
        if not session.captured:
            raise RuntimeError(f"{type(self.pipe).__name__} left its loop without a step at t = {first:.6g}.")
        outputs = [c.output for c in session.captured]
        raw = outputs[0][:batch] if len(outputs) == 1 and plan.batched else plan.pack(outputs, batch)
        seen = plan.pack([c.sample for c in session.captured], batch) if plan.settle else x
        return raw, plan.pack(outputs, batch), seen

    # -- calls -------------------------------------------------------------------------------------------------
    def _device(self) -> torch.device:
        first = next(iter(self.tap.modules().values()), None)
        return torch.device("cpu") if first is None else next(first.parameters()).device

    def arguments(self, rows: Sequence[Row], guided: bool, steps: int, output_type: str = "pt") -> dict[str, Any]:
        """Return the arguments of one call; see :func:`flowalign.pipelines.arguments.arguments`."""
        return arguments(self.tap, self.base, rows, guided, steps, output_type)

    def forget_setting(self) -> None:
        """Allow another precision or attention backend from here on; densities of earlier rollouts no longer apply."""
        self.setting = None

    def relearn(self) -> None:
        """Forget everything that was learnt of the pipeline, e.g. after its precision has changed."""
        for known in (self.plans, self.grids, self.starts):
            known.clear()
        self.batching = Batching(self)
        self.memo.forget()
        self.decoder = Decoder(self)

    def free_encoders(self) -> list[str]:
        """Move the encoders to the CPU; they come back for the length of a call when a new prompt is encoded."""
        names = [k for k in self.tap.modules() if k.startswith(("text_encoder", "image_encoder"))]
        for name in names:
            self.tap.freed[name] = self.tap.modules()[name].to("cpu")
        return names

    def _same_setting(self) -> None:
        now = setting(next(iter(self.experts.values())), self.sdpa)
        if self.setting is None:
            self.setting = now
        elif self.setting != now:
            raise RuntimeError(
                f"the network ran as {self.setting} before and would now run as {now}: densities of a rollout and "
                "of an update would differ, and the ratio would not be 1. Use the same autocast, precision and "
                "attention backend in both, or call forget_setting() if that is meant."
            )

    def _run(self, rows: Sequence[Row], guided: bool, session: Session, steps: int | None = None) -> Any:
        session.batch = len(rows)
        by_prompt = "encode_prompt" in vars(self.tap.shadow_class) and "prior" not in vars(self.pipe)
        session.module_memo = bool(rows[0].kind) or not by_prompt
        call = self.arguments(rows, guided, steps if steps is not None else max(self.steps, 2))
        if self.sdpa is None:
            return self.tap.call(call, session)
        with sdpa_kernel(KERNELS[self.sdpa]):
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
            frames: of a video, which to return (the clip is decoded whole, then picked from).
            checkpoint: recompute the decoder in the backward pass.
        """
        self._check(x, cond)
        return self.decoder(x, cond, chunk=chunk, frames=frames, checkpoint=checkpoint)

    def latents(self, media: Tensor, cond: Inputs) -> Tensor:
        """Return clean states ``(B, *shape)`` of media: the way in."""
        return self.decoder.latents(media, cond)

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


def _modality(accepted: frozenset[str]) -> Modality:
    if accepted & {"num_frames", "video_length"}:
        return "video"
    return "audio" if any("audio" in name for name in accepted) else "image"
