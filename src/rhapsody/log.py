"""Logging of the package: silent until the author asks for it."""

from __future__ import annotations

import logging
import os
from typing import Any

__all__ = ["enable_logging"]

_FORMAT = "%(asctime)s | %(levelname)-8s | [%(name)s] | %(message)s"
_root = logging.getLogger("rhapsody")
_root.addHandler(logging.NullHandler())


def enable_logging(
    level: int | str | None = None,
    format_string: str = _FORMAT,
    stream: Any = None,
    force: bool = True,
) -> None:
    """Log what the package does.

    Args:
        level: a level of `logging`, number or name; `RHAPSODY_LOG_LEVEL`, else INFO, where None.
        format_string: as `logging.Formatter` takes it.
        stream: where to; standard error where None.
        force: replace the handler of an earlier call; else the earlier one stays.

    Raises:
        ValueError: the level is unknown.
    """
    if level is None:
        level = os.environ.get("RHAPSODY_LOG_LEVEL", "INFO").upper()
    old = [h for h in _root.handlers if not isinstance(h, logging.NullHandler)]
    if old and not force:
        return
    _root.setLevel(level)  # first: it refuses an unknown one
    for handler in old:
        _root.removeHandler(handler)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter(format_string))
    _root.addHandler(handler)
