"""Losses with known probabilities, heads, data folders, and trainings that must learn a known taste."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from tiny_judges import dino, hf_clip
from torchvision.utils import save_image

from flowalign.rewards import load
from flowalign.rewards.backbones import TowerBackbone, VitBackbone
from flowalign.rewards.data import picture, read_folder
from flowalign.rewards.distil import distil
from flowalign.rewards.heads import Pooled, QueryAttention
from flowalign.rewards.losses import (
    binary_pairs,
    bradley_terry,
    bradley_terry_ties,
    gaussian_preference,
    win_tie,
)
from flowalign.rewards.training import HeadSpec, Settings, Trained, train

torch.set_num_threads(1)
A = torch.linspace(-3, 3, 13, dtype=torch.float64)
B = torch.zeros_like(A)


def label(value):
    return torch.full((13,), value, dtype=torch.long)


# ---- losses ---------------------------------------------------------------------------------------------------------


def test_bradley_terry_is_minus_the_log_of_its_probability():
    assert torch.allclose(bradley_terry(A, B, label(1)), -torch.log(torch.sigmoid(A)))
    assert torch.allclose(bradley_terry(A, B, label(-1)), -torch.log(torch.sigmoid(-A)))
    assert bradley_terry(A, B, label(0)).sum() == 0


@pytest.mark.parametrize("k", [1.5, 5.0])
def test_ties_are_a_probability_model(k):
    p = [torch.exp(-bradley_terry_ties(A, B, label(v), k)) for v in (1, 0, -1)]
    assert torch.allclose(sum(p), torch.ones_like(A))
    assert torch.allclose(p[0], A.exp() / (A.exp() + k)) and torch.allclose(p[2], 1 / (1 + k * A.exp()))
    assert p[1].argmax() == 6  # likeliest at equal rewards
    with pytest.raises(ValueError, match="k must be above 1"):
        bradley_terry_ties(A, B, label(1), 1.0)


def test_solireward_tie_is_btts_up_to_a_constant():
    for k in (2.0, 5.0):
        gap = win_tie(A, B, label(0), math.log(k)) - bradley_terry_ties(A, B, label(0), k)
        assert torch.allclose(gap, torch.full_like(gap, math.log(k**2 - 1)))
    tie = win_tie(A, B, label(0))
    assert tie.argmin() == 6 and torch.allclose(tie, tie.flip(0))
    assert torch.allclose(win_tie(A, B, label(1)), -torch.log(torch.sigmoid(A)))
    assert torch.allclose(win_tie(A, B, label(0), tie_weight=0.5), tie / 2)


def test_gaussian_preference_loss():
    std = torch.full_like(A, 1e-9)
    got = gaussian_preference((A, std), (B, std), label(1))
    assert torch.allclose(got, -torch.log(torch.sigmoid(A)), atol=1e-6)
    wide = gaussian_preference((A, std + 5), (B, std), label(1))
    assert (wide[-1] > got[-1]) and (wide[0] < got[0])  # an unsure judge neither gains nor loses as much


def test_binary_labels_pair_across_prompts():
    good = torch.tensor([True, False, True, False, False])
    a, b, y = binary_pairs(good, torch.Generator().manual_seed(0))
    wins = {(i, j) for i, j, v in zip(a.tolist(), b.tolist(), y.tolist(), strict=True) if v == 1}
    assert wins == {(i, j) for i in (0, 2) for j in (1, 3, 4)}
    ties = [(i, j) for i, j, v in zip(a.tolist(), b.tolist(), y.tolist(), strict=True) if v == 0]
    assert len(ties) == 4 and all(good[i] == good[j] and i != j for i, j in ties)  # 1 + 3 there are; 6 were allowed
    assert len(binary_pairs(good, ties=2)[0]) == 8
    assert (binary_pairs(torch.tensor([True, True]))[2] == 0).all()


# ---- heads ----------------------------------------------------------------------------------------------------------


def test_query_attention_by_hand():
    torch.manual_seed(0)
    head = QueryAttention(8, 2, heads=2, hidden=4).double()
    layers = [torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(3, 7, 8, dtype=torch.float64)]
    q = torch.zeros(3, 1, 8, dtype=torch.float64)
    for i, tokens in enumerate(layers):
        q = q + head.queries[i]
        n = head.inputs[i]
        x = F.layer_norm(tokens, (8,), n.weight, n.bias)
        m = head.attention[i]
        w, b = m.in_proj_weight.chunk(3), m.in_proj_bias.chunk(3)
        s = [(v @ w[j].T + b[j]).unflatten(-1, (2, 4)).transpose(1, 2) for j, v in enumerate((q, x, x))]
        y = ((s[0] @ s[1].transpose(-1, -2) / 2).softmax(-1) @ s[2]).transpose(1, 2).flatten(2)
        y = y @ m.out_proj.weight.T + m.out_proj.bias
        q = F.layer_norm(q + y, (8,), head.norms[i].weight, head.norms[i].bias)
    want = F.silu(q[:, 0] @ head.out[0].weight.T + head.out[0].bias) @ head.out[2].weight.T + head.out[2].bias
    assert torch.allclose(head(layers), want.squeeze(-1))


def test_heads_read_every_layer_and_the_time():
    torch.manual_seed(0)
    head = QueryAttention(8, 3, heads=2, timed=True)
    layers = [torch.randn(2, 5, 8, requires_grad=True) for _ in range(3)]
    time = torch.tensor([0.1, 0.9])
    score = head(layers, time)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(score.sum(), layers))
    assert (head(layers, time.flip(0)) != score).all()
    assert torch.allclose(head([v[:, torch.randperm(5)] for v in layers], time), score, atol=1e-5)  # a set of tokens
    with pytest.raises(ValueError, match="reads 3 layers"):
        head(layers[:2])
    with pytest.raises(ValueError, match="must divide"):
        QueryAttention(8, 1, heads=3)
    pooled = Pooled(8, 0, timed=True)
    assert (pooled(layers, time) != pooled(layers, time.flip(0))).all()


# ---- data -----------------------------------------------------------------------------------------------------------


def paint(folder, count=40, seed=0, sizes=((20, 20), (24, 32))):
    """Pictures whose merit is how red they are; their merits."""
    folder.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(seed)
    merits = torch.rand(count, generator=g)
    for i, merit in enumerate(merits):
        h, w = sizes[i % 2]
        x = 0.3 * torch.rand(3, h, w, generator=g)
        x[0] += 0.7 * merit
        save_image(x, folder / f"{i}.png")
    return merits


def write(path, rows):
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")


def pairs_folder(root, merits, count=150, ties=0.0):
    g = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(count):
        i, j = torch.randperm(len(merits), generator=g)[:2].tolist()
        gap = (merits[i] - merits[j]).item()
        y = 0 if abs(gap) < ties else (1 if gap > 0 else -1)
        rows.append({"prompt": f"p{i % 3}", "a": f"{i}.png", "b": f"{j}.png", "label": y})
    write(root / "pairs.jsonl", rows)


def test_folders_are_read(tmp_path):
    merits = paint(tmp_path / "s", 4)
    write(
        tmp_path / "s" / "scores.jsonl",
        [{"image": f"{i}.png", "prompt": "p", "score": m.item()} for i, m in enumerate(merits)],
    )
    data = read_folder(tmp_path / "s")
    assert data.kind == "scores" and len(data) == 4 and torch.allclose(data.value, merits)
    assert data.items[1] == (tmp_path / "s" / "1.png", "p") and data.index.tolist() == [[0], [1], [2], [3]]
    paint(tmp_path / "g" / "good", 2)
    paint(tmp_path / "g" / "bad", 3)
    data = read_folder(tmp_path / "g")
    assert data.kind == "labels" and data.value.tolist() == [1, 1, 0, 0, 0]
    assert picture(tmp_path / "s" / "1.png").shape == (3, 24, 32)


BAD_LINES = {
    '{"a": "0.png", "b": "1.png", "label": 2}': "label must be -1, 0 or 1; got 2",
    '{"a": "0.png", "b": "1.png", "label": true}': "label must be",
    '{"a": "0.png", "b": "9.png", "label": 1}': "there is no picture",
    '{"a": "0.png", "label": 1}': "wants a, b as names",
    '{"a": "0.png", "b": "1.png", "label": 1, "prompt": 3}': "prompt must be a string",
    "not json": "is not JSON",
    "[1]": "wants a, b",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_lines_are_named(tmp_path, line):
    paint(tmp_path, 2)
    good = '{"a": "0.png", "b": "1.png", "label": 1}'
    (tmp_path / "pairs.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(ValueError, match=BAD_LINES[line]) as error:
        read_folder(tmp_path)
    assert "line 2" in str(error.value)


def test_bad_folders_are_explained(tmp_path):
    with pytest.raises(ValueError, match=r"wanted pairs\.jsonl"):
        read_folder(tmp_path)
    (tmp_path / "scores.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        read_folder(tmp_path)
    (tmp_path / "scores.jsonl").write_text('{"image": "0.png", "score": NaN}')
    paint(tmp_path, 1)
    with pytest.raises(ValueError, match="finite number"):
        read_folder(tmp_path)


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return dino(tmp_path_factory.mktemp("vit"))


@pytest.mark.parametrize("loss", ["bt", "btt", "win-tie"])
def test_pairs_teach_a_taste_that_holds_for_new_pictures(tmp_path, vit, loss):
    merits = paint(tmp_path, 40)
    pairs_folder(tmp_path, merits, ties=0.05)
    torch.manual_seed(0)
    model = Trained(VitBackbone(vit, size=28), HeadSpec(hidden=16, heads=2))
    report = train(model, read_folder(tmp_path), Settings(loss=loss, epochs=25, rate=5e-3))
    assert report.accuracy > 0.85 and report.losses[-1] < 0.8 * report.losses[0]
    fresh = paint(tmp_path / "new", 30, seed=9)
    scores = torch.cat([model(picture(tmp_path / "new" / f"{i}.png")[None], [""]) for i in range(30)])
    rank = torch.corrcoef(torch.stack([scores.argsort().argsort().float(), fresh.argsort().argsort().float()]))[0, 1]
    assert rank > 0.85


@pytest.mark.parametrize("loss", ["soli", "bce"])
def test_good_and_bad_single_items_teach_too(tmp_path, vit, loss):
    merits = paint(tmp_path / "all", 40)
    for i, m in enumerate(merits):
        side = tmp_path / "data" / ("good" if m > 0.5 else "bad")
        side.mkdir(parents=True, exist_ok=True)
        (tmp_path / "all" / f"{i}.png").rename(side / f"{i}.png")
    torch.manual_seed(0)
    model = Trained(VitBackbone(vit, size=28), HeadSpec("pooled", hidden=16))
    report = train(model, read_folder(tmp_path / "data"), Settings(loss=loss, epochs=25, rate=5e-3))
    assert report.accuracy > 0.85


def test_scores_are_regressed_and_the_reward_is_saved_and_loaded_by_name(tmp_path, vit):
    merits = paint(tmp_path, 40)
    write(tmp_path / "scores.jsonl", [{"image": f"{i}.png", "score": m.item()} for i, m in enumerate(merits)])
    torch.manual_seed(0)
    model = Trained(VitBackbone(vit, taps=(1, 2), size=28), HeadSpec(hidden=16, heads=2), name="redness")
    assert train(model, read_folder(tmp_path), Settings(epochs=30, rate=5e-3)).accuracy > 0.85
    model.save(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["head.safetensors", "reward.json"]
    again = load(f"trained@{tmp_path / 'out'}")
    x = torch.rand(3, 3, 30, 30)
    assert torch.equal(again(x, [""] * 3), model(x, [""] * 3)) and again.card.name == "redness"
    y = x.clone().requires_grad_()
    model(y, [""] * 3).sum().backward()
    assert y.grad.abs().sum() > 0 and all(p.grad is None or p.grad.abs().sum() >= 0 for p in model.parameters())
    with pytest.raises(ValueError, match=r"no reward\.json"):
        Trained(tmp_path)
    with pytest.raises(ValueError, match="from its folder"):
        load("trained")


def test_prompts_can_be_part_of_the_taste(tmp_path):
    """Red is good for one prompt and bad for the other: only a backbone that reads prompts can learn it."""
    merits = paint(tmp_path, 30, sizes=((20, 20), (20, 20)))
    rows = []
    for i, m in enumerate(merits):
        rows += [{"image": f"{i}.png", "prompt": p, "score": s * m.item()} for p, s in (("red", 1), ("not", -1))]
    write(tmp_path / "scores.jsonl", rows)
    torch.manual_seed(0)
    model = Trained(TowerBackbone(hf_clip(tmp_path / "clip")), HeadSpec(hidden=32, heads=2))
    assert train(model, read_folder(tmp_path), Settings(epochs=60, rate=5e-3)).accuracy > 0.8


def test_training_refuses_what_it_cannot_learn_from(tmp_path, vit):
    merits = paint(tmp_path / "p", 6)
    pairs_folder(tmp_path / "p", merits, 8)
    model = Trained(VitBackbone(vit, size=28), HeadSpec(hidden=4, heads=2))
    with pytest.raises(ValueError, match="does not fit pairs"):
        train(model, read_folder(tmp_path / "p"), Settings(loss="bce"))
    write(tmp_path / "p" / "labels.jsonl", [{"image": f"{i}.png", "good": True} for i in range(3)])
    (tmp_path / "p" / "pairs.jsonl").unlink()
    with pytest.raises(ValueError, match="nothing to learn"):
        train(model, read_folder(tmp_path / "p"))
    with pytest.raises(ValueError, match="taps must be"):
        VitBackbone(vit, taps=(9,))


def test_noise_aware_student_foresees_better_than_one_that_is_blind_to_time(vit):
    """Redness fades with t in the previews, so that the same preview means different things at different times."""
    g = torch.Generator().manual_seed(0)
    n = 240
    merit, t = torch.rand(n, generator=g), torch.rand(n, generator=g) * 0.8
    x = torch.full((n, 3, 28, 28), 0.2)
    x[:, 0] = (0.2 + 0.8 * merit * (1 - t)).view(-1, 1, 1)
    teacher = 20 + 30 * merit
    errors = {}
    for timed in (True, False):
        torch.manual_seed(0)
        student = Trained(VitBackbone(vit, size=28), HeadSpec("pooled", hidden=64, noise_aware=True))
        times = t if timed else torch.zeros(n)
        distil(student, x[:200], times[:200], [""] * 200, teacher[:200], steps=400, rate=5e-3)
        meta = [{"time": v.item()} for v in times[200:]]
        got = student(x[200:], [""] * 40, meta)
        errors[timed] = (got - teacher[200:]).abs().mean().item()
    assert errors[True] < 3 and errors[True] < 0.6 * errors[False], errors
    with pytest.raises(ValueError, match="'time'"):
        student(x[:1], [""])
    with pytest.raises(ValueError, match="reads the time"):
        distil(Trained(VitBackbone(vit, size=28), HeadSpec(heads=2)), x, t, [""] * n, teacher)
    with pytest.raises(ValueError, match="one length"):
        distil(student, x, t[:3], [""] * n, teacher)
