"""The shipped conditional worlds: run by plain diffusers in a process without flowalign, and good, as their cards say.

Every bound lies well under the card's figure, so that few samples will do.
"""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline

from flowalign.pipelines.worlds import edit, motions, path, scenes, superres, tones, video
from flowalign.pipelines.worlds.splits import prompts
from flowalign.rewards.audio_signal import SISDR
from flowalign.rewards.shapes import verdicts
from flowalign.rewards.shapes_edit import ShapesEdit
from flowalign.rewards.shapes_video import ShapesVideo

torch.set_num_threads(1)

PLAIN = """
import json, sys, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
call = json.loads(sys.argv[2])
for k, shape in call.pop("tensors", {}).items():
    call[k] = torch.zeros(shape)
media = pipe(num_inference_steps=1, **call)[0]
assert list(media.shape) == json.loads(sys.argv[3]), media.shape
assert all(p.dtype == torch.float32 for m in pipe.components.values() if isinstance(m, torch.nn.Module)
           for p in m.parameters())
assert not any(m.split(".")[0] == "flowalign" for m in sys.modules)
"""
CALLS = {
    "shapes-sr": (
        {
            "prompt": "a red circle left of a green square", "height": 32, "width": 32, "max_sequence_length": 10,
            "output_type": "pt", "tensors": {"control_image": [1, 3, 32, 32]},
        },
        [1, 3, 32, 32],
    ),
    "shapes-edit": (
        {
            "prompt": "move the red circle left", "height": 32, "width": 32, "max_sequence_length": 8,
            "output_type": "pt", "tensors": {"control_image": [1, 3, 32, 32]},
        },
        [1, 3, 32, 32],
    ),
    "shapes-video": (
        {
            "prompt": "a red circle falling", "height": 16, "width": 16, "num_frames": 8, "guidance_scale": 1.0,
            "max_sequence_length": 8, "output_type": "pt", "tensors": {"image": [1, 3, 16, 16]},
        },
        [1, 9, 3, 16, 16],
    ),
    "tones": (
        {
            "prompt": "a low tone with two harmonics", "duration": 0.512, "mask_start_seconds": 0,
            "mask_end_seconds": 0, "tensors": {"audio": [1, 1, 2048]},
        },
        [1, 1, 2048],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_plain_diffusers_loads_and_runs_it(name, tmp_path):
    call, shape = CALLS[name]
    done = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", PLAIN, str(path(name)), json.dumps(call), json.dumps(shape)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def load(name):
    pipe = DiffusionPipeline.from_pretrained(path(name))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def decibels(images, truth):
    return -10 * (images.clamp(0, 1) - truth).square().mean((1, 2, 3)).log10()


def test_super_resolution_draws_the_shapes_that_the_words_name():
    text = prompts("report", "count")[:24] + prompts("report", "relation")[:24]
    batch = superres.draw(torch.Generator().manual_seed(5), len(text), tuple(map(scenes.parse, text)))
    images = superres.sample(load("shapes-sr"), batch)
    strict, blurred = (verdicts(x, batch.prompts)["strict"] for x in (images, superres.enlarge(batch.low)))
    assert strict[:24].mean() >= 0.8
    assert strict[24:].mean() >= 0.35
    assert blurred.mean() <= 0.2
    assert (decibels(images, batch.high) - decibels(superres.enlarge(batch.low), batch.high)).mean() >= 5


def test_tones_come_out_of_the_noise():
    batch = tones.draw(torch.Generator().manual_seed(5), 24)
    audio = tones.sample(load("tones"), batch)
    before, after = (SISDR()(x, batch.prompts, batch.meta()) for x in (batch.noisy, audio))
    assert float((after - before).mean()) >= 6.5  # decibels; the card: 8.6


def test_edits_do_as_told_and_leave_the_rest():
    batch = edit.draw(torch.Generator().manual_seed(5), 60, "report", turns=0.3)
    images = edit.sample(load("shapes-edit"), batch)
    judge = ShapesEdit("strict")
    assert judge(images, batch.prompts, batch.meta()).mean() >= 0.6  # card: .99 of moves, .73 of turns, .82 of sizes
    assert judge(batch.source, batch.prompts, batch.meta()).mean() == 0  # leaving all as it was is no edit
    assert judge.findings(batch.source, images, batch.prompts).others.float().mean() >= 0.8


def test_videos_move_as_told():
    batch = motions.draw(torch.Generator().manual_seed(5), 60, "report")
    media = video.sample(load("shapes-video"), batch.prompts, batch.video[:, 0])
    still = batch.video[:, :1].expand_as(batch.video)
    judge = ShapesVideo("strict")
    assert judge(media, batch.prompts, batch.meta()).mean() >= 0.5  # card: from .56 (paths) to .94 (falls)
    assert judge(still, batch.prompts, batch.meta()).mean() == 0
    assert (media[:, 0] - batch.video[:, 0]).abs().mean() <= 0.03  # the first frame is the given one
