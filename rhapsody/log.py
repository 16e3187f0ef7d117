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
        level: a level of `logging`, number or name in either case; `RHAPSODY_LOG_LEVEL` where
            None, and INFO where that is not set or empty.
        format_string: as `logging.Formatter` takes it.
        stream: where to; standard error where None.
        force: replace the handler of an earlier call; else the earlier one stays.

    Raises:
        ValueError: the level is unknown.
    """
    number = level_of(level)
    old = [h for h in _root.handlers if not isinstance(h, logging.NullHandler)]
    if old and not force:
        return
    _root.setLevel(number)
    for handler in old:
        _root.removeHandler(handler)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter(format_string))
    _root.addHandler(handler)


def level_of(given: int | str | None = None) -> int:
    """Return the number of a level, as `enable_logging` takes it.

    Raises:
        ValueError: it is unknown; the message says where it came from.
    """
    where = "the level"
    if given is None:
        given, where = os.environ.get("RHAPSODY_LOG_LEVEL") or "INFO", "RHAPSODY_LOG_LEVEL"
    found: object = given
    if isinstance(given, str):
        name = given.strip().upper()
        found = int(name) if name.isdecimal() else logging.getLevelName(name)
    if not isinstance(found, int) or isinstance(found, bool):
        raise ValueError(
            f"{where} must be a number or one of DEBUG, INFO, WARNING, ERROR and CRITICAL,"
            f" not {given!r}"
        )
    return found
