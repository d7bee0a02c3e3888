"""What every judge promises, whichever it is: shapes, pairing, precision, gradients, refusals."""

import pytest
import torch
from tiny_judges import (
    aesthetic_head,
    bert_vocab,
    dino,
    hf_clip,
    hps3_checkpoint,
    hps_checkpoint,
    image_reward,
    iresnet,
    qwen_base,
)

from flowalign.protocols import Card, Reward
from flowalign.rewards.aesthetic import Aesthetic
from flowalign.rewards.clip import HFClipScore
from flowalign.rewards.dino import DinoSimilarity
from flowalign.rewards.discriminator import Discriminator
from flowalign.rewards.face import FaceIdentity
from flowalign.rewards.hps import HPS, HPSCrop
from flowalign.rewards.hps3 import HPS3
from flowalign.rewards.imagereward import ImageReward
from flowalign.rewards.jpeg import Compressibility
from flowalign.rewards.pickscore import PickScore
from flowalign.rewards.quality import ClipIqa, FullReference, Smoothness

torch.set_num_threads(1)
PROMPTS = ["a red circle", "", "a blue square above three cats", "two red circle"]
NAMES = [
    "pickscore",
    "clip-hf",
    "hps",
    "hps-crop",
    "aesthetic",
    "imagereward",
    "hps3",
    "dino",
    "dino-adversarial",
    "clip-iqa",
    "psnr",
    "ssim",
    "smoothness",
    "face",
    "compressibility",
]
SHORT = "Rate {text_prompt}: <|Reward|>"
READS_PROMPT = {"pickscore", "clip-hf", "hps", "hps-crop", "imagereward", "hps3"}


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    home = tmp_path_factory.mktemp("contract")
    clip, dinos = hf_clip(home / "clip"), dino(home / "dino")
    hps = hps_checkpoint(home / "HPS_v2.1_compressed.pt")
    base, config, vocab = qwen_base(home / "qwen")
    weights = hps3_checkpoint(home / "HPSv3.safetensors", config, vocab + 1)
    torch.manual_seed(0)
    pool = torch.nn.functional.normalize(torch.randn(3, 16), dim=-1)
    yield {
        "pickscore": PickScore(clip),
        "clip-hf": HFClipScore(clip),
        "hps": HPS(hps, model="flowalign-tiny"),
        "hps-crop": HPSCrop(hps, model="flowalign-tiny"),
        "aesthetic": Aesthetic(aesthetic_head(home / "a.pth"), clip),
        "imagereward": ImageReward(image_reward(home / "IR.pt", 160), bert_vocab(home / "bert"), head_dim=8),
        "hps3": HPS3(weights, base, instruction=SHORT, pixels=56 * 56, dtype=torch.float32),
        "dino": DinoSimilarity(dinos, torch.rand(3, 3, 30, 30), size=28),
        "dino-adversarial": Discriminator(dinos, hidden=8, size=28),
        "clip-iqa": ClipIqa(clip),
        "psnr": FullReference("psnr"),
        "ssim": FullReference("ssim"),
        "smoothness": Smoothness(),
        "face": FaceIdentity(iresnet(home / "backbone.pth"), pool, aligned=True),
        "compressibility": Compressibility(),
    }


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(3)
    x = torch.nn.functional.interpolate(0.2 + 0.6 * torch.rand(4, 3, 8, 10, generator=g), size=(40, 50), mode="bicubic")
    y = torch.rand(4, 3, 40, 50, generator=g)
    return x.clamp(0, 1), PROMPTS, [{"reference": r} for r in y]


def test_every_judge_here_is_contracted(judges):
    assert set(judges) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_scores_and_card(judges, batch, name):
    r = judges[name]
    s = r(*batch)
    assert isinstance(r, Reward) and isinstance(r.card, Card) and r.card.name == name
    assert s.shape == (4,) and s.dtype == torch.float32 and torch.isfinite(s).all()
    assert s.std() > 0 and not s.requires_grad
    assert torch.equal(s, r(*batch))  # nothing random, nothing remembered
    low, high = r.card.range
    assert low < high


