"""Functions that tests run as tasks. Worker processes import this module, as the tests do."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

from rhapsody.api import BaseTask


def noop() -> None:
    return None


def double(x: Any) -> Any:
    return 2 * x


async def double_later(x: Any) -> Any:
    await asyncio.sleep(0.001)
    return 2 * x


def fail(message: object = "as it was told to") -> None:
    raise KeyError(message)


def die(*_: object) -> None:
    """End this process as the system does that runs out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


async def outcome(task: BaseTask) -> Any:
    """A coroutine for what takes no awaitable: `asyncio.create_task` and its like."""
    return await task
