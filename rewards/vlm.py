"""Frozen vision-language models as judges: what probability do they give to these words after seeing this picture?

One door to the image-text models of transformers (tested: Qwen2-VL, 2.5 and 3, LLaVA, Gemma 3; no family has code of
its own). The model's own processor lays out the conversation and the pixels, fed with tensors so that gradients reach
them. Three things are put right on the way:

* the processor's resize overshoots on float pixels where the published byte path clips: it is clipped straight through;
* the last layer runs in float32 whatever the model's dtype is: bfloat16 logits near 20 are 0.125 apart;
* answers are tokenised on their own and appended, so that the split between question and answer cannot shift, and
  padding goes on the right, where a causal model never sees it.

Chat templates are rendered by transformers' sandboxed Jinja; no remote code is run.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowalign.rewards.loading import folder_or_id
from flowalign.rewards.preprocess import clamp_through

__all__ = ["Float32Head", "VisionLanguage"]

Pictures = Sequence[Sequence[Tensor]]  # per sample, its pictures (3, H, W) in the order of the conversation


@final
class Float32Head(nn.Module):
    """A language model's last layer, computed in float32 from its own (shared) weights."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor) -> Tensor:
        """Return float32 logits ``(..., V)``."""
        weight, bias = self.head.weight, self.head.bias
        return F.linear(hidden.float(), weight.float(), None if bias is None else bias.float())


