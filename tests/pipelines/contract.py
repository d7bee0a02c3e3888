"""The contract of the adapter, point by point, for any case of the zoo.

Each function takes a :class:`Subject` and raises ``AssertionError`` with the number that was measured, or returns it.
``POINTS`` names them in the order of the issue. The same functions make ``pipelines/support.json``.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flowalign.kernels import EulerMaruyama
from flowalign.laws import Constant
from flowalign.noise import Stream
from flowalign.pipelines import Adapter, Handover, load
from flowalign.pipelines import lora as lora_files
from flowalign.pipelines.condition import Inputs
from flowalign.pipelines.verdict import noise_of, stock
from flowalign.policy import Policy
from flowalign.rollout import rollout
from flowalign.trajectory import Nodes
from tests.zoo import build

PLAIN = (str, int, float, bool, type(None))


@dataclass
class Subject:
    """One case of the zoo, wrapped, with its condition and what the stock call did."""

    name: str
    case: Any
    adapter: Adapter
    cond: Inputs
    steps: int
    times: list[float]
    calls: list[Any] = field(default_factory=list)
    results: list[Tensor] = field(default_factory=list)
    draws: list[list[Tensor]] = field(default_factory=list)
    media: Any = None

    @property
    def plan(self) -> Any:
        return self.adapter.known.plan(self.cond)

    def begin(self) -> Tensor:
        """The first state of the stock call."""
        return self.plan.pack([self.calls[k].sample for k in self.plan.captures], 1)

    def end(self) -> Tensor:
        """The last state of the stock call."""
        last = self.results[-self.plan.steps :]
        return self.plan.pack([last[k] for k in self.plan.captures], 1)


def split(inputs: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return the prompt, what belongs to a row, and what belongs to every call."""
    rest = dict(inputs)
    prompt = rest.pop("prompt", "")
    prompt = prompt[0] if isinstance(prompt, list) else (prompt or "")
    call = {
        k: v
        for k, v in rest.items()
        if k != "class_labels" and (isinstance(v, PLAIN) or (isinstance(v, list) and v and isinstance(v[0], PLAIN)))
    }
    return prompt, {k: v for k, v in rest.items() if k not in call}, call


def subject(name: str, seed: int = 0, double: bool = False) -> Subject:
    """Build and wrap a case, and run its stock call."""
    case = build(name, seed)
    if double:
        case.pipe.to(torch.float64)
    case.pipe.set_progress_bar_config(disable=True)
    prompt, meta, call = split(case.inputs)
    adapter = load(case.pipe, call, modality=case.modality, check=False)
    adapter.steps = max(case.steps, 2)
    cond = adapter.encode([prompt], [meta])
    steps = adapter.known.two(cond)
    verdict = adapter.examine(cond)
    assert verdict.status == "passes", verdict.reason
    times = adapter.times(steps, cond).tolist()
    ran = stock(adapter, cond, steps)
    return Subject(name, case, adapter, cond, steps, times, *ran, pixels(adapter, cond, steps))


