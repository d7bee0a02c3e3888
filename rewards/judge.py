"""Judges behind an OpenAI-compatible endpoint (vLLM, SGLang, llama.cpp, a hosted model): pictures in, a number out.

Each sample becomes one chat request with its picture (PNG, base64) and a question; the answer must end in a line that
``pattern`` finds, by default "Final Score: x" as UnifiedReward writes it (Wang et al. 2025, arXiv 2503.05236). The
score is that number. What can go wrong, and what then happens:

* no number, a number outside ``scale``, no completion in the reply: the sample is unjudged, and :class:`Unjudged` names
  it and carries the others' scores. Peers score 0 here, which teaches the generator to confuse the judge.
* timeouts, refused connections, 429 and 5xx: tried again with growing pauses; if the last try fails,
  :class:`EndpointDown`, which a run can wait out, since nothing has been scored wrongly.
* other 4xx: the request is wrong and would stay so: ``ValueError`` with the server's words.

The key comes from an environment variable and appears in no message.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final
from urllib.parse import urlsplit

import torch
from torch import Tensor

from flowalign.pause import Away
from flowalign.protocols import Card, Meta
from flowalign.rewards.base import Judge, Unjudged
from flowalign.rewards.preprocess import to_bytes

if TYPE_CHECKING:
    import httpx

__all__ = ["EndpointDown", "OpenAIJudge", "Retry", "Unjudged"]

QUESTION = (
    "You are shown what a generator made for a prompt. Judge how well it matches the prompt and how good it looks: "
    "objects, their number, colours and relations first, then flaws and beauty. The prompt is between the lines.\n"
    "----\n{prompt}\n----\n"
    "Say briefly what you see, then end with one line 'Final Score: x', where x is a number from {low} (bad) to {high} "
    "(perfect)."
)
LOCAL = {"127.0.0.1", "localhost", "::1"}


class EndpointDown(Away):
    """The endpoint did not answer after all retries."""


@dataclass(frozen=True)
class Retry:
    """How patient the client is.

    Attributes:
        timeout: seconds for one request.
        attempts: requests before giving up.
        pause: seconds before the second attempt; doubles each time. A server's Retry-After is obeyed up to ``longest``.
        longest: longest pause in seconds.
    """

    timeout: float = 60.0
    attempts: int = 4
    pause: float = 1.0
    longest: float = 30.0

    def __post_init__(self) -> None:
        if self.timeout <= 0 or self.attempts < 1 or self.pause < 0 or self.longest < 0:
            raise ValueError(f"timeout must be positive, attempts at least 1, pauses not negative; got {self}.")


@final
class OpenAIJudge(Judge):
    """A vision-language judge that is asked over HTTP.

    Args:
        weights: the model's name at the endpoint.
        url: base address, ending in ``/v1`` as a rule.
        question: must contain ``{prompt}``; ``{low}`` and ``{high}`` are filled in from ``scale``. UnifiedReward
            checkpoints were trained on wordings of their own: give theirs for published numbers.
        pattern: regular expression with one group; its last match in the answer is the score.
        scale: lowest and highest score; an answer outside is no score.
        tokens: length limit of an answer.
        frames: pictures sent of a video, evenly spaced.
        concurrency: requests under way at once.
        retry: how patient to be.
        key: name of the environment variable that holds the key; none is sent where it is unset.
        reply: bytes of a reply beyond which it is no answer.
    """

    card = Card(
        name="judge",
        summary="number given by a vision-language model behind an OpenAI-compatible endpoint",
        modality=("image", "video"),
        differentiable=False,
        range=(1.0, 5.0),
        licence="of the model asked; the default's was not seen, some of its family's: MIT",
        weights="CodeGoat24/UnifiedReward-2.0-qwen-7b",
        text=8192,
        reference="UnifiedReward, arXiv 2503.05236",
    )

    def __init__(
        self,
        weights: str = "CodeGoat24/UnifiedReward-2.0-qwen-7b",
        *,
        url: str = "http://127.0.0.1:8000/v1",
        question: str = QUESTION,
        pattern: str = r"Final Score:\s*\**\s*(-?\d+(?:\.\d+)?)",
        scale: tuple[float, float] = (1.0, 5.0),
        tokens: int = 1024,
        frames: int = 4,
        concurrency: int = 8,
        retry: Retry = Retry(),
        key: str = "OPENAI_API_KEY",
        reply: int = 1_000_000,
    ) -> None:
        super().__init__()
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise ValueError(f"url must be http://host[:port]/v1 or https://...; got {url!r}.")
        if "{prompt}" not in question:
            raise ValueError(f"the question must contain {{prompt}}; got {question!r:.200}.")
        if re.compile(pattern).groups != 1:
            raise ValueError(f"the pattern must have one group, the score; got {pattern!r}.")
        if not scale[0] < scale[1] or frames < 1 or concurrency < 1:
            raise ValueError(f"scale must rise, frames and concurrency be ≥ 1; got {scale}, {frames}, {concurrency}.")
        self.model, self.url, self.question = weights, url.rstrip("/"), question
        self.pattern, self.scale, self.tokens = re.compile(pattern), scale, tokens
        self.frames, self.concurrency, self.retry, self.key, self.reply = frames, concurrency, retry, key, reply
        self.card = replace(self.card, range=scale, weights=weights)

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return ``(B,)`` scores; one request per sample.

        Raises:
            Unjudged: where answers hold no score.
            EndpointDown: where the endpoint stays silent.
            ValueError: where it refuses the request.
        """
        import httpx

        bodies = [self._body(x, p) for x, p in zip(media, prompts, strict=True)]
        trust = urlsplit(self.url).hostname not in LOCAL  # a proxy cannot reach this machine's own loopback
        secret = os.environ.get(self.key)
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        client = httpx.Client(timeout=self.retry.timeout, trust_env=trust, headers=headers)
        with client, ThreadPoolExecutor(self.concurrency) as pool:
            replies = list(pool.map(lambda body: self._ask(client, body), bodies))
        scores = torch.full((len(media),), math.nan)
        reasons: dict[int, str] = {}
        for i, reply in enumerate(replies):
            found = self._read(reply)
            if isinstance(found, float):
                scores[i] = found
            else:
                reasons[i] = found
        self.unjudged(scores.to(media.device), reasons)
        return scores.to(media.device)

    def _body(self, sample: Tensor, prompt: str) -> dict[str, Any]:
        stills = sample[None] if sample.ndim == 3 else sample
        if len(stills) > self.frames:
            stills = stills[torch.linspace(0, len(stills) - 1, self.frames).round().long().to(stills.device)]
        low, high = (f"{v:g}" for v in self.scale)
        text = self.question.replace("{low}", low).replace("{high}", high).replace("{prompt}", prompt)
        pictures = [{"type": "image_url", "image_url": {"url": data_url(still)}} for still in stills]
        content = [*pictures, {"type": "text", "text": text}]
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.tokens,
            "temperature": 0,
            "seed": 0,
        }

    def _ask(self, client: httpx.Client, body: dict[str, Any]) -> bytes:
        """Return the reply's body, trying again where that can help."""
        import httpx

        trouble = ""
        for attempt in range(self.retry.attempts):
            pause = self.retry.pause * 2**attempt
            try:
                with client.stream("POST", f"{self.url}/chat/completions", json=body) as response:
                    content = self._limited(response)
                    status, wait = response.status_code, response.headers.get("Retry-After", "")
            except httpx.TransportError as error:
                trouble = f"{type(error).__name__}: {error}"
            else:
                if status < 400:
                    return content
                words = content[:300].decode("utf-8", "replace")
                if status != 429 and status < 500:
                    raise ValueError(f"{self.url} refuses the request for model {self.model!r}: {status} {words}")
                trouble = f"{status} {words}"
                pause = float(wait) if wait.isdecimal() else pause
            if attempt + 1 < self.retry.attempts:
                time.sleep(min(pause, self.retry.longest))
        raise EndpointDown(
            f"judge {self.model!r} at {self.url} did not answer in {self.retry.attempts} attempts of up to "
            f"{self.retry.timeout:g} s; last: {trouble}. Nothing was scored; start the server, or raise the timeout."
        )

    def _limited(self, response: httpx.Response) -> bytes:
        """Return at most ``reply`` bytes and one more, by which :meth:`_read` sees that there were too many.

        httpx's own timeout is for each read, so a server that trickles would hold the run for ever: the whole reply is
        timed too.
        """
        import httpx

        content, began = bytearray(), time.monotonic()
        for chunk in response.iter_bytes():
            content += chunk
            if time.monotonic() - began > self.retry.timeout:
                raise httpx.ReadTimeout(f"the reply took longer than {self.retry.timeout:g} s")
            if len(content) > self.reply:
                break
        return bytes(content[: self.reply + 1])

    def _read(self, content: bytes) -> float | str:
        """Return the score, or the reason why there is none."""
        if len(content) > self.reply:
            return f"the reply exceeds {self.reply} bytes"
        try:
            text = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            return f"the reply is no chat completion: {content[:120]!r}"
        if not isinstance(text, str):
            return f"the reply has no text but {type(text).__name__}"
        found = self.pattern.findall(text)
        if not found:
            return f"no score in the answer {text[-120:]!r}"
        try:
            score = float(found[-1])
        except ValueError:
            return f"the score {found[-1]!r:.40} is no number"
        if not self.scale[0] <= score <= self.scale[1]:
            return f"the score {score:g} lies outside [{self.scale[0]:g}, {self.scale[1]:g}]"
        return score


def data_url(still: Tensor) -> str:
    """Return a picture ``(3, H, W)`` in [0, 1] as a PNG in a data URL."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(to_bytes(still).permute(1, 2, 0).cpu().numpy()).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
