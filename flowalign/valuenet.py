"""A latent value network ``V_φ(x_t, t, prompt)``, and its training beside a policy: Euphonium's process reward.

A small convolution over the noisy state (images 2-D, video 3-D, audio and token sequences 1-D), modulated by the time
and by a bag of hashed words of the prompt, trained by regression on rollouts: every visited state predicts the reward
of what came of it. It knows nothing of the generator, so one serves any pipeline. Flow-NRG trains the same network on
re-noised samples, TTSnap on posterior means; all three write one kind of file (:mod:`flowalign.value_file`), which
fk-steering and ttsnap read.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from flowalign.experience import Experience
from flowalign.noise import mix
from flowalign.recipe import Learner

__all__ = ["LatentValue", "ValueLearner", "word_ids"]

WORDS = 4096
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def word_ids(prompts: Sequence[str], limit: int = 64) -> Tensor:
    """Return hashed word ids ``(B, L)``, 0 for padding; a stable hash, the same in every process."""
    rows = [[zlib.crc32(w.encode()) % (WORDS - 1) + 1 for w in p.lower().split()[:limit]] for p in prompts]
    width = max([len(r) for r in rows] + [1])
    return torch.tensor([r + [0] * (width - len(r)) for r in rows])


class LatentValue(nn.Module):
    """The network.

    Args:
        shape: of one state, channels first.
        width: of the hidden layers.
    """

    def __init__(self, shape: Sequence[int], width: int = 64) -> None:
        super().__init__()
        dims = len(shape) - 1
        if dims not in CONV:
            raise ValueError(f"states must be (C, L), (C, H, W) or (C, F, H, W); got {tuple(shape)}.")
        conv = CONV[dims]
        self.stem = conv(shape[0], width, 3, padding=1)
        stride = 2 if min(shape[1:]) >= 4 else 1
        self.deep = nn.ModuleList(conv(width, width, 3, padding=1, stride=stride) for _ in range(2))
        self.words = nn.EmbeddingBag(WORDS, width, mode="sum", padding_idx=0)
        self.film = nn.ModuleList(nn.Linear(2 * width, 2 * width) for _ in range(3))
        self.head = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, 1))
        self.shape, self.width = tuple(shape), width

    def forward(self, x: Tensor, t: Tensor, words: Tensor) -> Tensor:
        """Return values ``(B,)`` of states ``(B, *shape)`` at times ``(B,)`` of prompts given by their word ids."""
        k = torch.arange(self.width // 2, device=x.device)
        angle = t.float()[:, None] * torch.exp(-math.log(1e3) * k / len(k)) * 100
        hint = torch.cat([angle.sin(), angle.cos(), self.words(words)], 1)
        h = x.float()
        for layer, film in zip([self.stem, *self.deep], self.film, strict=True):
            h = layer(h)
            scale, shift = (z.reshape(*z.shape, *[1] * (h.ndim - 2)) for z in film(hint).chunk(2, 1))
            h = silu(h * (1 + scale) + shift)
        h = h.flatten(2)
        return self.head(torch.cat([h.mean(2), h.amax(2)], 1))[:, 0]


class ValueLearner(Learner):
    """Trains a latent value on the states of each iteration's rollout; also the value itself, by prompt row.

    Targets are standardised by a running mean and a running variance around it, so the reward's scale does not matter:

        mean ← mean + .1 (mean r - mean),    var ← var + .1 (mean (r - mean)² - var);    the first iteration sets both

    The variance holds a tenth of the iteration's own squared targets before they are divided by it: their mean square
    is at most 10, however rewards jump. An iteration whose rewards are all alike ranks no state above another and
    would only shrink the scale: nothing is learnt from it.

    Args:
        width: of the network.
        lr: learning rate.
        passes: passes over an iteration's states.
        batch: states per step.
    """

    def __init__(self, width: int = 64, lr: float = 1e-3, passes: int = 2, batch: int = 256) -> None:
        self.width, self.lr, self.passes, self.batch = width, lr, passes, batch
        self.network: LatentValue | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.mean, self.std, self.seen = 0.0, 1.0, 0  # seen: iterations that taught something
        self.prompts: tuple[str, ...] = ()
        self.weights: dict[str, float] = {}  # of the rewards whose sum is learnt

    def prepare(self, shape: Sequence[int], device: torch.device | str = "cpu") -> None:
        """Make the network for states of a shape, if there is none."""
        if self.network is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.network = LatentValue(shape, self.width).to(device)
            self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.lr)

    def enter(self, prompts: Sequence[str]) -> None:
        """Remember which prompts the rows of the coming rollout are."""
        self.prompts = tuple(prompts)

    def __call__(self, x: Tensor, t: Tensor, row: Tensor) -> Tensor:
        """Return predicted rewards ``(B,)``; 0 before anything was learnt."""
        if self.network is None:
            return x.new_zeros(len(x))
        words = word_ids([self.prompts[r] for r in row.tolist()]).to(x.device)
        return self.mean + self.std * self.network(x, t.to(x.device), words)

    def gradient(self, x: Tensor, t: Tensor, row: Tensor) -> Tensor:
        """Return ``∇_x V``, ``(B, *)``."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            value = self(leaf, t, row)
            if not value.requires_grad:
                return torch.zeros_like(x)
            (g,) = torch.autograd.grad(value.sum(), leaf)
        return g

    def observe(self, experience: Experience) -> dict[str, float]:
        """Regress every visited state onto the mean reward of its descendants; no metrics where rewards are alike."""
        e, tree = experience, experience.trajectory
        total = e.total.detach().float()
        if not self._rescale(total):
            return {}
        self.prepare(tree.leaves.x.shape[1:], tree.leaves.x.device)
        assert self.network is not None and self.optimizer is not None
        self.weights = dict(e.weights)
        x, t, row, y = self._states(tree, tree.backup(total))
        words = word_ids(e.cond.prompts).to(x.device)
        g = torch.Generator().manual_seed(mix(e.seed, e.iteration, 500))
        losses = []
        for _ in range(self.passes):
            for index in torch.randperm(len(x), generator=g).split(self.batch):
                i = index.to(x.device)
                pred = self.network(x[i], t[i], words[row[index].to(x.device)])
                loss = ((pred - (y[i] - self.mean) / self.std) ** 2).mean()
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                losses.append(loss.detach())
        return {"value/loss": float(torch.stack(losses).mean())}

    def _rescale(self, total: Tensor) -> bool:
        """Move mean and deviation with an iteration's rewards ``(N,)``; return whether they differ beyond round-off."""
        r = total.double()
        if float(r.std(correction=0)) <= 1e-6 * float(r.abs().max()):
            return False
        rate = 0.1 if self.seen else 1.0
        self.mean = (1 - rate) * self.mean + rate * float(r.mean())
        self.std = math.sqrt((1 - rate) * self.std**2 + rate * float(((r - self.mean) ** 2).mean()))
        self.seen += 1
        return True

    def _states(self, tree: Any, values: list[Tensor | None]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        levels = range(tree.first, len(tree.levels))
        x = torch.cat([tree.at(k).x.detach() for k in levels])
        t = torch.cat([tree.times[k].expand(len(tree.at(k))) for k in levels]).to(x.device)
        row = torch.cat([tree.at(k).row for k in levels])
        return x, t, row, torch.cat([v for v in values if v is not None]).to(x.device)

    def export(self, folder: Path) -> None:
        """Write what was learnt to ``value/values.safetensors`` in a run's result; nothing where nothing was."""
        from flowalign.value_file import TOTAL, LatentValues

        if self.network is not None and self.seen:
            found = LatentValues({TOTAL: [self.network]}, {TOTAL: (self.mean, self.std)}, weights=self.weights)
            found.save(folder / "value" / "values.safetensors")

    def state_dict(self) -> dict[str, Any]:
        """Return the network, its optimiser and the scale of the targets."""
        if self.network is None or self.optimizer is None:
            return {}
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "shape": list(self.network.shape),
            "scale": [self.mean, self.std],
            "seen": self.seen,
            "weights": self.weights,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        if not state:
            return
        self.prepare([int(n) for n in state["shape"]])
        assert self.network is not None and self.optimizer is not None
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.mean, self.std = state["scale"]
        self.seen = int(state["seen"])
        self.weights = dict(state["weights"])
