"""Links that make the files of one task visible to another."""

from __future__ import annotations

import os
from typing import TypedDict

from rhapsody.runtime.errors import TaskValidationError
from rhapsody.runtime.task import Task

__all__ = ["DataLinks"]


class Link(TypedDict):
    """Paths, on the file system that the tasks share, of a file and of the link to it."""

    source: str
    target: str


class Links(TypedDict):
    """Paths of several links."""

    target: list[str]


class DataLinks:
    """Makes symbolic links in the folders of tasks; a part of `BaseExecutionBackend`."""

    def __init__(self) -> None:
        self._links: dict[str, str] = {}  # made here: what each points to, by path

    def link_explicit_data_deps(
        self,
        src_task: Task | None = None,
        dst_task: Task | None = None,
        file_name: str | None = None,
        file_path: str | None = None,
    ) -> Link:
        """Make a file of one task (or at `file_path`) visible to another, under its name.

        Raises:
            TaskValidationError: neither a producer nor a path, or no file name is given; or another
                file has that name already, other than a link made here before, which is replaced.
        """
        name = file_name or (os.path.basename(file_path) if file_path else None)
        if name is None or (src_task is None and file_path is None):
            raise TaskValidationError(
                "a data dependency needs a file_path, or a src_task and a file_name"
            )
        source = os.path.abspath(file_path or os.path.join(_folder(src_task), name))
        target = os.path.abspath(os.path.join(_folder(dst_task), os.path.basename(name)))
        if source != target:
            self._link(source, target)
        return {"source": source, "target": target}

    def link_implicit_data_deps(self, src_task: Task, dst_task: Task) -> Links:
        """Make the `output_files` of the producer visible to the consumer.

        Raises:
            TaskValidationError: as `link_explicit_data_deps`.
        """
        names = src_task.get("output_files") or []
        links = [self.link_explicit_data_deps(src_task, dst_task, name) for name in names]
        return {"target": [link["target"] for link in links]}

    def _link(self, source: str, target: str) -> None:
        current = os.readlink(target) if os.path.islink(target) else None
        if current == source:
            return
        if current is not None and current == self._links.get(target):
            os.unlink(target)  # made for an earlier task
        elif os.path.lexists(target):
            raise TaskValidationError(f"'{target}' exists, and is not a link to '{source}'")
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.symlink(source, target)
        self._links[target] = source


def _folder(task: Task | None) -> str:
    """The folder in which a task runs."""
    if task is None:
        return os.getcwd()
    options, resources = task.get("task_backend_specific_kwargs") or {}, task.get("resources")
    return os.fspath(options.get("cwd") or (resources and resources.cwd) or os.getcwd())
