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

import argparse
import asyncio
import hmac
import itertools
import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from flowalign.protocols import Reward
from flowalign.rewards.wire import Limits, Refused, decode
from flowalign.rewards.worker import Job, Worker

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

__all__ = ["main", "make_app", "serve"]

log = logging.getLogger(__name__)
LOCAL = ("127.0.0.1", "localhost", "::1")


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
        raise ValueError(f"listening on {host} lets others in: give a token, in FLOWALIGN_TOKEN or as token=.")
    try:
        import uvicorn
    except ImportError as error:
        raise ImportError("serving needs uvicorn and starlette: pip install 'flowalign[serve]'.") from error
    if isinstance(reward, str):
        from flowalign.rewards.names import load

        reward = load(reward, device=device)
    log.info("serving %s", reward.card.name)
    app = make_app(reward, limits=limits, token=token, device=device)
    crowd = 4 * (limits or Limits()).waiting
    uvicorn.run(app, host=host, port=port, timeout_keep_alive=30, server_header=False, limit_concurrency=crowd)


def main(args: Sequence[str]) -> None:
    """``flowalign serve REWARD [options]``."""
    usage = argparse.ArgumentParser("flowalign serve", description="A reward behind HTTP; use it as remote@URL.")
    usage.add_argument("reward", help="name[@weights][:weight], several with commas; `flowalign rewards` lists names")
    usage.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; beyond this machine a token is needed"
    )
    usage.add_argument("--port", type=int, default=8000)
    usage.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    usage.add_argument("--samples", type=int, default=Limits.samples, help="samples per request, at most")
    usage.add_argument("--body", type=int, default=Limits.body, help="bytes per request, at most")
    o = usage.parse_args(list(args))
    device = ("cuda" if torch.cuda.is_available() else "cpu") if o.device == "auto" else o.device
    token = os.environ.get("FLOWALIGN_TOKEN")  # not an option: those can be read in the list of processes
    limits = Limits(body=o.body, samples=o.samples)
    serve(o.reward, host=o.host, port=o.port, token=token, limits=limits, device=device)
