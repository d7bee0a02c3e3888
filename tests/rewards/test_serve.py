"""The reward server and its client: exact scores, every kind of bad request, pauses and resumption."""

import base64
import json
import pickle
import socket
import struct
import threading
import time
import zlib
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowalign.asynchronous import Asynchronous
from flowalign.pause import Away
from flowalign.protocols import Card
from flowalign.rewards import load
from flowalign.rewards.base import Judge, Unjudged
from flowalign.rewards.remote import Patience, RemoteReward, RewardDown
from flowalign.rewards.serve import main, make_app, serve
from flowalign.rewards.wire import JSON, SAFETENSORS, Limits, decode, encode_json, encode_safetensors

torch.set_num_threads(1)
LIMITS = Limits(body=200_000, samples=8, values=3 * 64 * 64, total=3 * 64 * 64 * 4, prompt=50, waiting=4)
QUICK = Patience(timeout=20, grace=20, first=0.05, longest=0.1)


class Mean(Judge):
    """Brightness plus the prompt's length plus meta's bonus; misbehaves when told to."""

    card = Card("mean", "brightness", ("image", "video"), range=(0.0, 9.0), text=50)

    def __init__(self):
        super().__init__()
        self.sizes, self.gate, self.entered = [], threading.Event(), threading.Event()
        self.gate.set()

    def score(self, media, prompts, meta):
        self.entered.set()
        self.gate.wait(30)
        self.sizes.append(len(media))
        scores = media.flatten(1).mean(1) + torch.tensor([float(len(p)) for p in prompts])
        if meta is not None:
            scores = scores + torch.tensor([float(torch.as_tensor(m.get("bonus", 0)).sum()) for m in meta])
        if any(p == "crash" for p in prompts):
            raise RuntimeError("secret path /etc/passwd")
        if any(p == "refuse" for p in prompts):
            raise ValueError("sample 0 is refused")
        reasons = {i: "no text" for i, p in enumerate(prompts) if p == "skip"}
        self.unjudged(
            torch.where(torch.tensor([i in reasons for i in range(len(prompts))]), torch.nan, scores), reasons
        )
        return scores


