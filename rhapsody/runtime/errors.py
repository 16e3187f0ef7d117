"""The exception tree; users import it from `rhapsody.api.errors`.

RhapsodyError
├── TaskValidationError     bad input, found at construction or at submit
├── TaskExecutionError      an executable ended with a non-zero exit code
├── TaskTimeoutError        a task ran longer than its `timeout=`
├── DependencyError         a parent of the task did not end DONE
├── SerializationError      a function, argument, result or exception cannot be pickled
├── SessionError            the session was used in a way that it does not allow
├── ResourceError           the machine or cluster does not have what a task asks for
└── BackendError            the infrastructure failed, not the task
    └── WorkerLostError     the process or node that ran the task is gone
"""

from __future__ import annotations

from typing import Any

from .text import describe_error

__all__ = [
    "BackendError",
    "DependencyError",
    "ResourceError",
    "RhapsodyError",
    "SerializationError",
    "SessionError",
    "TaskExecutionError",
    "TaskTimeoutError",
    "TaskValidationError",
    "WorkerLostError",
]

_STDERR_SHOWN = 2000  # characters, about a screen: enough for what a program printed last


def _rebuild(
    cls: type[RhapsodyError], args: tuple[Any, ...], state: dict[str, Any]
) -> RhapsodyError:
    error = cls.__new__(cls, *args)
    error.args = args  # an OSError, such as a timeout, takes them in __init__ only
    error.__dict__.update(state)
    return error


class RhapsodyError(Exception):
    """Base of every error that RHAPSODY itself raises.

    Every error of the tree pickles, with its attributes.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception.__reduce__ calls cls(*args), which fails for constructors with other arguments.
        return _rebuild, (type(self), self.args, self.__dict__)


class _Refusal(RhapsodyError):  # noqa: N818 - a base, never raised itself
    """Raised when tasks were refused.

    `errors` maps the uid of each refused task to what is wrong with it; the other tasks of the
    same `submit_tasks` call were submitted.
    """

    def __init__(self, message: str, errors: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.errors = errors or {}


class TaskValidationError(_Refusal, ValueError):
    """Raised when a task is described wrongly, or asks a backend for what it cannot do."""


class TaskExecutionError(RhapsodyError):
    """Raised when an executable ended with a non-zero exit code, or could not be started.

    `exit_code` is the program's own, or the negative number of the signal that ended it; as in a
    shell, 127 for a program that does not exist and 126 for one that may not be run.
    `exit_codes` are those of all ranks of a job where the engine reports them, else None.
    """

    exit_codes: list[int] | None = None

    def __init__(self, uid: str, stderr: str | None = None, exit_code: int | None = None) -> None:
        self.uid = uid
        self.stderr = stderr
        self.exit_code = exit_code
        shown = (stderr or "").strip()
        if len(shown) > _STDERR_SHOWN:
            shown = "..." + shown[-_STDERR_SHOWN:]
        super().__init__(f"Task '{uid}' failed with exit code {exit_code}: {shown}")


class TaskTimeoutError(RhapsodyError, TimeoutError):
    """Raised when a task ran longer than its `timeout=`.

    `stopped` is False where the backend could not interrupt it: a synchronous function on a
    thread runs to its end, though its task is settled before.
    """

    def __init__(self, uid: str, timeout: float, *, stopped: bool = True) -> None:
        self.uid = uid
        self.timeout = timeout
        self.stopped = stopped
        rest = "" if stopped else "; it could not be interrupted and still runs"
        super().__init__(f"Task '{uid}' ran longer than its timeout of {timeout:g} s{rest}")


class DependencyError(RhapsodyError):
    """Raised for a task whose parent failed or was canceled.

    `cause` is the parent's error; where that is a DependencyError too, `root` is the error with
    which the chain began, else the cause. Both are None where it began with a canceled task. Of a
    chain, this error, its cause and the root are pickled.
    """

    def __init__(self, uid: str, parent: str, cause: BaseException | None = None) -> None:
        self.uid = uid
        self.parent = parent
        self.cause = cause
        self.root = cause
        before = ""
        if isinstance(cause, DependencyError):
            # Only the root is described, however long the chain is.
            self.root = cause.root
            before = "it was not run either: "
        canceled = "a task was canceled" if before else "it was canceled"
        root = self.root
        why = before + (canceled if root is None else describe_error(root))
        super().__init__(f"Task '{uid}' was not run, its parent '{parent}' did not succeed ({why})")
        # Not the cause: every link of a chain would be printed, and pickled by `tblib`, which
        # Dask installs for all exceptions.
        self.__cause__ = self.root

    def __reduce__(self) -> tuple[Any, ...]:
        state, cause = {**self.__dict__}, self.cause
        if isinstance(cause, DependencyError):  # a whole chain may pass the recursion limit
            known = {**cause.__dict__, "cause": cause.root}
            state["cause"] = _rebuild(type(cause), cause.args, known)
        return _rebuild, (type(self), self.args, state)


class SerializationError(RhapsodyError, TypeError):
    """Raised when a value for another process cannot be pickled, or not be unpickled there."""


class SessionError(RhapsodyError, RuntimeError):
    """Raised when a session is used in a way that it does not allow, or after `close`."""


class ResourceError(_Refusal):
    """Raised when a task asks for more than the machine or the cluster has."""


class BackendError(RhapsodyError):
    """Raised when the infrastructure failed rather than the task.

    `backend` is the backend's name, `host` the machine where it happened, and `transient` tells
    whether running the task again may help.
    """

    def __init__(
        self,
        message: str,
        *,
        backend: str | None = None,
        host: str | None = None,
        transient: bool = False,
    ) -> None:
        super().__init__(message)
        self.backend = backend
        self.host = host
        self.transient = transient


class WorkerLostError(BackendError):
    """Raised for the task whose worker process or node died under it."""
