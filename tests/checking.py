"""The run-time type checker of the core's signatures: beartype, an int being good enough where a float is wanted."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
