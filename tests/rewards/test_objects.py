"""Judges of objects, text, faces and quality: cases with known answers."""

import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tiny_judges import dino, hf_clip, iresnet

from flowalign.rewards.arcface import TEMPLATE, IResNet, align, similarity_transform
from flowalign.rewards.base import Unjudged
from flowalign.rewards.detect import Found, TorchvisionDetector, TransformersDetector, iou
from flowalign.rewards.dino import DinoSimilarity
from flowalign.rewards.discriminator import Discriminator
from flowalign.rewards.face import FaceIdentity
from flowalign.rewards.geneval import COLOURS, ClipColour, GenEval, relations
from flowalign.rewards.ocr import OCR, RapidReader, quoted, similarity
from flowalign.rewards.quality import LPIPS, PSNR, SSIM, ClipIqa, FullReference, Plugin, Smoothness, pyiqa
from flowalign.rewards.spatial import Spatial, axis_angle
from flowalign.rewards.towers import HFTower

torch.set_num_threads(1)


class Scripted:
    """A detector that returns what it is told, one list per picture in turn."""

    labels = ("cat", "dog", "bar")

    def __init__(self, *pictures):
        self.pictures = list(pictures)

    def __call__(self, media):
        return [self.pictures.pop(0) for _ in media]


def at(label, x, y, size=20.0, score=0.95, mask=None):
    return Found(label, score, (x - size / 2, y - size / 2, x + size / 2, y + size / 2), mask)


X = torch.zeros(1, 3, 100, 100)


# ---- GenEval --------------------------------------------------------------------------------------------------------


def judge(objects, rules, mode="strict", colours=None):
    names = (lambda picture, found, name: colours[: len(found)]) if colours else None
    return GenEval(Scripted(objects), names, mode)(X, ["p"], [rules]).item()


def cat(count=1, **more):
    return {"class": "cat", "count": count, **more}


STRICT = {
    "one is there": ([at("cat", 50, 50)], {"include": [cat()]}, 1),
    "none is there": ([at("dog", 50, 50)], {"include": [cat()]}, 0),
    "too few": ([at("cat", 20, 20)], {"include": [cat(2)]}, 0),
    "more than asked is fine without exclude": ([at("cat", i, 20) for i in (20, 50, 80)], {"include": [cat(2)]}, 1),
    "exclude forbids a third": (
        [at("cat", i, 20) for i in (20, 50, 80)],
        {"include": [cat(2)], "exclude": [cat(3)]},
        0,
    ),
    "faint objects do not count": ([at("cat", 50, 50, score=0.29)], {"include": [cat()]}, 0),
    "counting wants confidence of .9": ([at("cat", 50, 50, score=0.85)], {"include": [cat()], "tag": "counting"}, 0),
    "left of": (
        [at("cat", 20, 50), at("dog", 80, 50)],
        {"include": [{"class": "dog", "count": 1}, cat(position=["left of", 0])]},
        1,
    ),
    "not right of": (
        [at("cat", 20, 50), at("dog", 80, 50)],
        {"include": [{"class": "dog", "count": 1}, cat(position=["right of", 0])]},
        0,
    ),
    "no target": ([at("cat", 20, 50)], {"include": [{"class": "dog", "count": 1}, cat(position=["left of", 0])]}, 0),
}


@pytest.mark.parametrize("name", STRICT)
def test_geneval_strict_verdicts(name):
    objects, rules, want = STRICT[name]
    assert judge(objects, rules) == want


def test_geneval_colour_and_partial_credit():
    two = [at("cat", 20, 50), at("cat", 80, 50, score=0.9)]
    rules = {"include": [cat(2, color="red")]}
    assert judge(two, rules, colours=["red", "red"]) == 1
    assert judge(two, rules, colours=["red", "blue"]) == 0
    assert judge(two, rules, "partial", ["red", "blue"]) == pytest.approx((1 + 0.5) / 2)
    assert judge(two[:1], rules, "partial", ["red"]) == pytest.approx((0.5 + 0) / 2)
    assert judge([*two, at("cat", 50, 20)], {"include": [cat(2)]}, "partial") == pytest.approx(0.5)
    assert judge([at("cat", i, 9) for i in range(10, 90, 10)], {"include": [cat(2)]}, "partial") == 0  # never below


