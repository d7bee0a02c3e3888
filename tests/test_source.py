"""Where prompts come from: every epoch has each prompt once, in an order of its own, whatever the number of groups."""

from __future__ import annotations

import pytest

from flowalign.source import Prompt, Prompts, make_draw, text_key

NAMES = [f"prompt {i}" for i in range(7)]


@pytest.mark.parametrize("groups", [1, 3, 7])
def test_iterations_read_on_through_the_epochs(groups: int) -> None:
    """The draws of successive iterations, end to end, are epochs: each a permutation, no two in the same order."""
    source, count = Prompts(NAMES, seed=5), 21 // groups
    seen = [p for i in range(count) for p in source.draw(i, groups, 2).prompts]
    epochs = [seen[k : k + 7] for k in (0, 7, 14)]
    assert all(sorted(e) == NAMES for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3 and epochs[0] != NAMES


def test_a_draw_depends_on_seed_and_iteration_alone() -> None:
    """Nothing is remembered: what a resumed run draws is what it would have drawn."""
    source = Prompts(NAMES, seed=5)
    later = source.draw(4, 3, 2).prompts
    source.draw(0, 3, 2)
    assert Prompts(NAMES, seed=5).draw(4, 3, 2).prompts == source.draw(4, 3, 2).prompts == later
    assert Prompts(NAMES, seed=6).draw(4, 3, 2).prompts != later


def test_groups_of_a_draw() -> None:
    """A prompt drawn twice has two keys; wordings share a group and its samples; a part is numbered from 0."""
    draw = make_draw([Prompt("a"), Prompt("b", {"k": 1}, ("bb",)), Prompt("a")], 5)
    assert draw.prompts == ["a", "b", "bb", "a"] and draw.group.tolist() == [0, 1, 1, 2]
    assert draw.samples.tolist() == [5, 3, 2, 5] and len(set(draw.keys)) == 4
    part = draw.part([2, 1])
    assert part.prompts == ["b", "bb", "a"] and part.group.tolist() == [1, 1, 0] and part.samples.tolist() == [3, 2, 5]
    assert part.keys == draw.keys[1:] and part.meta[0] == {"k": 1}
    assert text_key("a") != text_key("b") and 0 <= text_key("a") < 2**63
    with pytest.raises(ValueError, match="at least one"):
        Prompts([])
