"""One thread, one seed, and shapes checked: what every test of the project starts from.

The core's signatures carry jaxtyping shapes; under pytest they are enforced with beartype. The hook must be in place
before the first import of ``flowalign``, and is confined to the core, whose modules it is cheap for.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

CHECKED = (
    "gaussian", "process", "laws", "kernels", "noise", "trajectory", "policy", "values", "guidance", "rollout",
    "ledger", "selection", "potentials", "credit",
)  # fmt: skip

sys.path.insert(0, str(Path(__file__).parents[1]))  # `pytest` alone finds `tests.toy` as `python -m pytest` does
if not os.environ.get("FLOWALIGN_UNCHECKED"):  # mutation testing wants the tests alone to find the fault
    install_import_hook([f"flowalign.{name}" for name in CHECKED], "checking.checked")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