def test_geneval_relation_follows_the_published_rule():
    """Offset shrunk by .1 of the summed sizes, then compared with half the offset's own length."""
    b = at("dog", 50, 50)
    for dx, dy in [
        (30, 0),
        (-30, 0),
        (0, 30),
        (30, 28),
        (3, 0),
        (30, 12),
        (-20, 21),
        (-15, 35),
        (15, 35),
        (35, -15),
        (-30, 15),
    ]:
        a = at("cat", 50 + dx, 50 + dy)
        rest = np.maximum(np.abs([dx, dy]) - 0.1 * 40, 0) * np.sign([dx, dy])
        want = set()
        if np.abs(rest).max() > 1e-3:
            ux, uy = rest / np.hypot(dx, dy)
            want |= {"left of"} if ux < -0.5 else set()
            want |= {"right of"} if ux > 0.5 else set()
            want |= {"above"} if uy < -0.5 else set()
            want |= {"below"} if uy > 0.5 else set()
        assert relations(a, b) == want, (dx, dy)


BAD_RULES = {
    "class": ([{"class": "cta", "count": 1}], "no class 'cta'; nearest: cat"),
    "count": ([{"class": "cat", "count": 0}], "count of at least 1"),
    "colour": ([{"class": "cat", "count": 1, "color": "mauve"}], "colour must be one of"),
    "index": ([{"class": "cat", "count": 1, "position": ["above", 0]}], "index of an earlier rule"),
    "empty": ([], "nothing to judge"),
}


@pytest.mark.parametrize("name", BAD_RULES)
def test_geneval_refuses_rules_that_could_never_hold(name):
    include, message = BAD_RULES[name]
    with pytest.raises(ValueError, match=message):
        GenEval(Scripted([]))(X, ["p"], [{"include": include}])
    with pytest.raises(ValueError, match="include"):
        GenEval(Scripted([]))(X, ["p"])


def test_geneval_names_colours_by_zero_shot_clip(tmp_path):
    tower = HFTower.load(hf_clip(tmp_path / "c"))
    namer = ClipColour(tower)
    x = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[10:30, 12:40] = True
    objects = [Found("cat", 0.9, (12.2, 9.8, 39.6, 30.4), mask), Found("cat", 0.9, (0.0, 0.0, 64.0, 64.0))]
    got = namer(x, objects, "cat")
    grey = torch.where(mask, x, torch.tensor(0.6))[:, 10:30, 12:40]
    forms = [f"a photo of a {c}{end}" for c in COLOURS for end in (" cat", "-colored cat", " object")]
    texts = tower.text(forms)
    for crop, name in ((grey, got[0]), (x, got[1])):
        logits = [(tower.image(crop[None]) @ F.normalize(texts[3 * i : 3 * i + 3].mean(0), dim=0)) for i in range(10)]
        assert COLOURS[int(torch.cat(logits).argmax())] == name


def test_torchvision_detector_runs_its_published_layout(tmp_path):
    from torchvision.models import get_model

    torch.manual_seed(0)
    name = "ssdlite320_mobilenet_v3_large"
    model = get_model(name, weights=None, weights_backbone=None, num_classes=91)
    torch.save(model.state_dict(), tmp_path / f"{name}.pth")
    detector = TorchvisionDetector(name, tmp_path)
    assert len(detector.labels) == 91 and "cat" in detector.labels
    found = detector.train()(torch.rand(2, 3, 64, 64))
    want = model.eval()(list(torch.rand(2, 3, 64, 64)))
    assert len(found) == len(want) == 2
    for objects in found:
        assert [f.score for f in objects] == sorted((f.score for f in objects), reverse=True)


