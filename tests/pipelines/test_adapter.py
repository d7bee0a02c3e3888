"""The adapter beyond the contract: bad input, exceptions, guidance, times off the grid, memo, media in and out."""

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from flowalign.pipelines import batching, load, verdict
from flowalign.pipelines.verdict import stock
from tests.pipelines.contract import fingerprint, gap, split, subject
from tests.zoo import build


def wrap(name, check=False, **more):
    case = build(name)
    case.pipe.set_progress_bar_config(disable=True)
    prompt, meta, call = split(case.inputs)
    adapter = load(case.pipe, {**call, **more}, modality=case.modality, check=check)
    return case, adapter, prompt, meta


@pytest.fixture(scope="module")
def sd3():
    return subject("StableDiffusion3")


def test_verdict_is_given_at_wrap_time():
    _, adapter, _, _ = wrap("StableDiffusion3", check=True)
    assert adapter.verdict.status == "passes" and "relative to the stock call" in str(adapter.verdict)
    _, adapter, prompt, meta = wrap("FluxKontext", check=True)
    assert adapter.verdict.status == "not tried"  # needs a picture: tried when it comes
    adapter.encode([prompt], [meta])
    assert adapter.verdict.status == "passes"


def test_verdict_warns_of_a_pipeline_that_it_cannot_follow(monkeypatch):
    _, adapter, prompt, _ = wrap("StableDiffusion3")
    cond = adapter.encode([prompt])
    evaluate = verdict.evaluate
    monkeypatch.setattr(verdict, "evaluate", lambda *a: tuple(1.1 * v for v in evaluate(*a)))
    with pytest.warns(UserWarning, match="not to be trusted"):
        assert adapter.examine(cond).status == "fails"


def test_reload_from_a_folder(tmp_path, sd3):
    sd3.case.pipe.save_pretrained(tmp_path)
    again = load(tmp_path, split(sd3.case.inputs)[2], check=False)
    cond = again.encode([split(sd3.case.inputs)[0]])
    with torch.no_grad():
        ours = again.posterior(sd3.begin(), sd3.times[0], cond).x0
        assert torch.equal(ours, sd3.adapter.posterior(sd3.begin(), sd3.times[0], sd3.cond).x0)


# -- bad input ---------------------------------------------------------------------------------------------------
def test_what_is_no_pipeline(tmp_path):
    with pytest.raises(TypeError, match="got Linear"):
        load(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"model_index\.json"):
        load(tmp_path)
    with pytest.raises(ValueError, match="no folder"):
        load("./nowhere/at/all")


def test_unknown_argument_is_named():
    with pytest.raises(ValueError, match="takes no argument hight"):
        load(build("StableDiffusion3").pipe, {"hight": 16})


def test_pipeline_without_a_scheduler():
    pipe = copy.copy(build("StableDiffusion3").pipe)
    vars(pipe).pop("scheduler")
    with pytest.raises(ValueError, match="no attribute `scheduler`"):
        load(pipe)


def test_prompts_of_unequal_kinds(sd3):
    with pytest.raises(ValueError, match="list of strings"):
        sd3.adapter.encode("one string")
    with pytest.raises(ValueError, match="int"):
        sd3.adapter.encode(["a", 3])
    with pytest.raises(ValueError, match="one entry per prompt"):
        sd3.adapter.encode(["a", "b"], [{}])
    with pytest.raises(ValueError, match="same kinds of inputs"):
        sd3.adapter.encode(["a", "b"], [{"prompt_2": "c"}, {}])
    _, adapter, prompt, meta = wrap("FluxKontext")
    small = {**meta, "image": meta["image"].resize((8, 8))}
    with pytest.raises(ValueError, match="same size"):
        adapter.encode([prompt, prompt], [meta, small])


def test_wrong_states_and_times(sd3):
    x = sd3.begin()
    with pytest.raises(ValueError, match="one row per condition"):
        sd3.adapter.posterior(torch.cat([x, x]), 0.5, sd3.cond)
    with pytest.raises(ValueError, match="states must have shape"):
        sd3.adapter.posterior(x[..., :4], 0.5, sd3.cond)
    with pytest.raises(ValueError, match="at least one step"):
        sd3.adapter.times(0)
    with pytest.raises(ValueError, match="starts at t = 1"):
        sd3.adapter.start(x, 0.5, sd3.cond)


def test_lora_of_another_model(tmp_path):
    _, adapter, _, _ = wrap("Flux")
    adapter.add_lora(2)
    adapter.save(tmp_path)
    _, other, _, _ = wrap("StableDiffusion3")
    with pytest.raises(ValueError, match="made for another model"):
        other.load_lora(tmp_path)
    with pytest.raises(ValueError, match=r"no \.safetensors"):
        other.load_lora(tmp_path / "missing")
    with pytest.raises(ValueError, match="already has an adapter"):
        adapter.add_lora(2)
    with pytest.raises(ValueError, match="ends in"):
        other.add_lora(2, targets=["nothing"])