def until(condition, seconds=20):
    """Wait for a condition; the machine may be busy, so no test counts on a fixed sleep."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


def waiting(url):
    return httpx.get(url + "/health", timeout=10).json()["waiting"]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def running(reward, port=None, **options):
    port = port or free_port()
    app = make_app(reward, **{"limits": LIMITS, **options})
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="critical", server_header=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def served():
    reward = Mean()
    with running(reward) as url:
        yield reward, url


@pytest.fixture
def x():
    return torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


P = ["a", "bb", "ccc", "", "ünïcode ✓"]


def post(url, body, kind=JSON, **headers):
    return httpx.post(url + "/score", content=body, headers={"content-type": kind, **headers}, timeout=30)


def alive(served):
    """The server still answers, and rightly."""
    _, url = served
    x = torch.zeros(1, 3, 4, 4)
    answer = post(url, encode_safetensors(x, ["ab"]), SAFETENSORS)
    return answer.status_code == 200 and answer.json() == {"scores": [2.0], "unjudged": {}}


# ---- the good way ---------------------------------------------------------------------------------------------------


def test_remote_scores_equal_local_ones(served, x):
    _, url = served
    meta = [{"bonus": 0.25 * i, "note": "é"} for i in range(5)]
    meta[1]["bonus"] = torch.tensor([0.5, 0.25])
    want = Mean()(x, P, meta)
    for batch in (1, 2, 64):
        remote = RemoteReward(url, batch=batch, parallel=3)
        assert torch.equal(remote(x, P, meta), want) and torch.equal(remote(x, P), Mean()(x, P))
        remote.close()
    assert remote.card.name == "mean" and remote.card.modality == ("image", "video") and not remote.card.differentiable
    bytes_only = (x * 255).round() / 255
    for encoding in ("json", "bytes"):
        rounded = load(f"remote@{url}", options={"remote": {"encoding": encoding}})
        assert torch.allclose(rounded(bytes_only, P), Mean()(bytes_only, P), atol=1e-6)
    assert torch.allclose(RemoteReward(url)(x.unsqueeze(1), P), Mean()(x, P))  # video


def test_composes_with_other_rewards(served, x):
    _, url = served
    assert torch.allclose((0.5 * RemoteReward(url) + Mean())(x, P), 1.5 * Mean()(x, P))


def test_unjudged_samples_keep_their_place_through_the_wire(served, x):
    _, url = served
    prompts = ["a", "skip", "b", "skip", "c"]
    with pytest.raises(Unjudged) as error:
        RemoteReward(url, batch=2)(x, prompts)
    assert sorted(error.value.reasons) == [1, 3] and error.value.reasons[3] == "no text"
    assert error.value.scores[[0, 2, 4]].isfinite().all() and error.value.scores[[1, 3]].isnan().all()


def test_health_and_card(served):
    _, url = served
    assert httpx.get(url + "/health").json() == {"status": "ok", "waiting": 0}
    card = httpx.get(url + "/card").json()
    assert card["name"] == "mean" and card["limits"]["samples"] == 8
    assert httpx.get(url + "/nothing").status_code == 404 and httpx.get(url + "/score").status_code == 405


def test_requests_that_wait_are_merged(x):
    reward = Mean()
    reward.gate.clear()
    with running(reward) as url:
        answers = {}

        def ask(i):
            answers[i] = post(url, encode_safetensors(x[i : i + 1], [P[i]]), SAFETENSORS).json()["scores"]

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
        threads[0].start()
        assert reward.entered.wait(20)  # the first is being scored; the other three pile up
        for t in threads[1:]:
            t.start()
        until(lambda: waiting(url) == 3)
        reward.gate.set()
        for t in threads:
            t.join()
    assert reward.sizes == [1, 3]
    want = Mean()(x, P)
    assert all(answers[i] == [want[i].item()] for i in range(4))


def test_one_bad_request_does_not_fail_its_neighbours(x):
    reward = Mean()
    reward.gate.clear()
    with running(reward) as url:
        codes = {}

        def ask(i, prompt):
            codes[i] = post(url, encode_safetensors(x[i : i + 1], [prompt]), SAFETENSORS).status_code

        threads = [threading.Thread(target=ask, args=(i, p)) for i, p in enumerate(["a", "ok", "refuse", "crash"])]
        threads[0].start()
        assert reward.entered.wait(20)
        for t in threads[1:]:
            t.start()
        until(lambda: waiting(url) == 3)
        reward.gate.set()
        for t in threads:
            t.join()
    assert codes == {0: 200, 1: 200, 2: 422, 3: 500}


def test_a_full_queue_answers_503_with_retry_after(x):
    reward = Mean()
    reward.gate.clear()
    with running(reward, limits=Limits(waiting=1)) as url:
        threads = [
            threading.Thread(target=post, args=(url, encode_safetensors(x[:1], ["a"]), SAFETENSORS)) for _ in range(2)
        ]
        threads[0].start()
        assert reward.entered.wait(20)
        threads[1].start()
        until(lambda: waiting(url) == 1)
        full = post(url, encode_safetensors(x[:1], ["a"]), SAFETENSORS)
        assert full.status_code == 503 and full.headers["retry-after"] == "1"
        reward.gate.set()
        for t in threads:
            t.join()


# ---- bad requests ---------------------------------------------------------------------------------------------------


def png(width, height, data=b""):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", data or zlib.compress(b"\0" * 10))
        + chunk(b"IEND", b"")
    )


def js(**changes):
    good = json.loads(encode_json(torch.zeros(1, 3, 4, 4), ["a"]))
    return json.dumps({**good, **changes}).encode()


def b64(data):
    return base64.b64encode(data).decode()


def tensors(media, prompts=("a",), meta=None, **extra):
    from safetensors.torch import save

    header = {"prompts": json.dumps(list(prompts)), "meta": json.dumps(meta)}
    return save({"media": media, **extra}, header)


ONE = torch.zeros(1, 3, 4, 4)
BAD = {
    "empty": (b"", JSON, 400),
    "not json": (b"{", JSON, 400),
    "a list": (b"[]", JSON, 400),
    "deep": (b"[" * 100_000, JSON, 400),
    "NaN": (b'{"images": NaN}', JSON, 400),
    "NaN in meta": (js().replace(b'"meta": null', b'"meta": [{"k": NaN}]'), JSON, 400),
    "not utf-8": (b'{"images": "\xff\xfe"}', JSON, 400),
    "no images": (js(images=[]), JSON, 400),
    "images of numbers": (js(images=[3]), JSON, 400),
    "not base64": (js(images=["***"]), JSON, 400),
    "not a picture": (js(images=[b64(b"GIF89a....")]), JSON, 400),
    "broken png": (js(images=[b64(png(4, 4))]), JSON, 400),
    "png bomb": (js(images=[b64(png(60_000, 60_000))]), JSON, 413),
    "png whose header alone is too large": (js(images=[b64(png(5000, 5000))]), JSON, 413),
    "png of a negative size": (js(images=[b64(png(0, 4))]), JSON, 400),
    "prompts missing": (js(prompts=None), JSON, 400),
    "prompts of numbers": (js(prompts=[1]), JSON, 400),
    "too many prompts": (js(prompts=["a", "b"]), JSON, 400),
    "long prompt": (js(prompts=["x" * 51]), JSON, 413),
    "meta of strings": (js(meta=["a"]), JSON, 400),
    "meta too long": (js(meta=[{}, {}]), JSON, 400),
    "many samples": (js(images=["x"] * 9), JSON, 413),
    "pickle": (pickle.dumps({"media": [1]}), "application/octet-stream", 415),
    "pickle as safetensors": (pickle.dumps({"media": [1]}), SAFETENSORS, 400),
    "no type": (b"x", "", 415),
    "safetensors without media": (tensors(ONE).replace(b"media", b"medium"[:5]), SAFETENSORS, 400),
    "header length beyond the body": (struct.pack("<Q", 2**40) + b"{}", SAFETENSORS, 400),
    "integers": (tensors(torch.zeros(1, 3, 4, 4, dtype=torch.int64)), SAFETENSORS, 400),
    "no dimension": (tensors(torch.tensor(1.0)), SAFETENSORS, 400),
    "empty tensor": (tensors(torch.zeros(0, 3, 4, 4), []), SAFETENSORS, 400),
    "too many samples": (tensors(torch.zeros(9, 3, 2, 2), ["a"] * 9), SAFETENSORS, 413),
    "too large a sample": (tensors(torch.zeros(1, 3, 65, 65)), SAFETENSORS, 413),
    "too large in all": (tensors(torch.zeros(8, 3, 48, 48, dtype=torch.uint8), ["a"] * 8), SAFETENSORS, 413),
    "stray tensor": (tensors(ONE, w=torch.zeros(1)), SAFETENSORS, 400),
    "meta tensor of no row": (tensors(ONE, meta=[{}], **{"meta.7.k": torch.zeros(1)}), SAFETENSORS, 400),
    "meta tensor of a silly row": (tensors(ONE, meta=[{}], **{"meta.²": torch.zeros(1)}), SAFETENSORS, 400),
    "out of range": (tensors(ONE + 3), SAFETENSORS, 422),
    "nan pixels": (tensors(ONE + torch.nan), SAFETENSORS, 422),
    "channels last": (tensors(torch.zeros(1, 4, 4, 3)), SAFETENSORS, 422),
    "audio to a judge of pictures": (tensors(torch.zeros(1, 1, 40)), SAFETENSORS, 422),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_answered_and_leave_the_server_up(served, name):
    body, kind, status = BAD[name]
    answer = post(served[1], body, kind)
    assert answer.status_code == status, (answer.status_code, answer.text)
    assert set(answer.json()) == {"error"} and "Traceback" not in answer.text and ".py" not in answer.text
    assert alive(served)


def test_bodies_beyond_the_limit_are_cut_off_with_or_without_a_length(served):
    _, url = served
    assert post(url, b"x" * 200_001).status_code == 413

    def endless():
        for _ in range(400):
            yield b"x" * 1000

    assert httpx.post(url + "/score", content=endless(), headers={"content-type": JSON}).status_code == 413
    assert alive(served)


def test_raw_sockets_cannot_take_it_down(served):
    _, url = served
    host, port = "127.0.0.1", int(url.rsplit(":", 1)[1])
    head = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: "
    for raw in (
        b"\x00\xff" * 100,
        head + b"-5\r\n\r\n",
        head + b"9" * 20 + b"\r\n\r\n",
        head + b"100\r\nContent-Type: application/json\r\n\r\n{",  # and hangs up
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
    ):
        with socket.create_connection((host, port), timeout=5) as s:
            s.sendall(raw)
            s.settimeout(0.2)
            with suppress(TimeoutError, ConnectionResetError):
                s.recv(1000)
    assert alive(served)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fuzz(served, data):
    """Random bytes, and good requests with random damage: always an answer, never 500, never anything of the server."""
    good = [
        encode_json(torch.zeros(1, 3, 4, 4), ["ab"]),
        encode_safetensors(torch.zeros(1, 3, 4, 4), ["ab"], [{"k": 1}]),
    ]
    body = bytearray(data.draw(st.one_of(st.binary(max_size=300), st.sampled_from(good))))
    for _ in range(data.draw(st.integers(0, 4))):
        if body:
            i = data.draw(st.integers(0, len(body) - 1))
            body[i : i + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    kind = data.draw(st.sampled_from([JSON, SAFETENSORS]))
    answer = post(served[1], bytes(body), kind)
    assert answer.status_code in (200, 400, 413, 422), (answer.status_code, answer.text)
    assert set(answer.json()) <= {"error", "scores", "unjudged"} and "flowalign" not in answer.text


def test_errors_inside_tell_nothing(served, caplog):
    _, url = served
    answer = post(url, encode_safetensors(ONE, ["crash"]), SAFETENSORS)
    assert answer.status_code == 500 and "passwd" not in answer.text and "RuntimeError" not in answer.text
    assert "server" not in {k.lower() for k in answer.headers}
    refused = post(url, encode_safetensors(ONE, ["refuse"]), SAFETENSORS)
    assert refused.status_code == 422 and refused.json()["error"] == "sample 0 is refused"
    assert alive(served)


def test_the_source_never_unpickles():
    folder = Path(__file__).parents[2] / "rewards"
    for name in ("wire", "serve", "remote", "worker"):
        text = (folder / f"{name}.py").read_text()
        assert "import pickle" not in text and "torch.load" not in text and "eval(" not in text


def test_token():
    with running(Mean(), token="s3cret") as url:
        assert httpx.get(url + "/health").status_code == 200
        assert httpx.get(url + "/card").status_code == 401
        assert post(url, encode_safetensors(ONE, ["a"]), SAFETENSORS, authorization="Bearer wrong").status_code == 401
        assert post(url, encode_safetensors(ONE, ["a"]), SAFETENSORS, authorization="Bearer s3cret").status_code == 200
        with pytest.raises(ValueError, match="401: wrong or missing token"):
            RemoteReward(url)
        assert RemoteReward(url, token="s3cret")(ONE, ["a"]).item() == 1
    with pytest.raises(ValueError, match="give a token"):
        serve(Mean(), host="0.0.0.0")


def test_the_command_serves_a_named_reward(monkeypatch):
    """``flowalign serve smoothness``: the whole way but uvicorn's own loop."""
    seen = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: seen.update(options, app=app))
    main(["smoothness", "--port", "8123", "--device", "cpu", "--samples", "3"])
    assert seen["port"] == 8123 and seen["host"] == "127.0.0.1"
    from starlette.testclient import TestClient

    with TestClient(seen["app"]) as client:
        assert client.get("/card").json()["limits"]["samples"] == 3
        answer = client.post("/score", content=encode_safetensors(ONE, ["a"]), headers={"content-type": SAFETENSORS})
        assert answer.json() == {"scores": [0.0], "unjudged": {}}
    monkeypatch.delenv("FLOWALIGN_TOKEN", raising=False)
    with pytest.raises(ValueError, match="give a token"):
        main(["smoothness", "--host", "0.0.0.0", "--device", "cpu"])
    with pytest.raises(ValueError, match="Nearest"):
        main(["smothness", "--device", "cpu"])


