"""Serialises tasks for Dask, with placeholders for the results of parents that it has."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Mapping, MutableMapping
from functools import partial
from typing import Any

from rhapsody.runtime import serialization
from rhapsody.runtime.arguments import arguments_of, inputs_of, map_elements
from rhapsody.runtime.errors import DependencyError, TaskValidationError
from rhapsody.runtime.local.executables import describe
from rhapsody.runtime.task import Task, kind_of
from rhapsody.runtime.text import argument_str, plain_str

from .capacity import requested_resources
from .task import DaskTask
from .worker_plugin import Call, OpaqueBytes, Placeholder, Program, run_function, run_program

__all__ = ["TaskSerializer"]


class TaskSerializer:
    """Turns the tasks of one backend into `DaskTask`s.

    Args:
        plugin: the name of the backend's plugins on the cluster.
        by_uid: the tasks whose owner has not been told their end yet.
        work_dir: returns the folder for output files.
    """

    def __init__(
        self, plugin: str, by_uid: Mapping[str, DaskTask], work_dir: Callable[[], str]
    ) -> None:
        self._plugin = plugin
        self._by_uid = by_uid
        self._work_dir = work_dir
        self._key_suffix = plugin.rpartition("-")[2]
        self._numbers = itertools.count()
        self._marker = ""

    def close(self) -> None:
        """Remove the marker file."""
        if self._marker:
            os.unlink(self._marker)
            self._marker = ""

    def serialize(self, submitted: Task, pickled: dict[int, bytes]) -> DaskTask:
        """Pickle a task's call; `pickled` caches the functions of one burst, by their `id`.

        Raises:
            SerializationError: it cannot be pickled.
            DependencyError: a parent has failed or was canceled.
            TaskValidationError: its option `key` is that of another task.
        """
        options = submitted.get("task_backend_specific_kwargs") or {}
        task = DaskTask(submitted, options)
        if kind_of(submitted) == "function":
            self._serialize_function(task, pickled)
        else:
            self._serialize_executable(task)
        for parent in submitted.get("after") or ():
            self._resolve(task, parent)
        task.resources = requested_resources(submitted, options)
        task.depth = 1 + max((parent.depth for parent in task.parents), default=-1)
        return task

    def _serialize_function(self, task: DaskTask, pickled: dict[int, bytes]) -> None:
        function = task.submitted["function"]
        task.key = self._key(task, getattr(function, "__name__", None) or type(function).__name__)
        data = pickled.get(id(function))
        if data is None:
            data = pickled[id(function)] = serialization.dumps(function, "function")
        args, kwargs = inputs_of(task.submitted)
        resolve = partial(self._resolve, task)
        arguments = (
            [map_elements(value, resolve) for value in args],
            {name: map_elements(value, resolve) for name, value in kwargs.items()},
        )
        task.payload = Call(
            self._plugin, task.key, data, serialization.dumps(arguments, "arguments")
        )
        task.function = run_function

    def _serialize_executable(self, task: DaskTask) -> None:
        submitted = task.submitted
        task.key = self._key(task, os.path.basename(os.fspath(submitted["executable"])))
        arguments = [self._resolve(task, argument) for argument in arguments_of(submitted)]
        words = [
            plain_str(submitted["executable"]),
            *(arg if isinstance(arg, Placeholder) else argument_str(arg) for arg in arguments),
        ]
        executable = describe(submitted, words=())
        if isinstance(executable.stdin, str):  # a path, relative to a folder of the client
            path = os.path.join(executable.cwd or os.getcwd(), executable.stdin)
            executable = executable._replace(stdin=path)
        task.captured = executable.capture
        program = Program(
            self._plugin, task.key, executable, words, self._work_dir(), self._marker_path()
        )
        task.payload = OpaqueBytes(serialization.dumps(program, "executable"))
        task.function = run_program

    def _key(self, task: DaskTask, name: str) -> str:
        """Return Dask's key of a task; Dask's dashboard shows the part before the dash."""
        own = task.options.get("key")
        if own is None:
            # A file's name may have bytes that are no UTF-8, and Dask's messages take none.
            name = name.encode(errors="replace").decode()
            return f"{name}-{self._key_suffix}.{next(self._numbers)}"
        for other in self._by_uid.values():
            if other.key == own:
                raise TaskValidationError(
                    f"task '{task.uid}': the key {own!r} is that of task '{other.uid}'"
                )
        return str(own)

    def _marker_path(self) -> str:
        """Return a file in the working folder; a worker that finds it shares that folder."""
        folder = self._work_dir()
        if os.path.dirname(self._marker) != folder:
            self.close()
            fd, self._marker = tempfile.mkstemp(prefix=".rhapsody-", dir=folder)
            os.close(fd)
        return self._marker

    def _resolve(self, task: DaskTask, value: Any) -> Any:
        """Return an argument; of a parent its result, or a placeholder if Dask still has it.

        Raises:
            DependencyError: the parent has failed or was canceled.
        """
        if not isinstance(value, MutableMapping) or isinstance(value, dict):
            return value
        uid = getattr(value, "uid", None)
        parent = self._by_uid.get(uid) if isinstance(uid, str) else None
        if parent is not None and parent.submitted is value:
            if parent not in task.parents:
                task.parents.append(parent)
                parent.children.append(task)
            return Placeholder(task.parents.index(parent))
        settled: Any = value
        if not hasattr(settled, "result") or not settled.done():
            return value
        if settled.state != "DONE":
            raise DependencyError(task.uid, settled.uid, settled.exception)
        return settled.result()