def test_autoencoder_that_overflows(sd3, monkeypatch):
    monkeypatch.setattr(type(sd3.case.pipe.vae), "decode", lambda self, z, **_: (z[:, :3] * float("nan"),))
    with pytest.raises(ValueError, match="overflows"):
        sd3.adapter.decode(sd3.end(), sd3.cond)


def test_half_precision_autoencoder_that_really_overflows():
    case = build("StableDiffusion3")
    case.pipe.to(torch.float16)
    with torch.no_grad():
        case.pipe.vae.decoder.conv_in.weight.mul_(1e4)
        case.pipe.vae.decoder.conv_in.bias.fill_(6e4)
    prompt, meta, call = split(case.inputs)
    adapter = load(case.pipe, call, check=False)
    cond = adapter.encode([prompt], [meta])
    with pytest.raises(ValueError, match=r"overflows in torch\.float16"):
        adapter.decode(torch.randn(1, *adapter.shape(cond)), cond)


# -- the pipeline afterwards -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["StableDiffusion3", "StableDiffusionPAG", "DDIM"])
def test_unchanged_after_an_exception_in_the_network(name):
    s = subject(name)
    before = fingerprint(s.case.pipe)
    network = next(iter(s.adapter.experts.values()))
    state = torch.random.get_rng_state()

    def fail(*_):
        raise RuntimeError("out of memory, say")

    hook = network.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="say"):
        s.adapter.posterior(s.begin(), s.times[0], s.cond)
    hook.remove()
    assert torch.is_grad_enabled() and torch.equal(torch.random.get_rng_state(), state)
    after = fingerprint(s.case.pipe)
    assert before.keys() == after.keys()
    assert not [k for k, v in before.items() if not (v is after[k] or (not torch.is_tensor(v) and v == after[k]))]
    results = stock(s.adapter, s.cond, s.steps).results
    assert torch.equal(results[-1], s.results[-1])


def test_no_graph_is_kept(sd3):
    """Once the posterior is gone, so are the activations; by reference counting alone."""
    ghosts = []
    block = next(m for n, m in sd3.adapter.denoiser.named_modules() if n == "transformer_blocks.0")
    hook = block.register_forward_hook(lambda m, a, out: ghosts.extend(weakref.ref(o) for o in out if o is not None))
    x = sd3.begin().clone().requires_grad_()
    p = sd3.adapter.posterior(x, sd3.times[1], sd3.cond)
    hook.remove()
    assert p.x0.requires_grad and ghosts
    del p
    assert not [g for g in ghosts if g() is not None]


# -- what the network is asked -----------------------------------------------------------------------------------
def test_guidance_off_is_the_bare_network(sd3):
    """Guidance is linear in its scale here, so scale w: guided = bare + (w - 1)(bare - unconditional)."""
    x, t = sd3.begin(), sd3.times[1]
    calls = []
    network = sd3.adapter.denoiser
    hook = network.register_forward_pre_hook(
        lambda m, a, k: calls.append(k["hidden_states"].shape[0]), with_kwargs=True
    )
    with torch.no_grad():
        bare = sd3.adapter.posterior(x, t, sd3.cond.bare())
        calls.clear()
        again = sd3.adapter.posterior(x, t, sd3.cond.bare())
        assert calls == [1] and torch.equal(bare.x0, again.x0)
        guided = sd3.adapter.posterior(x, t, sd3.cond)
        assert calls == [1, 2] and not torch.allclose(bare.x0, guided.x0)
    hook.remove()