def test_weights_out_of_reach_are_explained(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r"no route to host.*Download https://.*pass its path"):
        TorchvisionDetector("ssdlite320_mobilenet_v3_large")


def test_transformers_detector_runs_its_published_layout(tmp_path):
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[32, 32],
        patch_size=8,
        num_detection_tokens=4,
        id2label={0: "cat", 1: "dog"},
        label2id={"cat": 0, "dog": 1},
    )
    model = YolosForObjectDetection(config)
    model.save_pretrained(tmp_path)
    YolosImageProcessor(size={"height": 32, "width": 32}, do_pad=False).save_pretrained(tmp_path)
    detector = TransformersDetector(tmp_path, floor=0.0)
    found = detector(torch.rand(2, 3, 40, 60))
    assert detector.labels == ("cat", "dog") and len(found) == 2 and all(len(o) > 0 for o in found)
    for f in found[0]:  # boxes are in pixels of the 40×60 picture
        assert -60 <= f.box[0] <= f.box[2] <= 120 and f.label in detector.labels


def test_iou():
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0 and iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0


# ---- OCR ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "target", "want"),
    [
        ("hello world", "Hello World", 1.0),
        ("xxhelloworldyy", "hello world", 1.0),
        ("", "abcd", 0.0),
        ("abcx", "abcd", 0.75),
        ("zzzzzzzzzzzz", "abcd", 0.0),
        ("ABC\nD", "abcd", 1.0),
    ],
)
def test_ocr_similarity(read, target, want):
    assert similarity(read, target) == pytest.approx(want)


def test_ocr_target_is_the_quoted_text_or_metas():
    assert quoted('a sign "OPEN" and "SHUT"') == "OPEN" and quoted("a “curly” one") == "curly"
    assert quoted("no quotes") is None and quoted('an empty ""') is None
    seen = []
    reward = OCR(lambda picture: seen.append(tuple(picture.shape)) or "open")
    x = torch.rand(3, 3, 8, 12)
    prompts = ['says "open"', 'says "shut"', "says nothing"]
    got = reward(x, prompts, [{}, {"text": "open"}, {"text": "opel"}])
    assert got.tolist() == pytest.approx([1.0, 1.0, 0.75]) and seen[0] == (8, 12, 3)
    with pytest.raises(Unjudged, match="sample 2: prompt 'says nothing' quotes no text") as error:
        reward(x, prompts)
    assert list(error.value.reasons) == [2] and error.value.scores[0] == 1 and error.value.scores[2].isnan()


def test_ocr_reads_a_real_picture_with_rapidocr():
    """The reader's own networks, which come inside its package."""
    image = Image.new("RGB", (240, 64), "white")
    ImageDraw.Draw(image).text((12, 8), "Hello 42", fill=(200, 0, 0), font=ImageFont.load_default(38))
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    reward = OCR()
    assert reward(x, ['a sign "hello 42"']).item() == 1


def test_rapidocr_is_given_blue_first():
    reader = RapidReader.__new__(RapidReader)
    seen = []
    reader.engine = lambda picture: seen.append(picture) or types.SimpleNamespace(txts=("a", "b"))
    red = torch.zeros(4, 6, 3, dtype=torch.uint8)
    red[..., 0] = 255
    assert reader(red) == "ab" and seen[0].shape == (4, 6, 3)
    assert (seen[0][..., 2] == 255).all() and (seen[0][..., :2] == 0).all()


# ---- Spatial --------------------------------------------------------------------------------------------------------


def edit(old, new, **edit):
    meta = [{"source": X[0], "edit": {"object": "cat", **edit}}]
    return Spatial(Scripted([old] if old else [], [new] if new else []))(X, ["p"], meta).item()


