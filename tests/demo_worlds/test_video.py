import math

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from flowalign.loading import load
from flowalign.methods.best_of_n import BestOfN
from flowalign.pipelines.worlds import motions, video
from flowalign.pipelines.worlds.canvas import BACKGROUND
from flowalign.rewards.dynamics_training import accuracy, still
from flowalign.rewards.idm import WEIGHTS, ActionAgreement, InverseDynamics
from flowalign.rewards.shapes_video import CATEGORIES, ShapesVideo, parse
from flowalign.source import Prompt
from flowalign.steer import steer

torch.set_num_threads(1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def drawn():
    return motions.draw(generator(1), 300)


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    pipe = video.build()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_drawing_is_seeded_and_stays_in_the_picture(drawn):
    assert torch.equal(motions.draw(generator(1), 300).video, drawn.video)
    assert drawn.video.shape == (300, 9, 3, 16, 16)
    assert drawn.track.min() > 2
    assert drawn.track.max() < 14
    group = motions.GROUP[drawn.motion]
    assert torch.bincount(group, minlength=5).min() > 35  # every category equally often


def test_paths_are_drawn_as_often_as_asked():
    """With weight 4 beside four categories of weight 1 each they are one in two; within four standard errors."""
    group = motions.GROUP[motions.draw(generator(2), 400, paths=4.0).motion]
    assert abs((group == 1).float().mean().item() - 0.5) < 4 * 0.5 / 400**0.5


def test_tracks_obey_the_formulas(drawn):
    step = drawn.track.diff(dim=1)
    bend = step.diff(dim=1)
    group = motions.GROUP[drawn.motion]
    down = torch.tensor([0.0, motions.GRAVITY])
    for k in (2, 3):  # falls and throws
        torch.testing.assert_close(bend[group == k], down.expand_as(bend[group == k]), atol=1e-4, rtol=0)
    assert step[group == 2][:, 0].abs().max() < 0.12  # from rest: g / 2 in the first step
    slides = bend[group == 4]
    assert (slides.norm(dim=-1) - motions.SLIDE).abs().max() < 1e-3
    side = torch.where(drawn.motion[group == 4] == 19, -1.0, 1.0)
    angle = torch.atan2(slides[..., 1], slides[..., 0] * side[:, None]) * 180 / math.pi
    assert (angle - 40).abs().max() < 0.2
    thrown = step[group == 3][:, 0, 0]
    assert (thrown.sign() == torch.where(drawn.motion[group == 3] == 17, -1.0, 1.0)).all()
    actions = drawn.actions()
    unit = torch.tensor(motions.STEP)[actions.clamp_min(0)]
    along = (step * unit).sum(-1)[group < 2]
    assert ((along > 0.69) & (along < 1.11)).all()
    assert (actions[group >= 2] == -1).all()
    assert (actions[:, :4] == actions[:, :1]).all()


def test_words_and_splits():
    parts = {s: set(motions.compositions(s)) for s in ("base", "train", "select", "report", "withheld")}
    assert not parts["base"] & parts["withheld"]
    assert parts["train"] | parts["select"] | parts["report"] == parts["base"]
    assert len(parts["base"]) + len(parts["withheld"]) == 21 * 6 * 3
    everything = parts["base"] | parts["withheld"]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert {(x[i], x[j]) for x in parts["train"]} == {(x[i], x[j]) for x in everything}
    for x in everything:
        colour, shape, category, _ = parse(motions.caption(*x))
        assert (colour, shape) == x[1:]
        assert CATEGORIES[int(motions.GROUP[x[0]])] == category
    for words in ("a red circle", "a red bar falling", "a pink circle falling", "a red circle moving up then up", ""):
        with pytest.raises(ValueError, match="not a caption"):
            parse(words)


def strict(media, prompts):
    return float(ShapesVideo()(media, prompts).mean())


def test_the_judge_is_exact_on_drawn_videos(drawn):
    assert strict(drawn.video, drawn.prompts) >= 0.99
    seen = ShapesVideo().findings(drawn.video, drawn.prompts)
    assert (seen.track - drawn.track).abs().mean() < 0.1  # triangles' centroids and ramps' shadows included
    noisy = (drawn.video + 0.05 * torch.randn(drawn.video.shape, generator=generator())).clamp(0, 1)
    assert strict(noisy, drawn.prompts) >= 0.97


def test_the_judge_refuses_wrong_motion_and_broken_laws(drawn):
    names = drawn.names.clone()
    names[:, 0] = (names[:, 0] + torch.randint(1, 21, (300,), generator=generator())) % 21
    assert strict(drawn.video, [motions.caption(*x) for x in names.tolist()]) == 0
    shaped = drawn.names.clone()
    shaped[:, 2] = (shaped[:, 2] + 1) % 3
    assert strict(drawn.video, [motions.caption(*x) for x in shaped.tolist()]) < 0.02
    assert strict(drawn.video[:, [0, 2, 1, 4, 3, 6, 5, 8, 7]], drawn.prompts) == 0  # trembling
    assert strict(drawn.video[:, :1].expand(-1, 9, -1, -1, -1), drawn.prompts) == 0  # standing still
    backwards = ShapesVideo()(drawn.video.flip(1), drawn.prompts)
    assert backwards[motions.GROUP[drawn.motion] != 1].max() == 0  # falls rise; "up then down" is itself again
    lost = drawn.video.clone()
    lost[:, 5] = BACKGROUND
    assert strict(lost, drawn.prompts) == 0
    falls = (motions.GROUP[drawn.motion] == 2).nonzero()[:, 0]
    slow = drawn.video[falls][:, [0, 0, 1, 1, 2, 2, 3, 3, 4]]
    assert strict(slow, [drawn.prompts[i] for i in falls.tolist()]) == 0  # a quarter of the gravity


def test_graded_parts_fall_with_the_faults(drawn):
    prompts = drawn.prompts
    whole = ShapesVideo("graded")(drawn.video, prompts)
    assert whole.mean() > 0.995
    frozen = drawn.video[:, :1].expand(-1, 9, -1, -1, -1)
    assert ShapesVideo("smooth")(frozen, prompts).min() == 1  # a still video is smooth ...
    assert ShapesVideo("law")(frozen, prompts).max() < 0.9  # ... and against every law
    assert (ShapesVideo("graded")(frozen, prompts) < whole).all()
    with pytest.raises(ValueError, match="measure must be"):
        ShapesVideo("hard")
    with pytest.raises(ValueError, match="at least 5 frames"):
        ShapesVideo()(drawn.video[:1, :4], prompts[:1])


def test_the_shipped_inverse_dynamics_reads_the_actions(drawn):
    model = InverseDynamics.load(WEIGHTS)
    told = motions.GROUP[drawn.motion] < 2
    media, actions = drawn.video[told], drawn.actions()[told]
    assert accuracy(model, media, actions) > 0.99
    held, kept = still(media, actions, generator(), 4)
    assert (kept == 4).float().mean() == pytest.approx(0.2, abs=0.03)
    assert accuracy(model, held, kept) > 0.99
    meta = [{"actions": a} for a in actions]
    words = [p for p, t in zip(drawn.prompts, told.tolist(), strict=True) if t]
    assert ActionAgreement()(media, words, meta).mean() > 0.99
    mirrored = ActionAgreement()(media.flip(-1), words, meta)
    sideways = (actions < 2).float().mean(1)
    torch.testing.assert_close(mirrored, 1 - sideways, atol=0.15, rtol=0)  # left and right trade places


def test_still_pairs_keep_the_order_of_the_rest():
    clip = torch.arange(9.0).reshape(1, 9, 1, 1, 1).expand(2, -1, 3, 2, 2)
    actions = torch.arange(8).expand(2, -1) % 4
    held, kept = still(clip, actions, generator(1), 4)
    for frames, got in zip(held[:, :, 0, 0, 0].tolist(), kept.tolist(), strict=True):
        for before, after, action in zip(frames[:-1], frames[1:], got, strict=True):
            assert action == (4 if after == before else int(before) % 4)


def test_the_autoencoder_is_exact(drawn, pipe):
    x = 2 * drawn.video[:8].movedim(2, 1) - 1
    with torch.no_grad():
        z = pipe.vae.encode(x).latent_dist.mode()
        assert (pipe.vae.decode(z).sample - x).abs().max() < 2e-3
        assert pipe.vae.encode(x).latent_dist.std.max() < 1e-4
    mean, std = (
        torch.tensor(v).reshape(1, -1, 1, 1, 1) for v in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    ours = video.latents(pipe.vae, drawn.video[:8])
    torch.testing.assert_close((z - mean) / std, ours, atol=5e-3, rtol=0)
    assert float(video.latents(pipe.vae, drawn.video).std()) == pytest.approx(1, abs=0.1)


@pytest.fixture
def seen(pipe):
    """What the transformer is given, call by call; it answers at random rather than with the zeros it starts with."""
    torch.nn.init.normal_(pipe.transformer.proj_out.weight, std=0.02, generator=generator())
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(lambda m, a, k: calls.append(k), with_kwargs=True)
    yield calls
    hook.remove()
    torch.nn.init.zeros_(pipe.transformer.proj_out.weight)


def plain(pipe, prompt, image, seed, steps):
    """One call of the stock pipeline: one prompt, one picture."""
    noise = torch.randn(2, 12, 9, 8, 8, generator=generator(seed))  # as sample draws it for two
    return [
        pipe(
            prompt=p, image=i, height=16, width=16, num_frames=8, num_inference_steps=steps, guidance_scale=1.0,
            latents=z[None], max_sequence_length=8, output_type="pt",
        ).frames
        for p, i, z in zip(prompt, image, noise, strict=True)
    ]  # fmt: skip


def test_training_sees_what_the_pipeline_computes(drawn, pipe, seen, monkeypatch):
    """Words and condition (mask, first frame, nothing after it) equal, tensor by tensor, the stock pipeline's."""
    monkeypatch.setattr(video, "BATCH", 300)
    monkeypatch.setattr(video, "DROPOUT", 0.0)
    monkeypatch.setattr(video, "draw", lambda g, n, paths: drawn)
    with torch.no_grad():
        plain(pipe, drawn.prompts[:2], drawn.video[:2, :1], 0, 1)
        torch.nn.init.zeros_(pipe.transformer.proj_out.weight)
        loss = video.flow_loss(pipe, generator())
        video.noisier_loss(pipe, generator())
    *theirs, ours, noisier = seen
    x = torch.cat([k["hidden_states"] for k in theirs])
    assert x.shape == (2, 25, 9, 8, 8)
    torch.testing.assert_close(ours["hidden_states"][:2, 12:], x[:, 12:], atol=5e-3, rtol=0)
    assert x[:, 12, 0].min() == 1 and x[:, 12, 1:].abs().max() == 0
    torch.testing.assert_close(x[:, 13:, 0], video.latents(pipe.vae, drawn.video[:2])[:, :, 0], atol=5e-3, rtol=0)
    words = torch.cat([k["encoder_hidden_states"] for k in theirs])
    torch.testing.assert_close(ours["encoder_hidden_states"][:2], words)
    assert theirs[0]["timestep"].tolist() == [1000]
    assert ours["timestep"].max() > 500 and ours["timestep"].max() < 1000  # training's times have the same unit
    assert noisier["timestep"].median() > ours["timestep"].median() + 100
    assert float(loss) == pytest.approx(2.0, rel=0.05)  # |ε - x0|², both of unit variance: the output starts at zero
    assert sum(p.numel() for m in (pipe.transformer, pipe.text_encoder) for p in m.parameters()) < 1.4e6  # 2.8 MB


def test_a_batch_of_pictures_is_sampled_as_one_by_one(drawn, pipe, seen):
    media = video.sample(pipe, drawn.prompts[:2], drawn.video[:2, 0], steps=2, seed=7)
    assert len(seen) == 2
    assert media.shape == (2, 9, 3, 16, 16)
    torch.testing.assert_close(media, torch.cat(plain(pipe, drawn.prompts[:2], drawn.video[:2, :1], 7, 2)))
    assert "prepare_latents" not in vars(pipe)  # the pipeline is left as it was


def test_a_picture_means_the_same_as_tensor_and_as_file(drawn, pipe, seen):
    """Unlike the other worlds' pipelines this one scales tensors too: it wants them in [0, 1]."""
    files = [to_pil_image(v[0]) for v in drawn.video[:2]]
    plain(pipe, drawn.prompts[:2], files, 0, 1)
    ours = video.condition(pipe.vae, drawn.video[:2, 0])
    theirs = torch.cat([k["hidden_states"] for k in seen])[:, 12:]
    step = 2 / 255 / min(pipe.vae.config.latents_std)  # a file has 256 levels
    torch.testing.assert_close(theirs, ours, atol=step, rtol=0)


def test_a_prompt_with_its_meta_reaches_the_network_as_in_training(drawn, pipe, seen):
    """Through flowalign's own door: ``load``, and rows of a prompt with the batch's meta."""
    call = {"height": 16, "width": 16, "num_frames": 8, "guidance_scale": 1.0, "max_sequence_length": 8}
    generated = load(pipe, call)
    meta = drawn.meta()[:2]
    prompts = [Prompt(p, m) for p, m in zip(drawn.prompts[:2], meta, strict=True)]
    result = steer(generated, BestOfN(n=1), ShapesVideo("graded"), prompts, steps=2)
    assert generated.verdict.status == "passes", str(generated.verdict)
    assert result.media.shape == (2, 9, 3, 16, 16)
    given = torch.cat([k["hidden_states"] for k in seen])[:, 12:]
    for want in video.condition(pipe.vae, drawn.video[:2, 0]):  # each prompt's own frame was shown
        assert (given - want).abs().amax((1, 2, 3, 4)).min() < 5e-3


def test_meta_tells_actions_of_what_has_some(drawn):
    assert ["actions" in m for m in drawn.meta()] == (motions.GROUP[drawn.motion] < 2).tolist()
    told = (motions.GROUP[drawn.motion] < 2).nonzero()[:, 0]
    meta = [drawn.meta()[i] for i in told.tolist()]
    assert ActionAgreement()(drawn.video[told], [drawn.prompts[i] for i in told.tolist()], meta).mean() > 0.99
