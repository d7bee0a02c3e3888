"""Preprocessing: the official PIL path to a byte, each wrong variant caught, gradients everywhere."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from PIL import Image

from flowalign.rewards.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocess,
    clamp_through,
    fit_crop,
    fit_pad,
    normalise,
    resize,
    to_bytes,
)

torch.set_num_threads(1)
MEAN_LIMIT, MAX_LIMIT = 2e-3, 0.011
SIZES = [(300, 300), (512, 768), (331, 257), (96, 400), (100, 120)]


def picture(h, w, seed=0):
    """A picture with hard edges, gradients and texture, as bytes."""
    g = np.random.default_rng(seed)
    y, x = np.mgrid[0:h, 0:w] / max(h, w)
    base = np.stack([x, y, 0.5 + 0.5 * np.sin(20 * x + 13 * y)], -1)
    for _ in range(8):
        cy, cx, r = g.random(3) * [h / max(h, w), w / max(h, w), 0.2]
        base[(y - cy) ** 2 + (x - cx) ** 2 < r**2] = g.random(3).round()
    base += g.normal(size=base.shape) * 0.05
    return Image.fromarray((base.clip(0, 1) * 255).round().astype(np.uint8))


def tensor(image):
    return TF.to_tensor(image).unsqueeze(0)


def official_crop(image, size, mean=CLIP_MEAN, std=CLIP_STD):
    """OpenAI's CLIP transform."""
    return T.Compose(
        [
            T.Resize(size, interpolation=T.InterpolationMode.BICUBIC),
            T.CenterCrop(size),
            T.ToTensor(),
            T.Normalize(mean, std),
        ]
    )(image).unsqueeze(0)


