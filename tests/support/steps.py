"""Let a test say what it does, in the log."""

import logging

_log = logging.getLogger("test")


def step(text: str, *values: object) -> None:
    """Log one understandable step of a test; *values* fill the %s in *text*."""
    _log.info(text, *values, stacklevel=2)
