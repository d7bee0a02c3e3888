"""The outside world of generators; imported as ``flowalign.pipelines``."""

if __name__ != "flowalign.pipelines":  # the folder sits at the top of the repository, where its bare name would collide
    raise ImportError("import flowalign.pipelines, not pipelines: the folder is part of the flowalign package.")