def official_pad(image, size):
    """HPS v2's transform: the longest side to ``size``, black around."""
    w, h = image.size
    scale = size / max(h, w)
    new = (round(h * scale), round(w * scale))
    image = TF.resize(image, new, T.InterpolationMode.BICUBIC)
    ph, pw = size - new[0], size - new[1]
    image = TF.pad(image, [pw // 2, ph // 2, pw - pw // 2, ph - ph // 2], fill=0)
    return TF.normalize(TF.to_tensor(image), CLIP_MEAN, CLIP_STD).unsqueeze(0)


def official_squash(image, size):
    """Width, then height: the order of every Pillow before 13, which may choose the cheaper one."""
    image = image.resize((size, image.height), Image.BICUBIC).resize((size, size), Image.BICUBIC)
    return TF.normalize(TF.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD).unsqueeze(0)


def agrees(ours, theirs, std):
    """Whether two network inputs agree in pixels: (mean, max) within the limits, shapes equal."""
    if ours.shape != theirs.shape:
        return False
    gap = ((ours - theirs).abs() * torch.tensor(std).view(-1, 1, 1)).double()
    return bool(gap.mean() < MEAN_LIMIT and gap.max() < MAX_LIMIT)


@pytest.mark.parametrize("size", SIZES)
def test_pixels_equal_the_pil_path(size):
    image = picture(*size)
    x = tensor(image)
    assert agrees(Preprocess(224)(x), official_crop(image, 224), CLIP_STD)
    assert agrees(Preprocess(224, "pad")(x), official_pad(image, 224), CLIP_STD)
    squash = Preprocess(224, "squash", IMAGENET_MEAN, IMAGENET_STD)
    assert agrees(squash(x), official_squash(image, 224), IMAGENET_STD)


def test_transformers_crop_is_the_floor_of_the_margin():
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    for size in [(331, 257), (224, 235), (231, 224)]:
        image = picture(*size)
        theirs = processor(image, return_tensors="pt").pixel_values
        assert agrees(Preprocess(224, centre="floor")(tensor(image)), theirs, CLIP_STD)
    image = picture(224, 235)  # an odd margin of 11: transformers starts at 5, torchvision at 6
    assert not agrees(
        Preprocess(224, centre="round")(tensor(image)), processor(image, return_tensors="pt").pixel_values, CLIP_STD
    )
    assert agrees(Preprocess(224, centre="round")(tensor(image)), official_crop(image, 224), CLIP_STD)


WRONG = {
    "no antialias": lambda x: normalise(fit_plain(x, 224, antialias=False), CLIP_MEAN, CLIP_STD),
    "bilinear": lambda x: normalise(fit_crop(x, 224, "bilinear"), CLIP_MEAN, CLIP_STD),
    "clamp once": lambda x: normalise(fit_plain(x, 224), CLIP_MEAN, CLIP_STD),
    "no clamp": lambda x: normalise(fit_plain(x, 224, clamp=False), CLIP_MEAN, CLIP_STD),
    "other statistics": lambda x: Preprocess(224, "crop", IMAGENET_MEAN, IMAGENET_STD)(x),
    "half statistics": lambda x: Preprocess(224, "crop", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))(x),
    "pad for crop": lambda x: Preprocess(224, "pad")(x),
    "squash for crop": lambda x: Preprocess(224, "squash")(x),
    "BGR": lambda x: Preprocess(224)(x.flip(1)),
    "bytes for unit range": lambda x: normalise(fit_crop(x, 224) * 255, CLIP_MEAN, CLIP_STD),
}


def fit_plain(x, size, antialias=True, clamp=True):
    h, w = x.shape[-2:]
    new = (size, int(size * w / h)) if h <= w else (int(size * h / w), size)
    x = F.interpolate(x, size=new, mode="bicubic", antialias=antialias, align_corners=False)
    x = x.clamp(0, 1) if clamp else x
    top, left = round((new[0] - size) / 2), round((new[1] - size) / 2)
    return x[..., top : top + size, left : left + size]


@pytest.mark.parametrize("name", WRONG)
def test_each_wrong_variant_fails_the_parity_test(name):
    image = picture(512, 768)
    assert not agrees(WRONG[name](tensor(image)), official_crop(image, 224), CLIP_STD)


@pytest.mark.parametrize("name", ["crop", "squash"])
def test_padding_is_told_from_crop_and_squash(name):
    image = picture(384, 768)
    assert agrees(Preprocess(224, "pad")(tensor(image)), official_pad(image, 224), CLIP_STD)
    assert not agrees(Preprocess(224, name)(tensor(image)), official_pad(image, 224), CLIP_STD)


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_gradcheck_through_preprocessing(fit):
    torch.manual_seed(0)
    x = (0.2 + 0.6 * torch.rand(2, 3, 9, 13, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(Preprocess(6, fit), (x,))


def test_straight_through_clamp_keeps_the_gradient_of_out_of_range_pixels():
    x = torch.tensor([-0.5, 0.5, 1.5], requires_grad=True)
    y = clamp_through(x)
    assert y.tolist() == [0.0, 0.5, 1.0]
    y.sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 1.0]
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1  # bicubic overshoots at the edge: the clamped pixels must still move their neighbours
    edge.requires_grad_()
    out = resize(edge, (15, 15))
    assert out.amin() == 0 and out.amax() == 1
    raw = F.interpolate(edge, size=(8, 15), mode="bicubic", antialias=True)
    assert raw.amin() < 0 and raw.amax() > 1  # the clamp is really at work here
    raw = F.interpolate(raw, size=(15, 15), mode="bicubic", antialias=True)
    want = torch.autograd.grad(raw.sum(), edge)[0]
    assert torch.allclose(torch.autograd.grad(out.sum(), edge)[0], want)


def test_half_precision_is_left_before_resizing_and_double_is_kept():
    x = torch.rand(1, 3, 20, 20)
    assert Preprocess(8)(x.bfloat16()).dtype == torch.float32
    assert Preprocess(8)(x.double()).dtype == torch.float64
    same = Preprocess(20, "squash", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))(x)
    assert torch.equal(same, x)


def test_padding_adds_black_and_nothing_else():
    x = torch.rand(1, 3, 10, 20)
    y = fit_pad(x, 20)
    assert y.shape == (1, 3, 20, 20)
    assert torch.equal(y[..., 5:15, :], x) and y[..., :5, :].abs().sum() == 0 and y[..., 15:, :].abs().sum() == 0


def test_bytes_round_to_the_nearest():
    assert to_bytes(torch.tensor([0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 1.2])).tolist() == [0, 0, 1, 255, 255]


@pytest.mark.parametrize("bad", [dict(size=0), dict(fit="stretch"), dict(std=(0.1, 0.0, 0.1))])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError, match="wanted size"):
        Preprocess(**bad)
