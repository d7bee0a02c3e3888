"""The shipped worlds: loaded by plain diffusers in a process without flowalign, and as good as their cards say."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

import flowalign.rewards
from flowalign.pipelines.worlds import cards, path, prompts
from flowalign.pipelines.worlds.shapes import encode
from flowalign.pipelines.worlds.store import WEIGHTS
from flowalign.rewards.objects import find_objects
from flowalign.rewards.shapes import verdicts

PLAIN = """
import sys, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
image = pipe("a red circle", num_inference_steps=2, output_type="pt").images
assert image.shape == (1, 3, 32, 32), image.shape
assert not any(m.split(".")[0] == "flowalign" for m in sys.modules)
"""


@pytest.fixture(scope="module")
def pipe():
    return DiffusionPipeline.from_pretrained(path("shapes"))


@pytest.mark.parametrize("name", ["shapes", "shapes-turbo", "shapes-vp", "shapes-vp-v"])
def test_plain_diffusers_loads_it(name, tmp_path):
    done = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN, str(path(name))], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_everything_is_small_and_safetensors():
    files = [f for f in WEIGHTS.rglob("*") if f.is_file()]
    judges = Path(flowalign.rewards.__path__[0]).rglob("*.safetensors")
    assert sum(f.stat().st_size for f in (*files, *judges) if f.suffix == ".safetensors") < 25e6
    assert sum(f.stat().st_size for f in files if "shapes" in f.relative_to(WEIGHTS).parts) < 4e6
    allowed = {".safetensors", ".json", ".md", ".png", ".txt"}
    assert {f.suffix for f in files} <= allowed
    denoiser = load_file(path("shapes") / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {w.dtype for w in denoiser.values()} == {torch.float16}


def test_the_pipeline_conditions_as_training_did(pipe):
    text = ["a red circle above a blue square", "three cyan squares"]
    tokens, _, pooled, _ = pipe.encode_prompt(text, text, text, do_classifier_free_guidance=False)
    ids = pipe.tokenizer(text, padding="max_length", max_length=10, return_tensors="pt").input_ids
    mine = encode(pipe, ids)
    assert torch.equal(tokens, mine[0])
    assert torch.equal(pooled, mine[1])


def test_the_judge_reads_pictures_through_the_autoencoder(pipe):
    from shapes_pictures import pictures

    images, truth = pictures(480, 7, noise=0, blur=0, gain=0)
    with torch.no_grad():
        again = pipe.vae.decode(pipe.vae.encode(2 * images - 1).latent_dist.mean).sample / 2 + 0.5
    assert verdicts(again.clamp(0, 1), list(map(str, truth)))["strict"].mean() >= 0.98  # of 960: .992


def test_it_draws_what_is_asked_for_and_leaves_room(pipe):
    text = [t for k in ("single", "relation", "mixed") for t in cards.repeated(prompts("report", k), 60)]
    images = cards.generate(pipe, text, seed=11)
    single, relation, mixed = verdicts(images, text)["strict"].split(60)
    assert single.mean() >= 0.93  # the card: .99
    assert relation.mean() >= 0.87  # the card: .96
    assert 0.4 <= mixed.mean() <= 0.85  # room to learn
    assert len(find_objects(images).row) > 60


@pytest.mark.parametrize(("name", "prediction"), [("shapes-vp", "epsilon"), ("shapes-vp-v", "v_prediction")])
def test_the_vp_worlds_draw_what_is_asked_for(name, prediction):
    """The cards: single .98, counts .79, relations .92 and more."""
    pipe = DiffusionPipeline.from_pretrained(path(name))
    assert pipe.scheduler.config.prediction_type == prediction
    text = [t for k in ("single", "relation", "mixed") for t in cards.repeated(prompts("report", k), 36)]
    single, relation, mixed = verdicts(cards.generate(pipe, text, seed=11), text)["strict"].split(36)
    assert single.mean() >= 0.85
    assert relation.mean() >= 0.75
    assert 0.3 <= mixed.mean() <= 0.85  # room to learn


def test_measure_counts_layouts_of_correct_pictures_only():
    images = torch.zeros(8, 3, 32, 32)

    def verdict(media, text):
        return torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]), torch.tensor([1, 1, 2, 2, 3, 4, 5, 6])

    figures = cards.measure(images, ["a red circle"] * 8, verdict)
    assert (figures.accuracy, figures.layouts) == (0.5, pytest.approx(2))
    assert figures.error == pytest.approx((0.25 / 8) ** 0.5)


def test_the_card_is_written(tmp_path, pipe):
    def verdict(media, text):
        return torch.ones(len(media)), torch.arange(len(media))

    card = cards.write_card(pipe, tmp_path, verdict, guidance=[1.0], samples=4, steps=[1])
    assert card["reports"]["1 steps, guidance 1"]["report"]["count"]["accuracy"] == 1
    assert {p.name for p in tmp_path.iterdir()} == {"card.json", "card.md", "samples.png"}
    assert "| single | report | 4 | 1.000" in Path(tmp_path / "card.md").read_text()


def test_the_card_reports_the_best_setting_and_the_best_of_the_fewest_steps(tmp_path, pipe, monkeypatch):
    """Accuracies by setting are planted: 2 steps at guidance 1 is the best, 1 step at guidance 2 the best of one."""
    planted = {(1, 1.0): 0.2, (1, 2.0): 0.4, (2, 1.0): 0.9, (2, 2.0): 0.1}

    def generate(pipe, text, *, steps, guidance, seed):
        return torch.full((len(text), 3, 32, 32), planted[steps, guidance])

    def verdict(media, text):
        return (torch.arange(len(media)) < media.mean((1, 2, 3)) * len(media) - 0.01).float(), torch.arange(len(media))

    monkeypatch.setattr(cards, "generate", generate)
    card = cards.write_card(pipe, tmp_path, verdict, guidance=[1.0, 2.0], samples=40, steps=[1, 2])
    assert card["best"] == {"steps": 2, "guidance": 1.0}
    assert {k: v["report"]["count"]["accuracy"] for k, v in card["reports"].items()} == {
        "1 steps, guidance 2": pytest.approx(0.4), "2 steps, guidance 1": pytest.approx(0.9)
    }  # fmt: skip
    assert [card["reports"][k]["withheld"]["mixed"]["n"] for k in card["reports"]] == [10, 10]
    scanned = {k: row["mixed"] for k, row in card["scan_on_select"].items() if k != "samples"}
    assert scanned == {f"{n} steps, guidance {w:g}": pytest.approx(a) for (n, w), a in planted.items()}