@pytest.mark.parametrize("name", ["StableDiffusion3", "StableDiffusionXL", "StableDiffusion", "ZImage"])
def test_several_times_in_one_batch(name):
    """Times on and off the grid, mixed: each row must be what it is alone."""
    s = subject(name)
    inside = 0.5 * (s.times[0] + s.times[1])
    times = torch.tensor([s.times[0], inside, s.times[1]], dtype=torch.float64)
    prompts = ["a red circle", "two squares", "a blue circle"]
    cond = s.adapter.encode(prompts)
    x = torch.randn(3, *s.adapter.shape(cond), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = s.adapter.posterior(x, times, cond).x0
        for i in range(3):
            alone = s.adapter.posterior(x[i : i + 1], float(times[i]), cond[torch.tensor([i])]).x0
            assert gap(together[i : i + 1], alone) < 1e-3


def test_why_rows_go_one_by_one_is_said(monkeypatch):
    """A refusal of several rows is an answer and kept in words; running out of memory is no answer."""
    _, adapter, _, _ = wrap("StableDiffusion3")
    own = batching.step

    def step(adapter, x, t, cond):
        if len(x) > 1:
            raise ValueError("one prompt at a time")
        return own(adapter, x, t, cond)

    monkeypatch.setattr(batching, "step", step)
    cond = adapter.encode(["a", "b"])
    assert adapter.batching.calls(cond) == [[0], [1]]
    assert adapter.batching.reasons == ["two rows in one call: ValueError: one prompt at a time"]
    _, adapter, _, _ = wrap("StableDiffusion3")
    monkeypatch.setattr(batching, "step", lambda a, x, t, c: own(a, x * len(x), t, c))
    assert adapter.batching.calls(adapter.encode(["a", "b"])) == [[0], [1]]
    assert "outputs differ by" in adapter.batching.reasons[0]
    _, adapter, _, _ = wrap("StableDiffusion3")

    def full(adapter, x, t, cond):
        if len(x) > 1:
            raise torch.OutOfMemoryError
        return own(adapter, x, t, cond)

    monkeypatch.setattr(batching, "step", full)
    with pytest.raises(torch.OutOfMemoryError):
        adapter.encode(["a", "b"])


def test_posterior_is_continuous_between_grid_points(sd3):
    x, t = sd3.begin(), sd3.times[1]
    with torch.no_grad():
        here = sd3.adapter.posterior(x, t, sd3.cond).x0
        near = sd3.adapter.posterior(x, t - 1e-5, sd3.cond).x0
        far = sd3.adapter.posterior(x, t - 1e-1, sd3.cond).x0
    assert 0 < gap(near, here) < 1e-3 < gap(far, here)


def test_nothing_is_encoded_twice():
    case, adapter, _, _ = wrap("StableDiffusion3")
    calls = []
    for part in (case.pipe.text_encoder, case.pipe.text_encoder_2, case.pipe.text_encoder_3):
        part.register_forward_pre_hook(lambda m, a: calls.append(type(m).__name__))
    cond = adapter.encode(["a", "b", "c"])
    x = torch.randn(3, *adapter.shape(cond))
    calls.clear()
    with torch.no_grad():
        first = adapter.posterior(x, 0.5, cond).x0
        mixed = torch.tensor([2, 0, 2, 1, 1])  # particles, groups, shuffled minibatches
        again = adapter.posterior(x[mixed], 0.5, cond[mixed]).x0
    assert not calls and gap(again, first[mixed]) < 1e-4
    adapter.memo.forget()
    adapter.encode(["a"])
    assert calls


def test_freed_encoders_come_back_for_a_new_prompt(sd3):
    assert sd3.adapter.free_encoders() == ["text_encoder", "text_encoder_2", "text_encoder_3"]
    cond = sd3.adapter.encode(["never seen before"])
    assert sd3.adapter.posterior(sd3.begin(), 0.5, cond).x0.isfinite().all()


def test_rollout_and_update_must_run_alike(sd3):
    with torch.no_grad():
        sd3.adapter.posterior(sd3.begin(), sd3.times[0], sd3.cond)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="ratio would not be 1"):
            sd3.adapter.posterior(sd3.begin(), sd3.times[0], sd3.cond)


# -- media -------------------------------------------------------------------------------------------------------
def test_start_is_what_the_pipeline_makes_of_latents(sd3):
    noise = torch.randn(1, *sd3.adapter.shape(sd3.cond), generator=torch.Generator().manual_seed(4))
    assert torch.equal(sd3.adapter.start(noise, 1.0, sd3.cond), noise)
    s = subject("StableDiffusionXL")  # Euler: scaled by init_noise_sigma
    noise = torch.randn(1, *s.adapter.shape(s.cond), generator=torch.Generator().manual_seed(0))
    want = noise * s.calls[0].sample.std() / torch.randn(noise.shape, generator=torch.Generator().manual_seed(0)).std()
    assert gap(s.adapter.start(noise, s.times[0], s.cond), want) < 1e-4


def test_pixels_out_of_range_keep_their_gradient(sd3):
    x = (sd3.end() * 30).clone().requires_grad_()
    media = sd3.adapter.decode(x, sd3.cond)
    out = (media == 0) | (media == 1)
    assert out.float().mean() > 0.05 and media.min() >= 0 and media.max() <= 1
    gradient = torch.autograd.grad((media * out).sum(), x)[0]
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("name", ["StableDiffusion3", "Flux", "Wan"])
def test_chunks_and_checkpoints_decode_the_same(name):
    s = subject(name)
    cond = s.cond[torch.tensor([0, 0])]
    x = torch.cat([s.end(), s.begin()]).requires_grad_()
    whole = s.adapter.decode(x, cond)
    parts = s.adapter.decode(x, cond, chunk=1, checkpoint=True)
    assert gap(parts, whole) < 1e-5
    a, b = (torch.autograd.grad(m.square().sum(), x)[0] for m in (whole, parts))
    assert gap(b, a) < 1e-3