@pytest.mark.parametrize("name", NAMES)
def test_scores_do_not_depend_on_the_batch(judges, batch, name):
    x, p, m = batch
    together = judges[name](x, p, m)
    alone = torch.cat([judges[name](x[i : i + 1], p[i : i + 1], m[i : i + 1]) for i in range(4)])
    assert torch.allclose(together, alone, rtol=1e-5, atol=1e-5), (together, alone)
    if name in READS_PROMPT:  # texts that repeat, as in groups, are encoded once and must find back to their pictures
        again = [p[2], p[0], p[2], p[0]]
        alone = torch.cat([judges[name](x[i : i + 1], again[i : i + 1]) for i in range(4)])
        assert torch.allclose(judges[name](x, again), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_pictures_and_prompts_are_paired(judges, batch, name):
    x, p, m = batch
    order = [2, 0, 3, 1]
    want = judges[name](x, p, m)[order]
    got = judges[name](x[order], [p[i] for i in order], [m[i] for i in order])
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)
    wrong = judges[name](x, [p[i] for i in order], m)
    assert torch.allclose(wrong, judges[name](x, p, m)) == (name not in READS_PROMPT)
    if name in READS_PROMPT:  # and each score follows its own prompt, not the batch's
        other = judges[name](x, [p[0], p[1], p[2], "the blue sign"], m)
        base = judges[name](x, p, m)
        assert torch.allclose(other[:3], base[:3], rtol=1e-5, atol=1e-5) and other[3] != base[3]


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(judges, batch, name):
    plain = judges[name](*batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = judges[name](*batch)
    assert cast.dtype == torch.float32 and (cast - plain).abs().max() < 1e-6


def test_half_precision_towers_have_float32_heads(tmp_path):
    r = PickScore(hf_clip(tmp_path / "c"), dtype=torch.bfloat16)
    s = r(torch.rand(8, 3, 40, 40, generator=torch.Generator().manual_seed(0)), ["a cat"] * 8)
    assert s.dtype == torch.float32 and (s != s.bfloat16().float()).any()  # finer than bfloat16's steps of .125 at 21


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(judges, batch, name):
    r = judges[name]
    x, p, m = batch
    if not r.card.differentiable:
        assert not r(x.clone().requires_grad_(), p, m).requires_grad
        return
    r = r.double()
    try:
        g = torch.Generator().manual_seed(1)
        x = (0.25 + 0.5 * torch.rand(x.shape, generator=g, dtype=torch.float64)).requires_grad_()
        m = [{"reference": v["reference"].double()} for v in m]
        y = r(x, p, m)
        grad = torch.autograd.grad(y.sum(), x)[0]
        d = torch.randn(x.shape, generator=g, dtype=torch.float64)
        eps = {"hps3": 1e-4}.get(name, 1e-8)  # PReLU and |x| have kinks; Qwen2-VL's norms are float32 inside
        with torch.no_grad():
            want = (r(x + eps * d, p, m) - r(x - eps * d, p, m)) / (2 * eps)
        got = (grad * d).flatten(1).sum(1)
        near = dict(rtol=2e-2, atol=4e-2) if name == "hps3" else dict(rtol=1e-4, atol=1e-5)
        assert torch.allclose(got, want, **near), (got, want)
        assert grad.flatten(1).abs().sum(1).min() > 0
    finally:
        r.float()


@pytest.mark.parametrize("name", NAMES)
def test_judges_are_frozen_and_stay_in_eval_mode(judges, batch, name):
    r = judges[name]
    trained = {n for n, p in r.named_parameters() if p.requires_grad}
    assert all(n.startswith("head.") for n in trained) and bool(trained) == (name == "dino-adversarial")
    r.train()
    assert not any(m.training for m in r.modules())
    x = batch[0].clone().requires_grad_(r.card.differentiable)
    if r.card.differentiable:
        r(x, *batch[1:]).sum().backward()
        assert all(p.grad is None for p in r.parameters())


BAD = {
    "three prompts for four": (lambda x: x, PROMPTS[:3], None, "one prompt per sample"),
    "one string": (lambda x: x, "four", None, "one string"),
    "None among the prompts": (lambda x: x, ["a", None, "b", "c"], None, "prompt 1 must be a string"),
    "meta of three": (lambda x: x, PROMPTS, [{}] * 3, "one meta mapping"),
    "bytes": (lambda x: x * 255, PROMPTS, None, r"must lie in \[0, 1\]"),
    "from -1 to 1": (lambda x: 2 * x - 1, PROMPTS, None, r"must lie in \[0, 1\]"),
    "NaN": (lambda x: x.masked_fill(x > 0.5, torch.nan), PROMPTS, None, "nan"),
    "channels last": (lambda x: x.permute(0, 2, 3, 1), PROMPTS, None, "channels come before"),
    "no batch": (lambda x: x[0], PROMPTS, None, "must be a float tensor"),
    "empty": (lambda x: x[:0], [], None, "must not be empty"),
    "integers": (lambda x: x.long(), PROMPTS, None, "must be a float tensor"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("name", ["pickscore", "imagereward", "compressibility", "face"])
def test_bad_input_is_refused_by_name(judges, batch, name, case):
    change, prompts, meta, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        judges[name](change(batch[0]), prompts, meta)


def test_nan_scores_stop_and_are_never_zero(judges, batch):
    r = judges["aesthetic"]
    bias = r.layers[7].bias.data.clone()
    try:
        r.layers[7].bias.data.fill_(torch.nan)
        with pytest.raises(ValueError, match="returned nan for sample 0"):
            r(*batch)
    finally:
        r.layers[7].bias.data.copy_(bias)


def test_a_reference_that_is_missing_or_of_another_size_is_named(judges, batch):
    x, p, m = batch
    with pytest.raises(ValueError, match="sample 0 has none"):
        judges["psnr"](x, p)
    with pytest.raises(ValueError, match="sample 2: wanted a reference"):
        judges["psnr"](x, p, [*m[:2], {"reference": torch.rand(3, 8, 8)}, m[3]])
