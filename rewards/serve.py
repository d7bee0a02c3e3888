"""A reward behind HTTP, so that a heavy judge can live on another machine and serve several runs.

    GET  /health    {"status": "ok", "waiting": 0}          GET  /card    the reward's card
    POST /score     a batch (see :mod:`flowalign.rewards.wire`) → {"scores": [...], "unjudged": {"3": "why"}}

One worker scores; while it is busy, requests that arrive are merged into one batch if their media agree in shape, and
a merged batch that fails is scored request by request, so nobody fails by another's fault. Too large: 413. Malformed:
400. Queue full: 503 with Retry-After. A reward's complaint about its input: 422. Anything else: 500 with a number that
stands in the server's log next to the trace; the answer itself tells nothing of the server.

Nothing is ever unpickled. It listens on this machine alone unless told otherwise, and then it wants a token.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import json
import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowalign.protocols import Reward, check_media, check_scores
from flowalign.rewards.base import Unjudged, check_prompts, modality_of
from flowalign.rewards.wire import Batch, Limits, Refused, decode

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

__all__ = ["make_app", "serve"]

log = logging.getLogger(__name__)
LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(eq=False)
class Job:
    """A request in the queue."""

    batch: Batch
    answer: asyncio.Future[dict[str, Any]] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Worker:
    """Scores what waits, merging what fits together.

    Args:
        reward: the judge.
        limits: of the queue and of a merged batch.
        device: where media are sent; None leaves them.
    """

    def __init__(self, reward: Reward, limits: Limits, device: torch.device | str | None) -> None:
        self.reward, self.limits, self.device = reward, limits, device
        self.queue: asyncio.Queue[Job] = asyncio.Queue(limits.waiting)

    async def run(self) -> None:
        """Serve the queue until cancelled."""
        while True:
            jobs = [await self.queue.get()]
            while not self.queue.empty():
                jobs.append(self.queue.get_nowait())
            for group in self._groups(jobs):
                await self._serve(group)

    def _groups(self, jobs: list[Job]) -> list[list[Job]]:
        """Group jobs of one shape, up to the limit of a batch; a reward of a set is never merged."""
        groups: list[list[Job]] = []
        for job in jobs:
            last = next((g for g in reversed(groups) if self._merge(g, job)), None)
            if last is None:
                groups.append([job])
            else:
                last.append(job)
        return groups

    def _merge(self, group: list[Job], job: Job) -> bool:
        a, b = group[0].batch, job.batch
        fits = a.media.shape[1:] == b.media.shape[1:] and a.media.dtype == b.media.dtype
        total = sum(len(j.batch.prompts) for j in group) + len(b.prompts)
        return self.reward.card.batch and fits and (a.meta is None) == (b.meta is None) and total <= self.limits.samples

    async def _serve(self, group: list[Job]) -> None:
        for jobs in [group] if len(group) == 1 else [group, *([j] for j in group)]:
            jobs = [j for j in jobs if not j.answer.done()]  # those whose client has gone, or who are answered
            if not jobs:
                continue
            try:
                answers = await asyncio.to_thread(self._score, [j.batch for j in jobs])
            except Exception as error:
                if len(jobs) == 1:
                    jobs[0].answer.set_exception(error)
                continue
            for job, answer in zip(jobs, answers, strict=True):
                if not job.answer.done():
                    job.answer.set_result(answer)

    @torch.no_grad()
    def _score(self, batches: list[Batch]) -> list[dict[str, Any]]:
        media = torch.cat([b.media for b in batches])
        check_media(media, modality_of(media, self.reward.card.modality))  # on the CPU, where the range is checked
        prompts = [p for b in batches for p in b.prompts]
        meta = None if batches[0].meta is None else [m for b in batches for m in b.meta or []]
        check_prompts(prompts, meta, len(media))
        scores, reasons = self._judge(media if self.device is None else media.to(self.device), prompts, meta)
        answers, start = [], 0
        for b in batches:
            part = scores[start : start + len(b.prompts)].tolist()
            why = {str(i - start): r for i, r in reasons.items() if start <= i < start + len(b.prompts)}
            answers.append({"scores": [s if math.isfinite(s) else None for s in part], "unjudged": why})
            start += len(b.prompts)
        return answers

    def _judge(self, media: Tensor, prompts: list[str], meta: Any) -> tuple[Tensor, dict[int, str]]:
        try:
            return check_scores(self.reward(media, prompts, meta), len(media), self.reward.card.name).cpu(), {}
        except Unjudged as error:
            return error.scores.detach().cpu(), error.reasons


def make_app(
    reward: Reward,
    *,
    limits: Limits | None = None,
    token: str | None = None,
    device: torch.device | str | None = None,
) -> Starlette:
    """Return the ASGI application.

    Args:
        reward: the judge.
        limits: see :class:`Limits`.
        token: if given, requests must bear it (``Authorization: Bearer ...``), but for /health.
        device: where media are sent before scoring.
    """
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    bounds = limits or Limits()
    numbers = itertools.count(1)
    state: dict[str, Worker] = {}

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        state["worker"] = Worker(reward, bounds, device)
        task = asyncio.create_task(state["worker"].run())
        try:
            yield
        finally:
            task.cancel()

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "waiting": state["worker"].queue.qsize()})

    async def card(request: Request) -> Response:
        refusal = _unauthorised(request, token)
        return refusal or JSONResponse({**asdict(reward.card), "limits": asdict(bounds)})

    async def score(request: Request) -> Response:
        refusal = _unauthorised(request, token)
        if refusal:
            return refusal
        try:
            job = Job(decode(await _body(request, bounds), request.headers.get("content-type", ""), bounds))
            state["worker"].queue.put_nowait(job)
            return JSONResponse(await job.answer)
        except asyncio.QueueFull:
            return JSONResponse({"error": "busy: try again"}, 503, {"Retry-After": "1"})
        except Refused as error:
            return JSONResponse({"error": str(error)}, error.status)
        except ValueError as error:
            return JSONResponse({"error": str(error)[:500]}, 422)
        except Exception:
            number = next(numbers)
            log.exception("request %d failed", number)
            return JSONResponse({"error": f"internal error {number}; see the server's log"}, 500)

    routes = [
        Route("/health", health, methods=["GET"]),
        Route("/card", card, methods=["GET"]),
        Route("/score", score, methods=["POST"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


def _unauthorised(request: Request, token: str | None) -> Response | None:
    from starlette.responses import JSONResponse

    given = request.headers.get("authorization", "")
    if token is None or hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        return None
    return JSONResponse({"error": "wrong or missing token"}, 401)


async def _body(request: Request, limits: Limits) -> bytes:
    """Read the body, and stop as soon as it is too long, whatever its header claimed."""
    too_large = Refused(f"the body is too large: at most {limits.body} bytes.", 413)
    claimed = request.headers.get("content-length", "0")
    if not claimed.isascii() or not claimed.isdigit() or len(claimed) > 18:
        raise Refused("Content-Length is not a number.")
    if int(claimed) > limits.body:
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limits.body:
            raise too_large
        parts.append(part)
    return b"".join(parts)


def serve(
    reward: Reward | str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    limits: Limits | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Serve a reward (or a specification such as ``pickscore:0.5,aesthetic``) until interrupted.

    Raises:
        ValueError: listening beyond this machine without a token.
        ImportError: the extra ``serve`` is not installed.
    """
    if host not in LOCAL and not token:
        raise ValueError(f"listening on {host} lets others in: give a token (FLOWALIGN_TOKEN or token=...).")
    try:
        import uvicorn
    except ImportError as error:
        raise ImportError("serving needs uvicorn and starlette: pip install 'flowalign[serve]'.") from error
    if isinstance(reward, str):
        from flowalign.rewards.names import load

        reward = load(reward, device=device)
    log.info("serving %s", json.dumps(reward.card.name))
    app = make_app(reward, limits=limits, token=token, device=device)
    crowd = 4 * (limits or Limits()).waiting
    uvicorn.run(app, host=host, port=port, timeout_keep_alive=30, server_header=False, limit_concurrency=crowd)
