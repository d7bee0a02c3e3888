"""A reward on another machine, as a reward here.

    reward = RemoteReward("http://judge:8000", token=...)

Large batches are cut to what the server takes and sent ``parallel`` at a time. What passes (connection refused, timed
out, 429, 502, 503, 504) is tried again with growing waits; what the server says is wrong is not. If it stays down for
longer than ``grace`` seconds the answer is :class:`RewardDown`, upon which a run pauses and goes on by itself when the
server is back (:mod:`flowalign.pause`). Scores never turn into zeros on the way.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowalign.pause import Away
from flowalign.protocols import Card, Meta
from flowalign.rewards.base import Judge, Unjudged
from flowalign.rewards.preprocess import to_bytes
from flowalign.rewards.wire import JSON, SAFETENSORS, encode_json, encode_safetensors

if TYPE_CHECKING:
    import httpx

__all__ = ["Patience", "RemoteReward", "RewardDown"]

PASSING = {408, 429, 502, 503, 504}


class RewardDown(Away):
    """The server does not answer; asking again later may help."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for what.

    Attributes:
        timeout: seconds for one request.
        grace: seconds of silent retries before it is said to be down.
        first: seconds before the first retry, doubled each time up to ...
        longest: ... this many.
    """

    timeout: float = 120.0
    grace: float = 20.0
    first: float = 0.25
    longest: float = 10.0


class RemoteReward(Judge):
    """The client.

    Args:
        url: of the server; also accepted as ``weights`` so that ``remote@http://judge:8000`` works.
        token: what the server wants to hear; None for none.
        encoding: ``safetensors`` (exact floats), ``bytes`` (the same, rounded to a saved picture's bytes: a quarter of
            the traffic) or ``json`` (PNG, pictures only).
        batch: samples per request, at most; the server's own limit is kept in any case.
        parallel: requests under way at once.
        patience: see :class:`Patience`.
    """

    card = Card("remote", "a reward behind HTTP", modality=("image", "video", "audio"))

    def __init__(
        self,
        weights: str | None = None,
        *,
        token: str | None = None,
        encoding: str = "safetensors",
        batch: int = 64,
        parallel: int = 2,
        patience: Patience | None = None,
    ) -> None:
        super().__init__()
        if weights is None or not weights.startswith(("http://", "https://")):
            raise ValueError(f"a remote reward wants the server's URL, remote@http://host:port; got {weights!r}.")
        if encoding not in ("safetensors", "bytes", "json") or batch < 1 or parallel < 1:
            raise ValueError(
                f"wanted encoding safetensors, bytes or json, and batch and parallel of at least 1; got {encoding!r}, "
                f"{batch}, {parallel}."
            )
        try:
            import httpx
        except ImportError as error:
            raise ImportError("remote rewards need httpx: pip install 'flowalign[serve]'.") from error
        self.url, self.encoding, self.patience = weights.rstrip("/"), encoding, patience or Patience()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.client = httpx.Client(timeout=self.patience.timeout, headers=headers, follow_redirects=False)
        about = self._request("GET", "/card")
        limit = about.pop("limits")
        known: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in about.items() if k in Card.__dataclass_fields__
        }
        self.card = replace(Card(**known), differentiable=False)
        self.batch = min(batch, int(limit["samples"])) if self.card.batch else int(limit["samples"])
        self.pool = ThreadPoolExecutor(parallel, thread_name_prefix="remote-reward")

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Send the batch in pieces and join the answers.

        Raises:
            RewardDown: the server is down.
            Unjudged: as the server's reward says.
            ValueError: the server refuses the input; its words are passed on.
        """
        count = len(media)
        if not self.card.batch and count > self.batch:
            raise ValueError(
                f"{self.card.name!r} judges a set at once, and the server takes {self.batch}; got {count}."
            )
        pieces = [slice(i, i + self.batch) for i in range(0, count, self.batch)]
        futures = [
            self.pool.submit(self._piece, media[s], prompts[s], None if meta is None else meta[s]) for s in pieces
        ]
        scores, reasons = [], {}
        for piece, future in zip(pieces, futures, strict=True):
            answer = future.result()
            scores += [math.nan if v is None else float(v) for v in answer["scores"]]
            reasons.update({piece.start + int(i): str(why) for i, why in answer.get("unjudged", {}).items()})
        result = torch.tensor(scores, dtype=torch.float32, device=media.device)
        if reasons:
            raise Unjudged(self.card.name, result, reasons)
        return result

    def _piece(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> dict[str, Any]:
        if self.encoding == "bytes":
            media = to_bytes(media)
        encode, kind = (encode_json, JSON) if self.encoding == "json" else (encode_safetensors, SAFETENSORS)
        answer = self._request("POST", "/score", encode(media, prompts, meta), kind)
        if not isinstance(answer.get("scores"), list) or len(answer["scores"]) != len(prompts):
            raise ValueError(f"{self.url} sent no score for each of {len(prompts)} samples.")
        return answer

    def _request(self, method: str, path: str, body: bytes | None = None, kind: str = JSON) -> dict[str, Any]:
        """Ask until there is an answer, with growing waits, for as long as ``grace`` lasts."""
        start, wait = time.monotonic(), self.patience.first
        while True:
            response, trouble = self._try(method, path, body, kind)
            if response is not None:
                return self._answer(response)
            if time.monotonic() - start > self.patience.grace:
                raise RewardDown(
                    f"reward server {self.url} is down ({trouble}). Start it again: flowalign serve REWARD."
                )
            time.sleep(wait * random.uniform(0.75, 1.25))  # so that many clients do not come back in step
            wait = min(2 * wait, self.patience.longest)

    def _try(self, method: str, path: str, body: bytes | None, kind: str) -> tuple[httpx.Response | None, str]:
        import httpx

        try:
            response = self.client.request(method, self.url + path, content=body, headers={"Content-Type": kind})
        except httpx.TransportError as error:
            return None, f"{type(error).__name__}: {error}"[:200]
        if response.status_code in PASSING:
            return None, f"status {response.status_code}"
        return response, ""

    def _answer(self, response: httpx.Response) -> dict[str, Any]:
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if response.status_code != 200 or not isinstance(answer, dict):
            told = answer.get("error") if isinstance(answer, dict) else response.text[:200]
            raise ValueError(f"reward server {self.url} answered {response.status_code}: {told}")
        return answer

    def close(self) -> None:
        """Close connections and threads."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.client.close()
