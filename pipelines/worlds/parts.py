"""Small stock components for the conditional worlds: tokenizer, text encoders, autoencoder, Flux with a control image.

Everything here is a class of transformers or diffusers with a small configuration, so a saved pipeline loads in plain
diffusers. `shapes-edit` and `shapes-sr` are both a ``FluxControlPipeline``: the given picture goes through the same
autoencoder and is concatenated to the noisy latents along the channels, and the velocity ``v = ε - x0`` is learned by

    min E |v(x_t, t, picture, text) - (ε - x0)|²,    x_t = (1 - t) x0 + t ε        (Lipman et al. 2210.02747)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxControlPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

__all__ = [
    "TOKENS", "as_control", "autoencoder", "autoencoder_loss", "flow_loss", "flow_times", "flux_control", "latents",
    "normalise", "shifted", "t5_encoder", "token_ids", "without_noise", "word_tokenizer",
]  # fmt: skip

TOKENS = 8  # prompts are padded to this many tokens; the longest of most worlds has seven words, and an end
TEXT_WIDTH = 64


def word_tokenizer(sentences: Sequence[str], length: int = TOKENS) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word of ``sentences``; other words become ``<unk>``."""
    words = sorted({w for s in sentences for w in s.split()})
    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *words])}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    core.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


def token_ids(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], device: torch.device) -> Tensor:
    """Return ``(B, T)`` ids as the pipelines compute them, T the tokenizer's length."""
    length = tokenizer.model_max_length
    out = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return out.input_ids.to(device)


def clip_encoder(vocabulary: int, length: int = TOKENS) -> CLIPTextModel:
    """Return a one-layer CLIP text model; its pooled output drives the adaptive norms."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=TEXT_WIDTH, intermediate_size=128, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=length, eos_token_id=1, bos_token_id=0, pad_token_id=0,
            projection_dim=TEXT_WIDTH,
        )
    )  # fmt: skip


def t5_encoder(vocabulary: int) -> T5EncoderModel:
    """Return a two-layer T5 encoder; its tokens are attended to."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary, d_model=TEXT_WIDTH, d_kv=16, num_heads=4, d_ff=128, num_layers=2, dropout_rate=0.0,
            pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        )
    )  # fmt: skip


def autoencoder(channels: tuple[int, ...] = (16, 32), latent_channels: int = 8) -> AutoencoderKL:
    """Return an untrained ``AutoencoderKL`` that halves the picture's edges."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def autoencoder_loss(vae: AutoencoderKL, images: Tensor, noise: Tensor, kl: float = 1e-5) -> Tensor:
    """Return |x̂ - x| + 2 |x̂ - x|² + kl · KL of pictures in [0, 1], scalar; ``noise`` has the latents' shape."""
    x = 2 * images - 1
    posterior = vae.encode(x).latent_dist
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    return (decoded - x).abs().mean() + 2 * (decoded - x).square().mean() + kl * posterior.kl().mean()


@torch.no_grad()
def normalise(vae: AutoencoderKL, images: Tensor) -> None:
    """Write the shift and scale that give latents of ``images`` mean 0 and standard deviation 1 into the config."""
    z = vae.encode(2 * images - 1).latent_dist.mean
    vae.register_to_config(shift_factor=float(z.mean()), scaling_factor=float(1 / z.std()))


@torch.no_grad()
def without_noise(vae: AutoencoderKL) -> None:
    """Give every posterior the standard deviation e^-15: a sample of it then is its mean.

    ``FluxControlPipeline`` *samples* the posterior of its control image, while :func:`latents` takes the mean; and
    where nothing is (most of a picture) the KL term has taught the encoder a deviation near 1.
    """
    head = vae.encoder.conv_out  # means, then log-variances
    c = vae.config.latent_channels
    head.weight[c:].zero_()
    head.bias[c:].fill_(-30.0)


def as_control(images: Tensor) -> Tensor:
    """Return pictures in [0, 1] as a ``control_image``: tensors in [-1, 1] (the pipeline scales PIL images only)."""
    return 2 * images - 1


