"""The outside world of judges; imported as ``flowalign.rewards``.

``REWARDS`` names each reward's class by dotted path, so that nothing is imported before it is asked for:

    load("pickscore")                       # published weights, from the hub or its cache
    load("hps:0.5, aesthetic")              # a weighted sum
    load("pickscore@/models/pick:2")        # weights of your own, times two
    load("my_module:MyReward")              # a class (or a factory) of yours with __call__(media, prompts, meta)
"""

from __future__ import annotations

if __name__ != "flowalign.rewards":  # the folder sits at the top of the repository, where its bare name would collide
    raise ImportError("import flowalign.rewards, not rewards: the folder is part of the flowalign package.")

from flowalign.rewards.names import REWARDS, Term, cards, load, locate, parse

__all__ = ["REWARDS", "Term", "cards", "load", "locate", "parse"]
