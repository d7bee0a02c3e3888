"""Which pipelines work: the generated verdict for every pipeline class of diffusers.

``support.json`` is written by ``python -m tests.pipelines.make_support``, which runs the whole contract on tiny random
components; ``flowalign pipelines`` prints it, the documentation shows it, and a test holds it against the installed
diffusers. A pipeline that is not listed as passing may still work: the self-test of ``load`` says.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["PATH", "Support", "markdown", "pipeline_classes", "summary", "support", "text"]

PATH = Path(__file__).parent / "support.json"
Status = Literal["passes", "fails", "not tried"]


@dataclass(frozen=True)
class Support:
    """One row of the table.

    Attributes:
        pipeline: class name in diffusers.
        case: name of the tiny instance that was tried; "" if none was.
        family: model family.
        status: passes, fails or not tried.
        why: the reason where it does not pass.
        measured: largest differences by point of the contract; ``draws`` is how often the solver draws noise in a step.
        code: digest of what it was measured with.
    """

    pipeline: str
    case: str
    family: str
    status: Status
    why: str
    measured: dict[str, float]
    code: str = ""


def pipeline_classes() -> list[str]:
    """Return the names of all pipeline classes that the installed diffusers exports."""
    import diffusers

    no = ("Output", "Blocks", "PipelineQuantizationConfig")
    return sorted(name for name in dir(diffusers) if "Pipeline" in name and not name.endswith(no))


def support() -> list[Support]:
    """Return the table: one row per case, and one per class that was not tried."""
    data: dict[str, Any] = json.loads(PATH.read_text())
    rows = [Support(case=case, **row) for case, row in data["cases"].items()]
    rows += [Support(name, "", "", "not tried", why, {}) for name, why in data["not_tried"].items()]
    return sorted(rows, key=lambda r: (r.pipeline, r.case))


def summary(rows: list[Support]) -> str:
    """Return one line: how many classes and families pass."""
    good = {r.pipeline for r in rows if r.status == "passes"}
    bad = {r.pipeline for r in rows if r.status == "fails"} - good
    untried = {r.pipeline for r in rows if r.status == "not tried"}
    families = {r.family for r in rows if r.status == "passes"}
    cases = sum(r.status == "passes" for r in rows)
    return (
        f"{len(good)} pipeline classes in {len(families)} families pass ({cases} cases), {len(bad)} fail, "
        f"{len(untried)} were not tried"
    )


def text(rows: list[Support], as_json: bool = False) -> str:
    """Return what ``flowalign pipelines`` prints."""
    if as_json:
        return json.dumps([asdict(r) for r in rows], indent=1, ensure_ascii=False)
    lines = [f"{r.status:9s}  {r.pipeline:52s} {r.family:22s} {r.why}".rstrip() for r in rows]
    return "\n".join([*lines, "", summary(rows) + "."])


def markdown(rows: list[Support]) -> str:
    """Return the table of the documentation."""
    head = (
        "| pipeline | case | family | verdict | rollout | decode | gradient | why |\n|---|---|---|---|---|---|---|---|"
    )
    body = [
        f"| {r.pipeline} | {r.case} | {r.family} | {r.status} | {_number(r, 'rollout')} | {_number(r, 'decode')} | "
        f"{_number(r, 'gradient')} | {r.why.replace('|', '/')} |"
        for r in rows
    ]
    return "\n".join([summary(rows) + ".", "", head, *body, ""])


def _number(row: Support, point: str) -> str:
    shown = f"{row.measured[point]:.0e}" if point in row.measured else ""
    return f"{shown} (noise)" if point == "rollout" and row.measured.get("draws") else shown