def test_spatial_moves():
    move = dict(kind="move", direction="right", amount=0.3)
    assert edit(at("cat", 30, 50), at("cat", 60, 50), **move) == pytest.approx(1)
    assert edit(at("cat", 30, 50), at("cat", 45, 50), **move) == pytest.approx(0.5)
    assert edit(at("cat", 30, 50), at("cat", 30, 50), **move) == 0
    assert edit(at("cat", 30, 50), at("cat", 10, 50), **move) == 0
    assert edit(at("cat", 30, 50), at("cat", 60, 60), **move) == pytest.approx(math.exp(-0.1 / 0.25))
    assert edit(at("cat", 30, 50), at("cat", 60, 50, 40), **move) == pytest.approx(math.exp(-math.log(2) / 0.25))
    assert edit(at("cat", 30, 50), at("dog", 60, 50), **move) == 0  # the edit lost the cat
    assert edit(at("cat", 50, 60), at("cat", 50, 30), kind="move", direction="up", amount=0.3) == pytest.approx(1)


def test_spatial_sizes():
    grow = dict(kind="resize", factor=2.0)
    assert edit(at("cat", 50, 50, 10), at("cat", 50, 50, 20), **grow) == pytest.approx(1)
    half = edit(at("cat", 50, 50, 10), at("cat", 50, 50, 14), **grow)
    assert 0 < half < 0.5 and half > edit(at("cat", 50, 50, 10), at("cat", 50, 50, 10), **grow)


def bar(degrees, size=101):
    y, x = torch.meshgrid(*[torch.arange(size) - size // 2.0] * 2, indexing="ij")
    a = math.radians(degrees)
    along, across = x * math.cos(a) + y * math.sin(a), -x * math.sin(a) + y * math.cos(a)
    return (along.abs() < 35) & (across.abs() < 6)


def test_spatial_rotations():
    for angle in (0, 30, 90, 150):
        assert abs((axis_angle(bar(angle)) - angle + 90) % 180 - 90) < 1
    turn = dict(kind="rotate", degrees=60)
    old = at("cat", 50, 50, mask=bar(10))
    assert edit(old, at("cat", 50, 50, mask=bar(70)), **turn) > 0.95
    assert edit(old, at("cat", 50, 50, mask=bar(10)), **turn) < 0.1
    with pytest.raises(Unjudged, match="detector with masks"):
        edit(old, at("cat", 50, 50), **turn)
    with pytest.raises(Unjudged, match="long as it is wide"):
        edit(old, at("cat", 50, 50, mask=torch.ones(20, 20, dtype=torch.bool)), **turn)


def test_spatial_refuses_what_cannot_be_judged():
    move = dict(kind="move", direction="right", amount=0.3)
    with pytest.raises(Unjudged, match="before the edit"):
        edit(None, at("cat", 60, 50), **move)
    for bad in (dict(kind="move", direction="north", amount=1), dict(kind="resize", factor=-1), dict(kind="turn")):
        with pytest.raises(ValueError, match="wanted kind"):
            edit(at("cat", 1, 1), None, **bad)


# ---- faces ----------------------------------------------------------------------------------------------------------


def test_similarity_transform_recovers_a_known_one():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(4, 5, 2, generator=g).double()
    a, b = torch.tensor(1.3 - 0.4j), torch.tensor(0.2 + 2j)
    w = torch.view_as_real(a * torch.view_as_complex(z) + b)
    for i in range(4):
        ai, bi = similarity_transform(z[i : i + 1], w[i])
        assert torch.allclose(torch.stack([ai[0], bi[0]]), torch.stack([a, b]).to(ai), atol=1e-6)


def test_alignment_maps_landmarks_onto_the_template():
    """Bright dots at the landmarks of a turned, scaled face come out at the template's places."""
    template = torch.tensor(TEMPLATE, dtype=torch.float64)
    angle, scale, shift = 0.4, 1.5, torch.tensor([40.0, 10.0])
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    points = scale * template @ turn.T + shift
    y, x = torch.meshgrid(torch.arange(260.0), torch.arange(240.0), indexing="ij")
    blobs = sum(torch.exp(-((x - px) ** 2 + (y - py) ** 2) / 8) for px, py in points.tolist())
    face = align(blobs.clamp(0, 1).expand(1, 3, -1, -1), points.unsqueeze(0).float())
    assert face.shape == (1, 3, 112, 112)
    for px, py in TEMPLATE:
        patch = face[0, 0, int(py) - 4 : int(py) + 6, int(px) - 4 : int(px) + 6]
        yy, xx = torch.meshgrid(torch.arange(10.0), torch.arange(10.0), indexing="ij")
        cx, cy = ((patch * v).sum() / patch.sum() for v in (xx, yy))
        assert abs(int(px) - 4 + cx - px) < 0.4 and abs(int(py) - 4 + cy - py) < 0.4
    x = torch.rand(1, 3, 12, 12, dtype=torch.float64, requires_grad=True)
    few = template.unsqueeze(0) / 10
    assert torch.autograd.gradcheck(lambda v: align(v, few)[..., ::28, ::28], (x,))


def test_iresnet_equals_its_layout_by_hand(tmp_path):
    path = iresnet(tmp_path / "backbone.pth")
    state = torch.load(path, weights_only=True)
    net = IResNet(tmp_path).train()
    x = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))

    def bn(h, n):
        return F.batch_norm(h, *(state[f"{n}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")))

    h = F.conv2d((x - 0.5) / 0.5, state["conv1.weight"], padding=1)
    h = F.prelu(bn(h, "bn1"), state["prelu.weight"])
    for i, depth in enumerate((1, 2, 1, 1), 1):
        for j in range(depth):
            n, stride = f"layer{i}.{j}", 2 if j == 0 else 1
            y = F.conv2d(bn(h, f"{n}.bn1"), state[f"{n}.conv1.weight"], padding=1)
            y = F.prelu(bn(y, f"{n}.bn2"), state[f"{n}.prelu.weight"])
            y = bn(F.conv2d(y, state[f"{n}.conv2.weight"], stride=stride, padding=1), f"{n}.bn3")
            if j == 0:
                h = bn(F.conv2d(h, state[f"{n}.downsample.0.weight"], stride=2), f"{n}.downsample.1")
            h = y + h
    h = bn(h, "bn2").flatten(1) @ state["fc.weight"].T + state["fc.bias"]
    assert torch.allclose(net(x), F.normalize(bn(h, "features")), atol=1e-5)


