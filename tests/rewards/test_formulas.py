"""Each learned judge against an independent computation of its formula on the same random weights."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_judges import (
    aesthetic_head,
    bert_vocab,
    hf_clip,
    hps3_checkpoint,
    hps_checkpoint,
    image_reward,
    open_clip_model,
    qwen_base,
)

from flowalign.rewards.aesthetic import Aesthetic
from flowalign.rewards.clip import ClipScore, HFClipScore
from flowalign.rewards.hps import HPS, HPSCrop
from flowalign.rewards.hps3 import HPS3, preference
from flowalign.rewards.imagereward import ImageReward
from flowalign.rewards.jpeg import Compressibility, Incompressibility
from flowalign.rewards.pickscore import PickScore
from flowalign.rewards.preprocess import Preprocess
from flowalign.rewards.qwen import Vision, chat, patches, smart_size
from flowalign.rewards.towers import HFTower, OpenClipTower

torch.set_num_threads(1)
PROMPTS = ["a red circle", "a blue square above three cats", ""]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("judges")


@pytest.fixture(scope="module")
def clip(home):
    return hf_clip(home / "clip")


@pytest.fixture(scope="module")
def media():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(3, 3, 9, 11, generator=g)
    return F.interpolate(x, size=(45, 60), mode="bilinear").clamp(0, 1)


def pils(media):
    return [Image.fromarray((x.permute(1, 2, 0) * 255).round().byte().numpy()) for x in media]


def test_pickscore_equals_transformers_own_pipeline_from_pil(home, clip, media):
    """The official code: processor on PIL, normalised features, exp(logit_scale)."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    inputs = processor(
        text=PROMPTS, images=pils(media), return_tensors="pt", padding="max_length", truncation=True, max_length=77
    )
    with torch.no_grad():
        want = model(**inputs).logits_per_image.diagonal()
    exact = (media * 255).round() / 255
    got = PickScore(clip)(exact, PROMPTS)
    gap = (got - want).abs().max() / 100  # in cosines: what rounding to bytes does to a random, lively tower
    assert gap < 5e-3 and got.std() > 1, gap
    with torch.no_grad():
        pixels = Preprocess(32, centre="floor")(exact)
        same = model(pixel_values=pixels, input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
    assert torch.allclose(got, same.logits_per_image.diagonal(), atol=1e-4)
    assert torch.allclose(PickScore(clip, divisor=26)(exact, PROMPTS), got / 26)


def test_clip_score_scalings(clip, media):
    from transformers import CLIPModel

    raw = HFClipScore(clip)(media, PROMPTS)
    model = CLIPModel.from_pretrained(clip)
    scale = model.logit_scale.exp().item()
    assert torch.allclose(raw * scale, PickScore(clip)(media, PROMPTS), atol=1e-4)
    assert torch.allclose(
        HFClipScore(clip, scale=100, positive=True)(media, PROMPTS), 100 * raw.clamp_min(0), atol=1e-5
    )
    assert (raw < 0).any()  # else the clipping above would not be seen


def test_open_clip_score_equals_the_model_itself(media):
    import open_clip

    model = open_clip_model()
    tokenizer = open_clip.get_tokenizer("flowalign-tiny")
    got = ClipScore(OpenClipTower(model, tokenizer))(media, PROMPTS)
    with torch.no_grad():
        image, text, _ = model(Preprocess(32)(media), tokenizer(PROMPTS))
    assert torch.allclose(got, (image * text).sum(-1), atol=1e-5)


def test_open_clip_score_loads_a_local_folder(home, media):
    """open_clip's own published layout: open_clip_config.json beside the weights."""
    import json

    from safetensors.torch import save_file
    from tiny_judges import OPEN_CLIP

    folder = home / "oc"
    folder.mkdir()
    model = open_clip_model(seed=4)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    cfg = {"model_cfg": OPEN_CLIP, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}}
    (folder / "open_clip_config.json").write_text(json.dumps(cfg))
    reward = ClipScore(f"local-dir:{folder}")
    assert reward.tower.preprocess == Preprocess(32, "squash", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert torch.equal(reward.tower.model.visual.proj, model.visual.proj)
    assert reward(media, PROMPTS).shape == (3,)


def test_hps_pads_and_its_twin_crops(home, media):
    import open_clip

    path = hps_checkpoint(home / "HPS_v2.1_compressed.pt")
    model = open_clip_model()
    tokens = open_clip.get_tokenizer("flowalign-tiny")(PROMPTS)
    for cls, fit in ((HPS, "pad"), (HPSCrop, "crop")):
        with torch.no_grad():
            image, text, _ = model(Preprocess(32, fit)(media), tokens)
        want = (image @ text.T).diagonal()
        assert torch.allclose(cls(path, model="flowalign-tiny")(media, PROMPTS), want, atol=1e-5)
        assert torch.allclose(cls(home, model="flowalign-tiny")(media, PROMPTS), want, atol=1e-5)  # by folder
    assert HPS.card.name == "hps" and HPSCrop.card.name == "hps-crop"


def test_aesthetic_is_one_affine_map_of_the_unit_feature(home, clip, media):
    from transformers import CLIPModel

    path = aesthetic_head(home / "aesthetic-model.pth")
    state = torch.load(path, weights_only=True)
    weight, bias = torch.eye(24), torch.zeros(24)
    for i in (0, 2, 4, 6, 7):
        w, b = state[f"layers.{i}.weight"], state[f"layers.{i}.bias"]
        weight, bias = w @ weight, w @ bias + b
    with torch.no_grad():
        f = CLIPModel.from_pretrained(clip).get_image_features(Preprocess(32, centre="floor")(media)).pooler_output
    want = (f / f.norm(dim=-1, keepdim=True)) @ weight.T + bias
    reward = Aesthetic(path, clip).train()  # dropout would show at once
    assert torch.allclose(reward(media, PROMPTS), want.squeeze(-1), atol=1e-5)
    assert torch.equal(reward(media, PROMPTS), reward(media, ["x"] * 3))  # the prompt is not read


def blip_by_hand(state, x, ids, mask, heads):
    """BLIP's ViT and BERT with cross-attention, from the published names, in plain tensor code."""

    def lin(name, h):
        return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, h, eps):
        return F.layer_norm(h, h.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attend(q, k, v, bias=0.0):
        split = [t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v)]
        w = (split[0] @ split[1].transpose(-1, -2) / split[0].shape[-1] ** 0.5 + bias).softmax(-1)
        return (w @ split[2]).transpose(1, 2).flatten(2)

    v = "blip.visual_encoder."
    conv = F.conv2d(x, state[v + "patch_embed.proj.weight"], state[v + "patch_embed.proj.bias"], stride=8)
    h = torch.cat([state[v + "cls_token"].expand(len(x), -1, -1), conv.flatten(2).transpose(1, 2)], 1)
    h = h + state[v + "pos_embed"]
    for i in range(2):
        b = f"{v}blocks.{i}."
        q, k, val = lin(b + "attn.qkv", norm(b + "norm1", h, 1e-6)).chunk(3, -1)
        h = h + lin(b + "attn.proj", attend(q, k, val))
        h = h + lin(b + "mlp.fc2", F.gelu(lin(b + "mlp.fc1", norm(b + "norm2", h, 1e-6))))
    picture = norm(v + "norm", h, 1e-6)

    t = "blip.text_encoder."
    e = state[t + "embeddings.word_embeddings.weight"][ids]
    e = e + state[t + "embeddings.position_embeddings.weight"][: ids.shape[1]]
    h = norm(t + "embeddings.LayerNorm", e, 1e-12)
    bias = torch.where(mask[:, None, None] > 0, 0.0, -1e9)
    for i in range(2):
        for kind, keys, b in (("attention", None, bias), ("crossattention", picture, 0.0)):
            n = f"{t}encoder.layer.{i}.{kind}."
            source = h if keys is None else keys
            y = attend(lin(n + "self.query", h), lin(n + "self.key", source), lin(n + "self.value", source), b)
            h = norm(n + "output.LayerNorm", h + lin(n + "output.dense", y), 1e-12)
        n = f"{t}encoder.layer.{i}."
        y = lin(n + "output.dense", F.gelu(lin(n + "intermediate.dense", h)))
        h = norm(n + "output.LayerNorm", h + y, 1e-12)
    out = h[:, 0]
    for i in (0, 2, 4, 6, 7):
        out = lin(f"mlp.layers.{i}", out)
    return (out.squeeze(-1) - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def image_reward_parts(home):
    vocab = bert_vocab(home / "bert")
    path = image_reward(home / "ImageReward.pt", 160)
    return path, vocab, ImageReward(path, vocab, head_dim=8)  # 4 heads for the picture, 3 for the text


def test_image_reward_equals_its_formula_by_hand(home, media):
    from transformers import BertTokenizer

    vocab = bert_vocab(home / "bert2")
    path = image_reward(home / "IR2.pt", 160, vision=24, text=24)  # equal widths: one number of heads by hand
    reward = ImageReward(path, vocab, head_dim=12)
    state = torch.load(path, weights_only=True)
    tokens = BertTokenizer.from_pretrained(vocab)(
        PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    want = blip_by_hand(state, Preprocess(32)(media), tokens.input_ids, tokens.attention_mask, heads=2)
    got = reward(media, PROMPTS)
    assert torch.allclose(got, want, atol=2e-4), (got, want)
    assert got.std() > 0.01
    swapped = reward(media, PROMPTS[::-1])
    assert (swapped[[0, 2]] - got[[0, 2]]).abs().min() > 1e-3  # the text matters: attention is across, not causal


def test_image_reward_cuts_the_text_at_35_tokens(image_reward_parts, media):
    *_, reward = image_reward_parts
    long = " ".join(["red"] * 33)
    a, b, c = (reward(media[:1], [p]) for p in (long, long + " blue circle", long[:-3] + "blue"))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert reward.card.text == 35


def test_clip_texts_are_cut_at_77_tokens_with_the_end_kept(clip, media):
    reward = HFClipScore(clip)
    assert reward.tower.context == 77
    a, b = (reward(media[:1], [p]) for p in ("x" * 75, "x" * 75 + " and more"))
    assert torch.equal(a, b)
    assert not torch.equal(a, reward(media[:1], ["x" * 74 + "y"]))


def test_jpeg_equals_pillow(media):
    want = []
    for image in pils(media):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        want.append(len(buffer.getvalue()) / 1000)
    want = torch.tensor(want)
    assert torch.allclose(Compressibility()(media, PROMPTS), -want)
    assert torch.allclose(Incompressibility(divisor=500)(media, PROMPTS), want / 500)
    noise, flat = torch.rand(1, 3, 32, 32), torch.full((1, 3, 32, 32), 0.5)
    assert Compressibility()(flat, [""]) > Compressibility()(noise, [""])


# ---- HPSv3 ----------------------------------------------------------------------------------------------------------


SHORT = "Rate {text_prompt}: <|Reward|>!"


def test_hps3_asks_for_its_instruction(tmp_path):
    with pytest.raises(ValueError, match="not shipped"):
        HPS3("w", "b")
    with pytest.raises(ValueError, match="once each"):
        HPS3("w", "b", instruction="rate {text_prompt} please")
    (tmp_path / "i.txt").write_text("no places", encoding="utf-8")
    with pytest.raises(ValueError, match="once each"):
        HPS3("w", "b", instruction=tmp_path / "i.txt")


@pytest.fixture(scope="module")
def hps3(home):
    base, config, vocab = qwen_base(home / "qwen")
    path = hps3_checkpoint(home / "HPSv3.safetensors", config, vocab + 1)
    return base, config, path, HPS3(path, base, instruction=SHORT, pixels=56 * 56, dtype=torch.float32)


def qwen_text_by_hand(state, x):
    """Qwen2's decoder with ordinary rotary positions 0, 1, 2, ..., from the names before transformers 4.52."""

    def rms(name, h):
        return state[name] * h / (h.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()

    length, d = x.shape[1], 8
    freq = 1e6 ** (-torch.arange(0, d, 2) / d)
    angle = torch.cat([torch.outer(torch.arange(length), freq)] * 2, -1)
    cos, sin = angle.cos(), angle.sin()

    def rope(h):
        a, b = h.chunk(2, -1)
        return h * cos + torch.cat([-b, a], -1) * sin

    for i in range(2):
        n = f"model.layers.{i}."
        h = rms(n + "input_layernorm.weight", x)
        q, k, v = (
            (h @ state[f"{n}self_attn.{c}_proj.weight"].T + state[f"{n}self_attn.{c}_proj.bias"])
            .unflatten(-1, (-1, d))
            .transpose(1, 2)
            for c in "qkv"
        )
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        w = rope(q) @ rope(k).transpose(-1, -2) / d**0.5
        w = w.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
        x = x + (w @ v).transpose(1, 2).flatten(2) @ state[n + "self_attn.o_proj.weight"].T
        h = rms(n + "post_attention_layernorm.weight", x)
        gate = F.silu(h @ state[n + "mlp.gate_proj.weight"].T) * (h @ state[n + "mlp.up_proj.weight"].T)
        x = x + gate @ state[n + "mlp.down_proj.weight"].T
    return rms("model.norm.weight", x)


def test_hps3_equals_its_formula_by_hand(hps3, media):
    from safetensors.torch import load_file

    _, config, path, reward = hps3
    state = load_file(path)
    mu, sigma = reward.gaussian(media, PROMPTS)
    size = smart_size(45, 60, Vision(min_pixels=56 * 56, max_pixels=56 * 56))
    tokens = size[0] * size[1] // 28**2
    for i, prompt in enumerate(PROMPTS):
        text = chat(SHORT.replace("{text_prompt}", prompt), tokens)
        ids = reward.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        assert (ids == config.image_token_id).sum() == tokens and (ids == reward.special).sum() == 1
        rows, grid = patches(media[i : i + 1].unsqueeze(1), reward.sizes)
        with torch.no_grad():
            seen = reward.model.visual(rows, grid_thw=grid).pooler_output
        x = state["model.embed_tokens.weight"][ids]
        x[ids == config.image_token_id] = seen
        h = qwen_text_by_hand(state, x)[ids == reward.special].squeeze(0)
        for k in (0, 3, 5):
            h = state[f"rm_head.{k}.weight"] @ h + state[f"rm_head.{k}.bias"]
            h = h if k == 5 else h.relu()
        assert torch.allclose(mu[i], h[0], atol=1e-4), (mu[i], h)
        assert torch.allclose(sigma[i], h[1].exp(), atol=1e-4)
    assert torch.equal(reward(media, PROMPTS), mu)


def test_hps3_reads_both_key_layouts(home, hps3, media):
    base, config, _, reward = hps3
    new = hps3_checkpoint(home / "new.safetensors", config, config.text_config.vocab_size, layout="new")
    again = HPS3(new, base, instruction=SHORT, pixels=56 * 56, dtype=torch.float32)
    assert torch.equal(again(media, PROMPTS), reward(media, PROMPTS))


def test_hps3_refuses_picture_tokens_in_a_prompt_and_ignores_the_reward_token(hps3, media):
    *_, reward = hps3
    with pytest.raises(ValueError, match="image_pad"):
        reward(media[:1], ["a <|image_pad|> b"])
    assert torch.isfinite(reward(media[:1], ["cheat <|Reward|>"])).all()


def test_qwen_pixels_equal_the_published_processor(media):
    from transformers import Qwen2VLImageProcessor

    bounds = dict(min_pixels=56 * 56, max_pixels=28 * 28 * 9)
    processor = Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 9})
    for size in ((45, 60), (100, 300), (60, 45), (28, 28)):
        g = np.random.default_rng(1)
        image = Image.fromarray((g.random((*size, 3)) * 255).astype(np.uint8))
        theirs = processor(images=[image], return_tensors="pt")
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None, None] / 255
        rows, grid = patches(x, Vision(**bounds))
        assert torch.equal(grid, theirs.image_grid_thw)
        gap = (rows - theirs.pixel_values).abs() * 0.27
        assert gap.mean() < 2e-3 and gap.max() < 0.011, (size, gap.mean(), gap.max())