def latents(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Return packed Flux latents ``(B, tokens, 4 C)`` of pictures in [0, 1], without sampling noise."""
    z = vae.encode(2 * images - 1).latent_dist.mean
    z = (z - vae.config.shift_factor) * vae.config.scaling_factor
    return FluxControlPipeline._pack_latents(z, *z.shape)


def flux_control(
    sentences: Sequence[str],
    vae: AutoencoderKL,
    double: int = 1,
    single: int = 3,
    length: int = TOKENS,
    shift: float = 1.0,
) -> FluxControlPipeline:
    """Return an untrained ``FluxControlPipeline`` for 32×32 pictures.

    Args:
        sentences: every prompt of the world; they make the vocabulary.
        vae: halves the picture's edges.
        double: number of two-stream blocks.
        single: number of one-stream blocks.
        length: tokens of a prompt; the longest and its end must fit.
        shift: of the sampler's times (:func:`shifted`).
    """
    tokenizer = word_tokenizer(sentences, length)
    c = vae.config.latent_channels * 4
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=2 * c, out_channels=c, num_layers=double, num_single_layers=single,
        attention_head_dim=32, num_attention_heads=4, joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH, guidance_embeds=False, axes_dims_rope=(4, 14, 14),
    )  # fmt: skip
    # the output starts at zero, as DiTs do: the first steps then do not fight a random field
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return FluxControlPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae,
        text_encoder=clip_encoder(len(tokenizer), length),
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder(len(tokenizer)),
        tokenizer_2=tokenizer,
        transformer=transformer,
    )


def flow_times(n: int, generator: torch.Generator) -> Tensor:
    """Return ``(n,)`` logit-normal times, stratified over the batch (Esser et al. 2403.03206, section 3.1)."""
    u = (torch.arange(n, device=generator.device) + torch.rand(n, generator=generator, device=generator.device)) / n
    return torch.sigmoid(math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-0.9999, 0.9999)))


def shifted(t: Tensor, shifts: Sequence[float]) -> Tensor:
    """Return ``s t / (1 + (s - 1) t)`` of times ``(B,)``, the shifts s dealt out over the batch; > 1 is towards noise.

    Small objects on an even ground can be seen in latents that are mostly noise: what they become is decided there.
    """
    s = torch.tensor(shifts, device=t.device).repeat(len(t))[: len(t)]
    return s * t / (1 + (s - 1) * t)


def flow_loss(
    pipe: FluxControlPipeline, x0: Tensor, control: Tensor, ids: Tensor, generator: torch.Generator,
    shifts: Sequence[float] = (1.0,),
) -> Tensor:  # fmt: skip
    """Return the flow-matching loss of one batch, scalar.

    Args:
        pipe: a :func:`flux_control` pipeline.
        x0: :func:`latents` of the wanted pictures ``(B, tokens, C)``.
        control: latents of the given pictures, likewise.
        ids: ``(B, T)`` of the prompts.
        generator: of times and noise, on the latents' device.
        shifts: of the times (:func:`shifted`).
    """
    noise = torch.randn(x0.shape, generator=generator, device=x0.device)
    t = shifted(flow_times(len(x0), generator), shifts)
    x = (1 - t)[:, None, None] * x0 + t[:, None, None] * noise
    edge = round(math.sqrt(x0.shape[1]))
    v = pipe.transformer(
        hidden_states=torch.cat([x, control], 2),
        timestep=t,
        pooled_projections=pipe.text_encoder(ids).pooler_output,
        encoder_hidden_states=pipe.text_encoder_2(ids)[0],
        txt_ids=torch.zeros(ids.shape[1], 3, device=ids.device),
        img_ids=FluxControlPipeline._prepare_latent_image_ids(1, edge, edge, ids.device, torch.float32),
        return_dict=False,
    )[0]
    return (v.float() - (noise - x0)).square().mean()
