"""Rewards of sets: diversity and distance to exemplars, with leave-one-out credit for each sample.

The scores are the Vendi score, minus the Fréchet distance and minus the MMD² (:mod:`flowalign.rewards.set_distances`);
DRAGON (arXiv 2504.15217) trains on such. A set's score S belongs to all its samples; the credit of sample i is what
the set loses without it,

    credit_i = S(X) - S(X without i),

or with ``credit="broadcast"`` the score itself. One call scores one batch: its samples form one set, or one set per
distinct ``meta[i]["set"]``, or per prompt with ``by="prompt"``. Features are a plug: any ``media -> (B, d)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, final

import torch
from torch import Tensor

from flowalign.gaussian import work_dtype
from flowalign.protocols import Card, Meta, Modality
from flowalign.rewards.base import Judge, field
from flowalign.rewards.set_distances import frechet, mmd2, moments, symmetric_root, vendi

__all__ = ["ExemplarSet", "FrechetSet", "MMDSet", "SetReward", "VendiSet", "colours"]

Features = Callable[[Tensor], Tensor]
Credit = Literal["leave_one_out", "broadcast"]
By = Literal["batch", "prompt"]


def colours(media: Tensor) -> Tensor:
    """Return ``(B, 48)`` mean colours on a 4x4 grid of an image, or of a video's mean frame; no model needed."""
    stills = media if media.ndim == 4 else media.mean(1)
    return torch.nn.functional.adaptive_avg_pool2d(stills, 4).flatten(1)


