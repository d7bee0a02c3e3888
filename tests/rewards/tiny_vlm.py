"""Tiny random vision-language checkpoints of the published layouts, with tokenizers built offline."""

import torch

WORDS = (
    "a an the red blue green circle square two three above below cat dog bell yes no Yes No user assistant system . , "
    ": ? ! Does this figure show Please answer or Describe image in detail picture shows video rate it Answer Is first "
    "better than second one with respect to Prompt prompt reason step by think why shape is and of on"
)

QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n"
    "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tokenizer(special, **extra):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {w: i for i, w in enumerate(["<pad>", "<unk>", *special, *dict.fromkeys(WORDS.split())])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", additional_special_tokens=list(special), **extra
    )


def shake(model, std=0.15):
    """The default initialisation makes all pictures look alike; a wider one lets tests tell them apart."""
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=std)


def qwen(folder, config_class, model_class, processor_class, vision, seed=0):
    """A checkpoint of the Qwen2-VL line: 14-pixel patches, 2x2 merging, 3-dimensional rotary positions."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    torch.manual_seed(seed)
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tok = tokenizer(special, eos_token="<|im_end|>")
    tok.image_token, tok.video_token = "<|image_pad|>", "<|video_pad|>"
    ids = {t: tok.convert_tokens_to_ids(t) for t in special}
    config = config_class(
        text_config=dict(
            vocab_size=len(tok) + 4, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=ids["<|im_end|>"],
            pad_token_id=0, rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"},
        ),
        vision_config=dict(depth=2, num_heads=2, patch_size=14, **vision),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )  # fmt: skip
    model = model_class(config)
    shake(model)
    model.save_pretrained(folder)
    processor_class(
        image_processor=Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56}),
        video_processor=Qwen2VLVideoProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56}),
        tokenizer=tok, chat_template=QWEN_TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def qwen2_vl(folder, seed=0):
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

    vision = dict(embed_dim=16, hidden_size=32, mlp_ratio=2)
    return qwen(folder, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor, vision, seed)


def qwen25_vl(folder, seed=0):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    vision = dict(hidden_size=16, out_hidden_size=32, intermediate_size=24, fullatt_block_indexes=[1], window_size=28)
    return qwen(folder, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, vision, seed)


def llava(folder, seed=0):
    """A LLaVA 1.5 checkpoint: CLIP tower, 4 + 1 patch tokens of which the class token is dropped."""
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    torch.manual_seed(seed)
    tok = tokenizer(["<s>", "</s>", "<image>"], bos_token="<s>", eos_token="</s>")
    config = LlavaConfig(
        vision_config=dict(
            model_type="clip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=2, image_size=28, patch_size=14, projection_dim=16,
        ),
        text_config=dict(
            model_type="llama", vocab_size=len(tok) + 4, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
        ),
        image_token_index=tok.convert_tokens_to_ids("<image>"), image_seq_length=4,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    shake(model)
    model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=tok, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE, image_token="<image>",
    ).save_pretrained(folder)  # fmt: skip
    return folder


def qwen3_vl(folder, seed=0):
    """A Qwen3-VL checkpoint: 16-pixel patches, pictures fed into several layers, interleaved rotary positions."""
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )  # fmt: skip

    torch.manual_seed(seed)
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tok = tokenizer(special, eos_token="<|im_end|>")
    tok.image_token, tok.video_token = "<|image_pad|>", "<|video_pad|>"
    tok.vision_start_token, tok.vision_end_token = "<|vision_start|>", "<|vision_end|>"
    ids = {t: tok.convert_tokens_to_ids(t) for t in special}
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=len(tok) + 4, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
            rope_scaling={"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True},
        ),
        vision_config=dict(
            depth=2, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=16, out_hidden_size=32,
            num_position_embeddings=64, deepstack_visual_indexes=[0, 1],
        ),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    model = Qwen3VLForConditionalGeneration(config)
    shake(model)
    model.save_pretrained(folder)
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=16, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64}),
        video_processor=Qwen3VLVideoProcessor(), tokenizer=tok, chat_template=QWEN_TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def gemma3(folder, seed=0):
    """A Gemma 3 checkpoint: SigLIP tower, pictures attended to in both directions."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3ImageProcessor, Gemma3Processor

    torch.manual_seed(seed)
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    special = ["<bos>", "<eos>", *names.values()]
    tok = tokenizer(special, eos_token="<eos>", bos_token="<bos>", extra_special_tokens=names)
    begin, end, soft = (tok.convert_tokens_to_ids(t) for t in names.values())
    config = Gemma3Config(
        text_config=dict(
            vocab_size=len(tok) + 4, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
        ),
        vision_config=dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32,
            patch_size=8,
        ),
        mm_tokens_per_image=4, image_token_index=soft, boi_token_index=begin, eoi_token_index=end,
    )  # fmt: skip
    model = Gemma3ForConditionalGeneration(config)
    shake(model)
    model.save_pretrained(folder)
    Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": 32, "width": 32}), tokenizer=tok, image_seq_length=4,
        chat_template=LLAVA_TEMPLATE.replace("<image>\n", "<start_of_image>"),
    ).save_pretrained(folder)  # fmt: skip
    return folder


FAMILIES = {"qwen2-vl": qwen2_vl, "qwen2.5-vl": qwen25_vl, "llava": llava}
MORE = {"qwen3-vl": qwen3_vl, "gemma-3": gemma3}
