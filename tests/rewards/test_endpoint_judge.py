"""The judge behind an endpoint: a local server that answers well, badly, late or not at all."""

import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

from flowalign.protocols import Reward
from flowalign.rewards.judge import EndpointDown, OpenAIJudge, Retry, Unjudged

IMPATIENT = Retry(timeout=0.5, attempts=3, pause=0.01, longest=0.05)


class Server:
    """An OpenAI-compatible endpoint that scores 1 + 4 times the first picture's mean red, or as ``script`` says."""

    def __init__(self):
        self.trickle = 0.0  # seconds before each byte
        self.script = None  # (body, n-th request) -> (status, bytes or text of the answer, headers)
        self.seen, self.lock, self.under_way, self.most = [], threading.Lock(), 0, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                with outer.lock:
                    outer.under_way += 1
                    outer.most = max(outer.most, outer.under_way)
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.seen.append((self.path, body, dict(self.headers)))
                    n = len(outer.seen)
                status, answer, headers = (outer.script or outer.red)(body, n)
                with outer.lock:
                    outer.under_way -= 1
                if isinstance(answer, str):
                    answer = json.dumps({"choices": [{"message": {"role": "assistant", "content": answer}}]}).encode()
                try:
                    self.send_response(status)
                    for key, value in {"Content-Length": len(answer), **headers}.items():
                        self.send_header(key, str(value))
                    self.end_headers()
                    for piece in [answer[i : i + 1] for i in range(len(answer))] if outer.trickle else [answer]:
                        time.sleep(outer.trickle)
                        self.wfile.write(piece)
                except (BrokenPipeError, ConnectionResetError):
                    return  # the client has given up, as some tests want it to

            def log_message(self, *args):
                return

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @staticmethod
    def images(body):
        urls = [c["image_url"]["url"] for c in body["messages"][0]["content"] if c["type"] == "image_url"]
        return [Image.open(io.BytesIO(base64.b64decode(u.split(",")[1]))) for u in urls]

    @staticmethod
    def text(body):
        return body["messages"][0]["content"][-1]["text"]

    def red(self, body, n):
        image = self.images(body)[0]
        red = sum(image.getchannel("R").tobytes()) / (255 * image.width * image.height)
        return 200, f"I see red.\nFinal Score: {1 + 4 * red:.6f}", {}


@pytest.fixture
def server():
    s = Server()
    yield s
    s.http.shutdown()
    s.http.server_close()


def judge(server, **options):
    return OpenAIJudge("tiny", url=server.url, **{"retry": IMPATIENT, **options})


def pictures(n=5):
    return torch.rand(n, 3, 6, 9, generator=torch.Generator().manual_seed(0)).mul(255).round().div(255)


PROMPTS = [f"prompt number {i}" for i in range(5)]


def test_scores_pictures_and_prompts_arrive_in_pairs(server):
    x, reward = pictures(), judge(server)
    assert isinstance(reward, Reward) and not reward.card.differentiable
    scores = reward(x, PROMPTS)
    assert torch.allclose(scores, 1 + 4 * x[:, 0].mean((1, 2)), atol=1e-4)  # the PNG holds the very pixels
    order = [3, 1, 4, 0, 2]
    assert torch.equal(reward(x[order], [PROMPTS[i] for i in order]), scores[order])
    for path, body, _ in server.seen:
        assert path == "/v1/chat/completions" and body["model"] == "tiny" and body["temperature"] == 0
        (image,) = server.images(body)
        words = next(p for p in PROMPTS if p in server.text(body))
        sent = x[PROMPTS.index(words)]
        assert image.size == (9, 6) and image.getpixel((2, 1)) == tuple((sent[:, 1, 2] * 255).round().int().tolist())
        assert "from 1 (bad) to 5" in server.text(body)
    slow = lambda body, n: (time.sleep(0.02 * (n % 3)), server.red(body, n))[1]  # noqa: E731
    server.script = slow  # answers out of order must not be shuffled
    assert torch.equal(reward(x, PROMPTS), scores)


def test_a_video_is_sent_as_frames(server):
    video = pictures(10)[None]
    judge(server, frames=3)(video, ["a"])
    sent = server.images(server.seen[0][1])
    assert len(sent) == 3
    for image, frame in zip(sent, video[0, [0, 4, 9]], strict=True):
        assert image.getpixel((0, 0)) == tuple((frame[:, 0, 0] * 255).round().int().tolist())
    judge(server, frames=30)(video, ["a"])
    assert len(server.images(server.seen[1][1])) == 10


def completion(content):
    return json.dumps({"choices": [{"message": {"content": content}}]}).encode()


BAD = {
    "no number": "It is lovely.",
    "a word": "Final Score: high",
    "empty": "",
    "above the scale": "Final Score: 6",
    "below the scale": "Final Score: 0",
    "not a number": "Final Score: nan",
    "no text": completion(None),
    "a list": completion([1]),
    "no choices": b'{"choices": []}',
    "no JSON": b"<html>oops</html>",
    "JSON of another kind": b"[1, 2]",
    "not UTF-8": b"\xff\xfe\x00",
    "no bytes": b"",
    "too long": b" " * 5000,
}


