"""Tasks: what an author describes, and where the results are found.

A task is an object and a mapping of the same fields. Each field is declared once: in the slots of
its class where most tasks have it, else as an `Option` or a `Result`, which is kept in a dict made
when needed. So a plain function task takes 0.9 us to make and 229 bytes (Python 3.11, one core of
a virtual machine).

Over 500 lines: the docstrings of two public constructors, and the checks of what authors give them.
"""

from __future__ import annotations

import asyncio
import copy
import difflib
import itertools
import os
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, MutableMapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from rhapsody.backends.constants import CANCELED, DONE, FAILED, NEW, TERMINAL_STATES
from rhapsody.runtime.arguments import elements, map_elements
from rhapsody.runtime.errors import TaskValidationError
from rhapsody.runtime.resources import Resources
from rhapsody.runtime.task import BoundInputs
from rhapsody.runtime.text import describe_error, safe_str

from .fields import FieldNames, Option, Result
from .validation import (
    ARGUMENT,
    check_inputs,
    check_prompt,
    check_timeout,
    check_uid,
    instance_of,
    integer,
    list_of,
    number,
)

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["AITask", "BaseTask", "ComputeTask", "as_task"]

SomeTask = TypeVar("SomeTask", bound="BaseTask")

_spare_uids: list[str] = []
_uid_blocks = itertools.count()
_UID_ENDS = [f"{number:03d}" for number in range(999, -1, -1)]
_NO_KWARGS: Mapping[str, Any] = {}  # of all tasks without; nobody is given it to write into

# Arguments of earlier versions, and what to write in their place.
_REMOVED = {
    "ranks": "resources=Resources(ranks=...)",
    "memory": "resources=Resources(memory_per_rank=...)",
    "gpu": "resources=Resources(gpus_per_rank=...)",
    "cpu_threads": "resources=Resources(cores_per_rank=...)",
    "environment": "task_backend_specific_kwargs={'env': ...}",
    "cwd": "task_backend_specific_kwargs={'cwd': ...}",
    "shell": "task_backend_specific_kwargs={'shell': True}",
}


def _check_after(value: Any, what: str) -> tuple[BaseTask, ...]:
    parents = (value,) if isinstance(value, (BaseTask, dict)) else value
    if not isinstance(parents, Iterable) or isinstance(parents, (str, Mapping)):
        raise TaskValidationError(f"{what} must be a list of tasks, not {value!r}")
    parents = tuple(parents)
    for parent in parents:
        if not isinstance(parent, (BaseTask, dict)):
            raise TaskValidationError(f"{what} must be a list of tasks, found {parent!r} in it")
    return parents