def pixels(adapter: Adapter, cond: Inputs, steps: int) -> Tensor:
    """What the stock call, decorated as it is, returns for ``output_type="pt"``; on a copy, as it writes on itself."""
    pipe = copy.copy(adapter.pipe)
    vars(pipe)["scheduler"] = copy.copy(adapter.pipe.scheduler)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        out = pipe(**adapter.arguments(cond.rows, True, steps, "pt"))
    if type(out[0]).__name__ == "ndarray":  # legacy code that knows no "pt"
        return torch.from_numpy(out[0]).permute(0, 3, 1, 2)
    return adapter.decoder._media(out)


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest entry of b."""
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().amax() / b.abs().amax().clamp_min(1e-30))


def ode_rollout(s: Subject) -> float:
    """(1) and (2): a free rollout ends where ``pipe(...)`` ends; of a stochastic solver, with the noise that it drew.

    Without noise the rollout is the core's own loop.
    """
    kernel = Handover(s.adapter)
    if not any(s.draws):
        trajectory = rollout(
            Policy(s.adapter), kernel, torch.tensor(s.times, dtype=torch.float64), Nodes.enter(s.begin()), s.cond,
            noise=Stream(torch.Generator()),
        )  # fmt: skip
        end = trajectory.levels[-1].x
    else:
        end, carry = s.begin(), None
        for i, (t, u) in enumerate(itertools.pairwise(s.times)):
            with torch.no_grad():
                law, carry = kernel(end, s.adapter.posterior(end, t, s.cond), t, u, carry)
            assert kernel.stochastic(t, u) == bool(s.draws[i * s.plan.steps + s.plan.captures[0]])
            end = law.mean + law.std * noise_of(s.adapter, kernel, law, s.draws, i)
    worst = gap(end, s.end().float())
    assert worst < 1e-5, f"the rollout ends {worst:.2e} (relative) from the stock call"
    return worst


def lora_gradients(s: Subject) -> float:
    """(3) Gradients reach the LoRA and match a finite difference along themselves, to 1e-2 in float32, 1e-6 in float64.

    A network that float32 does not resolve (HiDream's experts are picked by a threshold) is asked again in float64.
    """
    try:
        return along_gradient(s)
    except AssertionError:
        if s.name not in DOUBLE:
            raise
        return along_gradient(subject(s.name, double=True), strict=False)


class KeepDouble(TorchFunctionMode):
    """Within it, float64 tensors are not cast to float32: norms and embeddings of diffusers upcast "to float32"."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if func in (Tensor.to, Tensor.type):
                args = tuple(torch.float64 if a is torch.float32 else a for a in args)
                kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return func(*args, **kwargs)


def along_gradient(s: Subject, strict: bool = True) -> float:
    """Compare the norm of the gradient to the finite difference in its direction.

    ``strict``: hold a float64 pipeline to 1e-6; parts of some (rotary embeddings, gates) stay in float32 all the same.
    """
    wide = s.begin().dtype == torch.float64
    with KeepDouble() if wide else nullcontext():
        if wide and strict:
            return _along_gradient(s, (1e-5,), 1e-6)
        return _along_gradient(s, (1e-4, 1e-5) if wide else (3e-2, 1e-2, 1e-1, 3e-3), 1e-2)


def _along_gradient(s: Subject, widths: tuple[float, ...], limit: float) -> float:
    parameters = s.adapter.add_lora(2, seed=1)
    generator = torch.Generator().manual_seed(3)
    for p in parameters:
        p.data = torch.randn(p.shape, generator=generator).to(p) * 0.05
    weight = torch.randn(s.begin().shape, generator=generator)
    # every expert must be reached: one time of each half of the grid
    spots = sorted({s.times[0], s.times[len(s.times) - 2]}, reverse=True)

    def loss() -> Tensor:
        return sum(
            ((s.adapter.posterior(s.begin(), t, s.cond).x0 * weight).double().sum() for t in spots), torch.zeros(())
        )

    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    reached = sum(g is not None and bool(g.abs().sum() > 0) for g in gradients)
    assert reached >= len(parameters) // 4, f"only {reached} of {len(parameters)} LoRA tensors get a gradient"
    grads = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
    norm = torch.stack([g.double().norm() for g in grads]).norm()
    best = float("inf")
    for h in widths:  # fourth-order central difference
        values = []
        for reach in (1, -1, 2, -2):
            with torch.no_grad():
                for p, g in zip(parameters, grads, strict=True):
                    p.add_(g / norm.to(g), alpha=reach * h)
                values.append(float(loss()))
                for p, g in zip(parameters, grads, strict=True):
                    p.sub_(g / norm.to(g), alpha=reach * h)
        slope = (8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * h)
        best = min(best, abs(slope - float(norm)) / float(norm))
        if best < limit:
            break
    assert best < limit, f"gradient and finite difference differ by {best:.2e} (relative)"
    return best


def checkpointed(s: Subject) -> float:
    """(4) Checkpointed and plain gradients agree."""
    policy, t = Policy(s.adapter), s.times[len(s.times) // 2]
    grads = []
    for again in (False, True):
        x = s.begin().clone().requires_grad_()
        value = policy.posterior(x, t, s.cond, checkpoint=again).x0.square().sum()
        grads.append(torch.autograd.grad(value, x)[0])
    worst = gap(grads[1], grads[0])
    assert worst < 1e-6, f"checkpointed and plain gradients differ by {worst:.2e}"
    return worst


def decoded(s: Subject) -> float:
    """(5) Decoding equals the pipeline's own output, and is differentiable."""
    x = s.end().clone().requires_grad_()
    media = s.adapter.decode(x, s.cond)
    gradient = torch.autograd.grad(media.square().mean(), x)[0]
    assert bool(gradient.abs().sum() > 0), "no gradient reaches the states"
    want = s.media
    if s.adapter.decoder.unscaled.get((s.cond.rows[0].kind, True)):
        want = want / 2 + 0.5
    want = want.clamp(-1 if s.adapter.modality == "audio" else 0, 1)
    if "raw" in s.adapter.decoder.ways.values() and bool((levels(want) < 1e-4).all()):
        want = truncated(media.detach(), want)
    worst = gap(media, want)
    assert worst < 1e-5, f"decoded media differ from the pipeline's by {worst:.2e}"
    return worst


def levels(pixels: Tensor) -> Tensor:
    """Distance of pixels from the nearest of 256 levels, in levels."""
    return (255 * pixels - (255 * pixels).round()).abs()


def truncated(ours: Tensor, theirs: Tensor) -> Tensor:
    """What 8-bit pixels were before ``(255 · p).astype(uint8)``, as far as they tell: p in [k, k + 1) / 255.

    Where a guardrail looks at numpy pixels (Cosmos), the pipeline's own come back in 256 levels. Ours must lie in the
    level that theirs were cut to; what lies in it is equal, the rest is as far away as its level.
    """
    return torch.minimum(torch.maximum(ours, theirs), theirs + 1 / 255)


def lora_file(s: Subject) -> float:
    """(6) LoRA saved by us loads with plain diffusers and reproduces the stock latents."""
    if "default" not in lora_files.adapters(next(iter(s.adapter.experts.values()))):
        for i, p in enumerate(s.adapter.add_lora(2, alpha=3.0)):
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p) * 0.05
    results = stock(s.adapter, s.cond, s.steps).results
    other = build(s.name)
    prompt, meta, call = split(s.case.inputs)
    again = load(other.pipe, call, modality=other.modality, check=False)
    cond = again.encode([prompt], [meta])
    with tempfile.TemporaryDirectory() as folder:
        s.adapter.save(folder)
        if lora_files.has_loader(other.pipe, again.experts) and len(s.adapter.experts) == 1:
            try:
                other.pipe.load_lora_weights(folder)  # nothing of ours is used here
            except AttributeError as upstream:  # Kolors: has loaded the U-Net, and then looks for a second text encoder
                assert "text_encoder_2" in str(upstream)
        else:
            again.load_lora(Path(folder))
    reloaded = stock(again, cond, s.steps).results
    worst = max(gap(a, b) for a, b in zip(reloaded, results, strict=True))
    assert worst < 1e-6, f"reloaded LoRA gives latents {worst:.2e} away"
    assert max(gap(a, b) for a, b in zip(results, s.results, strict=True)) > 0, "the LoRA changes nothing"
    return worst


def ratio(s: Subject) -> float:
    """(7) The ratio of a step's density at rollout and at the update is exactly 1."""
    kernel, t, u = EulerMaruyama(Constant(0.3)), s.times[0], s.times[1]
    x = s.begin()
    with torch.no_grad():
        law, _ = kernel(x, s.adapter.posterior(x, t, s.cond), t, u)
        y = law.sample(torch.randn(law.mean.shape, generator=torch.Generator().manual_seed(0)))
        before = law.log_prob(y)
    law, _ = kernel(x, s.adapter.posterior(x, t, s.cond), t, u)
    value = float((law.log_prob(y) - before).detach().exp())
    assert value == 1.0, f"the ratio is {value!r}"
    return value


def fingerprint(pipe: Any) -> dict[str, Any]:
    """Everything about a pipeline that a user could notice: attributes, scheduler, modules, processors, hooks."""
    out: dict[str, Any] = {f"pipe.{k}": v for k, v in vars(pipe).items()}
    out["config"] = copy.deepcopy(dict(pipe.config))
    out |= {f"scheduler.{k}": v for k, v in vars(pipe.scheduler).items()}
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            out[f"{name}.attributes"] = sorted(vars(part))
            out[f"{name}.training"] = part.training
            out[f"{name}.processors"] = {k: id(v) for k, v in getattr(part, "attn_processors", {}).items()}
            out[f"{name}.hooks"] = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in part.modules())
            out[f"{name}.grads"] = all(p.grad is None for p in part.parameters())
    return out


