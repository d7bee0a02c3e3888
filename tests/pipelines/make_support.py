"""Write ``pipelines/support.json``: the verdict for every pipeline class of the installed diffusers.

    python -m tests.pipelines.make_support [--only NAME ...] [--new] [--docs]

Runs the contract on every case of the zoo (about a quarter of an hour on one idle core) and writes after each, so that
it can be stopped and gone on with (``--new`` runs only what the file does not have).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

os.environ["DIFFUSERS_VERBOSITY"] = os.environ["TRANSFORMERS_VERBOSITY"] = "critical"

import diffusers
import torch

from flowalign.pipelines.support import PATH, markdown, pipeline_classes, support
from tests import zoo
from tests.pipelines import contract

MARK = "## What passes"


def verdict(name: str) -> dict[str, Any]:
    """Return the row of one case: what was measured, and why it fails if it does."""
    row: dict[str, Any] = {"pipeline": "", "family": "", "status": "fails", "why": "", "measured": {}}
    case = None
    try:
        case = zoo.build(name)
        row |= {"pipeline": type(case.pipe).__name__, "family": case.family}
        row["measured"] = {k: float(f"{v:.1e}") for k, v in contract.check(name).items()}
        row["status"] = "passes"
    except Exception as failure:  # the row is about exactly this
        row["why"] = f"{type(failure).__name__}: {failure}".replace("AssertionError: ", "")[:300]
    return row


def write_docs() -> None:
    """Put the table under its heading in the documentation."""
    page = Path(__file__).parents[2] / "docs" / "pipelines.md"
    head = page.read_text().split(MARK)[0]
    page.write_text(head + MARK + "\n\n" + markdown(support()))


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--new", action="store_true")
    parser.add_argument("--docs", action="store_true", help="only write the table into docs/pipelines.md")
    options = parser.parse_args()
    if options.docs:
        write_docs()
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    known = json.loads(PATH.read_text()) if PATH.is_file() else {}
    cases = {k: v for k, v in known.get("cases", {}).items() if k in zoo.names()}
    for name in options.only or zoo.names():
        if options.new and name in cases:
            continue
        cases[name] = verdict(name)
        print(name, cases[name]["status"], cases[name]["why"], flush=True)
        tried = {row["pipeline"] for row in cases.values()}
        absent = {k: zoo.NOT_TRIED.get(k, "not in the zoo yet") for k in pipeline_classes() if k not in tried}
        data = {"diffusers": diffusers.__version__, "cases": dict(sorted(cases.items())), "not_tried": absent}
        PATH.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
