"""Logging of the package `rhapsody`: silent until `enable_logging` is called."""

from __future__ import annotations

import logging
import os
from typing import TextIO

__all__ = ["enable_logging"]

_FORMAT = "%(asctime)s | %(levelname)-8s | [%(name)s] | %(message)s"
_root = logging.getLogger("rhapsody")
_root.addHandler(logging.NullHandler())


def enable_logging(
    level: int | str | None = None,
    format_string: str = _FORMAT,
    stream: TextIO | None = None,
    force: bool = True,
) -> None:
    """Write log messages of this package to a stream.

    Args:
        level: a level of `logging`, its number or its name in either case. None stands for
            `RHAPSODY_LOG_LEVEL`, or INFO where that is unset or empty.
        format_string: a format of `logging.Formatter`.
        stream: None for standard error.
        force: replace the handler of an earlier call; if False, an earlier one stays.

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
        ValueError: it is unknown; the message says whether it came from the environment.
    """
    source = "the level"
    if given is None:
        given, source = os.environ.get("RHAPSODY_LOG_LEVEL") or "INFO", "RHAPSODY_LOG_LEVEL"
    found: object = given
    if isinstance(given, str):
        name = given.strip().upper()
        found = int(name) if name.isdecimal() else logging.getLevelName(name)
    if not isinstance(found, int) or isinstance(found, bool):
        raise ValueError(
            f"{source} must be a number or one of DEBUG, INFO, WARNING, ERROR and CRITICAL,"
            f" not {given!r}"
        )
    return found
