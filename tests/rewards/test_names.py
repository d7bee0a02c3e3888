"""Names, specifications and loading: what is found, what is refused, and in which words."""

import pickle
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_judges import aesthetic_head, hf_clip

from flowalign import rewards
from flowalign.protocols import Card, Reward
from flowalign.rewards import REWARDS, Term, cards, load, locate, parse
from flowalign.rewards.aesthetic import Aesthetic
from flowalign.rewards.algebra import Weighted
from flowalign.rewards.loading import fill, find, folder_or_id, read, rename
from flowalign.rewards.pickscore import PickScore

torch.set_num_threads(1)


def test_every_name_leads_to_a_class_with_its_own_card():
    for name, path in REWARDS.items():
        found = locate(name)
        assert path.startswith("flowalign.rewards.") or ":" in path
        assert isinstance(found.card, Card) and found.card.name == name, (name, found)
        assert found.card.summary and found.card.modality and found.card.range[0] < found.card.range[1]
    assert sorted(c.name for c in cards()) == sorted(REWARDS)


def test_names_the_issue_asks_for():
    wanted = {"clip", "pickscore", "hps", "hps-crop", "hps3", "imagereward", "aesthetic", "compressibility"}
    wanted |= {"incompressibility", "ocr", "geneval", "dino", "dino-adversarial", "face", "spatial", "clip-iqa"}
    assert wanted <= set(REWARDS)


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        ("pickscore", [Term("pickscore")]),
        ("pickscore:0.5, aesthetic:-1", [Term("pickscore", None, 0.5), Term("aesthetic", None, -1.0)]),
        ("hps@owner/name:file.pt:2", [Term("hps", "owner/name:file.pt", 2.0)]),
        ("hps@/a/b.pt", [Term("hps", "/a/b.pt")]),
        ("my_module:MyReward", [Term("my_module:MyReward")]),
        ("remote@http://judge:8000", [Term("remote", "http://judge:8000")]),
        ("remote@http://judge:8000:0.5,ocr:2", [Term("remote", "http://judge:8000", 0.5), Term("ocr", None, 2.0)]),
        ("my_module:MyReward:1e-1", [Term("my_module:MyReward", None, 0.1)]),
    ],
)
def test_specifications(spec, want):
    assert parse(spec) == want


@pytest.mark.parametrize("spec", ["", "a,,b", "clip:nan", "clip:inf", "@x", ":1"])
def test_bad_specifications(spec):
    with pytest.raises(ValueError, match=r"bad term|no reward is called"):
        load(spec)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ValueError, match=r"Nearest:.*pickscore"):
        load("pikscore")
    with pytest.raises(ValueError, match="written module:Class"):
        load("zzzzzz")
    with pytest.raises(ValueError, match="no module 'no_such_module'"):
        load("no_such_module:Reward")
    with pytest.raises(ValueError, match="has no 'Lod'"):
        load("json:Lod")


def test_users_module_is_found_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_77.py").write_text(
        textwrap.dedent(
            """
            from flowalign.protocols import Card
            from flowalign.rewards.algebra import reward

            class Mine:
                card = Card("mine", "mine")
                def __init__(self, weights="none"):
                    self.weights = weights
                def __call__(self, media, prompts, meta=None):
                    return media.mean((1, 2, 3))

            @reward("fun")
            def fun(media, prompts, meta):
                return media.sum((1, 2, 3))

            class Empty:
                pass

            def plain(media, prompts, meta=None):
                return media.sum((1, 2, 3))

            def made(scale):
                return Mine(scale)
            """
        )
    )
    (tmp_path / "my_broken_77.py").write_text("import not_there_77\n")
    monkeypatch.chdir(tmp_path)
    x = torch.rand(2, 3, 4, 4)
    both = load("my_rewards_77:Mine@file:0.5,my_rewards_77:fun:2")
    assert isinstance(both, Weighted) and both.members[0].weights == "file"
    assert torch.allclose(both(x, ["", ""]), 0.5 * x.mean((1, 2, 3)) + 2 * x.sum((1, 2, 3)))
    assert isinstance(load("my_rewards_77:fun"), Reward)
    with pytest.raises(ValueError, match="not a reward"):
        load("my_rewards_77:Empty")
    with pytest.raises(ValueError, match="ready reward"):
        load("my_rewards_77:fun@weights")
    with pytest.raises(ValueError, match=r"'my_rewards_77:plain' cannot be made: .*'media'.* the decorator @reward"):
        load("my_rewards_77:plain")
    with pytest.raises(ValueError, match=r"'scale'\. Give it as an option: my_rewards_77:made\?option=value"):
        load("my_rewards_77:made")
    with pytest.raises(ModuleNotFoundError, match="not_there_77"):
        load("my_broken_77:X")


def test_load_builds_published_classes_from_paths_and_options(tmp_path):
    clip, head = hf_clip(tmp_path / "clip"), aesthetic_head(tmp_path / "head.pth")
    reward = load(f"pickscore@{clip}:0.5,aesthetic@{head}", options={"aesthetic": {"clip": str(clip)}})
    x = torch.rand(2, 3, 40, 40)
    want = 0.5 * PickScore(clip)(x, ["a", "b"]) + Aesthetic(head, clip)(x, ["a", "b"])
    assert torch.allclose(reward(x, ["a", "b"]), want, atol=1e-5)
    with pytest.raises(ValueError, match="does not name"):
        load(f"pickscore@{clip}", options={"hps": {}})


