"""Randomly initialised checkpoints of the published layouts, small enough for a test, written to a folder.

The same classes, key names and file names as the published weights; only the sizes differ.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

WORDS = ["a", "an", "the", "red", "blue", "green", "circle", "square", "two", "three", "cats", "above", "sign", "of"]


def bert_vocab(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    letters = [c for c in 'abcdefghijklmnopqrstuvwxyz0123456789.,"']
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters, *("##" + c for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(tokens)))
    return folder


def clip_tokenizer():
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[])


def hf_clip(folder: Path, seed: int = 0, size: int = 32, context: int = 77, scale: float = 4.6) -> Path:
    """A transformers CLIP with its processor files; PickScore's and aesthetic's layout."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    config = CLIPConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=context,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
        ),
        vision_config=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=size,
            patch_size=8,
        ),
        projection_dim=24,
        logit_scale_init_value=scale,
    )
    model = CLIPModel(config)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)  # the default init makes all pictures look alike
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(folder)
    return folder


OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def open_clip_model(seed: int = 0, name: str = "flowalign-tiny"):
    import open_clip

    open_clip.add_model_config(_config_folder(name))
    torch.manual_seed(seed)
    model = open_clip.create_model(name)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
    return model


def _config_folder(name: str) -> Path:
    import tempfile

    folder = Path(tempfile.mkdtemp())
    (folder / f"{name}.json").write_text(json.dumps(OPEN_CLIP))
    return folder


def hps_checkpoint(path: Path, seed: int = 0) -> Path:
    """HPS_v2.1_compressed.pt: a pickle with ``state_dict`` beside other safe entries."""
    model = open_clip_model(seed)
    torch.save({"epoch": 1, "name": "hps", "state_dict": model.state_dict()}, path)
    return path


def aesthetic_head(path: Path, dim: int = 24, seed: int = 1) -> Path:
    from flowalign.rewards.aesthetic import affine_mlp

    torch.manual_seed(seed)
    torch.save({f"layers.{k}": v for k, v in affine_mlp(dim).state_dict().items()}, path)
    return path


def image_reward(path: Path, vocab: int, *, vision=32, text=24, depth=2, size=32, patch=8, seed=2) -> Path:
    """ImageReward.pt's names: BLIP's own ViT and BERT, the projections nobody uses, position_ids, the affine MLP."""
    g = torch.Generator().manual_seed(seed)

    def r(*shape):
        return torch.randn(*shape, generator=g) * 0.15

    state = {}

    def linear(name, out, inn):
        state[f"{name}.weight"], state[f"{name}.bias"] = r(out, inn), r(out)

    def norm(name, width):
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + r(width), r(width)

    v = "blip.visual_encoder."
    state[v + "cls_token"], state[v + "pos_embed"] = r(1, 1, vision), r(1, (size // patch) ** 2 + 1, vision)
    state[v + "patch_embed.proj.weight"], state[v + "patch_embed.proj.bias"] = r(vision, 3, patch, patch), r(vision)
    for i in range(depth):
        b = f"{v}blocks.{i}."
        norm(b + "norm1", vision)
        linear(b + "attn.qkv", 3 * vision, vision)
        linear(b + "attn.proj", vision, vision)
        norm(b + "norm2", vision)
        linear(b + "mlp.fc1", 2 * vision, vision)
        linear(b + "mlp.fc2", vision, 2 * vision)
    norm(v + "norm", vision)
    t = "blip.text_encoder."
    state[t + "embeddings.position_ids"] = torch.arange(64).unsqueeze(0)
    state[t + "embeddings.word_embeddings.weight"], state[t + "embeddings.position_embeddings.weight"] = (
        3 * r(vocab, text),
        r(64, text),
    )
    norm(t + "embeddings.LayerNorm", text)
    for i in range(depth):
        b = f"{t}encoder.layer.{i}."
        for kind, width in (("attention", text), ("crossattention", vision)):
            linear(f"{b}{kind}.self.query", text, text)
            linear(f"{b}{kind}.self.key", text, width)
            linear(f"{b}{kind}.self.value", text, width)
            linear(f"{b}{kind}.output.dense", text, text)
            norm(f"{b}{kind}.output.LayerNorm", text)
        linear(b + "intermediate.dense", 2 * text, text)
        linear(b + "output.dense", text, 2 * text)
        norm(b + "output.LayerNorm", text)
    linear("blip.vision_proj", 8, vision)
    linear("blip.text_proj", 8, text)
    for index, (out, inn) in zip(
        (0, 2, 4, 6, 7), ((1024, text), (128, 1024), (64, 128), (16, 64), (1, 16)), strict=True
    ):
        linear(f"mlp.layers.{index}", out, inn)
    torch.save(state, path)
    return path


def qwen_base(folder: Path):
    """A folder with Qwen2-VL's configuration and tokenizer files."""
    from transformers import Qwen2Tokenizer, Qwen2VLConfig
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokenizer = Qwen2Tokenizer(vocab={t: i for i, t in enumerate(letters)}, merges=[])
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.save_pretrained(folder)
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in special}
    config = Qwen2VLConfig(
        text_config=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=len(tokenizer),
            bos_token_id=0,
            eos_token_id=0,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[1, 1, 2]),
        ),
        vision_config=dict(depth=1, embed_dim=16, num_heads=2, hidden_size=32, mlp_ratio=2),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    config.save_pretrained(folder)
    return folder, config, len(tokenizer)


