"""How calls are stopped on workers that may themselves be dying."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from .connection import DaskEngine

__all__ = ["ANSWER", "tell_to_stop"]

# Seconds for workers to stop calls and answer; `TaskTracker.stop` waits for up to 7 of them.
ANSWER = 10.0


async def tell_to_stop(engine: DaskEngine, plugin: str, keys: list[str]) -> dict[str, set[str]]:
    """Tell every worker to stop calls; returns by key what they said, in the words of `TaskTracker.stop`.

    A worker that cannot be asked is taken to have said `unknown` of the keys that it was given.

    Raises:
        asyncio.TimeoutError: the scheduler does not answer.
    """
    answers = await _ask_all(engine, plugin, keys)
    words: dict[str, set[str]] = {key: set() for key in keys}
    for answer in answers.values():
        for key, word in answer.items():
            words[key].add(word)
    return words


async def _ask_all(engine: DaskEngine, plugin: str, keys: list[str]) -> dict[str, dict[str, str]]:
    from .scheduler_plugin import whereabouts
    from .worker_plugin import GRACE, stop_calls

    client, call = engine.client, engine.call

    async def ask(workers: list[str] | None) -> dict[str, Any]:
        asked = call(
            client.run,
            stop_calls,
            plugin,
            keys,
            GRACE,
            workers=workers,
            on_error="return",
        )
        answers: dict[str, Any] = await asyncio.wait_for(asked, ANSWER)
        return answers

    answers: dict[str, Any] = {}
    with contextlib.suppress(asyncio.TimeoutError):
        answers = await ask(None)
    if answers and all(isinstance(answer, dict) for answer in answers.values()):
        return answers
    # One that has just died, or hangs, keeps the scheduler from answering for all of them.
    listing = call(client.run_on_scheduler, whereabouts, keys)
    has: dict[str, list[str]] = await asyncio.wait_for(listing, ANSWER)
    each = await asyncio.gather(*(ask([address]) for address in has), return_exceptions=True)
    for (address, theirs), answer in zip(has.items(), each, strict=True):
        said = answer.get(address) if isinstance(answer, dict) else None
        answers[address] = said if isinstance(said, dict) else dict.fromkeys(theirs, "unknown")
    return {address: answers[address] for address in has}
