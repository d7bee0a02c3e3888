"""``report.html`` of a search: what it found, the genealogy with pictures, reward along it and against the budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowalign.genealogy import Family, Member, family
from flowalign.media_files import data_uri, grid, picture
from flowalign.page import write_page
from flowalign.plots import COLOURS, Series, figure
from flowalign.protocols import Pipeline
from flowalign.scorer import Scorer
from flowalign.source import Prompt
from flowalign.trajectory import Trajectory

if TYPE_CHECKING:
    from flowalign.steered import Steered

__all__ = ["write_report"]

SHOWN, FAMILIES = 12, 3  # prompts with pictures, and with a genealogy
TILE, ACROSS, DOWN, EDGE = 46, 104, 58, 16  # pixels of the drawing
LOW, HIGH = (201, 42, 42), (43, 138, 62)


def write_report(
    path: Path,
    summary: dict[str, Any],
    found: Steered,
    generator: Pipeline,
    scorer: Scorer,
    prompts: Sequence[Prompt],
) -> Path:
    """Write one file with nothing outside it."""
    import yaml

    visual = generator.modality != "audio"
    values = {
        "s": summary,
        "title": f"{summary['method']}: {', '.join(scorer.rewards)}",
        "sheets": _sheets(found, prompts) if visual else [],
        "families": _families(found, generator, prompts) if visual else [],
        "curve": _curve(found),
        "ledger": [(k.removeprefix("seconds/"), v, k.startswith("seconds/")) for k, v in summary["ledger"].items()],
        "config": yaml.safe_dump(summary["config"], sort_keys=False, allow_unicode=True),
    }
    return write_page(path, "steer.html", summary, values)


def _sheets(found: Steered, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    out = []
    for p in range(min(len(prompts), SHOWN)):
        mine = (found.row == p).nonzero().flatten()[:16]
        tiles = [
            {
                "uri": data_uri(grid(found.media[i][None], 1, size=96, gap=0)),
                "reward": f"{float(found.total[i]):.3f}",
                "weight": f"{float(found.weights[i]):.2f}",
            }
            for i in mine
        ]
        out.append({"prompt": prompts[p].text, "tiles": tiles, "more": int((found.row == p).sum()) - len(mine)})
    return out


# -- the genealogy ---------------------------------------------------------------------------------------------------
def _families(found: Steered, generator: Pipeline, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    tree = found.trajectory
    if tree is None or tree.first == len(tree.levels) - 1:
        return []
    # where every result is a system of its own, there are more rows than prompts
    owner = torch.arange(len(prompts)) if tree.n_rows == len(prompts) else found.row
    rows = [r for r in range(min(tree.n_rows, len(owner))) if bool((tree.leaves.row == r).any())]
    out = []
    for r in rows[:FAMILIES]:
        f = family(tree, r)
        text = prompts[int(owner[r])].text
        svg = _svg(f, tree, _pictures(f, tree, generator, text))
        out.append({"prompt": text, "svg": svg, "left_out": f.left_out, "curve": _lineages(f, tree)})
    return out


def _pictures(f: Family, tree: Trajectory, generator: Pipeline, text: str) -> list[str | None]:
    """Return a data URI for each member whose picture is known: posterior means, and the finished samples."""
    states: list[tuple[int, Tensor]] = []
    for n, m in enumerate(f.members):
        nodes = tree.at(m.level)
        if m.level == len(tree.levels) - 1:
            states.append((n, nodes.x[m.index]))
        elif nodes.posterior is not None:
            states.append((n, nodes.posterior.x0[m.index]))
    cond = generator.encode([text])
    out: list[str | None] = [None] * len(f.members)
    for part in torch.arange(len(states)).split(32):
        batch = torch.stack([states[i][1] for i in part.tolist()])
        with torch.no_grad():
            media = generator.decode(batch, cond[torch.zeros(len(batch), dtype=torch.long)])
        for i, image in zip(part.tolist(), media, strict=True):
            out[states[i][0]] = data_uri(_small(image))
    return out


def _small(image: Tensor) -> Any:
    """Return a thumbnail of at most 96 pixels."""
    from PIL import Image as Pillow

    still = picture(image)
    w, h = still.size
    scale = 96 / max(w, h)
    return still if scale >= 1 else still.resize((round(w * scale), round(h * scale)), Pillow.Resampling.LANCZOS)


def _svg(f: Family, tree: Trajectory, pictures: Sequence[str | None]) -> str:
    """Draw: time runs from left to right, a frame's colour is the reward, its width the weight."""
    values = [m.value for m in f.members if m.value is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    width = EDGE * 2 + ACROSS * (len(f.levels) - 1) + TILE
    height = EDGE * 2 + DOWN * f.height + 22
    parts = [f'<svg viewBox="0 0 {width} {height:.0f}" width="{width}" height="{height:.0f}" role="img">']
    for c, k in enumerate(f.levels):
        label = f"t = {float(tree.times[k]):.2f}" if k < len(tree.levels) - 1 else "result"
        parts.append(f'<text x="{EDGE + c * ACROSS + TILE / 2}" y="14" class="axis">{label}</text>')
    for m in sorted(f.members, key=lambda m: m.alive):  # the living on top
        if m.parent >= 0:
            parts.append(_edge(f.members[m.parent], m, _colour(m.value, low, high)))
    most = {k: max(m.weight for m in f.members if m.level == k) for k in f.levels}
    for m, uri in zip(f.members, pictures, strict=True):
        parts.append(_tile(m, uri, _colour(m.value, low, high), m.weight / max(most[m.level], 1e-12)))
    return "".join([*parts, "</svg>"])


def _place(m: Member) -> tuple[float, float]:
    return EDGE + m.column * ACROSS, EDGE + 14 + m.y * DOWN


def _edge(a: Member, b: Member, colour: str) -> str:
    (xa, ya), (xb, yb) = _place(a), _place(b)
    xa, ya, yb, mid = xa + TILE, ya + TILE / 2, yb + TILE / 2, (xa + TILE + xb) / 2
    look = f'stroke="{colour}" stroke-width="2.4"' if b.alive else 'stroke="#ced4da" stroke-width="1"'
    return f'<path d="M{xa:.0f},{ya:.0f} C{mid:.0f},{ya:.0f} {mid:.0f},{yb:.0f} {xb:.0f},{yb:.0f}" fill="none" {look}/>'


def _tile(m: Member, uri: str | None, colour: str, share: float) -> str:
    x, y = _place(m)
    value = "not asked" if m.value is None else f"{m.value:.4f}"
    title = f"<title>level {m.level}, reward {value}, weight {m.weight:.3f}</title>"
    fade = "" if m.alive else ' opacity=".45"'
    box = f'x="{x}" y="{y:.1f}" width="{TILE}" height="{TILE}"'
    inside = f'<rect {box} fill="#e9ecef"/>' if uri is None else f'<image {box} href="{uri}"/>'
    frame = f'<rect {box} rx="3" fill="none" stroke="{colour}" stroke-width="{1.5 + 3 * share:.1f}"/>'
    label = (
        ""
        if m.value is None
        else f'<text x="{x + TILE / 2}" y="{y + TILE + 9.5:.1f}" class="value">{m.value:.2f}</text>'
    )
    return f"<g{fade}>{title}{inside}{frame}{label}</g>"


def _colour(value: float | None, low: float, high: float) -> str:
    if value is None:
        return "#adb5bd"
    share = 0.5 if high <= low else (value - low) / (high - low)
    middle = (230, 170, 30)
    a, b, u = (LOW, middle, 2 * share) if share < 0.5 else (middle, HIGH, 2 * share - 1)
    return "#" + "".join(f"{round(p + (q - p) * u):02x}" for p, q in zip(a, b, strict=True))


# -- curves ----------------------------------------------------------------------------------------------------------
def _lineages(f: Family, tree: Trajectory) -> str:
    """Draw the reward along the line of ancestors of every result."""
    series = []
    for line in f.lineages():
        known = [(1 - float(tree.times[m.level]), m.value) for m in line if m.value is not None]
        series.append(Series("", [a for a, _ in known], [v for _, v in known], colour=COLOURS[0]))
    dead = [m for m in f.members if not m.alive and m.value is not None]
    panels = {"Reward along each result's ancestors": series}
    if dead:
        steps = sorted({m.level for m in f.members if m.value is not None})
        means = [[m.value for m in f.members if m.level == k and m.value is not None] for k in steps]
        panels["Mean reward of all nodes of a level"] = [
            Series("", [1 - float(tree.times[k]) for k in steps], [sum(v) / len(v) for v in means], colour=COLOURS[1])
        ]
    return figure(panels, "1 - t (0 = noise, 1 = data)")


def _curve(found: Steered) -> str:
    """Draw reward against each unit that was spent, ESS and log Z."""
    looks = list(found.looks)
    if len(looks) < 2:
        return ""
    panels = {}
    for unit, label in (("evaluations", "network evaluations"), ("rewards", "reward calls"), ("seconds", "seconds")):
        at = [k.spent[unit] for k in looks]
        panels[f"Reward against {label}"] = [
            Series("best so far", at, [k.best for k in looks], colour=COLOURS[0]),
            Series("mean of each look", at, [k.mean for k in looks], colour=COLOURS[2]),
        ]
    at = [k.spent["evaluations"] for k in looks if k.ess is not None]
    panels["ESS, share of the particles"] = [Series("", at, [k.ess for k in looks if k.ess is not None])]
    panels["log Z so far"] = [Series("", at, [k.log_z for k in looks if k.log_z is not None], colour=COLOURS[3])]
    return figure(panels, "spent")
