"""Chooses the backend of a task, and makes the errors of those that are refused."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from rhapsody.backends.base import BaseExecutionBackend
from rhapsody.backends.constants import NEW
from rhapsody.runtime.errors import ResourceError, RhapsodyError, TaskValidationError

from .task import BaseTask

__all__ = ["combine_errors", "duplicate_error", "parent_error", "route", "task_label"]


def route(task: BaseTask, backends: Mapping[str, BaseExecutionBackend]) -> BaseExecutionBackend:
    """Return the backend that runs a task, and write its name into `task.backend`.

    Raises:
        TaskValidationError, ResourceError: the backend that it asks for, or each one, refuses it.
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
        else TaskValidationError
    )
    raise kind(f"no backend can run task '{task.uid}': " + "; ".join(map(str, errors)))


def task_label(given: Any, place: int) -> str:
    """Name a task in errors: by its uid, or by its place in the submit where it has none."""
    uid = given.get("uid") if isinstance(given, (BaseTask, dict)) else None
    return uid if isinstance(uid, str) and uid else f"task number {place}"


def duplicate_error(task: BaseTask, known: Mapping[str, BaseTask]) -> TaskValidationError:
    """The error of a task that was submitted before, or whose uid another task has."""
    if known.get(task.uid) is task or task.state != NEW:
        return TaskValidationError(
            f"task '{task.uid}' was submitted before; make a new task to run it again"
        )
    return TaskValidationError(
        f"another task of this session has the uid '{task.uid}'; a uid must be unique"
    )


def parent_error(task: BaseTask, parent: BaseTask, cause: RhapsodyError | None) -> RhapsodyError:
    """The error of a task whose parent was refused, or (`cause` is None) is not in the session."""
    start = f"task '{task.uid}' depends on task '{parent.uid}', which "
    if cause is None:
        return TaskValidationError(
            f"{start}is not in this session; submit it before or with its child"
        )
    kind = ResourceError if isinstance(cause, ResourceError) else TaskValidationError
    return kind(f"{start}was refused")


def combine_errors(refused: dict[str, RhapsodyError]) -> RhapsodyError:
    """The error of a submit: one for all tasks that were refused, by uid or place."""
    errors = {uid: str(error) for uid, error in refused.items()}
    first = next(iter(refused.values()))
    shown = "; ".join(itertools.islice(errors.values(), 10))
    more = f"; and {len(errors) - 10} more" if len(errors) > 10 else ""
    lacking = all(isinstance(error, ResourceError) for error in refused.values())
    error = (ResourceError if lacking else TaskValidationError)(shown + more, errors)
    error.__cause__ = first
    return error