def unchanged(s: Subject, before: dict[str, Any]) -> None:
    """(8) The pipeline is what it was."""
    after = fingerprint(s.case.pipe)
    assert before.keys() == after.keys(), f"attributes changed: {sorted(before.keys() ^ after.keys())}"
    for key, value in before.items():
        same = value is after[key] or (not isinstance(value, Tensor) and value == after[key])
        assert same, f"{key} was {value!r:.80} and is {after[key]!r:.80}"


def batch(s: Subject) -> float:
    """(9) A batch of prompts gives what each prompt gives alone; so do several times in one call."""
    prompt, meta, _ = split(s.case.inputs)
    second = prompt.replace("red", "blue") if "red" in prompt else prompt + " on blue"
    second = second if "prompt" in s.adapter.tap.accepted else prompt
    cond = s.adapter.encode([prompt, second], [meta, meta])
    g = torch.Generator().manual_seed(5)
    x = torch.cat([s.begin(), s.begin() + 0.1 * torch.randn(s.begin().shape, generator=g)])
    worst = 0.0
    times = (s.times[0], s.times[len(s.times) - 2])
    for t in (times[0], torch.tensor(times, dtype=torch.float64)):
        with torch.no_grad():
            together = s.adapter.posterior(x, t, cond).x0
            for i in (0, 1):
                own = t if isinstance(t, float) else float(t[i])
                alone = s.adapter.posterior(x[i : i + 1], own, cond[torch.tensor([i])]).x0
                worst = max(worst, gap(together[i : i + 1], alone))
    assert worst < 1e-3, f"a batch differs from its rows by {worst:.2e}"
    return worst


DOUBLE = ("HiDreamImage",)  # float32 does not resolve its gates

POINTS: dict[str, Callable[[Subject], float]] = {
    "rollout": ode_rollout,
    "checkpoint": checkpointed,
    "decode": decoded,
    "ratio": ratio,
    "batch": batch,
    "gradient": lora_gradients,
    "lora": lora_file,
}


def check(name: str) -> dict[str, float]:
    """Run the whole contract on one case; raises at the first point that fails."""
    s = subject(name)
    assert "scheduler" in inspect.signature(type(s.case.pipe).__init__).parameters
    before = fingerprint(s.case.pipe)
    measured = {"draws": float(max(map(len, s.draws)))}
    for point, run in POINTS.items():
        if point == "gradient":  # from here on the networks carry a LoRA
            unchanged(s, before)
        try:
            measured[point] = run(s)
        except AssertionError as failure:
            raise AssertionError(f"{name}, {point}: {failure}") from failure
    return measured
