"""Latent values in one file: what Euphonium, Flow-NRG and TTSnap train, fk-steering and ttsnap read.

    value of a reward  =  mean + std · V_φ(x, t, prompt)  [ + the clean reward of the posterior mean, where residual ]

The file (safetensors, :mod:`flowalign.weights_file`) says what the networks look at: noisy states (Euphonium's and
Flow-NRG's, one network for all times) or posterior means (TTSnap's students, one for each level), and whether they
predict the rewards one by one or the weighted sum that a run was trained on (Euphonium's).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from flowalign import weights_file
from flowalign.process import Time
from flowalign.valuenet import LatentValue

__all__ = ["TOTAL", "LatentValues"]

KIND = "latent-values"
TOTAL = "weighted sum"


@dataclass(frozen=True)
class LatentValues:
    """Trained values by reward.

    Attributes:
        networks: by name of the reward (``TOTAL`` for the weighted sum): one for all times, or one for each level.
        scale: mean and deviation of what they predict, by name.
        times: of the levels; empty for one network of all times.
        sees: what they look at: the noisy state, or its posterior mean.
        residual: whether they predict what is to be added to the clean reward of the posterior mean.
        weights: of the rewards in the sum that ``TOTAL`` predicts; empty where each reward has a value of its own.
    """

    networks: Mapping[str, Sequence[LatentValue]]
    scale: Mapping[str, tuple[float, float]]
    times: Sequence[float] = ()
    sees: Literal["state", "posterior"] = "state"
    residual: bool = False
    weights: Mapping[str, float] | None = None

    def __call__(self, name: str, x: Tensor, t: Time, words: Tensor) -> Tensor:
        """Return what is predicted of a reward, ``(B,)``, in its units.

        Args:
            name: of the reward.
            x: what the networks look at, ``(B, *)``.
            t: one time, or ``(B,)``; of several levels the one nearest to the first is asked.
            words: of the prompts, ``(B, L)``; see :func:`flowalign.valuenet.word_ids`.

        Raises:
            ValueError: for a reward without a value, or states of another shape.
        """
        if name not in self.networks:
            raise ValueError(f"no value of reward {name!r} was trained; there are {', '.join(self.networks)}.")
        at = torch.as_tensor(t, dtype=torch.float64).reshape(-1).expand(len(x))
        nets = self.networks[name]
        net = nets[min(range(len(nets)), key=lambda k: abs(self.times[k] - float(at[0])))] if self.times else nets[0]
        if tuple(x.shape[1:]) != net.shape:
            raise ValueError(f"the value of {name!r} was trained on states {net.shape}; got {tuple(x.shape[1:])}.")
        mean, std = self.scale[name]
        return mean + std * net.to(x.device)(x, at.to(x.device), words.to(x.device)).to(x)

    def of(self, name: str, words: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Return a reward's value as ``(x, t (B,), row) → (B,)``, with the words of each row."""
        return lambda x, t, row: self(name, x, t, words[row])

    def parts(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Return the weights of the values here that make up a weighted sum of rewards.

        Raises:
            ValueError: where a reward has no value, or the sum that was learnt is another.
        """
        wanted = {k: w for k, w in weights.items() if w}
        if not self.weights:
            missing = [k for k in wanted if k not in self.networks]
            if missing:
                raise ValueError(
                    f"there are values of {', '.join(self.networks)}, none of {missing[0]}: train it first."
                )
            return wanted
        learnt = {k: w for k, w in self.weights.items() if w}
        ratio = {wanted[k] / learnt[k] for k in learnt if k in wanted}
        if set(wanted) != set(learnt) or max(ratio) - min(ratio) > 1e-6 * abs(max(ratio)):
            raise ValueError(
                f"this value is of the weighted sum {learnt}, which these rewards do not make: {wanted}. Weigh them as "
                "in the run that trained it, or train a value of each (flow-nrg)."
            )
        return {TOTAL: max(ratio)}

    def save(self, path: Path) -> None:
        """Write the weights with what is needed to read them; folders are made."""
        first = next(iter(self.networks.values()))[0]
        about = {
            "times": list(self.times), "scale": dict(self.scale), "sees": self.sees, "residual": self.residual,
            "weights": dict(self.weights or {}), "shape": first.shape, "width": first.width,
        }  # fmt: skip
        weights = {
            f"{name}/{k}/{key}": v
            for name, nets in self.networks.items() for k, net in enumerate(nets) for key, v in net.state_dict().items()
        }  # fmt: skip
        weights_file.write(path, KIND, about, weights)

    @classmethod
    def load(cls, path: Path) -> LatentValues:
        """Read what :meth:`save` wrote, onto the CPU; nothing in the file can run.

        Raises:
            ValueError: for a file that is none of these.
        """
        about, weights = weights_file.read(path, KIND, "file of latent values")
        networks: dict[str, list[LatentValue]] = {}
        for name in about["scale"]:
            nets = [LatentValue(about["shape"], about["width"]) for _ in about["times"] or [None]]
            for k, net in enumerate(nets):
                head = f"{name}/{k}/"
                net.load_state_dict({key.removeprefix(head): w for key, w in weights.items() if key.startswith(head)})
            networks[name] = nets
        scale = {name: (float(m), float(s)) for name, (m, s) in about["scale"].items()}
        return cls(networks, scale, about["times"], about["sees"], bool(about["residual"]), about["weights"])
