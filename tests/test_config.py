"""Configuration: presets, files, exact keys; prompts from files, with line numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from flowalign.config import compose, default, flatten, from_yaml, to_dict
from flowalign.facts import WORLDS, resolve_world, world_prompts
from flowalign.methods import METHODS, names
from flowalign.pipelines.worlds.scenes import CATEGORIES
from flowalign.pipelines.worlds.store import WEIGHTS
from flowalign.prepare import Lora
from flowalign.prompts import read_prompts
from flowalign.source import Prompt


@pytest.mark.parametrize("method", names("training"))
def test_plain_values_come_back(method: str) -> None:
    """What is written to config.yaml reads back as the same configuration, for every preset of every method."""
    from flowalign.methods import resolve

    for preset in resolve(method).presets():
        config = default(method, preset)
        text = yaml.safe_dump(to_dict(config))
        assert compose(yaml.safe_load(text), None) == config


def test_file_over_preset(tmp_path: Path) -> None:
    """A file changes what it names, down to nested keys, and leaves the rest of the preset."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "method: {name: flow-grpo, window: [1, 3], clip: null}\nfit: {lr: 1e-4, max_seconds: 60}\nlora: {rank: 4}\n"
        "call: {height: 64, guidance_scale: 4.5}\noutput: runs/x\nevaluation: {images: 10}\n"
    )
    config, base = from_yaml(path), default("flow-grpo")
    assert config.method == replace(base.method, window=(1, 3), clip=None)
    assert config.fit == replace(base.fit, lr=1e-4, max_seconds=60.0) and isinstance(config.fit.max_seconds, float)
    assert config.lora == Lora(rank=4) and config.output == Path("runs/x")
    assert config.call == {"height": 64, "guidance_scale": 4.5} and config.evaluation.images == 10
    assert config.reward == base.reward


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method: flow-grpo\nfti: {lr: 1}", "no key 'fti'.*Did you mean fit"),
        ("method: flow-grpo\nfit: {lerning_rate: 1}", "no key 'lerning_rate' in FitOptions"),
        ("method: {name: flow-grpo, nois: 1}", "no key 'nois' in FlowGRPO.*noise"),
        ("method: flow-gpro", "no method is called 'flow-gpro'.*flow-grpo"),
        ("method: flow-grpo\nfit: {lr: fast}", "fit: lr takes float; got 'fast'"),
        ("method: flow-grpo\nfit: {iterations: 1.5}", "iterations takes int; got 1.5"),
        ("method: flow-grpo\nguidance: 3", "guidance takes bool"),
        ("method: {name: flow-grpo, window: [1]}", "window takes"),
        ("method: {name: flow-grpo, ratio: exact}", "one of per_dim, mse, density, guard"),
        ("method: flow-grpo\nfit: {size: 0}", "size must be at least 1; got 0"),
        ("method: flow-grpo\nevaluation: {images: 0}", "evaluation.images must be at least 1"),
        ("method: flow-grpo\nfit: {lr: .nan}", "lr must be positive; got nan"),
        ("method: flow-grpo\nfit: {max_seconds: -5}", "max_seconds must be positive; got -5"),
        ("method: flow-grpo\nfit: {max_evaluations: 0}", "max_evaluations must be positive; got 0"),
        ("method: flow-grpo\nfit: {warmup: -1}", "warmup must be at least 0; got -1"),
        ("method: flow-grpo\nema: 1", "ema is a decay: at least 0 and below 1"),
        ("method: flow-grpo\nchunk: 0", "chunk must be at least 1"),
        ("method: flow-grpo\nmax_wall: 0", "max_wall must be positive"),
        ("method: flow-grpo\nlora: {rank: 0}", "rank of a LoRA must be at least 1"),
        ("method: flow-grpo\npreset: fast", "no preset 'fast'; it has published, published-cps, demo"),
        ("fit: {lr: 1}", "no method is named"),
        ("- a\n- b", "must be a mapping"),
        ("a: [", "cannot be read"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, words: str) -> None:
    """Every mistake is named, with what would be right."""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        from_yaml(path)


def test_file_and_command_must_agree(tmp_path: Path) -> None:
    """A file of one method is not run as another."""
    path = tmp_path / "run.yaml"
    path.write_text("method: flow-grpo")
    with pytest.raises(ValueError, match="configuration of flow-grpo, and the command asks for diffusion-nft"):
        from_yaml(path, "diffusion-nft")


def test_flatten() -> None:
    """Nested keys are joined by dots."""
    flat = flatten(to_dict(default("diffusion-nft")))
    assert flat["method.name"] == "diffusion-nft" and flat["fit.lr"] == 6e-4 and flat["lora"] is None


