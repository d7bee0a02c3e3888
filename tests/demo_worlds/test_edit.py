import math

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from flowalign.loading import load
from flowalign.methods.best_of_n import BestOfN
from flowalign.pipelines.worlds import edit
from flowalign.pipelines.worlds.canvas import BACKGROUND, COLOURS, SHAPES, Scene, coverage, render
from flowalign.pipelines.worlds.parts import as_control, token_ids
from flowalign.rewards import blobs
from flowalign.rewards.shapes_edit import OPERATIONS, ShapesEdit, categories, parse
from flowalign.source import Prompt
from flowalign.steer import steer

torch.set_num_threads(1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def drawn():
    return edit.draw(generator(1), 600)


def single(shape, x=16.0, y=16.0, r=4.0, angle=0.0, colour=0):
    values = [torch.tensor([[v]]) for v in (shape, colour, x, y, r, angle)]
    return Scene(*values, torch.ones(1, 1, dtype=torch.bool))


AREAS = (math.pi, 1.8**2, 3 * math.sqrt(3) * 0.725**2, 2.8 * 1.1)  # over r²


@pytest.mark.parametrize("shape", range(4))
def test_coverage_has_the_area_and_the_centre_of_the_shape(shape):
    for angle in (0.0, 0.4):
        cover = coverage(single(shape, 15.3, 16.9, 5.0, angle))[0, 0]
        assert float(cover.sum()) == pytest.approx(25 * AREAS[shape], rel=0.04)
        axis = torch.arange(32) + 0.5
        assert float((cover.sum(0) * axis).sum() / cover.sum()) == pytest.approx(15.3, abs=0.1)
        assert float((cover.sum(1) * axis).sum() / cover.sum()) == pytest.approx(16.9, abs=0.1)


def test_turning_is_clockwise_on_the_screen():
    bar = single(SHAPES.index("bar"), angle=math.pi / 4)  # long axis from upper left to lower right
    cover = coverage(bar)[0, 0]
    assert cover[12, 12] > 0.9
    assert cover[19, 19] > 0.9
    assert cover[12, 19] == 0


def test_drawing_is_seeded_and_scenes_have_room(drawn):
    again = edit.draw(generator(1), 600)
    assert torch.equal(again.source, drawn.source)
    assert torch.equal(again.target, drawn.target)
    assert again.prompts == drawn.prompts
    assert not torch.equal(edit.draw(generator(2), 8).source, drawn.source[:8])
    assert drawn.before.apart().all()
    assert drawn.after.apart().all()
    assert drawn.source.min() == pytest.approx(BACKGROUND)
    counts = torch.bincount(drawn.edit, minlength=8)
    assert counts.min() > 45  # no edit is rarer for needing room: 600 / 8 = 75 but for the circles' turns


@pytest.mark.parametrize("amounts", [edit.FIXED, edit.SPREAD])
def test_edits_do_what_the_words_say(amounts):
    drawn = edit.draw(generator(1), 600, amounts=amounts)
    b, a, e = drawn.before, drawn.after, drawn.edit
    dx, dy = (a.x - b.x)[:, 0], (a.y - b.y)[:, 0]
    da, k = (a.angle - b.angle)[:, 0] * 180 / math.pi, (a.r / b.r)[:, 0]
    (low, high), turns, ratios = amounts
    for op, value in ((0, -dx), (1, dx), (2, -dy), (3, dy)):
        assert ((value[e == op] >= low - 1e-4) & (value[e == op] <= high + 1e-4)).all()
    for op, value, (low, high) in ((4, da, turns), (5, -da, turns), (6, k, ratios), (7, 1 / k, ratios)):
        assert ((value[e == op] >= low - 1e-2) & (value[e == op] <= high + 1e-2)).all()
    rest = (a.x - b.x)[:, 1:].abs() + (a.y - b.y)[:, 1:].abs() + (a.r - b.r)[:, 1:].abs()
    assert rest.max() == 0
    for i, prompt in enumerate(drawn.prompts[:100]):
        op, colour, shape = parse(prompt)
        assert (op, colour, shape) == (int(e[i]), int(b.colour[i, 0]), int(b.shape[i, 0]))
        assert OPERATIONS[op] == list(edit.EDITS)[op]
        assert int((b.colour[i][b.here[i]] == colour).sum()) == 1  # the name is unambiguous


def test_splits_are_apart_and_cover_every_pair():
    parts = {s: set(edit.compositions(s)) for s in ("base", "train", "select", "report", "withheld")}
    assert not parts["base"] & parts["withheld"]
    assert parts["train"] | parts["select"] | parts["report"] == parts["base"]
    assert sum(len(parts[s]) for s in ("train", "select", "report")) == len(parts["base"])
    assert len(parts["base"] | parts["withheld"]) == 8 * 6 * 4 - 2 * 6  # circles cannot be turned
    everything = parts["base"] | parts["withheld"]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert {(x[i], x[j]) for x in parts["train"]} == {(x[i], x[j]) for x in everything}
    batch = edit.draw(generator(3), 60, "withheld")
    assert {parse(p) for p in batch.prompts} <= parts["withheld"]
    with pytest.raises(ValueError, match="split must be one of"):
        edit.compositions("test")


def strict(images, prompts, meta):
    return float(ShapesEdit()(images, prompts, meta).mean())


def test_the_judge_is_exact_on_drawn_edits(drawn):
    meta = drawn.meta()
    assert strict(drawn.target, drawn.prompts, meta) >= 0.996
    noisy = (drawn.target + 0.05 * torch.randn(drawn.target.shape, generator=generator())).clamp(0, 1)
    assert strict(noisy, drawn.prompts, meta) >= 0.99
    tinted = (drawn.target * (0.85 + 0.3 * torch.rand(len(drawn.prompts), 3, 1, 1, generator=generator()))).clamp(0, 1)
    assert strict(tinted, drawn.prompts, meta) >= 0.99


def test_the_judge_refuses_every_wrong_edit(drawn):
    meta, n = drawn.meta(), len(drawn.prompts)
    colour, shape = drawn.before.colour, drawn.before.shape
    assert strict(drawn.source, drawn.prompts, meta) == 0  # nothing done
    partner = (1, 0, 3, 2, 5, 4, 7, 6)
    opposite = [
        edit.instruction(partner[e], int(colour[i, 0]), int(shape[i, 0])) for i, e in enumerate(drawn.edit.tolist())
    ]
    assert strict(drawn.target, opposite, meta) == 0
    other = [edit.instruction(e, int(colour[i, 1]), int(shape[i, 1])) for i, e in enumerate(drawn.edit.tolist())]
    assert strict(drawn.target, other, meta) == 0  # the right edit of the wrong object
    one = torch.ones(n, dtype=torch.long)
    pushed = drawn.after.with_object(one, x=drawn.after.x[:, 1] + 3)
    assert strict(render(pushed), drawn.prompts, meta) < 0.01  # another object moved as well
    swapped = drawn.after.with_object(one * 0, shape=(shape[:, 0] + 1) % 4)
    assert strict(render(swapped), drawn.prompts, meta) < 0.01  # the object became another shape
    gone = drawn.after.with_object(one, here=torch.zeros(n, dtype=torch.bool))
    assert strict(render(gone), drawn.prompts, meta) == 0
    used = torch.zeros(n, 6).scatter(1, colour, 1.0)
    extra = drawn.target.clone()
    new = torch.tensor(list(COLOURS.values()))[used.argmin(1)]
    extra[:, :, :4, :4] = new[:, :, None, None]
    assert strict(extra, drawn.prompts, meta) < 0.05  # something new appeared


def test_the_graded_verdict_rises_with_the_edit():
    before = edit.scenes(generator(4), 1, "base")[0]
    before = before.with_object(
        torch.tensor([0]), x=torch.tensor([8.0]), y=torch.tensor([16.0]), shape=torch.tensor([0])
    )
    before.here[:, 1:] = False
    source, prompt = render(before), edit.instruction(1, int(before.colour[0, 0]), 0)
    scores = []
    for dx in (-3.0, 0.0, 1.0, 2.0, 3.0, 5.0):
        moved = before.with_object(torch.tensor([0]), x=torch.tensor([8.0 + dx]))
        scores.append(float(ShapesEdit("graded")(render(moved), [prompt], [{"image": source[0]}])))
    assert scores[0] == pytest.approx(scores[1], abs=0.01)
    assert scores[1:5] == sorted(scores[1:5])
    assert scores[1] == pytest.approx(0.5, abs=0.01)
    assert scores[5] == pytest.approx(1.0, abs=0.02)


def test_turns_come_in_their_share_and_as_often_as_they_would_besides():
    counts = edit.scenes(generator(3), 4000, "base", turns=0.3)[2].bincount(minlength=8)
    plain = edit.scenes(generator(3), 4000, "base")[2].bincount(minlength=8)
    usual = plain[4:6].sum() / 4000
    assert float(counts[4:6].sum() / 4000) == pytest.approx(float(0.3 + 0.7 * usual), abs=4 * 0.5 / 4000**0.5)
    assert 0.1 < usual < 0.3


def test_turns_and_areas_are_measured(drawn):
    before, after = blobs.measure(drawn.source), blobs.measure(drawn.target)
    named = drawn.before.colour[:, :1]
    shape = blobs.shape_of(before)
    assert (shape.gather(1, named)[:, 0] == drawn.before.shape[:, 0]).float().mean() > 0.998
    turn = blobs.turned(before, after, shape).gather(1, named)[:, 0]
    true = (drawn.after.angle - drawn.before.angle)[:, 0] * 180 / math.pi
    rows = (drawn.edit // 2 == 2) & (drawn.before.shape[:, 0] != 1)  # squares: 40° is -50° too
    assert (turn - true)[rows].abs().mean() < 1.5
    square = (drawn.edit // 2 == 2) & (drawn.before.shape[:, 0] == 1)
    gap = (turn - true)[square]
    assert (gap - 90 * (gap / 90).round()).abs().mean() < 1.5


def test_the_judge_refuses_what_it_cannot_read(drawn):
    image, meta = drawn.target[:1], drawn.meta()[:1]
    for words in ("move the red circle", "turn the red circle left", "make the pink square bigger", ""):
        with pytest.raises(ValueError, match="not an instruction"):
            ShapesEdit()(image, [words], meta)
    with pytest.raises(ValueError, match="image"):
        ShapesEdit()(image, drawn.prompts[:1], None)
    with pytest.raises(ValueError, match="source picture"):
        ShapesEdit()(image, drawn.prompts[:1], [{"image": torch.zeros(3, 16, 16)}])
    with pytest.raises(ValueError, match="strict"):
        ShapesEdit("soft")
    assert categories(["move the red circle left", "turn the red bar clockwise", "make the red bar smaller"]) == [
        "move", "turn", "resize",
    ]  # fmt: skip


def test_training_sees_what_the_pipeline_computes(drawn):
    """Every input of the loss equals, tensor by tensor, what the pipeline hands its transformer, picture and all."""
    torch.manual_seed(0)
    pipe = edit.build()
    pipe.set_progress_bar_config(disable=True)
    edit.set_scale(pipe, generator())
    torch.nn.init.normal_(pipe.transformer.proj_out.weight)
    seen, out = [], []
    pipe.transformer.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)
    pipe.transformer.register_forward_hook(lambda m, a, y: out.append(y[0]))
    two = edit.EditBatch(
        drawn.source[:2], drawn.target[:2], drawn.prompts[:2], drawn.edit[:2], drawn.before, drawn.after
    )
    with torch.no_grad():
        edit.sample(pipe, two, steps=1)
        ids = token_ids(pipe.tokenizer, two.prompts, torch.device("cpu"))
        x0, control = edit.latents(pipe.vae, two.target), edit.latents(pipe.vae, two.source)
        loss = edit.flow_loss(pipe, x0, control, ids, generator())
        noise = torch.randn(x0.shape, generator=generator())
    ours, theirs = seen[1], seen[0]
    for key in ("encoder_hidden_states", "pooled_projections", "txt_ids", "img_ids"):
        torch.testing.assert_close(ours[key], theirs[key])
    c = x0.shape[2]
    assert torch.equal(theirs["hidden_states"][..., :c], noise)  # time 1: noise alone, the same as sample's
    torch.testing.assert_close(theirs["hidden_states"][..., c:], control, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours["hidden_states"][..., c:], control)
    assert theirs["timestep"].tolist() == [1, 1]
    assert ((ours["timestep"] > 0) & (ours["timestep"] < 1)).all()
    assert float(loss) == pytest.approx(float((out[1] - (noise - x0)).square().mean()), rel=1e-5)
    assert float(x0.std()) == pytest.approx(1, abs=0.2)
    assert (ids != 2).all()  # no unknown word
    assert [pipe.tokenizer.decode(x, skip_special_tokens=True) for x in ids] == two.prompts  # and none is cut off
    assert sum(p.numel() for p in pipe.transformer.parameters()) < 1.6e6


def test_a_picture_means_the_same_as_tensor_and_as_file(drawn):
    """The pipeline scales PIL pictures to [-1, 1] and leaves tensors alone."""
    pipe = edit.build()
    file = to_pil_image(drawn.source[0])
    arguments = (32, 32, 1, 1, torch.device("cpu"), torch.float32)
    theirs = pipe.prepare_image(file, *arguments)
    ours = pipe.prepare_image(as_control(drawn.source[:1]), *arguments)
    torch.testing.assert_close(ours, theirs, atol=1 / 127, rtol=0)


def test_a_prompt_with_its_meta_reaches_the_network_as_in_training(drawn):
    """Through flowalign's own door: ``load``, and rows of a prompt with the batch's meta."""
    pipe = edit.build()
    edit.set_scale(pipe, generator())
    two = edit.EditBatch(
        drawn.source[:2], drawn.target[:2], drawn.prompts[:2], drawn.edit[:2], drawn.before, drawn.after
    )
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)
    steer(
        load(pipe, {"height": 32, "width": 32, "max_sequence_length": 8}), BestOfN(n=1), ShapesEdit("graded"),
        [Prompt(p, m) for p, m in zip(two.prompts, two.meta(), strict=True)], steps=1,
    )  # fmt: skip
    with torch.no_grad():
        control = edit.latents(pipe.vae, two.source)
    torch.testing.assert_close(seen[-1]["hidden_states"][..., control.shape[2] :], control, atol=1e-4, rtol=0)
