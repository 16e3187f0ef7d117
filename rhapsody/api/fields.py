"""How a task keeps its fields: descriptors that declare them, and the names that follow."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar, cast, overload

from rhapsody.backends.constants import NEW

from .validation import Check

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["FieldNames", "Option", "Result"]

T = TypeVar("T")


class Owner(Protocol):
    """What the descriptors need of the task that they are fields of."""

    state: str
    _options: dict[str, Any] | None
    _results: dict[str, Any] | None


class Option(Generic[T]):
    """A field that the author may set, and few do: kept in a dict that is made for the first one.

    Args:
        default: its value until it is set. Of a list or dict each task has a copy of its own.
        check: returns the value that the constructor keeps, or raises TaskValidationError.
        holds_tasks: whether parents of the task are in it.
    """

    def __init__(
        self, default: T, check: Check[T] | None = None, *, holds_tasks: bool = False
    ) -> None:
        self.default = default
        self.check = check
        self.holds_tasks = holds_tasks
        self._mutable = isinstance(default, (list, dict))

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, task: None, owner: type) -> Self: ...
    @overload
    def __get__(self, task: Owner, owner: type) -> T: ...
    def __get__(self, task: Owner | None, owner: type) -> T | Self:
        if task is None:
            return self
        options = task._options
        if options is not None and self.name in options:
            return cast("T", options[self.name])
        if not self._mutable:
            return self.default
        empty = copy.copy(self.default)
        if task.state == NEW:  # the author may put something into it; later only others read it
            self.__set__(task, empty)
        return empty

    def __set__(self, task: Owner, value: T) -> None:
        if task._options is None:
            task._options = {}
        task._options[self.name] = value

    def peek(self, task: Owner) -> T:
        """Return the value without keeping a list or dict that is made for it."""
        options = task._options
        if options is not None and self.name in options:
            return cast("T", options[self.name])
        return copy.copy(self.default) if self._mutable else self.default


class Result(Generic[T]):
    """A field that is set when the task has ended: kept in a dict that is made for the first one.

    Decorates a method that returns the value of a task for which none was set.
    """

    def __init__(self, otherwise: Callable[[Any], T]) -> None:
        self._otherwise = otherwise
        self.__doc__ = otherwise.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, task: None, owner: type) -> Self: ...
    @overload
    def __get__(self, task: Owner, owner: type) -> T: ...
    def __get__(self, task: Owner | None, owner: type) -> T | Self:
        if task is None:
            return self
        results = task._results
        value = None if results is None else results.get(self.name)
        return self._otherwise(task) if value is None else cast("T", value)

    def __set__(self, task: Owner, value: T) -> None:
        if task._results is None:
            task._results = {}
        task._results[self.name] = value


class FieldNames(NamedTuple):
    """The names that follow from the declarations of a class of tasks."""

    inputs: tuple[str, ...]  # in slots, given by the author
    options: dict[str, Option[Any]]  # given by few authors
    outcome: tuple[str, ...]  # set by the session
    names: frozenset[str]  # of all these
    slots: frozenset[str]  # that a class declares
    holding_tasks: frozenset[str]  # slots and options in which parents are

    @classmethod
    def of(cls, task_class: type) -> FieldNames:
        """Collect the declarations of a class and its bases."""
        bases = [vars(base) for base in reversed(task_class.__mro__)]

        def declared(role: str) -> tuple[str, ...]:
            return tuple(name for base in bases for name in base.get(role, ()))

        options = {n: v for base in bases for n, v in base.items() if isinstance(v, Option)}
        results = (n for base in bases for n, v in base.items() if isinstance(v, Result))
        inputs = tuple(name.lstrip("_") for name in declared("_INPUT_SLOTS"))
        outcome = (*declared("_OUTCOME_SLOTS"), *results)
        with_tasks = (name for name, option in options.items() if option.holds_tasks)
        return cls(
            inputs=inputs,
            options=options,
            outcome=outcome,
            names=frozenset((*inputs, *options, *outcome)),
            slots=frozenset(declared("__slots__")) - {"__weakref__"},
            holding_tasks=frozenset((*declared("_SLOTS_WITH_TASKS"), *with_tasks)),
        )
