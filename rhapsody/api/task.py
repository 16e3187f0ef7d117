"""Tasks: what an author describes, and where the results are found.

Longer than other modules for the docstrings and checks of what authors write.
A task is an object and a mapping of the same fields. What few tasks use (options, and what an
executable printed) lives in small dictionaries made when needed, so that a plain function task
costs a microsecond and a quarter of a kilobyte.
"""

from __future__ import annotations

import asyncio
import copy
import difflib
import itertools
import os
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast, overload

from rhapsody.runtime.arguments import elements, map_elements
from rhapsody.runtime.errors import TaskValidationError
from rhapsody.runtime.resources import Resources
from rhapsody.runtime.text import describe_error, safe_str

from .validation import ARGUMENT, CHECKS, check_inputs, check_prompt, check_uid

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["TERMINAL", "AITask", "BaseTask", "ComputeTask", "as_task"]

T = TypeVar("T")
SomeTask = TypeVar("SomeTask", bound="BaseTask")

_spare_uids: list[str] = []
_uid_blocks = itertools.count()
_UID_ENDS = [f"{number:03d}" for number in range(999, -1, -1)]
TERMINAL = frozenset({"DONE", "FAILED", "CANCELED"})

_REMOVED = {
    "ranks": "resources=Resources(ranks=...)",
    "memory": "resources=Resources(memory_per_rank=...)",
    "gpu": "resources=Resources(gpus_per_rank=...)",
    "cpu_threads": "resources=Resources(cores_per_rank=...)",
    "environment": "task_backend_specific_kwargs={'env': ...}",
    "cwd": "task_backend_specific_kwargs={'cwd': ...}",
    "shell": "task_backend_specific_kwargs={'shell': True}",
}


class _Option(Generic[T]):
    """A field that few tasks set: kept in the task's option dictionary, made on first use."""

    def __init__(self, default: T) -> None:
        self.default = default
        self.grows = isinstance(default, (list, dict))  # the author may put something into it

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, task: None, owner: type) -> Self: ...
    @overload
    def __get__(self, task: BaseTask, owner: type) -> T: ...
    def __get__(self, task: BaseTask | None, owner: type) -> T | Self:
        if task is None:
            return self
        options = task._options
        if options is not None and self.name in options:
            return cast("T", options[self.name])
        if not self.grows:
            return self.default
        empty = copy.copy(self.default)
        if task.state == "NEW":  # later nobody would look into it, and other threads read the task
            self.__set__(task, empty)
        return empty

    def __set__(self, task: BaseTask, value: T) -> None:
        if task._options is None:
            task._options = {}
        task._options[self.name] = value


