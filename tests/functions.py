"""Functions that tests run as tasks. Worker processes import this module, as the tests do."""

from __future__ import annotations

from typing import Any

from rhapsody.api import BaseTask


def noop() -> None:
    return None


def double(x: Any) -> Any:
    return 2 * x


def fail(message: str = "as it was told to") -> None:
    raise KeyError(message)


async def outcome(task: BaseTask) -> Any:
    """A coroutine for what takes no awaitable: `asyncio.create_task` and its like."""
    return await task