def test_wire_round_trip_is_exact():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 3, 4, 4, generator=g)
    meta = [{"a": 1, "t": torch.arange(3)}, {"b": [1, {"c": None}]}]
    back = decode(encode_safetensors(x, ["p", "q"], meta), SAFETENSORS + "; charset=x", Limits())
    assert torch.equal(back.media, x) and back.prompts == ["p", "q"]
    assert torch.equal(back.meta[0].pop("t"), torch.arange(3)) and back.meta == [{"a": 1}, {"b": [1, {"c": None}]}]
    image = (torch.rand(1, 3, 5, 7, generator=g) * 255).round() / 255
    assert torch.allclose(decode(encode_json(image, ["p"]), JSON, Limits()).media, image, atol=1e-7)
    for bad in ([{"x": float("nan")}], [{"x": object()}]):
        with pytest.raises((ValueError, TypeError)):
            encode_safetensors(ONE, ["p"], bad)


# ---- down and up ----------------------------------------------------------------------------------------------------


def test_a_server_that_goes_away_for_a_moment_is_waited_for(x):
    port = free_port()
    with running(Mean(), port) as url:
        remote = RemoteReward(url, patience=replace(QUICK, grace=60))
        assert torch.equal(remote(x, P), Mean()(x, P))
    result = {}
    thread = threading.Thread(target=lambda: result.update(scores=remote(x, P)))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    with running(Mean(), port):
        thread.join(10)
        assert torch.equal(result["scores"], Mean()(x, P))


