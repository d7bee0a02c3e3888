"""The trainer on a world of one linear map: resuming, averaging, stages, and what is saved."""

from pathlib import Path

import pytest
import torch
from torch import nn

from flowalign.pipelines.worlds import WORLDS, find, store, train


class Toy(nn.Module):
    """The least that the trainer asks of a pipeline."""

    def __init__(self):
        super().__init__()
        self.unet = nn.Linear(3, 1)

    @property
    def components(self):
        return {"unet": self.unet}

    def save_pretrained(self, folder, safe_serialization):
        assert safe_serialization
        Path(folder).mkdir(parents=True)
        torch.save(self.unet.state_dict(), Path(folder) / "unet.pt")


class CutOff(Exception):
    pass


def world(calls, cut=None, after=None):
    def loss(pipe, g):
        calls.append(1)
        if cut is not None and len(calls) > cut:
            raise CutOff
        x = torch.randn(8, 3, generator=g)
        return (pipe.unet(x) - x.sum(1, keepdim=True)).square().mean()

    one = train.Stage("one", lambda p: [p.unet], loss, 4, lr=1e-2, after=after)
    two = train.Stage("two", lambda p: [p.unet], loss, 2400, lr=1e-2, until=0.75)
    return train.World("toy", "a linear map", Toy, (one, two))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    calls = []
    pipe = train.train(world(calls), tmp_path_factory.mktemp("whole") / "toy")
    return calls, pipe


def test_learns_and_stops_at_its_share(whole):
    calls, pipe = whole
    assert len(calls) == 4 + 1800
    assert torch.allclose(pipe.unet.weight, torch.ones(1, 3), atol=0.02)


def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(whole, tmp_path):
    scales = []
    with pytest.raises(CutOff):
        train.train(world([], cut=1500), tmp_path / "toy")
    pipe = train.train(world([], after=lambda p, g: scales.append(g.initial_seed())), tmp_path / "toy")
    assert torch.equal(pipe.unet.weight, whole[1].unet.weight)
    assert scales == [train.mixed(0, 0)]  # what a finished stage set outside the weights is set again


def test_a_stage_with_a_teacher_begins_again(tmp_path):
    """Cut off within it, the run takes its teacher from the weights that the stage began with, not from half-way."""
    seen = []

    def made(cut):
        calls = []
        toy = world(calls, cut=cut)

        def keep(pipe):
            seen.append(pipe.unet.weight.detach().clone())

        last = train.Stage("last", toy.stages[0].modules, toy.stages[0].loss, 20, lr=1e-2, before=keep)
        return train.World("toy", "a linear map", Toy, (toy.stages[0], last))

    with pytest.raises(CutOff):
        train.train(made(14), tmp_path / "toy")
    pipe = train.train(made(None), tmp_path / "toy")
    again = train.train(made(None), tmp_path / "again" / "toy")
    assert all(torch.equal(w, seen[0]) for w in seen) and len(seen) == 3
    assert torch.equal(pipe.unet.weight, again.unet.weight)
    assert not torch.equal(pipe.unet.weight, seen[0])


def test_other_seeds_see_other_data(whole, tmp_path):
    pipe = train.train(world([]), tmp_path / "toy", seed=1, shorten=0.01)
    same = train.train(world([]), tmp_path / "again" / "toy", seed=1, shorten=0.01)
    assert torch.equal(pipe.unet.weight, same.unet.weight)
    assert not torch.equal(pipe.unet.weight, whole[1].unet.weight)


def test_the_denoiser_is_stored_in_half_and_the_rest_is_kept(tmp_path):
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "card.json").write_text("{}")
    (folder / "old.bin").write_text("stale")
    pipe = Toy()
    store.save(pipe, folder)
    assert torch.load(folder / "unet.pt", weights_only=True)["weight"].dtype == torch.float16
    assert pipe.unet.weight.dtype == torch.float32
    assert (folder / "card.json").exists()
    assert not (folder / "old.bin").exists()


def test_unknown_worlds_are_refused():
    with pytest.raises(ValueError, match="shapes-turbo"):
        find("shape")
    with pytest.raises(ValueError, match="make nowhere"):
        store.path("nowhere")
    assert find("shapes").name in WORLDS
