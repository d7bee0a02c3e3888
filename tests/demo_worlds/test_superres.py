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
    ids = superres.token_ids(pipe.tokenizer, [str(c) for c in scenes.captions()], torch.device("cpu"))
    assert (ids != 2).all()  # every word of every caption is known
    assert ((ids == 1).sum(1) == 1).all()  # and every caption fits, with its end
