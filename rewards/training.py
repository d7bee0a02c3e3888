"""Train a reward on judgements of one's own, in minutes: a small head on a frozen backbone.

    data = read_folder("judgements/")                            # pairs, scores, or good and bad pictures
    model = Trained(TowerBackbone("openai/clip-vit-large-patch14"))
    report = train(model, data, Settings(loss="btt"))            # accuracy on held-out judgements
    model.save("my_reward/")                                     # then: --reward trained@my_reward/

The backbone runs once over the distinct pictures; what is trained is only the head on the remembered tokens. Losses:
``bt``, ``btt`` and ``win-tie`` for pairs; ``soli`` for good and bad single items (cross-prompt pairs with ties, see
:mod:`flowalign.rewards.losses`); ``bce`` for a classifier of artifacts, a regulariser against hacking; ``mse`` for
scores. A head that also reads the time is taught by :func:`flowalign.rewards.distil.distil`.

References: Bradley-Terry and BTT (2501.13918); SoliReward (2512.22170); artifact reward (2601.03468).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowalign.protocols import Card, Meta
from flowalign.rewards.backbones import Backbone, make_backbone
from flowalign.rewards.base import Judge, field
from flowalign.rewards.data import Judgements, picture
from flowalign.rewards.heads import Head, Pooled, QueryAttention
from flowalign.rewards.loading import fill
from flowalign.rewards.losses import binary_pairs, bradley_terry, bradley_terry_ties, win_tie

__all__ = ["HeadSpec", "Report", "Settings", "Trained", "train"]

Loss = Literal["bt", "btt", "win-tie", "soli", "bce", "mse"]
FITS: dict[str, tuple[Loss, ...]] = {"pairs": ("bt", "btt", "win-tie"), "labels": ("soli", "bce"), "scores": ("mse",)}


@dataclass(frozen=True)
class Settings:
    """How a head is trained.

    Attributes:
        loss: see the module; None for the first that fits the data.
        epochs: passes over the judgements.
        batch: judgements per step.
        rate: AdamW's learning rate.
        decay: its weight decay.
        k: of BTT.
        margin: of win-tie.
        tie_weight: of ties in win-tie and soli.
        held_out: share of the judgements kept for the report.
        seed: of the split, the order and the ties.
    """

    loss: Loss | None = None
    epochs: int = 30
    batch: int = 64
    rate: float = 1e-3
    decay: float = 1e-2
    k: float = 5.0
    margin: float = 0.0
    tie_weight: float = 0.25
    held_out: float = 0.2
    seed: int = 0


@dataclass(frozen=True)
class Report:
    """What a training achieved.

    Attributes:
        accuracy: share of held-out judgements got right (pairs that are no ties; good or bad against the median), or
            the correlation with held-out scores; NaN with none held out.
        losses: mean loss of each epoch.
    """

    accuracy: float
    losses: tuple[float, ...]


@dataclass(frozen=True)
class HeadSpec:
    """What a saved head needs to be built again."""

    kind: Literal["pooled", "query"] = "query"
    hidden: int = 128
    heads: int = 4
    noise_aware: bool = False


class Trained(Judge):
    """A frozen backbone and a trained head.

    Args:
        weights: a backbone to train a new head on, or the folder of a saved reward.
        head: what head to put on a new backbone.
        name: for the card.
    """

    card = Card("trained", "a reward trained on your own judgements", differentiable=True, range=(-10.0, 10.0))

    def __init__(
        self, weights: Backbone | str | Path | None = None, head: HeadSpec | None = None, name: str = "trained"
    ) -> None:
        super().__init__()
        if weights is None:
            raise ValueError("a trained reward is loaded from its folder: trained@/path/of/my_reward.")
        saved = None if isinstance(weights, Backbone) else Path(weights)
        if saved is not None:
            if not (saved / "reward.json").is_file():
                raise ValueError(f"{saved} holds no reward.json: it is no folder that Trained.save wrote.")
            config = json.loads((saved / "reward.json").read_text())
            weights, head, name = make_backbone(config["backbone"]), HeadSpec(**config["head"]), config["name"]
        assert isinstance(weights, Backbone)
        self.spec, self.backbone = head or HeadSpec(), weights
        self.freeze()
        self.head = _head(self.spec, weights)
        self.card = replace(type(self).card, name=name, differentiable=True)
        if saved is not None:
            fill(self.head, load_file(saved / "head.safetensors"), saved)

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return the head's score; a noise-aware reward reads ``meta[i]["time"]``. No gradient reaches the head."""
        time = None
        if self.spec.noise_aware:
            time = torch.tensor(field(meta, "time", self.card.name, len(media)), device=self.backbone.device)
        tokens = self.backbone(media, prompts)
        frozen = {k: v.detach() for k, v in self.head.named_parameters()}
        return torch.func.functional_call(self.head, frozen, (tokens, time)).to(media.device)

    def save(self, folder: str | Path) -> None:
        """Write ``reward.json`` and ``head.safetensors``; the backbone is named, not copied."""
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        config = {"name": self.card.name, "head": asdict(self.spec), "backbone": self.backbone.config()}
        (root / "reward.json").write_text(json.dumps(config, indent=2))
        save_file({k: v.contiguous() for k, v in self.head.state_dict().items()}, root / "head.safetensors")