def hps3_checkpoint(path: Path, config, vocab: int, seed: int = 3, layout: str = "old") -> Path:
    """HPSv3.safetensors with the key names of transformers before 4.52 (``old``) or after (``new``)."""
    from transformers import Qwen2VLModel

    torch.manual_seed(seed)
    config.text_config.vocab_size = vocab
    model = Qwen2VLModel(config)
    state = {}
    for key, value in model.state_dict().items():
        value = torch.randn_like(value) * 0.2 if value.ndim > 1 else value
        if layout == "new":
            key = "model." + key
        elif key.startswith("language_model."):
            key = "model." + key.removeprefix("language_model.")
        state[key] = value.clone()
    state["lm_head.weight"] = torch.randn(vocab, 32)
    for index, (out, inn) in zip((0, 3, 5), ((1024, 32), (16, 1024), (2, 16)), strict=True):
        state[f"rm_head.{index}.weight"], state[f"rm_head.{index}.bias"] = (
            torch.randn(out, inn) * 0.1,
            torch.randn(out) * 0.1,
        )
    save_file(state, path)
    return path


def dino(folder: Path, seed: int = 5) -> Path:
    """facebook/dinov2-base's layout: config.json and model.safetensors."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(seed)
    model = Dinov2Model(
        Dinov2Config(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
        )
    )
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(folder)
    return folder


def iresnet(path: Path, widths=(4, 6, 8, 8), depths=(1, 2, 1, 1), features: int = 16, seed: int = 6) -> Path:
    """backbone.pth of insightface's iresnet: the names and shapes, num_batches_tracked included."""
    g = torch.Generator().manual_seed(seed)
    state = {}

    def conv(name, out, inn, k):
        state[f"{name}.weight"] = torch.randn(out, inn, k, k, generator=g) / (inn * k * k) ** 0.5

    def bn(name, n):
        state[f"{name}.weight"], state[f"{name}.bias"] = (
            1 + 0.1 * torch.randn(n, generator=g),
            0.1 * torch.randn(n, generator=g),
        )
        state[f"{name}.running_mean"] = 0.1 * torch.randn(n, generator=g)
        state[f"{name}.running_var"] = 1 + 0.1 * torch.rand(n, generator=g)
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    conv("conv1", widths[0], 3, 3)
    bn("bn1", widths[0])
    state["prelu.weight"] = torch.full((widths[0],), 0.25)
    inner = widths[0]
    for i, (width, depth) in enumerate(zip(widths, depths, strict=True), 1):
        for j in range(depth):
            n = f"layer{i}.{j}"
            bn(f"{n}.bn1", inner if j == 0 else width)
            conv(f"{n}.conv1", width, inner if j == 0 else width, 3)
            bn(f"{n}.bn2", width)
            state[f"{n}.prelu.weight"] = torch.full((width,), 0.1)
            conv(f"{n}.conv2", width, width, 3)
            bn(f"{n}.bn3", width)
            if j == 0:
                conv(f"{n}.downsample.0", width, inner, 1)
                bn(f"{n}.downsample.1", width)
        inner = width
    bn("bn2", inner)
    state["fc.weight"], state["fc.bias"] = (
        torch.randn(features, inner * 49, generator=g) * 0.1,
        torch.randn(features, generator=g),
    )
    bn("features", features)
    torch.save(state, path)
    return path
