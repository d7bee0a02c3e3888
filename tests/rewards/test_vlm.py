"""Vision-language judges on tiny random checkpoints: parity of pixels, formulas, precision, pairing, refusals."""

import numpy as np
import pytest
import tiny_vlm
import torch
from PIL import Image

from flowalign.protocols import Reward
from flowalign.rewards.promptecho import PromptEcho
from flowalign.rewards.rewarddance import MANNER, QUESTION, RewardDance
from flowalign.rewards.vlm import VisionLanguage
from flowalign.rewards.vqa import VQAScore

PROMPTS = ["a red circle above a blue square", "two green cat", "the dog and a bell", "three square below a red dog"]


@pytest.fixture(scope="module", params=tiny_vlm.FAMILIES)
def folder(request, tmp_path_factory):
    return tiny_vlm.FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def vlm(folder):
    return VisionLanguage(folder, dtype=torch.float32)


def pictures(n, h=28, w=28, seed=0):
    """Blocky pictures with hard edges; at this size neither checkpoint resizes, so formulas can be compared tightly."""
    coarse = torch.rand(n, 3, 7, 9, generator=torch.Generator().manual_seed(seed)).round()
    return torch.nn.functional.interpolate(coarse, (h, w), mode="nearest")


def official(folder):
    """The checkpoint through transformers alone: model, processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder)


def pil(x):
    return Image.fromarray((x.permute(1, 2, 0) * 255).round().byte().numpy())


def chat(processor, question, count=1):
    content = [{"type": "image"}] * count + [{"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )


@torch.no_grad()
def reference_log_probs(folder, images, question, answer):
    """Log-probabilities of the answer's tokens, one sample, official byte pixels, nothing of ours."""
    model, processor = official(folder)
    batch = processor(text=[chat(processor, question, len(images))], images=[images], return_tensors="pt")
    ids = torch.tensor([processor.tokenizer(answer, add_special_tokens=False)["input_ids"]], dtype=torch.long)
    start = batch["input_ids"].shape[1]
    batch["input_ids"] = torch.cat((batch["input_ids"], ids), 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    for key in ("mm_token_type_ids", "token_type_ids"):
        if key in batch:
            batch[key] = torch.cat((batch[key], torch.zeros_like(ids)), 1)
    logits = model(**batch).logits[0].double()
    logs = logits.log_softmax(-1)
    return torch.stack([logs[start - 1 + j, t] for j, t in enumerate(ids[0])]), logs[start - 1]


@pytest.mark.parametrize("size", [(40, 61), (90, 50), (28, 28)])
def test_pixels_agree_with_the_official_processor(folder, vlm, size):
    """Below 2e-3 in the mean and .011 at most (in [0, 1]) against bytes through PIL; wrong variants are far outside."""
    x = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(pictures(2, *size), (3,) * 4, mode="replicate"), 7, 1)
    _, processor = official(folder)
    want = processor(text=[chat(processor, "?")] * 2, images=[[pil(v)] for v in x], return_tensors="pt")["pixel_values"]
    mine = vlm.layout([[v] for v in x], ["?"] * 2)["pixel_values"]
    std = 0.27
    gap = (mine - want).abs() * std
    assert gap.mean() < 2e-3 and gap.max() < 0.011
    raw = processor(
        text=[chat(processor, "?")] * 2, images=[[v] for v in x], return_tensors="pt",
        images_kwargs={"do_rescale": False, "input_data_format": "channels_first"},
    )["pixel_values"]  # fmt: skip
    flipped = vlm.layout([[v.flip(0)] for v in x], ["?"] * 2)["pixel_values"]
    assert ((flipped - want).abs() * std).mean() > 0.05
    if size != (28, 28):
        assert ((raw - want).abs() * std).max() > 0.012  # without clipping, bicubic overshoots