def _head(spec: HeadSpec, backbone: Backbone) -> Head:
    if spec.kind == "pooled":
        return Pooled(backbone.width, spec.hidden, spec.noise_aware)
    return QueryAttention(backbone.width, backbone.layers, spec.heads, spec.hidden, spec.noise_aware)


@torch.no_grad()
def _tokens(backbone: Backbone, data: Judgements) -> list[Tensor]:
    """Run the backbone over each distinct item; pictures of any sizes, one at a time."""
    rows = [backbone(picture(path).unsqueeze(0), [prompt]) for path, prompt in data.items]
    return [torch.cat([r[i] for r in rows]).cpu() for i in range(len(rows[0]))]


def train(model: Trained, data: Judgements, settings: Settings | None = None) -> Report:
    """Train the head of ``model`` on ``data``.

    Raises:
        ValueError: a loss that does not fit the data, or judgements that all say the same.
    """
    s = settings or Settings()
    loss = s.loss or FITS[data.kind][0]
    if loss not in FITS[data.kind]:
        raise ValueError(f"loss {loss!r} does not fit {data.kind}: wanted one of {', '.join(FITS[data.kind])}.")
    if data.value.unique().numel() < 2 and data.kind != "pairs":
        raise ValueError(f"all {len(data)} judgements say {data.value[0].item():g}: there is nothing to learn.")
    tokens = _tokens(model.backbone, data)
    g = torch.Generator().manual_seed(s.seed)
    order = torch.randperm(len(data), generator=g)
    split = round(len(data) * s.held_out)
    held, kept = order[:split], order[split:]
    head = model.head.cpu()
    optimiser = torch.optim.AdamW(head.parameters(), s.rate, weight_decay=s.decay)
    losses = []
    for _ in range(s.epochs):
        total = 0.0
        for rows in kept[torch.randperm(len(kept), generator=g)].split(s.batch):
            value = _loss(head, tokens, data, rows, loss, s, g)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            total += value.item() * len(rows)
        losses.append(total / len(kept))
    model.head.to(model.backbone.device)
    return Report(_accuracy(head, tokens, data, held), tuple(losses))


def _scores(head: nn.Module, tokens: list[Tensor], items: Tensor) -> Tensor:
    weight = next(head.parameters())
    return head([t[items].to(weight) for t in tokens])


def _loss(
    head: Head, tokens: list[Tensor], data: Judgements, rows: Tensor, loss: Loss, s: Settings, g: torch.Generator
) -> Tensor:
    value, index = data.value[rows], data.index[rows]
    if data.kind == "pairs":
        a, b = (_scores(head, tokens, index[:, i]) for i in (0, 1))
        label = value.long()
        if loss == "btt":
            return bradley_terry_ties(a, b, label, s.k).mean()
        if loss == "win-tie":
            return win_tie(a, b, label, s.margin, s.tie_weight).mean()
        return bradley_terry(a, b, label).mean()
    scores = _scores(head, tokens, index[:, 0])
    if loss == "soli":
        i, j, label = binary_pairs(value > 0.5, g)
        return win_tie(scores[i], scores[j], label, s.margin, s.tie_weight).mean() if len(i) else 0 * scores.sum()
    if loss == "bce":
        return F.binary_cross_entropy_with_logits(scores, value.to(scores))
    return F.mse_loss(scores, value.to(scores))


@torch.no_grad()
def _accuracy(head: Head, tokens: list[Tensor], data: Judgements, rows: Tensor) -> float:
    if not len(rows):
        return float("nan")
    value, index = data.value[rows], data.index[rows]
    if data.kind == "pairs":
        told = value != 0
        gap = (_scores(head, tokens, index[:, 0]) - _scores(head, tokens, index[:, 1]))[told]
        return ((gap > 0) == (value[told] > 0)).float().mean().item()
    scores = _scores(head, tokens, index[:, 0])
    if data.kind == "scores":
        return torch.corrcoef(torch.stack([scores, value.to(scores)]))[0, 1].item()
    good, bad = scores[value > 0.5], scores[value <= 0.5]
    return (good[:, None] > bad[None]).float().mean().item()  # the probability that a good one beats a bad one