@final
class VisionLanguage(nn.Module):
    """A frozen image-text-to-text model and its processor.

    Args:
        weights: hub id or folder.
        dtype: of the network; its last layer is float32 in any case.
        template: the conversation, where the processor has no chat template or another one is wanted; must contain
            ``{images}`` (the picture tokens) and ``{question}``.
    """

    def __init__(
        self, weights: str | Path, *, dtype: torch.dtype = torch.bfloat16, template: str | None = None
    ) -> None:
        super().__init__()
        from transformers import AutoModelForImageTextToText, AutoProcessor

        source = folder_or_id(weights)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, trust_remote_code=False)
        self.model.set_output_embeddings(Float32Head(self.model.get_output_embeddings()))
        self.processor: Any = AutoProcessor.from_pretrained(source, trust_remote_code=False)
        self.processor.image_processor = _clipping(self.processor.image_processor)
        self.tokenizer: Any = self.processor.tokenizer
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.template = template
        if template is None and not self.processor.chat_template:
            raise ValueError(f"{source} has no chat template: pass template='... {{images}} ... {{question}} ...'.")
        self.requires_grad_(False).eval()
        self.differentiable = self._probe()

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.device

    def train(self, mode: bool = True) -> VisionLanguage:
        """Stay in evaluation mode."""
        return super().train(False)

    def _probe(self) -> bool:
        """Return whether the processor lets gradients through to the pixels."""
        pixels = torch.full((3, 64, 64), 0.5, requires_grad=True)
        batch = self.layout([[pixels]], ["?"])
        return any(v.requires_grad for v in batch.values() if isinstance(v, Tensor))

    def conversation(self, pictures: int, question: str) -> str:
        """Return the text of one turn with its picture tokens, up to where the answer begins.

        Raises:
            ValueError: where the question holds one of the tokenizer's special tokens, which would be read as layout.
        """
        self._refuse_layout(question)
        if self.template is not None:
            return self.template.format(images=self.processor.image_token * pictures, question=question)
        content = [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": question}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

    def _refuse_layout(self, text: str) -> None:
        special = [*self.tokenizer.all_special_tokens, getattr(self.processor, "image_token", None)]
        found = [token for token in special if token and token in text]
        if found:
            raise ValueError(f"the text {text!r:.200} holds the model's special token {found[0]!r}: remove it.")

    def layout(self, pictures: Pictures, questions: Sequence[str]) -> dict[str, Any]:
        """Return the model's inputs; pixels carry gradients where the processor is written in torch."""
        texts = [self.conversation(len(p), q) for p, q in zip(pictures, questions, strict=True)]
        batch = self.processor(
            text=texts,
            images=[list(p) for p in pictures],
            padding=True,
            return_tensors="pt",
            images_kwargs={"do_rescale": False, "input_data_format": "channels_first"},
        )
        return dict(batch)

    def words(self, text: str) -> Tensor:
        """Return the token ids of an answer, without special tokens."""
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)

    def single(self, word: str) -> int:
        """Return the id of a word that is one token.

        Raises:
            ValueError: where it is several or unknown: the probability of its first piece would be something else.
        """
        ids = self.words(word).tolist()
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            raise ValueError(f"{word!r} is not one token of this model but {ids}; choose a word that is.")
        return ids[0]

    def logits(self, pictures: Pictures, questions: Sequence[str], answers: Sequence[Tensor]) -> Tensor:
        """Return ``(B, K+1, V)`` float32 logits: row j predicts token j of the answer, K the longest answer.

        Rows past the end of a shorter answer are meaningless.

        Raises:
            ValueError: where conversation and answer exceed the model's context (nothing is cut silently), or pictures
                want a gradient that the processor stops.
        """
        if not self.differentiable and any(x.requires_grad for p in pictures for x in p):
            raise ValueError(
                f"{type(self.processor.image_processor).__name__} stops gradients: this model can score pictures but "
                "not train by backpropagation. Detach them, or take a model whose processor is written in torch."
            )
        batch = self.layout([[x.to(self.device, torch.float32) for x in p] for p in pictures], questions)
        rows, starts = _append(batch, answers, self.tokenizer.pad_token_id)
        longest = max(len(a) for a in answers)
        length = rows["input_ids"].shape[1]
        limit = self.model.config.get_text_config().max_position_embeddings
        if length > limit:
            raise ValueError(
                f"picture, question and answer take {length} tokens; the model reads {limit}. Shorten them."
            )
        keep = length - min(starts) + 1
        inputs = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in rows.items()}
        out = self.model(**inputs, use_cache=False, logits_to_keep=keep).logits.float()
        first = torch.tensor(starts, device=out.device) - 1 - (length - out.shape[1])
        index = (first[:, None] + torch.arange(longest + 1, device=out.device)).clamp(max=out.shape[1] - 1)
        return out.gather(1, index[:, :, None].expand(-1, -1, out.shape[2]))

    def answer_log_probs(self, pictures: Pictures, questions: Sequence[str], answers: Sequence[str]) -> list[Tensor]:
        """Return, per sample, the ``(K_i,)`` log-probabilities of the answer's tokens; no special token among them."""
        for answer in answers:
            self._refuse_layout(answer)
        ids = [self.words(a) for a in answers]
        logits = self.logits(pictures, questions, ids)
        return [-F.cross_entropy(logits[i, : len(a)], a.to(logits.device), reduction="none") for i, a in enumerate(ids)]

    def next_log_probs(
        self, pictures: Pictures, questions: Sequence[str], so_far: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Return ``(B, V)`` log-probabilities of the first token of the answer, or of the next after ``so_far``."""
        given = [torch.empty(0, dtype=torch.long)] * len(questions) if so_far is None else so_far
        logits = self.logits(pictures, questions, given)
        last = torch.tensor([len(g) for g in given], device=logits.device)
        return logits[torch.arange(len(logits), device=logits.device), last].log_softmax(-1)

    @torch.no_grad()
    def write(self, pictures: Pictures, questions: Sequence[str], tokens: int) -> list[Tensor]:
        """Return, per sample, the ids of a greedy answer of at most ``tokens`` tokens, without special tokens.

        One sample at a time: left padding, which batched generation needs, would change the words with the batch.
        """
        special = set(self.tokenizer.all_special_ids)
        answers = []
        for p, q in zip(pictures, questions, strict=True):
            batch = self.layout([[x.to(self.device, torch.float32) for x in p]], [q])
            inputs = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            out = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
            ids = out[0, inputs["input_ids"].shape[1] :].tolist()
            stop = ids.index(self.tokenizer.eos_token_id) if self.tokenizer.eos_token_id in ids else len(ids)
            answers.append(torch.tensor([t for t in ids[:stop] if t not in special], dtype=torch.long))
        return answers


def _clipping(processor: Any) -> Any:
    """Return a copy of an image processor whose resize clips to [0, 1], as the byte path does, with gradients."""
    clipping = copy.copy(processor)
    resize = processor.resize

    def resize_and_clip(*args: Any, **kwargs: Any) -> Any:
        return clamp_through(resize(*args, **kwargs))

    clipping.resize = resize_and_clip
    return clipping


def _append(batch: dict[str, Any], answers: Sequence[Tensor], pad: int) -> tuple[dict[str, Any], list[int]]:
    """Append answers to padded conversations and pad on the right again.

    Returns:
        The inputs, and where each answer begins.
    """
    mask = batch["attention_mask"].bool()
    shape = batch["input_ids"].shape
    starts = [int(m.sum()) for m in mask]
    length = max(s + len(a) for s, a in zip(starts, answers, strict=True))
    out = dict(batch)
    for key, value in batch.items():
        if not isinstance(value, Tensor) or value.shape != shape or value.is_floating_point():
            continue  # pixels and grids have no entry per token
        filler = pad if key == "input_ids" else 0
        rows = value.new_full((shape[0], length), filler)
        for i, answer in enumerate(answers):
            rows[i, : starts[i]] = value[i][mask[i]]
            end = starts[i] + len(answer)
            if key == "input_ids":
                rows[i, starts[i] : end] = answer.to(rows.device)
            elif key == "attention_mask":
                rows[i, starts[i] : end] = 1
        out[key] = rows
    return out, starts
