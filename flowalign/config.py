"""The configuration of a run: one dataclass whose fields are the keys of a YAML file and the options of the command.

    method: {name: diffusion-nft, kl: 2.0}
    pipeline: shapes
    reward: shapes
    fit: {lr: 6e-4, iterations: 300}

Settings are taken from the method's preset, then the file, then the command line, later ones winning. A key that does
not exist is an error that names the nearest ones that do (:mod:`flowalign.fields`): nothing is ever passed over in
silence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from flowalign.ahead import check_names
from flowalign.allocate import Allocation
from flowalign.fields import update
from flowalign.methods import METHODS, resolve
from flowalign.methods.base import Method, Preset
from flowalign.options import FitOptions
from flowalign.prepare import Lora
from flowalign.restraint import Restraint
from flowalign.yaml_file import read_mapping

__all__ = ["Evaluation", "RunConfig", "compose", "default", "flatten", "from_yaml", "over", "to_dict"]

Scalar = bool | int | float | str


@dataclass(frozen=True)
class Evaluation:
    """How the model is judged before and after, on the same noises, sampler and guidance.

    Attributes:
        prompts: held-out prompts, never trained on; the world's report set, or the training prompts, when None.
        images: per category of prompts.
        batch: images sampled at a time.
        steps: sampling steps; when None those of a demo world's card, elsewhere those of the training.
        guidance: whether the pipeline's guidance rule is on; the base should be judged at its best.
        rewards: held-out rewards, a specification like ``reward``; off the demo worlds the first is the headline, and
            the training's own reward is when None. A demo world's own are watched in the checks when None; "" for none.
        layouts: module:function(media, prompts) -> (B,) integers that name arrangements; the world's own when None.
        seed: of the noises.
        every: iterations between checks while training, of the trained reward beside held-out ones, diversity and
            distance to the base; 0 for none.
        stop_on_hacking: end the run where checks say that the trained reward rises while a held-out one falls.
        check: images of a check in all.
        check_prompts: prompts of a check; the selection set of a world, or the training prompts, when None.
        base: a before.pt of another run with the same pipeline and evaluation, to save the time of making it again.
    """

    prompts: str | None = None
    images: int = 1000
    batch: int = 100
    steps: int | None = None
    guidance: bool = True
    rewards: str | None = None
    layouts: str | None = None
    seed: int = 20261121
    every: int = 20
    stop_on_hacking: bool = False
    check: int = 200
    check_prompts: str | None = None
    base: Path | None = None

    def __post_init__(self) -> None:
        for name, low in {"images": 1, "batch": 1, "every": 0, "check": 1}.items():
            if getattr(self, name) < low:
                raise ValueError(f"evaluation.{name} must be at least {low}; got {getattr(self, name)}.")
        if self.stop_on_hacking and not self.every:
            raise ValueError("evaluation.stop_on_hacking looks at the checks, and evaluation.every = 0 makes none.")


@dataclass(frozen=True)
class RunConfig:
    """A run.

    Attributes:
        method: settings of the method; ``flowalign methods`` lists them.
        pipeline: a demo world, a folder written by save_pretrained, a hub id, or your module:function.
        call: arguments of every call of the pipeline, e.g. height, guidance_scale.
        reward: name[@weights][:weight], with commas; or your module:Class.
        prompts: a .txt or .jsonl file, world:set, or a datasets id; the world's training set when None.
        output: folder of the run; runs/METHOD-PIPELINE when None.
        allocation: how an iteration's samples are spread over prompts: evenly, or by running reward variance.
        fit: how long and how hard to train.
        restraint: what keeps the run near its base, whatever the method; the method's own (usually none) when None.
        lora: the adapter; None trains the whole denoiser.
        ema: decay of the averaged weights, which are evaluated and saved; None for none.
        guidance: whether the pipeline's guidance rule is on while training.
        precision: of the network; kernels and log-probabilities always are float32.
        device: cpu, cuda, ...; auto takes cuda where there is one.
        chunk: samples per forward pass where memory is short; None for all at once.
        memory_budget: like 8GiB: choose micro-batches, recomputation and pieces that fit; None to leave them as set.
        evaluation: before and after.
        trackers: what else metrics go to: tensorboard, wandb, trackio, or another that accelerate knows.
        max_wall: seconds of training and its checks by the clock, after which the run ends; None for no limit.
        permute: shuffle rewards inside each group: the control that must not learn.
        keep_images: pictures kept for the report, per category.
    """

    method: Method
    pipeline: str = "shapes"
    call: dict[str, Scalar] = field(default_factory=dict)
    reward: str = "shapes"
    prompts: str | None = None
    output: Path | None = None
    allocation: Allocation = field(default_factory=Allocation)
    fit: FitOptions = field(default_factory=FitOptions)
    restraint: Restraint | None = None
    lora: Lora | None = None
    ema: float | None = 0.9
    guidance: bool = True
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: str = "auto"
    chunk: int | None = None
    memory_budget: str | None = None
    evaluation: Evaluation = field(default_factory=Evaluation)
    trackers: tuple[str, ...] = ("tensorboard",)
    max_wall: float | None = None
    permute: bool = False
    keep_images: int = 48

    def __post_init__(self) -> None:
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema is a decay: at least 0 and below 1, or none for no average; got {self.ema}.")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk must be at least 1; got {self.chunk}.")
        if self.max_wall is not None and not self.max_wall > 0:
            raise ValueError(f"max_wall must be positive; got {self.max_wall}.")
        if self.keep_images < 0:
            raise ValueError(f"keep_images must be at least 0; got {self.keep_images}.")
        check_names(self.trackers)

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.output or Path("runs") / f"{self.method.name}-{Path(self.pipeline).name}"


def default(method: str, preset: str = "demo") -> RunConfig:
    """Return the configuration of a method's preset.

    Raises:
        ValueError: for an unknown method or preset, with the nearest valid names.
    """
    chosen = preset_of(resolve(method), preset)
    return RunConfig(chosen.method, fit=chosen.fit, lora=chosen.lora, ema=chosen.ema, guidance=chosen.guidance)


def preset_of(method: type[Method], preset: str) -> Preset:
    """Return a preset by name.

    Raises:
        ValueError: with the names that there are.
    """
    known = method.presets()
    if preset not in known:
        raise ValueError(f"{method.name} has no preset {preset!r}; it has {', '.join(known)}.")
    return known[preset]


# -- from YAML -------------------------------------------------------------------------------------------------------
def from_yaml(path: Path, method: str | None = None, preset: str = "demo") -> RunConfig:
    """Read a configuration; what it leaves out comes from the preset of its method.

    Args:
        path: the file; its key ``preset`` may name the preset.
        method: the method of the command line, which must be the file's where both name one.
        preset: where the file names none.

    Raises:
        ValueError: for a file that is no mapping or names a key twice, an unknown key (with the nearest valid ones), or
            a wrong type.
    """
    data = read_mapping(path)
    return compose(data, method, str(data.get("preset", preset)), str(path))


def compose(data: Mapping[str, Any], method: str | None, preset: str = "demo", where: str = "") -> RunConfig:
    """Build a configuration from plain values; see :func:`from_yaml`."""
    name = _settings(data, where).get("name", method)
    if name is None:
        raise ValueError(f"{where}: no method is named: write method: {{name: diffusion-nft}}.")
    if method is not None and name != method:
        raise ValueError(f"{where} is a configuration of {name}, and the command asks for {method}. Use one of them.")
    return over(default(name, preset), data, where)


def over(base: RunConfig, data: Mapping[str, Any], where: str = "") -> RunConfig:
    """Return ``base`` with what plain values say; the names of the method and the preset are not looked at.

    Raises:
        ValueError: for an unknown key (with the nearest valid ones) or a wrong type.
    """
    own = {k: v for k, v in _settings(data, where).items() if k != "name"}
    base = replace(base, method=update(base.method, own, f"{where}: method"))
    return update(base, {k: v for k, v in data.items() if k not in ("preset", "method")}, where)


def _settings(data: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return what plain values say of the method: ``method: flow-grpo`` is short for ``method: {name: flow-grpo}``.

    Raises:
        ValueError: for what is neither.
    """
    own = data.get("method")
    settings = {"name": own} if isinstance(own, str) else {} if own is None else own
    if not isinstance(settings, Mapping):
        raise ValueError(f"{where}: method must be a name, or a mapping like {{name: flow-grpo}}; got {own!r}.")
    if not isinstance(settings.get("name", ""), str):
        raise ValueError(f"{where}: the name of the method must be a string; got {settings['name']!r}.")
    return settings


# -- to plain values -------------------------------------------------------------------------------------------------
def to_dict(config: Any) -> Any:
    """Return plain values that :func:`compose` reads back; a method carries its name."""
    if isinstance(config, Method):
        own = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}  # type: ignore[arg-type]
        return {"name": _name(config), **own}
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {k: to_dict(v) for k, v in config.items()}
    if isinstance(config, tuple | list):
        return [to_dict(v) for v in config]
    return str(config) if isinstance(config, Path) else config


def _name(method: Method) -> str:
    kind = type(method)
    return method.name if method.name in METHODS else f"{kind.__module__}:{kind.__qualname__}"


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``{"fit.lr": ...}`` of nested plain values, for trackers and comparisons."""
    out: dict[str, Any] = {}
    for k, v in data.items():
        out |= flatten(v, f"{prefix}{k}.") if isinstance(v, Mapping) else {f"{prefix}{k}": v}
    return out
