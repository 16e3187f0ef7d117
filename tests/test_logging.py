"""Logging: silent until it is asked for, and then as it is asked for."""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from rhapsody import enable_logging

logger = logging.getLogger("rhapsody.of.a.test")


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    root = logging.getLogger("rhapsody")
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_it_is_silent_until_it_is_asked_for() -> None:
    script = "import rhapsody, logging; logging.getLogger('rhapsody.api').error('unheard')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_enabled_it_logs_from_info_up() -> None:
    stream = io.StringIO()
    enable_logging(stream=stream)
    logger.debug("a detail")
    logger.info("an event")
    assert "a detail" not in stream.getvalue()
    assert "INFO     | [rhapsody.of.a.test] | an event" in stream.getvalue()


@pytest.mark.parametrize("level", ["DEBUG", "debug", "10", logging.DEBUG])
def test_the_level(level: int | str) -> None:
    stream = io.StringIO()
    enable_logging(level, "%(message)s", stream)
    logger.debug("a detail")
    assert stream.getvalue() == "a detail\n"


def test_the_level_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setenv("RHAPSODY_LOG_LEVEL", "error")
    enable_logging(format_string="%(message)s", stream=stream)
    logger.warning("unheard")
    logger.error("heard")
    assert stream.getvalue() == "heard\n"


@pytest.mark.parametrize(
    ("level", "number"),
    [("", logging.INFO), ("10", 10), (" warning ", logging.WARNING), ("Critical", 50)],
)
def test_levels_that_the_environment_may_have(
    level: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RHAPSODY_LOG_LEVEL", level)
    enable_logging(stream=io.StringIO())
    assert logging.getLogger("rhapsody").level == number


def test_a_level_of_the_environment_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHAPSODY_LOG_LEVEL", "garbage")
    with pytest.raises(ValueError, match=r"RHAPSODY_LOG_LEVEL must be .*'garbage'"):
        enable_logging()


def test_a_second_call_replaces_the_first_unless_told_not_to() -> None:
    first, second, third = io.StringIO(), io.StringIO(), io.StringIO()
    enable_logging(stream=first, format_string="%(message)s")
    enable_logging(stream=second, format_string="%(message)s")
    enable_logging(stream=third, force=False)
    logger.info("once")
    assert (first.getvalue(), second.getvalue(), third.getvalue()) == ("", "once\n", "")


@pytest.mark.parametrize("level", ["LOUD", "-1.5", True, 2.5, b"INFO"])
def test_an_unknown_level_is_refused_and_changes_nothing(level: Any) -> None:
    stream = io.StringIO()
    enable_logging(stream=stream, format_string="%(message)s")
    with pytest.raises(ValueError, match=re.escape(repr(level))):
        enable_logging(level)
    logger.info("as before")
    assert stream.getvalue() == "as before\n"
