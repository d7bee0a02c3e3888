"""CLAP: the cosine between a sound and its description, on any transformers ``ClapModel``.

    score = ⟨a, w⟩,  a = E_audio(log-mel(x)) / |·|,  w = E_text(prompt) / |·|      in [-1, 1]

The model's own feature extractor works in numpy and stops gradients; here the same log-mel spectrogram is computed in
torch (resampling, mono, repeat-and-pad, Hann STFT, mel filters, dB), so gradients reach the waveform. Sounds longer
than the model's window are judged by their centre; the extractor takes a random crop, which would make the score noisy.

Wu et al. 2023 (arXiv 2211.06687); Elizalde et al. 2023.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

from flowalign.protocols import Card, Meta
from flowalign.rewards.base import Judge, unique
from flowalign.rewards.loading import folder_or_id

__all__ = ["Clap", "resample"]


def resample(audio: Tensor, rate: int, target: int) -> Tensor:
    """Return ``(*, L)`` audio at another sampling rate: its spectrum cut or padded, as ``scipy.signal.resample`` does.

    Exact for signals that are periodic over the clip; elsewhere the ends ring for a few samples.
    """
    if rate == target:
        return audio
    length = audio.shape[-1]
    wanted = max(1, round(length * target / rate))
    spectrum = torch.fft.rfft(audio)
    kept = min(length, wanted)
    out = spectrum[..., : kept // 2 + 1]
    if kept % 2 == 0:  # the bin at the Nyquist frequency stands for two halves
        gain = torch.ones(kept // 2 + 1, device=audio.device)
        gain[-1] = 2.0 if wanted < length else 0.5
        out = out * gain
    return torch.fft.irfft(out, n=wanted) * (wanted / length)


@final
class Clap(Judge):
    """Cosine of sound and prompt under a CLAP model.

    Args:
        weights: hub id or folder with model, tokenizer and feature extractor.
        rate: sampling rate of the media in Hz; None: the model's own.
        max_tokens: prompts are cut here, as in training.
    """

    card = Card(
        name="clap",
        summary="cosine of sound and prompt under CLAP",
        modality=("audio",),
        differentiable=True,
        range=(-0.2, 0.8),
        licence="Apache-2.0",
        weights="laion/clap-htsat-unfused",
        text=77,
        reference="Wu et al., arXiv 2211.06687",
    )

    def __init__(
        self, weights: str | Path = "laion/clap-htsat-unfused", *, rate: int | None = None, max_tokens: int = 77
    ) -> None:
        super().__init__()
        from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel

        source = folder_or_id(weights)
        self.model: Any = ClapModel.from_pretrained(source, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        self.extractor: Any = ClapFeatureExtractor.from_pretrained(source)
        fused = self.extractor.truncation == "fusion"
        filters = self.extractor.mel_filters if fused else self.extractor.mel_filters_slaney
        self.filters: Tensor
        self.register_buffer("filters", torch.from_numpy(filters).float(), persistent=False)
        self.copies = 4 if fused else 1
        self.rate = self.extractor.sampling_rate if rate is None else rate
        self.max_tokens = max_tokens
        self.freeze()

    def mel(self, audio: Tensor) -> Tensor:
        """Return the model's input ``(B, copies, T, mels)`` of audio ``(B, C, L)``: the extractor's, in torch."""
        e = self.extractor
        x = self._window(resample(audio.float().mean(1), self.rate, e.sampling_rate))
        window = torch.hann_window(e.fft_window_size, device=x.device)
        spectrum = torch.stft(
            x, e.fft_window_size, e.hop_length, window=window, center=True, pad_mode="reflect", return_complex=True
        )
        power = spectrum.real.square() + spectrum.imag.square()
        mel = (power.transpose(1, 2) @ self.filters.to(x.device)).clamp(min=1e-10)
        return (10 * mel.log10())[:, None].expand(-1, self.copies, -1, -1)

    def _window(self, x: Tensor) -> Tensor:
        """Bring ``(B, L)`` to the model's length: centre of what is longer, repeats and zeros for what is shorter."""
        size, length = int(self.extractor.nb_max_samples), x.shape[-1]
        if length >= size:
            start = (length - size) // 2
            return x[:, start : start + size]
        if self.extractor.padding == "repeat":
            return x.repeat(1, math.ceil(size / length))[:, :size]
        if self.extractor.padding == "repeatpad":
            x = x.repeat(1, size // length)
        return F.pad(x, (0, size - x.shape[-1]))

    def embed_audio(self, audio: Tensor) -> Tensor:
        """Return unit ``(B, d)`` embeddings of audio; also the features for set rewards on sound."""
        mel = self.mel(audio.to(self.filters.device))
        longer = torch.zeros(len(mel), 1, dtype=torch.bool, device=mel.device)
        out = self.model.get_audio_features(input_features=mel, is_longer=longer)
        return F.normalize(out.pooler_output.float(), dim=-1)

    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Return unit ``(B, d)`` embeddings of prompts, each distinct one encoded once."""
        words, index = unique(prompts)
        tokens = self.tokenizer(
            words, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.filters.device)
        out = self.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return F.normalize(out.pooler_output.float(), dim=-1)[index]

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return ``(B,)`` cosines of audio ``(B, C, L)`` and prompts; an empty prompt is compared as such."""
        return (self.embed_audio(media) * self.embed_text(prompts)).sum(-1).to(media.device)
