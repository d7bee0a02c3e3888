"""Steadied targets: closed forms, orthogonality of the error, and wordings that show the same."""

import pytest
import torch

from flowalign.pipelines.worlds import scenes, shapes, shapes_training, splits
from flowalign.pipelines.worlds.targets import first_wordings, posterior_mean

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_two_candidates_give_the_hyperbolic_tangent():
    """E[x0 | x] of a uniform prior on ±m is m tanh(a m x / s²)."""
    x = torch.linspace(-3, 3, 31, dtype=torch.float64)[:, None]
    a, s, m = torch.full((31,), 0.4, dtype=torch.float64), torch.full((31,), 0.7, dtype=torch.float64), 1.7
    pair = torch.tensor([[m], [-m]], dtype=torch.float64).expand(31, 2, 1)
    expected = m * torch.tanh(0.4 * m * x / 0.7**2)
    torch.testing.assert_close(posterior_mean(x, a, s, pair), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("t", [0.3, 0.7, 0.95])
def test_the_error_is_orthogonal_to_every_function_of_the_noised_picture(t):
    g, n = generator(1), 200_000
    points = torch.randn(5, 2, generator=g)
    x0 = points[torch.randint(5, (n,), generator=g)]
    x = (1 - t) * x0 + t * torch.randn(n, 2, generator=g)
    error = x0 - posterior_mean(x, torch.full((n,), 1 - t), torch.full((n,), t), points.expand(n, 5, 2))
    for f in (torch.ones_like(x), x, x.square(), x.sin()):
        product = (error * f).flatten()
        assert abs(product.mean()) < 4 * product.std() / product.numel() ** 0.5


def test_it_ends_at_the_drawn_picture_and_begins_at_the_mean():
    g = generator(2)
    candidates = torch.randn(3, 6, 8, generator=g)
    x0 = candidates[:, 0]
    clean = posterior_mean(0.99 * x0, torch.full((3,), 0.99), torch.full((3,), 0.01), candidates)
    torch.testing.assert_close(clean, x0)
    noisy = posterior_mean(torch.randn(3, 8, generator=g), torch.zeros(3), torch.ones(3), candidates)
    torch.testing.assert_close(noisy, candidates.mean(1))


def test_the_first_wording_shows_the_same():
    known = splits.base()
    first = first_wordings(known)
    turned = 0
    for c, i in zip(known, first.tolist(), strict=True):
        assert known[i] in splits.wordings(c)
        turned += known[i] != c
        if c.relation in ("above", "left of") or c.relation is None:
            assert known[i] == c
    told = [known[i].relation for i in first.tolist() if known[i].relation]
    assert turned > 250
    assert sum(r in ("above", "left of") for r in told) / len(told) > 0.9  # the rest have their other wording hidden


def test_references_are_pictures_of_their_captions(monkeypatch):
    """Decoded, they pass the strict judge."""
    from diffusers import AutoencoderKL

    from flowalign.pipelines.worlds import store
    from flowalign.rewards.shapes import verdicts

    monkeypatch.setattr(shapes_training, "REFERENCES", 2)
    vae = AutoencoderKL.from_pretrained(store.path("shapes"), subfolder="vae")
    latents = shapes_training.references(vae, CPU)
    assert latents.shape == (len(splits.base()), 2, 1024)
    some = torch.arange(0, len(splits.base()), 7)
    z = latents[some, 1].float().view(-1, 4, 16, 16) / vae.config.scaling_factor + vae.config.shift_factor
    with torch.no_grad():
        images = (vae.decode(z).sample / 2 + 0.5).clamp(0, 1)
    assert verdicts(images, [str(splits.base()[int(i)]) for i in some])["strict"].mean() > 0.97


class Recorder(torch.nn.Module):
    """Stands for the transformer: keeps what it is asked and answers zero."""

    def forward(self, hidden_states, timestep, encoder_hidden_states, pooled_projections, return_dict):
        self.x, self.t = hidden_states, timestep / 1000
        return (torch.zeros_like(hidden_states),)


def test_the_first_stages_see_pure_noise_and_two_of_four_words(monkeypatch):
    pipe, g = shapes.build(), generator(3)
    pipe.register_modules(transformer=(net := Recorder()))
    seen = []
    place = scenes.Layout.__call__
    monkeypatch.setattr(scenes.Layout, "__call__", lambda self, i, g: (seen.append(i), place(self, i, g))[1])
    monkeypatch.setattr(shapes_training, "references", lambda vae, device: torch.zeros(len(splits.base()), 2, 1024))
    for _ in range(4):
        shapes_training.first_loss(pipe, g)
        assert (net.t > 0.999).all()
    told = [splits.base()[int(i)].relation for i in torch.cat(seen)]
    assert sum(r in ("above", "left of") for r in told) > 0.9 * sum(r is not None for r in told) > 0
    shapes_training.flow_loss(pipe, g)
    assert (net.t < 0.5).any()
    assert (net.t > 0.999).any()


def test_the_layout_stage_sees_the_times_at_which_the_layout_is_decided(monkeypatch):
    """Three quarters of its times are those of a shift of 6, whose median is 6 / 7."""
    pipe, times = shapes.build(), []
    pipe.register_modules(transformer=(net := Recorder()))
    monkeypatch.setattr(shapes_training, "references", lambda vae, device: torch.zeros(len(splits.base()), 2, 1024))
    for seed in range(8):
        shapes_training.layout_loss(pipe, generator(seed))
        times.append(net.t)
    t = torch.cat(times)
    assert t.median().item() == pytest.approx(0.83, abs=0.03)
    assert 0.6 < ((t > 0.7) & (t < 0.97)).float().mean() < 0.8


def test_the_mean_is_taken_in_single_precision_whatever_the_autocast():
    g = generator(4)
    candidates, x = torch.randn(6, 9, 64, generator=g), torch.randn(6, 64, generator=g)
    a, s = torch.linspace(0.9, 0.1, 6), torch.linspace(0.1, 0.9, 6)
    plain = posterior_mean(x, a, s, candidates)
    with torch.autocast("cpu", torch.bfloat16):
        again = posterior_mean(x, a, s, candidates)
    assert torch.equal(again, plain)


class TwoPictures(torch.nn.Module):
    """The velocity on ±c alone, ``(x - c tanh((1 - t) c·x / t²)) / t``; with ``sure`` that of c by itself."""

    def __init__(self, c, sure):
        super().__init__()
        self.c, self.sure = c, sure

    def forward(self, hidden_states, timestep, encoder_hidden_states, pooled_projections, return_dict):
        t = timestep / 1000
        which = torch.tanh((1 - t) * torch.einsum("bchw,chw->b", hidden_states, self.c) / t.square())
        mean = self.c if self.sure else which[:, None, None, None] * self.c
        return ((hidden_states - mean) / t[:, None, None, None],)


@pytest.mark.parametrize("empty", [False, True])
def test_the_loss_is_least_for_the_velocity_of_all_that_the_caption_could_show(monkeypatch, empty):
    """Captions aim at the mean over their pictures, the empty caption, which shows anything, at the one drawn."""
    c = 0.03 * torch.randn(4, 16, 16, generator=generator(5))
    pipe = shapes.build()
    monkeypatch.setattr(shapes_training, "DROPOUT", float(empty))
    monkeypatch.setattr(shapes_training, "latents", lambda vae, images: c.expand(len(images), 4, 16, 16))
    monkeypatch.setattr(
        shapes_training, "references", lambda vae, device: -c.flatten().expand(len(splits.base()), 1, 1024)
    )
    found = {}
    for sure in (False, True):
        pipe.register_modules(transformer=TwoPictures(c, sure))
        found[sure] = float(shapes_training.flow_loss(pipe, generator(6)))
    assert found[empty] < 1e-7
    assert found[not empty] > 1e-4
