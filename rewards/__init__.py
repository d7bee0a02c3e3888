"""The outside world of judges; imported as ``flowalign.rewards``."""

if __name__ != "flowalign.rewards":  # the folder sits at the top of the repository, where its bare name would collide
    raise ImportError("import flowalign.rewards, not rewards: the folder is part of the flowalign package.")