class SetReward(Judge, ABC):
    """A score of a set, credited to its samples.

    Args:
        features: ``media -> (B, d)``; gradients flow where it lets them. None takes :func:`colours`, which needs no
            model and sees little: choose CLIP, DINO or CLAP features for real work.
        credit: "leave_one_out", or "broadcast" to give every sample its set's score.
        by: "batch" puts all samples of a call into one set, "prompt" those of one prompt; ``meta[i]["set"]``, where
            given, overrides both.
        modality: of the media that the features read.
    """

    least = 2  # samples that a set must have left after one is taken out

    def __init__(
        self,
        *,
        features: Features | None = None,
        credit: Credit = "leave_one_out",
        by: By = "batch",
        modality: Modality = "image",
    ) -> None:
        super().__init__()
        if credit not in ("leave_one_out", "broadcast") or by not in ("batch", "prompt"):
            raise ValueError(
                f"credit must be leave_one_out or broadcast, by must be batch or prompt; got {credit!r}, {by!r}."
            )
        if features is None and modality == "audio":
            raise ValueError("audio has no colours: give features, e.g. a CLAP model's embedding of the sound.")
        self.features = colours if features is None else features
        self.credit = credit
        self.by = by
        self.card = replace(self.card, modality=(modality,))

    @abstractmethod
    def score_set(self, z: Tensor) -> Tensor:
        """Return the scalar score of one set of features ``(n, d)``."""

    def embed(self, media: Tensor) -> Tensor:
        """Return ``(B, d)`` features in float32 at least; the eigenvalues of small sets want float64 on a CPU.

        Raises:
            ValueError: where the feature function returns another shape, or values that are not finite.
        """
        z = self.features(media)
        if z.ndim != 2 or len(z) != len(media):
            raise ValueError(f"features must be ({len(media)}, d); got {tuple(z.shape)}.")
        bad = (~torch.isfinite(z.detach()).all(1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"features of samples {bad[:8]} are not finite; one such sample spoils its whole set.")
        return z.to(work_dtype(z) if z.device.type == "mps" else torch.float64)

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return ``(B,)`` credits.

        Raises:
            ValueError: where a set is too small to lose a sample.
        """
        z = self.embed(media)
        out = torch.zeros(len(z), dtype=z.dtype, device=z.device)
        for name, rows in self._sets(prompts, meta).items():
            need = self.least + (self.credit == "leave_one_out")
            if len(rows) < need:
                raise ValueError(
                    f"{self.card.name} needs {need} samples in a set for credit {self.credit!r}; set {name!r} has "
                    f"{len(rows)}. Sample more per prompt, or group by the whole batch."
                )
            index = torch.tensor(rows, device=z.device)
            out = out.index_put((index,), self._credits(z[index]))
        return out.float()

    def _sets(self, prompts: Sequence[str], meta: Meta | None) -> dict[object, list[int]]:
        if meta is not None and any("set" in entry for entry in meta):
            keys = field(meta, "set", self.card.name, len(prompts))
        else:
            keys = list(prompts) if self.by == "prompt" else ["batch"] * len(prompts)
        sets: dict[object, list[int]] = {}
        for i, key in enumerate(keys):
            sets.setdefault(key, []).append(i)
        return sets

    def _credits(self, z: Tensor) -> Tensor:
        whole = self.score_set(z)
        if self.credit == "broadcast":
            return whole.expand(len(z))
        keep = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
        return whole - torch.stack([self.score_set(z[row]) for row in keep])


@final
class VendiSet(SetReward):
    """Effective number of different samples in the set."""

    card = Card(
        name="vendi",
        summary="Vendi score: effective number of distinct samples; leave-one-out credit",
        differentiable=True,
        range=(-1.0, 1.0),
        reference="Friedman & Dieng, arXiv 2210.02410; DRAGON, arXiv 2504.15217",
        batch=False,
    )
    least = 1

    def score_set(self, z: Tensor) -> Tensor:
        """Return the Vendi score."""
        return vendi(z)


class ExemplarSet(SetReward, ABC):
    """Minus a distance of a set's features to those of exemplars.

    Args:
        exemplars: media of the target distribution, or ``(m, d)`` features of it (of another modality too, if the two
            feature functions share a space, as CLIP's and CLAP's do).
        weights: instead of exemplars, a safetensors file whose tensor "features" is ``(m, d)``.
        features, credit, by, modality: see :class:`SetReward`.

    Raises:
        ValueError: for neither exemplars nor weights, both, or fewer than two exemplars.
    """

    @torch.no_grad()
    def __init__(
        self, exemplars: Tensor | None, weights: str | Path | None, features: Features | None, credit: Credit, by: By,
        modality: Modality,
    ) -> None:  # fmt: skip
        super().__init__(features=features, credit=credit, by=by, modality=modality)
        if (exemplars is None) == (weights is None):
            raise ValueError(
                f"{self.card.name} compares with exemplars: give exemplars=media or features, or weights=a safetensors "
                'file with a tensor "features", and not both.'
            )
        if weights is not None:
            from safetensors.torch import load_file

            exemplars = load_file(str(weights))["features"]
        assert exemplars is not None
        if len(exemplars) < 2:
            raise ValueError(f"{self.card.name} needs at least 2 exemplars; got {len(exemplars)}.")
        self.remember(exemplars.double() if exemplars.ndim == 2 else self.embed(exemplars))

    @abstractmethod
    def remember(self, y: Tensor) -> None:
        """Keep what the distance needs of the exemplars' features ``(m, d)``, as buffers."""


@final
class FrechetSet(ExemplarSet):
    """Minus the Fréchet distance of the set's features to those of exemplars.

    Args:
        exemplars, weights: see :class:`ExemplarSet`.
        shrinkage: γ in [0, 1] for both covariances: with fewer samples than dimensions the sample covariance is
            singular and the distance dominated by it.
        features, credit, by, modality: see :class:`SetReward`.
    """

    card = Card(
        name="frechet",
        summary="minus the Fréchet distance of a set to exemplars, covariance shrunk; leave-one-out credit",
        differentiable=True,
        range=(-10.0, 10.0),
        reference="Heusel et al. 2017; DRAGON, arXiv 2504.15217",
        batch=False,
    )

    def __init__(
        self, exemplars: Tensor | None = None, *, weights: str | Path | None = None, shrinkage: float = 0.1,
        features: Features | None = None, credit: Credit = "leave_one_out", by: By = "batch",
        modality: Modality = "image",
    ) -> None:  # fmt: skip
        if not 0 <= shrinkage <= 1:
            raise ValueError(f"shrinkage must be in [0, 1]; got {shrinkage}.")
        self.shrinkage = shrinkage
        super().__init__(exemplars, weights, features, credit, by, modality)

    def remember(self, y: Tensor) -> None:
        """Keep mean and root of the covariance."""
        mean, cov = moments(y, self.shrinkage)
        self.mean: Tensor
        self.root: Tensor
        self.register_buffer("mean", mean)
        self.register_buffer("root", symmetric_root(cov))

    def score_set(self, z: Tensor) -> Tensor:
        """Return minus the squared Fréchet distance."""
        mean, cov = moments(z, self.shrinkage)
        return -frechet(mean, cov, self.mean, self.root)


@final
class MMDSet(ExemplarSet):
    """Minus the squared MMD of the set's features to those of exemplars.

    The unbiased estimate is right for a set's score and wrong for credit: a single stray among n samples is as far from
    the exemplars as from the other samples, the two cancel, and its credit is zero however far it lies. The biased one
    counts the stray's own mass. So by default the estimate is unbiased for ``credit="broadcast"`` and biased for
    ``"leave_one_out"``, where its bias is the same for all samples of a set.

    Args:
        exemplars, weights: see :class:`ExemplarSet`.
        kernel: "energy", ``-|a-b|``, or "gaussian", which saturates: one far stray in a set hardly shows.
        bandwidth: of the Gaussian kernel; None takes the median distance between exemplars, once and for all (a
            bandwidth that followed the samples would move the goal).
        unbiased: None for the default above.
        features, credit, by, modality: see :class:`SetReward`.
    """

    card = Card(
        name="mmd",
        summary="minus the squared MMD of a set to exemplars; leave-one-out credit",
        differentiable=True,
        range=(-1.0, 1.0),
        reference="Gretton et al. 2012; DRAGON, arXiv 2504.15217",
        batch=False,
    )

    def __init__(
        self, exemplars: Tensor | None = None, *, weights: str | Path | None = None,
        kernel: Literal["energy", "gaussian"] = "energy", bandwidth: float | None = None, unbiased: bool | None = None,
        features: Features | None = None, credit: Credit = "leave_one_out", by: By = "batch",
        modality: Modality = "image",
    ) -> None:  # fmt: skip
        if kernel not in ("energy", "gaussian") or (kernel == "energy" and bandwidth is not None):
            raise ValueError(
                f"kernel must be energy (no bandwidth) or gaussian; got {kernel!r}, bandwidth {bandwidth}."
            )
        self.kernel, self.given = kernel, bandwidth
        self.unbiased = credit == "broadcast" if unbiased is None else unbiased
        super().__init__(exemplars, weights, features, credit, by, modality)

    def remember(self, y: Tensor) -> None:
        """Keep the exemplars, and the bandwidth."""
        h = torch.pdist(y).median() if self.given is None else torch.tensor(self.given, dtype=y.dtype)
        if self.kernel == "gaussian" and not h > 0:
            raise ValueError(f"the bandwidth must be positive; got {h.item():g} (exemplars all alike?): give one.")
        self.exemplars: Tensor
        self.bandwidth: Tensor
        self.register_buffer("exemplars", y)
        self.register_buffer("bandwidth", h)

    def score_set(self, z: Tensor) -> Tensor:
        """Return minus the squared MMD."""
        bandwidth = self.bandwidth if self.kernel == "gaussian" else None
        return -mmd2(z, self.exemplars, bandwidth, unbiased=self.unbiased)
