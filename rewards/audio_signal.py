"""Signal metrics against a clean reference: what speech enhancement is judged by when the reference is known.

    SI-SDR = 10 log10(|α s|² / |α s - ŝ|²),  α = ⟨ŝ, s⟩ / |s|²              in dB; blind to loudness (torchmetrics)
    LSD    = mean over frames of sqrt(mean over bins of (10 log10 P̂/P)²)    in dB; sees loudness, deaf to phase

P and P̂ are power spectra with Hann windows, floored ``floor`` dB below the reference's loudest bin so that silence is
not compared to the last bit; the distance is averaged over several window lengths. The two have different blind spots,
so a generator that games one pays in the other: the reason why FlowSE-GRPO trains on several metrics at once.

References: Le Roux et al. 2019 (arXiv 1811.02508); Gray & Markel 1976 for the log-spectral distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from flowalign.protocols import Card, Meta
from flowalign.rewards.base import Judge, field

__all__ = ["SISDR", "LogSpectralDistance", "log_spectral_distance"]


def references(media: Tensor, meta: Meta | None, name: str) -> Tensor:
    """Return the clean signals ``meta[i]["reference"]`` as ``(B, C, L)`` like ``media``.

    Raises:
        ValueError: where one is missing, of another shape, or silent: nothing can be measured against silence.
    """
    rows = [torch.as_tensor(r) for r in field(meta, "reference", name, len(media))]
    for i, row in enumerate(rows):
        row = row[None] if row.ndim == 1 else row
        if tuple(row.shape) != tuple(media.shape[1:]):
            raise ValueError(f"meta[{i}]['reference'] must be {tuple(media.shape[1:])} as the audio; got {row.shape}.")
        if not (row.isfinite().all() and row.abs().amax() > 0):
            raise ValueError(f"meta[{i}]['reference'] is silent or not finite: {name} cannot be measured against it.")
        rows[i] = row
    return torch.stack(rows).to(media.device, torch.float32)


def log_spectral_distance(audio: Tensor, clean: Tensor, window: int, floor: float = 60.0) -> Tensor:
    """Return the log-spectral distance ``(*)`` in dB of signals ``(*, L)``.

    Args:
        audio: the signals, ``L ≥ window``.
        clean: their references.
        window: samples of the Hann window; the hop is a quarter of it.
        floor: dB below the reference's loudest bin at which both spectra are floored.
    """
    hann = torch.hann_window(window, device=audio.device, dtype=audio.dtype)

    def power(x: Tensor) -> Tensor:
        spectrum = torch.stft(
            x.reshape(-1, x.shape[-1]), window, window // 4, window=hann, center=False, return_complex=True
        )
        return (spectrum.real.square() + spectrum.imag.square()).unflatten(0, x.shape[:-1])

    p, p0 = power(audio), power(clean)
    least = p0.amax((-2, -1), keepdim=True) * 10 ** (-floor / 10)
    gap = 10 * ((p + least) / (p0 + least)).log10()
    return (gap.square().mean(-2) + 1e-12).sqrt().mean(-1)


@final
class SISDR(Judge):
    """Scale-invariant signal-to-distortion ratio in dB, averaged over channels."""

    card = Card(
        name="si-sdr",
        summary="scale-invariant signal-to-distortion ratio to meta[i]['reference'], in dB",
        modality=("audio",),
        differentiable=True,
        range=(-30.0, 40.0),
        reference="Le Roux et al., arXiv 1811.02508",
    )

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return ``(B,)`` dB of audio ``(B, C, L)``; prompts are not read."""
        from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

        clean = references(media, meta, self.card.name)
        return scale_invariant_signal_distortion_ratio(media.float(), clean).mean(1)


@final
class LogSpectralDistance(Judge):
    """Minus the log-spectral distance in dB, averaged over window lengths and channels.

    Args:
        windows: window lengths in samples; each signal must be as long as the longest.
        floor: see :func:`log_spectral_distance`.
    """

    card = Card(
        name="log-spectral",
        summary="minus the log-spectral distance to meta[i]['reference'], in dB; sees loudness, deaf to phase",
        modality=("audio",),
        differentiable=True,
        range=(-40.0, 0.0),
        reference="Gray & Markel 1976",
    )

    def __init__(self, windows: Sequence[int] = (256, 512, 1024), *, floor: float = 60.0) -> None:
        super().__init__()
        if not windows or min(windows) < 8 or any(w % 4 for w in windows) or floor <= 0:
            raise ValueError(f"windows must be multiples of 4, at least 8, and floor > 0 dB; got {windows}, {floor}.")
        self.windows = tuple(windows)
        self.floor = floor

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return ``(B,)`` scores of audio ``(B, C, L)``; prompts are not read.

        Raises:
            ValueError: for audio shorter than the longest window.
        """
        if media.shape[-1] < max(self.windows):
            raise ValueError(
                f"log-spectral with windows {self.windows} needs {max(self.windows)} samples; got {media.shape[-1]}. "
                "Give shorter windows."
            )
        clean = references(media, meta, self.card.name)
        audio = media.float()
        per_window = [log_spectral_distance(audio, clean, w, self.floor) for w in self.windows]
        return -torch.stack(per_window).mean((0, 2))