def test_options_are_part_of_a_name(tmp_path):
    clip = hf_clip(tmp_path / "clip")
    x = torch.rand(2, 3, 40, 40)
    got = load(f"pickscore?divisor=26@{clip}:2")(x, ["a", "b"])
    assert torch.allclose(got, 2 * PickScore(clip, divisor=26)(x, ["a", "b"]))
    assert parse("clip?scale=100&positive=true:0.5") == [Term("clip?scale=100&positive=true", None, 0.5)]
    assert locate("clip?scale=100") is locate("clip")
    assert load("compressibility?quality=50&divisor=500.0").quality == 50
    for bad, message in (
        ("compressibility?qualty=50", "no option 'qualty'; nearest: quality"),
        ("compressibility@weights", "no option 'weights'"),
        ("compressibility?quality", "option=value"),
        ("compressibility?quality=500", "JPEG quality"),
    ):
        with pytest.raises(ValueError, match=message):
            load(bad)


def test_samples_that_cannot_be_judged_get_a_value_only_if_asked_for(tmp_path, monkeypatch):
    (tmp_path / "picky_77.py").write_text(
        textwrap.dedent(
            """
            import torch
            from flowalign.protocols import Card
            from flowalign.rewards.base import Judge

            class Picky(Judge):
                card = Card("picky", "picky")
                def score(self, media, prompts, meta):
                    self.unjudged(torch.tensor([1.0, torch.nan]), {1: "no"})
            """
        )
    )
    monkeypatch.chdir(tmp_path)
    x = torch.rand(2, 3, 4, 4)
    with pytest.raises(ValueError, match="cannot judge 1 of 2"):
        load("picky_77:Picky")(x, ["", ""])
    assert load("picky_77:Picky?unjudged=-2")(x, ["", ""]).tolist() == [1.0, -2.0]
    assert load("picky_77:Picky?unjudged=mask")(x, ["", ""]).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="a number, or mask"):
        load("picky_77:Picky?unjudged=maks")


def test_the_whole_package_is_reached_from_one_import():
    assert rewards.load is load


# ---- loading --------------------------------------------------------------------------------------------------------


class Trap:
    def __reduce__(self):
        return (Path("/tmp/flowalign-was-here").touch, ())


def test_pickles_with_code_are_not_opened(tmp_path):
    mark = Path("/tmp/flowalign-was-here")
    mark.unlink(missing_ok=True)
    path = tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps({"state_dict": Trap()}))
    torch_path = tmp_path / "evil2.pt"
    torch.save({"w": Trap()}, torch_path)
    for p in (path, torch_path):
        with pytest.raises(ValueError, match="pickles run code"):
            read(p)
    with pytest.raises(ValueError, match="pickles run code"):
        load(f"aesthetic@{torch_path}", options={"aesthetic": {"clip": str(hf_clip(tmp_path / "c"))}})
    assert not mark.exists()


def test_read_unwraps_what_trainers_wrap(tmp_path):
    w = {"a.w": torch.rand(2), "b": torch.rand(3)}
    for i, wrapped in enumerate(
        [w, {"state_dict": w, "epoch": 3}, {"model": {f"module.{k}": v for k, v in w.items()}}]
    ):
        torch.save(wrapped, tmp_path / f"{i}.pt")
        assert {k: v.tolist() for k, v in read(tmp_path / f"{i}.pt").items()} == {k: v.tolist() for k, v in w.items()}
    save_file(w, tmp_path / "w.safetensors")
    assert torch.equal(read(tmp_path / "w.safetensors")["b"], w["b"])
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="no state dict"):
        read(tmp_path / "list.pt")


def test_fill_wants_every_key_and_shape(tmp_path):
    layer = torch.nn.Linear(2, 3)
    good = {k: torch.rand_like(v) for k, v in layer.state_dict().items()}
    fill(layer, {**good, "extra": torch.ones(1)}, "x", ignore=lambda k: k == "extra")
    assert torch.equal(layer.weight, good["weight"])
    for bad, message in (
        ({"weight": good["weight"]}, "missing \\['bias'\\]"),
        ({**good, "new": torch.ones(1)}, "unknown \\['new'\\]"),
        ({**good, "bias": torch.ones(4)}, "bias \\(4,\\) for \\(3,\\)"),
    ):
        with pytest.raises(ValueError, match=message):
            fill(layer, bad, "x")
    assert rename({"a.b": torch.ones(1)}, [("a.", "c."), ("c.", "d.")]).keys() == {"c.b"}


def test_find_and_folder_name_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"holds none of a\.pt, b\.pt"):
        find(tmp_path, "a.pt", "b.pt")
    with pytest.raises(ValueError, match="no such file or folder"):
        find(tmp_path / "nowhere", "a.pt")
    (tmp_path / "b.pt").touch()
    assert find(tmp_path, "a.pt", "b.pt").name == "b.pt"
    for bad in ("./nowhere", str(tmp_path / "x"), "one-word", str(tmp_path / "b.pt")):
        with pytest.raises(ValueError, match="no such folder"):
            folder_or_id(bad)
    assert folder_or_id("owner/name") == "owner/name"


def test_hub_ids_are_read_from_the_cache_and_explained_when_out_of_reach(tmp_path, monkeypatch):
    """The hub's own cache layout, offline."""
    import huggingface_hub.constants as constants

    snapshot = tmp_path / "models--owner--judge" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--owner--judge" / "refs").mkdir()
    (tmp_path / "models--owner--judge" / "refs" / "main").write_text("abc")
    aesthetic_head(snapshot / "head.pth")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find("owner/judge:head.pth") == snapshot / "head.pth"
    assert find("owner/judge", "none.pth", "head.pth") == snapshot / "head.pth"
    with pytest.raises(ValueError, match=r"hf download owner/judge other\.pth"):
        find("owner/judge:other.pth")