class Colour(torch.nn.Module):
    """A face network whose feature is the mean colour: answers known by eye."""

    def forward(self, faces):
        return F.normalize(faces.mean((-1, -2)), dim=-1)


def test_face_identity_pools_and_leaves_out_frames_without_a_face():
    red, green = torch.eye(3)[0], torch.eye(3)[1]
    video = torch.zeros(1, 3, 3, 120, 120)
    video[0, 0, 0], video[0, 1, 1], video[0, 2, 2] = 1, 1, 1  # a red, a green and a blue frame
    points = torch.tensor(TEMPLATE).expand(3, 5, 2).clone()
    points[2] = torch.nan  # no face in the blue one
    meta = [{"landmarks": points}]
    pool = torch.stack([red, green])
    assert FaceIdentity(Colour(), pool)(video, [""], meta).item() == pytest.approx(1)
    assert FaceIdentity(Colour(), pool, "mean")(video, [""], meta).item() == pytest.approx(0.5)
    assert FaceIdentity(Colour(), red[None])(video, [""], meta).item() == pytest.approx(0.5)
    own = FaceIdentity(Colour())(video, [""], [{**meta[0], "identity": green[None]}])
    assert own.item() == pytest.approx(0.5)


def test_face_without_a_face_is_unjudged_not_zero():
    x = torch.rand(2, 3, 120, 120)
    points = torch.tensor(TEMPLATE).expand(2, 5, 2).clone()
    points[1] = torch.nan
    reward = FaceIdentity(Colour(), torch.eye(3)[:1])
    with pytest.raises(Unjudged, match="sample 1: no face") as error:
        reward(x, ["", ""], [{"landmarks": p} for p in points])
    assert error.value.scores[0] > 0 and error.value.scores[1].isnan()
    finder = FaceIdentity(Colour(), torch.eye(3)[:1], landmarks=lambda frames: points[:1].expand(len(frames), 5, 2))
    assert torch.allclose(finder(x, ["", ""])[:1], error.value.scores[:1])
    assert reward.enrol(x, points).shape == (1, 3)
    with pytest.raises(ValueError, match="no face in any"):
        reward.enrol(x[1:], points[1:])
    with pytest.raises(ValueError, match="landmarks"):
        reward(x, ["", ""])
    with pytest.raises(ValueError, match="ArcFace checkpoint of yours"):
        FaceIdentity()