@pytest.mark.parametrize("name", ["StableDiffusion3", "Flux", "Wan", "QwenImage", "LTX"])
def test_way_in_inverts_the_way_out(name):
    """States of media, sent out again, reach ``vae.decode`` as exactly what ``vae.encode`` gave."""
    s = subject(name)
    media = s.adapter.decode(s.end(), s.cond).detach()
    states = s.adapter.latents(media, s.cond)
    assert states.shape == s.end().shape
    pixels = media * 2 - 1
    vae = s.case.pipe.vae
    if media.ndim == 5:
        pixels = pixels.transpose(1, 2)
    elif vae.config.get("z_dim") is not None:
        pixels = pixels[:, :, None]
    seen = []
    decode = type(vae).decode
    vae.decode = lambda z, *a, **k: seen.append(z) or decode(vae, z, *a, **k)
    try:
        s.adapter.decode(states, s.cond)
    finally:
        del vae.decode
    assert gap(seen[-1].reshape(-1), vae.encode(pixels).latent_dist.mode().reshape(-1)) < 1e-5
    with pytest.raises(ValueError, match="must"):
        s.adapter.latents(media * 3, s.cond)


# -- chosen frames -----------------------------------------------------------------------------------------------
def cost(run):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


# frames of the clip, the latents that some of them need (None where frames are rows of a batch), and what that saves
CLIPS = {
    "Wan": (21, {0: 1, 1: 2, 10: 4, 20: 6}, 0.7),  # causal: a prefix
    "Mochi": (19, {0: 1, 9: 3, 18: 4}, 0.8),
    "LTX": (49, {0: 11, 48: 13}, 0.9),  # looks both ways
    "HunyuanVideo": (9, {0: 3, 8: 3}, 1.0),  # its group norms run over the whole clip
    "AnimateDiff": (None, None, 0.4),  # frame by frame
    "StableVideoDiffusion": (None, None, 1.0),  # is told the number of frames
}


@pytest.mark.parametrize("name", CLIPS)
def test_chosen_frames_are_those_of_the_whole_clip_for_less(name):
    count, needs, share = CLIPS[name]
    _, adapter, prompt, meta = wrap(name, **({} if count is None else {"num_frames": count}))
    cond = adapter.encode([prompt], [meta])
    x = torch.randn(1, *adapter.shape(cond), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = adapter.decode(x, cond)
        last = whole.shape[1] - 1
        for k in needs or (0, 1):
            assert gap(adapter.decode(x, cond, frames=[k]), whole[:, [k]]) < 1e-5
        assert gap(adapter.decode(x, cond, frames=[-1, 0]), whole[:, [last, 0]]) < 1e-5
    found = adapter.decoder.layouts[cond.rows[0].kind, True].needs
    assert needs is None or {k: found[k] for k in needs} == needs
    middle = sorted(needs)[(len(needs) - 1) // 2] if needs else 1
    spent = cost(lambda: adapter.decode(x, cond, frames=[middle])) / cost(lambda: adapter.decode(x, cond))
    assert spent <= share


def test_chosen_frames_pass_their_gradient_and_no_other():
    _, adapter, prompt, meta = wrap("Wan", num_frames=9)
    cond = adapter.encode([prompt, prompt], [meta, meta])
    x = torch.randn(2, *adapter.shape(cond), generator=torch.Generator().manual_seed(0)).requires_grad_()
    want = torch.autograd.grad(adapter.decode(x, cond)[:, [3]].square().sum(), x)[0]
    for checkpoint in (False, True):
        media = adapter.decode(x, cond, frames=[3], chunk=1, checkpoint=checkpoint)
        gradient = torch.autograd.grad(media.square().sum(), x)[0]
        assert gap(gradient, want) < 1e-3
        assert gradient[:, :, :2].abs().sum() > 0 and gradient[:, :, 2].abs().sum() == 0


def test_frames_that_the_clip_does_not_have(sd3):
    s = subject("Wan")
    for frames in ([], [5], [-6]):
        with pytest.raises(ValueError, match="one of the 5 frames"):
            s.adapter.decode(s.end(), s.cond, frames=frames)
    with pytest.raises(ValueError, match="frames can be chosen of a video"):
        sd3.adapter.decode(sd3.end(), sd3.cond, frames=[0])


def test_decoding_without_gradients_first_does_not_lose_them(sd3, monkeypatch):
    with torch.no_grad():
        sd3.adapter.decode(sd3.end(), sd3.cond)
    by = sd3.adapter.decoder._by
    blind = lambda way, x, cond: by(way, x, cond).detach() if way == "zero" else by(way, x, cond)  # noqa: E731
    monkeypatch.setattr(sd3.adapter.decoder, "_by", blind)
    assert sd3.adapter.decode(sd3.end().requires_grad_(), sd3.cond).requires_grad
