"""Selections: which nodes of a level have offspring, and how many.

A selection maps ``(level, log_w, row, n_rows, noise)`` to ``(parents, log_w, dlog_z)``: the index of each child's
parent, the log-weights that the children carry on, and what each row's ``log Z`` gains. It never mixes rows.
"""

from flowalign.selection.base import Chosen, Selection
from flowalign.selection.branch import Branch, Fan
from flowalign.selection.resample import SCHEMES, Resample
from flowalign.selection.top import Top

__all__ = ["SCHEMES", "Branch", "Chosen", "Fan", "Resample", "Selection", "Top"]
