"""Audio rewards: CLAP on tiny random checkpoints, signal metrics against hand computations."""

import math

import numpy as np
import pytest
import torch
from scipy import signal

from flowalign.protocols import Reward
from flowalign.rewards.audio_signal import SISDR, LogSpectralDistance
from flowalign.rewards.clap import Clap, resample

WORDS = ["a", "dog", "cat", "barks", "bell", "rings", "softly", "loud", "the", "of", "sound", "and"]


def noise(*shape, seed=0):
    return (0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).clamp(-1, 1)


def tiny_clap(folder, fused):
    """A CLAP checkpoint of the published layout: model, RoBERTa-like tokenizer, feature extractor."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = ClapConfig(
        text_config=dict(
            vocab_size=24, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=90,
        ),
        audio_config=dict(
            window_size=4, num_mel_bins=16, spec_size=64, patch_size=4, hidden_size=32, depths=[1, 1],
            num_attention_heads=[2, 2], patch_embeds_hidden_size=16, num_hidden_layers=2, enable_fusion=fused,
            fusion_type="aff_2d" if fused else None,
        ),
        projection_dim=12,
    )  # fmt: skip
    model = ClapModel(config)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)  # the default init makes all sounds alike
    model.save_pretrained(folder)
    ClapFeatureExtractor(
        feature_size=16, sampling_rate=8000, hop_length=80, max_length_s=1, fft_window_size=256, frequency_max=4000,
        truncation="fusion" if fused else "rand_trunc",
    ).save_pretrained(folder)  # fmt: skip
    vocab = {w: i for i, w in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    special = dict(bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["unfused", "fused"])
def folder(request, tmp_path_factory):
    return tiny_clap(tmp_path_factory.mktemp("clap"), request.param)


PROMPTS = ["a dog barks", "the bell rings softly", "loud cat"]


@pytest.mark.parametrize("length", [8000, 3000, 1234])
def test_mel_agrees_with_the_extractor(folder, length):
    clap = Clap(folder)
    audio = noise(3, 1, length)
    official = clap.extractor([a[0].numpy() for a in audio], sampling_rate=8000, return_tensors="pt")["input_features"]
    mine = clap.mel(audio)
    assert mine.shape == official.shape
    assert (mine - official).abs().max() < 1e-3  # dB
    wrong = 10 * (mine / 10).exp()  # natural for decimal logarithms is far outside that tolerance
    assert (wrong - official).abs().max() > 1


def test_clap_equals_its_formula(folder):
    from transformers import ClapModel, PreTrainedTokenizerFast

    clap = Clap(folder)
    assert isinstance(clap, Reward) and clap.card.text == 77
    audio = noise(3, 2, 8000)
    scores = clap(audio, PROMPTS)
    model = ClapModel.from_pretrained(folder).eval()
    mel = clap.extractor([a.mean(0).numpy() for a in audio], sampling_rate=8000, return_tensors="pt")["input_features"]
    words = PreTrainedTokenizerFast.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(
            input_ids=words["input_ids"], attention_mask=words["attention_mask"], input_features=mel,
            is_longer=torch.zeros(3, 1, dtype=torch.bool),
        )  # fmt: skip
    by_hand = torch.nn.functional.cosine_similarity(out.audio_embeds, out.text_embeds)
    assert torch.allclose(scores, by_hand, atol=1e-4)
    assert scores.std() > 1e-3  # the tiny model tells the samples apart, so the tests below can fail


def test_clap_pairing_batches_and_autocast(folder):
    clap = Clap(folder)
    audio = noise(3, 1, 4000)
    scores = clap(audio, PROMPTS)
    order = [2, 0, 1]
    assert torch.allclose(clap(audio[order], [PROMPTS[i] for i in order]), scores[order], atol=1e-5)
    assert not torch.allclose(clap(audio[order], PROMPTS), scores[order], atol=1e-3)
    singles = torch.cat([clap(audio[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    assert torch.allclose(singles, scores, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(clap(audio, PROMPTS), scores, atol=1e-6)
    audio.requires_grad_()
    clap(audio, PROMPTS).sum().backward()
    assert torch.isfinite(audio.grad).all() and (audio.grad.flatten(1).abs().sum(1) > 0).all()
    assert not any(p.requires_grad for p in clap.parameters()) and not clap.train().training


def test_clap_cuts_long_prompts_and_long_sounds(folder):
    clap = Clap(folder, max_tokens=6)
    long, cut = "a dog barks loud the bell rings", "a dog barks loud"  # <s> + 4 words + </s>
    audio = noise(1, 1, 9001)
    assert torch.equal(clap(audio, [long]), clap(audio, [cut]))
    centre = audio[..., 500:8500]
    assert torch.equal(clap(audio, [cut]), clap(centre, [cut]))
    quiet = torch.zeros(1, 1, 8000)
    assert clap(quiet, [""]).isfinite().all()  # silence and no words have a score: a meaningless one, not a NaN


def test_resample_equals_scipy_and_carries_gradients(folder):
    for length, rate, target in [(300, 100, 80), (300, 100, 150), (301, 100, 80), (441, 44100, 48000), (7, 10, 10)]:
        x = noise(2, length)
        want = signal.resample(x.numpy(), max(1, round(length * target / rate)), axis=-1)
        assert np.allclose(resample(x, rate, target).numpy(), want, atol=1e-5)
    t = torch.arange(4000) / 4000
    tone = 0.5 * torch.sin(2 * math.pi * 50 * t)[None, None]
    fine = 0.5 * torch.sin(2 * math.pi * 50 * torch.arange(8000) / 8000)[None, None]
    told, right, untold = (
        Clap(folder, rate=4000)(tone, ["bell"]),
        Clap(folder)(fine, ["bell"]),
        Clap(folder)(tone, ["bell"]),
    )
    assert (told - right).abs() < 2e-3 < (untold - right).abs()  # empty bins differ in the last bit, -100 dB down


# -- signal metrics ----------------------------------------------------------------------------------------------------


def test_si_sdr_by_hand():
    s, n = noise(2, 3, 2000, seed=1).double(), noise(2, 3, 2000, seed=2).double()
    heard = (0.5 * s + 0.1 * n).float()
    meta = [{"reference": r} for r in s.float()]
    alpha = (heard.double() * s).sum(-1, keepdim=True) / s.square().sum(-1, keepdim=True)
    want = 10 * ((alpha * s).square().sum(-1) / (heard.double() - alpha * s).square().sum(-1)).log10().mean(1)
    score = SISDR()(heard, ["", ""], meta)
    assert torch.allclose(score.double(), want, atol=1e-3)
    assert torch.allclose(SISDR()(0.3 * heard, ["", ""], meta), score, atol=1e-3)  # blind to loudness


def test_log_spectral_distance_by_hand():
    clean, heard = noise(2, 1, 1500, seed=3), noise(2, 1, 1500, seed=4)
    meta = [{"reference": r} for r in clean]
    score = LogSpectralDistance([256], floor=60)(heard, ["", ""], meta)
    for i in range(2):
        spectra = [
            np.abs(np.stack([np.fft.rfft(x[a : a + 256] * signal.get_window("hann", 256))
                             for a in range(0, 1500 - 255, 64)])) ** 2
            for x in (heard[i, 0].numpy(), clean[i, 0].numpy())
        ]  # fmt: skip
        least = spectra[1].max() * 1e-6
        gap = 10 * np.log10((spectra[0] + least) / (spectra[1] + least))
        assert score[i].item() == pytest.approx(-np.sqrt((gap**2).mean(1)).mean(), rel=1e-3)
    same = LogSpectralDistance()(clean, ["", ""], meta)
    assert torch.allclose(same, torch.zeros(2), atol=1e-4)


def test_the_two_metrics_have_different_blind_spots():
    clean = noise(1, 1, 4000, seed=5)
    meta = [{"reference": clean[0]}]
    quiet, flipped = 0.1 * clean, -clean
    assert SISDR()(quiet, [""], meta) > 60 and LogSpectralDistance()(quiet, [""], meta) < -15
    assert LogSpectralDistance()(flipped, [""], meta) > -1e-3
    noisy = [(clean + k * noise(1, 1, 4000, seed=6)).clamp(-1, 1) for k in (0.05, 0.2, 0.7)]
    scores = torch.stack([torch.cat([m(x, [""], meta) for x in noisy]) for m in (SISDR(), LogSpectralDistance())])
    assert (scores[:, :-1] > scores[:, 1:]).all()  # both fall as noise rises


@pytest.mark.parametrize("make", [SISDR, LogSpectralDistance])
def test_signal_metrics_gradients_pairing_and_refusals(make):
    reward = make()
    clean, heard = noise(3, 1, 2048, seed=7), noise(3, 1, 2048, seed=8).requires_grad_()
    meta = [{"reference": r} for r in clean]
    score = reward(heard, [""] * 3, meta)
    assert reward.card.differentiable and isinstance(reward, Reward)
    score.sum().backward()
    assert torch.isfinite(heard.grad).all() and (heard.grad.flatten(1).abs().sum(1) > 0).all()
    order = [2, 0, 1]
    assert torch.allclose(reward(heard[order], [""] * 3, [meta[i] for i in order]), score[order], atol=1e-4)
    near = (clean + 0.1 * noise(3, 1, 2048, seed=9)).clamp(-1, 1)
    assert (reward(near, [""] * 3, meta) > reward(near, [""] * 3, meta[1:] + meta[:1])).all()
    singles = torch.cat([reward(heard[i : i + 1], [""], [meta[i]]) for i in range(3)])
    assert torch.allclose(singles, score, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(reward(heard, [""] * 3, meta), score, atol=1e-6)
    perfect = clean.clone().requires_grad_()
    reward(perfect, [""] * 3, meta).sum().backward()
    assert torch.isfinite(perfect.grad).all()
    with pytest.raises(ValueError, match="reference"):
        reward(heard, [""] * 3)
    with pytest.raises(ValueError, match="must be"):
        reward(heard, [""] * 3, [{"reference": r[:, :100]} for r in clean])
    with pytest.raises(ValueError, match="silent"):
        reward(heard, [""] * 3, [{"reference": torch.zeros(1, 2048)}] * 3)
    with pytest.raises(ValueError, match="not finite"):
        reward(heard, [""] * 3, [{"reference": torch.full((1, 2048), math.nan)}] * 3)
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        reward(3 * torch.ones(1, 1, 2048), [""], meta[:1])


def test_log_spectral_refuses_short_audio():
    with pytest.raises(ValueError, match="needs 1024 samples"):
        LogSpectralDistance()(noise(1, 1, 1000), [""], [{"reference": noise(1, 1000)}])
