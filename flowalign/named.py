"""What a user of the command line calls ``module:attribute``: a pipeline, a reward, a method, layouts of their own."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

__all__ = ["function"]


def function(path: str) -> Any:
    """Return ``module:attribute``; the working directory counts as on the path, as it does for ``python -m``.

    Raises:
        ValueError: for what cannot be imported.
    """
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"{path!r} cannot be imported: {error}.") from error
