import json
import subprocess
import sys

import pytest
import torch

from flowalign.pipelines.worlds import edit, tones, video
from flowalign.rewards.audio_signal import SISDR, LogSpectralDistance

torch.set_num_threads(1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def drawn():
    return tones.draw(generator(1), 300)


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    pipe = tones.build()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_tones_are_what_the_words_say(drawn):
    again = tones.draw(generator(1), 300)
    assert torch.equal(again.clean, drawn.clean)
    assert torch.equal(again.noisy, drawn.noisy)
    assert drawn.clean.shape == (300, 1, 2048)
    assert drawn.noisy.abs().max() <= 1
    level = drawn.clean.square().mean((1, 2)).sqrt()
    assert ((level > 0.149) & (level < 0.251)).all()
    # the spectrum: a fundamental inside the pitch's bounds, harmonics up to the number named, nothing above
    power = torch.fft.rfft(drawn.clean[:, 0] * torch.hann_window(2048)).abs().square()
    hz = torch.fft.rfftfreq(2048, 1 / tones.RATE)
    pitch, number = drawn.kind // 3, drawn.kind % 3 + 2
    for i in range(100):
        low, high = tones.BOUNDS[pitch[i]], tones.BOUNDS[pitch[i] + 1]
        inside = (hz > low - 6) & (hz < high + 6)
        f = float(hz[inside][power[i][inside].argmax()])
        near = (hz[:, None] - f * torch.arange(1, int(number[i]) + 1)).abs().amin(1) < 2 + 8 * int(number[i])
        assert power[i][near].sum() / power[i].sum() > 0.95


def test_the_noise_has_the_stated_level(drawn):
    judge = SISDR()
    score = judge(drawn.noisy, drawn.prompts, drawn.meta())
    assert score.min() > -0.5
    assert score.max() < 10.8
    assert float(score.mean()) == pytest.approx(5, abs=0.7)
    assert judge(drawn.clean, drawn.prompts, drawn.meta()).min() > 60


def test_the_two_judges_have_different_blind_spots(drawn):
    distance = LogSpectralDistance()
    quiet = 0.5 * drawn.clean
    assert SISDR()(quiet, drawn.prompts, drawn.meta()).min() > 60
    assert distance(quiet, drawn.prompts, drawn.meta()).max() < -1  # 6 dB in the bins above the floor
    assert distance(drawn.clean, drawn.prompts, drawn.meta()).min() > -1e-4
    flipped = -drawn.clean
    assert distance(flipped, drawn.prompts, drawn.meta()).min() > -1e-4
    late = drawn.clean.roll(5, -1)
    assert (SISDR()(late, drawn.prompts, drawn.meta()) < 20).all()


def test_the_autoencoder_is_exact(drawn, pipe):
    with torch.no_grad():
        z = pipe.vae.encode(drawn.clean[:8]).latents
        assert z.shape == (8, 32, 64)
        torch.testing.assert_close(z, tones.latents(drawn.clean[:8]), atol=1e-6, rtol=0)
        torch.testing.assert_close(pipe.vae.decode(z).sample, drawn.clean[:8], atol=1e-6, rtol=0)


def test_training_sees_what_the_pipeline_computes(drawn, pipe, monkeypatch):
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(lambda m, a, k: seen.append((a, k)), with_kwargs=True)
    two = tones.ToneBatch(drawn.clean[:2], drawn.noisy[:2], drawn.kind[:2])
    monkeypatch.setattr(tones, "BATCH", 2)
    monkeypatch.setattr(tones, "draw", lambda g, n: two)
    with torch.no_grad():
        tones.flow_loss(pipe, generator())
        audio = tones.sample(pipe, two, steps=2)
    hook.remove()
    for key in ("encoder_hidden_states", "global_hidden_states", "encoder_attention_mask", "local_add_cond"):
        torch.testing.assert_close(seen[0][1][key], seen[1][1][key])
    assert float(seen[1][0][1].max()) == 1.0  # the pipeline's times are noise levels, as in training
    assert audio.shape == (2, 1, 2048)


LOAD = """
import json, sys, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
out = {}
for name, call in json.loads(sys.argv[2]).items():
    pipe = DiffusionPipeline.from_pretrained(f"{sys.argv[1]}/{name}")
    pipe.set_progress_bar_config(disable=True)
    for k, shape in call.pop("tensors", {}).items():
        call[k] = torch.zeros(shape)
    got = pipe(num_inference_steps=1, **call)[0]
    out[name] = [type(pipe).__name__, list(torch.as_tensor(got).shape)]
assert not any(m.startswith("flowalign") for m in sys.modules)
print(json.dumps(out))
"""


def test_the_worlds_load_in_plain_diffusers(tmp_path, pipe):
    """Saved, then loaded and run by a process that has never heard of flowalign."""
    for name, p in (("tones", pipe), ("shapes-video", video.build()), ("shapes-edit", edit.build())):
        p.save_pretrained(tmp_path / name, safe_serialization=True)
    calls = {
        "tones": {
            "prompt": "a low tone with two harmonics", "duration": 0.512, "mask_start_seconds": 0,
            "mask_end_seconds": 0, "tensors": {"audio": [1, 1, 2048]},
        },
        "shapes-video": {
            "prompt": "a red circle falling", "height": 16, "width": 16, "num_frames": 8, "guidance_scale": 1.0,
            "max_sequence_length": 8, "output_type": "pt", "tensors": {"image": [1, 3, 16, 16]},
        },
        "shapes-edit": {
            "prompt": "move the red circle left", "height": 32, "width": 32, "max_sequence_length": 8,
            "output_type": "pt", "tensors": {"control_image": [1, 3, 32, 32]},
        },
    }  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD, str(tmp_path), json.dumps(calls)],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout.splitlines()[-1]) == {
        "tones": ["StableAudio3InpaintPipeline", [1, 1, 2048]],
        "shapes-video": ["WanImageToVideoPipeline", [1, 9, 3, 16, 16]],
        "shapes-edit": ["FluxControlPipeline", [1, 3, 32, 32]],
    }
    assert not list(tmp_path.rglob("*.bin")) + list(tmp_path.rglob("*.pt")) + list(tmp_path.rglob("*.py"))
