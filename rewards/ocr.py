"""OCR: whether the text that the prompt quotes can be read in the picture.

    score = 1 − min(d, |target|) / |target|
    d     = 0 if the target occurs in what was read, else Levenshtein(read, target)

both lower-cased and without spaces, as in Flow-GRPO. The target is what stands between the first pair of double
quotes (straight or curly) of the prompt, or ``meta[i]["text"]``. A sample with neither cannot be judged.

The reader is RapidOCR (Apache-2.0, extra ``ocr``; its models come inside the package), or any callable of yours.
Reference: Flow-GRPO (2505.05470), which reads with PaddleOCR: expect other digits on hard pictures.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowalign.protocols import Card, Meta
from flowalign.rewards.base import Judge
from flowalign.rewards.preprocess import to_bytes

__all__ = ["OCR", "quoted", "similarity"]

QUOTES = re.compile(r'"([^"]+)"|“([^”]+)”')


def quoted(prompt: str) -> str | None:
    """Return what stands between the first pair of double quotes of ``prompt``, or None."""
    found = QUOTES.search(prompt)
    return (found[1] or found[2]) if found else None


def similarity(read: str, target: str) -> float:
    """Return one minus the clipped relative edit distance of ``read`` to ``target``, in [0, 1]."""
    from rapidfuzz.distance import Levenshtein

    read, target = (re.sub(r"\s", "", s).lower() for s in (read, target))
    if not target:
        raise ValueError("the text to be read is empty once its spaces are removed.")
    distance = 0 if target in read else Levenshtein.distance(read, target)
    return 1 - min(distance, len(target)) / len(target)


class RapidReader:
    """RapidOCR as a reader: ``(H, W, 3)`` RGB bytes to the text of all lines, top to bottom, joined."""

    def __init__(self) -> None:
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ImportError(
                "the OCR reward reads with RapidOCR, which is not installed: pip install 'flowalign[ocr]', or pass a "
                "reader of your own, OCR(reader=my_function)."
            ) from error
        self.engine = RapidOCR(params={"Global.log_level": "error"})

    def __call__(self, picture: Tensor) -> str:
        """Return the joined text; empty where nothing is found."""
        result = self.engine(picture.numpy()[..., ::-1].copy())  # RapidOCR follows OpenCV: BGR
        return "".join(result.txts or ())  # type: ignore[union-attr]


class OCR(Judge):
    """Text accuracy.

    Args:
        reader: ``(H, W, 3)`` uint8 RGB tensor to text; None for RapidOCR.
    """

    card = Card(
        "ocr",
        "whether the quoted text can be read",
        licence="Apache-2.0",
        weights="inside rapidocr",
        reference="arXiv:2505.05470",
    )

    def __init__(self, reader: Callable[[Tensor], str] | None = None) -> None:
        super().__init__()
        self.reader = reader or RapidReader()

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return the similarity of what is read to what is asked for.

        Raises:
            Unjudged: samples whose prompt quotes nothing and whose meta has no text.
        """
        scores = torch.full((len(media),), torch.nan)
        reasons = {}
        for i, picture in enumerate(to_bytes(media).permute(0, 2, 3, 1).cpu()):
            target = meta[i].get("text") if meta is not None else None
            target = target or quoted(prompts[i])
            if not target or not target.strip():
                reasons[i] = f"prompt {prompts[i]!r:.80} quotes no text"
                continue
            scores[i] = similarity(self.reader(picture), target)
        self.unjudged(scores, reasons)
        return scores.to(media.device)
