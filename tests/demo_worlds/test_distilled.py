"""What the distilled stages aim at: the guided velocity of a kept teacher, one point all along a path."""

import pytest
import torch
from torch import nn

from flowalign.pipelines.worlds import shapes, shapes_training, shapes_turbo, store


class Speaker(nn.Module):
    """A transformer that says one number: that of the empty caption, or that of any other."""

    def __init__(self, given, free):
        super().__init__()
        self.given, self.free = nn.Parameter(torch.tensor(given)), nn.Parameter(torch.tensor(free))

    def forward(self, x, text, pooled, t, return_dict):
        empty = (text.flatten(1) == EMPTY.flatten()).all(1)
        value = torch.where(empty, self.free, self.given)
        return (value[:, None, None, None].expand_as(x),)


EMPTY = torch.zeros(1)


@pytest.fixture
def pipe():
    made = shapes.build()
    with torch.no_grad():
        embeds, _ = shapes.encode(made, shapes.ids(made.tokenizer, torch.device("cpu"))[-1:])
    EMPTY.resize_(embeds.shape).copy_(embeds)
    made.transformer = Speaker(3.0, 1.0)
    return made


def losses(pipe, seeds=40):
    return torch.stack(
        [shapes_training.guided_loss(pipe, torch.Generator().manual_seed(s)) for s in range(seeds)]
    ).detach()


def told(monkeypatch, scale, until):
    """Fold in one scale up to one time, whatever the caption."""
    rows = torch.tensor([scale, until]).repeat(len(shapes.splits.base()) + 1, 1)
    monkeypatch.setattr(shapes_training, "guidance", lambda device: rows)


def test_the_aim_is_the_guided_velocity_below_and_the_plain_one_above(pipe, monkeypatch):
    """A student that says the guided number everywhere is wrong only above the interval, and on no empty caption."""
    shapes_training.keep_teacher(pipe)
    guided = 1.0 + 2.5 * (3.0 - 1.0)
    with torch.no_grad():
        pipe.transformer.given.fill_(guided)
    told(monkeypatch, 2.5, 1.0)
    assert losses(pipe, 3).abs().max() < 1e-9
    # t' = 2u / (1 + u) > .95 where u > .95 / 1.05
    for until, above in ((-1.0, 1.0), (0.95, 1 - 0.95 / 1.05)):
        told(monkeypatch, 2.5, until)
        share = losses(pipe) / (guided - 3.0) ** 2  # of captions that are not empty
        assert share.mean().item() == pytest.approx(
            above * (1 - shapes.DROPOUT), abs=4 * (0.09 / (40 * shapes.BATCH)) ** 0.5
        )


def test_every_caption_has_the_guidance_of_its_category():
    rows = shapes_training.guidance(torch.device("cpu"))
    for c, (scale, until) in zip(shapes.splits.base(), rows.tolist()[:-1], strict=True):
        assert (scale, until) == pytest.approx(shapes_training.GUIDANCE[c.category])
    assert rows[-1, 0] == 1  # of the empty caption


def test_the_teacher_stays_as_it_was(pipe):
    shapes_training.keep_teacher(pipe)
    with torch.no_grad():
        pipe.transformer.given.fill_(7.0)
    assert shapes_training.TEACHERS[pipe.transformer].given.item() == 3.0


class Straight(nn.Module):
    """The velocity field of one data point: ``(x - c) / t``, on which ``f`` is c wherever it is asked."""

    def __init__(self, centre):
        super().__init__()
        self.centre = nn.Parameter(torch.tensor(centre))

    def forward(self, x, text, pooled, t, return_dict):
        return ((x - self.centre) / (t / 1000).clamp_min(1e-9)[:, None, None, None],)


def test_consistency_is_no_distance_on_straight_paths(pipe, monkeypatch):
    """At the last step the target is the teacher's own end; a student elsewhere is pulled to it from there."""
    teacher = shapes.build()
    teacher.transformer = Straight(0.5)
    monkeypatch.setattr(store, "frozen", lambda name, device: teacher)
    pipe.transformer = Straight(0.5)
    g = torch.Generator().manual_seed(0)
    assert shapes_turbo.consistency_loss(pipe, g).item() == pytest.approx(0, abs=1e-4)
    pipe.transformer = Straight(0.8)
    loss = torch.stack([shapes_turbo.consistency_loss(pipe, torch.Generator().manual_seed(s)) for s in range(20)])
    # x_s has left the student's own line: f(x_s) = .8 as long as s > 0, and the teacher's .5 at s = 0
    n = 4 * 16 * 16
    c = 0.00054 * n**0.5
    one = (n * 0.3**2 + c**2) ** 0.5 - c
    hit = loss.mean().item() / one  # share of t = 1/12
    assert hit == pytest.approx(1 / shapes_turbo.GRID, abs=4 * (1 / 12 * 11 / 12 / (20 * shapes.BATCH)) ** 0.5)