# ---- DINO -----------------------------------------------------------------------------------------------------------


def test_dino_similarity_by_hand(tmp_path):
    from transformers import AutoModel

    from flowalign.rewards.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess

    path = dino(tmp_path)
    g = torch.Generator().manual_seed(0)
    x, refs = torch.rand(2, 3, 40, 30, generator=g), torch.rand(3, 3, 28, 28, generator=g)
    model, fit = AutoModel.from_pretrained(path), Preprocess(28, "squash", IMAGENET_MEAN, IMAGENET_STD)
    with torch.no_grad():
        a, b = (F.normalize(model(fit(v)).last_hidden_state[:, 0], dim=-1) for v in (x, refs))
    assert torch.allclose(DinoSimilarity(path, refs, size=28)(x, ["", ""]), (a @ b.T).amax(1), atol=1e-5)
    assert torch.allclose(DinoSimilarity(path, refs, "mean", size=28)(x, ["", ""]), (a @ b.T).mean(1), atol=1e-5)
    own = DinoSimilarity(path, size=28)(x, ["", ""], [{"reference": refs[0]}, {"reference": refs[1:]}])
    assert torch.allclose(own, torch.stack([(a @ b.T)[0, 0], (a @ b.T)[1, 1:].amax()]), atol=1e-5)
    with pytest.raises(ValueError, match="multiple of the model's patch"):
        DinoSimilarity(path, size=30)