def test_a_server_that_stays_down_ends_in_a_clear_error(x):
    """Within the run this is a pause (test_in_training.py); the command line prints it, with no trace."""
    patience = Patience(timeout=1, grace=0.05, first=0.02, longest=0.05)
    port = free_port()
    with pytest.raises(RewardDown, match=rf"127.0.0.1:{port} is down .*Start it again: flowalign serve"):
        RemoteReward(f"http://127.0.0.1:{port}", patience=patience)
    with running(Mean(), port) as url:
        remote = RemoteReward(url, patience=patience)
    with pytest.raises(RewardDown) as error:
        (0.5 * remote + Mean())(x, P)
    assert isinstance(error.value, Away)


def test_what_passes_is_retried_and_what_is_wrong_is_not(x, monkeypatch):
    with running(Mean()) as url:
        remote = RemoteReward(url, patience=QUICK)
        real, answers = remote.client.request, [httpx.ConnectTimeout("slow"), httpx.Response(503), httpx.Response(429)]
        calls = []

        def flaky(*args, **kwargs):
            calls.append(args)
            if answers:
                answer = answers.pop(0)
                if isinstance(answer, Exception):
                    raise answer
                return answer
            return real(*args, **kwargs)

        monkeypatch.setattr(remote.client, "request", flaky)
        assert torch.equal(remote(x[:2], P[:2]), Mean()(x[:2], P[:2])) and len(calls) == 4
        calls.clear()
        with pytest.raises(ValueError, match="422: sample 0 is refused"):
            remote(x[:1], ["refuse"])
        with pytest.raises(ValueError, match="500: internal error 1"):
            remote(x[:1], ["crash"])
        assert len(calls) == 2
        for answer in (httpx.Response(200, text="<html>"), httpx.Response(200, json={"scores": [1.0, 2.0]})):
            answers.append(answer)
            with pytest.raises(ValueError):
                remote(x[:1], ["a"])