def test_qwen_patches_of_video_pair_frames_in_time():
    x = torch.rand(2, 3, 3, 28, 28)
    vision = Vision(min_pixels=28 * 28, max_pixels=28 * 28)
    rows, grid = patches(x, vision)
    assert grid.tolist() == [[2, 2, 2]] * 2 and rows.shape == (16, 3 * 2 * 14 * 14)
    first = rows.view(2, 2, 4, 3, 2, 14, 14)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    want = (x[1, 2, :, 14:, :14] - mean) / std  # last frame, bottom left patch: repeated to fill the pair
    assert torch.allclose(first[1, 1, 2, :, 0], want, atol=1e-6) and torch.allclose(
        first[1, 1, 2, :, 1], want, atol=1e-6
    )


def test_gaussian_preference_equals_sampling():
    a = torch.tensor([0.3, -1.0]), torch.tensor([0.5, 2.0])
    b = torch.tensor([0.1, 0.5]), torch.tensor([1.0, 0.3])
    z = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    for i in range(2):
        std = (a[1][i] ** 2 + b[1][i] ** 2).sqrt()
        want = torch.sigmoid(a[0][i] - b[0][i] + std * z).mean()
        assert abs(preference(a, b)[i] - want) < 3e-3
    assert torch.allclose(preference(a, b) + preference(b, a), torch.ones(2), atol=1e-6)


def test_towers_read_sizes_from_the_checkpoint(clip):
    tower = HFTower.load(clip)
    assert tower.preprocess.size == 32 and tower.preprocess.centre == "floor"