def test_discriminator_scores_by_its_formula_and_learns_to_tell(tmp_path):
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    d = Discriminator(dino(tmp_path), hidden=16, size=28, patches=2)
    real, fake = torch.rand(8, 3, 28, 28, generator=g) * 0.3, 0.7 + 0.3 * torch.rand(8, 3, 28, 28, generator=g)
    tokens = d.dino(real)
    logits = d.head(tokens).squeeze(-1)
    assert torch.allclose(d(real, [""] * 8), 0.7 * logits[:, 0] + 0.3 * logits[:, 1:].mean(1), atol=1e-6)
    full = Discriminator(tmp_path, hidden=16, size=28, patches=None)
    full.load_state_dict(d.state_dict())
    other = d.head(d.dino(fake)).squeeze(-1)
    want = 0.5 * ((1 - logits[:, 0]).relu().mean() + (1 + other[:, 0]).relu().mean()) + 0.5 * 0.3 * (
        (1 - logits[:, 1:]).relu().mean() + (1 + other[:, 1:]).relu().mean()
    )
    assert torch.allclose(full.loss(real, fake), want, atol=1e-6)
    same = [d.loss(real, fake, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(same[0], same[1])
    optimiser = torch.optim.Adam(d.head.parameters(), 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        d.loss(real, fake, g).backward()
        optimiser.step()
    new_real, new_fake = torch.rand(8, 3, 28, 28, generator=g) * 0.3, 0.7 + 0.3 * torch.rand(8, 3, 28, 28, generator=g)
    assert d(new_real, [""] * 8).min() > d(new_fake, [""] * 8).max()


# ---- quality --------------------------------------------------------------------------------------------------------


def test_full_reference_metrics():
    from torchmetrics.functional.image import (
        multiscale_structural_similarity_index_measure,
        peak_signal_noise_ratio,
        structural_similarity_index_measure,
    )

    g = torch.Generator().manual_seed(0)
    y = torch.rand(2, 3, 176, 176, generator=g)
    x = (y + torch.tensor([0.02, 0.2]).view(2, 1, 1, 1) * torch.randn(y.shape, generator=g)).clamp(0, 1)
    meta = [{"reference": v} for v in y]
    for i in range(2):
        one = (x[i : i + 1], y[i : i + 1])
        for name, function in (
            ("psnr", peak_signal_noise_ratio),
            ("ssim", structural_similarity_index_measure),
            ("ms-ssim", multiscale_structural_similarity_index_measure),
        ):
            got = FullReference(name)(x, ["", ""], meta)[i]
            assert got.item() == pytest.approx(function(*one, data_range=1.0).item(), abs=1e-4), name
    for name in ("psnr", "ssim", "ms-ssim", "vif", "uqi"):
        scores = FullReference(name)(x, ["", ""], meta)
        assert scores[0] > scores[1]
        assert torch.isfinite(FullReference(name)(y, ["", ""], meta)).all()  # an exact copy has no infinite score
    with pytest.raises(ValueError, match="ms-ssim wants at least"):
        FullReference("ms-ssim")(x[..., :64, :64], ["", ""], [{"reference": v[..., :64, :64]} for v in y])
    with pytest.raises(ValueError, match="metric must be one of"):
        FullReference("fid")
    assert torch.equal(PSNR()(x, ["", ""], meta), FullReference("psnr")(x, ["", ""], meta))
    assert torch.equal(SSIM()(x, ["", ""], meta), FullReference("ssim")(x, ["", ""], meta))


def test_lpips_is_negated_and_reads_its_published_backbone(tmp_path, monkeypatch):
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    torch.save(squeezenet1_1().state_dict(), folder / "squeezenet1_1-b8a52dc0.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    y = torch.rand(1, 3, 64, 64)
    noise = torch.randn(y.shape)
    metric = LPIPS(net="squeeze")
    meta = [{"reference": y[0]}]
    scores = [metric((y + s * noise).clamp(0, 1), [""], meta).item() for s in (0.0, 0.05, 0.3)]
    assert scores[0] == pytest.approx(0, abs=1e-6) and scores[0] > scores[1] > scores[2]
    x = (y + 0.1 * noise).clamp(0, 1).requires_grad_()
    metric(x, [""], meta).sum().backward()
    assert x.grad.abs().sum() > 0


def test_clip_iqa_and_smoothness_and_plugins(tmp_path):
    tower = HFTower.load(hf_clip(tmp_path / "c"))
    x = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    t = tower.text(["Good photo.", "Bad photo."])
    logits = 100 * tower.image(x) @ t.T
    assert torch.allclose(ClipIqa(tower)(x, ["", ""]), logits.softmax(-1)[:, 0], atol=1e-6)
    dx, dy = x.diff(dim=-1).abs().flatten(1).sum(1), x.diff(dim=-2).abs().flatten(1).sum(1)
    assert torch.allclose(Smoothness()(x, ["", ""]), -(dx + dy) / 4800, atol=1e-6)
    from flowalign.protocols import Card

    plugin = Plugin(lambda v: v.mean((1, 2, 3)).unsqueeze(1), Card("m", "mean"), lower_is_better=True)
    assert torch.allclose(plugin(x, ["", ""]), -x.mean((1, 2, 3)))


def test_pyiqa_is_a_hook_and_never_a_dependency(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(ImportError, match="Noncommercial"):
        pyiqa("musiq")

    class Metric(torch.nn.Module):
        lower_better = True

        def forward(self, x):
            return x.mean((1, 2, 3))

    fake = types.SimpleNamespace(create_metric=lambda name, as_loss: Metric())
    monkeypatch.setitem(sys.modules, "pyiqa", fake)
    reward = pyiqa("brisque")
    x = torch.rand(2, 3, 8, 8)
    assert torch.allclose(reward(x, ["", ""]), -x.mean((1, 2, 3))) and "not for commercial use" in reward.card.licence
