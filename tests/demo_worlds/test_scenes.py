import pytest
import torch

from flowalign.pipelines.worlds.scenes import (
    CATEGORIES,
    MAX_OBJECTS,
    RELATIONS,
    Layout,
    captions,
    draw,
    parse,
    relation_holds,
)  # fmt: skip
from flowalign.rewards import objects, shapes


def test_captions_and_words_are_one():
    assert len(set(map(str, captions()))) == len(captions()) == 18 + 54 + 720 + 1530
    assert all(parse(str(c)) == c for c in captions())
    assert {c.category for c in captions()} == set(CATEGORIES)
    assert max(c.total for c in captions()) == MAX_OBJECTS


@pytest.mark.parametrize(
    "words", ["a red bar", "five red circles", "two red circle", "", "a red circle near a blue square"]
)
def test_other_words_are_refused(words):
    with pytest.raises(ValueError, match="not a caption"):
        parse(words)
    with pytest.raises(ValueError, match="not a caption"):
        shapes.parse(words)


def test_the_judge_reads_what_the_scenes_mean():
    colours, kinds = list(objects.HUES), list(objects.SHAPES)
    for c in captions():
        target = shapes.parse(str(c))
        assert target.kinds == tuple((g.number, colours.index(g.colour), kinds.index(g.shape)) for g in c.groups)
        assert target.relation == (-1 if c.relation is None else RELATIONS.index(c.relation))


def test_layouts_obey_the_caption_and_never_touch():
    g = torch.Generator().manual_seed(0)
    index = torch.arange(len(captions()))
    scenes = Layout(captions())(index, g)
    here = scenes.radius > 0
    assert here.sum(1).tolist() == [c.total for c in captions()]
    for i, c in enumerate(captions()):
        if c.relation is not None:
            assert relation_holds(c.relation, scenes.centre[i, 0], scenes.centre[i, 1])
    gap = (scenes.centre[:, :, None] - scenes.centre[:, None]).abs().amax(-1)
    gap = gap[here[:, :, None] & here[:, None] & ~torch.eye(MAX_OBJECTS, dtype=torch.bool)]
    assert gap.min() > 2 * 1.05 * 3.9 + 1  # two largest triangles side by side leave a pixel


def test_drawing_depends_on_the_generator_alone():
    layout, index = Layout(captions()), torch.arange(0, len(captions()), 97)
    one, two, other = (draw(layout(index, torch.Generator().manual_seed(s))) for s in (3, 3, 4))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert one.min() >= 0
    assert one.max() <= 1


def test_areas_are_those_of_the_formulas():
    index = torch.arange(18)  # single objects
    scenes = Layout(captions())(index, torch.Generator().manual_seed(0))
    found = objects.find_objects(draw(scenes))
    r = scenes.radius[:, 0]
    want = torch.stack([torch.pi * r**2, (1.76 * r) ** 2, 2.1 * r**2], -1)[index, scenes.shape[:, 0]]
    assert torch.allclose(found.area, want, rtol=0.05)
    offset = torch.where(scenes.shape[:, 0] == 2, r / 3, 0.0)  # a triangle's centroid lies below its middle
    assert (found.centre[:, 0] - scenes.centre[:, 0, 0]).abs().max() < 0.15
    assert (found.centre[:, 1] - scenes.centre[:, 0, 1] - offset).abs().max() < 0.3
