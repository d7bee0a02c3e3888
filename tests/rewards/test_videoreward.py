"""VideoReward on a tiny random release of the published layout, its LoRA made by peft itself."""

import json
import math

import pytest
import tiny_vlm
import torch
from safetensors.torch import save_file

from flowalign.protocols import Reward
from flowalign.rewards.qwen import patches
from flowalign.rewards.videoalign import SPECIAL, merge_lora, read_release, read_template
from flowalign.rewards.videoreward import CRITERIA, VideoReward, sample_frames

TEMPLATE = "\nRate it . <|VQ_reward|> why ? <|MQ_reward|>\nPrompt : {text_prompt} . <|TA_reward|>\n"
MEANS, STDS = (0.3, -0.2, 0.1), (1.5, 0.7, 2.0)
PROMPTS = ["a red circle above a blue square", "two green cat", "the dog and a bell"]


class Released(torch.nn.Module):
    """What upstream wraps with peft: Qwen2-VL with a head called ``rm_head``."""

    def __init__(self, model, outputs):
        super().__init__()
        self.model, self.lm_head = model.model, model.lm_head
        self.rm_head = torch.nn.Linear(32, outputs, bias=False)


def old_name(key):
    """The key as transformers 4.45 called it."""
    return key.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def make_release(folder, base, outputs=3, full=True, rslora=False):
    """Write a release; return the peft model that it was saved from."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

    torch.manual_seed(5)
    inner = Qwen2VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    inner.resize_token_embeddings(len(tokenizer))
    released = Released(inner, outputs)
    torch.nn.init.normal_(released.rm_head.weight)
    targets = [n for n, m in released.named_modules() if isinstance(m, torch.nn.Linear) and "language_model" in n]
    wrapped = get_peft_model(released, LoraConfig(target_modules=targets, r=4, lora_alpha=8, use_rslora=rslora))
    for name, p in wrapped.named_parameters():
        if "lora_" in name or "embed_tokens" in name:
            torch.nn.init.normal_(p, std=0.2)  # peft starts B at zero, which would hide a missing merge
    step = folder / "checkpoint-20"
    step.mkdir(parents=True)
    (folder / "checkpoint-9").mkdir()  # an earlier one, which must not be taken
    state = {old_name(k): v.clone() for k, v in wrapped.state_dict().items()}
    if full:
        torch.save(state, step / "model.pth")
    else:
        lora = {k.replace(".default.", "."): v for k, v in state.items() if ".lora_" in k}
        save_file(lora, step / "adapter_model.safetensors")
        rest = {k: v for k, v in state.items() if "visual" in k or "embed_tokens" in k or "rm_head" in k}
        torch.save(rest, step / "non_lora_state_dict.pth")
    config = {
        "data_config": {"fps": 2.0, "num_frames": None, "max_frame_pixels": 56 * 56, "eval_dim": list(CRITERIA)},
        "model_config": {"model_name_or_path": str(base), "output_dim": outputs, "use_special_tokens": True},
        "peft_lora_config": {"lora_r": 4, "lora_alpha": 8, "use_rslora": rslora},
        "inference_config": {f"{k}_{s}": v for s, row in (("mean", MEANS), ("std", STDS))
                             for k, v in zip(CRITERIA, row, strict=True)},
    }  # fmt: skip
    (folder / "model_config.json").write_text(json.dumps(config))
    return wrapped.eval()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videoreward")
    tiny_vlm.qwen2_vl(folder / "base")
    (folder / "template.txt").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module", params=[(3, True, False), (1, True, True), (3, False, False)],
                ids=["full", "shared-rslora", "adapter"])  # fmt: skip
def release(request, home):
    outputs, full, rslora = request.param
    folder = home / f"release-{outputs}-{full}-{rslora}"
    return folder, make_release(folder, home / "base", outputs, full, rslora)


def judge(home, release, **options):
    return VideoReward(release[0], home / "template.txt", dtype=torch.float32, **options)


def videos(n=3, frames=12, h=40, w=56, seed=0):
    coarse = torch.rand(n, frames, 3, 5, 7, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse.flatten(0, 1), (h, w), mode="bilinear").unflatten(0, (n, frames))


@torch.no_grad()
def by_hand(home, wrapped, video, prompt, index):
    """The unmerged peft model, one video, positions counted one by one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    from flowalign.rewards.qwen import Vision

    pixels, grid = patches(video[None, index], Vision(min_pixels=56 * 56, max_pixels=56 * 56))
    count = int(grid.prod()) // 4
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|video_pad|>" * count + "<|vision_end|>" + TEMPLATE.format(text_prompt=prompt)
        + "<|im_end|>\n<|im_start|>assistant\n"
    )  # fmt: skip
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    qwen = wrapped.base_model.model.model
    embeds = qwen.get_input_embeddings()(ids)
    embeds[ids == tokenizer.convert_tokens_to_ids("<|video_pad|>")] = torch.cat(
        list(qwen.get_video_features(pixels, grid).pooler_output)
    )
    positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
    hidden = qwen.language_model(inputs_embeds=embeds, position_ids=positions).last_hidden_state[0]
    values = wrapped.base_model.model.rm_head(hidden)
    out = []
    for k, token in enumerate(SPECIAL):
        row = values[(ids[0] == tokenizer.convert_tokens_to_ids(token)).nonzero()[0, 0]]
        out.append((row[k if len(row) == 3 else 0].item() - MEANS[k]) / STDS[k])
    return torch.tensor(out)


