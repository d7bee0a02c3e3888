import random

import pytest
import torch
from shapes_pictures import near_miss, pictures

from flowalign.rewards.base import Unjudged
from flowalign.rewards.shapes import ASPECTS, ShapesJudge, verdicts


def precision_recall(n, seed):
    images, truth = pictures(n, seed)
    rng = random.Random(seed)
    right = verdicts(images, list(map(str, truth)))["strict"].sum().item()
    wrong = verdicts(images, [str(near_miss(c, rng)) for c in truth])["strict"].sum().item()
    return right / max(right + wrong, 1), right / len(images)


def test_exact_on_degraded_drawings():
    precision, recall = precision_recall(480, 0)
    assert precision == 1.0
    assert recall >= 0.995


@pytest.mark.slow
def test_exact_on_ten_thousand():
    precision, recall = precision_recall(10_000, 1)
    print(f"precision {precision:.5f}, recall {recall:.5f}")
    assert precision >= 0.9995
    assert recall >= 0.997


def test_strict_is_graded_one():
    images, truth = pictures(160, 2)
    rng = random.Random(2)
    for prompts in (truth, [near_miss(c, rng) for c in truth]):
        v = verdicts(images, list(map(str, prompts)))
        assert torch.equal(v["strict"] == 1, v["graded"] == 1)
        assert v["graded"].min() >= 0


def test_graded_ranks_nearly_right_above_wrong():
    images, truth = pictures(160, 3)
    rng = random.Random(3)
    right, near, far = (
        verdicts(images, list(map(str, p)))["graded"]
        for p in (truth, [near_miss(c, rng) for c in truth], truth[4:] + truth[:4])
    )
    assert (right > near).all()
    assert near.mean() > far.mean() + 0.2


@pytest.mark.parametrize(
    ("drawn", "asked", "aspect", "want"),
    [
        ("three red circles", "two red circles", "count", 1 / 2),
        ("three red circles", "three blue circles", "colour", 0.0),
        ("three red circles", "three red squares", "shape", 0.0),
        ("three red circles", "three red squares", "colour", 1.0),
        ("two red circles and one blue square", "one red circle and two blue squares", "kind", 2 / 3),
        ("a red circle above a blue square", "a blue square below a red circle", "strict", 1.0),
        ("a red circle above a blue square", "a red circle below a blue square", "relation", 0.0),
        ("a red square above a blue circle", "a red circle above a blue square", "kind", 0.0),
        ("a red square above a blue circle", "a red circle above a blue square", "colour", 1.0),
    ],
)
def test_aspects(drawn, asked, aspect, want):
    from flowalign.pipelines.worlds.scenes import Layout, draw, parse

    image = draw(Layout((parse(drawn),))(torch.tensor([0, 0]), torch.Generator().manual_seed(1)))
    assert ShapesJudge(aspect)(image, [asked, asked]).tolist() == pytest.approx([want, want])


def test_an_empty_picture_is_wrong_and_a_relation_must_be_asked_for():
    image = torch.full((1, 3, 32, 32), 0.1)
    assert ShapesJudge("strict")(image, ["a red circle"]).item() == 0
    with pytest.raises(Unjudged, match="no relation"):
        ShapesJudge("relation")(image, ["a red circle"])
    with pytest.raises(ValueError, match=ASPECTS[0]):
        ShapesJudge("beauty")


def test_a_malformed_object_is_not_a_shape():
    image = torch.full((1, 3, 32, 32), 0.1)
    image[0, 0, 10:13, 4:28] = 0.9  # a red stroke
    v = verdicts(image.repeat(3, 1, 1, 1), ["a red square", "a red circle", "a red triangle"])
    assert v["count"].tolist() == v["colour"].tolist() == [1, 1, 1]
    assert v["shape"].tolist() == v["strict"].tolist() == [0, 0, 0]


def test_order_of_the_batch_does_not_matter():
    images, truth = pictures(32, 4)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    whole = verdicts(images, list(map(str, truth)))["graded"]
    assert torch.equal(verdicts(images[order], [str(truth[i]) for i in order])["graded"], whole[order])