def test_promptecho_equals_its_formula(folder, vlm):
    echo = PromptEcho(vlm)
    assert isinstance(echo, Reward)
    x = pictures(4).mul(255).round().div(255)
    scores = echo(x, PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        tokens, _ = reference_log_probs(folder, [pil(x[i])], "Describe this image in detail.", prompt)
        assert scores[i].item() == pytest.approx(tokens.mean().item(), abs=2e-3)
        assert abs(scores[i].item() - tokens.sum().item()) > 1  # a sum would be a different reward
    assert scores.std() > 0.01


@pytest.mark.parametrize("name", tiny_vlm.MORE)
def test_further_families_need_no_code_of_their_own(name, tmp_path):
    tiny_vlm.MORE[name](tmp_path)
    echo = PromptEcho(tmp_path, dtype=torch.float32)
    x = pictures(3, 32, 32).mul(255).round().div(255).requires_grad_()
    scores = echo(x, PROMPTS[:3])
    for i in range(3):
        tokens, _ = reference_log_probs(tmp_path, [pil(x[i].detach())], "Describe this image in detail.", PROMPTS[i])
        assert scores[i].item() == pytest.approx(tokens.mean().item(), abs=2e-3)
    (grad,) = torch.autograd.grad(scores.sum(), x)
    assert (grad.flatten(1).abs().sum(1) > 0).all()


def test_vqa_equals_its_formula(folder, vlm):
    vqa = VQAScore(vlm)
    x = pictures(4, seed=1).mul(255).round().div(255)
    scores = vqa(x, PROMPTS)
    yes = vlm.tokenizer.convert_tokens_to_ids("Yes")
    for i, prompt in enumerate(PROMPTS):
        _, logs = reference_log_probs(
            folder, [pil(x[i])], f'Does this figure show "{prompt}"? Please answer yes or no.', "yes"
        )
        assert scores[i].item() == pytest.approx(logs[yes].exp().item(), rel=2e-2)
    assert torch.allclose(VQAScore(vlm, log=True)(x, PROMPTS).exp(), scores, rtol=1e-5)


@pytest.mark.parametrize("normalise", ["vocabulary", "pair"])
def test_rewarddance_equals_its_formula(folder, vlm, normalise):
    dance = RewardDance(vlm, instruction="shape", normalise=normalise)
    x, y = (pictures(4, seed=s).mul(255).round().div(255) for s in (2, 3))
    meta = [{"reference": v} for v in y]
    scores = dance(x, PROMPTS, meta)
    ids = [vlm.tokenizer.convert_tokens_to_ids(w) for w in ("yes", "Yes", "no", "No")]
    for i, prompt in enumerate(PROMPTS):
        question = QUESTION.format(prompt=prompt, instruction="shape", manner=MANNER[False])
        _, logs = reference_log_probs(folder, [pil(x[i]), pil(y[i])], question, "yes")
        p = logs.exp()[ids]
        want = p[:2].sum() if normalise == "vocabulary" else p[:2].sum() / p.sum()
        assert scores[i].item() == pytest.approx(want.item(), rel=2e-2)
    swapped = dance(y, PROMPTS, [{"reference": v} for v in x])
    assert not torch.allclose(swapped, scores, rtol=1e-3)
    other = dance(x, PROMPTS, [{"reference": v, "instruction": "red"} for v in y])
    assert not torch.allclose(other, scores, rtol=1e-4)


def test_rewarddance_reads_the_answer_after_its_reasons(folder, vlm):
    dance = RewardDance(vlm, instruction="shape", reasoning=5)
    x, y = pictures(2, seed=4).mul(255).round().div(255), pictures(2, seed=5).mul(255).round().div(255)
    meta = [{"reference": v} for v in y]
    scores = dance(x, PROMPTS[:2], meta)
    model, processor = official(folder)
    for i in range(2):
        question = QUESTION.format(prompt=PROMPTS[i], instruction="shape", manner=MANNER[True])
        batch = processor(text=[chat(processor, question, 2)], images=[[pil(x[i]), pil(y[i])]], return_tensors="pt")
        out = model.generate(**batch, max_new_tokens=5, do_sample=False)[0, batch["input_ids"].shape[1] :].tolist()
        if vlm.tokenizer.eos_token_id in out:
            out = out[: out.index(vlm.tokenizer.eos_token_id)]
        out = [t for t in out if t not in vlm.tokenizer.all_special_ids]
        reasons = processor.tokenizer.convert_ids_to_tokens(out)
        answer = " ".join([*reasons, "Answer", ":", "yes"])
        ids = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
        assert ids[: len(out)] == out
        logs, _ = reference_log_probs(folder, [pil(x[i]), pil(y[i])], question, answer)
        yes = logs[-1].exp().item()
        capital, _ = reference_log_probs(folder, [pil(x[i]), pil(y[i])], question, answer[:-3] + "Yes")
        assert scores[i].item() == pytest.approx(yes + capital[-1].exp().item(), rel=2e-2)
    assert not torch.allclose(scores, RewardDance(vlm, instruction="shape")(x, PROMPTS[:2], meta), rtol=1e-3)


def judges(vlm):
    return [PromptEcho(vlm), VQAScore(vlm, log=True), RewardDance(vlm)]


def test_pairing_batches_and_padding(vlm):
    """Prompts of different lengths in one batch: each score is that of its own pair, alone."""
    x, y = pictures(4, seed=6), pictures(4, seed=7)
    meta = [{"reference": v} for v in y]
    order = [2, 0, 3, 1]
    for judge in judges(vlm):
        scores = judge(x, PROMPTS, meta)
        singles = torch.cat([judge(x[i : i + 1], PROMPTS[i : i + 1], meta[i : i + 1]) for i in range(4)])
        assert torch.allclose(scores, singles, atol=2e-5)
        shuffled = judge(x[order], [PROMPTS[i] for i in order], [meta[i] for i in order])
        assert torch.allclose(shuffled, scores[order], atol=2e-5)
        assert not torch.allclose(judge(x, [PROMPTS[i] for i in order], meta), scores, atol=1e-4)


def test_gradients_reach_the_pixels(vlm):
    assert vlm.differentiable
    x, y = pictures(2, seed=8) * 0.8 + 0.1, pictures(2, seed=9)
    for judge in judges(vlm):
        assert judge.card.differentiable
        x.requires_grad_()
        score = judge(x, PROMPTS[:2], [{"reference": v} for v in y]).sum()
        (grad,) = torch.autograd.grad(score, x)
        assert torch.isfinite(grad).all() and (grad.flatten(1).abs().sum(1) > 0).all()
        direction = grad / grad.norm()
        step = 2e-3
        with torch.no_grad():
            up, down = (
                judge(x + s * direction, PROMPTS[:2], [{"reference": v} for v in y]).sum() for s in (step, -step)
            )
        assert ((up - down) / (2 * step)).item() == pytest.approx(grad.norm().item(), rel=0.05)
        assert not any(p.requires_grad for p in judge.parameters())


def test_a_processor_that_stops_gradients_is_noticed(folder):
    vlm = VisionLanguage(folder, dtype=torch.float32)
    resize = vlm.processor.image_processor.resize
    vlm.processor.image_processor.resize = lambda *a, **k: resize(*a, **k).detach()
    vlm.differentiable = vlm._probe()
    assert not vlm.differentiable
    assert PromptEcho(vlm)(pictures(1), PROMPTS[:1]).isfinite().all()
    with pytest.raises(ValueError, match="stops gradients"):
        PromptEcho(vlm)(pictures(1).requires_grad_(), PROMPTS[:1])


def test_the_last_layer_is_float32_whatever_surrounds_it(folder, vlm):
    x, y = pictures(2, seed=10), pictures(2, seed=11)
    meta = [{"reference": v} for v in y]
    for judge in judges(vlm):
        plain = judge(x, PROMPTS[:2], meta)
        with torch.autocast("cpu", torch.bfloat16):
            cast = judge(x, PROMPTS[:2], meta)
        assert plain.dtype == torch.float32 and (plain - cast).abs().max() < 1e-6
    half = VisionLanguage(folder, dtype=torch.bfloat16)
    logits = half.logits([[x[0]]], ["?"], [half.words("a red cat")])
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())  # a bfloat16 layer would only have such values
    echo = PromptEcho(half)(x, PROMPTS[:2])
    assert (echo - PromptEcho(vlm)(x, PROMPTS[:2])).abs().max() < 0.2