def test_scores_equal_the_unmerged_model(home, release):
    reward = judge(home, release)
    assert isinstance(reward, Reward)
    video, meta = videos(), [{"fps": 6.0}] * 3
    values = reward.standardised(video, PROMPTS, meta)
    index = torch.tensor([0, 4, 7, 11])  # 12 frames at 6 per second are 2 seconds: 4 frames at 2 per second
    for i in range(3):
        assert torch.allclose(values[i], by_hand(home, release[1], video[i], PROMPTS[i], index), atol=2e-4)
    assert values.std(0).min() > 1e-3
    assert torch.allclose(reward(video, PROMPTS, meta), values.sum(1), atol=1e-5)
    motion = judge(home, release, criteria=["MQ"], fps=6.0)
    assert torch.allclose(motion(video, PROMPTS), values[:, 1], atol=1e-5)


def test_the_true_rate_matters_and_may_differ_within_a_batch(home, release):
    reward, video = judge(home, release), videos()
    rates = [6.0, 2.0, 3.0]  # 4, 12 and 8 frames are looked at
    mixed = reward(video, PROMPTS, [{"fps": r} for r in rates])
    for i, rate in enumerate(rates):
        alone = reward(video[i : i + 1], PROMPTS[i : i + 1], [{"fps": rate}])
        assert torch.allclose(mixed[i : i + 1], alone, atol=1e-4)
    assert not torch.allclose(mixed, reward(video, PROMPTS, [{"fps": 2.0}] * 3), atol=1e-3)
    with pytest.raises(ValueError, match="fps"):
        reward(video, PROMPTS)
    with pytest.raises(ValueError, match="positive rate"):
        reward(video, PROMPTS, [{"fps": 0}] * 3)


@pytest.mark.parametrize(
    ("total", "fps", "want"),
    [
        (12, 6.0, [0, 4, 7, 11]),
        (81, 16.0, [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]),  # 5.06 s at 2 fps: 10.1 -> 10
        (5, 30.0, [0, 1, 3, 4]),  # at least 4 ...
        (3, 30.0, [0, 2]),  # ... as far as they reach, and even
        (8, 2.0, list(range(8))),
    ],
)
def test_frames_are_sampled_as_upstream(total, fps, want):
    assert sample_frames(total, fps, 2.0).tolist() == want


def test_fixed_number_of_frames():
    assert sample_frames(9, 24.0, 2.0, frames=5).tolist() == [0, 3, 5, 8]
    for total, fps in [(1, 2.0), (5, -1.0), (5, math.nan)]:
        with pytest.raises(ValueError, match="at least 2 frames"):
            sample_frames(total, fps, 2.0)


