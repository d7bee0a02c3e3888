import json

import pytest
import torch

from flowalign.pipelines.worlds import diversity, splits
from flowalign.pipelines.worlds.scenes import CATEGORIES, captions, parse


def test_a_composition_falls_into_one_split():
    for c in captions():
        assert {splits.split_of(w) for w in splits.wordings(c)} == {splits.split_of(c)}
        assert c in splits.wordings(c)


def test_the_base_is_shown_no_withheld_composition():
    shown = {w for c in splits.base() for w in splits.wordings(c)}
    withheld = {parse(p) for p in splits.prompts("withheld")}
    assert len(withheld) == 35
    assert not shown & withheld


def test_training_sees_every_word_and_kind():
    train = [parse(p) for p in splits.prompts("train", "count")]
    assert len({c.groups[0].kind for c in train}) == 18
    assert {c.groups[0].number for c in train} == {2, 3, 4}
    sets = {s: set(splits.prompts(s)) - set(splits.prompts(s, "single")) for s in splits.SPLITS}
    assert sum(map(len, sets.values())) == len(set.union(*sets.values())) == len(captions()) - 18


def test_the_shipped_files_are_the_lists():
    from flowalign.pipelines.worlds.store import WEIGHTS

    for split in splits.SPLITS:
        rows = [json.loads(x) for x in (WEIGHTS.parent / "prompts" / f"{split}.jsonl").read_text().splitlines()]
        want = [(p, k) for k in CATEGORIES for p in splits.prompts(split, k)]
        assert [(r["prompt"], r["category"]) for r in rows] == want


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="withheld"):
        splits.prompts("test")
    with pytest.raises(ValueError, match="mixed"):
        splits.prompts("train", "colour")


def test_effective_number_of_layouts():
    assert diversity.effective(torch.tensor([7, 7, 7])) == pytest.approx(1)
    assert diversity.effective(torch.arange(12).repeat(5)) == pytest.approx(12)
    assert diversity.effective(torch.tensor([])) == 0
    # p = 3/4, 1/4: 2^{H}, H = .8113 bits
    assert diversity.effective(torch.tensor([1, 1, 1, 2])) == pytest.approx(2**0.811278, rel=1e-5)


def test_cells_and_groups():
    centre = torch.tensor([[5.0, 5.0], [27.0, 5.0], [16.0, 16.0]])
    codes = diversity.cells(centre, torch.tensor([0, 0, 2]), 3)
    assert codes.tolist() == [0b101, 0, 0b10000]
    correct = torch.tensor([True, True, False])
    assert diversity.layouts(codes, correct, ["a", "a", "b"]) == {"a": pytest.approx(2), "b": 0}


def test_vendi():
    assert diversity.vendi(torch.eye(5)) == pytest.approx(5)
    assert diversity.vendi(torch.ones(6, 3)) == pytest.approx(1)
    assert diversity.vendi(torch.eye(3).repeat(4, 1)) == pytest.approx(3)
