"""Score one part of an iteration's samples while the next part is rolled out.

    main thread    roll out 1 | decode 1 | roll out 2 | decode 2 | ...
    worker                               | score 1               | score 2 ...

An iteration's groups are cut into parts of whole groups; noises are keyed by prompt, so each sample is the one that it
would be in a single rollout, and all are of the same policy: nothing goes stale. Only the rewards run in the other
thread: decoding shares the pipeline with the rollout. A judge that is away is asked again here, in the main thread,
which pauses (:mod:`flowalign.pause`).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from flowalign.asynchronous import Asynchronous
from flowalign.collect import Collector
from flowalign.hearing import Heard
from flowalign.pause import Away
from flowalign.scorer import Bound, Scorer
from flowalign.source import Draw
from flowalign.trajectory import Nodes, Trajectory

__all__ = ["overlapped", "side_by_side"]

Piece = tuple[Tensor, list[str], list | None]
Answer = tuple[dict[str, Tensor], Heard]


def overlapped(
    collector: Collector, draw: Draw, judge: Bound, iteration: int, parts: int
) -> tuple[Trajectory, dict[str, Tensor]]:
    """Roll out and judge a draw in ``parts`` parts, one's scoring overlapping the next one's rollout.

    Args:
        collector: samples.
        draw: of the iteration.
        judge: of the whole draw.
        iteration: its number.
        parts: how many; at most one per group.

    Returns:
        The genealogy of all, and ``{name: (N,)}`` scores of its leaves.

    Raises:
        ValueError: a reward of a set, whose set would be cut.
    """
    scorer, ledger = collector.scorer, collector.policy.ledger
    for name, reward in scorer.rewards.items():
        if not reward.card.batch:
            raise ValueError(
                f"reward {name!r} judges a set of samples at once, and fit.overlap = {parts} would cut the set. Set "
                "overlap to 1."
            )
    trees: list[Trajectory] = []
    waiting: list[tuple[Piece, Future[Answer]]] = []
    with Asynchronous(partial(scorer.ask, patient=False)) as worker:
        for groups in torch.arange(int(draw.group.max()) + 1).tensor_split(parts):
            if not len(groups):
                continue
            part = draw.part(groups.tolist())
            own = _bound(judge, draw, groups)
            with ledger.phase("rollout"):
                trees.append(collector.sample(part, own, iteration))
            with ledger.phase("reward"), torch.no_grad():
                pieces = own.pieces(trees[-1].leaves.x, trees[-1].leaves.row)
                waiting += [(piece, worker.submit(*piece)) for piece in pieces]
        with ledger.phase("reward"), torch.no_grad():
            answers = [_answer(scorer, piece, future) for piece, future in waiting]
    scores = [s for s, _ in answers]
    scorer.heard += [told for _, heard in answers for told in heard]
    for learner in collector.recipe.learners:
        learner.enter(draw.prompts)  # credit and learners see the whole draw again
    return side_by_side(trees), {k: torch.cat([s[k] for s in scores]) for k in scores[0]}


def _answer(scorer: Scorer, piece: Piece, future: Future[Answer]) -> Answer:
    """Return what the worker found; ask again, patiently, where the judge was away."""
    try:
        return future.result()
    except Away:
        return scorer.ask(*piece)


def _bound(judge: Bound, draw: Draw, groups: Tensor) -> Bound:
    """Return the judge of the rows of some groups; their prompts are not encoded again."""
    rows = torch.isin(draw.group, groups).nonzero().flatten()
    meta = None if judge.meta is None else [judge.meta[r] for r in rows.tolist()]
    return Bound(judge.scorer, judge.cond[rows], [judge.prompts[r] for r in rows.tolist()], meta)


def side_by_side(trees: Sequence[Trajectory]) -> Trajectory:
    """Return genealogies of one grid and of different rows as one; the rows of the later ones are numbered on."""
    levels: list[Nodes | None] = []
    for k in range(len(trees[0].levels)):
        joined, rows, before = None, 0, 0
        for tree in trees:
            nodes = tree.levels[k]
            if nodes is not None:
                parent = torch.where(nodes.parent >= 0, nodes.parent + before, nodes.parent)
                moved = replace(nodes, row=nodes.row + rows, parent=parent)
                joined = moved if joined is None else joined.join(moved)
            rows += tree.n_rows
            above = tree.levels[k - 1] if k else None
            before += 0 if above is None else len(above)
        levels.append(joined)
    return Trajectory(trees[0].times, tuple(levels), torch.cat([t.log_z for t in trees]))