@pytest.mark.parametrize(
    "bad", [dict(weights=None), dict(weights="judge:80"), dict(weights="http://x", encoding="pickle")]
)
def test_bad_client_settings(bad):
    with pytest.raises(ValueError):
        RemoteReward(**bad)


# ---- asynchronous ---------------------------------------------------------------------------------------------------


class Slow(Mean):
    def score(self, media, prompts, meta):
        time.sleep(0.15)
        return super().score(media, prompts, meta)


def test_scoring_overlaps_the_next_rollout(x):
    def rollout():
        time.sleep(0.15)
        return x

    start = time.perf_counter()
    want = [Slow()(rollout(), P) for _ in range(4)]
    apart = time.perf_counter() - start
    start = time.perf_counter()
    with Asynchronous(Slow()) as judge:
        futures = [judge.submit(rollout(), P) for _ in range(4)]
        got = [f.result() for f in futures]
    together = time.perf_counter() - start
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert together < 0.85 * apart  # 5 × .15 s instead of 8 × .15 s


def test_back_pressure_and_errors(x):
    reward = Mean()
    reward.gate.clear()
    judge = Asynchronous(reward, pending=2)
    futures = [judge.submit(x, P), judge.submit(x, P)]
    third = threading.Thread(target=lambda: futures.append(judge.submit(x, P)))
    third.start()
    third.join(0.2)
    assert third.is_alive() and len(futures) == 2  # the third waits for room
    reward.gate.set()
    third.join(5)
    assert all(torch.equal(f.result(), Mean()(x, P)) for f in futures) and len(futures) == 3
    failing, fine = judge.submit(x[:1], ["refuse"]), judge.submit(x[:1], ["a"])
    with pytest.raises(ValueError, match="sample 0 is refused"):
        failing.result()
    assert fine.result().shape == (1,)
    judge.close()
    with pytest.raises(RuntimeError):
        judge.submit(x, P)
    with pytest.raises(ValueError, match="at least 1"):
        Asynchronous(reward, pending=0)
