"""VideoReward (VideoAlign): visual quality, motion quality and text alignment of a video, by a tuned Qwen2-VL.

The model reads the video and a text in which each criterion ends in a token of its own; a linear head on the three
tokens' states gives three numbers, standardised by the release's own statistics:

    z_k = (⟨w_k, h[<|k_reward|>]⟩ - mean_k) / std_k,   k ∈ {VQ, MQ, TA},       score = Σ z_k over the chosen criteria

Liu et al. 2025 (arXiv 2501.13918). As in the release, text and picture tokens have *sequential* positions (its forward
never computes Qwen2-VL's three-dimensional ones), and frames are taken at the release's rate, 2 per second. A video
must say its true rate: taken for 2 frames per second, a good clip of 24 scores negative. Pixels are prepared on
tensors, so gradients reach the frames; upstream goes through an mp4 file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from flowalign.protocols import Card, Meta
from flowalign.rewards.base import Judge, field
from flowalign.rewards.loading import folder_or_id
from flowalign.rewards.qwen import Vision, chat, patches, tokenize
from flowalign.rewards.videoalign import SPECIAL, fetch, read_release, read_template, read_weights

__all__ = ["CRITERIA", "VideoReward", "sample_frames"]

CRITERIA = ("VQ", "MQ", "TA")
PAD = "<|video_pad|>"
MIN_PIXELS = 128 * 28 * 28  # Qwen's tools enlarge video frames to at least this


def sample_frames(total: int, fps: float, wanted_fps: float, frames: int | None = None) -> Tensor:
    """Return the indices of the frames that the model looks at, evenly spaced, first and last included.

    Their number is even, at least 4 and at most 768, as far as the video has so many.

    Args:
        total: frames of the video.
        fps: its true rate.
        wanted_fps: the rate that the model was trained on.
        frames: a fixed number instead.

    Raises:
        ValueError: for fewer than 2 frames or a rate that is not positive.
    """
    if total < 2 or not fps > 0:
        raise ValueError(f"videoreward needs at least 2 frames and a positive rate; got {total} frames at {fps} fps.")
    if frames is None:
        most = min(768, total) // 2 * 2
        count = 2 * round(min(max(total / fps * wanted_fps, 4), most) / 2)
    else:
        count = 2 * round(frames / 2)
    return torch.linspace(0, total - 1, min(count, total)).round().long()


@final
class VideoReward(Judge):
    """VideoAlign's VQ, MQ and TA.

    Args:
        weights: folder or hub id of a release.
        template: the wording that the release was trained with: upstream's ``prompt_template.py`` (MIT; read, not run)
            or a text file. It is part of the model: another wording gives other numbers.
        base: where Qwen2-VL's configuration and tokenizer lie; None: as the release says.
        fps: true rate of the videos; None: ``meta[i]["fps"]`` tells.
        criteria: which of VQ, MQ and TA are summed.
        dtype: of the network; the head is float32 in any case.
    """

    card = Card(
        name="videoreward",
        summary="visual quality + motion quality + text alignment of a video, standardised (VideoAlign)",
        modality=("video",),
        differentiable=True,
        range=(-6.0, 6.0),
        licence="MIT (code); weights: not verified",
        weights="KwaiVGI/VideoReward",
        text=6144,
        reference="Liu et al., arXiv 2501.13918",
    )

    def __init__(
        self,
        weights: str | Path = "KwaiVGI/VideoReward",
        template: str | Path | None = None,
        *,
        base: str | Path | None = None,
        fps: float | None = None,
        criteria: Sequence[str] = CRITERIA,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        if template is None:
            raise ValueError(
                "videoreward needs template=: the wording that its weights were trained on, which is not shipped here. "
                "Download prompt_template.py from github.com/KwaiVGI/VideoAlign and pass its path; it is read, not run."
            )
        unknown = [c for c in criteria if c not in CRITERIA]
        if unknown or not criteria:
            raise ValueError(f"criteria must be among {', '.join(CRITERIA)}; got {list(criteria)}.")
        self.template = read_template(Path(template))
        folder = fetch(weights)
        self.release = read_release(folder)
        self.fps = fps
        self.chosen = [CRITERIA.index(c) for c in criteria]
        self._load(folder, folder_or_id(self.release.base if base is None else base), dtype)
        self.freeze()

    def _load(self, folder: Path, source: str, dtype: torch.dtype) -> None:
        from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLModel

        self.tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        self.tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
        special: Any = self.tokenizer.convert_tokens_to_ids(list(SPECIAL))
        self.special: list[int] = special
        state = read_weights(folder, self.release, source)
        head = state.pop("rm_head.weight", None)
        config: Any = Qwen2VLConfig.from_pretrained(source)
        width = config.text_config.hidden_size
        if head is None or tuple(head.shape) != (self.release.outputs, width):
            got = None if head is None else tuple(head.shape)
            raise ValueError(f"{folder}: rm_head.weight must be ({self.release.outputs}, {width}); got {got}.")
        config.text_config.vocab_size = len(state["language_model.embed_tokens.weight"])
        loaded: Any = Qwen2VLModel.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
        self.model, info = loaded
        wrong = {k: sorted(v)[:4] for k, v in info.items() if v}
        if wrong:
            raise ValueError(f"weights {folder} do not fit the configuration of {source}: {wrong}.")
        self.head: Tensor
        self.register_buffer("head", head.float())
        sizes = config.vision_config
        self.sizes = Vision(
            sizes.patch_size, sizes.spatial_merge_size, sizes.temporal_patch_size,
            min(MIN_PIXELS, self.release.max_pixels), self.release.max_pixels,
        )  # fmt: skip

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return ``(B,)`` sums of the chosen criteria; an empty prompt is judged as such."""
        return self.standardised(media, prompts, meta)[:, self.chosen].sum(1)

    def standardised(self, media: Tensor, prompts: Sequence[str], meta: Meta | None = None) -> Tensor:
        """Return ``(B, 3)`` float32 VQ, MQ and TA.

        Raises:
            ValueError: where the rate is missing or wrong, or a prompt holds one of the model's special tokens.
        """
        count, total = media.shape[:2]
        rates = [self.fps] * count if self.fps is not None else field(meta, "fps", self.card.name, count)
        picks = [sample_frames(total, float(r), self.release.fps, self.release.frames) for r in rates]
        out = media.new_zeros((count, 3), dtype=torch.float32)
        for length in sorted({len(p) for p in picks}):  # videos of one number of frames go together
            rows = [i for i, p in enumerate(picks) if len(p) == length]
            frames = torch.stack([media[i, picks[i].to(media.device)] for i in rows])
            values = self._raw(frames, [prompts[i] for i in rows])
            out = out.index_put((torch.tensor(rows, device=out.device),), values.to(out.device))
        means, stds = (torch.tensor(v, device=out.device) for v in (self.release.means, self.release.stds))
        return (out - means) / stds

    def _raw(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return ``(B, 3)`` values of the head for frames ``(B, T, 3, H, W)`` already sampled."""
        device = self.head.device
        pixels, grid = patches(frames.to(device), self.sizes)
        count = int(grid[0].prod()) // self.sizes.merge**2
        texts = [chat(self.template.replace("{text_prompt}", p), count, PAD) for p in prompts]
        ids, mask = tokenize(self.tokenizer, texts, device)
        embeds = self.model.get_input_embeddings()(ids)
        seen = self.model.get_video_features(pixels.to(embeds.dtype), grid).pooler_output
        place = ids == self.model.config.video_token_id
        asked = [ids == token for token in self.special]
        if not ((place.sum(1) == count).all() and all((a.sum(1) == 1).all() for a in asked)):
            raise ValueError(f"a prompt holds {PAD} or one of {', '.join(SPECIAL)}, which are not text: remove it.")
        embeds = embeds.masked_scatter(place.unsqueeze(-1), torch.cat(list(seen)).to(embeds.dtype))
        positions = torch.arange(ids.shape[1], device=device).expand(3, *ids.shape)
        hidden = self.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        states = torch.stack([hidden[a] for a in asked], 1).float()  # (B, 3, d)
        return (states * self.head.float()).sum(-1)  # row k of the head for token k, or its only row for all