class BaseTask(MutableMapping[str, Any]):
    """What every task has: an identity, options, a state and results.

    Awaitable after `submit_tasks`: `await task` returns the task when it is DONE and raises the
    task's own exception when it FAILED; RuntimeError before it was submitted.

    Args:
        uid: `str` without `/`, unique within a session; made (`task.000001`) where none is given.
        backend: name of the backend to run on; the first compatible one where none is given.
        resources: what the task needs.
        retries: how many more times to run it after a failure.
        timeout: seconds that it may run.
        after: tasks that must be DONE before it starts; a plain dict there was submitted before.
        task_backend_specific_kwargs: options that only this backend knows.

    Raises:
        TaskValidationError: a field is unknown, of a wrong type, or missing.
    """

    _INPUT_SLOTS: ClassVar[tuple[str, ...]] = ("uid", "backend")
    _OUTCOME_SLOTS: ClassVar[tuple[str, ...]] = ("state", "return_value", "exception")
    _SESSION_SLOTS: ClassVar[tuple[str, ...]] = ("_bound", "_future", "_started", "_submitted")
    _SLOTS_WITH_TASKS: ClassVar[tuple[str, ...]] = ()
    __slots__ = (
        "__weakref__",
        "_options",
        "_results",
        *_INPUT_SLOTS,
        *_OUTCOME_SLOTS,
        *_SESSION_SLOTS,
    )

    uid: str
    backend: str | None
    state: str
    return_value: Any
    exception: BaseException | None
    _options: dict[str, Any] | None  # options that were set, and keys that others put there
    _results: dict[str, Any] | None  # results that were set
    _future: asyncio.Future[Any] | None
    _bound: BoundInputs | None
    _submitted: float  # seconds, monotonic clock
    _started: float

    resources = Option[Resources | None](None, instance_of(Resources, "Resources(...)"))
    retries = Option(0, integer(0))
    timeout = Option[float | None](None, check_timeout)
    after = Option[tuple["BaseTask", ...]]((), _check_after, holds_tasks=True)
    task_backend_specific_kwargs = Option[dict[str, Any]]({}, instance_of(dict, "a dict"))
    input_files = Option[list[str] | None](None, list_of((str, os.PathLike), "names"))
    output_files = Option[list[str] | None](None, list_of((str, os.PathLike), "names"))
    capture_stdio = Option(False, instance_of(bool, "True or False"))

    # What only a ComputeTask has; backends look at tasks of any class.
    function: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    _kwargs: Mapping[str, Any] = _NO_KWARGS

    kind: ClassVar[str] = ""
    _fields: ClassVar[FieldNames]
    _names: ClassVar[frozenset[str]]  # those of the fields, which every access looks up

    def __init_subclass__(cls) -> None:
        cls._fields = FieldNames.of(cls)
        cls._names = cls._fields.names

    # ------------------------------------------------------------------ results

    @Result
    def stdout(self) -> str | None:
        """Captured output; of a function, `str(return_value)`, made when it is read.

        With `capture_stdio=True`, the path of the file that has it.
        """
        if self.state == DONE and self.kind == "function":
            return safe_str(self.return_value)
        return None

    @Result
    def stderr(self) -> str | None:
        """Captured error output; of a failed function, its exception with the traceback.

        With `capture_stdio=True`, the path of the file that has it.
        """
        error = self.exception
        if error is None or self.kind != "function":
            return None
        trace = self._traceback or error.__traceback__
        return "".join(traceback.format_exception(type(error), error, trace))

    @Result
    def exit_code(self) -> int | None:
        """Exit code of an executable; of a function 0 when it is DONE and 1 when it FAILED."""
        return {DONE: 0, FAILED: 1}.get(self.state) if self.kind == "function" else None

    @Result
    def stdout_file(self) -> str | None:
        """Path of the file with the whole standard output, where it was large or asked for."""
        return None

    @Result
    def stderr_file(self) -> str | None:
        """Path of the file with the whole standard error, where it was large or asked for."""
        return None

    @Result
    def response(self) -> Any:
        """The answer to an `AITask`."""
        return None

    def result(self) -> Any:
        """What replaces the task in its children: return value, standard output or response."""
        if self.kind == "executable":
            return self.stdout
        return self.response if self.kind == "ai" else self.return_value

    def done(self) -> bool:
        """Whether the task has reached a terminal state."""
        return self.state in TERMINAL_STATES

    def __await__(self) -> Generator[Any, None, Any]:
        # Shielded: giving up the wait (a timeout around it, say) does not cancel what others await.
        return asyncio.shield(self._waitable()).__await__()

    def _waitable(self) -> asyncio.Future[Any]:
        """The task's future; a new one where the user canceled it but not the task."""
        future = self._future
        if future is None:
            raise RuntimeError(f"task '{self.uid}' was not submitted, so it cannot be awaited")
        if future.cancelled() and self.state != CANCELED:
            self._future = future = future.get_loop().create_future()
            if self.done():
                self._settle_future()
        return future

    def _settle_future(self) -> None:
        """Set the future to the task's end; a future that is done stays as it is."""
        future = self._future
        if future is None or future.done():
            return
        if self.state == DONE:
            future.set_result(self if self._options is None else self._submitted_object())
        elif self.state == CANCELED or self.exception is None:
            future.cancel()
        elif isinstance(self.exception, (StopIteration, asyncio.CancelledError)):
            # A future cannot carry these: the first is refused, the second means something else.
            wrapper = RuntimeError(f"task '{self.uid}' raised {describe_error(self.exception)}")
            wrapper.__cause__ = self.exception
            future.set_exception(wrapper)
            future.exception()
        else:
            # A future gives the traceback to the first who awaits it, and to nobody after that.
            self._traceback = self.exception.__traceback__
            future.set_exception(self.exception)
            # Seen on the task too, so a future that nobody awaits is not worth a warning.
            future.exception()

    @property
    def _traceback(self) -> TracebackType | None:
        return None if self._results is None else self._results.get("_traceback")

    @_traceback.setter
    def _traceback(self, value: TracebackType | None) -> None:
        if self._results is None:
            self._results = {}
        self._results["_traceback"] = value

    def _submitted_object(self) -> Any:
        """The object that the author submitted: the task, or the plain dict it was made from."""
        return self if self._options is None else self._options.get("_dict", self)

    def _copy_to_dict(self) -> None:
        """Write the outcome into the plain dict from which the task was made, if it was."""
        if self._options is not None and "_dict" in self._options:
            given = self._options["_dict"]
            for name in ("backend", *self._fields.outcome):
                given[name] = self[name]

    # ------------------------------------------------------------------ the mapping

    def __getitem__(self, key: str) -> Any:
        if key in self._names:
            return getattr(self, key)
        if self._options is not None and key in self._options:
            return self._options[key]
        raise KeyError(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a field, or the default where there is no such field.

        An empty list or dict of a field that was not set is not the task's own.
        """
        if (option := self._fields.options.get(key)) is not None:
            return option.peek(self)
        return getattr(self, key) if key in self._names else super().get(key, default)

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self._names:
            setattr(self, key, value)
            return
        if self._options is None:
            self._options = {}
        self._options[key] = value

    def __delitem__(self, key: str) -> None:
        if self._options is None or key not in self._options:
            raise KeyError(key)
        del self._options[key]

    def __iter__(self) -> Iterator[str]:
        fields = self._fields
        yield from (*fields.inputs, *fields.options, *fields.outcome)
        for key in self._options or ():
            if key not in self._names and not key.startswith("_"):
                yield key

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getattr__(self, name: str) -> Any:
        # A slot that was never set: what construction leaves out costs nothing there.
        if name in self._fields.slots:
            return None
        if not name.startswith("_"):  # a key that somebody put into the mapping
            options = self._options
            if options is not None and name in options:
                return options[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.uid} {self.state}>"

    def __copy__(self) -> Self:
        return _restore(type(self), self._state())

    def __reduce__(self) -> tuple[Any, ...]:
        state = self._state()
        if self._traceback is not None:  # a traceback does not pickle, its text does
            state["_results"] = {**(self._results or {}), "stderr": self.stderr, "_traceback": None}
        for values in (state, state["_options"] or {}):
            for name in self._fields.holding_tasks & values.keys():
                values[name] = _flatten(values[name])
        return _restore, (type(self), state)

    def _state(self) -> dict[str, Any]:
        names = self._fields.slots.difference(self._SESSION_SLOTS)
        state = {name: getattr(self, name) for name in names}
        if self._options is not None:
            state["_options"] = {n: v for n, v in self._options.items() if n != "_dict"}
        return state

    def _reference(self) -> Self:
        """A copy of an ended or submitted parent, without that parent's own parents."""
        twin = copy.copy(self)
        for name in self._fields.holding_tasks:
            if twin._options is not None:
                twin._options.pop(name, None)
        if isinstance(twin, ComputeTask):
            twin.args, twin._kwargs = (), _NO_KWARGS
        return twin

    # ------------------------------------------------------------------ construction

    def _begin(self, uid: str | None, backend: str | None) -> None:
        try:
            self.uid = _spare_uids.pop() if uid is None else check_uid(uid)
        except IndexError:
            self.uid = _make_uids()
        self.backend = backend
        self.state = NEW
        self._options = self._future = self._bound = None

    def _take_options(self, options: dict[str, Any]) -> None:
        """Check and keep the keyword arguments that are options."""
        known = self._fields.options
        if unknown := [name for name in options if name not in known]:
            raise TaskValidationError(f"task '{self.uid}': {_explain(unknown[0], type(self))}")
        for name, value in options.items():
            if value is None:
                continue
            option = known[name]
            check = option.check
            option.__set__(self, check(value, f"task '{self.uid}': {name}") if check else value)
        if self.backend is not None and not isinstance(self.backend, str):
            raise TaskValidationError(
                f"task '{self.uid}': backend must be the name of a backend, not {self.backend!r}"
            )


BaseTask._fields = FieldNames.of(BaseTask)
BaseTask._names = BaseTask._fields.names


class ComputeTask(BaseTask):
    """A function or an executable to run.

    Args:
        executable: program to run, a name on the PATH or a path; this or `function` is given.
        function: any callable, sync or async.
        arguments: list of arguments of the executable; numbers and paths are converted to `str`, a
            task is replaced by its result.
        args, kwargs: arguments of the function; a task among them, or directly in a list, tuple or
            dict among them, is awaited and replaced by its result. Deeper ones are not looked for:
            the function gets them as they are. A plain dict there is data, never a task.
        input_files, output_files: names of files that the task reads and writes.
        capture_stdio: stream the output to files in the session's folder; `stdout` and `stderr`
            are then their paths.

    The other arguments, and the errors, are those of `BaseTask`.
    """

    _INPUT_SLOTS = ("executable", "function", "args", "_kwargs")
    _SLOTS_WITH_TASKS = ("args", "_kwargs")
    __slots__ = _INPUT_SLOTS

    executable: str | None

    arguments = Option[list[Any]]([], holds_tasks=True)

    def __init__(
        self,
        executable: str | os.PathLike[str] | None = None,
        function: Callable[..., Any] | None = None,
        arguments: list[Any] | tuple[Any, ...] | None = None,
        args: tuple[Any, ...] | list[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        uid: str | None = None,
        input_files: list[str] | None = None,
        output_files: list[str] | None = None,
        capture_stdio: bool = False,
        *,
        backend: str | None = None,
        **options: Any,
    ) -> None:
        # The statements of `_begin`: a call of it would take half as long again.
        try:
            self.uid = _spare_uids.pop() if uid is None else check_uid(uid)
        except IndexError:
            self.uid = _make_uids()
        self.backend = backend
        self.state = NEW
        self._options = self._future = self._bound = None
        self.function = function
        self.args = () if args is None else args  # type: ignore[assignment]
        self._kwargs = _NO_KWARGS if kwargs is None else kwargs
        if function is None or executable is not None:
            if executable is None and options:  # perhaps `executable` is misspelt there
                self._take_options(options)
            self._take_executable(executable, arguments)
        elif not callable(function):
            raise TaskValidationError(
                f"task '{self.uid}': function must be a callable, not {function!r}"
            )
        elif arguments:
            raise TaskValidationError(
                f"task '{self.uid}': arguments are an executable's; a function has args and kwargs"
            )
        if args is not None or kwargs is not None:
            check_inputs(self.args, self._kwargs, self.uid)
        if options or backend or input_files or output_files or capture_stdio:
            options.update(
                input_files=input_files, output_files=output_files, capture_stdio=capture_stdio
            )
            self._take_options(options)

    @property
    def kwargs(self) -> Mapping[str, Any]:
        """The function's keyword arguments."""
        if self._kwargs is not _NO_KWARGS:
            return self._kwargs
        empty: dict[str, Any] = {}
        if self.state == NEW:  # the author may put something into it
            self._kwargs = empty
        return empty

    @kwargs.setter
    def kwargs(self, value: Mapping[str, Any]) -> None:
        self._kwargs = value

    @property
    def kind(self) -> str:  # type: ignore[override]
        """`"function"` or `"executable"`."""
        return "executable" if self.function is None else "function"

    def _take_executable(self, executable: Any, arguments: Any) -> None:
        if executable is None or self.function is not None:
            found = "neither" if executable is None else "both"
            raise TaskValidationError(
                f"task '{self.uid}': exactly one of executable= and function= is accepted,"
                f" found {found}"
            )
        if not isinstance(executable, (str, os.PathLike)) or not os.fspath(executable):
            raise TaskValidationError(
                f"task '{self.uid}': executable must be a program's name or path,"
                f" not {executable!r}"
            )
        self.executable = os.fspath(executable)
        if arguments is not None:
            if not isinstance(arguments, (list, tuple)):
                raise TaskValidationError(
                    f"task '{self.uid}': arguments must be a list, not {arguments!r}"
                )
            for argument in arguments:
                if not isinstance(argument, (*ARGUMENT, BaseTask)):
                    raise TaskValidationError(
                        f"task '{self.uid}': an argument must be a str, a number, a path or a task,"
                        f" not {argument!r}"
                    )
            self.arguments = list(arguments)
        if self.args or self._kwargs:
            raise TaskValidationError(
                f"task '{self.uid}': args and kwargs are a function's; an executable has arguments"
            )


class AITask(BaseTask):
    """A request to a language model; the answer is `task.response`.

    Args:
        prompt: a `str`, or a list of `str` or of chat messages.
        model: name of the model; this, `inference_endpoint` or `backend` must be given.
        inference_endpoint: address of an inference service.
        system_prompt: what the model is told first.
        temperature, max_tokens, top_p, top_k, stop_sequences: parameters of the sampling, as the
            model's service defines them.

    The other arguments, and the errors, are those of `BaseTask`.
    """

    __slots__ = ()

    kind = "ai"

    prompt = Option[str | list[Any]]("")  # checked apart: it may not be missing
    model = Option[str | None](None, instance_of(str, "a str"))
    inference_endpoint = Option[str | None](None, instance_of(str, "a str"))
    system_prompt = Option[str | None](None, instance_of(str, "a str"))
    temperature = Option[float | None](None, number(0, float("inf"), "a number of at least 0"))
    max_tokens = Option[int | None](None, integer(1))
    top_p = Option[float | None](None, number(0, 1, "a number from 0 to 1"))
    top_k = Option[int | None](None, integer(-1, " (all)"))
    stop_sequences = Option[list[str] | None](None, list_of((str,), "str"))

    def __init__(
        self,
        prompt: str | list[Any],
        model: str | None = None,
        inference_endpoint: str | None = None,
        system_prompt: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        stop_sequences: list[str] | None = None,
        uid: str | None = None,
        backend: str | None = None,
        **options: Any,
    ) -> None:
        self._begin(uid, backend)
        check_prompt(prompt, f"task '{self.uid}': prompt")
        if not (model or inference_endpoint or backend):
            raise TaskValidationError(
                f"task '{self.uid}': one of model=, inference_endpoint= and backend= is needed"
            )
        self._take_options(
            {
                "prompt": prompt,
                "model": model,
                "inference_endpoint": inference_endpoint,
                "system_prompt": system_prompt,
                "temperature": temperature,
                "max_tokens": max_tokens,
                "top_p": top_p,
                "top_k": top_k,
                "stop_sequences": stop_sequences,
                **options,
            }
        )


def _make_uids() -> str:
    """Return a uid, and keep 999 more, which makes them five times as fast as one by one."""
    block = next(_uid_blocks)
    prefix = f"task.{block:03d}"
    uids = [prefix + end for end in _UID_ENDS]
    if not block:
        uids.pop()  # the first is task.000001
    uid = uids.pop()
    _spare_uids.extend(uids)
    return uid


def as_task(given: Any) -> BaseTask:
    """Return the task, or the task that a plain dict describes.

    The dict gets the task's uid at once, and its results when the task is settled.

    Raises:
        TaskValidationError: it is neither, or the dict describes no task.
    """
    if isinstance(given, BaseTask):
        return given
    if not isinstance(given, dict):
        raise TaskValidationError(
            f"a task must be a ComputeTask, an AITask or a dict, not {type(given).__name__}"
        )
    outcome = BaseTask._fields.outcome
    fields = {str(name): value for name, value in given.items() if name not in outcome}
    task: BaseTask = AITask(**fields) if "prompt" in fields else ComputeTask(**fields)
    task["_dict"] = given
    given["uid"] = task.uid
    return task


def _flatten(values: Any) -> Any:
    """Replace parents that have been submitted by references to them.

    Else all their ancestors would be pickled too, in a chain deeper than Python's recursion limit.
    A graph that is new stays whole, so that it can be submitted where it arrives.
    """

    def refer(value: Any) -> Any:
        return value._reference() if _is_submitted(value) else value

    def refer_inside(value: Any) -> Any:
        return map_elements(value, refer) if any(map(_is_submitted, elements(value))) else value

    return map_elements(values, refer_inside)


def _is_submitted(value: Any) -> bool:
    return isinstance(value, BaseTask) and value.state != NEW


def _restore(cls: type[SomeTask], state: dict[str, Any]) -> SomeTask:
    task = cls.__new__(cls)
    for name, value in state.items():
        setattr(task, name, value)
    # A copy, which is made this way too, has fields of its own.
    for name in ("_options", "_results"):
        setattr(task, name, state[name] and {**state[name]})
    return task


def _explain(name: str, cls: type[BaseTask]) -> str:
    """Describe an unknown keyword argument, and what to write in its place."""
    if name in _REMOVED:
        return f"'{name}' is no longer a task's own argument; use {_REMOVED[name]}"
    known = sorted((*cls._fields.inputs, *cls._fields.options))
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    return f"unknown argument '{name}'{hint}; accepted: {', '.join(known)}"
