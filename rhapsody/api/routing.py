"""Where a task goes, and in what words it is refused."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from rhapsody.backends.base import BaseExecutionBackend
from rhapsody.runtime.errors import ResourceError, RhapsodyError, TaskValidationError

from .task import BaseTask

__all__ = ["combine_errors", "duplicate_error", "parent_refused", "route", "task_label"]


def route(task: BaseTask, backends: Mapping[str, BaseExecutionBackend]) -> BaseExecutionBackend:
    """Return the backend of a task, and name it in the task.

    Raises:
        TaskValidationError, ResourceError: the one that it asks for, or every one, refuses it.
    """
    if task.backend is not None:
        backend = backends.get(task.backend)
        if backend is None:
            raise TaskValidationError(
                f"task '{task.uid}': this session has no backend '{task.backend}';"
                f" it has: {', '.join(backends)}"
            )
        backend.check(task)
        return backend
    errors: list[RhapsodyError] = []
    for backend in backends.values():
        try:
            backend.check(task)
        except (TaskValidationError, ResourceError) as error:
            errors.append(error)
        else:
            task.backend = backend.name
            return backend
    if len(errors) == 1:
        raise errors[0]
    kind = (
        ResourceError
        if any(isinstance(error, ResourceError) for error in errors)
        else (TaskValidationError)
    )
    raise kind(f"no backend can run task '{task.uid}': " + "; ".join(map(str, errors)))


def task_label(given: Any, place: int) -> str:
    """A task's uid, or its place in the batch where it has none."""
    uid = given.get("uid") if isinstance(given, (BaseTask, dict)) else None
    return uid if isinstance(uid, str) and uid else f"task number {place}"


def duplicate_error(task: BaseTask, known: Mapping[str, BaseTask]) -> str:
    """Why a task with a known uid, or one that is not new, is refused."""
    if known.get(task.uid) is task or task.state != "NEW":
        return f"task '{task.uid}' was submitted before; make a new task to run it again"
    return f"another task of this session has the uid '{task.uid}'; a uid must be unique"


def parent_refused(task: BaseTask, parent: BaseTask, cause: RhapsodyError | None) -> RhapsodyError:
    """Why a task is refused for its parent: with the parent's error, or for want of it."""
    words = f"task '{task.uid}' depends on task '{parent.uid}', which "
    if cause is None:
        return TaskValidationError(
            f"{words}is not in this session; submit it before or with its child"
        )
    kind = ResourceError if isinstance(cause, ResourceError) else TaskValidationError
    return kind(f"{words}was refused")


def combine_errors(refused: dict[str, RhapsodyError]) -> RhapsodyError:
    """One error for all tasks that were refused."""
    errors = {uid: str(error) for uid, error in refused.items()}
    first = next(iter(refused.values()))
    shown = "; ".join(itertools.islice(errors.values(), 10))
    more = f"; and {len(errors) - 10} more" if len(errors) > 10 else ""
    lacking = all(isinstance(error, ResourceError) for error in refused.values())
    error = (ResourceError if lacking else TaskValidationError)(shown + more, errors)
    error.__cause__ = first
    return error
