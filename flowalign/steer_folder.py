"""The folder of a search: pictures, scores and weights, ``summary.json``, ``looks.jsonl``, ``report.html``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowalign.config import to_dict
from flowalign.ledger import Ledger
from flowalign.media_files import save_media
from flowalign.protocols import Pipeline
from flowalign.scorer import Scorer
from flowalign.source import Prompt
from flowalign.steer_report import write_report
from flowalign.summary import commit, versions
from flowalign.trajectory import ranks

if TYPE_CHECKING:
    from flowalign.steer import SteerConfig
    from flowalign.steered import Steered

__all__ = ["spent_before", "write"]


def spent_before(folder: Path) -> Ledger:
    """Return the ledger of the search that a folder holds, or an empty one."""
    ledger, path = Ledger(), folder / "summary.json"
    if path.is_file():
        ledger.load_state_dict(json.loads(path.read_text(encoding="utf-8"))["ledger"])
    return ledger


def write(
    config: SteerConfig, generator: Pipeline, scorer: Scorer, prompts: Sequence[Prompt], found: Steered, status: str
) -> dict[str, Any]:
    """Write everything that a search has found; return the summary."""
    folder = config.folder
    for old in (folder / "media").glob("*"):
        old.unlink()  # of the search that this one went on from
    names = [f"{int(r):03d}-{i:02d}" for r, i in zip(found.row, ranks(found.row).tolist(), strict=True)]
    files = save_media(folder / "media", found.media, generator.modality, names)
    results = [
        {
            "prompt": prompts[int(found.row[i])].text,
            "file": files[i],
            "reward": float(found.total[i]),
            "rewards": {k: float(v[i]) for k, v in found.rewards.items()},
            "weight": float(found.weights[i]),
        }
        for i in range(len(found.row))
    ]
    summary = {
        "method": config.method.name,
        "status": status,
        "partial": found.partial,
        "prompts": [_prompt(found, i, p.text) for i, p in enumerate(prompts)],
        "reward_of_results": _number(found.total.mean()),
        "reward_of_candidates": _number(found.candidates.nanmean()),
        "ledger": found.ledger.state_dict(),
        "results": results,
        "config": to_dict(config),
        "versions": versions(),
        "commit": commit(),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    lines = [json.dumps({**look.spent, "mean": look.mean, "best": look.best}) for look in found.looks]
    (folder / "looks.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_report(folder / "report.html", summary, found, generator, scorer, prompts)
    return summary


def _prompt(found: Steered, i: int, text: str) -> dict[str, Any]:
    mine = found.row == i
    total, w = found.total[mine].double(), found.weights[mine].double()
    return {
        "prompt": text,
        "results": int(mine.sum()),
        "best": _number(total.max()) if len(total) else None,
        "weighted_mean": _number((w * total).sum()) if len(total) else None,
        "ess": None if found.ess is None else _number(found.ess[i]),
        "log_z": None if found.log_z is None else _number(found.log_z[i]),
        "log_z_error": None if found.log_z_error is None else _number(found.log_z_error[i]),
    }


def _number(x: Any) -> float | None:
    """Return a number that JSON knows."""
    return float(x) if math.isfinite(float(x)) else None
