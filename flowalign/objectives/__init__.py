"""Objectives: losses by name, of a batch of what they want.

An objective is a function of its batch: nothing random is drawn inside, so a resumed run repeats it bit for bit. It
says what data it wants (``wants``); the training loop makes it.
"""

from flowalign.objectives.backprop import Backprop, Grown
from flowalign.objectives.balance import TrajectoryBalance
from flowalign.objectives.base import Losses, Objective
from flowalign.objectives.clip import Clip
from flowalign.objectives.matching import AdjointMatching, FlowMatching
from flowalign.objectives.nft import DiffusionNFT
from flowalign.objectives.preference import FlowDPO

__all__ = [
    "AdjointMatching",
    "Backprop",
    "Clip",
    "DiffusionNFT",
    "FlowDPO",
    "FlowMatching",
    "Grown",
    "Losses",
    "Objective",
    "TrajectoryBalance",
]
