"""The network of golden noise, and its training: ``min_f E | f(z, prompt) - z' |²`` (NPNet, 2411.09502).

    f(z, prompt) = z + linear convolution(z) + shift(words) + deep correction(z, words)

All three terms start at zero, so that an untrained network changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from flowalign import weights_file
from flowalign.valuenet import CONV, WORDS, word_ids

__all__ = ["GoldenNet", "Pairs", "Refine", "fit_pairs"]

KIND = "golden-noise"


@dataclass(frozen=True)
class Pairs:
    """Noises and what they became.

    Attributes:
        noise: ``(N, *shape)``.
        golden: ``(N, *shape)``.
        prompts: of each.
        gain: in reward, ``(N,)``.
    """

    noise: Tensor
    golden: Tensor
    prompts: list[str]
    gain: Tensor

    def __getitem__(self, index: Tensor) -> Pairs:
        """Select pairs by their numbers."""
        return Pairs(self.noise[index], self.golden[index], [self.prompts[i] for i in index.tolist()], self.gain[index])


@dataclass(frozen=True)
class Refine:
    """How the network is trained.

    Attributes:
        width: of its hidden layers.
        lr: learning rate (AdamW); published 1e-4 with batches of 64 on 100,000 pairs. [M]
        epochs: passes over the pairs.
        batch: pairs per step.
    """

    width: int = 32
    lr: float = 1e-3
    epochs: int = 20
    batch: int = 64


class GoldenNet(nn.Module):
    """``f(z, prompt)``.

    Args:
        shape: of one noise, channels first.
        width: of the hidden layers.

    Raises:
        ValueError: for noises without a channel dimension.
    """

    def __init__(self, shape: Sequence[int], width: int = 32) -> None:
        super().__init__()
        dims = len(shape) - 1
        if dims not in CONV:
            raise ValueError(f"noises must be (C, L), (C, H, W) or (C, F, H, W); got {tuple(shape)}.")
        conv = CONV[dims]
        self.linear = conv(shape[0], shape[0], 3, padding=1)
        self.words = nn.EmbeddingBag(WORDS, width, mode="sum", padding_idx=0)
        self.shift = nn.Linear(width, shape[0])
        self.stem, self.deep = conv(shape[0], width, 3, padding=1), conv(width, width, 3, padding=1)
        self.film = nn.Linear(width, 2 * width)
        self.head = conv(width, shape[0], 3, padding=1)
        for last in (self.linear, self.shift, self.head):
            nn.init.zeros_(last.weight)
            assert last.bias is not None
            nn.init.zeros_(last.bias)
        self.shape, self.width = tuple(shape), width

    def forward(self, z: Tensor, words: Tensor) -> Tensor:
        """Return better noises of ``z (B, *shape)`` for prompts given by their word ids ``(B, L)``."""
        hint, ones = self.words(words), [1] * (z.ndim - 2)
        scale, shift = (v.reshape(*v.shape, *ones) for v in self.film(hint).chunk(2, 1))
        h = silu(self.deep(silu(self.stem(z))) * (1 + scale) + shift)
        text = self.shift(hint)
        return z + self.linear(z) + text.reshape(*text.shape, *ones) + self.head(h)

    @torch.no_grad()
    def refine(self, z: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return better noises of the kind of ``z``."""
        device = self.linear.weight.device
        return self(z.to(device, torch.float32), word_ids(prompts).to(device)).to(z)

    def save(self, path: Path) -> None:
        """Write weights (safetensors) with what is needed to read them."""
        weights_file.write(path, KIND, {"shape": self.shape, "width": self.width}, self.state_dict())

    @classmethod
    def load(cls, path: Path) -> GoldenNet:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: for a file that is none of these.
        """
        about, weights = weights_file.read(path, KIND, "golden-noise network")
        net = cls(about["shape"], about["width"])
        net.load_state_dict(weights)
        return net


def fit_pairs(pairs: Pairs, options: Refine, seed: int = 0) -> GoldenNet:
    """Regress golden noises on noises and prompts.

    Raises:
        ValueError: for no pairs.
    """
    if not len(pairs.noise):
        raise ValueError(
            "no pair of noises gained in reward, so that there is nothing to learn from: collect more pairs, or raise "
            "the guidance scale."
        )
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        net = GoldenNet(pairs.noise.shape[1:], options.width)
        optimizer = torch.optim.AdamW(net.parameters(), lr=options.lr)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
        z, target, words = pairs.noise.float(), pairs.golden.float(), word_ids(pairs.prompts)
        for _ in range(options.epochs):
            for i in torch.randperm(len(z)).split(options.batch):
                loss = ((net(z[i], words[i]) - target[i]) ** 2).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            decay.step()
    return net
