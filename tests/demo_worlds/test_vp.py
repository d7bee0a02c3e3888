"""The VP worlds: the flow teacher's two ends, and a loss whose minimum is what the stock pipeline needs."""

import pytest
import torch

from flowalign.pipelines.worlds import shapes, shapes_vp

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    pipe = shapes_vp.EPSILON.build()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_flow_names_the_data_and_the_noise_of_a_diffused_point():
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 4, 3, 3, generator=g)
    kept = torch.tensor([0.0047, 0.1, 0.5, 0.9, 0.999])
    x = kept.sqrt()[:, None, None, None] * x0 + (1 - kept).sqrt()[:, None, None, None] * noise
    seen = []

    def velocity(point, tau):
        t = tau[:, None, None, None]
        torch.testing.assert_close(point, (1 - t) * (x0 - 0.7) + t * noise, atol=1e-5, rtol=0)
        seen.append(tau)
        return noise - (x0 - 0.7)

    found, drawn = shapes_vp.ends(velocity, x, kept, 0.7)
    torch.testing.assert_close(found, x0, atol=1e-5, rtol=0)
    torch.testing.assert_close(drawn, noise, atol=1e-5, rtol=0)
    assert (seen[0].diff() < 0).all()
    assert ((seen[0] > 0) & (seen[0] < 1)).all()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_network_without_loss_samples_the_data_point(pipe, prediction, monkeypatch):
    """Let every data point be .3: the network that knows this has loss 0, and the pipeline ends at .3 with it."""
    pipe.register_modules(scheduler=shapes_vp.schedule(prediction))
    kept = pipe.scheduler.alphas_cumprod

    def noise(x, k):
        return (x - k.sqrt() * 0.3) / (1 - k).sqrt()

    def forward(x, t, text=None, encoder_hidden_states=None, return_dict=False, **_):
        seen.append(text if text is not None else encoder_hidden_states)
        k = kept[t.reshape(-1, 1, 1, 1)]
        out = noise(x, k)
        return (out if prediction == "epsilon" else k.sqrt() * out - (1 - k).sqrt() * 0.3,)

    seen = []
    monkeypatch.setattr(pipe.unet, "forward", forward)
    monkeypatch.setattr(
        shapes_vp, "ends", lambda v, x, k, shift: (torch.full_like(x, 0.3), noise(x, k[:, None, None, None]))
    )
    monkeypatch.setattr(shapes, "BATCH", 4)
    with torch.no_grad():
        assert float(shapes_vp.loss(pipe, torch.Generator().manual_seed(1), prediction)) < 1e-6
        words = [str(c) for c in shapes.splits.base()[:2]]
        text = pipe.text_encoder(shapes.ids(pipe.tokenizer, torch.device("cpu"))[:2])[0]
        out = pipe(words, height=32, width=32, num_inference_steps=4, guidance_scale=1.0, output_type="latent").images
    torch.testing.assert_close(out, torch.full_like(out, 0.3), atol=0.15, rtol=0)  # it stops at ᾱ_0, not at 1
    assert float(out.mean()) == pytest.approx(0.3, abs=0.01)
    assert pipe.scheduler.timesteps.tolist() == [999, 749, 499, 249]
    torch.testing.assert_close(seen[-1], text)


def test_latents_go_back_to_the_picture(pipe):
    images, _ = shapes.draw(torch.Generator().manual_seed(1), 16)
    with torch.no_grad():
        x0 = pipe.vae.encode(2 * images - 1).latent_dist.mean * pipe.vae.config.scaling_factor
        decoded = pipe.vae.decode(x0 / pipe.vae.config.scaling_factor).sample / 2 + 0.5
    assert float(x0.std()) == pytest.approx(1, abs=0.15)
    assert float((decoded - images).abs().mean()) < 0.02


@pytest.mark.parametrize("stage", range(3))
def test_the_first_stages_see_noise_and_two_of_four_words(stage, pipe, monkeypatch):
    drawn, times = [], []

    def forward(x, t, *_, **__):
        times.append(t)
        return (x.detach().requires_grad_(),)

    original = shapes.draw
    monkeypatch.setattr(pipe.unet, "forward", forward)
    monkeypatch.setattr(shapes, "draw", lambda *a: (drawn.append(original(*a)), drawn[-1])[1])
    for seed in range(6):
        shapes_vp.EPSILON.stages[stage].loss(pipe, torch.Generator().manual_seed(seed))
    assert (torch.cat(times).min() >= 900) == (stage < 2)
    told = [shapes.splits.base()[int(i)].relation for _, index in drawn for i in index]
    first, every = sum(r in ("above", "left of") for r in told), sum(r is not None for r in told)
    assert (first / every > 0.9) == (stage == 0)
