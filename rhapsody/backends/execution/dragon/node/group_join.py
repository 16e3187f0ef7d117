"""Patches how a worker of Batch waits for the processes of a job. Read in Dragon 0.15.0."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["GroupJoinPatch"]

# Seconds for the process that manages the ranks to end after them.
_GROUP_END = 60.0


class GroupJoinPatch:
    """Part of a job's template; the worker of Batch that unpickles it is patched.

    When the ranks have ended, that worker closes their group, and gives it 5 s. With PMIx over
    several nodes the group's manager takes 2 to 10 s; then an error takes the place of the exit
    codes, which are lost.

    While the ranks run, the worker asks every 0.1 s whether they have ended, and as a rule gets no
    answer in that time. A late answer that they have not has no traceback; Dragon dereferences
    None ("'NoneType' object is not subscriptable"), and the job fails.

    Batch has no public setting for either.
    """

    def __reduce__(self) -> tuple[Callable[[], GroupJoinPatch], tuple[()]]:
        return _apply, ()


def _apply() -> GroupJoinPatch:
    groups: Any = importlib.import_module("dragon.native.process_group")
    process = importlib.import_module("dragon.globalservices.process")

    def join_manager(puid: int, timeout: float) -> Any:
        """Wait for the manager of this one group; longer if its ranks ended by themselves."""
        groups.process_join = process.join
        cancelled = sys.exc_info()[0] is not None  # then nobody asks for the exit codes
        return process.join(puid, timeout=timeout if cancelled else _GROUP_END)

    # That wait is the only use of the name there.
    groups.process_join = join_manager
    if groups.ProcessGroup.join.__module__ != __name__:
        groups.ProcessGroup.join = _raise_timeout(groups.ProcessGroup.join)
    return GroupJoinPatch()


def _raise_timeout(join: Callable[..., None]) -> Callable[..., None]:
    def join_in_time(group: Any, timeout: float | None = None) -> None:
        try:
            join(group, timeout)
        except TypeError as error:
            if "subscriptable" not in str(error):
                raise
            raise TimeoutError from None

    return join_in_time
