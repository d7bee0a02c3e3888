import pytest
import torch

from flowalign.pipelines.worlds.__main__ import area_under_curve
from flowalign.rewards import shapes_clip


def test_words_become_ids():
    ids = shapes_clip.tokens(["a red circle", "two red circles"])
    assert ids.shape == (2, shapes_clip.LENGTH)
    assert ids[0].argmax() == 3  # open_clip reads the text at its largest id
    assert ids[0, 4:].sum() == 0
    assert ids[0, 1] == ids[1, 1]
    with pytest.raises(ValueError, match="'purple'"):
        shapes_clip.tokens(["a purple circle"])
    with pytest.raises(ValueError, match="10 words"):
        shapes_clip.tokens(["a " * 10])


def test_the_loss_falls_and_repeats_itself():
    def batches(g):
        colour = torch.randint(3, (12,), generator=g)
        images = torch.eye(3)[colour][:, :, None, None] * torch.rand(12, 1, 32, 32, generator=g)
        return images, [f"a {('red', 'green', 'blue')[c]} circle" for c in colour]

    assert next(shapes_clip.fit_clip(batches, 2))[:2] == next(shapes_clip.fit_clip(batches, 2))[:2]
    (_, loss, _) = list(shapes_clip.fit_clip(batches, 30))[-1]
    assert loss < 0.7  # chance is log 12 - log 4 = 1.1: captions that say the same are not told apart


def test_area_under_the_curve():
    scores, good = torch.tensor([0.1, 0.4, 0.4, 0.9]), torch.tensor([False, True, False, True])
    assert area_under_curve(scores, good) == pytest.approx(3.5 / 4)