def test_pairing_gradients_and_precision(home, release):
    reward, video = judge(home, release, fps=6.0), videos(seed=3)
    scores = reward(video, PROMPTS)
    order = [2, 0, 1]
    assert torch.allclose(reward(video[order], [PROMPTS[i] for i in order]), scores[order], atol=1e-4)
    assert not torch.allclose(reward(video, [PROMPTS[i] for i in order]), scores, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert (reward(video, PROMPTS) - scores).abs().max() < 1e-6
    video.requires_grad_()
    reward(video, PROMPTS).sum().backward()
    touched = video.grad.abs().sum((0, 2, 3, 4)) > 0
    assert torch.isfinite(video.grad).all() and touched.nonzero().flatten().tolist() == [0, 4, 7, 11]
    assert reward.head.dtype == torch.float32
    half = VideoReward(release[0], home / "template.txt", dtype=torch.bfloat16, fps=6.0)
    assert half.head.dtype == torch.float32 and (half(video, PROMPTS) - scores).abs().max() < 1.0
    reward(video.detach(), ["", *PROMPTS[1:]])  # an empty prompt has visual and motion quality all the same


def test_the_template_is_read_and_not_run(home, tmp_path):
    bomb = tmp_path / "prompt_template.py"
    bomb.write_text(f"raise SystemExit('ran')\nSIMPLE = 'x'\nDETAILED_PROMPT_WITH_SPECIAL_TOKEN = {TEMPLATE!r}\n")
    assert read_template(bomb) == TEMPLATE == read_template(home / "template.txt")
    bomb.write_text("SIMPLE = 'x'\n")
    with pytest.raises(ValueError, match="assigns no string"):
        read_template(bomb)
    for text in (TEMPLATE.replace("{text_prompt}", ""), TEMPLATE.replace("<|MQ_reward|>", ""),
                 TEMPLATE.replace("<|VQ_reward|>", "<|TA_reward|>")):  # fmt: skip
        (tmp_path / "t.txt").write_text(text)
        with pytest.raises(ValueError, match="must contain"):
            read_template(tmp_path / "t.txt")
    (tmp_path / "t.txt").write_text(TEMPLATE + "<|TA_reward|>")
    with pytest.raises(ValueError, match="occur once"):
        read_template(tmp_path / "t.txt")


def test_refusals(home, release, tmp_path):
    folder, _ = release
    with pytest.raises(ValueError, match=r"prompt_template\.py"):
        VideoReward(folder)
    with pytest.raises(ValueError, match="criteria must be"):
        VideoReward(folder, home / "template.txt", criteria=["beauty"])
    with pytest.raises(ValueError, match=r"no model_config\.json"):
        VideoReward(tmp_path, home / "template.txt")
    reward = judge(home, release, fps=6.0)
    for token in (*SPECIAL, "<|video_pad|>"):
        with pytest.raises(ValueError, match="are not text"):
            reward(videos(1), [f"a {token} dog"])
    config = json.loads((folder / "model_config.json").read_text())
    config["model_config"]["use_special_tokens"] = False
    (tmp_path / "model_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="three reward tokens"):
        read_release(tmp_path)
    config["model_config"] |= {"use_special_tokens": True, "output_dim": 1 if reward.release.outputs == 3 else 3}
    (tmp_path / "model_config.json").write_text(json.dumps(config))
    (tmp_path / "checkpoint-1").symlink_to(folder / "checkpoint-20")
    with pytest.raises(ValueError, match=r"rm_head\.weight must be"):
        VideoReward(tmp_path, home / "template.txt")


def test_lora_without_its_partner_is_refused():
    w, a = torch.zeros(3, 3), torch.ones(1, 3)
    merged = merge_lora({"x.weight": w, "x.lora_A.weight": a, "x.lora_B.weight": torch.ones(3, 1)}, 0.5)
    assert torch.equal(merged["x.weight"], torch.full((3, 3), 0.5)) and list(merged) == ["x.weight"]
    for state in ({"x.weight": w, "x.lora_A.weight": a}, {"x.lora_A.weight": a, "x.lora_B.weight": a.T}):
        with pytest.raises(ValueError, match="lacks"):
            merge_lora(state, 1.0)
    with pytest.raises(ValueError, match="unknown kind"):
        merge_lora({"x.lora_embedding_A": a}, 1.0)