class BaseTask(MutableMapping[str, Any]):
    """What every task has: an identity, options, a state and results.

    Awaitable after `submit_tasks`: `await task` returns the task when it is DONE and raises the
    task's own exception when it FAILED; RuntimeError before it was submitted.

    Args:
        uid: unique within a session; made (`task.000001`) where none is given.
        backend: name of the backend to run on; the first compatible one where none is given.
        resources: what the task needs.
        retries: how many more times to run it after a failure.
        timeout: seconds that it may run.
        after: tasks that must be DONE before it starts; a plain dict there was submitted before.
        task_backend_specific_kwargs: options that only this backend knows.

    Raises:
        TaskValidationError: a field is unknown, of a wrong type, or missing.
    """

    __slots__ = (
        "__weakref__",
        "_bound",
        "_future",
        "_options",
        "_results",
        "_started",
        "_submitted",
        "backend",
        "exception",
        "return_value",
        "state",
        "uid",
    )

    uid: str
    backend: str | None
    state: str
    return_value: Any
    exception: BaseException | None
    _options: dict[str, Any] | None  # what few tasks set, and keys that others put there
    _results: dict[str, Any] | None  # what an executable or an AI request left
    _future: asyncio.Future[Any] | None
    _bound: dict[str, Any] | None  # args, kwargs and arguments with the parents' results in place
    _submitted: float  # seconds, monotonic clock
    _started: float

    resources = _Option[Resources | None](None)
    retries = _Option(0)
    timeout = _Option[float | None](None)
    after = _Option[tuple["BaseTask", ...]](())
    task_backend_specific_kwargs = _Option[dict[str, Any]]({})
    input_files = _Option[list[str] | None](None)
    output_files = _Option[list[str] | None](None)
    capture_stdio = _Option(False)

    kind: ClassVar[str] = ""
    _option_fields: ClassVar[tuple[str, ...]] = (
        "resources",
        "retries",
        "timeout",
        "after",
        "task_backend_specific_kwargs",
        "input_files",
        "output_files",
        "capture_stdio",
    )
    _outcome: ClassVar[tuple[str, ...]] = (
        "state",
        "stdout",
        "stderr",
        "exit_code",
        "stdout_file",
        "stderr_file",
        "return_value",
        "response",
        "exception",
    )

    # ------------------------------------------------------------------ results

    def _result(self, name: str) -> Any:
        return None if self._results is None else self._results.get(name)

    def _set_result(self, name: str, value: Any) -> None:
        if self._results is None:
            self._results = {}
        self._results[name] = value

    @property
    def stdout(self) -> str | None:
        """Captured text; of a function, `str(return_value)`, made when it is read.

        With `capture_stdio=True` the path of the file that holds it.
        """
        text: str | None = self._result("stdout")
        if text is None and self.state == "DONE" and self.kind == "function":
            return safe_str(self.return_value)
        return text

    @stdout.setter
    def stdout(self, value: str | None) -> None:
        self._set_result("stdout", value)

    @property
    def stderr(self) -> str | None:
        """Captured text; of a failed function, its exception with the traceback."""
        text: str | None = self._result("stderr")
        error = self.exception
        if text is None and error is not None and self.kind == "function":
            trace = self._result("_trace") or error.__traceback__
            return "".join(traceback.format_exception(type(error), error, trace))
        return text

    @stderr.setter
    def stderr(self, value: str | None) -> None:
        self._set_result("stderr", value)

    @property
    def exit_code(self) -> int | None:
        """Exit code of an executable; of a function 0 when it is DONE and 1 when it FAILED."""
        code: int | None = self._result("exit_code")
        if code is None and self.kind == "function":
            return {"DONE": 0, "FAILED": 1}.get(self.state)
        return code

    @exit_code.setter
    def exit_code(self, value: int | None) -> None:
        self._set_result("exit_code", value)

    @property
    def response(self) -> Any:
        """The answer to an `AITask`."""
        return self._result("response")

    @response.setter
    def response(self, value: Any) -> None:
        self._set_result("response", value)

    @property
    def stdout_file(self) -> str | None:
        """Path of the file with the whole standard output, where it was large or asked for."""
        return self._result("stdout_file")  # type: ignore[no-any-return]

    @stdout_file.setter
    def stdout_file(self, value: str | None) -> None:
        self._set_result("stdout_file", value)

    @property
    def stderr_file(self) -> str | None:
        """Path of the file with the whole standard error, where it was large or asked for."""
        return self._result("stderr_file")  # type: ignore[no-any-return]

    @stderr_file.setter
    def stderr_file(self, value: str | None) -> None:
        self._set_result("stderr_file", value)

    def result(self) -> Any:
        """What the task's children get for it: return value, standard output or response."""
        if self.kind == "executable":
            return self.stdout
        return self.response if self.kind == "ai" else self.return_value

    def done(self) -> bool:
        """Whether the task has reached a terminal state."""
        return self.state in TERMINAL

    def __await__(self) -> Generator[Any, None, Any]:
        # Shielded: giving up the wait (a timeout around it, say) does not cancel what others await.
        return asyncio.shield(self._waitable()).__await__()

    def _waitable(self) -> asyncio.Future[Any]:
        """The task's future; a new one where the user canceled it but not the task."""
        future = self._future
        if future is None:
            raise RuntimeError(f"task '{self.uid}' was not submitted, so it cannot be awaited")
        if future.cancelled() and self.state != "CANCELED":
            self._future = future = future.get_loop().create_future()
            if self.done():
                self._settle_future()
        return future

    def _settle_future(self) -> None:
        """Give the future what the terminal state says; a future that is done stays as it is."""
        future = self._future
        if future is None or future.done():
            return
        if self.state == "DONE":
            future.set_result(self._submitted_object())
        elif self.state == "CANCELED" or self.exception is None:
            future.cancel()
        elif isinstance(self.exception, (StopIteration, asyncio.CancelledError)):
            # A future cannot carry these: the first is refused, the second means something else.
            wrapper = RuntimeError(f"task '{self.uid}' raised {describe_error(self.exception)}")
            wrapper.__cause__ = self.exception
            future.set_exception(wrapper)
            future.exception()
        else:
            # A future gives the traceback to the first who awaits it, and to nobody after that.
            self._set_result("_trace", self.exception.__traceback__)
            future.set_exception(self.exception)
            # Seen on the task too, so a future that nobody awaits is not worth a warning.
            future.exception()

    def _submitted_object(self) -> Any:
        """What the author submitted: the task, or the plain dict it was made from."""
        return self if self._options is None else self._options.get("_dict", self)

    # ------------------------------------------------------------------ the mapping

    _fields: ClassVar[tuple[str, ...]] = ("uid", "backend", *_option_fields, *_outcome)
    _field_set: ClassVar[frozenset[str]] = frozenset(_fields)

    def __getitem__(self, key: str) -> Any:
        if key in self._field_set:
            return getattr(self, key)
        if self._options is not None and key in self._options:
            return self._options[key]
        raise KeyError(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a field, or the default where there is no such field.

        Where nothing is in a field, an empty list or dict that is got so is not the task's own.
        """
        if key in _GROWING and (self._options is None or key not in self._options):
            return _GROWING[key]()
        return getattr(self, key) if key in self._field_set else super().get(key, default)

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self._field_set:
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
        yield from self._fields
        for key in self._options or ():
            if key not in self._field_set and not key.startswith("_"):
                yield key

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getattr__(self, name: str) -> Any:
        # Reached for fields that were never set, and for keys that somebody put into the mapping.
        if name in _UNSET:
            return None
        if not name.startswith("_"):
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
        if self._result("_trace") is not None:  # a traceback does not pickle, its text does
            state["_results"] = {**(self._results or {}), "stderr": self.stderr, "_trace": None}
        for fields in (state, state["_options"] or {}):
            for name in _ABOUT_PARENTS & fields.keys():
                fields[name] = _flatten(fields[name])
        return _restore, (type(self), state)

    def _state(self) -> dict[str, Any]:
        names = ("uid", "backend", "state", "return_value", "exception", "_options", "_results")
        state = {name: getattr(self, name) for name in (*names, *self._constructor_fields)}
        if self._options is not None:
            state["_options"] = {n: v for n, v in self._options.items() if n != "_dict"}
        return state

    def _reference(self) -> Self:
        """Who a parent is, how it ended and with what, without its own parents."""
        twin = copy.copy(self)
        for name in _ABOUT_PARENTS:
            if twin._options is not None:
                twin._options.pop(name, None)
        if isinstance(twin, ComputeTask):
            twin.args, twin._kwargs = (), _NO_KWARGS
        return twin

    # ------------------------------------------------------------------ construction

    _constructor_fields: ClassVar[tuple[str, ...]] = ()

    def _begin(self, uid: str | None, backend: str | None) -> None:
        try:
            self.uid = _spare_uids.pop() if uid is None else check_uid(uid)
        except IndexError:
            self.uid = _make_uids()
        self.backend = backend
        self.state = "NEW"
        self._options = self._future = self._bound = None

    def _take_options(self, options: dict[str, Any]) -> None:
        """Check and keep the keyword arguments that are not the plain few."""
        unknown = [name for name in options if name not in self._option_fields]
        if unknown:
            raise TaskValidationError(f"task '{self.uid}': {_explain(unknown[0], type(self))}")
        for name, value in options.items():
            if value is None:
                continue
            check = _CHECKS.get(name)
            self[name] = check(value, f"task '{self.uid}': {name}") if check else value
        if self.backend is not None and not isinstance(self.backend, str):
            raise TaskValidationError(
                f"task '{self.uid}': backend must be the name of a backend, not {self.backend!r}"
            )


class ComputeTask(BaseTask):
    """A function or an executable to run.

    Args:
        executable: program to run, a name on the PATH or a path; this or `function` is given.
        function: any callable, sync or async.
        arguments: of the executable, a list; numbers and paths are turned into text, a task is
            replaced by its result.
        args, kwargs: of the function; a task among them is awaited and replaced by its result, and
            so is one directly in a list, tuple or dict there. Deeper ones are not looked for: the
            function gets them as they are. A plain dict there is data, never a task.
        input_files, output_files: names of files that the task reads and writes.
        capture_stdio: stream the output to files in the session's folder; `stdout` and `stderr`
            are then their paths.

    The other arguments, and the errors, are those of `BaseTask`.
    """

    __slots__ = ("_kwargs", "args", "executable", "function")

    executable: str | None
    function: Callable[..., Any] | None
    args: tuple[Any, ...]
    _kwargs: Mapping[str, Any]

    arguments = _Option[list[Any]]([])

    _option_fields = (*BaseTask._option_fields, "arguments")
    _constructor_fields = ("executable", "function", "args", "_kwargs")
    _fields = (
        "uid",
        "backend",
        "executable",
        "function",
        "args",
        "kwargs",
        *_option_fields,
        *BaseTask._outcome,
    )
    _field_set = frozenset(_fields)

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
        # The statements of `_begin`, which a call would make half as expensive again.
        try:
            self.uid = _spare_uids.pop() if uid is None else check_uid(uid)
        except IndexError:
            self.uid = _make_uids()
        self.backend = backend
        self.state = "NEW"
        self._options = self._future = self._bound = None
        self.function = function
        self.args = () if args is None else args  # type: ignore[assignment]
        self._kwargs = _NO_KWARGS if kwargs is None else kwargs
        if function is None or executable is not None:
            if executable is None and options:  # a typo in it: say that
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
            check_inputs(self.uid, self.args, self._kwargs)
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
        if self.state == "NEW":  # the author may put something into it
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
                        f"task '{self.uid}': an argument must be text, a number, a path or a task,"
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
        prompt: a text, or a list of texts or of chat messages.
        model: name of the model; this, `inference_endpoint` or `backend` must be given.
        inference_endpoint: address of an inference service.
        system_prompt: what the model is told first.
        temperature, max_tokens, top_p, top_k, stop_sequences: of the sampling, as the model's
            service defines them.

    The other arguments, and the errors, are those of `BaseTask`.
    """

    __slots__ = ()

    kind = "ai"
    _option_fields = (
        *BaseTask._option_fields,
        "prompt",
        "model",
        "inference_endpoint",
        "system_prompt",
        "temperature",
        "max_tokens",
        "top_p",
        "top_k",
        "stop_sequences",
    )

    _fields = ("uid", "backend", *_option_fields, *BaseTask._outcome)
    _field_set = frozenset(_fields)

    prompt = _Option[str | list[Any]]("")
    model = _Option[str | None](None)
    inference_endpoint = _Option[str | None](None)
    system_prompt = _Option[str | None](None)
    temperature = _Option[float | None](None)
    max_tokens = _Option[int | None](None)
    top_p = _Option[float | None](None)
    top_k = _Option[int | None](None)
    stop_sequences = _Option[list[str] | None](None)

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
        check_prompt(self.uid, prompt)
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


_NO_KWARGS: Mapping[str, Any] = {}  # of all tasks without; nobody is given it to write into
_GROWING: dict[str, type[Any]] = {"arguments": list, "task_backend_specific_kwargs": dict}


# Fields that are None until they are set: what is not stored at construction costs nothing there.
_UNSET = frozenset({"exception", "return_value", "executable", "_results"})


def _make_uids() -> str:
    """Return a uid, and put the other 999 of its block aside: one by one they cost five times."""
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
    outcome = BaseTask._outcome
    fields = {str(name): value for name, value in given.items() if name not in outcome}
    task: BaseTask = AITask(**fields) if "prompt" in fields else ComputeTask(**fields)
    task["_dict"] = given
    given["uid"] = task.uid
    return task


# Fields in which parents are.
_ABOUT_PARENTS = frozenset({"after", "args", "_kwargs", "arguments"})


def _flatten(values: Any) -> Any:
    """Put references in the places of parents that have been submitted.

    All that came before them would be pickled along, in a chain deeper than Python can go. A graph
    that is new stays whole, so that it can be submitted where it arrives.
    """

    def flat(value: Any) -> Any:
        return value._reference() if _is_past(value) else value

    def deeper(value: Any) -> Any:
        return map_elements(value, flat) if any(map(_is_past, elements(value))) else value

    return map_elements(values, deeper)


def _is_past(value: Any) -> bool:
    return isinstance(value, BaseTask) and value.state != "NEW"


def _restore(cls: type[SomeTask], state: dict[str, Any]) -> SomeTask:
    task = cls.__new__(cls)
    task._future = task._bound = None
    for name, value in state.items():
        setattr(task, name, value)
    # A copy, which is made this way too, has fields of its own.
    for name in ("_options", "_results"):
        setattr(task, name, state[name] and {**state[name]})
    return task


def _explain(name: str, cls: type[BaseTask]) -> str:
    """Say what to write in place of an unknown keyword."""
    if name in _REMOVED:
        return f"'{name}' is no longer a task's own argument; use {_REMOVED[name]}"
    known = sorted({*cls._fields} - {*cls._outcome})
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    return f"unknown argument '{name}'{hint}; accepted: {', '.join(known)}"


def _check_after(value: Any, what: str) -> tuple[BaseTask, ...]:
    parents = (value,) if isinstance(value, (BaseTask, dict)) else value
    if not isinstance(parents, Iterable) or isinstance(parents, (str, Mapping)):
        raise TaskValidationError(f"{what} must be a list of tasks, not {value!r}")
    parents = tuple(parents)
    for parent in parents:
        if not isinstance(parent, (BaseTask, dict)):
            raise TaskValidationError(f"{what} must be a list of tasks, found {parent!r} in it")
    return parents


_CHECKS = {**CHECKS, "after": _check_after}