def test_any_size_and_a_template_of_ones_own(folder, vlm):
    for size in [(28, 90), (100, 30), (33, 57)]:
        assert PromptEcho(vlm)(pictures(1, *size), PROMPTS[:1]).isfinite().all()
    own = VisionLanguage(folder, dtype=torch.float32, template="user {images} {question} assistant")
    if own.processor.image_token == "<image>":
        assert own.conversation(2, "why?") == "user <image><image> why? assistant"
        assert PromptEcho(own)(pictures(2), PROMPTS[:2]).isfinite().all()


def test_refusals(vlm, tmp_path):
    x = pictures(2)
    reference = [{"reference": v} for v in x]
    for bad in ("", "   "):
        with pytest.raises(ValueError, match="prompt 1"):
            PromptEcho(vlm)(x, ["a cat", bad])
        with pytest.raises(ValueError, match="prompt 1"):
            VQAScore(vlm)(x, ["a cat", bad])
    special = vlm.tokenizer.all_special_tokens[-1]
    for judge in (VQAScore(vlm), RewardDance(vlm), PromptEcho(vlm)):
        with pytest.raises(ValueError, match="special token"):
            judge(x, ["a cat", f"a {special} dog"], reference)
    with pytest.raises(ValueError, match="reference"):
        RewardDance(vlm)(x, PROMPTS[:2])
    with pytest.raises(ValueError, match=r"\(3, H, W\)"):
        RewardDance(vlm)(x, PROMPTS[:2], [{"reference": v[None]} for v in x])
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        RewardDance(vlm)(x, PROMPTS[:2], [{"reference": v * 255} for v in x])
    with pytest.raises(ValueError, match="not one token"):
        VQAScore(vlm, answer="certainly not")
    with pytest.raises(ValueError, match="is one token"):
        RewardDance(vlm, yes=["certainly"])
    with pytest.raises(ValueError, match=r"\{prompt\}"):
        VQAScore(vlm, question="Is it good?")
    with pytest.raises(ValueError, match="the model reads 512"):
        PromptEcho(vlm)(x[:1], ["a red cat " * 300])
    with pytest.raises(ValueError, match="one prompt per sample"):
        PromptEcho(vlm)(x, ["a cat"])
    with pytest.raises(ValueError, match="must be a string"):
        PromptEcho(vlm)(x, ["a cat", None])
    with pytest.raises(ValueError, match="no such folder"):
        PromptEcho(tmp_path / "nothing")
    broken = x.clone()
    broken[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        PromptEcho(vlm)(broken, PROMPTS[:2])
