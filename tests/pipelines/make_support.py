"""Write ``pipelines/support.json``: the verdict for every pipeline class of the installed diffusers.

    python -m tests.pipelines.make_support [--only NAME ...] [--new | --all] [--docs]

Runs the contract on every case of the zoo (about a quarter of an hour on one idle core) and writes after each, so that
it can be stopped and gone on with: every row carries a digest of the code that it was measured with (the adapter, the
contract, the file of the zoo), and a row whose digest is today's is not measured again. New and failing cases come
first. ``--new`` runs only cases that the file does not have, ``--all`` every one.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
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


def digest(name: str) -> str:
    """Return what a row depends on, in eight characters."""
    root = Path(__file__).parents[2]
    files = sorted((root / "pipelines").glob("*.py"))
    files += [Path(contract.__file__), Path(inspect.getfile(zoo.builders()[name]))]
    skipped = ("support.py", "schedulers.py", "memory.py", "quantise.py", "loading.py")  # no part of the contract
    return hashlib.blake2b(b"".join(f.read_bytes() for f in files if f.name not in skipped), digest_size=4).hexdigest()


def queue(cases: dict[str, Any], codes: dict[str, str], every: bool) -> list[str]:
    """Return the cases to measure: those that no row of today's code has, new and failing ones first."""
    stale = [k for k in zoo.names() if every or k not in cases or cases[k].get("code") != codes[k]]
    return sorted(stale, key=lambda k: (k in cases, cases.get(k, {}).get("status") == "passes", k))


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
    parser.add_argument("--all", action="store_true")
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
    codes = {name: digest(name) for name in zoo.names()}
    for name in options.only or queue(cases, codes, options.all):
        if options.new and name in cases:
            continue
        cases[name] = verdict(name) | {"code": codes[name]}
        print(name, cases[name]["status"], cases[name]["why"], flush=True)
        tried = {row["pipeline"] for row in cases.values()}
        absent = {k: zoo.NOT_TRIED.get(k, "not in the zoo yet") for k in pipeline_classes() if k not in tried}
        data = {"diffusers": diffusers.__version__, "cases": dict(sorted(cases.items())), "not_tried": absent}
        fresh = PATH.with_suffix(".tmp")
        fresh.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
        fresh.replace(PATH)  # readers never see half a table


if __name__ == "__main__":
    main()
