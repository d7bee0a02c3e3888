"""RLIR: does the video follow the actions that it was given? An inverse-dynamics model reads them back.

An inverse-dynamics model g maps neighbouring frames to the action that leads from one to the other; the reward is the
agreement of ``â_t = g(frame_t, frame_{t+1})`` with the actions a_t that conditioned the generator (Ye et al. 2025,
arXiv 2509.23958):

    accuracy     mean_t 1[argmax_k ℓ_t(k) = a_t]                discrete actions, not differentiable
    likelihood   mean_t log softmax(ℓ_t)[a_t]                   discrete actions, differentiable
    error        -mean_t |â_t - a_t|² / scale²                  continuous actions, differentiable

Any callable ``(B, F, 3, H, W) -> (B, F-1, K)`` will do as g. :class:`InverseDynamics` is a small one, for small worlds:
the demo world's own lies in ``rewards/weights/inverse_dynamics``, made by :mod:`flowalign.rewards.dynamics_training`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowalign.protocols import Card, Meta
from flowalign.rewards.base import Judge, field

__all__ = ["WEIGHTS", "ActionAgreement", "InverseDynamics", "InverseDynamicsConfig"]

WEIGHTS = Path(__file__).parent / "weights" / "inverse_dynamics"
DynamicsModel = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class InverseDynamicsConfig:
    """Shape of the small inverse-dynamics model.

    Attributes:
        actions: K, the number of discrete actions or the dimensions of a continuous one.
        size: side in pixels to which frames are brought, a multiple of 4.
        width: channels of the first layer.
    """

    actions: int
    size: int = 32
    width: int = 32


@final
class InverseDynamics(nn.Module):
    """A small convolutional network on pairs of frames.

    The pair enters as both frames and their difference; the head sees where things are (no global pooling), because the
    direction of a motion is a matter of place.
    """

    def __init__(self, config: InverseDynamicsConfig) -> None:
        super().__init__()
        if config.size % 4:
            raise ValueError(f"size must be a multiple of 4; got {config.size}.")
        self.config = config
        c = config.width
        self.trunk = nn.Sequential(
            nn.Conv2d(9, c, 5, padding=2), nn.SiLU(),
            nn.Conv2d(c, 2 * c, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(2 * c, 2 * c, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(2 * c, c // 2, 1), nn.SiLU(), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Sequential(
            nn.Linear(c // 2 * (config.size // 4) ** 2, 128), nn.SiLU(), nn.Linear(128, config.actions)
        )

    def forward(self, video: Tensor) -> Tensor:
        """Return ``(B, F-1, K)`` logits or actions of videos ``(B, F, 3, H, W)`` in [0, 1]."""
        b, f = video.shape[:2]
        frames = F.interpolate(video.flatten(0, 1), (self.config.size,) * 2, mode="bilinear", antialias=True)
        frames = 2 * frames.unflatten(0, (b, f)) - 1
        before, after = frames[:, :-1], frames[:, 1:]
        pair = torch.cat((before, after, after - before), dim=2).flatten(0, 1)
        return self.head(self.trunk(pair)).unflatten(0, (b, f - 1))

    def save(self, path: Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` into the folder ``path``."""
        from safetensors.torch import save_file

        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, path / "model.safetensors")

    @classmethod
    def load(cls, path: Path) -> InverseDynamics:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: where the folder lacks a file, naming it.
        """
        from safetensors.torch import load_file

        missing = [name for name in ("config.json", "model.safetensors") if not (path / name).is_file()]
        if missing:
            raise ValueError(
                f"{path} is no inverse-dynamics model: {', '.join(missing)} missing. Train one on your world "
                "(InverseDynamics(...).save(folder)), or pass any model=callable to ActionAgreement."
            )
        model = cls(InverseDynamicsConfig(**json.loads((path / "config.json").read_text())))
        model.load_state_dict({k: v.float() for k, v in load_file(path / "model.safetensors").items()})
        return model


@final
class ActionAgreement(Judge):
    """Agreement of the actions read back from a video with ``meta[i]["actions"]``.

    Actions are ``(F-1,)`` integers in [0, K), or ``(F-1, K)`` floats with ``measure="error"``.

    Args:
        weights: folder of an :class:`InverseDynamics`; not used where ``model`` is given.
        model: any inverse-dynamics model ``(B, F, 3, H, W) -> (B, F-1, K)``.
        measure: "accuracy" (published), "likelihood" or "error", see the module.
        scale: unit of continuous actions.
    """

    card = Card(
        name="idm",
        summary="agreement of the actions that an inverse-dynamics model reads from a video with those given",
        modality=("video",),
        differentiable=False,
        range=(0.0, 1.0),
        licence="of the model given; the demo world's: Apache-2.0",
        weights="rewards/weights/inverse_dynamics",
        reference="RLIR, arXiv 2509.23958",
    )

    def __init__(
        self,
        weights: str | Path = WEIGHTS,
        *,
        model: DynamicsModel | None = None,
        measure: Literal["accuracy", "likelihood", "error"] = "accuracy",
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if measure not in ("accuracy", "likelihood", "error") or scale <= 0:
            raise ValueError(
                f"measure must be accuracy, likelihood or error, and scale positive; got {measure!r}, {scale}."
            )
        self.model = InverseDynamics.load(Path(weights)) if model is None else model
        self.measure = measure
        self.scale = scale
        if measure != "accuracy":
            self.card = replace(self.card, differentiable=True, range=(-10.0, 0.0))
        self.freeze()

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return ``(B,)`` agreements of videos ``(B, F, 3, H, W)`` with F ≥ 2; prompts are not read.

        Raises:
            ValueError: where actions are missing, of the wrong number or out of range.
        """
        count, steps = media.shape[0], media.shape[1] - 1
        if steps < 1:
            raise ValueError("an action leads from one frame to the next: idm needs at least 2 frames; got 1.")
        rows = [torch.as_tensor(a, device=media.device) for a in field(meta, "actions", "idm", count)]
        found = self.model(media.float()).float()
        if found.ndim != 3 or tuple(found.shape[:2]) != (count, steps):
            raise ValueError(f"the model must return ({count}, {steps}, K); got {tuple(found.shape)}.")
        kinds = found.shape[2]
        want = (steps, kinds) if self.measure == "error" else (steps,)
        for i, row in enumerate(rows):
            if tuple(row.shape) != want:
                raise ValueError(f"meta[{i}]['actions'] must have shape {want}; got {tuple(row.shape)}.")
        actions = torch.stack(rows)
        if self.measure == "error":
            return -(found - actions.float()).square().mean((1, 2)) / self.scale**2
        if actions.is_floating_point() or int(actions.min()) < 0 or int(actions.max()) >= kinds:
            raise ValueError(f"discrete actions must be integers in [0, {kinds}); got {actions.tolist()}.")
        if self.measure == "accuracy":
            return (found.argmax(2) == actions).float().mean(1)
        return found.log_softmax(2).gather(2, actions.long()[:, :, None]).mean((1, 2))
