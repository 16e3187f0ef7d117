"""From a task to what Dask is given: pickled calls, with places for the results of parents."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from rhapsody.runtime import serialization
from rhapsody.runtime.arguments import arguments_of, inputs_of
from rhapsody.runtime.errors import DependencyError, TaskValidationError
from rhapsody.runtime.task import Task, kind_of
from rhapsody.runtime.text import argument_str

from . import worker_plugin as remote
from .task import DaskTask, wanted

__all__ = ["TaskSerializer"]


class TaskSerializer:
    """Packs the tasks of one backend.

    Args:
        plugin: the name of the backend's plugins on the cluster.
        by_uid: the flights whose owner has not heard of their end yet.
        work_dir: returns the folder for output files.
    """

    def __init__(
        self, plugin: str, by_uid: Mapping[str, DaskTask], work_dir: Callable[[], str]
    ) -> None:
        self._plugin = plugin
        self._by_uid = by_uid
        self._work_dir = work_dir
        self._tag = plugin.rpartition("-")[2]
        self._numbers = itertools.count()
        self._marker = ""

    def close(self) -> None:
        """Remove the marker file."""
        if self._marker:
            os.unlink(self._marker)
            self._marker = ""

    def pack(self, task: Task, pickled: dict[int, bytes]) -> DaskTask:
        """Pickle a task's call; `pickled` keeps the functions of this burst, by identity.

        Raises:
            SerializationError: it cannot be pickled.
            DependencyError: a parent has ended, and not well.
            TaskValidationError: the key that it asks for is another task's.
        """
        options = task.get("task_backend_specific_kwargs") or {}
        flight = DaskTask(task, options)
        if kind_of(task) == "function":
            self._pack_function(flight, pickled)
        else:
            self._pack_program(flight, options)
        for parent in task.get("after") or ():
            self._slot(flight, parent)
        flight.wants = wanted(task, options)
        flight.wave = 1 + max((parent.wave for parent in flight.parents), default=-1)
        return flight

    def _pack_function(self, flight: DaskTask, pickled: dict[int, bytes]) -> None:
        function = flight.task["function"]
        name = getattr(function, "__name__", None) or type(function).__name__
        flight.key = self._key(flight, name)
        blob = pickled.get(id(function))
        if blob is None:
            blob = pickled[id(function)] = serialization.dumps(function, "function")
        given, named = inputs_of(flight.task)
        args = [self._slots(flight, value) for value in given]
        kwargs = {name: self._slots(flight, value) for name, value in named.items()}
        arguments = serialization.dumps((args, kwargs), "arguments")
        flight.call = remote.Call(self._plugin, flight.key, blob, arguments)
        flight.runner = remote.run_function

    def _pack_program(self, flight: DaskTask, options: Mapping[str, Any]) -> None:
        task = flight.task
        need = task.get("resources")
        name = os.path.basename(os.fspath(task["executable"]))
        flight.key = self._key(flight, name)
        env = {**((need and need.env) or {}), **(options.get("env") or {})}
        cwd = options.get("cwd") or (need and need.cwd)
        stdin = options.get("stdin")
        flight.captured = bool(task.get("capture_stdio"))
        program = remote.Program(
            plugin=self._plugin,
            key=flight.key,
            uid=flight.uid,
            argv=[task["executable"], *(self._word(flight, a) for a in arguments_of(task))],
            shell=bool(options.get("shell")),
            ranks=need.ranks if need else 1,
            cwd=os.path.abspath(cwd) if cwd else None,
            env=env,
            env_replace=bool(options.get("env_replace")),
            stdin=stdin.encode() if isinstance(stdin, str) else stdin and _path_or_bytes(stdin),
            capture=flight.captured,
            folder=self._work_dir(),
            marker=self._mark(),
        )
        flight.call = remote.OpaqueBytes(serialization.dumps(program, "executable"))
        flight.runner = remote.run_program

    def _key(self, flight: DaskTask, name: str) -> str:
        """Dask's key of a task; what is before the dash is its name on the dashboard."""
        own = flight.options.get("key")
        if own is None:
            # A file's name may hold what no message can.
            name = name.encode(errors="replace").decode()
            return f"{name}-{self._tag}.{next(self._numbers)}"
        for other in self._by_uid.values():
            if other.key == own:
                raise TaskValidationError(
                    f"task '{flight.uid}': the key {own!r} is that of task '{other.uid}'"
                )
        return str(own)

    def _word(self, flight: DaskTask, argument: Any) -> Any:
        value = self._slot(flight, argument)
        return value if isinstance(value, remote.Slot) else argument_str(value)

    def _mark(self) -> str:
        """A file in the working folder, by which a worker learns whether it sees that folder."""
        folder = self._work_dir()
        if os.path.dirname(self._marker) != folder:
            self.close()
            fd, self._marker = tempfile.mkstemp(prefix=".rhapsody-", dir=folder)
            os.close(fd)
        return self._marker

    # ------------------------------------------------------------------ dependencies within Dask

    def _slots(self, flight: DaskTask, value: Any) -> Any:
        """Replace parents that are still in flight by places for their results."""
        if type(value) in (list, tuple, set):
            return type(value)(self._slot(flight, inner) for inner in value)
        if type(value) is dict:
            return {name: self._slot(flight, inner) for name, inner in value.items()}
        return self._slot(flight, value)

    def _slot(self, flight: DaskTask, value: Any) -> Any:
        """Return a place for a parent's result, or what it has come to meanwhile.

        Raises:
            DependencyError: the parent has not succeeded.
        """
        if not isinstance(value, MutableMapping) or isinstance(value, dict):
            return value
        uid = getattr(value, "uid", None)
        parent = self._by_uid.get(uid) if isinstance(uid, str) else None
        if parent is not None and parent.task is value:
            if parent not in flight.parents:
                flight.parents.append(parent)
                parent.children.append(flight)
            return remote.Slot(flight.parents.index(parent))
        ended: Any = value
        if not hasattr(ended, "result") or not ended.done():
            return value
        if ended.state != "DONE":
            raise DependencyError(flight.uid, ended.uid, ended.exception)
        return ended.result()


def _path_or_bytes(stdin: Any) -> bytes | str:
    return stdin if isinstance(stdin, bytes) else os.path.abspath(stdin)