@pytest.mark.parametrize("kind", BAD)
def test_an_answer_without_a_score_is_unjudged_and_never_zero(server, kind):
    x, broken = pictures(), PROMPTS[2]
    server.script = lambda body, n: (200, BAD[kind], {}) if broken in server.text(body) else server.red(body, n)
    with pytest.raises(Unjudged, match="1 of 5 samples; sample 2") as caught:
        judge(server, reply=3000)(x, PROMPTS)
    scores = caught.value.scores
    assert list(caught.value.reasons) == [2] and scores[2].isnan()
    good = [0, 1, 3, 4]
    assert torch.allclose(scores[good], 1 + 4 * x[good, 0].mean((1, 2)), atol=1e-4)
    assert len(server.seen) == 5  # asking the same again at temperature 0 would change nothing


def test_the_last_score_counts_and_markdown_is_read(server):
    answers = {
        "Final Score: 2 at first sight. On reflection\nFinal Score: 4.5": 4.5,
        "**Final Score:** 3": 3.0,
        "Final Score:   **1.25**": 1.25,
    }
    for text, want in answers.items():
        server.script = lambda body, n, text=text: (200, text, {})
        assert judge(server)(pictures(1), ["a"]).item() == want
    ten = judge(server, pattern=r"(\d+)/10", scale=(0, 10))
    server.script = lambda body, n: (200, "I give it 7/10.", {})
    assert ten(pictures(1), ["a"]).item() == 7 and ten.card.range == (0, 10)
    assert "from 0 (bad) to 10" in server.text(server.seen[-1][1])


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_passing_faults_are_tried_again(server, status):
    server.script = lambda body, n: (status, b"busy", {"Retry-After": "1"}) if n <= 2 else server.red(body, n)
    began = time.monotonic()
    scores = judge(server)(pictures(1), ["a"])
    assert scores.isfinite().all() and len(server.seen) == 3
    assert time.monotonic() - began < 1.5  # Retry-After is obeyed up to the longest pause only


def test_an_endpoint_that_stays_down_stops_the_run_and_later_serves_again(server):
    server.script = lambda body, n: (500, b"out of memory", {})
    reward = judge(server)
    with pytest.raises(EndpointDown, match=r"3 attempts.*500 out of memory"):
        reward(pictures(1), ["a"])
    assert len(server.seen) == 3
    server.script = None
    assert reward(pictures(1), ["a"]).isfinite().all()


def test_timeouts_and_refused_connections(server):
    hold = threading.Event()
    server.script = lambda body, n: (hold.wait(5) and None) or server.red(body, n)
    impatient = Retry(timeout=0.1, attempts=2, pause=0.0)
    began = time.monotonic()
    with pytest.raises(EndpointDown, match=r"2 attempts of up to 0.1 s.*Timeout"):
        judge(server, retry=impatient)(pictures(1), ["a"])
    assert time.monotonic() - began < 2
    hold.set()
    server.script = lambda body, n: (200, b" " * 40, {})
    server.trickle = 0.05  # a byte now and then keeps every single read within its timeout
    began = time.monotonic()
    with pytest.raises(EndpointDown, match="Timeout"):
        judge(server, retry=Retry(timeout=0.2, attempts=1))(pictures(1), ["a"])
    assert time.monotonic() - began < 1.0
    with pytest.raises(EndpointDown, match="Connect"):
        OpenAIJudge("tiny", url="http://127.0.0.1:9/v1", retry=impatient)(pictures(1), ["a"])


def test_a_wrong_request_fails_at_once_with_the_servers_words(server):
    server.script = lambda body, n: (404, b'{"error": "no such model"}', {})
    with pytest.raises(ValueError, match=r"404.*no such model"):
        judge(server)(pictures(1), ["a"])
    assert len(server.seen) == 1


def test_the_key_is_sent_and_never_shown(server, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret-123")
    reward = judge(server, key="SOME_KEY")
    reward(pictures(1), ["a"])
    assert server.seen[0][2]["Authorization"] == "Bearer secret-123"
    server.script = lambda body, n: (500, b"bad", {})
    with pytest.raises(EndpointDown) as caught:
        reward(pictures(1), ["a"])
    assert "secret" not in str(caught.value) and "secret" not in repr(reward)
    monkeypatch.delenv("SOME_KEY")
    server.script = None
    reward(pictures(1), ["a"])
    assert "Authorization" not in server.seen[-1][2]


def test_concurrency_is_bounded(server):
    server.script = lambda body, n: (time.sleep(0.03), server.red(body, n))[1]
    judge(server, concurrency=2)(pictures(), PROMPTS)
    assert server.most == 2


def test_refusals():
    for options, match in [
        ({"url": "ftp://x/v1"}, "url must be"), ({"url": "127.0.0.1:80"}, "url must be"),
        ({"question": "How good?"}, "must contain"), ({"pattern": r"\d"}, "one group"),
        ({"scale": (5, 1)}, "must rise"), ({"concurrency": 0}, "concurrency"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=match):
            OpenAIJudge("tiny", **options)
    with pytest.raises(ValueError, match="attempts"):
        Retry(attempts=0)