def test_every_method_has_its_presets() -> None:
    """Every name resolves to a method of that name with a reference and both presets."""
    from flowalign.methods import resolve

    for name in METHODS:
        method = resolve(name)
        assert method.name == name and "@" in method.reference and method.summary
        assert {"published", "demo"} <= method.presets().keys()


def test_prompt_files(tmp_path: Path) -> None:
    """Text and JSONL files are read; extra keys become the reward's meta."""
    text, records = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("a red circle\n two blue squares \n\n")
    records.write_text('{"prompt": "a", "variants": ["b"], "category": "x"}\n')
    assert read_prompts(str(text)) == [Prompt("a red circle"), Prompt("two blue squares")]
    assert read_prompts(str(records)) == [Prompt("a", {"category": "x"}, ("b",))]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.txt", "", "is empty"),
        ("p.txt", "\n \n", "is empty"),
        ("p.txt", "a\n\nb", "line 2: this line is blank"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b"', "line 2: this is not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n["b"]', "line 2: wanted an object"),
        ("p.jsonl", '{"text": "a"}', r"line 1: 'prompt' must be a string.*Keys: \['text'\]"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": " "}', "line 2: 'prompt' must be"),
        ("p.jsonl", '{"prompt": "a", "variants": "b"}', "line 1: 'variants'"),
    ],
)
def test_bad_prompt_files(tmp_path: Path, name: str, text: str, words: str) -> None:
    """A malformed file is refused with the number of the line."""
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_prompts(str(path))


def test_missing_prompts(tmp_path: Path) -> None:
    """A file, a world or a dataset that is not there."""
    with pytest.raises(ValueError, match="does not exist"):
        read_prompts(str(tmp_path / "nothing.txt"))
    with pytest.raises(ValueError, match="there are no prompts 'nothing'"):
        read_prompts("nothing")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_prompts(str(tmp_path / "latin.txt"))


def test_world_steps() -> None:
    """A demo world is judged with its own number of steps, however many a method trains with, unless told otherwise."""
    plain = compose({"method": {"name": "flow-grpo"}}, None, where="test")
    assert plain.pipeline == "shapes" and plain.fit.steps == 6 and resolve_world(plain).evaluation.steps == 10
    asked = compose({"method": {"name": "flow-grpo"}, "evaluation": {"steps": 7}}, None, where="test")
    assert resolve_world(asked).evaluation.steps == 7


def test_world_prompts() -> None:
    """The demo world's sets are read by name; a category's set has three prompts of it to one of the others,
    or as many as its name says, and the focus set is that of the category with most to learn."""
    from flowalign.build import world_prompts

    report = read_prompts("shapes:report", world_prompts)
    focus = read_prompts("shapes:focus", world_prompts)
    for name, category, parts in (
        ("focus", "mixed", 3),
        ("focus7", "mixed", 7),
        ("count", "count", 3),
        ("relation2", "relation", 2),
    ):
        found = [p.meta["category"] for p in read_prompts(f"shapes:{name}", world_prompts)]
        assert found.count(category) / len(found) == pytest.approx(parts / (parts + 1), abs=0.01)
    turbo = [p.meta["category"] for p in read_prompts("shapes-turbo:focus", world_prompts)]
    assert turbo.count("count") > len(turbo) / 2
    with pytest.raises(ValueError, match="no prompt set 'focus0'"):
        read_prompts("shapes:focus0", world_prompts)
    singles = {p.text for p in report if p.meta["category"] == "single"}
    assert not {p.text for p in focus} & {p.text for p in report} - singles
    with pytest.raises(
        ValueError, match="no prompt set 'trian'; it has focus, single, count, relation, mixed, report, select, train"
    ):
        read_prompts("shapes:trian", world_prompts)


@pytest.mark.parametrize("world", sorted(WORLDS))
def test_every_captioned_world_brings_its_prompts_and_judge(world: str) -> None:
    """Whatever is shipped with a caption for a prompt is aligned by naming it alone."""
    config = resolve_world(replace(default("flow-grpo"), pipeline=world))
    assert config.prompts == f"{world}:focus"
    assert config.evaluation.rewards == "shapes"
    assert config.evaluation.prompts == f"{world}:report"
    assert config.call["guidance_scale"] == 1.0
    assert {p.meta["category"] for p in world_prompts(world, "report")} == set(CATEGORIES)


def test_no_shipped_captioned_world_is_forgotten() -> None:
    """A folder whose pipeline takes captions of the grammar alone (edits, videos and audio have data of their own)."""
    captioned = {"StableDiffusion3Pipeline", "StableDiffusionPipeline"}
    shipped = {
        p.parent.name
        for p in WEIGHTS.glob("*/model_index.json")
        if json.loads(p.read_text())["_class_name"] in captioned
    }
    assert shipped == set(WORLDS)
