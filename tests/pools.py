"""Pools of processes, and the ways in which Python starts them."""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from rhapsody.backends import ConcurrentExecutionBackend

# Python warns of a fork beside threads from 3.12 on. The user may choose it all the same.
FORKS = pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
CONTEXTS = [pytest.param("fork", marks=FORKS), "spawn", "forkserver"]
QUICK = "fork" if sys.version_info < (3, 12) else "forkserver"  # to start, without a warning


async def process_pool(
    width: int = 2, context: str = QUICK, grace: float = 5.0, **options: Any
) -> ConcurrentExecutionBackend:
    """A backend on a pool of processes."""
    pool = ProcessPoolExecutor(width, mp_context=multiprocessing.get_context(context), **options)
    return await ConcurrentExecutionBackend(pool, grace=grace)
