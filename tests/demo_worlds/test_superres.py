import torch

from flowalign.pipelines.worlds import scenes, superres
from flowalign.rewards.shapes import ShapesJudge

torch.set_num_threads(1)


def test_pairs_are_seeded_captioned_and_consistent():
    batch = superres.draw(torch.Generator().manual_seed(1), 200)
    again = superres.draw(torch.Generator().manual_seed(1), 200)
    assert torch.equal(batch.low, again.low)
    assert batch.prompts == again.prompts
    assert batch.low.shape == (200, 3, 8, 8)
    gap = batch.low - superres.reduce(batch.high)
    assert abs(float(gap.std()) - superres.NOISE) < 0.003
    assert float(ShapesJudge()(batch.high, batch.prompts).mean()) > 0.99
    blurred = superres.enlarge(batch.low)
    assert float(ShapesJudge()(blurred, batch.prompts).mean()) < 0.5  # the shape is lost at 8×8: there is work to do
    meta = batch.meta()[3]
    assert torch.equal(meta["reference"], batch.high[3])
    assert torch.equal(meta["image"], blurred[3])
    assert torch.equal(meta["control_image"], 2 * blurred[3:4] - 1)


def test_given_captions_are_drawn_in_order():
    chosen = scenes.captions()[:3]
    batch = superres.draw(torch.Generator().manual_seed(1), 5, chosen)
    assert batch.prompts == [str(chosen[i % 3]) for i in range(5)]


def test_the_pipeline_runs_on_pairs():
    torch.manual_seed(0)
    pipe = superres.build()
    pipe.set_progress_bar_config(disable=True)
    batch = superres.draw(torch.Generator().manual_seed(1), 2)
    with torch.no_grad():
        first, second = superres.sample(pipe, batch, steps=2), superres.sample(pipe, batch, steps=2, seed=1)
    assert first.shape == (2, 3, 32, 32)
    assert not torch.equal(first, second)


def test_every_caption_is_read_to_its_end():
    pipe = superres.build()
    captions = [str(c) for c in scenes.captions()]
    ids = superres.token_ids(pipe.tokenizer, captions, torch.device("cpu"))
    assert [pipe.tokenizer.decode(x, skip_special_tokens=True) for x in ids] == captions
    assert ids.shape[1] == pipe.text_encoder.config.max_position_embeddings


def test_training_sees_what_the_pipeline_computes():
    torch.manual_seed(0)
    pipe = superres.build()
    pipe.set_progress_bar_config(disable=True)
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)
    batch = superres.draw(torch.Generator().manual_seed(1), 4, scenes.captions()[-4:])
    with torch.no_grad():
        superres.sample(pipe, batch, steps=1)
        ids = superres.token_ids(pipe.tokenizer, batch.prompts, torch.device("cpu"))
        x0, low = (superres.latents(pipe.vae, x) for x in (batch.high, superres.enlarge(batch.low)))
        superres.flow_loss(pipe, x0, low, ids, torch.Generator().manual_seed(2))
    theirs, ours = seen
    for key in ("encoder_hidden_states", "pooled_projections", "txt_ids", "img_ids"):
        torch.testing.assert_close(ours[key], theirs[key])
    c = x0.shape[2]
    torch.testing.assert_close(theirs["hidden_states"][..., c:], low, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours["hidden_states"][..., c:], low)


def test_the_autoencoder_carries_what_the_judge_looks_at():
    pipe = superres.build()
    batch = superres.draw(torch.Generator().manual_seed(1), 100)
    with torch.no_grad():
        z = superres.latents(pipe.vae, batch.high)
        z = pipe._unpack_latents(z, 32, 32, pipe.vae_scale_factor)
        z = z / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor  # as the pipeline decodes
        images = pipe.image_processor.postprocess(pipe.vae.decode(z).sample, output_type="pt")
    assert float(ShapesJudge()(images, batch.prompts).mean()) > 0.95
